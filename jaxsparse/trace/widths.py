"""Widths of smaller models, rounded up to multiples by channels that stay although they are closed."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxsparse.groups import Group, entries
from jaxsparse.trees import listed
from jaxsparse.user_warnings import warn

__all__ = ["rounded"]

Place = tuple[str, int]  # a leaf and an axis


def rounded(
    groups: tuple[Group, ...], shut: Mapping[str, np.ndarray], leaves: Mapping[str, Any], multiple_of: int
) -> dict[str, np.ndarray]:
    """The closed channels, fewer of them so that widths are multiples; a warning for leaves where they are not.

    Args:
      groups: the groups of channels.
      shut: name of a group -> (size,), bool: its closed channels.
      leaves: the params, by path. Of closed channels those with the largest norm stay.
      multiple_of: of this, the size of each axis that loses entries, times those of the axes after it, is a multiple.
    """
    orders = {group.name: _best_first(group, shut[group.name], leaves) for group in groups if shut[group.name].any()}
    ranks = _ranks(groups, orders, shut, leaves)
    reopened = dict.fromkeys(orders, 0)  # how many of the closed channels stay

    def fits(name: str) -> dict[Place, np.ndarray]:
        numbers = np.arange(len(orders[name]) + 1)  # never fewer than stay by now, so that this ends
        sizes = _sizes(name, len(numbers), ranks, reopened, leaves)
        return {place: (numbers >= reopened[name]) & (size % multiple_of == 0) for place, size in sizes.items()}

    waiting = list(orders)
    while True:
        before = dict(reopened)
        for name in orders:
            if (all_fit := np.all([*fits(name).values()], 0)).any():
                reopened[name] = int(all_fit.argmax())
        if reopened != before:  # others may fit now
            continue
        stuck = [name for name in waiting if not all(fit[reopened[name]] for fit in fits(name).values())]
        if not stuck:
            break
        name, found = stuck[0], fits(stuck[0])  # as many places as can be, first those where it is the only group
        waiting.remove(name)
        alone = [all({*ranks.get((p, i), ())} <= {name} for i in range(axis, leaves[p].ndim)) for p, axis in found]
        score = np.sum([fit * (1 + only * len(found)) for only, fit in zip(alone, found.values(), strict=True)], 0)
        reopened[name] = int(score.argmax()) if score.any() else len(orders[name])
    missed = [place for name in orders for place, fit in fits(name).items() if not fit[reopened[name]]]
    if missed:
        places = listed([f"axis {axis} of {path}" for path, axis in dict.fromkeys(missed)])
        warn(f"multiple_of={multiple_of} is missed along {places}: no closed channels were found that, kept, reach it")
    stay = {name: order[: reopened[name]] for name, order in orders.items()}
    return {name: vector & ~np.isin(np.arange(vector.size), stay.get(name, ())) for name, vector in shut.items()}


def _best_first(group: Group, shut: np.ndarray, leaves: Mapping[str, Any]) -> np.ndarray:
    """The closed channels of a group, those with the largest norm of all their slices first."""
    norms = np.zeros(shut.size)
    for which in group.removes:
        leaf = leaves[which.path]
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            axes, channels = entries(which, leaf.shape, shut.size)
            squares = np.square(np.abs(np.asarray(leaf)).astype(np.float64))
            along = squares.sum(tuple(i for i in range(leaf.ndim) if i not in axes))
            np.add.at(norms, channels[channels >= 0], along[channels >= 0])
    return np.argsort(np.where(shut, -norms, np.inf), kind="stable")[: shut.sum()]


def _ranks(groups, orders, shut, leaves) -> dict[Place, dict[str, np.ndarray]]:
    """Place -> name of a group -> how many channels it has to reopen, in their order, until each entry stays."""
    found: dict[Place, dict[str, np.ndarray]] = {}
    for group in (group for group in groups if group.name in orders):
        size, order = shut[group.name].size, orders[group.name]
        of_channels = np.zeros(size + 1, int)  # the last one is that of entries without a channel
        of_channels[order] = 1 + np.arange(len(order))
        for which in group.removes:
            axes, channels = entries(which, leaves[which.path].shape, size)
            rank = of_channels[channels].min(tuple(range(len(axes) - 1)))  # stacked layers have one width
            at = found.setdefault((which.path, axes[-1]), {})
            at[group.name] = np.maximum(at.get(group.name, 0), rank)
    return found


def _sizes(name, numbers, ranks, reopened, leaves) -> dict[Place, np.ndarray]:
    """Where a group removes -> the size of the axis times those after it, for every number of channels it reopens."""
    found = {}
    for path in {path: 0 for (path, _), of in ranks.items() if name in of}:
        size = np.ones(numbers, int)
        for axis in reversed(range(leaves[path].ndim)):
            of, stays = ranks.get((path, axis), {}), np.ones(leaves[path].shape[axis], bool)
            for other in of.keys() - {name}:
                stays &= of[other] <= reopened[other]
            own = of.get(name, np.zeros(len(stays), int))[stays]
            size = size * np.bincount(own, minlength=numbers).cumsum()
            if name in of:
                found[path, axis] = size
    return found
