"""Products with masked weights: every backend against the definition, forward and both gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from jaxsparse.kernels import block_sparse_matmul, masked_matmul
from jaxsparse.kernels.masked_matmul import pallas_tpu, reference
from jaxsparse.kernels.masked_matmul.arg_specs import TESTS, Product
from jaxsparse.kernels.masked_matmul.block_info import block_info, live_tiles
from jaxsparse.kernels.masked_matmul.config import Config
from tests.problems import slow_except

BLOCK_BACKENDS = ("xla", "xla_blocks", "interpret")
MASK_BACKENDS = ("xla", "interpret")
MASKS = ("none", "all", "one", "tenth", "half", "dead row", "dead column")


def blocks_of(spec):
    return -(-spec.inputs // spec.block[0]), -(-spec.outputs // spec.block[1])


def a_mask(kind, shape, seed=0):
    draw = np.random.default_rng(seed).random(shape)
    mask = {"none": draw < 0, "all": draw < 2, "one": draw == draw.max(), "tenth": draw < 0.1}.get(kind, draw < 0.5)
    if kind == "dead row":
        mask[shape[0] // 2] = False
    if kind == "dead column":
        mask[:, -1] = False
    return jnp.asarray(mask)


def operands(spec, dtype, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (spec.rows, spec.inputs), (spec.inputs, spec.outputs), (spec.rows, spec.outputs)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def with_gradients(multiply, x, w, dy):
    y, pull = jax.vjp(multiply, x, w)
    return y, *pull(dy.astype(y.dtype))


def close(ours, wanted, sums):
    """Within the rounding of the dtype; errors of sums of so many random products grow like their square root."""
    for got, want, n in zip(ours, wanted, sums, strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        error = 2.0**-22 if got.dtype == jnp.float32 else 2.0**-7
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        np.testing.assert_allclose(got, want, rtol=4 * error, atol=16 * error * n**0.5)


@pytest.mark.parametrize("backend", BLOCK_BACKENDS)
def test_the_same_where_jax_has_64_bits(backend):
    x, w, dy = operands(Product(rows=24, inputs=32, outputs=48, block=(8, 16)), "float32")
    mask = a_mask("half", (4, 3))
    multiply = functools.partial(block_sparse_matmul, block_mask=mask, implementation=backend)
    wanted = with_gradients(multiply, x, w, dy)
    with jax.enable_x64(True):
        found = with_gradients(multiply, x, w, dy)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def compare(spec, masks, dtype, implementation, out_dtype=None):
    """Forward and both gradients against the definition; masks are of blocks, or of weights if ``spec`` has none."""
    x, w, dy = operands(spec, dtype)
    how = {"out_dtype": out_dtype} | ({} if spec.block is None else {"block": spec.block})
    ours, define = (
        (masked_matmul, reference.masked_matmul)
        if spec.block is None
        else (block_sparse_matmul, reference.block_sparse_matmul)
    )
    multiply = functools.partial(ours, implementation=implementation, **how)
    define = functools.partial(define, **how)
    traced = []

    @jax.jit
    def ours(mask):
        traced.append(mask)
        return with_gradients(lambda x, w: multiply(x, w, mask), x, w, dy)

    for mask in masks:
        wanted = with_gradients(lambda x, w, mask=mask: define(x, w, mask), x, w, dy)
        close(ours(mask), wanted, (spec.inputs, spec.outputs, spec.rows))
    assert len(traced) == 1  # another mask compiles nothing anew


@pytest.mark.parametrize("implementation", BLOCK_BACKENDS)
@pytest.mark.parametrize("name", slow_except(["ragged"], TESTS))
def test_blocks_of_awkward_shapes(name, implementation):
    compare(TESTS[name], [a_mask("half", blocks_of(TESTS[name]))], "float32", implementation)


@pytest.mark.parametrize("dtype", slow_except(["float32"], ["float32", "bfloat16"]))
@pytest.mark.parametrize("implementation", BLOCK_BACKENDS)
def test_masks_of_blocks(implementation, dtype):
    spec = Product(48, 512, 384, (128, 128))
    compare(spec, [a_mask(kind, blocks_of(spec)) for kind in MASKS], dtype, implementation)


@pytest.mark.parametrize("dtype", slow_except(["float32"], ["float32", "bfloat16"]))
@pytest.mark.parametrize("implementation", MASK_BACKENDS)
def test_masks_of_weights(implementation, dtype):
    spec = Product(33, 200, 600, None)
    compare(spec, [a_mask(kind, (spec.inputs, spec.outputs)) for kind in MASKS], dtype, implementation)


@pytest.mark.parametrize("block", slow_except([(64, 64)], [(64, 64), None]))
@pytest.mark.parametrize("implementation", BLOCK_BACKENDS)
@pytest.mark.parametrize(("dtype", "out_dtype"), slow_except([("bfloat16", "float32")],
                         [("bfloat16", "float32"), ("float32", "bfloat16")]))  # fmt: skip
def test_result_of_another_dtype(implementation, block, dtype, out_dtype):
    if block is None and implementation == "xla_blocks":
        pytest.skip("xla_blocks is for masks of blocks")
    spec = Product(33, 200, 300, block)
    shape = (spec.inputs, spec.outputs) if block is None else blocks_of(spec)
    compare(spec, [a_mask("half", shape)], dtype, implementation, out_dtype)


@pytest.mark.slow
@settings(max_examples=12)
@given(
    rows=st.integers(1, 70),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 300),
    block=st.tuples(*[st.sampled_from([8, 16, 64, 128, 256])] * 2),
    density=st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    implementation=st.sampled_from(BLOCK_BACKENDS),
    seed=st.integers(0, 2**31),
)
def test_any_blocks(rows, inputs, outputs, block, density, dtype, implementation, seed):
    spec = Product(rows, inputs, outputs, block)
    if implementation == "interpret" and dtype == "float16":
        dtype = "bfloat16"
    live = jnp.asarray(np.random.default_rng(seed).random(blocks_of(spec)) < density)
    compare(spec, [live], dtype, implementation)


@pytest.mark.slow
@settings(max_examples=8)
@given(
    rows=st.integers(1, 40),
    inputs=st.integers(1, 700),
    outputs=st.integers(1, 200),
    density=st.sampled_from([0.0, 0.001, 0.1, 1.0]),
    implementation=st.sampled_from(MASK_BACKENDS),
    seed=st.integers(0, 2**31),
)
def test_any_mask(rows, inputs, outputs, density, implementation, seed):
    mask = jnp.asarray(np.random.default_rng(seed).random((inputs, outputs)) < density)
    compare(Product(rows, inputs, outputs, None), [mask], "float32", implementation)


@pytest.mark.slow
@pytest.mark.parametrize("masked", slow_except([True], [False, True]))
def test_no_races_and_nothing_read_that_was_not_written(masked):
    # The interpreter that keeps to a TPU's memory: what was not written is NaN, copies on their way are watched.
    spec = Product(16, 256, 256, (128, 128))
    x, w, dy = operands(spec, "float32")
    live = jnp.asarray([[True, False], [True, False]])
    mask = jnp.repeat(jnp.repeat(live, 128, 0), 128, 1)
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    config = Config("mosaic_tpu", spec.block, 8, interpret=params)
    info = block_info(live, visit_empty=True)
    given_mask = mask if masked else None
    ours = (
        pallas_tpu.forward(x, w, given_mask, info, config, jnp.float32),
        pallas_tpu.backward_x(dy, w, given_mask, info, config, jnp.float32),
        pallas_tpu.backward_w(x, dy, given_mask, info, config, jnp.float32),
    )
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found
    wanted = with_gradients(lambda x, w: reference.masked_matmul(x, w, mask), x, w, dy)
    close(ours, wanted, (256, 256, 16))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", BLOCK_BACKENDS)
def test_leading_axes_bias_and_what_is_dead(implementation):
    spec = TESTS["small blocks"]
    live = a_mask("half", blocks_of(spec))
    x, w, _ = operands(spec, "float32")
    bias = jnp.arange(spec.outputs, dtype=jnp.float32)
    mask = jnp.repeat(jnp.repeat(live, spec.block[0], 0), spec.block[1], 1)
    multiply = functools.partial(block_sparse_matmul, block=spec.block, implementation=implementation)
    # What the mask leaves out is not read: NaN there goes nowhere, neither forward nor back.
    poisoned = jnp.where(mask, w, jnp.nan)
    y = multiply(x.reshape(4, 10, -1), poisoned, live, bias)
    assert y.shape == (4, 10, spec.outputs)
    np.testing.assert_allclose(
        y.reshape(40, -1), reference.masked_matmul(x, w, mask) + bias[None], rtol=1e-5, atol=1e-4
    )
    dx, dw, db = jax.grad(lambda x, w, b: multiply(x, w, live, b).sum(), (0, 1, 2))(x, poisoned, bias)
    assert np.isfinite(dx).all()
    assert np.isfinite(dw).all()
    assert (np.asarray(dw)[~np.asarray(mask)] == 0).all()
    np.testing.assert_allclose(db, np.full(spec.outputs, 40.0))


@pytest.mark.parametrize("implementation", BLOCK_BACKENDS)
def test_dense_gradients_of_the_weights(implementation):
    spec = TESTS["small blocks"]
    live = a_mask("tenth", blocks_of(spec))
    x, w, _ = operands(spec, "float32")

    @jax.jit
    def gradient(dense):
        return jax.grad(
            lambda w: block_sparse_matmul(
                x, w, live, block=spec.block, implementation=implementation, dense_weight_grad=dense
            ).sum()
        )(w)

    full = np.repeat(np.asarray(x).sum(0)[:, None], spec.outputs, 1)
    mask = np.repeat(np.repeat(np.asarray(live), spec.block[0], 0), spec.block[1], 1)
    np.testing.assert_allclose(gradient(jnp.array(True)), full, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(gradient(jnp.array(False)), np.where(mask, full, 0), rtol=1e-5, atol=1e-4)
    fixed = jax.grad(
        lambda w: masked_matmul(
            x, w, jnp.asarray(mask), dense_weight_grad=True, implementation=implementation.replace("_blocks", "")
        ).sum()
    )(w)
    np.testing.assert_allclose(fixed, full, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", BLOCK_BACKENDS)
@pytest.mark.parametrize("batched", slow_except(["all"], ["x", "w", "mask", "all"]))
def test_vmap(implementation, batched):
    spec = TESTS["small blocks"]
    examples = [operands(spec, "float32", seed) for seed in range(3)]
    x, w = (jnp.stack([example[i] for example in examples]) for i in (0, 1))
    live = jnp.stack([a_mask("half", blocks_of(spec), seed) for seed in range(3)])
    axes = [0 if batched in (name, "all") else None for name in ("x", "w", "mask")]
    args = [a if axis == 0 else a[0] for a, axis in zip((x, w, live), axes, strict=True)]

    def one(x, w, live):
        multiply = functools.partial(block_sparse_matmul, block=spec.block, implementation=implementation)
        return with_gradients(lambda x, w: multiply(x, w, live), x, w, jnp.ones((spec.rows, spec.outputs)))

    ours = jax.jit(jax.vmap(one, axes))(*args)
    for i in range(3):
        own = [a[i] if axis == 0 else a for a, axis in zip(args, axes, strict=True)]
        for got, want in zip(ours, one(*own), strict=True):
            np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("implementation", ["xla", "xla_blocks"])
def test_each_device_multiplies_its_share(implementation):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w, _ = operands(Product(64, 128, 128, None), "float32")
    live = jnp.asarray([[True, False], [False, True]])

    def both(x, w):
        return with_gradients(
            lambda x, w: block_sparse_matmul(x, w, live, implementation=implementation), x, w, jnp.cos(x)
        )

    # The weights are the same on all devices, so their gradient is the sum.
    shared = jax.shard_map(both, mesh=mesh, in_specs=(P("batch"), P()), out_specs=(P("batch"), P("batch"), P()))
    for got, want in zip(jax.jit(shared)(x, w), both(x, w), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_nothing_to_multiply():
    assert masked_matmul(jnp.ones((0, 4)), jnp.ones((4, 3)), jnp.ones((4, 3), bool)).shape == (0, 3)
    y = masked_matmul(jnp.ones((2, 0)), jnp.ones((0, 3)), jnp.ones((0, 3), bool), jnp.arange(3.0))
    assert y.tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.slow
def test_lists_of_blocks():
    live = jnp.asarray([[False, True, True], [False, False, True]])
    by_column = block_info(live).by_column
    assert by_column.starts.tolist() == [0, 0, 1, 3]
    assert by_column.count.tolist() == [3]
    assert by_column.position[:3].tolist() == [0, 0, 1]
    assert by_column.line[:3].tolist() == [1, 2, 2]
    visited = block_info(live, visit_empty=True).by_column
    assert visited.count.tolist() == [4]
    assert visited.line[:4].tolist() == [0, 1, 2, 2]
    assert visited.live[:4].tolist() == [0, 1, 1, 1]
    assert block_info(live).by_row.starts.tolist() == [0, 2, 3]
    assert live_tiles(jnp.eye(5, dtype=bool), (2, 3)).tolist() == [[True, False], [True, True], [False, True]]


@pytest.mark.parametrize(
    ("block", "shape", "tile"),
    [
        ((64, 64), (4096, 4096), (128, 128)),
        ((256, 128), (4096, 4096), (256, 128)),
        ((1024, 640), (4096, 640), (512, 128)),
        (None, (4096, 100), (512, 128)),
    ],
)
def test_tiles_of_a_tpu(block, shape, tile):
    assert pallas_tpu.choose_tile(block, shape, jnp.dtype("float32")) == tile
    # Rows are divided in equal shares, of what a TPU stores together.
    assert pallas_tpu.choose_rows((128, 128), 2049, 2, 2) == 1040
    assert pallas_tpu.choose_rows((128, 128), 3, 4, 4) == 8
    assert pallas_tpu.choose_rows((128, 128), 3, 2, 4) == 16


x, w = jnp.ones((4, 8)), jnp.ones((8, 6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masked_matmul(x, jnp.ones((7, 6)), jnp.ones((7, 6), bool)), r"got \(4, 8\) and \(7, 6\)"),
        (lambda: masked_matmul(x, w, jnp.ones((8, 6))), r"bool mask of the shape of w, \(8, 6\), got float32"),
        (lambda: masked_matmul(x, w, jnp.ones((6, 8), bool)), r"got bool of shape \(6, 8\)"),
        (lambda: masked_matmul(x, w, w > 0, jnp.ones(8)), r"bias of shape \(6,\), got \(8,\)"),
        (lambda: masked_matmul(x.astype(int), w.astype(int), w > 0), "float32, bfloat16, float16, got int32"),
        (lambda: masked_matmul(x, w, w > 0, out_dtype="int8"), "out_dtype must be one of float32, .* got int8"),
        (lambda: masked_matmul(x, w, w > 0, implementation="triton"), "implementation must be one of .*'triton'"),
        (lambda: masked_matmul(x, w, w > 0, implementation="xla_blocks"), "is for masks of blocks"),
        (lambda: masked_matmul(x, w, w > 0, dense_weight_grad=jnp.ones(2)), "bool scalar, got float32"),
        (lambda: masked_matmul(x, w, w > 0, implementation="mosaic_tpu"), "cannot run on cpu: it is a kernel for TPUs"),
        (lambda: block_sparse_matmul(x, w, jnp.ones((3, 2), bool)), r"3 x 2 blocks do not divide w of shape \(8, 6\)"),
        (lambda: block_sparse_matmul(x, w, jnp.ones((2, 2))), "needs a bool matrix as block_mask, got float32"),
        (lambda: block_sparse_matmul(x, w, jnp.ones((2, 2), bool), block=(3, 3)), r"3 x 2 blocks of 3 x 3, got"),
        (lambda: block_sparse_matmul(x, w, jnp.ones((2, 2), bool), block=(0, 3)), r"at least 1, got \(0, 3\)"),
        (
            lambda: block_sparse_matmul(x, w, jnp.ones((2, 2), bool), block=(5, 3), implementation="interpret"),
            "sides divide 128 or are multiples of it, got 5 x 3",
        ),
        (
            lambda: block_sparse_matmul(
                x.astype("float16"), w.astype("float16"), jnp.ones((2, 2), bool), implementation="interpret"
            ),
            "takes float32 and bfloat16, got float16",
        ),
        (
            lambda: block_sparse_matmul(x, w, jnp.ones((2, 2), bool), implementation="mosaic_gpu"),
            "takes bfloat16 and float16, got float32",
        ),
        (
            lambda: block_sparse_matmul(
                x.astype("float16"),
                w.astype("float16"),
                jnp.ones((2, 2), bool),
                block=(6, 3),
                implementation="mosaic_gpu",
            ),
            "sides divide 64 or are multiples of it, got 6 x 3",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
