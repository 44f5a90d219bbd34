"""Matrix products with sparse weights: one folder per operation, with one file per backend."""

from jaxsparse.kernels.masked_matmul import block_sparse_matmul, masked_matmul

__all__ = ["block_sparse_matmul", "masked_matmul"]
