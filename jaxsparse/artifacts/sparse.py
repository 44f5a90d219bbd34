"""Save, load and describe sparse models, each in one file."""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxsparse.artifacts.contents import FORMAT, VERSION, Leaf, as_json, checksum, joined, read_contents
from jaxsparse.artifacts.encodings import (
    SMALLER,
    bit_view,
    decode_fan_in,
    decode_positions,
    decode_values,
    encode_fan_in,
    encode_positions,
    encode_values,
    require,
)
from jaxsparse.artifacts.files import (
    ArtifactError,
    in_tree_of,
    naming,
    plain_nodes,
    plain_tree,
    printable,
    replacing,
    safetensors_package,
)
from jaxsparse.artifacts.n_of_m import decode_n_of_m, encode_n_of_m, in_groups, leaf_units, order_of_axes
from jaxsparse.layouts import LayoutLike
from jaxsparse.masks import validate_masks, warn_of_empty
from jaxsparse.prunable import default_choice
from jaxsparse.structures import StructureLike, n_of_m
from jaxsparse.tables import Table
from jaxsparse.trees import is_masked_node, leaf_paths, natural_order, path_name

__all__ = ["describe", "load_sparse", "save_sparse"]

_IN_HEADER = {"fan_in": 20, "n_of_m": 34}  # bytes that such a leaf takes more in the header
_AT_LEAST, _TIMES_THE_FILE = 1 << 24, 4096  # the default limit of a file's size in memory


def save_sparse(
    path: str | os.PathLike,
    params: Any,
    masks: Any = None,
    *,
    init: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    structure: StructureLike | None = None,
    layout: LayoutLike = None,
) -> None:
    """Write a sparse model to a file: the positions and values of all weights that are not pruned.

    The file appears whole or not at all. Equal models give equal files. Masks that keep 2 of every 4 weights along the
    inputs are found, and their leaves stored in the order that sparse matrix hardware takes.

    Args:
      path: the file; an existing one is replaced.
      params: dicts (with strings or ints as keys), lists, tuples and None, with arrays of bool, int or float dtypes as
        leaves. Other nodes (flax.nnx.State, FrozenDict, NamedTuples, dataclasses, Equinox modules) are stored as dicts
        with the names of their parts as keys, and ``load_sparse(path, like=params)`` restores them.
      masks: like ``params``: bool arrays, the scalar True for dense leaves. With None, the weights that are not +0
        survive in every leaf with two or more axes that is not a bias or scale; leaves without zeros are dense.
      init: the result of :func:`jaxsparse.centroids`, to store ``jaxsparse.amenable_init(params, masks, init)`` instead
        of the params.
      dtype: the dtype of the stored values. None keeps theirs; "float32", "bfloat16" or "float16" rounds larger floats
        to it; "int8" quantises the weights of sparse leaves, with one scale per leaf, max|w| / 127, and keeps the dtype
        of the other leaves. A leaf with a single value, or with one negative and one positive value, always takes one
        or two numbers.
      structure: :class:`jaxsparse.n_of_m`, or a mapping from paths to it, for leaves to be stored so although some
        groups keep fewer than n weights, as where ``masks`` is None and a weight that stayed is 0. The others stay
        "weight". None: leaves whose masks keep exactly 2 of every 4 along the inputs are stored so, and n of every 4,
        8, 16 or 32 where that is smallest.
      layout: pattern -> :class:`jaxsparse.Layout`, for leaves whose inputs are not found by their names and shapes.

    Warns:
      UserWarning: where ``masks`` is None, for leaves that are all zeros: their masks keep nothing.

    Raises:
      ValueError: for params, masks or options that cannot be stored, naming the leaf, before anything is written.
      OSError: if the file cannot be written; an existing file stays as it was.
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
    kept = _kept(tree, masks, layout)
    if init is not None:
        from jaxsparse.methods.amenable import amenable_init  # methods import this package's layer, not the reverse

        bools = treedef.unflatten([np.array(True) if mask is None else mask for mask in kept])
        tree = plain_tree(amenable_init(tree, bools, init))
    units = leaf_units(tree, kept, structure, layout)
    leaves, parts = [], []
    for name, leaf, mask in zip(names, jax.tree.leaves(tree), kept, strict=True):
        with naming(name, ValueError):
            about, arrays = _encode(name, leaf, mask, dtype, units.get(name), asked=structure is not None)
        leaves.append(about)
        parts.append(arrays)
    tensors = joined(leaves, parts)
    model = {"tree": as_json(treedef.unflatten(range(len(leaves)))), "leaves": [leaf.as_json() for leaf in leaves]}
    text = json.dumps(model, separators=(",", ":"))
    stamp = checksum(text, {name: tensor.view(np.uint8) for name, tensor in tensors.items()})
    metadata = {"format": FORMAT, "version": VERSION, "sha256": stamp, "model": text}
    data = memoryview(package.save(tensors, metadata))
    # The package writes the metadata in a random order: restore that above, so that equal models give equal files.
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:end])) | {"__metadata__": metadata}
    with replacing(path) as file:
        file.write(data[:8])
        file.write(json.dumps(header, separators=(",", ":")).encode().ljust(end - 8))
        file.write(data[end:])


def load_sparse(path: str | os.PathLike, *, like: Any = None, max_bytes: int | None = None) -> tuple[Any, Any]:
    """Read a sparse model that :func:`save_sparse` has written.

    Everything is checked before it is used, and nothing in the file is executed.

    Args:
      path: the file.
      like: a pytree of the model's params, or of their shapes (``jax.eval_shape``). Params and masks are returned in
        its nodes, matched by path, with the dtypes that were saved. With None they are in dicts, lists and tuples.
      max_bytes: the most memory that params and masks may take together. The default is 16 MiB, or 4096 times the size
        of the file if that is more: a file of a few bytes can describe arrays of any size.

    Returns:
      The params and the masks, as NumPy arrays, which all functions of JAX take and which are on no device yet. Params
      have the dtypes that they had, also where ``dtype=`` stored less, including float64, and bfloat16 as ml_dtypes
      defines it. Masks are bool arrays,
      and the scalar True for dense leaves. Pruned weights are +0.

    Raises:
      ArtifactError: if the file is damaged, not written by :func:`save_sparse`, of another version, or too large.
      ValueError: if its leaves are not those of ``like``, or have other shapes, naming them.
      OSError: if the file cannot be read.
      ImportError: without the package safetensors.

    Examples:
      >>> import tempfile, numpy as np
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_sparse(f"{folder}/model", [np.float64([[0, 0.1]])])
      ...     load_sparse(f"{folder}/model")
      ([array([[0. , 0.1]])], [array([[False,  True]])])
    """
    with naming(path, ArtifactError):
        tree, leaves, parts, file_size = read_contents(path)
        limit = max(_AT_LEAST, _TIMES_THE_FILE * file_size) if max_bytes is None else max_bytes
        needed = sum(leaf.nbytes + (leaf.size if leaf.positions != "dense" else 0) for leaf in leaves)
        if needed > limit:
            raise ValueError(
                f"this file of {file_size:,} bytes would take {needed:,} in memory, more than max_bytes={limit:,}; "
                f"if you trust it, use load_sparse(path, max_bytes={needed})"
            )
        loaded = [_decode(leaf, arrays) for leaf, arrays in zip(leaves, parts, strict=True)]
        params, masks = (jax.tree.map(lambda i, which=which: loaded[i][which], tree) for which in (0, 1))
    if like is None:
        return params, masks
    with naming(path, ValueError):
        return in_tree_of(like, params), in_tree_of(like, masks, check=False)


def describe(path: str | os.PathLike) -> str:
    """A table of a file's leaves, with the density, the encoding and the size in bytes of each.

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
      header                                          424
      all     10,100     1.98%                        532
      dense: 40,400 bytes, 1.32% of it
    """
    with naming(path, ArtifactError):
        _, leaves, parts, file_size = read_contents(path)
        rows, stored = [], 0
        for leaf, arrays in zip(leaves, parts, strict=True):
            size = sum(array.nbytes for array in arrays.values())
            stored += size
            values = {"each": "", "constant": "one ", "two": "two ", "scaled": "scaled "}[leaf.values]
            share = "dense" if leaf.positions == "dense" else f"{leaf.kept / leaf.size:.2%}" if leaf.size else "-"
            positions = leaf.positions if leaf.n_of_m is None else "{}:{}".format(*leaf.n_of_m)
            encoding = f"{positions}, {values}{arrays['values'].dtype.name}"
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


def _kept(tree: Any, masks: Any, layout: LayoutLike) -> list[np.ndarray | None]:
    """The mask of every leaf, None for dense ones."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if masks is None:
        matrices = default_choice(tree, layout)
        found = [bit_view(leaf) != 0 if matrices[path_name(path)] else None for path, leaf in leaves]
        by_name = {path_name(path): mask for (path, _), mask in zip(leaves, found, strict=True) if mask is not None}
        warn_of_empty(by_name, "Give masks= for a model to train on with leaves that only start at zero")
        return [None if mask is None or mask.all() else mask for mask in found]
    checked = jax.tree.leaves(validate_masks(plain_nodes(masks, "masks"), tree), is_leaf=is_masked_node)
    found = [None if is_masked_node(mask) else np.asarray(mask) for mask in checked]
    for (path, leaf), mask in zip(leaves, found, strict=True):
        if mask is not None and (outside := np.count_nonzero(leaf[~mask])):
            raise ValueError(
                f"{printable(path_name(path))} has {outside} weights that are not 0 where its mask is False: save "
                "jaxsparse.apply_masks(params, masks). (Masks of gates change at every step: save eval_params alone.)"
            )
    return found


def _encode(
    name: str, leaf: np.ndarray, mask: np.ndarray | None, dtype: str | None, unit: n_of_m | None, asked: bool
) -> tuple[Leaf, dict]:
    parts: dict[str, np.ndarray] = {}
    own: dict[str, Any] = {}  # the fields that this encoding of positions has alone
    if mask is None:
        positions, low_bits, survivors = "dense", 0, leaf.ravel()
    else:
        positions, low_bits, parts["positions"] = encode_positions(mask.ravel())
        survivors = leaf[mask]
        fan_in = encode_fan_in(mask)
        if fan_in is not None and fan_in[2].size + _IN_HEADER["fan_in"] < parts["positions"].size:
            positions, (inputs, low_bits, parts["positions"]) = "fan_in", fan_in
            outputs = np.moveaxis(leaf, range(*inputs), range(inputs[0] - inputs[1], 0))
            survivors = outputs[np.moveaxis(mask, range(*inputs), range(inputs[0] - inputs[1], 0))]
            own = {"inputs": inputs}
    kept = survivors.size
    if mask is not None and unit is not None and leaf.size:
        axes, _ = order_of_axes(unit, leaf.ndim)
        packed, where, live = encode_n_of_m(mask, unit.n, unit.m, axes)
        asked |= (unit.n, unit.m) == (2, 4)  # as large as a bit a weight
        if asked or packed.size + _IN_HEADER["n_of_m"] < parts["positions"].size:
            positions, low_bits, parts["positions"] = "n_of_m", 0, packed
            survivors = np.take_along_axis(in_groups(leaf, unit.m, axes), where, axis=1)
            survivors = np.where(live, survivors, np.zeros((), leaf.dtype)).ravel()
            own = {"n_of_m": (unit.n, unit.m), "axes": axes}
    values, of_values = encode_values(survivors, dtype, sparse=mask is not None)
    parts |= of_values
    in_file = parts["values"].dtype.name
    about = Leaf(
        name,
        leaf.shape,
        kept,
        dtype=leaf.dtype.name,
        stored=None if values == "scaled" or in_file == leaf.dtype.name else in_file,
        positions=positions,
        bytes=0 if mask is None else parts["positions"].size,
        low_bits=low_bits,
        values=values,
        **own,
    )
    return about, parts


def _decode(leaf: Leaf, parts: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The leaf and its mask."""
    with naming(leaf.name, ValueError):
        values = decode_values(parts, leaf.values, leaf.slots, leaf.dtype)
        if leaf.positions == "dense":
            return np.broadcast_to(values, leaf.size).reshape(leaf.shape).copy(), np.array(True)
        array, mask = np.zeros(leaf.size, leaf.dtype), np.zeros(leaf.size, bool)
        if leaf.positions == "n_of_m":
            where, live = decode_n_of_m(parts["positions"], leaf.size, leaf.kept, *leaf.n_of_m)
            free = np.broadcast_to(values, live.size)[~live]
            require(not bit_view(free).any(), "a weight that only fills its group is not 0")
            array[where], mask[where] = values, live
            seen, back = [leaf.shape[axis] for axis in leaf.axes], np.argsort(leaf.axes)
            array, mask = (np.ascontiguousarray(flat.reshape(seen).transpose(back)) for flat in (array, mask))
        elif leaf.positions == "fan_in":
            where = decode_fan_in(parts["positions"], leaf.shape, leaf.kept, leaf.inputs, leaf.low_bits)
            array[where], mask[where] = values, True
        else:
            mask = decode_positions(parts["positions"], leaf.positions, leaf.size, leaf.kept, leaf.low_bits)
            array[mask] = values
    return array.reshape(leaf.shape), mask.reshape(leaf.shape)
