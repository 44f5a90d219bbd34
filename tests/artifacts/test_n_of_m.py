import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsparse
from jaxsparse import Layout, n_of_m
from jaxsparse.artifacts import describe, load_sparse, save_sparse
from jaxsparse.artifacts.n_of_m import decode_n_of_m, encode_n_of_m, exact_n_of_m, order_of_axes
from tests.artifacts.test_artifacts import documented_reader, same_bits


def of_groups(rng, n, m, shape, axes, density=1.0):
    """A mask that keeps n of every m weights of a leaf whose axes have that order, or of these some."""
    seen = [shape[axis] for axis in axes]
    groups = rng.random((np.prod(seen, dtype=int) // m, m)).argsort(1) < n
    groups &= rng.random(groups.shape) < density
    return groups.reshape(seen).transpose(np.argsort(axes))


def test_encoding_by_hand():
    # Two outputs of eight inputs: 0 and 2, 1 and 3; and 2 and 3, 1 alone.
    mask = np.zeros((8, 2), bool)
    mask[[0, 2, 5, 7], 0] = mask[[2, 3, 5], 1] = True
    packed, positions, live = encode_n_of_m(mask, 2, 4, (1, 0))
    assert positions.tolist() == [[0, 2], [1, 3], [2, 3], [0, 1]]
    assert live.tolist() == [[True, True], [True, True], [True, True], [False, True]]
    # Four positions to a byte, the first in the lowest two bits: 3 1 2 0 and 1 0 3 2. Then a bit for each.
    assert [f"{byte:08b}" for byte in packed] == ["11011000", "01001110", "11111101"]
    where, alive = decode_n_of_m(packed, 16, 7, 2, 4)
    assert where.tolist() == [0, 2, 5, 7, 10, 11, 12, 13]
    np.testing.assert_array_equal(alive, live.ravel())
    for change, kept, words in (
        (packed[:-1], 7, "its positions are not those of 7 weights, 2 of every 4 among 16"),
        (np.append(packed, packed[:1]), 7, "its positions are not those of 7 weights"),
        (packed, 8, "its positions are not those of 8 weights"),
        (packed, 6, "its positions do not keep 6 weights"),
        (np.uint8([0b11011010, *packed[1:]]), 7, "do not increase, or run past its 4 weights"),  # 2 and 2
        (np.uint8([0b11010010, *packed[1:]]), 7, "do not increase"),  # 2 and 0
    ):
        with pytest.raises(ValueError, match=words):
            decode_n_of_m(change, 16, kept, 2, 4)
    with pytest.raises(ValueError, match="a group of 4 weights keeps 2 of them, more than 1"):
        encode_n_of_m(mask, 1, 4, (1, 0))


def test_positions_that_do_not_fill_their_bits():
    mask = np.zeros((6, 1), bool)
    mask[[2, 4]] = True
    packed, _, _ = encode_n_of_m(mask, 1, 3, (1, 0))
    assert [f"{byte:08b}" for byte in packed] == ["00000110"]  # 2, then 1
    for byte in (0b0111, 0b10110):  # a position 3 of three weights; a bit after the last
        with pytest.raises(ValueError, match="run past its 3 weights|bits that pad its last byte"):
            decode_n_of_m(np.uint8([byte]), 6, 2, 1, 3)


def test_a_byte_has_what_the_metadata_of_the_hardware_has():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((32, 6)).astype(np.float32)
    mask = of_groups(rng, 2, 4, (32, 6), (1, 0))
    values, positions = jaxsparse.kernels.compress_n_of_m(kernel, mask)
    packed, where, _ = encode_n_of_m(mask, 2, 4, (1, 0))
    np.testing.assert_array_equal(where.reshape(6, 8, 2), positions)
    np.testing.assert_array_equal(np.stack([packed >> 2 * i & 3 for i in range(4)], 1).reshape(6, 8, 2), positions)
    stored = kernel.transpose(1, 0).reshape(-1, 4)
    np.testing.assert_array_equal(np.take_along_axis(stored, where, 1).reshape(6, 16), values)


def test_2_of_4_is_found_along_the_inputs_whichever_axes_they_are(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "model"
    kernels = {
        "fc/kernel": ((16, 6), (1, 0)),
        "conv/kernel": ((3, 3, 8, 5), (3, 0, 1, 2)),
        "mlp/weight": ((6, 16), (0, 1)),  # as Equinox has it, by the bias beside it
        "attention/out/kernel": ((2, 6, 12), (2, 0, 1)),  # (heads, dim, outputs): groups go on from head to head
        "attention/query/kernel": ((12, 2, 6), (1, 2, 0)),
    }
    biases = {"mlp/bias": 6, "attention/out/bias": 12, "attention/query/bias": (2, 6)}
    masks = {name: of_groups(rng, 2, 4, *about) for name, about in kernels.items()}
    params = {name: np.where(mask, rng.standard_normal(mask.shape), 0).astype("f4") for name, mask in masks.items()}
    params |= {name: np.ones(shape, np.float32) for name, shape in biases.items()}
    masks |= {name: np.array(True) for name in biases}
    nested = tuple(flax.traverse_util.unflatten_dict(tree, sep="/") for tree in (params, masks))
    save_sparse(path, *nested)
    assert describe(path).count("2:4, float32") == len(kernels)
    same_bits(load_sparse(path), nested)
    same_bits(documented_reader()(path), params)
    for name in ("fc/kernel", "conv/kernel"):  # the mask as the structure itself makes it
        mask = np.asarray(n_of_m(2, 4).top(jnp.asarray(rng.random(kernels[name][0]))))
        assert exact_n_of_m(mask, Layout(mask.ndim - 2, mask.ndim - 1)) == (2, 4)


@st.composite
def stored(draw):
    """A leaf, its mask, and the structure and layout to store it by."""
    n, m = draw(st.sampled_from([(2, 4), (1, 4), (1, 2), (3, 5), (4, 8), (2, 2), (1, 1)]))
    shape, layout = draw(
        st.sampled_from([
            ((2 * m, 3), None),
            ((3, 2, m, 2), None),
            ((2, m), Layout(1, 0)),
            ((2, 3, m), Layout((0, 2), 1)),
            ((2, 3, m, 2), Layout(2, 3, stack=1)),
            ((0, 3), None),
        ])
    )  # fmt: skip
    axis = draw(st.sampled_from(["inputs", "inputs", layout.inputs[-1] if layout else -2]))
    structure = n_of_m(n, m, axis=axis, layout=layout)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    axes, _ = order_of_axes(structure, len(shape))
    mask = of_groups(rng, n, m, shape, axes, draw(st.sampled_from([0.0, 0.4, 1.0])))
    values = draw(st.sampled_from([rng.standard_normal(shape), rng.choice([-0.0, 0.0, 1.0], shape), np.ones(shape)]))
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float64", "int32"]))
    return np.where(mask, values, 0).astype(dtype), mask, n_of_m(n, m, axis=axis), layout


@settings(max_examples=60, deadline=None)
@given(stored(), st.booleans())
def test_a_structure_that_is_asked_for_comes_back_bit_for_bit(tmp_path_factory, leaf, asked):
    array, mask, structure, layout = leaf
    path = tmp_path_factory.mktemp("models") / "model"
    options = {"structure": {"w": structure}, "layout": layout and {"w": layout}} if asked else {}
    save_sparse(path, {"w": array}, {"w": mask}, **options)
    same_bits(load_sparse(path), ({"w": array}, {"w": mask}))
    same_bits(documented_reader()(path), {"w": array})
    assert (f"{structure.n}:{structure.m}, " in describe(path)) >= (asked and array.size > 0 and structure.m > 1)


def test_what_is_found_by_itself(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "model"
    for n, m, smallest in ((1, 4, True), (2, 4, True), (2, 8, True), (1, 16, True), (3, 4, False), (4, 8, False)):
        mask = of_groups(rng, n, m, (256, 40), (1, 0))
        save_sparse(path, {"kernel": np.float32(rng.random(mask.shape) * mask)}, {"kernel": mask})
        found = describe(path)
        assert (f"{n}:{m}, float32" in found) == smallest, found
    full = of_groups(rng, 2, 4, (64, 40), (1, 0))
    params = {"kernel": np.float32((1 + rng.random(full.shape)) * full)}
    save_sparse(path, params)  # without masks
    assert "2:4, float32" in describe(path)
    params["kernel"][tuple(np.argwhere(full)[7])] = 0  # a weight that stayed is 0: not exactly 2 of 4 any more
    save_sparse(path, params)
    assert "mask, float32" in describe(path)
    save_sparse(path, params, structure=n_of_m(2, 4))
    assert "2:4, float32" in describe(path)
    same_bits(load_sparse(path), (params, {"kernel": params["kernel"] != 0}))
    save_sparse(path, params, {"kernel": full}, dtype="int8")
    assert "2:4, scaled int8" in describe(path)
    np.testing.assert_allclose(load_sparse(path)[0]["kernel"], params["kernel"], atol=0.01)


def test_sizes_of_2_of_4(tmp_path):
    """As many bytes as a bit for each weight, and what the header takes."""
    rng, path = np.random.default_rng(0), tmp_path / "model"
    mask = of_groups(rng, 2, 4, (256, 128), (1, 0))
    params = {"kernel": (rng.standard_normal(mask.shape) * mask).astype(jnp.bfloat16)}
    sizes = {}
    for name, options in (("mask", {"structure": "weight"}), ("2:4", {})):
        save_sparse(path, params, {"kernel": mask}, **options)
        assert f"{name}, bfloat16" in describe(path)
        sizes[name] = path.stat().st_size
    assert 0 <= sizes["2:4"] - sizes["mask"] <= 64
    assert 256 * 128 * (2 / 2 + 1 / 8) < sizes["2:4"] < 256 * 128 * (2 / 2 + 1 / 8) + 1000


def test_a_trained_mask_and_what_cannot_be_stored(tmp_path):
    path = tmp_path / "model"
    params = {"fc": {"kernel": jax.random.normal(jax.random.key(0), (16, 6)), "bias": jnp.zeros(6)}}
    masks = jaxsparse.magnitude_masks(params, sparsity=0.5, structure=n_of_m(2, 4))
    save_sparse(path, jaxsparse.apply_masks(params, masks), masks)
    assert "2:4, float32" in describe(path)
    path.unlink()
    dense = np.ones((8, 3), np.float32)
    dense[0] = 0
    for structure, error, message in (
        (n_of_m(2, 4), ValueError, "^w: a group of 4 weights keeps 4 of them, more than 2$"),
        ("block", ValueError, "structure"),
        (jaxsparse.block(2, 2), ValueError, r'structure of a file must be n_of_m or "weight", got block\(2, 2\)'),
        ({"v": n_of_m(2, 4)}, ValueError, "v"),
    ):
        with pytest.raises(error, match=message):
            save_sparse(path, {"w": dense}, structure=structure)
    with pytest.warns(UserWarning, match=r"n_of_m\(2, 16\) does not fit w of shape \(8, 3\)"):
        save_sparse(path, {"w": dense}, structure=n_of_m(2, 16))
    assert "mask, one float32" in describe(path) or "gaps, one float32" in describe(path)
