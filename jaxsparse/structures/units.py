"""Units of a leaf: single weights, tiles, kernels and filters."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

from jaxsparse.layouts import Layout
from jaxsparse.structures.base import Structure

__all__ = ["block", "channel", "kernel", "weight"]


@dataclasses.dataclass(frozen=True, repr=False)
class weight(Structure):  # noqa: N801  (lower case, for it is called like the functions that methods are)
    """Every weight by itself."""

    has_sign: ClassVar[bool] = True
    positional: ClassVar[bool] = False

    def axes(self, rank: int) -> tuple[int, ...]:
        """A weight extends over no axis."""
        del rank
        return ()


@dataclasses.dataclass(frozen=True, repr=False)
class block(Structure):  # noqa: N801
    """Tiles of ``bm`` inputs times ``bn`` outputs.

    Of a convolution (kh, kw, inputs, outputs) each spatial place is tiled by itself; a 1x1 convolution is a matrix.

    Attributes:
      bm: inputs of a tile, int >= 1.
      bn: outputs of a tile, int >= 1.

    Raises:
      ValueError: for sizes below 1, an unknown ``score`` or ``ragged`` (see :class:`Structure`).

    Examples:
      >>> import jax.numpy as jnp
      >>> mask = jnp.zeros((4, 6), bool).at[0, 5].set(True)
      >>> block(2, 3).units(mask).tolist()
      [[False, True], [False, False]]
      >>> block(2, 3).expand(block(2, 3).units(mask), mask)[0].tolist()
      [False, False, False, True, True, True]
    """

    bm: int
    bn: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._whole("bm", "bn")
        if self.bm < 1 or self.bn < 1:
            raise ValueError(f"block needs sizes of at least 1, got {self}")

    def tile(self, shape: Sequence[int]) -> tuple[int, ...]:
        """1 x ... x bm x bn."""
        return (*(1 for _ in shape[:-2]), self.bm, self.bn)

    def _fits(self, seen: Sequence[int]) -> bool:
        return len(seen) >= 2 and super()._fits(seen)


@dataclasses.dataclass(frozen=True, repr=False)
class kernel(Structure):  # noqa: N801
    """The kernel of one input and one output of a convolution: all of its spatial positions.

    Given for all leaves at once, it is for convolutions, and matrices go by single weights. Named for a leaf, it takes
    any that has places. Leaves whose layout had to be guessed, and others, raise an error by default,
    ``ragged="error"``.
    """

    ragged: Literal["warn", "error"] = dataclasses.field(default="error", kw_only=True)

    def tile(self, shape: Sequence[int]) -> tuple[int, ...]:
        """All spatial positions, one input, one output."""
        return (*(1 for _ in shape[: self._stacked]), *shape[self._stacked : -2], 1, 1)

    def _fits(self, seen: Sequence[int]) -> bool:
        return len(seen) >= 3 + self._stacked

    def axes(self, rank: int) -> tuple[int, ...]:
        """The spatial axes of a convolution."""
        return _layout_of(self, rank).places(rank)


@dataclasses.dataclass(frozen=True, repr=False)
class channel(Structure):  # noqa: N801
    """The filter of one output channel: all of its spatial positions and inputs.

    Given for all leaves at once, it is for convolutions, and matrices go by single weights: the last one holds a
    network's own outputs. Named for a leaf, it takes matrices too. Leaves whose layout had to be guessed, and others,
    raise an error by default, ``ragged="error"``.
    """

    splits_outputs: ClassVar[bool] = False

    ragged: Literal["warn", "error"] = dataclasses.field(default="error", kw_only=True)

    def tile(self, shape: Sequence[int]) -> tuple[int, ...]:
        """All spatial positions and inputs, one output."""
        return (*(1 for _ in shape[: self._stacked]), *shape[self._stacked : -1], 1)

    def _fits(self, seen: Sequence[int]) -> bool:
        return len(seen) >= 2 + self._stacked

    def axes(self, rank: int) -> tuple[int, ...]:
        """The spatial axes and inputs of a filter."""
        at = _layout_of(self, rank)
        return (*at.places(rank), *at.inputs)  # type: ignore[misc]


def _layout_of(unit: Structure, rank: int) -> Layout:
    """The layout of a leaf of this rank; by default its inputs and outputs are the last two axes."""
    return (Layout(inputs=-2, outputs=-1) if unit.layout is None else unit.layout).of_rank(rank)
