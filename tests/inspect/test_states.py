import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from jaxsparse import inspect
from tests.problems import SPARSE_SIZE, make_params


def sparse_state(params=None, **options):
    tx = jaxsparse.chain(optax.sgd(0.1, momentum=0.9), jaxsparse.sparse_momentum(0.75, 10, **options))
    return tx.init(make_params() if params is None else params)


def test_get_masks_has_the_tree_of_the_params():
    params = make_params()
    masks = jaxsparse.get_masks(sparse_state(), params)
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    assert masks["temperature"].shape == masks["dense"]["bias"].shape == ()
    assert masks["dense"]["kernel"].shape == (16, 24)
    assert masks["dense"]["kernel"].dtype == bool


def test_sparsify_and_eval_params_put_the_params_on_the_masks():
    params, state = make_params(), sparse_state()
    sparse = jaxsparse.sparsify(state, params)
    assert int((sparse["dense"]["kernel"] != 0).sum()) == 16 * 24 // 4
    assert sparse["dense"]["bias"] is params["dense"]["bias"]
    for a, b in zip(*map(jax.tree.leaves, (jaxsparse.eval_params(state, sparse), sparse)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "access", [jaxsparse.get_masks, jaxsparse.check, lambda s: jaxsparse.sparsify(s, make_params())]
)
def test_a_state_without_a_sparse_link_is_refused(access):
    with pytest.raises(ValueError, match="there is no sparse link in this optimizer state"):
        access(optax.sgd(0.1).init(make_params()))


@pytest.mark.parametrize(
    "access",
    [
        lambda params, state: jaxsparse.sparsify(params, state),
        lambda params, state: jaxsparse.eval_params(params, state),
        lambda params, state: jaxsparse.get_masks(params, state),
        lambda params, state: jaxsparse.check(params, state),
        lambda params, state: jaxsparse.summary(params, state),
        lambda params, state: jaxsparse.inspect.measure(params, state),
        lambda params, state: jaxsparse.inspect.current_masks(params, state),
    ],
)
def test_arguments_that_changed_places(access):
    with pytest.raises(ValueError, match="the params and the optimizer state are swapped"):
        access(make_params(), sparse_state())


def test_masks_come_before_the_params():
    params = make_params()
    masks = jaxsparse.get_masks(sparse_state(), params)
    for look in (jaxsparse.summary, inspect.show, inspect.plot_weights):
        with pytest.raises(ValueError, match="the params and the masks are swapped: masks come first"):
            look(params, masks)


def test_two_links_on_one_leaf_are_refused():
    params = make_params()
    with pytest.raises(ValueError, match="two sparse links mask the same leaf: attention/kernel"):
        jaxsparse.get_masks((sparse_state(), sparse_state()), params)
    with pytest.raises(ValueError, match="two sparse links mask the same leaf"):
        jaxsparse.get_masks((sparse_state(), sparse_state()))


def test_masks_of_other_params_are_refused():
    with pytest.raises(ValueError, match="masks of leaves that the params lack: attention/kernel"):
        jaxsparse.get_masks(sparse_state(), {"dense": make_params()["dense"]})


def test_check_says_what_is_wrong():
    params, (inner, link) = make_params(), sparse_state()
    sparse = jaxsparse.sparsify((inner, link), params)
    jaxsparse.check((inner, link), sparse)
    with pytest.raises(jaxsparse.SparsityError, match="pruned weights of dense/kernel are not zero"):
        jaxsparse.check((inner, link), params)
    full = jax.tree.map(jnp.ones_like, link.masks)
    with pytest.raises(
        jaxsparse.SparsityError, match=f"masks keep {SPARSE_SIZE} weights, but the budget is {SPARSE_SIZE // 4}"
    ):
        jaxsparse.check((inner, link._replace(masks=full)))
    with pytest.raises(jaxsparse.SparsityError, match="3 NaN"):
        jaxsparse.check((inner, link._replace(nan_scores=jnp.int32(3))))


def test_a_state_of_a_smaller_model_is_refused():
    params = make_params()
    more = params | {"new": {"kernel": jnp.ones((4, 4))}, "head": jnp.ones(3)}
    hidden = optax.masked(jaxsparse.asni(0.5, 2), {name: name != "conv" for name in params})
    for state in (sparse_state(), hidden.init(params)):
        for look in (jaxsparse.get_masks, jaxsparse.summary, jaxsparse.sparsify, jaxsparse.eval_params):
            look(state, params)
            with pytest.raises(ValueError, match="lacks these leaves of the params: head, new/kernel"):
                look(state, more)


@pytest.mark.slow
def test_layers_of_which_nothing_is_left_are_warned_of():
    params = {"big": jnp.ones((100, 100)), "out": {"kernel": 0.01 * jnp.ones((5, 4))}, "dense": jnp.ones((2, 2))}
    masks = {"big": params["big"] > 0, "out": {"kernel": jnp.zeros((5, 4), bool)}, "dense": True}
    links = [jaxsparse.mask_updates(masks), jaxsparse.sparse_momentum(0.5, 9, masks=masks, decay=0.9)]
    for state in (link.init(params) for link in links):
        with pytest.warns(UserWarning, match="^0 of 20 weights of out/kernel are left") as told:
            jaxsparse.check(state, jaxsparse.sparsify(state, params))
        assert len(told) == 1
    state = jax.vmap(lambda key: jaxsparse.sparse_momentum(0.5, 9, decay=0.9, key=key).init(params))(jnp.arange(2))
    with warnings.catch_warnings(action="error"):
        jaxsparse.check(state)  # replicas count apart
    one_emptied = state.masks | {"out": {"kernel": state.masks["out"]["kernel"].at[1].set(False)}}
    with pytest.warns(UserWarning, match="^0 of 20 weights of out/kernel are left"):
        jaxsparse.check(state._replace(masks=one_emptied, kept=state.kept.at[1].add(-10)))
    tx = jaxsparse.l0(optax.sgd(0.1), [jaxsparse.Group("g", {"big": 0})], penalty=1.0, log_alpha=-9.0)
    with pytest.warns(UserWarning, match="^0 of 100 open channels of group g are left"):
        jaxsparse.check(tx.init(params))


def test_looking_inside_jit_says_so():
    params, state = make_params(), sparse_state()
    for look in (jaxsparse.check, jaxsparse.summary, inspect.plot_weights, inspect.show):
        with pytest.raises(ValueError, match="needs concrete values, which do not exist inside jit.* call it outside"):
            jax.jit(lambda state, params, look=look: str(look(state, params)))(state, params)
    jax.jit(jaxsparse.get_masks)(state, params)
    jax.jit(jaxsparse.eval_params)(state, params)


def test_parts_of_complex_params_are_looked_at_in_parts():
    params = {"w": jnp.arange(1.0, 17.0).reshape(4, 4) * (1 + 2j)}
    link = jaxsparse.sparse_momentum(0.5, 2)
    tx = optax.contrib.split_real_and_imaginary(jaxsparse.chain(optax.sgd(0.1, momentum=0.9), link))
    opt_state = tx.init(params)
    updates, opt_state = tx.update(params, opt_state, params)
    params = optax.apply_updates(params, updates)
    for look in (jaxsparse.get_masks, jaxsparse.sparsify, jaxsparse.check):
        with pytest.raises(ValueError, match="real and imaginary parts of w have masks of their own"):
            look(opt_state, params)
    parts = jax.tree.map(lambda w: {"real": w.real, "imaginary": w.imag}, params)
    jaxsparse.check(opt_state, parts)
    assert int(jaxsparse.count(jaxsparse.get_masks(opt_state, parts))) == 16
