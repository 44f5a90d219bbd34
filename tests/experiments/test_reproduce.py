import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import reproduce
from experiments.tables import TABLES, Row, Table
from experiments.train import Stopped, train
from experiments.workdir import Workdir

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "digits_sparse_momentum.py")


def row(x, changes, published=None, seeds=2):
    return Row("digits", x, f"digits/{x}", CONFIG, {"smoke": True, "epochs": 1, **changes}, published, seeds)


TABLE = Table(
    "A small table. Somebody, 2019",
    "What was done.",
    "weights kept (%)",
    (
        row(10, {}, (20.0, 1.0)),
        row(20, {"sparsity.sparsity": 0.8}, (15.0, None)),
        row("dense", {"dense": True}, seeds=1),
    ),
    others={"another method": {10: 22.0, 20: 17.0}},
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    reproduce.reproduce(TABLE, folder, data_dir=None)
    return folder


@pytest.mark.slow
def test_every_run_of_the_table_is_run(runs):
    outcomes = reproduce.outcomes(TABLE, runs)
    assert [list(found) for found in outcomes] == [[0, 1], [0, 1], [0]]
    result = json.loads((runs / "digits/20/seed_1/result.json").read_text())
    assert outcomes[1][1] == (pytest.approx(100 - 100 * result["test_accuracy"]), 20, None, None)
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
    assert "left to the process that is at it" in capsys.readouterr().out
    assert [list(found) for found in reproduce.outcomes(TABLE, tmp_path)] == [[], [], [0]]


def outcomes(*errors, kept=10.0):
    return {seed: reproduce.Outcome(error, kept) for seed, error in enumerate(errors)}


def test_markdown():
    found = [outcomes(19.0, 21.0, 23.0), outcomes(16.5), {}]
    text = reproduce.as_markdown("small", TABLE, found, "the command")
    assert "| digits | 10 | 20.00 ± 1.000 | 21.00 ± 1.155 | 0, 1, 2 | +1.000 | 3.055 |" in text  # 2 sqrt(1 + 4 / 3)
    assert "| digits | 20 | 15.00 | 16.50 | 0 | +1.500 |  |" in text
    assert "| digits | dense |  | not run |  |  |  |" in text
    assert "| digits | 10 | 19.00 | 21.00 | 23.00 |" in text
    assert "`the command`, JAX " in text


def test_markdown_of_changes():
    table = TABLE._replace(relative_to=10)
    text = reproduce.as_markdown("small", table, [outcomes(20.0, 22.0), outcomes(15.0, 17.0), {}], "")
    assert "| digits | 20 | -5.00 | -5.00 ± 1.414 |" in text
    assert "Change against 10, in points:" in text


def test_markdown_and_picture_of_what_finds_its_sparsity_itself():
    rows = tuple(row._replace(published=None, x=x) for row, x in zip(TABLE.rows, ("a", "b", "dense"), strict=True))
    table = TABLE._replace(x="setting", rows=rows, against_kept=True, others={})
    found = [outcomes(20.0, 22.0, kept=9.5), outcomes(15.0, kept=30.25), outcomes(3.0, kept=100.0)]
    text = reproduce.as_markdown("small", table, found, "the command")
    assert "| network | setting | kept (%) | ours | seeds |" in text
    assert "| digits | a | 9.50 ± 0.000 | 21.00 ± 1.000 | 0, 1 |" in text
    assert "paper" not in text
    found[0] = {0: reproduce.Outcome(20.0, 9.5, validation_error=18.0)}
    assert "| digits | a | 9.50 | 18.00 | 20.00 | 0 |" in reproduce.as_markdown("small", table, found, "the command")
    (axes,) = reproduce.picture(table, found).axes
    assert axes.get_xlabel() == "weights kept (%)"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["9.5", "30.25"]


@pytest.mark.slow
def test_picture(runs, tmp_path):
    reproduce.picture(TABLE, reproduce.outcomes(TABLE, runs)).savefig(tmp_path / "table.png")
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
            assert config.sparsity.sparsity == pytest.approx(1 - row.x / 100)
    reproduce.picture(table, [{} for _ in table.rows])  # what there is before anything was run


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
    assert (tmp_path / "results" / "small.png").exists()


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


@pytest.mark.slow
def test_rows_that_start_from_the_masks_of_others_wait_for_them(tmp_path, capsys):
    config = str(ROOT / "configs" / "mnist_asni.py")
    changes = {"smoke": True, "data.name": "digits", "data.mean": None, "data.std": None, "epochs": 2}
    first = Row("digits", "ASNI-I", "fc/asni_1", config, changes, None, 1)
    second = first._replace(
        x="ASNI-II", run="fc/asni_2", changes={**changes, "sparsity.method": "mask_updates"}, after=first.run
    )
    reproduce.reproduce(Table("", "", "start", (second,)), tmp_path, None)
    assert "left for later: it starts from the masks of " in capsys.readouterr().out
    table = Table("", "", "start", (first, second))
    reproduce.reproduce(table, tmp_path, None)
    one, two = (found[0].kept for found in reproduce.outcomes(table, tmp_path))
    assert one == two < 100
