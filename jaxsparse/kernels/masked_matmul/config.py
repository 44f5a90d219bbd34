"""Static settings of a product: backend, tile sizes, precision."""

import dataclasses
from typing import Any

import jax

__all__ = ["Config"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Static settings of a product.

    Attributes:
      implementation: "xla", "xla_blocks", "mosaic_tpu" or "mosaic_gpu".
      tile: (rows, columns) of the weights that are visited as one, the unit of the block lists. It is a block of the
        mask or part of one; or it covers several blocks, or the mask has no blocks, and then the kernel also applies
        the mask.
      rows: the number of rows of x that are multiplied at once. Arguments are padded to multiples of these sizes.
      precision: as for ``jax.numpy.matmul``.
      interpret: whether to run a kernel in Pallas' interpreter: False, True, or parameters of the interpreter.
      dense_weight_grad: whether all weights get gradients, including those in dead blocks; None: an operand decides.
      out_dtype: the dtype of ``x @ w``, and so of its gradient; None: that of x and w.
    """

    implementation: str
    tile: tuple[int, int]
    rows: int = 1
    precision: jax.lax.PrecisionLike = None
    interpret: Any = False
    dense_weight_grad: bool | None = False
    out_dtype: str | None = None
