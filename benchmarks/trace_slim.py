"""How much faster a transformer is without half of its units and heads, and what it costs to look at a large one.

Takes half of the hidden units and half of the heads out of every block of two GPTs with :func:`jaxsparse.trace.slim`,
one of Linen under scan and remat and one of NNX, and times the forward pass and a train step of SGD with momentum,
dense beside slim, jitted, in turn. Compares the losses. Then traces a model with 7 billion params from their shapes
alone and analyses it; the memory is what the process takes after that, beyond what it took before.

Usage: ``python -m benchmarks.trace_slim [--width 256] [--blocks 4] [--batch 8] [--length 128] [--rounds 9]``
"""

import argparse
import resource
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import timing
from jaxsparse import trace
from jaxsparse.groups import entries
from jaxsparse.trace.analysis import Analysis
from jaxsparse.trees import by_path, leaf_paths

VOCABULARY = 256


class Block(nn.Module):
    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x):
        width, h = x.shape[-1], nn.LayerNorm()(x)
        q, k, v = (nn.DenseGeneral((self.heads, width // self.heads), name=name)(h) for name in ("q", "k", "v"))
        h = nn.dot_product_attention(q, k, v, mask=nn.make_causal_mask(x[..., 0]))
        x = x + nn.DenseGeneral(width, axis=(-2, -1), name="out")(h)
        return x + nn.Dense(width, name="down")(nn.gelu(nn.Dense(self.hidden, name="up")(nn.LayerNorm()(x))))


class GPT(nn.Module):
    width: int
    heads: int
    hidden: int
    blocks: int
    vocabulary: int = VOCABULARY

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(self.vocabulary, self.width)
        block = nn.remat(Block, prevent_cse=False)(self.heads, self.hidden, name="blocks")
        scanned = nn.scan(
            lambda module, x, _: (module(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.blocks,
        )
        x, _ = scanned(block, embed(tokens), None)
        return embed.attend(nn.LayerNorm()(x))


class NNXBlock(nnx.Module):
    def __init__(self, width, heads, hidden, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(width, hidden, rngs=rngs), nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class NNXGPT(nnx.Module):
    def __init__(self, width, heads, hidden, blocks, rngs):
        self.embed, self.norm = nnx.Embed(VOCABULARY, width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.blocks = nnx.List([NNXBlock(width, heads, hidden, rngs) for _ in range(blocks)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


def linen_gpt(width, blocks, tokens):
    model = GPT(width, width // 32, 4 * width, blocks)
    return model.apply, jax.jit(model.init)(jax.random.key(0), tokens)


def nnx_gpt(width, blocks, tokens):
    graphdef, params, rest = nnx.split(NNXGPT(width, width // 32, 4 * width, blocks, nnx.Rngs(0)), nnx.Param, ...)
    return lambda params, tokens: nnx.merge(graphdef, params, rest)(tokens), params


def halved(apply, params, tokens):
    """The params with half of the units and heads at zero, and the function without them."""
    groups = trace.channel_groups(apply, params, tokens)
    width = tokens_width(params)
    closed = {
        group.name: np.arange(group.size) % 2 == 1
        for group in groups
        if group.size in (4 * width, width // 32)  # neither the width itself nor the inside of a head
    }
    leaves = by_path(params)
    for group in groups:
        for which in group.multiplies if group.name in closed else ():
            (axis,), channels = entries(which, leaves[which.path].shape, group.size)
            open_ = jnp.asarray(~np.append(closed[group.name], False)[channels])
            shape = [-1 if i == axis else 1 for i in range(leaves[which.path].ndim)]
            leaves[which.path] = leaves[which.path] * open_.reshape(shape)
    shut = jax.tree.structure(params).unflatten([leaves[path] for path in leaf_paths(params)])
    return shut, trace.slim(apply, shut, closed, tokens, groups=groups)


def tokens_width(params):
    return next(leaf.shape[-1] for path, leaf in by_path(params).items() if path.endswith("embedding"))


def runs_of(apply, params, tokens):
    """The forward pass and a train step as functions without arguments, and the loss."""
    tx = optax.sgd(1e-3, momentum=0.9)

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, tokens), tokens).mean()

    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    forward, train, state = jax.jit(apply), jax.jit(step), tx.init(params)
    return lambda: forward(params, tokens), lambda: train(params, state), float(jax.jit(loss)(params))


def large(blocks):
    """Seconds to trace and analyse a model with 7 billion params at 32 blocks, its params, and gigabytes taken."""
    model, tokens = GPT(4096, 32, 16384, blocks, 32000), jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    traced = trace.program.trace(model.apply, params, tokens)
    Analysis(traced)
    seconds = time.perf_counter() - start
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    start = time.perf_counter()
    groups = trace.channel_groups(model.apply, params, tokens)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return seconds, time.perf_counter() - start, len(groups), size, taken


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of each alternative")
    args = parser.parse_args()

    seconds, grouping, number, size, taken = large(32)  # first, for the memory that is reported is a maximum
    tokens, rows = jnp.asarray(np.random.RandomState(0).randint(0, VOCABULARY, (args.batch, args.length))), []
    for name, make in {"Linen, scan and remat": linen_gpt, "NNX": nnx_gpt}.items():
        apply, params = make(args.width, args.blocks, tokens)
        shut, small = halved(apply, params, tokens)
        whole, slim = runs_of(apply, shut, tokens), runs_of(small.apply, small.params, tokens)
        for i, what in enumerate(("forward", "train step")):
            median = timing.interleaved({"whole": whole[i], "slim": slim[i]}, args.rounds)
            sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (shut, small.params)]
            rows.append([
                name, what, f"{sizes[0]:,}", f"{sizes[1]:,}", f"{1e3 * median['whole']:.1f}",
                f"{1e3 * median['slim']:.1f}", f"{median['whole'] / median['slim']:.2f}",
                f"{abs(slim[2] / whole[2] - 1):.0e}",
            ])  # fmt: skip
    timing.save(
        "trace_slim",
        f"GPTs without half of their hidden units and heads, width {args.width}, {args.blocks} blocks, "
        f"{args.batch} x {args.length} tokens",
        ["model", "", "params", "slim", "ms", "slim", "times faster", "difference of the loss"],
        rows,
        f"Medians of {args.rounds} rounds, alternatives in turn. A GPT of {size / 1e9:.1f} billion params under scan, "
        f"from its shapes: {seconds:.2f} s for trace and analysis, {taken:.2f} GB; {grouping:.2f} s more for its "
        f"{number} channel groups.",
    )


if __name__ == "__main__":
    main()
