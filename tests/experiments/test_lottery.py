"""Rounds of lottery tickets: rewound values, learning rate and order of images, resumed with the same bits."""

import copy
import os
import runpy
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse
from experiments import stages, train
from experiments.options import check_config, small
from experiments.stopping import Stopped
from experiments.workdir import Workdir, read_metrics, write_json
from tests.experiments.test_resume import outcome

ROOT = Path(__file__).parents[2]
LOTTERY = runpy.run_path(str(ROOT / "configs/stages/lottery.py"))


def read_config(experiment="digits_late", rounds=2, **changes):
    """The first rounds of an experiment, made small: four epochs of 44 steps."""
    config = LOTTERY["get_config"](experiment).lock()
    config.update_from_flattened_dict({"smoke": True, **changes})
    config.stages = copy.deepcopy(config.stages[: rounds + 1])
    return config


# --- What is rewound ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("at", "logged"), [(0.5, [22, 44]), (2.0, [44, 132])])
def test_rewound_without_pruning_is_the_same_training(tmp_path, monkeypatch, at, logged):
    """Values, learning rate, which falls after the second of four epochs, and order of the images: all go on alike."""
    monkeypatch.setattr(train, "draw", lambda *_: None)  # pictures take longer than the training
    config = read_config(rounds=1, **{"optimizer.momentum": 0.0, "optimizer.nesterov": False})
    config.stages[1].update({"prune": {"name": "magnitude_masks", "sparsity": 0.0}, "start_epochs": at})
    stages.run(config, tmp_path)
    dense, _ = jaxsparse.load_sparse(tmp_path / "round_0/dense.safetensors")
    again, _ = jaxsparse.load_sparse(tmp_path / "round_1/sparse.safetensors")
    start, _ = jaxsparse.load_sparse(tmp_path / "round_1/start.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again, dense)
    assert not np.array_equal(start["fc1"]["kernel"], dense["fc1"]["kernel"])
    first = [read_metrics(tmp_path / name)[0]["step"] for name in ("round_0", "round_1")]
    assert first == logged


@pytest.mark.slow
def test_stopped_and_broken_off_in_every_round_it_ends_with_the_same_bits(tmp_path, monkeypatch):
    """Broken off after the values to rewind to are written, and before the next checkpoint."""
    monkeypatch.setattr(train, "draw", lambda *_: None)
    whole, again = tmp_path / "whole", tmp_path / "again"
    config = read_config(**{"checkpoint_every_epochs": 3})
    for stage in config.stages[1:]:
        stage["start_epochs"] = 1.5
    table = stages.run(config, whole)
    assert [row[1] for row in table.rows] == ["100.00%", "80.20%", "64.34%"]
    log, ends = Workdir.log, {"round_0": (88, "break"), "round_1": (88, "stop"), "round_2": (132, "break")}

    def end_once(run, metrics):
        log(run, metrics)
        step, how = ends.get(run.path.name, (None, None))
        if metrics["step"] == step:
            del ends[run.path.name]
            if how == "break":
                raise RuntimeError("broken off")
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Workdir, "log", end_once)
    for error in (RuntimeError, Stopped, RuntimeError):
        with pytest.raises(error):
            stages.run(config, again)
    assert stages.run(config, again) == table
    for name in ("round_0", "round_1", "round_2"):
        assert outcome(again / name) == outcome(whole / name)
    for file in ("round_0/epoch_1.5.safetensors", "round_1/start.safetensors", "round_2/start.safetensors"):
        assert (again / file).read_bytes() == (whole / file).read_bytes()


def leave(folder, params, masks=None):
    """What a finished stage leaves, without the training."""
    folder.mkdir(parents=True)
    write_json(folder / "result.json", {})
    jaxsparse.save_sparse(folder / ("dense.safetensors" if masks is None else "sparse.safetensors"), params, masks)


def test_a_round_prunes_what_is_left_and_takes_the_earlier_values(tmp_path):
    config, draw = read_config(rounds=2), np.random.default_rng(0).standard_normal
    params = {name: {"kernel": jnp.asarray(draw((10, 10)), jnp.float32)} for name in ("fc1", "fc3")}
    early = jax.tree.map(lambda leaf: leaf + 1, params)
    leave(tmp_path / "round_0", params)
    with pytest.raises(stages.MissingStageError, match=r"round_1 starts from .*epoch_2\.safetensors, which is not"):
        stages.write_start(config, "round_1", tmp_path)
    jaxsparse.save_sparse(tmp_path / "round_0/epoch_2.safetensors", early)
    stages.write_start(config, "round_1", tmp_path)
    start, masks = jaxsparse.load_sparse(tmp_path / "round_1/start.safetensors")
    assert {name: int(layer["kernel"].sum()) for name, layer in masks.items()} == {"fc1": 80, "fc3": 90}
    jax.tree.map(np.testing.assert_array_equal, start, jaxsparse.apply_masks(early, masks))
    # The second round takes a fifth of the 80, and a tenth of the 90, by the values that round_1 ended with.
    trained = jaxsparse.apply_masks(params, masks)
    leave(tmp_path / "round_1/x", trained, masks)
    (tmp_path / "round_1/x/result.json").rename(tmp_path / "round_1/result.json")
    (tmp_path / "round_1/x/sparse.safetensors").rename(tmp_path / "round_1/sparse.safetensors")
    stages.write_start(config, "round_2", tmp_path)
    start, masks = jaxsparse.load_sparse(tmp_path / "round_2/start.safetensors")
    assert {name: int(layer["kernel"].sum()) for name, layer in masks.items()} == {"fc1": 64, "fc3": 81}
    jax.tree.map(np.testing.assert_array_equal, start, jaxsparse.apply_masks(early, masks))
    # A criterion under which pruned weights come back is refused.
    config.stages[2]["prune"] = {"name": "random_masks", "sparsity": 0.3}
    with pytest.raises(ValueError, match=r"round_2: prune keeps weights of fc1/kernel, fc3/kernel that round_1 had"):
        stages.write_start(config, "round_2", tmp_path)


# --- Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", LOTTERY["EXPERIMENTS"])
def test_every_experiment_makes_its_rounds(tmp_path, experiment):
    config = LOTTERY["get_config"](experiment).lock()
    data, _, rewind = experiment.partition("_")
    last = f"round_{LOTTERY['ROUNDS'][data]}"
    assert stages.config_of(config, last, tmp_path).start == "weights"
    kept = stages.config_of(config, "round_0", tmp_path).keep_epochs
    assert kept == {"original": (0.0,), "late": (config.stages[1].get("start_epochs"),)}.get(rewind, ())
    assert stages.config_of(config, "round_1", tmp_path).keep_epochs == ()
    config.stages = config.stages[:3]
    stages.check(config, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rewind": "round_2"},
            r"config\.stages\[1\]\.rewind is an earlier stage, one of \['round_0'\], .* got 'round_2'",
        ),
        ({"start": "original"}, r"config\.stages\[1\]\.rewind .* comes with 'prune' and without 'start'"),
        ({"prune": None, "after": None}, r"config\.stages\[1\]\.rewind .* comes with 'prune'"),
        (
            {"optimizer": {"name": "sgd"}},
            r"config\.start_epochs has no effect without config\.optimizer\.learning_rate",
        ),
    ],
)
def test_rounds_that_do_not_fit_together(tmp_path, changes, message):
    config = read_config(rounds=1)
    stage = config.stages[1] | changes
    config.stages[1] = {key: value for key, value in stage.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        stages.check(config, tmp_path)


def test_a_stage_is_not_rewound_to_before_the_start_of_another(tmp_path):
    config = read_config()
    config.stages[2].update({"rewind": "round_1", "start_epochs": 1.0})
    with pytest.raises(ValueError, match=r"config\.stages\[2\] rewinds to epoch 1, but round_1 starts at 2"):
        stages.check(config, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_epochs": 4.0}, r"config\.start_epochs is from 0 to less than the 4 epochs, got 4"),
        ({"start_epochs": 1.0}, r"config\.start_epochs is for config\.dense or config\.masks_from"),
        ({"start_epochs": 1.0, "dense": True, "data.streamed": True}, "config.start_epochs is for images that fit"),
        ({"keep_epochs": (1.0, 4.5)}, r"config\.keep_epochs are from 0\.0 to 4, got \(1\.0, 4\.5\)"),
        ({"keep_epochs": (1.0,), "start_epochs": 2.0, "dense": True}, r"config\.keep_epochs are from 2\.0 to 4"),
    ],
)
def test_epochs_out_of_range(changes, message):
    config = read_config().unlock()
    del config.stages
    config = small(config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        check_config(config, num_examples=1000)
