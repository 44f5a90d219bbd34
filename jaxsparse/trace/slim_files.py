"""Slim params in a file, and the function made small again from them."""

import collections
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxsparse.artifacts import ArtifactError, load_sparse, save_sparse
from jaxsparse.artifacts.files import in_tree_of, naming
from jaxsparse.trace.program import is_array, live_eqns, opened
from jaxsparse.trace.slim import Slim, SlimApply, array_shapes

__all__ = ["load_slim", "primitives", "save_slim"]


def save_slim(path: str | os.PathLike, slim: Slim) -> None:
    """Write a :class:`Slim` to a file, see its ``save``."""
    traced, _, _ = slim.apply.analysed(slim.params, *slim.args)
    about = {
        "args": str(jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}" if is_array(x) else x, slim.args)),
        "full": slim.apply.full,
        "jax": jax.__version__,
        "primitives": primitives(traced.closed),
    }
    tree = {
        "about": np.frombuffer(json.dumps(about, sort_keys=True).encode(), np.uint8),
        "kept": {f"{name}:{axis}": stays for (name, axis), stays in sorted(slim.apply.kept.items())},
        "params": arrays_alone(slim.params),
    }
    save_sparse(path, tree)


def load_slim(
    path: str | os.PathLike, apply: Callable[..., Any], *args: Any, like: Any = None, check: bool = True
) -> Slim:
    """Read what :meth:`Slim.save` wrote, and make the function small again: the same bits, in any process.

    Args:
      path: the file.
      apply: the function that was made small, as it was: ``apply(params, *args)`` at full shapes. (After slimming
        twice, the first one.)
      *args: arguments of it, or their shapes.
      like: a tree like the full params, or their shapes: for params with nodes that are no dicts, lists or tuples, and
        for leaves that are no arrays, such as an Equinox module's functions.
      check: whether the function must consist of the same primitives as when it was saved. False lets other versions of
        JAX or of a framework write the same function in another way.

    Returns:
      A :class:`Slim`, with NumPy arrays as params and without a state of an optimizer.

    Raises:
      ArtifactError: if the file is damaged or not of :meth:`Slim.save`.
      ValueError: if the function has other params or shapes, consists of other primitives, or needs entries that are
        gone, naming what differs.
      OSError: if the file cannot be read.
      ImportError: without the package safetensors.

    Examples:
      >>> import tempfile, jax.numpy as jnp
      >>> from jaxsparse import trace
      >>> params, x = {"fc1": jnp.ones((5, 4)), "fc2": jnp.ones((4, 3))}, jnp.ones((2, 5))
      >>> def apply(params, x):
      ...     return jnp.tanh(x @ params["fc1"]) @ params["fc2"]
      >>> small = trace.slim(apply, params, {"fc1": jnp.arange(4) < 1}, x)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     small.save(f"{folder}/small")
      ...     again = trace.load_slim(f"{folder}/small", apply, x)
      >>> again.params["fc1"].shape, bool((again.apply(again.params, x) == small.apply(small.params, x)).all())
      ((5, 3), True)
    """
    tree, _ = load_sparse(path)
    with naming(path, ArtifactError):
        if not isinstance(tree, dict) or set(tree) != {"about", "kept", "params"}:
            raise ValueError("a sparse model, but not from Slim.save")
        about = json.loads(tree["about"].tobytes())
        kept = {(name.rpartition(":")[0], int(name.rpartition(":")[2])): stays for name, stays in tree["kept"].items()}
    full = {name: tuple(shape) for name, shape in about["full"].items()}
    params = tree["params"]
    with naming(path, ValueError):
        if like is not None:
            for name, shape in array_shapes(like).items():
                if name in full and shape != full[name]:
                    raise ValueError(f"{name} had shape {full[name]} before it was slim, and has {shape} in like=")
            params = _filled(like, in_tree_of(arrays_alone(like), params, check=False))
        small = SlimApply(apply, full, kept)
        traced, _, _ = small.analysed(params, *args)
        if check and (now := primitives(traced.closed)) != about["primitives"]:
            raise ValueError(_differs(about, now))
    shapes = {name: (full[name], shape) for name, shape in array_shapes(params).items()}
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if is_array(x) else x, args)
    return Slim(small, params, None, shapes, structs)


# They come and go with the shapes of a batch and the version of JAX, and compute nothing.
_LAYOUT = (
    "broadcast_in_dim closed_call convert_element_type copy copy_p core_call custom_jvp_call custom_vjp_call iota jit "
    "pjit reshape sharding_constraint slice split squeeze stop_gradient transpose"
)
LAYOUT = set(_LAYOUT.split())


def primitives(jaxpr: Any) -> dict[str, int]:
    """How often a program has each primitive that computes something, those of its inner programs included."""
    counts: collections.Counter[str] = collections.Counter()
    for eqn in live_eqns(opened(jaxpr)[0]):
        counts[eqn.primitive.name] += eqn.primitive.name not in LAYOUT
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(opened(x)[0], "eqns")):
            if hasattr(opened(inner)[0], "eqns"):
                counts.update(primitives(inner))
    return {name: counts[name] for name in sorted(counts) if counts[name]}


def arrays_alone(tree: Any) -> Any:
    """A tree in which leaves that are no arrays are None."""
    return jax.tree.map(lambda leaf: leaf if is_array(leaf) else None, tree)


def _filled(like: Any, arrays: Any) -> Any:
    leaves, treedef = jax.tree.flatten(like)
    values = iter(jax.tree.leaves(arrays))
    return treedef.unflatten([next(values) if is_array(leaf) else leaf for leaf in leaves])


def _differs(about: dict[str, Any], now: dict[str, int]) -> str:
    was = about["primitives"]
    found = [
        f"{name} {was.get(name, 0)} times then, {now.get(name, 0)} now"
        for name in sorted(set(was) | set(now))
        if was.get(name, 0) != now.get(name, 0)
    ]
    return (
        f"this is not the function that was saved, it has {'; '.join(found[:5])}. It was saved with args of "
        f"{about['args']} and JAX {about['jax']}, this is JAX {jax.__version__}. If it is the same function all the "
        "same, check=False loads it"
    )
