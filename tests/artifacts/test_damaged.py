"""Damaged and hostile files. Whatever is done to a file, it is refused or gives the data that were saved."""

import hashlib
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxsparse
from jaxsparse.artifacts import ArtifactError, contents, describe, files, load_sparse, save_sparse
from tests.artifacts.test_artifacts import same_bits

LIMIT = 1 << 24  # what a small file may take in memory by default


def every_encoding():
    """A small model with every encoding in it: params and masks."""
    rng = np.random.default_rng(1)
    dense = rng.standard_normal((40, 25))
    mask = rng.random((40, 25)) < 0.1
    half = rng.random((40, 25)) < 0.6
    pairs = rng.random((8, 6, 4)).argsort(2) < 2
    pairs, some = (x.reshape(8, 24).T for x in (pairs, pairs & (rng.random((8, 6, 4)) < 0.8)))
    fan_in = rng.permuted(np.arange(120)[:, None] < np.array([8, 0, 0, 0] * 16), axis=0).reshape(12, 10, 64)
    params = {
        "fan_in": np.where(fan_in, rng.standard_normal((12, 10, 64)), 0).astype(np.float32),
        "gaps": np.where(mask, dense, 0).astype(np.float32),
        "mask": np.where(half, dense, 0).astype(jnp.bfloat16),
        "n_of_m": [np.where(pairs, dense[:24, :8], 0), np.where(some, dense[:24, :8], 0).astype(np.float32)],
        "two": [np.where(mask, np.sign(dense) / 8, 0).astype(np.float32), np.float32(np.where(half, -0.5, 0))],
        "dense": (rng.standard_normal(9), np.arange(5), np.array([True, False]), np.zeros((3, 0), np.float16)),
    }
    params["gaps"][0, 1] = np.nan
    masks = jax.tree.map(lambda x: np.array(True), params)
    masks |= {"fan_in": fan_in, "gaps": params["gaps"] != 0, "mask": half, "n_of_m": [pairs, some], "two": [mask, half]}
    return params, masks


STRUCTURE = {"n_of_m/*": jaxsparse.n_of_m(2, 4)}


@pytest.fixture(scope="module")
def model():
    return every_encoding()


@pytest.fixture(scope="module")
def valid(model, tmp_path_factory):
    """The bytes of its file, and a path to write to."""
    path = tmp_path_factory.mktemp("fuzz") / "model"
    save_sparse(path, *model, structure=STRUCTURE)
    text = describe(path)
    for encoding in (
        "2:4, float64",
        "2:4, float32",
        "fan_in, float32",
        "gaps, float32",
        "mask, bfloat16",
        "gaps, two float32",
        "mask, one float32",
    ):
        assert encoding in text
    assert "dense, bool" in text
    return path.read_bytes(), path


def refused_or_right(path, data, model):
    """Whether a file is refused."""
    path.write_bytes(data)
    try:
        loaded = load_sparse(path)
    except ArtifactError:
        return True
    same_bits(loaded, model)
    return False


def test_1000_flips_of_bits(valid, model):
    data, path = valid
    rng = np.random.default_rng(2)
    start = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for i in range(1000):
        bits = np.unpackbits(np.frombuffer(data, np.uint8))
        first, last = (0, 8 * start) if i % 2 else (8 * start, bits.size)  # the header, the tensors
        bits[rng.integers(first, last, rng.integers(1, 9))] ^= 1
        changed = np.packbits(bits).tobytes()
        refused += refused_or_right(path, changed, model) or changed == data
    assert refused == 1000


def test_900_files_cut_overwritten_or_with_bytes_more_or_less(valid, model):
    data, path = valid
    rng = np.random.default_rng(3)
    for i in range(900):
        at, count = rng.integers(0, len(data)), rng.integers(1, 65)
        changed = (
            data[:at],
            data[:at] + rng.bytes(count) + data[at + count :],
            data[:at] + rng.bytes(count) + data[at:],
            data[:at] + data[at + count :],
            data[:at] + data[at : at + count] + data[at:],
            data + rng.bytes(count),
        )[i % 6]
        assert refused_or_right(path, changed, model)


PARTS = ("positions", "values", "signs", "scale")


def forge(data, change, stamp=True):
    """A file with another header or other parts of leaves, and a checksum that is right for these.

    ``change`` gets the model, the parts by "<index of the leaf>/<part>", and the metadata. Arrays that it adds by a
    name without a "/" are whole tensors.
    """
    found = safetensors.deserialize(data)
    rest = {name: np.frombuffer(tensor["data"], files.DTYPES[tensor["dtype"]]) for name, tensor in found}
    end = 8 + int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8:end])["__metadata__"]
    model, parts = json.loads(metadata["model"]), {}
    for i, leaf in enumerate(model["leaves"]):
        for part, (dtype, number) in contents._checked_leaf(str(i), leaf).parts().items():
            parts[f"{i}/{part}"], rest[dtype] = rest[dtype][:number], rest[dtype][number:]
    text = change(model, parts, metadata)
    of_dtype, tensors = {}, {name: parts.pop(name) for name in list(parts) if "/" not in name}
    for name in sorted(parts, key=lambda name: (int(name.partition("/")[0]), PARTS.index(name.partition("/")[2]))):
        of_dtype.setdefault(parts[name].dtype.name, []).append(parts[name])
    tensors = {dtype: np.concatenate(arrays) for dtype, arrays in of_dtype.items()} | tensors
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    metadata["model"] = text if isinstance(text, str) else json.dumps(model)
    if stamp:
        sha256 = hashlib.sha256(metadata["model"].encode() + b"".join(tensors[x].tobytes() for x in sorted(tensors)))
        metadata["sha256"] = sha256.hexdigest()[:16]
    return safetensors.numpy.save(tensors, metadata)


LEAVES = [
    "dense/0",
    "dense/1",
    "dense/2",
    "dense/3",
    "fan_in",
    "gaps",
    "mask",
    "n_of_m/0",
    "n_of_m/1",
    "two/0",
    "two/1",
]


def about(model, name):
    return model["leaves"][LEAVES.index(name)]


NUMBERS = [-1, 0.5, True, None, "1", [], {}, 1e30, float("nan"), 10**18, 2**63, 10**4000, 1001, 0]
NAMES = ["float33", "F32", "object", "O", "", None, 1, "../../etc/passwd", ["float32"], "complex64", "float8_e4m3fn"]


def of_leaf(name, field, value):
    def change(model, parts, metadata):
        about(model, name)[field] = value

    return change


def of_part(name, part, array):
    def change(model, parts, metadata):
        key = f"{LEAVES.index(name)}/{part}"
        parts[key] = array(parts[key]) if callable(array) else array
        if part == "positions":
            about(model, name)["bytes"] = parts[key].size

    return change


def of_model(key, value):
    def change(model, parts, metadata):
        model[key] = value(model[key]) if callable(value) else value

    return change


def bits_more(count):
    """Appends ones to the bits of gaps."""
    return lambda packed: np.concatenate([packed, np.full(count, 255, np.uint8)])


HOSTILE = {
    **{f"shape {n!r:.20} of {leaf}": of_leaf(leaf, "shape", [n, 25])
       for n in NUMBERS for leaf in ("gaps", "mask", "two/1") if n != 1001},
    **{f"shape {shape!r:.30}": of_leaf("gaps", "shape", shape)
       for shape in (None, 1000, "1000", {"0": 1000}, [], [1000] * 65, [0, 2**62, 2**62], [999])},
    **{f"kept {n!r:.20} of {leaf}": of_leaf(leaf, "kept", n)
       for n in NUMBERS for leaf in ("gaps", "mask", "two/0", "two/1", "dense/0")},
    **{f"low_bits {n!r:.20} of {leaf}": of_leaf(leaf, "low_bits", n)
       for n in (*NUMBERS[:-1], 1, 2, 5, 62, 63, 64) for leaf in ("gaps", "mask")
       if (leaf, n) != ("mask", 0)},
    **{f"{field} {name!r:.20}": of_leaf("gaps", field, name)
       for name in NAMES for field in ("dtype", "positions", "values", "name")},
    **{f"positions {name} of {leaf}": of_leaf(leaf, "positions", name)
       for leaf, name in (("gaps", "mask"), ("gaps", "dense"), ("dense/0", "mask"))},
    **{f"values {name} of {leaf}": of_leaf(leaf, "values", name)
       for leaf, name in (("gaps", "two"), ("gaps", "constant"), ("gaps", "scaled"), ("two/0", "each"),
                          ("two/1", "each"), ("dense/1", "scaled"), ("dense/2", "two"))},
    **{f"dtype {name} of {leaf}": of_leaf(leaf, "dtype", name)
       for leaf, name in (("gaps", "int32"), ("gaps", "float16"), ("gaps", "bfloat16"), ("dense/1", "bool"),
                          ("dense/2", "uint8"), ("dense/1", "float64"))},
    "an unknown key of a leaf": of_leaf("gaps", "more", 1),
    "inputs that nobody needs": of_leaf("gaps", "inputs", [0, 1]),
    **{f"fan_in of {leaf}": of_leaf(leaf, "positions", "fan_in") for leaf in ("gaps", "mask", "dense/0")},
    **{f"fan_in as {name}": of_leaf("fan_in", "positions", name) for name in ("gaps", "mask", "dense")},
    **{f"inputs {axes!r:.30}": of_leaf("fan_in", "inputs", axes)
       for axes in (None, 2, "02", [], [0], [0, 1, 2], [0, 0], [1, 0], [2, 2], [-1, 2], [0, 4], [0, 1], [1, 2], [0, 3],
                    [1, 3], [0, 2.0], [False, 2], ["0", 2], {"0": 2}, [0, 10**30])},
    **{f"fan_in kept {n!r:.20}": of_leaf("fan_in", "kept", n) for n in (*NUMBERS, 112, 127, 144)},
    **{f"fan_in low_bits {n!r:.20}": of_leaf("fan_in", "low_bits", n) for n in (*NUMBERS, 2, 4, 62, 64)},
    **{f"n_of_m of {leaf}": of_leaf(leaf, "positions", "n_of_m") for leaf in ("gaps", "mask", "dense/0", "fan_in")},
    **{f"n_of_m as {name}": of_leaf("n_of_m/0", "positions", name) for name in ("gaps", "mask", "dense", "fan_in")},
    **{f"n_of_m {pair!r:.30}": of_leaf("n_of_m/0", "n_of_m", pair)
       for pair in (None, 2, "24", [], [2], [2, 4, 4], [0, 4], [4, 2], [-2, 4], [2, 0], [2, -4], [1, 4], [2, 8], [4, 8],
                    [1, 1], [2.0, 4], [True, 4], {"2": 4}, [2, 5], [2, 10**30], [10**30, 10**30])},
    **{f"axes {axes!r:.30}": of_leaf("n_of_m/0", "axes", axes)
       for axes in (None, 1, "10", [], [1], [1, 1], [0, 2], [-1, 0], [1, 0, 2], [1.0, 0], [True, 0], {"1": 0})},
    **{f"n_of_m {i} kept {n!r:.20}": of_leaf(f"n_of_m/{i}", "kept", n) for i in (0, 1)
       for n in (*NUMBERS, 95, 97, 192)},
    "low bits of n_of_m": of_leaf("n_of_m/0", "low_bits", 1),
    "a position twice": of_part("n_of_m/0", "positions", lambda x: np.append(np.uint8([0]), x[1:])),
    "positions that fall": of_part("n_of_m/0", "positions", lambda x: ~x),
    "a byte of positions less": of_part("n_of_m/0", "positions", lambda x: x[:-1]),
    "a byte of positions more": of_part("n_of_m/0", "positions", lambda x: np.append(x, x[:1])),
    "no bits of what stays": of_part("n_of_m/1", "positions", lambda x: x[:24]),
    "all stay": of_part("n_of_m/1", "positions", lambda x: np.append(x[:24], np.full(12, 255, np.uint8))),
    "none stay": of_part("n_of_m/1", "positions", lambda x: np.append(x[:24], np.zeros(12, np.uint8))),
    "others stay": of_part("n_of_m/1", "positions", lambda x: np.append(x[:24], x[24:][::-1])),
    "what fills groups is not 0": of_part("n_of_m/1", "values", lambda x: x + np.float32(1)),
    "a value of n_of_m less": of_part("n_of_m/1", "values", lambda x: x[:-1]),
    **{f"no {key} of {leaf}": lambda model, parts, metadata, leaf=leaf, key=key: about(model, leaf).pop(key) and None
       for leaf, key in (("dense/0", "shape"), ("gaps", "kept"), ("gaps", "bytes"), ("gaps", "low_bits"),
                           ("gaps", "positions"), ("mask", "dtype"), ("fan_in", "inputs"), ("n_of_m/0", "axes"))},
    **{f"bytes {n!r:.20} of {leaf}": of_leaf(leaf, "bytes", n)
       for n in (*NUMBERS, 1, 124, 126) for leaf in ("gaps", "mask", "fan_in", "n_of_m/0", "dense/0")},
    **{f"stored {name!r:.20} of {leaf}": of_leaf(leaf, "stored", name)
       for name in (*(name for name in NAMES if name is not None), "float64", "float16", "int8", "bool")
       for leaf in ("gaps", "dense/0", "dense/1", "two/0")},
    "a leaf that is a list": of_model("leaves", lambda old: [list(old[0].values()), *old[1:]]),
    "a leaf less": of_model("leaves", lambda old: old[:-1]),
    "a leaf more": of_model("leaves", lambda old: [*old, old[0]]),
    "leaves in another order": of_model("leaves", lambda old: old[::-1]),
    **{f"leaves {value!r:.20}": of_model("leaves", value) for value in (None, {}, 1, "leaves", [None])},
    **{f"tree {value!r:.20}": of_model("tree", value)
       for value in (None, 0, True, 0.5, "tree", [], ["set", 0], [["list"]], {"gaps": 0}, {}, -1, 10**30, ["list", 0],
                     ["dict"], ["dict", 0], ["dict", [0]], ["dict", [0, 0, 0]], ["dict", ["a", 0]], ["dict", [True, 0]],
                     ["dict", [[], 0]], ["dict", [0, 0], [0, 1]])},
    "a leaf twice": of_model("tree", lambda old: old | {"gaps": old["mask"]}),
    "a leaf missing": of_model("tree", lambda old: old | {"gaps": None}),
    "a leaf of no index": of_model("tree", lambda old: old | {"gaps": 99}),
    "a leaf by true": of_model("tree", lambda old: old | {"gaps": True}),
    "keys in another order": of_model("tree", lambda old: {"z" + key if key == "gaps" else key: node
                                                           for key, node in old.items()}),
    "deep lists": lambda model, parts, metadata: '{"tree":' + '["list",' * 100_000,
    "deep closed lists": lambda model, parts, metadata: json.dumps(model).replace(
        '"tree": {', '"tree": {"deep": ' + '["list",' * 5000 + "null" + "]" * 5000 + ", "),
    "deep objects": lambda model, parts, metadata: '{"a":' * 5000 + "1" + "}" * 5000,
    "no JSON": lambda model, parts, metadata: "model",
    "empty": lambda model, parts, metadata: "",
    "a number": lambda model, parts, metadata: "1",
    "a key twice": lambda model, parts, metadata: json.dumps(model).replace('"tree"', '"tree": null, "tree"', 1),
    "a list": lambda model, parts, metadata: json.dumps(list(model.items())),
    "too many digits": lambda model, parts, metadata: json.dumps(model).replace("[40", "[4" + "0" * 9999, 1),
    "an unknown key": of_model("more", 1),
    **{f"no {key}": lambda model, parts, metadata, key=key: json.dumps(
        {name: value for name, value in model.items() if name != key}) for key in ("tree", "leaves")},
    "a tensor more": lambda model, parts, metadata: parts.update({"complex": np.ones(3)}),
    "numbers more": lambda model, parts, metadata: parts.update({"99/values": np.ones(3)}),
    "a tensor of two axes": lambda model, parts, metadata: parts.update({"float32": np.ones((2, 3), np.float32)}),
    "a tensor of another dtype": lambda model, parts, metadata: parts.update({"int64": np.ones(5)}),
    "signs that nobody needs": lambda model, parts, metadata: parts.update({"0/signs": np.ones(3, np.uint8)}),
    **{f"without part {i}": lambda model, parts, metadata, i=i: parts.pop(sorted(parts)[i]).all() for i in range(19)},
    "no bits of outputs": of_part("fan_in", "positions", lambda x: x[8:]),
    "some bits of outputs": of_part("fan_in", "positions", lambda x: x[:3]),
    "a third output": of_part("fan_in", "positions", lambda x: np.append(np.uint8([0b10001001]), x[1:])),
    "no output": of_part("fan_in", "positions", lambda x: np.append(np.zeros(8, np.uint8), x[8:])),
    "half of the outputs": of_part("fan_in", "positions", lambda x: np.append(x[:8] & np.uint8(240), x[8:])),
    "indices past the inputs": of_part("fan_in", "positions", lambda x: np.concatenate([
        x[:8], np.full(48, 255, np.uint8), x[56:]])),
    "a value less": of_part("gaps", "values", lambda x: x[:-1]),
    "a value more": of_part("gaps", "values", lambda x: np.append(x, x[:1])),
    "values of another dtype": of_part("gaps", "values", lambda x: x.astype(np.float64)),
    "values that are whole": of_part("gaps", "values", lambda x: np.ones(x.size, np.int32)),
    "positions of another dtype": of_part("gaps", "positions", lambda x: x.view(np.int8)),
    "no unary bits": of_part("gaps", "positions", lambda x: x[:50]),
    "a byte of gaps less": of_part("gaps", "positions", lambda x: x[:-1]),
    "no gaps": of_part("gaps", "positions", lambda x: x[:0]),
    "a byte of zeros more": of_part("gaps", "positions", lambda x: np.append(x, np.uint8(0))),
    "many zeros more": of_part("gaps", "positions", lambda x: np.append(x, np.zeros(10_000, np.uint8))),
    "gaps of ones": of_part("gaps", "positions", lambda x: np.full_like(x, 255)),
    "gaps of zeros": of_part("gaps", "positions", np.zeros_like),
    "a byte of ones more": of_part("gaps", "positions", bits_more(1)),
    "many ones more": of_part("gaps", "positions", bits_more(10_000)),
    "low bits of ones": of_part("gaps", "positions", lambda x: np.append(np.full(40, 255, np.uint8), x[40:])),
    "a long last gap": of_part("gaps", "positions", lambda x: np.concatenate([x[:-1], np.zeros(300, np.uint8),
                                                                               x[-1:]])),
    "a mask of ones": of_part("mask", "positions", lambda x: np.full_like(x, 255)),
    "a mask of zeros": of_part("mask", "positions", np.zeros_like),
    "a short mask": of_part("mask", "positions", lambda x: x[:-1]),
    "a long mask": of_part("mask", "positions", lambda x: np.append(x, np.uint8(0))),
    "signs less": of_part("two/0", "signs", lambda x: x[:-1]),
    "signs more": of_part("two/0", "signs", lambda x: np.append(x, np.uint8(0))),
    "signs that fill the byte": of_part("two/0", "signs", lambda x: np.append(x[:-1], np.uint8(255))),
    "signs of another dtype": of_part("two/0", "signs", lambda x: x.view(bool)),
    **{f"two values {pair}": of_part("two/0", "values", np.float32(pair))
       for pair in ([1, -1], [-1, np.nan], [np.nan, 1], [0, 1], [-1, 0], [1, 1], [-1], [-1, 0, 1])},
    "one value that is two": of_part("two/1", "values", np.float32([1, 2])),
    "one value that is none": of_part("two/1", "values", np.float32([])),
    "a bool of 2": of_part("dense/2", "values", np.frombuffer(b"\1\2", bool)),
    **{f"metadata {key} {value!r:.20}": lambda model, parts, metadata, key=key, value=value: metadata.update(
        {key: value}) for key, value in (("format", "pt"), ("version", "3"), ("version", "1"), ("version", "2.0"),
                                         ("more", ""))},
    **{f"without {key}": lambda model, parts, metadata, key=key: metadata.pop(key) == 0
       for key in ("format", "version")},
}  # fmt: skip


def scaled_with(scale):
    def change(model, parts, metadata):
        about(model, "gaps")["values"] = "scaled"
        i = LEAVES.index("gaps")
        parts[f"{i}/values"], parts[f"{i}/scale"] = np.ones(about(model, "gaps")["kept"], np.int8), scale

    return change


HOSTILE |= {
    f"scale {scale!r:.20}": scaled_with(scale)
    for scale in (
        *(np.float32([number]) for number in (np.nan, np.inf, 0, -1)),
        *(np.float64([1]), np.float32([1, 1]), np.float32([]), np.uint8([1])),
    )
}


def measured(path):
    """What loading a file raises, and the most memory that it took."""
    tracemalloc.start()
    try:
        load_sparse(path)
    except ArtifactError as error:
        return error, tracemalloc.get_traced_memory()[1]
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return None, peak


def test_forged_files_are_refused(valid, model):
    data, path = valid
    for what, change in HOSTILE.items():
        path.write_bytes(forge(data, change))
        error, peak = measured(path)
        assert type(error) is ArtifactError, what
        assert peak < 2 * max(LIMIT, 4096 * len(data)), what
        with pytest.raises(ArtifactError):
            describe(path) and load_sparse(path)


def test_a_forged_file_with_nothing_changed_is_read(valid, model):
    data, path = valid
    assert not refused_or_right(path, forge(data, lambda *args: None), model)


def test_wrong_checksums_alone_are_refused(valid):
    data, path = valid
    for change in (
        lambda model, parts, metadata: metadata.update(sha256="0" * 16),
        of_part("dense/0", "values", lambda x: x + 1),
        of_model("tree", lambda old: old | {"two": ["tuple", *old["two"][1:]]}),
    ):
        path.write_bytes(forge(data, change))
        if change.__name__ == "change":
            load_sparse(path)  # with a right checksum it is another model
        path.write_bytes(forge(data, change, stamp=False))
        with pytest.raises(ArtifactError, match="it is damaged: its checksum is wrong"):
            load_sparse(path)


def test_tensors_of_one_size_cannot_change_places(tmp_path):
    path = tmp_path / "model"
    params = {"a": np.arange(4, dtype=np.int32), "b": np.arange(4, dtype=np.float32)}
    save_sparse(path, params)
    data = path.read_bytes()
    for one, other in ((b"[0,16]", b"[16,32]"), (b'"I32"', b'"F32"')):
        changed = data.replace(one, b"<>").replace(other, one).replace(b"<>", other)
        assert len(changed) == len(data)
        assert changed != data
        path.write_bytes(changed)
        with pytest.raises(ArtifactError):
            load_sparse(path)


def test_other_versions_say_what_to_do(valid):
    data, path = valid
    for version, words in (
        ("3", "version '3' of the format, but this jaxsparse reads '2': update jaxsparse"),
        ("1", "version 1 of the format, written by an older, unreleased version of jaxsparse: save it anew"),
    ):
        path.write_bytes(forge(data, HOSTILE[f"metadata version '{version}'"]))
        with pytest.raises(ArtifactError, match=words):
            load_sparse(path)


def test_metadata_twice(valid, model):
    data, path = valid
    end = 8 + int.from_bytes(data[:8], "little")
    for first in ('{"format":1}', "{}", "null", '{"format":"pt"}'):
        header = b'{"__metadata__":' + first.encode() + b"," + data[9:end]
        refused_or_right(path, len(header).to_bytes(8, "little") + header + data[end:], model)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_small_file_does_not_take_much_memory_unless_that_is_asked_for(tmp_path, sparse):
    path = tmp_path / "bomb"
    big = np.zeros((1 << 12, 1 << 13), np.float32)  # 128 MiB
    save_sparse(path, {"kernel" if sparse else "bias": big})
    assert path.stat().st_size < 1000
    error, peak = measured(path)
    needed = big.nbytes + (big.size if sparse else 0)
    assert f"would take {needed:,} in memory" in str(error)
    assert f"max_bytes={needed}" in str(error)
    assert peak < 1 << 20
    loaded, _ = load_sparse(path, max_bytes=needed)
    assert jax.tree.leaves(loaded)[0].shape == big.shape
    with pytest.raises(ArtifactError):
        load_sparse(path, max_bytes=needed - 1)


def test_memory_is_in_proportion(tmp_path):
    rng = np.random.default_rng(0)
    params = {"kernel": np.float32(rng.standard_normal((1000, 1000)) * (rng.random((1000, 1000)) < 0.2))}
    save_sparse(tmp_path / "model", params)
    _, peak = measured(tmp_path / "model")
    assert peak < 6 * params["kernel"].nbytes
