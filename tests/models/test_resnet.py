import re

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from jaxsparse.models import resnet
from jaxsparse.models.blocks import BatchNorm
from tests.models.networks import numpy_images, numpy_variables, quick_jit, variables_of
from tests.problems import slow_except


def outputs(model, variables, images):
    """What each block of a model gives in training, and its shortcut's batch normalisation, by path."""

    @quick_jit
    def run(variables, images):
        _, found = model.apply(variables, images, mutable=["batch_stats", "intermediates"], capture_intermediates=True)
        return {"/".join(path[:-1]): value[0] for path, value in flatten_dict(found["intermediates"]).items()}

    return run(variables, images)


def test_shortcut_without_parameters_keeps_every_second_pixel_and_surrounds_the_channels_with_zeros():
    model = resnet.ResNetCIFAR(8, width=3 / 16)
    variables = numpy_variables(model, (2, 5, 4, 3))
    for layer in ("conv2", "bn2"):  # the shortcut is all that is left
        variables["params"]["block2_1"][layer] = jax.tree.map(jnp.zeros_like, variables["params"]["block2_1"][layer])
    found = outputs(model, variables, numpy_images((2, 5, 4, 3)))
    x, y = found["block1_1"], found["block2_1"]
    assert (x.shape, y.shape) == ((2, 5, 4, 3), (2, 3, 2, 6))
    chex.assert_trees_all_equal(y[..., 1:4], x[:, ::2, ::2])
    chex.assert_trees_all_equal(y[..., :1].sum() + y[..., 4:].sum(), jnp.float32(0))


@pytest.mark.parametrize(("model", "parameters"), [(resnet.ResNet18, 11_689_512), (resnet.ResNet34, 21_797_672)])
def test_the_stem_of_imagenet_gives_torchvisions_numbers_of_parameters(model, parameters):
    model = model(num_classes=1000, stem="imagenet")
    assert sum(v.size for k, v in variables_of(model).items() if k[0] == "params") == parameters
    with pytest.raises(ValueError, match="at least 32 x 32"):
        variables_of(model, (1, 16, 16, 3))
    with pytest.raises(ValueError, match="ResNet18's stem is 'small' or 'imagenet', got 'large'"):
        variables_of(resnet.ResNet18(stem="large"))


def test_the_stem_of_imagenet_leaves_a_quarter_of_the_pixels_on_each_side():
    model = resnet.ResNet18(width=1 / 16, stem="imagenet")
    shapes = {}

    def look(call, args, kwargs, context):
        shapes["/".join(context.module.path)] = args[0].shape
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        variables_of(model, (1, 32, 32, 3))
    assert shapes["block1_1"] == (1, 8, 8, 4)
    assert shapes["block4_2"] == (1, 1, 1, 32)


@pytest.mark.parametrize(
    ("model", "before"),
    [
        pytest.param(resnet.ResNet18(width=1 / 16, zero_init=True), "bn1", id="basic", marks=pytest.mark.slow),
        pytest.param(resnet.ResNet50(width=1 / 16, zero_init=True), None, id="bottleneck", marks=pytest.mark.slow),
    ],
)
def test_blocks_start_as_their_shortcuts_if_the_last_scale_starts_from_zero(model, before):
    images = numpy_images((2, 32, 32, 3))
    found = outputs(model, quick_jit(model.init)(jax.random.key(1), images), images)
    blocks = [path for path in found if re.fullmatch(r"block\d_\d", path)]
    assert len(blocks) == (8 if before else 16)
    projected = 0
    for block, previous in zip(blocks, [before, *blocks], strict=False):
        if f"{block}/shortcut_bn" in found:
            shortcut, projected = found[f"{block}/shortcut_bn"], projected + 1
        else:
            shortcut = nn.relu(found[previous])
        chex.assert_trees_all_equal(found[block], nn.relu(shortcut))
    assert projected == (3 if before else 4)


@pytest.mark.parametrize("zero_init", [True, False])
@pytest.mark.parametrize(
    "model",
    slow_except([resnet.ResNet20()], [resnet.ResNet20(), resnet.ResNet18(), resnet.ResNet34(), resnet.ResNet50()]),
    ids=lambda m: type(m).__name__,
)
def test_zero_init_is_of_the_last_batch_normalisation_of_every_block(model, zero_init):
    model, starts = model.clone(zero_init=zero_init), {}

    def look(call, args, kwargs, context):
        if isinstance(context.module, BatchNorm):
            starts["/".join(context.module.path)] = context.module.scale_init
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        shapes = variables_of(model)
    assert shapes == variables_of(model.clone(zero_init=False))
    blocks = {path[1] for path in shapes if path[1].startswith("block")}
    last = {f"{block}/{'bn3' if isinstance(model, resnet.ResNet50) else 'bn2'}" for block in blocks}
    assert {path for path, init in starts.items() if init is nn.initializers.zeros_init()} == (
        last if zero_init else set()
    )
