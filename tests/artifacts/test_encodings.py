import itertools
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsparse.artifacts import encodings


def bits(text):
    return np.packbits([int(bit) for bit in text.replace(" ", "")])


def test_gaps_by_hand():
    mask = np.zeros(64, bool)
    mask[[2, 3, 9]] = True  # gaps 2, 0, 5; one low bit each: 0, 0, 1, and 1, 0, 2 in unary: 01 1 001
    encoding, low_bits, packed = encodings.encode_positions(mask)
    assert (encoding, low_bits) == ("gaps", 0)  # 10 bits up to the last survivor
    np.testing.assert_array_equal(packed, bits("001 1 000001"))
    packed = np.concatenate([bits("0 0 1"), bits("01 1 001")])
    np.testing.assert_array_equal(encodings.decode_positions(packed, "gaps", 64, 3, 1), mask)


def test_every_mask_of_ten_weights():
    for entries in itertools.product([False, True], repeat=10):
        mask = np.array(entries)
        encoding, low_bits, packed = encodings.encode_positions(mask)
        decoded = encodings.decode_positions(packed, encoding, 10, int(mask.sum()), low_bits)
        np.testing.assert_array_equal(decoded, mask)


@settings(max_examples=60)
@given(st.integers(1, 3000), st.floats(0, 1), st.integers(0, 1000))
def test_the_number_of_low_bits_is_the_best(size, density, seed):
    mask = np.random.default_rng(seed).random(size) < density
    encoding, low_bits, packed = encodings.encode_positions(mask)
    gaps = np.diff(np.flatnonzero(mask), prepend=-1) - 1
    best = min(-(-gaps.size * r // 8) - (-int((gaps >> r).sum() + gaps.size) // 8) for r in range(20))
    assert packed.size == min(best, -(-size // 8))
    np.testing.assert_array_equal(encodings.decode_positions(packed, encoding, size, gaps.size, low_bits), mask)


def test_values_of_all_kinds():
    def names(*args, **options):
        return encodings.encode_values(*args, **options)[0]

    pair = np.float32([-1, 2] * 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(pair, None) == "two"
        assert names(pair[::2], None) == "constant"
        assert names(np.append(pair, np.float32(0)), None) == "each"
        assert names(np.append(pair, np.float32("nan")).astype(jnp.bfloat16), None) == "each"
        assert names(np.float32([-0.0, 0.0] * 50), None) == "each"
        assert names(np.float32([1, 1 + 1e-4] * 50), None) == "each"
        assert names(np.float32([1, 1 + 1e-4] * 50), "bfloat16") == "constant"  # once they are rounded
        assert names(pair[:2], None) == "each"  # two numbers and the signs take more
        assert names(np.arange(100), "int8") == "each"
        assert names(np.arange(9.0), "int8") == "scaled"
        assert names(np.arange(9.0), "int8", sparse=False) == "each"


def test_a_dtype_that_is_not_smaller_is_not_taken():
    values = np.array([1e30, 2e30, -3e30], jnp.bfloat16)
    for dtype in ("float32", "float16", "bfloat16"):
        assert encodings.encode_values(values, dtype)[1]["values"].dtype == jnp.bfloat16


def test_too_large_for_the_dtype():
    for values, dtype in ((np.float32([65520]), "float16"), (np.float64([1e39]), "float32")):
        with pytest.raises(ValueError, match="1 of its values are too large"):
            encodings.encode_values(values, dtype)
    for values in (np.float32([np.inf, 65504]), np.float64([np.nan])):
        encodings.encode_values(values, "float16")
