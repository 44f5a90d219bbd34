"""Writes tables of methods from their docstrings, and of numbers from committed results (docs/evidence.py).

``python -m docs.tables`` writes them; with ``--check`` it only says which are stale.

A method is a public function in ``jaxsparse/methods/`` that returns a gradient transformation. The first line of its
docstring is its goal, with the paper in brackets; the first address under "References" is that of the paper.
"""

import argparse
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args, get_origin

import jaxsparse
from docs import evidence, speeds
from jaxsparse import methods

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "methods"
BEGIN = "<!-- Written by python -m docs.tables -->"
END = "<!-- End of the tables -->"
FIRST_LINE = re.compile(
    r"(?P<goal>.*?)(?: \((?P<paper>[^()]*\d{4})\))?\.(?: An? (?:link|wrapper)\b.*)?"
)


# What methods are for, in the README -> the words that their goals begin with, of which the first that fit count.
PURPOSES = {
    "a fixed number of weights from the first step": ("Train a fixed number",),
    "n of every m weights (2:4)": ("Train n:m",),
    "the largest weights, chosen anew while the others learn too": ("Train",),
    "prune as training goes on, or once it is over": ("Prune",),
    "as few weights as are needed": ("Find", "Learn"),
    "whole channels, for a smaller dense network": ("Remove",),
    "masks that are there already": ("Keep given",),
}


SHARED_PAGES = {"rda": "reweighted_l1"}  # which is a link of it


class Method(NamedTuple):
    """A row: the name of a method, its goal, its paper and the address of that, its page in docs/methods ("": none)."""

    name: str
    goal: str
    paper: str
    address: str
    page: str


def modules() -> list[ModuleType]:
    """The modules of ``jaxsparse.methods``, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(methods.__path__))
    return [importlib.import_module(f"{methods.__name__}.{name}") for name in names]


def all_methods() -> list[Method]:
    """All methods, sorted by goal."""
    found = [
        method_of(name, getattr(module, name), module)
        for module in modules()
        for name in module.__all__
        if returns_transformation(getattr(module, name))
    ]
    return sorted(found, key=lambda method: method.goal)


def returns_transformation(value: Any) -> bool:
    """Whether a value is a function that, by its annotation, returns a gradient transformation."""
    return inspect.isfunction(value) and "GradientTransformation" in str(
        value.__annotations__.get("return")
    )


def method_of(name: str, function: Callable, module: ModuleType) -> Method:
    """The row of a method. A first line without a full stop, or a paper without an address, is a ValueError."""
    text = inspect.getdoc(function) or ""
    line = text.partition("\n")[0]
    read = FIRST_LINE.fullmatch(line)
    if read is None:
        raise ValueError(
            f"{name}: the docstring should begin 'Goal (Authors, year).', got {line!r}"
        )
    paper = read["paper"] or ""
    address = re.search(r"<(https://[^>]+)>", text.partition("References:")[2])
    if paper and address is None:
        raise ValueError(f"{name}: the docstring has no address of {paper} under 'References:'")
    shared = SHARED_PAGES.get(name, module.__name__.rpartition(".")[2])
    pages = [f"{name}.md", f"{shared}.md"]
    page = next((page for page in pages if (PAGES / page).exists()), "")
    return Method(name, read["goal"], paper, address[1] if address else "", page)


def table() -> str:
    """The table of all methods, for their own pages."""
    lines = ["| goal | method | paper |", "| --- | --- | --- |"]
    for method in all_methods():
        name = f"`{method.name}`"
        name = f"[{name}]({method.page})" if method.page else name
        paper = method.paper
        paper = f"[{paper}]({method.address})" if paper else paper
        lines.append(f"| {method.goal} | {name} | {paper or '-'} |")
    return "\n".join(lines)


def names() -> str:
    """The names of all methods by what they are for, which the first words of their goals say, for the README."""
    lines = ["| for | methods |", "| --- | --- |"]
    rest = all_methods()
    for purpose, begins in PURPOSES.items():
        chosen = [method for method in rest if method.goal.startswith(begins)]
        rest = [method for method in rest if method not in chosen]
        links = ", ".join(
            f"[`{method.name}`](docs/methods/{method.page})"
            if method.page
            else f"`{method.name}`"
            for method in sorted(chosen)
        )
        lines.append(f"| {purpose} | {links} |")
    if rest:
        raise ValueError(f"{rest[0].name}: PURPOSES has none for {rest[0].goal!r}")
    return "\n".join(lines)


def reference() -> str:
    """The reference of all modules of methods: one section each, with its docstring up to the colon as its title."""
    sections = []
    for module in modules():
        title = re.split("[:.]", inspect.getdoc(module) or "")[0]
        lines = [f"## {title}", "", "```{eval-rst}"]
        for name in module.__all__:
            value = getattr(module, name)
            kind = "autoclass" if inspect.isclass(value) else "autofunction"
            is_top = getattr(jaxsparse, name, None) is value
            if not is_top and not inspect.isclass(value):
                continue  # shared by methods, but no name for users
            lines.append(f".. {kind}:: {'jaxsparse' if is_top else module.__name__}.{name}")
        sections.append("\n".join([*lines, *options(module), "```"]))
    return "\n\n".join(sections)


def options(module: ModuleType) -> list[str]:
    """The entries of the public names of a module that stand for a choice of strings, such as ``Growth``."""
    lines = []
    for name in module.__annotations__:  # an alias that is imported has none
        value = getattr(module, name)
        if name[0].isupper() and get_origin(value) is Literal:
            *most, last = (f'``"{option}"``' for option in get_args(value))
            lines += ["", f".. py:data:: {name}", "", f"   {', '.join(most)} or {last}."]
    if lines:
        lines = [
            "",
            f".. currentmodule:: {module.__name__}",
            *lines,
            "",
            ".. currentmodule:: jaxsparse",
        ]
    return lines


TABLES = {
    ROOT / "README.md": names,
    PAGES / "index.md": table,
    ROOT / "docs" / "choose.md": evidence.choose,
    ROOT / "docs" / "benchmarks.md": speeds.digest,
    ROOT / "docs" / "api" / "methods.md": reference,
}


def written(page: Path, make: Callable[[], str]) -> str:
    """The page with its part written anew."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} should have the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{make()}\n\n{END}{after}"


def stale() -> list[Path]:
    """The pages that differ from what would be written."""
    return [page for page, make in TABLES.items() if page.read_text() != written(page, make)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing, fail if a page is stale"
    )
    check = parser.parse_args().check
    for page in (pages := stale()):
        if not check:
            page.write_text(written(page, TABLES[page]))
        print(f"{page.relative_to(ROOT)}: {'stale' if check else 'written'}")
    if check and pages:
        sys.exit("run: python -m docs.tables")


if __name__ == "__main__":
    main()
