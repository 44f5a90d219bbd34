"""Optimizers for the configs to call by name."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import cifar10_resnet8
from experiments import build, optimizers

PARAMS = {
    "conv": {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 4, 8)), "bias": jnp.ones(8)},
    "dense": {"kernel": jax.random.normal(jax.random.key(1), (8, 5))},
}


def test_kernels_of_convolutions_are_orthogonalised_and_the_rest_is_adams():
    rate = optax.linear_schedule(0.1, 0.0, 10)
    tx = optimizers.muon_of_convolutions(rate, adam_factor=0.5, ns_steps=10, weight_decay=0.01)
    state = tx.init(PARAMS)
    grads = jax.tree.map(lambda leaf: jnp.cos(3 * leaf), PARAMS)
    adam = optax.adamw(lambda step: 0.5 * rate(step), weight_decay=0.0, nesterov=True)
    of_adam = adam.init(PARAMS)
    for step in range(3):
        updates, state = tx.update(grads, state, PARAMS)
        expected, of_adam = adam.update(grads, of_adam, PARAMS)
        for layer, name in (("conv", "bias"), ("dense", "kernel")):
            np.testing.assert_allclose(updates[layer][name], expected[layer][name], rtol=1e-5)
        moved = updates["conv"]["kernel"] / rate(step) + 0.01 * PARAMS["conv"]["kernel"]  # without decay
        singular = jnp.linalg.svd(moved.reshape(36, 8), compute_uv=False)
        assert 0.6 < singular.min() <= singular.max() < 1.3, singular  # the quintic iteration ends around 1


def test_a_number_is_a_constant_learning_rate():
    number, schedule = map(optimizers.muon_of_convolutions, (0.1, optax.constant_schedule(0.1)))
    updates = [tx.update(PARAMS, tx.init(PARAMS), PARAMS)[0] for tx in (number, schedule)]
    chex.assert_trees_all_equal(*updates)


@pytest.mark.parametrize("argument", ["sparse_momentum", "magnitude_pruning_sgd", "dep_l0_sgd", "dense_sgd"])
def test_the_resnet8_trains_by_muon_and_every_method_but_dual_averaging_by_sgd_too(argument):
    config = cifar10_resnet8.get_config(argument)
    function, arguments = build.Calls(config, 10).call(config.optimizer, "config.optimizer")
    assert function is (optax.sgd if argument.endswith("_sgd") else optimizers.muon_of_convolutions)
    first, tenth = (float(arguments["learning_rate"](step)) for step in (0, 9))
    assert tenth == pytest.approx(10 * first, rel=0.01)  # warms up
    assert bool(config.weight_decay) == argument.endswith("_sgd")  # Muon's own is decoupled
    assert config.dense == argument.startswith("dense")
    with pytest.raises(ValueError, match="this config comes with .*'dense_sgd', got 'rda_sgd'"):
        cifar10_resnet8.get_config("rda_sgd")
