import json
import runpy
import sys

import pytest

from experiments import compare


def finished(folder, density, accuracy):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "result.json").write_text(json.dumps({"density": density, "test_accuracy": accuracy}))


def test_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished(tmp_path / "dense", 1.0, 0.98)
    for seed in (10, 2):
        finished(tmp_path / f"sparse/seed_{seed}", 0.1, 0.9775)
    assert compare.table(["dense", "sparse", "dense/../dense"]).text().splitlines() == [
        "run             density  test accuracy  difference",
        "--------------  -------  -------------  ----------",
        "dense           100.00%         98.00%       +0.00",
        "sparse/seed_2    10.00%         97.75%       -0.25",
        "sparse/seed_10   10.00%         97.75%       -0.25",
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"error: '.*' is not the folder of a run, nor is one in it: there is no config\.json"),
        ({"config.json": "{}"}, r"error: '.*' is not finished: it has no result\.json"),
        ({"config.json": "{}", "result.json": "{"}, r"error: .*result\.json is not JSON"),
        ({"config.json": "{}", "result.json": "[1]"}, r"error: .*result\.json: expected a JSON object, got \[1\]"),
        ({"config.json": "{}", "result.json": '{"density": 1}'}, r"error: .*result\.json has no test_accuracy"),
    ],
)
def test_folders_that_cannot_be_compared(tmp_path, monkeypatch, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path)])
    monkeypatch.delitem(sys.modules, "experiments.compare")
    with pytest.raises(SystemExit, match=message):
        runpy.run_module("experiments.compare", run_name="__main__")


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
    assert compare.table(["a", "b", "c", "d"]).text().splitlines() == [
        "run  data    density  test accuracy  difference",
        "---  ------  -------  -------------  ----------",
        "a    mnist   100.00%         98.00%       +0.00",
        "b    digits  100.00%         50.00%       +0.00",
        "c    mnist   100.00%         97.00%       -1.00",
        "d    digits  100.00%         60.00%      +10.00",
    ]
    assert compare.tested_on({"data.name": "x", "data.classes": [1, "b"], "data.examples": 1408}) == (
        "x, classes 1, b, the first 1,408 images"
    )
