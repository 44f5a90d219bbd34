"""The tables of methods in README and docs follow from the docstrings."""

import jaxsparse
from docs import tables


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
