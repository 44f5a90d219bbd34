"""Links between notebooks: docs/notebooks is a symbolic link, which Sphinx follows out of docs/."""

from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref

FOLDER = "notebooks"


def repair(app, doctree):
    """Leads links from notebook to notebook back into docs/; those to notebooks that are not there become text."""
    if not app.env.docname.startswith(f"{FOLDER}/"):
        return
    for node in list(doctree.findall(pending_xref)):
        target = node.get("reftarget", "")
        if node.get("refdomain") == "doc":
            name = f"{FOLDER}/{Path(target).name}"
            if name in app.env.found_docs:
                node["reftarget"] = name
        elif target.endswith(".ipynb"):
            node.replace_self(nodes.inline("", "", *node.children))


def setup(app):
    """Connects it."""
    app.connect("doctree-read", repair)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
