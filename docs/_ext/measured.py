"""The committed pages of measurements as sections of the documentation: in place of the line ``[all of FOLDER]``."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACE = re.compile(r"^\[all of ([\w/]+)\]$", re.MULTILINE)
PICTURE = re.compile(r'<picture>.*?srcset="([^"]+)".*?src="([^"]+)" alt="([^"]*)".*?</picture>')


def section(page: Path) -> str:
    """A page of measurements, one level of headings lower, with its pictures as seen from docs/."""
    folder = f"../{page.parent.relative_to(ROOT).as_posix()}"
    text = re.sub(r"^#", "##", page.read_text().strip(), flags=re.MULTILINE)
    text = re.sub(
        r"!\[([^\]]*)\]\(([^)]+)\)", rf"```{{image}} {folder}/\2\n:alt: \1\n```", text
    )

    def light_and_dark(match: re.Match) -> str:
        dark, light, about = match.groups()
        return "\n\n".join(
            f"```{{image}} {folder}/{name}\n:alt: {about}\n:class: only-{theme}\n```"
            for theme, name in (("light", light), ("dark", dark))
        )

    return PICTURE.sub(light_and_dark, text)


def pages(folder: str) -> list[Path]:
    """The pages of measurements in a folder, sorted by title."""
    return sorted((ROOT / folder).glob("*.md"), key=lambda page: page.read_text().lower())


def insert(app, docname: str, source: list[str]) -> None:
    """Puts the pages where they belong."""

    def all_of(match: re.Match) -> str:
        found = pages(match[1])
        for page in found:
            app.env.note_dependency(str(page))
        return "\n\n".join(map(section, found))

    source[0] = PLACE.sub(all_of, source[0])


def setup(app) -> dict:
    """Sphinx calls this."""
    app.connect("source-read", insert)
    return {"parallel_read_safe": True}
