"""Train steps of an unchanged GPT on block kernels (``trace.sparse_apply``), beside those of the dense one.

A Flax transformer whose blocks are scanned and rematerialised. A step is the loss, its gradients and SGD with momentum,
with block masks on every matrix of the blocks; embeddings are dense. The alternatives in turn, in one process.

Usage: ``python -m benchmarks.trace_sparse [--models gpt-256 gpt-1024] [--density 0.1] [--rounds 7]``
"""

import argparse
import functools
import statistics
import sys

import jax
import optax
from flax import linen as nn

import jaxsparse
from benchmarks import timing
from jaxsparse import trace

VOCABULARY = 512
MODELS = {  # width, layers, heads, block
    "gpt-256": (256, 4, 4, 64),
    "gpt-1024": (1024, 2, 8, 128),
}


class Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(nn.RMSNorm()(x), mask=mask)
        h = nn.gelu(nn.Dense(4 * x.shape[-1], name="up")(nn.RMSNorm()(x)))
        return x + nn.Dense(x.shape[-1], name="down")(h)


class GPT(nn.Module):
    width: int
    layers: int
    heads: int

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, self.width, name="embed")
        x = embed(tokens) + self.param("positions", nn.initializers.normal(0.02), (tokens.shape[1], self.width))
        blocks = nn.remat(Block, prevent_cse=False)(self.heads, name="blocks")
        lifted = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": self.layers}
        x, _ = nn.scan(lambda block, x, _: (block(x), None), **lifted)(blocks, x, None)
        return embed.attend(nn.RMSNorm()(x))


def step_of(product, tx):
    """A train step: ``product(params, masks, tokens)`` gives the logits."""

    def loss(params, masks, tokens):
        logits = product(params, masks, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def step(params, state, masks, tokens):
        value, grads = jax.value_and_grad(loss)(params, masks, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def alternatives(name, length, tokens, density):
    """Functions that run a step, and the report of what is multiplied by blocks."""
    width, layers, heads, side = MODELS[name]
    model = GPT(width, layers, heads)
    data = jax.random.randint(jax.random.key(0), (tokens // length, length + 1), 0, VOCABULARY)
    params = jax.jit(model.init)(jax.random.key(1), data[:, :-1])
    unit = jaxsparse.block(side, side)
    masks = jaxsparse.random_masks(params, 1 - density, key=2, structure=unit, prunable="*/blocks/*/kernel")
    tx = optax.sgd(0.1, momentum=0.9)
    fast = trace.sparse_apply(model.apply, block=unit)
    runs = {}
    for kind, product in {"dense": lambda p, m, x: model.apply(p, x), "blocks": fast}.items():
        start = params if kind == "dense" else jaxsparse.apply_masks(params, masks)
        runs[kind] = functools.partial(step_of(product, tx), start, tx.init(start), masks, data)
    return runs, fast.report(params, masks, data[:, :-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="MODEL")
    parser.add_argument("--density", type=float, default=0.1, help="share of the blocks that live")
    parser.add_argument("--tokens", type=int, default=4096, help="batch times length")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each")
    args = parser.parse_args()

    rows = []
    for name in args.models:
        runs, report = alternatives(name, args.length, args.tokens, args.density)
        seconds = timing.rounds_of(runs, args.rounds)
        width, layers, _, side = MODELS[name]
        against = [dense / ours for dense, ours in zip(seconds["dense"], seconds["blocks"], strict=True)]
        rows.append([
            f"{width}, {layers}", f"{side} x {side}", f"{report.share:.0%}",
            *(f"{statistics.median(times):.2f}" for times in seconds.values()),
            f"{statistics.median(against):.2f}", f"{min(against):.2f} to {max(against):.2f}",
        ])  # fmt: skip
        print(report, " | ".join(rows[-1]), sep="\n", file=sys.stderr)
    timing.save(
        "trace_sparse",
        "Train steps of an unchanged GPT on block kernels",
        ["width, blocks", "blocks of", "of the masked products", "dense, s", "by blocks, s", "times as fast", "range"],
        rows,
        f"{args.density:.0%} of the blocks live; {args.tokens} tokens a step in sequences of {args.length}. Medians of "
        f"{args.rounds} steps, and of the ratios of steps that followed one another.",
    )


if __name__ == "__main__":
    main()
