"""How large sparse models are on disk, and how long it takes to write and read them.

LeNet-300-100 with 5% of its weights and a ResNet-50 with 10%, on uniform random masks, beside files of dense arrays.
"init" is what a run of ASNI-II starts from: signs, masks and two numbers a layer.

Usage: ``python -m benchmarks.artifacts [--rounds 5]``
"""

import argparse
import os
import tempfile

import flax
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

import jaxsparse
from benchmarks import networks, timing
from jaxsparse import models
from jaxsparse.trees import by_path


def lenet():
    """LeNet-300-100 as it is initialised."""
    return models.LeNet300100().init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]


def resnet50():
    return flax.traverse_util.unflatten_dict(networks.resnet50(0), sep="/")


def formats(params, masks):
    """By name: a function that writes a file, and one that reads it."""
    dense = by_path(params)
    init = jaxsparse.centroids(params, masks)

    def sparse(**options):
        return lambda path: jaxsparse.save_sparse(path, params, masks, **options), jaxsparse.load_sparse

    def load_npz(path):
        with np.load(path) as archive:
            return dict(archive)

    return {
        "dense, safetensors": (
            lambda path: safetensors.numpy.save_file(dense, path),
            safetensors.numpy.load_file,
        ),
        "dense, np.savez": (lambda path: np.savez(path, **dense), load_npz),
        "sparse, float32": sparse(),
        "sparse, bfloat16": sparse(dtype="bfloat16"),
        "sparse, int8": sparse(dtype="int8"),
        "sparse, init": sparse(init=init),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each alternative")
    args = parser.parse_args()

    rows = []
    for network, make, sparsity in (("LeNet-300-100", lenet, 0.95), ("ResNet-50", resnet50, 0.9)):
        params = make()
        masks = jaxsparse.random_masks(params, sparsity)
        params, masks = jax.device_get((jaxsparse.apply_masks(params, masks), masks))
        alternatives = formats(params, masks)
        with tempfile.TemporaryDirectory() as folder:
            paths = {name: f"{folder}/{i}.npz" for i, name in enumerate(alternatives)}
            saving = {name: lambda save=save, path=paths[name]: save(path) for name, (save, _) in alternatives.items()}
            loading = {name: lambda load=load, path=paths[name]: load(path) for name, (_, load) in alternatives.items()}
            saved, loaded = timing.interleaved(saving, args.rounds), timing.interleaved(loading, args.rounds)
            sizes = {name: os.path.getsize(path) for name, path in paths.items()}
        for name, size in sizes.items():
            rows.append([
                network, name, f"{size:,}", f"{size / sizes['dense, safetensors']:.1%}",
                f"{1e3 * saved[name]:,.1f}", f"{1e3 * loaded[name]:,.1f}",
            ])  # fmt: skip
    timing.save(
        "artifacts",
        "Sparse models on disk: LeNet-300-100 at 95% sparsity, a ResNet-50 at 90%",
        ["network", "file", "bytes", "of the dense file", "save, ms", "load, ms"],
        rows,
        f"Medians of {args.rounds} rounds, alternatives in turn. Sparse files are checksummed, and are on the disk "
        "(fsync) when the call returns; the others may be in the memory of the system.",
    )


if __name__ == "__main__":
    main()
