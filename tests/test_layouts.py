import functools
import warnings

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxsparse
from jaxsparse.layouts import Layout, leaf_layouts
from jaxsparse.structures import leaf_structures
from jaxsparse.trees import by_path
from tests.problems import make_params

KEY = jax.random.key(0)


class Block(nn.Module):
    bias: bool = True

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.MultiHeadDotProductAttention(4, use_bias=self.bias)(nn.LayerNorm()(x))
        return x + nn.Dense(64, use_bias=False)(nn.Dense(128, use_bias=self.bias)(y)), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=12)
        x, _ = scanned(name="blocks")(nn.Embed(50, 64)(x))
        return nn.Dense(10)(nn.LayerNorm()(x))


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), use_bias=False, name="first")(x)
        x = nn.ConvTranspose(16, (3, 3), transpose_kernel=True, name="up")(x)
        x = nn.Conv(16, (3, 3), feature_group_count=16)(x)
        return nn.Conv(32, (5,))(x.reshape(x.shape[0], -1, 16))


class EquinoxBlock(eqx.Module):
    norm: eqx.nn.LayerNorm
    fc: eqx.nn.Linear
    conv: eqx.nn.Conv2d
    embed: eqx.nn.Embedding
    cell: eqx.nn.GRUCell

    def __init__(self, key):
        self.norm, self.fc, self.conv = (
            eqx.nn.LayerNorm(64),
            eqx.nn.Linear(64, 32, key=key),
            eqx.nn.Conv2d(8, 16, 3, key=key),
        )
        self.embed, self.cell = eqx.nn.Embedding(100, 8, key=key), eqx.nn.GRUCell(4, 8, key=key)


def shapes_of(module, *args):
    return jax.eval_shape(module.init, KEY, *args)["params"]


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def haiku_stack(x):
    return hk.experimental.layer_stack(6)(lambda x: hk.Linear(64)(hk.LayerNorm(-1, True, True)(x)))(x)


STACKED = eqx.filter_eval_shape(
    lambda: eqx.filter(eqx.filter_vmap(EquinoxBlock)(jax.random.split(KEY, 6)), eqx.is_array)
)
ATTENTION = "MultiHeadDotProductAttention_0"
# params, then (path, inputs, outputs, stack) of the leaves that multiply; every other one is no matrix
TREES = [
    (shapes_of(Block(), jnp.ones((2, 5, 64))), [
        (f"{ATTENTION}/query/kernel", (0,), (1, 2), ()), (f"{ATTENTION}/key/kernel", (0,), (1, 2), ()),
        (f"{ATTENTION}/value/kernel", (0,), (1, 2), ()), (f"{ATTENTION}/out/kernel", (0, 1), (2,), ()),
        ("Dense_0/kernel", (0,), (1,), ()), ("Dense_1/kernel", (0,), (1,), ())]),
    (shapes_of(Stack(), jnp.ones((2, 5), int)), [
        (f"blocks/{ATTENTION}/query/kernel", (1,), (2, 3), (0,)),
        (f"blocks/{ATTENTION}/key/kernel", (1,), (2, 3), (0,)),
        (f"blocks/{ATTENTION}/value/kernel", (1,), (2, 3), (0,)),
        (f"blocks/{ATTENTION}/out/kernel", (1, 2), (3,), (0,)),
        ("blocks/Dense_0/kernel", (1,), (2,), (0,)), ("blocks/Dense_1/kernel", (1,), (2,), (0,)),
        ("Embed_0/embedding", (0,), (1,), ()), ("Dense_0/kernel", (0,), (1,), ())]),
    (shapes_of(Convolutions(), jnp.ones((1, 8, 8, 3))), [
        ("first/kernel", (2,), (3,), ()), ("up/kernel", (3,), (2,), ()), ("Conv_0/kernel", (2,), (3,), ()),
        ("Conv_1/kernel", (1,), (2,), ())]),
    (jax.eval_shape(hk.transform(haiku_stack).init, KEY, jnp.ones((2, 64))), [
        ("__layer_stack_no_per_layer/linear/w", (1,), (2,), (0,))]),
    (STACKED, [
        ("fc/weight", (2,), (1,), (0,)), ("conv/weight", (2,), (1,), (0,)), ("embed/weight", (1,), (2,), (0,)),
        ("cell/weight_ih", (2,), (1,), (0,)), ("cell/weight_hh", (2,), (1,), (0,))]),
    (jax.eval_shape(lambda: {"mlp": {"w": jnp.ones((3, 8, 4)), "b": jnp.ones((3, 4))},
                             "ab": {"a": jnp.ones((8, 2)), "b": jnp.ones((2, 8))},
                             "qkv": {"kernel": jnp.ones((64, 3, 4, 16))}, "head": {"weight": jnp.ones((10, 64))},
                             "experts": {"wi": jnp.ones((8, 4, 16)), "wo": jnp.ones((8, 16, 4))}}), [
        ("mlp/w", (1,), (2,), (0,)), ("ab/a", (0,), (1,), ()), ("ab/b", (0,), (1,), ()),
        ("qkv/kernel", (0,), (1, 2, 3), ()), ("head/weight", (1,), (0,), ()),
        ("experts/wi", (1,), (2,), (0,)), ("experts/wo", (1,), (2,), (0,))]),
    # Plain dicts, in the manner of others. Stacked blocks without biases, gains that are leaves of their own.
    ({"layers": {"attention_norm": shape(6, 16), "wq": shape(6, 16, 16), "wo": shape(6, 16, 16), "w1": shape(6, 16, 64),
                 "w2": shape(6, 64, 16)}}, [
        ("layers/wq", (1,), (2,), (0,)), ("layers/wo", (1,), (2,), (0,)), ("layers/w1", (1,), (2,), (0,)),
        ("layers/w2", (1,), (2,), (0,))]),
    ({"ff": {"W": shape(3, 16, 64), "b": shape(3, 64)}, "cls_token": shape(1, 16),
      "head": {"w": shape(8, 4), "b": shape(1, 4)},
      "attn": {"wq": shape(16, 4, 4), "bq": shape(4, 4)}, "lora": {"a": shape(8, 2), "b": shape(2, 8)}}, [
        ("ff/W", (1,), (2,), (0,)), ("head/w", (0,), (1,), ()), ("attn/wq", (0,), (1, 2), ()),
        ("lora/a", (0,), (1,), ()), ("lora/b", (0,), (1,), ())]),
    ({"attn": {"query": {"kernel": shape(16, 4, 8)}, "key": {"kernel": shape(16, 2, 8)},
               "value": {"kernel": shape(16, 1, 8)}, "out": {"kernel": shape(4, 8, 16)}},
      "value": {"kernel": shape(3, 3, 8, 64), "bias": shape(64)}, "to_qkv": {"kernel": shape(1, 1, 8, 24)}}, [
        ("attn/query/kernel", (0,), (1, 2), ()), ("attn/key/kernel", (0,), (1, 2), ()),
        ("attn/value/kernel", (0,), (1, 2), ()), ("attn/out/kernel", (0, 1), (2,), ()),
        ("value/kernel", (2,), (3,), ()), ("to_qkv/kernel", (2,), (3,), ())]),
    ({"embedding": {"kernel": shape(4, 4, 3, 16), "bias": shape(16)},
      "ConvStack_0": {"Conv_0": {"kernel": shape(3, 3, 8, 9)}},
      "conv2_d_transpose": {"w": shape(3, 3, 8, 16)}, "pos_embed": shape(1, 9, 16)}, [
        ("embedding/kernel", (2,), (3,), ()), ("ConvStack_0/Conv_0/kernel", (2,), (3,), ()),
        ("conv2_d_transpose/w", (3,), (2,), ()), ("pos_embed", (1,), (2,), (0,))]),
    ({"scan_blocks": {"alpha": shape(6), "query": {"kernel": shape(6, 16, 4, 4)}, "ln": {"scale": shape(6, 16)}}}, [
        ("scan_blocks/query/kernel", (1,), (2, 3), (0,))]),
    ({"PreNormBlock_0": {"w1": shape(16, 64)}, "norm_mlp": {"weight": shape(64, 16), "bias": shape(64)},
      "scale_proj": shape(16, 16), "to_gamma": shape(16, 16), "unembed": {"weight": shape(100, 16)}}, [
        ("PreNormBlock_0/w1", (0,), (1,), ()), ("norm_mlp/weight", (1,), (0,), ()), ("scale_proj", (0,), (1,), ()),
        ("to_gamma", (0,), (1,), ()), ("unembed/weight", (1,), (0,), ())]),
]  # fmt: skip


def test_inputs_outputs_and_stacks_of_every_framework():
    for params, matrices in TREES:
        found = leaf_layouts(params)
        assert {path for path, layout in found.items() if layout.is_matrix} == {path for path, *_ in matrices}
        for path, inputs, outputs, stack in matrices:
            assert found[path] == Layout(inputs, outputs, stack), path
            assert not found[path].guess, path


def test_what_sizes_contradict_or_nothing_tells_is_in_doubt():
    hidden = {"norm": optax.MaskedNode(), "query": {"kernel": shape(6, 16, 4, 4)}, "up": shape(6, 16, 64)}
    for params in (
        {"h": {"query": {"kernel": shape(6, 16, 4, 4)}, "out": {"kernel": shape(6, 4, 4, 16)}, "wq": shape(6, 16, 16)}},
        {"layers": {"norm": {"scale": shape(16, 6)}, "up": shape(16, 6, 64), "down": shape(64, 6, 16)}},
        {"q_einsum": {"w": shape(4, 16, 4)}, "kv_einsum": {"w": shape(2, 1, 16, 4)}},
        hidden,
    ):
        for path, layout in leaf_layouts(params).items():
            assert bool(layout.guess) == layout.is_matrix, path


def test_what_is_in_doubt_is_a_guess_that_layout_settles():
    params = {
        "u": jnp.ones((3, 4, 8)),
        "c": {"kernel": jnp.ones((5, 4, 8)), "bias": jnp.ones(8)},
        "fc": jnp.ones((8, 8)),
    }
    found = leaf_layouts(params)
    assert found["u"].guess
    assert found["c/kernel"].guess
    assert not found["fc"].guess
    with pytest.warns(UserWarning, match=r"u \(.*\), c/kernel \(|c/kernel \(.*\), u \("):
        jaxsparse.random_masks(params, 0.5, structure=jaxsparse.block(2, 2))
    with pytest.warns(UserWarning, match="allocation 'erdos_renyi' needs"):
        jaxsparse.random_masks(params, 0.5, allocation="erdos_renyi")
    said = {"u": Layout(inputs=(0, 1), outputs=2), "*/kernel": Layout(1, 2)}
    with warnings.catch_warnings(action="error"):
        masks = jaxsparse.random_masks(params, 0.5, structure=jaxsparse.n_of_m(1, 3), prunable="u", layout=said)
        jaxsparse.random_masks(params, 0.5, allocation="erdos_renyi", layout=said)
        jaxsparse.random_masks(params, 0.5)  # for which no axis counts
    assert masks["u"].reshape(4, 3, 8).sum(1).tolist() == [[1] * 8] * 4
    for layout, message in (
        ({"v": Layout(0, 1)}, "layout: 'v' matches none of"),
        ({"fc": Layout(0, 2)}, r"layout of fc of shape \(8, 8\): .* a leaf of rank 2 does not have"),
        ({"fc": (0, 1)}, r"layout of fc must be a jaxsparse.Layout, got \(0, 1\)"),
        (Layout(0, 1), "layout names leaves"),
    ):
        with pytest.raises(ValueError, match=message):
            leaf_layouts(params, layout)
    with pytest.raises(ValueError, match="names each axis once"):
        Layout(0, 0)


VIEWS = [
    # layout, shape, shape seen as matrices, its element (..., i, o) in the leaf
    (Layout(0, (1, 2)), (6, 2, 4), (6, 8), lambda i, o: (i, o // 4, o % 4)),
    (Layout((0, 1), 2), (2, 4, 6), (8, 6), lambda i, o: (i // 4, i % 4, o)),
    (Layout(1, 0), (6, 8), (8, 6), lambda i, o: (o, i)),
    (Layout(2, 1, stack=0), (3, 6, 8), (3, 8, 6), lambda s, i, o: (s, o, i)),
    (Layout(1, 0), (4, 8, 3, 2), (3, 2, 8, 4), lambda h, w, i, o: (o, i, h, w)),
]


def test_a_leaf_is_seen_as_matrices_and_back():
    for layout, shape, seen, at in VIEWS:
        leaf = jax.random.normal(KEY, shape)
        matrices = layout.to_matrices(leaf)
        assert matrices.shape == seen == layout.matrix_shape(shape)
        for index in np.ndindex(seen):
            assert matrices[index] == leaf[at(*index)]
        np.testing.assert_array_equal(layout.from_matrices(matrices, leaf), leaf)


@pytest.mark.slow
def test_structures_count_in_inputs_and_outputs_wherever_they_lie():
    groups, tiles = jaxsparse.n_of_m(2, 4), jaxsparse.block(2, 2)
    for layout, shape, seen, _ in VIEWS:
        leaf = jax.random.normal(KEY, shape)
        plain = layout.to_matrices(leaf)
        of_groups, of_tiles, of_columns = (
            jax.tree.leaves(leaf_structures({"w": s}, {"w": leaf}, {"w": True}, layout={"w": layout}))[0]
            for s in (groups, tiles, "channel")
        )
        if seen[-2] % 4 == 0:
            mask = jax.jit(functools.partial(of_groups.top, absolute=True))(leaf)
            np.testing.assert_array_equal(layout.to_matrices(mask), groups.top(plain, absolute=True))
            assert bool(of_groups.holds(mask))
        np.testing.assert_array_equal(of_tiles.scores(leaf), tiles.scores(plain))
        live = tiles.scores(plain) > 0.8
        np.testing.assert_array_equal(layout.to_matrices(of_tiles.expand(live, leaf)), tiles.expand(live, plain))
        columns = of_columns.scores(leaf)
        axes = tuple(range(len(layout.stack), len(seen) - 1))
        np.testing.assert_allclose(columns, np.abs(plain).mean(axes, keepdims=True), rtol=1e-5)


def test_groups_along_an_axis_of_choice():
    leaf = jax.random.normal(KEY, (4, 8))
    for axis, along in (("outputs", 1), (1, 1), (-1, 1), (0, 0), ("inputs", 0)):
        mask = jaxsparse.magnitude_masks({"w": leaf}, 0.5, structure=jaxsparse.n_of_m(2, 4, axis=axis))["w"]
        groups = np.moveaxis(np.asarray(mask), along, -1).reshape(-1, 4)
        assert (groups.sum(1) == 2).all()
    with pytest.raises(ValueError, match="axis must be"):
        jaxsparse.n_of_m(2, 4, axis="heads")


@pytest.mark.slow
def test_equal_matrices_get_equal_densities_and_a_stack_is_its_layers():
    shapes = {"q": (512, 8, 64), "same": (512, 512), "mlp": (512, 2048)}
    for kernel in (False, True):
        densities = jaxsparse.erdos_renyi(shapes, 0.1, kernel=kernel)
        assert densities["q"] == densities["same"] > densities["mlp"]
    layers = {f"block{i}": {"kernel": jnp.ones((64, 256)), "bias": jnp.ones(256)} for i in range(12)}
    stack = {"kernel": jnp.ones((12, 64, 256)), "bias": jnp.ones((12, 256))}
    embed = {"embed": {"embedding": jnp.ones((256, 64))}}
    for allocation in ("erdos_renyi", "erdos_renyi_kernel"):
        one = jaxsparse.random_masks({**embed, **layers}, 0.8, allocation=allocation)
        other = jaxsparse.random_masks({**embed, "blocks": stack}, 0.8, allocation=allocation)
        assert int(one["embed"]["embedding"].sum()) == int(other["embed"]["embedding"].sum())
        assert sum(int(layer["kernel"].sum()) for layer in map(one.get, layers)) == int(other["blocks"]["kernel"].sum())


@pytest.mark.slow
def test_every_method_takes_heads_and_outputs_first():
    """2:4 and columns of attention and of Equinox are those of the matrix, in all methods that take structures."""
    params = {"query": {"kernel": jax.random.normal(KEY, (8, 2, 4))}, "fc": {"weight": jax.random.normal(KEY, (6, 8))}}
    seen = {"query/kernel": Layout(0, (1, 2)), "fc/weight": Layout(1, 0)}
    columns = {"query/kernel": "channel", "fc/weight": "channel"}
    for method in (
        jaxsparse.sparse_momentum(0.5, 1, structure=columns, growth="random", redistribution="none"),
        jaxsparse.asni(0.5, 1, structure=columns),
        jaxsparse.reweighted_l1(0.1, l1=4.0, structure=columns),
    ):
        tx = jaxsparse.chain(optax.sgd(0.1, momentum=0.9), method)
        state, weights = tx.init(params), params
        for _ in range(3):
            updates, state = jax.jit(tx.update)(weights, state, weights)
            weights = jax.tree.map(jnp.add, weights, updates)
        for path, leaf in by_path(weights).items():
            live = seen[path].to_matrices(leaf) != 0
            assert (live.all(0) | ~live.any(0)).all(), (method, path)
            assert not live.all()
    grown = jaxsparse.momentum_regrowth(
        params, params, jaxsparse.random_masks(params, 0.5), 0.5, growth="momentum_neuron"
    )
    assert sum(int(mask.sum()) for mask in jax.tree.leaves(grown)) == 56


@pytest.mark.slow
def test_the_views_work_on_sharded_leaves_of_explicit_meshes():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    leaf = jax.random.normal(KEY, (8, 2, 4))
    with jax.set_mesh(mesh):
        for spec in (PartitionSpec("d"), PartitionSpec(None, "d"), PartitionSpec(None, None, "d")):
            placed = jax.device_put(leaf, NamedSharding(mesh, spec))
            masks = jax.jit(
                lambda x: jaxsparse.magnitude_masks({"query": x}, 0.5, structure=jaxsparse.n_of_m(2, 4))["query"]
            )(placed)
            expected = jaxsparse.magnitude_masks({"query": leaf}, 0.5, structure=jaxsparse.n_of_m(2, 4))["query"]
            np.testing.assert_array_equal(masks, expected)


def test_params_of_the_suite_have_the_layouts_they_are_made_for():
    found = leaf_layouts(make_params())
    assert found["attention/kernel"] == Layout(0, (1, 2))
    assert found["conv/kernel"] == Layout(2, 3)
    assert [path for path, layout in found.items() if not layout.is_matrix] == [
        "attention/bias", "conv/bias", "dense/bias", "temperature",
    ]  # fmt: skip


def test_dead_inputs_outputs_and_closed_channels_are_those_of_the_matrix():
    query = jnp.ones((6, 2, 4)).at[1].set(0).at[:, 1, 2].set(0)  # input 1, output 6
    stack = jnp.ones((3, 4, 5)).at[1, :, 3].set(0).at[2, 0].set(0)
    params = {"query": query, "fc": {"weight": jnp.ones((5, 6)).at[2].set(0)}, "experts": {"wi": stack}}
    masks = jaxsparse.nonzero_masks(params)
    dead = {row.path: (row.dead_inputs, row.dead_outputs) for row in jaxsparse.summary(masks, params).layers}
    assert dead == {"query": (1, 1), "fc/weight": (0, 1), "experts/wi": (1, 1)}
    closed = {path: found.tolist() for path, found in jaxsparse.closed_channels(params).items()}
    assert closed == {"query": [6], "fc/weight": [2], "experts/wi": [[1, 3]]}
    said = jaxsparse.summary(masks, params, layout={"query": Layout((0, 1), 2)}).layers
    assert {row.path: row.dead_inputs for row in said}["query"] == 2


def test_layers_of_a_stack_that_keep_nothing_are_named():
    scales = jnp.array([1.0, 0.1, 0.001])[:, None, None]
    params = {"scan": {"kernel": scales * jax.random.normal(jax.random.key(0), (3, 8, 8)), "bias": jnp.zeros((3, 8))}}
    with pytest.warns(
        UserWarning, match="no weight is left in layer 2 of scan/kernel, .* layers of a stack count as one"
    ):
        masks = jaxsparse.magnitude_masks(params, 0.6)
    tx = jaxsparse.mask_updates(masks)
    with pytest.warns(UserWarning, match="no weight is left in layer 2 of scan/kernel"):
        jaxsparse.check(tx.init(params), jaxsparse.apply_masks(params, masks))
    apart = jaxsparse.score_masks(params, jaxsparse.saliency.magnitude(params), 0.75, per_output=True)
    assert apart["scan"]["kernel"].sum((1, 2)).tolist() == [16] * 3
    whole = jaxsparse.magnitude_masks({"scan": {"kernel": params["scan"]["kernel"][0]}}, 0.9)
    assert int(whole["scan"]["kernel"].sum()) == 6
