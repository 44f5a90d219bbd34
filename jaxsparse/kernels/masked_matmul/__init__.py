"""Masked matrix products, ``x @ (w * mask)``, and their gradients, by kernels that apply masks and skip dead blocks.

:mod:`reference` is the definition, :mod:`api` has the public functions, :mod:`block_info` makes lists of live blocks
from a mask, :mod:`ops` has the gradients, and ``xla_*`` and ``pallas_*`` are the backends: each a module with
``forward``, ``backward_x`` and ``backward_w`` with the same arguments.

The kernels are checked in Pallas' interpreters and compiled ahead of time. They have not run on a TPU or a GPU yet: no
speed is claimed for them, and on GPUs they have to be requested by name. ``python -m benchmarks.gpu`` checks and times
them on one.
"""

from jaxsparse.kernels.masked_matmul.api import block_sparse_matmul, masked_matmul

__all__ = ["block_sparse_matmul", "masked_matmul"]
