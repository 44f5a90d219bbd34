"""Both parts of ASNI: prune while training, then start again from two numbers a layer, beside what they compare with.

  python -m experiments.asni --config=configs/mnist_asni.py:fc --config.data_dir=DIR --workdir=/tmp/mnist_asni
  python -m experiments.asni ... --seeds=0,1,2
  python -m experiments.asni ... --arms=dense,asni_1,asni_2        # not all of them

trains one after another, each in its folder of WORKDIR (what is in there, python -m experiments.train --help tells),

  dense           the same without pruning
  asni_1          ASNI-I: pruned once an epoch
  asni_2          ASNI-II: the masks and signs of asni_1, two numbers a layer, biases zero
  asni_2_biases   likewise, with two numbers of each layer's biases
  original        the masks of asni_1, the random weights that it started from: the lottery ticket

and prints them side by side. What was stopped goes on where it was when the same command is given again.
"""

import itertools
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict

from experiments import command_line
from experiments.compare import mean_and_error
from experiments.train import FLAGS, Stopped, as_seeds, config_of_flags, train, with_seed
from jaxsparse.tables import Table

flags.DEFINE_list("arms", None, "Train these only; by default all of them.")

# What each changes in the config of ASNI-I; those with fixed masks need the file of its run.
ARMS: Mapping[str, Mapping[str, Any]] = {
    "dense": {"dense": True},
    "asni_1": {},
    "asni_2": {"sparsity.method": "mask_updates", "sparsity.start": "centroids"},
    "asni_2_biases": {"sparsity.method": "mask_updates", "sparsity.start": "centroids_and_biases"},
    "original": {"sparsity.method": "mask_updates", "sparsity.start": "original"},
}
FIRST = "asni_1"


def run(config: ConfigDict, workdir: Path, seeds: Sequence[int], arms: Sequence[str] = tuple(ARMS)) -> str:
    """Trains every arm with every seed, in folders such as ``workdir/asni_1/seed_0``.

    Args:
      config: of ASNI-I, such as ``configs/mnist_asni.py`` gives.
      workdir: folder of all runs.
      seeds: one or more.
      arms: names out of :data:`ARMS`.

    Returns:
      A table: test accuracy with its standard error, its difference from the first arm, density of the layers.

    Raises:
      ValueError: for another method's config, arms that are not there or lack the run they start from; otherwise as
        :func:`experiments.train.train`.
    """
    if unknown := set(arms) - set(ARMS):
        raise ValueError(f"--arms takes {', '.join(ARMS)}, got {', '.join(sorted(unknown))}")
    if config.sparsity.method != "asni" or config.dense:
        raise ValueError(
            f"this takes a config of ASNI-I, such as configs/mnist_asni.py, got {config.sparsity.method!r}"
        )
    for arm, seed in itertools.product(arms, seeds):
        if "sparsity.method" in ARMS[arm] and FIRST not in arms and not masks_of(workdir / FIRST, seed).exists():
            raise ValueError(
                f"{arm} starts from the masks of {FIRST}, of which there is no {masks_of(workdir / FIRST, seed)}"
            )
    results: dict[str, list[Mapping[str, Any]]] = {arm: [] for arm in ARMS if arm in arms}
    for seed in seeds:
        for arm in results:
            print(f"{arm}, seed {seed}", flush=True)
            mine = with_seed(config, seed)
            changes = dict(ARMS[arm])
            if "sparsity.method" in changes:
                changes["sparsity.masks_from"] = str(masks_of(workdir / FIRST, seed))
            mine.update_from_flattened_dict(changes)
            results[arm] += train(mine, workdir / arm / f"seed_{seed}")[1]
    return table(results)


def masks_of(runs: Path, seed: int) -> Path:
    """The file with the masks and weights of one of the runs of ASNI-I, which have a folder for each seed."""
    return runs / f"seed_{seed}" / "sparse.safetensors"


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One line an arm, of its result.json files."""
    rows: list[tuple[str, ...]] = []
    baseline = None
    for arm, of_arm in results.items():
        mean, error = mean_and_error([100 * result["test_accuracy"] for result in of_arm])
        baseline = mean if baseline is None else baseline
        density, _ = mean_and_error([result["density"] for result in of_arm])
        accuracy = f"{mean:.2f}" + ("" if error is None else f" ± {error:.3f}")
        rows.append((arm, f"{density:.2%}", accuracy, f"{mean - baseline:+.2f}"))
    return Table(("arm", "density", "test accuracy", "difference"), tuple(rows)).text()


def main(argv: Sequence[str]) -> None:
    """Runs :func:`run` with the flags; what the user can set right is told in a line, without a traceback."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options start with --")
    try:
        config = config_of_flags()
        seeds = [config.seed] if FLAGS.seeds is None else as_seeds(FLAGS.seeds)
        print(run(config, Path(FLAGS.workdir), seeds, tuple(FLAGS.arms or ARMS)))
    except Stopped as stopped:
        print(f"stopped by {signal.Signals(stopped.signal).name} {stopped}; the same command goes on from there")
        sys.exit(128 + stopped.signal)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
