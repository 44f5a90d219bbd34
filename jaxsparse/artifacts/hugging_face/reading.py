"""Read a checkpoint of Hugging Face's format as a models.GPT and its params."""

import contextlib
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxsparse.artifacts.encodings import finite_cast
from jaxsparse.artifacts.files import DTYPES, ArtifactError, naming, safetensors_package
from jaxsparse.artifacts.hugging_face.families import options_of
from jaxsparse.artifacts.hugging_face.tensors import Names, Tensor, read_object, shapes_of, widest
from jaxsparse.trees import listed

__all__ = ["from_hf"]

_FLOATS = ("BF16", "F16", "F32", "F64")


def from_hf(
    folder: str | os.PathLike, *, dtype: Any = None, max_length: int | None = None, scan: bool = False
) -> tuple[Any, Any]:
    """Read a checkpoint in Hugging Face's format: config.json, and safetensors in one file or several.

    The families are GPT-2, Llama, Mistral and Qwen2. What their config.json can say and :class:`jaxsparse.models.GPT`
    cannot do is refused by name: scaled rotary angles, a sliding window, other activations, quantised weights. Dropout
    is off in the model; ``model.clone(dropout=0.1)`` trains with it.

    Args:
      folder: the folder of the checkpoint, on this machine.
      dtype: of the params, for instance "float32". None keeps those of the file.
      max_length: the most tokens that the model will read, if fewer than the checkpoint's. Up to its window a
        checkpoint with a sliding window is the same as one without. Not for learned positions (GPT-2).
      scan: whether the blocks are stacked, for a model with ``scan=True``.

    Returns:
      The :class:`jaxsparse.models.GPT`, which computes in the dtype of the params, and its params: dicts of NumPy
      arrays, which are on no device yet.

    Raises:
      ArtifactError: for a checkpoint that is damaged, has something that the model cannot do, lacks tensors, has others
        or has them in other shapes, naming them.
      OSError: if a file is missing or cannot be read.
      ImportError: without Flax or the package safetensors.

    Examples:
      >>> import tempfile, jax, jax.numpy as jnp
      >>> from jaxsparse import formats, models
      >>> model = models.GPT(vocab_size=50, width=16, num_layers=2, max_length=8)
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     formats.to_hf(f"{folder}/gpt", model, params)
      ...     again, loaded = formats.from_hf(f"{folder}/gpt", dtype="bfloat16")
      >>> again.num_layers, loaded["block_1"]["attention"]["query"]["kernel"].shape, loaded["norm"]["scale"].dtype
      (2, (16, 4, 4), dtype(bfloat16))
    """
    safetensors_package()
    try:
        from flax.traverse_util import unflatten_dict

        from jaxsparse.models.gpt import GPT
    except ImportError as error:
        raise ImportError("from_hf needs Flax: pip install flax") from error
    known = [DTYPES[code] for code in _FLOATS]
    if dtype is not None:
        try:
            name = np.dtype(dtype).name
        except TypeError:
            name = repr(dtype)
        if name not in known:
            raise ValueError(f"dtype must be None or one of {', '.join(known)}, got {name}")
        dtype = np.dtype(dtype)
    folder = Path(folder)
    with naming(folder / "config.json", ArtifactError):
        config = read_object(folder / "config.json")
        family, options = options_of(config, max_length)
        model = GPT(**options)
    with naming(folder, ArtifactError), contextlib.ExitStack() as stack:
        stored = _stored(folder, family.names, stack)
        if model.num_layers > len(stored):  # before anything is made for each of them
            raise ValueError(f"config.json says {model.num_layers} blocks, but there are {len(stored)} tensors")
        with naming("config.json", ValueError):
            shapes = shapes_of(model)
        tensors = family.names.tensors(shapes, model.num_layers)
        _check_tied(model.tied, stored, tensors)
        _check(stored, tensors, shapes)
        leaves: dict[str, np.ndarray] = {}
        for tensor in tensors:
            file, name = stored[tensor.name]
            for path, leaf in tensor.split(file.get_tensor(name), shapes):
                if dtype is not None:
                    with naming(tensor.name, ValueError):
                        leaf = finite_cast(leaf, functools.partial(leaf.astype, dtype))
                block, _, rest = path.partition("/")
                if scan and block.startswith("block_"):
                    path, empty = f"blocks/{rest}", np.empty((model.num_layers, *leaf.shape), leaf.dtype)
                    stacked = leaves.setdefault(path, empty)
                    leaves[path] = stacked.astype(widest([stacked, leaf]), copy=False)  # blocks may be of other dtypes
                    leaves[path][int(block.removeprefix("block_"))] = leaf
                else:
                    leaves[path] = leaf
    computes = widest(leaves.values())
    return model.clone(scan=scan, dtype=computes, param_dtype=computes), unflatten_dict(leaves, sep="/")


def _stored(folder: Path, names: Names, stack: contextlib.ExitStack) -> dict[str, tuple[Any, str]]:
    """Every tensor's file and its name in it, by its name with the prefix; constants are left out."""
    import safetensors

    def opened(name: str) -> Any:
        if not (folder / name).exists():
            raise ValueError(f"{name} is missing")
        try:
            return stack.enter_context(safetensors.safe_open(folder / name, "numpy"))
        except safetensors.SafetensorError as error:
            raise ValueError(f"{name} is damaged, or not a safetensors file: {error}") from error

    single, index = "model.safetensors", "model.safetensors.index.json"
    if (folder / single).exists():
        file = opened(single)
        where = dict.fromkeys(file.keys(), file)
    elif (folder / index).exists():
        with naming(index, ValueError):
            where = _by_index(read_object(folder / index), opened)
    else:
        others = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {listed(others)} has another format, which transformers can convert" if others else ""
        raise FileNotFoundError(f"{folder} has neither {single} nor {index}{hint}")
    bare = not any(name.startswith(names.prefix) for name in where)
    return {
        f"{names.prefix}{name}" if bare and not name.startswith("lm_head.") else name: (file, name)
        for name, file in where.items()
        if not names.is_constant(name)
    }


def _by_index(index: Mapping[str, Any], opened: Any) -> dict[str, Any]:
    """The file of every tensor that an index lists."""
    listing = index.get("weight_map")
    if not isinstance(listing, dict) or not all(isinstance(name, str) for name in listing.values()):
        raise ValueError("expected a weight_map, from the names of the tensors to those of the files")
    if outside := [name for name in listing.values() if not name or Path(name).name != name]:
        raise ValueError(f"expected files of this folder, got {outside[0]!r}")
    files = {name: opened(name) for name in sorted(set(listing.values()))}
    inside = {name: set(file.keys()) for name, file in files.items()}
    if missing := [tensor for tensor, name in listing.items() if tensor not in inside[name]]:
        raise ValueError(f"{listed(missing)} should be in {listing[missing[0]]}, and is not")
    return {tensor: files[name] for tensor, name in listing.items()}


def _check_tied(tied: bool, stored: dict[str, tuple[Any, str]], tensors: list[Tensor]) -> None:
    """Drops the head of a checkpoint that shares the embedding with it and has stored both."""
    if not tied or "lm_head.weight" not in stored:
        return
    embedding = next(tensor.name for tensor in tensors if tensor.leaves == ("embedding/embedding",))
    file, name = stored.pop("lm_head.weight")
    if embedding in stored:
        other, other_name = stored[embedding]
        if not np.array_equal(file.get_tensor(name), other.get_tensor(other_name)):
            raise ValueError(f"tie_word_embeddings is true in config.json, but lm_head.weight is not {embedding}")


def _check(stored: Mapping[str, tuple[Any, str]], tensors: list[Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses tensors that are missing, that are there beyond the others, of other shapes, or no floats."""
    expected = {tensor.name: tensor.shape(shapes) for tensor in tensors}
    missing = [name for name in expected if name not in stored]
    extra = sorted(set(stored) - set(expected))
    if missing or extra:
        lacks = [f"lacks {listed(missing)}"] if missing else []
        has = [f"has {listed(extra)}, which models.GPT has no place for"] if extra else []
        raise ValueError(f"by its config.json, it {' and '.join([*lacks, *has])}")
    for name, shape in expected.items():
        file, inside = stored[name]
        found = file.get_slice(inside)
        if tuple(found.get_shape()) != shape:
            raise ValueError(f"{name} must have shape {shape} by config.json, got {tuple(found.get_shape())}")
        if (kind := found.get_dtype()) not in _FLOATS:
            floats = ", ".join(DTYPES[code] for code in _FLOATS)
            raise ValueError(f"{name} must be one of {floats}, got {DTYPES.get(kind, kind)}")
