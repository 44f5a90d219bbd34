"""Crops of encoded images, resized to pictures of one size, as fast as NumPy and libjpeg-turbo allow."""

import functools
import io
import math
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image


def random_box(height: int, width: int, draws: Sequence[float]) -> tuple[int, int, int, int]:
    """A crop of 8 to 100% of the area at an aspect from 3/4 to 4/3: left, top, right, bottom.

    Args:
      height, width: of the image.
      draws: 40 numbers in [0, 1), four for each of ten attempts to find one that fits.
    """
    for area, aspect, left, top in zip(*[iter(draws)] * 4, strict=True):
        area, aspect = (0.08 + 0.92 * area) * height * width, (4 / 3) ** (2 * aspect - 1)
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            left, top = int(left * (width - across + 1)), int(top * (height - down + 1))
            return left, top, left + across, top + down
    # An image so long that nothing fitted: as much of its centre as the aspect allows.
    across, down = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def centre_box(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """The box of a centre crop of ``size`` pixels, for an image whose shorter side becomes ``size`` * 256/224."""
    side = round(min(height, width) * size / round(size * 256 / 224))
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def square_box(height: int, width: int) -> tuple[int, int, int, int]:
    """The largest square in the centre: left, top, right, bottom."""
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def crop(
    file: bytes, box_of: Callable[[int, int], tuple[int, int, int, int]], out: np.ndarray, mirrored: bool = False
) -> None:
    """A part of an image, resized as Pillow does with ``Resampling.BILINEAR``; up to twice as fast.

    Rows below the part are not decoded, and an image whose part is more than twice as large as the picture is decoded
    at half its size, or less, which is what :meth:`PIL.Image.Image.draft` does. Else no pixel differs from Pillow's by
    more than 1.

    Args:
      file: the encoded image, of any kind that Pillow reads.
      box_of: from height and width of the image to left, top, right and bottom of the part, in pixels.
      out: (size, size, 3), uint8, contiguous: the picture is put here.
      mirrored: whether left and right are exchanged.

    Raises:
      ValueError: for more than 8 bits a channel.
      Exception: of Pillow, if the file cannot be read, or ends too early.
    """
    header = _jpeg_header(file)
    if header is not None:
        try:
            return _from_jpeg(file, header, box_of(header.height, header.width), out, mirrored)
        except ValueError:  # something is wrong with it; Pillow decides whether it can be read
            pass
    image = Image.open(io.BytesIO(file))
    if image.mode[0] in "IF":  # Pillow would clip them
        raise ValueError(f"it has more than 8 bits a channel, mode {image.mode}")
    part = np.asarray(image.convert("RGB").crop(box_of(image.height, image.width)))
    _resize(part, (0, part.shape[1]), (0, part.shape[0]), out, mirrored)


class _JpegHeader(NamedTuple):
    """Height and width; where in the file the height stands; rows that are coded together, 0 if all of them are."""

    height: int
    width: int
    position: int
    rows: int


def _jpeg_header(file: bytes) -> _JpegHeader | None:
    """None for what is left to Pillow: other formats, CMYK, and what is broken."""
    if file[:2] != b"\xff\xd8":
        return None
    position, frame, restarts = 2, None, False
    while position + 12 <= len(file):
        marker, length = struct.unpack_from(">HH", file, position)
        if marker in (0xFFC0, 0xFFC1, 0xFFC2):
            bits, height, width, components = struct.unpack_from(">BHHB", file, position + 4)
            if bits != 8 or components not in (1, 3) or not height or not width:
                return None
            rows = 8 * max(sampling & 15 for sampling in file[position + 11 : position + 10 + 3 * components : 3])
            frame = _JpegHeader(height, width, position + 5, 0 if marker == 0xFFC2 else rows)
        elif marker == 0xFFDD:
            restarts = file[position + 4 : position + 6] != b"\0\0"
        elif marker == 0xFFDA:
            if frame is None or (file[position + 4] == components and not restarts):
                return frame
            return frame._replace(rows=0)  # a scan for each component; or it would have to end as the rows do
        elif not 0xFFC4 <= marker <= 0xFFFE:
            return None
        position += 2 + length
    return None


def _from_jpeg(
    file: bytes, header: _JpegHeader, box: tuple[int, int, int, int], out: np.ndarray, mirrored: bool
) -> None:
    left, top, right, bottom = box
    height, size = header.height, len(out)
    # What is below the box is left out by a smaller height in the header, but for the next row: where colours have half
    # the resolution it goes into the last. A file that does not end as it should is decoded to its end, to know.
    if header.rows and file[-2:] == b"\xff\xd9":
        height = min(height, (bottom // header.rows + 1) * header.rows)
    cut = height < header.height
    if cut:
        file = b"".join((file[: header.position], struct.pack(">H", height), file[header.position + 2 :]))
    by = next(by for by in (8, 4, 2, 1) if by == 1 or min(right - left, bottom - top) >= by * size)
    height, width = -(-height // by), -(-header.width // by)
    buffer = _scratch("decoded", height * width * 3, np.uint8)
    try:
        simplejpeg.decode_jpeg(file, min_height=height, min_width=width, min_factor=by, buffer=buffer)
    except ValueError as error:
        # All that was asked for is there when it comes upon the rows it was to leave out.
        if not (cut and "extraneous bytes before marker 0xd9" in str(error)):
            raise
    x, y = left // by, top // by
    part = buffer.reshape(height, width, 3)[y : -(-bottom // by), x : -(-right // by)]
    _resize(part, (left / by - x, right / by - x), (top / by - y, bottom / by - y), out, mirrored)


def _resize(
    pixels: np.ndarray, across: tuple[float, float], down: tuple[float, float], out: np.ndarray, mirrored: bool
) -> None:
    """Puts the box between these coordinates of the pixels (height, width, 3) into ``out``.

    Each row and column of the result is a sum of few neighbours, which is a product with a matrix that has few entries
    besides 0: done in bands of rows and columns it costs half of what Pillow takes.
    """
    size, (height, width, _) = len(out), pixels.shape
    # Small bands stay in the fast memory, and are too small for NumPy's library to start threads of its own.
    bands = _bands(height, *down, size, step=8, channels=1, mirrored=False)
    as_pixels = _scratch("floats", len(bands[0][2]) * width * 3).reshape(-1, width, 3)
    floats = as_pixels.reshape(-1, width * 3)
    rows = _scratch("rows", size * width * 3).reshape(size, width * 3)
    for taken, band, weights in bands:
        as_pixels[:] = pixels[taken]
        np.matmul(weights.T, floats, rows[band])
    result = _scratch("result", size * size * 3).reshape(size, size * 3)
    for taken, band, weights in _bands(width, *across, size, step=5, channels=3, mirrored=mirrored):
        np.matmul(rows[:, taken], weights, result[:, band])
    result += 0.5
    np.copyto(out.reshape(size, size * 3), result, casting="unsafe")


@functools.lru_cache(maxsize=2048)  # of lengths up to twice the size there are not more; the largest take 0.1 MB
def _bands(
    length: int, low: float, high: float, size: int, step: int, channels: int, mirrored: bool
) -> list[tuple[slice, slice, np.ndarray]]:
    """The weights that ``length`` numbers have in ``size`` means of neighbours, for a few of the means at a time.

    Each band is the numbers it takes, always equally many, its means, and the matrix (numbers, means).
    The weights are multiples of 1/256, so that all sums are exact in float32: the pictures are the same on every
    processor.
    """
    scale = (high - low) / size
    reach = max(scale, 1.0)  # of the triangle: neighbours are a source pixel apart, or a pixel of the result if larger
    # The last band repeats a centre where it would not be full, and any takes more numbers than it needs, 0 times.
    numbers = np.minimum(np.arange(-(-size // step) * step), size - 1)
    centres = low + ((size - 1 - numbers if mirrored else numbers) + 0.5) * scale
    centres = centres.reshape(-1, 1, step)
    starts = np.maximum((centres.min((1, 2)) - reach).astype(int), 0)
    stops = np.minimum((centres.max((1, 2)) + reach).astype(int) + 1, length)
    taken = (stops - starts).max()
    starts = np.minimum(starts, length - taken)
    places = starts[:, None] + np.arange(taken) + 0.5
    weights = np.maximum(1 - np.abs(places[..., None] - centres) / reach, 0)
    weights = np.rint(256 * weights / weights.sum(1, keepdims=True))
    largest = weights.argmax(1)[:, None]
    rest = 256 - weights.sum(1, keepdims=True)
    np.put_along_axis(weights, largest, np.take_along_axis(weights, largest, 1) + rest, 1)
    matrices = np.zeros((len(starts), taken, channels, step, channels), np.float32)
    for channel in range(channels):
        matrices[:, :, channel, :, channel] = weights / 256
    matrices = matrices.reshape(len(starts), taken * channels, step * channels)
    bands = []
    for i, (start, matrix) in enumerate(zip((starts * channels).tolist(), matrices, strict=True)):
        band = slice(i * step * channels, min((i + 1) * step, size) * channels)
        bands.append((slice(start, start + len(matrix)), band, matrix[:, : band.stop - band.start]))
    return bands


_memory = threading.local()


def _scratch(name: str, size: int, dtype: Any = np.float32) -> np.ndarray:
    """An array of this thread, used again for each image: new memory costs more than what is done with it."""
    array = getattr(_memory, name, None)
    if array is None or array.size < size:
        array = np.empty(size, dtype)
        setattr(_memory, name, array)
    return array[:size]
