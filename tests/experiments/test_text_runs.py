"""Whole runs on a text: resumed, in every layout, side by side, with masks held, pruned at the start, in a sweep."""

import json
import runpy

import chex
import jax
import numpy as np
import pytest

import jaxsparse
from experiments import program, stages, sweep, train
from experiments.inputs import open_dataset, open_source
from experiments.results import sweep as results
from experiments.results.compare import finished_runs
from experiments.workdir import read_metrics
from jaxsparse.trees import by_path
from tests.experiments import tiny_text
from tests.experiments.test_resume import outcome

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_text.write(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "rigl"
    state, [result] = train.train(tiny_text.config(folder), workdir)
    return workdir, state, result


def test_a_run_leaves_losses_tokens_a_second_and_where_its_text_is_from(run, folder):
    workdir, state, result = run
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert all(line["speed"]["tokens_per_second"] == pytest.approx(3 * 64 / line["seconds"]) for line in lines)
    assert result["test_loss"] < np.log(256)
    assert result["test_bits_per_byte"] == pytest.approx(result["test_loss"] / np.log(2), rel=1e-6)
    assert result["test_perplexity"] == pytest.approx(np.exp(result["test_loss"]), rel=1e-5)
    assert result["tokens"] == 12 * 64
    assert result["data"]["source"] == str(folder)
    assert (result["data"]["files"], len(result["data"]["sha256"])) == (16, 64)
    assert "receptive_fields.png" not in {path.name for path in workdir.glob("*.png")}
    jaxsparse.check(state.opt_state, state.params)
    table = finished_runs([workdir]).text()
    assert "test loss" in table
    assert "accuracy" not in table


def test_a_run_that_was_stopped_ends_with_the_same_bits(run, folder, tmp_path, stopped_and_resumed):
    state = stopped_and_resumed(tiny_text.config(folder), tmp_path / "run")
    chex.assert_trees_all_equal(state.params, run[1].params)
    assert outcome(tmp_path / "run") == outcome(run[0])


def test_another_text_is_refused(folder, tmp_path, monkeypatch):
    own = tiny_text.write(tmp_path / "text")
    train.train(tiny_text.config(own, "static", epochs=1), tmp_path / "run", quiet=True)
    with next(own.rglob("*.txt")).open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="the run was begun with another text"):
        train.train(tiny_text.config(own, "static", epochs=1), tmp_path / "run", quiet=True)


@pytest.mark.parametrize("layout", ["pmap", "data", "fsdp"])
def test_a_run_is_the_same_in_every_layout(run, folder, layout):
    config = tiny_text.config(folder, **{"parallel.layout": layout})
    dataset = open_dataset(config)
    made = program.make_program(config, dataset)
    state, source = made.layout.place(made.init(0)), open_source(None, config, dataset, made.layout, None)
    state, measured = made.train_chunk(state, source, 0, 9)  # masks change on step 3 and 6
    alone = [line["train_loss"] for line in read_metrics(run[0])[:3]]
    np.testing.assert_allclose(np.asarray(measured["losses"]).reshape(3, 3).mean(1), alone, rtol=1e-5)
    evaluated = jax.device_get(made.evaluate(state, source.test))
    assert evaluated["loss"] < np.log(256)


def test_seeds_side_by_side(run, folder, tmp_path):
    table = train.train_seeds(tiny_text.config(folder), tmp_path, [0, 1], side_by_side=True)
    summary = json.loads((tmp_path / "seeds.json").read_text())
    assert summary["test_loss"][0] == pytest.approx(run[2]["test_loss"], rel=1e-4)
    assert summary["test_loss"][0] != summary["test_loss"][1]
    assert table.startswith("test loss\nseed 0: ")
    assert table.endswith(" nats")


def test_fine_tuning_ends_with_the_same_zeros(run, folder, tmp_path):
    workdir, _, before = run
    config = tiny_text.config(folder, masks_from=str(workdir / "sparse.safetensors"), start="weights", epochs=1)
    state, [result] = train.train(config, tmp_path, quiet=True)
    params, masks = jaxsparse.load_sparse(workdir / "sparse.safetensors")
    kept = jaxsparse.get_masks(state.opt_state, state.params)
    for path, mask in by_path(masks).items():
        np.testing.assert_array_equal(mask, by_path(kept)[path])
        if np.ndim(mask):
            found = np.asarray(by_path(state.params)[path])
            assert not found[~np.asarray(mask)].any()
            assert np.any(found != by_path(params)[path])
    assert result["test_loss"] < before["test_loss"]


def test_snip_prunes_a_gpt_before_training(folder):
    config = tiny_text.config(folder)
    with config.unlocked():
        config.method = {"name": "prune_at_init", "score": "snip", "sparsity": 0.8, "examples": 10,
                         "prunable": ("block*/*",)}  # fmt: skip
    made = program.make_program(config, open_dataset(config))
    masks = [jaxsparse.get_masks(state.opt_state, state.params) for state in map(made.init, (0, 1))]
    assert float(jaxsparse.density(masks[0])) == pytest.approx(0.2, abs=0.01)
    assert any(bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, masks), strict=True))


def test_a_sweep_is_by_loss(folder, tmp_path):
    config = runpy.run_path(str(tiny_text.ROOT / "configs/sweeps/text_gpt.py"))["get_config"]()
    planned = sweep.plan(config, tmp_path / "plan")
    names = [(run.arm, run.value, run.seed) for run in planned]
    assert len(set(names)) == 17  # six arms; of seed 1 at 90% alone
    assert {value for _, value, seed in names if seed == 1} == {"", "0.9"}
    config.sweep.arms = [arm for arm in config.sweep.arms if arm["name"] in ("dense", "static")]
    changed = {
        **{f"data.{key}": value for key, value in {"files": str(folder), "test": 0.2, "length": 8}.items()},
        **{"model.width": 8, "model.num_layers": 1, "model.num_heads": 2, "epochs": 1, "data.epoch_tokens": 256},
        **{"smoke": True, "warmup_epochs": 0.5, "data.examples": None},
    }
    config.update_from_flattened_dict(changed)
    runs = [run for run in sweep.plan(config, tmp_path / "runs", changed=changed) if run.value != "0.8"][:2]
    sweep.train_all(runs)
    found = results.outcomes(runs)
    assert (found.test_loss < np.log(256) + 0.1).all()
    said = sweep.write(config, runs, tmp_path / "tables", "command")
    assert "The dense network reaches 5." in said
    assert "nats a token" in said
    page = (tmp_path / "tables" / "sweep_text_gpt.md").read_text()
    assert "Test loss in nats a token" in page
    assert "accuracy" not in page + said


def test_stages_are_compared_by_loss():
    found = stages.table(
        {"dense": {"0": {"density": 1.0, "test_loss": 1.5}}, "pruned": {"0": {"density": 0.1, "test_loss": 1.75}}},
        stages.measure_of({"data.name": "text"}),
    ).text()
    assert "test loss" in found
    assert "+0.2500" in found
