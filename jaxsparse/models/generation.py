"""Texts by a :class:`jaxsparse.models.GPT`, one token after the other."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxsparse.masks import as_key
from jaxsparse.models.gpt import GPT

__all__ = ["generate"]


def generate(
    model: GPT,
    params: Any,
    tokens: jax.Array,
    length: int,
    *,
    temperature: float = 0.0,
    key: ArrayLike | None = None,
) -> jax.Array:
    """Continue texts by a model: the most likely token after what is there, again and again, or one drawn at random.

    Reads ``tokens`` once, then one token a step, with the keys and values of the tokens before it kept. Compiled for
    each model, shape and length.

    Args:
      model: the model; of smaller params, :meth:`GPT.fitted`.
      params: its params.
      tokens: the texts to continue, (batch, at least 1), int.
      length: tokens of the results, those of ``tokens`` included, up to the model's ``max_length``.
      temperature: tokens are drawn from softmax(logits / temperature); 0 takes the most likely one.
      key: for the draws: an int or a key of ``jax.random``, needed if ``temperature`` is above 0.

    Returns:
      (batch, length), of the dtype of ``tokens``, which it starts with.

    Raises:
      ValueError: for a length that is not above that of the tokens or exceeds ``max_length``; for tokens that are not
        (batch, at least 1) ints, have a dtype too small for the vocabulary or, unless traced, are outside of it; and
        for a temperature that is negative or not finite, or one without a key.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsparse import models
      >>> model = models.GPT(vocab_size=50, width=16, num_layers=2)
      >>> text = jnp.array([[3, 14, 15], [9, 2, 6]])
      >>> params = model.init(jax.random.key(0), text)["params"]
      >>> models.generate(model, params, text, 8, temperature=0.5, key=0).shape
      (2, 8)
    """
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer) or not tokens.shape[1]:
        raise ValueError(
            f"generate needs tokens (batch, at least 1) of ints, got {tokens.dtype} of shape {tokens.shape}"
        )
    if jnp.iinfo(tokens.dtype).max < model.vocab_size - 1:
        raise ValueError(f"{tokens.dtype} cannot hold the {model.vocab_size} tokens of the vocabulary: give int32")
    if tokens.size and not isinstance(tokens, jax.core.Tracer) and tokens.is_fully_addressable:
        known = np.asarray(tokens)  # inside jit too, where the minimum of a constant would be traced
        least, most = int(known.min()), int(known.max())
        if least < 0 or most >= model.vocab_size:
            raise ValueError(f"tokens must be from 0 to {model.vocab_size - 1}, got {least} to {most}")
    if isinstance(length, bool) or not isinstance(length, int):
        raise ValueError(f"length must be an int, got {length!r}")
    if not tokens.shape[1] < length <= model.max_length:
        raise ValueError(
            f"length must be more than the {tokens.shape[1]} tokens that are there and at most the model's max_length="
            f"{model.max_length}, got {length}"
        )
    if not 0 <= temperature < math.inf:
        raise ValueError(f"generate needs a finite temperature of at least 0, got {temperature}")
    if temperature > 0 and key is None:
        raise ValueError("a temperature above 0 draws tokens: give key=, an int or a key of jax.random")
    draw, key = bool(temperature > 0), as_key(0 if key is None else key)
    temperature = jnp.float32(max(temperature, float(jnp.finfo(jnp.float32).tiny)))
    return _generate(model, length, draw, params, tokens, temperature, key)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(model, length, draw, params, tokens, temperature, key):
    def read(cache, tokens, key):
        logits, cache = model.apply({"params": params, **cache}, tokens, cache_length=length, mutable=["cache"])
        logits = logits[:, -1]
        if draw:
            logits -= logits.max(-1, keepdims=True)  # 0 and below, so that no quotient is infinity
            found = jax.random.categorical(key, logits / temperature)
        else:
            found = jnp.argmax(logits, -1)
        return cache, found.astype(tokens.dtype)

    def step(carry, key):
        cache, last = carry
        carry = read(cache, last[:, None], key)
        return carry, carry[1]

    keys = jax.random.split(key, length - tokens.shape[1])
    carry = read({}, tokens, keys[0])
    _, found = lax.scan(step, carry, keys[1:])
    return jnp.concatenate([tokens, carry[1][:, None], found.T], axis=1)
