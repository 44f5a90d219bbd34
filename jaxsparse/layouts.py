"""Which axes of a leaf are inputs, outputs, places of a convolution, and stacked layers.

A leaf is a matrix (inputs x outputs), one for each place of a convolution, and all of that once for each layer of a
stack (``nn.scan``, ``vmap``, ``layer_stack``). A bias or the gain of a normalisation has no inputs: it is no matrix,
and stays dense by default. Structures, allocations and inspection count in these axes.

What a leaf is cannot be read off its rank: (12, 64, 64) may be twelve layers, a convolution over twelve places, or
attention with twelve heads. :func:`leaf_layouts` decides by the names and shapes of a leaf and of those beside it, as
Flax, Haiku and Equinox have them. Where that leaves a doubt, whoever uses the layout warns and names the leaf, and
``layout=`` settles it.
"""

import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.trees import WRAPPED, by_pattern, is_partial, path_name

__all__ = ["Layout", "LayoutLike", "leaf_layouts", "warn_of_guesses"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axes of a leaf that are inputs, outputs and stacked layers; what is left are the places of a convolution.

    Attributes:
      inputs: an axis, or several that count as one, such as (heads, dim) of attention's output projection. None at all,
        ``()``, says that the leaf is no matrix: a bias or a gain, dense by default.
      outputs: an axis, or several that count as one.
      stack: the axes along which layers are stacked.
      guess: what is in doubt, empty if nothing is.

    Raises:
      ValueError: for an axis that is named twice, or inputs without outputs.

    Examples:
      >>> query = Layout(inputs=0, outputs=(1, 2))
      >>> query.matrix_shape((64, 4, 16))
      (64, 64)
      >>> Layout(inputs=-2, outputs=-1, stack=0).matrix_shape((12, 3, 3, 16, 32))
      (12, 3, 3, 16, 32)
    """

    inputs: int | tuple[int, ...]
    outputs: int | tuple[int, ...]
    stack: int | tuple[int, ...] = ()
    guess: str = dataclasses.field(default="", compare=False, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("inputs", "outputs", "stack"):
            axes = getattr(self, name)
            object.__setattr__(self, name, (axes,) if isinstance(axes, int) else tuple(axes))
        axes = self.axes
        if not all(type(axis) is int for axis in axes) or len(set(axes)) != len(axes):
            raise ValueError(f"a layout names each axis once, by an int, got {self}")
        if self.inputs and not self.outputs:
            raise ValueError(f"a layout with inputs has outputs too, got {self}")

    @property
    def axes(self) -> tuple[int, ...]:
        """All axes that are named."""
        return (*self.stack, *self.inputs, *self.outputs)  # type: ignore[misc]

    @property
    def is_matrix(self) -> bool:
        """Whether the leaf has inputs: it multiplies, where a bias or a gain does not."""
        return bool(self.inputs)

    def is_plain(self, rank: int) -> bool:
        """Whether a leaf of this rank lies as Flax has dense layers and convolutions: places, inputs, outputs."""
        return not self.stack and (not self.inputs or (self.inputs, self.outputs) == ((rank - 2,), (rank - 1,)))

    def of_rank(self, rank: int) -> "Layout":
        """The layout with axes counted from the front, for a leaf of this rank.

        Raises:
          ValueError: for axes that a leaf of this rank does not have.
        """
        if not all(-rank <= axis < rank for axis in self.axes):
            raise ValueError(f"{self} names axes that a leaf of rank {rank} does not have")
        front = [tuple(axis % rank for axis in axes) for axes in (self.inputs, self.outputs, self.stack)]  # type: ignore[union-attr]
        return Layout(*front, guess=self.guess)

    def places(self, rank: int) -> tuple[int, ...]:
        """The axes of a convolution's places, in order."""
        named = self.of_rank(rank).axes
        return tuple(axis for axis in range(rank) if axis not in named)

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a leaf seen as matrices: (stack..., places..., inputs, outputs)."""
        order, sizes = self._view(len(shape))
        ends = iter(shape[axis] for axis in order)
        return tuple(math.prod(next(ends) for _ in range(size)) for size in sizes)

    def to_matrices(self, x: Any) -> Any:
        """A leaf seen as matrices, of shape (stack..., places..., inputs, outputs). No copy if that is how it lies."""
        order, sizes = self._view(x.ndim)
        moved = x if order == tuple(range(x.ndim)) else x.transpose(order)
        shape = self.matrix_shape(x.shape)
        if moved.shape == shape or isinstance(x, np.ndarray):
            return moved.reshape(shape)
        spec = jax.typeof(moved).sharding.spec
        if not any(spec):
            return moved.reshape(shape)
        spec, merged, start = [*spec, *[None] * (x.ndim - len(spec))], [], 0
        for size in sizes:  # merged axes stay sharded if only the first of them is
            merged.append(None if any(spec[start + 1 : start + size]) else spec[start])
            start += size
        sharding = jax.typeof(moved).sharding.update(spec=jax.sharding.PartitionSpec(*merged))
        return jax.lax.reshape(moved, shape, out_sharding=sharding)

    def from_matrices(self, x: jax.Array, like: Any) -> jax.Array:
        """Undoes :meth:`to_matrices`, for an array of the shape that it returns.

        Args:
          x: an array of ``matrix_shape(like.shape)``.
          like: the leaf, or anything else of its shape; an array's sharding is taken too.
        """
        rank = len(like.shape)
        order, _ = self._view(rank)
        shape = tuple(like.shape[axis] for axis in order)
        if x.shape != shape:
            sharding = jax.typeof(like).sharding if isinstance(like, jax.Array) else None
            if sharding is None or not (any(sharding.spec) or any(jax.typeof(x).sharding.spec)):
                x = x.reshape(shape)
            else:
                spec = [*sharding.spec, *[None] * (rank - len(sharding.spec))]
                moved = jax.sharding.PartitionSpec(*(spec[axis] for axis in order))
                x = jax.lax.reshape(x, shape, out_sharding=sharding.update(spec=moved))
        if order == tuple(range(rank)):
            return x
        return jnp.transpose(x, [order.index(axis) for axis in range(rank)])

    def any_by_output(self, mask: np.ndarray) -> np.ndarray:
        """Which outputs, of each layer of a stack, have any entry set: (stack..., outputs)."""
        return self._any(mask, -1)

    def any_by_input(self, mask: np.ndarray) -> np.ndarray:
        """Which inputs, of each layer of a stack, have any entry set: (stack..., inputs)."""
        return self._any(mask, -2)

    def _any(self, mask: np.ndarray, axis: int) -> np.ndarray:
        seen = self.to_matrices(mask)
        kept = (*range(len(self.stack)), axis % seen.ndim)  # type: ignore[arg-type]
        return seen.any(axis=tuple(other for other in range(seen.ndim) if other not in kept))

    def _view(self, rank: int) -> tuple[tuple[int, ...], list[int]]:
        """The order of axes that puts matrices last, and how many of them make up each axis of the view."""
        at = self.of_rank(rank)
        places = at.places(rank)
        parts = [(axis,) for axis in (*at.stack, *places)] + [p for p in (at.inputs, at.outputs) if p]  # type: ignore[misc]
        return tuple(axis for part in parts for axis in part), [len(part) for part in parts]


LayoutLike: TypeAlias = Mapping[str, Layout] | Sequence[tuple[str, Layout]] | None


def leaf_layouts(params: Any, layout: LayoutLike = None) -> dict[str, Layout]:
    """The layout of every leaf, by path.

    By name and shape, of a leaf and of those beside it:

    * biases, scales, offsets, gammas and betas, what lies in a module called or of a class called a norm, and what has
      the shape of the bias beside it are no matrices;
    * a leading axis is a stack where biases and gains in the same module, or around it, have it too, or where a name
      says so (scan, vmap, stack, ensemble, experts);
    * ``weight`` has outputs first, as in Equinox and PyTorch, other names inputs first, as in Flax and Haiku, unless
      the size of the bias says otherwise (transposed convolutions); embeddings are (entries, features);
    * query, key and value of attention are (inputs, heads, dim), its output (heads, dim, outputs); other kernels of
      three axes are as their bias says.

    Args:
      params: a pytree of arrays, or of their shapes.
      layout: pattern -> :class:`Layout` (see :func:`jaxsparse.trees.matching`), the first match wins; for leaves that
        it does not name the rules above hold.

    Returns:
      path -> :class:`Layout`, axes counted from the front.

    Raises:
      ValueError: for a pattern that matches nothing, or a layout that does not fit its leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"attn": {"query": jnp.ones((64, 4, 16)), "bias": jnp.ones((4, 16))}, "w": jnp.ones((6, 8, 8))}
      >>> leaf_layouts(params, {"w": Layout(1, 2, stack=0)})["attn/query"]
      Layout(inputs=(0,), outputs=(1, 2), stack=())
    """
    leaves = _described(params)
    rules = _Rules(leaves)
    given = by_pattern(layout, list(leaves), "layout", partial=is_partial(params)) if layout else {}
    found = {}
    for path, leaf in leaves.items():
        if path in given:
            if not isinstance(given[path], Layout):
                raise ValueError(f"layout of {path} must be a jaxsparse.Layout, got {given[path]!r}")
            try:
                found[path] = given[path].of_rank(len(leaf.shape))
            except ValueError as error:
                raise ValueError(f"layout of {path} of shape {leaf.shape}: {error}") from None
        else:
            found[path] = rules.layout(leaf) if leaf.shape else Layout((), ())
    return found


def warn_of_guesses(layouts: Mapping[str, Layout], why: str, stacklevel: int = 3) -> None:
    """Warns of leaves whose layout is a guess, by name.

    Args:
      layouts: path -> layout, of the leaves for which it matters.
      why: what the layout is needed for.
      stacklevel: whom to name as the place, as of :func:`warnings.warn`.
    """
    doubts = [f"{path} ({layout.guess})" for path, layout in layouts.items() if layout.guess]
    if doubts:
        warnings.warn(
            f"{why} needs the inputs and outputs of leaves, and these had to be guessed: {', '.join(doubts)}. Say it "
            'by layout={"path or pattern": jaxsparse.Layout(inputs=..., outputs=..., stack=...)}',
            UserWarning,
            stacklevel=stacklevel + 1,
        )


# --- The rules --------------------------------------------------------------------------------------------------------

# Names of leaves that multiply, wherever they lie. (``weight`` does not: it may be a normalisation's.)
_MATRIX_NAMES = {"kernel", "w", "embedding", "embeddings"}
_GENERIC_NAMES = _MATRIX_NAMES | {"weight", "weights"}
_VECTOR = re.compile(r"(^|_)(bias|biases|scale|offset|gamma|beta|gain|shift)(_|\d|$)")
_SHORT_BIAS = re.compile(r"b(_?\d+|_[a-z]{1,3})?")  # Haiku's b; b1, b_ih
_NORM = re.compile(r"norm(?!al(?!i))|(^|_)(ln|bn|gn)(_|\d|$)")  # not "normal", but "normalization"
_HEADS_OUT = re.compile(r"(to_|w_?)?(q|k|v|qk|kv|qkv|query|key|value)(_?(proj|projection|kernel))?(_?\d+)?")
_HEADS_IN = re.compile(r"((to|attn|attention)_|w_?)?(o|out|output)(_?(proj|projection|kernel))?(_?\d+)?")
_ATTENTION = re.compile(r"attn|attention")
_STACK = re.compile(r"scan|vmap|stack|ensemble|expert")
_LAYERS = re.compile(r"layers|blocks")
_CONVOLUTION = re.compile(r"conv")
_EMBEDDING = re.compile(r"embed|^(wte|wpe|tok|token)s?$")


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """What the rules look at."""

    name: str  # the last part of the path
    modules: tuple[str, ...]  # the other parts, outermost first, in lower case with underscores
    kind: str  # the class of the innermost module, in lower case with underscores; "" for a dict
    shape: tuple[int, ...]

    @property
    def module(self) -> str:
        """The innermost module that has a name and no number."""
        return next((part for part in reversed(self.modules) if not part.isdecimal()), "")

    @property
    def label(self) -> str:
        """The name that tells most: that of the module if the leaf's own is one that any leaf has."""
        return self.module if self.name in _GENERIC_NAMES and self.modules else self.name

    @functools.cached_property
    def is_vector_by_name(self) -> bool:
        """Whether the leaf is named as, or lies in, what does not multiply."""
        name = _snake(self.name)
        if name.split("_")[-1] in _GENERIC_NAMES:
            in_norm = bool(_NORM.search(self.module) or _NORM.search(self.kind))
            return in_norm and name not in _MATRIX_NAMES
        if _VECTOR.search(name) or name.endswith(("bias", "scale", "offset")):
            return True
        return bool(_NORM.search(self.module) or _NORM.search(self.kind))

    def named(self, pattern: re.Pattern) -> bool:
        """Whether the leaf's label, or the class of its module, is called so."""
        return bool(pattern.search(self.label) or pattern.search(self.kind))


def _described(params: Any) -> dict[str, _Leaf]:
    """What the rules look at, for every leaf, by path."""
    found = {}

    def walk(node: Any, path: tuple, kind: str) -> None:
        children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda other: other is not node)[0]
        if len(children) == 1 and children[0][1] is node:
            name = path_name(path)
            *modules, own = name.split("/")
            shape = tuple(getattr(node, "shape", ()))
            found[name] = _Leaf(own, tuple(_snake(part) for part in modules if part != "~"), kind, shape)
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


class _Rules:
    """The rules, for the leaves of one tree."""

    def __init__(self, leaves: Mapping[str, _Leaf]):
        self._beside: dict[tuple[str, ...], list[_Leaf]] = {}
        self._inside: dict[tuple[str, ...], list[_Leaf]] = {}
        for leaf in leaves.values():
            self._beside.setdefault(leaf.modules, []).append(leaf)
            for depth in range(len(leaf.modules) + 1):
                self._inside.setdefault(leaf.modules[:depth], []).append(leaf)
        self._named_vectors = {leaf for leaf in leaves.values() if leaf.is_vector_by_name or self._is_short_bias(leaf)}
        self._stacks = {modules: self._agreed_stack(inside) for modules, inside in self._inside.items()}

    def layout(self, leaf: _Leaf) -> Layout:
        rank = len(leaf.shape)
        stack, guess = self._stack(leaf)
        vector = self._is_vector(leaf) or (leaf.name not in _GENERIC_NAMES and _is_thin(leaf.shape))
        if vector or rank - stack < 2:  # of a stack, each layer has one axis
            stack = min(stack, rank - 1)
            return Layout((), tuple(range(stack, rank)), tuple(range(stack)))
        return self._matrix(leaf, stack, guess)

    def _is_vector(self, leaf: _Leaf) -> bool:
        """Whether a leaf is called a bias or a gain, or has the shape of the bias beside it, as no matrix has."""
        return leaf in self._named_vectors or any(
            other.shape == leaf.shape for other in self._beside[leaf.modules] if other in self._named_vectors
        )

    def _is_short_bias(self, leaf: _Leaf) -> bool:
        """Whether a leaf is the b (b1, b_ih) of a w that has more axes."""
        return bool(_SHORT_BIAS.fullmatch(leaf.name)) and any(
            other.name == f"w{leaf.name[1:]}" and len(other.shape) > len(leaf.shape)
            for other in self._beside[leaf.modules]
        )

    def _bias(self, leaf: _Leaf) -> tuple[int, ...]:
        """The shape of the bias of the layer whose kernel a leaf is; () if there is none."""
        found = [other for other in self._beside[leaf.modules] if other in self._named_vectors]
        if leaf.name not in _GENERIC_NAMES or not found:
            return ()
        return self._plain_shape(min(found, key=lambda other: "bias" not in other.name and other.name[0] != "b"))

    def _plain_shape(self, bias: _Leaf) -> tuple[int, ...]:
        """The shape of a bias or gain; of a bias of Equinox's convolutions, (C, 1, 1), without the ones."""
        of_convolution = any(
            "weight" in other.name and len(other.shape) == len(bias.shape) + 1
            and (len(other.shape) > 3 or other.named(_CONVOLUTION)) for other in self._beside[bias.modules]
        )  # fmt: skip
        shape = bias.shape
        while of_convolution and len(shape) > 1 and shape[-1] == 1:
            shape = shape[:-1]
        return shape

    def _agreed_stack(self, inside: Sequence[_Leaf]) -> int:
        """How many leading axes a module's leaves are stacked over.

        A bias or gain of one layer has one axis. Where all of a module have more, and all leaves have the same leading
        axes, these are a stack.
        """
        vectors = [leaf for leaf in inside if self._is_vector(leaf)]
        if len(inside) < 2 or not vectors:
            return 0
        stack = min(len(self._plain_shape(leaf)) - 1 for leaf in vectors)
        for leaf in inside:
            stack = min(stack, len(leaf.shape) - (2 if leaf.name in _MATRIX_NAMES else 1))
            same = [a == b for a, b in zip(leaf.shape, inside[0].shape, strict=False)]
            stack = min(stack, (*same, False).index(False))
        return max(stack, 0)

    def _stack(self, leaf: _Leaf) -> tuple[int, str]:
        """How many leading axes of a leaf are stacked layers, and what is in doubt about it."""
        for depth in range(len(leaf.modules), -1, -1):
            if stack := self._stacks[leaf.modules[:depth]]:
                return stack, ""
        if len(leaf.shape) < 3 or self._is_vector(leaf):
            return 0, ""
        for depth, part in enumerate(leaf.modules, 1):
            numbered = any(other.isdecimal() for other in leaf.modules[depth:])
            if _STACK.search(part) or (_LAYERS.fullmatch(part) and not numbered):
                inside = self._inside[leaf.modules[:depth]]
                # A bias of one layer says that there is no stack.
                if all(len(other.shape) > 1 and other.shape[0] == leaf.shape[0] for other in inside):
                    return 1, "" if _STACK.search(part) else f"axis 0 is taken for layers, as it lies in {part}"
        return 0, ""

    def _matrix(self, leaf: _Leaf, stack: int, guess: str) -> Layout:
        rank, shape, bias = len(leaf.shape), leaf.shape[stack:], self._bias(leaf)[stack:]
        stacked, axes = tuple(range(stack)), tuple(range(stack, rank))

        def layout(inputs: Sequence[int], outputs: Sequence[int], doubt: str = guess) -> Layout:
            return Layout(tuple(inputs), tuple(outputs), stacked, guess=doubt)

        if leaf.named(_EMBEDDING):
            return Layout((rank - 2,), (rank - 1,), tuple(range(rank - 2)), guess=guess)
        if len(shape) > 2 and _HEADS_OUT.fullmatch(_snake(leaf.label)):
            return layout(axes[:1], axes[1:])
        if len(shape) == 3 and _HEADS_IN.fullmatch(_snake(leaf.label)) and self._in_attention(leaf):
            return layout(axes[:2], axes[2:])
        if 1 < len(bias) < len(shape) and shape[-len(bias) :] == bias:
            return layout(axes[: -len(bias)], axes[-len(bias) :])
        outputs_first = "weight" in leaf.name
        if len(shape) > 3 or leaf.named(_CONVOLUTION) or len(shape) == 2:
            first, second = axes[:2] if outputs_first else axes[-2:][::-1]  # outputs, inputs
            if len(bias) == 1 and bias[0] != leaf.shape[first] and bias[0] == leaf.shape[second]:
                first, second = second, first
            known = len(shape) < 5 or leaf.name in _GENERIC_NAMES or leaf.named(_CONVOLUTION)
            doubt = guess if known else guess or "taken for a convolution, inputs and outputs last"
            return layout([second], [first], doubt)
        if len(bias) == 1:  # a convolution over a sequence, or several axes of inputs
            ends = axes[1::-1] if outputs_first else axes[-2:]
            return layout(ends[:1], ends[1:], guess or "taken for a convolution over one axis")
        ends = axes[:0:-1] if outputs_first else axes[1:]
        return Layout(ends[:1], ends[1:], (*stacked, stack), guess=guess or f"axis {stack} is taken for stacked layers")

    def _in_attention(self, leaf: _Leaf) -> bool:
        """Whether query, key or value stand beside a leaf (or its module), or a module around it is attention."""
        around = leaf.modules[:-1] if leaf.label != leaf.name else leaf.modules
        beside = {other.modules[len(around)] if len(other.modules) > len(around) else other.name
                  for other in self._inside[around]}  # fmt: skip
        heads = any(_HEADS_OUT.fullmatch(_snake(name)) for name in beside)
        return heads or any(_ATTENTION.search(part) for part in (*around, leaf.kind))


def _is_thin(shape: Sequence[int]) -> bool:
    """Whether an array of three or more axes is one vector, such as (C, 1, 1)."""
    return len(shape) > 2 and sum(size > 1 for size in shape) < 2
