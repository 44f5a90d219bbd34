"""Runs of the trainer that are killed, or whose disk gets full, at any moment, and started again."""

import dataclasses
import functools
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.experiments import jpeg_sets, processes, test_processes, test_resume, tiny_text

ROOT = Path(__file__).parents[2]
LONGEST = 600  # seconds that a run may take before it counts as hanging
STREAMED = test_processes.CONFIG.replace("epochs = 8", "epochs = 24")
DIGITS, *_, LOGGED = test_resume.SMALL
FLAGS = {
    "resident": test_resume.SMALL,
    "full disk": [
        DIGITS,
        *(f"--config.{x}" for x in ("epochs=4", "eval_every_epochs=2", "checkpoint_every_epochs=2")),
        LOGGED,
    ],
}
CONFIGS = {
    "gated": """
from configs import mnist_l0

def get_config():
    config = mnist_l0.get_config("lenet_300_100_dep")
    config.data.name, config.data.batch_size = "digits", 32
    config.method.penalty.examples = 1437
    config.epochs, config.method.freeze_gates_at_epochs = 40, 32
    config.eval_every_epochs, config.checkpoint_every_epochs = 2, 3
    config.log_every_steps = 44
    return config
""",
    "text": """
from ml_collections import ConfigDict
from tests.experiments import tiny_text

def get_config():
    config = tiny_text.config({text!r}, epochs=40, checkpoint_every_epochs=2)
    with config.unlocked():
        config.smoke_overrides = ConfigDict()
    return config
""",
    "streamed": STREAMED,
    "two processes": STREAMED,
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """Runs of one kind: in how many processes, by which arguments, and what their ends have to have in common."""

    name: str
    folder: Path
    arguments: tuple[str, ...]
    processes: int = 1

    def start(self, workdir: Path, **environment: str) -> list[subprocess.Popen]:
        """Starts the run, or goes on with it."""
        workdir.mkdir(parents=True, exist_ok=True)
        if self.processes > 1:
            return test_processes.start(workdir, list(self.arguments))
        command = [sys.executable, "-m", "experiments.train", f"--workdir={workdir}", *self.arguments]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        # They compile the same few programs, again and again: killed while they train, they tell more. Two processes do
        # not: the second would not find its programs, and the first waits for half a minute, then takes it for dead.
        compiled = {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        return [subprocess.Popen(command, cwd=ROOT, env=os.environ | compiled | environment, **pipes)]

    def finish(self, workdir: Path) -> None:
        """Lets the run come to its end."""
        outputs, codes = processes.ends(self.start(workdir), LONGEST)
        if any(codes):
            raise RuntimeError(f"the run should end well, got {codes}: {outputs}")

    def outcome(self, workdir: Path) -> Any:
        """What has to be the same, to the last bit."""
        return (test_processes if self.processes > 1 else test_resume).outcome(workdir)

    @functools.cached_property
    def reference(self) -> tuple[Any, float]:
        """The outcome of a run that nothing happens to, and the seconds that it takes."""
        workdir, began = self.folder / "reference", time.monotonic()
        shutil.rmtree(workdir, ignore_errors=True)
        self.finish(workdir)
        return self.outcome(workdir), time.monotonic() - began

    def compare(self, workdir: Path) -> None:
        """Compares the end of a run with that of the reference, and deletes the run if it is the same."""
        if self.outcome(workdir) != self.reference[0]:
            raise RuntimeError(f"another end than that of a run that nothing happened to: {workdir}")
        shutil.rmtree(workdir)


def kinds(folder: Path) -> dict[str, Kind]:
    """All kinds of runs; their configurations and data are written to a folder."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    if not (folder / "data" / "imagenet2012").exists():
        jpeg_sets.prepare_imagenet(folder / "data")
    text = str(tiny_text.write(folder / "data" / "text"))  # not in the folder of a kind
    found = {name: Kind(name, folder / name.replace(" ", "_"), tuple(flags)) for name, flags in FLAGS.items()}
    for kind in found.values():
        kind.folder.mkdir(exist_ok=True)
    for name, config in CONFIGS.items():
        path = folder / name.replace(" ", "_")
        path.mkdir(exist_ok=True)
        (path / "config.py").write_text(config.replace("{text!r}", repr(text)))
        arguments = [f"--config={path / 'config.py'}"]
        if config is STREAMED:
            arguments.append(f"--config.data_dir={folder / 'data'}")
        if name == "streamed":
            arguments.append("--config.parallel.layout=one_device")
        found[name] = Kind(name, path, tuple(arguments), 2 if name == "two processes" else 1)
    return found


def killed(kind: Kind, trial: int, kills: int) -> dict[str, Any]:
    """Kills all processes of a run at random moments, as often as told, and starts it again each time.

    One that comes to its end before is compared and begun anew.

    Returns:
      The moments, in seconds from the start.
    """
    _, seconds = kind.reference
    random_moments, workdir, moments = random.Random(f"{kind.name} {trial}"), kind.folder / f"trial_{trial}", []
    shutil.rmtree(workdir, ignore_errors=True)
    while len(moments) < kills:
        started, began = kind.start(workdir), time.monotonic()
        moment = random_moments.uniform(0, seconds)
        while time.monotonic() < began + moment and any(run.poll() is None for run in started):
            time.sleep(0.01)
        alive = any(run.poll() is None for run in started)
        for run in started:
            run.kill()
        outputs, codes = processes.ends(started, LONGEST)
        if alive:
            moments.append(round(moment, 2))
        elif any(codes):
            raise RuntimeError(f"the run should end well, got {codes}: {outputs}")
        else:
            kind.compare(workdir)
    kind.finish(workdir)
    kind.compare(workdir)
    return {"kills": kills, "moments": moments}


def one_killed(kind: Kind, trial: int) -> dict[str, Any]:
    """A run one of whose two processes is killed once it trains: the other ends by itself, and both start again."""
    moments, workdir = random.Random(f"one {trial}"), kind.folder / f"one_{trial}"
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir(parents=True)
    test_processes.kill_one(workdir, list(kind.arguments), moments.randrange(1, 110), moments.randrange(2))
    kind.finish(workdir)
    kind.compare(workdir)
    return {"kills": 1}


def preloaded(folder: Path) -> Path:
    """The library that makes a disk full, compiled from full_disk.c."""
    library = folder / "full_disk.so"
    source = Path(__file__).with_name("full_disk.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def files_written(kind: Kind) -> list[str]:
    """The files that a run opens for writing, in order, without what differs between runs."""
    log, workdir = kind.folder / "opened.txt", kind.folder / "counted"
    shutil.rmtree(workdir, ignore_errors=True)
    log.unlink(missing_ok=True)
    outputs, codes = processes.ends(kind.start(workdir, **_full(kind, workdir, 10**9, log)), LONGEST)
    if any(codes):
        raise RuntimeError(f"the run should end well, got {codes}: {outputs}")
    kind.compare(workdir)
    return [re.sub(r"[0-9a-f]{8,}|\d+", "*", line.removeprefix(f"{workdir}/")) for line in log.read_text().splitlines()]


def disk_full(kind: Kind, number: int, file: str) -> dict[str, Any]:
    """A run whose disk is full from its file of this number on, counted from 1, and then no longer.

    Args:
      kind: of the run.
      number: of the file.
      file: its name, for the log.

    Returns:
      The name, and whether the run ended for it: one without which a run is whole may be missing.
    """
    workdir = kind.folder / f"full_{number}"
    shutil.rmtree(workdir, ignore_errors=True)
    started = kind.start(workdir, **_full(kind, workdir, number))
    (output,), (code,) = processes.ends(started, LONGEST)
    if code not in (0, 1) or (code and f"error: workdir '{workdir}' is on a disk that is full: " not in output):
        raise RuntimeError(f"a full disk should be named, got {code}: {output}")
    kind.finish(workdir)
    kind.compare(workdir)
    return {"file": file, "ended": bool(code)}


def _full(kind: Kind, workdir: Path, number: int, log: Path | None = None) -> dict[str, str]:
    found = {"LD_PRELOAD": str(preloaded(kind.folder)), "FULL_DISK_FOLDER": str(workdir), "FULL_DISK_AT": str(number)}
    return found | ({"FULL_DISK_LOG": str(log)} if log else {})
