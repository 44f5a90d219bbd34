import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from tests.problems import SPARSE_SIZE, make_params, make_step

SIZES = {"attention/kernel": 256, "conv/kernel": 144, "dense/kernel": 384}


def kept_by_step(tx, steps, params=None):
    """How many weights each leaf keeps after every step, and the params and masks at the end."""
    params = make_params() if params is None else params
    opt_state, step, history = tx.init(params), make_step(tx), []
    for count in range(steps):
        params, opt_state = step(params, opt_state, count)
        masks = jaxsparse.get_masks(opt_state)
        history.append([int(mask.sum()) for mask in jax.tree.leaves(masks) if mask.ndim])
    jaxsparse.check(opt_state, params)
    return np.array(history), params, masks


def test_every_layer_follows_equation_1_and_ends_where_it_says():
    tx = jaxsparse.chain(optax.sgd(0.05), jaxsparse.magnitude_pruning(0.9, begin=2, end=11, every=4))
    history, *_ = kept_by_step(tx, 14)
    sizes = np.array([*SIZES.values()])
    reached = np.zeros(3)
    for t, kept in enumerate(history):
        if t in (2, 6, 10, 11):
            reached = np.round(sizes * 0.9 * (1 - (1 - (t - 2) / 9) ** 3))
        np.testing.assert_array_equal(kept, sizes - reached)
    np.testing.assert_array_equal(history[-1], sizes - np.round(0.9 * sizes))


def test_at_once_it_is_magnitude_masks():
    params = make_params()
    _, _, masks = kept_by_step(jaxsparse.magnitude_pruning(0.75, begin=0), 1, params)
    expected = jaxsparse.magnitude_masks(params, 0.75)
    jax.tree.map(np.testing.assert_array_equal, masks, expected)
    _, _, masks = kept_by_step(jaxsparse.magnitude_pruning(0.75, scope="global"), 1, params)
    jax.tree.map(np.testing.assert_array_equal, masks, jaxsparse.magnitude_masks(params, 0.75, allocation="global"))


def test_a_schedule_of_steps_is_read_as_it_is_and_can_be_injected():
    linear = optax.linear_schedule(0.0, 0.5, 4)
    plain = jaxsparse.magnitude_pruning(linear, end=6, every=1, scope="global")
    history, *_ = kept_by_step(plain, 7)
    totals = [SPARSE_SIZE - round(SPARSE_SIZE * min(t / 8, 0.5)) for t in range(7)]
    assert history.sum(1).tolist() == totals
    injected = optax.inject_hyperparams(jaxsparse.magnitude_pruning, static_args=("end", "every", "schedule", "scope"))
    history, *_ = kept_by_step(injected(linear, end=6, every=1, schedule="constant", scope="global"), 7)
    assert history.sum(1).tolist() == totals
    named = jaxsparse.magnitude_pruning(0.5, end=4, every=2, schedule="linear", scope="global")
    assert kept_by_step(named, 5)[0].sum(1).tolist() == [SPARSE_SIZE, SPARSE_SIZE] + [totals[2]] * 2 + [totals[4]]


@pytest.mark.slow
def test_lamp_scores_are_those_of_a_loop_and_lose_no_layer():
    weights = jax.random.normal(jax.random.key(0), (5, 7))
    mask = jax.random.bernoulli(jax.random.key(1), 0.6, (5, 7))
    squares = np.where(mask, np.square(np.asarray(weights, np.float64)), 0)
    expected = [s / squares[squares >= s].sum() if s else 0 for s in squares.flat]
    np.testing.assert_allclose(jaxsparse.saliency.lamp_scores(weights, mask).reshape(-1), expected, rtol=1e-5)

    params = {"large": 10 * jax.random.normal(jax.random.key(2), (20, 10)), "small": jnp.linspace(0.01, 0.02, 8)[None]}
    by_scope = {scope: kept_by_step(jaxsparse.magnitude_pruning(0.9, scope=scope), 1, params)[0][-1].tolist()
                for scope in ("layer", "global", "lamp")}  # fmt: skip
    assert by_scope["layer"] == [20, 1]
    assert by_scope["global"] == [21, 0]
    assert sum(by_scope["lamp"]) == 21
    assert min(by_scope["lamp"]) > 0
    # Within a layer, the largest stay: what its mask would be at that number.
    _, _, masks = kept_by_step(jaxsparse.magnitude_pruning(0.9, scope="lamp"), 1, params)
    for name, mask in masks.items():
        order = np.argsort(-np.abs(np.asarray(params[name])).reshape(-1))
        assert mask.reshape(-1)[order[: int(mask.sum())]].all()


@pytest.mark.slow
def test_scores_of_ones_own_replace_the_magnitudes():
    params = make_params()

    def first_order(params, gradients):
        return {path: -params[path] * gradients[path] for path in params}

    tx = jaxsparse.chain(optax.sgd(0.1), jaxsparse.magnitude_pruning(0.5, score=first_order))
    grads = jax.tree.map(jnp.sin, params)
    _, state = tx.update(grads, tx.init(params), params)
    mask = jaxsparse.get_masks(state)["dense"]["kernel"]
    scores = -params["dense"]["kernel"] * grads["dense"]["kernel"]
    np.testing.assert_array_equal(mask, jaxsparse.top_k_mask(scores, 192))


@pytest.mark.slow
def test_units_and_n_of_m():
    structure = {"attention/kernel": jaxsparse.block(2, 4), "dense/kernel": jaxsparse.n_of_m(1, 4)}
    for scope in ("layer", "global", "lamp"):
        tx = jaxsparse.magnitude_pruning(0.8, end=2, every=1, scope=scope, structure=structure, at_least=1)
        history, _, masks = kept_by_step(tx, 3)
        assert jaxsparse.block(2, 4).holds(masks["attention"]["kernel"].reshape(16, 16))
        assert jaxsparse.n_of_m(1, 4).counts(masks["dense"]["kernel"]).min() >= 1
        assert history[-1].min() >= 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.5}, "sparsity must be at least 0 and at most 1, got 1.5"),
        ({"begin": 5, "end": 4}, "end must be at least begin, 5, got 4"),
        ({"every": 0}, "every must be at least 1"),
        ({"scope": "network"}, r"scope must be one of \['layer', 'global', 'lamp'\], got 'network'"),
        ({"schedule": "sudden"}, r"schedule must be one of \['cubic', 'linear', 'constant'\], got 'sudden'"),
        ({"structure": "row"}, "structure must be one of"),
    ],
)
def test_options_are_checked_when_the_link_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        jaxsparse.magnitude_pruning(**{"sparsity": 0.9, **options})
