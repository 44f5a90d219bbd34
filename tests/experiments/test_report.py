import dataclasses
import json
import re
import runpy
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

import jaxsparse
from experiments import compare, report, train
from experiments.workdir import read_json
from jaxsparse import inspect
from tests.experiments.test_train import ROOT, smoke_config
from tests.pages import Page

SPARSE = {"params": {"w": np.eye(3)}, "masks": {"w": np.eye(3) > 0}}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of digits, made small: dense, sparse with two seeds, with gates, one that was stopped and one just begun."""
    folder = tmp_path_factory.mktemp("runs")
    train.train(smoke_config(dense=True), folder / "dense")
    train.train_seeds(smoke_config(), folder / "sparse", [0, 1])
    stopped = folder / "stopped"
    shutil.copytree(folder / "sparse/seed_0", stopped)
    for name in ("result.json", "sparse.safetensors"):
        (stopped / name).unlink()
    lines = (stopped / "metrics.jsonl").read_text()
    (stopped / "metrics.jsonl").write_text("".join(lines.splitlines(keepends=True)[:2]) + lines[:40])
    (folder / "begun").mkdir()
    shutil.copy(folder / "dense/config.json", folder / "begun")
    return folder


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    report.main([str(runs / "dense"), str(runs / "sparse"), str(runs), f"--out={out}", "--title=5% <kept> & more"])
    return out


@pytest.mark.slow
def test_the_page_has_every_run_and_its_numbers(runs, page):
    shown = Page(page.read_text())
    assert shown.text.count("5% <kept> & more") == 2
    header, *rows = shown.tables[0]
    assert [row[:3] for row in rows] == [
        ["dense", "dense", "finished, epoch 4"],
        ["sparse/seed_0", "sparse_momentum", "finished, epoch 4"],
        ["sparse/seed_1", "sparse_momentum", "finished, epoch 4"],
        ["begun", "dense", "nothing logged yet"],
        ["stopped", "sparse_momentum", "not finished, epoch 2"],
    ]
    results = [read_json(runs / name / "result.json") for name in ("dense", "sparse/seed_0", "sparse/seed_1")]
    accuracies = [result["test_accuracy"] for result in results]
    assert [row[header.index("test accuracy")] for row in rows[:3]] == [f"{accuracy:.2%}" for accuracy in accuracies]
    points = [f"{100 * (accuracy - accuracies[0]):+.2f} points" for accuracy in accuracies[1:]]
    assert [row[header.index("difference")] for row in rows[:3]] == ["", *points]
    assert [row[header.index("kept")] for row in rows[:3]] == ["100.00%", "10.00%", "10.00%"]
    mean, error = compare.mean_and_error([100 * accuracy for accuracy in accuracies[1:]])
    assert shown.tables[1][1] == ["sparse", "2", "10.00 ± 0.000%", f"{mean:.2f} ± {error:.3f}%"]


@pytest.mark.slow
def test_the_page_says_what_differs_between_configurations(page):
    tables = Page(page.read_text()).tables
    differing = next(table for table in tables if table[0][0] == "key")
    assert differing[1:] == [["dense", "true", "false", "false", "true", "false"]]
    shared = next(table for table in tables if table[0] == ["key", "value"])
    assert ["sparsity.method", '"sparse_momentum"'] in shared
    assert ["model.name", '"lenet_300_100"'] in shared


@pytest.mark.slow
def test_the_page_compares_masks(runs, page):
    overlap = next(table for table in Page(page.read_text()).tables if table[0][-1] == "by chance")
    masks = [jaxsparse.load_sparse(runs / f"sparse/seed_{seed}/sparse.safetensors")[1] for seed in (0, 1)]
    total = jaxsparse.inspect.compare_masks(*masks).total
    assert overlap[0][0] == "against sparse/seed_0"
    assert overlap[1][:4] == ["sparse/seed_1", f"{total.both:,}", f"{total.flips:,}", f"{total.jaccard:.3f}"]
    assert 0.03 < float(overlap[1][4]) < float(overlap[1][3])  # two random tenths share 1/19


@pytest.mark.slow
def test_the_page_stands_alone_and_takes_the_colours_of_the_scheme(page):
    text, shown = page.read_text(), Page(page.read_text())
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in shown.links)
    assert not re.search(r"url\((?!#)|@import|<script", text)
    assert shown.drawings > 6
    assert "currentColor" in text
    assert report.INK not in text


@pytest.mark.slow
def test_gates_and_a_single_run(tmp_path):
    folder = tmp_path / "l0"
    config = train.shrink(runpy.run_path(str(ROOT / "configs/mnist_l0.py"))["get_config"]("lenet_300_100"))
    config.data.name, config.model.num_classes = "digits", 10
    train.train(config, folder)
    run = report.read_run(folder, "l0")
    assert run.masks is not None
    shown = Page(report.report([run], "one"))
    assert "finished, epoch 4" in shown.tables[0][1]
    assert not any(table[0][-1] == "by chance" for table in shown.tables)
    assert "fc1/kernel" in shown.text + str(shown.tables)


def test_folders_without_runs(tmp_path):
    with pytest.raises(SystemExit, match=r"is not the folder of a run, nor is one in it: there is no config\.json"):
        report.main([str(tmp_path)])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SystemExit, match=r"config\.json is not JSON"):
        report.main([str(tmp_path)])
    (tmp_path / "config.json").write_text(json.dumps({"dense": False}))
    with pytest.raises(SystemExit, match="Is a directory"):
        report.main([str(tmp_path), f"--out={tmp_path}"])


def made_up(name, *, accuracy, density=0.1, seed=0, dense=False, history=(), **sparsity):
    """A finished run, of which there is no more than this."""
    config = {"dense": dense, "seed": seed, "sparsity.method": "sparse_momentum"}
    config |= {f"sparsity.{key}": value for key, value in sparsity.items()}
    result = {"test_accuracy": accuracy, "density": 1.0 if dense else density}
    return report.Run(name, report.Path("runs") / name, config, inspect.History(history), result)


def points_of(runs):
    """Of the picture of accuracy against kept weights the series, with errors, and the baselines."""
    axes = report.accuracy_against_kept(runs).axes[0]
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
    assert report.accuracy_against_kept(runs[3:]) is None
    header, *rows = report.runs_table(runs)[:2]
    assert [row[header.index("test accuracy")] for row in rows[0]] == ["97.00%", "95.00%", "96.00%", "nan"]


def test_what_was_logged_in_some_lines_only_and_odd_names():
    history = ({"step": 1, "train_loss": 1.0, "speed": {}}, {"step": 2, "speed": {"images_per_second": 100.0}})
    runs = [made_up(name, accuracy=0.9, history=history) for name in ("_a", "$b$", "c$_")]
    shown = Page(report.report(runs, "odd"))
    header, *rows = shown.tables[0]
    assert [row[0] for row in rows] == ["_a", "$b$", "c$_"]
    assert rows[0][header.index("images/s")] == "100"


@pytest.mark.slow
def test_a_run_in_a_run_and_one_that_is_given_twice(runs, tmp_path):
    shutil.copytree(runs / "dense", tmp_path / "outer")
    shutil.copytree(runs / "dense", tmp_path / "outer/inner")
    (tmp_path / "link").symlink_to(tmp_path / "outer")
    paths = compare.find_runs([tmp_path / "outer", tmp_path / "outer/inner", tmp_path / "link"])
    assert report.short_names(paths) == ["outer", "inner"]


def test_runs_on_other_data_are_not_compared():
    history = ({"step": 1, "epoch": 1, "train_loss": 1.0},)
    runs = []
    for name, images, dense, accuracy in (
        ("a", "mnist", True, 0.98),
        ("b", "mnist", False, 0.975),
        ("c", "digits", True, 0.91),
        ("d", "digits", False, 0.9),
    ):
        run = made_up(name, accuracy=accuracy, dense=dense, history=history)
        runs.append(dataclasses.replace(run, config={**run.config, "data.name": images}, **SPARSE))
    shown = Page(report.report(runs, "two sets"))
    tables = [table for table in shown.tables if "difference" in table[0]]
    assert [[row[0] for row in table[1:]] for table in tables] == [["a", "b"], ["c", "d"]]
    assert [table[2][table[0].index("difference")] for table in tables] == ["-0.50 points", "-1.00 points"]
    assert [table[0][0] for table in shown.tables if table[0][-1] == "by chance"] == ["against a", "against c"]
    assert shown.text.count("Test accuracy of finished runs.") == shown.text.count("Loss and error by epoch.") == 2
    alone = Page(report.report(runs[:2], "one set"))
    assert alone.text.count("Loss and error by epoch.") == 1
    assert [list(of_set) for of_set in (report.by_test_set(runs), report.by_test_set(runs[:2]))] == [
        ["mnist", "digits"], ["mnist"],
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to look at the page with")
@pytest.mark.parametrize("width", [1280, 420])
def test_the_page_in_a_browser(page, tmp_path, width):
    pictures = []
    for scheme in ("0", "1"):  # dark, light
        out = tmp_path / f"{scheme}.png"
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path}/browser",
        ]
        flags += [
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--window-size={width},1600",
            f"--screenshot={out}",
        ]
        subprocess.run([CHROMIUM, *flags, f"file://{page}"], check=True, capture_output=True, timeout=120)
        pictures.append(np.asarray(Image.open(out).convert("L")).astype(int))
    dark, light = pictures
    assert dark[0, 0] < 40
    assert light[0, 0] > 240
    for picture in pictures:  # letters and lines are seen on the page's ground, down to the curves
        assert (abs(picture - picture[0, 0]) > 100).mean() > 0.005
        assert (abs(picture[800:] - picture[0, 0]) > 100).any()
