"""Values of a program, and the calls and products in it, as far as they are known without computing."""

import dataclasses
from typing import Any

from jaxsparse.trace.conditions import ALWAYS, Condition
from jaxsparse.trace.program import Where
from jaxsparse.trace.spaces import Axis

__all__ = ["Node", "Scan", "Site", "Val", "fixed"]


@dataclasses.dataclass
class Val:
    """A value in a program, as far as it is known without computing it.

    Attributes:
      shape: its shape.
      axes: for each axis which entries may go away, see :class:`~jaxsparse.trace.spaces.Spaces`.
      zero: for each axis when the entries that go away along it are zeros.
      leaves: the paths of the leaves of params that it is made of.
      data: whether it is made of arguments and anything else but params.
      const: its value, where known and small.
      view: (path, for each axis the axes of the leaf, None if it is only a part of them): a leaf in another layout.
    """

    shape: tuple[int, ...]
    axes: list[Axis]
    zero: list[Condition]
    leaves: frozenset[str] = frozenset()
    data: bool = False
    const: Any = None
    view: tuple[str, tuple[tuple[int, ...] | None, ...]] | None = None


def fixed(aval: Any, data: bool = False) -> Val:
    """A value none of whose entries can go away."""
    rank = len(aval.shape)
    return Val(tuple(aval.shape), [None] * rank, [ALWAYS] * rank, data=data)


@dataclasses.dataclass
class Site:
    """A product in a program.

    Attributes:
      leaves: the paths of the leaves that one side of it is made of; none for a product of activations.
      macs: its multiply-adds, of all rounds of the loops around it.
      times: the rounds.
      bounded: False inside a while loop, whose rounds are not known and taken as one.
      where: its place in the program.
    """

    leaves: tuple[str, ...]
    macs: float
    times: float
    bounded: bool
    where: Where


@dataclasses.dataclass
class Scan:
    """A loop over stacked layers.

    Attributes:
      length: the number of layers.
      leaves: the paths of the leaves whose first axis it goes along.
      shared: the axes of all that goes from layer to layer, or in and out.
    """

    length: int
    leaves: list[str]
    shared: list[Axis]


class Node:
    """A call of a jaxpr and all that is known inside of it; the same jaxpr may be called elsewhere.

    Attributes:
      env: the :class:`Val` of each variable.
      children: (id of an eqn, number) -> the node of the call of a jaxpr in it.
    """

    def __init__(self) -> None:
        self.env: dict[Any, Val] = {}
        self.children: dict[tuple[int, int], Node] = {}
