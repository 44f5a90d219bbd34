"""How a run ends before its last step: by a signal, or by numbers that are not finite."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np


class Stopped(Exception):  # noqa: N818  # not an error
    """The run was stopped by a signal and can be resumed.

    Attributes:
      signal: the number of the signal.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list to which SIGTERM and SIGINT add their number, in place of ending the program; a second one ends it."""
    received: list[int] = []

    def receive(number, frame):
        del frame
        received.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_unless_finite(name: str, values: Sequence[float], first_step: int) -> None:
    """Raises a FloatingPointError that names the first of the values, one a step, that is NaN or infinite."""
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise FloatingPointError(
            f"{name} is {values[bad[0]]} at step {first_step + bad[0]}; try a smaller learning rate or step size"
        )
