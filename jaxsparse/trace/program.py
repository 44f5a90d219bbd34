"""Functions of params as jaxprs: how they are traced, which params they use, and where in the user's code a line is.

What differs between JAX 0.10 and 0.12 stands here and nowhere else: :func:`opened`, :func:`scan_counts` and
:func:`bind`.
"""

import contextlib
import contextvars
import dataclasses
import functools
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import Literal

from jaxsparse.trees import leaf_paths, listed
from jaxsparse.user_warnings import warn

__all__ = [
    "Traced",
    "Where",
    "bind",
    "is_array",
    "live_eqns",
    "opened",
    "scan_counts",
    "trace",
    "used_inputs",
    "where",
    "within",
]

# Primitives that run one jaxpr on all their operands, in order; those they bring along for themselves come first.
CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "remat", "custom_jvp_call")
# Packages whose lines are not the user's own.
LIBRARIES = {"chex", "einops", "equinox", "flax", "haiku", "jax", "jaxlib", "jaxtyping", "optax"}
# Errors of JAX where the program depends on the values of its inputs.
NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


# Adaptors to the versions of JAX.


def opened(jaxpr: Any) -> tuple[Any, tuple]:
    """(jaxpr, consts) of a Jaxpr or a ClosedJaxpr; from JAX 0.11 on they are one class."""
    return getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ()))


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """Where the carry and where the xs begin among the operands of a scan."""
    if "ft_in" in params:  # JAX 0.11
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(consts) + len(carry)
    return params["num_consts"], params["num_consts"] + params["num_carry"]


def bind(eqn: Any, args: Sequence[Any], **changed: Any) -> list[Any]:
    """The results of a primitive on other operands, with some of its params changed."""
    outs = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params) | changed)
    return list(outs) if eqn.primitive.multiple_results else [outs]


# Places.


_OUTER: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar("outer", default=())


@contextlib.contextmanager
def within(eqn: Any) -> Iterator[None]:
    """Inside of it, places are inside of an equation: what a jitted function of a library does has no other line."""
    token = _OUTER.set((eqn, *_OUTER.get()))
    try:
        yield
    finally:
        _OUTER.reset(token)


@dataclasses.dataclass(frozen=True)
class Where:
    """A place in a program; its text is made when it is asked for, since that takes a while.

    The text has the primitive and the innermost line of the user's own code (file:line, function): frames of JAX, of
    Flax, Equinox and Haiku, and of this package are passed over.

    Attributes:
      eqn: the equation of the jaxpr.
      note: what is said about it, in front of the text.
      outer: the equations around it, from the inside out. One jaxpr may be called in several places.
    """

    eqn: Any
    note: str = ""
    outer: tuple[Any, ...] = ()

    def _key(self) -> tuple[Any, ...]:
        return (self.note, id(self.eqn), *map(id, self.outer))

    def __hash__(self) -> int:
        return hash(self._key())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Where) and self._key() == other._key()

    def __str__(self) -> str:
        tracebacks = [eqn.source_info.traceback for eqn in (self.eqn, *self.outer)]
        frames = [frame for traceback in tracebacks if traceback for frame in traceback.frames]
        line = user_line((frame.file_name, frame.line_num, frame.function_name) for frame in frames)
        line = line or source_info_util.summarize(self.eqn.source_info) or "an unknown line"
        scope = ""
        for eqn in (*self.outer[::-1], self.eqn):  # one that is inside of another may have the other's scope, too
            own = str(eqn.source_info.name_stack)
            scope = own if own.startswith(scope) else f"{scope}/{own}".rstrip("/")
        return f"{self.note}{self.eqn.primitive.name} at {line}" + (f" in {scope}" if scope else "")


def where(eqn: Any, note: str = "") -> Where:
    """The place of an equation, with a note; see :func:`within`."""
    return Where(eqn, f"{note}: " if note else "", _OUTER.get())


@functools.cache
def _is_library(file: str) -> bool:
    """Whether a file is part of JAX, of Python, of a library of layers or of this package."""
    own = [Path(__file__).parents[1] / name for name in ("trace", "nn", "kernels")]
    files = [getattr(sys.modules.get(name), "__file__", None) for name in LIBRARIES]
    folders = [*own, *(Path(each).parent for each in files if each)]
    if file.startswith((*(f"{folder}{os.sep}" for folder in folders), "<frozen")):
        return True
    stdlib = sysconfig.get_paths()["stdlib"] + os.sep
    return file.startswith(stdlib) and "-packages" not in file


def user_line(frames: Iterable[tuple[str, int, str]]) -> str:
    """The first of (file, line, function) that is the user's, as text; empty if none is."""
    for file, line, function in frames:
        if not _is_library(file):
            near = os.path.relpath(file) if file.startswith(os.getcwd() + os.sep) else file
            return f"{near}:{line} ({function.rpartition('.<locals>.')[2]})"
    return ""


# What is used.


def live_eqns(jaxpr: Any) -> list[Any]:
    """The equations whose results are used, or that have effects.

    Models leave dead code behind, such as ``mask_of(x[..., 0])``, which uses the shape alone.
    """
    used, kept = {v for v in jaxpr.outvars if not isinstance(v, Literal)}, []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in used for v in eqn.outvars):
            kept.append(eqn)
            used.update(v for v in eqn.invars if not isinstance(v, Literal))
    return kept[::-1]


def used_inputs(jaxpr: Any) -> list[bool]:
    """Whether the results depend on an input, for each input of a jaxpr."""
    jaxpr, _ = opened(jaxpr)
    used = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    for eqn in live_eqns(jaxpr):
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")) if eqn.primitive.name in CALLS else None
        needed = [True] * len(eqn.invars) if inner is None or eqn.effects else used_inputs(inner)
        used.update(v for v, need in zip(eqn.invars, needed, strict=True) if need and not isinstance(v, Literal))
    return [v in used for v in jaxpr.invars]


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an input of the program: an array or its shape."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


# Tracing.


@dataclasses.dataclass
class Traced:
    """A function of params as a jaxpr; leaves that are no arrays (flags, functions, None) are part of the program.

    Attributes:
      closed: the jaxpr with its constants.
      paths: for every input of the jaxpr the path of the leaf of params that it is, or None for other arguments.
      out_paths: the path of every output of the jaxpr in what the function returns.
      given: the inputs as they were given, arrays or shapes.
      rebuild: makes what the function returns of the outputs of the jaxpr.
    """

    closed: Any
    paths: list[str | None]
    out_paths: list[str]
    given: list[Any]
    rebuild: Callable[[Sequence[Any]], Any]

    @functools.cached_property
    def leaves(self) -> list[Any]:
        """The inputs, with those of NumPy as arrays of JAX, in the dtypes that the jaxpr has."""
        return [jnp.asarray(leaf) if isinstance(leaf, np.ndarray | np.generic) else leaf for leaf in self.given]


def trace(apply: Callable[..., Any], params: Any, *args: Any) -> Traced:
    """The jaxpr of ``apply(params, *args)``; only shapes and dtypes matter, so ``jax.ShapeDtypeStruct`` will do.

    Args:
      apply: a function of params and further arguments. Flags go into a lambda, state (batch statistics, the state of
        NNX, keys) into the arguments.
      params: a pytree of arrays or their shapes.
      *args: further arguments, pytrees.

    Returns:
      A :class:`Traced`.

    Raises:
      ValueError: if ``apply`` uses none of the params, most often since it closes over them; if it changes what it
        closes over; if a shape or a branch depends on the values of arrays. A warning names single params that are not
        used.

    Examples:
      >>> import jax.numpy as jnp
      >>> traced = trace(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 3))}, jnp.ones((2, 4)))
      >>> traced.paths, [eqn.primitive.name for eqn in opened(traced.closed)[0].eqns]
      (['w', None], ['dot_general'])
    """
    if not callable(apply):
        raise ValueError(f"apply must be a function of (params, *args), got {apply!r}")
    leaves, treedef = jax.tree.flatten((params, args))
    names = leaf_paths(params)
    dynamic = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
    if not any(i < len(names) for i in dynamic):
        raise ValueError(f"the params must have arrays, got {listed([repr(leaf) for leaf in leaves[: len(names)]])}")
    found: dict[str, Any] = {}

    def flat(*arrays: Any) -> list[Any]:
        filled = list(leaves)
        for i, array in zip(dynamic, arrays, strict=True):
            filled[i] = array
        params, args = treedef.unflatten(filled)
        out = apply(params, *args)
        found["out"], found["def"] = jax.tree.flatten(out)
        found["paths"] = leaf_paths(out)
        found["dynamic"] = [i for i, leaf in enumerate(found["out"]) if is_array(leaf) or isinstance(leaf, float | int)]
        return [found["out"][i] for i in found["dynamic"]]

    given = [leaves[i] for i in dynamic]
    try:
        closed = jax.make_jaxpr(flat)(*given)
    except Exception as error:
        if message := _explained(error):
            raise ValueError(message) from error
        raise

    def rebuild(outs: Sequence[Any]) -> Any:
        filled = list(found["out"])
        for i, array in zip(found["dynamic"], outs, strict=True):
            filled[i] = array
        return found["def"].unflatten(filled)

    paths = [names[i] if i < len(names) else None for i in dynamic]
    _check_use(closed, paths)
    return Traced(closed, paths, [found["paths"][i] for i in found["dynamic"]], given, rebuild)


def _explained(error: Exception) -> str:
    """Advice about an error of tracing; empty if it is the user's own."""
    frames = []
    step = error.__traceback__
    while step is not None:
        frames.append((step.tb_frame.f_code.co_filename, step.tb_lineno, step.tb_frame.f_code.co_qualname))
        step = step.tb_next
    line = user_line(reversed(frames)) or "a line of a library"
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, NEEDS_VALUES) or (isinstance(error, TypeError) and "concrete value" in said):
        return (
            f"apply cannot be traced: {line} asks for the values of an array, and only its shape and dtype are known "
            f"({said}). Choose by jnp.where or lax.cond, and give what decides on shapes as a Python value in a lambda"
        )
    if type(error).__name__ == "TraceContextError":  # of flax.nnx, which need not be installed
        return (
            f"apply changes state that it closes over, at {line} ({said}). Give all state as arguments: "
            "graphdef, params, rest = nnx.split(model, nnx.Param, ...), and "
            "apply = lambda params, rest, x: nnx.merge(graphdef, params, rest)(x)"
        )
    return ""


def _check_use(closed: Any, paths: Sequence[str | None]) -> None:
    used = used_inputs(closed)
    unused = [path for path, use in zip(paths, used, strict=True) if path is not None and not use]
    if len(unused) == sum(path is not None for path in paths):
        raise ValueError(
            f"apply uses none of the params it is given ({listed(unused)}): does it close over others? It must compute "
            "with its first argument, as in lambda params, x: model.apply({'params': params}, x)"
        )
    if unused:
        warn(f"apply does not use these params: {listed(unused)}")
