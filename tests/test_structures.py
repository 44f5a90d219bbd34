import logging

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxsparse
from jaxsparse.structures import align, check_structure, prunable_leaves
from tests.problems import SPARSE, make_params


def names(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, chosen in jax.tree_util.tree_flatten_with_path(tree)[0]
        if chosen
    }


def test_the_default_leaves_biases_scales_scalars_and_integers_dense(caplog):
    params = {
        **make_params(),
        "norm": {"scale": jnp.ones((2, 3)), "q_bias": jnp.ones((2, 3)), "offset": jnp.ones((1, 3))},
        "steps": jnp.ones((2, 2), int),
    }
    with caplog.at_level(logging.INFO, "jaxsparse"):
        chosen = prunable_leaves(params)
    assert names(chosen) == set(SPARSE)
    assert "prunable: attention/kernel, conv/kernel, dense/kernel; dense: attention/bias" in caplog.text


def test_a_predicate_and_a_tree():
    params = make_params()
    assert names(prunable_leaves(params, jaxsparse.Prunable(lambda path, leaf: leaf.ndim == 4))) == {"conv/kernel"}
    tree = jax.tree.map(lambda p: p.ndim == 4, params)
    assert names(prunable_leaves(params, tree)) == {"conv/kernel"}


@pytest.mark.parametrize(
    ("prunable", "message"),
    [
        (jaxsparse.Prunable(lambda path, leaf: path == "fc9/kernel"), "matches none of the params, which are att"),
        (jax.tree.map(lambda p: 1.0, make_params()), "must hold a bool for every leaf, got 1.0 for attention/bias"),
    ],
)  # fmt: skip
def test_bad_choices(prunable, message):
    with pytest.raises(ValueError, match=message):
        prunable_leaves(make_params(), prunable)


def test_integers_cannot_be_chosen():
    with pytest.raises(ValueError, match="chooses steps of dtype int32"):
        prunable_leaves({"steps": jnp.ones((2, 2), jnp.int32)}, {"steps": True})


def test_align_matches_by_path_and_ignores_what_is_masked():
    tree = {"a": 1, "b": {"c": 2, "d": 3}}
    assert align(tree, {"a": 0, "b": {"c": 0, "d": 0}}, "tree") == [1, 2, 3]
    assert align(tree, {"a": optax.MaskedNode(), "b": {"c": 0, "d": 0}}, "tree") == [2, 3]
    with pytest.raises(ValueError, match="tree must have the tree of the params, but has nothing for e"):
        align(tree, {"a": 0, "e": 0}, "tree")
    with pytest.raises(ValueError, match="but has b/c, b/d beyond them"):
        align(tree, {"a": 0}, "tree")


def test_structures_are_checked():
    check_structure({"conv/kernel": "channel"})
    with pytest.raises(ValueError, match=r"structure must be one of \['weight', 'kernel', 'channel'\], got 'blob'"):
        check_structure("blob")
    with pytest.raises(ValueError, match=r"structure must be one of \['weight'\], got 'channel'"):
        jaxsparse.sparse_momentum(0.9, 100, structure="channel")
