"""Layers that a scan stacks: channels that each layer closes for itself, put at the same places in all of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.groups import Group, entries
from jaxsparse.post_training.samples import arrays_of
from jaxsparse.trace.channels import ChannelGroups
from jaxsparse.trace.program import opened
from jaxsparse.trace.states import cut_params, cut_state
from jaxsparse.transforms.gated import GatedState
from jaxsparse.trees import listed

__all__ = ["align_layers", "check_interchangeable"]

Place = tuple[str, int]  # a leaf and an axis of it


def align_layers(
    params: Any, groups: ChannelGroups, closed: Mapping[str, Any], opt_state: Any = None
) -> tuple[Any, dict[str, np.ndarray], Any]:
    """Put the channels that each layer of a stack closes at the same places in all layers.

    Layers under one scan have one width, and :func:`jaxsparse.trace.slim` removes the same places from all. So the
    channels of each layer are put in another order here, those that stay first. This changes nothing that the model
    computes as long as its channels are interchangeable, as hidden units and heads mostly are. They are not where
    each has a constant of its own, such as the slopes of ALiBi: :func:`prune_channels` checks it with numbers.

    Args:
      params: the params, or their shapes.
      groups: those of :func:`jaxsparse.trace.channel_groups`.
      closed: name of a group -> bool, True for channels to remove: (layers, size), equally many in each layer; those of
        (size,) are handed on.
      opt_state: a state of an optimizer of these params; None: there is none.

    Returns:
      (params, closed, opt_state), where closed has (size,) for every group, as slim takes it. Params and state are
      those given if no group has layers of its own.

    Raises:
      ValueError: for numbers of closed channels that differ from layer to layer, for other shapes, and for a state with
        gates.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsparse import trace
      >>> params = {"up": jnp.arange(6.0).reshape(2, 1, 3), "down": jnp.ones((2, 3, 1))}
      >>> apply = lambda p, x: jax.lax.scan(lambda x, p: (jnp.tanh(x @ p["up"]) @ p["down"], None), x, p)[0]
      >>> groups = trace.channel_groups(apply, params, jnp.ones((4, 1)))
      >>> params, closed, _ = align_layers(params, groups, {"up": [[True, False, False], [False, False, True]]})
      >>> params["up"][:, 0].tolist(), closed["up"].tolist()
      ([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0]], [False, False, True])
    """
    alike, found = params, dict[str, np.ndarray]()
    for name, given in closed.items():
        shut, group = np.asarray(given), groups[name]
        if shut.ndim != 2:
            found[name] = shut
            continue
        stacked = groups.layers.get(name)
        if stacked is None or shut.shape != (stacked, group.size) or shut.dtype != bool:
            raise ValueError(
                f"closed must have bools of shape ({'' if stacked is None else f'{stacked}, '}{group.size}) for group "
                f"{name!r}, got {shut.dtype} of shape {shut.shape}"
            )
        counts = shut.sum(1)
        if (counts != counts[0]).any():
            raise ValueError(f"all layers of group {name!r} must close equally many channels, got {counts.tolist()}")
        order = _orders(group, np.argsort(shut, axis=1, kind="stable"), groups.shapes)
        if opt_state is not None:
            if any(isinstance(node, GatedState) for node in jax.tree.leaves(opt_state, is_leaf=_is_gated)):
                raise ValueError(
                    "the optimizer's state has gates, which cannot change places: give the state of the optimizer "
                    "inside, opt_state.inner_state, with the params to evaluate with"
                )
            opt_state = cut_state(opt_state, alike, order, {})
        alike = cut_params(alike, order)
        found[name] = np.arange(group.size) >= group.size - counts[0]
    return alike, found, opt_state


def _is_gated(node: Any) -> bool:
    return isinstance(node, GatedState)


def _orders(group: Group, order: np.ndarray, shapes: Mapping[str, tuple[int, ...]]) -> dict[Place, np.ndarray]:
    """(path, axis) -> the entries in the order of the channels, (layers, size), for each layer."""
    found: dict[Place, np.ndarray] = {}
    for which in group.removes:
        (axis,), channels = entries(which, shapes[which.path], order.shape[1])
        places = np.argsort(channels, kind="stable")[(channels < 0).sum() :].reshape(order.shape[1], -1)
        new = found.setdefault((which.path, axis), np.tile(np.arange(channels.size), (len(order), 1)))
        new[:, places.ravel()] = places[order].reshape(len(order), -1)
    return found


def check_interchangeable(apply: Any, params: Any, aligned: Any, args: tuple[Any, ...], names: Sequence[str]) -> None:
    """Check that params whose channels have other places give the same outputs.

    Args:
      apply: the function.
      params, aligned: its params before and after.
      args: its other arguments.
      names: the groups of channels, for the error.

    Raises:
      ValueError: if the outputs differ by more than rounding, in the norm of all of them.
    """
    (arrays, put), (given, put_args) = arrays_of(params), arrays_of(args)

    def outputs(arrays, given):
        ys = jax.tree.leaves(apply(put(arrays), *put_args(given)))
        return [jnp.asarray(y) for y in ys if jnp.issubdtype(jnp.result_type(y), jnp.floating)]

    @jax.jit
    def norms(arrays, moved, given):
        pairs = [
            [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in pair]
            for pair in zip(outputs(arrays, given), outputs(moved, given), strict=True)
        ]
        # What a model masks may be infinite in both.
        size = sum(jnp.sum(jnp.where(jnp.isfinite(y), y, 0) ** 2) for y, _ in pairs)
        error = sum(jnp.sum(jnp.where(y == z, 0, y - z) ** 2) for y, z in pairs)
        return jnp.sqrt(size), jnp.sqrt(error)

    coarsest = _coarsest(jax.make_jaxpr(outputs)(arrays, given))
    norm, error = map(float, norms(arrays, arrays_of(aligned)[0], given))
    if not error <= max(1e-4, 4 * coarsest) * norm:
        raise ValueError(
            f"not all channels of {listed(names)} are interchangeable: with those of each layer in another order the "
            f'outputs differ by {error / max(norm, 1e-30):.1e} of their norm. Give ranking="stack", by which all '
            "layers lose the same channels, or write the layers out"
        )


def _coarsest(jaxpr: Any) -> float:
    """The largest rounding of the floats that a program computes with."""
    jaxpr, _ = opened(jaxpr)
    found = [float(jnp.finfo(jnp.float32).eps)]
    for eqn in jaxpr.eqns:
        dtypes = [v.aval.dtype for v in eqn.outvars if hasattr(v.aval, "dtype")]
        found += [float(jnp.finfo(dtype).eps) for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
        for value in eqn.params.values():
            inner = value if isinstance(value, list | tuple) else [value]
            found += [_coarsest(one) for one in inner if hasattr(opened(one)[0], "eqns")]
    return max(found)
