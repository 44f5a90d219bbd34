"""What one update of L0 gates costs on a ResNet-50, against the optimizer inside alone.

Times ``tx.update`` and ``optax.apply_updates``, jitted, with params and state donated, on the 25.6 million parameters
of :class:`jaxsparse.models.ResNet50` with its 33 groups of channels: SGD with momentum, then the same in
:func:`jaxsparse.l0` and in :func:`jaxsparse.dep_l0` forward, with the authors' penalty.

Usage: ``python -m benchmarks.gates [--rounds 15]``
"""

import argparse

import jax
import jax.numpy as jnp
import optax

import jaxsparse
from benchmarks import timing
from benchmarks.update import runner
from jaxsparse import models


def params_of(model: models.ResNet50, seed: int) -> dict:
    """Random numbers in the shapes of the model's params."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten([
        0.05 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)
    ])  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each alternative")
    args = parser.parse_args()

    model = models.ResNet50()
    groups = models.channel_groups(model)
    params, *grads = (params_of(model, seed) for seed in range(3))
    inner = optax.sgd(0.1, momentum=0.9)
    alternatives = {
        "SGD momentum": inner,
        "l0": jaxsparse.l0(inner, groups, penalty=5e-9),
        "dep_l0, forward": jaxsparse.dep_l0(inner, groups, penalty=5e-9),
    }
    median = timing.interleaved({name: runner(tx, params, grads) for name, tx in alternatives.items()}, args.rounds)
    count = sum(p.size for p in jax.tree.leaves(params))
    rows = []
    for name, tx in alternatives.items():
        state = tx.init(params)
        held = sum(x.nbytes for x in jax.tree.leaves(state) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key))
        ratio = median[name] / median["SGD momentum"]
        rows.append([name, f"{1e3 * median[name]:.1f}", f"{ratio:.2f}", f"{held / count:.2f}"])
    timing.save(
        "gates",
        f"One update with gates on {len(groups)} groups of channels, ResNet-50 ({count / 1e6:.1f} million parameters)",
        ["optimizer", "ms", "times", "state, bytes a parameter"],
        rows,
        f"Medians of {args.rounds} rounds, alternatives in turn.",
    )


if __name__ == "__main__":
    main()
