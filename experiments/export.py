"""Write the weights of a run, or of a file of jaxsparse.save_sparse, to a file.

  python -m experiments.export WORKDIR model.safetensors                   # sparse: survivors and where they are
  python -m experiments.export WORKDIR model.safetensors --dtype=bfloat16  # the same in less
  python -m experiments.export WORKDIR model.npz                           # for numpy.load, zeros included
  python -m experiments.export model.safetensors dense.safetensors --to=dense

Of a run these are the weights that the network computes with (jaxsparse.eval_params) at its last checkpoint, and the
masks; gates are multiplied into the weights, and what they close is stored as zeros. Printed is what each leaf takes.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

import jaxsparse
from experiments.checkpoints import Checkpoints, size_in_bytes
from experiments.command_line import as_path, not_empty
from experiments.inputs import open_dataset
from experiments.outcome import one_a_run
from experiments.program import Program, TrainState, make_program
from experiments.workdir import read_json
from jaxsparse import artifacts, inspect
from jaxsparse.artifacts import formats

FORMATS = ("sparse", "dense", "npz")


def export(
    source: Path, out: Path, to: str | None = None, dtype: str | None = None, data_dir: str | None = None
) -> str:
    """Writes a file.

    Args:
      source: the folder of a run, or a file that ``jaxsparse.save_sparse`` wrote.
      out: the file to write.
      to: "sparse" (``jaxsparse.save_sparse``), "dense" (an ordinary safetensors file) or "npz"; None goes by the suffix
        of ``out``: "npz" for .npz, else "sparse".
      dtype: of the values, for "sparse".
      data_dir: where the data of the run are, instead of where its configuration says.

    Returns:
      A table of what was written, and its size beside that of the dense arrays.

    Raises:
      ValueError: for options that do not go together, and a file that cannot be read.
      OSError: if there is no such run, it has no checkpoint, or ``out`` cannot be written.
    """
    to = to or ("npz" if out.suffix == ".npz" else "sparse")
    if dtype is not None and to != "sparse":
        raise ValueError(f"--dtype is for --to=sparse, and this is {to}")
    params, masks = restore(source, data_dir) if source.is_dir() else jaxsparse.load_sparse(source)
    if to == "sparse":
        jaxsparse.save_sparse(out, params, masks, dtype=dtype)
        return artifacts.describe(out)
    if to == "dense":
        formats.save_dense(out, params)
    else:
        formats.save_npz(out, params, masks)
    dense, written = size_in_bytes(params), out.stat().st_size
    table = jaxsparse.summary(jax.tree.map(lambda x: np.array(True), params) if masks is None else masks, params)
    return f"{table}\n{written:,} bytes, {written / dense:.2%} of the {dense:,} of the dense arrays"


def restore(workdir: Path, data_dir: str | None = None) -> tuple[Any, Any]:
    """The params that a run evaluates at its last checkpoint, and its masks; None for the masks of gates.

    Raises:
      OSError, ValueError: as :func:`restore_run`.
    """
    program, params, state = restore_run(workdir, data_dir)
    gated = program.optimizer.groups is not None
    return params, None if gated else inspect.current_masks(state.opt_state, state.params)


def restore_run(workdir: Path, data_dir: str | None = None) -> tuple[Program, Any, TrainState]:
    """The program of a run, the params that it evaluates at its last checkpoint, and its state there, on one device.

    Raises:
      OSError: if this is not the folder of a run, it has no checkpoint, or its data are not there.
      ValueError: if its configuration is none of this version.
    """
    config = read_json(workdir / "config.json")
    if config is None:
        raise OSError(f"{str(workdir)!r} is not the folder of a run: it has no config.json")
    config = ConfigDict(config)
    if "method" not in config:
        raise ValueError(f"{str(workdir)!r} is a run of another version: its config.json has no 'method'")
    seeds = config.get("side_by_side")  # their checkpoints are of all of them, a folder above
    folder = (workdir if seeds is None else workdir.parent) / "checkpoints"
    if not folder.is_dir():
        raise OSError(f"{str(workdir)!r} has no checkpoint")
    config.data_dir = data_dir or config.data_dir
    for key in ("distill_from", "start_from"):  # the weights do not depend on what they learned and began from any more
        if key in config:
            del config[key]
    dataset, seed = open_dataset(config), np.asarray(config.seed if seeds is None else seeds, np.uint32)
    devices = _enough(config)
    program = make_program(config, dataset, side_by_side=seeds is not None, devices=devices)

    def shapes(about):
        nonlocal program
        if about.get("pruned"):
            program = make_program(config, dataset, devices=devices, pruned=about["pruned"])
        return program.layout.collected_shapes(jax.eval_shape(program.init, seed), about.get("devices"))

    with closing(Checkpoints(folder)) as checkpoints:
        restored = checkpoints.restore(shapes)
    if restored is None:
        raise OSError(f"{str(workdir)!r} has no checkpoint")
    state = one_a_run(restored[1], seeds)[0 if seeds is None else list(seeds).index(config.seed)]
    state = program.layout.one_copy(program.layout.restore(state))
    params = state.params if config.dense else jaxsparse.eval_params(state.opt_state, state.params)
    return program, params, state


def _enough(config: ConfigDict) -> list[jax.Device] | None:
    """As many devices as share the run's batches equally, of which other machines have had another number; or all."""
    devices, parts = jax.devices(), config.data.batch_size // config.parallel.accumulate
    if jax.process_count() > 1 or parts % len(devices) == 0:
        return None
    return devices[: max(count for count in range(1, len(devices)) if parts % count == 0)]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=as_path, metavar="WORKDIR_OR_FILE", help="folder of a run, or a sparse model")
    parser.add_argument("out", type=as_path, metavar="OUT", help="the file to write")
    parser.add_argument("--to", choices=FORMATS, help="npz for a name that ends in .npz, else sparse")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "int8"), help="of the values, for sparse")
    parser.add_argument("--data_dir", type=not_empty, help="where the data of the run are, if not where they were")
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.WARNING)
    try:
        print(export(args.source, args.out, args.to, args.dtype, args.data_dir))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
