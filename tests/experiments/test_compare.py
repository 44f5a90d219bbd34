import json

import pytest

from experiments import compare


def test_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, density, accuracy in (("dense", 1.0, 0.98), ("sparse", 0.1, 0.9775)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps({"density": density, "test_accuracy": accuracy}))
    assert compare.table(["dense", "sparse"]).splitlines() == [
        "run     density  test accuracy  difference",
        "dense   100.00%         98.00%       +0.00",
        "sparse   10.00%         97.75%       -0.25",
    ]


def test_unfinished_run_is_named(tmp_path):
    with pytest.raises(OSError, match=r"result\.json"):
        compare.table([str(tmp_path)])
