"""The product as a Pallas kernel for TPUs, which fetches and multiplies only the listed tiles.

The lists are prefetched as scalars and determine the tiles of x and of the weights that each step of the grid fetches.
The grid is as long as the list, a traced number. Accumulates in float32.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxsparse.kernels.masked_matmul.block_info import BlockInfo, BlockList
from jaxsparse.kernels.masked_matmul.config import Config
from jaxsparse.kernels.masked_matmul.manual_axes import shape_like, zeros_like

__all__ = ["backward_w", "backward_x", "choose_rows", "choose_tile", "forward", "why_not"]

LANES = 128  # the last dimension of a fetched tile is a multiple of this
_LARGEST_SIDE = 512
_MOST_ROWS = 2048
_VMEM_BYTES = 10 * 2**20  # of the 16 MB that a kernel may use by default


def why_not(block: tuple[int, int] | None, dtype: jnp.dtype) -> str | None:
    """The reason why the kernel does not support these blocks or this dtype; None if it does."""
    if dtype.name not in ("float32", "bfloat16"):
        return f"the TPU kernel takes float32 and bfloat16, got {dtype}"
    if block is not None and any(side % LANES and LANES % side for side in block):
        return (
            f"the TPU kernel takes blocks whose sides divide {LANES} or are multiples of it, "
            f"got {block[0]} x {block[1]}"
        )
    return None


def choose_tile(block: tuple[int, int] | None, shape: tuple[int, int], dtype: jnp.dtype) -> tuple[int, int]:
    """Choose the tile to visit as one: a block, several small ones, part of a large one, or without blocks a square.

    Raises:
      ValueError: for blocks or a dtype that the kernel does not support.
    """
    if reason := why_not(block, dtype):
        raise ValueError(reason)
    if block is None:
        rows, columns = (min(_LARGEST_SIDE, size + -size % LANES) for size in shape)
    else:
        rows, columns = (LANES if side < LANES else _part(side) for side in block)
    return rows, columns


def _part(side: int) -> int:
    return max(part for part in range(LANES, min(side, _LARGEST_SIDE) + 1, LANES) if side % part == 0)


def choose_rows(tile: tuple[int, int], rows: int, itemsize: int, out_itemsize: int) -> int:
    """Choose how many rows of x to multiply at once: all, or as many as fit, in equal shares."""
    granule = 32 // min(itemsize, out_itemsize)  # rows that a TPU stores together
    itemsize = max(itemsize, out_itemsize)
    # There are two copies of each tile of x, w, mask and output, one of them in transfer, and one float32 sum.
    per_row = max(tile) * 4 + sum(tile) * 2 * itemsize
    fit = (_VMEM_BYTES - math.prod(tile) * (4 * itemsize + 6)) // per_row
    at_most = max(LANES, min(fit, _MOST_ROWS) // LANES * LANES)
    share = -(-rows // max(1, -(-rows // at_most)))
    return max(granule, share + -share % granule)


def forward(x, w, mask, info: BlockInfo, config: Config, dtype):
    """``x @ (w * mask)``; :mod:`xla_blocks` has the sums."""
    return _sum_lines(x, w, mask, info.by_column, config, dtype, transpose=False)


def backward_x(dy, w, mask, info: BlockInfo, config: Config, dtype):
    """``dy @ (w * mask).T``."""
    return _sum_lines(dy, w, mask, info.by_row, config, dtype, transpose=True)


def _sum_lines(x, w, mask, blocks: BlockList, config: Config, dtype, transpose: bool):
    """Sum over the listed tiles of each line; lines are columns of w, or rows with ``transpose``."""
    tile, rows = config.tile, config.rows
    summed, out_tile = (tile[1], tile[0]) if transpose else tile
    width = w.shape[0 if transpose else 1]

    def x_index(r, t, line, position, live):
        del line, live
        return r, position[t]

    def w_index(r, t, line, position, live):
        del r, live
        return (line[t], position[t]) if transpose else (position[t], line[t])

    def out_index(r, t, line, position, live):
        del position, live
        return r, line[t]

    in_specs = [pl.BlockSpec((rows, summed), x_index), pl.BlockSpec(tile, w_index)]
    operands = [x, w]
    if mask is not None:
        in_specs.append(pl.BlockSpec(tile, w_index))
        operands.append(mask.astype(jnp.int8))
    return _call(
        functools.partial(_line_kernel, transpose=transpose, precision=config.precision),
        "backward_x" if transpose else "forward",
        blocks,
        grid=(x.shape[0] // rows, blocks.count[0]),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((rows, out_tile), out_index),
        out_shape=shape_like(x, (x.shape[0], width), dtype),
        scratch=(rows, out_tile),
        operands=operands,
        cost=_cost(x.shape[0], blocks, tile, operands, (x.shape[0], width), dtype),
        interpret=config.interpret,
        order=("parallel", "arbitrary"),
    )


def _line_kernel(line, position, live, x, w, *refs, transpose, precision):
    mask, (out, total) = (refs[0], refs[1:]) if len(refs) == 3 else (None, refs)
    del position
    t, last = pl.program_id(1), pl.num_programs(1) - 1
    first_of_line = (t == 0) | (line[t] != line[jnp.maximum(t - 1, 0)])
    last_of_line = (t == last) | (line[t] != line[jnp.minimum(t + 1, last)])

    @pl.when(first_of_line)
    def start():
        total[...] = jnp.zeros_like(total)

    @pl.when(live[t] != 0)
    def add():
        total[...] += _dot(x[...], _masked(w[...], mask), (1, 1 if transpose else 0), precision)

    @pl.when(last_of_line)
    def store():
        out[...] = total[...].astype(out.dtype)


def backward_w(x, dy, mask, info: BlockInfo, config: Config, dtype):
    """``x.T @ dy`` for listed tiles and 0 elsewhere: the output starts as zeros, and only listed tiles are written."""
    tile, rows = config.tile, config.rows
    blocks = info.by_column

    def x_index(t, r, line, position, live):
        del line, live
        return r, position[t]

    def dy_index(t, r, line, position, live):
        del position, live
        return r, line[t]

    def w_index(t, r, line, position, live):
        del r, live
        return position[t], line[t]

    in_specs = [pl.BlockSpec((rows, tile[0]), x_index), pl.BlockSpec((rows, tile[1]), dy_index)]
    operands = [x, dy]
    if mask is not None:
        in_specs.append(pl.BlockSpec(tile, w_index))
        operands.append(mask.astype(jnp.int8))
    in_specs.append(pl.BlockSpec(memory_space=pl.ANY))
    operands.append(zeros_like(x, (x.shape[1], dy.shape[1]), dtype))
    return _call(
        functools.partial(_tile_kernel, precision=config.precision),
        "backward_w",
        blocks,
        grid=(blocks.count[0], x.shape[0] // rows),
        in_specs=in_specs,
        out_specs=pl.BlockSpec(tile, w_index),
        out_shape=shape_like(x, (x.shape[1], dy.shape[1]), dtype),
        scratch=tile,
        operands=operands,
        cost=_cost(x.shape[0], blocks, tile, operands, (0, 0), dtype),
        interpret=config.interpret,
        order=("arbitrary", "arbitrary"),
        aliases={3 + len(operands) - 1: 0},
    )


def _tile_kernel(line, position, live, x, dy, *refs, precision):
    mask, (_, out, total) = (refs[0], refs[1:]) if len(refs) == 4 else (None, refs)
    del line, position
    t, r = pl.program_id(0), pl.program_id(1)

    @pl.when(r == 0)
    def start():
        total[...] = jnp.zeros_like(total)

    @pl.when(live[t] != 0)
    def add():
        total[...] += _dot(x[...], dy[...], (0, 0), precision)

    @pl.when(r == pl.num_programs(1) - 1)
    def store():
        out[...] = _masked(total[...], mask).astype(out.dtype)


def _dot(a, b, axes, precision):
    dims = (((axes[0],), (axes[1],)), ((), ()))
    dtype = jnp.promote_types(a.dtype, b.dtype)  # the gradient of the result may be wider than x and w
    return jax.lax.dot_general(
        a.astype(dtype), b.astype(dtype), dims, precision=precision, preferred_element_type=jnp.float32
    )


def _masked(values, mask):
    # Not every TPU compares bytes (v4 does not).
    return values if mask is None else jnp.where(mask[...].astype(jnp.int32) != 0, values, jnp.zeros_like(values))


def _call(
    kernel, name, blocks, *, grid, in_specs, out_specs, out_shape, scratch, operands, cost, interpret, order, aliases=()
):
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(scratch, jnp.float32)],
        ),
        out_shape=out_shape,
        input_output_aliases=dict(aliases),
        compiler_params=pltpu.CompilerParams(dimension_semantics=order),
        cost_estimate=cost,
        interpret=interpret,
        name=f"masked_matmul_{name}",
    )(blocks.line, blocks.position, blocks.live, *operands)


def _cost(rows, blocks, tile, operands, out_shape, dtype):
    """The cost for XLA's scheduler, which plans before there is a mask: as if all tiles were live."""
    return pl.CostEstimate(
        flops=2 * rows * blocks.line.size * math.prod(tile),
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in operands)
        + math.prod(out_shape) * jnp.dtype(dtype).itemsize,
        transcendentals=0,
    )
