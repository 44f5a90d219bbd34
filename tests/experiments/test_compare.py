import json
import runpy
import sys

import pytest


def finished(folder, density, accuracy):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "result.json").write_text(json.dumps({"density": density, "test_accuracy": accuracy}))


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
    monkeypatch.delitem(sys.modules, "experiments.compare", raising=False)
    with pytest.raises(SystemExit, match=message):
        runpy.run_module("experiments.compare", run_name="__main__")
