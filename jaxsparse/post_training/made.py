"""Values that are made of params and constants alone, computed when asked for, of the weights as they are then."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from jaxsparse.trace.program import bind
from jaxsparse.trace.views import View, lost, viewed, whole_axes, whole_leaf

__all__ = ["Made", "as_is", "bound", "constant", "made_by", "plain", "sliced", "stacked", "whole"]


@dataclasses.dataclass(frozen=True)
class Made:
    """A value that is made of params and constants alone.

    Attributes:
      view: the leaf that it is, in which layout; of several leaves the first. Its value is the shape alone.
      named: whether it is made of any leaf.
      at: (axis of the leaf, entry), for the axes that scans around have taken apart.
      compute: makes the array of the weights as they are now. Its argument holds what was computed on the way, so that
        nothing is computed twice where a value is used several times.
    """

    view: View
    named: bool
    at: tuple[tuple[int, int], ...]
    compute: Callable[[dict[int, Any]], Any]

    @property
    def path(self) -> str | None:
        """The leaf; None for constants."""
        return self.view.path


def plain(value: Any, known: dict[int, Any] | None = None) -> Any:
    """The array of a value; ``known`` is what :class:`Made` computes with."""
    return value.compute({} if known is None else known) if isinstance(value, Made) else value


def constant(value: Any) -> Made:
    """A constant."""
    return Made(View(value, None), False, (), lambda _: value)


def whole(path: str, aval: Any, read: Callable[[], Any]) -> Made:
    """A leaf of params as it is."""
    return Made(whole_leaf(path, aval), True, (), lambda _: read())


def as_is(eqn: Any, args: list[Any]) -> bool:
    """Whether all operands of an equation are made of params and constants, and it does nothing but compute."""
    operands = zip(eqn.invars, args, strict=True)
    return not eqn.effects and all(isinstance(arg, Made) or isinstance(v, Literal) for v, arg in operands)


def bound(eqn: Any, args: list[Any], known: dict[int, Any] | None = None) -> list[Any]:
    """The results of an equation on arrays, whose memory is not given away: others may still need it."""
    known = {} if known is None else known
    values = [plain(arg, known) for arg in args]
    donated = eqn.params.get("donated_invars")
    with eqn.ctx.manager:
        return bind(eqn, values, **({} if donated is None else {"donated_invars": (False,) * len(donated)}))


def made_by(eqn: Any, args: list[Any]) -> list[Made]:
    """The results of an equation of which :func:`as_is` holds."""
    if not any(isinstance(arg, Made) and arg.named for arg in args):
        return [constant(out) for out in bound(eqn, args)]
    views = viewed(eqn, [arg.view if isinstance(arg, Made) else arg for arg in args], [v.aval for v in eqn.outvars])

    def results(known):
        if id(results) not in known:
            known[id(results)] = bound(eqn, args, known)
        return known[id(results)]

    found = []
    for i, view in enumerate(views):
        at = next(arg.at for arg in args if isinstance(arg, Made) and arg.path == view.path)
        found.append(Made(view, True, at, lambda known, i=i: results(known)[i]))  # type: ignore[misc]
    return found


def sliced(value: Any, i: int) -> Any:
    """Entry i of a value that a scan goes over."""
    if not isinstance(value, Made):
        return _entry(value, i)

    def compute(known):
        return _entry(plain(value, known), i)

    if not value.named:
        return constant(compute({}))
    view, at = value.view, value.at
    shape = jax.ShapeDtypeStruct(view.value.shape[1:], view.value.dtype)
    first = whole_axes([view.axes[0]])
    if first is None or len(first) > 1:
        view = dataclasses.replace(view, value=shape, axes=(None,) * len(shape.shape))
    else:
        view = dataclasses.replace(view, value=shape, axes=view.axes[1:], scanned=(*view.scanned, *first))
        at = (*at, *((axis, i) for axis in first))
    return Made(view, True, at, compute)


@jax.jit
def _entry(x, i):
    return lax.dynamic_index_in_dim(x, i, 0, keepdims=False)  # compiled once for all entries


def stacked(values: list[Any], aval: Any) -> Any:
    """The results of the rounds of a scan, given in order, as the scan returns them."""
    named = [value for value in values if isinstance(value, Made) and value.named]

    def compute(known):
        return jnp.stack([plain(value, known) for value in values])

    if not all(isinstance(value, Made) for value in values):
        return compute({})
    return Made(lost(named[0].path, aval), True, (), compute) if named else constant(compute({}))
