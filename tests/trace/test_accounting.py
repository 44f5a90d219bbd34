"""Multiply-adds against formulas, against published numbers, and through every call pattern."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxsparse
from jaxsparse import models
from jaxsparse.trace import multiply_adds
from jaxsparse.trees import by_path
from tests.models.networks import Attends
from tests.problems import slow_except
from tests.trace.models import MODELS, TOKENS, rand

T = TOKENS.size  # tokens in the batch; 8 in a sequence, 4 heads of 4


def counted(name):
    apply, params, args = MODELS[name]()
    return multiply_adds(apply, params, *args)


def macs(counts):
    return {path: leaf.macs for path, leaf in counts.leaves.items()}


def shapes_of(model, *args, **flags):
    variables = dict(jax.eval_shape(lambda *args: model.init(jax.random.key(0), *args, **flags), *args))
    params = variables.pop("params")
    return (lambda p, rest, *args: model.apply({"params": p, **rest}, *args, **flags)), params, (variables, *args)


def positions(model, *args, **flags):
    apply, params, args = shapes_of(model, *args, **flags)
    return multiply_adds(apply, params, *args).positions(batch=len(jax.tree.leaves(args)[-1]))


def test_layers_count_by_their_formula():
    counts = counted("mlp")
    assert macs(counts) == {"fc1/kernel": 5 * 20 * 32, "fc2/kernel": 5 * 32 * 24, "fc3/kernel": 5 * 24 * 6}
    assert counts.leaves["fc1/kernel"].bytes == 4 * (5 * 20 + 20 * 32 + 5 * 32)
    assert counts.positions(batch=5) == {"fc1/kernel": 1, "fc2/kernel": 1, "fc3/kernel": 1}
    assert (counts.total, counts.activations, counts.bounded, counts.uncounted) == (7760, 0, True, ())
    lenet = counted("lenet").positions(batch=2)
    assert lenet == dict(zip(sorted(lenet), (12 * 12, 6 * 6, 1, 1), strict=True))


# VGG-16 for CIFAR: 313.2M multiply-adds in convolutions, ResNet-50: 4.09G, ResNet-56: 125.5M (He et al.), ResNet-8
# of MLPerf Tiny: 12.5M.
PUBLISHED = [
    (models.VGG("16"), 32, 313_196_544 + 5_120),
    (models.ResNetCIFAR(56), 32, 125_485_696),
    (models.ResNet8(), 32, 12_501_632),
    (models.ResNet50(), 224, 4_089_184_256),
]


@pytest.mark.parametrize(
    ("model", "size", "expected"), slow_except(PUBLISHED[:1], PUBLISHED), ids=lambda value: type(value).__name__
)
def test_published_numbers(model, size, expected):
    apply, params, args = shapes_of(model, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    counts = multiply_adds(apply, params, *args)
    assert counts.total == expected
    assert set(counts.leaves) == {path for path in by_path(params) if path.endswith("kernel")}


@pytest.mark.parametrize(
    ("name", "layers", "attention"),
    [
        ("gpt linen scan+remat rms", 3, 12_288),
        ("gpt linen loop layernorm", 3, 12_288),
        ("gpt nnx mha", 2, 8_192),
        ("gpt eqx scan vmap", 3, 12_288),
    ],
)
def test_transformers_of_every_framework_count_alike(name, layers, attention):
    counts = counted(name)
    of_a_layer = T * (4 * 16 * 16 + 3 * 16 * 24)
    assert sum(macs(counts).values()) == layers * of_a_layer + T * 16 * 32
    assert counts.activations == attention == layers * 2 * (2 * 4 * 8 * 8 * 4)
    assert counts.total == sum(site.macs for site in counts.sites)


def test_fused_stacked_and_tied_leaves():
    counts = counted("gpt plain fused gqa rope scan")
    assert macs(counts) == {
        "blocks/qkv": 2 * T * 16 * 32,
        "blocks/out": 2 * T * 16 * 16,
        "blocks/gate_up": 2 * T * 16 * 48,
        "blocks/down": 2 * T * 24 * 16,
        "embed": T * 16 * 32,
    }
    assert counts.positions(batch=2) == dict.fromkeys(macs(counts), 8)  # of every layer, the length of a sequence


def test_recurrent_layers_count_every_step():
    counts = counted("rnn linen")  # 6 steps of 8 inputs and 12 units, a batch of 2
    found = {path.removeprefix("params/"): number for path, number in counts.positions(batch=2).items()}
    assert found == dict.fromkeys(found, 6)
    assert sum(macs(counts).values()) == 2 * 6 * (4 * (8 * 12 + 12 * 12) + 12 * 4)


def test_positions_of_layers_of_flax():
    places = positions(Attends(), jnp.ones((2, 8, 8, 1)), train=False)
    attention = {path.split("/")[-2]: number for path, number in places.items() if "Attention" in path}
    assert attention == dict.fromkeys(("query", "key", "value", "out"), 64)
    assert {path: number for path, number in places.items() if "Attention" not in path} == {
        "Conv_0/kernel": 16,
        "ConvTranspose_0/kernel": 16,  # of its inputs: the zeros between them do not count
        "Dense_0/kernel": 1,
    }
    assert all(isinstance(number, int) for number in places.values())


def test_grouped_and_depthwise_convolutions_use_a_weight_once_a_place():
    found = counted("mobilenet").positions(batch=2)
    assert {int(found[path]) for path in found if "Conv_2" in path} == {64}  # depthwise, at 8 x 8
    assert found["params/Dense_0/kernel"] == 1


def test_calls_of_one_layer_add_up():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            conv = nn.Conv(8, (3, 3), name="conv")
            low_rank = nn.Einsum((8, 3), "bhwi,ij->bj", use_bias=False, name="einsum")(conv(x))
            return conv(x[:, ::2, ::2]).mean((1, 2)).sum(1) + low_rank.sum(1)

    places = positions(Model(), jnp.ones((1, 32, 32, 3)))
    assert places == {"conv/kernel": 32 * 32 + 16 * 16, "einsum/kernel": 1}


W = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 2))}
X = jnp.ones((1, 4))


def test_loops_and_branches():
    fori = multiply_adds(lambda w, x: lax.fori_loop(0, 3, lambda i, x: x @ w["w"], x) @ w["v"], W, X)
    assert (macs(fori), fori.bounded) == ({"v": 8, "w": 48}, True)
    outer = multiply_adds(
        lambda w, x: (
            lax.scan(lambda c, _: (lax.fori_loop(0, 3, lambda i, x: x @ w["w"], c), None), x, length=5)[0] @ w["v"]
        ),
        W,
        X,
    )
    assert macs(outer) == {"v": 8, "w": 16 * 15}

    def until(w, x):
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ w["w"]), (0, x))[1] @ w["v"]

    def either(w, x):
        return lax.cond(x.sum() > 0, lambda x: x @ w["w"], lambda x: x, x) @ w["v"]

    for apply in (until, either):
        counts = multiply_adds(apply, W, X)
        assert (macs(counts), counts.bounded) == ({"v": 8, "w": 16}, False)
        assert str(counts).splitlines()[-1].startswith("all, of one round of loops and all branches  ")


def test_leaves_that_make_one_weight_count_for_the_largest():
    params = {"w": rand(8, 12), "g": rand(12), "a": rand(8, 2), "b": rand(2, 12)}
    counts = multiply_adds(lambda p, x: x @ ((p["w"] + p["a"] @ p["b"]) * p["g"][None]), params, jnp.ones((5, 8)))
    assert macs(counts) == {"b": 8 * 2 * 12, "w": 5 * 8 * 12}
    assert [site.leaves for site in counts.sites] == [("a", "b"), ("a", "b", "g", "w")]
    assert counts.positions(batch=5) == {"b": 8 / 5, "w": 1}  # a @ b is computed once a batch


def test_a_mapped_function_counts_every_example():
    counts = multiply_adds(jax.vmap(lambda w, x: jnp.tanh(x @ w["w"]) @ w["v"], (None, 0)), W, jnp.ones((6, 3, 4)))
    assert macs(counts) == {"v": 6 * 3 * 8, "w": 6 * 3 * 16}
    each = multiply_adds(jax.vmap(lambda w, x: x @ w), jnp.ones((6, 4, 2)), jnp.ones((6, 3, 4)))
    assert each.leaves[""].uses == 3
    assert str(each).splitlines()[2].startswith("the params       48     3")


def test_products_on_many_devices_count_on_all_of_them():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def on_each(w, v, x):
        return lax.psum(jax.nn.relu(x @ w) @ v, "model")

    def apply(p, x):
        specs = (P(None, "model"), P("model"), P("data"))
        return jax.shard_map(on_each, mesh=mesh, in_specs=specs, out_specs=P("data"))(p["w"], p["v"], x)

    counts = multiply_adds(apply, {"w": rand(3, 8), "v": rand(8, 5)}, jnp.ones((4, 3)))
    assert macs(counts) == {"v": 4 * 8 * 5, "w": 4 * 3 * 8}


def test_rows_that_choose_their_matrix_count_once():
    counts = multiply_adds(lambda w, x: lax.ragged_dot(x, w, jnp.array([1, 3])), rand(2, 3, 5), jnp.ones((4, 3)))
    assert counts.total == 4 * 3 * 5
    assert counts.leaves[""].uses == 2  # on average: each of the two matrices has some of the four rows


def test_masks_count_what_they_keep():
    counts = counted("mlp")
    masks = {
        "fc1": {"kernel": np.arange(640).reshape(20, 32) % 4 == 0, "bias": True},
        "fc2": {"kernel": np.array(True), "bias": np.array(True)},
    }
    assert counts.under(masks) == macs(counts) | {"fc1/kernel": 5 * 160}
    with pytest.raises(
        ValueError, match="masks have fc9/kernel, which the params lack; they have fc1/bias, fc1/kernel"
    ):
        counts.under({"fc9": {"kernel": np.ones(3, bool)}})
    with pytest.raises(ValueError, match=r"mask of fc1/kernel must have shape \(20, 32\), got \(32, 20\)"):
        counts.under({"fc1": {"kernel": np.ones((32, 20), bool)}})
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        counts.positions(batch=0)


def test_summary_and_remaining_take_its_positions():
    apply, params, args = MODELS["mlp"]()
    counts = multiply_adds(apply, params, *args)
    masks = jax.tree.map(lambda p: jnp.arange(p.size).reshape(p.shape) % 2 == 0 if p.ndim > 1 else True, params)
    rows = jaxsparse.summary(masks, params, positions=counts.positions(batch=5)).layers
    assert {row.path: 5 * row.macs for row in rows if row.macs} == counts.under(masks)


def test_shapes_are_enough_and_nothing_is_computed():
    apply, params, args = MODELS["attention linen"]()
    shapes = jax.eval_shape(lambda: (params, args))
    of_shapes = multiply_adds(apply, shapes[0], *shapes[1])
    assert str(of_shapes) == str(multiply_adds(apply, params, *args))
    assert {leaf.uses for leaf in of_shapes.leaves.values()} == {2 * 6}
    big = {"w": jax.ShapeDtypeStruct((2**16, 2**16), jnp.bfloat16)}
    counts = multiply_adds(lambda p, x: x @ p["w"], big, jax.ShapeDtypeStruct((2**18, 2**16), jnp.bfloat16))
    assert counts.total == 2**50


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_counted_whole(name):
    apply, params, args = MODELS[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counts = multiply_adds(apply, params, *args)
    assert counts.bounded
    assert counts.leaves


def test_what_is_not_counted_is_named_with_its_line():
    def apply(w, x):
        h = x @ w["w"]
        return jnp.linalg.cholesky(h.T @ h) @ w["v"]

    with pytest.warns(UserWarning, match=r"not counted: cholesky at .*test_accounting.py:\d+ \(apply\)") as told:
        counts = multiply_adds(apply, W, X)
    assert told[0].filename == __file__
    assert str(counts).splitlines()[-1].startswith("all, without 1 uncounted")
    assert macs(counts) == {"v": 32, "w": 16}
    assert counts.activations == 16
    with pytest.warns(UserWarning, match="not counted: fft at .*test_accounting.py"):
        multiply_adds(lambda w, x: jnp.fft.rfft(x @ w).real, W["w"], X)


def test_the_table():
    counts = counted("attention linen")
    lines = str(counts).splitlines()
    assert lines[0].split() == ["leaf", "weights", "uses", "multiply-adds", "share", "bytes", "moved"]
    assert lines[-3].split()[:2] == ["activations", "1,728"]
    assert lines[-1].split() == ["all", "448", f"{counts.total:,}", "100.0%", lines[-1].split()[-1]]


def test_matrices_that_are_one_in_a_product_share_its_multiply_adds():
    params = {"wq": jnp.ones((8, 6)), "wk": jnp.ones((8, 6)), "wv": jnp.ones((8, 12)), "gain": jnp.ones(24)}

    def apply(p, x):
        return x @ (jnp.concatenate([p["wq"], p["wk"], p["wv"]], 1) * p["gain"][None])

    counts = multiply_adds(apply, params, jnp.ones((4, 8)))
    assert {path: leaf.macs for path, leaf in counts.leaves.items()} == {"wk": 192, "wq": 192, "wv": 384}
    assert counts.positions(batch=4) == {"wk": 1, "wq": 1, "wv": 1}


def test_a_leaf_without_weights_counts_nothing():
    params = {"a": jnp.ones((4, 0)), "b": jnp.ones((0, 3)), "c": jnp.ones((4, 3))}
    counts = multiply_adds(lambda p, x: x @ p["a"] @ p["b"] + x @ p["c"], params, jnp.ones((2, 4)))
    assert {path: leaf.uses for path, leaf in counts.leaves.items()} == {"a": 0, "b": 0, "c": 2}
    assert counts.total == 24


def test_a_scalar_mask_can_only_be_true():
    counts = multiply_adds(lambda p, x: x @ p["a"], {"a": jnp.ones((4, 5))}, jnp.ones((2, 4)))
    assert counts.under({"a": jnp.array(True)}) == {"a": 40}
    for false in (jnp.array(False), np.False_, False):
        with pytest.raises(ValueError, match="the mask of a is the scalar False"):
            counts.under({"a": false})
