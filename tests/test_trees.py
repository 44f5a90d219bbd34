import logging

import optax
import pytest
from jax.tree_util import DictKey, GetAttrKey

from jaxsparse.trees import align, by_pattern, path_name


def test_only_the_attribute_of_a_variable_is_left_out_of_a_name():
    assert path_name((DictKey("head"), DictKey("kernel"), GetAttrKey("value"))) == "head/kernel"
    assert path_name((DictKey("head"), DictKey("kernel"), GetAttrKey("raw_value"))) == "head/kernel"
    assert path_name((DictKey("head"), DictKey("value"))) == "head/value"
    assert path_name((GetAttrKey("value"), GetAttrKey("weight"))) == "value/weight"
    assert path_name((GetAttrKey("value"),)) == "value"


def test_align_matches_by_path_and_ignores_what_is_masked():
    tree = {"a": 1, "b": {"c": 2, "d": 3}}
    assert align(tree, {"a": 0, "b": {"c": 0, "d": 0}}, "tree") == [1, 2, 3]
    assert align(tree, {"a": optax.MaskedNode(), "b": {"c": 0, "d": 0}}, "tree") == [2, 3]
    with pytest.raises(ValueError, match="tree must have the tree of the params, but has nothing for e"):
        align(tree, {"a": 0, "e": 0}, "tree")
    with pytest.raises(ValueError, match="but has b/c, b/d beyond them"):
        align(tree, {"a": 0}, "tree")


def test_the_first_pattern_that_matches_wins_and_what_it_took_is_logged(caplog):
    paths = ["a/attn/kernel", "a/mlp/kernel", "b/mlp/kernel", "odd[0]"]
    with caplog.at_level(logging.INFO, "jaxsparse"):
        found = by_pattern({"b/*": 1, "*/mlp/*": 2, "odd[0]": 3, "*": 4}, paths, "sparsity")
    assert found == {"a/attn/kernel": 4, "a/mlp/kernel": 2, "b/mlp/kernel": 1, "odd[0]": 3}
    assert "'*/mlp/*' selects a/mlp/kernel" in caplog.text
    assert by_pattern([("b/*", 1)], paths, "sparsity") == {"b/mlp/kernel": 1}
    with pytest.raises(ValueError, match=r"sparsity: 'a/mpl/kernel' matches none of a/attn.* \(near: a/mlp/kernel"):
        by_pattern({"a/mpl/kernel": 1}, paths, "sparsity")
    with pytest.raises(ValueError, match=r"'a/mlp/\*' selects nothing, since '\*' before it took a/mlp/kernel"):
        by_pattern({"*": 1, "a/mlp/*": 2}, paths, "sparsity")
    assert by_pattern({"nothing": 1}, paths, "sparsity", partial=True) == {}
