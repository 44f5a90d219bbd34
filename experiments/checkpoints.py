"""Checkpoints by Orbax, with a checksum of their own and a way back to the one before."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from experiments import checksums
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
        # To read with. The manager's restore has processes wait for each other, also for one that has failed.
        self._states, self._abouts = ocp.StandardCheckpointHandler(), ocp.JsonCheckpointHandler()

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
        about |= {"step": step, "checksums": checksums.together(checksums.parts(state))}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
        with _as_os_error():
            self._manager.save(step, args=items)

    def wait(self) -> None:
        """Returns when what was saved is on the disk; raises what went wrong."""
        with _as_os_error():
            self._manager.wait_until_finished()

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """The newest checkpoint that is whole: its step and state; None if there is none.

        A checkpoint that is unreadable or fails its checksum is moved to ``damaged/`` beside the folder, with a
        warning.

        Args:
          like: a state of the same structure, shapes and dtypes, or ``jax.ShapeDtypeStruct`` for its leaves, which may
            have shardings; or a function that makes these from what was saved as ``about``.

        Raises:
          OSError: if there are checkpoints, and all of them are damaged.
        """
        self.wait()
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            wrong, saved, parts = "", {}, {}
            try:  # nothing in here waits for other processes, which may not have met the error
                about = self.about(step)
                shapes = like(about) if callable(like) else like
                args = ocp.args.StandardRestore(_as_shapes(shapes))
                restored = self._states.restore(self.folder / str(step) / "state", args=args)
                saved, parts = about["checksums"], checksums.parts(restored)
            except Exception as error:  # whatever Orbax, TensorStore and JSON make of damaged files
                wrong = (str(error) or repr(error)).splitlines()[0].partition(" See full TensorStore details")[0]
            if not any_process(bool(wrong)) and (paths := checksums.differing(saved, parts)):
                wrong = f"the values of {', '.join(paths[:3])}{' ...' * (len(paths) > 3)} are not those that were saved"
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

    def newest(self) -> dict[str, Any]:
        """The metadata of the newest checkpoint that has any; nothing if none has."""
        for step in reversed(self.steps()):
            with suppress(Exception):  # of damaged files, as in restore, which says what is wrong
                return self.about(step)
        return {}

    def about(self, step: int) -> dict[str, Any]:
        """The metadata saved beside the state of a checkpoint."""
        return self._abouts.restore(self.folder / str(step) / "about", args=ocp.args.JsonRestore())

    def close(self) -> None:
        """Waits for the last save and ends Orbax's threads."""
        with _as_os_error():
            self._manager.close()
        self._states.close()
        self._abouts.close()

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


def _as_shapes(tree: Any) -> Any:
    """Shapes and dtypes of arrays; those that are already such keep their sharding."""
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.eval_shape(lambda: leaf), tree
    )


def size_in_bytes(state: Any) -> int:
    """Bytes of all arrays of a tree, or of what ``jax.eval_shape`` gives for them."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
