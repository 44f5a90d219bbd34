"""Matrices of which n of every m weights along the inputs are kept, as two dense arrays: values and positions."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

__all__ = ["compress_n_of_m", "decompress_n_of_m", "tcgen05_metadata"]

_LONGEST = 256  # positions are uint8


def compress_n_of_m(
    kernel: ArrayLike, mask: ArrayLike | None = None, *, n: int = 2, m: int = 4
) -> tuple[jax.Array, jax.Array]:
    """Compress a matrix that keeps at most n of every m weights along its inputs.

    A group that keeps fewer than n weights has zeros at the first of its free positions, so that each has n. The files
    of :func:`jaxsparse.save_sparse` have the same order.

    Args:
      kernel: (..., inputs, outputs), floats, m dividing the inputs. Reshape a convolution of (height, width, inputs,
        outputs) to (height * width * inputs, outputs): its groups stay the same.
      mask: bool, of the kernel's shape; weights where it is False are ignored, even NaN. None: the weights that are not
        0, of either sign.
      n: how many weights stay, from 1 to m.
      m: how many weights are in a group, at most 256.

    Returns:
      The values, (..., outputs, inputs * n / m), of the kernel's dtype; and the position of each of them in its group,
      uint8 of shape (..., outputs, inputs / m, n), in increasing order.

    Raises:
      ValueError: for shapes that do not divide, a mask of another shape or dtype, and a group that keeps more than n.
        Under ``jax.jit``, where that cannot be seen, all values of such a group are NaN.
      TypeError: for a kernel that is not of floats.

    Examples:
      >>> import jax.numpy as jnp
      >>> kernel = jnp.array([[0.0, 3.0], [1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
      >>> values, positions = compress_n_of_m(kernel)
      >>> values.tolist(), positions.tolist()
      ([[1.0, 2.0], [3.0, 0.0]], [[[1, 3]], [[0, 1]]])
      >>> bool((decompress_n_of_m(values, positions) == kernel).all())
      True
    """
    kernel = jnp.asarray(kernel)
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise TypeError(f"compress_n_of_m needs a kernel of floats, got {kernel.dtype}")
    if not 1 <= n <= m <= _LONGEST:
        raise ValueError(f"compress_n_of_m needs 1 <= n <= m <= {_LONGEST}, got n={n}, m={m}")
    if kernel.ndim < 2 or kernel.shape[-2] % m:
        raise ValueError(f"compress_n_of_m needs (..., inputs, outputs), inputs divisible by {m}, got {kernel.shape}")
    mask = kernel != 0 if mask is None else jnp.asarray(mask)
    if mask.shape != kernel.shape or mask.dtype != jnp.bool_:
        raise ValueError(
            f"compress_n_of_m needs a bool mask of the kernel's shape, {kernel.shape}, got {mask.dtype} of {mask.shape}"
        )
    shape = (*kernel.shape[:-2], kernel.shape[-1], kernel.shape[-2] // m, m)
    groups, live = (jnp.swapaxes(x, -1, -2).reshape(shape) for x in (kernel, mask))
    kept = jnp.sum(live, axis=-1, keepdims=True, dtype=jnp.int32)
    if not isinstance(kept, jax.core.Tracer) and kept.size and (most := int(kept.max())) > n:
        raise ValueError(f"compress_n_of_m: a group of {m} weights keeps {most} of them, more than n={n}")
    places = jax.lax.broadcasted_iota(jnp.int32, live.shape, live.ndim - 1)
    first = jnp.sort(jnp.where(live, places, places + m), axis=-1)[..., :n]  # those that stay, then the free ones
    positions = jnp.sort(first % m, axis=-1)
    values = jnp.take_along_axis(jnp.where(live, groups, jnp.zeros_like(groups)), positions, axis=-1)
    values = jnp.where(kept > n, jnp.full_like(values, jnp.nan), values)
    return values.reshape(*shape[:-2], shape[-2] * n), positions.astype(jnp.uint8)


def decompress_n_of_m(values: ArrayLike, positions: ArrayLike, *, m: int = 4) -> jax.Array:
    """Make the matrix that :func:`compress_n_of_m` has compressed, bit for bit, with 0 for the other weights.

    Args:
      values: (..., outputs, inputs * n / m).
      positions: (..., outputs, inputs / m, n), integers from 0 to m - 1 that differ within a group.
      m: how many weights are in a group.

    Returns:
      (..., inputs, outputs), of the dtype of the values.

    Raises:
      ValueError: for shapes that do not belong together.
    """
    values, positions = checked(values, positions, m, "decompress_n_of_m")
    by_group, groups = values.reshape(positions.shape), jnp.zeros((*positions.shape[:-1], m), values.dtype)
    places = jax.lax.broadcasted_iota(positions.dtype, groups.shape, groups.ndim - 1)
    for i in range(positions.shape[-1]):
        groups = jnp.where(positions[..., i, None] == places, by_group[..., i, None], groups)
    return jnp.swapaxes(groups.reshape(*values.shape[:-1], positions.shape[-2] * m), -1, -2)


def tcgen05_metadata(positions: ArrayLike, dtype: DTypeLike = jnp.bfloat16) -> jax.Array:
    """Reorder the positions of 2:4 as the sparse matrix product of Blackwell GPUs reads them, ``tcgen05.mma.sp``.

    The order is that of the `sparsity selector
    <https://docs.nvidia.com/cuda/parallel-thread-execution/#tcgen05-sparse-matrices>`_ in the PTX ISA, in tiles that
    Pallas copies with ``async_copy_sparse_metadata_to_tmem``; ``plgpu.format_tcgen05_sparse_metadata`` gives the same.

    Args:
      positions: (outputs, inputs / 4, 2), of :func:`compress_n_of_m`; outputs and inputs are multiples of 128.
      dtype: of the values, of 8 or 16 bits.

    Returns:
      uint2, (outputs / 128, inputs / 128, 128, 64).

    Raises:
      ValueError: for other shapes, and values of other sizes.

    Examples:
      >>> import jax.numpy as jnp
      >>> positions = jnp.tile(jnp.array([0, 3], jnp.uint8), (128, 64, 1))  # of 128 outputs and 256 inputs
      >>> tcgen05_metadata(positions).shape
      (1, 2, 128, 64)
    """
    positions = jnp.asarray(positions)
    rows, groups, n = positions.shape if positions.ndim == 3 else (0, 0, 0)
    if n != 2 or rows % 128 or groups % 32:
        raise ValueError(
            "tcgen05_metadata needs (outputs, inputs / 4, 2), for multiples of 128 outputs and inputs, "
            f"got {positions.shape}"
        )
    tiles = rows // 128, groups // 32
    if (size := jnp.dtype(dtype).itemsize) == 1:
        ordered = positions.reshape(tiles[0], 128, tiles[1], 64).transpose(0, 2, 1, 3)
    elif size == 2:
        ordered = positions.reshape(tiles[0], 8, 2, 8, tiles[1], 4, 2, 8).transpose(0, 4, 1, 6, 3, 5, 2, 7)
    else:
        raise ValueError(f"tcgen05_metadata needs a dtype of 8 or 16 bits, got {jnp.dtype(dtype)}")
    return ordered.reshape(*tiles, 128, 64).astype(jnp.uint2)


def checked(values: ArrayLike, positions: ArrayLike, m: int, who: str) -> tuple[jax.Array, jax.Array]:
    """Both as arrays; a ValueError for shapes that do not belong together."""
    values, positions = jnp.asarray(values), jnp.asarray(positions)
    fits = values.ndim >= 2 and positions.ndim == values.ndim + 1 and positions.shape[:-2] == values.shape[:-1]
    if not fits or positions.shape[-2] * positions.shape[-1] != values.shape[-1] or not 1 <= positions.shape[-1] <= m:
        raise ValueError(
            f"{who} needs values (..., outputs, inputs * n / m) and positions (..., outputs, inputs / m, n), n at most "
            f"m={m}, got {values.shape} and {positions.shape}"
        )
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"{who} needs positions that are integers, got {positions.dtype}")
    return values, positions
