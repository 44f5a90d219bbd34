import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from tests.methods.published import INNERS, compare, in_groups, ranks, straight
from tests.problems import slow_except


def test_two_steps_by_hand():
    # 2:4 along the inputs, SGD with a rate of 1, decay 1/2. Two outputs: the columns 1, -2, 3, -4 and 8, 6, -2, 4.
    # Kept at first: 3, -4 and 8, 6.
    # Gradients (0, -2, 2, -1) and (0, 3, 0, -3) + half of the pruned weights (1/2, -1, 0, 0) and (0, 0, -1, 2):
    #   1/2, 1, 1, -3: of the two 1 the first is kept; 8, 3, -1, 5: kept 8, 5.
    # Gradients (0, 0, 1, 0) and (1, 0, 0, 5) + (1/4, 0, 1/2, 0) and (0, 3/2, -1/2, 0):
    #   1/4, 1, -1/2, -3: kept 1, -3; 7, 3/2, -1/2, 0: kept 7, 3/2.
    params = {"w": jnp.array([[1.0, 8.0], [-2.0, 6.0], [3.0, -2.0], [-4.0, 4.0]])}
    tx = jaxsparse.sr_ste(optax.sgd(1.0), 2, 4, decay=0.5)
    update = jax.jit(tx.update)
    opt_state = tx.init(params)
    params = jaxsparse.sparsify(opt_state, params)
    np.testing.assert_array_equal(params["w"].T, [[0, 0, 3, -4], [8, 6, 0, 0]])
    for grads, weights, seen, flips in (
        ([[0, -2, 2, -1], [0, 3, 0, -3]], [[0.5, 1, 1, -3], [8, 3, -1, 5]], [[0, 1, 0, -3], [8, 0, 0, 5]], 4),
        ([[0, 0, 1, 0], [1, 0, 0, 5]], [[0.25, 1, -0.5, -3], [7, 1.5, -0.5, 0]], [[0, 1, 0, -3], [7, 1.5, 0, 0]], 2),
    ):
        updates, opt_state = update({"w": jnp.array(grads, jnp.float32).T}, opt_state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(opt_state.weights["w"].T, weights)
        np.testing.assert_array_equal(params["w"].T, seen)
        assert (int(opt_state.flips), int(opt_state.kept)) == (flips, 4)
        jaxsparse.check(opt_state, params)


CASES = [("adam", 2, 4, 0.05), ("momentum", 1, 4, 0.05), ("momentum", 2, 4, 0.0), ("sgd", 3, 4, 0.5)]


@pytest.mark.parametrize(("inner", "n", "m", "decay"), slow_except(CASES[:1], CASES))
def test_it_is_the_published_training(inner, n, m, decay):
    def mask(w):
        return (ranks(in_groups(w, m), 1) < n).reshape(w.shape)

    image = straight(lambda w: jnp.where(mask(w), w, 0), lambda g, w: g + decay * jnp.where(mask(w), 0, w))
    optimizer = INNERS[inner]()
    compare(jaxsparse.sr_ste(optimizer, n, m, decay=decay), optimizer, image)


def test_the_decay_may_be_a_schedule_of_the_step_that_saw_the_masks():
    weights, grads = {"w": jnp.array([[1.0], [-2.0]])}, {"w": jnp.zeros((2, 1))}
    tx = jaxsparse.sr_ste(optax.sgd(1.0), 1, 2, decay=lambda step: 0.5 * step)
    opt_state, found = tx.init(weights), []
    params = jaxsparse.sparsify(opt_state, weights)
    for _ in range(3):
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        found.append(float(opt_state.weights["w"][0, 0]))
    assert found == [1.0, 0.5, 0.0]


@pytest.mark.slow
def test_groups_lie_along_the_inputs_wherever_these_are():
    weights = {"weight": jnp.arange(1.0, 25.0).reshape(3, 8), "kernel": jnp.arange(1.0, 97.0).reshape(3, 4, 8)}
    layout = {"weight": jaxsparse.Layout(1, 0), "kernel": jaxsparse.Layout((0, 1), 2)}
    state = jaxsparse.sr_ste(optax.sgd(0.1), 2, 4, layout=layout).init(weights)
    np.testing.assert_array_equal(state.masks["weight"], np.tile([False, False, True, True], (3, 2)))
    np.testing.assert_array_equal(state.masks["kernel"], np.tile([[False], [False], [True], [True]], (3, 1, 8)))
    outputs = jaxsparse.sr_ste(optax.sgd(0.1), 1, 8, axis="outputs", prunable="kernel", layout=layout).init(weights)
    assert outputs.masks["kernel"].sum((0, 1)).tolist() == [0, 0, 0, 0, 0, 0, 0, 12]


def test_leaves_that_do_not_divide_are_named():
    weights = {"conv": {"kernel": jnp.arange(1.0, 25.0).reshape(2, 1, 3, 4)}, "fc": {"kernel": jnp.ones((8, 2))}}
    with pytest.raises(ValueError, match=r"n_of_m\(2, 4.*does not fit conv/kernel of shape \(2, 1, 3, 4\).*prunable="):
        jaxsparse.sr_ste(optax.sgd(0.1), 2, 4).init(weights)
    without = jaxsparse.sr_ste(optax.sgd(0.1), 2, 4, prunable=jaxsparse.all_but("conv")).init(weights)
    assert isinstance(without.weights["conv"]["kernel"], optax.MaskedNode)
    with pytest.warns(UserWarning, match="does not fit conv/kernel .*single weights"):
        state = jaxsparse.sr_ste(optax.sgd(0.1), 1, 4, ragged="warn").init(weights)
    assert state.masks["conv"]["kernel"].reshape(-1).tolist() == [False] * 18 + [True] * 6
    assert int(state.kept) == 6 + 4
    with pytest.warns(UserWarning, match="single weights"):
        state = jaxsparse.sr_ste(optax.sgd(0.1), 1, 8, ragged="warn").init({"w": jnp.arange(3.0)[:, None]})
    assert state.masks["w"][:, 0].tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": 0.1}, "sr_ste: inner must be an optimizer, .* got 0.1"),
        ({"n": 5}, r"n_of_m needs 1 <= n <= m, got n_of_m\(5, 4"),
        ({"n": 0}, "n_of_m needs 1 <= n <= m"),
        ({"decay": -1e-4}, "decay must be at least 0, got -0.0001"),
        ({"decay": None}, "decay must be a number or a schedule, got NoneType"),
        ({"decay": lambda step: step - 1.0}, "decay of step 0 must be at least 0, got -1"),
        ({"axis": "rows"}, 'axis must be "inputs", "outputs" or the number of an axis'),
        ({"ragged": "pad"}, r"ragged must be one of \['warn', 'error'\], got 'pad'"),
        ({"every": 1.5}, "every must be a whole number of steps"),
    ],
)
def test_options_are_checked_when_the_wrapper_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        jaxsparse.sr_ste(**{"inner": optax.sgd(0.1), "n": 2, "m": 4, **options})
