from functools import partial

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from jaxsparse.models import resnet
from jaxsparse.models.blocks import BatchNorm
from jaxsparse.models.layers import Conv
from tests.models.networks import quick_jit, variables_of


def test_shortcut_without_parameters_keeps_every_second_pixel_and_surrounds_the_channels_with_zeros():
    x = jax.random.uniform(jax.random.key(0), (2, 5, 4, 3))
    conv = partial(Conv, use_bias=False)
    block = resnet._Block(8, 2, (None,), False, conv, BatchNorm)
    variables = quick_jit(block.init)(jax.random.key(1), x)
    variables["params"]["conv2"]["kernel"] *= 0  # the shortcut is all that is left
    y = quick_jit(block.apply)(variables, x)
    chex.assert_shape(y, (2, 3, 2, 8))
    chex.assert_trees_all_equal(y[..., 2:5], x[:, ::2, ::2])
    chex.assert_trees_all_equal(y[..., :2].sum() + y[..., 5:].sum(), jnp.float32(0))


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


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("features", [2, 4])
def test_blocks_start_as_their_shortcuts_if_the_last_scale_starts_from_zero(features, strides):
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 4 * 2))
    conv = partial(Conv, use_bias=False)
    for block in (
        resnet._Block(4 * features, strides, (None,), True, conv, BatchNorm, zero_init=True),
        resnet._Bottleneck(features, strides, (None, None), conv, BatchNorm, zero_init=True),
    ):

        @quick_jit
        def outputs(x, block=block):
            variables = block.init(jax.random.key(1), x)
            y, updates = block.apply(variables, x, mutable=["batch_stats", "intermediates"], capture_intermediates=True)
            return variables["params"], y, updates["intermediates"].get("shortcut_bn", {"__call__": [x]})

        params, y, shortcut = outputs(x)
        assert ("shortcut_bn" in params) == (features != 2 or strides != 1)
        chex.assert_trees_all_equal(y, nn.relu(shortcut["__call__"][0]))


@pytest.mark.parametrize("zero_init", [True, False])
@pytest.mark.parametrize(
    "model",
    [resnet.ResNet20(), resnet.ResNet18(), resnet.ResNet34(), resnet.ResNet50()],
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
