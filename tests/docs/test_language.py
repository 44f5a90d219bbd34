"""Words that a reader stumbles over: first lines of docstrings that make no sense by themselves, and some patterns."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^(`{3,})[^\n]*\n.*?^\1`*\s*$", re.MULTILINE | re.DOTALL)
# A first line is a noun phrase or an imperative, as a table of contents has it.
STARTS = re.compile(r"(Of|What|Says|Likewise|Those|Other than)\b")
BANNED = re.compile(r"\bso many\b|\blikewise\b|\ba program a step\b|\bOther than\b", re.IGNORECASE)
DOCUMENTED = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def first_lines(file: Path) -> Iterator[tuple[int, str]]:
    """(line, first line of the docstring) of a module and of what is public in it."""
    nodes: list[ast.AST] = [ast.parse(file.read_text())]
    while nodes:
        node = nodes.pop()
        text = ast.get_docstring(node)
        if text:
            yield node.body[0].lineno, text.splitlines()[0]
        if isinstance(node, ast.Module | ast.ClassDef):
            nodes += [n for n in node.body if isinstance(n, DOCUMENTED) and not n.name.startswith("_")]


def test_first_lines_of_docstrings_stand_by_themselves():
    files = [file for folder in ("jaxsparse", "experiments") for file in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 50
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line}"
        for file in files
        for number, line in first_lines(file)
        if STARTS.match(line) or BANNED.search(line)
    ]
    assert not found, f"{len(found)} first lines of docstrings want other words:\n" + "\n".join(found)


def test_pages_avoid_the_banned_words():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found = [
        f"{page.relative_to(ROOT)}: {line}"
        for page in pages
        for line in FENCE.sub("", page.read_text()).splitlines()
        if BANNED.search(line)
    ]
    assert not found, f"{len(found)} lines want other words:\n" + "\n".join(found)


def test_an_offender_is_found(tmp_path):
    file = tmp_path / "module.py"
    file.write_text('"""A module."""\n\n\nclass A:\n    """Of a class."""\n\n\ndef _b():\n    """What is private."""\n')
    assert [line for _, line in first_lines(file) if STARTS.match(line)] == ["Of a class."]
