import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from jaxsparse.transforms import align_signal, land_on_masks, on_update_steps, stored_momentum
from tests.problems import gradients, make_params


def recorder():
    """A link that keeps the extra args it was given."""
    seen = {}

    def update(updates, state, params=None, *, grad=None, momentum=None, **extra_args):
        seen.update(grad=grad, momentum=momentum, **extra_args)
        return updates, state

    return seen, optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def test_a_chain_of_plain_transformations_is_optax_chain():
    params = make_params()
    members = (optax.clip(1.0), optax.add_decayed_weights(0.1), optax.adam(0.01))
    ours, theirs = jaxsparse.chain(*members), optax.chain(*members)
    a, b = ours.init(params), theirs.init(params)
    for count in range(3):
        u, a = ours.update(gradients(params, count), a, params)
        v, b = theirs.update(gradients(params, count), b, params)
        for x, y in zip(jax.tree.leaves((u, a)), jax.tree.leaves((v, b)), strict=True):
            np.testing.assert_array_equal(x, y)


def test_members_see_the_gradient_that_entered():
    params = make_params()
    seen, link = recorder()
    tx = jaxsparse.chain(optax.scale(3.0), link)
    grads = gradients(params)
    tx.update(grads, tx.init(params), params)
    assert seen["grad"] is grads


def test_the_callers_signals_win_and_other_extra_args_pass():
    params = make_params()
    seen, link = recorder()
    tx = jaxsparse.chain(optax.sgd(0.1, momentum=0.9), jaxsparse.chain(link))
    tx.update(gradients(params), tx.init(params), params, grad="mine", momentum="mine too", value=1.0)
    assert seen == {"grad": "mine", "momentum": "mine too", "value": 1.0}


def test_an_inner_chain_sees_the_signals_of_the_outer():
    params = make_params()
    seen, link = recorder()
    tx = jaxsparse.chain(optax.sgd(0.1, momentum=0.9), jaxsparse.chain(optax.scale(2.0), link))
    grads = gradients(params)
    tx.update(grads, tx.init(params), params)
    assert seen["grad"] is grads
    # sgd's trace after its first step is the gradient.
    for m, g in zip(jax.tree.leaves(seen["momentum"]()), jax.tree.leaves(grads), strict=True):
        np.testing.assert_array_equal(m, g)


@pytest.mark.slow
def test_a_chain_in_a_chain_has_its_own_momentum_and_that_of_the_outer():
    params = make_params()
    whole = [optax.sgd(0.1, momentum=0.9), jaxsparse.sparse_momentum(0.5, 2)]
    flat, nested = jaxsparse.chain(*whole), jaxsparse.chain(jaxsparse.chain(*whole), optax.identity())
    state, nested_state = flat.init(params), nested.init(params)
    p = q = jaxsparse.sparsify(state, params)
    for count in range(4):
        u, state = flat.update(gradients(params, count), state, p)
        v, nested_state = nested.update(gradients(params, count), nested_state, q)
        p, q = optax.apply_updates(p, u), optax.apply_updates(q, v)
    for x, y in zip(jax.tree.leaves(p), jax.tree.leaves(q), strict=True):
        np.testing.assert_array_equal(x, y)

    seen, link = recorder()
    tx = jaxsparse.chain(optax.trace(0.9), jaxsparse.chain(optax.scale(2.0), optax.trace(0.5), link))
    tx.update(gradients(params), tx.init(params), params)
    for m, g in zip(jax.tree.leaves(seen["momentum"]()), jax.tree.leaves(gradients(params)), strict=True):
        np.testing.assert_array_equal(m, 2 * g)


@pytest.mark.parametrize("make", [
    lambda: jaxsparse.sparse_momentum(0.5, 2),
    lambda: jaxsparse.magnitude_pruning(0.5),
    lambda: jaxsparse.rigl(0.5, 2, stop_at=10),
])  # fmt: skip
def test_a_link_before_the_optimizer_is_told_to_stand_behind_it(make):
    tx = jaxsparse.chain(make(), optax.sgd(0.1, momentum=0.9))
    with pytest.raises(ValueError, match="the sparse link stands before the optimizer in the chain: put it last"):
        tx.init(make_params())


def test_in_a_plain_chain_sparse_momentum_says_what_it_lacks():
    params, link = make_params(), jaxsparse.sparse_momentum(0.5, 2)
    plain, ours = (chain(optax.sgd(0.1, momentum=0.9), link) for chain in (optax.chain, jaxsparse.chain))
    with pytest.warns(UserWarning, match="handed no momentum and takes the proposed update .* use jaxsparse.chain"):
        plain.update(gradients(params), plain.init(params), params)
    with warnings.catch_warnings(action="error"):
        ours.update(gradients(params), ours.init(params), params)
        plain.update(gradients(params), plain.init(params), params, momentum=params)


@pytest.mark.parametrize("make", [
    lambda steps: jaxsparse.sparse_momentum(0.5, steps),
    lambda steps: jaxsparse.sparse_momentum(0.5, 2, stop_at=steps),
    lambda steps: jaxsparse.asni(0.5, steps),
])  # fmt: skip
def test_steps_are_whole(make):
    with pytest.raises(ValueError, match="must be a whole number of steps, got 44.9"):
        make(44.9)
    make(44.0)
    make(np.int64(44))


def test_the_nearest_momentum_before_a_member_is_taken():
    params = {"w": jnp.ones((2, 2))}
    states = (optax.TraceState({"w": jnp.zeros((2, 2))}), optax.EmaState(jnp.int32(0), {"w": jnp.ones((2, 2))}))
    assert stored_momentum(states, params)["w"].tolist() == [[1, 1], [1, 1]]
    assert stored_momentum(states[::-1], params)["w"].tolist() == [[0, 0], [0, 0]]


def test_momenta_of_another_shape_are_not_taken():
    params = {"w": jnp.ones((2, 2))}
    assert stored_momentum((optax.TraceState({"w": jnp.zeros(4)}),), params)["w"] == optax.MaskedNode()


def test_a_state_of_another_chain_is_refused():
    params = make_params()
    tx = jaxsparse.chain(optax.sgd(0.1))
    with pytest.raises(ValueError, match="the chain has 1 members, but its state has 2 parts"):
        tx.update(gradients(params), (*tx.init(params), optax.EmptyState()), params)


def test_align_signal_takes_trees_and_functions():
    params = {"a": jnp.ones(2), "b": optax.MaskedNode()}
    tree = {"a": jnp.zeros(2), "b": jnp.ones(3)}
    assert align_signal(tree, params, "x")[0] is tree["a"]
    assert align_signal(lambda: tree, params, "x")[0] is tree["a"]
    assert align_signal({"a": optax.MaskedNode(), "b": 1}, params, "x") == [None]


def test_on_update_steps_computes_only_when_due():
    @jax.jit
    def step(due, old):
        return on_update_steps(due, lambda o: {"x": o["x"] + 1, "key": jax.random.split(o["key"])[0]}, old)

    old = {"x": jnp.zeros(3), "key": jax.random.key(0)}
    assert step(True, old)["x"].tolist() == [1, 1, 1]
    assert step(True, old)["key"] != old["key"]
    assert step(False, old)["x"].tolist() == [0, 0, 0]
    assert step(False, old)["key"] == old["key"]


def test_on_update_steps_under_vmap_gives_each_lane_its_own_and_computes_only_if_one_is_due():
    calls = []

    def compute(x):
        jax.debug.callback(lambda: calls.append(1))
        return x + 10

    step = jax.vmap(lambda due, x: on_update_steps(due, compute, x))
    x = jnp.arange(3.0)
    for run in (jax.jit(step), step):
        assert run(jnp.array([True, False, True]), x).tolist() == [10, 1, 12]
        jax.effects_barrier()
        assert calls
        calls.clear()
        assert run(jnp.zeros(3, bool), x).tolist() == [0, 1, 2]
        jax.effects_barrier()
        assert not calls
    nested = jax.jit(jax.vmap(step, in_axes=(None, 0)))
    assert nested(jnp.array([True, False, True]), jnp.stack([x, x + 1])).tolist() == [[10, 1, 12], [11, 2, 13]]


def test_on_update_steps_is_a_plain_branch_outside_of_jit():
    calls = []
    assert on_update_steps(jnp.array(False), calls.append, 3) == 3
    assert not calls


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_landing_is_exact_in_every_dtype(dtype):
    p = jnp.asarray(np.random.default_rng(0).normal(size=1000) * 10.0 ** np.arange(-4, 4).repeat(125), dtype)
    updates = land_on_masks({"w": jnp.full(1000, jnp.nan)}, {"w": p}, {"w": jnp.zeros(1000, bool)})
    assert updates["w"].dtype == dtype
    assert (optax.apply_updates({"w": p}, updates)["w"] == 0).all()


def test_line_searches_work_as_in_optax_chain():
    params = {"w": jnp.arange(1.0, 17.0).reshape(4, 4)}
    link = jaxsparse.mask_updates(jaxsparse.random_masks(params, 0.5))

    def loss(p):
        return jnp.sum((p["w"] - 3.0) ** 2)

    def program(tx):
        def step(params, state):
            value, grad = jax.value_and_grad(loss)(params)
            return tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)

        return str(jax.make_jaxpr(step)(params, jax.eval_shape(tx.init, params)))

    theirs = program(optax.chain(optax.lbfgs(), link))
    assert "while" in theirs
    assert program(jaxsparse.chain(optax.lbfgs(), link)) == theirs
    assert program(jaxsparse.chain(jaxsparse.chain(optax.lbfgs(), optax.identity()), jaxsparse.chain(link))) == theirs


def test_links_get_the_signals_however_they_are_wrapped():
    params, seen = make_params(), {}

    class State(NamedTuple):
        masks: dict

        def sparse_masks(self):
            return self.masks

        def wants_momentum(self):
            return False

        def problems(self, params):
            return []

    def update(updates, state, params=None, **extra_args):  # names none of them
        seen.update(extra_args)
        return updates, state

    link = optax.GradientTransformationExtraArgs(lambda params: State({"w": jnp.ones(2, bool)}), update)
    grads = gradients(params)
    for member in (
        link,
        optax.chain(optax.identity(), link),
        optax.named_chain(("a", optax.identity()), ("link", link)),
        optax.masked(link, jax.tree.map(lambda p: True, params)),
        optax.partition({"a": link}, jax.tree.map(lambda p: "a", params)),
        optax.inject_hyperparams(lambda number: link)(0.5),
        jaxsparse.chain(optax.identity(), optax.chain(link)),
    ):
        seen.clear()
        tx = jaxsparse.chain(optax.sgd(0.1, momentum=0.9), member)
        tx.update(grads, tx.init(params), params)
        assert seen["grad"] is grads
        np.testing.assert_array_equal(seen["momentum"]()["dense"]["kernel"], grads["dense"]["kernel"])


def test_numbers_of_low_precision_are_refused():
    params = {"w": jnp.ones((40, 50), jnp.bfloat16)}
    gate = jaxsparse.Group("g", {"w": 0})
    exact = functools.partial(optax.inject_hyperparams, hyperparam_dtype=jnp.float32)
    for name, make in (
        ("sparsity", lambda inject: inject(jaxsparse.sparse_momentum)(0.995, 100, decay=0.9)),
        ("prune_rate", lambda inject: inject(jaxsparse.sparse_momentum, "sparsity")(0.9, 100, prune_rate=0.3)),
        ("decay", lambda inject: inject(jaxsparse.sparse_momentum, ("sparsity", "prune_rate"))(0.9, 100, decay=0.9)),
        ("sparsity", lambda inject: inject(jaxsparse.asni)(0.995, 100)),
        ("the strength of the penalty", lambda inject: inject(jaxsparse.l0)(optax.sgd(0.1), [gate], penalty=1.0)),
    ):
        message = f"{name} must be a Python number or of float32, got bfloat16.*hyperparam_dtype=jnp.float32"
        with pytest.raises(ValueError, match=message):
            make(optax.inject_hyperparams).init(params)
        with pytest.raises(ValueError, match=message):  # traced
            jax.eval_shape(make(optax.inject_hyperparams).init, params)
        jax.eval_shape(make(exact).init, params)
    state = exact(jaxsparse.sparse_momentum)(0.995, 100, decay=0.9).init(params)
    assert int(jaxsparse.count(jaxsparse.get_masks(state))) == 10


def make_links(params):
    masks = jax.tree.map(lambda p: jnp.eye(4, dtype=bool) if jnp.ndim(p) == 2 else True, params)
    return (
        jaxsparse.mask_updates(masks),
        jaxsparse.asni(0.5, 2),
        jaxsparse.sparse_momentum(0.5, 2, decay=0.9),
        jaxsparse.reweighted_l1(0.1, l1=0.1),
    )


def test_python_numbers_are_leaves_as_for_optax():
    params = {"w": jnp.ones((4, 4)), "temperature": 1.0, "number": 3}
    for link in make_links(params):
        state = link.init(params)
        updates, state = link.update(params, state, params)
        assert (updates["temperature"].dtype, updates["number"].dtype) == (jnp.float32, jnp.int32)
        trained = optax.apply_updates(params, updates)
        jaxsparse.check(state, trained)
        assert float(jaxsparse.sparsify(state, trained)["temperature"]) == 2.0


def test_functions_among_the_leaves_are_named():
    params = {"layer": {"w": jnp.ones((4, 4)), "activation": jax.nn.relu}}
    for link in make_links({"layer": {"w": params["layer"]["w"], "activation": jnp.ones(())}}):
        with pytest.raises(
            ValueError, match=r"layer/activation is .* give its arrays: eqx.filter\(model, eqx.is_inexact_array\)"
        ):
            link.init(params)


def test_updates_of_none_stay_none():
    params = {"w": jnp.ones((4, 4)), "steps": jnp.arange(3), "absent": None}
    for link in make_links(params):
        updates, _ = link.update({"w": params["w"], "steps": None, "absent": None}, link.init(params), params)
        assert updates["steps"] is updates["absent"] is None
        zeros, _ = link.update({"w": 0 * params["w"], "steps": None, "absent": None}, link.init(params), params)
        none, _ = link.update({"w": None, "steps": None, "absent": None}, link.init(params), params)
        np.testing.assert_array_equal(none["w"], zeros["w"])  # a sparse leaf lands on its mask all the same


def test_numbers_of_steps_that_an_int32_does_not_hold_are_told():
    group = jaxsparse.Group("w", {"w": 0}, {"w": 0})
    for make in (
        lambda: jaxsparse.sparse_momentum(0.5, 2**31),
        lambda: jaxsparse.sparse_momentum(0.5, 2, stop_at=10**12),
        lambda: jaxsparse.asni(0.5, 2**31),
        lambda: jaxsparse.l0(optax.sgd(0.1), [group], penalty=1.0, freeze_gates_at=2**31),
    ):
        with pytest.raises(ValueError, match=r"must be below 2\*\*31, for steps are counted in int32"):
            make()


def test_sharpness_aware_minimisation():
    params = {"w": jnp.arange(1.0, 17.0).reshape(4, 4)}
    adversary = optax.sgd(0.01)

    def sam(optimizer, **options):
        return optax.contrib.sam(optimizer, adversary, sync_period=2, **options)

    def train(tx, **extra_args):
        p, state = params, tx.init(params)
        for _ in range(4):
            updates, state = tx.update(jax.tree.map(jnp.cos, p), state, p, **extra_args)
            p = optax.apply_updates(p, updates)
        jaxsparse.check(state, p)
        assert int((p["w"] != 0).sum()) == 8

    link = jaxsparse.mask_updates({"w": params["w"] > 8})
    train(jaxsparse.chain(sam(optax.sgd(0.1)), link))
    train(sam(jaxsparse.chain(optax.sgd(0.1), link), opaque_mode=True), grad_fn=lambda p, _: jax.tree.map(jnp.cos, p))
    for each in (link, jaxsparse.asni(0.5, 2)):
        with pytest.raises(ValueError, match="masks in the optimizer state have become int32.*optax.contrib.sam"):
            train(sam(jaxsparse.chain(optax.sgd(0.1), each)))
