"""Shapes of products by name, for tests and benchmarks."""

from typing import NamedTuple

__all__ = ["BENCHMARKS", "TESTS", "Product"]


class Product(NamedTuple):
    """``x`` (rows, inputs) times ``w`` (inputs, outputs), with blocks of (rows, columns), or without."""

    rows: int
    inputs: int
    outputs: int
    block: tuple[int, int] | None


# Small and awkward: edges that do not fill a block, a single row, a single column, blocks larger than w, and blocks
# that the TPU kernel combines or divides.
TESTS = {
    "square": Product(128, 256, 256, (128, 128)),
    "small blocks": Product(40, 128, 192, (32, 64)),
    "ragged": Product(33, 200, 300, (64, 128)),
    "one row": Product(1, 130, 70, (64, 64)),
    "one output": Product(20, 256, 1, (128, 128)),
    "large blocks": Product(24, 640, 300, (640, 256)),
}

# The transformer is 4096 wide; the rows of ResNet-50 are 256 images of 14 x 14 positions.
BENCHMARKS = {
    "2048 cubed": Product(2048, 2048, 2048, (128, 128)),
    "4096 cubed": Product(4096, 4096, 4096, (128, 128)),
    "transformer MLP, in": Product(8192, 4096, 16384, (128, 128)),
    "transformer MLP, out": Product(8192, 16384, 4096, (128, 128)),
    "ResNet-50, 1x1 in": Product(50176, 1024, 256, (128, 128)),
    "ResNet-50, 1x1 out": Product(50176, 256, 1024, (128, 128)),
}
