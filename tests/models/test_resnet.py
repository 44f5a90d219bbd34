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
