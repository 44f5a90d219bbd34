"""The folder of a run: which run it is, what was measured, and that nobody else is writing to it."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from experiments.checkpoints import Checkpoints
from experiments.measures import TEXT
from experiments.options import with_seed
from jaxsparse.inspect import read_history

# Where the data lie and who reads them is not part of what is run.
NOT_COMPARED = ("data_dir", "data.workers")
OTHERS = ("masks_from", "start_from", "distill_from")  # what other runs have left
# Keys that runs of earlier versions lack, with the values that come to the same.
ADDED = {"start_from": None, "distill_from": None, "distill_temperature": 2.0, "distill_weight": 0.5}
ADDED_TO_IMAGES = {"data.files": None, "data.test": None}  # texts have always had them


class WorkdirError(OSError):
    """A folder that cannot be used, or a disk that does not take what is written to it."""


class WorkdirInUseError(WorkdirError):
    """Another process writes to the folder."""


class Workdir:
    """The folder of one run; it is made, and this process is the only one to write to it until :meth:`close`.

      config.json      the configuration
      metrics.jsonl    a line for each chunk of steps
      tensorboard/     the same for TensorBoard
      result.json      what came out, once the run is finished

    Args:
      path: the folder.
      config: the configuration of the run.

    Raises:
      WorkdirError: if the folder cannot be written to, is in use, or holds a run with another configuration.
    """

    def __init__(self, path: str | Path, config: ConfigDict):
        self.path, self.config = Path(path), config
        self._metrics = self._tensorboard = None
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path)
            try:
                refuse_another(self.path, config)
                write_json(self.path / "config.json", json.loads(config.to_json()))
            except BaseException:
                os.close(self._lock)
                raise

    @property
    def result(self) -> dict[str, Any] | None:
        """The contents of result.json; None while the run is not finished."""
        return read_json(self.path / "result.json")

    def metrics(self) -> list[dict[str, Any]]:
        """The contents of metrics.jsonl, one entry per line."""
        return read_metrics(self.path)

    def open_metrics(self, step: int) -> None:
        """Forgets what was logged after ``step``, and goes on logging from there."""
        lines = [json.dumps(line) + "\n" for line in self.metrics() if line["step"] <= step]
        with writing(self.path):
            _write(self.path / "metrics.jsonl", "".join(lines))
            self._metrics = (self.path / "metrics.jsonl").open("a")
            self._tensorboard = _EventFile(self.path / "tensorboard", first_step=step + 1)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Appends a line. A number in a mapping of the metrics is TensorBoard's ``name/key``."""
        self._metrics.write(json.dumps(metrics) + "\n")
        self._metrics.flush()
        scalars = {
            f"{name}/{key}" if key else name: number
            for name, value in metrics.items()
            for key, number in (value.items() if isinstance(value, Mapping) else [("", value)])
        }
        self._tensorboard.log(metrics["step"], scalars)

    def keep_metrics(self) -> None:
        """Returns when what was logged is on the disk, so that no checkpoint has steps of which nothing is known."""
        with writing(self.path):
            os.fsync(self._metrics.fileno())

    def finish(self, result: Mapping[str, Any]) -> None:
        """Writes result.json, the sign that the run is finished."""
        write_json(self.path / "result.json", result)

    def close(self) -> None:
        """Closes what was opened, and lets others write to the folder."""
        for file in (self._metrics, self._tensorboard):
            if file is not None:
                with suppress(OSError):  # raised by log() before
                    file.close()
        os.close(self._lock)


class Follower:
    """The stand-in for the folder in all processes except the first, the only one that writes to it.

    Args:
      path, config: as for :class:`Workdir`.
    """

    def __init__(self, path: str | Path, config: ConfigDict):
        self.path, self.config = Path(path), config

    @property
    def result(self) -> dict[str, Any] | None:
        """The contents of result.json; None while the run is not finished."""
        return read_json(self.path / "result.json")

    def open_metrics(self, step: int) -> None:
        """Nothing."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Nothing."""

    def keep_metrics(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class _EventFile:
    """TensorBoard's file format, written at once: its own writers have a thread, and a full disk ends that unheard."""

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(exist_ok=True)
        file = (folder / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}").open("wb")
        self._writer = RecordWriter(file)
        self._write(file_version="brain.Event:2")
        # Makes TensorBoard forget what an earlier file has of these steps.
        self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=tag, simple_value=number) for tag, number in scalars.items() if tag != "step"]
        self._write(step=step, summary=Summary(value=values))

    def close(self) -> None:
        self._writer.close()

    def _write(self, **fields: Any) -> None:
        self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._writer.flush()


def open_runs(stack: ExitStack, config: ConfigDict, workdir: Path, seeds: Sequence[int] | None) -> list[Workdir]:
    """The folder of the run, or of each seed; closed with the stack."""
    if jax.process_index() > 0:
        return [Follower(workdir, config)]
    if seeds is None:
        return [stack.enter_context(closing(Workdir(workdir, config)))]
    with writing(workdir):  # which has the checkpoints of all
        workdir.mkdir(parents=True, exist_ok=True)
        stack.callback(os.close, _lock(workdir))
    runs = []
    for seed in seeds:
        mine = with_seed(config, seed)
        with mine.unlocked():
            mine.side_by_side = list(seeds)
        runs.append(stack.enter_context(closing(Workdir(workdir / f"seed_{seed}", mine))))
    return runs


@contextmanager
def writing(path: Path, checkpoints: Checkpoints | None = None) -> Iterator[None]:
    """Re-raises disk errors as WorkdirError, with the last checkpoint that is intact."""
    try:
        yield
    except WorkdirError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = "is on a disk that is full" if full else "cannot be written"
        steps = checkpoints.steps() if checkpoints else []
        safe = f". The last checkpoint is of step {steps[-1]}; the same command goes on from there" if steps else ""
        raise WorkdirError(f"workdir {str(path)!r} {what}: {error.strerror or error}{safe}") from error


@contextmanager
def open_checkpoints(path: Path) -> Iterator[Checkpoints]:
    """The checkpoints of a run's folder, closed in the end: what the last of them could not write shows then."""
    with writing(path):
        checkpoints = Checkpoints(path / "checkpoints")
    try:
        yield checkpoints
    finally:
        with writing(path, checkpoints):
            checkpoints.close()


def refuse_other_seeds(path: Path, about: Mapping[str, Any], seeds: Sequence[int] | None) -> None:
    """Raises a WorkdirError if the checkpoint that ``about`` describes is of other seeds than those to train."""
    mine, others = None if seeds is None else list(seeds), about.get("seeds")
    if about and mine != others:
        there = "a run of one seed" if others is None else f"seeds {others} side by side"
        now = "the run of one seed" if mine is None else f"seeds {mine} side by side"
        raise WorkdirError(f"{path} has the checkpoints of {there}: train {now} in another folder")


def require_space(path: Path, needed: int) -> None:
    """Raises a WorkdirError if the disk of a folder has fewer bytes left than will be needed."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise WorkdirError(
            f"workdir {str(path)!r} is on a disk with {free / 2**20:,.0f} MiB left; the run needs "
            f"{needed / 2**20:,.0f} MiB for its checkpoints"
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The contents of the metrics.jsonl of a folder; a last line that was cut off is left out."""
    return [dict(line) for line in read_history(path).lines] if (path / "metrics.jsonl").exists() else []


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no file, a ValueError if it holds something else."""
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {str(value)[:80]}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes a file whole or not at all."""
    _write(path, json.dumps(value, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # two processes may take part in a sweep
    with open(part, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _lock(path: Path) -> int:
    """Locks a folder for this process, which the system undoes whenever the process ends."""
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise WorkdirInUseError(f"workdir {str(path)!r} is in use by another process") from None
    except OSError:  # some network file systems have no locks
        logging.warning("%s cannot be locked: take care that no other process writes to it", path)
    return folder


def refuse_another(path: Path, config: ConfigDict) -> None:
    """Raises a WorkdirError if a folder holds a run with another configuration, and says which keys differ."""
    there = read_json(path / "config.json")
    if there is None:
        return
    there, here = compared(there), compared(json.loads(config.to_json()))
    for key in OTHERS:  # however their paths are written
        if there.get(key) and here.get(key) and os.path.realpath(there[key]) == os.path.realpath(here[key]):
            there[key] = here[key]
    differences = [
        f"  {key}: {json.dumps(there[key]) if key in there else 'not set'} there, "
        f"{json.dumps(here[key]) if key in here else 'not set'} now"
        for key in sorted(there | here)
        if key not in there or key not in here or there[key] != here[key]
    ]
    if differences:
        raise WorkdirError(
            f"workdir {str(path)!r} holds a run with another configuration:\n"
            + "\n".join(differences)
            + "\nTake another workdir, or delete that one to begin anew"
        )


def compared(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a configuration that say what is run, dotted, without those that were added and change nothing."""
    keys = flat(config)
    added = ADDED | ({} if keys.get("data.name") == TEXT else ADDED_TO_IMAGES)
    return {
        key: value
        for key, value in keys.items()
        if key not in NOT_COMPARED and not (key in added and value == added[key])
    }


def fingerprint(config: ConfigDict) -> str:
    """A short name for what a configuration runs: that of another one differs."""
    same = compared(json.loads(config.to_json()))
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:12]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping by dotted keys: {"a": {"b": 1}} is {"a.b": 1}."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return leaves
