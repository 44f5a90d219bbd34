"""Side-by-side timing: alternatives take turns in one process, medians and their ratios are what counts."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable

import jax

RESULTS = pathlib.Path(__file__).parent / "results"


def rounds_of(alternatives: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Runs each alternative once a round, in turn, back and forth, after one round that does not count; seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for i in range(rounds + 1):
        turns = list(alternatives.items())
        for name, run in turns if i % 2 else turns[::-1]:
            start = time.perf_counter()
            jax.block_until_ready(run())
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def interleaved(alternatives: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of :func:`rounds_of`."""
    return {name: statistics.median(times) for name, times in rounds_of(alternatives, rounds).items()}


def machine() -> str:
    """Device, cores, versions, date."""
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "optax"))
    return f"{kind}; {versions}, Python {platform.python_version()}; {datetime.date.today()}"


def line(cells: list[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def as_markdown(
    name: str, title: str, header: list[str], rows: Iterable[list[str]], notes: str, where: str | None = None
) -> str:
    """A page with a table, the command that this program was given, and where it ran; None: on this machine."""
    table = [line(header), line(["---"] * len(header)), *map(line, rows)]
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
    return f"# {title}\n\n`{command}` on {where or machine()}.\n\n" + "\n".join(table) + f"\n\n{notes}\n"


def save(name: str, title: str, header: list[str], rows: list[list[str]], notes: str) -> None:
    """Prints a table and keeps it as ``benchmarks/results/NAME_PLATFORM.md``."""
    text = as_markdown(name, title, header, rows, notes)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}_{jax.default_backend()}.md").write_text(text)
