import json
import math

import pytest

from experiments.results import collect, compare
from tests.experiments.results.runs import made_up
from tests.experiments.test_compare import finished


def test_finished_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished(tmp_path / "dense", 1.0, 0.98)
    for seed in (10, 2):
        finished(tmp_path / f"sparse/seed_{seed}", 0.1, 0.9775)
    assert compare.finished_runs(["dense", "sparse", "dense/../dense"]).text().splitlines() == [
        "run             density  test accuracy  difference",
        "--------------  -------  -------------  ----------",
        "dense           100.00%         98.00%       +0.00",
        "sparse/seed_2    10.00%         97.75%       -0.25",
        "sparse/seed_10   10.00%         97.75%       -0.25",
    ]


def test_runs_on_other_data_are_not_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, images, accuracy in (
        ("a", "mnist", 0.98),
        ("b", "digits", 0.5),
        ("c", "mnist", 0.97),
        ("d", "digits", 0.6),
    ):
        finished(tmp_path / name, 1.0, accuracy)
        (tmp_path / name / "config.json").write_text(json.dumps({"data": {"name": images, "examples": None}}))
    assert compare.finished_runs(["a", "b", "c", "d"]).text().splitlines() == [
        "run  data    density  test accuracy  difference",
        "---  ------  -------  -------------  ----------",
        "a    mnist   100.00%         98.00%       +0.00",
        "b    digits  100.00%         50.00%       +0.00",
        "c    mnist   100.00%         97.00%       -1.00",
        "d    digits  100.00%         60.00%      +10.00",
    ]
    assert collect.tested_on({"data.name": "x", "data.classes": [1, "b"], "data.examples": 1408}) == (
        "x, classes 1, b, the first 1,408 images"
    )


def points_of(runs):
    """The series of the picture of accuracy against kept weights, with their errors, and its baselines."""
    axes = compare.accuracy_against_kept(runs).axes[0]
    series = {}
    for bars in axes.containers:
        line, _, (errors,) = bars.lines
        ends = [segment[:, 1] for segment in errors.get_segments()]
        series[bars.get_label()] = [
            (*point, round((high - low) / 2, 9))
            for point, (low, high) in zip(line.get_xydata().round(9).tolist(), ends, strict=True)
        ]
    drawn = {bars.lines[0] for bars in axes.containers}
    return series, {
        line.get_label(): line.get_ydata()[0]
        for line in axes.lines
        if line not in drawn and len(line.get_xdata()) == 2 and not line.get_label().startswith("_")
    }


def test_seeds_are_one_point_and_a_line_is_of_one_number_that_changes():
    runs = [made_up(f"dense/{i}", accuracy=0.98 + 0.01 * i, seed=i, dense=True, density=i) for i in (0, 1)]
    runs += [
        made_up(f"{kept}/{i}", accuracy=0.9 + 0.02 * i, density=kept, seed=i, sparsity=1 - kept)
        for kept in (0.2, 0.05)
        for i in (0, 1)
    ]
    assert points_of(runs) == (
        {"sparse_momentum": [(5.0, 91.0, 1.0), (20.0, 91.0, 1.0)]},
        {"dense": pytest.approx(98.5)},
    )


def test_other_configurations_are_other_series():
    runs = [
        made_up(f"{growth}", accuracy=accuracy, sparsity=0.9, growth=growth)
        for growth, accuracy in (("momentum", 0.97), ("random", 0.95))
    ]
    runs.append(made_up("more", accuracy=0.96, density=0.2, sparsity=0.8, growth="random"))
    runs.append(made_up("diverged", accuracy=float("nan"), sparsity=0.9, growth="random"))
    assert points_of(runs)[0] == {
        'sparse_momentum, growth "momentum"': [(10.0, 97.0, 0.0)],
        'sparse_momentum, growth "random"': [(10.0, 95.0, 0.0), (20.0, 96.0, 0.0)],
    }
    assert compare.accuracy_against_kept(runs[3:]) is None
    header, *rows = compare.runs_table(runs)[:2]
    assert [row[header.index("test accuracy")] for row in rows[0]] == ["97.00%", "95.00%", "96.00%", "nan"]


def test_seeds_have_a_mean_where_all_of_them_have_the_number():
    runs = [made_up(f"a/{i}", accuracy=0.9 + 0.02 * i, seed=i, sparsity=0.9) for i in (0, 1)]
    runs += [made_up(f"b/{i}", accuracy=accuracy, seed=i, sparsity=0.8) for i, accuracy in ((0, 0.9), (1, math.nan))]
    runs.append(made_up("c/0", accuracy=0.5, sparsity=0.7))
    assert compare.seeds_table(runs).rows == (
        ("a", "2", "10.00 ± 0.000%", "91.00 ± 1.000%"),
        ("b", "2", "10.00 ± 0.000%", ""),
    )
    assert compare.seeds_table(runs[4:]).rows == ()
