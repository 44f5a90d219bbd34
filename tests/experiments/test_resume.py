"""A run that is stopped at any moment and started again ends with the bits of one that was not."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.workdir import read_metrics

ROOT = Path(__file__).parents[2]
SMALL = [
    f"--config={ROOT / 'configs' / 'digits_sparse_momentum.py'}",
    "--config.epochs=60",
    "--config.eval_every_epochs=2",
    "--config.checkpoint_every_epochs=3",
    "--config.log_every_steps=44",  # an epoch, so that every stretch of steps between them is as long: one program
]
TIMES = ("seconds", "steps_per_second", "speed")


def start(workdir, arguments=SMALL):
    command = [sys.executable, "-m", "experiments.train", f"--workdir={workdir}", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **pipes)


def finish(run):
    output, _ = run.communicate()
    assert run.returncode == 0, output
    return output


def wait_for_step(run, workdir, step):
    """Until the metrics of a run have come to a step, or it has ended."""
    while run.poll() is None:
        lines = read_metrics(workdir)
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.01)


def newest_checkpoint(workdir):
    return max((workdir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name)).absolute()


def logged(workdir):
    """Metrics and result without times."""
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(workdir)]
    result = {k: v for k, v in json.loads((workdir / "result.json").read_text()).items() if k not in TIMES}
    return lines, result


def outcome(workdir):
    """All that has to be the same, to the last bit: metrics and result without times, and the final checkpoint."""
    newest = newest_checkpoint(workdir)
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(newest / "state")
    return *logged(workdir), newest.name, [bits(leaf) for leaf in jax.tree.leaves(state)]


def bits(leaf):
    typed_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if typed_key else leaf).tobytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    finish(start(workdir))
    return outcome(workdir)


def kill_and_resume(workdir, steps, arguments=SMALL, seed=0):
    """Kills the run with signal 9 at a random moment after each of these steps, and lets it end then."""
    moments = random.Random(seed)
    for step in steps:
        run = start(workdir, arguments)
        wait_for_step(run, workdir, step)
        time.sleep(moments.uniform(0, 0.3))
        run.kill()
        output, _ = run.communicate()
        assert run.returncode == -signal.SIGKILL, output
    finish(start(workdir, arguments))


@pytest.mark.slow
def test_killed_three_times(uninterrupted, tmp_path):
    kill_and_resume(tmp_path, (1, 700, 1500))
    assert outcome(tmp_path) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop(uninterrupted, tmp_path, number):
    run = start(tmp_path)
    wait_for_step(run, tmp_path, 100)
    run.send_signal(number)
    output, _ = run.communicate()
    assert run.returncode == 128 + number
    assert "Traceback" not in output
    stopped_at = read_metrics(tmp_path)[-1]["step"]
    assert f"stopped by {number.name} at step {stopped_at} of 2640; the same command goes on from there" in output
    assert (tmp_path / "checkpoints" / str(stopped_at)).is_dir()
    if number == signal.SIGTERM:
        assert f"going on from step {stopped_at} of 2640" in finish(start(tmp_path))
        assert outcome(tmp_path) == uninterrupted


@pytest.mark.slow
def test_damaged_newest_checkpoint(uninterrupted, tmp_path):
    run = start(tmp_path)
    wait_for_step(run, tmp_path, 700)
    run.terminate()
    run.communicate()
    newest = newest_checkpoint(tmp_path)
    for path in newest.rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-20])
    assert f"the checkpoint of step {newest.name} is damaged" in finish(start(tmp_path))
    assert outcome(tmp_path) == uninterrupted


@pytest.mark.slow
def test_disk_that_gets_full(uninterrupted, tmp_path):
    run = start(tmp_path)
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))  # files that may not grow stand for a full disk
    output, _ = run.communicate()
    assert run.returncode == 1
    assert f"error: workdir '{tmp_path}' is on a disk that is full: " in output
    # No traceback of ours: a write that Orbax had begun may still complain that its event loop is closed.
    assert 'File "' + str(ROOT) not in output.replace(f"{ROOT / '.venv'}", "")
    assert not (tmp_path / "result.json").exists()
    finish(start(tmp_path))
    assert outcome(tmp_path) == uninterrupted


@pytest.mark.long
def test_killed_ten_times_at_random_moments_on_mnist(tmp_path):
    """Needs MNIST: JAXSPARSE_DATA_DIR says where TensorFlow Datasets has it."""
    arguments = [f"--config={ROOT / 'configs' / 'mnist_sparse_momentum.py'}"]
    if "JAXSPARSE_DATA_DIR" in os.environ:
        arguments.append(f"--config.data_dir={os.environ['JAXSPARSE_DATA_DIR']}")
    finish(start(tmp_path / "whole", arguments))
    seed = time.time_ns()
    print(f"the moments are those of seed {seed}")
    steps = sorted(random.Random(seed).randrange(54_000) for _ in range(10))
    kill_and_resume(tmp_path / "killed", steps, arguments, seed)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
