from functools import partial

import chex
import jax
import jax.numpy as jnp

from jaxsparse.models import resnet
from jaxsparse.models.blocks import BatchNorm
from jaxsparse.models.layers import Conv
from tests.models.networks import quick_jit


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
