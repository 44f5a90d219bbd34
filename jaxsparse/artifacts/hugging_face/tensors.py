"""The tensors of Hugging Face checkpoints: their names, and how the leaves of models.GPT lie in them."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["GPT_2", "LLAMA", "Names", "Tensor", "read_object", "shapes_of", "widest"]


class Tensor(NamedTuple):
    """A tensor of a checkpoint, which has one leaf of models.GPT, or several side by side along their outputs.

    Attributes:
      name: its name, without the prefix of the checkpoint.
      leaves: the paths of the leaves. A kernel (inputs, outputs) may have several axes of either.
      transposed: whether it is (outputs, inputs), as in PyTorch's Linear.
    """

    name: str
    leaves: tuple[str, ...]
    transposed: bool = False

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The tensor's shape, from those of the leaves."""
        flat = [_flat(leaf, shapes[leaf]) for leaf in self.leaves]
        shape = (*flat[0][:-1], sum(last for *_, last in flat))
        return shape[::-1] if self.transposed else shape

    def join(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        """The tensor, from the leaves."""
        parts = [leaves[leaf].reshape(_flat(leaf, leaves[leaf].shape)) for leaf in self.leaves]
        array = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        return np.ascontiguousarray(array.T if self.transposed else array)

    def split(self, array: np.ndarray, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
        """The leaves, from the tensor."""
        array = array.T if self.transposed else array
        ends = np.cumsum([_flat(leaf, shapes[leaf])[-1] for leaf in self.leaves])
        for leaf, part in zip(self.leaves, np.split(array, ends[:-1], axis=-1), strict=True):
            yield leaf, np.ascontiguousarray(part).reshape(shapes[leaf])


class Names(NamedTuple):
    """The tensors of a family.

    Attributes:
      prefix: what the names of all but the head's begin with, unless the checkpoint was saved without a head.
      blocks: what the names of a block's tensors begin with; the number of the block follows, and a dot.
      outside: the tensors outside of the blocks.
      inside: the tensors of a block, with paths inside the block.
      constants: pattern of tensors that older checkpoints have and that are no weights.
    """

    prefix: str
    blocks: str
    outside: tuple[Tensor, ...]
    inside: tuple[Tensor, ...]
    constants: str

    def tensors(self, shapes: Mapping[str, Any], num_layers: int) -> list[Tensor]:
        """All tensors of a checkpoint with the leaves of ``shapes``, those of the first block standing for all."""
        found = [tensor for tensor in self.outside if tensor.leaves[0] in shapes]
        inside = [tensor for tensor in self.inside if f"block_0/{tensor.leaves[0]}" in shapes]
        return found + [
            tensor._replace(
                name=f"{self.prefix}{self.blocks}{i}.{tensor.name}",
                leaves=tuple(f"block_{i}/{leaf}" for leaf in tensor.leaves),
            )
            for i in range(num_layers)
            for tensor in inside
        ]

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is no weight, but a mask or a table of angles that the model can make by itself."""
        return re.fullmatch(self.constants, name) is not None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; a ValueError for other JSON, and for none."""
    found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise ValueError("expected a JSON object")
    return found


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the leaves of a GPT without scan, by path; the blocks are equal, so that one is traced."""
    import jax
    import jax.numpy as jnp

    from jaxsparse.trees import by_path

    one = model.clone(num_layers=1, scan=False, remat=False)
    shapes = jax.eval_shape(one.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    first = {path: tuple(leaf.shape) for path, leaf in by_path(shapes).items()}
    blocks = {path.removeprefix("block_0/"): shape for path, shape in first.items() if path.startswith("block_0/")}
    return first | {f"block_{i}/{path}": shape for i in range(model.num_layers) for path, shape in blocks.items()}


def widest(leaves: Iterable[np.ndarray]) -> np.dtype:
    """The smallest float dtype that holds the values of all leaves."""
    dtypes = {leaf.dtype for leaf in leaves}
    if len({dtype for dtype in dtypes if dtype.itemsize == 2}) > 1:  # neither of bfloat16 and float16 holds the other
        dtypes.add(np.dtype(np.float32))
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def _flat(leaf: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a leaf as a matrix, (inputs, outputs), or as a vector."""
    if not leaf.endswith(("/kernel", "/embedding")):
        return (math.prod(shape),)
    inputs = 2 if leaf.endswith("attention/out/kernel") else 1
    return math.prod(shape[:inputs]), math.prod(shape[inputs:])


def _layer(tensor: str, *leaves: str, parts: Sequence[str] = ("kernel", "bias"), transposed: bool = False) -> tuple:
    """The weight and the bias of a layer, or of several that lie side by side."""
    names = zip(("weight", "bias"), parts, strict=False)
    return tuple(
        Tensor(f"{tensor}.{name}", tuple(f"{leaf}/{part}" for leaf in leaves), transposed and name == "weight")
        for name, part in names
    )


_NORM = ("scale", "bias")

GPT_2 = Names(
    prefix="transformer.",
    blocks="h.",
    outside=(
        *_layer("transformer.wte", "embedding", parts=("embedding",)),
        *_layer("transformer.wpe", "positions", parts=("embedding",)),
        *_layer("transformer.ln_f", "norm", parts=_NORM),
        *_layer("lm_head", "head", transposed=True),
    ),
    inside=(
        *_layer("ln_1", "norm_1", parts=_NORM),
        *_layer("attn.c_attn", "attention/query", "attention/key", "attention/value"),
        *_layer("attn.c_proj", "attention/out"),
        *_layer("ln_2", "norm_2", parts=_NORM),
        *_layer("mlp.c_fc", "mlp/up"),
        *_layer("mlp.c_proj", "mlp/down"),
    ),
    constants=r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
)

LLAMA = Names(
    prefix="model.",
    blocks="layers.",
    outside=(
        *_layer("model.embed_tokens", "embedding", parts=("embedding",)),
        *_layer("model.norm", "norm", parts=_NORM),
        *_layer("lm_head", "head", transposed=True),
    ),
    inside=(
        *_layer("input_layernorm", "norm_1", parts=_NORM),
        *_layer("self_attn.q_proj", "attention/query", transposed=True),
        *_layer("self_attn.k_proj", "attention/key", transposed=True),
        *_layer("self_attn.v_proj", "attention/value", transposed=True),
        *_layer("self_attn.o_proj", "attention/out", transposed=True),
        *_layer("post_attention_layernorm", "norm_2", parts=_NORM),
        *_layer("mlp.gate_proj", "mlp/gate", transposed=True),
        *_layer("mlp.up_proj", "mlp/up", transposed=True),
        *_layer("mlp.down_proj", "mlp/down", transposed=True),
    ),
    constants=r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
)
