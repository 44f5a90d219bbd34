r"""Sparse models on disk: small, checksummed, loadable without this library's help.

:func:`save_sparse` writes params and masks to one file, :func:`load_sparse` reads them back, bit for bit unless a
smaller dtype was asked for. :func:`describe` says what a file holds, and so does
``python -m jaxsparse.artifacts FILE``. They need the package safetensors: ``pip install jaxsparse[artifacts]``.

**The format, version 1.** A `safetensors <https://huggingface.co/docs/safetensors>`_ file whose metadata has

- ``format``: "jaxsparse"; ``version``: "1"; ``sha256``: the first 16 hex digits of the SHA-256 of the next, as UTF-8;
- ``model``: JSON with the keys ``tree``, ``leaves`` and ``tensors``.

``tree`` is null for None, an object for a dict, ``["dict", [key, node], ...]`` for one with ints as keys,
``["list", node, ...]`` or ``["tuple", node, ...]``, and for a leaf its index in ``leaves``. ``tensors`` has
``[dtype, shape, sha256]`` of every tensor of the file, by name. Tensors are vectors, and those of leaf i are called
``"i/positions"``, ``"i/values"``, ``"i/signs"`` and ``"i/scale"``. Bits are packed with the first one highest, and
filled up with zeros to whole bytes. A leaf has ``name`` (its path), ``shape``, ``dtype`` (in memory; its values may be
stored in a smaller one), ``kept`` (how many weights survive), and

- ``positions``, where the survivors are in row-major order: "dense" (everywhere; the mask is the scalar True); "mask"
  (one bit a weight); or "gaps": a Golomb-Rice code of how many weights are missing before each survivor. The r =
  ``low_bits`` lowest bits of each gap come first, r bits a gap, filled up to bytes; then gap >> r of each gap as so
  many zeros and a one. ``low_bits`` is 0 where there are no gaps;
- ``values``: "each" survivor's; "constant", one number for all; "two", a negative and a positive number, and for each
  survivor a bit in ``signs`` that is set where it is positive; or "scaled", int8 to be multiplied by ``scale`` in
  float32.

So a file can be read with NumPy and safetensors alone (and ml_dtypes, which makes bfloat16 known to NumPy):

>>> import json, math
>>> import numpy as np
>>> from safetensors import safe_open
>>> def read(path):  # {name: array}
...     file, arrays = safe_open(path, "np"), {}
...     for i, leaf in enumerate(json.loads(file.metadata()["model"])["leaves"]):
...         part = {key[len(f"{i}/"):]: file.get_tensor(key) for key in file.keys() if key.startswith(f"{i}/")}
...         size, kept, r, values = math.prod(leaf["shape"]), leaf["kept"], leaf["low_bits"], part["values"]
...         if leaf["values"] == "two":
...             values = values[np.unpackbits(part["signs"], count=kept)]
...         elif leaf["values"] == "scaled":
...             values = values * part["scale"]
...         where = np.arange(size)
...         if leaf["positions"] == "mask":
...             where = np.flatnonzero(np.unpackbits(part["positions"], count=size))
...         elif leaf["positions"] == "gaps":
...             bits = np.unpackbits(part["positions"])
...             low = bits[: kept * r].reshape(kept, r) @ (1 << np.arange(r)[::-1])
...             ones = np.flatnonzero(bits[-(-kept * r // 8) * 8 :])
...             where = np.cumsum((np.diff(ones, prepend=-1) - 1 << r) + low + 1) - 1
...         array = np.zeros(size, leaf["dtype"])
...         array[where] = values
...         arrays[leaf["name"]] = array.reshape(leaf["shape"])
...     return arrays
>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     save_sparse(f"{folder}/model", {"fc1": {"kernel": np.float32([[0, 2], [0, 0]]), "bias": np.float32([1, 1])}})
...     read(f"{folder}/model")
{'fc1/bias': array([1., 1.], dtype=float32), 'fc1/kernel': array([[0., 2.],
       [0., 0.]], dtype=float32)}
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsparse.artifacts.encodings import (
    FLOATS,
    SMALLER,
    bit_view,
    decode_positions,
    decode_values,
    encode_positions,
    encode_values,
    in_bytes,
    most_low_bits,
    require,
)
from jaxsparse.artifacts.files import (
    DTYPES,
    ArtifactError,
    in_tree_of,
    naming,
    plain_nodes,
    plain_tree,
    printable,
    read_safetensors,
    replacing,
    safetensors_package,
)
from jaxsparse.masks import validate_masks
from jaxsparse.prunable import default_choice
from jaxsparse.tables import Table
from jaxsparse.trees import is_masked_node, leaf_paths, natural_order, path_name

__all__ = ["ArtifactError", "describe", "load_sparse", "save_sparse"]

_FORMAT, _VERSION = "jaxsparse", "1"
_CODES = {name: code for code, name in DTYPES.items()}
_POSITIONS, _VALUES = ("dense", "mask", "gaps"), ("each", "constant", "two", "scaled")
_MOST_AXES = 64  # of NumPy
_AT_LEAST, _TIMES_THE_FILE = 1 << 24, 4096  # what a file may become in memory unless the caller says more


class _Leaf(NamedTuple):
    """What a file says of a leaf, see the format."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kept: int
    positions: str
    low_bits: int
    values: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * np.dtype(self.dtype).itemsize

    def parts(self) -> set[str]:
        """The tensors that it needs."""
        needed = {
            "positions": self.positions != "dense",
            "values": True,
            "signs": self.values == "two",
            "scale": self.values == "scaled",
        }
        return {part for part, there in needed.items() if there}


def save_sparse(
    path: str | os.PathLike,
    params: Any,
    masks: Any = None,
    *,
    init: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> None:
    """Writes a sparse model: of every leaf the positions and the values of the weights that are not pruned.

    The file appears whole or not at all. Equal models give equal files.

    Args:
      path: the file. One that is there is replaced.
      params: dicts (whose keys are strings or ints), lists, tuples, None, and in them arrays of bool, int or float
        dtypes. Other nodes (flax.nnx.State, FrozenDict, NamedTuples, dataclasses, Equinox modules) are stored as dicts
        by the names of their parts, and ``load_sparse(path, like=params)`` brings them back.
      masks: like ``params``: bool arrays, the scalar True for dense leaves. None takes the weights that are not +0
        in the leaves of two and more axes that are no bias or scale, and leaves without any zero as dense.
      init: what :func:`jaxsparse.methods.asni.centroids` returned: to store, instead of the params, what
        :func:`jaxsparse.methods.asni.amenable_init` makes of them.
      dtype: of the stored values: None as they are; "float32", "bfloat16" or "float16", in which larger floats are
        rounded; "int8", with one scale a leaf, max|w| / 127, for the weights of sparse leaves (the others stay as they
        are). A leaf with one value, or with one negative and one positive, takes one or two numbers in any case.

    Raises:
      ValueError: for params, masks or options that cannot be stored, naming the leaf; before anything is written.
      OSError: if the file cannot be written; what was there before stays.
      ImportError: without the package safetensors.

    Examples:
      >>> import tempfile, jax.numpy as jnp
      >>> params = {"kernel": jnp.eye(100), "bias": jnp.zeros(100)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_sparse(f"{folder}/eye.safetensors", params)
      ...     loaded, masks = load_sparse(f"{folder}/eye.safetensors")
      >>> int(masks["kernel"].sum()), float(loaded["kernel"].sum()), bool(masks["bias"])
      (100, 100.0, True)
    """
    package = safetensors_package()
    if dtype is not None and dtype not in SMALLER:
        raise ValueError(f"dtype must be None or one of {list(SMALLER)}, got {dtype!r}")
    tree = plain_tree(params)
    treedef, names = jax.tree.structure(tree), leaf_paths(tree)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two leaves of the params have the path {twice[0]!r}: rename a key")
    kept = _kept(tree, masks)
    if init is not None:
        from jaxsparse.methods.asni import amenable_init  # methods are above what they all use

        bools = treedef.unflatten([np.array(True) if mask is None else mask for mask in kept])
        tree = plain_tree(amenable_init(tree, bools, init))
    leaves = []
    tensors: dict[str, np.ndarray] = {}
    for i, (name, leaf, mask) in enumerate(zip(names, jax.tree.leaves(tree), kept, strict=True)):
        about, parts = _encode(name, leaf, mask, dtype)
        leaves.append(about._asdict())
        tensors |= {f"{i}/{part}": np.ascontiguousarray(array) for part, array in parts.items()}
    stamps = {name: [_CODES[x.dtype.name], x.shape, _sha256(x.view(np.uint8))] for name, x in sorted(tensors.items())}
    model = {"tree": _as_json(treedef.unflatten(range(len(leaves)))), "leaves": leaves, "tensors": stamps}
    text = json.dumps(model, separators=(",", ":"))
    metadata = {"format": _FORMAT, "version": _VERSION, "sha256": _sha256(text.encode()), "model": text}
    data = memoryview(package.save(tensors, metadata))
    # The package writes the metadata in another order every time: here in that above.
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:end])) | {"__metadata__": metadata}
    with replacing(path) as file:
        file.write(data[:8])
        file.write(json.dumps(header, separators=(",", ":")).encode().ljust(end - 8))
        file.write(data[end:])


def load_sparse(path: str | os.PathLike, *, like: Any = None, max_bytes: int | None = None) -> tuple[Any, Any]:
    """Reads what :func:`save_sparse` wrote. Everything is checked before it is used, and nothing in it is executed.

    Args:
      path: the file.
      like: a pytree of the model's params, or of their shapes (``jax.eval_shape``): params and masks come in its nodes,
        matched by path, with the dtypes of the file. None: as dicts, lists and tuples.
      max_bytes: how much memory params and masks may take together. By default 16 MiB, or 4096 times the size of the
        file if that is more: a file of a few bytes can describe arrays of any size.

    Returns:
      The params and the masks, as NumPy arrays: these go into every function of JAX, and no device is chosen for them.
      Params have the dtypes that were saved, float64 too and bfloat16 as that of ml_dtypes. Masks are bool arrays, the
      scalar True for dense leaves. What a mask leaves out is +0.

    Raises:
      ArtifactError: if the file is damaged, is none of :func:`save_sparse`, of a newer version, or too large.
      ValueError: if its leaves are not those of ``like``, or have other shapes, naming them.
      OSError: if it cannot be read.
      ImportError: without the package safetensors.

    Examples:
      >>> import tempfile, numpy as np
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_sparse(f"{folder}/model", [np.float64([[0, 0.1]])])
      ...     load_sparse(f"{folder}/model")
      ([array([[0. , 0.1]])], [array([[False,  True]])])
    """
    with naming(path, ArtifactError):
        tree, leaves, tensors, file_size = _read(path)
        limit = max(_AT_LEAST, _TIMES_THE_FILE * file_size) if max_bytes is None else max_bytes
        needed = sum(leaf.nbytes + (leaf.size if leaf.positions != "dense" else 0) for leaf in leaves)
        if needed > limit:
            raise ValueError(
                f"a file of {file_size:,} bytes that would take {needed:,} in memory, more than max_bytes={limit:,}; "
                f"if you trust it, load_sparse(path, max_bytes={needed})"
            )
        loaded = [_decode(leaf, _parts(tensors, i)) for i, leaf in enumerate(leaves)]
        params, masks = (jax.tree.map(lambda i, part=part: loaded[i][part], tree) for part in (0, 1))
    if like is None:
        return params, masks
    with naming(path, ValueError):
        return in_tree_of(like, params), in_tree_of(like, masks, check=False)


def describe(path: str | os.PathLike) -> str:
    """A table of a file: what each leaf keeps, how it is stored, and how many bytes that takes.

    Args:
      path: the file.

    Raises:
      ArtifactError, OSError, ImportError: as :func:`load_sparse`.

    Examples:
      >>> import tempfile, numpy as np
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_sparse(f"{folder}/model", {"kernel": np.eye(100, dtype="float32"), "bias": np.ones(100, "float32")})
      ...     print(describe(f"{folder}/model"))
      leaf    shape    density  encoding            bytes
      ------  -------  -------  ------------------  -----
      bias    100        dense  dense, one float32      4
      kernel  100x100    1.00%  gaps, one float32     104
      ------  -------  -------  ------------------  -----
      header                                          776
      all     10,100     1.98%                        884
      dense: 40,400 bytes, 2.19% of it
    """
    with naming(path, ArtifactError):
        _, leaves, tensors, file_size = _read(path)
        rows, stored = [], 0
        for i, leaf in enumerate(leaves):
            parts = _parts(tensors, i)
            size = sum(part.nbytes for part in parts.values())
            stored += size
            values = {"each": "", "constant": "one ", "two": "two ", "scaled": "scaled "}[leaf.values]
            share = "dense" if leaf.positions == "dense" else f"{leaf.kept / leaf.size:.2%}" if leaf.size else "-"
            encoding = f"{leaf.positions}, {values}{parts['values'].dtype.name}"
            rows.append(
                (printable(leaf.name), "x".join(map(str, leaf.shape)) or "scalar", share, encoding, f"{size:,}")
            )
    rows.sort(key=lambda row: natural_order(row[0]))
    size, kept = sum(leaf.size for leaf in leaves), sum(leaf.kept for leaf in leaves)
    dense = sum(leaf.nbytes for leaf in leaves)
    totals = (
        ("header", "", "", "", f"{file_size - stored:,}"),
        ("all", f"{size:,}", f"{kept / size:.2%}" if size else "-", "", f"{file_size:,}"),
    )
    table = Table(("leaf", "shape", "density", "encoding", "bytes"), tuple(rows), totals, left=(0, 1, 3))
    share = f", {file_size / dense:.2%} of it" if dense else ""
    return f"{table.text()}\ndense: {dense:,} bytes{share}"


def _kept(tree: Any, masks: Any) -> list[np.ndarray | None]:
    """The mask of every leaf, None for dense ones."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if masks is None:
        matrices = default_choice(tree)
        found = [bit_view(leaf) != 0 if matrices[path_name(path)] else None for path, leaf in leaves]
        return [None if mask is None or mask.all() else mask for mask in found]
    checked = jax.tree.leaves(validate_masks(plain_nodes(masks, "masks"), tree), is_leaf=is_masked_node)
    found = [None if is_masked_node(mask) else np.asarray(mask) for mask in checked]
    for (path, leaf), mask in zip(leaves, found, strict=True):
        if mask is not None and (outside := np.count_nonzero(leaf[~mask])):
            raise ValueError(
                f"{printable(path_name(path))} has {outside} weights that are not 0 where its mask is False: save "
                "jaxsparse.apply_masks(params, masks). (Masks of gates change with every step: save eval_params alone.)"
            )
    return found


def _encode(name: str, leaf: np.ndarray, mask: np.ndarray | None, dtype: str | None) -> tuple[_Leaf, dict]:
    parts = {}
    if mask is None:
        positions, low_bits, survivors = "dense", 0, leaf.ravel()
    else:
        positions, low_bits, parts["positions"] = encode_positions(mask.ravel())
        survivors = leaf[mask]
    with naming(name, ValueError):
        values, of_values = encode_values(survivors, dtype, sparse=mask is not None)
    return _Leaf(name, leaf.shape, leaf.dtype.name, survivors.size, positions, low_bits, values), parts | of_values


def _decode(leaf: _Leaf, parts: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The leaf and its mask."""
    with naming(leaf.name, ValueError):
        values = decode_values(parts, leaf.values, leaf.kept, leaf.dtype)
        if leaf.positions == "dense":
            return np.broadcast_to(values, leaf.size).reshape(leaf.shape).copy(), np.array(True)
        mask = decode_positions(parts["positions"], leaf.positions, leaf.size, leaf.kept, leaf.low_bits)
    array = np.zeros(leaf.size, leaf.dtype)
    array[mask] = values
    return array.reshape(leaf.shape), mask.reshape(leaf.shape)


def _read(path: str | os.PathLike) -> tuple[Any, list[_Leaf], dict[str, np.ndarray], int]:
    """Tree (of the leaves' indices), leaves, tensors and size of a file.

    What they say is checked, as far as that needs no decoding.
    """
    found, metadata, size = read_safetensors(path)
    if metadata.get("format") != _FORMAT:
        raise ValueError("a safetensors file, but none of save_sparse; jaxsparse.formats.load_dense reads dense ones")
    if (version := metadata.get("version")) != _VERSION:
        raise ValueError(f"of version {version!r} of the format, this jaxsparse knows {_VERSION!r}: update jaxsparse")
    require(set(metadata) == {"format", "version", "sha256", "model"}, "its metadata have the wrong keys")
    require(_sha256(metadata["model"].encode()) == metadata["sha256"], "the checksum of its header is wrong")
    model = json.loads(metadata["model"], object_pairs_hook=_object)
    require(type(model) is dict and set(model) == {"tree", "leaves", "tensors"}, "its model has the wrong keys")
    require(type(model["leaves"]) is list and type(model["tensors"]) is dict, "its model has the wrong types")
    leaves = [_checked_leaf(leaf) for leaf in model["leaves"]]
    tree = _from_json(model["tree"])
    order = jax.tree.leaves(tree)
    require(sorted(order) == list(range(len(leaves))), "its tree does not have every leaf once")
    require([leaves[i].name for i in order] == leaf_paths(tree), "its leaves do not have the names that its tree gives")
    needed = {f"{i}/{part}" for i, leaf in enumerate(leaves) for part in leaf.parts()}
    require(needed == set(found) == set(model["tensors"]), "it lacks tensors, or has others than its leaves need")
    tensors = {}
    for name, tensor in found.items():
        dtype, shape = tensor["dtype"], list(tensor["shape"])
        intact = model["tensors"][name] == [dtype, shape, _sha256(tensor["data"])]
        of = printable(leaves[int(name.partition("/")[0])].name)
        require(intact, f"the tensor {name!r}, of {of}, is damaged: its checksum is wrong")
        require(dtype in DTYPES and len(shape) == 1, f"the tensor {name!r} is no vector of a known dtype")
        tensors[name] = np.frombuffer(tensor["data"], DTYPES[dtype])
    for i, leaf in enumerate(leaves):
        with naming(leaf.name, ValueError):
            _check_parts(leaf, _parts(tensors, i))
    return tree, leaves, tensors, size


def _checked_leaf(about: Any) -> _Leaf:
    require(type(about) is dict and set(about) == set(_Leaf._fields), "a leaf has the wrong keys")
    leaf = _Leaf(**about)
    require(type(leaf.name) is str, "the name of a leaf is no string")
    with naming(leaf.name, ValueError):
        for value, known in ((leaf.dtype, _CODES), (leaf.positions, _POSITIONS), (leaf.values, _VALUES)):
            require(type(value) is str and value in known, f"expected one of {', '.join(known)}, got {value!r}")
        require(type(leaf.shape) is list and len(leaf.shape) <= _MOST_AXES, "its shape is no list, or too long")
        require(all(type(n) is int and 0 <= n < 1 << 63 for n in leaf.shape), "its shape is not of sizes")
        leaf = leaf._replace(shape=tuple(leaf.shape))
        bytes_without_zeros = math.prod(n for n in leaf.shape if n) * np.dtype(leaf.dtype).itemsize
        require(bytes_without_zeros < 1 << 63, "its shape is too large")  # as NumPy counts, which must not overflow
        least = leaf.size if leaf.positions == "dense" else 0
        require(type(leaf.kept) is int and least <= leaf.kept <= leaf.size, f"it cannot keep {leaf.kept!r} weights")
        most = most_low_bits(leaf.size, leaf.kept) if leaf.positions == "gaps" else 0
        require(type(leaf.low_bits) is int and 0 <= leaf.low_bits <= most, f"low_bits cannot be {leaf.low_bits!r}")
    return leaf


def _check_parts(leaf: _Leaf, parts: Mapping[str, np.ndarray]) -> None:
    """Dtypes and lengths of the tensors of a leaf."""
    stored, is_float = parts["values"].dtype, leaf.dtype in FLOATS
    if leaf.values == "scaled":
        fits = is_float and stored == np.int8
    else:
        smaller = is_float and stored.name in FLOATS and stored.itemsize < np.dtype(leaf.dtype).itemsize
        fits = (stored.name == leaf.dtype or smaller) and (is_float or leaf.values != "two")
    require(fits, f"its values are {leaf.dtype}, and cannot be stored as {leaf.values!r} of {stored}")
    lengths = {
        "positions": in_bytes(leaf.size) if leaf.positions == "mask" else None,  # of gaps it is found by decoding
        "values": {"constant": 1, "two": 2}.get(leaf.values, leaf.kept),
        "signs": in_bytes(leaf.kept),
        "scale": 1,
    }
    for part, array in parts.items():
        dtype = {"values": stored, "scale": np.float32}.get(part, np.uint8)
        fits = array.dtype == dtype and lengths[part] in (None, array.size)
        require(fits, f"its {part} cannot be {array.size} {array.dtype}")


def _as_json(tree: Any) -> Any:
    if isinstance(tree, list | tuple):
        return [type(tree).__name__, *map(_as_json, tree)]
    if not isinstance(tree, dict):
        return tree
    items = [(key, _as_json(value)) for key, value in tree.items()]
    return dict(items) if all(isinstance(key, str) for key in tree) else ["dict", *items]


def _from_json(node: Any) -> Any:
    if type(node) is dict:
        return {key: _from_json(value) for key, value in node.items()}
    if type(node) is list:
        require(node and node[0] in ("list", "tuple", "dict"), "a node of its tree is neither list, tuple nor dict")
        if node[0] != "dict":
            return (list if node[0] == "list" else tuple)(map(_from_json, node[1:]))
        items = node[1:]
        pairs = all(type(item) is list and len(item) == 2 and type(item[0]) is int for item in items)
        require(items and pairs, "a dict of its tree does not have ints as keys")
        return {key: _from_json(value) for key, value in _object(items).items()}
    require(node is None or type(node) is int, f"its tree has a leaf {node!r}")
    return node


def _parts(tensors: Mapping[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    names = {part: f"{i}/{part}" for part in ("positions", "values", "signs", "scale")}
    return {part: tensors[name] for part, name in names.items() if name in tensors}


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _object(pairs: list[Any]) -> dict[Any, Any]:
    require(len(dict(pairs)) == len(pairs), "a key is there twice")
    return dict(pairs)
