"""State in half the bytes: bfloat16 that is rounded up or down at random, so that running sums are right in the mean.

Rounding to the nearest would lose every change below 1/512 of a number. The random bits are a hash of the step, the
leaf and the place in the leaf: the same on every device and after a resume, and cheap beside reading the leaf.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.positions import mixed, row_major

__all__ = ["check_state_dtype", "rounded"]


def check_state_dtype(dtype: Any, caller: str) -> None:
    """Raises a ValueError for what is neither None, float32 nor bfloat16."""
    if dtype is not None and jnp.dtype(dtype) not in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
        raise ValueError(f"{caller}: state_dtype is None, float32 or bfloat16, got {jnp.dtype(dtype).name}")


def rounded(arrays: Sequence[jax.Array], dtype: Any, step: jax.Array, leaf: int) -> list[jax.Array]:
    """One or two arrays in another dtype: as they are rounded to the nearest, or for bfloat16 at random.

    Args:
      arrays: floats of one shape.
      dtype: of the results. A float that lies between two neighbours of bfloat16 becomes either, the nearer one more
        often: in the mean what it was.
      step: int32, by which the random choice is drawn.
      leaf: the number of the leaf, likewise.

    Examples:
      >>> import jax.numpy as jnp
      >>> [x] = rounded([jnp.full(10_000, 1 + 1 / 1024)], jnp.bfloat16, jnp.int32(0), 0)
      >>> sorted(set(x.tolist())), f"{x.astype(jnp.float32).mean():.4f}"
      ([1.0, 1.0078125], '1.0010')
    """
    if jnp.dtype(dtype) != jnp.dtype("bfloat16"):
        return [x.astype(dtype) for x in arrays]
    bits = _random_bits(arrays[0].shape, step, leaf)
    halves = (bits & 0xFFFF, bits >> 16)
    return [_round_up_by(x.astype(jnp.float32), half) for x, half in zip(arrays, halves, strict=False)]


def _round_up_by(x: jax.Array, half: jax.Array) -> jax.Array:
    """bfloat16 is the upper half of float32: adding to the lower half carries as often as that is large."""
    pattern = jax.lax.bitcast_convert_type(x, jnp.uint32) + jnp.where(jnp.isfinite(x), half, 0)
    return jax.lax.bitcast_convert_type((pattern >> 16).astype(jnp.uint16), jnp.bfloat16)


def _random_bits(shape: tuple[int, ...], step: jax.Array, leaf: int) -> jax.Array:
    """uint32, by a hash of the step, the leaf and the place."""
    seed = mixed(step.astype(jnp.uint32) * jnp.uint32(0x9E3779B9) + jnp.uint32(leaf * 0x632BE5AB % (1 << 32)))
    return mixed(row_major(shape, dtype=jnp.uint32) + seed)
