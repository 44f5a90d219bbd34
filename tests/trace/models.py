"""Small models of every framework to trace. Each function returns (apply, params, args); nothing is built on import."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from tests.models import transformers
from tests.trace.linen_models import (
    GPT,
    IMAGE,
    TOKENS,
    ConvNeXt,
    DenseNet,
    FlaxResNet,
    LeNet,
    MobileNet,
    Recurrent,
    ResNet,
    SelfAttention,
    UNet,
    ViT,
    filled,
    linen,
    rand,
    stochastic,
)

# Plain functions.


def mlp():
    params = {
        "fc1": {"kernel": rand(20, 32), "bias": rand(32, seed=1)},
        "fc2": {"kernel": rand(32, 24, seed=2), "bias": rand(24, seed=4)},
        "fc3": {"kernel": rand(24, 6, seed=3)},
    }

    def apply(p, x):
        h = jax.nn.relu(x @ p["fc1"]["kernel"] + p["fc1"]["bias"][None])
        h = jax.nn.sigmoid(h @ p["fc2"]["kernel"] + p["fc2"]["bias"][None])
        return h @ p["fc3"]["kernel"]

    return apply, params, (rand(5, 20, seed=9),)


def rms_norm(x, scale):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * jnp.expand_dims(scale, range(x.ndim - 1))


def rope(x):
    length, half = x.shape[1], x.shape[-1] // 2
    angle = jnp.arange(length)[:, None] * (10000.0 ** (-jnp.arange(half) / half))[None]
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def plain_gpt(d=16, heads=4, kv=2, layers=2, scan=True):
    """Fused queries, keys and values, grouped heads, rotary embeddings, gated units, tied embedding."""
    dim = d // heads

    def layer(i):
        return {
            "n1": 1 + rand(d, seed=i + 1),
            "qkv": rand(d, (heads + 2 * kv) * dim, seed=i + 2),
            "out": rand(heads * dim, d, seed=i + 3),
            "n2": 1 + rand(d, seed=i + 4),
            "gate_up": rand(d, 2 * 24, seed=i + 5),
            "down": rand(24, d, seed=i + 6),
        }

    def block(x, p):
        b, t, _ = x.shape
        q, k, v = jnp.split(rms_norm(x, p["n1"]) @ p["qkv"], [heads * dim, (heads + kv) * dim], -1)
        q, k, v = rope(q.reshape(b, t, heads, dim)), rope(k.reshape(b, t, kv, dim)), v.reshape(b, t, kv, dim)
        k, v = (jnp.repeat(z, heads // kv, 2) for z in (k, v))
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(dim)
        scores = jnp.where(jnp.tril(jnp.ones((1, 1, t, t), bool)), scores, -1e30)
        y = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
        x = x + y.reshape(b, t, -1) @ p["out"]
        gate, up = jnp.split(rms_norm(x, p["n2"]) @ p["gate_up"], 2, -1)
        return x + (jax.nn.gelu(gate) * up) @ p["down"]

    def apply(p, tokens):
        x = p["embed"][tokens]
        if scan:
            x = lax.scan(jax.checkpoint(lambda x, q: (block(x, q), None)), x, p["blocks"])[0]
        else:
            for q in p["blocks"]:
                x = block(x, q)
        return rms_norm(x, p["norm"]) @ p["embed"].T

    blocks = [layer(10 * i) for i in range(layers)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *blocks) if scan else blocks
    return apply, {"embed": rand(32, d, seed=77), "norm": 1 + rand(d, seed=78), "blocks": stacked}, (TOKENS,)


def lstm(d=5, n=12):
    """An LSTM by hand, whose four gates are one kernel."""
    params = {
        "wx": rand(d, 4 * n),
        "wh": rand(n, 4 * n, seed=1),
        "b": rand(4 * n, seed=2, scale=0.3),
        "out": rand(n, 3, seed=3),
    }

    def apply(p, x):
        def cell(state, x):
            h, c = state
            i, f, g, o = jnp.split(x @ p["wx"] + h @ p["wh"] + p["b"][None], 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros((x.shape[1], n))
        return lax.scan(cell, (zeros, zeros), x)[1] @ p["out"]

    return apply, params, (rand(7, 2, d, seed=8),)


def experts(d=8, e=4, f=12):
    """A mixture of experts: two of four for each token."""
    params = {
        "router": rand(d, e),
        "in": rand(e, d, f, seed=1, scale=0.3),
        "out": rand(e, f, d, seed=2, scale=0.3),
        "head": rand(d, 3, seed=4),
    }

    def apply(p, x):
        gates, which = lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
        chosen = jax.nn.one_hot(which, e) * gates[..., None]
        h = jax.nn.relu(jnp.einsum("td,edf->etf", x, p["in"]))
        y = jnp.einsum("etf,efd->etd", h, p["out"])
        return (x + jnp.einsum("tke,etd->td", chosen, y)) @ p["head"]

    return apply, params, (rand(6, d, seed=9),)


# The library's own, as of several families.


def own_gpt(*form):
    _, params, apply = transformers.gpt(*form)
    return apply, params, (transformers.TOKENS,)


# Flax NNX.


class NNXBlock(nnx.Module):
    def __init__(self, d, heads, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(d, rngs=rngs), nnx.RMSNorm(d, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, d, decode=False, rngs=rngs)
        self.gate, self.up = nnx.Linear(d, 24, rngs=rngs), nnx.Linear(d, 24, rngs=rngs)
        self.down = nnx.Linear(24, d, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        x = x + self.drop(self.attention(self.norm1(x), mask=nnx.make_causal_mask(x[..., 0])))
        h = self.norm2(x)
        return x + self.drop(self.down(nnx.silu(self.gate(h)) * self.up(h)))


class NNXGPT(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(32, 16, rngs=rngs)
        self.blocks = nnx.List([NNXBlock(16, 4, rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(16, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


def nnx_gpt(train=False):
    """In training, dropout's state is a further argument."""
    model = nnx.eval_shape(lambda: NNXGPT(nnx.Rngs(0)))
    if not train:
        model.eval()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = filled(params), filled(rest)
    if train:
        return (lambda p, rest, tokens: nnx.merge(graphdef, p, rest)(tokens)), params, (rest, TOKENS)
    return (lambda p, tokens: nnx.merge(graphdef, p, rest)(tokens)), params, (TOKENS,)


# Equinox and Haiku.


class EqxBlock(eqx.Module):
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.RMSNorm
    attention: eqx.nn.MultiheadAttention
    gate: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, d, heads, key):
        k = jax.random.split(key, 4)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(d), eqx.nn.RMSNorm(d)
        self.attention = eqx.nn.MultiheadAttention(heads, d, key=k[0])
        self.gate, self.up = eqx.nn.Linear(d, 24, key=k[1]), eqx.nn.Linear(d, 24, key=k[2])
        self.down = eqx.nn.Linear(24, d, key=k[3])

    def __call__(self, x):
        mask = jnp.tril(jnp.ones((len(x), len(x)), bool))
        h = jax.vmap(self.norm1)(x)
        x = x + self.attention(h, h, h, mask)
        h = jax.vmap(self.norm2)(x)
        h = jax.nn.silu(jax.vmap(self.gate)(h)) * jax.vmap(self.up)(h)
        return x + jax.vmap(self.down)(h)


class EqxGPT(eqx.Module):
    embed: eqx.nn.Embedding
    blocks: EqxBlock
    norm: eqx.nn.LayerNorm

    def __init__(self, key):
        k1, k2 = jax.random.split(key)
        self.embed = eqx.nn.Embedding(32, 16, key=k1)
        self.blocks = eqx.filter_vmap(lambda k: EqxBlock(16, 4, k))(jax.random.split(k2, 3))
        self.norm = eqx.nn.LayerNorm(16)

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens)
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        x, _ = lax.scan(lambda x, b: (eqx.combine(b, static)(x), None), x, arrays)
        return jax.vmap(self.norm)(x) @ self.embed.weight.T


def eqx_gpt():
    model = filled(eqx.filter_eval_shape(lambda: EqxGPT(jax.random.key(3))))
    return (lambda m, tokens: jax.vmap(m)(tokens)), model, (TOKENS,)


def eqx_mlp():
    model = filled(eqx.filter_eval_shape(lambda: eqx.nn.MLP(12, 5, 16, 2, key=jax.random.key(0))))
    return (lambda m, x: jax.vmap(m)(x)), model, (rand(7, 12, seed=2),)


def haiku_net():
    def f(x):
        x = jax.nn.relu(hk.Conv2D(8, 3)(x))
        x = jax.nn.relu(hk.GroupNorm(4)(hk.Conv2D(16, 3, 2)(x)))
        x = hk.Flatten()(x)
        return hk.nets.MLP([12, 7])(x)

    net = hk.without_apply_rng(hk.transform(f))
    x = rand(2, 8, 8, 3, seed=4, scale=1)
    return net.apply, filled(jax.eval_shape(lambda: net.init(jax.random.key(0), x))), (x,)


MODELS: dict[str, Callable[[], tuple[Callable, Any, tuple]]] = {
    "mlp": mlp,
    "lenet": lambda: linen(LeNet(), IMAGE),
    "resnet": lambda: linen(ResNet(), IMAGE),
    "resnet flax example": lambda: linen(FlaxResNet(), IMAGE),
    "densenet": lambda: linen(DenseNet(), IMAGE),
    "mobilenet": lambda: linen(MobileNet(), IMAGE),
    "convnext": lambda: linen(ConvNeXt(), IMAGE),
    "unet": lambda: linen(UNet(), IMAGE),
    "dropout batchnorm train": stochastic,
    "vit": lambda: linen(ViT(), IMAGE),
    "attention linen": lambda: linen(SelfAttention(), rand(2, 6, 8, seed=3)),
    "rnn linen": lambda: linen(Recurrent(), rand(2, 6, 8, seed=3)),
    "gpt linen scan+remat rms": lambda: linen(GPT(), TOKENS),
    "gpt linen loop layernorm": lambda: linen(GPT(scan=False, norm="layer"), TOKENS),
    "gpt linen loop slow layernorm": lambda: linen(GPT(scan=False, norm="slow", layers=1), TOKENS),
    "gpt nnx mha": nnx_gpt,
    "gpt eqx scan vmap": eqx_gpt,
    "gpt plain fused gqa rope scan": plain_gpt,
    "gpt plain loop": lambda: plain_gpt(scan=False),
    "own gpt-2 loop": lambda: own_gpt("gpt-2", "loop"),
    "own qwen2 scan+remat": lambda: own_gpt("qwen2", "scan+remat"),
    "own one key head scan": lambda: own_gpt("one key head", "scan"),
    "mlp eqx": eqx_mlp,
    "haiku conv groupnorm": haiku_net,
    "lstm": lstm,
    "experts": experts,
}
