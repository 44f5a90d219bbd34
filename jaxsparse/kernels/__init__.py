"""Products with sparse weights: one folder an operation, with a file for each backend."""

from jaxsparse.kernels.masked_matmul import block_sparse_matmul, masked_matmul

__all__ = ["block_sparse_matmul", "masked_matmul"]
