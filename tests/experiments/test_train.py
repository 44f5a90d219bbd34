import json
import runpy
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse
from experiments import train

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "digits_sparse_momentum.py"
KEPT = 5_020  # a tenth of the 50,200 weights


def smoke_config(**changes):
    config = runpy.run_path(str(CONFIG))["get_config"]("smoke").lock()
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def sparse_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sparse")
    return workdir, *train.train(smoke_config(), workdir)


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_sparse_run_learns(sparse_run):
    workdir, _, _, result = sparse_run
    metrics = metrics_of(workdir)
    assert [line["step"] for line in metrics] == [44, 88, 132, 176]
    assert [line["epoch"] for line in metrics] == [1, 2, 3, 4]
    assert ["test_accuracy" in line for line in metrics] == [False, True, False, True]
    losses = [line["train_loss"] for line in metrics]
    assert np.all(np.isfinite(losses))
    assert np.all(np.diff(losses) < 0)
    assert metrics[-1]["train_accuracy"] > 0.8
    assert result["test_accuracy"] == metrics[-1]["test_accuracy"] > 0.85
    assert json.loads((workdir / "result.json").read_text()) == result


def test_sparse_run_keeps_its_budget(sparse_run):
    workdir, params, opt_state, result = sparse_run
    assert jaxsparse.count(jaxsparse.get_masks(opt_state, params)) == KEPT
    assert sum(jnp.count_nonzero(layer["kernel"]) for layer in params.values()) <= KEPT
    assert {line["density"] for line in metrics_of(workdir)} == {0.1}
    assert result["density"] == 0.1


def test_sparse_run_leaves_picture_and_config(sparse_run):
    workdir, *_ = sparse_run
    assert (workdir / "masks.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((workdir / "config.json").read_text()) == smoke_config().to_dict()


def test_same_seed_gives_the_same_bits_whatever_is_logged(sparse_run, tmp_path):
    _, params, opt_state, _ = sparse_run
    again = train.train(smoke_config(log_every_steps=30), tmp_path)
    chex.assert_trees_all_equal((params, jaxsparse.get_masks(opt_state)), (again[0], jaxsparse.get_masks(again[1])))


def test_seed_reaches_the_masks():
    params = {"kernel": jnp.ones((20, 30))}
    masks = [
        jaxsparse.get_masks(train.make_optimizer(smoke_config(), 44, jax.random.key(seed)).init(params))
        for seed in (0, 1)
    ]
    assert jnp.any(masks[0]["kernel"] != masks[1]["kernel"])


def test_dense_run(tmp_path, capsys):
    (tmp_path / "masks.png").write_text("of an earlier, sparse run")
    params, _, result = train.train(smoke_config(), tmp_path, dense=True)
    assert jnp.count_nonzero(params["fc1"]["kernel"]) > 19_000
    assert result["density"] == 1
    assert result["test_accuracy"] > 0.9
    assert not (tmp_path / "masks.png").exists()
    assert f"test accuracy {result['test_accuracy']:.2%} at density 1" in capsys.readouterr().out


def test_dense_optimizer_is_the_sparse_one_without_its_last_link():
    params = {"kernel": jnp.ones((4, 5))}
    sparse, dense = (
        train.make_optimizer(smoke_config(), 44, jax.random.key(0), dense).init(params) for dense in (False, True)
    )
    chex.assert_trees_all_equal(sparse[:-1], dense)


@pytest.mark.parametrize("decay", train.PRUNE_RATES)
def test_every_prune_rate_decay_makes_an_optimizer(decay):
    config = smoke_config(**{"sparsity.prune_rate_decay": decay})
    opt_state = train.make_optimizer(config, 44, jax.random.key(0)).init({"kernel": jnp.ones((20, 30))})
    assert int(opt_state[-1].budget) == 60


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sparsity.growth", "momentun", "growth"),
        ("sparsity.redistribution", "nonzero", "redistribution"),
        ("sparsity.prune", "set", "prune"),
        ("sparsity.allocation", "even", "allocation"),
        (
            "sparsity.prune_rate_decay",
            "cosin",
            "prune_rate_decay is one of 'cosine', 'linear', 'constant', got 'cosin'",
        ),
        ("sparsity.sparsity", 1.5, "sparsity"),
        ("sparsity.update_every_epochs", 0, "update_every"),
        ("data.name", "mnits", "unknown data set 'mnits'; known are 'digits'"),
        ("data.batch_size", 2000, "batch_size is between 1 and the 1438 train examples, got 2000"),
        ("model.name", "lenet", "config.model.name is one of 'lenet_300_100', 'lenet5_caffe', got 'lenet'"),
        ("epochs", 0, "config.epochs is at least 1, got 0"),
        ("optimizer.decay_every_epochs", 0, "config.optimizer.decay_every_epochs is at least 1, got 0"),
    ],
)
def test_bad_config_fails_before_the_workdir_is_made(tmp_path, key, value, message):
    with pytest.raises(ValueError, match=message):
        train.train(smoke_config(**{key: value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_model_that_does_not_fit_the_images(tmp_path):
    with pytest.raises(ValueError, match="at least 16 x 16"):
        train.train(smoke_config(**{"model.name": "lenet5_caffe"}), tmp_path)


def test_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"workdir '.*file/run' cannot be written: Not a directory"):
        train.train(smoke_config(), tmp_path / "file" / "run")


def test_loss_that_is_not_finite_ends_the_program(tmp_path):
    command = [sys.executable, "-m", "experiments.train", f"--config={CONFIG}:smoke", f"--workdir={tmp_path}"]
    run = subprocess.run(
        [*command, "--config.optimizer.learning_rate=1e6"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "error: train_loss is inf at step 2; try a smaller config.optimizer.learning_rate" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(("values", "step"), [([1, np.nan, np.inf], 11), ([np.inf], 10), ([-np.inf, 1], 10)])
def test_stop_unless_finite_names_the_first(values, step):
    with pytest.raises(FloatingPointError, match=f"train_loss is -?(nan|inf) at step {step};"):
        train.stop_unless_finite("train_loss", values, first_step=10)


@pytest.mark.parametrize(("start", "length"), [(0, 12), (0, 3), (3, 1), (3, 2), (2, 9), (11, 1)])
def test_batches_do_not_depend_on_the_chunk(start, length):
    key, size, examples = jax.random.key(0), 5, 22  # four steps an epoch, two examples dropped
    whole = train.batches(key, 0, 12, size, examples)
    chex.assert_trees_all_equal(train.batches(key, start, length, size, examples), whole[start : start + length])
    for epoch in whole.reshape(3, 20):
        assert len(jnp.unique(epoch)) == 20
    assert jnp.any(whole[:4] != whole[4:8])


@pytest.mark.parametrize(
    ("arguments", "grid"),
    [((10, 4, 5), [0, 4, 5, 9, 10]), ((10, 100, 100), [0, 10]), ((6, 3, 6), [0, 3, 6]), ((7, 2, 1), list(range(8)))],
)
def test_chunk_grid(arguments, grid):
    assert train.chunk_grid(*arguments) == grid
