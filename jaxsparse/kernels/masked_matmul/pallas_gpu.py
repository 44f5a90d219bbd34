"""The product as a Pallas Mosaic GPU kernel for Hopper GPUs (H100, H200), visiting only live blocks.

``x`` is (M, K), ``w`` (K, N), ``dy`` (M, N), all bfloat16 or all float16, padded to whole tiles of the ``Config``. It
accumulates in float32 and rounds once, to the requested dtype. Only Hopper has the multiplying instruction, wgmma;
Blackwell has a different one.

Each program computes one tile of the output. One of its warpgroups fetches operands, 64 entries of the summed axis at a
time, into a ring of buffers; the others multiply. The program reads the number of iterations from the lists of live
blocks: masks can change without recompilation, and a tile with nothing to sum takes no iterations and writes zeros,
whatever the dead blocks contain.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxsparse.kernels.masked_matmul.block_info import BlockInfo, BlockList
from jaxsparse.kernels.masked_matmul.config import Config
from jaxsparse.kernels.masked_matmul.manual_axes import shape_like

__all__ = ["backward_w", "backward_x", "choose_rows", "choose_tile", "forward", "why_not"]

_SIDES = (64, 128, 256)
# Entries of the summed axis in a buffer: 128 bytes, the longest row that TMA and wgmma swizzle.
_DEPTH = 64
# Two warpgroups sum; each has room for 128 by 128 sums, which take 128 registers per thread.
_MAX_TILE = 2 * 128 * 128
# The output is written through shared memory in pieces of at most this size, one per warpgroup.
_PIECE = (64, 128)
_MAX_BUFFERS = 6
# A program may use 227 KiB; barriers need a little of it.
_SHARED_BYTES = 224 * 1024


def why_not(block: tuple[int, int] | None, dtype: jnp.dtype) -> str | None:
    """The reason why the kernel does not support these blocks, this dtype or this process's GPU; None if it does."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"the kernel for Hopper GPUs takes bfloat16 and float16, got {dtype}"
    if block is not None and any(side % _SIDES[0] and _SIDES[0] % side for side in block):
        return (
            f"the kernel for Hopper GPUs takes blocks whose sides divide {_SIDES[0]} or are multiples of it, "
            f"got {block[0]} x {block[1]}"
        )
    if jax.default_backend() == "gpu":
        capability = str(getattr(jax.devices()[0], "compute_capability", "9.0"))
        if not capability.startswith("9."):
            return f"the kernel is for Hopper GPUs, of compute capability 9.0, this one has {capability}"
    return None


def choose_tile(block: tuple[int, int] | None, shape: tuple[int, int], dtype: jnp.dtype) -> tuple[int, int]:
    """Choose the tile to visit as one: a block, several small blocks, or part of a large block.

    Raises:
      ValueError: for blocks or a dtype that the kernel does not support.
    """
    del shape
    if reason := why_not(block, dtype):
        raise ValueError(reason)
    rows, columns = (
        max((side for side in _SIDES if of_block % side == 0), default=_SIDES[0]) for of_block in block or (128, 128)
    )
    return rows, columns


def choose_rows(tile: tuple[int, int], rows: int, itemsize: int, out_itemsize: int) -> int:
    """Choose how many rows of x to multiply at once: with more, weights are fetched from the L2 cache less often."""
    del tile, itemsize, out_itemsize
    return next(side for side in (*_SIDES, rows) if side >= min(rows, _SIDES[-1]))


def forward(x, w, mask, info: BlockInfo, config: Config, dtype, *, interpret=None):
    """``y[:, j] = sum over the live i of x[:, i] @ w[i, j]``.

    Args:
      mask: None if the blocks are the mask. Otherwise the weights are masked before the kernel, in one pass: inside the
        kernel, every tile of rows would repeat it.
      info: made with ``visit_empty=False``.
      interpret: as for ``plgpu.kernel``.
    """
    return _sum_lines("forward", x, _masked(w, mask), info.by_column, config, dtype, interpret, transposed=False)


def backward_x(dy, w, mask, info: BlockInfo, config: Config, dtype, *, interpret=None):
    """``dx[:, i] = sum over the live j of dy[:, j] @ w[i, j].T``."""
    return _sum_lines(
        "backward_x", _rounded(dy, w.dtype), _masked(w, mask), info.by_row, config, dtype, interpret, transposed=True
    )


def backward_w(x, dy, mask, info: BlockInfo, config: Config, dtype, *, interpret=None):
    """``dw[i, j] = x[:, i].T @ dy[:, j]`` for the live (i, j), 0 for the others."""
    _check_sides(config)
    tk, tn = config.tile
    shape, tile = (x.shape[1], dy.shape[1]), _out_tile(tk, tn)
    blocks = info.by_column
    counted = jnp.where(jnp.arange(blocks.live.size) < blocks.count, blocks.live, 0)
    live = jnp.zeros((shape[1] // tn, shape[0] // tk), jnp.int32).at[blocks.line, blocks.position].max(counted)

    def visit(live, i, j):
        rounds = live[j * tile[1] // tn, i * tile[0] // tk] * (x.shape[0] // _DEPTH)
        return (rounds,), lambda t: (t, i), lambda t: (t, j)

    dw = _matmul("backward_w", visit, (live,), x, _rounded(dy, x.dtype), (True, False), shape, tile, dtype, interpret)
    return _masked(dw, mask)


def _sum_lines(name, x, w, blocks: BlockList, config: Config, dtype, interpret, *, transposed: bool):
    """``x @ w``, or ``x @ w.T``: every line of blocks is summed into a block of output columns."""
    _check_sides(config)
    summed, width = reversed(config.tile) if transposed else config.tile
    shape, tile = (x.shape[0], w.shape[0 if transposed else 1]), _out_tile(config.rows, width)
    in_block = summed // _DEPTH

    def visit(starts, position, i, j):
        line = j * tile[1] // width
        first = starts[line]

        def x_index(t, s):
            return i, position[first + t] * in_block + s

        def w_index(t, s):
            along = position[first + t] * in_block + s
            return (j, along) if transposed else (along, j)

        return (starts[line + 1] - first, in_block), x_index, w_index

    lists = (blocks.starts, blocks.position)
    return _matmul(name, visit, lists, x, w, (False, transposed), shape, tile, dtype, interpret)


def _matmul(name, visit, lists, a, b, transposed, shape, tile, dtype, interpret):
    """``a @ b``, over the parts of the summed axis that ``visit`` selects.

    Args:
      visit: maps the references to ``lists`` and the indices of an output tile to the sizes of the loop and, for ``a``
        and for ``b``, the function from the loop's indices to those of the tile to multiply.
      transposed: whether ``a``, and whether ``b``, is stored transposed; wgmma accepts 16-bit operands like this too.
      shape: the shape of the output.
      tile: the shape of the tile of the output that one program computes.
    """
    _check_operands(a, b, dtype)
    if shape[0] % tile[0] or shape[1] % tile[1]:
        raise ValueError(f"an output of {shape} is not in whole tiles of {tile}")
    # Split by rows if there are enough for two instructions of 64: the warpgroups then share the tiles of b.
    split = (2, 1) if tile[0] >= 128 else (1, 2) if tile[1] >= 128 else (1, 1)
    warpgroups = split[0] * split[1]
    part = (tile[0] // split[0], tile[1] // split[1])
    piece = (_PIECE[0], min(_PIECE[1], part[1]))

    piece_bytes = warpgroups * piece[0] * piece[1] * jnp.dtype(dtype).itemsize
    buffers = min(_MAX_BUFFERS, (_SHARED_BYTES - piece_bytes) // (_DEPTH * sum(tile) * a.dtype.itemsize))

    def body(*refs):
        *list_refs, a_ref, b_ref, out_ref, piece_ref = refs
        i, j, warpgroup = lax.axis_index("i"), lax.axis_index("j"), lax.axis_index("warpgroup")
        rows, columns = (pl.ds(warpgroup * n if parts == 2 else 0, n) for parts, n in zip(split, part, strict=True))
        loop, a_index, b_index = visit(*list_refs, i, j)

        def multiply(_, a_tile, b_tile, total):
            a_part = _part(a_tile, rows, slice(None), transposed[0])
            b_part = _part(b_tile, slice(None), columns, transposed[1])
            plgpu.wgmma(total, a_part, b_part)
            # Waits for all but this product; the buffers of the previous one are then released (delay_release=1).
            plgpu.wgmma_wait(1)
            return total

        def sum_up(total, run):
            run(total)
            sums = total[...].astype(dtype)
            out = out_ref.at[pl.ds(i * tile[0], tile[0]), pl.ds(j * tile[1], tile[1])].at[rows, columns]
            for row in range(0, part[0], piece[0]):
                for column in range(0, part[1], piece[1]):
                    here = slice(row, row + piece[0]), slice(column, column + piece[1])
                    piece_ref[warpgroup] = sums[here]
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(piece_ref.at[warpgroup], out.at[here])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        plgpu.emit_pipeline_warp_specialized(
            multiply,
            grid=loop,
            in_specs=[
                _spec(a, (tile[0], _DEPTH), a_index, transposed[0]),
                _spec(b, (_DEPTH, tile[1]), b_index, transposed[1]),
            ],
            max_concurrent_steps=buffers,
            num_compute_wgs=warpgroups,
            wg_axis="warpgroup",
            memory_registers=40,
            compute_context=lambda run: pl.run_scoped(lambda total: sum_up(total, run), plgpu.ACC(part, jnp.float32)),
        )(a_ref, b_ref)

    kernel = plgpu.kernel(
        body,
        out_type=shape_like(a, shape, dtype),
        scratch_types=[plgpu.SMEM((warpgroups, *piece), dtype, transforms=_swizzled(dtype))],
        # j varies fastest: programs that run at the same time share rows of x or dy, which are then read from memory
        # once, and the few live blocks of w stay in the L2 cache from one row of tiles to the next.
        grid=(shape[0] // tile[0], shape[1] // tile[1]),
        grid_names=("i", "j"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        kernel_name=f"block_sparse_matmul_{name}",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    with jax.enable_x64(False):  # the indices of its loops are of 32 bits, as the lists are
        return kernel(*lists, a, b)


def _spec(operand, block, index, transposed):
    """The tiles of an operand that the ring's buffers hold."""
    block = block[::-1] if transposed else block
    return plgpu.BlockSpec(block, index, transforms=_swizzled(operand.dtype), delay_release=1)


def _part(tile, rows, columns, transposed):
    """Some rows and columns of an operand's tile in shared memory."""
    return tile.at[columns, rows].T if transposed else tile.at[rows, columns]


def _swizzled(dtype):
    """The layout in shared memory that TMA and wgmma require: rows of 128 bytes, swizzled."""
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def _out_tile(height, width):
    return height, min(width, _MAX_TILE // height)


def _rounded(dy, dtype):
    """The gradient of a float32 result in the 16 bits that wgmma takes."""
    return dy.astype(dtype) if dy.dtype == jnp.float32 else dy


def _masked(w, mask):
    return w if mask is None else jnp.where(mask, w, jnp.zeros_like(w))


def _check_sides(config: Config):
    if config.rows not in _SIDES or not all(side in _SIDES for side in config.tile):
        raise ValueError(f"the kernel takes sides {_SIDES}; got rows={config.rows}, tile={config.tile}")


def _check_operands(a, b, dtype):
    if a.dtype != b.dtype or a.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"the kernel takes two bfloat16 or two float16 operands; got {a.dtype} and {b.dtype}")
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"the kernel writes bfloat16, float16 or float32; got {jnp.dtype(dtype)}")
