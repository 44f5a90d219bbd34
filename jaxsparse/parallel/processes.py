"""Agreement between the processes of a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

__all__ = ["ElsewhereError", "any_process", "of_processes", "together"]


class ElsewhereError(RuntimeError):
    """An error in another process."""


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process. All have to call this; with a single process it costs nothing."""
    return bool(of_processes(flag).any())


def of_processes(number: float) -> np.ndarray:
    """The numbers of all processes, gathered: (processes,). All have to call this."""
    if jax.process_count() == 1:
        return np.asarray([number])
    return np.asarray(multihost_utils.process_allgather(np.asarray(number)))


@contextmanager
def together() -> Iterator[None]:
    """Raise in all processes if the block raises in any of them.

    The processes in which it succeeded raise :class:`ElsewhereError` at its end.
    """
    try:
        yield
    except Exception:
        any_process(True)
        raise
    if any_process(False):
        raise ElsewhereError("another process could not begin; it says why")
