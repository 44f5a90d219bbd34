"""A paper's table beside results: as Markdown, as JSON and as a picture."""

import json
from pathlib import Path

import pytest

from experiments.results import paper, plot
from experiments.results.published import TABLES, PaperTable, Row

RESULTS = Path(__file__).parents[3] / "results"
TABLE = PaperTable(
    "A small table. Somebody, 2019",
    "How it was made.",
    "weights kept (%)",
    (
        Row("digits", 10, "digits/10", "", {}, (20.0, 1.0), 2),
        Row("digits", 20, "digits/20", "", {}, (15.0, None), 2),
        Row("digits", "dense", "digits/dense", "", {}, None, 1),
    ),
    others={"another method": {10: 22.0, 20: 17.0}},
)


def outcomes(*of_rows, kept=(10.0, 20.0, 100.0), **more):
    """Results of the rows of TABLE, whose test errors are given, a tuple for each row."""
    return paper.as_frame([
        {"run": row.run, "seed": seed, "test_error": error, "kept": share, **more}
        for row, share, errors in zip(TABLE.rows, kept, of_rows, strict=True)
        for seed, error in enumerate(errors)
    ])  # fmt: skip


@pytest.mark.parametrize("name", [name for name in TABLES if (RESULTS / f"{name}.json").exists()])
def test_the_committed_pages_are_those_of_the_committed_numbers(name):
    """But for the last line, which says how and when they were written."""
    found = paper.read_outcomes(RESULTS / f"{name}.json")
    page = paper.as_markdown(name, TABLES[name], found, "")
    assert page.splitlines()[:-1] == (RESULTS / f"{name}.md").read_text().splitlines()[:-1]
    assert paper.as_json(TABLES[name], found) == json.loads((RESULTS / f"{name}.json").read_text())


def test_files_of_the_runs():
    files = {"multiply_adds": 12.34, "bytes_float32": 21_000, "bytes_int8": 10_500, "error_int8": 20.5}
    found = outcomes((19.0,), (16.5,), (15.0,), **files)
    table = TABLE._replace(footprint=True)
    text = paper.as_markdown("small", table, found, "the command")
    assert "| digits | 10 | 20.00 ± 1.000 | 19.00 | 12.3 | 21,000 | 10,500 | 20.50 | 0 |" in text
    (axes,) = plot.picture(table, found).axes
    assert axes.get_xlabel() == "kilobytes of the file, values in int8"
    assert "bytes" not in paper.as_markdown("small", TABLE, outcomes((19.0,), (), ()), "the command")


def test_markdown():
    text = paper.as_markdown("small", TABLE, outcomes((19.0, 21.0, 23.0), (16.5,), ()), "the command")
    assert "| digits | 10 | 20.00 ± 1.000 | 21.00 ± 1.155 | 0, 1, 2 | +1.000 | 3.055 |" in text  # 2 sqrt(1 + 4 / 3)
    assert "| digits | 20 | 15.00 | 16.50 | 0 | +1.500 |  |" in text
    assert "| digits | dense |  | not run |  |  |  |" in text
    assert "| digits | 10 | 19.00 | 21.00 | 23.00 |" in text
    assert "`the command`, JAX " in text


def test_markdown_of_changes():
    table = TABLE._replace(relative_to=10)
    text = paper.as_markdown("small", table, outcomes((20.0, 22.0), (15.0, 17.0), ()), "")
    assert "| digits | 10 | +0.00 |  |" in text
    assert "| digits | 20 | -5.00 | -5.00 ± 1.414 |" in text
    assert "| digits | dense |  | not run |" in text
    assert "Change against 10, in points:" in text


def test_markdown_of_a_table_of_which_nothing_was_run():
    text = paper.as_markdown("small", TABLE, paper.as_frame([]), "the command")
    assert text.count("not run") == len(TABLE.rows)
    assert plot.picture(TABLE, paper.as_frame([])).axes


def test_markdown_and_picture_of_methods_that_find_their_sparsity():
    rows = tuple(row._replace(published=None, x=x) for row, x in zip(TABLE.rows, ("a", "b", "dense"), strict=True))
    table = TABLE._replace(x="setting", rows=rows, against_kept=True, others={})
    found = outcomes((20.0, 22.0), (15.0,), (3.0,), kept=(9.5, 30.25, 100.0))
    text = paper.as_markdown("small", table, found, "the command")
    assert "| network | setting | kept (%) | ours | seeds |" in text
    assert "| digits | a | 9.50 ± 0.000 | 21.00 ± 1.000 | 0, 1 |" in text
    assert "paper" not in text
    (axes,) = plot.picture(table, found).axes
    assert axes.get_xlabel() == "weights kept (%)"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["9.5", "30.25"]


def test_a_mean_needs_the_number_of_every_seed():
    table = TABLE._replace(with_kept=True)
    found = outcomes((20.0, 22.0), (15.0,), (), validation_error=18.0)
    text = paper.as_markdown("", table, found, "")
    assert "| 10 | 20.00 ± 1.000 | 10.00 ± 0.000 | 18.00 ± 0.000 | 21.00 ± 1.000 |" in text
    found.loc[0, "validation_error"] = None
    text = paper.as_markdown("", table, found, "")
    assert "| 10 | 20.00 ± 1.000 | 10.00 ± 0.000 |  | 21.00 ± 1.000 |" in text


def test_json_keeps_what_was_read(tmp_path):
    saved = {
        "digits/10": {"0": {"test_error": 0.0, "kept": 10.0}, "7": {"test_error": 2.5, "kept": 9.0, "widths": "20-5"}},
        "digits/20": {"1": {"test_error": 15.5, "kept": 20.0, "validation_error": 14.0}},
        "digits/dense": {},
    }
    (tmp_path / "small.json").write_text(json.dumps(saved))
    found = paper.read_outcomes(tmp_path / "small.json")
    assert paper.as_json(TABLE, found) == saved
    assert paper.as_json(TABLE, found.assign(kept=1 / 3))["digits/10"]["0"]["kept"] == 0.3333
    assert "| digits | 10 | 0.00 |  | 2.50 (20-5) |" in paper.as_markdown("", TABLE, found, "")
