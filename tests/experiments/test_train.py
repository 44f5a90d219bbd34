import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import jaxsparse
from experiments import inputs, networks, options, program, speed, streams, train
from experiments.workdir import WorkdirError, read_metrics
from tests.experiments import jpeg_sets

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "digits_sparse_momentum.py"
KEPT = 5_020  # a tenth of the 50,200 weights
PICTURES = {"learning_curve.png", "layer_densities.png", "masks.png", "receptive_fields.png", "weights.png"}
TIMES = {"seconds", "steps_per_second", "speed"}


def smoke_config(**changes):
    config = options.small(runpy.run_path(str(CONFIG))["get_config"]())
    config.model.num_classes = 10
    config.lock()
    config.update_from_flattened_dict(changes)
    return config


def without_times(lines):
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def test_two_steps_give_the_numbers_they_always_gave(tmp_path):
    """If this alone fails, what a run computes has changed. If that was meant, write the new numbers below."""
    train.train(smoke_config(**{"data.examples": 32, "epochs": 2, "log_every_steps": 1}), tmp_path)
    first, second = read_metrics(tmp_path)
    losses = {"step 1": first["train_loss"], "step 2": second["train_loss"], "test": second["test_loss"]}
    assert losses == pytest.approx({"step 1": 2.293748, "step 2": 2.291010, "test": 2.318690}, rel=1e-5)
    flips = {"fc1/kernel": 655, "fc2/kernel": 933, "fc3/kernel": 890}
    assert second["flips"] == pytest.approx(flips, rel=0.01)  # weights that rank nearly alike may change places


@pytest.fixture(scope="module")
def sparse_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sparse")
    state, [result] = train.train(smoke_config(), workdir)
    return workdir, state, result


def test_sparse_run_learns(sparse_run):
    workdir, _, result = sparse_run
    metrics = read_metrics(workdir)
    assert [line["step"] for line in metrics] == [44, 88, 132, 176]
    assert [line["epoch"] for line in metrics] == [1, 2, 3, 4]
    assert ["test_accuracy" in line for line in metrics] == [False, True, False, True]
    losses = [line["train_loss"] for line in metrics]
    assert np.all(np.isfinite(losses))
    assert np.all(np.diff(losses) < 0)
    assert metrics[-1]["train_accuracy"] > 0.8
    assert result["test_accuracy"] == metrics[-1]["test_accuracy"] > 0.85
    assert result["seconds"] == sum(line["seconds"] for line in metrics)
    assert json.loads((workdir / "result.json").read_text()) == result


def test_sparse_run_keeps_its_budget(sparse_run):
    workdir, state, result = sparse_run
    assert jaxsparse.count(jaxsparse.get_masks(state.opt_state, state.params)) == KEPT
    assert sum(jnp.count_nonzero(layer["kernel"]) for layer in state.params.values()) <= KEPT
    assert {line["density"] for line in read_metrics(workdir)} == {0.1}
    assert result["density"] == 0.1


def test_layers_are_logged(sparse_run):
    workdir, state, _ = sparse_run
    metrics = read_metrics(workdir)
    masks = jaxsparse.get_masks(state.opt_state, state.params)
    last = {f"{name}/kernel": round(float(layer["kernel"].mean()), 6) for name, layer in masks.items()}
    assert metrics[-1]["layer_density"] == last
    # Masks change on the first step of every epoch but the first.
    assert ["flips" in line for line in metrics] == [False, True, True, True]
    flips = np.array([list(line["flips"].values()) for line in metrics[1:]])
    assert np.all(flips.sum(1) % 2 == 0)  # as many go as come
    assert np.all(flips.sum(1) > 0)


def test_sparse_run_leaves_pictures_and_config(sparse_run):
    workdir, *_ = sparse_run
    assert {path.name for path in workdir.glob("*.png")} == PICTURES
    assert json.loads((workdir / "config.json").read_text()) == json.loads(smoke_config().to_json())


def test_tensorboard_has_what_the_metrics_have(sparse_run):
    workdir, *_ = sparse_run
    events = EventAccumulator(str(workdir / "tensorboard")).Reload()
    last = read_metrics(workdir)[-1]
    for name in ("train_loss", "test_accuracy", "layer_density/fc1/kernel", "flips/fc2/kernel"):
        value = last
        for key in name.split("/", 1):
            value = value[key]
        scalar = events.Scalars(name)[-1]
        assert (scalar.step, scalar.value) == (176, pytest.approx(value))


@pytest.mark.slow
def test_same_seed_gives_the_same_bits_whatever_is_logged(sparse_run, tmp_path):
    _, state, _ = sparse_run
    again, _ = train.train(smoke_config(log_every_steps=30, checkpoint_every_epochs=1), tmp_path)
    chex.assert_trees_all_equal(state.params, again.params)
    chex.assert_trees_all_equal(jaxsparse.get_masks(state.opt_state), jaxsparse.get_masks(again.opt_state))


def test_finished_run_without_checkpoints_is_not_run_again_either(sparse_run, tmp_path, capsys):
    workdir, _, result = sparse_run
    shutil.copytree(workdir, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert train.train(smoke_config(), tmp_path / "run") == (None, [result])
    assert f"finished before, see {tmp_path / 'run'}, which has no checkpoint any more" in capsys.readouterr().out
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_dense_run(tmp_path, capsys):
    state, [result] = train.train(smoke_config(dense=True), tmp_path)
    assert jnp.count_nonzero(state.params["fc1"]["kernel"]) > 19_000
    assert result["density"] == 1
    assert result["test_accuracy"] > 0.9
    assert {path.name for path in tmp_path.glob("*.png")} == {"learning_curve.png"}
    assert f"test accuracy {result['test_accuracy']:.2%} at density 1" in capsys.readouterr().out


@pytest.mark.slow
def test_validation_images_are_held_out_and_evaluated(tmp_path):
    _, [result] = train.train(smoke_config(**{"data.validation": 0.1, "epochs": 1}), tmp_path)
    assert result["steps"] == 1267 // 32  # nine tenths of 1408
    hits = result["validation_accuracy"] * 141
    assert hits == pytest.approx(round(hits), abs=1e-3)


def test_finished_run_is_not_run_again(sparse_run, capsys):
    workdir, state, result = sparse_run
    before = (workdir / "metrics.jsonl").stat().st_mtime_ns
    again, [same] = train.train(smoke_config(), workdir)
    assert f"finished before, see {workdir}" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").stat().st_mtime_ns == before
    assert same == result
    chex.assert_trees_all_equal(
        (state.params, jaxsparse.get_masks(state.opt_state)), (again.params, jaxsparse.get_masks(again.opt_state))
    )


def test_another_config_in_the_same_workdir_is_refused(sparse_run):
    workdir, *_ = sparse_run
    with pytest.raises(WorkdirError, match="another configuration:\n  method.sparsity: 0.9 there, 0.8 now\nTake"):
        train.train(smoke_config(**{"method.sparsity": 0.8}), workdir)


@pytest.mark.slow
def test_seeds_one_after_another_and_side_by_side(sparse_run, tmp_path):
    *_, result = sparse_run
    table = train.train_seeds(smoke_config(), tmp_path / "after", [0, 1])
    summary = json.loads((tmp_path / "after" / "seeds.json").read_text())
    assert summary["test_accuracy"][0] == result["test_accuracy"] != summary["test_accuracy"][1]
    mean, error = np.mean(summary["test_accuracy"]), np.std(summary["test_accuracy"], ddof=1) / 2**0.5
    assert (summary["mean"], summary["standard_error"]) == pytest.approx((mean, error))
    assert f"mean {mean:.2%}, standard error {100 * error:.2f} points" in table

    # The vmapped program rounds otherwise, so the first losses are compared, not the last.
    train.train_seeds(smoke_config(log_every_steps=4), tmp_path / "beside", [0, 1], side_by_side=True)
    train.train(smoke_config(log_every_steps=4), tmp_path / "alone")
    alone = read_metrics(tmp_path / "alone")
    for seed in (0, 1):
        metrics = read_metrics(tmp_path / "beside" / f"seed_{seed}")
        assert len(metrics) == len(alone)
        assert {line["density"] for line in metrics} == {0.1}
        close = np.isclose(metrics[0]["train_loss"], alone[0]["train_loss"], rtol=1e-4)
        assert close == (seed == 0)
    again = train.train(smoke_config(log_every_steps=4), tmp_path / "beside", [0, 1])[1]  # finished: read
    assert [one["seed"] for one in again] == [0, 1]
    with pytest.raises(
        WorkdirError, match=r"of seeds \[0, 1\] side by side: train seeds \[2, 3, 4\] side by side in an"
    ):
        train.train(smoke_config(log_every_steps=4), tmp_path / "beside", [2, 3, 4])
    with pytest.raises(WorkdirError, match=r"of seeds \[0, 1\] side by side: train the run of one seed in another f"):
        train.train(smoke_config(log_every_steps=4), tmp_path / "beside")
    with pytest.raises(
        WorkdirError, match=r"of a run of one seed: train seeds \[0, 1\] side by side in another folder"
    ):
        train.train(smoke_config(log_every_steps=4), tmp_path / "alone", [0, 1])
    (tmp_path / "alone" / "result.json").unlink()
    (tmp_path / "alone" / "metrics.jsonl").unlink()
    with pytest.raises(WorkdirError, match=r"metrics.jsonl has lost the last steps: delete the newest folder in check"):
        train.train(smoke_config(log_every_steps=4), tmp_path / "alone")


class WithBatchNorm(nn.Module):
    num_classes: int
    dtype: Any

    @nn.compact
    def __call__(self, images):
        x = nn.Dense(30)(images.reshape(len(images), -1))
        x = nn.BatchNorm(use_running_average=not self.is_mutable_collection("batch_stats"))(x)
        return nn.Dense(self.num_classes)(nn.relu(x))


@pytest.mark.slow
def test_batch_statistics_are_trained_used_and_saved(tmp_path, monkeypatch):
    monkeypatch.setitem(networks.MODELS, "with_batch_norm", WithBatchNorm)
    config = smoke_config(**{"model.name": "with_batch_norm"})
    state, [result] = train.train(config, tmp_path)
    assert result["test_accuracy"] > 0.85
    assert jnp.all(state.model_state["batch_stats"]["BatchNorm_0"]["mean"] != 0)
    restored, _ = train.train(config, tmp_path)
    chex.assert_trees_all_equal(state.model_state, restored.model_state)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method.growth", "momentun", "config.method: growth"),
        (
            "method.prune_rate.name",
            "cosine_prune_rat",
            "config.method.prune_rate.name .*, got 'cosine_prune_rat'; did you mean 'cosine_prune_rate'",
        ),
        ("method.sparsity", 1.5, "config.method: sparsity"),
        ("method.update_every_epochs", 0, "config.method: update_every .* got 0"),
        ("data.name", "mnits", "unknown data set 'mnits'; did you mean 'mnist'?"),
        ("data.batch_size", 2000, "batch_size is between 1 and the 1408 train examples, got 2000"),
        ("data.validation", 1.0, r"config.data.validation is in \[0, 1\), got 1.0"),
        ("model.name", "lenet", "config.model.name is one of 'alexnet', .*'wide_resnet', got 'lenet'"),
        ("model.name", "lenet5_caffe", "at least 16 x 16"),
        ("method.name", "sparse_momentun", "config.method.name is .*; did you mean 'sparse_momentum'"),
        ("data.examples", 0, "config.data.examples is at least 1, got 0"),
        ("data.pad", -1, "config.data.pad is at least 0, got -1"),
        ("data.pad_mode", "mirror", "config.data.pad_mode is one of 'zeros', 'reflect', got 'mirror'"),
        ("model.dtype", "float16", "config.model.dtype is one of 'float32', 'bfloat16', got 'float16'"),
        ("epochs", 0, "config.epochs is at least one step, .*, got 0"),
        ("seed", 2**32, r"config.seed is from 0 to 2\^32 - 1, got 4294967296"),
        ("data.classes", (1, 2), "config.data.classes is for streamed images, config.data.streamed"),
        ("label_smoothing", 1.0, r"config.label_smoothing is in \[0, 1\), got 1.0"),
        ("model.num_classes", 9, "config.model.num_classes is 9, but the data have 10 classes"),
        ("parallel.layout", "mesh", "config.parallel.layout: a layout is one of 'one_device', 'pmap', .*, got 'mesh'"),
        ("parallel.accumulate", 0, "config.parallel.accumulate is at least 1, got 0"),
        ("parallel.accumulate", 3, "config.data.batch_size=32 cannot be split among 1 devices, 3 parts each"),
        ("checkpoint_every_epochs", 0, "config.checkpoint_every_epochs is at least 1, got 0"),
        ("optimizer.learning_rate.transition_steps", 0, "learning_rate.transition_steps is at least 1, got 0"),
    ],
)
def test_bad_config_fails_before_the_workdir_is_made(tmp_path, key, value, message):
    with pytest.raises(ValueError, match=message):
        train.train(smoke_config(**{key: value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_devices_cannot_share(tmp_path):
    with pytest.raises(ValueError, match="batch_size=20 cannot be split among 8 devices, 1 parts each"):
        train.train(smoke_config(**{"parallel.layout": "pmap", "data.batch_size": 20}), tmp_path / "run")


def test_synchronised_statistics_are_for_models_that_have_some(tmp_path):
    changes = {"parallel.layout": "pmap", "parallel.sync_batch_norm": True}
    with pytest.raises(ValueError, match="sync_batch_norm is for models with batch normalisation, .*'lenet_300_100'"):
        train.train(smoke_config(**changes), tmp_path / "run")


def test_sparsity_that_would_never_change(tmp_path):
    config = options.small(runpy.run_path(str(ROOT / "configs/mnist_asni.py"))["get_config"]())
    config.data.name, config.model.num_classes = "digits", 10
    config.method.update_every_epochs = 5
    with pytest.raises(ValueError, match="config.method changes masks every 220 steps, and there are 176 steps in all"):
        train.train(config, tmp_path / "run")


def test_seeds_side_by_side_are_for_one_device(tmp_path):
    with pytest.raises(ValueError, match="--vmap_seeds is for config.parallel.layout='one_device', got 'data'"):
        train.train(smoke_config(**{"parallel.layout": "data"}), tmp_path / "run", [0, 1])


@pytest.mark.slow
def test_speed_is_logged_and_a_trace_written_if_asked_for(tmp_path):
    train.train(smoke_config(epochs=2, eval_every_epochs=2), tmp_path, profile=True)
    for line in read_metrics(tmp_path):
        speed = line["speed"]
        assert speed["images_per_second"] == pytest.approx(44 * 32 / line["seconds"])
        assert speed["step_milliseconds"] == pytest.approx(1000 * line["seconds"] / 44)
        assert speed["input_wait"] == 0
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_share_of_the_peak_counts_the_operations_of_the_dense_network(monkeypatch):
    config = smoke_config()
    compiled = program.make_program(config, inputs.open_dataset(config))
    shapes = jax.eval_shape(compiled.init, 0)
    monkeypatch.setitem(speed.PEAKS, compiled.layout.devices[0].device_kind, 1e9)
    found = speed.speedometer(config, compiled, shapes)(steps=10, seconds=2.0, waited=0.5)
    multiply_adds = 64 * 300 + 300 * 100 + 100 * 10
    assert found["share_of_peak"] == pytest.approx(6 * multiply_adds * 160 / 1e9)
    assert (found["step_milliseconds"], found["input_wait"]) == (150, 0.25)


def streamed_config(data_dir, **changes):
    config = smoke_config()
    with config.unlocked():
        config.model.update({"name": "resnet_20", "depth": 8, "width": 0.25, "num_classes": 1000})
    config.data_dir = str(data_dir)
    config.data.update({"name": "imagenet2012", "streamed": True, "image_size": 16, "batch_size": 8})
    config.data.update({"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)})
    config.update_from_flattened_dict({"epochs": 1, "log_every_steps": 2, **changes})
    return config


@pytest.mark.slow
def test_streamed_images_that_cannot_be_read_are_named_and_counted(tmp_path, caplog):
    jpeg_sets.prepare_imagenet(tmp_path / "data", train=8, validation=3, corrupt=2)
    _, [result] = train.train(streamed_config(tmp_path / "data"), tmp_path / "run")
    assert result["steps"] == 4
    assert sum(line["replaced_images"] for line in read_metrics(tmp_path / "run")) == 2  # each once an epoch
    warnings = [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]
    assert len(warnings) == 2
    assert all("JPEG cannot be read: the next image was taken in its place" in warning for warning in warnings)


@pytest.mark.slow
def test_images_to_evaluate_on_that_cannot_be_read_are_left_out(tmp_path, caplog, monkeypatch):
    jpeg_sets.prepare_imagenet(tmp_path / "data", train=8, validation=3)
    config = streamed_config(tmp_path / "data", epochs=2)
    test = inputs.open_dataset(config).test

    class Broken(list):
        name_of = test.name_of

    def opened(bad):
        files = Broken((b"broken" if i in bad else file, label) for i, (file, label) in enumerate(test))
        real = open_dataset(config)
        monkeypatch.setattr(train, "open_dataset", lambda config: real._replace(test=files))

    open_dataset = inputs.open_dataset
    opened((3, 4, 11))
    state, [result] = train.train(config, tmp_path / "run")
    left_out = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert left_out == [f"{test.name_of(i)} cannot be read: it is left out of the evaluation" for i in (3, 4, 11)]
    assert read_metrics(tmp_path / "run")[-1]["test_unreadable"] == 3
    whole = program.make_program(config, open_dataset(config))
    readable = [example for i, example in enumerate(test) if i not in (3, 4, 11)]
    hits = [whole.evaluate(state, Broken([example]))["accuracy"] for example in readable]
    assert result["test_accuracy"] == pytest.approx(np.mean(hits))
    opened(range(12))
    with pytest.raises(streams.StreamError, match="12 images in a row, from .* on, cannot be read"):
        train.train(config, tmp_path / "another")


@pytest.mark.parametrize(
    ("changes", "seeds", "message"),
    [
        ({"seed": -1}, None, r"config.seed is from 0 to 2\^32 - 1, got -1"),
        ({}, [0, 1], "--vmap_seeds is for images that fit into the memory, not for config.data.streamed"),
        ({"data.streamed": False}, None, r"has no split 'test', it has .*are streamed: --config.data.streamed"),
    ],
)
def test_what_streamed_images_cannot_do(imagenet_dir, tmp_path, changes, seeds, message):
    with pytest.raises(ValueError, match=message):
        train.train(streamed_config(imagenet_dir, **changes), tmp_path / "run", seeds)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["mean", "std"])
def test_streamed_images_need_mean_and_deviation(imagenet_dir, tmp_path, key):
    with pytest.raises(ValueError, match=f"config.data.{key} of streamed images has one number or one for each"):
        train.train(streamed_config(imagenet_dir, **{f"data.{key}": None}), tmp_path / "run")


def test_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"workdir '.*file/run' cannot be written: Not a directory"):
        train.train(smoke_config(), tmp_path / "file" / "run")


@pytest.mark.slow
def test_loss_that_is_not_finite_ends_the_program_and_keeps_the_last_checkpoint(tmp_path):
    command = [
        sys.executable,
        "-m",
        "experiments.train",
        f"--config={CONFIG}",
        "--config.smoke",
        f"--workdir={tmp_path}",
    ]
    # Fine for two epochs; then the learning rate is multiplied by a million.
    command += ["--config.optimizer.learning_rate.decay_rate=1e6", "--config.checkpoint_every_epochs=1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stderr
    assert "error: train_loss is " in run.stderr
    assert "; try a smaller learning rate or step size" in run.stderr
    assert "Traceback" not in run.stderr
    assert {path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")} == {"44", "88"}
    assert read_metrics(tmp_path)[-1]["step"] == 88
    assert not (tmp_path / "result.json").exists()


@pytest.mark.slow
def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    real = program.ResidentProgram.train_chunk

    def breaking(self, state, source, start, length):
        state, measured = real(self, state, source, start, length)
        if start:  # the loss of a chunk does not show what its last step did
            measured["finite"]["fc2/kernel"] = jnp.array(False)
        return state, measured

    monkeypatch.setattr(program.ResidentProgram, "train_chunk", breaking)
    with pytest.raises(FloatingPointError, match="fc2/kernel is nan at step 88;"):
        train.train(smoke_config(checkpoint_every_epochs=1), tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")} == {"44"}


@pytest.mark.parametrize(("values", "step"), [([1, np.nan, np.inf], 11), ([np.inf], 10), ([-np.inf, 1], 10)])
def test_stop_unless_finite_names_the_first(values, step):
    with pytest.raises(FloatingPointError, match=f"train_loss is -?(nan|inf) at step {step};"):
        train.stop_unless_finite("train_loss", values, first_step=10)


@pytest.mark.parametrize(
    ("arguments", "grid"),
    [
        ((10, 4, 5), [0, 4, 5, 9, 10]),
        ((10, 100, 100), [0, 10]),
        ((6, 3, 6), [0, 3, 6]),
        ((7, 2, 1), list(range(8))),
        ((12, 5, 4, 6), [0, 4, 6, 8, 12]),
    ],
)
def test_chunk_grid(arguments, grid):
    assert program.chunk_grid(*arguments) == grid


@pytest.mark.parametrize("texts", [["0", "x"], [""], ["1", "1"]])
def test_seeds_that_are_none(texts):
    with pytest.raises(ValueError, match="--seeds takes different whole numbers .*such as 0,1,2, got"):
        options.as_seeds(texts)


@pytest.mark.parametrize("seeds", ["0,4294967296", "-1", "0,0", "1.5", ""])
def test_seeds_are_different_numbers_of_32_bits(seeds):
    with pytest.raises(ValueError, match=r"--seeds takes different whole numbers from 0 to 2\^32 - 1"):
        options.as_seeds(seeds.split(","))


def test_seeds_of_32_bits_are_all_different():
    config = smoke_config()
    made = program.make_program(config, inputs.open_dataset(config))
    seeds = options.as_seeds(f"0,{2**31},{2**32 - 1}".split(","))
    keys = {tuple(jax.random.key_data(made.init(np.asarray(seed, np.uint32)).order_key).tolist()) for seed in seeds}
    assert len(keys) == 3
