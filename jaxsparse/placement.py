"""Placement of arrays that belong to a leaf: on the leaf's devices, with its sharding.

A method makes its state from the shapes of the params, and on one device nothing more is needed. On a mesh, masks and
copies of weights have to be made with the sharding of the weights: outside of jit, so that no device holds them whole;
inside of jit with explicit mesh axes, or in ``jax.shard_map``, because JAX refuses operations on mixed shardings.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def is_abstract(leaf: Any) -> bool:
    """Whether a leaf is a shape without values, as from ``jax.eval_shape``."""
    return isinstance(leaf, jax.ShapeDtypeStruct)


def sharding_of(leaf: Any) -> jax.sharding.Sharding | None:
    """The sharding for new arrays of a leaf's shape; None if any will do."""
    if isinstance(leaf, jax.core.Tracer):
        sharding = jax.typeof(leaf).sharding  # under jit, only explicit axes are known
        return sharding if any(sharding.spec) else None
    return getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None


def lies_anywhere(x: jax.Array) -> bool:
    """Whether the type of an array says nothing of devices: of a mesh with explicit axes, or a ``shard_map``."""
    kind = jax.typeof(x)
    varying = getattr(getattr(kind, "manual_axis_type", None), "varying", None)
    return not (any(kind.sharding.spec) or varying)


def zeros(leaf: Any, shape: Sequence[int] | None = None) -> jax.Array:
    """Zeros with a leaf's dtype and placement.

    Args:
      leaf: an array, or a ``jax.ShapeDtypeStruct``.
      shape: the leaf's shape, in which some axes may have length 1, which are not sharded; None: the leaf's shape.
    """
    if shape is None or tuple(shape) == leaf.shape:
        return jnp.zeros_like(leaf)
    sharding = sharding_of(leaf)
    if isinstance(sharding, NamedSharding):
        spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
        kept = [axis if n == full else None for axis, n, full in zip(spec, shape, leaf.shape, strict=True)]
        sharding = sharding.update(spec=PartitionSpec(*kept))
    return jax.lax.full_like(leaf, 0, shape=tuple(shape), sharding=sharding)


def copied(leaf: Any) -> Any:
    """A copy of a leaf; a shape without values is returned as it is."""
    return leaf if is_abstract(leaf) else jnp.array(leaf, copy=True)


def of_shapes_too(init: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """An ``init`` that makes shapes of a state from shapes of params, for one that computes with their values."""

    def made(params):
        return jax.eval_shape(init, params) if any(map(is_abstract, jax.tree.leaves(params))) else init(params)

    return made


def mask_like(mask: Any, leaf: Any) -> jax.Array:
    """A mask placed like a leaf, so that one operation can take both."""
    if isinstance(leaf, jax.core.Tracer) or isinstance(mask, jax.core.Tracer):
        return mask & jnp.ones_like(leaf, bool)
    sharding = sharding_of(leaf)
    return mask if sharding is None else jax.device_put(mask, sharding)


def placed_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """An array with the sharding of another of the same shape, if a mesh has explicit axes."""
    came, wanted = jax.typeof(x).sharding, jax.typeof(like).sharding
    if not any(came.spec) and not any(wanted.spec):
        return x
    # An array without a mesh is replicated on the devices of the other's.
    return jax.sharding.reshard(x, came.update(spec=wanted.spec) if wanted.mesh.empty else wanted)


def gathered(x: jax.Array) -> jax.Array:
    """An array whole on every device, if a mesh has explicit axes: for what JAX does not do on sharded axes."""
    sharding = jax.typeof(x).sharding
    return jax.sharding.reshard(x, sharding.update(spec=PartitionSpec())) if any(sharding.spec) else x


def varying_like(x: Any, tree: Any) -> Any:
    """Arrays marked as varying over the axes of a ``jax.shard_map`` over which leaves of a tree vary, and their own."""
    if not _in_shard_map():
        return x
    axes = frozenset().union(*map(_axes, jax.tree.leaves(tree)))
    return jax.tree.map(lambda leaf: _varying(leaf, axes), x)


def steady(compute: Callable[[Any], Any], old: Any) -> tuple[Callable[[Any], Any], Any]:
    """Make a function and its argument vary over the same axes of a ``jax.shard_map``, as a loop in it requires.

    Not every state does: masks made from a key alone are equal on all devices until they depend on params that are not.
    """
    if not _in_shard_map():
        return compute, old
    while True:
        new = jax.eval_shape(compute, old)
        wider = jax.tree.map(lambda n, o: _varying(o, _axes(n)), new, old)
        if list(map(_axes, jax.tree.leaves(wider))) == list(map(_axes, jax.tree.leaves(old))):
            break
        old = wider

    def computed(old):
        return jax.tree.map(lambda n, o: _varying(n, _axes(o)), compute(old), old)

    return computed, old


def _in_shard_map() -> bool:
    """Whether this is traced in a shard_map that tracks which arrays vary over its devices (``check_vma``)."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return bool(manual) and bool(_axes(jax.lax.pcast(jnp.zeros(()), tuple(manual), to="varying")))


def _axes(x: Any) -> frozenset[str]:
    """The axes over which an array varies from device to device."""
    return jax.typeof(x).manual_axis_type.varying


def _varying(x: Any, axes: frozenset[str]) -> Any:
    return jax.lax.pcast(x, tuple(sorted(axes - _axes(x))), to="varying")
