import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from jaxsparse import trace
from jaxsparse.trees import by_path
from tests.trace.models import eqx_mlp, mlp

CLOSED = {"fc1/kernel": np.arange(32) % 2 == 0, "fc2/kernel": np.arange(24) >= 20}
ROWS, COLUMNS = np.arange(1, 32, 2), np.arange(20)


def a_step(tx, params):
    """The state after a step with uneven gradients."""
    grads = jax.tree.map(lambda p: jnp.arange(p.size, dtype=p.dtype).reshape(p.shape) / p.size, params)
    return jax.jit(tx.update)(grads, tx.init(params), params)[1]


def slim_state(tx, state=None):
    apply, params, (x,) = mlp()
    state = a_step(tx, params) if state is None else state
    return state, trace.slim(apply, params, CLOSED, x, opt_state=state)


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(0.1),
        pytest.param(optax.sgd(0.1, momentum=0.9), marks=pytest.mark.slow),
        pytest.param(optax.MultiSteps(optax.lion(0.1), 2), marks=pytest.mark.slow),
        optax.masked(optax.adam(0.1), {"fc1": True, "fc2": True, "fc3": False}),
    ],
    ids=["adam", "momentum", "accumulated", "masked"],
)
def test_what_belongs_to_a_leaf_is_cut_like_it(tx):
    state, small = slim_state(tx)
    was, now = by_path(state), by_path(small.opt_state)
    assert list(was) == list(now)
    found = [path for path in was if path.endswith("fc2/kernel")]
    assert found
    for path in was:
        if path in found:
            np.testing.assert_array_equal(now[path], np.asarray(was[path])[np.ix_(ROWS, COLUMNS)])
        elif np.ndim(was[path]) == 0 and "kept" not in path:
            assert now[path] == was[path]
    _, again = jax.eval_shape(tx.update, small.params, small.opt_state, small.params)
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, small.opt_state)


@pytest.mark.slow
def test_masks_count_what_is_left():
    _, params, _ = mlp()
    tx = jaxsparse.chain(optax.sgd(0.1, momentum=0.9), jaxsparse.magnitude_pruning(0.5, every=1))
    state = a_step(tx, params)
    _, small = slim_state(tx, state)
    masks = jaxsparse.get_masks(small.opt_state, small.params)
    np.testing.assert_array_equal(masks["fc2"]["kernel"], state[-1].masks["fc2"]["kernel"][np.ix_(ROWS, COLUMNS)])
    assert sum(mask.sum() for mask in jax.tree.leaves(small.opt_state[-1].masks)) < state[-1].kept
    jaxsparse.check(small.opt_state)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tx",
    [
        jaxsparse.straight_through(optax.sgd(0.1), 0.5, every=100),
        jaxsparse.top_kast(optax.sgd(0.1), 0.75, 0.5, every=100),
        jaxsparse.chain(optax.sgd(0.1), jaxsparse.srigl(0.75, 2, stop_at=99, never_ablate="*", allocation="uniform")),
    ],
    ids=["straight_through", "top_kast", "srigl"],
)
def test_budgets_are_those_of_the_smaller_network(tx):
    apply, params, (x,) = mlp()
    state = a_step(tx, params)
    small = trace.slim(apply, jaxsparse.sparsify(state, params), CLOSED, x, opt_state=state)
    params, state = small.params, small.opt_state
    link = state if hasattr(state, "kept") else state[-1]
    if link.method == "srigl":  # outputs have unequally many inputs until masks change
        kept = int(link.kept)
        for _ in range(4):
            updates, state = jax.jit(tx.update)(params, state, params)
            params = optax.apply_updates(params, updates)
        assert kept / 2 < int(state[-1].kept) <= kept
    jaxsparse.check(state, params)


@pytest.mark.slow
def test_gates_are_cut_by_group():
    apply, params, (x,) = mlp()
    groups = trace.channel_groups(apply, params, x)
    tx = jaxsparse.l0(optax.adam(0.1), groups, penalty=1e-3)
    state = a_step(tx, params)
    small = trace.slim(apply, jaxsparse.eval_params(state, params), CLOSED, x, groups=groups, opt_state=state)
    np.testing.assert_array_equal(small.opt_state.log_alpha["fc1/kernel"], state.log_alpha["fc1/kernel"][ROWS])
    np.testing.assert_array_equal(small.opt_state.gate_state[0].mu[1], state.gate_state[0].mu[1][COLUMNS])
    tx = jaxsparse.l0(optax.adam(0.1), trace.channel_groups(small.apply, small.params, x), penalty=1e-3)
    fresh = tx.init(small.params)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, small.opt_state)


def test_the_optimizer_may_see_a_part_of_the_params():
    apply, params, (x,) = mlp()
    variables = {"batch_stats": {"mean": jnp.ones(20)}, "params": params}

    def centred(variables, x):
        return apply(variables["params"], x - variables["batch_stats"]["mean"][None])

    both = trace.channel_groups(centred, variables, x)
    groups = both.within("params")
    tx = jaxsparse.l0(optax.adam(0.1), groups, penalty=1e-3)
    state = a_step(tx, params)
    closed = {f"params/{name}": shut for name, shut in CLOSED.items()}
    small = trace.slim(centred, variables, closed, x, groups=both, opt_state=state)
    of_params = trace.slim(apply, params, CLOSED, x, groups=groups, opt_state=state)
    jax.tree.map(np.testing.assert_array_equal, small.params["params"], of_params.params)
    assert small.opt_state.inner_state[0].mu["fc2"]["kernel"].shape == (16, 20)
    numbers = [jax.tree.leaves(one.opt_state._replace(key=())) for one in (small, of_params)]
    jax.tree.map(np.testing.assert_array_equal, *numbers)


@pytest.mark.slow
def test_gates_of_stacked_layers_stay_where_any_layer_is_open():
    def apply(params, x):
        return jax.lax.scan(lambda x, p: (x + jnp.tanh(x @ p["up"]) @ p["down"], None), x, params)[0]

    params, x = {"up": jnp.ones((3, 5, 4)), "down": jnp.ones((3, 4, 5))}, jnp.ones((2, 5))
    groups = trace.channel_groups(apply, params, x).per_layer()
    (hidden,) = (group for group in groups if group.size == 12)
    tx = jaxsparse.l0(optax.adam(0.1), [hidden], penalty=1e-3)
    closed = np.array([[True, True, False, False], [True, False, True, False], [True, True, False, False]])
    state = a_step(tx, params)
    small = trace.slim(apply, params, {hidden.name: closed.reshape(-1)}, x, groups=[hidden], opt_state=state)
    assert small.params["up"].shape == (3, 5, 3)
    log_alpha = np.asarray(state.log_alpha[hidden.name]).reshape(3, 4)
    np.testing.assert_array_equal(small.opt_state.log_alpha[hidden.name].reshape(3, 3), log_alpha[:, 1:])


def test_leaves_are_found_by_path_where_the_tree_is_another():
    apply, model, (x,) = eqx_mlp()
    arrays = jax.tree.map(lambda leaf: leaf if hasattr(leaf, "dtype") else None, model)
    state = optax.adam(0.1).init(arrays)
    (first, *_) = trace.channel_groups(apply, model, x)
    small = trace.slim(apply, model, {first.name: np.arange(16) < 6}, x, opt_state=state)
    assert small.opt_state[0].mu.layers[0].weight.shape == small.params.layers[0].weight.shape == (10, 12)


def test_states_that_cannot_be_cut():
    with pytest.raises(ValueError, match=r"v_row/fc1/kernel has shape \(20,\), which cannot be cut as fc1/kernel"):
        slim_state(optax.adafactor(0.1, min_dim_size_to_factor=8))
    apply, params, (x,) = mlp()
    groups = trace.channel_groups(apply, params, x)
    tx = jaxsparse.dep_l0(optax.sgd(0.1), groups, penalty=1e-3)
    with pytest.raises(ValueError, match="dep_l0: a generator of gates has the sizes of the groups"):
        slim_state(tx, tx.init(params))
    tx = jaxsparse.l0(optax.sgd(0.1), [jaxsparse.Group("hidden", {"fc2/kernel": 0})], penalty=1e-3)
    with pytest.raises(ValueError, match="l0: the groups have no 'hidden'"):
        slim_state(tx, tx.init(params))
