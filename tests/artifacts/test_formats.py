import dataclasses
import os
import warnings
import zipfile

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import sparse

from jaxsparse.artifacts import ArtifactError, formats, save_sparse

CONVERSIONS = {"bcoo": formats.to_bcoo, "bcsr": formats.to_bcsr, "scipy": formats.to_scipy}


def model(shape=(4, 3), dtype="float32", density=0.4, seed=0):
    """Params of which some kept weights are 0, and masks."""
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < density
    kernel = np.where(mask & (rng.random(shape) < 0.8), rng.standard_normal(shape), 0).astype(dtype)
    params = {"layer": {"kernel": kernel, "bias": np.arange(3, dtype=np.float32)}}
    return params, {"layer": {"kernel": mask, "bias": np.array(True)}}


def same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@settings(max_examples=30)
@given(
    st.sampled_from(sorted(CONVERSIONS)),
    st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 1000),
)
def test_sparse_arrays_and_back(conversion, shape, dtype, density, seed):
    params, masks = model(shape, dtype, density, seed)
    converted = CONVERSIONS[conversion](params, masks)
    assert converted["layer"]["bias"] is params["layer"]["bias"]
    same(formats.from_sparse(converted, jax.eval_shape(lambda: params)), (params, masks))


def test_products_with_sparse_arrays():
    params, masks = model((5, 3))
    dense, vector = params["layer"]["kernel"], np.arange(3, dtype=np.float32)
    bcoo, bcsr, csr = (convert(params, masks)["layer"]["kernel"] for convert in CONVERSIONS.values())
    assert isinstance(bcoo, sparse.BCOO)
    assert isinstance(bcsr, sparse.BCSR)
    for matrix in (bcoo, bcsr, csr):
        np.testing.assert_allclose(matrix @ vector, dense @ vector, rtol=1e-6)
    kept = masks["layer"]["kernel"].sum()
    assert kept == bcoo.nse == bcsr.nse == csr.nnz
    assert kept > np.count_nonzero(dense)  # zeros that the mask keeps are stored


def fan_in(inputs, outputs, k, live, seed=0):
    """A mask of constant fan-in."""
    rng = np.random.default_rng(seed)
    return rng.permuted(np.arange(inputs)[:, None] < k * (rng.permutation(outputs) < live), axis=0)


@pytest.mark.slow
def test_a_constant_fan_in_is_two_dense_arrays_and_a_product():
    rng = np.random.default_rng(0)
    mask = fan_in(30, 12, 5, 8)
    kernel = np.where(mask & (rng.random(mask.shape) < 0.8), rng.standard_normal(mask.shape), 0).astype(np.float32)
    params, masks = {"w": kernel, "b": np.ones(12, np.float32)}, {"w": mask, "b": np.array(True)}
    matrix = formats.to_fan_in(params, masks)["w"]
    assert matrix.indices.shape == matrix.values.shape == (5, 8)
    same(formats.from_sparse(formats.to_fan_in(params, masks), params), (params, masks))
    np.testing.assert_array_equal(matrix.todense(), kernel)
    x = rng.standard_normal((2, 3, 30)).astype(np.float32)
    for product in (x @ matrix, jnp.asarray(x) @ matrix, jax.jit(lambda x, m: x @ m)(x, matrix)):
        np.testing.assert_allclose(product, x @ kernel, atol=1e-5)
    # Its gradient is that of the dense product, of the weights that are kept.
    grads = jax.grad(lambda m: jnp.sum(jnp.sin(jnp.asarray(x) @ m)), allow_int=True)(matrix).values
    dense = jax.grad(lambda w: jnp.sum(jnp.sin(jnp.asarray(x) @ w)))(jnp.asarray(kernel))
    np.testing.assert_allclose(grads, dense[matrix.indices, matrix.outputs[None]], atol=1e-5)
    with pytest.raises(ValueError, match=r"the last axis must be the 30 inputs of the matrix, got shape \(2, 12\)"):
        jnp.ones((2, 12)) @ matrix


def test_what_is_no_constant_fan_in_is_named():
    mask = fan_in(6, 5, 2, 4)
    params, masks = {"a": np.float32(mask)}, {"a": mask}
    matrix = formats.to_fan_in(params, masks)["a"]
    indices, outputs = np.array(matrix.indices), np.array(matrix.outputs)
    for change, words in (
        ({"indices": indices + 6}, "a: its indices are not all below 6"),
        ({"indices": indices - 6}, "a: its indices are not all below 6"),
        ({"indices": indices[::-1]}, "a: its indices do not increase, or are there twice"),
        ({"indices": indices[[0, 0]]}, "a: its indices do not increase, or are there twice"),
        ({"outputs": outputs[::-1]}, "a: its outputs do not increase, or are there twice"),
        ({"outputs": outputs + 5}, "a: its outputs are not all below 5"),
        ({"outputs": outputs[:3]}, "a: its indices, values and outputs are not of one shape"),
        ({"shape": (5, 6)}, r"a: "),
    ):
        with pytest.raises(ValueError, match=words):
            formats.from_sparse({"a": dataclasses.replace(matrix, **change)}, params)
    mask[np.flatnonzero(mask[:, outputs[0]])[0], outputs[0]] = False
    with pytest.raises(ValueError, match="a: its outputs keep 1 to 2 of 6 inputs, not equally many or none"):
        formats.to_fan_in(params, masks)
    nothing = formats.to_fan_in(params, {"a": np.zeros_like(mask)})["a"]
    np.testing.assert_array_equal(np.ones((2, 6), np.float32) @ nothing, np.zeros((2, 5)))


def test_kernels_become_matrices():
    params, masks = model((3, 3, 2, 4))
    assert formats.to_bcoo(params, masks)["layer"]["kernel"].shape == (3, 3, 2, 4)
    for convert in (formats.to_bcsr, formats.to_scipy):
        matrix = convert(params, masks)["layer"]["kernel"]
        assert matrix.shape == (18, 4)
        np.testing.assert_array_equal(matrix.todense(), params["layer"]["kernel"].reshape(18, 4))


def test_sparse_arrays_of_others_come_in():
    dense = jnp.array([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
    padded = sparse.BCOO.fromdense(dense, nse=4)  # with two entries outside
    params, masks = formats.from_sparse({"w": padded}, {"w": dense})
    np.testing.assert_array_equal(params["w"], dense)
    np.testing.assert_array_equal(masks["w"], dense != 0)
    twice = sparse.BCOO((jnp.ones(2), jnp.zeros((2, 2), int)), shape=(2, 3))
    with pytest.raises(ValueError, match="w: an entry is stored twice"):
        formats.from_sparse({"w": twice}, {"w": dense})
    with pytest.raises(ValueError, match=r"w: expected shape \(3, 2\), got \(2, 3\)"):
        formats.from_sparse({"w": padded}, {"w": dense.T})
    with pytest.raises(ValueError, match="w: sparse arrays with batch or dense axes"):
        formats.from_sparse({"w": sparse.BCOO.fromdense(dense, n_batch=1)}, {"w": dense})
    below = sparse.BCOO((jnp.ones(1), jnp.array([[0, -1]])), shape=(2, 2))
    with pytest.raises(ValueError, match="w: an index is below 0"):
        formats.from_sparse({"w": below}, {"w": jnp.ones((2, 2))})


def test_what_becomes_of_64_bits_is_said():
    params, masks = model(dtype="float64")
    for convert in (formats.to_bcoo, formats.to_bcsr):
        with pytest.warns(UserWarning, match="layer/kernel of 64 bits lose a half"):
            convert(params, masks)
        with jax.enable_x64(True), warnings.catch_warnings(action="error"):
            assert convert(params, masks)["layer"]["kernel"].dtype == np.float64
    with warnings.catch_warnings(action="error"):
        assert formats.to_scipy(params, masks)["layer"]["kernel"].dtype == np.float64


def test_masks_that_do_not_fit_are_named():
    params, masks = model()
    masks["layer"]["kernel"] = masks["layer"]["kernel"].T
    for convert in CONVERSIONS.values():
        with pytest.raises(ValueError, match="masks of layer/kernel: expected bool"):
            convert(params, masks)


def test_dense_files(tmp_path):
    params = {"fc1": {"kernel": jnp.eye(3, dtype=jnp.bfloat16), "bias": np.float64([1, 2])}, "step": np.int32(7)}
    formats.save_dense(tmp_path / "model", params)
    same(formats.load_dense(tmp_path / "model"), params)
    assert set(safetensors.safe_open(tmp_path / "model", "np").keys()) == {"fc1/kernel", "fc1/bias", "step"}
    formats.save_dense(tmp_path / "model", {"layers": [np.eye(2), (np.ones(1),)]})
    same(formats.load_dense(tmp_path / "model"), {"layers": {"0": np.eye(2), "1": {"0": np.ones(1)}}})
    assert os.listdir(tmp_path) == ["model"]


def test_files_of_numpy(tmp_path):
    params, masks = model((3, 3, 2, 4))
    params["file"] = {"self": np.zeros((), np.int8)}  # numpy.savez has arguments of these names
    masks["file"] = {"self": np.array(True)}
    formats.save_npz(tmp_path / "model.npz", params, masks)
    same(formats.load_npz(tmp_path / "model.npz"), (params, masks))
    with np.load(tmp_path / "model.npz") as archive:
        np.testing.assert_array_equal(archive["layer/kernel"], params["layer"]["kernel"])
        assert archive["masks/layer/kernel"].shape == (9,)
    formats.save_npz(tmp_path / "model.npz", {"w": jnp.ones(2, jnp.bfloat16)})
    same(formats.load_npz(tmp_path / "model.npz"), ({"w": np.ones(2, np.float32)}, {"w": np.array(True)}))
    assert os.listdir(tmp_path) == ["model.npz"]


def test_equal_params_give_equal_files(tmp_path):
    for save in (formats.save_dense, formats.save_npz):
        for name in ("one", "two"):
            save(tmp_path / name, model()[0])
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"": np.eye(2)}, r"shape \(2, 2\) at '' needs keys that are not empty"),
        (np.eye(2), r"shape \(2, 2\) at '' needs keys that are not empty"),
        ({"a/b": np.eye(2), "a": {"b": np.eye(2)}}, "two leaves of the params have the path 'a/b'"),
        ({"a/b": np.eye(2), "a": np.eye(2)}, "the params have 'a' and, below it, 'a/b'"),
    ],
)
def test_keys_that_are_no_names(tmp_path, params, message):
    for save in (formats.save_dense, formats.save_npz):
        with pytest.raises(ValueError, match=message):
            save(tmp_path / "model", params)
    assert os.listdir(tmp_path) == []


def test_keys_that_the_formats_use_themselves(tmp_path):
    with pytest.raises(ValueError, match="the params have '__metadata__', which safetensors keeps"):
        formats.save_dense(tmp_path / "model", {"__metadata__": np.ones(2)})
    with pytest.raises(ValueError, match=r"the params have 'w\.npy', but NumPy uses the suffix"):
        formats.save_npz(tmp_path / "model", {"w": np.ones(2), "w.npy": np.zeros(3)})
    with pytest.raises(ValueError, match=r"the params have 'w\\x00v', which is not a valid file name in an archive"):
        formats.save_npz(tmp_path / "model", {"w\0v": np.ones(2)})
    assert os.listdir(tmp_path) == []


def test_any_tree_comes_back_like_itself(tmp_path):
    mask = np.array([[True, False], [True, True]])
    for params in (
        {"mlp/~/linear_0": {"w": np.eye(2)}, "b": [np.ones(3), (np.zeros((0, 5)), None)]},
        nnx.to_pure_dict(nnx.state(nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0))))),
        flax.core.freeze({"a": {"kernel": np.eye(2)}}),
    ):
        masks = jax.tree.map(lambda leaf: mask if leaf.shape == (2, 2) else np.array(True), params)
        params = jax.tree.map(lambda leaf, kept: leaf * kept, params, masks)
        formats.save_dense(tmp_path / "dense", params)
        same(formats.load_dense(tmp_path / "dense", like=params), params)
        formats.save_npz(tmp_path / "npz", params, masks)
        same(formats.load_npz(tmp_path / "npz", like=params), (params, masks))
    formats.save_dense(tmp_path / "dense", {"mlp/~/linear_0": {"w": np.eye(2)}})
    same(formats.load_dense(tmp_path / "dense"), {"mlp": {"~": {"linear_0": {"w": np.eye(2)}}}})
    with pytest.raises(ValueError, match=r"dense: mlp/~/linear_0/w is in the file alone"):
        formats.load_dense(tmp_path / "dense", like={"v": np.eye(2)})


def test_a_key_for_masks(tmp_path):
    with pytest.raises(ValueError, match="the params have 'masks/w', but masks are stored under this name"):
        formats.save_npz(tmp_path / "model", {"masks": {"w": np.eye(2)}})


def test_damaged_dense_files(tmp_path):
    path = tmp_path / "model"
    save_sparse(path, {"w": np.eye(2)})
    with pytest.raises(ArtifactError, match=r"a sparse model: read it with jaxsparse\.artifacts\.load_sparse"):
        formats.load_dense(path)
    path.write_bytes(safetensors.numpy.save({"a": np.ones(1), "a/b": np.ones(1)}))
    with pytest.raises(ArtifactError, match="'a/b' is below another array"):
        formats.load_dense(path)
    header = b'{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"1")
    with pytest.raises(ArtifactError, match="it has tensors of F8_E4M3"):
        formats.load_dense(path)
    path.write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="damaged, or not a safetensors file"):
        formats.load_dense(path)


def test_damaged_files_of_numpy(tmp_path):
    path = tmp_path / "model.npz"
    params, masks = model((20, 10))
    formats.save_npz(path, params, masks)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        try:
            loaded = formats.load_npz(path)
        except ArtifactError:
            continue
        assert all(leaf.dtype.kind in "fb" for leaf in jax.tree.leaves(loaded))
    np.savez_compressed(path, w=params["layer"]["kernel"])
    compressed = bytearray(path.read_bytes())
    compressed[100] ^= 0xFF  # within the deflated bytes
    encrypted = bytearray(data)
    for signature in (b"PK\x03\x04", b"PK\x01\x02"):  # of the local and of the central header
        encrypted[data.index(signature) + (6 if signature[2] == 3 else 8)] |= 1
    with zipfile.ZipFile(path, "w") as archive, archive.open("w.npy", "w") as entry:
        np.lib.format.write_array_header_1_0(entry, {"descr": "<f4", "fortran_order": False, "shape": (10**15,)})
    huge = path.read_bytes()
    for bad in (b"", b"damaged", data[:100], data[:-30], bytes(compressed), bytes(encrypted), huge):
        path.write_bytes(bad)
        with pytest.raises(ArtifactError, match=r"model\.npz: "):
            formats.load_npz(path)
    np.savez(path, w=np.array([{}], object))
    with pytest.raises(ArtifactError, match="allow_pickle=False"):
        formats.load_npz(path)
    np.savez(path, **{"w": np.ones(9), "masks/w": np.ones(1, np.uint8)})
    with pytest.raises(ArtifactError, match="the mask of w does not fit its weights"):
        formats.load_npz(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.txt", "no array")
    with pytest.raises(ArtifactError, match=r"model\.npz: "):
        formats.load_npz(path)
