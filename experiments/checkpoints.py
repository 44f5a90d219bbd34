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
from jax.experimental import multihost_utils

from jaxsparse.parallel import any_process

KEPT = 2  # the one before the newest is what a damaged newest one falls back to


# Orbax logs, with a traceback, what it raises as well.
logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)


class Checkpoints:
    """The checkpoints of a run, in a folder of its own; the newest two are kept.

    A checkpoint appears in the folder whole or not at all, whenever the program is killed: Orbax writes it under
    another name and renames it. What a failing disk or a power cut does to it later is found by a checksum of the
    values.

    Of several processes all make one, for the same folder on a file system that all see, and call the same methods in
    the same order: they write a checkpoint together.

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

    def save(self, step: int, state: Any, **about: Any) -> None:
        """Begins to write a checkpoint; the state may be donated at once. Errors may come with the next call.

        Args:
          step: the step that the run has come to.
          state: a pytree of arrays.
          **about: what :meth:`restore` needs to know, such as can be written as JSON.
        """
        about |= {"step": step, "sha256": _digests(state)}
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
          like: a state of the same structure, shapes and dtypes, or ``jax.ShapeDtypeStruct`` for its leaves, which may
            have shardings; or a function that makes these from what was saved as ``about``.

        Raises:
          OSError: if there are checkpoints, and all of them are damaged.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                about = self.about(step)
                shapes = like(about) if callable(like) else like
                items = ocp.args.Composite(state=ocp.args.StandardRestore(_as_shapes(shapes)))
                restored = self._manager.restore(step, args=items).state
                wrong = (
                    ""
                    if _same_digests(_digests(restored), about["sha256"])
                    else "its values are not those that were saved"
                )
            except Exception as error:  # whatever Orbax, TensorStore and JSON make of damaged files
                wrong = str(error).splitlines()[0]
            if any_process(bool(wrong)):
                damaged[step] = wrong or "another process could not read it"
                continue
            self._set_aside(damaged, step)
            return step, restored
        if damaged:
            raise OSError(
                f"no checkpoint in {self.folder} can be restored: "
                + "; ".join(f"step {step}: {why}" for step, why in damaged.items())
                + ". Delete the workdir to begin anew"
            )
        return None

    def about(self, step: int) -> dict[str, Any]:
        """What was saved with a checkpoint beside its state."""
        return self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about

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
            if jax.process_index() == 0:
                aside.mkdir(exist_ok=True)
                shutil.rmtree(aside / str(step), ignore_errors=True)
                shutil.move(self.folder / str(step), aside / str(step))
        if damaged:
            any_process(False)  # nobody looks at the folder before that is done
            self._manager.reload()


@contextmanager
def _as_os_error() -> Iterator[None]:
    """What TensorStore raises when the disk is full is a ValueError with the number of the system's error in it.

    Another process that is gone is no matter of the disk.
    """
    try:
        yield
    except (OSError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        found = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else str(error).strip().splitlines()[-1]) from error


def _digests(state: Any) -> list[str]:
    """SHA-256 of the structure and of dtype, shape and bytes of every leaf.

    One for each process, of what it holds; if all hold the whole state, that is one.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            arrays = [np.asarray(leaf)]
        else:
            arrays = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        for array in arrays:
            digest.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    if jax.process_count() == 1:
        return [digest.hexdigest()]
    everywhere = multihost_utils.process_allgather(np.frombuffer(digest.digest(), np.uint8))
    return list(dict.fromkeys(one.tobytes().hex() for one in everywhere))


def _same_digests(now: list[str], saved: list[str]) -> bool:
    """Parts of a state that other processes had held cannot be compared."""
    return now == saved or len(now) != len(saved)


def _as_shapes(tree: Any) -> Any:
    """Shapes and dtypes of arrays; those that are already such keep their sharding."""
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.eval_shape(lambda: leaf), tree
    )
