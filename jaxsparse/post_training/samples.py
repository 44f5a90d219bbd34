"""Calibration data: batches of arguments, and statistics of each of their samples by itself."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.trace.program import is_array

__all__ = ["arrays_of", "by_sample", "checked_batches", "each_batch", "jitted", "kind", "shapes_of"]

logger = logging.getLogger("jaxsparse")


def checked_batches(batches: Iterable[Any], least: int = 1) -> Iterator[tuple[Any, ...]]:
    """The args after params that each batch is: a tuple as it is, anything else alone.

    Raises:
      ValueError: if there are fewer than ``least``, 0 or 1; if they are one array, one dict, or no iterable.
    """
    if is_array(batches) or isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        given = f"one array of shape {tuple(batches.shape)}" if is_array(batches) else repr(batches)  # type: ignore[attr-defined]
        raise ValueError(
            f"batches must be an iterable of batches, got {given}: give [batch], or a list of (arg, arg) if the model "
            "takes several"
        )
    found = 0
    for batch in batches:
        found += 1
        yield batch if type(batch) is tuple else (batch,)  # one of a class of tuples is one argument
    if found < least:
        raise ValueError("batches has no batch: calibration needs one at least")


def each_batch(step: Callable[..., Any], params: Any, batches: Iterable[Any]) -> Iterator[Any]:
    """Call ``step(params, *args)`` for each batch, and hand on what it returns.

    Raises:
      ValueError: for whatever goes wrong with a batch, naming its number and shapes.
    """
    for number, args in enumerate(checked_batches(batches)):
        try:
            yield step(params, *args)
        except Exception as error:
            raise ValueError(f"batch {number}, {shapes_of(args)}: {error}") from error


def shapes_of(args: Any) -> str:
    """The shapes and dtypes of arguments, for messages; what is no array as it is."""
    shapes = [f"{leaf.dtype}{list(leaf.shape)}" if is_array(leaf) else repr(leaf) for leaf in jax.tree.leaves(args)]
    return f"({', '.join(shapes)})"


def kind(leaf: Any) -> Any:
    """The part of an argument that its program depends on: shape and dtype of an array, anything else itself."""
    if is_array(leaf):
        return tuple(leaf.shape), leaf.dtype, getattr(jax.typeof(leaf), "weak_type", False)
    return type(leaf), leaf if getattr(leaf, "__hash__", None) else id(leaf)


def arrays_of(params: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The leaves that are arrays, which can be arguments of ``jax.jit``, and what puts others in their places."""
    leaves, treedef = jax.tree.flatten(params)
    places = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
    others = [None if is_array(leaf) else leaf for leaf in leaves]  # not the arrays, whose memory others may need

    def put(arrays: Sequence[Any]) -> Any:
        filled = list(others)
        for i, array in zip(places, arrays, strict=True):
            filled[i] = array
        return treedef.unflatten(filled)

    return [leaves[i] for i in places], put


def jitted(function: Callable[..., Any], params: Any) -> Callable[..., Any]:
    """``function(params, *args)`` in ``jax.jit``, where leaves that are no arrays are part of the program.

    Args:
      function: of params and args.
      params: the params that will be given: their leaves that are no arrays are always these. Those of args, such as
        ``"eval"`` or a function, may differ from call to call; each has a program of its own.
    """
    _, put = arrays_of(params)
    programs: dict[Any, Callable[..., Any]] = {}

    def call(params: Any, *args: Any) -> Any:
        arrays, put_args = arrays_of(args)
        leaves, treedef = jax.tree.flatten(args)
        fixed = treedef, *(None if is_array(leaf) else kind(leaf) for leaf in leaves)  # jit looks at the arrays
        if fixed not in programs:
            programs[fixed] = jax.jit(lambda weights, arrays: function(put(weights), *put_args(arrays)))
        return programs[fixed](arrays_of(params)[0], arrays)

    return call


def by_sample(function: Callable[..., Any], params: Any, samples: int | Sequence[int | None] | None) -> Callable:
    """``function(params, *args)`` of each sample by itself, summed up over the samples of a batch, and jitted.

    Args:
      function: of params and args, a batch of one sample; it returns a pytree of arrays.
      params: the params that will be given, whose leaves that are no arrays are part of the program.
      samples: the axis of samples in the arrays of all args, or of each; None: these are given as they are, and so is
        what is no array.

    Returns:
      The function of params and args of a batch. It raises a ValueError for args without such an axis.
    """

    def summed(params: Any, *args: Any) -> Any:
        axes = _axes(samples, args)
        if all(axis is None for axis in axes):
            return function(params, *args)
        split = [arrays_of(arg) for arg in args]  # vmap takes nothing but arrays

        def one(*arrays: Any) -> Any:
            batch = [
                put(own if axis is None else [jnp.expand_dims(x, axis) for x in own])
                for own, axis, (_, put) in zip(arrays, axes, split, strict=True)
            ]
            return function(params, *batch)

        return jax.tree.map(lambda x: x.sum(0), jax.vmap(one, in_axes=axes)(*(arrays for arrays, _ in split)))

    return jitted(summed, params)


def _axes(samples: int | Sequence[int | None] | None, args: Sequence[Any]) -> tuple[int | None, ...]:
    """The axis of samples of each of the args, which must have it, all of one length."""
    axes = (samples,) * len(args) if samples is None or isinstance(samples, int) else tuple(samples)
    if len(axes) != len(args):
        raise ValueError(
            f"samples must be an axis, or one for each of the {len(args)} args after params, got {samples!r}"
        )
    lengths: dict[int, str] = {}
    for number, (arg, axis) in enumerate(zip(args, axes, strict=True)):
        if axis is None:
            continue
        for leaf in arrays_of(arg)[0]:
            shape = np.shape(leaf)
            if not -len(shape) <= axis < len(shape):
                raise ValueError(
                    f"arg {number} after params has an array of shape {shape}, without the axis {axis} of samples: "
                    "give samples= with an axis for each of the args, None for those that all samples share"
                )
            lengths.setdefault(shape[axis], f"{shape[axis]} in arg {number}")
            logger.info(
                "arg %d after params: %d samples along axis %d of an array of %s", number, shape[axis], axis, shape
            )
    if len(lengths) > 1:
        raise ValueError(
            f"the args have different numbers of samples, {' and '.join(lengths.values())}: give samples= with an axis "
            "for each of the args, None for those that all samples share"
        )
    return axes
