"""Lists of the live blocks of a mask, which kernels visit in this order.

They are made on the device, inside jit: the lists have room for every block, and a count says how many entries are
valid. So masks may change from call to call without recompilation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["BlockInfo", "BlockList", "block_info", "live_tiles"]


class BlockList(NamedTuple):
    """The blocks to visit, line by line; a line is a column of blocks, or a row of them for the transposed weights.

    Attributes:
      line: (blocks,), int32: the line of each entry, ascending. Entries after the first ``count`` are meaningless.
      position: (blocks,), int32: the position of the block in its line, ascending within a line.
      live: (blocks,), int32: 1 for live blocks. With ``visit_empty``, each line without live blocks has one entry with
        0, for kernels that only write the outputs of lines that they visit.
      starts: (lines + 1,), int32: the index of each line's first entry; the last is ``count``.
      count: (1,), int32: the number of entries.
    """

    line: jax.Array
    position: jax.Array
    live: jax.Array
    starts: jax.Array
    count: jax.Array


class BlockInfo(NamedTuple):
    """The block lists of a mask, for a product and its gradients.

    Attributes:
      by_column: for ``x @ w`` and for the gradient of ``w``; lines are columns of blocks, positions are rows of blocks.
      by_row: for ``dy @ w.T``; lines are rows of blocks, positions are columns of blocks.
    """

    by_column: BlockList
    by_row: BlockList


def block_info(live: jax.Array, *, visit_empty: bool = False) -> BlockInfo:
    """Make the block lists of a mask.

    Args:
      live: (rows of blocks, columns of blocks), bool.
      visit_empty: whether a line without live blocks gets one entry, with ``live`` 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> info = block_info(jnp.array([[True, False, False], [True, False, True]]))
      >>> n = int(info.by_column.count[0])
      >>> info.by_column.line[:n].tolist(), info.by_column.position[:n].tolist(), info.by_column.starts.tolist()
      ([0, 0, 2], [0, 1, 1], [0, 2, 2, 3])
    """
    return BlockInfo(_list(live.T, visit_empty), _list(live, visit_empty))


def live_tiles(mask: jax.Array, tile: tuple[int, int]) -> jax.Array:
    """Find the tiles of a mask that contain a True: (rows of tiles, columns of tiles), bool.

    The mask is padded with False to whole tiles.
    """
    padded = jnp.pad(mask, [(0, -mask.shape[axis] % tile[axis]) for axis in (0, 1)])
    rows, columns = padded.shape[0] // tile[0], padded.shape[1] // tile[1]
    # Reducing rows first is several times faster on a CPU than both axes at once.
    return padded.reshape(rows, tile[0], padded.shape[1]).any(1).reshape(rows, columns, tile[1]).any(2)


def _list(lines: jax.Array, visit_empty: bool) -> BlockList:
    visited = lines
    if visit_empty:
        visited = lines.at[:, 0].set(lines[:, 0] | ~lines.any(1))
    flat = jnp.nonzero(visited.reshape(-1), size=lines.size, fill_value=0)[0].astype(jnp.int32)
    counts = jnp.sum(visited, axis=1, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.zeros([1], jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
    line, position = flat // lines.shape[1], flat % lines.shape[1]
    return BlockList(line, position, lines.reshape(-1)[flat].astype(jnp.int32), starts, starts[-1:])
