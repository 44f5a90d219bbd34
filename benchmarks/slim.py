"""How much faster a network is without its closed channels.

Closes the same share of the channels of every group of a network at random, takes them out with
:func:`jaxsparse.models.slim`, and times the evaluation of a batch with both, jitted, in turn. Checks that they agree.

Usage: ``python -m benchmarks.slim [--closed 0.5] [--batch 128] [--rounds 15]``
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from jaxsparse import models
from jaxsparse.groups import group_sizes
from jaxsparse.trees import by_path

NETWORKS = {
    "LeNet-300-100": (models.LeNet300100(), (28, 28, 1)),
    "LeNet-5": (models.LeNet5Caffe(), (28, 28, 1)),
    "VGG16": (models.VGG("16"), (32, 32, 3)),
    "ResNet-56": (models.ResNet56(project=True), (32, 32, 3)),
}


def close(model, params, share, random):
    """The params with so many of the channels of every group multiplied by zero."""
    groups, leaves = models.channel_groups(model), by_path(params)
    for group, size in zip(groups, group_sizes(groups, params), strict=True):
        gates = jnp.asarray(random.permutation(size) >= share * size, jnp.float32)
        for path, axis, _ in group.multiplies:
            shape = [1] * leaves[path].ndim
            shape[axis] = -1
            leaves[path] = leaves[path] * gates.reshape(shape)
    return jax.tree.structure(params).unflatten(list(leaves.values()))


def pair(name, share, batch, random):
    """The evaluation of the whole network and of the slim one, their sizes, and how far apart their results are."""
    model, shape = NETWORKS[name]
    images = jnp.asarray(random.standard_normal((batch, *shape)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    params, stats = close(model, variables["params"], share, random), variables.get("batch_stats")
    small, slim_params, slim_stats = models.slim(model, params, stats)

    def evaluation(model, params, stats):
        apply = jax.jit(model.apply)
        collections = {"params": params} | ({} if stats is None else {"batch_stats": stats})
        return lambda: apply(collections, images)

    runs = {"whole": evaluation(model, params, stats), "slim": evaluation(small, slim_params, slim_stats)}
    away = float(jnp.abs(runs["whole"]() - runs["slim"]()).max() / jnp.abs(runs["whole"]()).max())
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, slim_params)]
    return runs, sizes, away


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--closed", type=float, default=0.5, help="share of the channels that are closed")
    parser.add_argument("--batch", type=int, default=128, help="images")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each alternative")
    args = parser.parse_args()

    rows, random = [], np.random.RandomState(0)
    for name in NETWORKS:
        runs, sizes, away = pair(name, args.closed, args.batch, random)
        median = timing.interleaved(runs, args.rounds)
        rows.append([
            name, f"{sizes[0]:,}", f"{sizes[1]:,}", f"{1e3 * median['whole']:.1f}", f"{1e3 * median['slim']:.1f}",
            f"{median['whole'] / median['slim']:.1f}", f"{away:.0e}",
        ])  # fmt: skip
    timing.save(
        "slim",
        f"Networks without the {args.closed:.0%} of their channels that are closed, batches of {args.batch}",
        ["network", "params", "slim", "ms", "slim", "times faster", "largest difference, of the largest logit"],
        rows,
        f"Medians of {args.rounds} rounds, alternatives in turn.",
    )


if __name__ == "__main__":
    main()
