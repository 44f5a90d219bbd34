"""Comparison of two functions by their outputs."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxsparse.trees import is_key, leaf_paths, listed

__all__ = ["same"]


def same(f: Callable[..., Any], g: Callable[..., Any], *args: Any, rtol: float = 1e-5) -> None:
    """Check that two functions give the same outputs, up to rounding.

    Args:
      f: a function, the reference.
      g: the function to compare, such as a module that was rebuilt with smaller widths.
      *args: the arguments of both.
      rtol: the largest difference allowed within an output, as a share of the largest entry of it that f gives. Outputs
        that are no floats, such as PRNG keys, must be equal; NaN equals NaN, and an infinity itself.

    Returns:
      None, if they agree.

    Raises:
      ValueError: naming the worst output by its path, the index, both values and the relative error; or outputs that
        only one of the two has, or whose shapes or dtypes differ.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsparse import trace
      >>> trace.same(jnp.tanh, jax.jit(jnp.tanh), jnp.arange(3.0))
      >>> trace.same(lambda x: {"y": x}, lambda x: {"y": x.at[1].add(0.5)}, jnp.arange(3.0))
      Traceback (most recent call last):
      ValueError: y differs most at [1]: 1.0 and 1.5, a relative error of 0.25 (rtol=1e-05)
    """
    ours, theirs = f(*args), g(*args)
    paths, others = leaf_paths(ours), leaf_paths(theirs)
    if sorted(paths) != sorted(others):
        raise ValueError(f"only one of the functions has the outputs {listed(sorted(set(paths) ^ set(others)))}")
    wanted = dict(zip(others, jax.tree.leaves(theirs), strict=True))
    worst, message = rtol, ""
    for path, a in zip(paths, jax.tree.leaves(ours), strict=True):
        a, b, name = _array(a), _array(wanted[path]), path or "the output"
        if a.shape != b.shape or str(a.dtype) != str(b.dtype):  # NumPy cannot compare its dtypes with those of keys
            raise ValueError(f"{name} is {a.dtype} of shape {a.shape}, and {b.dtype} of shape {b.shape}")
        if is_key(a):
            a, b, name = _array(jax.random.key_data(a)), _array(jax.random.key_data(b)), f"the key data of {name}"
        errors = _errors(a, b)
        if errors.size and (most := errors.max()) > worst:
            at = np.unravel_index(errors.argmax(), a.shape)
            place = f" at [{', '.join(map(str, at))}]" if at else ""
            worst = most
            message = f"{name} differs most{place}: {a[at]} and {b[at]}, a relative error of {most:.2g} (rtol={rtol:g})"
    if message:
        raise ValueError(message)


def _array(output: Any) -> Any:
    """An output as an array of NumPy, which has no typed keys: those stay as they are."""
    return output if is_key(output) else np.asarray(output)


def _errors(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The differences as shares of the largest entry of ``a``, infinite where they mean nothing."""
    if not (jax.numpy.issubdtype(a.dtype, np.inexact)):
        return np.where(a == b, 0.0, np.inf)
    wide = np.complex128 if np.iscomplexobj(a) else np.float64
    a, b = a.astype(wide), b.astype(wide)
    alike = (a == b) | (np.isnan(a) & np.isnan(b))
    scale = np.abs(a[np.isfinite(a)]).max(initial=0)
    with np.errstate(all="ignore"):
        errors = np.abs(a - b) / scale if scale else np.full(a.shape, np.inf)
    return np.where(alike, 0.0, np.where(np.isfinite(errors), errors, np.inf))
