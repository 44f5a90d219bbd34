"""Checkpoints by Orbax, with a checksum of their own and a way back to the one before."""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

KEPT = 2  # the one before the newest is what a damaged newest one falls back to


# Orbax logs, with a traceback, what it raises as well.
logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)


class Checkpoints:
    """The checkpoints of a run, in a folder of its own; the newest two are kept.

    A checkpoint appears in the folder whole or not at all, whenever the program is killed: Orbax writes it under
    another name and renames it. What a failing disk or a power cut does to it later is found by a checksum of the
    values.

    Args:
      folder: made by the first save.
      **options: changes to Orbax's ``CheckpointManagerOptions``.

    Examples:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> checkpoints = Checkpoints(tempfile.mkdtemp())
      >>> checkpoints.save(10, {"w": jnp.ones(3)})
      >>> checkpoints.restore(like={"w": jnp.zeros(3)})
      (10, {'w': Array([1., 1., 1.], dtype=float32)})
      >>> checkpoints.close()
    """

    def __init__(self, folder: str | Path, **options: Any):
        self.folder = Path(folder).absolute()
        self._manager = ocp.CheckpointManager(
            self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=KEPT, **options)
        )

    def steps(self) -> list[int]:
        """The steps of which there are checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any) -> None:
        """Begins to write a checkpoint; the state may be donated at once. Errors may come with the next call."""
        about = {"step": step, "sha256": _sha256(state)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
        with _as_os_error():
            self._manager.save(step, args=items)

    def wait(self) -> None:
        """Returns when what was saved is on the disk; raises what went wrong."""
        with _as_os_error():
            self._manager.wait_until_finished()

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """The newest checkpoint that is whole: its step and state; None if there is none.

        One that cannot be read, or not with the values that were saved, is moved to ``damaged/`` beside the folder,
        with a warning.

        Args:
          like: a state of the same structure, shapes and dtypes, or ``jax.ShapeDtypeStruct`` for its leaves.

        Raises:
          OSError: if there are checkpoints, and all of them are damaged.
        """
        like = jax.eval_shape(lambda: like)
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            items = ocp.args.Composite(state=ocp.args.StandardRestore(like), about=ocp.args.JsonRestore())
            try:
                restored = self._manager.restore(step, args=items)
                if _sha256(restored.state) != restored.about["sha256"]:
                    raise ValueError("its values are not those that were saved")
            except Exception as error:  # whatever Orbax, TensorStore and JSON make of damaged files
                damaged[step] = str(error).splitlines()[0]
                continue
            self._set_aside(damaged, step)
            return step, restored.state
        if damaged:
            raise OSError(
                f"no checkpoint in {self.folder} can be restored: "
                + "; ".join(f"step {step}: {why}" for step, why in damaged.items())
                + ". Delete the workdir to begin anew"
            )
        return None

    def close(self) -> None:
        """Waits for the last save and ends Orbax's threads."""
        with _as_os_error():
            self._manager.close()

    def _set_aside(self, damaged: dict[int, str], instead: int) -> None:
        for step, why in damaged.items():
            aside = self.folder.parent / "damaged"
            logging.warning(
                "the checkpoint of step %d is damaged (%s): going on from that of step %d; it was moved to %s",
                *(step, why, instead, aside),
            )
            aside.mkdir(exist_ok=True)
            shutil.rmtree(aside / str(step), ignore_errors=True)
            shutil.move(self.folder / str(step), aside / str(step))
        if damaged:
            self._manager.reload()


@contextmanager
def _as_os_error() -> Iterator[None]:
    """What TensorStore raises when the disk is full is a ValueError with the number of the system's error in it."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        found = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else str(error).strip().splitlines()[-1]) from error


def _sha256(state: Any) -> str:
    """Of the structure and of dtype, shape and bytes of every leaf."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()
