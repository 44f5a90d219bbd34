"""The README and the pages of docs/: their Python runs, and their links lead somewhere."""

import ast
import collections
import contextlib
import io
import logging
import re
import sys
import warnings
from pathlib import Path

import jax
import pytest

from tests.problems import slow_except

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted(path for folder in (".", "*") for path in DOCS.glob(f"{folder}/*.md") if path.parent.name != "notebooks")
FENCE = re.compile(r"^(`{3,})([^\n`]*)\n(.*?)^\1`*\s*$", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"^\s*print\(.*\)  # (.*)$")
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,3} +(.+?)\s*$", re.MULTILINE)  # MyST names no deeper ones
TARGET = re.compile(r"^\(([\w-]+)\)=$", re.MULTILINE)


def name(page: Path) -> str:
    return page.relative_to(ROOT if page == README else DOCS).as_posix()


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line, code) of the fenced blocks of a language."""
    text = page.read_text()
    found = FENCE.finditer(text)
    return [(text.count("\n", 0, m.start(3)) + 1, m[3]) for m in found if m[2].strip() == language]


WITH_CODE = [page for page in PAGES if blocks(page, "python")]


def test_pages_are_found():
    assert len(PAGES) > 30
    assert len(WITH_CODE) > 15


QUICK = [DOCS / "index.md"]


@pytest.mark.parametrize("page", slow_except(QUICK, WITH_CODE), ids=name)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("jaxsparse")
    monkeypatch.setattr(logger, "level", logger.level)  # one page sets it
    source = ""
    for line, code in blocks(page, "python"):  # at the lines that they have on the page
        source += "\n" * (line - 1 - source.count("\n")) + code
    run(source, page)


OF_README = blocks(README, "python")


@pytest.mark.parametrize("line", slow_except([line for line, code in OF_README if "for " not in code], dict(OF_README)))
def test_each_block_of_the_readme_runs_by_itself(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = dict(OF_README)[line]
    said = run("\n" * (line - 1) + code, README)
    if "accuracy" in code:  # what a reader sees: it has learned, and the file is small
        accuracy, size = re.fullmatch(r"accuracy ([\d.]+), ([\d,]+) bytes", *said.values()).groups()
        assert float(accuracy) > 0.85
        assert int(size.replace(",", "")) < 20_000


def test_the_readme_is_short():
    assert len(README.read_bytes()) < 9_000


def run(source: str, page: Path) -> dict[int, str]:
    """Runs code and compares what it prints with what it says that it does; what each line has printed first."""
    printed = {}

    def print_and_tell(*values):
        printed.setdefault(sys._getframe(1).f_lineno, " ".join(map(str, values)))

    users_add_biases = jax.numpy_rank_promotion("allow")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), users_add_biases:
        warnings.simplefilter("error", DeprecationWarning)
        exec(compile(source, page, "exec"), {"__name__": page.stem, "print": print_and_tell})
    for number, line in enumerate(source.splitlines(), 1):
        if found := PRINTED.search(line):  # what is printed, and maybe some words on it
            said = ".*".join(map(re.escape, found[1].split("...")))
            words = re.escape(printed[number])
            assert re.fullmatch(said, printed[number]) or re.match(rf"{words}([,:]|$| of )", found[1]), (
                f"line {number} says {found[1]}, but prints {printed[number]}"
            )
    return printed


@pytest.mark.parametrize("page", [README, *PAGES], ids=name)
def test_code_says_what_it_is(page):
    languages = {m[2].strip() for m in FENCE.finditer(page.read_text())}
    assert "" not in languages, "a block without a language"
    assert not languages & {"py3", "Python", "sh", "shell"}


@pytest.mark.parametrize("page", [README, *PAGES], ids=name)
def test_links_lead_somewhere(page):
    assert not dead_links(page)
    for target in re.findall(r"^:?(?:file|image|figure)?[`~]{3,}\{(?:image|figure)\} (\S+)", page.read_text(), re.M):
        assert (page.parent / target).resolve().exists(), f"{name(page)} shows {target}"


def dead_links(page: Path) -> list[str]:
    """The links of a page to files that are not there, and to places that a page of ours does not have."""
    dead = []
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        file, _, place = target.partition("#")
        if file.startswith(("http://", "https://")):
            continue
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (place and path.suffix == ".md" and place not in places(path)):
            dead.append(target)
    return dead


def places(page: Path) -> set[str]:
    """What a link to a page may have behind its "#": explicit targets, and headings as GitHub and MyST name them."""
    text = FENCE.sub("", page.read_text())
    found, seen = set(TARGET.findall(text)), collections.Counter()
    for title in HEADING.findall(text):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def test_a_dead_link_is_found(tmp_path):
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# Other\n\n(here)=\n## `f` at 2:4, [twice](page.md)\n\n## Other\n\n```python\n# Code\n```\n")
    alive = ["other.md", "other.md#other", "other.md#here", "other.md#f-at-24-twice", "other.md#other-1", "#page"]
    dead = ["none.md", "other.md#f-at-2-4-twice", "other.md#code", "other.md#other-2", "#other"]
    page.write_text("# Page\n\n" + "\n".join(f"[a link]({target})" for target in alive + dead))
    assert dead_links(page) == dead


@pytest.mark.parametrize("page", [page for page in PAGES if "toctree" in page.read_text()], ids=name)
def test_contents_exist(page):
    for _, block in [(0, m[3]) for m in FENCE.finditer(page.read_text()) if m[2].strip() == "{toctree}"]:
        for entry in block.split("\n"):
            if entry and not entry.startswith(":") and "*" not in entry:
                assert (page.parent / f"{entry}.md").exists(), f"{name(page)} lists {entry}"


def test_no_word_looks_like_a_mail_address():
    """What does becomes a link to write a mail to, in a page as in a docstring."""
    address, code = re.compile(r"(?<![\w`])[\w.+-]+@[\w-]+\.?\w"), re.compile(r"`+[^`]*`+")
    texts = {page: FENCE.sub("", page.read_text()) for page in [*PAGES, README]}
    for file in (ROOT / "jaxsparse").rglob("*.py"):
        trees = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, DOCUMENTED))
        texts[file] = "\n".join(ast.get_docstring(node) or "" for node in trees)
    for file, text in texts.items():
        found = [m[0] for line in text.splitlines() if not line.lstrip().startswith(">>>")
                 for m in address.finditer(code.sub("", line))]  # fmt: skip
        assert not found, f"{file} has {found}: it would be a mail link"
