"""Generated texts: those of passes without a cache, one for each token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.models import GPT, generate
from tests.models.transformers import TOKENS, VOCAB, gpt
from tests.problems import slow_except

LENGTH = 12
CASES = [("gpt-2", "loop"), ("qwen2", "scan+remat"), ("one key head", "scan"), ("learned and gated", "loop")]


@pytest.mark.parametrize(("name", "form"), slow_except([("qwen2", "scan+remat")], CASES))
@pytest.mark.parametrize("start", slow_except([5], [1, 5]))
def test_the_most_likely_token_after_all_that_is_there(name, form, start):
    model, params, apply = gpt(name, form)
    found = generate(model, params, TOKENS[:, :start], LENGTH)
    assert found.shape == (2, LENGTH)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found[:, :start], TOKENS[:, :start])
    logits = jax.jit(apply)(params, found)  # as no token sees those behind it, one pass gives the logits of all
    np.testing.assert_array_equal(found[:, start:], jnp.argmax(logits, -1)[:, start - 1 : -1])
    assert model.tied or len(np.unique(found[:, start:])) > 2  # tied, one token may follow itself for good


@pytest.mark.slow
@pytest.mark.parametrize("form", ["scan", "loop"])
def test_parts_with_a_cache_give_the_logits_of_the_whole(form):
    model, params, apply = gpt("gpt-2", form)
    parts, cache = [], {}
    for begin, end in ((0, 3), (3, 4), (4, 8)):
        variables = {"params": params, **cache}
        logits, cache = model.apply(variables, TOKENS[:, begin:end], cache_length=10, mutable=["cache"])
        parts.append(logits)
    assert int(cache["cache"]["length"]) == 8
    np.testing.assert_allclose(jnp.concatenate(parts, 1), jax.jit(apply)(params, TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_draws_follow_the_softmax_of_logits_over_the_temperature():
    model, params, apply = gpt("gpt-2", "scan")
    many = jnp.tile(TOKENS[:1, :3], (4000, 1))
    found = generate(model, params, many, 4, temperature=2.0, key=0)
    expected = jax.nn.softmax(jax.jit(apply)(params, TOKENS[:1, :3])[0, -1] / 2.0)
    shares = np.bincount(found[:, -1], minlength=VOCAB) / len(many)
    np.testing.assert_allclose(shares, expected, atol=4 * np.sqrt(0.25 / len(many)))
    assert np.abs(shares - 1 / VOCAB).max() > 0.05  # they are far from uniform
    np.testing.assert_array_equal(found, generate(model, params, many, 4, temperature=2.0, key=jax.random.key(0)))
    assert (found != generate(model, params, many, 4, temperature=2.0, key=1)).any()
    coldest = generate(model, params, many[:2], 4, temperature=1e-50, key=np.int64(0))
    np.testing.assert_array_equal(coldest, generate(model, params, many[:2], 4))


@pytest.mark.slow
def test_of_half_precision():
    model, params, _ = gpt("qwen2", "scan", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert generate(model, params, TOKENS[:, :3], LENGTH).shape == (2, LENGTH)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"length": 3}, "length must be more than the 3 tokens .* at most the model's max_length=12, got 3"),
        ({"length": 13}, "max_length=12, got 13"),
        ({"length": 4.0}, "length must be an int, got 4.0"),
        ({"tokens": TOKENS[0]}, r"generate needs tokens \(batch, at least 1\) of ints, got int32 of shape \(8,\)"),
        ({"tokens": TOKENS[:, :0]}, r"got int32 of shape \(2, 0\)"),
        ({"tokens": TOKENS * 1.0}, "got float"),
        ({"tokens": TOKENS[:, :3] - 9}, f"tokens must be from 0 to {VOCAB - 1}, got -"),
        ({"tokens": TOKENS[:, :3] + VOCAB}, f"tokens must be from 0 to {VOCAB - 1}, got "),
        ({"tokens": np.zeros((1, 3), np.int8), "vocab": 129}, "int8 cannot hold the 129 tokens"),
        ({"temperature": -1.0}, "finite temperature of at least 0, got -1.0"),
        ({"temperature": float("nan")}, "finite temperature of at least 0, got nan"),
        ({"temperature": 1.0}, "a temperature above 0 draws tokens: give key="),
    ],
)
def test_errors(arguments, error):
    arguments = {"tokens": TOKENS[:, :3], "length": 5} | arguments
    model = GPT(arguments.pop("vocab", VOCAB), 16, max_length=12)
    with pytest.raises(ValueError, match=error):
        generate(model, {}, **arguments)


def test_tokens_that_are_a_constant_of_a_compiled_function():
    model = GPT(VOCAB, 16, max_length=12)
    params = model.init(jax.random.key(0), TOKENS[:, :3])["params"]
    tokens, outside = jnp.asarray(TOKENS[:, :3]), jnp.asarray(TOKENS[:, :3] + VOCAB)
    found = jax.jit(lambda params: generate(model, params, tokens, 5))(params)
    np.testing.assert_array_equal(found, generate(model, params, tokens, 5))
    with pytest.raises(ValueError, match="tokens must be from 0"):
        jax.jit(lambda params: generate(model, params, outside, 5))(params)
