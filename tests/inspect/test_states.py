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
    ],
)
def test_arguments_that_changed_places(access):
    with pytest.raises(ValueError, match="the params and the optimizer state have changed places"):
        access(make_params(), sparse_state())


def test_masks_come_before_the_params():
    params = make_params()
    masks = jaxsparse.get_masks(sparse_state(), params)
    for look in (jaxsparse.summary, inspect.show, inspect.plot_weights):
        with pytest.raises(ValueError, match="the params and the masks have changed places: masks come first"):
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
