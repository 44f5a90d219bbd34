"""Long trials: runs that are killed or whose disk is full end with the same bits, and hostile files do no harm.

``python -m tests.soak`` goes on where it was ended, and takes some hours. DIR/log.jsonl has a line for each trial; once
none is missing, the table is written to results/soak.md. A trial in which something is lost is told, stays in the log,
and its run stays in DIR. ``--only=NAME`` makes those of one name, ``--again`` repeats those that lost something.
"""

import argparse
import datetime
import functools
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import rich.progress

from tests.soak import hostile, kills

ROOT = Path(__file__).parents[2]
EACH = 4  # kills of a run
KILLED = "at random moments, the start included; at its end the run has the bits of one that was not killed"
ABOUT = {  # name -> how many trials, 0 if that shows only once they are prepared, and what they are
    "resident": (5, f"digits in memory, sparse momentum: killed {KILLED}"),
    "streamed": (5, "the same of a ResNet on JPEG files"),
    "gated": (5, "the same with dependent gates on channels (`dep_l0`)"),
    "text": (5, "the same of a GPT with RigL"),
    "two processes": (5, "the same in two processes, both killed"),
    "one of two processes": (20, "one is killed after a random step: the other ends and says why; then the same bits"),
    "full disk": (0, "the disk is full from one file on: the run says so, and with room again ends with the same bits"),
    "artifacts": (4000, "`load_sparse`: bits flipped, cut, overwritten, forged with a right checksum"),
    "Hugging Face checkpoints": (500, "`formats.from_hf`: config.json, headers, tensors and indices changed"),
}  # fmt: skip

Attempt = Callable[[], dict[str, Any]]


def attempts(name: str, folder: Path) -> list[Attempt]:
    """The trials of a name."""
    count, _ = ABOUT[name]
    if name == "artifacts":
        artifacts = hostile.Artifacts(folder / "hostile")
        return [functools.partial(artifacts.trial, number) for number in range(count)]
    if name == "Hugging Face checkpoints":
        checkpoints = hostile.HuggingFace(folder / "hostile")
        return [functools.partial(checkpoints.trial, number) for number in range(count)]
    kinds = kills.kinds(folder)
    if name == "full disk":
        files = kills.files_written(kinds[name])
        return [functools.partial(kills.disk_full, kinds[name], number, file) for number, file in enumerate(files, 1)]
    if name == "one of two processes":
        return [functools.partial(kills.one_killed, kinds["two processes"], number) for number in range(count)]
    return [functools.partial(kills.killed, kinds[name], number, EACH) for number in range(count)]


def all_lines(log: Path) -> list[dict[str, Any]]:
    """The lines of the log, without what follows the last line's end, which was being written."""
    text = log.read_text() if log.exists() else ""
    return list(map(json.loads, text.split("\n")[:-1]))


def lines_of(log: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The newest line of each trial."""
    return {(line["name"], line["trial"]): line for line in all_lines(log)}


def make(name: str, folder: Path, log: Path, again: bool) -> bool:
    """Makes what is missing of the trials of a name; whether nothing was lost in any of them."""
    if log.exists() and not log.read_text().endswith("\n"):  # ended while it wrote
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    made = lines_of(log)
    done = {trial for (other, trial), line in made.items() if other == name and not (again and "lost" in line)}
    count, _ = ABOUT[name]
    left = [] if count and len(done) == count else attempts(name, folder)  # which prepares them
    for trial, attempt in enumerate(rich.progress.track(left, name)):
        if trial in done:
            continue
        began = time.monotonic()
        try:
            found = attempt()
        except Exception as error:
            traceback.print_exc()
            found = {"lost": f"{type(error).__name__}: {error}"}
        seconds = round(time.monotonic() - began, 1)
        line = {"name": name, "trial": trial, **found, "seconds": seconds, "date": f"{datetime.date.today()}"}
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
    return not any("lost" in line for (other, _), line in lines_of(log).items() if other == name)


def page(log: Path) -> str:
    """The table of what was tried, and what was lost."""
    made = lines_of(log)
    rows, dates = [], sorted({line["date"] for line in made.values()})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    for name, (count, about) in ABOUT.items():
        lines = [line for (other, _), line in made.items() if other == name]
        if not lines or (count and len(lines) < count):
            raise ValueError(f"trials are missing: {name} has {len(lines)} of {count or 'all'}")
        if name in ("artifacts", "Hugging Face checkpoints"):
            tried = f"{len(lines):,}, {sum(line.get('refused', 0) for line in lines):,} of them refused"
        elif name == "full disk":
            tried = f"{len(lines)} files, for {sum(line.get('ended', 0) for line in lines)} of which the run ended"
        else:
            tried = f"{sum(line.get('kills', 0) for line in lines)} kills in {len(lines)} runs"
        rows.append(f"| {name} | {about} | {tried} | {sum('lost' in line for line in lines)} |")
    mended = sum("lost" in line for line in all_lines(log)) - sum("lost" in line for line in made.values())
    return "\n".join([
        "# What was tried to lose something", "",
        f"`make soak`, {when}, JAX {jax.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} CPU cores.", "",
        "| | what is done | trials | lost |", "| --- | --- | --- | --- |", *rows, "",
        "Lost is a trial with other bits than those of a run to which nothing happens, without an end, or without a "
        "message of our own; of files one that is neither refused in words nor read in little memory, or, where it was "
        "not forged, read as something else than was saved. Files that are read in spite of a change are whole in what "
        "counts, such as a checkpoint whose config.json has another value of a key that is not needed. Trials that "
        f"lost something at first, and were repeated after a mend: {mended}.",
    ]) + "\n"  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--dir", type=Path, default=ROOT / "runs" / "soak", help="for runs and the log")
    parser.add_argument("--only", choices=ABOUT, help="the trials of one name")
    parser.add_argument("--again", action="store_true", help="repeat trials in which something was lost")
    args = parser.parse_args()
    folder, log = args.dir.absolute(), args.dir.absolute() / "log.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    whole = [make(name, folder, log, args.again) for name in ([args.only] if args.only else ABOUT)]
    if not args.only:
        (ROOT / "results" / "soak.md").write_text(page(log))
    sys.exit(not all(whole))


if __name__ == "__main__":
    main()
