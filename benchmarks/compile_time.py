"""How long XLA takes to compile one update with each link, beside AdamW alone: 72 kernels of a 12-layer transformer.

Compiles ``tx.update`` and ``optax.apply_updates`` for shapes, from tracing on, every case in turn, ``--rounds`` times,
and prints the median as a multiple of AdamW's.

Usage: ``python -m benchmarks.compile_time [--rounds 3] [NAME ...]``
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import optax

import jaxsparse

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
    "asni": lambda: jaxsparse.asni(0.9, 100),
    "magnitude_pruning": lambda: jaxsparse.magnitude_pruning(0.9, end=1000),
    "magnitude_pruning, lamp": lambda: jaxsparse.magnitude_pruning(0.9, end=1000, scope="lamp"),
    "reweighted_l1": lambda: jaxsparse.reweighted_l1(1e-3, l1=1e-3),
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


def seconds(link) -> float:
    """Of tracing, lowering and compiling one step."""
    members = [optax.adamw(1e-3)] if link is None else [optax.adamw(1e-3), link()]
    tx, params = jaxsparse.chain(*members), transformer()
    state = jax.eval_shape(tx.init, params)

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    jax.clear_caches()
    started = time.perf_counter()
    jax.jit(step, donate_argnums=(1, 2)).lower(params, state, params).compile()
    return time.perf_counter() - started


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of these alone: {', '.join(LINKS)}")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if unknown := sorted({*arguments.names} - {*LINKS}):
        parser.error(f"there is no {', '.join(unknown)}: choose from {', '.join(LINKS)}")
    cases = {"AdamW": None} | {name: LINKS[name] for name in arguments.names or LINKS}
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(arguments.rounds):
        for name, link in cases.items():
            taken[name].append(seconds(link))
    base = statistics.median(taken["AdamW"])
    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}, {arguments.rounds} rounds\n")
    print("| chain | seconds | of AdamW's |\n|---|---|---|")
    for name, times in taken.items():
        print(f"| {name} | {statistics.median(times):.2f} | {statistics.median(times) / base:.2f} |")


if __name__ == "__main__":
    main()
