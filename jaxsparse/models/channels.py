"""The channels of the library's models: their groups, and the model without those that are closed."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsparse.groups import Group, entries
from jaxsparse.models.lenet import LeNet5Caffe, LeNet300100
from jaxsparse.models.resnet import ResNet50, ResNetCIFAR
from jaxsparse.models.vgg import VGG, convolutions_and_hidden

__all__ = ["channel_groups", "reestimate_batch_stats", "slim"]

EPSILON = 1e-5  # of nn.BatchNorm


def channel_groups(model: nn.Module) -> tuple[Group, ...]:
    """The groups of channels of a model of the library, in network order.

    * :class:`LeNet300100`: the inputs of the three dense layers, "inputs" (the pixels), "fc1", "fc2".
    * :class:`LeNet5Caffe`: the filters "conv1", "conv2", then the inputs of the two dense layers, "inputs" and "fc1".
      Both as Louizos et al. (2018).
    * :class:`VGG`: the convolutions and hidden dense layers, by their batch normalisation.
    * :class:`ResNetCIFAR`, :class:`ResNet50`: "conv1", whose gates close channels for its reader but remove nothing
      (later blocks add to them), and the inner channels of the blocks, by their batch normalisation. As Li and Ji
      (2021).

    Args:
      model: the model; also one that :func:`slim` has made.

    Returns:
      The groups, for :func:`jaxsparse.l0`, :func:`jaxsparse.dep_l0` and :func:`jaxsparse.remaining`.

    Raises:
      ValueError: for another model.

    Examples:
      >>> from jaxsparse import models
      >>> [group.name for group in channel_groups(models.LeNet5Caffe())]
      ['conv1', 'conv2', 'inputs', 'fc1']
    """
    if isinstance(model, LeNet300100):
        return (
            Group("inputs", {"fc1/kernel": 0}, {"fc1/kernel": 0}),
            _units("fc1", "fc2"),
            _units("fc2", "fc3"),
        )
    if isinstance(model, LeNet5Caffe):
        rows: Any = 0 if model.inputs is None else (0, np.asarray(model.inputs) % model.features[1])
        return (
            _filters("conv1", {"conv2/kernel": 2}),
            _filters("conv2", {"fc1/kernel": rows}),
            Group("inputs", {"fc1/kernel": 0}, {"fc1/kernel": 0}),
            _units("fc1", "fc2"),
        )
    if isinstance(model, VGG):
        convolutions, hidden = convolutions_and_hidden(model.variant)
        names = [f"conv{i + 1}" for i in range(convolutions)] + [f"fc{i + 1}" for i in range(hidden + 1)]
        return tuple(
            _normalised(name, f"{name}/kernel", f"bn{i + 1}", {f"{reader}/kernel": -2}, bias=f"{name}/bias")
            for i, (name, reader) in enumerate(pairwise(names))
        )
    if isinstance(model, ResNetCIFAR | ResNet50):
        stem = Group("conv1", {"bn1/scale": 0, "bn1/bias": 0}, kernel="conv1/kernel")
        blocks = [(model.depth - 2) // 6] * 3 if isinstance(model, ResNetCIFAR) else (3, 4, 6, 3)
        names = [f"block{stage}_{i + 1}" for stage, times in enumerate(blocks, 1) for i in range(times)]
        inner = range(1, 2 if isinstance(model, ResNetCIFAR) else 3)
        return (
            stem,
            *(
                _normalised(
                    f"{name}/conv{i}", f"{name}/conv{i}/kernel", f"{name}/bn{i}", {f"{name}/conv{i + 1}/kernel": -2}
                )
                for name in names
                for i in inner
            ),
        )
    raise ValueError(
        f"there are groups for LeNet300100, LeNet5Caffe, VGG, ResNetCIFAR and ResNet50, got {type(model).__name__}: "
        "write them down with jaxsparse.Group. (jaxsparse.remaining then counts what is left; slim makes these models "
        "smaller and no others.)"
    )


def slim(model: nn.Module, params: Any, batch_stats: Any = None) -> tuple[nn.Module, Any, Any]:
    """The smaller model that computes the same, without the channels that do not matter, and its variables.

    A channel goes if nothing reads it, or if it is the same for every input: its filter is zero, or the scale of its
    batch normalisation, as where a gate is closed. What a constant other than zero adds to the next layer goes into
    the bias there, or, if that is a convolution (whose padding is no constant), into one channel that stays for all of
    them. This repeats until nothing changes, because removing a channel can make others removable in the layers before
    and after it. Each layer keeps one channel at least.

    So it does not matter what has closed the channels: gates (hand in :func:`jaxsparse.eval_params`, which folds the
    gates that are between 0 and 1 into the weights), dual averaging with ``structure="channel"``, or so many weights
    pruned one by one that a unit has none left.

    Args:
      model: a model that :func:`channel_groups` knows.
      params: its params.
      batch_stats: its batch statistics, None if it has none.

    Returns:
      The smaller model, its params and batch statistics. In evaluation its outputs differ by rounding alone; in
      training constant channels make no difference either, but see :func:`reestimate_batch_stats`.

    Raises:
      ValueError: for a model that :func:`channel_groups` does not know.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsparse import models
      >>> model = models.LeNet300100()
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
      >>> params["fc1"]["kernel"] = params["fc1"]["kernel"].at[200:].set(0)  # only these pixels are read
      >>> params["fc3"]["kernel"] = params["fc3"]["kernel"].at[30:].set(0)  # and only these units
      >>> small, params, _ = slim(model, params)
      >>> len(small.inputs), small.features, params["fc1"]["kernel"].shape
      (200, (300, 30), (200, 300))
    """
    leaves = {path: np.array(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    stats = {path: np.array(leaf) for path, leaf in flatten_dict(batch_stats or {}, sep="/").items()}
    names = [group.name for group in channel_groups(model) if group.removes]
    changed = True
    while changed:
        changed = False
        for name in names:
            (group,) = (group for group in channel_groups(model) if group.name == name)
            stays = _fold_constants(group, leaves, stats)
            if not stays.all():
                model = _narrowed(model, name, stays)
                _cut(group, stays, leaves, stats)
                changed = True
    to_arrays = jax.tree.map(jnp.asarray, (unflatten_dict(leaves, sep="/"), unflatten_dict(stats, sep="/")))
    return model, to_arrays[0], to_arrays[1] if batch_stats is not None else None


def reestimate_batch_stats(
    model: nn.Module,
    params: Any,
    batch_stats: Any,
    batches: Iterable[jax.Array],
    momentum: float = 0.9,
    **kwargs: Any,
) -> Any:
    """The running means and variances made anew, as the plain mean over batches.

    For a network whose channels, gates or masks have changed since its statistics were gathered: gates were random
    then, and are not when the network is evaluated.

    Args:
      model: the model.
      params: its params, those to evaluate with.
      batch_stats: its batch statistics, of which the structure is taken.
      batches: inputs of the model, a few hundred examples each, such as twenty batches of the train images.
      momentum: of the model's batch normalisation.
      **kwargs: what else the model is called with to gather statistics, such as ``train=True``.

    Returns:
      Batch statistics like ``batch_stats``.

    Raises:
      ValueError: if there are no batches, or the model gathers no statistics when it is called so.
    """
    # The batches are whole: no axis of devices is bound here.
    local = model.clone(axis_name=None) if getattr(model, "axis_name", None) else model

    @jax.jit
    def of_batch(images):
        start = jax.tree.map(jnp.zeros_like, batch_stats)  # of which (1 - momentum) times the batch's remains
        _, new = local.apply({"params": params, "batch_stats": start}, images, mutable=["batch_stats"], **kwargs)
        return jax.tree.map(lambda x: x / (1 - momentum), new["batch_stats"])

    total, number = None, 0
    for images in batches:
        found = of_batch(images)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        number += 1
    if total is None:
        raise ValueError("reestimate_batch_stats needs one batch at least")
    if not any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(total)):
        raise ValueError(
            "the model gathered no statistics: call it as in training, reestimate_batch_stats(..., train=True) or what "
            "its argument is"
        )
    return jax.tree.map(lambda x: x / number, total)


def _units(name: str, reader: str) -> Group:
    """The units of a dense layer, gated where the next one reads them."""
    return Group(name, {f"{reader}/kernel": 0}, {f"{name}/kernel": -1, f"{name}/bias": 0, f"{reader}/kernel": 0})


def _filters(name: str, reader: dict[str, Any]) -> Group:
    """The filters of a convolution without batch normalisation."""
    return Group(
        name,
        {f"{name}/kernel": -1, f"{name}/bias": 0},
        {f"{name}/kernel": -1, f"{name}/bias": 0, **reader},
    )


def _normalised(name: str, kernel: str, norm: str, reader: dict[str, int], bias: str | None = None) -> Group:
    """The outputs of a layer behind which is batch normalisation."""
    own = {kernel: -1} | ({bias: 0} if bias else {})
    return Group(
        name,
        {f"{norm}/scale": 0, f"{norm}/bias": 0},
        {**own, f"{norm}/scale": 0, f"{norm}/bias": 0, **reader},
        kernel,
    )


def _parts(group: Group, leaves: dict[str, np.ndarray]) -> tuple[str | None, str | None, str | None, str]:
    """The paths of the kernel that makes a group's channels, its bias, the normalisation, the kernel that reads."""
    *own, reader = group.removes
    kernel = next((path for path in own if leaves[path].ndim > 1), None)
    norm = next((path.removesuffix("/scale") for path in own if path.endswith("/scale")), None)
    bias = kernel and f"{kernel.removesuffix('/kernel')}/bias"
    return kernel, bias if bias in own else None, norm, reader


def _fold_constants(group: Group, leaves: dict[str, np.ndarray], stats: dict[str, np.ndarray]) -> np.ndarray:
    """Which channels of a group stay, bool; what the others add to the next layer is in ``leaves`` afterwards."""
    kernel, bias, norm, reader = _parts(group, leaves)
    size = leaves[next(iter(group.multiplies))].shape[next(iter(group.multiplies.values()))]
    axis, channels = entries(group, reader, leaves[reader].shape, size)
    others = tuple(i for i in range(leaves[reader].ndim) if i != axis)
    read = np.bincount(channels, (leaves[reader] != 0).any(others), minlength=size) > 0
    if kernel is None:  # inputs
        return _at_least_one(read)
    if not read.any():  # nor is the one that stays
        leaves[kernel][..., 0] = 0
    made = (leaves[kernel] != 0).any(tuple(range(leaves[kernel].ndim - 1)))
    value = np.zeros(size, np.float32)  # of the channels that are made of nothing
    if bias:
        value = value + leaves[bias]  # in float32 at least
    behind_relu = group.name.startswith("fc")  # where VGG's hidden dense layers have their normalisation
    if norm is None or behind_relu:
        value = np.maximum(value, 0)
    if norm is not None:
        scale, shift = leaves[f"{norm}/scale"], leaves[f"{norm}/bias"]
        made &= scale != 0
        mean, variance = (stats[f"{norm}/{name}"].astype(value.dtype) for name in ("mean", "var"))
        normal = (value - mean) / np.sqrt(variance + EPSILON)
        value = np.where(scale != 0, normal * scale, 0) + shift
        if not behind_relu:
            value = np.maximum(value, 0)
    constant = read & ~made & (value != 0)
    stays = read & made
    next_bias = f"{reader.removesuffix('/kernel')}/bias"
    if leaves[reader].ndim == 2 and next_bias in leaves:
        rows = np.where(constant, value, 0)[channels].astype(np.float64)
        added = rows @ leaves[reader].astype(np.float64)
        leaves[next_bias] = (leaves[next_bias] + added).astype(leaves[next_bias].dtype)
        leaves[reader][constant[channels]] = 0
    elif constant.sum() > 1:
        carrier = int(np.flatnonzero(constant)[0])
        # A channel that is 1 everywhere, read with the sum of what is read of them all.
        weights = np.moveaxis(leaves[reader], axis, -1)
        weights = weights.copy()
        weights[..., carrier] = weights[..., constant] @ value[constant]
        leaves[reader] = np.moveaxis(weights, -1, axis)
        leaves[kernel][..., carrier] = 0
        if bias:
            leaves[bias][carrier] = 0 if norm else 1
        if norm:
            leaves[f"{norm}/scale"][carrier], leaves[f"{norm}/bias"][carrier] = 0, 1
        stays[carrier] = True
    else:
        stays |= constant
    return _at_least_one(stays)


def _at_least_one(stays: np.ndarray) -> np.ndarray:
    if not stays.any():
        stays = stays.copy()
        stays[0] = True
    return stays


def _cut(group: Group, stays: np.ndarray, leaves: dict[str, np.ndarray], stats: dict[str, np.ndarray]) -> None:
    for path in group.removes:
        axis, channels = entries(group, path, leaves[path].shape, stays.size)
        leaves[path] = np.compress(stays[channels], leaves[path], axis)
        if path.endswith("/scale"):
            for name in ("mean", "var"):
                statistic = path.removesuffix("scale") + name
                stats[statistic] = stats[statistic][stays]


def _narrowed(model: nn.Module, name: str, stays: np.ndarray) -> nn.Module:
    """The model with those channels of a group that stay."""
    kept = np.flatnonzero(stays)
    if isinstance(model, LeNet300100 | LeNet5Caffe):
        if name == "inputs":
            inputs = np.arange(stays.size) if model.inputs is None else np.asarray(model.inputs)
            return model.clone(inputs=tuple(inputs[kept].tolist()))
        number = ["fc1", "fc2"].index(name) if isinstance(model, LeNet300100) else ["conv1", "conv2", "fc1"].index(name)
        if isinstance(model, LeNet5Caffe) and name == "conv2" and model.inputs is not None:
            place, channel = np.divmod(np.asarray(model.inputs), stays.size)
            there = stays[channel]
            renumbered = np.cumsum(stays) - 1
            inputs = place[there] * kept.size + renumbered[channel[there]]
            model = model.clone(inputs=tuple(inputs.tolist()))
        return model.clone(features=_replaced(model.features, number, kept.size))
    groups = [group.name for group in channel_groups(model)]
    if isinstance(model, VGG):
        return model.clone(features=_replaced(model.widths(), groups.index(name), kept.size), width=1.0)
    assert isinstance(model, ResNetCIFAR | ResNet50)
    return model.clone(inner=_replaced(model.inner_widths(), groups.index(name) - 1, kept.size))


def _replaced(numbers: Sequence[int], index: int, number: int) -> tuple[int, ...]:
    return (*numbers[:index], number, *numbers[index + 1 :])
