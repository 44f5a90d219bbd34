"""Compressed weights and their product; the kernel for Blackwell GPUs is lowered, which needs no GPU."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxsparse import n_of_m
from jaxsparse.kernels import compress_n_of_m, decompress_n_of_m, n_of_m_matmul, tcgen05_metadata
from tests.problems import jit_once, slow_except

pallas_gpu = importlib.import_module("jaxsparse.kernels.n_of_m_matmul.pallas_gpu")


def problem(inputs=16, outputs=5, n=2, m=4, dtype=jnp.float32):
    """A kernel and a mask that keeps n of every m along its inputs."""
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((inputs, outputs)), dtype)
    return kernel, n_of_m(n, m).top(jnp.abs(kernel.astype(jnp.float32)))


def random_positions(rng, outputs, groups):
    """Two ascending positions of every four, all six pairs among them."""
    return jnp.asarray(
        np.array([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])[rng.integers(0, 6, (outputs, groups))]
    )


def test_compressed_by_hand():
    kernel = jnp.array([[5.0, 0.0], [0.0, 0.0], [6.0, 7.0], [0.0, 0.0], [0.0, 1.0], [2.0, 2.0], [0.0, 3.0], [4.0, 0.0]])
    mask = (kernel != 0).at[6, 1].set(False)
    values, positions = jax.jit(compress_n_of_m)(kernel, mask)
    assert values.tolist() == [[5, 6, 2, 4], [0, 7, 1, 2]]
    assert positions.tolist() == [
        [[0, 2], [1, 3]],
        [[0, 2], [0, 1]],
    ]  # of a group with one, the first free position too
    assert (values.dtype, positions.dtype) == (jnp.float32, jnp.uint8)


@pytest.mark.parametrize(
    ("pair", "dtype", "shape"),
    slow_except(
        [((2, 4), "bfloat16", (2, 16, 3))],
        [
            ((2, 4), "bfloat16", (2, 16, 3)),
            ((2, 4), "float32", (48, 5)),
            ((1, 4), "float16", (48, 1)),
            ((4, 8), "float32", (16, 5)),
            ((3, 3), "float32", (6, 4)),
            ((3, 16), "float16", (32, 4)),
            ((2, 4), "float32", (0, 3)),
            ((2, 4), "float32", (8, 0)),
        ],
    ),
)
def test_compressing_is_exact(pair, dtype, shape):
    (n, m), rng, width = pair, np.random.default_rng(0), jnp.dtype(dtype).itemsize

    @jit_once
    def there_and_back(kernel, mask):
        values, positions = compress_n_of_m(kernel, mask, n=n, m=m)
        return values, positions, decompress_n_of_m(values, positions, m=m)

    for density in (1, 0.5, 0):
        kernel = rng.integers(0, 2 ** (8 * width), shape).astype(f"u{width}").view(dtype)  # NaN, infinities and -0 too
        groups = rng.random((*shape[:-2], shape[-2] // m, m, shape[-1])).argsort(-2) < n
        mask = (groups & (rng.random(groups.shape) < density)).reshape(shape)
        values, positions, back = there_and_back(kernel, mask)
        assert values.shape == (*shape[:-2], shape[-1], shape[-2] // m * n)
        assert positions.shape == (*shape[:-2], shape[-1], shape[-2] // m, n)
        assert (np.diff(np.asarray(positions, int), axis=-1) > 0).all()
        assert back.dtype == kernel.dtype
        assert np.asarray(back).tobytes() == np.where(mask, kernel, np.zeros((), kernel.dtype)).tobytes()


def test_without_a_mask_zeros_of_either_sign_are_pruned():
    values, positions = jax.jit(compress_n_of_m)(jnp.array([[-0.0], [jnp.nan], [0.0], [1.0]]))
    assert positions.tolist() == [[[1, 3]]]
    np.testing.assert_array_equal(values, [[np.nan, 1.0]])


def test_a_group_with_too_many_is_an_error_and_nan_where_that_cannot_be_seen():
    kernel = jnp.ones((8, 2)).at[:2, 0].set(0).at[5:7].set(0)
    with pytest.raises(ValueError, match="a group of 4 weights keeps 4 of them, more than n=2"):
        compress_n_of_m(kernel)
    values, _ = jax.jit(compress_n_of_m)(kernel)
    np.testing.assert_array_equal(values, [[1, 1, 1, 1], [np.nan, np.nan, 1, 1]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "float8_e4m3fn"])
def test_metadata_has_the_order_of_pallas(dtype):
    positions = random_positions(np.random.default_rng(0), 256, 96)
    ours = jax.jit(lambda x: tcgen05_metadata(x, dtype))(positions)
    theirs = plgpu.format_tcgen05_sparse_metadata(positions.astype(jnp.uint2), jnp.dtype(dtype))
    assert (ours.dtype, ours.shape) == (jnp.uint2, (2, 3, 128, 64))
    np.testing.assert_array_equal(ours.astype(jnp.uint8), theirs.astype(jnp.uint8))


def test_metadata_of_16_bits_by_the_documented_position():
    # The selectors of 8 rows and 64 of the weights that are kept lie together, 8 of a row at a time.
    positions = jnp.zeros((128, 32, 2), jnp.uint8).at[1, 0, 0].set(3).at[8, 0, 1].set(2).at[0, 4, 0].set(1)
    where = np.argwhere(np.asarray(tcgen05_metadata(positions).astype(jnp.uint8)))[:, 2:].tolist()
    found = {int(tcgen05_metadata(positions)[0, 0, row, column]): (row, column) for row, column in where}
    assert found == {3: (1, 0), 2: (0, 9), 1: (8, 0)}


@pytest.mark.parametrize(
    ("n", "m", "dtype"),
    slow_except([(2, 4, "bfloat16")], [(2, 4, "bfloat16"), (2, 4, "float32"), (1, 4, "bfloat16"), (4, 8, "float32")]),
)
def test_product_is_that_of_the_decompressed_weights(n, m, dtype):
    kernel, mask = problem(n=n, m=m, dtype=dtype)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 2, 16)), dtype)
    dense = np.where(mask, kernel, 0).astype(np.float32)

    @jit_once
    def products(x, kernel, mask):
        values, positions = compress_n_of_m(kernel, mask, n=n, m=m)
        y = n_of_m_matmul(x, values, positions, m=m, out_dtype="float32", precision="highest")
        summed = jax.grad(lambda values: n_of_m_matmul(x, values, positions, m=m, out_dtype="float32").sum())
        return y, n_of_m_matmul(x, values, positions, m=m), summed(values), positions

    y, same, gradient, positions = products(x, kernel, mask)
    np.testing.assert_allclose(y, np.asarray(x, np.float32) @ dense, rtol=1e-5, atol=1e-5)
    assert same.dtype == jnp.dtype(dtype)
    rows = np.asarray(x, np.float32).sum((0, 1))  # the gradient of a weight is its input, summed over the rows
    index = (np.arange(16 // m)[:, None] * m + np.asarray(positions)).reshape(5, -1)
    np.testing.assert_allclose(gradient.astype(np.float32), rows[index], rtol=2e-2, atol=2e-2)


KERNELS = {"bfloat16": (256, 512, 300), "float16": (128, 128, 1)}  # outputs, inputs, rows


@pytest.mark.parametrize(("dtype", "out_dtype"), [("bfloat16", "float32"), ("bfloat16", None), ("float16", None)])
def test_lowers_for_blackwell(dtype, out_dtype):
    """Not more than that: Pallas' interpreter does not have the instruction."""
    outputs, inputs, rows = KERNELS[dtype]
    shapes = ((rows, inputs), dtype), ((outputs, inputs // 2), dtype), ((outputs, inputs // 4, 2), "uint8")

    def step(x, values, positions):
        def loss(x, values):
            y = n_of_m_matmul(x, values, positions, out_dtype=out_dtype, implementation="mosaic_gpu")
            return y.astype(jnp.float32).sum(), y.shape

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, values)

    traced = jax.jit(step).trace(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    assert [leaf.shape for leaf in jax.tree.leaves(traced.out_info)][-2:] == [shapes[0][0], shapes[1][0]]
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
    assert "n_of_m_matmul_forward" in text
    assert "tcgen05.mma.sp" in text
    for platform in ("cpu", "tpu"):
        with pytest.raises(ValueError, match=rf"cannot run on {platform}: it is a kernel .* \(Blackwell\); elsewhere"):
            traced.lower(lowering_platforms=(platform,))


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ([(3, 128), (128, 64), (128, 32, 2)], {}, "takes bfloat16 and float16, got float32"),
        ([(3, 128), (120, 64), (120, 32, 2)], {"dtype": "bfloat16"}, "multiples of 128 outputs and inputs, got 120"),
        ([(3, 64), (128, 32), (128, 16, 2)], {"dtype": "bfloat16"}, "outputs and inputs, got 128 and 64"),
        ([(3, 128), (128, 32), (128, 32, 1)], {"dtype": "bfloat16"}, "takes 2 of every 4 weights, got 1 of 4"),
        ([(3, 128), (128, 64), (128, 16, 4)], {"dtype": "bfloat16", "m": 8}, "2 of every 4 weights, got 4 of 8"),
    ],
)
def test_the_kernel_refuses_what_it_cannot_do(shapes, options, message):
    options = dict(options)
    dtype = options.pop("dtype", "float32")
    x, values, positions = (jnp.zeros(shape, kind) for shape, kind in zip(shapes, (dtype, dtype, "uint8"), strict=True))
    with pytest.raises(ValueError, match=message):
        n_of_m_matmul(x, values, positions, implementation="mosaic_gpu", **options)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="elsewhere than on GPUs")
def test_a_call_outside_of_jit_is_compiled_too():
    x, values, positions = jnp.zeros((3, 128)), jnp.zeros((128, 64)), jnp.zeros((128, 32, 2), jnp.uint8)
    with pytest.raises(ValueError, match="implementation='mosaic_gpu' cannot run on"):
        n_of_m_matmul(x.astype("bfloat16"), values.astype("bfloat16"), positions, implementation="mosaic_gpu")


def test_the_kernel_refuses_other_gpus(monkeypatch):
    class Hopper:
        compute_capability = "9.0"

    assert pallas_gpu.why_not(128, 128, 2, 4, jnp.dtype("bfloat16")) is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Hopper()])
    assert "this one has 9.0" in pallas_gpu.why_not(128, 128, 2, 4, jnp.dtype("bfloat16"))


def test_bad_arguments():
    kernel, mask = problem()
    values, positions = compress_n_of_m(kernel, mask)
    x = jnp.ones((3, 16))
    for call, error, message in (
        (lambda: compress_n_of_m(kernel[:15]), ValueError, r"inputs divisible by 4, got \(15, 5\)"),
        (lambda: compress_n_of_m(kernel[:, 0]), ValueError, r"got \(16,\)"),
        (lambda: compress_n_of_m(kernel, mask[:4]), ValueError, r"a bool mask .*\(16, 5\), got bool of \(4, 5\)"),
        (lambda: compress_n_of_m(kernel, kernel), ValueError, "got float32 of"),
        (lambda: compress_n_of_m(kernel, mask, n=5), ValueError, "1 <= n <= m <= 256, got n=5, m=4"),
        (lambda: compress_n_of_m(jnp.ones((4, 4), int)), TypeError, "a kernel of floats, got int"),
        (lambda: decompress_n_of_m(values, positions[0]), ValueError, r"decompress_n_of_m needs .*\(4, 2\)"),
        (lambda: decompress_n_of_m(values[:, 1:], positions), ValueError, r"got \(5, 7\) and \(5, 4, 2\)"),
        (lambda: decompress_n_of_m(values, positions, m=1), ValueError, "n at most m=1"),
        (lambda: decompress_n_of_m(values, positions.astype(jnp.float32)), ValueError, "are integers, got float32"),
        (lambda: tcgen05_metadata(positions), ValueError, r"multiples of 128 outputs and inputs, got \(5, 4, 2\)"),
        (lambda: tcgen05_metadata(jnp.zeros((128, 32, 2), int), "float32"), ValueError, "8 or 16 bits, got float32"),
        (lambda: n_of_m_matmul(x[:, 1:], values, positions), ValueError, r"with m=4, got \(3, 15\), \(5, 8\) and"),
        (lambda: n_of_m_matmul(x, values, positions, implementation="cuda"), ValueError, "'mosaic_gpu'.* got 'cuda'"),
        (lambda: n_of_m_matmul(x, values, positions, out_dtype="int8"), ValueError, "takes float32, .*, for int8"),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.skipif(
    jax.default_backend() != "gpu" or pallas_gpu.why_not(128, 128, 2, 4, jnp.dtype("bfloat16")) is not None,
    reason="runs on a Blackwell GPU alone, which the kernel has not met yet",
)
@pytest.mark.parametrize("dtype", KERNELS)
def test_is_the_product_on_a_blackwell_gpu(dtype):
    outputs, inputs, rows = KERNELS[dtype]
    kernel, mask = problem(inputs, outputs, dtype=dtype)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, inputs)), dtype)
    values, positions = compress_n_of_m(kernel, mask)
    y = n_of_m_matmul(x, values, positions, out_dtype="float32", implementation="mosaic_gpu")
    expected = np.asarray(x, np.float32) @ np.where(mask, kernel, 0).astype(np.float32)
    np.testing.assert_allclose(y, expected, atol=3e-7 * inputs, rtol=1e-5)
