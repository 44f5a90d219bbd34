"""Draws the pictures of docs/gallery.md by running its code, light and dark: ``python -m docs.gallery``, two minutes.

The runs that some of them want are trained first where they are not there, by ``make train``.
"""

import ast
import re
import subprocess
from pathlib import Path
from typing import Any

import matplotlib as mpl

from docs import pictures

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "gallery.md"
BLOCK = re.compile(r"^```py(?:thon)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[list[ast.stmt], ast.expr | None, str]]:
    """The blocks of code: statements, the figure that the last line gives, and its name, if it is one."""
    found = []
    for code in BLOCK.findall(PAGE.read_text()):
        *most, last = ast.parse(code).body
        called = (
            last.value.func
            if isinstance(last, ast.Expr) and isinstance(last.value, ast.Call)
            else None
        )
        if isinstance(called, ast.Attribute) and called.attr.startswith("plot_"):
            found.append((most, last.value, called.attr))
        else:
            found.append(([*most, last], None, ""))
    return found


def main() -> None:
    """The command line."""
    if not all((ROOT / "runs" / f"digits_{name}").exists() for name in ("dense", "sparse")):
        subprocess.run(["make", "train"], cwd=ROOT, check=True)
    names: dict[str, Any] = {}
    for statements, figure, name in blocks():
        exec(compile(ast.Module(statements, []), PAGE.name, "exec"), names)
        if figure is None:
            continue
        for theme in pictures.INK:
            with mpl.rc_context(pictures.style(theme)):
                drawn = eval(compile(ast.Expression(figure), PAGE.name, "eval"), names)
                path = pictures.FOLDER / f"{name}_{theme}.png"
                pictures.save(drawn, path)
                print(f"{path.name}: {path.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
