"""Blocks removed from params, masks and optimizer states: in any containers, numbered anew."""

import collections

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze

import jaxsparse
from jaxsparse import models
from jaxsparse.post_training import drop_blocks
from jaxsparse.post_training.block_names import numbers_of
from tests.trace.models import NNXGPT, TOKENS, EqxGPT, filled


def numbered(names, shape=(2, 3)):
    """A tree of dicts whose leaves are filled with the number of their block; -1 elsewhere."""
    tree = {name: {"kernel": jnp.full(shape, i, jnp.float32)} for i, name in enumerate(names)}
    return {"embed": jnp.full(3, -1.0), **tree}


def test_dicts_are_numbered_anew():
    names = [f"layer_{i}" for i in range(12)]
    found = drop_blocks(numbered(names), "layer_*", [0, 2, 11])
    assert list(found) == ["embed", *names[:9]]
    assert [int(found[name]["kernel"][0, 0]) for name in names[:9]] == [1, 3, 4, 5, 6, 7, 8, 9, 10]
    haiku = {f"gpt/~/block_{i}/linear": {"w": jnp.full(2, i)} for i in range(3)}
    assert list(drop_blocks(haiku, "gpt/~/block_*", [1])) == ["gpt/~/block_0/linear", "gpt/~/block_1/linear"]
    assert isinstance(drop_blocks(freeze(numbered(names)), "layer_*", [1]), FrozenDict)


def test_sequences_and_what_else_holds_blocks():
    Pair = collections.namedtuple("Pair", "blocks head")
    tree = Pair([{"w": jnp.full(2, i)} for i in range(3)], jnp.ones(2))
    found = drop_blocks(tree, "blocks/*", [0])
    assert isinstance(found, Pair)
    assert [int(block["w"][0]) for block in found.blocks] == [1, 2]
    assert isinstance(drop_blocks(tree._replace(blocks=tuple(tree.blocks)), "blocks/*", [2]).blocks, tuple)
    layers = drop_blocks({"a": {"blocks": jnp.arange(4.0), "rate": 2.0}, "mask": {"blocks": True}}, "blocks", [1, 3])
    assert layers["a"]["blocks"].tolist() == [0, 2]
    assert layers["mask"]["blocks"] is True
    shapes = drop_blocks({"blocks": jax.ShapeDtypeStruct((3, 2), jnp.float32)}, "blocks", [1])
    assert shapes["blocks"].shape == (2, 2)


def test_layers_of_the_same_name_further_down_stay():
    def tree(stack):
        layers = [{"mlp": {"layers": [jnp.full(2, 10 * i + j) for j in range(2)]}} for i in range(2)]
        layers = jax.tree.map(lambda *x: jnp.stack(x), *layers) if stack else layers
        return {"layers": layers, "head": {"layers": jnp.full((2, 2), -1) if stack else [jnp.full(2, -1)] * 2}}

    for blocks, stack in (("layers/*", False), ("layers", True)):
        found = drop_blocks({"mu": tree(stack), "nu": tree(stack)}, blocks, [0])
        for part in found.values():
            assert [leaf.ravel().tolist() for leaf in jax.tree.leaves(part["layers"])] == [[10, 10], [11, 11]]
            assert len(jax.tree.leaves(part["head"])) == (1 if stack else 2)
            assert sum(leaf.size for leaf in jax.tree.leaves(part["head"])) == 4


def test_the_blocks_of_leaves():
    tree = {"layers": [{"mlp": {"layers": [jnp.ones(2)] * 2}, "scale": jnp.ones(2)}] * 2, "head": {"layers": [1.0]}}
    want = {f"layers/{i}/{name}": i for i in range(2) for name in ("mlp/layers/0", "mlp/layers/1", "scale")}
    assert numbers_of(tree, "layers/*") == (want, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("blocks", "stack"), [("block_*", False), ("blocks", True)])
def test_states_of_optimizers(blocks, stack):
    params = numbered([f"block_{i}" for i in range(3)])
    if stack:
        stack = jnp.stack([params[f"block_{i}"]["kernel"] for i in range(3)])
        params = {"embed": params["embed"], "blocks": {"kernel": stack}}
    masks = jax.tree.map(lambda p: p != 0 if p.ndim > 1 else True, params)

    def link(masks):
        kernels = jax.tree.map(lambda mask: mask is not True, masks)
        return optax.chain(optax.masked(optax.adam(0.1), kernels), jaxsparse.mask_updates(masks))

    tx = link(masks)
    _, state = tx.update(jax.tree.map(lambda p: 10 * p, params), tx.init(params), params)
    dropped, small = drop_blocks(state, blocks, [1]), drop_blocks(params, blocks, [1])
    less = link(drop_blocks(masks, blocks, [1]))
    assert jax.tree.structure(dropped) == jax.tree.structure(less.init(small))
    adam = dropped[0].inner_state[0]
    moved = np.concatenate([np.ravel(mu) for mu in jax.tree.leaves(adam.mu)])
    assert sorted({round(float(mu), 4) for mu in moved}) == [0, 2]
    kept = jaxsparse.get_masks(dropped, small)
    assert jax.tree.structure(kept) == jax.tree.structure(small)
    assert int(dropped[1].kept) == sum(int(m.sum()) for m in jax.tree.leaves(kept) if np.ndim(m)) == 6
    updates, _ = less.update(small, dropped, small)
    assert jax.tree.structure(updates) == jax.tree.structure(small)


BAD = {
    "unknown": (numbered(["a_0", "a_1"]), "b_*", [0], "'b_.' names nothing in the tree"),
    "no such number": (numbered(["a_0", "a_1"]), "a_*", [0, 2], r"remove names \[2\], but .* has the numbers 0 to 1"),
    "all": (numbered(["a_0", "a_1"]), "a_*", [0, 1], "all 2 of .* are to be removed: one must stay"),
    "gaps": (numbered(["a_0", "a_2"]), "a_*", [0], r"the tree must have the blocks 0, 1, ..., and has \[0, 2\]"),
    "star first": (
        [jnp.ones(2), jnp.ones(2)],
        "*",
        [0],
        "one . for the number of the block, which does not stand first",
    ),
    "one number": (numbered(["a_0", "a_1"]), "a_*", 1, r"remove must be the numbers of the blocks .*, got 1"),
    "flags": (numbered(["a_0", "a_1"]), "a_*", [True, False], "remove must be the numbers of the blocks"),
    "several": (
        {"x": numbered(["a_0", "a_1"]), "y": numbered(["a_0", "a_1", "a_2"])},
        "a_*",
        [0],
        "different numbers of blocks",
    ),
    "no stack": (numbered(["a_0", "a_1"]), "blocks", [0], "one axis of layers in front, got {}"),
    "lengths": ({"a": {"x": jnp.ones(2), "y": jnp.ones(3)}}, "a", [0], "one axis of layers in front, got {'a/x': 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_dropped(name):
    tree, blocks, remove, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        drop_blocks(tree, blocks, remove)


@pytest.mark.slow
def test_states_that_have_numbers_for_each_leaf():
    params = numbered(["a_0", "a_1"], (8, 8))
    gates = jaxsparse.l0(optax.sgd(0.1), [jaxsparse.Group("g", {"a_0/kernel": 0})], penalty=1.0)
    with pytest.raises(ValueError, match="l0: gates cannot be dropped with blocks"):
        drop_blocks(gates.init(params), "a_*", [0])


@pytest.mark.slow
def test_modules_with_fewer_blocks():
    model = models.GPT(32, 16, 3, max_length=8)
    params = filled(jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS)))["params"]
    small = drop_blocks(params, "block_*", [1])
    logits = models.GPT(32, 16, 2, max_length=8).apply({"params": small}, TOKENS)
    stacked = {name: leaf for name, leaf in params.items() if not name.startswith("block")}
    stacked["blocks"] = jax.tree.map(lambda *x: jnp.stack(x), *(params[f"block_{i}"] for i in range(3)))
    scan = models.GPT(32, 16, 2, max_length=8, scan=True).apply({"params": drop_blocks(stacked, "blocks", [1])}, TOKENS)
    np.testing.assert_allclose(logits, scan, atol=1e-5)


@pytest.mark.slow
def test_modules_of_nnx_and_equinox():
    weights = nnx.state(NNXGPT(nnx.Rngs(0)), nnx.Param)
    small = drop_blocks(weights, "blocks/*", [0])
    assert type(small) is type(weights)
    want, found = weights["blocks"][1]["up"]["kernel"], small["blocks"][0]["up"]["kernel"]
    np.testing.assert_array_equal(found.get_value(), want.get_value())
    model = EqxGPT(jax.random.key(0))
    fewer = drop_blocks(eqx.filter(model, eqx.is_array), "blocks", [1])
    np.testing.assert_array_equal(fewer.blocks.up.weight, model.blocks.up.weight[jnp.array([0, 2])])
    layers = eqx.nn.MLP(4, 4, 4, 3, key=jax.random.key(1))
    assert [x is y for x, y in zip(drop_blocks(layers, "layers/*", [0]).layers, layers.layers[1:], strict=True)]


def test_numbers_with_zeros_in_front_keep_their_digits():
    layers = {f"layer_{i:02d}": {"w": np.full(2, i)} for i in range(12)}
    left = drop_blocks(layers, "layer_*", [1])
    assert sorted(left) == [f"layer_{i:02d}" for i in range(11)]
    assert [int(left[name]["w"][0]) for name in sorted(left)] == [0, *range(2, 12)]


def test_default_dicts_stay_what_they_are():
    params = collections.defaultdict(dict, {f"layers_{i}": {"w": jnp.full(2, i)} for i in range(3)})
    small = drop_blocks({"model": params}, "model/layers_*", [1])["model"]
    assert type(small) is collections.defaultdict
    assert small.default_factory is dict
    assert {name: int(block["w"][0]) for name, block in small.items()} == {"layers_0": 0, "layers_1": 2}
