"""Matrix products with sparse weights: one folder per operation, with one file per backend."""

from jaxsparse.kernels.masked_matmul import block_sparse_matmul, masked_matmul
from jaxsparse.kernels.n_of_m_matmul import compress_n_of_m, decompress_n_of_m, n_of_m_matmul, tcgen05_metadata

__all__ = [
    "block_sparse_matmul", "compress_n_of_m", "decompress_n_of_m", "masked_matmul", "n_of_m_matmul", "tcgen05_metadata",
]  # fmt: skip
