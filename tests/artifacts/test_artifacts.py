import itertools
import math
import os
import subprocess
import sys
from typing import Any, NamedTuple

import equinox
import flax
import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  # makes bfloat16 known to NumPy
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import sparse as jsparse
from jax.sharding import NamedSharding, PartitionSpec

import jaxsparse
from jaxsparse import artifacts
from jaxsparse.artifacts import ArtifactError, describe, formats, load_sparse, save_sparse
from jaxsparse.artifacts.__main__ import main as command_line
from jaxsparse.methods.amenable import amenable_init, centroids
from jaxsparse.trees import by_path

FLOATS = ["float16", "bfloat16", "float32", "float64"]
INTEGERS = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
SPECIAL = [-0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45]


def lenet(density=0.05):
    """LeNet-300-100 with random weights on uniform random masks."""
    rng = np.random.default_rng(0)
    sizes = [784, 300, 100, 10]
    params, masks = {}, {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        mask = np.zeros(fan_in * fan_out, bool)
        mask[rng.choice(mask.size, round(density * mask.size), replace=False)] = True
        mask = mask.reshape(fan_in, fan_out)
        kernel, bias = (0.1 * rng.standard_normal(shape, np.float32) for shape in ((fan_in, fan_out), fan_out))
        params[f"fc{i + 1}"] = {"kernel": np.where(mask, kernel, 0), "bias": bias}
        masks[f"fc{i + 1}"] = {"kernel": mask, "bias": np.array(True)}
    return params, masks


def same_bits(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def documented_reader():
    """The function ``read`` of the module's docstring."""
    lines = [line[4:] for line in artifacts.__doc__.splitlines() if line.startswith((">>> ", "... "))]
    code = "\n".join(lines[: next(i for i, line in enumerate(lines) if line.startswith("import tempfile"))])
    assert len(lines) < 55
    assert "jaxsparse" not in code
    names = {}
    exec(code, names)
    return names["read"]


@st.composite
def leaves(draw):
    """An array of any kind, and its mask."""
    shape = draw(st.lists(st.integers(0, 7), max_size=4).map(tuple))
    dtype = draw(st.sampled_from(FLOATS + INTEGERS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    density = draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 0.9, 1.0]))
    kind = draw(st.sampled_from(["random", "bits", "constant", "two", "special"]))
    mask = rng.random(shape) < density
    size = math.prod(shape)
    itemsize = np.dtype(dtype).itemsize
    if dtype == "bool":
        values = rng.random(size) < 0.5
    elif kind == "bits" or dtype in INTEGERS:
        values = rng.bytes(size * itemsize)
        values = np.frombuffer(values, dtype)
    else:
        values = {
            "random": rng.standard_normal(size),
            "constant": np.full(size, draw(st.sampled_from([0.25, *SPECIAL]))),
            "two": np.where(rng.random(size) < 0.5, -0.5, 0.125),
            "special": rng.choice([1.0, 0.0, *SPECIAL], size),
        }[kind].astype(dtype)
    array = np.zeros(shape, dtype)
    array[mask] = values.reshape(shape)[mask]
    return array, mask if shape and draw(st.booleans()) else None


@settings(max_examples=150)
@given(st.lists(leaves(), max_size=4))
def test_what_is_saved_comes_back_bit_for_bit(tmp_path_factory, pairs):
    path = tmp_path_factory.mktemp("models") / "model"
    params = {f"leaf {i}": array for i, (array, _) in enumerate(pairs)}
    masks = {f"leaf {i}": np.array(True) if mask is None else mask for i, (_, mask) in enumerate(pairs)}
    save_sparse(path, params, masks)
    with np.errstate(all="ignore"):
        same_bits(load_sparse(path), (params, masks))
        same_bits(documented_reader()(path), params)
    assert f"{path.stat().st_size:,}" in describe(path)


@settings(max_examples=50)
@given(leaves())
def test_without_masks_every_weight_but_plus_zero_survives(tmp_path_factory, pair):
    path = tmp_path_factory.mktemp("models") / "model"
    save_sparse(path, {"w": pair[0]})
    loaded, masks = load_sparse(path)
    same_bits(loaded, {"w": pair[0]})
    bits = pair[0].view(f"u{pair[0].itemsize}")
    if pair[0].ndim < 2 or pair[0].dtype.name in INTEGERS or bits.all():
        same_bits(masks, {"w": np.array(True)})
    else:
        same_bits(masks, {"w": bits != 0})


def test_without_masks_layouts_count_and_leaves_of_zeros_are_named(tmp_path):
    params = {"scale": np.eye(3), "m": {"kernel": np.eye(3)}, "head": {"kernel": np.zeros((3, 2))}}
    layout = {"scale": jaxsparse.Layout(0, 1), "m/kernel": jaxsparse.Layout((), (0, 1))}
    with pytest.warns(UserWarning, match=r"no weight is left in head/kernel \(of 6 weights\): .* Give masks="):
        jaxsparse.save_sparse(tmp_path / "a", params, layout=layout)
    masks = jaxsparse.load_sparse(tmp_path / "a")[1]
    assert masks["scale"].tolist() == np.eye(3, dtype=bool).tolist()
    assert masks["m"]["kernel"].tolist() is True


@settings(max_examples=50)
@given(leaves(), st.sampled_from(["float32", "bfloat16", "float16"]))
def test_values_are_rounded_once(tmp_path_factory, pair, dtype):
    path = tmp_path_factory.mktemp("models") / "model"
    array, mask = pair
    expected = array
    with np.errstate(all="ignore"):
        if array.dtype.name in FLOATS and np.dtype(dtype).itemsize < array.itemsize:
            expected = array.astype(dtype).astype(array.dtype)
        if array.dtype.name in FLOATS and (np.isfinite(array) & ~np.isfinite(expected)).any():
            with pytest.raises(ValueError, match=r"^w: \d+ of its values are too large for the dtype"):
                save_sparse(path, {"w": array}, {"w": np.array(True) if mask is None else mask}, dtype=dtype)
            return
        save_sparse(path, {"w": array}, {"w": np.array(True) if mask is None else mask}, dtype=dtype)
        same_bits(load_sparse(path)[0], {"w": expected})


@settings(max_examples=50)
@given(
    st.one_of(
        st.tuples(st.just("float16"), st.floats(-8, 4)),
        st.tuples(st.sampled_from(["bfloat16", "float32", "float64"]), st.floats(-44, 37)),
    ),
    st.integers(0, 2**32),
)
def test_int8_is_within_half_a_step(tmp_path_factory, dtype_and_exponent, seed):
    path = tmp_path_factory.mktemp("models") / "model"
    dtype, exponent = dtype_and_exponent
    array = (np.random.default_rng(seed).standard_normal((6, 5)) * 10.0**exponent).astype(dtype)
    bias = np.arange(5, dtype=np.float32) / 7
    masks = {"w": np.ones((6, 5), bool), "b": np.array(True)}
    save_sparse(path, {"w": array, "b": bias}, masks, dtype="int8")
    loaded = load_sparse(path)[0]
    same_bits(loaded["b"], bias)
    peak = np.abs(array).max().astype(float)
    error = np.abs(loaded["w"].astype(float) - array.astype(float)).max()
    resolution = max(float(jnp.finfo(dtype).smallest_subnormal), float(jnp.finfo(dtype).eps) * peak, 2.0**-127)
    assert error <= peak / 254 + resolution
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(
            documented_reader()(path)["w"].astype(float), loaded["w"].astype(float), atol=resolution
        )


def test_sizes(tmp_path):
    params, masks = lenet()
    assert sum(mask.sum() for mask in jax.tree.leaves(masks) if mask.ndim) == 13_310

    def size(**options):
        save_sparse(tmp_path / "model", params, masks, **options)
        return (tmp_path / "model").stat().st_size

    assert size() <= 65_500
    assert size(dtype="bfloat16") <= 38_500
    assert size(dtype="int8") <= 26_000
    assert size(init=centroids(params, masks)) <= 12_500
    same_bits(load_sparse(tmp_path / "model")[0], amenable_init(params, masks, centroids(params, masks)))
    formats.save_dense(tmp_path / "dense", params)
    assert 1_066_000 <= (tmp_path / "dense").stat().st_size <= 1_068_000


def test_the_smaller_encoding_of_positions_is_taken(tmp_path):
    rng = np.random.default_rng(0)
    for density in (0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.99):
        mask = rng.random((200, 100)) < density
        save_sparse(tmp_path / "model", {"w": np.float32(mask)}, {"w": mask})
        p = mask.mean()
        entropy = -20_000 * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8 if p else 0
        stored = (tmp_path / "model").stat().st_size - 4
        header = int.from_bytes((tmp_path / "model").read_bytes()[:8], "little") + 8
        assert stored - header <= (2500 if density >= 0.5 else 1.06 * entropy + 4)
        assert ("mask, " if density >= 0.5 else "gaps, ") in describe(tmp_path / "model")


def test_a_constant_fan_in_is_coded_by_output_where_that_is_smaller(tmp_path):
    rng = np.random.default_rng(0)
    for live in (60, 20):  # of 60 outputs, which have 600 of 12,000 weights
        columns = np.where(np.arange(60) < live, 600 // live, 0)
        mask = rng.permuted(np.arange(200)[:, None] < rng.permutation(columns), axis=0)
        params = {"w": np.where(mask, rng.standard_normal(mask.shape), 0).astype(np.float32)}
        for name, turn in (("last", lambda x: x), ("first", np.transpose), ("two", lambda x: x.reshape(200, 6, 10))):
            turned, masks = {"w": turn(params["w"])}, {"w": turn(mask)}
            path = tmp_path / f"{name} {live}"
            save_sparse(path, turned, masks)
            assert ("fan_in, float32" if live == 20 else "gaps, float32") in describe(path)
            same_bits(load_sparse(path), (turned, masks))
            same_bits(documented_reader()(path)["w"], turned["w"])
            save_sparse(path, turned, masks, dtype="int8")
            np.testing.assert_allclose(load_sparse(path)[0]["w"], turned["w"], atol=0.02)


def test_equal_models_give_equal_files(tmp_path):
    params, masks = lenet()
    for name in ("one", "two", "three"):
        save_sparse(tmp_path / name, params, masks)
    contents = {(tmp_path / name).read_bytes() for name in ("one", "two", "three")}
    assert len(contents) == 1
    with safetensors.safe_open(tmp_path / "one", "np") as file:  # the order of the header is made by hand
        assert list(file.metadata()) != []
        assert file.keys() == ["float32", "uint8"]


def test_trees(tmp_path):
    eye = np.eye(3, dtype=np.float32)
    strange = {'"\\\n\x00é': {"..": eye, "": 2 * eye}, "~/../../etc/passwd": {"\ud800": 3 * eye, "\x7f": 4 * eye}}
    for params in (
        {"a": [eye, (2 * eye, None, [])], "b": None, "c": {}}, [], (), None, {}, eye, np.float32(2), strange,
        flax.core.freeze({"a": {"kernel": eye}}),
    ):  # fmt: skip
        save_sparse(tmp_path / "model", params)
        loaded, masks = load_sparse(tmp_path / "model")
        plain = flax.core.unfreeze(params) if isinstance(params, flax.core.FrozenDict) else params
        same_bits(loaded, plain)
        assert jax.tree.structure(masks) == jax.tree.structure(plain)
        describe(tmp_path / "model")


def test_names_cannot_disturb_a_terminal(tmp_path, capsys):
    save_sparse(tmp_path / "model", {"\x1b[2J\n\ud800": np.eye(3)})
    command_line([str(tmp_path / "model")])
    assert r"'\x1b[2J\n\ud800'" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"^'\\x1b\[2J\\n': 1 of its values are too large"):
        save_sparse(tmp_path / "model", {"\x1b[2J\n": np.float32([1e9])}, dtype="float16")


def test_jax_arrays_sharded_donated_and_of_any_layout(tmp_path):
    params = {"w": jnp.arange(64, dtype=jnp.bfloat16).reshape(8, 8), "b": jnp.ones(3)}
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(params["w"], NamedSharding(mesh, PartitionSpec("x")))
    masks = {"w": jax.device_put(params["w"] > 7, sharded.sharding), "b": jnp.array(True)}
    params["w"] = jnp.where(masks["w"], sharded, 0)
    save_sparse(tmp_path / "model", params, masks)
    same_bits(load_sparse(tmp_path / "model"), (params, masks))
    turned = {"w": np.asarray(params["w"]).T, "b": np.arange(6, dtype=">f4")[::2]}
    save_sparse(tmp_path / "model", turned)
    same_bits(load_sparse(tmp_path / "model")[0], {"w": turned["w"].copy("C"), "b": turned["b"].astype(np.float32)})


def test_masks_of_an_optimizer_state_and_what_they_keep(tmp_path):
    params = {"fc": {"kernel": jax.random.normal(jax.random.key(0), (20, 10)), "bias": jnp.zeros(10)}}
    tx = jaxsparse.chain(optax.sgd(0.1, momentum=0.9), jaxsparse.sparse_momentum(0.8, 100))
    state = tx.init(params)
    params = jaxsparse.sparsify(state, params)
    masks = jaxsparse.get_masks(state, params)
    row, column = np.argwhere(np.asarray(masks["fc"]["kernel"]))[0]
    params["fc"]["kernel"] = params["fc"]["kernel"].at[row, column].set(0)  # as regrown weights are
    save_sparse(tmp_path / "model", params, masks)
    same_bits(load_sparse(tmp_path / "model"), (params, masks))
    params["fc"]["kernel"] = jnp.where(masks["fc"]["kernel"], 1.0, -0.0)  # as a product with masks leaves them
    save_sparse(tmp_path / "model", params, masks)
    same_bits(load_sparse(tmp_path / "model")[0]["fc"]["kernel"], np.where(masks["fc"]["kernel"], 1, 0).astype("f4"))


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        ({"w": np.eye(2)}, {"masks": {"w": ~np.eye(2, dtype=bool)}}, r"w has 2 weights that are not 0 .*apply_masks"),
        ({"w": np.eye(2)}, {"masks": {"w": np.ones(2, bool)}}, r"masks of w: expected bool of shape \(2, 2\)"),
        ({"w": np.eye(2)}, {"masks": {"v": np.eye(2, dtype=bool)}}, "masks must have the tree of the params"),
        ({"w": np.eye(2)}, {"dtype": "float8"}, "dtype must be None or one of .*, got 'float8'"),
        ({"w": np.eye(2, dtype=complex)}, {}, "the params at 'w': expected an array of bool, .*, got complex128"),
        ({"w": jax.random.key(0)}, {}, "the params at 'w': expected an array of bool, .*, got key<fry>"),
        ({"w": [1.0]}, {}, "the params at 'w/0': expected a dict, list, tuple, None or array, got builtins.float"),
        ({(1, 2): np.eye(2)}, {}, r"the params: expected keys that are strings, or all of them ints, got \(1, 2\)"),
        ({"a": {"b": np.eye(2), 1: np.eye(2)}}, {}, "the params at 'a': expected keys that are strings, .*, got 1"),
        ({"a/b": np.eye(2), "a": {"b": np.eye(2)}}, {}, "two leaves of the params have the path 'a/b'"),
        ({"w": np.float32([[7e4, 0]])}, {"dtype": "float16"}, "w: 1 of its values are too large for the dtype"),
        ({"w": np.float64([[1e300, -7, 0]])}, {"dtype": "int8"}, "w: 1 of its values are too large for the dtype"),
        ({"w": np.float32([[np.nan, 1, 0]])}, {"dtype": "int8"}, "w: int8 needs finite weights"),
        ({"w": np.eye(2)}, {"init": {"v": (-1.0, 1.0)}}, "v"),
        ({"w": jsparse.BCOO.fromdense(np.eye(2))}, {}, "the params at 'w': expected a dict, .*, got jax.*BCOO"),
        ({"w": optax.EmptyState()}, {}, "the params at 'w': expected a dict, .*, got optax.*EmptyState"),
    ],
)
def test_what_cannot_be_saved_is_said_before_anything_is_written(tmp_path, params, options, message):
    with pytest.raises(ValueError, match=message):
        save_sparse(tmp_path / "model", params, **options)
    assert os.listdir(tmp_path) == []


def test_modules_are_saved_by_their_parts_and_come_back_in_their_own_tree(tmp_path):
    class Pair(NamedTuple):
        value: Any
        policy: Any

    mlp = equinox.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))
    stack = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
    state = nnx.state(stack, nnx.Param)
    eye = np.eye(3, dtype=np.float32)
    for params, paths in (
        (state, ["layers/0/bias", "layers/0/kernel", "layers/2/bias", "layers/2/kernel"]),
        (nnx.to_pure_dict(state), ["layers/0/bias", "layers/0/kernel", "layers/2/bias", "layers/2/kernel"]),
        (equinox.filter(mlp, equinox.is_array), [f"layers/{i}/{name}" for i in (0, 1) for name in ("bias", "weight")]),
        (flax.core.freeze({"a": {"kernel": eye}}), ["a/kernel"]),
        (Pair(eye, 2 * eye), ["policy", "value"]),
        ({"head": Pair(eye, 2 * eye)}, ["head/policy", "head/value"]),
        ({"mlp/~/linear_0": {"w": eye}}, ["mlp/~/linear_0/w"]),
        ({0: [eye], 10: (None, eye)}, ["0/0", "10/1"]),
    ):
        masks = jax.tree.map(lambda leaf: leaf != 0 if leaf.ndim > 1 else True, params)
        save_sparse(tmp_path / "model", params, masks)
        plain, _ = load_sparse(tmp_path / "model")
        assert sorted(by_path(plain)) == paths
        loaded = load_sparse(tmp_path / "model", like=jax.eval_shape(lambda params=params: params))
        same_bits(loaded, (params, masks))
    same_bits(plain, params)  # ints as keys stay ints
    nnx.update(stack, load_sparse_of(tmp_path, state))
    with pytest.raises(ValueError, match=r"at 'activation'.*got builtins.function.*eqx\.filter|got jax.*eqx\.filter"):
        save_sparse(tmp_path / "module", mlp)
    with pytest.raises(ValueError, match=r"model: 0/0 is in the file alone$"):
        load_sparse(tmp_path / "model", like={"b": eye})
    with pytest.raises(ValueError, match="the tree of like= at 'b': expected"):
        load_sparse(tmp_path / "model", like={"b": jsparse.BCOO.fromdense(eye)})
    save_sparse(tmp_path / "model", {"b": eye})
    with pytest.raises(ValueError, match=r"model: b has shape \(3, 3\), but \(4, 3\) in like="):
        load_sparse(tmp_path / "model", like={"b": np.ones((4, 3))})


def load_sparse_of(folder, params):
    save_sparse(folder / "again", params)
    return load_sparse(folder / "again")[0]


def test_errors_of_the_system_name_the_file_that_was_asked_for(tmp_path):
    for path in (tmp_path / "no folder" / "model", tmp_path):
        for save in (save_sparse, formats.save_dense, formats.save_npz):
            with pytest.raises(OSError, match=f"{path}'$"):
                save(path, {"w": np.eye(2)})


class FailingDiskError(OSError):
    pass


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_write_leaves_what_was_there(tmp_path, monkeypatch, call):
    save_sparse(tmp_path / "model", {"w": np.eye(2)})
    before = (tmp_path / "model").read_bytes()

    def fail(*args):
        raise FailingDiskError

    monkeypatch.setattr(os, call, fail)
    for save in (save_sparse, formats.save_dense, formats.save_npz):
        with pytest.raises(FailingDiskError):
            save(tmp_path / "model", {"w": np.ones(2)})
    assert os.listdir(tmp_path) == ["model"]
    assert (tmp_path / "model").read_bytes() == before


def test_errors_of_the_system_are_passed_on(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_sparse(tmp_path / "nowhere" / "model", {"w": np.eye(2)})
    with pytest.raises(FileNotFoundError):
        load_sparse(tmp_path / "model")
    with pytest.raises(IsADirectoryError):
        load_sparse(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        save_sparse(tmp_path / "folder", {"w": np.eye(2)})
    assert os.listdir(tmp_path) == ["folder"]


def test_without_safetensors_it_is_said_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for call in (lambda: save_sparse(tmp_path / "model", {}), lambda: load_sparse(tmp_path / "model")):
        with pytest.raises(ImportError, match=r"pip install safetensors"):
            call()


def test_other_files_are_told_apart(tmp_path):
    formats.save_dense(tmp_path / "dense", {"w": np.eye(2)})
    with pytest.raises(ArtifactError, match=r"dense: a safetensors file, but not from save_sparse.*load_dense"):
        load_sparse(tmp_path / "dense")
    formats.save_npz(tmp_path / "npz", {"w": np.eye(2)})
    with pytest.raises(ArtifactError, match="npz: damaged, or not a safetensors file"):
        load_sparse(tmp_path / "npz")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ArtifactError, match="empty: damaged, or not a safetensors file"):
        describe(tmp_path / "empty")


def test_command_line(tmp_path, capsys):
    save_sparse(tmp_path / "model", *lenet())
    command_line([str(tmp_path / "model"), str(tmp_path / "model")])
    out = capsys.readouterr().out
    assert out.count("fc2/kernel  300x100") == 2
    assert "dense: 1,066,440 bytes, 6." in out
    (tmp_path / "bad").write_bytes(b"bad")
    for bad in ("bad", "nowhere"):
        with pytest.raises(SystemExit, match="error: .*" + bad):
            command_line([str(tmp_path / bad)])
    run = [sys.executable, "-m", "jaxsparse.artifacts"]
    done = subprocess.run([*run, str(tmp_path / "bad")], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_names_of_leaves(tmp_path):
    params, masks = lenet()
    save_sparse(tmp_path / "model", params, masks)
    same_bits(documented_reader()(tmp_path / "model"), by_path(params))
