"""A run in several processes: how they find each other, and how they end."""

import ctypes
import faulthandler
import os
import re
import signal
import sys
from typing import Any

import jax

from jaxsparse.parallel import any_process

HEARTBEAT_SECONDS = 30  # a process silent for this long is considered dead
LOST = "start all processes again to go on from the last checkpoint"

# What is told of processes that cannot be reached; other errors, such as of too little memory, have other causes.
_OF_ANOTHER = "gloo|nccl|mpi_|connection|socket|barrier|heartbeat|coordination|unavailable|deadline|timed out|aborted"
_handlers: list[Any] = []  # kept alive for C


def join(distributed: bool, coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Makes this one of several processes, before anything is computed.

    Args:
      distributed: whether the machines' own system tells which processes there are: Cloud TPU, Slurm, Open MPI.
      coordinator, processes, process: elsewhere, "HOST:PORT" of the first process, how many there are, and which of
        them this is, from 0.

    Raises:
      ValueError: if something is missing or out of range, or they do not find each other.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [flag for flag, value in given.items() if value is None]
    if not distributed and len(missing) == len(given):
        return
    if missing and not (distributed and len(missing) == len(given)):
        raise ValueError(f"{', '.join(missing)} missing: --coordinator, --processes and --process come together")
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"--coordinator is HOST:PORT of the first process, got {coordinator!r}")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ValueError(f"--process is from 0 to {processes - 1}, as there are --processes={processes}, got {process}")
    _say_who_is_gone()
    try:
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the processes do not find each other: {error}. Where nothing tells them (Cloud TPU, Slurm and Open MPI "
            "do), name the first of them: --coordinator=HOST:PORT --processes=N --process=I"
        ) from error


def lost(error: BaseException) -> str | None:
    """The message for an error caused by the end of another process; None for other errors."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, jax.errors.JaxRuntimeError):
        cause = cause.__cause__ or cause.__context__
    if cause is None or jax.process_count() == 1 or not re.search(_OF_ANOTHER, str(cause), re.IGNORECASE):
        return None
    return f"lost another process, or the network to it ({str(cause).strip().splitlines()[0]}); {LOST}"


def leave(message: str) -> None:
    """Ends the program with an error, and the other processes with it."""
    if jax.process_count() == 1:
        sys.exit(message)
    print(message, file=sys.stderr, flush=True)
    os._exit(1)  # an orderly end would wait for the others, and they for this one


def part() -> None:
    """Waits until all processes have finished: one that leaves early is considered dead."""
    if jax.process_count() > 1:
        any_process(False)
        jax.distributed.shutdown()


def _say_who_is_gone() -> None:
    """Makes the end of this process a message when another one has died.

    JAX notices by its heartbeats, says which one, and aborts from a thread of its own, where Python handles no signals:
    what would be left is a dump of all threads.
    """
    faulthandler.disable()

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(number):
        del number
        os.write(2, f"error: another process of this run is gone, see above; {LOST}\n".encode())
        os._exit(1)

    _handlers.append(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)
