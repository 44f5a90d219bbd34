import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from jaxsparse import models
from tests.models.networks import quick_jit

MNIST = (2, 28, 28, 1)


def sizes(params):
    weights = sum(layer["kernel"].size for layer in params.values())
    return weights, sum(layer["bias"].size for layer in params.values())


@pytest.mark.parametrize(
    ("model", "layers", "expected"),
    [
        (models.LeNet300100(), ["fc1", "fc2", "fc3"], (266_200, 410)),
        (models.LeNet5Caffe(), ["conv1", "conv2", "fc1", "fc2"], (430_500, 580)),
    ],
    ids=["LeNet300100", "LeNet5Caffe"],
)
def test_parameters_are_the_papers(model, layers, expected):
    logits, variables = quick_jit(model.init_with_output)(jax.random.key(0), jnp.ones(MNIST))
    params = variables["params"]
    chex.assert_shape(logits, (2, 10))
    assert list(params) == layers
    assert sizes(params) == expected
    for name, layer in params.items():
        *fan_in, _ = layer["kernel"].shape
        bound = float(jnp.prod(jnp.array(fan_in))) ** -0.5
        for parameter in layer.values():
            assert parameter.dtype == jnp.float32
            assert jnp.abs(parameter).max() <= bound, name
        assert jnp.abs(layer["kernel"]).max() > 0.95 * bound, name  # the range is used
        assert jnp.abs(layer["bias"]).max() > 0.5 * bound, name


def test_lenet_300_100_is_three_matrix_products():
    model = models.LeNet300100(num_classes=7)
    images = jax.random.normal(jax.random.key(1), (5, 4, 3))
    logits, variables = model.init_with_output(jax.random.key(0), images)
    fc1, fc2, fc3 = variables["params"].values()
    x = images.reshape(5, 12)
    x = jnp.maximum(x @ fc1["kernel"] + fc1["bias"][None], 0)
    x = jnp.maximum(x @ fc2["kernel"] + fc2["bias"][None], 0)
    chex.assert_trees_all_close(logits, x @ fc3["kernel"] + fc3["bias"][None], rtol=1e-5)
    chex.assert_shape(logits, (5, 7))


@pytest.mark.slow
def test_lenet_5_forms_agree_in_logits_and_gradient():
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 1))
    params = models.LeNet5Caffe().init(jax.random.key(0), images)

    def loss(params, implementation):
        logits = models.LeNet5Caffe(implementation=implementation).apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(2)).mean(), logits

    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    results = [value_and_grad(params, form) for form in ("xla", "slices")]
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", [models.LeNet300100(dtype=jnp.bfloat16), models.LeNet5Caffe(dtype=jnp.bfloat16)])
def test_dtype_is_of_the_computation_only(model):
    logits, params = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones(MNIST))
    assert logits.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_lenet_5_takes_images_from_16_by_16_on():
    model, images = models.LeNet5Caffe(num_classes=3), jnp.ones((2, 16, 17, 4))
    logits, params = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    chex.assert_shape(logits, (2, 3))
    assert params["params"]["fc1"]["kernel"].shape == (50, 500)


@pytest.mark.parametrize("shape", [(1, 8, 8, 1), (1, 28, 15, 1), (28, 28, 1)])
def test_lenet_5_refuses_what_it_cannot_see(shape):
    with pytest.raises(ValueError, match="at least 16 x 16"):
        models.LeNet5Caffe().init(jax.random.key(0), jnp.ones(shape))


def test_lenet_300_100_refuses_a_missing_batch_axis():
    with pytest.raises(ValueError, match=r"needs images of shape \(batch, ...\), got \(64,\)"):
        models.LeNet300100().init(jax.random.key(0), jnp.ones(64))
