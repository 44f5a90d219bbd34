"""The contents of a sparse model's file, checked before use; :mod:`jaxsparse.artifacts` documents the format."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsparse.artifacts.encodings import FLOATS, in_bytes, most_low_bits, require
from jaxsparse.artifacts.files import DTYPES, naming, read_safetensors
from jaxsparse.trees import leaf_paths

__all__ = ["FORMAT", "VERSION", "Leaf", "as_json", "checksum", "joined", "read_contents"]

FORMAT, VERSION = "jaxsparse", "2"
_POSITIONS, _VALUES = ("dense", "mask", "gaps", "fan_in", "n_of_m"), ("each", "constant", "two", "scaled")
_USUAL = {"dtype": "float32", "stored": None, "positions": "dense", "values": "each"}  # left out in a file
_FIELDS_OF = {  # those that an encoding of positions has, and the others have not
    "dense": set(),
    "mask": {"kept", "bytes"},
    "gaps": {"kept", "bytes", "low_bits"},
    "fan_in": {"kept", "bytes", "low_bits", "inputs"},
    "n_of_m": {"kept", "bytes", "n_of_m", "axes"},
}
_MOST_AXES = 64  # NumPy's limit


class Leaf(NamedTuple):
    """The description of a leaf in a file; :mod:`jaxsparse.artifacts` documents the fields."""

    name: str  # by the tree
    shape: tuple[int, ...]
    kept: int
    dtype: str = "float32"
    stored: str | None = None
    positions: str = "dense"
    bytes: int = 0
    low_bits: int = 0
    values: str = "each"
    inputs: Any = None  # two axes
    n_of_m: Any = None  # n and m
    axes: Any = None  # an order of the axes

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def slots(self) -> int:
        """The number of values: of the weights that survive, or of n in every m whether they do or not."""
        if self.n_of_m is None:
            return self.kept
        n, m = self.n_of_m
        return self.size // m * n

    @property
    def nbytes(self) -> int:
        """The bytes that the weights take in memory."""
        return self.size * np.dtype(self.dtype).itemsize

    def as_json(self) -> dict[str, Any]:
        """The fields that the file has."""
        own = {"shape", *_FIELDS_OF[self.positions]}
        fields = self._asdict().items()
        return {field: value for field, value in fields if field in own or value != _USUAL.get(field, value)}

    def parts(self) -> dict[str, tuple[str, int]]:
        """The dtype and the number of entries of each of its parts, in the order of the file."""
        scaled, number = self.values == "scaled", {"constant": 1, "two": 2}.get(self.values, self.slots)
        parts = {
            "positions": ("uint8", self.bytes) if self.positions != "dense" else None,
            "values": ("int8" if scaled else self.stored or self.dtype, number),
            "signs": ("uint8", in_bytes(self.slots)) if self.values == "two" else None,
            "scale": ("float32", 1) if scaled else None,
        }
        return {name: part for name, part in parts.items() if part}


def read_contents(path: str | os.PathLike) -> tuple[Any, list[Leaf], list[dict[str, np.ndarray]], int]:
    """Read a file and check everything that can be checked without decoding.

    Returns:
      The tree with the indices of the leaves, the leaves, the parts of each by name, and the size of the file in bytes.

    Raises:
      ValueError: if the file is damaged, or has another format or version.
    """
    found, metadata, size = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise ValueError("a safetensors file, but not from save_sparse; jaxsparse.formats.load_dense reads dense ones")
    if (version := metadata.get("version")) == "1":
        raise ValueError("version 1 of the format, written by an older, unreleased version of jaxsparse: save it anew")
    if version != VERSION:
        raise ValueError(f"version {version!r} of the format, but this jaxsparse reads {VERSION!r}: update jaxsparse")
    require(set(metadata) == {"format", "version", "sha256", "model"}, "its metadata has the wrong keys")
    right = checksum(metadata["model"], {name: tensor["data"] for name, tensor in found.items()})
    require(right == metadata["sha256"], "it is damaged: its checksum is wrong")
    model = json.loads(metadata["model"], object_pairs_hook=_object)
    require(type(model) is dict and set(model) == {"tree", "leaves"}, "its model has the wrong keys")
    tree = _from_json(model["tree"])
    order, names = jax.tree.leaves(tree), leaf_paths(tree)
    fits = type(model["leaves"]) is list and order == list(range(len(model["leaves"])))
    require(fits, "its tree does not have every leaf once, in order")
    leaves = [_checked_leaf(name, leaf) for name, leaf in zip(names, model["leaves"], strict=True)]
    return tree, leaves, _split(leaves, found), size


def joined(leaves: Sequence[Leaf], parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The parts of all leaves, one after the other, in one vector for each dtype, by its name."""
    of_dtype: dict[str, list[np.ndarray]] = {}
    for leaf, arrays in zip(leaves, parts, strict=True):
        for part, (dtype, _) in leaf.parts().items():
            of_dtype.setdefault(dtype, []).append(arrays[part])
    return {dtype: np.concatenate(arrays) for dtype, arrays in of_dtype.items()}


def _split(leaves: Sequence[Leaf], found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, np.ndarray]]:
    """The parts of each leaf, out of the tensors of a file."""
    needed: dict[str, int] = {}
    for leaf in leaves:
        for dtype, number in leaf.parts().values():
            needed[dtype] = needed.get(dtype, 0) + number
    require(set(found) == set(needed), f"its tensors are {sorted(found)}, but its leaves need {sorted(needed)}")
    for dtype, tensor in found.items():
        code, shape = tensor["dtype"], list(tensor["shape"])
        fits = DTYPES.get(code) == dtype and shape == [needed[dtype]]
        require(fits, f"its tensor {dtype} has {code} of shape {shape}, but its leaves need {needed[dtype]} {dtype}")
    tensors = {dtype: np.frombuffer(tensor["data"], dtype) for dtype, tensor in found.items()}
    starts = dict.fromkeys(needed, 0)
    parts: list[dict[str, np.ndarray]] = []
    for leaf in leaves:
        parts.append({})
        for part, (dtype, number) in leaf.parts().items():
            parts[-1][part] = tensors[dtype][starts[dtype] : starts[dtype] + number]
            starts[dtype] += number
    return parts


def _checked_leaf(name: str, about: Any) -> Leaf:
    with naming(name, ValueError):
        require(type(about) is dict, "it is not described by an object")
        about = _USUAL | about
        for field, known in (("dtype", DTYPES.values()), ("positions", _POSITIONS), ("values", _VALUES)):
            value = about[field]
            require(type(value) is str and value in known, f"expected one of {', '.join(known)}, got {value!r}")
        fields = {"shape", *_USUAL, *_FIELDS_OF[about["positions"]]}
        require(set(about) == fields, f"it has {', '.join(sorted(about))}, not {', '.join(sorted(fields))}")
        shape = about["shape"]
        require(type(shape) is list and len(shape) <= _MOST_AXES, "its shape is not a list, or too long")
        require(all(type(n) is int and 0 <= n < 1 << 63 for n in shape), "its shape has entries that are not sizes")
        leaf = Leaf(**{"name": name, "kept": math.prod(shape), **about, "shape": tuple(shape)})
        bytes_without_zeros = math.prod(n for n in shape if n) * np.dtype(leaf.dtype).itemsize
        require(bytes_without_zeros < 1 << 63, "its shape is too large")  # or NumPy's count of bytes overflows
        require(type(leaf.kept) is int and 0 <= leaf.kept <= leaf.size, f"it cannot keep {leaf.kept!r} weights")
        least, most = (in_bytes(leaf.size),) * 2 if leaf.positions == "mask" else (0, 1 << 63)
        require(type(leaf.bytes) is int and least <= leaf.bytes <= most, f"bytes cannot be {leaf.bytes!r}")
        if leaf.positions == "fan_in":
            axes, last = leaf.inputs, len(leaf.shape)
            fits = _are_ints(axes) and len(axes) == 2
            require(fits and 0 <= axes[0] < axes[1] <= last and leaf.kept, f"its inputs cannot be the axes {axes!r}")
        if leaf.positions == "n_of_m":
            pair, axes = leaf.n_of_m, leaf.axes
            fits = _are_ints(pair) and len(pair) == 2 and 1 <= pair[0] <= pair[1] and pair[1] > 1
            require(fits and leaf.size and leaf.size % pair[1] == 0, f"it cannot keep n of every m {pair!r}")
            require(_are_ints(axes) and sorted(axes) == list(range(len(leaf.shape))), f"its axes cannot be {axes!r}")
            require(leaf.kept <= leaf.slots, f"it cannot keep {leaf.kept} weights, {pair[0]} of every {pair[1]}")
        most = most_low_bits(leaf.size, leaf.kept)
        require(type(leaf.low_bits) is int and 0 <= leaf.low_bits <= most, f"low_bits cannot be {leaf.low_bits!r}")
        is_float, stored = leaf.dtype in FLOATS, leaf.stored
        smaller = is_float and stored in FLOATS and np.dtype(stored).itemsize < np.dtype(leaf.dtype).itemsize
        fits = stored is None or (smaller and leaf.values != "scaled")
        fits &= is_float or leaf.values in ("each", "constant")
        require(fits, f"its values are {leaf.dtype}, and cannot be stored as {leaf.values!r} of {stored!r}")
    return leaf


def _are_ints(value: Any) -> bool:
    return type(value) is list and all(type(entry) is int for entry in value)


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


def checksum(model: str, tensors: Mapping[str, Any]) -> str:
    """The first 16 hex digits of the SHA-256 of a file's model and of the bytes of its tensors."""
    sha256 = hashlib.sha256(model.encode())
    for name in sorted(tensors):
        sha256.update(tensors[name])
    return sha256.hexdigest()[:16]


def _object(pairs: list[Any]) -> dict[Any, Any]:
    require(len(dict(pairs)) == len(pairs), "a key appears twice")
    return dict(pairs)
