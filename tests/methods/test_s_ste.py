import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from tests.methods.published import INNERS, compare, in_groups, make_problem, straight
from tests.problems import slow_except


def soft(w, n, m):
    """The soft threshold of every group: what its (m - n)-th smallest magnitude leaves."""
    magnitude = in_groups(jnp.abs(w), m)
    threshold = jnp.sort(magnitude, axis=1)[:, m - n - 1 : m - n]
    return jnp.sign(w) * jnp.maximum(magnitude - threshold, 0).reshape(w.shape)


def test_two_steps_by_hand():
    # 2:4, SGD with a rate of 1. Columns 1, -2, 3, -4 and 8, 2, -6, 4, thresholds 2 and 4, so S = 0, 0, 1, -2 and
    # 4, 0, -2, 0, and beta = (3 + 8 + 32 + 12) / (1 + 4 + 16 + 4) = 55 / 25 = 2.2.
    # Gradients (0, -1, 0, 0) and (6, 0, 0, 0): 1, -1, 3, -4 and 2, 2, -6, 4, thresholds 1 (twice) and 2 (twice):
    #   S = 0, 0, 2, -3 and 0, 0, -4, 2.
    # Gradients (-4, 0, 0, 0) and (0, 0, 0, 2): 5, -1, 3, -4 and 2, 2, -6, 2, thresholds 3 and 2 (three times):
    #   S = 2, 0, 0, -1 and 0, 0, -4, 0. The masks keep two each; of the three 2 the first, whose S is 0.
    weights = {"w": jnp.array([[1.0, 8.0], [-2.0, 2.0], [3.0, -6.0], [-4.0, 4.0]])}
    tx = jaxsparse.s_ste(optax.sgd(1.0))
    update = jax.jit(tx.update)
    opt_state = tx.init(weights)
    params = jaxsparse.sparsify(opt_state, weights)
    np.testing.assert_allclose(opt_state.own["w"], [[2.2]], rtol=1e-6)
    for grads, wanted, seen, masks in (
        ([[0, -1, 0, 0], [6, 0, 0, 0]], [[1, -1, 3, -4], [2, 2, -6, 4]], [[0, 0, 2, -3], [0, 0, -4, 2]], "0011 0011"),
        ([[-4, 0, 0, 0], [0, 0, 0, 2]], [[5, -1, 3, -4], [2, 2, -6, 2]], [[2, 0, 0, -1], [0, 0, -4, 0]], "1001 1010"),
    ):
        updates, opt_state = update({"w": jnp.array(grads, jnp.float32).T}, opt_state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(opt_state.weights["w"].T, wanted)
        np.testing.assert_allclose(params["w"].T, 2.2 * np.array(seen), rtol=1e-6)
        assert [[int(bit) for bit in column] for column in masks.split()] == opt_state.masks["w"].T.tolist()
        np.testing.assert_allclose(opt_state.own["w"], [[2.2]], rtol=1e-6)
        jaxsparse.check(opt_state, params)


CASES = [("adam", 2, 4), ("momentum", 1, 4), ("sgd", 1, 2)]


@pytest.mark.parametrize(("inner", "n", "m"), slow_except(CASES[:1], CASES))
def test_it_is_the_published_training(inner, n, m):
    first, _ = make_problem()
    kernels = {layer["kernel"].shape: layer["kernel"] for layer in first.values()}

    def image(w):
        start = kernels[w.shape]
        s = soft(start, n, m)
        return jnp.sum(start * s) / jnp.sum(s * s) * soft(w, n, m)

    optimizer = INNERS[inner]()
    compare(jaxsparse.s_ste(optimizer, n, m), optimizer, straight(image), first=image)


def test_nothing_jumps():
    # Where the masks change, both weights are 0: f moves as little as w does.
    weights = {"w": jnp.array([[1.0], [1.01], [2.0], [-3.0]])}
    tx = jaxsparse.s_ste(optax.sgd(1.0), 3, 4)
    opt_state = tx.init(weights)
    params = jaxsparse.sparsify(opt_state, weights)
    updates, opt_state = tx.update(jax.tree.map(jnp.zeros_like, weights), opt_state, params)
    before = optax.apply_updates(params, updates)
    updates, opt_state = tx.update({"w": jnp.array([[-0.02], [0.0], [0.0], [0.0]])}, opt_state, before)
    after = optax.apply_updates(before, updates)
    assert int(opt_state.flips) == 2
    assert float(jnp.abs(after["w"] - before["w"]).max()) < 0.025 * float(opt_state.own["w"][0, 0])


@pytest.mark.slow
def test_each_layer_of_a_stack_has_its_scale_and_a_ragged_leaf_is_one_group():
    key = jax.random.key(0)
    layout = {"stack": jaxsparse.Layout(1, 2, stack=0)}
    weights = {"stack": jax.random.normal(key, (3, 8, 5)), "odd": jax.random.normal(key, (6, 3))}
    with pytest.warns(UserWarning, match="does not fit odd"):
        state = jaxsparse.s_ste(optax.sgd(0.1), layout=layout, ragged="warn").init(weights)
    assert state.own["stack"].shape == (3, 1, 1)
    for layer, scale in zip(weights["stack"], state.own["stack"], strict=True):
        s = soft(layer, 2, 4)
        np.testing.assert_allclose(scale, jnp.sum(layer * s) / jnp.sum(s * s), rtol=1e-5)
    s = soft(weights["odd"].reshape(18, 1), 9, 18)
    np.testing.assert_allclose(state.own["odd"], jnp.sum(weights["odd"].reshape(18, 1) * s) / jnp.sum(s * s), rtol=1e-5)
    dense = jaxsparse.s_ste(optax.sgd(0.1), 4, 4).init({"w": weights["stack"][0], "zeros": jnp.zeros((4, 2))})
    assert [scale.tolist() for scale in jax.tree.leaves(dense.own)] == [[[1.0]], [[1.0]]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": optax.adam}, "s_ste: inner must be an optimizer, .* got <function adam"),
        ({"n": 5}, r"n_of_m needs 1 <= n <= m, got n_of_m\(5, 4"),
        ({"axis": "rows"}, 'axis must be "inputs", "outputs" or the number of an axis'),
        ({"ragged": "pad"}, r"ragged must be one of \['warn', 'error'\], got 'pad'"),
    ],
)
def test_options_are_checked_when_the_wrapper_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        jaxsparse.s_ste(**{"inner": optax.sgd(0.1), **options})


def test_leaves_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match=r"n_of_m\(2, 4.*\) does not fit fc/kernel of shape \(6, 2\)"):
        jaxsparse.s_ste(optax.sgd(0.1)).init({"fc": {"kernel": jnp.ones((6, 2))}})
