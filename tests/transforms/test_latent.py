import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from jaxsparse.transforms import LatentState, latent, map_latents
from tests.problems import signature


class StraightThroughState(LatentState):
    method = "straight_through_top_k"


def straight_through_top_k(inner, k, decay=0.0):
    """The k largest of each matrix; the gradient of all, and the decay of SR-STE for the others."""

    def latents(params):
        return jax.tree.map(lambda p: p if p.ndim > 1 else optax.MaskedNode(), params)

    def forward(state):
        masks = jax.tree.map(lambda w: jaxsparse.top_k_mask(w, k, absolute=True), state.weights)
        return jax.tree.map(lambda w, m: jnp.where(m, w, 0), state.weights, masks), state._replace(masks=masks)

    def pull(grads, weights, state):
        return map_latents(lambda g, w, m: g + decay * jnp.where(m, 0, w), grads, weights, state.masks), state

    return latent(StraightThroughState, inner, latents, forward, pull=pull)


PARAMS = {"kernel": jnp.array([[1.0, -2.0], [3.0, -4.0]]), "bias": jnp.array([0.5, 0.5])}


def test_the_loss_sees_the_largest_and_the_optimizer_moves_all():
    params, tx = jax.tree.map(jnp.copy, PARAMS), straight_through_top_k(optax.sgd(0.5), 2)
    opt_state = tx.init(params)
    params = jaxsparse.sparsify(opt_state, params)
    np.testing.assert_array_equal(params["kernel"], [[0, 0], [3, -4]])

    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    step = jax.jit(step, donate_argnums=(0, 1))
    types = signature((params, opt_state))
    for grads, bias, weights, seen in (
        # A pruned weight comes back as soon as it is among the largest.
        ([[-4.0, 4.0], [2.0, 0.0]], [1.0, -1.0], [[3, -4], [2, -4]], [[0, -4], [0, -4]]),
        # Of two equal ones the first stays.
        ([[8.0, 0.0], [-20.0, 0.0]], [0.0, 2.0], [[-1, -4], [12, -4]], [[0, -4], [12, 0]]),
    ):
        before = params["bias"] - 0.5 * jnp.array(bias)
        params, opt_state = step(params, opt_state, {"kernel": jnp.array(grads), "bias": jnp.array(bias)})
        np.testing.assert_array_equal(opt_state.weights["kernel"], weights)
        np.testing.assert_array_equal(params["kernel"], seen)
        np.testing.assert_array_equal(params["bias"], before)
        assert signature((params, opt_state)) == types
        jaxsparse.check(opt_state, params)
    assert isinstance(opt_state.weights["bias"], optax.MaskedNode)
    np.testing.assert_array_equal(jaxsparse.get_masks(opt_state)["kernel"], [[False, True], [True, False]])


def test_the_inner_optimizer_sees_the_latent_weights_and_their_gradient():
    def update(updates, state, params, *, grad, value):
        return jax.tree.map(lambda g: -value * g, grad), (updates, params)

    inner = optax.GradientTransformationExtraArgs(lambda params: (params, params), update)
    tx = straight_through_top_k(inner, 2, decay=0.25)
    opt_state = tx.init(PARAMS)
    params, grads = jaxsparse.sparsify(opt_state, PARAMS), jax.tree.map(jnp.ones_like, PARAMS)
    updates, opt_state = tx.update(grads, opt_state, params, grad=grads, value=2.0)
    seen, behind = opt_state.inner_state
    np.testing.assert_array_equal(seen["kernel"], [[1.25, 0.5], [1, 1]])
    jax.tree.map(np.testing.assert_array_equal, behind, PARAMS)
    np.testing.assert_array_equal(opt_state.weights["kernel"], [[-1.5, -3], [1, -6]])
    np.testing.assert_array_equal(params["kernel"] + updates["kernel"], [[0, -3], [0, -6]])


def test_leaves_without_an_update_stay():
    tx = straight_through_top_k(optax.sgd(0.5), 2)
    opt_state = tx.init(PARAMS)
    params = jaxsparse.sparsify(opt_state, PARAMS)
    updates, opt_state = tx.update({"kernel": None, "bias": None}, opt_state, params)
    assert updates["bias"] is None
    np.testing.assert_array_equal(updates["kernel"], np.zeros((2, 2)))
    np.testing.assert_array_equal(opt_state.weights["kernel"], PARAMS["kernel"])


def test_links_inside_are_found():
    params = {**PARAMS, "table": jnp.ones(4)}
    masks = {"kernel": True, "bias": True, "table": np.array([True, False, True, False])}
    tx = straight_through_top_k(jaxsparse.chain(optax.sgd(0.5), jaxsparse.mask_updates(masks)), 1)
    opt_state = tx.init(params)
    found = jaxsparse.get_masks(opt_state, params)
    assert jax.tree.map(jnp.sum, found) == {"kernel": 1, "bias": 1, "table": 2}


def test_what_goes_wrong_is_said_with_the_methods_name():
    with pytest.raises(ValueError, match="straight_through_top_k: inner must be an optimizer, .* got 0.1"):
        straight_through_top_k(0.1, 2)
    tx = straight_through_top_k(optax.sgd(0.5), 2)
    opt_state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="straight_through_top_k needs the params"):
        tx.update(PARAMS, opt_state)
    broken = opt_state._replace(weights={**opt_state.weights, "kernel": jnp.full((2, 2), jnp.nan)})
    with pytest.raises(jaxsparse.SparsityError, match="top_k: the weights of kernel are not finite"):
        jaxsparse.check(broken)
    with pytest.raises(jaxsparse.SparsityError, match="top_k: 2 pruned weights of kernel are not zero"):
        jaxsparse.check(opt_state, PARAMS)
