"""The files of a finished run of a network with batch normalisation: how large they are, and how well they do.

  python -m experiments.footprint WORKDIR

writes WORKDIR/footprint.json: of the network with batch normalisation folded into its layers, and without its closed
channels, the share of the multiply-adds that are not by zeros, and for values in float32 and in int8 the bytes of the
file of jaxsparse.save_sparse and the test accuracy of what it holds.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

import jaxsparse
from experiments import data
from experiments.command_line import as_path, not_empty
from experiments.export import restore_run
from experiments.finished import errors_in_a_line
from experiments.program import Program
from experiments.workdir import read_json, write_json
from jaxsparse import inspect, models
from jaxsparse.trees import by_path

NAME, DTYPES = "footprint.json", ("float32", "int8")


def footprint(workdir: Path, data_dir: str | None = None) -> dict[str, Any]:
    """Measure the files of a finished run, or read what was measured before from its footprint.json.

    Args:
      workdir: the folder of a run that is finished.
      data_dir: where its data are, instead of where its configuration says.

    Returns:
      "multiply_adds", a share of those of the dense network, and for each of :data:`DTYPES` "bytes_float32", ... and
      "test_accuracy_float32", ....

    Raises:
      OSError: if this is not the folder of a finished run, or its data are not there.
      ValueError: for a model that has no batch normalisation to fold, and streamed images.
    """
    if (known := read_json(workdir / NAME)) is not None:
        return known
    if read_json(workdir / "result.json") is None:
        raise OSError(f"{str(workdir)!r} is not the folder of a finished run: it has no result.json")
    config: dict[str, Any] = read_json(workdir / "config.json") or {}
    if config.get("data", {}).get("streamed"):
        raise ValueError(f"{str(workdir)!r} streams its images; this takes data that fit into the memory")
    program, params, state = restore_run(workdir, data_dir)
    stats = state.model_state.get("batch_stats")
    if stats is None:
        raise ValueError(f"{str(workdir)!r}: {type(program.model).__name__} has no batch normalisation to fold")
    model, masks = program.model, None
    dense = _multiply_adds(program, model, jax.tree.map(np.ones_like, params))
    by_channels = program.optimizer.groups is not None or config["method"].get("structure") == "channel"
    if by_channels and not config["dense"]:
        model, params, stats = models.slim(model, params, stats)
    elif not config["dense"]:
        masks = inspect.current_masks(state.opt_state, state.params)
    found = {"multiply_adds": _multiply_adds(program, model, params) / dense}
    model, params, *masks = models.fold_batch_norm(model, params, stats, *([] if masks is None else [masks]))
    # int8 is for leaves with masks: those of kernels that are dense keep all.
    whole = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool) if leaf.ndim > 1 else np.array(True), params)
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            file = Path(folder) / dtype
            jaxsparse.save_sparse(file, params, *(masks or ([whole] if dtype == "int8" else [])), dtype=dtype)
            found[f"bytes_{dtype}"] = file.stat().st_size
            found[f"test_accuracy_{dtype}"] = _accuracy(program, model, jaxsparse.load_sparse(file)[0])
    write_json(workdir / NAME, found)
    return found


def _multiply_adds(program: Program, model: Any, params: Any) -> int:
    """The multiply-adds of an image that are not by zeros."""
    leaves = by_path(params)
    return sum(int(np.count_nonzero(leaves[path])) * number for path, number in program.positions(model).items())


def _accuracy(program: Program, model: Any, params: Any) -> float:
    """The share of the test images that a model without batch statistics classifies correctly."""
    task, split = program.task, program.layout.replicate(program.task.dataset.test)

    @jax.jit
    def hits(params, split):
        def of_batch(batch):
            images, labels, real = task.evaluated(batch, split)
            found = model.apply({"params": params}, task.inputs(images)).argmax(-1) == labels
            return (found & real).sum()

        return jax.lax.map(of_batch, task.in_batches(split, task.eval_batch)).sum()

    return float(hits(params, split) / data.count(split))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.footprint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdir", type=as_path, metavar="WORKDIR", help="folder of a finished run")
    parser.add_argument("--data_dir", type=not_empty, help="where the data of the run are, if not where they were")
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.WARNING)
    with errors_in_a_line():
        found = footprint(args.workdir, args.data_dir)
    print(f"multiply-adds: {found['multiply_adds']:.2%} of the dense network's")
    for dtype in DTYPES:
        print(f"{dtype}: {found[f'bytes_{dtype}']:,} bytes, test accuracy {found[f'test_accuracy_{dtype}']:.2%}")


if __name__ == "__main__":
    main()
