import json
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from experiments import reproduce
from experiments.results import paper, plot
from experiments.results.published import TABLES, PaperTable, Row
from experiments.stopping import Stopped
from experiments.train import train
from experiments.workdir import Workdir

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "digits_sparse_momentum.py")


def row(x, changes, published=None, seeds=2):
    return Row("digits", x, f"digits/{x}", CONFIG, {"smoke": True, "epochs": 1, **changes}, published, seeds)


TABLE = PaperTable(
    "A small table. Somebody, 2019",
    "What was done.",
    "weights kept (%)",
    (
        row(10, {}, (20.0, 1.0)),
        row(20, {"method.sparsity": 0.8}, (15.0, None)),
        row("dense", {"dense": True}, seeds=1),
    ),
    others={"another method": {10: 22.0, 20: 17.0}},
)


def seeds_of(found):
    return {run: sorted(rows.seed) for run, rows in found.groupby("run")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    reproduce.reproduce(TABLE, folder, data_dir=None)
    return folder


@pytest.mark.slow
def test_every_run_of_the_table_is_run(runs):
    found = paper.outcomes(TABLE, runs)
    assert seeds_of(found) == {"digits/10": [0, 1], "digits/20": [0, 1], "digits/dense": [0]}
    result = json.loads((runs / "digits/20/seed_1/result.json").read_text())
    ((error, *others),) = found[(found.run == "digits/20") & (found.seed == 1)][paper.OUTCOMES[2:]].to_numpy()
    assert error == pytest.approx(100 - 100 * result["test_accuracy"])
    assert others[0] == 20
    assert pd.isna(others[1:]).all()
    assert result["density"] == 0.2


@pytest.mark.slow
def test_finished_runs_are_not_run_again(runs, capsys):
    files = {path: path.stat().st_mtime_ns for path in runs.rglob("metrics.jsonl")}
    reproduce.reproduce(TABLE, runs, data_dir="somewhere else")
    assert files == {path: path.stat().st_mtime_ns for path in runs.rglob("metrics.jsonl")}
    assert "run " not in capsys.readouterr().out


@pytest.mark.slow
def test_runs_of_another_process_are_left_to_it(runs, capsys, tmp_path):
    config = reproduce.config_of(TABLE.rows[0], seed=0)
    run = Workdir(tmp_path / "digits/10/seed_0", config)
    reproduce.reproduce(TABLE, tmp_path, None, seeds=[0], only="10|dense")
    run.close()
    assert "left to the process that trains it" in capsys.readouterr().out
    assert seeds_of(paper.outcomes(TABLE, tmp_path)) == {"digits/dense": [0]}


@pytest.mark.slow
def test_picture(runs, tmp_path):
    plot.picture(TABLE, paper.outcomes(TABLE, runs)).savefig(tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 1000


@pytest.mark.parametrize("name", TABLES)
def test_tables_have_configs_and_their_own_folders(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    table = TABLES[name]
    configs = [reproduce.config_of(row, seed=3) for row in table.rows]
    assert all(config.seed == 3 for config in configs)
    assert len({row.run for row in table.rows}) == len(table.rows)
    for row, config in zip(table.rows, configs, strict=True):
        assert config.dense == (row.x == "dense")
        if table.x == "weights kept (%)" and row.x != "dense":
            assert config.method.sparsity == pytest.approx(1 - row.x / 100)
        if row.stage:
            assert row.run.endswith(f"/{row.stage}")


def test_tables_share_the_runs_they_have_in_common(monkeypatch):
    monkeypatch.chdir(ROOT)
    by_run = {}
    for table in TABLES.values():
        for row in table.rows:
            config = reproduce.config_of(row, seed=0).to_json()
            assert by_run.setdefault(row.run, config) == config
    assert len(by_run) < sum(len(table.rows) for table in TABLES.values())


def run_command(*arguments):
    command = [sys.executable, "-m", "experiments.reproduce", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_help_lists_the_tables():
    help_text = run_command("--help").stdout
    assert all(name in help_text for name in TABLES)


@pytest.mark.slow
def test_data_that_are_not_there(tmp_path):
    arguments = ["--data_dir", str(tmp_path), "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    run = run_command("sparse_momentum_table_1", *arguments)
    assert run.returncode == 1
    assert "error: data set 'mnist' is not in" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.slow
def test_table_is_written_when_it_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setitem(TABLES, "small", TABLE)
    arguments = ["small", "--seeds=0", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]

    def stopped_in_the_second(config, workdir):
        if workdir.parent.name == "20":
            raise Stopped("at step 1 of 2", signal.SIGTERM)
        return train(config, workdir)

    monkeypatch.setattr(reproduce, "train", stopped_in_the_second)
    with pytest.raises(SystemExit) as exit:
        reproduce.main(arguments)
    assert exit.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "results" / "small.md").read_text().count("not run") == 2
    monkeypatch.setattr(reproduce, "train", train)
    reproduce.main(arguments)
    assert "not run" not in (tmp_path / "results" / "small.md").read_text()
    assert {path.name for path in (tmp_path / "results").glob("*.png")} == {"small_light.png", "small_dark.png"}


def test_add_keeps_what_the_results_have(tmp_path, monkeypatch):
    monkeypatch.setitem(TABLES, "small", TABLE)
    began = []
    monkeypatch.setattr(reproduce, "train", lambda config, workdir: began.append((workdir.parent.name, config.seed)))

    def outcome(error):
        return {"test_error": error, "kept": 10.0}

    known = {"digits/10": {"0": outcome(20.0), "7": outcome(22.0)}, "digits/20": {"1": outcome(15.5)}}
    (tmp_path / "small.json").write_text(json.dumps(known))
    reproduce.main(["small", "--add", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path)])
    assert began == [("20", 0), ("dense", 0), ("10", 1)]
    assert json.loads((tmp_path / "small.json").read_text()) == {**known, "digits/dense": {}}
    assert "| digits | 10 | 20.00 ± 1.000 | 21.00 ± 1.000 | 0, 7 |" in (tmp_path / "small.md").read_text()


def test_results_are_not_forgotten(tmp_path, monkeypatch):
    monkeypatch.setitem(TABLES, "small", TABLE)
    monkeypatch.setattr(reproduce, "train", lambda config, workdir: None)
    known = json.dumps({"digits/10": {"0": {"test_error": 20.0, "kept": 10.0}}})
    (tmp_path / "small.json").write_text(known)
    arguments = ["small", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"small.json has 1 runs that would be left out of it, .* digits/10, seed 0"):
        reproduce.main([*arguments, "--only", "digits/20"])
    assert (tmp_path / "small.json").read_text() == known
    reproduce.main(arguments)  # all of them are trained anew
    with pytest.raises(SystemExit):
        reproduce.main([*arguments, "--only", "["])


def test_results_of_another_configuration_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(TABLES, "small", TABLE)

    def finish(config, workdir):
        run = Workdir(workdir, config)
        run.finish({"seed": config.seed, "test_accuracy": 0.9, "density": 0.1})
        run.close()

    monkeypatch.setattr(reproduce, "train", finish)
    arguments = ["small", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    reproduce.main(arguments)
    before = (tmp_path / "small.json").read_text()
    reproduce.main([*arguments, "--add"])
    assert (tmp_path / "small.json").read_text() == before
    changed = TABLE._replace(rows=(row(10, {"weight_decay": 0.5}, (20.0, 1.0)), *TABLE.rows[1:]))
    monkeypatch.setitem(TABLES, "small", changed)
    with pytest.raises(
        SystemExit, match="digits/10/seed_.' holds a run with another configuration:\n  weight_decay: .* 0.5 now"
    ):
        reproduce.main(arguments)
    with pytest.raises(SystemExit, match="small.json has digits/10, seed 0, of another configuration than the table"):
        reproduce.main(["small", "--add", "--runs", str(tmp_path / "others"), "--results", str(tmp_path)])
    assert (tmp_path / "small.json").read_text() == before


def test_a_run_that_fails_does_not_stop_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TABLES, "small", TABLE)
    began = []

    def fail(config, workdir):
        began.append(workdir.parent.name)
        if workdir.parent.name == "20":
            raise FloatingPointError("train_loss is nan at step 3")

    monkeypatch.setattr(reproduce, "train", fail)
    with pytest.raises(SystemExit, match="the loss was not finite in .*/digits/20/seed_0, which the table lacks"):
        reproduce.main(["small", "--seeds=0", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path)])
    assert began == ["10", "20", "dense"]
    assert "failed: train_loss is nan at step 3" in capsys.readouterr().out
    assert (tmp_path / "small.md").exists()


@pytest.mark.slow
def test_rows_that_start_from_the_masks_of_others_wait_for_them(tmp_path, capsys):
    config = str(ROOT / "configs/stages/asni.py")
    changes = {"smoke": True, "data.name": "digits", "data.mean": None, "data.std": None, "epochs": 2}
    first = Row("digits", "ASNI-I", "fc/asni_1", config, changes, None, 1, "asni_1")
    second = first._replace(x="ASNI-II", run="fc/asni_2", stage="asni_2")
    reproduce.reproduce(PaperTable("", "", "start", (second,)), tmp_path, None)
    assert "left for later: asni_2 starts from the network of " in capsys.readouterr().out
    table = PaperTable("", "", "start", (first, second))
    reproduce.reproduce(table, tmp_path, None)
    kept = dict(paper.outcomes(table, tmp_path)[["run", "kept"]].to_numpy())
    assert kept["fc/asni_1"] == kept["fc/asni_2"] < 100
