"""The contents of a sparse model's file, checked before use; :mod:`jaxsparse.artifacts` documents the format."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsparse.artifacts.encodings import FLOATS, in_bytes, most_low_bits, require
from jaxsparse.artifacts.files import DTYPES, naming, printable, read_safetensors
from jaxsparse.trees import leaf_paths

__all__ = ["CODES", "FORMAT", "VERSION", "Leaf", "as_json", "parts_of", "read_contents", "sha256"]

FORMAT, VERSION = "jaxsparse", "1"
CODES = {name: code for code, name in DTYPES.items()}
_POSITIONS, _VALUES = ("dense", "mask", "gaps", "fan_in", "n_of_m"), ("each", "constant", "two", "scaled")
_FIELDS_OF = {"fan_in": {"inputs"}, "n_of_m": {"n_of_m", "axes"}}  # fields that one encoding of positions has alone
_MOST_AXES = 64  # NumPy's limit


class Leaf(NamedTuple):
    """The description of a leaf in a file; :mod:`jaxsparse.artifacts` documents the fields."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kept: int
    positions: str
    low_bits: int
    values: str
    inputs: Any = None  # two axes; of "fan_in" alone
    n_of_m: Any = None  # n and m; of "n_of_m" alone, as the next
    axes: Any = None  # an order of the axes

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def stored(self) -> int:
        """The number of values in the file: the weights that survive, or n of every m whether they do or not."""
        if self.n_of_m is None:
            return self.kept
        n, m = self.n_of_m
        return self.size // m * n

    @property
    def nbytes(self) -> int:
        """The bytes that the weights take in memory."""
        return self.size * np.dtype(self.dtype).itemsize

    def as_json(self) -> dict[str, Any]:
        """The fields, without those that the encoding of its positions does not have."""
        return {field: value for field, value in self._asdict().items() if value is not None}

    def parts(self) -> set[str]:
        """The names of the tensors that the leaf needs."""
        needed = {
            "positions": self.positions != "dense",
            "values": True,
            "signs": self.values == "two",
            "scale": self.values == "scaled",
        }
        return {part for part, there in needed.items() if there}


def read_contents(path: str | os.PathLike) -> tuple[Any, list[Leaf], dict[str, np.ndarray], int]:
    """Read a file and check everything that can be checked without decoding.

    Returns:
      The tree with the indices of the leaves, the leaves, the tensors by name, and the size of the file in bytes.

    Raises:
      ValueError: if the file is damaged, or has another format or version.
    """
    found, metadata, size = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise ValueError("a safetensors file, but not from save_sparse; jaxsparse.formats.load_dense reads dense ones")
    if (version := metadata.get("version")) != VERSION:
        raise ValueError(f"version {version!r} of the format, but this jaxsparse reads {VERSION!r}: update jaxsparse")
    require(set(metadata) == {"format", "version", "sha256", "model"}, "its metadata has the wrong keys")
    require(sha256(metadata["model"].encode()) == metadata["sha256"], "the checksum of its header is wrong")
    model = json.loads(metadata["model"], object_pairs_hook=_object)
    require(type(model) is dict and set(model) == {"tree", "leaves", "tensors"}, "its model has the wrong keys")
    require(type(model["leaves"]) is list and type(model["tensors"]) is dict, "its model has the wrong types")
    leaves = [_checked_leaf(leaf) for leaf in model["leaves"]]
    tree = _from_json(model["tree"])
    order = jax.tree.leaves(tree)
    require(sorted(order) == list(range(len(leaves))), "its tree does not have every leaf once")
    require([leaves[i].name for i in order] == leaf_paths(tree), "its leaves do not have the names that its tree gives")
    needed = {f"{i}/{part}" for i, leaf in enumerate(leaves) for part in leaf.parts()}
    require(needed == set(found) == set(model["tensors"]), "its tensors are not those that its leaves need")
    tensors = {}
    for name, tensor in found.items():
        dtype, shape = tensor["dtype"], list(tensor["shape"])
        intact = model["tensors"][name] == [dtype, shape, sha256(tensor["data"])]
        of = printable(leaves[int(name.partition("/")[0])].name)
        require(intact, f"the tensor {name!r}, of {of}, is damaged: its checksum is wrong")
        require(dtype in DTYPES and len(shape) == 1, f"the tensor {name!r} is not a vector of a known dtype")
        tensors[name] = np.frombuffer(tensor["data"], DTYPES[dtype])
    for i, leaf in enumerate(leaves):
        with naming(leaf.name, ValueError):
            _check_parts(leaf, parts_of(tensors, i))
    return tree, leaves, tensors, size


def _checked_leaf(about: Any) -> Leaf:
    require(type(about) is dict, "a leaf has the wrong keys")
    absent = {field for of, fields in _FIELDS_OF.items() if of != about.get("positions") for field in fields}
    require(set(about) == {*Leaf._fields} - absent, "a leaf has the wrong keys")
    leaf = Leaf(**about)
    require(type(leaf.name) is str, "the name of a leaf is not a string")
    with naming(leaf.name, ValueError):
        for value, known in ((leaf.dtype, CODES), (leaf.positions, _POSITIONS), (leaf.values, _VALUES)):
            require(type(value) is str and value in known, f"expected one of {', '.join(known)}, got {value!r}")
        require(type(leaf.shape) is list and len(leaf.shape) <= _MOST_AXES, "its shape is not a list, or too long")
        require(all(type(n) is int and 0 <= n < 1 << 63 for n in leaf.shape), "its shape has entries that are no sizes")
        leaf = leaf._replace(shape=tuple(leaf.shape))
        bytes_without_zeros = math.prod(n for n in leaf.shape if n) * np.dtype(leaf.dtype).itemsize
        require(bytes_without_zeros < 1 << 63, "its shape is too large")  # or NumPy's count of bytes overflows
        least = leaf.size if leaf.positions == "dense" else 0
        require(type(leaf.kept) is int and least <= leaf.kept <= leaf.size, f"it cannot keep {leaf.kept!r} weights")
        if leaf.positions == "fan_in":
            axes, last = leaf.inputs, len(leaf.shape)
            fits = _are_ints(axes) and len(axes) == 2
            require(fits and 0 <= axes[0] < axes[1] <= last and leaf.kept, f"its inputs cannot be the axes {axes!r}")
        if leaf.positions == "n_of_m":
            pair, axes = leaf.n_of_m, leaf.axes
            fits = _are_ints(pair) and len(pair) == 2 and 1 <= pair[0] <= pair[1] and pair[1] > 1
            require(fits and leaf.size and leaf.size % pair[1] == 0, f"it cannot keep n of every m {pair!r}")
            require(_are_ints(axes) and sorted(axes) == list(range(len(leaf.shape))), f"its axes cannot be {axes!r}")
            require(leaf.kept <= leaf.stored, f"it cannot keep {leaf.kept} weights, {pair[0]} of every {pair[1]}")
        most = most_low_bits(leaf.size, leaf.kept) if leaf.positions in ("gaps", "fan_in") else 0
        require(type(leaf.low_bits) is int and 0 <= leaf.low_bits <= most, f"low_bits cannot be {leaf.low_bits!r}")
    return leaf


def _are_ints(value: Any) -> bool:
    return type(value) is list and all(type(entry) is int for entry in value)


def _check_parts(leaf: Leaf, parts: Mapping[str, np.ndarray]) -> None:
    """Check the dtypes and lengths of a leaf's tensors."""
    stored, is_float = parts["values"].dtype, leaf.dtype in FLOATS
    if leaf.values == "scaled":
        fits = is_float and stored == np.int8
    else:
        smaller = is_float and stored.name in FLOATS and stored.itemsize < np.dtype(leaf.dtype).itemsize
        fits = (stored.name == leaf.dtype or smaller) and (is_float or leaf.values != "two")
    require(fits, f"its values are {leaf.dtype}, and cannot be stored as {leaf.values!r} of {stored}")
    lengths = {
        "positions": in_bytes(leaf.size) if leaf.positions == "mask" else None,  # that of others shows in decoding
        "values": {"constant": 1, "two": 2}.get(leaf.values, leaf.stored),
        "signs": in_bytes(leaf.stored),
        "scale": 1,
    }
    for part, array in parts.items():
        dtype = {"values": stored, "scale": np.float32}.get(part, np.uint8)
        fits = array.dtype == dtype and lengths[part] in (None, array.size)
        require(fits, f"its {part} cannot be {array.size} {array.dtype}")


def as_json(tree: Any) -> Any:
    """A tree of indices as JSON."""
    if isinstance(tree, list | tuple):
        return [type(tree).__name__, *map(as_json, tree)]
    if not isinstance(tree, dict):
        return tree
    items = [(key, as_json(value)) for key, value in tree.items()]
    return dict(items) if all(isinstance(key, str) for key in tree) else ["dict", *items]


def _from_json(node: Any) -> Any:
    if type(node) is dict:
        return {key: _from_json(value) for key, value in node.items()}
    if type(node) is list:
        require(node and node[0] in ("list", "tuple", "dict"), "a node of its tree is not a list, tuple or dict")
        if node[0] != "dict":
            return (list if node[0] == "list" else tuple)(map(_from_json, node[1:]))
        items = node[1:]
        pairs = all(type(item) is list and len(item) == 2 and type(item[0]) is int for item in items)
        require(items and pairs, "a dict of its tree does not have ints as keys")
        return {key: _from_json(value) for key, value in _object(items).items()}
    require(node is None or type(node) is int, f"its tree has a leaf {node!r}")
    return node


def parts_of(tensors: Mapping[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    """The tensors of leaf i, by part."""
    names = {part: f"{i}/{part}" for part in ("positions", "values", "signs", "scale")}
    return {part: tensors[name] for part, name in names.items() if name in tensors}


def sha256(data: Any) -> str:
    """The first 16 hex digits of the SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


def _object(pairs: list[Any]) -> dict[Any, Any]:
    require(len(dict(pairs)) == len(pairs), "a key appears twice")
    return dict(pairs)
