"""Conversions of sparse models: JAX's BCOO and BCSR, SciPy's CSR, dense arrays of a constant fan-in, and other files.

In memory, sparse leaves become sparse matrices and dense ones stay as they are; :func:`from_sparse` converts all of
them back, including the zeros that a mask keeps. The files have dense arrays; :mod:`jaxsparse.artifacts` writes small
ones. :func:`from_hf` and :func:`to_hf` read and write transformers in Hugging Face's format.
"""

import math
import os
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.artifacts.fan_in import FanIn, fan_in_of
from jaxsparse.artifacts.files import (
    DTYPES,
    ArtifactError,
    in_tree_of,
    naming,
    plain_nodes,
    plain_tree,
    read_safetensors,
    replacing,
    safetensors_package,
)
from jaxsparse.artifacts.hugging_face import from_hf, to_hf
from jaxsparse.masks import validate_masks
from jaxsparse.trees import by_path, is_masked_node, leaf_paths, listed, path_name
from jaxsparse.user_warnings import warn

__all__ = [
    "FanIn", "from_hf", "from_sparse", "load_dense", "load_npz", "save_dense", "save_npz", "to_bcoo", "to_bcsr",
    "to_fan_in", "to_hf", "to_scipy",
]  # fmt: skip


def to_bcoo(params: Any, masks: Any) -> Any:
    """Convert sparse leaves to :class:`jax.experimental.sparse.BCOO` of the same shape.

    Args:
      params: a pytree of arrays.
      masks: a pytree like ``params``: bool arrays, the scalar True for dense leaves.

    Returns:
      A pytree like ``params``. All weights that a mask keeps are stored, including zeros; dense leaves are unchanged.

    Raises:
      ValueError: for masks that do not fit, naming the leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[0.0, 2.0], [0.0, 0.0]])}
      >>> sparse = to_bcoo(params, {"kernel": jnp.array([[True, True], [False, False]])})["kernel"]
      >>> sparse.nse, (sparse @ jnp.ones(2)).tolist()
      (2, [2.0, 0.0])
    """
    from jax.experimental import sparse  # slow to import

    def convert(leaf, mask):
        indices = np.argwhere(mask).astype(np.int32)
        pair = jnp.asarray(leaf[mask]), jnp.asarray(indices)
        return sparse.BCOO(pair, shape=leaf.shape, indices_sorted=True, unique_indices=True)

    return _converted(params, masks, convert)


def to_bcsr(params: Any, masks: Any) -> Any:
    """Convert sparse leaves to matrices, :class:`jax.experimental.sparse.BCSR`.

    A leaf that does not have two axes is reshaped to (product of all sizes but the last, last size).

    Args:
      params: a pytree of arrays.
      masks: a pytree like ``params``: bool arrays, the scalar True for dense leaves.

    Returns:
      A pytree like ``params``. All weights that a mask keeps are stored, including zeros; dense leaves are unchanged.

    Raises:
      ValueError: for masks that do not fit, naming the leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"conv": jnp.arange(18.0).reshape(3, 3, 1, 2)}
      >>> sparse = to_bcsr(params, {"conv": params["conv"] > 10})["conv"]
      >>> sparse.shape, sparse.nse
      ((9, 2), 7)
    """
    from jax.experimental import sparse

    def convert(leaf, mask):
        matrix, data, columns, starts = _rows(leaf, mask)
        parts = tuple(map(jnp.asarray, (data, columns, starts)))
        return sparse.BCSR(parts, shape=matrix, indices_sorted=True, unique_indices=True)

    return _converted(params, masks, convert)


def to_fan_in(params: Any, masks: Any) -> Any:
    """Convert sparse leaves of constant fan-in to :class:`FanIn`: of every output that is left, as many weights.

    :func:`jaxsparse.srigl` trains such leaves. The last axis is outputs and all others are inputs, as in the kernels of
    Flax; transpose a leaf that has them otherwise, and give the layers of a stack one by one.

    Args:
      params: a pytree of arrays.
      masks: a pytree like ``params``: bool arrays, the scalar True for dense leaves.

    Returns:
      A pytree like ``params``. All weights that a mask keeps are stored, including zeros; dense leaves are unchanged.

    Raises:
      ValueError: for masks that do not fit, or whose outputs do not keep equally many weights or none, naming the leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[1.0, 0.0, 3.0], [2.0, 0.0, 0.0], [0.0, 0.0, 4.0]])}
      >>> matrix = to_fan_in(params, {"kernel": params["kernel"] != 0})["kernel"]
      >>> matrix.indices.tolist(), matrix.values.tolist(), matrix.outputs.tolist()
      ([[0, 0], [1, 2]], [[1.0, 3.0], [2.0, 4.0]], [0, 2])
      >>> (jnp.ones(3) @ matrix).tolist()
      [3.0, 0.0, 7.0]
    """
    paths = iter(by_path(validate_masks(masks, params)))  # of the sparse leaves

    def convert(leaf, mask):
        with naming(next(paths), ValueError):
            return fan_in_of(leaf.reshape(_matrix(leaf.shape)), mask.reshape(_matrix(leaf.shape)))

    return _converted(params, masks, convert)


def to_scipy(params: Any, masks: Any) -> Any:
    """Convert sparse leaves to matrices, :class:`scipy.sparse.csr_array`, with the rows and columns of :func:`to_bcsr`.

    Args:
      params: a pytree of arrays.
      masks: a pytree like ``params``: bool arrays, the scalar True for dense leaves.

    Returns:
      A pytree like ``params``. All weights that a mask keeps are stored, including zeros; dense leaves are unchanged.
      bfloat16 and float16, with which SciPy does not compute, become float32.

    Raises:
      ValueError: for masks that do not fit, naming the leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> sparse = to_scipy({"kernel": jnp.eye(3)}, {"kernel": jnp.eye(3, dtype=bool)})["kernel"]
      >>> sparse.nnz, sparse.sum()
      (3, np.float32(3.0))
    """
    import scipy.sparse

    def convert(leaf, mask):
        matrix, data, columns, starts = _rows(leaf, mask)
        small = data.dtype.name in ("bfloat16", "float16")
        return scipy.sparse.csr_array((data.astype(np.float32) if small else data, columns, starts), shape=matrix)

    return _converted(params, masks, convert, of_jax=False)


def from_sparse(tree: Any, like: Any) -> tuple[Any, Any]:
    """Convert the result of :func:`to_bcoo`, :func:`to_bcsr`, :func:`to_fan_in` or :func:`to_scipy` back.

    Args:
      tree: a pytree like ``like`` whose leaves may be BCOO, BCSR, :class:`FanIn` or sparse arrays of SciPy.
      like: the params, or their shapes and dtypes (``jax.eval_shape``).

    Returns:
      The params and the masks, as NumPy arrays with the dtypes of ``like``. Masks are True for all stored entries, zero
      or not, and the scalar True for dense leaves.

    Raises:
      ValueError: for leaves that do not fit the shapes, store an entry twice, or have indices below 0, naming
        them.

    Examples:
      >>> import jax.numpy as jnp
      >>> params, masks = {"kernel": jnp.eye(2)}, {"kernel": jnp.array([[True, True], [False, True]])}
      >>> params, masks = from_sparse(to_bcsr(params, masks), params)
      >>> params["kernel"].tolist(), masks["kernel"].tolist()
      ([[1.0, 0.0], [0.0, 1.0]], [[True, True], [False, True]])
    """
    shapes, treedef = jax.tree_util.tree_flatten_with_path(like)
    pairs = []
    for (path, leaf), value in zip(shapes, treedef.flatten_up_to(tree), strict=True):
        shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
        with naming(path_name(path), ValueError):
            stored = _stored(value)
        expected = {shape} if stored is None else {shape, _matrix(shape)}
        if tuple(value.shape) not in expected:
            raise ValueError(f"{path_name(path)}: expected shape {shape}, got {tuple(value.shape)}")
        if stored is None:
            pairs.append((np.array(value, dtype), np.array(True)))
            continue
        data, indices = stored
        if any((np.asarray(index) < 0).any() for index in indices):
            raise ValueError(f"{path_name(path)}: an index is below 0")
        inside = np.all(
            [index < n for index, n in zip(indices, value.shape, strict=True)], axis=0
        )  # JAX pads with indices outside
        where = np.ravel_multi_index([index[inside] for index in indices], value.shape)
        array, mask = np.zeros(math.prod(shape), dtype), np.zeros(math.prod(shape), bool)
        array[where], mask[where] = np.asarray(data)[inside], True
        if np.count_nonzero(mask) < where.size:
            raise ValueError(f"{path_name(path)}: an entry is stored twice; call its sum_duplicates() first")
        pairs.append((array.reshape(shape), mask.reshape(shape)))
    return treedef.unflatten([array for array, _ in pairs]), treedef.unflatten([mask for _, mask in pairs])


def save_dense(path: str | os.PathLike, params: Any) -> None:
    """Write an ordinary safetensors file, with every leaf under its path, such as "fc1/kernel".

    Args:
      path: the file; an existing one is replaced, once the new one is complete.
      params: as for :func:`jaxsparse.artifacts.save_sparse`. No two leaves may have the same path, and no leaf may have
        a path that leads to other leaves.

    Raises:
      ValueError: for params that cannot be stored, naming the leaf.
      OSError: if the file cannot be written.
      ImportError: without the package safetensors.

    Examples:
      >>> import tempfile, numpy as np
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_dense(f"{folder}/model.safetensors", {"fc1": {"bias": np.float32([1, 2])}})
      ...     load_dense(f"{folder}/model.safetensors")
      {'fc1': {'bias': array([1., 2.], dtype=float32)}}
    """
    package, named = safetensors_package(), _named(params)
    if "__metadata__" in named:
        raise ValueError("the params have '__metadata__', which safetensors keeps for its own use: rename the key")
    data = package.save({name: np.ascontiguousarray(leaf).reshape(leaf.shape) for name, leaf in named.items()})
    with replacing(path) as file:
        file.write(data)


def load_dense(path: str | os.PathLike, *, like: Any = None) -> Any:
    """Read an ordinary safetensors file as NumPy arrays.

    Args:
      path: the file.
      like: a pytree of the model's params, or of their shapes: the arrays are returned in its nodes, matched by path.
        With None they are in nested dicts, one for each part of a path between "/", with strings as keys. Then a key of
        Haiku such as "mlp/~/linear_0" becomes several dicts, and lists and tuples become dicts keyed by index.

    Raises:
      ArtifactError: if the file is damaged, not a safetensors file, or one written by ``save_sparse``.
      ValueError: if its leaves are not those of ``like``, or have other shapes, naming them.
      OSError: if it cannot be read.
      ImportError: without the package safetensors.
    """
    with naming(path, ArtifactError):
        found, metadata, _ = read_safetensors(path)
        if metadata.get("format") == "jaxsparse":
            raise ValueError("a sparse model: read it with jaxsparse.artifacts.load_sparse")
        if unknown := sorted({tensor["dtype"] for tensor in found.values()} - set(DTYPES)):
            raise ValueError(f"it has tensors of {', '.join(unknown)}, which NumPy lacks")
        tree = _nested({
            name: np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
            for name, tensor in sorted(found.items())
        })  # fmt: skip
    if like is None:
        return tree
    with naming(path, ValueError):
        return in_tree_of(like, tree)


def save_npz(path: str | os.PathLike, params: Any, masks: Any = None) -> None:
    """Write a file for ``numpy.load``: every leaf under its path, and its mask, one bit per weight, under "masks/PATH".

    Args:
      path: the file; an existing one is replaced, once the new one is complete.
      params: as for :func:`save_dense`, without a key "masks" at the top. bfloat16 becomes float32, because these files
        do not have it.
      masks: like ``params``: bool arrays, the scalar True for dense leaves. None stores no masks.

    Raises:
      ValueError: for params or masks that cannot be stored, naming the leaf.
      OSError: if the file cannot be written.

    Examples:
      >>> import tempfile, numpy as np
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_npz(f"{folder}/model.npz", {"w": np.eye(2)}, {"w": np.eye(2, dtype=bool)})
      ...     load_npz(f"{folder}/model.npz")
      ({'w': array([[1., 0.],
             [0., 1.]])}, {'w': array([[ True, False],
             [False,  True]])})
    """
    named = _named(params)
    if suffixed := [name for name in named if name.endswith(".npy")]:
        raise ValueError(f"the params have {suffixed[0]!r}, but NumPy uses the suffix .npy itself: rename the key")
    if taken := [name for name in named if name.split("/")[0] == "masks"]:
        raise ValueError(f"the params have {taken[0]!r}, but masks are stored under this name: rename the key")
    if cut := [name for name in named if zipfile.ZipInfo(name).filename != name]:
        raise ValueError(f"the params have {cut[0]!r}, which is not a valid file name in an archive: rename the key")
    arrays = {name: leaf.astype(np.float32) if leaf.dtype.name == "bfloat16" else leaf for name, leaf in named.items()}
    if masks is not None:
        plain = plain_nodes(masks, "masks")
        checked = jax.tree.leaves(validate_masks(plain, plain_tree(params)), is_leaf=is_masked_node)
        arrays |= {
            f"masks/{name}": np.packbits(np.asarray(mask))
            for name, mask in zip(named, checked, strict=True)
            if not is_masked_node(mask)
        }
    # Instead of numpy.savez, which cannot store a leaf called "file" and writes the time into every file.
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def load_npz(path: str | os.PathLike, *, like: Any = None) -> tuple[Any, Any]:
    """Read params and masks that :func:`save_npz` has written, without pickle.

    Args:
      path: the file.
      like: as for :func:`load_dense`.

    Returns:
      The params as NumPy arrays, as from :func:`load_dense`, and masks like them: bool arrays, and the scalar True for
      leaves that have none.

    Raises:
      ArtifactError: if the file is damaged, or masks do not fit.
      ValueError: if its leaves are not those of ``like``, or have other shapes, naming them.
      OSError: if it cannot be read.
    """
    with naming(path, ArtifactError), open(path, "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                arrays = dict(archive)
        except OSError:
            raise
        except Exception as error:  # of zipfile, its decompressors and NumPy, which each have several
            raise ValueError(f"damaged, or not a file of numpy.savez: {error}") from error
    with naming(path, ArtifactError):
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray) or array.dtype.name not in DTYPES.values():
                raise ValueError(f"{name!r} is not an array of bools or numbers")
        packed = {name.removeprefix("masks/"): arrays.pop(name) for name in list(arrays) if name.startswith("masks/")}
        masks = {name: np.array(True) for name in arrays}
        for name, bits in packed.items():
            leaf = arrays.get(name)
            if leaf is None or bits.dtype != np.uint8 or bits.shape != (-(-leaf.size // 8),):
                raise ValueError(f"the mask of {name} does not fit its weights")
            masks[name] = np.unpackbits(bits, count=leaf.size).view(bool).reshape(leaf.shape)
        tree, masks = _nested(arrays), _nested(masks)
    if like is None:
        return tree, masks
    with naming(path, ValueError):
        return in_tree_of(like, tree), in_tree_of(like, masks, check=False)


def _converted(params: Any, masks: Any, convert: Callable[[np.ndarray, np.ndarray], Any], of_jax: bool = True) -> Any:
    leaves, treedef = jax.tree.flatten(params)
    checked = treedef.flatten_up_to(validate_masks(masks, params))
    rows = zip(leaf_paths(params), leaves, checked, strict=True)
    sparse = {name: leaf.dtype for name, leaf, mask in rows if not is_masked_node(mask)}
    wide = [name for name, dtype in sparse.items() if jax.dtypes.canonicalize_dtype(dtype) != dtype]
    if wide and of_jax:
        warn(
            f"{listed(wide)} of 64 bits lose a half of them as arrays of JAX: convert inside jax.enable_x64(True), or "
            "by to_scipy",
        )
    return treedef.unflatten([
        leaf if is_masked_node(mask) else convert(np.asarray(leaf), np.asarray(mask))
        for leaf, mask in zip(leaves, checked, strict=True)
    ])  # fmt: skip


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def _rows(leaf: np.ndarray, mask: np.ndarray) -> tuple[tuple[int, int], np.ndarray, np.ndarray, np.ndarray]:
    """A leaf as a matrix: its shape, its survivors, their columns, and where each row starts."""
    mask = mask.reshape(matrix := _matrix(leaf.shape))
    starts = np.concatenate([[0], np.cumsum(mask.sum(1))]).astype(np.int32)
    return matrix, leaf.reshape(matrix)[mask], np.nonzero(mask)[1].astype(np.int32), starts


def _stored(value: Any) -> tuple[Any, list[np.ndarray]] | None:
    """The stored entries of a sparse array and their indices along each axis; None if it is dense."""
    if isinstance(value, FanIn):
        value.check()
        outputs = np.broadcast_to(value.outputs, value.indices.shape)
        return np.ravel(value.values), [np.ravel(value.indices), np.ravel(outputs)]
    if hasattr(value, "tocoo"):
        coo = value.tocoo()
        return coo.data, [coo.row, coo.col]
    if not hasattr(value, "nse"):
        return None
    if hasattr(value, "to_bcoo"):
        value = value.to_bcoo()
    if value.n_batch or value.n_dense:
        raise ValueError("sparse arrays with batch or dense axes are not supported")
    return value.data, list(np.asarray(value.indices).T)


def _named(params: Any) -> dict[str, np.ndarray]:
    """The leaves by their paths, which have to identify them."""
    tree = plain_tree(params)
    names, named = leaf_paths(tree), {}
    above = {name[:i]: name for name in names for i, character in enumerate(name) if character == "/"}
    for name, leaf in zip(names, jax.tree.leaves(tree), strict=True):
        if not all(name.split("/")):
            raise ValueError(f"the array of shape {leaf.shape} at {name!r} needs keys that are not empty")
        if name in named:
            raise ValueError(f"two leaves of the params have the path {name!r}: rename a key")
        if name in above:
            raise ValueError(f"the params have {name!r} and, below it, {above[name]!r}: rename a key")
        named[name] = leaf
    return named


def _nested(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, last = name.split("/")
        node = tree
        for key in folders:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name!r} is below another array")
        if last in node:
            raise ValueError(f"{name!r} appears twice, or is above other arrays")
        node[last] = array
    return tree
