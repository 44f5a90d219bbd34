"""The committed measurements are sections of the documentation, and every picture is in the gallery."""

import re
from pathlib import Path

from docs import gallery
from docs._ext import measured
from jaxsparse import inspect

DOCS = Path(__file__).parents[2] / "docs"


def test_a_page_becomes_a_section(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "ROOT", tmp_path)
    page = tmp_path / "results" / "one.md"
    page.parent.mkdir()
    page.write_text(
        "# One\n\n## Part\n\n| # |\n| --- |\n\n![Curve](one.png)\n\n"
        '<picture><source media="(prefers-color-scheme: dark)" srcset="d.png"><img src="l.png" alt="Two"></picture>\n'
    )
    assert measured.section(page) == (
        "## One\n\n### Part\n\n| # |\n| --- |\n\n```{image} ../results/one.png\n:alt: Curve\n```\n\n"
        "```{image} ../results/l.png\n:alt: Two\n:class: only-light\n```\n\n"
        "```{image} ../results/d.png\n:alt: Two\n:class: only-dark\n```"
    )
    page.with_name("two.md").write_text("# An earlier title\n")
    assert [path.name for path in measured.pages("results")] == ["two.md", "one.md"]


def test_all_measurements_have_a_place():
    for name, folder in (("results", "results"), ("benchmarks", "benchmarks/results")):
        assert measured.PLACE.findall((DOCS / f"{name}.md").read_text()) == [folder]
        for page in measured.pages(folder):
            text = measured.section(page)
            assert text.startswith("## "), page
            assert len(re.findall("^## ", text, re.MULTILINE)) == 1, page
            for picture in re.findall(r"```\{image\} (\S+)", text):
                assert (DOCS / picture).is_file(), picture


def test_every_picture_is_in_the_gallery():
    plots = {name for name in inspect.__all__ if name.startswith("plot_")}
    assert {name for _, figure, name in gallery.blocks() if figure is not None} == plots
    text = gallery.PAGE.read_text()
    for name in plots:
        for theme in ("light", "dark"):
            assert f"_static/{name}_{theme}.png" in text
            assert (DOCS / "_static" / f"{name}_{theme}.png").is_file()
