"""Atomic file writes, errors that name the file, and conversion of pytrees to plain ones."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from jaxsparse.trees import by_path, is_masked_node, path_name

__all__ = [
    "DTYPES",
    "ArtifactError",
    "filling",
    "in_tree_of",
    "naming",
    "plain_nodes",
    "plain_tree",
    "printable",
    "read_safetensors",
    "replacing",
    "safetensors_package",
]

# Names of safetensors: names of NumPy.
DTYPES = {
    "BOOL": "bool", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "U8": "uint8", "U16": "uint16",
    "U32": "uint32", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip


class ArtifactError(ValueError):
    """A file is damaged, has another format, or has a newer version of it."""


def plain_tree(params: Any, what: str = "params") -> Any:
    """Convert a pytree to dicts, lists, tuples and None, with NumPy arrays as leaves.

    Other nodes (flax.nnx.State, FrozenDict, NamedTuples, dataclasses, Equinox modules) become dicts with the names of
    their parts as keys. A variable of flax.nnx becomes its value.

    Raises:
      ValueError: for keys that are neither all strings nor all ints, and for leaves that are not arrays of the dtypes
        of :data:`DTYPES`, naming them.
    """

    def plain(node, path):
        where = f"the {what} at {'/'.join(path)!r}" if path else f"the {what}"
        if node is None:
            return None
        if type(node) in (list, tuple):
            return type(node)(plain(value, (*path, str(i))) for i, value in enumerate(node))
        if isinstance(node, np.ndarray | np.generic | jax.Array):
            if getattr(node.dtype, "name", "") not in DTYPES.values():
                raise ValueError(f"{where}: expected an array of {', '.join(DTYPES.values())}, got {node.dtype}")
            return np.asarray(node).astype(node.dtype.name, copy=False)  # in this machine's byte order
        parts = node if type(node) is dict else _parts(node)
        if not parts and not isinstance(node, Mapping):
            kind = f"{type(node).__module__}.{type(node).__qualname__}"
            raise ValueError(
                f"{where}: expected a dict, list, tuple, None or array, got {kind}. "
                "For flax.nnx pass nnx.state(model), for Equinox eqx.filter(model, eqx.is_array)"
            )
        if _is_variable(node, parts):
            (value,) = parts.values()
            return plain(value, path)
        kinds = {type(key) for key in parts}
        if not kinds <= {str} and kinds != {int}:
            odd = next(key for key in parts if type(key) is not str)
            raise ValueError(f"{where}: expected keys that are strings, or all of them ints, got {odd!r}")
        return {key: plain(value, (*path, str(key))) for key, value in parts.items()}

    return plain(params, ())


def plain_nodes(tree: Any, what: str = "params") -> Any:
    """Convert the nodes of a pytree as :func:`plain_tree` does, but keep its leaves, of any kind."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_masked_node)
    numbers = plain_tree(treedef.unflatten(map(np.array, range(len(leaves)))), what)
    return jax.tree.map(lambda number: leaves[number], numbers)


def in_tree_of(like: Any, tree: Any, check: bool = True) -> Any:
    """Put the arrays of a plain tree into the tree of ``like``, matched by path.

    Args:
      like: a pytree of arrays, or of their shapes.
      tree: a tree of dicts, lists and tuples.
      check: whether the arrays must have the shapes of ``like``.

    Raises:
      ValueError: for leaves that only one of the two has, or whose shapes differ, naming them.
    """
    leaves, treedef = jax.tree.flatten(like)
    numbered = treedef.unflatten(map(np.array, range(len(leaves))))
    numbers, values = by_path(plain_tree(numbered, "tree of like=")), by_path(tree)
    if only := sorted(set(numbers) ^ set(values)):
        where = "the file" if only[0] in values else "like="
        raise ValueError(f"{only[0]} is in {where} alone")
    found = [None] * len(leaves)
    for path, number in numbers.items():
        value, leaf = values[path], leaves[number]
        if check and np.shape(value) != np.shape(leaf):
            raise ValueError(f"{path} has shape {np.shape(value)}, but {np.shape(leaf)} in like=")
        found[number] = value
    return treedef.unflatten(found)


def _parts(node: Any) -> dict[Any, Any]:
    """The children of a node of any registered type, by key; empty for leaves and for nodes with unnamed parts."""
    children, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
    parts = {}
    for path, child in children:
        if not path or not isinstance(path[0], jax.tree_util.DictKey | jax.tree_util.GetAttrKey):
            return {}
        parts[path[0].key if isinstance(path[0], jax.tree_util.DictKey) else path_name(path)] = child
    return parts


def _is_variable(node: Any, parts: Mapping[Any, Any]) -> bool:
    """Whether a node is a variable of flax.nnx, whose only part is an array."""
    of_nnx = any(base.__module__.startswith("flax.nnx") for base in type(node).__mro__)
    return of_nnx and list(parts) in (["value"], ["raw_value"]) and jax.tree_util.all_leaves(parts.values())


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces ``path`` once it is complete on disk; an error leaves ``path`` unchanged.

    Examples:
      >>> import os, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with replacing(f"{folder}/file") as file:
      ...         _ = file.write(b"all of it")
      ...     os.listdir(folder)
      ['file']
    """
    path = Path(path)
    part = path.with_name(f".{secrets.token_hex(8)}.part")  # a different name for every writer
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError) and error.filename == os.fspath(part):
            raise type(error)(error.errno, error.strerror, os.fspath(path)) from error
        raise
    _sync(path.parent)


@contextlib.contextmanager
def filling(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield a folder to write files to that becomes ``folder`` at the end; an error leaves none behind.

    Raises:
      FileExistsError: if ``folder`` is there and not empty.

    Examples:
      >>> import os, tempfile
      >>> with tempfile.TemporaryDirectory() as parent:
      ...     with filling(f"{parent}/folder") as part:
      ...         _ = (part / "file").write_text("all of it")
      ...     os.listdir(parent), os.listdir(f"{parent}/folder")
      (['folder'], ['file'])
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{printable(os.fspath(folder))} is there already: expected a new or an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{secrets.token_hex(8)}.part")
    part.mkdir()
    try:
        yield part
        _sync(part)
        if folder.exists():
            folder.rmdir()  # empty, or others have filled it meanwhile: an error
        os.replace(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    _sync(folder.parent)


def _sync(folder: Path) -> None:
    """Have the entries of a folder on disk."""
    if os.name == "posix":  # elsewhere folders cannot be opened
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def safetensors_package() -> Any:
    """Import the module ``safetensors.numpy``, which the extra "artifacts" installs."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("safetensors is not installed: pip install safetensors") from error
    return safetensors.numpy


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, dict[str, Any]], dict[str, str], int]:
    """Read a safetensors file: its tensors, each with "dtype", "shape" and "data", its metadata, and its size in bytes.

    Raises:
      ValueError: if the file is damaged, or not a safetensors file.
    """
    safetensors_package()
    import safetensors

    data = Path(path).read_bytes()
    try:
        found = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError as error:
        raise ValueError(f"damaged, or not a safetensors file: {error}") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return found, header.get("__metadata__") or {}, len(data)


@contextlib.contextmanager
def naming(what: str | os.PathLike, kind: type[ValueError]) -> Iterator[None]:
    """Re-raise any ValueError inside the block as a one-line ``kind`` that names ``what``.

    Examples:
      >>> with naming("model.npz", ArtifactError):
      ...     raise ValueError("damaged")
      Traceback (most recent call last):
      jaxsparse.artifacts.files.ArtifactError: model.npz: damaged
    """
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise kind(f"{printable(os.fspath(what))}: {error}") from error


def printable(name: str) -> str:
    """A name in which characters that would disturb a terminal are escaped.

    Examples:
      >>> printable("fc1/kernel"), printable("fc1\\n")
      ('fc1/kernel', "'fc1\\\\n'")
    """
    return name if name.isprintable() else repr(name)
