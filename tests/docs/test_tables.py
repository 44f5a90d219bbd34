"""The tables of methods in README and docs follow from the docstrings."""

import pytest

import jaxsparse
from docs import evidence, tables


def test_pages_are_as_written():
    assert not tables.stale(), "run: python -m docs.tables"


def test_every_method_has_a_row():
    names = [method.name for method in tables.all_methods()]
    assert {"asni", "dep_l0", "l0", "magnitude_pruning", "mask_updates", "rda", "sparse_momentum"} <= set(names)
    assert len(names) == len(set(names))
    assert all(hasattr(jaxsparse, name) for name in names), "a method that is no name of jaxsparse itself"
    pages = {page.stem for page in tables.PAGES.glob("*.md")} - {"index"}
    assert {method.page.removesuffix(".md") for method in tables.all_methods()} - {""} == pages, (
        "a page without a method"
    )


def test_a_first_line_is_read():
    def method():
        """Keep half (Smith, 2020).

        References:
          Smith, `Half <https://example.org/half>`_, 2020.
        """

    row = tables.method_of("method", method, jaxsparse)
    assert row == ("method", "Keep half", "Smith, 2020", "https://example.org/half", "")


def test_every_arm_of_the_sweep_is_in_a_table_of_numbers():
    listed = {arm for groups in (evidence.ARMS, evidence.FREE) for arms in groups.values() for arm in arms}
    assert {arm for arm, _ in evidence.sweep()} - {"dense"} == listed


def test_one_number_of_a_page_of_results_is_read(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# T\n\n| a b | n |\n| --- | --- |\n| x | 1 |\n| y | 2 |\n| y | 3 |\n\n| a b | m |\n| --- | --- |\n| x | 4 |"
    )
    assert evidence.cell(page, "n", a_b="x") == "1"
    assert evidence.cell(page, "m", a_b="x") == "4"
    for column, value in (("n", "y"), ("n", "z"), ("k", "x")):  # two rows, none, no such column
        with pytest.raises(ValueError, match=r"page.md: \d rows have"):
            evidence.cell(page, column, a_b=value)
