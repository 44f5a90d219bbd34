import dataclasses

import numpy as np
import pytest

from experiments.results import compare, page
from tests.experiments.results.runs import made_up
from tests.pages import Page

SPARSE = {"params": {"w": np.eye(3)}, "masks": {"w": np.eye(3) > 0}}


def test_what_was_logged_in_some_lines_only_and_odd_names():
    history = ({"step": 1, "train_loss": 1.0, "speed": {}}, {"step": 2, "speed": {"images_per_second": 100.0}})
    runs = [made_up(name, accuracy=0.9, history=history) for name in ("_a", "$b$", "c$_")]
    shown = Page(page.report(runs, "odd"))
    header, *rows = shown.tables[0]
    assert [row[0] for row in rows] == ["_a", "$b$", "c$_"]
    assert rows[0][header.index("images/s")] == "100"


@pytest.mark.slow
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
    shown = Page(page.report(runs, "two sets"))
    tables = [table for table in shown.tables if "difference" in table[0]]
    assert [[row[0] for row in table[1:]] for table in tables] == [["a", "b"], ["c", "d"]]
    assert [table[2][table[0].index("difference")] for table in tables] == ["-0.50 points", "-1.00 points"]
    assert [table[0][0] for table in shown.tables if table[0][-1] == "by chance"] == ["against a", "against c"]
    assert shown.text.count("Test accuracy of finished runs.") == shown.text.count("Loss and error by epoch.") == 2
    alone = Page(page.report(runs[:2], "one set"))
    assert alone.text.count("Loss and error by epoch.") == 1
    assert [list(of_set) for of_set in (compare.by_data(runs), compare.by_data(runs[:2]))] == [
        ["mnist", "digits"], ["mnist"],
    ]  # fmt: skip


@pytest.mark.slow
def test_layer_densities_are_drawn_where_masks_change():
    def lines(*densities, **flips):
        return tuple(
            {"step": i, "layer_density": {"w": density}, "flips": flips} for i, density in enumerate(densities, start=1)
        )

    for history, drawn in ((lines(0.5, 0.5), 0), (lines(0.5, 0.4), 1), (lines(0.5, 0.5, w=3), 1), (lines(0.5, w=0), 0)):
        run = dataclasses.replace(made_up("one", accuracy=0.9, history=history), **SPARSE)
        assert Page(page.report([run], "")).text.count("Density of each layer, and flips") == drawn


def test_a_run_that_has_just_begun_alone():
    run = dataclasses.replace(made_up("begun", accuracy=None), result=None)
    shown = Page(page.report([run], "one"))
    assert shown.tables[0] == [["run", "method", "state"], ["begun", "sparse_momentum", "nothing logged yet"]]
    assert "No masks to show" in shown.text
