"""From a mask to lists of live blocks: what a kernel visits, and in which order.

Made on the device, inside jit, from the mask of the moment: the lists have room for every block, and a number says how
many entries count. So masks may change from call to call and nothing is compiled anew.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["BlockInfo", "BlockList", "block_info", "live_tiles"]


class BlockList(NamedTuple):
    """The blocks to visit, line after line: a line is a column of blocks (or a row of them, of the transposed weights).

    Attributes:
      line: (blocks,), int32: the line of each entry, ascending. What comes after ``count`` entries means nothing.
      position: (blocks,), int32: where in its line the block lies, ascending within a line.
      live: (blocks,), int32: 1; 0 for the one entry that a line without live blocks has, if such lines are visited, for
        a kernel that writes an output only where it comes by.
      starts: (lines + 1,), int32: where the entries of each line begin; the last is ``count``.
      count: (1,), int32: the number of entries.
    """

    line: jax.Array
    position: jax.Array
    live: jax.Array
    starts: jax.Array
    count: jax.Array


class BlockInfo(NamedTuple):
    """The lists of a mask of blocks.

    Attributes:
      by_column: for ``x @ w``, and for the gradient of ``w``: lines are columns of blocks, positions rows of blocks.
      by_row: for ``dy @ w.T``: lines are rows of blocks, positions columns of blocks.
    """

    by_column: BlockList
    by_row: BlockList


def block_info(live: jax.Array, *, visit_empty: bool = False) -> BlockInfo:
    """The lists of a mask of blocks.

    Args:
      live: (rows of blocks, columns of blocks), bool.
      visit_empty: give a line without live blocks one entry, whose ``live`` is 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> info = block_info(jnp.array([[True, False, False], [True, False, True]]))
      >>> n = int(info.by_column.count[0])
      >>> info.by_column.line[:n].tolist(), info.by_column.position[:n].tolist(), info.by_column.starts.tolist()
      ([0, 0, 2], [0, 1, 1], [0, 2, 2, 3])
    """
    return BlockInfo(_list(live.T, visit_empty), _list(live, visit_empty))


def live_tiles(mask: jax.Array, tile: tuple[int, int]) -> jax.Array:
    """Which tiles of a mask have a True in them: (rows of tiles, columns of tiles), bool.

    The mask is taken for continued by False where the last tiles stand over.
    """
    padded = jnp.pad(mask, [(0, -mask.shape[axis] % tile[axis]) for axis in (0, 1)])
    rows, columns = padded.shape[0] // tile[0], padded.shape[1] // tile[1]
    # Rows first: several times faster on a CPU than both at once.
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
