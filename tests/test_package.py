"""What ``import jaxsparse`` brings along, and what it does without."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import jaxsparse


def printed(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_library_imports_nothing_but_jax_optax_and_numpy():
    others = ("flax", "grain", "matplotlib", "orbax", "rich", "safetensors", "tensorflow_datasets", "treescope")
    assert printed(f"import sys, jaxsparse; print([name for name in {others} if name in sys.modules])") == "[]\n"


def test_models_and_layers_come_when_they_are_asked_for():
    assert printed("import jaxsparse; print(jaxsparse.models.MLP.__name__, jaxsparse.nn.SparseDense.__name__)") == (
        "MLP SparseDense\n"
    )
    with pytest.raises(AttributeError, match="module 'jaxsparse' has no attribute 'sparse_momentom'"):
        _ = jaxsparse.sparse_momentom


def test_tracing_comes_when_it_is_asked_for():
    code = "import sys, jaxsparse; print('jaxsparse.trace' in sys.modules, jaxsparse.trace.multiply_adds.__name__)"
    assert printed(code) == "False multiply_adds\n"


def test_without_flax_it_is_said_what_is_missing():
    code = """
import sys
sys.modules["flax"] = None
import jaxsparse
try:
    jaxsparse.models
except AttributeError as error:
    print(error)
"""
    assert printed(code) == "jaxsparse.models needs Flax: pip install flax\n"


def test_all_public_names_are_there():
    assert sorted(jaxsparse.__all__) == sorted(set(jaxsparse.__all__))
    assert all(hasattr(jaxsparse, name) for name in jaxsparse.__all__)


def test_every_name_that_a_module_lists_is_there():
    for found in pkgutil.walk_packages(jaxsparse.__path__, "jaxsparse."):
        if not found.name.endswith("__main__"):
            module = importlib.import_module(found.name)
            missing = [name for name in getattr(module, "__all__", ()) if not hasattr(module, name)]
            assert not missing, f"{found.name} has no {', '.join(missing)}"
