"""Configuration of Sphinx: ``make docs``, or ``python -m sphinx -W --keep-going -n -b html docs build/docs``.

Nothing is fetched while building, and notebooks are shown as they were committed. A public name that no page of the
reference has, or that two have, fails the build (docs/_ext/api.py).
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[:0] = [str(Path(__file__).parent / "_ext"), str(Path(__file__).parents[1])]

import jaxsparse  # noqa: E402

project = "jaxsparse"
author = "The jaxsparse authors"
copyright = author
version = release = jaxsparse.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_nb",
    "sphinx_copybutton",
    "api",
    "mathml",
    "measured",
    "notebooks",
    "search",
]
exclude_patterns = ["**.ipynb_checkpoints", "notebooks/README.md"]
suppress_warnings = [
    "toc.empty_glob",  # before there are notebooks
    "mystnb.unknown_mime_type",
    "ref.python",  # two classes are called Layout: that of a leaf, and that of a train step over devices
]

# Markdown and notebooks.
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
myst_dmath_double_inline = True

# Docstrings.
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False  # several names may share a line
napoleon_custom_sections = [("Attributes", "params_style")]
python_maximum_signature_line_length = 90

# Names of other libraries, which are not looked up, and words of docstrings' argument lists.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(collections|jax|jaxlib|optax|flax|numpy|np|jnp|nn|os|scipy|matplotlib|rich|treescope)\..*",
    ),
    (
        "py:class",
        r"ArrayLike|Any|BlocksLike|Table|Callable|DTypeLike|Iterable|Iterator|Mapping|Sequence|Path|Mesh|NamedSharding|Ranking|Samples|Change|Choose|Drop|Forward|Grow|Image|Kept|Pull|Rule|Scope|SlicesLike|Stack|Start|Zeros|.*_lib\..*",
    ),
]

math_renderer = "mathml"

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"jaxsparse {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_search_scorer = str(Path(__file__).parent / "_ext" / "scorer.js")
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b6e99", "color-brand-content": "#0b6e99"},
    "dark_css_variables": {"color-brand-primary": "#56b4e9", "color-brand-content": "#56b4e9"},
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
