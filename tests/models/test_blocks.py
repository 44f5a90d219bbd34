import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.models import blocks


def test_batch_norm_uses_and_updates_the_statistics_of_the_batch_where_they_are_mutable():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (8, 4, 4, 5))
    variables = blocks.BatchNorm().init(jax.random.key(1), x)
    y, updates = blocks.BatchNorm().apply(variables, x, mutable=["batch_stats"])
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    expected = {"mean": 0.1 * mean, "var": 0.9 + 0.1 * var}
    chex.assert_trees_all_close(updates["batch_stats"], expected, rtol=1e-5)
    chex.assert_trees_all_close(y, (x - mean[None, None, None]) / jnp.sqrt(var + 1e-5)[None, None, None], atol=1e-5)


@pytest.mark.parametrize("mutable", [False, ["intermediates"]])
def test_batch_norm_uses_the_running_statistics_elsewhere(mutable):
    x = jax.random.normal(jax.random.key(0), (4, 3))
    variables = {
        "params": {"scale": jnp.full(3, 2.0), "bias": jnp.ones(3)},
        "batch_stats": {"mean": jnp.full(3, 0.5), "var": jnp.full(3, 4.0)},
    }
    y = blocks.BatchNorm().apply(variables, x, mutable=mutable)
    y, updates = y if mutable else (y, {})
    assert not updates
    chex.assert_trees_all_close(y, 1 + 2 * (x - 0.5) / (4 + 1e-5) ** 0.5, rtol=1e-5, atol=1e-6)


def test_batch_norm_starts_without_the_batch():
    variables = blocks.BatchNorm().init(jax.random.key(0), jnp.full((4, 3), 7.0))
    chex.assert_trees_all_equal(variables["batch_stats"], {"mean": jnp.zeros(3), "var": jnp.ones(3)})
    chex.assert_trees_all_equal(variables["params"], {"scale": jnp.ones(3), "bias": jnp.zeros(3)})


def test_batch_norm_takes_statistics_of_bfloat16_in_float32():
    x = (10 + jax.random.normal(jax.random.key(0), (4096, 2))).astype(jnp.bfloat16)
    layer = blocks.BatchNorm(dtype=jnp.bfloat16)
    y, updates = layer.apply(layer.init(jax.random.key(1), x), x, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    statistics = {"mean": 0.1 * exact.mean(0), "var": 0.9 + 0.1 * exact.var(0)}
    chex.assert_trees_all_close(updates["batch_stats"], jax.tree.map(jnp.float32, statistics), rtol=1e-5)


def test_batch_norm_over_devices_is_that_of_the_whole_batch():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (8, 4, 3, 3, 5))  # a batch of four for each of eight devices
    layer = blocks.BatchNorm(axis_name="devices")
    variables = layer.init(jax.random.key(1), x[0])
    train = jax.pmap(lambda v, x: layer.apply(v, x, mutable=["batch_stats"]), "devices", in_axes=(None, 0))
    y, updates = train(variables, x)
    whole, expected = blocks.BatchNorm().apply(variables, x.reshape(32, 3, 3, 5), mutable=["batch_stats"])
    chex.assert_trees_all_close(y.reshape(whole.shape), whole, atol=1e-5)
    for device in (0, 7):
        chex.assert_trees_all_close(jax.tree.map(lambda leaf, i=device: leaf[i], updates), expected, rtol=1e-5)
    alone, _ = blocks.BatchNorm().apply(variables, x[0], mutable=["batch_stats"])
    assert jnp.abs(y[0] - alone).max() > 0.01


@pytest.mark.parametrize(
    ("channels", "width", "expected"), [(64, 1.0, 64), (16, 0.1, 2), (64, 1e-3, 1), (10, 1.26, 13)]
)
def test_scaled_rounds_and_leaves_one(channels, width, expected):
    assert blocks.scaled(channels, width) == expected
