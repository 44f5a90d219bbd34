"""Decoder-only transformers: GPT-2 and, with other options, Llama, Qwen2 and Mistral."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from jaxsparse.trees import by_path, leaf_paths, listed, natural_order

__all__ = ["GPT"]

_CHOICES = {"positions": ("learned", "rotary"), "norm": ("layer", "rms"), "mlp": ("gelu", "gated")}


class GPT(nn.Module):
    """A decoder-only transformer: attention and an MLP in each block, normalised before, added to the residual stream.

    With x the embedded tokens, block i computes

    .. math:: x \\leftarrow x + \\text{attention}(\\text{norm}_1(x)), \\quad
       x \\leftarrow x + \\text{mlp}(\\text{norm}_2(x)),

    and the logits are the products of norm(x) with the embedding (``tied``) or with a kernel of their own. The defaults
    are GPT-2's. Llama, Qwen2 and Mistral are ``positions="rotary", norm="rms", mlp="gated", bias=False``, with fewer
    heads for keys and values than for queries.

    Kernels and embeddings start from N(0, 0.02), those that write into the residual stream ("out" of the attention,
    "down" of the MLP) from N(0, 0.02 / sqrt(2 num_layers)), as in GPT-2; biases from 0, scales from 1.

    The params are "embedding", "positions" (if learned), "block_0", "block_1", ..., "norm" and "head" (unless tied). A
    block has "norm_1", "attention" ("query", "key", "value": kernels (width, heads, head_dim); "out": (heads, head_dim,
    width)), "norm_2" and "mlp" ("up" and, if gated, "gate": (width, mlp_width); "down": (mlp_width, width)). With
    ``scan=True`` all blocks are one, "blocks", whose leaves have a leading axis of layers; one is compiled, however
    many there are.

    By default methods prune all kernels, and the embeddings too: ``prunable=["*/attention/*", "*/mlp/*"]`` chooses the
    blocks' matrices alone.

    Attributes:
      vocab_size: number of tokens, int >= 1.
      width: channels of the residual stream, int >= 1.
      num_layers: blocks, int >= 1.
      num_heads: heads of the queries, int >= 1.
      num_kv_heads: heads of keys and values, a divisor of ``num_heads``: head g of them serves a group of successive
        heads of the queries. None: as many.
      head_dim: channels of a head; None: ``width / num_heads``. Even, for rotary positions.
      mlp_width: units of the MLP; None: ``4 * width``.
      max_length: tokens that the model can read at once.
      positions: "learned" embeddings, added to the tokens' at the start, or "rotary": pairs (i, i + head_dim / 2) of
        the channels of queries and keys are rotated by the angle position * rotary_base^(-2 i / head_dim).
      rotary_base: of the rotary positions' wavelengths.
      norm: "layer" (mean and variance, with a bias) or "rms" (root mean square); in float32 for every ``dtype``.
      norm_eps: added to the variance or mean square.
      mlp: "gelu", down(gelu(up(x))) with GELU's tanh approximation, or "gated", down(silu(gate(x)) * up(x)).
      bias: whether dense layers have biases.
      attention_bias: whether those of the attention have biases: True, False, or "qkv" for all but "out", as in Qwen2;
        None: as ``bias`` says.
      tied: whether the logits' kernel is the embedding.
      scan: whether the blocks are one ``nn.scan``.
      remat: whether the backward pass computes each block again, instead of keeping what it computed.
      dropout: share of the embedded tokens, attention weights and blocks' outputs that training drops; it takes
        ``rngs={"dropout": key}``.
      dtype: of the computation. Norms, softmax and logits are float32.
      param_dtype: of the parameters.

    Raises:
      ValueError: for an option that is none of the above, tokens that are not ints of shape (batch, length), and more
        of them than ``max_length``.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsparse import models
      >>> model = models.GPT(vocab_size=50, width=16, num_layers=2, num_heads=4, num_kv_heads=2, positions="rotary")
      >>> tokens = jnp.array([[3, 14, 15, 9]])
      >>> params = model.init(jax.random.key(0), tokens)["params"]
      >>> list(params)
      ['embedding', 'block_0', 'block_1', 'norm']
      >>> params["block_0"]["attention"]["key"]["kernel"].shape
      (16, 2, 4)
      >>> logits = model.apply({"params": params}, tokens)
      >>> logits.shape
      (1, 4, 50)
      >>> models.generate(model, params, tokens, length=10).shape
      (1, 10)

    References:
      Radford et al., *Language models are unsupervised multitask learners*, 2019; Touvron et al., *LLaMA*, 2023; Su et
      al., *RoFormer*, 2021; Ainslie et al., *GQA*, 2023; Shazeer, *GLU variants improve transformer*, 2020.
    """

    vocab_size: int
    width: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int | None = None
    max_length: int = 256
    positions: str = "learned"
    rotary_base: float = 10_000.0
    norm: str = "layer"
    norm_eps: float = 1e-5
    mlp: str = "gelu"
    bias: bool = True
    attention_bias: bool | str | None = None
    tied: bool = True
    scan: bool = False
    remat: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False, *, cache_length: int | None = None) -> jax.Array:
        """Logits of the token after each of ``tokens``.

        Args:
          tokens: (batch, length), int.
          train: whether dropout is on.
          cache_length: None reads ``tokens`` as the whole text. An int reads them as what follows the tokens of earlier
            calls, whose keys and values are in the mutable collection "cache", with room for that many in all; without
            the collection they are the first. :func:`generate` uses it.

        Returns:
          (batch, length, vocab_size), float32.
        """
        self._check(tokens, cache_length)
        scale = 0.02 / math.sqrt(2 * self.num_layers)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = partial(nn.Embed, features=self.width, embedding_init=nn.initializers.normal(0.02), **types)
        norm = partial(_Norm, centred=self.norm == "layer", eps=self.norm_eps, **types)
        drop = partial(nn.Dropout, self.dropout, deterministic=not train)
        bias = self.bias if self.attention_bias is None else self.attention_bias
        attention = partial(
            _Attention,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim or self.width // self.num_heads,
            rotary_base=self.rotary_base if self.positions == "rotary" else None,
            bias=bool(bias),
            out_bias=bias is True,
            out_scale=scale,
            drop=drop,
            cache_length=cache_length,
            **types,
        )
        mlp = partial(
            _MLP, self.mlp_width or 4 * self.width, gated=self.mlp == "gated", bias=self.bias, out_scale=scale, **types
        )

        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        if cache_length is not None:
            read = self.variable("cache", "length", jnp.zeros, (), jnp.int32)
            positions += read.value
            read.value += tokens.shape[1]
        embedding = embed(self.vocab_size, name="embedding")
        x = embedding(tokens)
        if self.positions == "learned":
            x += embed(self.max_length, name="positions")(positions)[None]
        x = drop(name="drop")(x)
        block = nn.remat(_Block, prevent_cse=not self.scan) if self.remat else _Block
        block = partial(block, norm, attention, mlp, drop)
        if self.scan:
            over = nn.scan(
                lambda block, x, positions: (block(x, positions), None),
                variable_axes={"params": 0, "cache": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=self.num_layers,
            )
            x, _ = over(block(name="blocks"), x, positions)
        else:
            for i in range(self.num_layers):
                x = block(name=f"block_{i}")(x, positions)
        x = norm(name="norm")(x)
        product = partial(lax.dot_general, preferred_element_type=jnp.float32)
        if self.tied:
            return product(x, embedding.embedding.astype(self.dtype), (((2,), (1,)), ((), ())))
        return nn.Dense(
            self.vocab_size, use_bias=False, kernel_init=nn.initializers.normal(0.02), dot_general=product, name="head",
            **types,
        )(x)  # fmt: skip

    def fitted(self, params: Any) -> "GPT":
        """This model with the widths of ``params``, such as those that :func:`jaxsparse.trace.slim` cut.

        Shapes say ``vocab_size``, ``width``, ``num_layers``, ``num_heads``, ``num_kv_heads``, ``head_dim``,
        ``mlp_width``, ``scan`` and, for learned positions, ``max_length``; all else stays. Params that lost units or
        heads compute the same. (Those that lost channels of the residual stream or of every head do not: the means of
        norms and the scale of attention are of the channels that are there.)

        Args:
          params: of a model with the same options: arrays or their shapes.

        Raises:
          ValueError: for params that no GPT of these options has, with the leaf, what it should be and what it is.

        Examples:
          >>> import jax, jax.numpy as jnp
          >>> from jaxsparse import models
          >>> small, tokens = models.GPT(50, 16, num_layers=2, head_dim=3), jnp.zeros((1, 4), int)
          >>> params = jax.eval_shape(small.init, jax.random.key(0), tokens)["params"]
          >>> found = models.GPT(vocab_size=99, num_layers=12, num_heads=8).fitted(params)
          >>> found.width, found.num_layers, found.num_heads, found.head_dim, found.mlp_width
          (16, 2, 4, 3, 64)
        """
        leaves = by_path(params)
        scan = any(path.startswith("blocks/") for path in leaves)
        first, stack = ("blocks", 1) if scan else ("block_0", 0)

        def shape(path: str, rank: int) -> tuple[int, ...]:
            if path not in leaves:
                raise ValueError(f"params of a GPT have {path}; these have {listed(sorted(leaves, key=natural_order))}")
            found = tuple(leaves[path].shape)
            if len(found) != rank:
                raise ValueError(f"{path} must have {rank} axes for a GPT with scan={scan}, got shape {found}")
            return found

        vocab_size, width = shape("embedding/embedding", 2)
        query = shape(f"{first}/attention/query/kernel", 3 + stack)
        blocks = {path.partition("/")[0] for path in leaves if path.startswith("block_")}
        model = self.clone(
            vocab_size=vocab_size,
            width=width,
            num_layers=query[0] if scan else len(blocks),
            num_heads=query[-2],
            num_kv_heads=shape(f"{first}/attention/key/kernel", 3 + stack)[-2],
            head_dim=query[-1],
            mlp_width=shape(f"{first}/mlp/up/kernel", 2 + stack)[-1],
            scan=scan,
        )
        if self.positions == "learned":
            model = model.clone(max_length=shape("positions/embedding", 2)[0])
        wanted = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        shapes = {path: tuple(leaf.shape) for path, leaf in by_path(wanted).items()}
        if missing := [path for path in leaf_paths(wanted) if path not in leaves]:
            raise ValueError(f"params of {_options(model)} have {listed(missing)} too, which these lack")
        for path, leaf in leaves.items():
            if path not in shapes:
                raise ValueError(f"{path} is in the params, and not in those of {_options(model)}")
            if tuple(leaf.shape) != shapes[path]:
                raise ValueError(
                    f"{path} must have shape {shapes[path]} as the leaves before it say, got {tuple(leaf.shape)}: all "
                    "blocks of a GPT have the same widths"
                )
        return model

    def _check(self, tokens: jax.Array, cache_length: int | None) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"GPT's {name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.attention_bias not in (None, True, False, "qkv"):
            raise ValueError(f"GPT's attention_bias must be None, a bool or 'qkv', got {self.attention_bias!r}")
        for name in ("vocab_size", "width", "num_layers", "num_heads", "max_length"):
            _check_size(name, getattr(self, name))
        for name in ("num_kv_heads", "head_dim", "mlp_width"):
            if getattr(self, name) is not None:
                _check_size(name, getattr(self, name))
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(
                f"GPT's num_kv_heads must divide num_heads={self.num_heads}, so that heads of keys and values serve as "
                f"many heads of queries each, got {self.num_kv_heads}"
            )
        if self.head_dim is None and self.width % self.num_heads:
            raise ValueError(f"GPT's num_heads={self.num_heads} does not divide width={self.width}: give head_dim=")
        head_dim = self.head_dim or self.width // self.num_heads
        if self.positions == "rotary" and head_dim % 2:
            raise ValueError(f"rotary positions rotate pairs of channels: head_dim must be even, got {head_dim}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"GPT's dropout must be from 0 to below 1, got {self.dropout}")
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"GPT needs tokens (batch, length) of ints, got {tokens.dtype} of shape {tokens.shape}")
        length = tokens.shape[1] if cache_length is None else cache_length
        if length > self.max_length:
            raise ValueError(f"{length} tokens are more than the max_length={self.max_length} of this GPT")
        if tokens.shape[1] > length:
            raise ValueError(f"{tokens.shape[1]} tokens are more than the cache_length={length} has room for")


class _Block(nn.Module):
    """A block; the attributes make its modules."""

    norm: Any
    attention: Any
    mlp: Any
    drop: Any

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        y = self.attention(name="attention")(self.norm(name="norm_1")(x), positions)
        x += self.drop(name="drop_1")(y)
        y = self.mlp(name="mlp")(self.norm(name="norm_2")(x))
        return x + self.drop(name="drop_2")(y)


class _Attention(nn.Module):
    """Causal attention with heads of keys and values that serve several heads of queries."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_base: float | None
    bias: bool
    out_bias: bool
    out_scale: float
    drop: Any
    cache_length: int | None
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        layer = partial(nn.DenseGeneral, kernel_init=nn.initializers.normal(0.02), use_bias=self.bias, **types)
        query = layer((self.num_heads, self.head_dim), name="query")(x)
        key = layer((self.num_kv_heads, self.head_dim), name="key")(x)
        value = layer((self.num_kv_heads, self.head_dim), name="value")(x)
        if self.rotary_base is not None:
            query, key = (_rotated(y, positions, self.rotary_base) for y in (query, key))
        if self.cache_length is not None:
            key, value = (self._cached(name, y, positions) for name, y in (("key", key), ("value", value)))
        batch, length = x.shape[:2]
        grouped = query.reshape(batch, length, self.num_kv_heads, self.num_heads // self.num_kv_heads, self.head_dim)
        scores = jnp.einsum("btgrd,bsgd->bgrts", grouped, key, preferred_element_type=jnp.float32)
        past = positions[:, None] >= jnp.arange(key.shape[1])[None]
        scores = jnp.where(past[None, None, None], scores / math.sqrt(self.head_dim), jnp.finfo(jnp.float32).min)
        weights = self.drop(name="drop")(jax.nn.softmax(scores)).astype(self.dtype)
        y = jnp.einsum("bgrts,bsgd->btgrd", weights, value).reshape(query.shape)
        return nn.DenseGeneral(
            x.shape[-1], axis=(-2, -1), kernel_init=nn.initializers.normal(self.out_scale), use_bias=self.out_bias,
            name="out", **types,
        )(y)  # fmt: skip

    def _cached(self, name: str, new: jax.Array, positions: jax.Array) -> jax.Array:
        """All keys or values up to now, with the new ones written at their positions; zeros behind them."""
        shape = (new.shape[0], self.cache_length, *new.shape[2:])
        cache = self.variable("cache", f"past_{name}", jnp.zeros, shape, self.dtype)
        cache.value = lax.dynamic_update_slice_in_dim(cache.value, new.astype(self.dtype), positions[0], axis=1)
        return cache.value


class _MLP(nn.Module):
    """Two dense layers with GELU between them, or three with a gate."""

    features: int
    gated: bool
    bias: bool
    out_scale: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = partial(nn.Dense, use_bias=self.bias, dtype=self.dtype, param_dtype=self.param_dtype)
        start, end = (nn.initializers.normal(scale) for scale in (0.02, self.out_scale))
        y = layer(self.features, kernel_init=start, name="up")(x)
        if self.gated:
            y *= nn.silu(layer(self.features, kernel_init=start, name="gate")(x))
        else:
            y = nn.gelu(y, approximate=True)
        return layer(x.shape[-1], kernel_init=end, name="down")(y)


class _Norm(nn.Module):
    """x, less its mean if centred, over the root of its mean square, in float32 for every dtype.

    Flax's norms have the same params, but mix dtypes implicitly where x or the params are not float32, which strict
    dtype promotion refuses.
    """

    centred: bool
    eps: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        if self.centred:
            x -= jnp.mean(x, axis=-1, keepdims=True)
        square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:], self.param_dtype)
        x *= lax.rsqrt(square + self.eps) * scale.astype(jnp.float32)[None, None]
        if self.centred:
            bias = self.param("bias", nn.initializers.zeros_init(), x.shape[-1:], self.param_dtype)
            x += bias.astype(jnp.float32)[None, None]
        return x.astype(self.dtype)


def _rotated(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Queries or keys (batch, length, heads, head_dim), their pairs of channels rotated by the positions (length,)."""
    half = x.shape[-1] // 2
    waves = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = (positions.astype(jnp.float32)[:, None] * waves[None])[None, :, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _check_size(name: str, size: Any) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"GPT's {name} must be an int of at least 1, got {size!r}")


def _options(model: GPT) -> str:
    names = (*_CHOICES, "bias", "attention_bias", "tied", "num_layers")
    return "a GPT of " + ", ".join(f"{name}={getattr(model, name)!r}" for name in names)
