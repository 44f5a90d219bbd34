import json
import re
import runpy
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

import jaxsparse
from experiments import options, report, train
from experiments.results import collect
from experiments.results import page as pages
from experiments.results.table import mean_and_error
from experiments.workdir import read_json
from tests.experiments.test_train import ROOT, smoke_config
from tests.pages import Page

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
    mean, error = mean_and_error([100 * accuracy for accuracy in accuracies[1:]])
    assert shown.tables[1][1] == ["sparse", "2", "10.00 ± 0.000%", f"{mean:.2f} ± {error:.3f}%"]


@pytest.mark.slow
def test_the_page_says_what_differs_between_configurations(page):
    tables = Page(page.read_text()).tables
    differing = next(table for table in tables if table[0][0] == "key")
    assert differing[1:] == [["dense", "true", "false", "false", "true", "false"]]
    shared = next(table for table in tables if table[0] == ["key", "value"])
    assert ["method.name", '"sparse_momentum"'] in shared
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
    assert pages.INK not in text


@pytest.mark.slow
def test_gates_and_a_single_run(tmp_path):
    folder = tmp_path / "l0"
    config = options.small(runpy.run_path(str(ROOT / "configs/mnist_l0.py"))["get_config"]("lenet_300_100"))
    config.data.name, config.model.num_classes = "digits", 10
    train.train(config, folder)
    run = collect.read_run(folder, "l0")
    assert run.masks is not None
    shown = Page(pages.report([run], "one"))
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


@pytest.mark.slow
def test_a_run_in_a_run_and_one_that_is_given_twice(runs, tmp_path):
    shutil.copytree(runs / "dense", tmp_path / "outer")
    shutil.copytree(runs / "dense", tmp_path / "outer/inner")
    (tmp_path / "link").symlink_to(tmp_path / "outer")
    paths = collect.find_runs([tmp_path / "outer", tmp_path / "outer/inner", tmp_path / "link"])
    assert collect.short_names(paths) == ["outer", "inner"]


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
