"""Formulas as MathML, which browsers show without any script or font from the network."""

import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

logger = logging.getLogger(__name__)


def mathml(latex: str, display: str) -> str:
    """The MathML of a formula. ``display``: "inline" or "block"."""
    found = convert(latex, display=display)
    # Bars about a value stand close to it.
    return re.sub(
        r"<mo[^>]*>(\||&#x0007C;|&#x02223;)</mo>",
        r'<mo lspace="0" rspace="0" stretchy="false">|</mo>',
        found,
    )


def _converted(self, node: nodes.Node, latex: str, display: str) -> str:
    try:
        return mathml(latex, display)
    except Exception as error:  # whatever the parser stumbles over
        logger.warning("latex2mathml cannot read %r: %s", latex, error, location=node)
        return f"<code>{self.encode(latex)}</code>"


def visit_math(self, node):
    """Within a line."""
    self.body.append(_converted(self, node, node.astext(), "inline"))
    raise nodes.SkipNode


def visit_displaymath(self, node):
    """On lines of its own, numbered where it has a label. Aligned where it says so: with & or \\\\."""
    latex = node.astext().strip()
    if re.search(r"(?<!\\)&|\\\\", latex) and r"\begin{" not in latex:
        latex = rf"\begin{{split}}{latex}\end{{split}}"
    self.body.append(
        '<div class="math-block">' + _converted(self, node, latex, "block") + "</div>\n"
    )
    raise nodes.SkipNode


def setup(app):
    """Registers the renderer "mathml"."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
