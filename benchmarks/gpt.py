"""Train steps of a GPT: with links that change their masks beside the dense optimizer, and without half of its units.

Random tokens, AdamW, all kernels of the blocks at 90% zeros. The smaller GPT has lost half of the hidden units and a
quarter of the heads, chosen by their activations; its train step, and how it generates, are beside the whole one's.

Usage: ``python -m benchmarks.gpt [--size 3m] [--batch 16] [--steps 2] [--rounds 7]``
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import optax

import jaxsparse
from benchmarks import timing
from benchmarks.update import NEVER
from jaxsparse.models import GPT, generate
from jaxsparse.post_training import prune_channels

# width, blocks, heads, tokens of the vocabulary, length of the texts
SIZES = {"smallest": (32, 2, 4, 64, 32), "3m": (256, 4, 4, 256, 256), "124m": (768, 12, 12, 50_257, 1024)}
LINKS = {  # with the steps between two changes of masks
    "sparse_momentum": functools.partial(jaxsparse.sparse_momentum, 0.9),
    "rigl": lambda every, **options: jaxsparse.rigl(
        0.9, every, drop_fraction=optax.constant_schedule(0.3), bias_correction=(0.9, 0.999), **options
    ),
    "magnitude_pruning": lambda every, **options: jaxsparse.magnitude_pruning(
        optax.linear_schedule(0.009, 0.9, 100), begin=every, every=every, **options
    ),
}
UNITS, HEADS = 0.5, 0.25  # the shares that the smaller GPT has lost


def make(size, batch, dtype):
    """A GPT, its params, and tokens."""
    width, blocks, heads, vocabulary, length = SIZES[size]
    model = GPT(vocabulary, width, blocks, num_heads=heads, max_length=length, dtype=jnp.dtype(dtype))
    tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, vocabulary)
    return model, jax.jit(model.init)(jax.random.key(0), tokens)["params"], tokens


def stepper(model, params, tokens, steps, link=None):
    """A function that takes so many train steps of its own params and state."""
    adamw = optax.adamw(1e-3)
    tx = adamw if link is None else jaxsparse.chain(adamw, link)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        def loss(params):
            logits = model.apply({"params": params}, tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    held = jax.tree.map(jnp.copy, params), tx.init(params)

    def run():
        nonlocal held
        for _ in range(steps):
            held = step(*held)
        return held

    return run


def with_link(size, batch, dtype, link, steps, rounds):
    """Seconds of a train step, dense, with a link that changes no mask, and of one that changes its masks."""
    model, params, tokens = make(size, batch, dtype)
    run = functools.partial(stepper, model, params, tokens)
    made = functools.partial(LINKS[link], prunable="block*/*")
    seconds = timing.interleaved({"dense": run(steps), "no change": run(steps, made(NEVER))}, rounds)
    seconds = {name: value / steps for name, value in seconds.items()}
    return seconds | timing.interleaved({"change": run(1, made(1))}, 3)


def without_channels(size, batch, dtype, steps, rounds):
    """Seconds of a train step and of generating, of the whole GPT and of the smaller one, and their params."""
    model, params, tokens = make(size, batch, dtype)

    def apply(params, tokens):
        return model.apply({"params": params}, tokens)

    small_params = prune_channels(apply, params, [tokens], {"units": UNITS, "heads": HEADS}).params
    both = {"whole": (model, params), "smaller": (model.fitted(small_params), small_params)}
    prompts = tokens[:, : tokens.shape[1] // 8]
    train = timing.interleaved({name: stepper(*one, tokens, steps) for name, one in both.items()}, rounds)
    texts = {name: functools.partial(generate, *one, prompts, tokens.shape[1]) for name, one in both.items()}
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(one)) for name, (_, one) in both.items()}
    return {name: value / steps for name, value in train.items()}, timing.interleaved(texts, rounds), counts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="3m", help="about so many weights (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="texts")
    parser.add_argument("--dtype", default="float32", help="of the computation, or bfloat16")
    parser.add_argument("--steps", type=int, default=2, help="a turn")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    size, batch, dtype = options.size, options.batch, options.dtype

    def row(what, baseline, ours, beside):
        return [what, f"{1e3 * baseline:.1f}", f"{1e3 * ours:.1f}", f"{ours / baseline:.3f}", beside]

    rows = []
    for link in LINKS:
        seconds = with_link(size, batch, dtype, link, options.steps, options.rounds)
        change = f"a step that changes masks {1e3 * seconds['change']:.0f} ms"
        rows.append(row(f"train step, {link}", seconds["dense"], seconds["no change"], change))
        print(rows[-1], flush=True)
    train, texts, counts = without_channels(size, batch, dtype, options.steps, options.rounds)
    params = f"{counts['whole']:,} and {counts['smaller']:,} params"
    rows.append(row("train step, without half of the units", train["whole"], train["smaller"], params))
    rows.append(row("generating, without half of the units", texts["whole"], texts["smaller"], params))
    timing.save(
        "gpt",
        f"Train steps of a GPT ({size})",
        ["what", "dense, ms", "sparse, ms", "sparse / dense", "beside that"],
        rows,
        f"Batches of {batch} texts of {SIZES[size][-1]} tokens, {dtype}. Medians of {options.rounds} rounds of "
        f"{options.steps} steps, alternatives in turn (steps that change masks: of 3). AdamW, all kernels of the "
        "blocks at 90% zeros. The GPT without half of its units has lost a quarter of its heads too.",
    )


if __name__ == "__main__":
    main()
