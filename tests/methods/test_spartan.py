import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from tests.problems import gradients, make_params

WEIGHTS = np.array([[0.9, -0.8, 0.05, 0.4], [-0.45, 0.3, -0.1, 0.7], [0.2, -0.6, 0.55, 0.0]])


def sinkhorn(values, k, beta, tolerance=0.01, rounds=100):
    """The authors' loop, with costs of 1, in double precision: y, from the dual variables mu and nu."""
    z = beta * (values - np.sort(values, axis=None)[::-1][k - 1])
    nu = -np.log1p(np.exp(z))
    before = np.sum(np.exp(z + nu) * values)
    for _ in range(rounds):
        mu = np.log(k) - np.log(np.sum(np.exp(z + nu)))
        nu = -np.log1p(np.exp(z + mu))
        y = np.exp(z + mu + nu)
        now = np.sum(y * values)
        if abs(now - before) <= tolerance * abs(before):
            break
        before = now
    return y


def moved(tx, weights, count, grads):
    """The state whose choice is that of a step, and how the weights move with gradients after it."""
    params = {"kernel": jnp.asarray(weights, jnp.float32)}
    opt_state = tx.init(params)._replace(count=jnp.int32(count - 1))
    updates, opt_state = tx.update({"kernel": jnp.zeros(weights.shape)}, opt_state, params)
    params = optax.apply_updates(params, updates)
    before = opt_state.weights["kernel"]
    _, after = tx.update({"kernel": jnp.asarray(grads, jnp.float32)}, opt_state, params)
    return opt_state, params["kernel"], before - after.weights["kernel"]


@pytest.mark.slow
def test_the_soft_choice_is_that_of_the_authors_loop():
    tx = jaxsparse.spartan(optax.sgd(1.0), 0.75, warmup=10, freeze_at=40)
    # Of 12 weights 12 - round(9 t / 10) are chosen, with a beta of 1 + 19 t / 40.
    for count, k in ((1, 11), (4, 8), (10, 3), (30, 3)):
        opt_state, params, _ = moved(tx, WEIGHTS, count, np.zeros((3, 4)))
        y = sinkhorn(np.abs(WEIGHTS), k, 1 + 19 * count / 40)
        np.testing.assert_allclose(opt_state.own["kernel"], y, rtol=2e-5)
        largest = np.abs(WEIGHTS) >= np.sort(np.abs(WEIGHTS), axis=None)[::-1][k - 1]
        np.testing.assert_array_equal(opt_state.masks["kernel"], largest)
        np.testing.assert_allclose(params, np.where(largest, WEIGHTS * y, 0), atol=1e-6)


def test_the_gradient_passes_through_the_choice():
    def product(weights, grads, k, beta):
        """The sum of G w y, with the y that adds up to k, by bisection."""
        low, high = -100.0, 100.0
        for _ in range(200):
            mu = (low + high) / 2
            y = 1 / (1 + np.exp(-beta * np.abs(weights) - mu))
            low, high = (mu, high) if y.sum() < k else (low, mu)
        return np.sum(grads * weights * y)

    weights, step = np.where(WEIGHTS == 0, 0.15, WEIGHTS), 1e-5
    grads = np.cos(np.arange(12.0)).reshape(3, 4)
    tx = jaxsparse.spartan(optax.sgd(1.0), 0.75, warmup=10, freeze_at=20, sharpness=7.0, tolerance=0.0)
    expected = np.zeros((3, 4))
    for at in np.ndindex(3, 4):
        there, back = weights.copy(), weights.copy()
        there[at] += step
        back[at] -= step
        expected[at] = (product(there, grads, 3, 4.0) - product(back, grads, 3, 4.0)) / (2 * step)
    _, _, found = moved(tx, weights, 10, grads)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    # From the last step on y is a constant, with zeros.
    opt_state, _, found = moved(tx, weights, 20, grads)
    np.testing.assert_allclose(found, grads * opt_state.own["kernel"], atol=1e-6)
    np.testing.assert_array_equal(np.asarray(found) != 0, opt_state.masks["kernel"])


@pytest.mark.parametrize("scope", ["layer", pytest.param("global", marks=pytest.mark.slow)])
def test_it_hardens_and_then_stays(scope):
    params = make_params()
    tx = jaxsparse.spartan(optax.sgd(0.05, momentum=0.9), 0.75, warmup=4, freeze_at=6, scope=scope)
    opt_state, states = tx.init(params), []
    params = jaxsparse.sparsify(opt_state, params)

    @jax.jit
    def step(params, opt_state, count):
        updates, opt_state = tx.update(gradients(params, count), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for count in range(8):
        params, opt_state = step(params, opt_state, count)
        jaxsparse.check(opt_state, params)
        states.append(opt_state)
    sizes = {"attention": 256, "conv": 144, "dense": 384}
    for t, state in enumerate(states, 1):
        kept = {name: int(state.masks[name]["kernel"].sum()) for name in sizes}
        share = 0.75 * min(t / 4, 1)
        if scope == "layer":
            assert kept == {name: size - round(size * share) for name, size in sizes.items()}
        else:
            assert sum(kept.values()) == 784 - round(784 * share)
    frozen, last = ((states[t].own, states[t].masks) for t in (5, 7))
    jax.tree.map(np.testing.assert_array_equal, frozen, last)
    # What passes no weight on is no longer in the soft choice either.
    jax.tree.map(lambda y, mask: np.testing.assert_array_equal(y != 0, mask), states[7].own, states[7].masks)
    # A weight of its full size has a y of nearly 1.
    assert max(float(y.max()) for y in jax.tree.leaves(opt_state.own)) > 0.99
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), jaxsparse.eval_params(opt_state, params), params
    )


def test_options_are_checked_when_the_wrapper_is_made():
    for options, message in (
        ({"sparsity": 1.0}, "sparsity must be at least 0 and below 1, got 1.0"),
        ({"warmup": 0}, "warmup must be at least 1, got 0"),
        ({"freeze_at": 5}, "freeze_at must be at least warmup, 10, got 5"),
        ({"sharpness": 0.5}, "sharpness must be at least 1, got 0.5"),
        ({"scope": "lamp"}, 'scope must be "global" or "layer", got \'lamp\''),
        ({"inner": 0.1}, "spartan: inner must be an optimizer, .* got 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            jaxsparse.spartan(**{"inner": optax.sgd(0.1), "sparsity": 0.9, "warmup": 10, "freeze_at": 20, **options})


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_leaf_without_entries_is_let_be(scope):
    params = {"none": jnp.ones((0, 4)), "some": jnp.arange(1.0, 17).reshape(4, 4)}
    tx = jaxsparse.spartan(optax.sgd(0.1), 0.5, warmup=1, freeze_at=2, scope=scope)
    opt_state = tx.init(params)
    for _ in range(3):
        updates, opt_state = tx.update(params, opt_state, params)
        params = optax.apply_updates(params, updates)
    assert int(jaxsparse.count(jaxsparse.get_masks(opt_state))) == 8
