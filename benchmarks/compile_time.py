"""How long XLA takes to compile an update with each link or wrapper, beside AdamW: 72 kernels of 12 transformer layers.

Compiles ``tx.update`` and ``optax.apply_updates`` for shapes, from tracing on, every case in turn, ``--rounds`` times,
and keeps the shortest time, which other work on the machine disturbs least, as a multiple of AdamW's. A table of some
links alone is printed, not kept.

Usage: ``python -m benchmarks.compile_time [--rounds 5] [NAME ...]``
"""

import argparse
import time

import jax
import jax.numpy as jnp
import optax

import jaxsparse
from benchmarks import timing

WIDTH, LAYERS = 256, 12
LINKS = {
    "mask_updates": lambda: jaxsparse.mask_updates(
        jax.tree.map(lambda p: jnp.ones(p.shape if p.ndim > 1 else (), bool), transformer())
    ),
    "sparse_momentum": lambda: jaxsparse.sparse_momentum(0.9, 100),
    "sparse_momentum, random growth": lambda: jaxsparse.sparse_momentum(0.9, 100, growth="random"),
    "sparse_momentum, n:m": lambda: jaxsparse.sparse_momentum(0.5, 100, structure=jaxsparse.n_of_m(2, 4)),
    "rigl": lambda: jaxsparse.rigl(0.9, stop_at=1000),
    "rigl, bias_correction": lambda: jaxsparse.rigl(0.9, stop_at=1000, bias_correction=(0.9, 0.999)),
    "sparse_evolutionary": lambda: jaxsparse.sparse_evolutionary(0.9, 100),
    "srigl": lambda: jaxsparse.srigl(0.9, stop_at=1000, never_ablate=()),
    "granet": lambda: jaxsparse.granet(0.9, steps=10_000),
    "ac_dc": lambda: jaxsparse.ac_dc(0.9, [0, 200], [100]),
    "iterative_hard_thresholding": lambda: jaxsparse.iterative_hard_thresholding(0.9, every=100),
    "asni": lambda: jaxsparse.asni(0.9, 100),
    "magnitude_pruning": lambda: jaxsparse.magnitude_pruning(0.9, end=1000),
    "magnitude_pruning, lamp": lambda: jaxsparse.magnitude_pruning(0.9, end=1000, scope="lamp"),
    "reweighted_l1": lambda: jaxsparse.reweighted_l1(1e-3, l1=1e-3),
}
WRAPPERS = {  # around AdamW
    "straight_through": lambda inner: jaxsparse.straight_through(inner, 0.9, every=100),
    "sr_ste": lambda inner: jaxsparse.sr_ste(inner, 2, 4),
    "top_kast": lambda inner: jaxsparse.top_kast(inner, 0.9, 0.8, every=100),
    "soft_threshold": lambda inner: jaxsparse.soft_threshold(inner),
    "admm": lambda inner: jaxsparse.admm(inner, 0.9),
}


def transformer() -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a decoder's params: six kernels, their biases and two norms a layer."""
    params = {}
    for layer in range(LAYERS):
        for name in ("query", "key", "value", "out"):
            params[f"{layer}/attention/{name}/kernel"] = (WIDTH, WIDTH)
            params[f"{layer}/attention/{name}/bias"] = (WIDTH,)
        for name, shape in (("wide", (WIDTH, 4 * WIDTH)), ("narrow", (4 * WIDTH, WIDTH))):
            params[f"{layer}/mlp/{name}/kernel"] = shape
            params[f"{layer}/mlp/{name}/bias"] = shape[1:]
        for name in ("norm1", "norm2"):
            params |= {f"{layer}/{name}/scale": (WIDTH,), f"{layer}/{name}/bias": (WIDTH,)}
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in params.items()}


def around_adamw(name: str) -> optax.GradientTransformation:
    """AdamW with the link or wrapper of that name; by its own name alone."""
    adamw = optax.adamw(1e-3)
    if name in WRAPPERS:
        return WRAPPERS[name](adamw)
    return jaxsparse.chain(*([adamw] if name == "AdamW" else [adamw, LINKS[name]()]))


def seconds(name: str) -> float:
    """Of tracing, lowering and compiling one step."""
    tx, params = around_adamw(name), transformer()
    state = jax.eval_shape(tx.init, params)

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    jax.clear_caches()
    started = time.perf_counter()
    jax.jit(step, donate_argnums=(1, 2)).lower(params, state, params).compile()
    return time.perf_counter() - started


def main() -> None:
    """Prints a table, and keeps it where it has all the links."""
    known = [*LINKS, *WRAPPERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of these alone: {', '.join(known)}")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if unknown := sorted({*arguments.names} - {*known}):
        parser.error(f"there is no {', '.join(unknown)}: choose from {', '.join(known)}")
    cases = ["AdamW", *(arguments.names or known)]
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(arguments.rounds):
        for name in cases:
            taken[name].append(seconds(name))
    base = min(taken["AdamW"])
    table = (
        "compile_time",
        "Compile time of one update",
        ["chain", "seconds", "of AdamW's"],
        [[name, f"{min(times):.2f}", f"{min(times) / base:.2f}"] for name, times in taken.items()],
        f"Tracing, lowering and compiling `tx.update` and `optax.apply_updates` for the {6 * LAYERS} kernels (and the "
        f"biases and norms) of a {LAYERS}-layer transformer, behind AdamW or, with wrappers, around it. The shortest "
        f"of {arguments.rounds} rounds.",
    )
    if arguments.names:
        print(timing.as_markdown(*table))
    else:
        timing.save(*table)


if __name__ == "__main__":
    main()
