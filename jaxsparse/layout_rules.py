"""The rules by which :func:`jaxsparse.layouts.leaf_layouts` infers layouts from names and shapes.

Each looks at one leaf and at those beside and around it. Where sizes contradict a name, or nothing tells, the answer
comes with a doubt in words.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse.trees import WRAPPED, path_name

__all__ = ["Axes", "Leaf", "Rules", "described", "is_attention_output"]

# Names of leaves that multiply, wherever they lie. (``weight`` does not: it may be a normalisation's.)
_MATRIX_NAMES = {"kernel", "w", "embedding", "embeddings"}
_GENERIC_NAMES = _MATRIX_NAMES | {"weight", "weights"}
_LAYERS_OF_WEIGHTS = ("proj", "projection", "linear", "dense", "conv")
_LAYER_WORDS = {*_LAYERS_OF_WEIGHTS, "kernel", "w", "mlp", "net"}
_LAYER = re.compile(rf"(^|_)({'|'.join(_LAYERS_OF_WEIGHTS)})(_?\d+)?$")  # a norm_mlp may be the norm before an mlp
_GAINS = {"weight", "weights", "scale", "g", "gain", "gamma", "beta", "b", "bias", "offset", "shift"}
_VECTOR = re.compile(r"(^|_)(bias|biases|scale|offset|gamma|beta|gain|shift)(_|\d|$)|bias$")
_NORM = re.compile(r"norm(?!al(?!i))|(^|_)(ln|bn|gn)(_|\d|$)")  # not "normal", but "normalization"
_TOKEN = re.compile(r"(^|_)(cls|token|dist)(_|$)")
_HEADS_OUT = re.compile(r"(to_|w_?)?(q|k|v|qk|kv|qkv|query|key|value)(_?(proj|projection|kernel))?(_?\d+)?")
_HEADS_IN = re.compile(r"((to|attn|attention)_|w_?)?(o|out|output)(_?(proj|projection|kernel))?(_?\d+)?")
_FUSED = re.compile(r"qk|kv")
_ATTENTION = re.compile(r"attn|attention")
_STACK = re.compile(r"scan|vmap|stack|ensemble|expert")
_LAYERS = re.compile(r"layers|blocks")
_CONVOLUTION = re.compile(r"conv")
_EMBEDDING = re.compile(r"(?<!un)(?<!de)embed|^(wte|wpe|tok|token)s?$")
_AXIS_0 = "axis 0 is taken for stacked layers"


class Axes(NamedTuple):
    """The axes of a leaf, counted from the front, and any doubt about them."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    stack: tuple[int, ...] = ()
    guess: str = ""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf as the rules see it: its names, its shape, the class of its module."""

    name: str  # the last part of the path, in lower case with underscores
    modules: tuple[str, ...]  # the other parts, outermost first, likewise
    kind: str  # the class of the innermost module, likewise; "" for a dict
    shape: tuple[int, ...]
    weights: bool  # floats or their masks; counters and keys tell nothing of the leaves around them

    @property
    def module(self) -> str:
        """The innermost module that has a name and no number."""
        return next((part for part in reversed(self.modules) if not part.isdecimal()), "")

    @property
    def label(self) -> str:
        """The most specific name: the leaf's own, or that of its module where the leaf's is generic."""
        return self.module if self.name in _GENERIC_NAMES and self.modules else self.name

    @functools.cached_property
    def called(self) -> str:
        """The kind of a leaf that, by its name, is no matrix: "bias" or "norm"; "" for others."""
        last = self.name.split("_")[-1]
        if self.name in _MATRIX_NAMES or last in _LAYER_WORDS or self.name.startswith("to_"):
            return ""
        if last not in _GENERIC_NAMES and _VECTOR.search(self.name):
            return "bias"
        in_norm = self.name in _GAINS and (_NORM.search(self.module) or _NORM.search(self.kind))
        # The weight of norm_proj is a layer's, that of proj_norm is none.
        of_layer = self.name in _GENERIC_NAMES and (_LAYER.search(self.module) or _LAYER.search(self.kind))
        return "norm" if (in_norm and not of_layer) or _NORM.search(self.name) else ""

    def named(self, pattern: re.Pattern) -> bool:
        """Whether the leaf's label, or the class of its module, is called so."""
        return bool(pattern.search(self.label) or pattern.search(self.kind))


def described(params: Any) -> dict[str, Leaf]:
    """Every leaf as the rules see it, by path."""
    found = {}

    def walk(node: Any, path: tuple, kind: str) -> None:
        children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda other: other is not node)[0]
        if len(children) == 1 and children[0][1] is node:
            name = path_name(path)
            *modules, own = (_snake(part) for part in name.split("/"))
            shape, dtype = tuple(getattr(node, "shape", ())), getattr(node, "dtype", jnp.float32)
            weights = jnp.issubdtype(dtype, jnp.floating) or dtype == jnp.bool_  # masks stand for weights
            found[name] = Leaf(own, tuple(part for part in modules if part != "~"), kind, shape, weights)
            return
        wraps = len(children) == 1 and children[0][0][-1] in WRAPPED  # a variable of flax.nnx
        if not wraps and not isinstance(node, Mapping | list | tuple):
            kind = _snake(type(node).__name__)
        for keys, child in children:
            walk(child, (*path, *keys), kind)

    walk(params, (), "")
    return found


def _snake(name: str) -> str:
    """LayerNorm_0 -> layer_norm_0."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


class Rules:
    """The rules, for the leaves of one tree.

    Args:
      leaves: by path, as :func:`described` has them.
      partial: the tree has more leaves than these.
    """

    def __init__(self, leaves: Mapping[str, Leaf], partial: bool = False):
        self._partial = partial
        self._beside: dict[tuple[str, ...], list[Leaf]] = {}
        self._inside: dict[tuple[str, ...], list[Leaf]] = {}
        for leaf in leaves.values():
            self._beside.setdefault(leaf.modules, []).append(leaf)
            for depth in range(len(leaf.modules) + 1 if leaf.weights else 0):
                self._inside.setdefault(leaf.modules[:depth], []).append(leaf)
        self._called_vectors = {leaf for leaf in leaves.values() if self._is_called_vector(leaf)}
        self._stacks = {modules: self._agreed_stack(inside) for modules, inside in self._inside.items()}

    def axes(self, leaf: Leaf) -> Axes:
        """The axes of a leaf."""
        rank = len(leaf.shape)
        stack, guess = self._stack(leaf)
        vector = self._is_vector(leaf) or _is_thin(leaf)
        if vector or rank - stack < 2:  # of a stack, each layer has one axis
            stack = max(min(stack, rank - 1), 0)
            return Axes((), tuple(range(stack, rank)), tuple(range(stack)), self._doubtful(leaf))
        if not stack and self._ends_stacked(leaf):
            return Axes((), (1,), (0,), "taken for biases of the stacked layers beside it")
        found = self._matrix(leaf, stack)
        hidden = self._partial and rank > 2 and not self._bias(leaf) and not leaf.named(_CONVOLUTION)
        guess = guess or found.guess or ("the leaves around it are hidden from this transformation" if hidden else "")
        return found._replace(guess=guess)

    # Vectors: biases, gains, tokens.

    def _is_called_vector(self, leaf: Leaf) -> bool:
        beside = [other for other in self._beside[leaf.modules] if other is not leaf]
        if leaf.called == "norm" and len(leaf.shape) > 1:  # unless it has a bias of fewer axes, as a layer has
            biases = [other for other in beside if other.called == "bias" or other.name == "b"]
            return not any(len(other.shape) < len(leaf.shape) for other in biases)
        if leaf.called:
            return True
        return leaf.name.startswith("b") and any(_is_b_of(leaf, other, beside) for other in beside)

    def _is_vector(self, leaf: Leaf) -> bool:
        """Whether a leaf is called a bias or a gain, or has the shape of the bias beside it, as no matrix has."""
        return leaf in self._called_vectors or any(
            other.shape == leaf.shape for other in self._beside[leaf.modules] if other in self._called_vectors
        )

    def _doubtful(self, leaf: Leaf) -> str:
        """The doubt, in words, about a leaf taken for a vector that has the name and shape of a matrix; "" for none."""
        known = leaf in self._called_vectors or _NORM.search(leaf.module) or _NORM.search(leaf.kind)
        if known or leaf.name.rstrip("0123456789") not in _GENERIC_NAMES or sum(size > 1 for size in leaf.shape) < 2:
            return ""
        beside = [other.name for other in self._beside[leaf.modules] if other in self._called_vectors]
        return f"taken for no matrix, as {beside[0]} beside it has its shape" if beside else ""

    def _ends_stacked(self, leaf: Leaf) -> bool:
        """Whether a leaf without a name has axes (layers, outputs) of one of (layers, inputs, outputs) beside it."""
        kernels = [other.shape for other in self._beside[leaf.modules] if len(other.shape) == 3]
        return leaf.name.isdecimal() and leaf.shape in [(shape[0], shape[2]) for shape in kernels]

    def _bias(self, leaf: Leaf) -> tuple[int, ...]:
        """The shape of the bias of the layer whose kernel a leaf is; () if there is none."""
        found = [other for other in self._beside[leaf.modules] if other in self._called_vectors]
        if leaf.name not in _GENERIC_NAMES or not found:
            return ()
        return self._plain_shape(min(found, key=lambda other: "bias" not in other.name and other.name[0] != "b"))

    def _plain_shape(self, bias: Leaf) -> tuple[int, ...]:
        """The shape of a bias or gain; of a bias of Equinox's convolutions, (C, 1, 1), without the ones."""
        of_convolution = any(
            "weight" in other.name and len(other.shape) == len(bias.shape) + 1
            and (len(other.shape) > 3 or other.named(_CONVOLUTION)) for other in self._beside[bias.modules]
        )  # fmt: skip
        shape = bias.shape
        while of_convolution and len(shape) > 1 and shape[-1] == 1:
            shape = shape[:-1]
        return shape

    # Stacked layers.

    def _agreed_stack(self, inside: Sequence[Leaf]) -> tuple[int, str]:
        """How many leading axes a module's leaves are stacked over, and what is in doubt.

        A bias or gain of one layer has one axis. Where all of a module have more, and all leaves have the same leading
        axes, these are a stack.
        """
        vectors = [leaf for leaf in inside if self._is_vector(leaf)]
        if len(inside) < 2 or not vectors:
            return 0, ""
        stack, length = min(len(self._plain_shape(leaf)) - 1 for leaf in vectors), vectors[0].shape[:1]
        # One number for each layer, under another name than those of biases.
        rest = [leaf for leaf in inside if leaf.shape != length or leaf in self._called_vectors]
        for leaf in rest:
            stack = min(stack, len(leaf.shape) - (2 if leaf.name in _MATRIX_NAMES else 1))
            same = [a == b for a, b in zip(leaf.shape, rest[0].shape, strict=False)]
            stack = min(stack, (*same, False).index(False))
        if stack > 0:
            return stack, ""
        second = {leaf.shape[1] if len(leaf.shape) > 1 else 0 for leaf in inside}
        kernels = [leaf for leaf in inside if len(leaf.shape) > 2]
        heads = any(leaf.shape[1:] == vector.shape for leaf in kernels for vector in vectors)  # and their biases
        late = len(second) == 1 and kernels and not heads
        return 0, "axis 1 may be one of stacked layers" if late else ""

    def _stack(self, leaf: Leaf) -> tuple[int, str]:
        """How many leading axes of a leaf are stacked layers, and what is in doubt about it."""
        if not leaf.weights:
            return 0, ""
        doubts = ""
        for depth in range(len(leaf.modules), -1, -1):
            stack, doubt = self._stacks[leaf.modules[:depth]]
            doubts = doubts or doubt
            if stack:
                return stack, doubts
        of_one_layer = leaf.named(_CONVOLUTION) and len(leaf.shape) < 5
        if len(leaf.shape) < 3 or of_one_layer or self._is_vector(leaf):
            return 0, doubts
        for depth, part in enumerate(leaf.modules, 1):
            numbered = any(other.isdecimal() for other in leaf.modules[depth:])
            if _STACK.search(part) or (_LAYERS.fullmatch(part) and not numbered):
                inside = self._inside[leaf.modules[:depth]]
                if all(other.shape[:1] == leaf.shape[:1] for other in inside):
                    return 1, doubts or ("" if _STACK.search(part) else f"{_AXIS_0}, as it lies in {part}")
        return 0, doubts

    # Inputs and outputs.

    def _matrix(self, leaf: Leaf, stack: int) -> Axes:
        rank, shape, bias = len(leaf.shape), leaf.shape[stack:], self._bias(leaf)[stack:]
        stacked, axes = tuple(range(stack)), tuple(range(stack, rank))
        if self._is_embedding(leaf, shape, bias):
            return Axes((rank - 2,), (rank - 1,), tuple(range(rank - 2)))
        if 1 < len(bias) < len(shape) and shape[-len(bias) :] == bias:
            return Axes(axes[: -len(bias)], axes[-len(bias) :], stacked)
        if heads := self._heads(leaf, shape, bias):
            inputs, outputs, more, doubt = heads
            return Axes(
                tuple(axes[i] for i in inputs), tuple(axes[i] for i in outputs), (*stacked, *axes[:more]), doubt
            )
        outputs_first = "weight" in leaf.name
        if len(shape) > 3 or leaf.named(_CONVOLUTION) or len(shape) == 2:
            first, second = axes[:2] if outputs_first else axes[-2:][::-1]  # outputs, inputs
            transposed = leaf.name == "w" and "transpose" in leaf.label  # Haiku's
            if len(bias) == 1 and bias[0] != leaf.shape[first] and bias[0] == leaf.shape[second]:
                transposed = True
            if transposed:
                first, second = second, first
            known = len(shape) == 2 or leaf.named(_CONVOLUTION) or (len(shape) == 4 and "einsum" not in leaf.label)
            return Axes((second,), (first,), stacked, "" if known else "taken for a convolution")
        if len(bias) == 1:  # a convolution over a sequence, or several axes of inputs
            ends = axes[1::-1] if outputs_first else axes[-2:]
            return Axes(ends[:1], ends[1:], stacked, "taken for a convolution over one axis")
        ends = axes[:0:-1] if outputs_first else axes[1:]
        return Axes(ends[:1], ends[1:], (*stacked, stack), _AXIS_0 if stack == 0 else f"axis {stack} likewise")

    def _is_embedding(self, leaf: Leaf, shape: tuple[int, ...], bias: tuple[int, ...]) -> bool:
        """Whether a leaf is (entries, features): what an embedding layer has, or positions in a leaf of their own."""
        if bias or leaf.named(_CONVOLUTION) or "linear" in leaf.kind or not leaf.named(_EMBEDDING):
            return False
        return len(shape) == 2 or (leaf.label == leaf.name and math.prod(shape[:-2]) == 1)

    def _heads(
        self, leaf: Leaf, shape: tuple[int, ...], bias: tuple[int, ...]
    ) -> tuple[Sequence[int], Sequence[int], int, str] | None:
        """Inputs, outputs, further axes of a stack and a doubt, for a leaf of attention with an axis of heads."""
        if "weight" in leaf.name or leaf.named(_CONVOLUTION) or not 3 <= len(shape) <= 4:
            return None
        around = self._around(leaf)
        tails = [other.shape[-3:] for other in around if len(other.shape) > 2]
        if _HEADS_OUT.fullmatch(leaf.label) and not bias:
            fused = bool(_FUSED.search(leaf.label))
            if len(shape) == 4 and not fused:
                return ([1], [2, 3], 1, _AXIS_0) if shape[1] == math.prod(shape[2:]) else None

            def as_wide(heads: tuple[int, ...]) -> bool:
                return heads[0] == math.prod(heads[1:]) or (*heads[1:], heads[0]) in tails

            if fused:
                agree = math.prod(shape[1:]) % shape[0] == 0 and (len(shape) == 3 or shape[1] in (2, 3))
            else:  # keys and values may have fewer heads than the queries beside them
                queries = [tail for tail in tails if tail[0] == shape[0] and tail[2] == shape[-1]]
                agree = any(map(as_wide, (shape, *queries)))
            if agree or (len(shape) == 3 and shape[0] >= shape[1]):
                return [0], range(1, len(shape)), 0, "" if agree else "taken for heads of attention"
        elif is_attention_output(leaf) and self._in_attention(leaf, around):
            if len(shape) == 4:
                return ([1, 2], [3], 1, _AXIS_0) if shape[1] * shape[2] == shape[3] else None
            if shape[0] * shape[1] == shape[2] or (shape[2], *shape[:2]) in tails:
                return [0, 1], [2], 0, ""
        return None

    def _around(self, leaf: Leaf) -> list[Leaf]:
        """The leaves of the module in which the layer that a leaf belongs to stands."""
        return self._inside.get(leaf.modules[:-1] if leaf.label != leaf.name else leaf.modules, [])

    def _in_attention(self, leaf: Leaf, around: Sequence[Leaf]) -> bool:
        """Whether query, key or value stand beside a leaf, or a module around it is attention."""
        heads = any(_HEADS_OUT.fullmatch(other.label) for other in around)
        return heads or any(_ATTENTION.search(part) for part in (*leaf.modules, leaf.kind))


def is_attention_output(leaf: Leaf) -> bool:
    """Whether a leaf, by its name, is the projection behind attention, whose inputs are the heads."""
    return bool(_HEADS_IN.fullmatch(leaf.label))


def _is_thin(leaf: Leaf) -> bool:
    """Whether a leaf is one vector, such as (C, 1, 1), or a token of (1, D), and not named as a kernel is."""
    vector = sum(size > 1 for size in leaf.shape) < 2 and len(leaf.shape) > 1
    return vector and leaf.name not in _GENERIC_NAMES and (len(leaf.shape) > 2 or bool(_TOKEN.search(leaf.name)))


def _is_b_of(leaf: Leaf, other: Leaf, beside: Sequence[Leaf]) -> bool:
    """Whether a leaf is the b (b1, b_ih, bq) of a w. That of low-rank adapters has an a beside it."""
    if other.name != f"w{leaf.name[1:]}" or not leaf.shape or any(each.name == "a" for each in beside):
        return False
    fewer = len(leaf.shape) < len(other.shape) or leaf.shape[0] == 1 or leaf.shape == other.shape
    return fewer and leaf.shape[-1] in other.shape
