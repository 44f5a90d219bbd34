"""Runs of several stages: each starts from what the one before it left, and all are resumed with the same bits."""

import copy
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxsparse
from experiments import stages, train
from experiments.inputs import open_dataset
from experiments.options import small, with_seed
from experiments.program import make_program
from experiments.stopping import Stopped
from experiments.workdir import Workdir, read_json
from jaxsparse.trees import by_path
from tests.experiments.test_resume import outcome, wait_for_step

ROOT = Path(__file__).parents[2]


def read_config(name, **changes):
    """A config of stages, made small, on digits."""
    config = runpy.run_path(str(ROOT / f"configs/stages/{name}.py"))["get_config"]().lock()
    changes = {"smoke": True, "data.name": "digits", "data.mean": None, "data.std": None} | changes
    config.update_from_flattened_dict(changes)
    return config


def two_stages():
    config = read_config("fine_tune")
    del config.stages[2:]
    return config


# --- Resumed --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_is_stopped_in_the_second_stage_ends_with_the_same_bits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "draw", lambda *_: None)  # pictures take longer than the training
    config, whole, stopped = two_stages(), tmp_path / "whole", tmp_path / "stopped"
    table = stages.run(config, whole)
    shutil.copytree(whole / "dense", stopped / "dense")
    log = Workdir.log

    def stop_after_one_chunk(run, metrics):
        log(run, metrics)
        if run.path.name == "fine_tune" and len(run.metrics()) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Workdir, "log", stop_after_one_chunk)
    with pytest.raises(Stopped):
        stages.run(config, stopped)
    assert not (stopped / "result.json").exists()
    assert stages.run(config, stopped).text() == table.text()
    printed = capsys.readouterr().out
    assert printed.count(f"finished before, see {stopped / 'dense'}") == 2
    assert "going on from step 44 of 176" in printed
    config_of = [read_json(run / "fine_tune/config.json") for run in (whole, stopped)]
    assert [config.pop("masks_from") for config in config_of] == [
        str(run / "fine_tune/start.safetensors") for run in (whole, stopped)
    ]
    assert config_of[0] == config_of[1]
    assert outcome(stopped / "fine_tune") == outcome(whole / "fine_tune")
    starts = [(run / "fine_tune/start.safetensors").read_bytes() for run in (whole, stopped)]
    assert starts[0] == starts[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "both"), [("asni.py", ("asni_1", "asni_2")), ("lottery.py:digits_late", ("round_0", "round_1"))]
)
def test_killed_in_both_stages(tmp_path, config, both):
    command = [sys.executable, "-m", "experiments.stages", f"--config={ROOT / 'configs/stages'}/{config}"]
    changes = {"smoke": True, "data.name": "digits", "data.mean": 0.3, "data.std": 0.4, "epochs": 20}
    command += [f"--config.{key}={value}" for key, value in changes.items()] + [f"--only={','.join(both)}"]

    def start(workdir):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([*command, f"--workdir={workdir}"], cwd=ROOT, **pipes)

    def finish(run):
        output, _ = run.communicate()
        assert run.returncode == 0, output
        return output

    finish(start(tmp_path / "whole"))
    for stage in both:
        run = start(tmp_path / "killed")
        wait_for_step(run, tmp_path / "killed" / stage, 440)
        time.sleep(0.1)
        run.kill()
        output, _ = run.communicate()
        assert run.returncode == -signal.SIGKILL, output
    assert "finished before" in finish(start(tmp_path / "killed"))
    for stage in both:
        assert outcome(tmp_path / "killed" / stage) == outcome(tmp_path / "whole" / stage)


# --- ASNI I and II --------------------------------------------------------------------------------------------------

ASNI = ("dense", "asni_1", "asni_2", "asni_2_biases", "original")


@pytest.fixture(scope="module")
def asni(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asni")
    return folder, stages.run(read_config("asni"), folder, seeds=[0])


def start_of(stage, folder):
    """The first state of a stage's run."""
    config = small(stages.config_of(read_config("asni"), stage, folder, 0))
    return make_program(config, open_dataset(config)).init(0)


@pytest.mark.slow
def test_one_command_trains_all_stages_and_shows_them_side_by_side(asni):
    folder, table = asni
    assert [row[0] for row in table.rows] == list(ASNI)
    results = {stage: read_json(folder / stage / "seed_0/result.json") for stage in ASNI}
    assert read_json(folder / "result.json") == {stage: {"0": result} for stage, result in results.items()}
    assert results["dense"]["density"] == 1
    assert results["asni_1"]["density"] < 0.6
    assert all(results[stage]["density"] == results["asni_1"]["density"] for stage in ASNI[2:])
    assert all(result["test_accuracy"] > 0.6 for result in results.values())


@pytest.mark.slow
def test_finished_stages_are_not_run_again(asni, capsys):
    folder, table = asni
    assert stages.run(read_config("asni"), folder, [0]) == table
    assert capsys.readouterr().out.count("finished before") == 5


@pytest.mark.slow
def test_the_sparse_model_of_a_stage_can_be_loaded(asni):
    folder, _ = asni
    params, masks = jaxsparse.load_sparse(folder / "asni_1/seed_0/sparse.safetensors")
    density = read_json(folder / "asni_1/seed_0/result.json")["density"]
    assert float(jaxsparse.density(masks)) == pytest.approx(density, abs=1e-6)
    assert all(
        (leaf[~mask] == 0).all() for leaf, mask in zip(*map(jax.tree.leaves, (params, masks)), strict=True) if mask.ndim
    )


@pytest.mark.slow
def test_every_stage_starts_from_what_its_name_says(asni):
    folder, _ = asni
    trained, masks = jaxsparse.load_sparse(folder / "asni_1/seed_0/sparse.safetensors")
    random = by_path(start_of("dense", folder).params)
    for stage in ASNI[2:]:
        state = start_of(stage, folder)
        for path, leaf in by_path(state.params).items():
            leaf, of_trained, mask = np.asarray(leaf), by_path(trained)[path], by_path(masks)[path]
            if stage == "original":
                np.testing.assert_array_equal(leaf, np.where(mask, random[path], 0))
            elif mask.ndim or stage == "asni_2_biases":
                means = [of_trained[sign * of_trained > 0].mean() for sign in (-1, 1)]
                expected = np.where(of_trained < 0, means[0], np.where(of_trained > 0, means[1], 0))
                np.testing.assert_allclose(leaf, expected, rtol=1e-5)
            else:
                assert not leaf.any()


# --- Prune and fine-tune --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fine_tuning_starts_from_the_largest_weights_of_every_layer(tmp_path):
    config = read_config("fine_tune")
    stages.run(config, tmp_path, seeds=[0, 1])
    results = read_json(tmp_path / "result.json")
    assert list(results) == ["dense", "fine_tune", "ticket"]
    assert all(list(of_stage) == ["0", "1"] for of_stage in results.values())
    trained, nothing = jaxsparse.load_sparse(tmp_path / "dense/seed_1/dense.safetensors")
    assert all(np.all(mask) for mask in jax.tree.leaves(nothing))
    expected = jaxsparse.magnitude_masks(trained, 0.95)
    for stage in ("fine_tune", "ticket"):
        params, masks = jaxsparse.load_sparse(tmp_path / stage / "seed_1/start.safetensors")
        jax.tree.map(np.testing.assert_array_equal, masks, expected)
        jax.tree.map(np.testing.assert_array_equal, params, jaxsparse.apply_masks(trained, expected))
        _, masks = jaxsparse.load_sparse(tmp_path / stage / "seed_1/sparse.safetensors")
        jax.tree.map(np.testing.assert_array_equal, masks, expected)
    mine = small(stages.config_of(config, "ticket", tmp_path, 1))
    fresh = make_program(with_seed(mine, 1), open_dataset(mine)).init(1).params
    dense = small(stages.config_of(config, "dense", tmp_path, 1))
    random = make_program(dense, open_dataset(dense)).init(1).params
    jax.tree.map(np.testing.assert_array_equal, fresh, jaxsparse.apply_masks(random, expected))


@pytest.mark.slow
def test_another_pruning_in_the_folder_of_a_run_is_refused(tmp_path):
    config = two_stages()
    stages.run(config, tmp_path)
    config.stages[1]["prune"] = {"name": "magnitude_masks", "sparsity": 0.5}
    with pytest.raises(ValueError, match=r"stage fine_tune was begun from another .*start\.safetensors"):
        stages.run(config, tmp_path)


# --- Refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "changes", "message"),
    [
        (1, {"name": "dense"}, r"config\.stages\[1\]\.name .* no other stage has it, got 'dense'"),
        (1, {"name": "a/b"}, r"config\.stages\[1\]\.name is the name of a folder"),
        (1, {"after": "ticket"}, r"config\.stages\[1\]\.after is an earlier stage, one of \['dense'\], got 'ticket'"),
        (1, {"after": None}, r"config\.stages\[1\]\.prune needs config\.stages\[1\]\.after"),
        (1, {"prune": None}, r"config\.stages\[1\] needs 'prune': dense, .* leaves no masks"),
        (1, {"dense": True}, r"config\.stages\[1\] starts from masks, those of dense, but is dense"),
        (1, {"start": "zeros"}, r"config\.stages\[1\]\.start is one of 'centroids', .* got 'zeros'"),
        (1, {"sparse_init": True}, r"stage fine_tune: config\.sparse_init scales random weights, .*start='weights'"),
        (1, {"epoch": 3}, r"stage fine_tune: config\.epoch cannot be 3"),
        (1, {"epochs.x": 3}, r"stage fine_tune: config\.epochs\.x cannot be 3"),
        (1, {"epochs": "many"}, r"stage fine_tune: config\.epochs cannot be 'many'"),
        (1, {"optimizer": {"name": "sdg"}}, r"stage fine_tune: config\.optimizer\.name .* got 'sdg'; did you mean"),
        (1, {"prune": {"name": "magnitude"}}, r"stage fine_tune: prune\.name is a function .* got 'magnitude'"),
        (1, {"prune": {"name": "magnitude_masks"}}, r"stage fine_tune: prune lacks 'sparsity'"),
    ],
)
def test_stages_that_do_not_fit_together_fail_before_anything_is_trained(tmp_path, place, changes, message):
    config = two_stages()
    config.stages = copy.deepcopy(config.stages)
    stage = config.stages[place]
    stage.update(changes)
    config.stages[place] = {key: value for key, value in stage.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        stages.run(config, tmp_path)
    assert not any(tmp_path.iterdir())


def test_only_takes_stages_whose_start_is_there(tmp_path):
    config = read_config("asni")
    with pytest.raises(ValueError, match="--only takes dense, asni_1, .* got asni_3"):
        stages.run(config, tmp_path, only=["asni_3"])
    with pytest.raises(OSError, match="asni_2 starts from the network of .*asni_1, which is not finished"):
        stages.run(config, tmp_path, only=["dense", "asni_2"])
    with pytest.raises(ValueError, match=r"config\.stages is for experiments\.stages"):
        train.train(config, tmp_path / "run")
    config.stages = []
    with pytest.raises(ValueError, match=r"takes a config with config\.stages"):
        stages.run(config, tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "configs/stages").glob("*.py")])
def test_the_committed_configs_fit_together(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    get_config = runpy.run_path(f"configs/stages/{name}.py")["get_config"]
    stages.check(get_config().lock(), tmp_path)


def test_table_over_seeds():
    results = {
        "dense": {"0": {"density": 1.0, "test_accuracy": 0.9}, "1": {"density": 1.0, "test_accuracy": 0.92}},
        "sparse": {"0": {"density": 0.1, "test_accuracy": 0.9}},
    }
    assert stages.table(results).text().splitlines() == [
        "stage   density  test accuracy  difference",
        "------  -------  -------------  ----------",
        "dense   100.00%  91.00 ± 1.000       +0.00",
        "sparse   10.00%          90.00       -1.00",
    ]


def test_a_stage_learns_from_an_earlier_one(tmp_path):
    config = two_stages()
    config.stages[1]["teacher"] = "dense"
    stages.check(config, tmp_path)
    assert stages.config_of(config, "fine_tune", tmp_path, seed=3).distill_from == str(tmp_path / "dense/seed_3")
    assert stages.config_of(config, "dense", tmp_path).distill_from is None
    config.stages[1]["teacher"] = "fine_tune"
    with pytest.raises(ValueError, match=r"config.stages\[1\].teacher is an earlier stage, one of \['dense'\], got"):
        stages.check(config, tmp_path)
