"""The public function: the product of features with compressed weights."""

import functools
import importlib
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxsparse.kernels.masked_matmul.platforms import only_on
from jaxsparse.kernels.n_of_m_matmul import reference
from jaxsparse.kernels.n_of_m_matmul.compressed import checked, tcgen05_metadata

__all__ = ["n_of_m_matmul"]

IMPLEMENTATIONS = ("xla", "mosaic_gpu")
DTYPES = ("float32", "bfloat16", "float16")
_ELSEWHERE = "it is a kernel for NVIDIA GPUs (Blackwell); elsewhere choose None or 'xla'"


def n_of_m_matmul(
    x: ArrayLike,
    values: ArrayLike,
    positions: ArrayLike,
    *,
    m: int = 4,
    precision: jax.lax.PrecisionLike = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiply by weights of which n of every m are kept, ``x @ decompress_n_of_m(values, positions)``.

    Gradients are those of this product, for x and the values. Accumulates in float32.

    Args:
      x: (..., inputs), float32, bfloat16 or float16.
      values: (outputs, inputs * n / m), one of the same dtypes; if they differ, both are promoted.
      positions: (outputs, inputs / m, n), of :func:`compress_n_of_m`.
      m: how many weights are in a group.
      precision: as for :func:`jax.numpy.matmul`.
      out_dtype: dtype of the result, one of the same; None: the one to which x and the values promote.
      implementation: "xla" (decompresses, and multiplies), "mosaic_gpu" (the sparse tensor cores of Blackwell GPUs, for
        2:4 in 16-bit floats and multiples of 128 inputs and outputs; never run yet); None: "xla".

    Returns:
      (..., outputs).

    Raises:
      ValueError: for shapes that do not contract, other dtypes, and an unknown implementation or one that does not
        support the product; at compile time, for an implementation that cannot run on the device.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxsparse.kernels import compress_n_of_m
      >>> values, positions = compress_n_of_m(jnp.array([[1.0], [0.0], [0.0], [5.0]]))
      >>> n_of_m_matmul(jnp.array([1.0, 10.0, 100.0, 1000.0]), values, positions).tolist()
      [5001.0]

    .. warning::
      "mosaic_gpu" has no rule for ``jax.vmap``.
    """
    x = jnp.asarray(x)
    values, positions = checked(values, positions, m, "n_of_m_matmul")
    outputs, groups, n = positions.shape if values.ndim == 2 else (0, 0, 0)
    if values.ndim != 2 or x.ndim < 1 or x.shape[-1] != groups * m:
        raise ValueError(
            f"n_of_m_matmul needs x (..., inputs), values (outputs, inputs * n / m) and positions "
            f"(outputs, inputs / m, n) with m={m}, got {x.shape}, {values.shape} and {positions.shape}"
        )
    dtype = jnp.result_type(x, values)
    out = dtype if out_dtype is None else jnp.dtype(out_dtype)
    if dtype.name not in DTYPES or out.name not in DTYPES:
        raise ValueError(f"n_of_m_matmul takes {', '.join(DTYPES)}, got {x.dtype} and {values.dtype}, for {out}")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation must be one of {list(IMPLEMENTATIONS)} or None, got {implementation!r}")
    x, values = x.astype(dtype), values.astype(dtype)
    if implementation != "mosaic_gpu" or not x.size:
        return reference.n_of_m_matmul(x, values, positions, m, out, precision)
    if reason := _kernel().why_not(outputs, groups * m, n, m, dtype):
        raise ValueError(reason)
    y = _jitted(out.name, x.reshape(-1, x.shape[-1]), values, positions)
    return y.reshape(*x.shape[:-1], outputs)


def _kernel() -> ModuleType:
    """The module of the kernel, imported when it is first used: Pallas is slow to import."""
    return importlib.import_module(f"{__package__}.pallas_gpu")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blackwell(dtype: str, x: jax.Array, values: jax.Array, positions: jax.Array) -> jax.Array:
    rows = x.shape[0]
    padded = jnp.pad(x, ((0, -rows % _kernel().TILE), (0, 0)))
    padded = only_on("cuda", "mosaic_gpu", padded, why=_ELSEWHERE)
    return _kernel().forward(padded, values, tcgen05_metadata(positions, x.dtype), dtype)[:, :rows].T


def _forward(dtype, x, values, positions):
    return _blackwell(dtype, x, values, positions), (x, values, positions)


def _backward(dtype, residuals, dy):
    x, values, positions = residuals
    _, pull = jax.vjp(lambda x, values: reference.n_of_m_matmul(x, values, positions, 4, dtype), x, values)
    return *pull(dy), None


_blackwell.defvjp(_forward, _backward)
_jitted = jax.jit(_blackwell, static_argnums=0)  # the check of the platform is made in compiling, eager calls included
