"""Unchanged models on block kernels: outputs and gradients are those of the masked model."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxsparse
from jaxsparse import trace
from jaxsparse.layouts import leaf_layouts
from jaxsparse.trees import by_path, leaf_paths
from tests.problems import jit_once, slow_except
from tests.trace.models import IMAGE, MODELS, ResNet, linen, rand

# The products on kernels; tables of embeddings have masks too, and their lookups stay dense.
PRODUCTS = {
    "mlp": 3,
    "lenet": 2,
    "resnet": 2,
    "densenet": 2,
    "mobilenet": 7,
    "gpt linen scan+remat rms": 8,
    "gpt linen loop layernorm": 22,
    "gpt linen loop slow layernorm": 8,
    "gpt nnx mha": 15,
    "gpt eqx scan vmap": 8,
    "gpt plain fused gqa rope scan": 5,
    "gpt plain loop": 9,
    "own gpt-2 loop": 13,
    "own one key head scan": 7,
    "mlp eqx": 3,
    "haiku conv groupnorm": 2,
    "resnet flax example": 8,
    "convnext": 3,
    "unet": 3,
    "dropout batchnorm train": 2,
    "vit": 13,
    "attention linen": 5,
    "rnn linen": 9,
    "lstm": 3,
    "experts": 4,
}


@pytest.fixture(autouse=True)
def _users_may_broadcast():
    with jax.numpy_rank_promotion("allow"):
        yield


def floats(tree):
    return eqx.filter(tree, eqx.is_inexact_array)


def masks_of(params, block=(4, 4), density=0.6):
    """Masks of random blocks in matrices, cut off where a leaf ends, and True for the rest."""
    rng, layouts = np.random.default_rng(0), leaf_layouts(floats(params))

    def mask(path, leaf):
        layout = layouts[path]
        if not layout.is_matrix or leaf.ndim < 2:
            return True
        shape = layout.matrix_shape(leaf.shape)
        units = rng.random([*shape[:-2], *(-(-n // side) for n, side in zip(shape[-2:], block, strict=True))])
        units = (units < density).repeat(block[0], -2).repeat(block[1], -1)[..., : shape[-2], : shape[-1]]
        return layout.from_matrices(jnp.asarray(units), leaf)

    leaves, treedef = jax.tree.flatten(floats(params))
    return treedef.unflatten(map(mask, leaf_paths(floats(params)), leaves))


def masked(params, masks):
    """The params with zeros: the definition."""
    given = {path: mask for path, mask in by_path(masks).items() if jnp.ndim(mask)}
    leaves, treedef = jax.tree.flatten(params)
    paths = list(by_path(params))
    return treedef.unflatten([
        jnp.where(given[path], leaf, jnp.zeros_like(leaf)) if path in given else leaf
        for path, leaf in zip(paths, leaves, strict=True)
    ])  # fmt: skip


def loss_of(out):
    leaves = [y.astype("float32") for y in jax.tree.leaves(out)]
    return sum(jnp.vdot(jnp.sin(0.7 * y), jnp.cos(jnp.arange(y.size)).reshape(y.shape)) for y in leaves)


def value_and_grad(function, params, *args):
    """Outputs, and the gradients of a loss of them with respect to the floats of the params."""
    arrays, rest = eqx.partition(params, eqx.is_inexact_array)

    def loss(arrays):
        out = function(eqx.combine(arrays, rest), *args)
        return loss_of(out), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return out, grads


def assert_close(got, want, tolerance=2e-6):
    """Within a tolerance relative to the largest entry of all."""
    got, want = (jax.tree.leaves(x) for x in (got, want))
    scale = max(float(jnp.abs(y).max(initial=0)) for y in want)
    assert scale > 0
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(*(np.asarray(a, np.float64) for a in (x, y)), rtol=0, atol=tolerance * scale)


def assert_same(apply, fast, params, masks, *args, tolerance=2e-6):
    """Outputs and gradients of ``fast`` are those of the masked model."""
    got = value_and_grad(lambda p, *a: fast(p, masks, *a), params, *args)
    want = value_and_grad(lambda p, *a: apply(masked(p, masks), *a), params, *args)
    for x, y in zip(got, want, strict=True):
        assert_close(x, y, tolerance)


@pytest.mark.parametrize("name", slow_except(["mlp eqx"], PRODUCTS))
def test_models(name):
    apply, params, args = MODELS[name]()
    masks = masks_of(params)
    fast = trace.sparse_apply(apply, block=(4, 4))
    assert_same(apply, fast, params, masks, *args)
    report = fast.report(params, masks, *args)
    blocks = [use.block for use in report.uses if use.block]
    assert len(blocks) == PRODUCTS[name]
    assert set(blocks) <= ({(4, 2), (2, 4), (4, 4)} if name == "attention linen" else {(4, 4)})  # of heads of 6
    assert all(use.why for use in report.uses if not use.block)


# Each: the function, its params, which have masks, products on blocks; the function takes (params, x of 6 x 8).
VIEWS = {
    "transposed": (lambda p, x: x @ p["w"].T, {"w": (12, 8)}, "w", [(4, 4)]),
    "scaled": (lambda p, x: x @ (-p["w"] * p["g"] / 2.0), {"w": (8, 12), "g": (12,)}, "w", [(4, 4)]),
    "added to": (lambda p, x: x @ (p["w"] + p["a"] @ p["b"]), {"w": (8, 12), "a": (8, 2), "b": (2, 12)}, "w", []),
    "split after": (lambda p, x: jnp.split(x @ p["w"], 2, -1)[0], {"w": (8, 16)}, "w", [(4, 4)]),
    "split before": (lambda p, x: x @ jnp.split(p["w"], 2, -1)[1], {"w": (8, 16)}, "w", [(4, 4)]),
    "sliced off the grid": (lambda p, x: x @ p["w"][:, 2:], {"w": (8, 300)}, "w", [(4, 128)]),
    "joined": (lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1), {"w": (8, 8), "v": (8, 12)}, "wv", [(4, 4)]),
    "joined with dense": (lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1), {"w": (8, 8), "v": (8, 8)}, "w", []),
    "heads": (lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["w"].reshape(8, 3, 4)), {"w": (8, 12)}, "w", [(4, 4)]),
    "heads joined": (lambda p, x: x @ p["w"].transpose(1, 0, 2).reshape(8, -1), {"w": (3, 8, 4)}, "w", [(4, 4)]),
    "cond": (lambda p, x: lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: x @ w * 2, p["w"]), {"w": (8, 16)}, "w",
             [(4, 4)] * 2),
    "loop over it": (lambda p, x: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"]), x), {"w": (8, 8)}, "w",
                     [(4, 4)]),
    "carried": (lambda p, x: lax.fori_loop(0, 2, lambda i, w: jnp.tanh(w), p["w"]), {"w": (8, 8)}, "w", []),
    "experts": (lambda p, x: jnp.einsum("bi,eio->beo", x, p["w"]), {"w": (4, 8, 16)}, "w", [(4, 4)]),
    "own experts": (lambda p, x: jnp.einsum("ebi,eio->ebo", jnp.stack([x, 2 * x]), p["w"]), {"w": (2, 8, 16)}, "w",
                    [(4, 4)]),
    "both": (lambda p, x: x @ (p["w"] @ p["v"]), {"w": (8, 16), "v": (16, 8)}, "wv", []),
    "while": (lambda p, x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"])), (0, x))[1],
              {"w": (8, 8)}, "w", [(4, 4)]),
}  # fmt: skip


@pytest.mark.parametrize("name", slow_except(["transposed", "scaled", "joined", "heads", "cond", "own experts"],
                         VIEWS))  # fmt: skip
def test_views(name):
    apply, shapes, with_masks, blocks = VIEWS[name]
    params = {key: rand(*shape, seed=i) for i, (key, shape) in enumerate(shapes.items())}
    masks = {
        key: masks_of({"w": leaf}, density=0.5)["w"] if key in with_masks else True for key, leaf in params.items()
    }
    x = rand(6, 8, seed=3)
    fast = trace.sparse_apply(apply, block=(4, 4))
    report = fast.report(params, masks, x)
    assert [use.block for use in report.uses if use.block] == blocks
    assert any(not use.block for use in report.uses) == (not blocks)
    if name == "while":  # which has no reverse-mode derivative
        assert_close(fast(params, masks, x), apply(masked(params, masks), x))
    else:
        assert_same(apply, fast, params, masks, x)


def small():
    """Two layers, in blocks of 4 x 2."""
    params, x = {"v": rand(16, 6), "w": rand(8, 16, seed=1)}, rand(5, 8, seed=2)

    def apply(p, x):
        return jnp.tanh(x @ p["w"]) @ p["v"]

    return apply, params, masks_of(params, (4, 2)), x, trace.sparse_apply(apply, block=(4, 2))


@pytest.mark.parametrize("how", slow_except([{"block": (4, 2)}], [{"block": (4, 2)}, {"tile": (8, 4)}]))
def test_masks_of_single_weights_are_right_too(how):
    apply, params, _, x, _ = small()
    fast, masks = trace.sparse_apply(apply, **how), masks_of(params, (1, 1), 0.3)
    assert [use.block for use in fast.report(params, masks, x).uses] == [*how.values()] * 2
    # Nothing that is dead is looked at: the gradients are right, though it is NaN.
    poisoned = jax.tree.map(lambda w, m: jnp.where(m, w, jnp.nan), params, masks)
    assert_same(apply, fast, poisoned, masks, x)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["interpret", "xla"])
def test_implementations(implementation):
    apply, params, masks, x, _ = small()
    fast = trace.sparse_apply(apply, block=(4, 2), implementation=implementation)
    assert {use.runs_on for use in fast.report(params, masks, x).uses} == {
        {"xla": "dense"}.get(implementation, implementation)
    }
    assert_same(apply, fast, params, masks, x)


def test_tiles_only_where_there_are_several():
    apply, params, masks, x, _ = small()

    def whys(**options):
        return [use.why for use in trace.sparse_apply(apply, **options).report(params, masks, x).uses]

    assert whys(tile=None) == ["its block is not known"] * 2
    assert whys()[0] == "8 x 16 is no more than one block of 128 x 128"
    assert (
        whys(block=(4, 2), implementation="xla") == ["no kernel is chosen on cpu, unless implementation= names one"] * 2
    )


def test_traces_once_for_a_shape():
    apply, params, masks, x, _ = small()
    traced = []

    def counted(p, x, flag):
        traced.append(flag)
        return apply(p, x)

    fast = trace.sparse_apply(counted, block=(4, 2))

    def loss(p, m, x, flag="train"):
        return fast(p, m, x, flag).sum()

    fast(params, masks, x, "train")
    fast(params, jax.tree.map(lambda m: ~m, masks), 2 * x, "train")
    jax.eval_shape(jax.value_and_grad(loss), params, masks, x)
    assert traced == ["train"]
    jax.eval_shape(loss, params, masks, x[:2])
    jax.eval_shape(functools.partial(loss, flag="eval"), params, masks, x)
    assert traced == ["train", "train", "eval"]
    for flag in (1, 1.0, True, 1, slice(2)):
        jax.eval_shape(functools.partial(loss, flag=flag), params, masks, x)
    assert [type(flag) for flag in traced[3:]] == [int, float, bool, slice]


@pytest.mark.slow
def test_vmap_over_params_and_masks():
    apply, params, masks, x, fast = small()
    params = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), params)
    masks = jax.tree.map(lambda m: jnp.stack([m, ~m]), masks)
    each = jax.vmap(lambda p, m: apply(masked(p, m), x))
    for got, want in zip(
        value_and_grad(jax.vmap(lambda p, m: fast(p, m, x)), params, masks),
        value_and_grad(each, params, masks),
        strict=True,
    ):
        assert_close(got, want)


def test_gradients_in_a_scan_and_remat():
    apply, params, masks, x, fast = small()

    def train(product):
        def step(p, _):
            grads = jax.grad(lambda p: loss_of(jax.checkpoint(product)(p, masks, x)))(p)
            return jax.tree.map(lambda w, g: w - 0.01 * g, p, grads), None

        return jax.jit(lambda p: lax.scan(step, p, None, 3)[0])(params)

    assert_close(train(fast), train(lambda p, m, x: apply(masked(p, m), x)))


@pytest.mark.parametrize("fixed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dense_gradients_of_the_weights(fixed):
    apply, params, masks, x, _ = small()
    params = masked(params, masks)

    def grads(when):
        fast = trace.sparse_apply(apply, block=(4, 2), dense_weight_grad=when)
        return jax.grad(lambda p: loss_of(fast(p, masks, x)))(params)

    want = jax.jit(jax.grad(lambda p: loss_of(apply(p, x))))(params)
    step = (lambda when: jax.jit(lambda: grads(bool(when)))()) if fixed else jit_once(grads)
    assert_close(step(jnp.array(True)), want)
    assert_close(step(jnp.array(False)), masked(want, masks))


def test_gradients_of_what_scales_a_leaf_do_not_look_at_dead_weights():
    params, x = {"w": rand(4, 4), "g": rand(4, seed=1) + 2, "h": rand(4, 4, seed=2)}, rand(3, 4, seed=3)
    masks = {"w": np.eye(4, dtype=bool)}

    def apply(p, x):
        return x @ (2 * p["h"] * p["w"] / p["g"])

    def grads(when, params):
        fast = trace.sparse_apply(apply, dense_weight_grad=when)
        return jax.grad(lambda p: loss_of(fast(p, masks, x)))(params)

    want = jax.jit(jax.grad(lambda p: loss_of(apply(p, x))))(masked(params, masks))
    poisoned = params | {"w": jnp.where(masks["w"], params["w"], jnp.nan)}
    step = jit_once(grads)
    for when in (True, False):
        for given in (params, poisoned):
            assert_close(step(jnp.array(when), given), want if when else masked(want, masks))


@pytest.mark.parametrize("out", slow_except(["float32"], ["bfloat16", "float32"]))
def test_bfloat16_and_wider_results(out):
    params = {"w": rand(64, 48).astype("bfloat16")}
    x, masks = rand(32, 64, seed=2).astype("bfloat16"), masks_of(params)

    def apply(p, x):
        return jnp.matmul(x, p["w"], preferred_element_type=jnp.dtype(out))

    fast = trace.sparse_apply(apply, block=(4, 4))
    assert fast.report(params, masks, x).share == 1
    (y, grads), (want, want_grads) = (
        value_and_grad(f, params) for f in (lambda p: fast(p, masks, x), lambda p: apply(masked(p, masks), x))
    )
    assert y.dtype == out
    # Sums of exact products of bfloat16 differ in the last bits of float32, unless they are rounded to bfloat16.
    assert_close(y, want, 2e-6 if out == "float32" else 2e-2)
    assert_close(grads, want_grads, 2e-2)


@pytest.mark.slow
def test_batch_statistics_and_numbers_come_out():
    model = ResNet()
    _, params, (x,) = linen(model, IMAGE)

    def apply(v, x, train):
        y, state = model.apply(v, x, train=train, mutable=["batch_stats"])
        return {"y": y, "state": state, "train": train, "none": None, "count": 3}

    masks = masks_of(params)
    fast = trace.sparse_apply(apply, block=(4, 4))
    got, want = fast(params, masks, x, True), apply(masked(params, masks), x, True)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert got["train"] is True
    assert got["count"] == 3
    assert_close([got["y"], got["state"]], [want["y"], want["state"]], 1e-5)


@pytest.mark.slow
def test_shard_map_outside_and_inside():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params = {"w": rand(8, 16), "v": rand(16, 8, seed=1)}
    masks, x = masks_of(params), rand(6, 8, seed=2)
    specs = {"mesh": mesh, "in_specs": (P(), P("data")), "out_specs": P()}

    def apply(p, x):
        return lax.psum((jax.nn.relu(x @ p["w"]) @ p["v"]).sum(0), "data")

    def inside(p, x):
        return jax.shard_map(apply, **specs)(p, x)

    fast = trace.sparse_apply(inside, block=(4, 4))
    assert fast.report(params, masks, x).share == 1
    assert_same(inside, fast, params, masks, x)
    by_device = trace.sparse_apply(apply, block=(4, 4))
    outside = lambda p, m, x: jax.shard_map(lambda p, x: by_device(p, m, x), **specs)(p, x)  # noqa: E731
    assert_same(inside, outside, params, masks, x)


def test_callbacks_and_what_is_closed_over():
    params = {"w": rand(8, 8), "v": rand(8, 4, seed=1)}
    masks, x, seen = masks_of(params), rand(2, 8, seed=2), []

    def loss(product, c):
        def apply(p, x):
            h = x @ p["w"] * c
            jax.debug.callback(lambda s: seen.append(float(s)), h.sum())
            return h @ p["v"]

        return loss_of(product(apply)(params, masks, x))

    got, want = (
        jax.jit(jax.grad(functools.partial(loss, product)))(2.0)
        for product in (
            lambda apply: trace.sparse_apply(apply, block=(4, 4)),
            lambda apply: lambda p, m, x: apply(masked(p, m), x),
        )
    )
    jax.effects_barrier()
    assert len(seen) == 2
    assert_close([got], [want])


def test_custom_derivatives_are_kept_and_named():
    @jax.custom_vjp
    def multiply(x, w):
        return x @ w

    multiply.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: (2 * g @ res[1].T, res[0].T @ g))
    params = {"w": rand(8, 8)}
    masks, x = masks_of(params), rand(3, 8, seed=1)
    fast = trace.sparse_apply(lambda p, x: multiply(x, p["w"]), block=(4, 4))
    assert_same(lambda p, x: multiply(x, p["w"]), fast, params, masks, x)
    (use,) = fast.report(params, masks, x).uses
    assert use.why == "inside a function with a custom derivative"


def table_model():
    return {"embed": rand(12, 8), "conv": rand(3, 3, 8, 8, seed=1), "out": rand(8, 8, seed=2)}


def table_apply(p, x):
    h = p["embed"][x][:, None]
    h = lax.conv_general_dilated(h, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return h @ p["out"]


def test_report_is_a_table_made_from_shapes_alone():
    params, x = table_model(), jnp.zeros((2, 5), jnp.int32)
    masks = {path: jnp.ones(leaf.shape, bool) for path, leaf in params.items()}
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (params, masks, x))
    report = trace.sparse_apply(table_apply, block=(4, 4)).report(*shapes)
    assert [use.paths for use in report.uses] == [("embed",), ("conv",), ("out",)]
    assert [use.macs for use in report.uses] == [0, 10 * 8 * 72, 10 * 64]
    text = str(report)
    assert re.search(
        r"^embed +gather at .*test_sparse\.py:\d+.*\(table_apply\) +dense +gather has no kernel$", text, re.M
    )
    assert re.search(r"^conv .* 5,760 +dense +a convolution of 3 x 3, groups, padding or dilation$", text, re.M)
    assert re.search(r"^out +dot_general at .*\(table_apply\) +640 +4 x 4 +xla_blocks$", text, re.M)
    assert re.search(r"^all +6,400 +10% on kernels$", text, re.M)


def test_blocks_by_structure_pattern_and_function():
    params = {"a": rand(16, 16), "b": rand(16, 32), "attn": {"query": {"kernel": rand(16, 4, 8)}}}

    def apply(p, x):
        return jnp.einsum("bi,ihd->bhd", x @ p["a"], p["attn"]["query"]["kernel"]).reshape(-1, 32) @ p["b"].T

    masks, x = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params), rand(3, 16)

    def blocks(block, **options):
        uses = trace.sparse_apply(apply, block=block, **options).report(params, masks, x).uses
        return {use.paths[0]: use.block for use in uses}

    unit = jaxsparse.block(8, 16)
    assert blocks(unit) == {"a": (8, 16), "attn/query/kernel": (8, 16), "b": (16, 8)}
    assert blocks({"attn": unit, "b": (4, 2), "*": None}, tile=(2, 2)) == {
        "a": (2, 2), "attn/query/kernel": (8, 16), "b": (2, 4)
    }  # fmt: skip
    assert blocks(lambda path: (4, 4) if path == "a" else None, tile=None) == {
        "a": (4, 4), "attn/query/kernel": None, "b": None
    }  # fmt: skip
    # A structure that a leaf does not divide into leaves it by single weights.
    assert blocks(jaxsparse.block(8, 32), tile=None)["a"] is None
    other = {"b": jaxsparse.Layout(inputs=1, outputs=0)}
    assert blocks(unit, layout=other)["b"] == (8, 16)


def test_nothing_on_kernels_without_masks():
    apply, params, _, x, fast = small()
    for masks in ({}, jax.tree.map(lambda _: True, params), jax.tree.map(lambda _: optax.MaskedNode(), params)):
        assert fast.report(params, masks, x).uses == ()
        np.testing.assert_allclose(fast(params, masks, x), apply(params, x), rtol=1e-6)


@pytest.mark.parametrize(
    ("masks", "options", "message"),
    [
        ({"w": jnp.ones((4, 8), bool)}, {}, r"mask of w must be .* float32 of \(8, 4\).* got bool of \(4, 8\)"),
        ({"w": jnp.ones((8, 4))}, {}, "mask of w must be bool"),
        ({"n": jnp.ones(3, bool)}, {}, "mask of n must be bool of the shape of its floats, int32"),
        ({"u": jnp.ones(3, bool)}, {}, "masks must have the paths of the params, but have u beyond them"),
        ({"w": jnp.ones((8, 4), bool)}, {"block": (4, 4, 4)}, r"block of w must be \(inputs, outputs\)"),
        ({"w": jnp.ones((8, 4), bool)}, {"block": (4, 2), "implementation": "mosaic_gpu"},
         r"w, dot_general at .*test_sparse.py.*takes bfloat16 and float16, got float32"),
        ({"w": jnp.ones((8, 4), bool)}, {"block": {"v": (4, 4)}}, "block: 'v' matches none of w"),
        ({"w": jnp.ones((8, 4), bool)}, {"block": "blocks"}, "structure must be one of"),
        ({"w": jnp.ones((8, 4), bool)}, {"tile": (0, 4)}, "tile must be"),
        ({"w": jnp.ones((8, 4), bool)}, {"tile": 128}, r"tile must be \(inputs, outputs\) .* got 128"),
        ({"w": jnp.ones((8, 4), bool)}, {"tile": (64.0, 4)}, r"tile must be .* got \(64.0, 4\)"),
    ],
)  # fmt: skip
def test_bad_input_is_named(masks, options, message):
    params = {"w": jnp.ones((8, 4)), "n": jnp.arange(3)}
    with pytest.raises(ValueError, match=message):
        trace.sparse_apply(lambda p, x: x @ p["w"] + p["n"][0], **options)(params, masks, jnp.ones((2, 8)))


@pytest.mark.slow
def test_block_sparse_momentum_trains_the_unchanged_gpt_alike():
    apply, params, (tokens,) = MODELS["gpt linen scan+remat rms"]()
    unit = jaxsparse.block(4, 4)
    tx = jaxsparse.chain(
        optax.sgd(0.05, momentum=0.9),
        jaxsparse.sparse_momentum(0.5, update_every=2, structure=unit, prunable="*/blocks/*"),
    )

    def train(product):
        @jit_once
        def step(p, state):
            masks = jaxsparse.get_masks(state, p)

            def loss(p):
                return optax.softmax_cross_entropy_with_integer_labels(product(p, masks, tokens), tokens).mean()

            value, grads = jax.value_and_grad(loss)(p)
            updates, state = tx.update(grads, state, p)
            return optax.apply_updates(p, updates), state, value

        state = tx.init(params)
        p = jaxsparse.sparsify(state, params)
        first = jaxsparse.get_masks(state, p)
        losses = []
        for _ in range(6):
            p, state, value = step(p, state)
            losses.append(value)
        jaxsparse.check(state, p)
        masks = jaxsparse.get_masks(state, p)
        assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (first, masks)), strict=True))
        return p, masks, losses

    dense = train(lambda p, m, x: apply(p, x))
    ours = train(trace.sparse_apply(apply, block=unit, dense_weight_grad=True))
    jax.tree.map(np.testing.assert_array_equal, ours[1], dense[1])
    assert_close(ours[2], dense[2])
    assert_close(ours[0], dense[0], 1e-5)


@pytest.mark.slow
def test_nnx_with_dropout_and_state():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)
            self.drop = nnx.Dropout(0.3, rngs=rngs)

        def __call__(self, x):
            return self.down(self.drop(jax.nn.relu(self.up(x))))

    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    x, masks = rand(5, 8), masks_of(params)
    apply = lambda p, rest, x: nnx.merge(graph, p, rest)(x)  # noqa: E731
    fast = trace.sparse_apply(apply, block=(4, 4))
    assert fast.report(params, masks, rest, x).share == 1
    assert_close(fast(params, masks, rest, x), apply(masked(params, masks), rest, x))
