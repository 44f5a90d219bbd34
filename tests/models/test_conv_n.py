import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import models
from tests.models.networks import numpy_images, numpy_variables, quick_jit, variables_of


@pytest.mark.parametrize(
    ("model", "shape", "parameters"),
    [
        # Frankle and Carbin, Figure 2: 4.3M weights in Conv-2, 2.4M in Conv-4, 1.1M in the convolutions of Conv-6.
        (models.Conv2(), (32, 32, 3), 4_301_642),
        (models.Conv4(), (32, 32, 3), 2_425_930),
        (models.Conv6(), (32, 32, 3), 2_262_602),
        (models.Conv2(), (28, 28, 1), 3_317_450),
        (models.Conv6(), (28, 28, 1), 1_802_698),
    ],
)
def test_numbers_of_parameters(model, shape, parameters):
    assert sum(v.size for v in variables_of(model, (1, *shape)).values()) == parameters


@pytest.mark.parametrize(
    "shape",
    [
        (2, 8, 8, 3),
        pytest.param((2, 14, 14, 1), marks=pytest.mark.slow),  # leaves a rest at the third max-pool
    ],
)
def test_it_is_what_it_says_in_plain_jax(shape):
    model = models.Conv6(width=1 / 16)
    variables, images = numpy_variables(model, shape), numpy_images(shape)
    layers = variables["params"]
    x = images
    for i in range(1, 7):
        kernel = layers[f"conv{i}"]["kernel"]
        assert kernel.shape[:2] == (3, 3)
        assert kernel.shape[3] == (4, 4, 8, 8, 16, 16)[i - 1]
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + layers[f"conv{i}"]["bias"].reshape(1, 1, 1, -1))
        if i % 2 == 0:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = x.reshape(len(x), -1)
    for i in (1, 2, 3):
        x = x @ layers[f"fc{i}"]["kernel"] + layers[f"fc{i}"]["bias"].reshape(1, -1)
        x = jax.nn.relu(x) if i < 3 else x
    for implementation in ("xla", "slices"):
        y = quick_jit(model.clone(implementation=implementation).apply)(variables, images)
        np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_kernels_start_normal_by_their_inputs_and_biases_at_zero():
    params = models.Conv2().init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    for layer, fan_in in (("conv2", 9 * 64), ("fc1", 1024), ("fc2", 256)):
        assert float(params[layer]["kernel"].std()) == pytest.approx((2 / fan_in) ** 0.5, rel=0.03)
        assert not params[layer]["bias"].any()


def test_bad_input():
    with pytest.raises(ValueError, match="ConvN has 2, 4 or 6 convolutions, got 3"):
        models.ConvN(3).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    with pytest.raises(
        ValueError, match="Conv2 needs images of shape .batch, height, width, channels., at least 8 x 8"
    ):
        models.Conv2().init(jax.random.key(0), jnp.zeros((1, 64)))
