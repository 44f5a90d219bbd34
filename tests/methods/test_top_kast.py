import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from tests.methods.published import INNERS, compare, ranks, straight
from tests.problems import jit_once, make_params, make_step, slow_except


def test_two_steps_by_hand():
    # Five weights 5, -4, 3, 2, 1: two in A (sparsity 0.6), three in B; SGD with a rate of 1, decay 0.2, 1/D = 2.5.
    # A: 5, -4; B: 3 too. Gradients 1: 1 + 0.2 * 5 = 2; 1 - 0.8 = 0.2; 1 + 0.2 * 2.5 * 3 = 2.5; the others stay:
    #   3, -4.2, 0.5, 2, 1. A: 3, -4.2; B: 2 too.
    # Gradients 0, 0, 7, 2, 7: 0.6; -0.84; none; 2 + 0.2 * 2.5 * 2 = 3; none:
    #   2.4, -3.36, 0.5, -1, 1. A: 2.4, -3.36; B: of -1 and 1 the first.
    params = {"w": jnp.array([[5.0, -4.0, 3.0, 2.0, 1.0]])}
    tx = jaxsparse.top_kast(optax.sgd(1.0), 0.6, 0.4, decay=0.2)
    update = jax.jit(tx.update)
    opt_state = tx.init(params)
    params = jaxsparse.sparsify(opt_state, params)
    np.testing.assert_array_equal(params["w"], [[5, -4, 0, 0, 0]])
    for grads, weights, seen, learning in (
        ([1.0, 1.0, 1.0, 1.0, 1.0], [3, -4.2, 0.5, 2, 1], [3, -4.2, 0, 0, 0], [0, 1, 3]),
        ([0.0, 0.0, 7.0, 2.0, 7.0], [2.4, -3.36, 0.5, -1, 1], [2.4, -3.36, 0, 0, 0], [0, 1, 3]),
    ):
        updates, opt_state = update({"w": jnp.array([grads])}, opt_state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(opt_state.weights["w"], [weights], rtol=1e-6)
        np.testing.assert_allclose(params["w"], [seen], rtol=1e-6)
        assert np.flatnonzero(opt_state.own.masks["w"]).tolist() == learning
        assert (int(opt_state.kept), int(opt_state.own.kept)) == (2, 3)
        jaxsparse.check(opt_state, params)
    lost = opt_state._replace(own=opt_state.own._replace(masks=jax.tree.map(jnp.zeros_like, opt_state.masks)))
    with pytest.raises(jaxsparse.SparsityError, match="backward set: the masks keep 0 .*; .* 2 weights of the forward"):
        jaxsparse.check(lost)


CASES = [("adam", 0.5, "l2"), ("sgd", 0.5, "l2"), ("momentum", 0.5, "l1"), ("sgd", 0.0, "l1")]


@pytest.mark.parametrize(("inner", "backward", "penalty"), slow_except(CASES[:1], CASES))
def test_it_is_the_published_training(inner, backward, penalty):
    def sets(w):
        place = ranks(w.reshape(-1), 0).reshape(w.shape)
        return place < w.size // 4, place < (1 - backward) * w.size

    def pull(g, w):
        here, there = sets(w)
        slope = w if penalty == "l2" else jnp.sign(w)
        return jnp.where(there, g + 0.01 * jnp.where(here, 1, 4) * slope, 0)

    image = straight(lambda w: jnp.where(sets(w)[0], w, 0), pull)
    optimizer = INNERS[inner]()
    tx = jaxsparse.top_kast(optimizer, 0.75, backward, decay=0.01, penalty=penalty)
    # The sets of a step are those of its weights; what is outside of B does not move, whatever the optimizer.
    compare(tx, optimizer, image, moves=lambda w, u: jnp.where(sets(w)[1], u, 0))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"scope": "global"}, {"allocation": "erdos_renyi_kernel", "every": 2}], ids=str
)
def test_sets_lie_in_each_other_and_nothing_outside_moves(options):
    tx = jaxsparse.top_kast(
        optax.adamw(0.05), optax.linear_schedule(0.5, 0.8, 4), optax.linear_schedule(0.2, 0.6, 4), **options
    )
    params = make_params()
    opt_state, step = tx.init(params), jit_once(make_step(tx))
    params = jaxsparse.sparsify(opt_state, params)
    for count in range(6):
        before = opt_state
        params, opt_state = step(params, opt_state, jnp.int32(count))
        jaxsparse.check(opt_state, params)
        for old, new, there in zip(
            *map(jax.tree.leaves, (before.weights, opt_state.weights, before.own.masks)), strict=True
        ):
            np.testing.assert_array_equal(old[~there], new[~there])
            assert bool((old != new)[there].all())
    assert (int(opt_state.kept), int(opt_state.own.kept)) == (157, 314)


def test_a_backward_set_that_would_be_smaller_is_counted():
    tx = jaxsparse.top_kast(optax.sgd(0.1), 0.5, lambda step: 0.25 * step)
    weights = {"w": jnp.arange(1.0, 9.0).reshape(2, 4)}
    opt_state, params, update = tx.init(weights), weights, jax.jit(tx.update)
    for _ in range(3):
        _, opt_state = update(weights, opt_state, params)
    assert (int(opt_state.kept), int(opt_state.own.kept), int(opt_state.clipped)) == (4, 4, 1)
    with pytest.raises(jaxsparse.SparsityError, match="1 times when masks were chosen, .* backward_sparsity was above"):
        jaxsparse.check(opt_state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": "adam"}, "top_kast: inner must be an optimizer, .* got 'adam'"),
        ({"backward_sparsity": 0.9}, "backward_sparsity must be at most sparsity, 0.8, got 0.9"),
        ({"sparsity": 1.0}, "sparsity must be at least 0 and below 1, got 1.0"),
        ({"sparsity": {"fc1": 0.5}}, "sparsity is one number for all leaves, or a schedule, got {'fc1': 0.5}"),
        ({"backward_sparsity": -0.1}, "backward_sparsity must be at least 0 and below 1, got -0.1"),
        ({"backward_sparsity": lambda step: -0.5}, "backward_sparsity is a schedule of fractions .* gives -0.5"),
        ({"decay": -1.0}, "decay must be at least 0, got -1.0"),
        ({"penalty": "l0"}, r"penalty must be one of \['l2', 'l1'\], got 'l0'"),
        ({"scope": "all"}, r"scope must be one of \['layer', 'global'\], got 'all'"),
    ],
)
def test_options_are_checked_when_the_wrapper_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        jaxsparse.top_kast(**{"inner": optax.sgd(0.1), "sparsity": 0.8, "backward_sparsity": 0.5, **options})
