"""Training in two processes on streamed images: stopped, killed, and refused together."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import pytest
from ml_collections import ConfigDict

from experiments import processes as ours
from experiments import train
from experiments.workdir import read_metrics
from tests.experiments import processes
from tests.experiments.test_resume import logged, newest_checkpoint

CONFIG = """
from configs import common

def get_config():
    config = common.sparse_momentum()
    config.epochs = 8
    config.eval_every_epochs = 4
    config.log_every_steps = 3
    config.data.name = "imagenet2012"
    config.data.streamed = True
    config.data.image_size = 16
    config.data.batch_size = 8
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.model.update({"name": "resnet_20", "depth": 8, "width": 0.5})
    config.data.classes = ("n07753592", "n01440764", "n02099601")
    config.optimizer.learning_rate.init_value = 0.01
    config.parallel.layout = "data"
    return config
"""
# Another process that died is noticed soon.
PROGRAM = """
from absl import app
from experiments import command_line, processes, train
processes.HEARTBEAT_SECONDS = 10
app.run(train.main, flags_parser=command_line.parse_flags)
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, imagenet_dir):
    config = tmp_path_factory.mktemp("config") / "config.py"
    config.write_text(CONFIG)
    return [f"--config={config}", f"--config.data_dir={imagenet_dir}"]


def start(workdir, arguments):
    flags = ["--coordinator=<COORDINATOR>", "--processes=<PROCESSES>", "--process=<PROCESS>", f"--workdir={workdir}"]
    return processes.start(["-c", PROGRAM, *flags, *arguments], devices=2)


def finish(workdir, arguments):
    outputs, codes = processes.ends(start(workdir, arguments))
    assert codes == [0, 0], outputs
    return outputs


def outcome(workdir):
    """All that has to be the same, to the last bit: metrics, result, and the checksums of the final state."""
    newest = newest_checkpoint(workdir)
    return *logged(workdir), json.loads((newest / "about" / "metadata").read_text())


def wait_for_step(started, workdir, step, since=0.0):
    """Until a step was logged by these processes: not what the file had at a time before they were started."""
    file = workdir / "metrics.jsonl"
    while all(run.poll() is None for run in started):
        lines = read_metrics(workdir) if file.exists() and file.stat().st_mtime > since else []
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.05)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, arguments):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    first, second = finish(workdir, arguments)
    assert "test accuracy" in first
    assert "accuracy" not in second  # one of them tells
    return outcome(workdir)


def kill_one(workdir, arguments, step, victim):
    """Kills one of two with signal 9 after a step: the other ends too, and says why."""
    since = time.time()
    started = start(workdir, arguments)
    wait_for_step(started, workdir, step, since)
    started[victim].kill()
    outputs, codes = processes.ends(started, timeout=120)
    assert codes[victim] == -signal.SIGKILL, outputs[victim]
    assert codes[1 - victim] == 1, outputs[1 - victim]
    told = outputs[1 - victim].splitlines()[-1]
    assert told.startswith(("error: another process of this run is gone", "error: lost another process"))
    assert told.endswith("start all processes again to go on from the last checkpoint")


@pytest.mark.slow
def test_told_to_stop_and_killed(uninterrupted, arguments, tmp_path):
    started = start(tmp_path, arguments)
    wait_for_step(started, tmp_path, 9)
    started[1].send_signal(signal.SIGTERM)  # the one that does not write
    outputs, codes = processes.ends(started)
    assert codes == [128 + signal.SIGTERM] * 2, outputs
    stopped_at = read_metrics(tmp_path)[-1]["step"]
    assert f"stopped by SIGTERM at step {stopped_at} of 40; the same command goes on from there" in outputs[0]
    assert (tmp_path / "checkpoints" / str(stopped_at)).is_dir()
    kill_one(tmp_path, arguments, stopped_at + 8, victim=1)
    assert "going on from step" in finish(tmp_path, arguments)[0]
    assert outcome(tmp_path) == uninterrupted


@pytest.mark.slow
def test_what_one_process_refuses_ends_the_others(arguments, tmp_path):
    (tmp_path / "config.json").write_text('{"epochs": 3}')
    outputs, codes = processes.ends(start(tmp_path, arguments))
    assert codes == [1, 1], outputs
    assert "holds a run with another configuration" in outputs[0]
    assert "error: another process could not begin; it says why" in outputs[1]


@pytest.mark.slow
def test_a_signal_that_reaches_the_processes_that_read_too(arguments, tmp_path):
    flags = [f"--workdir={tmp_path}", "--config.parallel.layout=one_device", "--config.data.workers=1"]
    command = [sys.executable, "-m", "experiments.train", *arguments, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = subprocess.Popen(command, cwd=processes.ROOT, start_new_session=True, **pipes)
    wait_for_step([started], tmp_path, 3)
    os.killpg(started.pid, signal.SIGTERM)  # as systemd does
    (output,), (code,) = processes.ends([started])
    assert code == 128 + signal.SIGTERM, output
    stopped_at = read_metrics(tmp_path)[-1]["step"]
    assert f"stopped by SIGTERM at step {stopped_at} of 40" in output
    assert (tmp_path / "checkpoints" / str(stopped_at)).is_dir()


@pytest.mark.parametrize(
    ("text", "is_of_another"),
    [
        ("UNKNOWN: Gloo AllGather failed: Read error: Connection reset by peer", True),
        ("DEADLINE_EXCEEDED: Barrier timed out. Id: save", True),
        ("UNAVAILABLE: failed to connect to all addresses", True),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.", False),
        ("INTERNAL: CUDA error: an illegal memory access", False),
    ],
)
def test_which_errors_another_process_has_caused(monkeypatch, text, is_of_another):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    error = RuntimeError("of Orbax")
    error.__cause__ = jax.errors.JaxRuntimeError(text)
    assert (ours.lost(error) is not None) == is_of_another
    assert (ours.lost(error.__cause__) is not None) == is_of_another


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("localhost", 2, 0), "--coordinator is HOST:PORT of the first process, got 'localhost'"),
        (("localhost:1", 2, 2), "--process is from 0 to 1, as there are --processes=2, got 2"),
        (("localhost:1", 2, None), "--process missing: --coordinator, --processes and --process come together"),
    ],
)
def test_processes_that_are_named_wrongly(given, message):
    with pytest.raises(ValueError, match=message):
        ours.join(False, *given)


def test_an_error_that_nobody_expects_ends_the_others_too(monkeypatch, tmp_path, capfd):
    def ended(status):
        raise SystemExit(status)

    def unexpected(*args, **kwargs):
        raise KeyError("unexpected")

    settings = {"distributed": False, "coordinator": None, "processes": None, "process": None}
    settings |= {"workdir": str(tmp_path), "seeds": None, "vmap_seeds": False, "profile": False}
    monkeypatch.setattr(train, "FLAGS", SimpleNamespace(**settings))
    monkeypatch.setattr(train, "config_of_flags", lambda: ConfigDict({"smoke": False}))
    monkeypatch.setattr(train, "train", unexpected)
    with pytest.raises(KeyError):
        train.main(["train"])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", ended)  # at once, without waiting for the others
    with pytest.raises(SystemExit, match="1"):
        train.main(["train"])
    told = capfd.readouterr().err
    assert "KeyError: 'unexpected'" in told
    assert told.endswith("error: this process of the run ends, see above, and with it the others\n")


@pytest.mark.long
def test_killed_ten_times(uninterrupted, arguments, tmp_path):
    moments = random.Random(0)
    for _ in range(10):  # each after steps of its own: those behind the last checkpoint are made again
        names = [path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")]
        made = max((int(name) for name in names if name.isdecimal()), default=0)  # not one that was half written
        kill_one(tmp_path, arguments, min(made + 1 + moments.randrange(6), 36), victim=moments.randrange(2))
    finish(tmp_path, arguments)
    assert outcome(tmp_path) == uninterrupted
