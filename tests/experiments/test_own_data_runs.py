"""Whole runs on images of one's own: resumed, refused when the images change, streamed, in stages, exported, pruned."""

import os
import shutil
import subprocess
import sys

import chex
import numpy as np
import pytest

import jaxsparse
from experiments import export, prune_after, stages, train
from experiments.results import collect
from experiments.workdir import read_json, read_metrics
from tests.experiments.test_own_data import arrays, saved, write_folder
from tests.experiments.test_resume import outcome
from tests.experiments.test_train import CONFIG, ROOT, smoke_config

pytestmark = pytest.mark.slow


def config_of(name, files, **changes):
    """An MLP of 8 units; 6 steps an epoch."""
    config = smoke_config(dense=True)
    with config.unlocked():
        config.model = {"name": "mlp", "features": (8,), "num_classes": None}
    of_data = {"name": name, "files": str(files), "examples": None, "image_size": 8, "pad": 1, "flip": True}
    config.update_from_flattened_dict(
        {**{f"data.{key}": value for key, value in of_data.items()}, "epochs": 2, "log_every_steps": 3,
         "eval_every_epochs": 1, "checkpoint_every_epochs": 1} | changes
    )  # fmt: skip
    return config


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """The path of an .npz without a test split, and a run on it that was never stopped."""
    folder = tmp_path_factory.mktemp("npz")
    np.savez(folder / "my.npz", **arrays(300, test=0))
    state, [result] = train.train(own_config(folder / "my.npz"), folder / "run", quiet=True)
    return folder / "my.npz", folder / "run", state, result


def own_config(file, **changes):
    return config_of("npz", file, **{"dense": False, "data.test": 0.2, "data.validation": 0.1} | changes)


def test_the_result_says_where_the_images_are_from(npz):
    file, run, _, result = npz
    counts = [result["data"][f"{name}_images"] for name in ("train", "validation", "test")]
    assert sum(counts) == 300
    assert 30 < counts[2] < 90
    assert (result["data"]["source"], result["data"]["classes"], len(result["data"]["sha256"])) == (str(file), 10, 64)
    assert "tokens" not in result
    assert {"validation_accuracy", "test_accuracy"} <= set(result)
    assert collect.tested_on(collect.read_config(run)) == f"npz, files {file}, test 0.2"


def test_a_run_that_was_stopped_ends_with_the_same_bits(npz, tmp_path, stopped_and_resumed):
    state = stopped_and_resumed(own_config(npz[0]), tmp_path / "run")
    chex.assert_trees_all_equal(state.params, npz[2].params)
    assert outcome(tmp_path / "run") == outcome(npz[1])


def test_other_images_are_refused(npz, tmp_path):
    file, run, _, _ = npz
    whole, changed = file.read_bytes(), arrays(300, test=0)
    changed["train_images"][7, 3, 3] += 1
    try:
        np.savez(file, **changed)
        with pytest.raises(
            ValueError, match="the run was begun with other images: .*my.npz, 2.. images to train on, SHA"
        ):
            train.train(own_config(file), run, quiet=True)
    finally:
        file.write_bytes(whole)
    with pytest.raises(OSError, match="data.test: 0.2 there, 0.3 now"):
        train.train(own_config(file, **{"data.test": 0.3}), run, quiet=True)


def test_a_run_is_exported_if_its_images_are_there(npz, tmp_path):
    shutil.move(npz[0], tmp_path / "my.npz")
    try:
        with pytest.raises(SystemExit, match="there is no file"):
            export.main([str(npz[1]), str(tmp_path / "model.safetensors")])
    finally:
        shutil.move(tmp_path / "my.npz", npz[0])
    export.main([str(npz[1]), str(tmp_path / "model.safetensors")])
    params, masks = jaxsparse.load_sparse(tmp_path / "model.safetensors")
    chex.assert_trees_all_equal(params, npz[2].params)
    assert float(jaxsparse.density(masks)) == pytest.approx(0.1, abs=0.01)


def test_a_folder_in_stages_and_pruned_after_training(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "draw", lambda *_: None)
    folder = write_folder(tmp_path / "images", channels=3, count=200, test=60, names=("train", "val"))
    config = config_of("folder", folder, epochs=1)
    with config.unlocked():
        config.smoke_overrides = {}  # as in a configuration that was not made small
        config.stages = [
            {"name": "dense", "dense": True},
            {"name": "tuned", "dense": False, "after": "dense", "start": "weights",
             "prune": {"name": "magnitude_masks", "sparsity": 0.5}},
        ]  # fmt: skip
    table = stages.run(config, tmp_path / "runs").text()
    assert "tuned" in table
    prune_after.main([
        f"--run={tmp_path / 'runs/dense'}", "--rules=magnitude", "--sparsities=0.5", "--windows=8",
        f"--results={tmp_path}",
    ])  # fmt: skip
    assert "magnitude" in (tmp_path / "prune_after.md").read_text()


def test_a_folder_is_streamed_and_resumed(tmp_path, stopped_and_resumed):
    write_folder(tmp_path / "images", channels=3, count=200, test=60)
    changes = {"data.streamed": True, "data.mean": (0.5,), "data.std": (0.3,), "data.pad": 0, "data.flip": False}
    config = config_of("folder", "images", data_dir=str(tmp_path), **changes)
    state, [result] = train.train(config, tmp_path / "run", quiet=True)
    assert (result["steps"], result["data"]["test_images"]) == (12, 60)
    again = stopped_and_resumed(config, tmp_path / "stopped")
    chex.assert_trees_all_equal(again.params, state.params)
    assert [line["step"] for line in read_metrics(tmp_path / "stopped")] == [3, 6, 9, 12]
    next((tmp_path / "images/train/digit_4").iterdir()).unlink()
    with pytest.raises(ValueError, match="begun with other images: .*images, 200 images to train on"):
        train.train(config, tmp_path / "stopped", quiet=True)


def test_the_command_line(tmp_path):
    file = saved(tmp_path / "my.npz")
    (tmp_path / "my_data.py").write_text(f"import numpy as np\ndef load():\n    return dict(np.load({file!r}))\n")
    command = [
        sys.executable, "-m", "experiments.train", f"--config={CONFIG}", "--config.data.name=function",
        "--config.data.files=my_data:load", "--config.epochs=1", "--config.dense", f"--workdir={tmp_path / 'run'}",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "test accuracy" in run.stdout
    assert read_json(tmp_path / "run/result.json")["data"]["source"] == "my_data:load"
