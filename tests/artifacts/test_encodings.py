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


def test_fan_in_by_hand():
    # 32 inputs and 9 outputs, of which three keep two each: 2 and 3 (gaps 2, 0), 9 and 30 (9, 20), 0 and 31 (0, 30).
    mask = np.zeros((32, 9), bool)
    mask[[2, 3], 1] = mask[[9, 30], 4] = mask[[0, 31], 8] = True
    inputs, low_bits, packed = encodings.encode_fan_in(mask)
    assert (inputs, low_bits) == ((0, 1), 4)
    live = "0100 1000 1000 0000"  # padded to whole bytes
    low, unary = "0010 0000 1001 0100 0000 1110", "1 1 1 01 1 01"  # gap & 15 and gap >> 4, which is 0 0 0 1 0 1
    np.testing.assert_array_equal(packed, bits(live + low + unary))
    where = encodings.decode_fan_in(packed, (32, 9), 6, inputs, low_bits)
    assert where.tolist() == [2 * 9 + 1, 3 * 9 + 1, 9 * 9 + 4, 30 * 9 + 4, 8, 31 * 9 + 8]
    for change, words in (
        (packed[:1], "it has no bit for each output, or no output"),
        (np.append(np.zeros(2, np.uint8), packed[2:]), "it has no bit for each output, or no output"),
        (np.append(bits("0100 1000 1100 0000"), packed[2:]), "the bits that pad its last byte are not 0"),
        (np.append(bits("1100 1000 1000 0000"), packed[2:]), "4 outputs cannot have equally many of 6 weights"),
        (np.append(bits("0100 1000 0000 0000"), packed[2:]), "its indices run past its 32 inputs"),
        (packed[:-1], "its gaps are not those of 6 weights among 288"),
    ):
        with pytest.raises(ValueError, match=words):
            encodings.decode_fan_in(change, (32, 9), 6, inputs, low_bits)


def test_fan_in_is_found_whichever_axes_are_the_inputs():
    rng = np.random.default_rng(0)
    for shape, inputs in (((20, 6), (0, 1)), ((6, 20), (1, 2)), ((3, 3, 4, 6), (0, 3)), ((3, 20, 6), (1, 2))):
        outputs = shape[: inputs[0]] + shape[inputs[1] :]
        live = (rng.random(outputs) < 0.7).reshape(-1)
        kept = rng.permuted(np.arange(np.prod(shape[slice(*inputs)])) < 3 * live[:, None], axis=1)
        mask = np.moveaxis(
            kept.reshape(*outputs, *shape[slice(*inputs)]), range(inputs[0] - inputs[1], 0), range(*inputs)
        )
        found, low_bits, packed = encodings.encode_fan_in(mask)
        assert found == inputs
        where = encodings.decode_fan_in(packed, shape, 3 * live.sum(), inputs, low_bits)
        np.testing.assert_array_equal(np.sort(where), np.flatnonzero(mask))
        mask[tuple(np.argwhere(mask)[0])] = False
        again = encodings.encode_fan_in(mask)
        assert again is None or again[0] != inputs
    assert encodings.encode_fan_in(np.zeros((4, 5), bool)) is None


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
