"""Capabilities of the states of sparse methods, and how to find these states in an optimizer state.

An accessor such as :func:`jaxsparse.get_masks` or :func:`jaxsparse.check` knows no method: it looks for states with the
protocols below, wherever they lie in an optimizer state. No class has to be inherited. A state needs
:class:`SparseState`, and the others where they apply:

====================  ===================================================================================
protocol              the state
====================  ===================================================================================
:class:`SparseState`  has masks: every sparse method
:class:`HasNotes`     knows of conditions that are legal but seldom meant
:class:`HasLatents`   evaluates with other weights than the params on their masks
:class:`HasGates`     has gates on channels
:class:`Wraps`        holds the state of an optimizer inside, which may hold further links
====================  ===================================================================================
"""

import functools
from typing import Any, Protocol, runtime_checkable

import jax

__all__ = ["HasGates", "HasLatents", "HasNotes", "SparseState", "Wraps", "is_link_state", "link_states"]


@runtime_checkable
class SparseState(Protocol):
    """The state of a link or wrapper: it has masks."""

    def sparse_masks(self) -> Any:
        """The masks: bool arrays, ``optax.MaskedNode()`` for dense leaves."""

    def wants_momentum(self) -> bool:
        """Whether the link needs the momentum of an optimizer before it in the chain."""

    def problems(self, params: Any | None) -> list[str]:
        """The broken invariants, one sentence each; an error of :func:`jaxsparse.check`. Runs outside of jit."""


@runtime_checkable
class HasNotes(Protocol):
    """A state that may have something to say that is no error."""

    def notes(self) -> list[str]:
        """Conditions that are legal but seldom meant, one sentence each; warnings of :func:`jaxsparse.check`."""


@runtime_checkable
class HasLatents(Protocol):
    """A state with weights for evaluation that are not the params on their masks."""

    def eval_weights(self) -> Any:
        """The leaves to evaluate with, ``optax.MaskedNode()`` for those that are evaluated as they are."""


@runtime_checkable
class HasGates(Protocol):
    """A state with gates on channels.

    Attributes:
      log_alpha: name of the group -> (size,), float32: the locations of the gates.
    """

    log_alpha: Any

    def open_channels(self) -> dict[str, jax.Array]:
        """The channels of each group that are open in evaluation: name -> (size,), bool."""


@runtime_checkable
class Wraps(Protocol):
    """A state with that of an optimizer inside.

    Attributes:
      inner_state: the state of the optimizer inside.
    """

    inner_state: Any


def link_states(opt_state: Any) -> list[Any]:
    """The states of all sparse methods in an optimizer state, however deep, also those inside of a wrapper's."""
    found = []
    for leaf in jax.tree.leaves(opt_state, is_leaf=is_link_state):
        if is_link_state(leaf):
            found += [leaf, *(link_states(leaf.inner_state) if isinstance(leaf, Wraps) else ())]
    return found


def is_link_state(node: Any) -> bool:
    """Whether a part of an optimizer state is a :class:`SparseState`. Each class is looked at once."""
    return _is_link_state(type(node))  # type: ignore[arg-type]


@functools.cache
def _is_link_state(kind: type) -> bool:
    return issubclass(kind, SparseState)
