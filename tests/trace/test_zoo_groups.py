"""The groups of the library's own models, written by hand, are those that are derived."""

import inspect

import jax
import jax.numpy as jnp
import pytest

from jaxsparse import models, trace
from jaxsparse.groups import entries, group_sizes
from jaxsparse.trees import by_path

ZOO = {
    "LeNet-300-100": (models.LeNet300100(), (28, 28, 1), 2),
    "LeNet-5": (models.LeNet5Caffe(), (28, 28, 1), 3),
    "VGG-16": (models.VGG(num_classes=10), (32, 32, 3), 15),
    "ResNet-8": (models.ResNet8(), (32, 32, 3), 3),
    "ResNet-20": (models.ResNetCIFAR(depth=20), (32, 32, 3), 9),
    "ResNet-50": (models.ResNet50(), (64, 64, 3), 32),
}


def channels_of(group, leaves, size):
    """(path, axis) -> the channel of each entry, of all that a group removes."""
    found = {}
    for which in group.removes:
        (axis,), channels = entries(which, leaves[which.path].shape, size)
        found[which.path, axis] = channels.tolist()
    return found


def test_all_groups_of_the_models_are_compared():
    assert sum(number for _, _, number in ZOO.values()) == 64


QUICK = ("LeNet-300-100", "LeNet-5", "ResNet-20")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ZOO])
def test_groups_written_by_hand_are_derived(name):
    model, shape, number = ZOO[name]
    x = jnp.zeros((1, *shape))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), x))
    flags = {"train": False} if "train" in inspect.signature(type(model).__call__).parameters else {}
    derived = trace.channel_groups(lambda v, x: model.apply(v, x, **flags), variables, x).within("params")
    assert derived.unknown == ()
    leaves = by_path(variables["params"])
    written = models.channel_groups(model)
    sizes = dict(zip((group.name for group in written), group_sizes(written, variables["params"]), strict=True))
    written = [group for group in written if group.removes and group.name != "inputs"]
    assert len(written) == number
    by_channels = {tuple(sorted(map(str, channels_of(g, leaves, g.size).items()))): g for g in derived}
    order = []
    for group in written:
        found = by_channels[tuple(sorted(map(str, channels_of(group, leaves, sizes[group.name]).items())))]
        assert found.size == sizes[group.name]
        # What the gates by hand multiply is enough.
        axes = {(which.path, which.axis % leaves[which.path].ndim) for which in group.multiplies}
        assert any({(which.path, which.axis) for which in choice} <= axes for choice in found.closed_by), group.name
        order.append(derived.groups.index(found))
    assert order == sorted(order)  # the order of the network, too
