"""Measure how sparse a network is while it trains, whatever its method holds: masks, or gates on channels."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsparse.counts import expected_counts
from jaxsparse.gates import prob_open
from jaxsparse.groups import Group
from jaxsparse.inspect.states import get_log_alpha, get_masks, links_or_none, open_channels
from jaxsparse.masks import density
from jaxsparse.transforms.protocols import HasGates, link_states
from jaxsparse.trees import as_array, by_path

__all__ = ["Measured", "current_masks", "measure"]


class Measured(NamedTuple):
    """How sparse a network is: scalars on the device.

    Attributes:
      density: the fraction of the weights of all sparse layers that their masks keep; with gates the fraction of the
        params that is left when closed channels are removed. 1 for a dense network.
      layer_density: the fraction that is kept of each sparse layer, by path; with gates of the channels of each group,
        by its name.
      flips: by the same names, how many entries of the mask, or channels, differ from ``before``; empty without it.
      remaining: "multiply_adds", the fraction of the multiply-adds that is left, where ``positions`` are given; with
        gates also "expected_params" and "expected_multiply_adds", by the probabilities that channels are open.
    """

    density: jax.Array
    layer_density: dict[str, jax.Array]
    flips: dict[str, jax.Array]
    remaining: dict[str, jax.Array]


def current_masks(opt_state: Any, params: Any) -> Any:
    """Masks like the params; with gates the open channels of each group, and all True for a dense network.

    Args:
      opt_state: any optimizer state, with sparse links in it or without.
      params: the params.

    Returns:
      As :func:`jaxsparse.get_masks`, or, if the state has gates, as :func:`jaxsparse.open_channels`.

    Raises:
      ValueError: as :func:`jaxsparse.get_masks`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.ones((4, 5))}
      >>> bool(current_masks(optax.sgd(0.1).init(params), params)["kernel"])
      True
    """
    if not links_or_none(opt_state, params):
        return jax.tree.map(lambda _: jnp.ones((), bool), params)
    return open_channels(opt_state) if _has_gates(opt_state) else get_masks(opt_state, params)


def measure(
    opt_state: Any,
    params: Any,
    positions: Mapping[str, float] | None = None,
    *,
    groups: Sequence[Group] | None = None,
    before: Any = None,
) -> Measured:
    """Measure density, density of the layers, flips, and the fraction of params and multiply-adds that remains.

    It asks the optimizer state alone, so a training loop need not know its method. Runs inside jit too.

    Args:
      opt_state: any optimizer state, with sparse links in it or without.
      params: the params.
      positions: for the kernels, by path, at how many places of an example they are applied, to count multiply-adds;
        see :meth:`jaxsparse.trace.MultiplyAdds.positions`. None leaves them out.
      groups: of a network with gates, the groups that its method was given.
      before: earlier masks, from :func:`current_masks`, to count flips against.

    Returns:
      A :class:`Measured`.

    Raises:
      ValueError: if there are gates in the state and no ``groups``, or ``positions`` of leaves that are not there;
        otherwise as :func:`jaxsparse.get_masks`.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxsparse
      >>> params = {"kernel": jnp.ones((4, 5)), "bias": jnp.zeros(5)}
      >>> tx = jaxsparse.chain(optax.sgd(0.1, momentum=0.9), jaxsparse.sparse_momentum(0.75, 100))
      >>> found = measure(tx.init(params), params)
      >>> print(found.density, {path: float(kept) for path, kept in found.layer_density.items()})
      0.25 {'kernel': 0.25}
    """
    leaves = {path: as_array(path, leaf) for path, leaf in by_path(params).items()}
    if unknown := sorted(set(positions or {}) - set(leaves)):
        raise ValueError(f"positions names {', '.join(unknown)}, which the params do not have")
    masks = {path: mask for path, mask in by_path(current_masks(opt_state, params)).items() if mask.ndim}
    of_layers = {path: density({path: mask}) for path, mask in masks.items()}
    earlier = {} if before is None else by_path(before)
    flips = {path: jnp.sum(mask != earlier[path]) for path, mask in masks.items() if path in earlier}
    if not _has_gates(opt_state):
        sizes = {path: leaf.size for path, leaf in leaves.items()}
        kept = {path: jnp.sum(masks[path], dtype=jnp.float32) for path in positions or () if path in masks}
        return Measured(density(masks), of_layers, flips, _multiply_adds(sizes | kept, sizes, positions))
    if groups is None:
        raise ValueError("there are gates in this optimizer state: groups says what is left without closed channels")
    chances = {name: prob_open(log_alpha) for name, log_alpha in get_log_alpha(opt_state).items()}
    left, adds = _shares(leaves, groups, masks, positions)
    expected, expected_adds = _shares(leaves, groups, chances, positions)
    later = {f"expected_{name}": share for name, share in ({"params": expected} | expected_adds).items()}
    return Measured(left, of_layers, flips, adds | later)


def _shares(
    leaves: Mapping[str, Any],
    groups: Sequence[Group],
    open_channels: Mapping[str, ArrayLike],
    positions: Mapping[str, float] | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The fraction of the params that is left, or expected to be, and that of the multiply-adds."""
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    kept = expected_counts(groups, shapes, open_channels)
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    return sum(kept.values()) / float(sum(sizes.values())), _multiply_adds(kept, sizes, positions)


def _multiply_adds(
    kept: Mapping[str, Any], sizes: Mapping[str, int], positions: Mapping[str, float] | None
) -> dict[str, jax.Array]:
    """The fraction of the multiply-adds that is left, by its name; nothing without positions."""
    if not positions:
        return {}
    # In floats: JAX takes no int above 2**31, and ResNet-50 has twice as many multiply-adds.
    adds, all_adds = (sum(float(n) * of[path] for path, n in positions.items()) for of in (kept, sizes))
    return {"multiply_adds": jnp.asarray(adds / all_adds, jnp.float32)}


def _has_gates(opt_state: Any) -> bool:
    return any(isinstance(link, HasGates) for link in link_states(opt_state))
