"""A process that measures and answers: its memory goes with it, and one that hangs or crashes takes no other along."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Measuring:
    """A process that runs a module of ``benchmarks`` whose main program is :func:`serve`.

    Args:
      module: its name and its arguments.
      tree: the folder whose ``jaxsparse`` it imports; ``benchmarks`` are those of this checkout.
    """

    def __init__(self, *module: str, tree: Path = ROOT):
        environment = os.environ | {"PYTHONPATH": f"{tree}{os.pathsep}{ROOT}"}
        command = [sys.executable, "-m", *module]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=tree, env=environment, stdin=pipe, stdout=pipe)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        self._waiting = selectors.DefaultSelector()
        self._waiting.register(self._from, selectors.EVENT_READ)

    def ask(self, request: object, seconds: float | None = None) -> dict:
        """What it answers to a request; raises as :meth:`answer`."""
        self.send(request)
        return self.answer(seconds)

    def send(self, request: object) -> None:
        """Lets it begin with a request, for :meth:`answer`."""
        with contextlib.suppress(BrokenPipeError):  # it has ended, as the answer will say
            self._to.write(json.dumps(request).encode() + b"\n")
            self._to.flush()

    def answer(self, seconds: float | None = None) -> dict:
        """What it answers to the request that was sent.

        Raises:
          TimeoutError: if it does not in so many seconds.
          RuntimeError: if it has ended.
        """
        until = None if seconds is None else time.monotonic() + seconds
        answer = b""
        while not answer.endswith(b"\n"):
            left = None if until is None else max(0.0, until - time.monotonic())
            if not self._waiting.select(left):
                raise TimeoutError(f"no answer in {seconds:.0f} s")
            part = os.read(self._from.fileno(), 1 << 16)
            if not part:
                code = self._process.wait()
                raise RuntimeError(f"the process that measures ended with {code}: its last words are above")
            answer += part
        return json.loads(answer)

    def close(self) -> None:
        """Ends it, whatever it is doing."""
        self._waiting.close()
        self._process.kill()
        self._process.wait()
        self._from.close()
        with contextlib.suppress(BrokenPipeError):  # of what it never read
            self._to.close()


def clean_up_when_stopped() -> None:
    """Lets SIGTERM end this program as Ctrl-C does: its processes and folders go with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def serve(answer: Callable[[dict], dict], requests: Iterable[str] = sys.stdin) -> None:
    """Answers requests, a line of JSON each; whatever goes wrong is an answer too: {"error": what}."""
    for line in requests:
        try:
            answered = answer(json.loads(line))
        except Exception as error:
            answered = {"error": first_line(error)}
        print(json.dumps(answered), flush=True)


def first_line(error: Exception) -> str:
    """What went wrong, short enough for a table."""
    text = f"{type(error).__name__}: {error}".splitlines()[0].replace("|", "/")
    return text if len(text) <= 300 else f"{text[:297]}..."
