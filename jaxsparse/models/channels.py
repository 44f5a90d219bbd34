"""Channel groups of the library's models, and smaller models without the closed channels."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsparse.groups import Group, entries
from jaxsparse.models.lenet import LeNet5Caffe, LeNet300100
from jaxsparse.models.resnet import ResNet8, ResNet50, ResNetCIFAR
from jaxsparse.models.vgg import VGG, convolutions_and_hidden
from jaxsparse.trees import listed

__all__ = ["channel_groups", "slim"]

EPSILON = 1e-5  # as in nn.BatchNorm, for models that do not say


def channel_groups(model: nn.Module) -> tuple[Group, ...]:
    """The channel groups of a model of this library, in network order.

    * :class:`LeNet300100`: the inputs of the three dense layers, "inputs" (the pixels), "fc1", "fc2".
    * :class:`LeNet5Caffe`: the filters "conv1", "conv2", then the inputs of the two dense layers, "inputs" and "fc1".
      Both as in Louizos et al. (2018).
    * :class:`VGG`: the convolutions and hidden dense layers, gated at their batch normalisation.
    * :class:`ResNet8`, :class:`ResNetCIFAR`, :class:`ResNet50`: "conv1", whose gates close channels for the next layer
      but remove nothing (later blocks add to them), and the inner channels of the blocks, gated at their batch
      normalisation. As in Li and Ji (2021).

    Args:
      model: the model; :func:`slim` may have made it.

    Returns:
      The groups, for :func:`jaxsparse.l0`, :func:`jaxsparse.dep_l0` and :func:`jaxsparse.remaining`.

    Raises:
      ValueError: for a model of another class, and one without its batch normalisation.

    Examples:
      >>> from jaxsparse import models
      >>> [group.name for group in channel_groups(models.LeNet5Caffe())]
      ['conv1', 'conv2', 'inputs', 'fc1']
    """
    if not getattr(model, "batch_norm", True):
        raise ValueError(
            f"the channels of a {type(model).__name__} are gated at its batch normalisation, which this one lacks: "
            "take the model before fold_batch_norm, and fold after slim"
        )
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
    if isinstance(model, ResNet8 | ResNetCIFAR | ResNet50):
        stem = Group("conv1", {"bn1/scale": 0, "bn1/bias": 0}, kernel="conv1/kernel")
        depth = 8 if isinstance(model, ResNet8) else getattr(model, "depth", None)
        blocks = (3, 4, 6, 3) if depth is None else [(depth - 2) // 6] * 3
        names = [f"block{stage}_{i + 1}" for stage, times in enumerate(blocks, 1) for i in range(times)]
        inner = range(1, 3 if depth is None else 2)
        biases = isinstance(model, ResNet8)
        return (
            stem,
            *(
                _normalised(
                    f"{name}/conv{i}",
                    f"{name}/conv{i}/kernel",
                    f"{name}/bn{i}",
                    {f"{name}/conv{i + 1}/kernel": -2},
                    bias=f"{name}/conv{i}/bias" if biases else None,
                )
                for name in names
                for i in inner
            ),
        )
    raise ValueError(
        "there are groups for LeNet300100, LeNet5Caffe, VGG, ResNet8, ResNetCIFAR and ResNet50, got "
        f"{type(model).__name__}: for any other model jaxsparse.trace.channel_groups finds them in its program, and "
        "jaxsparse.trace.slim removes channels"
    )


def slim(model: nn.Module, params: Any, batch_stats: Any = None) -> tuple[nn.Module, Any, Any]:
    """Remove all channels that have no effect, and return the smaller model with its variables.

    The smaller model computes the same. A channel is removed if it is unused, or if it is constant, because its filter
    or the scale of its batch normalisation is zero, as with a closed gate. The contribution of nonzero constants to the
    next layer is added to the bias there, or, if that layer is a convolution (whose padding is not constant), to one
    channel that stays for all of them. This repeats until nothing changes, because removing a channel can make others
    removable in the layers before and after it. Each layer keeps at least one channel.

    Channels may have been closed by any method: by gates (pass :func:`jaxsparse.eval_params`, which multiplies gates
    between 0 and 1 into the weights), by dual averaging with ``structure="channel"``, or because all weights of a unit
    were pruned one by one.

    Args:
      model: a model that :func:`channel_groups` supports.
      params: its params.
      batch_stats: its batch statistics, None if it has none.

    Returns:
      The smaller model, its params and batch statistics. In evaluation, outputs differ only by rounding. Constant
      channels make no difference in training either, but see :func:`jaxsparse.models.reestimate_batch_stats`.

    Raises:
      ValueError: for a model that :func:`channel_groups` does not support, and params or batch statistics of another.

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
    groups = [group for group in channel_groups(model) if group.removes]
    names = [group.name for group in groups]
    _check_variables(model, groups, leaves, stats)
    changed = True
    while changed:
        changed = False
        for name in names:
            (group,) = (group for group in channel_groups(model) if group.name == name)
            stays = _fold_constants(group, leaves, stats, getattr(model, "epsilon", EPSILON))
            if not stays.all():
                model = _narrowed(model, name, stays)
                _cut(group, stays, leaves, stats)
                changed = True
    to_arrays = jax.tree.map(jnp.asarray, (unflatten_dict(leaves, sep="/"), unflatten_dict(stats, sep="/")))
    return model, to_arrays[0], to_arrays[1] if batch_stats is not None else None


def _check_variables(
    model: nn.Module, groups: Sequence[Group], leaves: Mapping[str, Any], stats: Mapping[str, Any]
) -> None:
    """Raises a ValueError for a leaf that groups name and that is not there."""
    paths = dict.fromkeys(which.path for group in groups for which in (*group.multiplies, *group.removes))
    norms = [path.removesuffix("/scale") for path in paths if path.endswith("/scale")]
    for what, there, needed in (
        ("params", leaves, paths),
        ("batch_stats", stats, [f"{norm}/{name}" for norm in norms for name in ("mean", "var")]),
    ):
        if missing := [path for path in needed if path not in there]:
            raise ValueError(f"the {what} of this {type(model).__name__} must have {listed(missing)}")


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
    """The outputs of a layer that is followed by batch normalisation."""
    own = {kernel: -1} | ({bias: 0} if bias else {})
    return Group(
        name,
        {f"{norm}/scale": 0, f"{norm}/bias": 0},
        {**own, f"{norm}/scale": 0, f"{norm}/bias": 0, **reader},
        kernel,
    )


def _parts(group: Group, leaves: dict[str, np.ndarray]) -> tuple[str | None, str | None, str | None, str]:
    """Paths of the kernel that makes a group's channels, its bias, its normalisation, and the next layer's kernel."""
    *own, reader = (which.path for which in group.removes)
    kernel = next((path for path in own if leaves[path].ndim > 1), None)
    norm = next((path.removesuffix("/scale") for path in own if path.endswith("/scale")), None)
    bias = kernel and f"{kernel.removesuffix('/kernel')}/bias"
    return kernel, bias if bias in own else None, norm, reader


def _fold_constants(
    group: Group, leaves: dict[str, np.ndarray], stats: dict[str, np.ndarray], epsilon: float
) -> np.ndarray:
    """Fold constant channels of a group into the next layer, in ``leaves``; returns which channels stay, bool."""
    kernel, bias, norm, reader = _parts(group, leaves)
    path, axis, _ = group.multiplies[0]
    size = np.shape(np.moveaxis(leaves[path], axis, 0))[0]
    (axis,), channels = entries(group.removes[-1], leaves[reader].shape, size)
    others = tuple(i for i in range(leaves[reader].ndim) if i != axis)
    read = np.bincount(channels, (leaves[reader] != 0).any(others), minlength=size) > 0
    if kernel is None:  # inputs
        return _at_least_one(read)
    if not read.any():  # one stays, but is not read either
        leaves[kernel][..., 0] = 0
    made = (leaves[kernel] != 0).any(tuple(range(leaves[kernel].ndim - 1)))
    value = np.zeros(size, np.float32)  # of channels without weights
    if bias:
        value = value + leaves[bias]  # in float32 at least
    behind_relu = group.name.startswith("fc")  # the position of normalisation in VGG's hidden dense layers
    if norm is None or behind_relu:
        value = np.maximum(value, 0)
    if norm is not None:
        scale, shift = leaves[f"{norm}/scale"], leaves[f"{norm}/bias"]
        made &= scale != 0
        mean, variance = (stats[f"{norm}/{name}"].astype(value.dtype) for name in ("mean", "var"))
        normal = (value - mean) / np.sqrt(variance + epsilon)
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
        # A channel that is 1 everywhere, whose weights are the sum of what the next layer gets from all of them.
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
    for which in group.removes:
        path = which.path
        (axis,), channels = entries(which, leaves[path].shape, stays.size)
        leaves[path] = np.compress(stays[channels], leaves[path], axis)
        if path.endswith("/scale"):
            for name in ("mean", "var"):
                statistic = path.removesuffix("scale") + name
                stats[statistic] = stats[statistic][stays]


def narrowed(model: nn.Module, stays: Mapping[str, np.ndarray]) -> nn.Module:
    """Make a model with fewer channels.

    Args:
      model: a model that :func:`channel_groups` supports.
      stays: name of a group -> (size,), bool: which of its channels stay, for the groups that lose some.

    Returns:
      The model, whose params are those of ``model`` without what the groups remove.
    """
    for name in sorted(stays, key=lambda name: name != "inputs"):  # before the filters that make the inputs
        model = _narrowed(model, name, stays[name])
    return model


def _narrowed(model: nn.Module, name: str, stays: np.ndarray) -> nn.Module:
    """The model with only those channels of a group that stay."""
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
    assert isinstance(model, ResNet8 | ResNetCIFAR | ResNet50)
    return model.clone(inner=_replaced(model.inner_widths(), groups.index(name) - 1, kept.size))


def _replaced(numbers: Sequence[int], index: int, number: int) -> tuple[int, ...]:
    return (*numbers[:index], number, *numbers[index + 1 :])
