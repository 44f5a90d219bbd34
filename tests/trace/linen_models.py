"""Small models of Flax Linen to trace, and the params of all models.

Params are drawn by NumPy, so nothing compiles, and no bias is 0 and no scale 1.
"""

import functools
import math
import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.trees import path_name

TOKENS = np.random.default_rng(5).integers(0, 32, (2, 8), np.int32)
IMAGE = np.random.default_rng(11).normal(size=(2, 16, 16, 3)).astype(np.float32)


def rand(*shape, seed=0, scale=None):
    scale = scale or 1 / math.sqrt(shape[0])
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def filled(shapes):
    """A tree of arrays for a tree of shapes: kernels of the size that layers want, scales near 1, all uneven."""

    def one(path, leaf):
        if not hasattr(leaf, "dtype"):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return jnp.broadcast_to(jax.random.key(7), leaf.shape)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        name = path_name(path)
        random = np.random.default_rng(zlib.crc32(name.encode())).normal(size=leaf.shape)
        if name.endswith(("scale", "var")) or name.endswith(("norm/weight", "norm1/weight", "norm2/weight")):
            values = np.exp(0.3 * random)
        else:
            values = random / math.sqrt(math.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.3 * random
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)


def linen(model, *args, **flags):
    variables = filled(jax.eval_shape(lambda: model.init(jax.random.key(1), *args, **flags)))
    return (lambda variables, *args: model.apply(variables, *args, **flags)), variables, args


# Convolutions.


class LeNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(8, (5, 5), padding="VALID")(x)), (2, 2), (2, 2))
        x = nn.max_pool(nn.relu(nn.Conv(12, (3, 3), padding="SAME")(x)), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(20)(x))
        return nn.Dense(10)(x)


class ResBlock(nn.Module):
    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        strides = (self.stride, self.stride)
        y = nn.Conv(self.features, (3, 3), strides, use_bias=False)(x)
        y = nn.relu(norm()(y))
        y = norm()(nn.Conv(self.features, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = norm(name="proj_norm")(nn.Conv(self.features, (1, 1), strides, use_bias=False, name="proj")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = ResBlock(8)(x, train)
        x = ResBlock(16, 2)(x, train)
        return nn.Dense(10)(x.mean((1, 2)))


class BottleneckBlock(nn.Module):
    filters: int
    conv: Any
    norm: Any
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(self.conv(self.filters, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.filters, (3, 3), self.strides)(y)))
        y = self.norm(scale_init=nn.initializers.zeros_init())(self.conv(self.filters * 4, (1, 1))(y))
        if x.shape != y.shape:
            x = self.conv(self.filters * 4, (1, 1), self.strides, name="conv_proj")(x)
            x = self.norm(name="norm_proj")(x)
        return nn.relu(x + y)


class FlaxResNet(nn.Module):
    """As in Flax's ImageNet example."""

    stage_sizes: tuple[int, ...] = (1, 2)
    num_filters: int = 4

    @nn.compact
    def __call__(self, x, train=False):
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, axis_name="batch")
        x = conv(self.num_filters, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], name="conv_init")(x)
        x = nn.max_pool(nn.relu(norm(name="bn_init")(x)), (3, 3), strides=(2, 2), padding="SAME")
        for i, blocks in enumerate(self.stage_sizes):
            for j in range(blocks):
                strides = (2, 2) if i > 0 and j == 0 else (1, 1)
                x = BottleneckBlock(self.num_filters * 2**i, conv, norm, strides)(x)
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        for _ in range(3):
            y = nn.Conv(6, (3, 3), use_bias=False)(nn.relu(norm()(x)))
            x = jnp.concatenate([x, y], -1)
        x = nn.Conv(10, (1, 1), use_bias=False)(nn.relu(norm()(x)))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(nn.relu(norm()(x)).mean((1, 2)))


class MobileNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu6(norm()(nn.Conv(8, (3, 3), (2, 2), use_bias=False)(x)))
        for stride in (1, 2):
            y = nn.relu6(norm()(nn.Conv(24, (1, 1), use_bias=False)(x)))
            y = nn.relu6(norm()(nn.Conv(24, (3, 3), (stride, stride), feature_group_count=24, use_bias=False)(y)))
            y = norm()(nn.Conv(8, (1, 1), use_bias=False)(y))
            x = x + y if stride == 1 else y
        s = jax.nn.sigmoid(nn.Dense(8)(nn.silu(nn.Dense(4)(x.mean((1, 2))))))  # squeeze and excitation
        x = x * s[:, None, None, :]
        return nn.Dense(10)(x.mean((1, 2)))


class ConvNeXt(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Conv(8, (4, 4), (4, 4), padding="VALID", name="stem")(x))
        y = nn.Conv(8, (7, 7), feature_group_count=8, name="depthwise")(x)
        y = nn.Dense(8, name="down")(nn.gelu(nn.Dense(32, name="up")(nn.LayerNorm()(y))))
        x = x + y * self.param("gamma", nn.initializers.constant(0.1), (8,))[None, None, None]
        return nn.Dense(10)(nn.LayerNorm()(x.mean((1, 2))))


class UNet(nn.Module):
    """Grouped convolutions, channel and pixel shuffles, a shortcut that is padded."""

    @nn.compact
    def __call__(self, x):
        a = nn.relu(nn.Conv(8, (3, 3))(x))
        b = nn.relu(nn.Conv(12, (3, 3), (2, 2))(a))
        y = jnp.concatenate([a, nn.relu(nn.ConvTranspose(10, (2, 2), (2, 2))(b))], -1)
        y = nn.Conv(16, (3, 3), feature_group_count=2)(y)
        n, h, w, k = y.shape
        y = y.reshape(n, h, w, 2, k // 2).swapaxes(3, 4).reshape(n, h, w, k)
        y = nn.Conv(12, (1, 1))(nn.relu(nn.GroupNorm(4)(y)))
        y = y.reshape(n, h, w, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, 3)
        z = jnp.pad(a[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (0, 6)))
        z = z + nn.Conv(14, (1, 1), (2, 2))(a)
        return y.mean((1, 2)), nn.Dense(3)(nn.relu(z).mean((1, 2)))


class Stochastic(nn.Module):
    """Dropout and batch normalisation, as in training."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), (2, 2), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        x = nn.Dropout(0.5, deterministic=False)(nn.relu(nn.Dense(12)(x.mean((1, 2)))))
        return nn.Dense(10)(x)


def stochastic():
    model = Stochastic()
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = filled(jax.eval_shape(lambda: model.init(keys, IMAGE)))

    def apply(variables, x, key):
        return model.apply(variables, x, rngs={"dropout": key}, mutable=["batch_stats"])

    return apply, variables, (IMAGE, jax.random.key(3))


# Sequences.


class Attention(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x):
        d = x.shape[-1]
        q, k, v = (nn.DenseGeneral((self.heads, d // self.heads), name=n)(x) for n in "qkv")
        y = nn.dot_product_attention(q, k, v, mask=nn.make_causal_mask(x[..., 0]))
        return nn.DenseGeneral(d, axis=(-2, -1), name="out")(y)


NORMS = {
    "rms": nn.RMSNorm,
    "layer": nn.LayerNorm,
    "slow": functools.partial(nn.LayerNorm, use_fast_variance=False),
}


class Block(nn.Module):
    heads: int = 4
    norm: str = "rms"

    @nn.compact
    def __call__(self, x):
        x = x + Attention(self.heads)(NORMS[self.norm]()(x))
        h = NORMS[self.norm]()(x)
        h = nn.silu(nn.Dense(24, use_bias=False, name="gate")(h)) * nn.Dense(24, use_bias=False, name="up")(h)
        return x + nn.Dense(x.shape[-1], name="down")(h)


class GPT(nn.Module):
    layers: int = 3
    scan: bool = True
    norm: str = "rms"

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(32, 16, name="embed")
        x = embed(tokens) + self.param("pos", nn.initializers.normal(0.1), (1, 8, 16))[:, : tokens.shape[1]]
        if self.scan:
            block = nn.remat(Block, prevent_cse=False)(norm=self.norm, name="blocks")
            over = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": self.layers}
            x, _ = nn.scan(lambda block, x, _: (block(x), None), **over)(block, x, None)
        else:
            for i in range(self.layers):
                x = Block(norm=self.norm, name=f"block{i}")(x)
        return embed.attend(nn.RMSNorm()(x))


class ViT(nn.Module):
    layers: int = 2

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (4, 4), (4, 4), padding="VALID", name="patches")(x)
        x = x.reshape(x.shape[0], -1, 16)
        cls = self.param("cls", nn.initializers.zeros_init(), (1, 1, 16))
        x = jnp.concatenate([jnp.tile(cls, (x.shape[0], 1, 1)), x], 1)
        x = x + self.param("pos", nn.initializers.normal(0.02), (1, x.shape[1], 16))
        for i in range(self.layers):
            x = x + nn.MultiHeadDotProductAttention(4, name=f"attention{i}")(nn.LayerNorm()(x))
            h = nn.gelu(nn.Dense(32, name=f"up{i}")(nn.LayerNorm()(x)))
            x = x + nn.Dense(16, name=f"down{i}")(h)
        return nn.Dense(10, name="head")(nn.LayerNorm()(x)[:, 0])


class SelfAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=12, out_features=10)(x)
        return nn.Dense(4)(x)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.RNN(nn.LSTMCell(12))(x))
