"""Warnings that point at the line of the caller's own code."""

import contextlib
import sys
import warnings
from pathlib import Path

import jax
import optax

__all__ = ["warn"]

# Between a user's line and what warns there are frames of this library and of those that it is called through.
_OURS = (str(Path(__file__).parent), *(str(Path(module.__file__).parent) for module in (jax, optax) if module.__file__))
_INSIDE = (*(f"{folder}/" for folder in _OURS), contextlib.__file__)


def warn(message: str) -> None:
    """Issue a UserWarning whose place is the innermost line outside of this library, JAX and Optax.

    So the line that Python shows is the user's ``tx.init(params)``, however deep in the library the warning arises.

    Args:
      message: what is done, of which leaf, and how to say otherwise.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
