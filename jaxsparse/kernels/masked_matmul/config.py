"""What is known when a product is traced: backend, tile sizes, precision."""

import dataclasses
from typing import Any

import jax

__all__ = ["Config"]


@dataclasses.dataclass(frozen=True)
class Config:
    """How a product is computed.

    Attributes:
      implementation: "xla", "xla_blocks", "mosaic_tpu" or "mosaic_gpu".
      tile: (rows, columns) of the weights that are visited as one, and that the lists are about: a block of the mask or
        a part of one; or several, or of a mask without blocks, and then the kernel applies the mask too.
      rows: how many rows of x are multiplied at once. The product's arguments are padded to multiples of these.
      precision: as for ``jax.numpy.matmul``.
      interpret: run a kernel in the interpreter of Pallas: False, True, or the parameters of one.
      dense_weight_grad: whether all weights get gradients, those of dead blocks too; None: an operand says so.
    """

    implementation: str
    tile: tuple[int, int]
    rows: int = 1
    precision: jax.lax.PrecisionLike = None
    interpret: Any = False
    dense_weight_grad: bool | None = False
