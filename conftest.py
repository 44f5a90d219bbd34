"""The examples in docstrings run under strict dtype promotion: what the library mixes, it converts itself."""

import pytest


@pytest.fixture(autouse=True)
def strict_promotion_of_examples(request):
    """Strict promotion in the examples of docstrings, and nowhere else: tests say for themselves."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    import jax  # not before tests/conftest.py has set its environment

    with jax.numpy_dtype_promotion("strict"):
        yield
