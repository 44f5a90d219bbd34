import errno
import json
import subprocess
import sys
from contextlib import closing

import pytest
from ml_collections import ConfigDict

from experiments import workdir
from experiments.workdir import Workdir, WorkdirError, WorkdirInUseError

CONFIG = {"seed": 0, "data_dir": "here", "optimizer": {"learning_rate": 0.1, "decay": (1, 2)}}


def make(path, **changes):
    config = ConfigDict(CONFIG)
    config.update(changes)
    return closing(Workdir(path, config))


def test_same_config_is_let_in_wherever_the_data_are_and_whoever_reads_them(tmp_path):
    for data_dir, workers in (("here", 0), ("there", 16)):
        with make(tmp_path / "a" / "b", data_dir=data_dir, data={"workers": workers}) as run:
            assert json.loads((run.path / "config.json").read_text())["data_dir"] == data_dir


def test_another_config_is_refused_with_the_difference(tmp_path):
    with make(tmp_path):
        pass
    with pytest.raises(WorkdirError) as error, make(tmp_path, seed=1, optimizer={"decay": (1, 3)}, dense=True):
        pass
    assert str(error.value).splitlines()[1:-1] == [
        "  dense: not set there, true now",
        "  optimizer.decay: [1, 2] there, [1, 3] now",
        "  seed: 0 there, 1 now",
    ]
    with make(tmp_path):  # what was there is as it was, and not locked
        pass


def test_paths_of_what_others_left_may_be_written_in_another_way(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    with make(tmp_path / "run", masks_from="other/sparse.safetensors"):
        pass
    with make(tmp_path / "run", masks_from=str(tmp_path / "run/../other/sparse.safetensors")):
        pass
    with pytest.raises(WorkdirError, match="masks_from: .*"), make(tmp_path / "run", masks_from="sparse.safetensors"):
        pass


def test_a_run_of_before_a_key_was_there_goes_on(tmp_path):
    with make(tmp_path / "run"):
        pass
    message = 'distill_from: not set there, "teacher" now'
    with pytest.raises(WorkdirError, match=message), make(tmp_path / "run", distill_from="teacher"):
        pass
    with make(tmp_path / "run", distill_from=None, distill_temperature=2.0, distill_weight=0.5):
        pass


def test_two_processes_do_not_share_a_folder(tmp_path):
    with make(tmp_path), pytest.raises(WorkdirInUseError, match="is in use by another process"), make(tmp_path):
        pass
    with make(tmp_path):
        pass


def test_lock_ends_with_its_process(tmp_path):
    code = f"from experiments.workdir import *; Workdir({str(tmp_path)!r}, ConfigDict({CONFIG!r})); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    with make(tmp_path):
        pass


def test_metrics_are_cut_back_to_a_step(tmp_path):
    with make(tmp_path) as run:
        run.open_metrics(0)
        for step in (10, 20, 30):
            run.log({"step": step, "loss": 1 / step, "flips": {"fc1/kernel": step}})
        assert [line["step"] for line in run.metrics()] == [10, 20, 30]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    with make(tmp_path) as run:
        run.open_metrics(20)
        run.log({"step": 25, "loss": 0.5})
        assert [line["step"] for line in run.metrics()] == [10, 20, 25]
        assert run.metrics()[1] == {"step": 20, "loss": 0.05, "flips": {"fc1/kernel": 20}}


def test_result_is_the_sign_that_a_run_is_finished(tmp_path):
    with make(tmp_path) as run:
        assert run.result is None
        run.finish({"test_accuracy": 0.5})
        assert run.result == {"test_accuracy": 0.5}
    assert not list(tmp_path.glob("*.part"))


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WorkdirError, match=r"workdir '.*/file/run' cannot be written: Not a directory"):
        make(tmp_path / "file" / "run")


def test_disk_with_too_little_space(tmp_path):
    with pytest.raises(
        WorkdirError, match=r"is on a disk with [\d,]+ MiB left; the run needs 1,000,000,000 MiB for its"
    ):
        workdir.require_space(tmp_path, 10**15 * 2**20 // 10**6)
    workdir.require_space(tmp_path, 1)


class TwoCheckpoints:
    def steps(self):
        return [40, 80]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_is_said_and_what_is_safe(tmp_path, number):
    message = "is on a disk that is full: .*The last checkpoint is of step 80; the same command goes on from there"
    with pytest.raises(WorkdirError, match=message), workdir.writing(tmp_path, TwoCheckpoints()):
        raise OSError(number, "no room")


@pytest.mark.parametrize("fails", ["__init__", "close"])  # the last save may only fail when it is closed
def test_full_disk_is_said_by_checkpoints_that_open_or_close(tmp_path, monkeypatch, fails):
    def no_room(*args):
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(workdir.Checkpoints, fails, no_room)
    with pytest.raises(WorkdirError, match="is on a disk that is full: no room"), workdir.open_checkpoints(tmp_path):
        assert fails == "close"
