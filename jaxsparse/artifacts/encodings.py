"""Compact encodings of a sparse leaf's weights.

Positions of the survivors are stored as a bit mask or as a Golomb-Rice code of the gaps between them, in the whole leaf
or, of a leaf of constant fan-in, among the inputs of each output; values as they are or in a smaller dtype, as one or
two numbers, or as int8. :mod:`jaxsparse.artifacts` documents the encodings.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

__all__ = [
    "FLOATS", "SMALLER", "bit_view", "decode_fan_in", "decode_positions", "decode_values", "encode_fan_in",
    "encode_positions", "encode_values", "finite_cast", "in_bytes", "most_low_bits", "require",
]  # fmt: skip

FLOATS = ("float16", "bfloat16", "float32", "float64")
SMALLER = ("float32", "bfloat16", "float16", "int8")  # the dtypes that values can be converted to


def encode_positions(mask: np.ndarray) -> tuple[str, int, np.ndarray]:
    """Encode the True entries of a flat mask, in the smaller of two encodings.

    Args:
      mask: (size,), bool.

    Returns:
      The encoding, "mask" or "gaps"; the number of low bits of the gaps (0 for "mask"); and the bytes.

    Examples:
      >>> mask = np.zeros(1000, bool)
      >>> mask[[100, 103, 590]] = True
      >>> encoding, low_bits, packed = encode_positions(mask)
      >>> encoding, low_bits, packed.size
      ('gaps', 7, 4)
      >>> np.flatnonzero(decode_positions(packed, encoding, size=1000, kept=3, low_bits=7)).tolist()
      [100, 103, 590]
    """
    gaps = np.diff(np.flatnonzero(mask), prepend=-1) - 1
    low_bits, packed = _encode_gaps(gaps, mask.size)
    if packed.size >= in_bytes(mask.size):
        return "mask", 0, np.packbits(mask)
    return "gaps", low_bits, packed


def decode_positions(packed: np.ndarray, encoding: str, size: int, kept: int, low_bits: int) -> np.ndarray:
    """Decode the result of :func:`encode_positions`.

    Args:
      packed: the bytes, uint8.
      encoding: "mask" or "gaps".
      size: the size of the mask.
      kept: the number of entries that are True, at most ``size``.
      low_bits: the number of low bits of the gaps, at most ``most_low_bits(size, kept)``, so that no sum overflows.

    Returns:
      The mask, (size,), bool.

    Raises:
      ValueError: if the bytes are not the encoding of such a mask.
    """
    if encoding == "mask":
        mask = _unpacked(packed, size).view(bool)
        require(np.count_nonzero(mask) == kept, f"its mask does not keep {kept} weights")
        return mask
    gaps = _decode_gaps(packed, size, kept, low_bits)
    positions = np.cumsum(gaps + 1) - 1
    require(not kept or positions[-1] < size, f"its gaps run past its {size} weights")
    mask = np.zeros(size, bool)
    mask[positions] = True
    return mask


def encode_fan_in(mask: np.ndarray) -> tuple[tuple[int, int], int, np.ndarray] | None:
    """Encode a mask of constant fan-in: every output keeps equally many of its inputs, or none.

    Inputs are axes that follow one another, such as all but the last of a kernel, and outputs the others. Which ones
    they are is found here.

    Args:
      mask: bool, of the leaf's shape.

    Returns:
      The first axis of the inputs and the one after their last; the number of low bits of the gaps; and the bytes. None
      for a mask without a constant fan-in, and one that keeps nothing.

    Examples:
      >>> mask = np.zeros((100, 64), bool)
      >>> mask[np.arange(5, 64), np.arange(5, 64)] = mask[80, 5:] = True  # two of 100 inputs, of 59 outputs
      >>> inputs, low_bits, packed = encode_fan_in(mask)
      >>> inputs, low_bits, packed.size
      ((0, 1), 5, 108)
      >>> decode_fan_in(packed, mask.shape, kept=118, inputs=inputs, low_bits=low_bits)[:3].tolist()
      [325, 5125, 390]
    """
    found = []
    for start in range(mask.ndim):
        for stop in range(start + 1, mask.ndim + 1):
            if math.prod(mask.shape[start:stop]) in (1, mask.size):  # one input, or one output: not a layer
                continue
            kept = np.count_nonzero(mask, axis=tuple(range(start, stop)))
            live = np.ravel(kept != 0)
            most = np.max(kept, initial=0)
            if not most or (np.ravel(kept)[live] != most).any():
                continue
            outputs = np.moveaxis(mask, range(start, stop), range(start - stop, 0)).reshape(live.size, -1)
            index = np.nonzero(outputs[live])[1].reshape(-1, most)
            gaps = np.diff(index, axis=1, prepend=-1) - 1
            low_bits, packed = _encode_gaps(gaps.ravel(), mask.size)
            found.append(((start, stop), low_bits, np.concatenate([np.packbits(live), packed])))
    return min(found, key=lambda code: code[2].size) if found else None


def decode_fan_in(
    packed: np.ndarray, shape: Sequence[int], kept: int, inputs: Sequence[int], low_bits: int
) -> np.ndarray:
    """Decode the result of :func:`encode_fan_in`.

    Args:
      packed: the bytes, uint8.
      shape: of the leaf.
      kept: the number of weights that it keeps, from 1 to its size.
      inputs: the first axis of the inputs and the one after their last.
      low_bits: as for :func:`decode_positions`.

    Returns:
      The indices of the weights in the flat leaf, (kept,), int64: output by output.

    Raises:
      ValueError: if the bytes are not the encoding of such a mask.
    """
    fan_in, after = math.prod(shape[slice(*inputs)]), math.prod(shape[inputs[1] :])
    size = math.prod(shape)
    first = in_bytes(size // fan_in)
    live = np.flatnonzero(_unpacked(packed[:first], size // fan_in))[:, None]
    require(packed.size >= first and live.size, "it has no bit for each output, or no output")
    require(kept % live.size == 0, f"{live.size} outputs cannot have equally many of {kept} weights")
    gaps = _decode_gaps(packed[first:], size, kept, low_bits)
    index = np.cumsum((gaps + 1).reshape(live.size, -1), axis=1) - 1  # so it increases, and nothing is there twice
    require(index[:, -1].max() < fan_in, f"its indices run past its {fan_in} inputs")
    return ((live // after * fan_in + index) * after + live % after).ravel()


def most_low_bits(size: int, kept: int) -> int:
    """The largest useful number of low bits for ``kept`` gaps in a mask: 2**r * kept is at most twice its size."""
    return (2 * size // kept).bit_length() - 1 if kept else 0


def encode_values(values: np.ndarray, dtype: str | None, sparse: bool = True) -> tuple[str, dict[str, np.ndarray]]:
    """Encode the values of a leaf's survivors, after rounding, in the smallest encoding that keeps all of them.

    Args:
      values: (kept,).
      dtype: the dtype to round larger floats to, one of :data:`SMALLER`; None keeps theirs.
      sparse: whether the leaf has a mask; only then can its values become int8.

    Returns:
      The encoding, "each", "constant", "two" or "scaled", and the arrays: "values", for "two" also "signs", for
      "scaled" also "scale".

    Raises:
      ValueError: if values are too large for ``dtype``, or not finite although they should become int8.

    Examples:
      >>> encode_values(np.float32([0.5] * 100), None)
      ('constant', {'values': array([0.5], dtype=float32)})
      >>> encoding, arrays = encode_values(np.float32([0.5, -1.0, 0.25]), "int8")
      >>> encoding, arrays["values"].tolist()
      ('scaled', [64, -127, 32])
    """
    stored = values
    is_float = values.dtype.name in FLOATS
    if is_float and dtype not in (None, "int8") and np.dtype(dtype).itemsize < values.dtype.itemsize:
        stored = finite_cast(values, lambda: values.astype(dtype))
    bits = bit_view(stored)
    if stored.size > 1 and (bits == bits[0]).all():
        return "constant", {"values": stored[:1]}
    if is_float and 2 * stored.itemsize + in_bytes(stored.size) < stored.nbytes:
        with np.errstate(invalid="ignore"):  # NaN
            signs, others = stored > 0, stored < 0
        if (signs | others).all() and signs.any() and others.any():
            pair = stored[[signs.argmin(), signs.argmax()]]
            if (bits == bit_view(pair)[signs.astype(np.uint8)]).all():
                return "two", {"values": pair, "signs": np.packbits(signs)}
    if not (is_float and sparse and dtype == "int8" and stored.size > 1):
        return "each", {"values": stored}
    peak = np.abs(values).max().astype(np.float64)
    if not np.isfinite(peak):
        raise ValueError("int8 needs finite weights, got NaN or infinity; use another dtype")
    # Not below the smallest normal number, so that the quotients stay within 127.
    scale = finite_cast(peak, lambda: np.array([max(peak / 127, np.finfo(np.float32).tiny)], np.float32))
    levels = np.rint(values / scale.astype(np.float64)).astype(np.int8)
    arrays = {"values": levels, "scale": scale}
    finite_cast(values, lambda: decode_values(arrays, "scaled", values.size, values.dtype.name))
    return "scaled", arrays


def decode_values(arrays: Mapping[str, np.ndarray], encoding: str, kept: int, dtype: str) -> np.ndarray:
    """Decode the result of :func:`encode_values`; rounding is not undone.

    Args:
      arrays: the arrays that :func:`encode_values` returned.
      encoding: the encoding that it returned.
      kept: the number of values.
      dtype: the original dtype.

    Returns:
      The values, (kept,), or (1,) if all of them are the same.

    Raises:
      ValueError: if the arrays are not those of the encoding.
    """
    values = arrays["values"]
    if values.dtype == bool:
        require(values.view(np.uint8).max(initial=0) <= 1, "a bool is neither 0 nor 1")
    if encoding == "two":
        require(values[0] < 0 < values[1], "its two values are not a negative and a positive one")
        values = values[_unpacked(arrays["signs"], kept)]
    elif encoding == "scaled":
        scale = arrays["scale"]
        require(np.isfinite(scale[0]) and scale[0] > 0, f"its scale is {scale[0]}")
        values = values * scale
    with np.errstate(all="ignore"):
        return values.astype(dtype)


def bit_view(array: np.ndarray) -> np.ndarray:
    """The bits of every entry as an unsigned number."""
    return array.view(f"u{array.itemsize}")


def in_bytes(bits: int) -> int:
    """The number of bytes that hold a number of bits."""
    return -(-bits // 8)


def require(condition: object, otherwise: str) -> None:
    """Raise ``ValueError(otherwise)`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(otherwise)


def _encode_gaps(gaps: np.ndarray, size: int) -> tuple[int, np.ndarray]:
    """The Golomb-Rice code of the gaps before each of some weights among ``size``: low bits, and the bytes."""
    kept = gaps.size
    sizes = []
    for r in range(most_low_bits(size, kept) + 1):
        sizes.append(in_bytes(kept * r) + in_bytes(kept + int((gaps >> r).sum())))
    r = int(np.argmin(sizes))
    low = np.empty((kept, r), np.uint8)
    for i in range(r):
        low[:, i] = (gaps >> (r - 1 - i)) & 1
    ones = np.cumsum((gaps >> r) + 1) - 1
    unary = np.zeros(ones[-1] + 1 if kept else 0, np.uint8)
    unary[ones] = 1
    return r, np.concatenate([np.packbits(low), np.packbits(unary)])


def _decode_gaps(packed: np.ndarray, size: int, kept: int, low_bits: int) -> np.ndarray:
    low_bytes = in_bytes(kept * low_bits)
    bits = _unpacked(packed[:low_bytes], kept * low_bits).reshape(kept, low_bits)
    ones = np.flatnonzero(np.unpackbits(packed[low_bytes:]))
    length = int(ones[-1]) + 1 if ones.size else 0
    fits = ones.size == kept and packed.size == low_bytes + in_bytes(length) and length - kept <= size >> low_bits
    require(fits, f"its gaps are not those of {kept} weights among {size}")
    gaps = np.diff(ones, prepend=-1) - 1
    for i in range(low_bits):
        gaps = 2 * gaps + bits[:, i]
    return gaps


def _unpacked(packed: np.ndarray, count: int) -> np.ndarray:
    bits = np.unpackbits(packed)
    require(not bits[count:].any(), "the bits that pad its last byte are not 0")
    return bits[:count]


def finite_cast(values: np.ndarray, cast: Callable[[], np.ndarray]) -> np.ndarray:
    """The result of ``cast()``; a ValueError if it is infinite where ``values`` are finite."""
    with np.errstate(all="ignore"):
        stored = cast()
        lost = np.count_nonzero(np.isfinite(values) & ~np.isfinite(stored))
    if lost:
        raise ValueError(f"{lost} of its values are too large for the dtype they are to be stored in")
    return stored
