"""The search of these pages finds first what people look for: checked after every build, where there is Node.js."""

import json
import shutil
import subprocess
from pathlib import Path

from sphinx.util import logging

logger = logging.getLogger(__name__)

# What is typed into the search -> the page that has to come first.
FIRST = {
    "magnitude pruning": "methods/magnitude_pruning",
    "RigL": "methods/rigl",
    "sparse momentum": "methods/sparse_momentum",
    "2:4": "methods/sr_ste",
    "transformer": "howto/transformers",
    "transformers": "howto/transformers",
    "nnx": "howto/flax_nnx",
    "gallery": "gallery",
    "prune a trained network": "prune",
    "save": "howto/save_and_convert",
    "load": "howto/save_and_convert",
    "checkpoint": "howto/save_and_convert",
    "hugging face": "howto/save_and_convert",
    "choose a method": "choose",
    "install": "install",
    "faq": "faq",
    "cheat sheet": "cheat_sheet",
    "jaxpruner": "coming_from/jaxpruner",
}


def check(app, exception) -> None:
    """Warns of each query that finds another page first."""
    if exception is not None or app.builder.name != "html":
        return
    node = shutil.which("node")
    if node is None:
        logger.info("search: not checked, there is no Node.js")
        return
    script = Path(__file__).with_suffix(".js")
    done = subprocess.run(
        [node, str(script), str(app.outdir), *FIRST], capture_output=True, text=True
    )
    if done.returncode:
        logger.warning("search: cannot be checked: %s", done.stderr)
        return
    for (query, wanted), found in zip(FIRST.items(), json.loads(done.stdout), strict=True):
        if found != wanted:
            logger.warning("search: %r finds %s first, not %s", query, found, wanted)


def setup(app) -> dict:
    """Sphinx calls this."""
    app.connect("build-finished", check, priority=900)
    return {"parallel_read_safe": True}
