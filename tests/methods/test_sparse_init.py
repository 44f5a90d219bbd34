"""Sparse initialisation: by hand, in every layout, and the variance that arrives."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxsparse
from jaxsparse import Layout
from jaxsparse.trees import by_path
from tests.problems import slow_except

ROOT = np.sqrt(3.0)


def test_by_hand():
    # A matrix of 3 inputs and 3 outputs; the outputs keep 3, 1 and 0: factors 1, sqrt(3 / 1), and nothing is left.
    params = {"kernel": jnp.arange(1.0, 10.0).reshape(3, 3), "bias": jnp.array([5.0, 6.0, 7.0])}
    masks = {"kernel": jnp.array([[1, 0, 0], [1, 1, 0], [1, 0, 0]], bool), "bias": jnp.array(True)}
    expected = [[1, 0, 0], [4, 5 * ROOT, 0], [7, 0, 0]]
    start = jaxsparse.sparse_init(params, masks)
    np.testing.assert_allclose(start["kernel"], expected, rtol=1e-6)
    assert start["bias"] is params["bias"]
    # 4 of the 9 weights of the layer are left: all have the factor 3 / 2.
    start = jaxsparse.sparse_init(params, masks, scope="layer")
    np.testing.assert_allclose(start["kernel"], [[1.5, 0, 0], [6, 7.5, 0], [10.5, 0, 0]], rtol=1e-6)


def test_every_layout():
    """Of 8 inputs (places included) output 0 keeps 2 and output 1 all: factors 2 and 1, wherever the axes are."""
    keeps = np.ones((8, 2), bool)
    keeps[2:, 0] = False
    factors = keeps * np.array([2.0, 1.0], np.float32)
    cases = {  # what a leaf of such names is, and how it is made of (inputs, outputs)
        "Dense/kernel": (None, lambda x: x),
        "Conv/kernel": (None, lambda x: x.reshape(2, 2, 2, 2)),  # two places by two, two inputs
        "conv1d/w": (Layout(1, 2), lambda x: x.reshape(4, 2, 2)),
        "torch/weight": (Layout(1, 0), lambda x: x.T),
        "attention/query": (Layout(0, (1, 2)), lambda x: x.reshape(8, 2, 1)),  # heads, dim
        "attention/out": (Layout((0, 1), 2), lambda x: x.reshape(4, 2, 2)),
        "layers/kernel": (Layout(1, 2, stack=0), lambda x: np.stack([x, x[:, ::-1]])),  # not of one fan-in
    }
    params = {path: np.ones(of(keeps).shape, np.float32) for path, (_, of) in cases.items()}
    masks = {path: of(keeps) for path, (_, of) in cases.items()}
    layout = {path: at for path, (at, _) in cases.items() if at is not None}

    @jax.jit
    def start(params, masks):
        return [jaxsparse.sparse_init(params, masks, scope=scope, layout=layout) for scope in ("output", "layer")]

    by_output, by_layer = start(params, masks)
    for path, (_, of) in cases.items():
        np.testing.assert_allclose(by_output[path], of(factors), rtol=1e-6, err_msg=path)
        # Of a layer 10 of 16 are left, in a stack of each.
        np.testing.assert_allclose(by_layer[path], of(keeps * np.float32(1.6**0.5)), rtol=1e-6, err_msg=path)


def test_layers_of_other_libraries_are_found_by_their_names():
    linear = eqx.nn.Linear(4, 2, key=jax.random.key(0))  # outputs first
    outputs_first = jnp.array([[1, 0, 0, 0], [1, 1, 1, 1]], bool)
    start = jaxsparse.sparse_init(linear, eqx.tree_at(lambda n: (n.weight, n.bias), linear, (outputs_first, True)))
    np.testing.assert_allclose(start.weight, linear.weight * outputs_first * np.array([[2], [1]]), rtol=1e-6)
    state = nnx.state(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.Param)
    masks = jax.tree.map(lambda p: outputs_first.T if p.ndim == 2 else jnp.array(True), state)
    kernels = [by_path(tree)["kernel"] for tree in (state, jaxsparse.sparse_init(state, masks))]
    np.testing.assert_allclose(kernels[1], kernels[0] * outputs_first.T * np.array([[2, 1]]), rtol=1e-6)


def second_moments(params, images):
    """Of what arrives before the ReLUs of each layer."""
    moments = []
    for kernel in params.values():
        images = images @ kernel
        moments.append(float(jnp.mean(images**2)))
        images = jax.nn.relu(images)
    return moments


@pytest.mark.parametrize("allocation", slow_except([], ["uniform", "ragged"]))
def test_what_arrives_has_the_variance_of_the_dense_network(allocation):
    draw = jax.nn.initializers.he_normal()
    params = {f"fc{i}": draw(jax.random.key(i), (512, 512)) for i in range(4)}
    images = jax.random.normal(jax.random.key(9), (128, 512))
    masks = jaxsparse.random_masks(params, 0.95, key=1)
    if allocation == "ragged":  # outputs keep from 1 to 51 of their inputs
        fan_in = jnp.linspace(1, 51, 512)[None]
        masks = {name: jax.random.uniform(jax.random.key(i), (512, 512)).argsort(0) < fan_in
                 for i, name in enumerate(params)}  # fmt: skip
    dense = second_moments(params, images)
    faded = second_moments(jaxsparse.apply_masks(params, masks), images)
    assert faded[3] < 1e-4 * dense[3]
    for options in ({}, {"gain": 2**0.5, "key": 3}):
        start = jaxsparse.sparse_init(params, masks, **options)
        first, *_, last = np.divide(second_moments(start, images), dense)
        assert first == pytest.approx(1, abs=0.1), options
        assert last == pytest.approx(1, abs=0.35), options  # four layers of weights with few terms each
        kernel = start["fc0"]
        assert bool(jnp.all((kernel != 0) == masks["fc0"]))
        by_output = jnp.sum(kernel**2, axis=0)  # 2 on the mean over outputs, of whatever fan-in
        assert float(by_output.mean()) == pytest.approx(2, rel=0.1)


@pytest.mark.slow
def test_new_draws_follow_the_gain_and_the_key_and_leave_dense_leaves():
    params = {"a": jnp.zeros((64, 64)), "b": jnp.zeros((64, 64)), "dense": jnp.ones((4, 4))}
    masks = jaxsparse.random_masks(params, 0.5, prunable=["a", "b"])
    one, same, other = (jaxsparse.sparse_init(params, masks, gain=1, key=key) for key in (0, jax.random.key(0), 1))
    chex.assert_trees_all_equal(one, same)
    assert one["dense"] is params["dense"]
    assert not bool(jnp.any((one["a"] == other["a"]) & masks["a"]))
    assert not bool(jnp.any((one["a"] == one["b"]) & masks["a"] & masks["b"]))
    twice = jaxsparse.sparse_init(params, masks, gain=2)
    np.testing.assert_allclose(twice["a"], 2 * one["a"], rtol=1e-6)
    assert float(one["a"].std() * 8) == pytest.approx(1, rel=0.05)  # N(0, 1 / 32) on half of the places


@pytest.mark.slow
def test_it_compiles_once_vmaps_and_keeps_dtypes():
    params = {"kernel": jnp.ones((8, 4), jnp.bfloat16), "bias": jnp.ones(4, jnp.float16)}
    masks = jaxsparse.random_masks(params, 0.75)
    start = jax.jit(lambda p, m, gain: jaxsparse.sparse_init(p, m, gain=gain))(params, masks, 1.5)
    chex.assert_trees_all_equal_shapes_and_dtypes(start, params)
    many = jnp.stack([masks["kernel"], ~masks["kernel"]])
    mapped = jax.vmap(lambda m: jaxsparse.sparse_init(params, {**masks, "kernel": m})["kernel"])(many)
    for mask, one in zip(many, mapped, strict=True):
        np.testing.assert_array_equal(one, jaxsparse.sparse_init(params, {**masks, "kernel": mask})["kernel"])


def test_what_is_wrong_is_named():
    params = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2), "odd": jnp.ones((12, 64, 64))}
    masks = {"kernel": jnp.ones((4, 2), bool), "bias": jnp.array(True), "odd": jnp.array(True)}
    for changes, options, message in (
        ({}, {"scope": "global"}, r"scope must be one of \['output', 'layer'\], got 'global'"),
        ({}, {"gain": 0}, "gain must be a positive number, or None .* got 0"),
        ({}, {"gain": -1.0}, "gain must be at least 0, got -1.0"),
        ({"kernel": jnp.ones((2, 4), bool)}, {}, r"masks of kernel: expected bool of shape \(4, 2\)"),
        ({"bias": jnp.array([True, False])}, {}, "number of inputs, and bias, which has a mask"),
    ):
        with pytest.raises(ValueError, match=message):
            jaxsparse.sparse_init(params, masks | changes, **options)
    with pytest.warns(UserWarning, match="sparse_init needs the inputs and outputs .* odd"):
        jaxsparse.sparse_init(params, masks | {"odd": jnp.ones((12, 64, 64), bool)})
