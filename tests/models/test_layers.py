from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxsparse.models import layers

IMAGES = (2, 9, 12, 3)


def images(shape=IMAGES, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(0), shape, dtype)


def value_and_grads(f, *args):
    """The output of ``f`` and the gradients of a scalar that weighs every entry of it differently."""

    def scalar(*args):
        y = f(*args)
        return jnp.sum(y * jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y

    (_, y), grads = jax.jit(jax.value_and_grad(scalar, argnums=tuple(range(len(args))), has_aux=True))(*args)
    return y, grads


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel_size", "strides", "padding"),
    [
        ((3, 3), 1, "VALID"),
        ((3, 3), 1, "SAME"),
        ((3, 3), 2, 1),
        ((1, 4), (2, 3), "SAME"),
        ((5, 2), (3, 1), (1, 2)),
        ((2, 2), 4, ((0, 2), 1)),
        ((2, 3), (1, 2), ((1, 0), (2, 3))),
        ((9, 12), 1, 0),
    ],
    ids=str,
)
def test_conv_forms_agree_in_value_and_gradient(kernel_size, strides, padding):
    kernel = jax.random.normal(jax.random.key(1), (*kernel_size, 3, 4))
    results = [
        value_and_grads(partial(layers.conv, strides=strides, padding=padding, implementation=form), images(), kernel)
        for form in layers.IMPLEMENTATIONS
    ]
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel_size", "window", "padding"),
    [
        ((5, 5), 2, "SAME"),
        ((2, 5), 2, "VALID"),
        ((2, 3), (2, 5), "VALID"),
        ((3, 3), (3, 4), 1),
        ((1, 1), 3, 0),
        ((3, 3), 1, "SAME"),
        ((4, 2), (2, 3), ((1, 2), (0, 1))),
        ((9, 12), 1, "VALID"),
        ((3, 3), 4, "SAME"),  # leaves a rest
    ],
    ids=str,
)
def test_conv_max_pool_forms_agree_in_value_and_gradient(kernel_size, window, padding):
    kernel = jax.random.normal(jax.random.key(1), (*kernel_size, 3, 4))

    def one_after_the_other(x, kernel):
        y = layers.conv(x, kernel, padding=padding, implementation="xla")
        return layers.max_pool(y, window, implementation="xla")

    expected = value_and_grads(one_after_the_other, images(), kernel)
    for form in layers.IMPLEMENTATIONS:
        together = partial(layers.conv_max_pool, window=window, padding=padding, implementation=form)
        chex.assert_trees_all_close(value_and_grads(together, images(), kernel), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", layers.IMPLEMENTATIONS)
def test_conv_layer_with_max_pool(form):
    ours = layers.Conv(features=4, kernel_size=2, padding="VALID", max_pool=2, implementation=form)
    shape = (2, 9, 13, 3)
    params = ours.init(jax.random.key(2), images(shape))
    params = jax.tree.map(lambda p: p + 0.1, params)
    theirs = nn.max_pool(nn.Conv(4, (2, 2), padding="VALID").apply(params, images(shape)), (2, 2), (2, 2))
    chex.assert_trees_all_close(ours.apply(params, images(shape)), theirs, rtol=1e-5, atol=1e-5)


def test_conv_layer_with_max_pool_and_strides():
    with pytest.raises(ValueError, match="max_pool=2 needs strides 1, got 3"):
        layers.Conv(features=4, kernel_size=2, max_pool=2, strides=3).init(jax.random.key(0), images())


def test_conv_max_pool_needs_a_kernel_that_fits():
    with pytest.raises(ValueError, match=r"conv_max_pool needs a kernel of shape \(height, width, 3, features\)"):
        layers.conv_max_pool(images(), jnp.ones((2, 2, 4, 5)))


@pytest.mark.parametrize(("strides", "padding"), [(1, "SAME"), ((2, 3), 1), (1, (1, 2)), (2, "VALID")], ids=str)
@pytest.mark.parametrize("form", layers.IMPLEMENTATIONS)
def test_conv_layer_is_nn_conv(form, strides, padding):
    ours = layers.Conv(features=4, kernel_size=(3, 2), strides=strides, padding=padding, implementation=form)
    theirs = nn.Conv(features=4, kernel_size=(3, 2), strides=strides, padding=padding)
    params = ours.init(jax.random.key(2), images())
    chex.assert_trees_all_equal(params, theirs.init(jax.random.key(2), images()))
    params = jax.tree.map(lambda p: p + 0.1, params)  # nn.Conv starts its bias at zero, which would hide it
    chex.assert_trees_all_close(ours.apply(params, images()), theirs.apply(params, images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", layers.IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "expected"), [(None, jnp.float32), (jnp.bfloat16, jnp.bfloat16)])
def test_conv_layer_computes_in_dtype_and_keeps_float32_params(form, dtype, expected):
    layer = layers.Conv(features=4, kernel_size=3, dtype=dtype, use_bias=False, implementation=form)
    y, params = layer.init_with_output(jax.random.key(0), images())
    assert y.dtype == expected
    assert list(params["params"]) == ["kernel"]
    assert params["params"]["kernel"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("form", "size", "kernel_size", "dtype", "expected"),
    [
        ("xla", 7, 3, "float32", True),
        ("nhwc", 7, 1, "bfloat16", True),
        ("slices", 32, 3, "float32", False),
        (None, 8, 3, "float32", True),
        (None, 7, 3, "float32", False),
        (None, 32, 1, "float32", False),
        (None, 32, 3, "bfloat16", False),
    ],
)
def test_conv_form_is_chosen_by_device_and_shape(form, size, kernel_size, dtype, expected):
    x, kernel = jnp.ones((2, 9, size, 3), dtype), jnp.ones((kernel_size, kernel_size, 3, 4), dtype)
    jaxpr = jax.make_jaxpr(partial(layers.conv, implementation=form))(x, kernel)
    expected = expected or (form is None and jax.default_backend() != "cpu")
    assert ("conv_general_dilated" in str(jaxpr)) == expected


@pytest.mark.parametrize(("strides", "padding"), [(1, "SAME"), ((2, 3), (1, (0, 2)))], ids=str)
def test_conv_has_all_derivatives_in_every_form(strides, padding):
    x, kernel = images(), jax.random.normal(jax.random.key(1), (3, 2, 3, 4))

    def products(form):
        conv = partial(layers.conv, strides=strides, padding=padding, implementation=form)
        loss = jax.grad(lambda x, kernel: jnp.sum(jnp.sin(conv(x, kernel))), argnums=(0, 1))
        return jax.jvp(loss, (x, kernel), (jnp.cos(x), jnp.cos(kernel)))

    ours, theirs = products("nhwc"), products("xla")
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mapped", [(0, None), (0, 0)])
def test_conv_is_vmapped_in_every_form(mapped):
    x, kernel = jnp.stack([images(), 2 * images()]), jax.random.normal(jax.random.key(1), (2, 3, 3, 3, 4))
    kernel = kernel if mapped[1] == 0 else kernel[0]
    results = [
        jax.vmap(
            jax.grad(lambda x, k, form=form: jnp.sum(jnp.sin(layers.conv(x, k, implementation=form))), (0, 1)), mapped
        )(x, kernel)
        for form in layers.IMPLEMENTATIONS
    ]
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [
        (3, None, "VALID"),
        ((3, 4), None, "SAME"),
        ((3, 4), None, (1, 0)),
        (3, None, ((0, 1), 1)),
        (2, None, "VALID"),
        (2, None, "SAME"),
        ((3, 4), 1, (1, 0)),
        (2, (1, 3), "SAME"),
        (2, 4, 1),
        (1, None, 0),
    ],
    ids=str,
)
def test_max_pool_forms_agree_in_value_and_gradient(window, strides, padding):
    results = [
        value_and_grads(
            partial(layers.max_pool, window=window, strides=strides, padding=padding, implementation=form), images()
        )
        for form in layers.IMPLEMENTATIONS
    ]
    chex.assert_trees_all_equal(results[0][0], results[1][0])
    chex.assert_trees_all_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("window", "reshapes"), [(3, True), ((9, 2), True), (2, False)])
def test_max_pool_reshapes_where_the_window_divides_the_image(window, reshapes):
    jaxpr = str(jax.make_jaxpr(lambda x: layers.max_pool(x, window, implementation="slices"))(images()))
    assert ("reduce_window" not in jaxpr) == reshapes


@pytest.mark.parametrize("form", layers.IMPLEMENTATIONS)
def test_max_pool_of_negative_bfloat16_with_padding(form):
    x = -jnp.ones((1, 3, 3, 1), jnp.bfloat16)
    y = layers.max_pool(x, 3, padding=1, implementation=form)
    chex.assert_trees_all_equal(y, -jnp.ones((1, 1, 1, 1), jnp.bfloat16))


@pytest.mark.parametrize("form", layers.IMPLEMENTATIONS)
def test_max_pool_gradient_of_ties_adds_up(form):
    grad = jax.grad(lambda x: layers.max_pool(x, 2, implementation=form).sum())(jnp.ones((1, 4, 4, 1)))
    chex.assert_trees_all_equal(grad.reshape(2, 2, 2, 2).sum((1, 3)), jnp.ones((2, 2)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"implementation": "fast"}, "implementation is None or one of"),
        ({"padding": "CIRCULAR"}, "padding is 'SAME', 'VALID'"),
        ({"padding": -1}, "padding is 'SAME', 'VALID'"),
        ({"padding": (1, 2, 3)}, "padding is 'SAME', 'VALID'"),
        ({"padding": 1.5}, "padding is 'SAME', 'VALID'"),
        ({"strides": 0}, "strides is an int >= 1"),
        ({"strides": (1, 1, 1)}, "strides is an int >= 1"),
        ({"x": jnp.ones((9, 12, 3))}, "needs images of shape"),
        ({"x": jnp.ones((1, 9, 12, 5))}, "needs a kernel of shape"),
        ({"x": jnp.ones(IMAGES, jnp.bfloat16)}, "one dtype, got bfloat16 and float32"),
        ({"x": jnp.ones((1, 2, 12, 3)), "padding": "VALID"}, "does not fit in an image of"),
    ],
)
def test_conv_refuses(kwargs, message):
    arguments = {"x": images(), "kernel": jnp.ones((3, 3, 3, 4))} | kwargs
    with pytest.raises(ValueError, match=message):
        layers.conv(**arguments)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"implementation": "fast"}, "implementation is None or one of"),
        ({"padding": "REFLECT"}, "padding is 'SAME', 'VALID'"),
        ({"window": 0}, "window is an int >= 1"),
        ({"window": 13}, "does not fit in an image of"),
        ({"x": jnp.ones((9, 12))}, "needs images of shape"),
        ({"x": jnp.ones(IMAGES, jnp.int32)}, "needs float images, got int32"),
    ],
)
def test_max_pool_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        layers.max_pool(**{"x": images()} | kwargs)


def test_fan_in_uniform_fills_its_range():
    values = layers.fan_in_uniform(25)(jax.random.key(0), (100_000,))
    assert -0.2 <= values.min() < -0.1999
    assert 0.1999 < values.max() < 0.2
    assert abs(values.mean()) < 0.001


def test_fan_in_uniform_refuses_zero():
    with pytest.raises(ValueError, match="fan_in >= 1, got 0"):
        layers.fan_in_uniform(0)
