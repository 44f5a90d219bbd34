import logging
import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxsparse
from jaxsparse.prunable import prunable_leaves
from jaxsparse.trees import by_path
from tests.problems import SPARSE, make_params


def names(tree):
    return {path for path, chosen in by_path(tree).items() if chosen}


def test_the_default_leaves_biases_scales_scalars_and_integers_dense(caplog):
    params = {
        **make_params(),
        "norm": {"scale": jnp.ones((2, 3)), "q_bias": jnp.ones((2, 3)), "offset": jnp.ones((1, 3))},
        "cell": {"bias_n": jnp.ones((2, 3)), "gamma": jnp.ones((2, 3))},
        "cls": jnp.ones((1, 1, 8)),
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


def test_all_but_some_keeps_the_default_for_the_rest():
    params = make_params()
    assert names(prunable_leaves(params, jaxsparse.all_but("conv", "attention/kernel"))) == {"dense/kernel"}
    assert names(prunable_leaves(params, jaxsparse.all_but())) == set(SPARSE)
    with pytest.raises(ValueError, match="all_but: 'den' matches none of the params, which are att"):
        prunable_leaves(params, jaxsparse.all_but("den", "conv/kernel/x"))
    with pytest.raises(ValueError, match="matches none of the params"):
        prunable_leaves(params, jaxsparse.all_but("conv", "attention", "dense"))


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


def test_globs_choose_among_what_is_prunable_by_default_and_whole_paths_choose_anything(caplog):
    params = make_params()
    assert names(prunable_leaves(params, "*/kernel")) == set(SPARSE)
    assert names(prunable_leaves(params, ["conv/*", "attention"])) == {"conv/kernel", "attention/kernel"}
    assert names(prunable_leaves(params, ("conv/*", "dense/bias"))) == {"conv/kernel", "dense/bias"}
    assert names(prunable_leaves(params, jaxsparse.all_but("*en*/kernel"))) == {"conv/kernel"}
    for prunable, message in (
        ("*/attn/*", r"prunable: '\*/attn/\*' matches none of the params, which are attention/bias"),
        ("*/bias", r"'\*/bias' matches only attention/bias, conv/bias, dense/bias, dense by default"),
        (["conv/*", "fc"], "'fc' matches none"),
        (jaxsparse.all_but("*/attn/*"), "all_but: .* matches none"),
    ):
        with pytest.raises(ValueError, match=message):
            prunable_leaves(params, prunable)
    hidden = jaxsparse.random_masks({"conv": params["conv"]}, 0.5, prunable="*")
    assert int(hidden["conv"]["kernel"].sum()) == 72


def test_a_predicate_that_takes_a_gain_is_told_with_its_name():
    params = {"block": {"norm": {"weight": jnp.ones((6, 8)), "bias": jnp.ones((6, 8))}, "w": jnp.ones((6, 8, 8))}}
    everything = jaxsparse.Prunable(lambda path, leaf: leaf.ndim > 1 and "bias" not in path)
    with pytest.warns(UserWarning, match="block/norm/weight"):
        assert names(prunable_leaves(params, everything)) == {"block/norm/weight", "block/w"}
    with warnings.catch_warnings(action="error"):  # said to be one
        layout = {"block/norm/weight": jaxsparse.Layout(0, 1)}
        assert "block/norm/weight" in names(prunable_leaves(params, everything, layout=layout))
        assert names(prunable_leaves(params, layout=layout)) == {"block/norm/weight", "block/w"}


@pytest.mark.slow
def test_a_layer_called_value_is_a_name_and_the_wrapper_of_nnx_is_none():
    attention = nnx.MultiHeadAttention(num_heads=2, in_features=4, rngs=nnx.Rngs(0), decode=False)
    linen = nn.MultiHeadDotProductAttention(2).init(jax.random.key(0), jnp.ones((1, 3, 4)))["params"]
    for params in (nnx.state(attention, nnx.Param), nnx.to_pure_dict(nnx.state(attention, nnx.Param)), linen):
        every = {"key/kernel", "out/kernel", "query/kernel", "value/kernel"}
        assert names(prunable_leaves(params)) == every
        assert names(prunable_leaves(params, jaxsparse.all_but("value"))) == every - {"value/kernel"}
        assert names(prunable_leaves(params, jaxsparse.Prunable(lambda path, _: path.endswith("value/kernel")))) == {
            "value/kernel"
        }
        structure = {"value/kernel": jaxsparse.n_of_m(2, 4)}
        masks = by_path(jaxsparse.magnitude_masks(params, {"value/*": 0.5, "*": 0.0}, prunable="value/*"))
        assert int(masks["value/kernel"].sum()) == 8
        masks = by_path(jaxsparse.magnitude_masks(params, 0.0, structure=structure))
        assert masks["value/kernel"].sum(0).tolist() == [[2, 2], [2, 2]]
    flat = {"attn": {name: jnp.ones((4, 4)) for name in ("query", "key", "value", "raw_value")}}
    chosen = names(prunable_leaves(flat, jaxsparse.all_but("attn/value")))
    assert chosen == {"attn/query", "attn/key", "attn/raw_value"}


class Block(eqx.Module):
    norm: eqx.nn.LayerNorm
    n1: eqx.nn.RMSNorm
    conv: eqx.nn.Conv2d
    fc: eqx.nn.Linear

    def __init__(self, key):
        self.norm, self.n1 = eqx.nn.LayerNorm((4, 3, 3)), eqx.nn.RMSNorm(8, use_bias=False)
        self.conv, self.fc = eqx.nn.Conv2d(2, 4, 3, key=key), eqx.nn.Linear(8, 8, key=key)


@pytest.mark.slow
def test_stacked_norms_and_biases_stay_dense():
    keys = jax.random.split(jax.random.key(0), 6)
    for params in (Block(keys[0]), eqx.filter_vmap(Block)(keys)):
        params = eqx.filter(params, eqx.is_array)
        assert names(prunable_leaves(params)) == {"conv/weight", "fc/weight"}
        masks = by_path(jaxsparse.random_masks(params, 0.9))
        assert all(mask.shape == () for path, mask in masks.items() if path not in ("conv/weight", "fc/weight"))
        assert by_path(jaxsparse.nonzero_masks(jax.tree.map(jnp.zeros_like, params)))["norm/weight"].shape == ()
        rda = jaxsparse.rda(0.1, l1=0.1).init(params)
        shrunk = names(jax.tree.map(lambda mask: mask.ndim > 0, jaxsparse.get_masks(rda, params)))
        assert shrunk == {"conv/weight", "fc/weight"}


def test_layers_that_are_called_after_a_norm_are_pruned():
    params = {"norm_proj": {"weight": jnp.ones((8, 8))}, "ln_out_linear": {"weight": jnp.ones((8, 8))}}
    params |= {
        "proj_norm": {"weight": jnp.ones((8, 8)), "bias": jnp.ones((8, 8))},
        "shift_conv": jnp.ones((3, 3, 8, 8)),
    }
    assert names(prunable_leaves(params)) == {"norm_proj/weight", "ln_out_linear/weight", "shift_conv"}


@pytest.mark.parametrize(
    ("params", "told"),
    [
        (
            {"m": {"w1": jnp.ones((8, 8)), "rel_bias": jnp.ones((8, 8))}, "fc": {"w": jnp.ones((8, 8))}},
            "m/w1 .*rel_bias",
        ),
        ({"l": {"w": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}, "fc": {"w": jnp.ones((8, 8))}}, "l/w .*as b beside it"),
        ([(jnp.ones((3, 4, 5)), jnp.ones((3, 5)))], "0/1 .*biases of the stacked layers"),
    ],
)
def test_what_stays_dense_by_a_guess_is_told(params, told):
    with pytest.warns(UserWarning, match=f"stay dense, which is a guess: {told}.*layout="):
        prunable_leaves(params)


def test_gains_of_stacked_norms_are_no_guess():
    layers = {
        "ln": {"w": jnp.ones((3, 8)), "b": jnp.ones((3, 8))},
        "fc": {"w": jnp.ones((3, 8, 8)), "b": jnp.ones((3, 8))},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(prunable_leaves({"layers": layers})) == {"layers/fc/w"}
