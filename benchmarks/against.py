"""Two versions of the library side by side: that of a commit, and that of the working tree.

A process each, with the same benchmark and another ``jaxsparse``, which take turns: one call in each a round, back and
forth. The old version has two processes, so that a ratio can be judged by that of old beside old in the same run.
"""

import contextlib
import importlib
import io
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax

import jaxsparse
from benchmarks.processes import ROOT, Measuring, serve

ALLOWED = 1.02  # how many times longer the new version may take anyway
SLOWER = "SLOWER"


@contextlib.contextmanager
def library_of(commit: str, *folders: str) -> Iterator[Path]:
    """A folder with the library as a commit has it, and with these other folders.

    Raises:
      ValueError: if git knows no such commit, or it has no library.
    """
    archived = subprocess.run(["git", "archive", commit, "jaxsparse", *folders], cwd=ROOT, capture_output=True)
    if archived.returncode:
        why = archived.stderr.decode().strip()
        raise ValueError(f"--against is a commit that git knows here, got {commit!r}: {why}")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archived.stdout)) as files:
            files.extractall(folder, filter="data")
        yield Path(folder)


def judge(seconds: dict[str, list[float]]) -> tuple[float, tuple[float, float], str]:
    """Of the rounds of "new", "old" and "old again": new / old, the middle half of old again / old, and a verdict.

    It is "ok" if new takes at most 1.02 times as long, or is within the spread of old beside old: at most the upper end
    of that middle half.
    """
    new, again = ([a / b for a, b in zip(seconds[name], seconds["old"], strict=True)] for name in ("new", "old again"))
    ratio = statistics.median(new)
    low, _, high = statistics.quantiles(again, n=4)
    return ratio, (low, high), "ok" if ratio <= max(ALLOWED, high) else SLOWER


def compare(commit: str, benchmark: str, cases: dict[str, int]) -> Iterable[list[str]]:
    """A row for each case, as its rounds are over: its name, times, new / old, the spread of old / old, the verdict.

    Args:
      commit: the old version.
      benchmark: the module that has ``case(name)``, which makes what is timed.
      cases: how many rounds to time of each.

    Raises:
      ValueError: as :func:`library_of`.
    """
    with library_of(commit) as old, contextlib.ExitStack() as stack:
        versions = {}
        for name, tree in (("old", old), ("new", ROOT), ("old again", old)):
            versions[name] = Measuring("benchmarks.against", benchmark, str(tree), tree=tree)
            stack.callback(versions[name].close)
        for case, rounds in cases.items():
            for version in versions.values():
                version.send({"case": case})
            made = {name: version.answer() for name, version in versions.items()}
            if failed := [f"{name}: {answer['error']}" for name, answer in made.items() if "error" in answer]:
                yield [case, "", "", "", "", "; ".join(failed)]
                continue
            seconds: dict[str, list[float]] = {name: [] for name in versions}
            for i in range(rounds):
                turns = list(versions.items())
                for name, version in turns if i % 2 else turns[::-1]:
                    seconds[name].append(version.ask({})["seconds"])
            ratio, (low, high), verdict = judge(seconds)
            times = [f"{1e3 * statistics.median(seconds[name]):.1f}" for name in ("old", "new")]
            yield [case, *times, f"{ratio:.3f}", f"{low:.3f} to {high:.3f}", verdict]


class Timing:
    """Answers {"case": name}, which makes a case and runs it twice, and {}, which times one call of it."""

    def __init__(self, make: Callable[[str], Callable[[], object]]):
        self._make, self._run = make, None

    def __call__(self, request: dict) -> dict:
        if "case" in request:
            self._run = None  # frees its memory before the next is made
            self._run = self._make(request["case"])
            jax.block_until_ready([self._run() for _ in range(2)][-1])
            return {}
        start = time.perf_counter()
        jax.block_until_ready(self._run())
        return {"seconds": time.perf_counter() - start}


if __name__ == "__main__":
    _, name, tree = sys.argv
    if Path(jaxsparse.__file__).resolve().parents[1] != Path(tree).resolve():
        sys.exit(f"the jaxsparse of {tree} is to be measured, but {jaxsparse.__file__} was imported")
    serve(Timing(importlib.import_module(name).case))
