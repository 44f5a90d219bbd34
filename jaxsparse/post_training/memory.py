"""The memory that post-training pruning takes, said before it starts."""

from collections.abc import Sequence
from typing import Any

from jax.extend.core import Literal, jaxprs_in_params

from jaxsparse.trace.program import live_eqns, opened

__all__ = ["as_text", "widest"]


def widest(jaxpr: Any, data: Sequence[bool]) -> int:
    """The bytes of all values that are there at once, at the widest point of a program, by shapes.

    Args:
      jaxpr: the program.
      data: whether each of its inputs counts; what is made of the others alone counts for nothing.
    """
    jaxpr, _ = opened(jaxpr)
    eqns = live_eqns(jaxpr)
    last = {v: i for i, eqn in enumerate(eqns) for v in eqn.invars if not isinstance(v, Literal)}
    last |= {v: len(eqns) for v in jaxpr.outvars if not isinstance(v, Literal)}
    counted = {v for v, counts in zip(jaxpr.invars, data, strict=True) if counts}
    there: dict[Any, int] = {}  # the inputs belong to the caller
    most = 0
    for i, eqn in enumerate(eqns):
        ins = [not isinstance(v, Literal) and v in counted for v in eqn.invars]
        if not any(ins):
            continue
        counted |= set(eqn.outvars)
        own = {v: v.aval.size * v.aval.dtype.itemsize for v in eqn.outvars}
        insides = [opened(inner)[0] for inner in jaxprs_in_params(eqn.params)]
        flags = [ins if len(j.invars) == len(ins) else [True] * len(j.invars) for j in insides]
        inner = max([widest(j, flag) for j, flag in zip(insides, flags, strict=True)], default=0)
        most = max(most, sum(there.values()) + max(inner, sum(own.values())))
        there = {v: n for v, n in (there | own).items() if last.get(v, i) > i}
    return most


def as_text(size: float) -> str:
    """A number of bytes in words.

    Examples:
      >>> as_text(3 * 2**20)
      '3.0 MiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1024
    return f"{size:.1f} GiB"
