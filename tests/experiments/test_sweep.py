"""A sweep: its plan, its runs, and what is said of them."""

import copy
import json
import os
import runpy
import signal
from pathlib import Path

import numpy as np
import pytest

from experiments import sweep
from experiments.results import sweep as results
from experiments.results import themes
from experiments.stopping import Stopped
from experiments.workdir import Workdir, WorkdirError, write_json
from tests.experiments.test_resume import outcome

ROOT = Path(__file__).parents[2]
CONFIG = runpy.run_path(str(ROOT / "configs/sweeps/mnist_lenet_300_100.py"))["get_config"]


def read_config(*arms, sparsities=(0.8, 0.9), seeds=(0, 1), **changes):
    """The sweep with these arms, names or mappings, on digits and made small."""
    config = CONFIG().lock()
    given = {arm["name"]: arm for arm in config.sweep.arms}
    with config.unlocked():
        config.sweep.arms = [copy.deepcopy(given[arm]) if isinstance(arm, str) else arm for arm in arms]
        config.sweep.sparsities, config.sweep.seeds = sparsities, seeds
        config.smoke_overrides.epochs = 16
    config.update_from_flattened_dict({"smoke": True, "data.name": "digits", "data.mean": None, "data.std": None})
    config.update_from_flattened_dict(changes)
    return config


# --- The plan -------------------------------------------------------------------------------------------------------


def test_the_committed_sweep_fits_together(tmp_path):
    runs = sweep.plan(CONFIG().lock(), tmp_path)
    assert {run.seed for run in runs} == {0, 1, 2}
    assert len({run.folder for run in runs}) == len(runs)
    assert {run.config.epochs for run in runs} == {20}
    values = {}
    for run in runs:
        values.setdefault(run.arm, set()).add(run.value)
    assert values.pop("dense") == {""}
    by_layer = "n_of_m_1_16_n_of_m_1_10_n_of_m_1_10"
    assert values.pop("sparse_momentum_n_of_m") == {"n_of_m_2_4", "n_of_m_1_4", by_layer}
    strengths = {arm: values.pop(arm) for arm in ("rda", "l0", "dep_l0", "soft_threshold") if arm in values}
    assert set(map(len, strengths.values())) == {3}
    told = {run.arm for run in runs if run.sparsity is not None}
    assert set(values) - {"sr_ste", "s_ste"} == told
    assert all(values[arm] == {"0.8", "0.9", "0.95", "0.98", "0.99"} for arm in told)


def test_the_sweep_of_options_fits_together(tmp_path):
    config = runpy.run_path(str(ROOT / "configs/sweeps/mnist_rigl_options.py"))["get_config"]().lock()
    runs = sweep.plan(config, tmp_path)
    assert len({run.folder for run in runs}) == len(runs) == 45
    assert {run.fingerprint for run in runs if run.seed} & {run.fingerprint for run in runs if not run.seed} == set()


def test_a_plan_goes_seed_by_seed_and_fills_in_the_values(tmp_path):
    config = read_config("dense", "magnitude", "asni", "rda", sparsities=(0.5, 0.75))
    runs = sweep.plan(config, tmp_path, changed={"epochs": 18})
    assert [run.seed for run in runs] == [0] * 8 + [1] * 8
    assert [run.name for run in runs[:3]] == ["dense, seed 0", "magnitude, 0.5, seed 0", "magnitude, 0.75, seed 0"]
    assert [run.sparsity for run in runs[:8]] == [None, 0.5, 0.75, 0.5, 0.75, None, None, None]
    assert runs[2].folder == tmp_path / "magnitude/0.75/seed_0"
    assert (runs[0].config.dense, runs[1].config.dense) == (True, False)
    assert [run.config.method.sparsity for run in runs[1:3]] == [0.5, 0.75]
    assert [run.config.method.sparsity.magnitude for run in runs[3:5]] == [0.5, 0.75]
    assert [run.config.method.l1 for run in runs[5:8]] == [1e-6, 5e-6, 1.5e-5]
    assert [run.config.optimizer.name for run in runs[4:6]] == ["sgd", "velocity"]
    assert {run.config.epochs for run in runs} == {18}
    assert all("sweep" not in run.config and "smoke_overrides" not in run.config for run in runs)
    some = sweep.plan(config, tmp_path, only=["rda"], seeds=[7])
    assert [(run.arm, run.seed, run.config.seed) for run in some] == [("rda", 7, 7)] * 3


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"method": {"name": "rigle"}}, r"arm a: there is no method 'rigle'; there are .*asni, .*sparse_momentum"),
        ({"method": {"name": "sgd"}}, r"arm a: there is no method 'sgd'; there are"),
        (
            {"method": {"name": "magnitude_pruning", "evry": 3}},
            r"arm a: config\.method: .* no 'evry'; did you mean 'every'",
        ),
        ({"optimiser.name": "adam"}, r"arm a: config\.optimiser\.name cannot be 'adam'"),
        ({"each": {"method.l1": ()}}, r"arm a: 'each' is one key with its values, got"),
        ({"each": {"epochs": (1,), "seed": (1,)}}, r"arm a: 'each' is one key with its values, got"),
        ({"name": "a/b"}, r"the name of an arm of config\.sweep is that of a folder, without '/', got 'a/b'"),
    ],
)
def test_arms_that_do_not_fit(tmp_path, arm, message):
    with pytest.raises(ValueError, match=message):
        sweep.plan(read_config({"name": "a", **arm}), tmp_path)
    assert not any(tmp_path.iterdir())


def test_values_are_names_of_folders():
    values = [0.9, 1e-5, {"name": "n_of_m", "n": 1, "m": 4}, "/abs/epoch_1.safetensors", "enc/*", "../up"]
    expected = ["0.9", "1e-05", "n_of_m_1_4", "abs_epoch_1.safetensors", "enc", ".._up"]
    assert list(map(sweep.label, values)) == expected


def test_sweeps_that_do_not_fit(tmp_path):
    config = read_config("dense", "dense")
    with pytest.raises(ValueError, match="two arms of config.sweep have the same name"):
        sweep.plan(config, tmp_path)
    with pytest.raises(ValueError, match=r"two values of an arm of config\.sweep look the same"):
        sweep.plan(read_config("magnitude", sparsities=(0.9, 0.90000001)), tmp_path)
    with pytest.raises(ValueError, match="--only takes dense, got rigl"):
        sweep.plan(read_config("dense"), tmp_path, only=["rigl"])
    with pytest.raises(ValueError, match=r"config\.sweep\.arms\[1\] lacks 'name'"):
        sweep.plan(read_config("dense", {"dense": True}), tmp_path)
    with pytest.raises(ValueError, match=r"arm magnitude is run at each of config\.sweep\.sparsities, .* lacks"):
        sweep.plan(read_config("magnitude", sparsities=()), tmp_path)
    with config.unlocked():
        del config.sweep.seeds
    with pytest.raises(ValueError, match=r"config\.sweep lacks seeds"):
        sweep.plan(config, tmp_path)
    with config.unlocked():
        del config.sweep
    with pytest.raises(ValueError, match=r"takes a config with config\.sweep"):
        sweep.plan(config, tmp_path)


def test_the_estimate_goes_by_what_runs_took(tmp_path):
    runs = sweep.plan(read_config("dense", "magnitude", "rda"), tmp_path)  # 16 epochs; 2 x (1 + 2 + 3) runs
    known = {"epoch": 1.0, "start": 4.0}
    assert sweep.seconds_left(runs, known) == 12 * (16 + 4)
    assert sweep.seconds_left(runs, {}) is None
    by_arm = {run.name: run for run in runs}
    for name, result in {
        "dense, seed 0": {"test_accuracy": 0.98, "density": 1.0, "seconds": 32.0},
        "magnitude, 0.8, seed 0": {"test_accuracy": 0.97, "density": 0.2, "seconds": 64.0},
    }.items():
        by_arm[name].folder.mkdir(parents=True)
        write_json(by_arm[name].folder / "result.json", result)
    # An epoch of dense takes 2 s, of magnitude 4 s, of the other arm as many as their mean, 3 s.
    assert sweep.seconds_left(runs, known) == (32 + 4) + 3 * (64 + 4) + 6 * (48 + 4)
    failures = {"rda, 1e-06, seed 0": "FloatingPointError", "rda, 1e-06, seed 1": "RuntimeError"}
    for name, kind in failures.items():  # the first is not tried again
        by_arm[name].folder.mkdir(parents=True)
        write_json(by_arm[name].folder / "failed.json", {"failed": "it is NaN", "kind": kind})
    assert sweep.seconds_left(runs, known) == (32 + 4) + 3 * (64 + 4) + 5 * (48 + 4)
    assert sweep.plan_table(runs).rows == (
        ("dense", "", "2", "2", "1", "0"),
        ("magnitude", "0.8, 0.9", "2", "4", "1", "0"),
        ("rda", "1e-06, 5e-06, 1.5e-05", "2", "6", "0", "2"),
    )


def test_finished_runs_of_another_configuration_are_not_mixed_in(tmp_path):
    small, changed = read_config("dense", seeds=(0,)), read_config("dense", seeds=(0,), log_every_steps=7)
    (run,) = sweep.plan(small, tmp_path)
    Workdir(run.folder, run.config).close()
    sweep.check_finished(sweep.plan(changed, tmp_path, changed={"log_every_steps": 7}))  # it is not finished
    write_json(run.folder / "result.json", {"test_accuracy": 0.98, "density": 1.0, "seconds": 32.0})
    sweep.check_finished([run])
    with pytest.raises(WorkdirError, match=r"(?s)holds a run with another configuration:.*log_every_steps: .* 7 now"):
        sweep.check_finished(sweep.plan(changed, tmp_path, changed={"log_every_steps": 7}))


def test_a_seed_on_the_command_line_is_not_that_of_all_runs(tmp_path):
    runs = sweep.plan(read_config("dense", seed=5), tmp_path, changed={"seed": 5})
    assert [run.config.seed for run in runs] == [0, 1]


# --- The runs -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_is_resumed_and_outlives_runs_that_fail(tmp_path, monkeypatch, capsys):
    explodes = {"name": "explodes", "dense": True, "optimizer": {"name": "sgd", "learning_rate": 1e30}}
    config = read_config("dense", "magnitude", explodes, sparsities=(0.9,), seeds=(0,), log_every_steps=4)
    whole, stopped = (sweep.plan(config, tmp_path / name) for name in ("whole", "stopped"))
    sweep.train_all(whole)
    found = results.outcomes(whole)
    assert list(found.arm) == ["dense", "magnitude", "explodes"]
    assert found.kept[:2].tolist() == pytest.approx([100, 10])
    assert (found.test_accuracy[:2] > 50).all()
    assert "train_loss is" in found.failed[2]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").rglob("*.json*")}
    sweep.train_all(whole)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").rglob("*.json*")}
    assert not list((tmp_path / "whole").rglob("*.png"))
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed] == [run.name for run in whole]
    log = Workdir.log

    def stop_in_the_second(run, metrics):
        log(run, metrics)
        if "magnitude" in str(run.path) and metrics["step"] == 30:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Workdir, "log", stop_in_the_second)
    with pytest.raises(Stopped):
        sweep.train_all(stopped)
    monkeypatch.undo()
    sweep.train_all(stopped)
    for one, other in zip(whole[:2], stopped[:2], strict=True):
        assert outcome(one.folder) == outcome(other.folder)
    said = sweep.write(config, stopped, tmp_path / "tables", "command")
    assert "Runs that failed: explodes (1)." in said
    files = {path.name for path in (tmp_path / "tables").iterdir()}
    assert files == {f"{config.sweep.name}{end}" for end in (".csv", ".md", "_light.png", "_dark.png")}


# --- What is said of them -------------------------------------------------------------------------------------------


def some_results():
    """Two seeds of five arms, whose means and errors can be seen at once."""
    rows = []

    def add(arm, value, sparsity, accuracies, kept):
        for seed, accuracy in enumerate(accuracies):
            failed = "" if accuracy else "train_loss is nan"
            numbers = (accuracy or np.nan, kept if accuracy else np.nan)
            rows.append((arm, value, sparsity, seed, *numbers, 12.0, failed, "0123456789ab"))

    add("dense", "", None, (98.4, 98.6), 100)
    add("a", "0.8", 0.8, (98.5, 98.7), 20)  # 98.6 +- 0.1
    add("b", "0.8", 0.8, (98.4, 98.6), 20)  # 98.5 +- 0.1
    add("c", "0.8", 0.8, (98.0, 98.0), 20)
    add("a", "0.99", 0.99, (97.0, 97.2), 1)
    add("b", "0.99", 0.99, (97.5, None), 1)
    add("c", "0.99", 0.99, (None, None), 1)
    add("l1", "1e-06", None, (98.2, 98.4), 8.04)
    add("l1", "1e-05", None, (97.9, 98.1), 1.96)
    return results.as_frame(rows)


def test_tables():
    found = some_results()
    assert results.text(found).splitlines() == [
        "arm      80% zeros       99% zeros",
        "---  -------------  --------------",
        "a    98.60 ± 0.100   97.10 ± 0.100",
        "b    98.50 ± 0.100  97.50 (1 of 2)",
        "c    98.00 ± 0.000          failed",
        "",
        "arm    value        kept (%)  test accuracy (%)",
        "-----  -----  --------------  -----------------",
        "dense         100.00 ± 0.000      98.50 ± 0.100",
        "l1     1e-06    8.04 ± 0.000      98.30 ± 0.100",
        "l1     1e-05    1.96 ± 0.000      98.00 ± 0.100",
    ]


def test_the_paragraph_says_what_the_tables_do():
    assert results.paragraph(some_results()) == (
        "The dense network reaches 98.50 ± 0.100%. "
        "At 80% zeros a is best, 98.60 ± 0.100%, b within a standard error of the difference; "
        "within 0.3 points of the dense network: all but c. "
        "At 99% zeros b is best, 97.50% (1 of 2); none is within 0.3 points of the dense network. "
        "l1 reaches 98.30% with 8.04% of the weights and 98.00% with 1.96% of the weights. "
        "Runs that failed: b 0.99 (1), c 0.99 (2)."
    )


def losses():
    """The results above as losses: the best arm is that of the smallest number."""
    found = some_results().rename(columns={"test_accuracy": "test_loss"})
    return results.as_frame(found.assign(test_loss=(100 - found.test_loss) / 10), results.LOSS)


def test_losses_are_better_when_they_are_smaller(tmp_path):
    found = losses()
    assert results.text(found).splitlines()[2] == "a    0.1400 ± 0.0100  0.2900 ± 0.0100"
    assert results.by_value(found).columns[-1] == "test loss (nats a token)"
    assert results.paragraph(found) == (
        "The dense network reaches 0.1500 ± 0.0100 nats a token. "
        "At 80% zeros a is best, 0.1400 ± 0.0100 nats a token, b within a standard error of the difference; "
        "within 1% of the dense network: all but c. "
        "At 99% zeros b is best, 0.2500 nats a token (1 of 2); none is within 1% of the dense network. "
        "l1 reaches 0.1700 nats a token with 8.04% of the weights and 0.2000 nats a token with 1.96% of the weights. "
        "Runs that failed: b 0.99 (1), c 0.99 (2)."
    )
    found.to_csv(tmp_path / "sweep.csv", index=False)
    assert results.paragraph(results.read(tmp_path / "sweep.csv")) == results.paragraph(found)
    page = results.as_markdown("name", "Title", found, "command")
    assert "Test loss in nats a token, mean ± standard error over the seeds 0, 1." in page


def test_a_csv_file_is_read_back(tmp_path):
    found = some_results()
    found.to_csv(tmp_path / "sweep.csv", index=False)
    assert results.paragraph(results.read(tmp_path / "sweep.csv")) == results.paragraph(found)
    assert json.loads(found.to_json()) == json.loads(results.read(tmp_path / "sweep.csv").to_json())


@pytest.mark.slow
def test_picture():
    for theme in themes.THEMES:
        with themes.style(theme):
            figure = results.picture(some_results(), "Title")
        axes, (legend,) = figure.axes[0], figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["dense", "c", "l1", "b", "a"]
        assert axes.get_xscale() == "log"
        low, high = axes.get_ylim()
        assert low < 97.1
        assert high > 98.6
    groups = {"One": ["c", "not there"], "Two": ["a", "b"], "Three": ["not there"]}
    panels = results.picture(some_results(), "Title", groups).axes
    assert [axes.get_title() for axes in panels] == ["One", "Two"]
    assert [[text.get_text() for text in axes.get_legend().get_texts()] for axes in panels] == [
        ["dense", "c"], ["dense", "b", "a"]
    ]  # fmt: skip
    axes = results.picture(losses(), "Title").axes[0]
    assert axes.get_ylabel() == "test loss (nats a token)"
    assert axes.get_yscale() == "linear"


def test_runs_are_taken_over_from_the_table_of_an_earlier_sweep(tmp_path):
    config = read_config("dense", "magnitude")
    runs = sweep.plan(config, tmp_path / "one")
    for run in runs[:2]:
        run.folder.mkdir(parents=True)
        write_json(run.folder / "config.json", json.loads(run.config.to_json()))
        write_json(run.folder / "result.json", {"test_accuracy": 0.75, "density": 0.125, "seconds": 3.0})
    found = results.outcomes(runs)
    found.to_csv(tmp_path / "sweep.csv", index=False, float_format="%.6g")
    again = sweep.plan(config, tmp_path / "two")
    assert sweep.take_over(again, tmp_path / "sweep.csv") == 2
    assert sweep.take_over(again, tmp_path / "sweep.csv") == 0
    sweep.check_finished(again)
    assert json.loads(results.outcomes(again).to_json()) == json.loads(found.to_json())
    other = sweep.plan(config, tmp_path / "three", changed={"epochs": 18})
    with pytest.raises(ValueError, match="sweep.csv has dense, seed 0 with another configuration"):
        sweep.take_over(other, tmp_path / "sweep.csv")
