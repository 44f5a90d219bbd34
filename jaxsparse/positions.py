"""Where in its array an entry is, and random bits drawn by that: the same on every device and after a resume."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

__all__ = ["fold_in", "mixed", "random_bits", "row_major"]


def row_major(
    shape: tuple[int, ...],
    axes: tuple[int, ...] | None = None,
    start: int | np.ndarray | jax.Array = 0,
    dtype: DTypeLike = jnp.int32,
) -> jax.Array:
    """The row-major index of every entry, built from iotas: nothing moves between devices.

    Args:
      shape: of the array.
      axes: the axes of the groups within which to count; None: all.
      start: the index of the first entry; an array of them for a stack, which is along the first axis.
      dtype: int32, for fewer than 2**31 entries, or uint32, which wraps around.

    Examples:
      >>> row_major((2, 3)).tolist()
      [[0, 1, 2], [3, 4, 5]]
    """
    axes, integer = tuple(range(len(shape))) if axes is None else axes, np.dtype(dtype).type
    if jnp.ndim(start):
        start, axes = jnp.expand_dims(start, range(1, len(shape))), axes[1:]
    index, stride = jnp.full(shape, start, dtype), 1
    for d in reversed(axes):
        index = index + integer(stride) * jax.lax.broadcasted_iota(dtype, shape, d)
        stride = stride * shape[d] % (1 << 32)
    return index


def fold_in(key: jax.Array, number: jax.Array | int) -> jax.Array:
    """``jax.random.fold_in`` by the hash of :func:`random_bits`, since JAX's takes ten kernels to compile on a CPU.

    Args:
      key: a typed PRNG key.
      number: an integer >= 0.
    """
    first, second = _seeds(key, number)
    words = jax.random.key_data(key).shape[-1]
    data = mixed(first + jnp.arange(words, dtype=jnp.uint32)) ^ second
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def random_bits(key: jax.Array, number: jax.Array | int, like: jax.Array) -> jax.Array:
    """32 random bits for every entry of an array, by one pass over it.

    ``jax.random.bits`` takes forty passes on a CPU, and sixteen kernels to compile. These bits are a hash of the key
    and the place: MurmurHash3's last step, twice, with 64 bits of the key. One to one, so no two of 2**32 entries have
    the same. Good for a random choice, not for cryptography.

    Args:
      key: a typed PRNG key.
      number: of the array, an integer >= 0: arrays with other numbers have other bits.
      like: the bits have its shape and placement.

    Returns:
      uint32.
    """
    first, second = _seeds(key, number)
    index = jnp.zeros_like(like, jnp.uint32) + row_major(like.shape, dtype=jnp.uint32)
    return mixed(mixed(index + first) ^ second)


def _seeds(key: jax.Array, number: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    first, second = jnp.uint32(0), jnp.asarray(number).astype(jnp.uint32)
    for word in jax.random.key_data(key).reshape(-1):
        first, second = mixed(second + word), mixed(first ^ second) + jnp.uint32(0x9E3779B9)
    return first, second


def mixed(x: jax.Array) -> jax.Array:
    """MurmurHash3's last step: uint32 to uint32, one to one, with every bit of the result by all of x."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
