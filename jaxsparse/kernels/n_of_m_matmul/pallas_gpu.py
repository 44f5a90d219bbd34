"""The product as a Pallas Mosaic GPU kernel for Blackwell GPUs of compute capability 10 (B200): ``tcgen05.mma.sp``.

**Never run on such a GPU**, and Pallas' interpreter does not have the instruction: the tests lower it, nothing more.

The sparse operand is the left one, so the kernel computes ``y.T = w.T @ x.T``. Each program computes a tile of it, of
128 outputs by 128 rows. It fetches values, positions and x for 128 inputs at a time into a ring of buffers, copies
positions to the tensor memory, and adds the product there, in float32.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from jaxsparse.kernels.masked_matmul.manual_axes import shape_like

__all__ = ["TILE", "forward", "why_not"]

TILE = 128  # of outputs, which the sparse instruction prescribes, of inputs, and of rows of x
_BUFFERS = 3
_SWIZZLE = 64  # bytes, for both operands: a row of 64 values has 128 bytes, two of them


def why_not(outputs: int, inputs: int, n: int, m: int, dtype: jnp.dtype) -> str | None:
    """The reason why the kernel does not support this product or this process's GPU; None if it does."""
    if (n, m) != (2, 4):
        return f"the kernel for Blackwell GPUs takes 2 of every 4 weights, got {n} of {m}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"the kernel for Blackwell GPUs takes bfloat16 and float16, got {dtype}"
    if outputs % TILE or inputs % TILE or not outputs or not inputs:
        return f"the kernel for Blackwell GPUs takes multiples of {TILE} outputs and inputs, got {outputs} and {inputs}"
    if jax.default_backend() == "gpu":
        capability = str(getattr(jax.devices()[0], "compute_capability", "10.0"))
        if not capability.startswith("10."):
            return f"the kernel is for Blackwell GPUs, of compute capability 10, this one has {capability}"
    return None


def forward(x: jax.Array, values: jax.Array, metadata: jax.Array, dtype: DTypeLike) -> jax.Array:
    """``(x @ w).T`` of shape (outputs, rows).

    Args:
      x: (rows, inputs), bfloat16 or float16, all sizes multiples of ``TILE``.
      values: (outputs, inputs / 2), of the dtype of x.
      metadata: of :func:`tcgen05_metadata`.
      dtype: of the result: bfloat16, float16 or float32.
    """
    shape = values.shape[0], x.shape[0]

    def body(values_ref, metadata_ref, x_ref, out_ref, total, positions, done, piece):
        i, j = lax.axis_index("i"), lax.axis_index("j")

        def multiply(indices, values_tile, metadata_tile, x_tile):
            # The product reads what this copy writes and is issued after it by the same thread: no need to wait.
            plgpu.async_copy_sparse_metadata_to_tmem(metadata_tile, positions)
            plgpu.tcgen05_mma(
                total,
                values_tile,
                x_tile.T,
                done,
                a_sparse_metadata=positions,
                accumulate=indices[0] > 0,
            )
            plgpu.barrier_wait(done)  # the next round overwrites positions, and a later one the buffers

        plgpu.emit_pipeline(
            multiply,
            grid=(x.shape[1] // TILE,),
            in_specs=[
                plgpu.BlockSpec((TILE, TILE // 2), lambda t: (i, t), transforms=_swizzled(values.dtype, _SWIZZLE)),
                plgpu.BlockSpec((1, 1, TILE, TILE // 2), lambda t: (i, t, 0, 0)),
                plgpu.BlockSpec((TILE, TILE), lambda t: (j, t), transforms=_swizzled(x.dtype, _SWIZZLE)),
            ],
            max_concurrent_steps=_BUFFERS,
        )(values_ref, metadata_ref, x_ref)
        piece[...] = plgpu.async_load_tmem(total).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(piece, out_ref.at[pl.ds(i * TILE, TILE), pl.ds(j * TILE, TILE)])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=shape_like(x, shape, jnp.dtype(dtype)),
        scratch_types=[
            plgpu.TMEM((TILE, TILE), jnp.float32),
            plgpu.TMEM((TILE, TILE // 2), jnp.uint2, layout=plgpu.TMEMLayout.SPARSE_METADATA_LAYOUT),
            plgpu.Barrier(orders_tensor_core=True),
            plgpu.SMEM((TILE, TILE), dtype, transforms=_swizzled(dtype, 128)),
        ],
        grid=(shape[0] // TILE, shape[1] // TILE),
        grid_names=("i", "j"),
        kernel_name="n_of_m_matmul_forward",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(values, metadata, x)


def _swizzled(dtype: DTypeLike, swizzle: int) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    return plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle)
