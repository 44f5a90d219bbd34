"""Structured pruning after training: heads and hidden units go by their activations in calibration data."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.groups import Group, entries
from jaxsparse.post_training.samples import by_sample, checked_batches, each_batch
from jaxsparse.post_training.stacks import align_layers, check_interchangeable
from jaxsparse.trace.channels import ChannelGroups, channel_groups
from jaxsparse.trace.moments import Statistic
from jaxsparse.trace.record import record
from jaxsparse.trace.slim import Slim, slim
from jaxsparse.trees import listed, matching
from jaxsparse.user_warnings import warn

__all__ = ["Ranking", "channel_scores", "lowest_channels", "prune_channels"]

logger = logging.getLogger("jaxsparse")

Ranking: TypeAlias = Literal["layer", "stack", "global"]
Samples: TypeAlias = int | Sequence[int | None] | None


def prune_channels(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    shares: Mapping[str, float],
    *,
    groups: ChannelGroups | None = None,
    ranking: Ranking = "layer",
    samples: Samples = 0,
    opt_state: Any = None,
) -> Slim:
    """Remove a share of the heads and hidden units of any model for good, those with the smallest activations.

    It is :func:`channel_scores`, :func:`lowest_channels`, :func:`align_layers` and :func:`jaxsparse.trace.slim` in one
    call; train the result on, as by distillation from the model that it was. By default blocks keep equal widths, so
    a module with fewer heads and units takes ``small.params`` as they are, if the size of its heads is an option.

    Args:
      apply: ``apply(params, *args)``, any function that JAX can trace, in the mode for evaluation.
      params: its params.
      batches: calibration data, an iterable of the args after params: tuples, or single arrays. The first batch is
        also what the smaller function is traced with.
      shares: which share of the channels of each group to remove, in [0, 1), rounded down to whole channels. The keys
        are kinds of groups, ``"units"`` and ``"heads"`` (:attr:`jaxsparse.trace.ChannelGroups.kinds`), or names of
        groups and patterns of them; the first that fits a group holds. Other groups keep all.
      groups: those of :func:`jaxsparse.trace.channel_groups`; None: found here.
      ranking: see :func:`lowest_channels`.
      samples: see :func:`channel_scores`.
      opt_state: a state of an optimizer of these params, for training on with its momentum.

    Returns:
      A :class:`jaxsparse.trace.Slim`: ``apply``, ``params`` and ``opt_state``. It computes what ``apply`` computes with
      the slices of the removed channels at zero.

    Raises:
      ValueError: as the four functions do.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = {"up": jnp.ones((3, 4)) * jnp.array([[1.0, 4.0, 2.0, 3.0]]), "down": jnp.ones((4, 2))}
      >>> small = prune_channels(lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"], params, [jnp.ones((5, 3))],
      ...                        {"units": 0.5})
      >>> small.params["up"][0].tolist()
      [4.0, 3.0]

    References:
      Muralidharan et al., *Compact Language Models via Pruning and Knowledge Distillation* (Minitron), 2024.
    """
    batches = list(checked_batches(batches))
    if groups is None:
        (groups,) = each_batch(functools.partial(channel_groups, apply), params, batches[:1])
    scores = channel_scores(apply, params, batches, groups, list(_shares_of(groups, shares)), samples=samples)
    closed = lowest_channels(groups, scores, shares, ranking=ranking)
    aligned, alike, opt_state = align_layers(params, groups, closed, opt_state)
    if moved := [name for name in closed if closed[name].ndim == 2]:
        check_interchangeable(apply, params, aligned, batches[0], moved)
    return slim(apply, aligned, alike, *batches[0], groups=groups, opt_state=opt_state)


def channel_scores(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    groups: ChannelGroups,
    names: Sequence[str] | None = None,
    *,
    samples: Samples = 0,
) -> dict[str, np.ndarray]:
    r"""Score channels by the size of the activations that arrive at the products that read them, as Minitron does.

    An input j of a product, such as a hidden unit where the down projection reads it, has

    .. math:: F_j = \sqrt{\sum_b \Big( \frac{1}{T} \sum_{t=1}^T |x_{btj}| \Big)^2}

    over samples b and their places t. A channel that is several inputs of the product, as a head is at the output
    projection, has the root of the sum of their squares. The scores of several products are added up, such as those
    behind the norms that read a residual stream; products that read the same activations count once.

    Args:
      apply, params: as :func:`prune_channels` takes them.
      batches: an iterable of the args after params: tuples, or single arrays.
      groups: those of :func:`jaxsparse.trace.channel_groups`, for the same function.
      names: the groups to score; None: all that a product with a leaf reads.
      samples: the axis of the samples in the arrays of the args; or for each of the args its own, None for those that
        all samples share, such as keys and states. Each sample goes through the model by itself, as a batch of one.
        None: a whole batch counts as one sample.

    Returns:
      name of a group -> float64, (size,); (layers, size) for groups whose layers a scan stacks
      (:attr:`jaxsparse.trace.ChannelGroups.layers`).

    Raises:
      ValueError: for groups that no product with a leaf reads, batches that do not fit, args without an axis of
        samples, and activations that are not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxsparse import trace
      >>> params, x = {"up": jnp.eye(2), "down": jnp.ones((2, 1))}, jnp.array([[[3.0, 1], [3, -1]], [[4, 0], [4, 0]]])
      >>> apply = lambda p, x: (x @ p["up"]) @ p["down"]
      >>> channel_scores(apply, params, [x], trace.channel_groups(apply, params, x))["up"].tolist()
      [5.0, 1.0]

    References:
      Muralidharan et al., *Compact Language Models via Pruning and Knowledge Distillation*, 2024, section 2.2; the L2
      norm over samples of means over tokens, and over the dimensions of a head, as in NVIDIA's Model Optimizer,
      ``mcore_minitron.py`` at a2fbac7.
    """
    if names is None:
        names = [group.name for group in groups if groups.reads.get(group.name)]
    for name in names:
        if not groups.reads.get(groups[name].name):
            raise ValueError(
                f"the channels of {name!r} arrive at no product with a leaf, so their activations give no scores: "
                f"these do: {listed([other for other, reads in groups.reads.items() if reads])}"
            )
    paths = sorted({path for name in names for path, _ in groups.reads[name]})
    step, found = by_sample(_squares_of(apply, paths), params, samples), None
    for new in each_batch(step, params, batches):
        found = new if found is None else jax.tree.map(jnp.add, found, new)
    assert found is not None
    if lost := [path for path in paths if path not in found]:
        raise ValueError(f"nothing is known of what arrives at {listed(lost)}: see the warning")
    scores = {name: _score(groups[name], groups, found) for name in names}
    if odd := [name for name, score in scores.items() if not np.isfinite(score).all()]:
        raise ValueError(f"the activations of {listed(odd)} are not all finite: look for NaN in params and batches")
    return scores


def _squares_of(apply: Callable, paths: Sequence[str]) -> Callable:
    """The squares of the mean absolute activations of one sample, as the values of statistics."""

    def squares(params, *args):
        found = record(apply, params, *args, leaves=paths, statistic=lambda rows: jnp.abs(rows).sum(-2))
        return {path: dataclasses.replace(one, value=jnp.square(one.mean)) for path, one in found.items()}

    return squares


def _score(group: Group, groups: ChannelGroups, found: Mapping[str, Statistic]) -> np.ndarray:
    products: list[tuple[np.ndarray, np.ndarray]] = []  # the squares that arrive, and the scores
    for path, axis in groups.reads[group.name]:
        known, shape = found[path], groups.shapes[path]
        squares = np.asarray(known.value, np.float64)
        if axis not in known.inputs:
            raise ValueError(f"{path} is read along axis {axis}, which is not among its inputs {known.inputs}")
        squares = squares.reshape(*squares.shape[:-1], *(shape[i] for i in known.inputs))
        others = [len(known.leading) + i for i, one in enumerate(known.inputs) if one != axis]
        squares = squares.sum(tuple(others))
        score = np.zeros((*squares.shape[:-1], group.size or 0))
        for which in group.removes:
            if (which.path, which.axis) == (path, axis):
                _, channels = entries(which, shape, group.size or 0)
                for entry in np.flatnonzero(channels >= 0):
                    score[..., channels[entry]] += squares[..., entry]
        if any(a.shape == squares.shape and np.allclose(a, squares, rtol=1e-5, atol=0) for a, _ in products):
            continue  # the same activations, but for the rounding of sums in another order
        score = np.sqrt(score)
        stacked = group.name in groups.layers
        if known.leading and not stacked and group.name in groups.kinds:
            logger.info("%s: the layers or experts along axes %s of %s lose the same", group.name, known.leading, path)
        products.append((squares, score.sum(tuple(range(int(stacked), score.ndim - 1)))))
    return sum(score for _, score in products)  # type: ignore[return-value]


def lowest_channels(
    groups: ChannelGroups, scores: Mapping[str, Any], shares: Mapping[str, float], *, ranking: Ranking = "layer"
) -> dict[str, np.ndarray]:
    """Choose the channels with the lowest scores, a share of those of each group.

    Args:
      groups: those of :func:`jaxsparse.trace.channel_groups`.
      scores: name of a group -> (size,), or (layers, size) for layers that a scan stacks, as of
        :func:`channel_scores`; finite.
      shares: kind, name or pattern of names of groups -> share in [0, 1) of their channels to remove, rounded down; see
        :func:`prune_channels`.
      ranking: what channels are compared with. "layer": with those of the same group and the same layer, so equal
        groups keep equal widths. "stack": layers that a scan stacks lose the same channels, those with the lowest sums.
        "global": with those of all groups that the same key of ``shares`` names, after the mean of each group's scores
        is subtracted and the rest divided by their standard deviation, as FLAP does; each keeps one channel at least.
        Layers under one scan have one width, so this takes layers that are written out.

    Returns:
      name of a group -> True for channels to remove, for :func:`jaxsparse.trace.slim`: (size,), bool. For layers that a
      scan stacks, by layer, (layers, size), equally many in each; :func:`align_layers` makes one of them. Of equal
      scores the last go.

    Raises:
      ValueError: for keys that fit no group, shares outside of [0, 1), and shares that leave no channel of a group.

    Warns:
      UserWarning: for groups of which a share is less than one channel.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxsparse import trace
      >>> params = {"up": jnp.ones((2, 4)), "down": jnp.ones((4, 1))}
      >>> groups = trace.channel_groups(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, jnp.ones((1, 2)))
      >>> lowest_channels(groups, {"up": [2.0, 1.0, 3.0, 1.0]}, {"units": 0.5})["up"].tolist()
      [False, True, False, True]

    References:
      An et al., *Fluctuation-based Adaptive Structured Pruning for Large Language Models* (FLAP), 2024, for "global".
    """
    if ranking not in ("layer", "stack", "global"):
        raise ValueError(f'ranking must be "layer", "stack" or "global", got {ranking!r}')
    keys = _shares_of(groups, shares)
    values = {name: _checked(name, scores, groups) for name in keys}
    if ranking == "global":
        return _lowest_of_all(groups, keys, shares, values)
    closed = {}
    for name, key in keys.items():
        of_group = values[name].sum(0) if ranking == "stack" and values[name].ndim == 2 else values[name]
        size = of_group.shape[-1]
        count = _count(shares[key], size)
        if count == size:
            raise ValueError(f"a share of {shares[key]} leaves none of the {size} channels of {name!r}")
        if shares[key] and not count:
            _warn_of_none(shares[key], size, repr(name))
        order = np.argsort(-of_group, axis=-1, kind="stable")
        closed[name] = np.zeros(of_group.shape, bool)
        np.put_along_axis(closed[name], order[..., size - count :], True, -1)
    return closed


def _lowest_of_all(groups, keys, shares, values) -> dict[str, np.ndarray]:
    if stacked := [name for name in keys if name in groups.layers]:
        raise ValueError(
            f'ranking="global" gives layers different widths, and those of {listed(stacked)} are stacked in a scan: '
            'write the layers out, or rank by "layer"'
        )
    closed: dict[str, np.ndarray] = {}
    for key in dict.fromkeys(keys.values()):
        names = [name for name in keys if keys[name] == key]
        standard = [(values[name] - values[name].mean()) / max(values[name].std(), 1e-30) for name in names]
        best = [int(np.argmax(score)) for score in standard]
        for score, one in zip(standard, best, strict=True):
            score[one] = np.inf  # something must pass
        every = np.concatenate(standard)
        count = _count(shares[key], every.size)
        if count > every.size - len(names):
            raise ValueError(
                f"a share of {shares[key]} of {key!r} leaves none of the channels of one of {listed(names)}"
            )
        if shares[key] and not count:
            _warn_of_none(shares[key], every.size, listed(names))
        shut = np.zeros(every.size, bool)
        shut[np.argsort(-every, kind="stable")[every.size - count :]] = True
        closed |= dict(zip(names, np.split(shut, np.cumsum([score.size for score in standard])[:-1]), strict=True))
    return closed


def _warn_of_none(share: float, size: int, where: str) -> None:
    warn(f"a share of {share} of the {size} channels of {where} is less than one: all stay")


def _shares_of(groups: ChannelGroups, shares: Mapping[str, float]) -> dict[str, str]:
    """The key of the share of each group that has one."""
    names = [group.name for group in groups]
    found: dict[str, str] = {}
    for key, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise ValueError(f"shares[{key!r}] must be a number in [0, 1), got {share!r}")
        matched = [name for name in names if groups.kinds.get(name) == key] or matching(key, names)
        taken = [name for name in matched if name not in found]
        if not taken:
            kinds = listed(sorted(set(groups.kinds.values()))) or "none"
            why = "all that it names have a share by a key before it" if matched else "it names no group"
            raise ValueError(
                f"shares: {key!r} selects nothing, {why}; the kinds are {kinds}, the groups {listed(names)}"
            )
        logger.info("a share of %s, by %r, of the channels of %s", share, key, listed(taken))
        found |= dict.fromkeys(taken, key)
    if not found:
        raise ValueError("shares names no group of channels")
    return {name: found[name] for name in names if name in found}


def _count(share: float, size: int) -> int:
    """How many channels a share is, rounded down; 0.3 of 10 is 3 although 0.3 in binary is a little less."""
    return math.floor(share * size * (1 + 1e-9))


def _checked(name: str, scores: Mapping[str, Any], groups: ChannelGroups) -> np.ndarray:
    if name not in scores:
        raise ValueError(f"scores have nothing for group {name!r}, only {listed(list(scores))}")
    found, size = np.asarray(scores[name], np.float64), groups[name].size
    shape = (groups.layers[name], size) if name in groups.layers else (size,)
    if found.shape != shape or not np.isfinite(found).all():
        raise ValueError(f"scores of group {name!r} must be finite and of shape {shape}, got {found.shape}: {found}")
    return found
