import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from tests.problems import gradients, make_params, make_step


@pytest.mark.parametrize("alpha", [3, pytest.param(2.5, marks=pytest.mark.slow)])
def test_it_is_the_power_differentiated(alpha):
    start = make_params()["dense"]
    optimizer = optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.02, momentum=0.9))
    tx = jaxsparse.powerpropagation(optimizer, alpha)

    def loss(params):
        return jnp.sum(jnp.cos(params["kernel"])) + jnp.sum(params["bias"] ** 2)

    def seen(weights):
        return {**weights, "kernel": weights["kernel"] * jnp.abs(weights["kernel"]) ** (alpha - 1)}

    @jax.jit
    def both(carry):
        weights, weights_state, params, opt_state = carry
        moves, weights_state = optimizer.update(jax.grad(lambda w: loss(seen(w)))(weights), weights_state, weights)
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(weights, moves), weights_state, optax.apply_updates(params, updates), opt_state

    root = jnp.sign(start["kernel"]) * jnp.abs(start["kernel"]) ** (1 / alpha)
    weights = {**start, "kernel": root}
    carry = weights, optimizer.init(weights), start, tx.init(start)
    np.testing.assert_allclose(carry[3].weights["kernel"], root, rtol=1e-6)
    for _ in range(6):
        carry = both(carry)
        weights, _, params, opt_state = carry
        np.testing.assert_allclose(opt_state.weights["kernel"], weights["kernel"], atol=2e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=4e-6), params, seen(weights))
        jaxsparse.check(opt_state, params)
    assert np.abs(params["kernel"] - start["kernel"]).max() > 0.1


@pytest.mark.slow
def test_a_link_inside_prunes_what_it_would_prune_of_the_params():
    inside = jaxsparse.magnitude_pruning(0.75, begin=2, scope="global")
    links = [
        jaxsparse.powerpropagation(optax.adam(0.01), 3, prune=inside),
        jaxsparse.powerpropagation(jaxsparse.chain(optax.adam(0.01), inside), 3),
    ]
    ends = []
    for tx in links:
        params, step = make_params(), make_step(tx)
        opt_state = tx.init(params)
        params = jaxsparse.sparsify(opt_state, params)
        for count in range(4):
            before = params
            params, opt_state = step(params, opt_state, count)
            masks = jaxsparse.get_masks(opt_state, params)
            if count == 2:
                expected = jaxsparse.magnitude_masks(before, 0.75, allocation="global")
                jax.tree.map(np.testing.assert_array_equal, masks, expected)
            jaxsparse.check(opt_state, params)
        assert int(jaxsparse.count(masks)) == 196
        jax.tree.map(lambda p, mask: np.testing.assert_array_equal(p == 0, ~mask & (p == p)), params, masks)
        jax.tree.map(np.testing.assert_array_equal, jaxsparse.eval_params(opt_state, params), params)
        ends.append(params)
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_zeros_stay_and_are_named():
    params = {"kernel": jnp.array([[0.0, 1.0], [2.0, 3.0]])}
    tx = jaxsparse.powerpropagation(optax.sgd(0.1, momentum=0.9), 2)
    opt_state = tx.init(params)
    assert int(jaxsparse.count(jaxsparse.get_masks(opt_state, params))) == 0  # no leaf has a mask
    for count in range(2):
        updates, opt_state = tx.update(gradients(params, count), opt_state, params)
        params = optax.apply_updates(params, updates)
    assert params["kernel"][0, 0] == 0
    with pytest.warns(UserWarning, match="1 weights of kernel are 0 and not pruned"):
        jaxsparse.check(opt_state, params)


def test_a_link_outside_is_found():
    params = make_params()["dense"]
    masks = jaxsparse.magnitude_masks(params, 0.5)
    tx = jaxsparse.chain(jaxsparse.powerpropagation(optax.sgd(0.1)), jaxsparse.mask_updates(masks))
    params, opt_state = make_step(tx)(params, tx.init(params), 0)
    with pytest.raises(jaxsparse.SparsityError, match="is not the power of its latent weights.*inside, as prune="):
        jaxsparse.check(opt_state, params)


@pytest.mark.slow
def test_alpha_can_be_injected():
    params = {"kernel": jnp.array([[1.0, -8.0], [0.125, 27.0]])}
    injected = optax.inject_hyperparams(jaxsparse.powerpropagation, static_args=("prune", "prunable", "layout"))
    tx, plain = injected(optax.sgd(0.1), alpha=3.0), jaxsparse.powerpropagation(optax.sgd(0.1), 3)
    (found, _), (expected, _) = (tx.update(params, tx.init(params), params) for tx in (tx, plain))
    np.testing.assert_allclose(found["kernel"], expected["kernel"], rtol=1e-4)


def test_options_are_checked_when_the_wrapper_is_made():
    for options, message in (
        ({"alpha": 0.5}, "alpha must be at least 1 and below inf, got 0.5"),
        ({"alpha": float("inf")}, "alpha must be at least 1 and below inf, got inf"),
        ({"inner": 0.1}, "powerpropagation: inner must be an optimizer, .* got 0.1"),
        ({"prune": 0.9}, "powerpropagation: prune must be an optimizer, .* got 0.9"),
    ):
        with pytest.raises(ValueError, match=message):
            jaxsparse.powerpropagation(**{"inner": optax.sgd(0.1), **options})


def test_a_scheduled_power_passes_check():
    params = {"kernel": jnp.arange(1.0, 17).reshape(4, 4)}
    power = optax.linear_schedule(2.0, 4.0, 4)
    inject = optax.inject_hyperparams(jaxsparse.powerpropagation, static_args=("inner", "prune"))
    tx = inject(optax.sgd(0.1), alpha=power)
    opt_state = tx.init(params)
    for _ in range(4):
        updates, opt_state = tx.update(jax.tree.map(jnp.zeros_like, params), opt_state, params)
        params = optax.apply_updates(params, updates)
        jaxsparse.check(opt_state, params)


def test_gradients_pass_by_the_power_that_made_the_params():
    params = {"kernel": jnp.array([[1.0, 4.0]])}
    inject = optax.inject_hyperparams(jaxsparse.powerpropagation, static_args=("inner", "prune"))
    tx = inject(optax.sgd(1.0), alpha=lambda step: jnp.where(step < 2, 2.0, 4.0))
    opt_state = tx.init(params)
    weights = [opt_state.inner_state.weights["kernel"]]  # 1 and 2
    for _ in range(3):
        updates, opt_state = tx.update({"kernel": jnp.full((1, 2), -0.5)}, opt_state, params)
        params = optax.apply_updates(params, updates)
        weights.append(opt_state.inner_state.weights["kernel"])
    # The third gradient was taken at squares, though its step makes fourth powers: w + 0.5 * 2 * w.
    np.testing.assert_allclose(weights, [[[1.0, 2.0]], [[2.0, 4.0]], [[4.0, 8.0]], [[8.0, 16.0]]], rtol=1e-5)
    np.testing.assert_allclose(params["kernel"], [[8.0**4, 16.0**4]], rtol=1e-5)
