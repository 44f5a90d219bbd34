"""Write a models.GPT and its params as a checkpoint of Hugging Face's format."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsparse.artifacts.files import filling, naming, plain_tree, replacing, safetensors_package
from jaxsparse.artifacts.hugging_face.families import family_for
from jaxsparse.artifacts.hugging_face.tensors import Tensor, read_object, widest
from jaxsparse.trees import by_path, listed

__all__ = ["to_hf"]

_FLOATS = ("bfloat16", "float16", "float32", "float64")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# The files beside a model that hold for a pruned one too.
_BESIDE = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json", "merges.txt",
    "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip


def to_hf(
    folder: str | os.PathLike,
    model: Any,
    params: Any,
    *,
    family: str | None = None,
    max_shard_size: int = 5 * 10**9,
    copy_from: str | os.PathLike | None = None,
) -> None:
    """Write a checkpoint that ``transformers`` loads as it is, ``AutoModelForCausalLM.from_pretrained(folder)``.

    Pruned weights are zeros in it, so that every program that reads such checkpoints reads it. Params that were cut, by
    :func:`jaxsparse.trace.slim` for instance, are written with the widths that they have, if the family can express
    them: units of the MLPs and whole blocks for all families; heads for Llama, Mistral and Qwen2. All blocks must have
    the same widths. The folder appears whole or not at all.

    Args:
      folder: a new folder, or an empty one.
      model: the :class:`jaxsparse.models.GPT` of the params, or the one before they were cut.
      params: its params, those of ``eval_params``: pruned weights are zeros.
      family: "gpt2", "llama", "mistral" or "qwen2". None takes the first of them that has the model's options. Every
        model of Mistral's is one of Llama's too, unless a cut left heads that do not divide the width.
      max_shard_size: the most bytes of tensors in one file, unless a single tensor has more. Several files come with an
        index.
      copy_from: the folder of a checkpoint whose tokenizer, generation_config.json and numbers of special tokens are
        copied.

    Raises:
      ValueError: for a model that no family has, or not the one asked for, naming its options; for params that do not
        fit the model, or were cut as no family can say, naming the leaf.
      FileExistsError: if the folder has files.
      OSError: if it cannot be written.
      ImportError: without the package safetensors.

    Examples:
      >>> import json, pathlib, tempfile, jax, jax.numpy as jnp
      >>> from jaxsparse import formats, models
      >>> model = models.GPT(
      ...     50, 16, 2, max_length=8, positions="rotary", norm="rms", mlp="gated", bias=False, tied=False
      ... )
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     formats.to_hf(f"{folder}/small", model, params)
      ...     config = json.loads(pathlib.Path(folder, "small", "config.json").read_text())
      >>> config["architectures"], config["intermediate_size"], config["torch_dtype"]
      (['LlamaForCausalLM'], 64, 'float32')
    """
    package = safetensors_package()
    if type(max_shard_size) is not int or max_shard_size < 1:
        raise ValueError(f"max_shard_size must be an int of at least 1, in bytes, got {max_shard_size!r}")
    tree = plain_tree(params)
    small = _fitted(model, tree)
    kind, found = family_for(small, family)
    leaves = by_path(tree)
    if odd := [path for path, leaf in leaves.items() if leaf.dtype.name not in _FLOATS]:
        raise ValueError(f"{odd[0]} must be one of {', '.join(_FLOATS)}, got {leaves[odd[0]].dtype}")
    config = {
        "architectures": [found.architecture],
        "model_type": kind,
        "vocab_size": small.vocab_size,
        **found.write(small),
        "tie_word_embeddings": small.tied,
        "torch_dtype": widest(leaves.values()).name,
        **(dict.fromkeys(_TOKENS) if copy_from is None else _special_tokens(Path(copy_from))),
    }
    leaves = _unstacked(leaves)
    tensors = found.names.tensors(leaves, small.num_layers)
    if lost := set(leaves) - {leaf for tensor in tensors for leaf in tensor.leaves}:
        raise ValueError(f"{kind} has no place for {listed(sorted(lost))}")
    beside = [] if copy_from is None else [path for name in _BESIDE if (path := Path(copy_from, name)).exists()]

    with filling(folder) as part:
        shards = list(_shards(tensors, leaves, max_shard_size))
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            weight_map |= {tensor.name: name for tensor in shard}
            with replacing(part / name) as file:
                file.write(package.save({tensor.name: tensor.join(leaves) for tensor in shard}, {"format": "pt"}))
        if len(shards) > 1:
            size = sum(leaf.nbytes for leaf in leaves.values())
            _write_json(
                part / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map}
            )
        _write_json(part / "config.json", config)
        for path in beside:
            shutil.copyfile(path, part / path.name)


def _fitted(model: Any, params: Any) -> Any:
    """The model with the widths of the params, of which two cannot be cut."""
    small = model.fitted(params)
    head_dim = model.head_dim or model.width // model.num_heads
    if small.width != model.width:
        raise ValueError(
            f"embedding/embedding has width {small.width}, and the model {model.width}: norms divide by the width, so "
            "that a checkpoint whose residual stream lost channels would compute something else"
        )
    if small.head_dim != head_dim:
        raise ValueError(
            f"the heads have {small.head_dim} channels, and those of the model {head_dim}: attention divides by the "
            "root of head_dim, and rotary angles depend on it, so that heads can only be cut as a whole"
        )
    return small


def _unstacked(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The leaves of the same model without scan."""
    found: dict[str, np.ndarray] = {}
    for path, leaf in leaves.items():
        if path.startswith("blocks/"):
            found |= {f"block_{i}/{path.removeprefix('blocks/')}": one for i, one in enumerate(leaf)}
        else:
            found[path] = leaf
    return found


def _shards(tensors: Sequence[Tensor], leaves: Mapping[str, np.ndarray], at_most: int) -> Iterator[list[Tensor]]:
    """The tensors in groups of at most so many bytes, in their order."""
    shard: list[Tensor] = []
    total = 0
    for tensor in tensors:
        size = sum(leaves[leaf].nbytes for leaf in tensor.leaves)
        if shard and total + size > at_most:
            yield shard
            shard, total = [], 0
        shard.append(tensor)
        total += size
    yield shard


def _special_tokens(folder: Path) -> dict[str, Any]:
    """The numbers of the special tokens in the config.json of another checkpoint."""
    path = folder / "config.json"
    with naming(path, ValueError):
        config = read_object(path)
    return {key: config.get(key) for key in _TOKENS}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())
