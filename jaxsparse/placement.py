"""Where arrays that belong to a leaf lie: on the leaf's devices, in its parts.

A method makes its state from the shapes of the params. On one device that is all there is to it. On a mesh, masks and
copies of weights have to be made as the weights lie: outside of jit so that no device holds them whole; inside, where a
mesh has explicit axes or in ``jax.shard_map``, so that JAX lets both meet in one operation.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def is_abstract(leaf: Any) -> bool:
    """Whether a leaf is a shape without values, as of ``jax.eval_shape``."""
    return isinstance(leaf, jax.ShapeDtypeStruct)


def sharding_of(leaf: Any) -> jax.sharding.Sharding | None:
    """The sharding to make an array of a leaf's shape with; None where there is nothing to say."""
    if isinstance(leaf, jax.core.Tracer):
        sharding = jax.typeof(leaf).sharding  # only what axes are explicit is known
        return sharding if any(sharding.spec) else None
    return getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None


def zeros(leaf: Any, shape: Sequence[int] | None = None) -> jax.Array:
    """Zeros of a leaf's dtype that lie as it does.

    Args:
      leaf: an array, or a ``jax.ShapeDtypeStruct``.
      shape: the leaf's, perhaps with axes of length 1, which are then whole on every device; None: the leaf's.
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
    """A copy of a leaf; of a shape without values itself, for there is nothing to copy."""
    return leaf if is_abstract(leaf) else jnp.array(leaf, copy=True)


def mask_like(mask: Any, leaf: Any) -> jax.Array:
    """A bool array of a leaf's shape, so placed that it can meet the leaf."""
    if isinstance(leaf, jax.core.Tracer) or isinstance(mask, jax.core.Tracer):
        return mask & jnp.ones_like(leaf, bool)
    sharding = sharding_of(leaf)
    return mask if sharding is None else jax.device_put(mask, sharding)


def placed_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """An array in the parts of another of its shape, where a mesh has explicit axes."""
    came, wanted = jax.typeof(x).sharding, jax.typeof(like).sharding
    if not any(came.spec) and not any(wanted.spec):
        return x
    # An array that was given without a mesh is whole on all devices of the other's.
    return jax.sharding.reshard(x, came.update(spec=wanted.spec) if wanted.mesh.empty else wanted)


def varying_like(x: Any, tree: Any) -> Any:
    """Arrays that vary over the devices of a ``jax.shard_map`` at least as the leaves of a tree do."""
    if not _in_shard_map():
        return x
    axes = frozenset().union(*map(_axes, jax.tree.leaves(tree)))
    return jax.tree.map(lambda leaf: _varying(leaf, axes), x)


def steady(compute: Callable[[Any], Any], old: Any) -> tuple[Callable[[Any], Any], Any]:
    """A function and its argument, such that it returns what varies over devices as the argument does.

    A loop in a ``jax.shard_map`` asks for it, and not every state does: masks made from a key alone are equal on all
    devices until they follow from params that are not.
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
    """Whether this is traced in a shard_map that keeps count of what varies over its devices (``check_vma``)."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return bool(manual) and bool(_axes(jax.lax.pcast(jnp.zeros(()), tuple(manual), to="varying")))


def _axes(x: Any) -> frozenset[str]:
    """The axes over which an array varies from device to device."""
    return jax.typeof(x).manual_axis_type.varying


def _varying(x: Any, axes: frozenset[str]) -> Any:
    return jax.lax.pcast(x, tuple(sorted(axes - _axes(x))), to="varying")
