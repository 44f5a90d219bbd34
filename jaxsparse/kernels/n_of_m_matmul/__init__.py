"""Products with weights of which n of every m are kept, and the compressed form that sparse tensor cores take.

:mod:`compressed` makes the two arrays of a matrix, :mod:`reference` is the definition of the product, :mod:`api` has
the public function, and :mod:`pallas_gpu` the kernel for Blackwell GPUs.

The kernel has never run: Pallas has no interpreter for its instruction, so it was only lowered for such a GPU, in the
tests. No speed is claimed for it, and it has to be requested by name.
"""

from jaxsparse.kernels.n_of_m_matmul.api import n_of_m_matmul
from jaxsparse.kernels.n_of_m_matmul.compressed import compress_n_of_m, decompress_n_of_m, tcgen05_metadata

__all__ = ["compress_n_of_m", "decompress_n_of_m", "n_of_m_matmul", "tcgen05_metadata"]
