"""The kernel in the Mosaic GPU interpreter, and lowered for CUDA; neither needs a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxsparse.kernels.masked_matmul import pallas_gpu
from jaxsparse.kernels.masked_matmul.block_info import block_info, live_tiles
from jaxsparse.kernels.masked_matmul.config import Config
from tests.problems import jit_once

NAMES = ["forward", "backward_x", "backward_w"]
LIVE = {
    "none": lambda shape: np.zeros(shape, bool),
    "one": lambda shape: np.arange(np.prod(shape)).reshape(shape) == np.prod(shape) - 1,
    "random": lambda shape: _uneven(np.random.default_rng(1).random(shape) < 0.3),
    "all": lambda shape: np.ones(shape, bool),
}


def _uneven(live):
    """With a dead row, a dead column, and others that begin at different blocks."""
    live[:, 0] = False
    live[0, 1:] = np.arange(1, live.shape[1]) == 1
    live[1] = False
    live[-1, 1:] = True
    return live


@pytest.fixture
def interpret():
    """Parameters of Pallas' interpreter."""
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("this JAX has no interpreter for Mosaic GPU: JAX 0.12 has")
    return plgpu.InterpretGPUParams()


def _problem(shape, dtype):
    """x, w and dy for (M, K, N)."""
    m, k, n = shape
    draw = np.random.default_rng(0).standard_normal
    return tuple(jnp.asarray(draw(size), dtype) for size in [(m, k), (k, n), (m, n)])


def _info(live):
    """The lists of a mask of blocks, with a live block too many where their entries mean nothing."""

    def spoil(blocks):
        past = jnp.arange(blocks.line.size) >= blocks.count
        fields = {name: jnp.where(past, 0, getattr(blocks, name)) for name in ("line", "position")}
        return blocks._replace(live=jnp.where(past, 1, blocks.live), **fields)

    info = block_info(jnp.asarray(live))
    return info._replace(by_column=spoil(info.by_column), by_row=spoil(info.by_row))


def _arguments(name, x, w, dy):
    return {"forward": (x, w), "backward_x": (dy, w), "backward_w": (x, dy)}[name]


def _expected(name, x, w, dy, mask):
    x, w, dy = (np.asarray(array, np.float32) for array in (x, w, dy))
    w = np.where(mask, w, 0)
    return {"forward": x @ w, "backward_x": dy @ w.T, "backward_w": np.where(mask, x.T @ dy, 0)}[name]


def _assert_close(got, expected, summed):
    """Up to one rounding, and what a float32 sum of that many standard normal products may be off."""
    error = np.abs(np.asarray(got, np.float32) - expected)
    assert np.all(error <= 0.5 * float(jnp.finfo(got.dtype).eps) * np.abs(expected) + 3e-7 * summed), error.max()
    assert np.all(np.asarray(got)[expected == 0] == 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("tile", "rows", "shape", "kind", "dtype", "out_dtype"),
    [
        ((64, 64), 64, (128, 256, 256), "random", jnp.bfloat16, jnp.bfloat16),
        ((64, 64), 128, (128, 64, 128), "none", jnp.float16, jnp.float16),
        ((128, 128), 128, (256, 384, 256), "random", jnp.float16, jnp.float32),
        ((128, 128), 128, (128, 256, 256), "one", jnp.bfloat16, jnp.bfloat16),
        ((64, 128), 128, (256, 128, 256), "all", jnp.bfloat16, jnp.float32),
        ((64, 128), 64, (64, 192, 384), "random", jnp.float16, jnp.float16),
        # More rounds than there are buffers, and two programs to a block.
        ((256, 256), 256, (512, 512, 512), "all", jnp.bfloat16, jnp.float32),
    ],
)
def test_is_the_float32_product_over_live_blocks(name, tile, rows, shape, kind, dtype, out_dtype, interpret):
    x, w, dy = _problem(shape, dtype)
    live = LIVE[kind]((shape[1] // tile[0], shape[2] // tile[1]))
    mask = np.kron(live, np.ones(tile, bool))
    # What lies in dead blocks is not read: a NaN would stay a NaN.
    poisoned = jnp.where(mask, w, jnp.nan)
    config, function = Config("mosaic_gpu", tile, rows), getattr(pallas_gpu, name)
    arguments = _arguments(name, x, poisoned, dy)
    got = function(*arguments, None, _info(live), config, out_dtype, interpret=interpret)
    assert got.dtype == out_dtype
    _assert_close(got, _expected(name, x, w, dy, mask), max(shape))


@pytest.mark.parametrize("name", NAMES)
def test_applies_a_mask_of_single_weights(name, interpret):
    shape, tile = (64, 128, 128), (64, 64)
    x, w, dy = _problem(shape, jnp.bfloat16)
    mask = np.random.default_rng(2).random(shape[1:]) < 0.1
    mask[:64, :64] = False
    arguments = _arguments(name, x, jnp.where(mask, w, jnp.nan), dy)
    info, config = _info(live_tiles(jnp.asarray(mask), tile)), Config("mosaic_gpu", tile, 64)
    got = getattr(pallas_gpu, name)(*arguments, jnp.asarray(mask), info, config, jnp.float32, interpret=interpret)
    _assert_close(got, _expected(name, x, w, dy, mask), max(shape))


def test_masks_change_without_compiling_anew(interpret):
    shape, tile = (64, 128, 192), (64, 64)
    x, w, dy = _problem(shape, jnp.bfloat16)
    config = Config("mosaic_gpu", tile, 64)

    @jit_once
    def f(x, w, live):
        return pallas_gpu.forward(x, w, None, block_info(live), config, jnp.float32, interpret=interpret)

    for live in ([[True, False, True], [True, False, False]], [[False, True, False], [True, True, False]]):
        mask = np.kron(np.array(live), np.ones(tile, bool))
        _assert_close(f(x, w, jnp.asarray(live)), _expected("forward", x, w, dy, mask), max(shape))


@pytest.mark.parametrize(
    "tile",
    [(64, 64), pytest.param((128, 128), marks=pytest.mark.slow), pytest.param((64, 256), marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", NAMES)
def test_lowers_for_cuda(name, tile):
    x, w, dy = (jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in [(256, 512), (512, 768), (256, 768)])
    live = jax.ShapeDtypeStruct((512 // tile[0], 768 // tile[1]), bool)

    def f(a, b, live):
        config = Config("mosaic_gpu", tile, 128)
        return getattr(pallas_gpu, name)(a, b, None, block_info(live), config, jnp.bfloat16)

    text = jax.jit(f).trace(*_arguments(name, x, w, dy), live).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
    assert f"block_sparse_matmul_{name}" in text


@pytest.mark.parametrize(
    ("tile", "rows", "dtypes", "message"),
    [
        ((32, 64), 64, (jnp.bfloat16, jnp.bfloat16), r"tile=\(32, 64\)"),
        ((64, 64), 96, (jnp.bfloat16, jnp.bfloat16), "rows=96"),
        ((64, 64), 64, (jnp.float32, jnp.float32), "got float32 and float32"),
        ((64, 64), 64, (jnp.bfloat16, jnp.float16), "got bfloat16 and float16"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_refuses_what_it_cannot_do(name, tile, rows, dtypes, message):
    a, b = (jax.ShapeDtypeStruct((192, 192), dtype) for dtype in dtypes)
    info = block_info(jnp.ones((192 // tile[0], 192 // tile[1]), bool))
    function, config = getattr(pallas_gpu, name), Config("mosaic_gpu", tile, rows)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda a, b: function(a, b, None, info, config, jnp.bfloat16), a, b)
