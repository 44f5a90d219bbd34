"""Moments of what arrives at every product of a function, for saliencies that look at activations."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jaxsparse.trace.moments import Moments
from jaxsparse.trace.program import is_array, trace
from jaxsparse.trace.recorder import Recorder
from jaxsparse.trace.views import whole_leaf
from jaxsparse.trees import by_path, by_pattern

__all__ = ["record"]


def record(
    apply: Callable, params: Any, *args: Any, gram: bool = False, leaves: str | Sequence[str] | None = None
) -> dict[str, Moments]:
    """Sum up second moments, or Gram matrices, of what arrives at every product with a leaf.

    It evaluates ``apply(params, *args)`` and looks at every ``dot_general`` and convolution of which one side is a leaf
    of params, also one that was cast, scaled, reshaped, transposed or split, wherever it is: in ``jit``, ``vmap``,
    ``cond``, ``remat``, functions with custom derivatives, and ``while_loop``; in a ``scan`` for each layer. In a
    ``shard_map``, and of arrays that are divided among devices, sums are over the whole batch (with
    ``check_vma=False`` over the axes of the mesh that arguments are divided along). A convolution's rows are the
    patches under its window, with padding as zeros; those of a grouped one are apart for each group.

    It is a function of arrays: jit it, and add up batches, here of an iterator::

        step = jax.jit(lambda params, x: record(apply, params, x))
        moments = step(params, next(batches))
        for x in batches:
            moments = jax.tree.map(jnp.add, moments, step(params, x))

    Args:
      apply: a pure function of params.
      params: as ``apply`` takes them.
      *args: as ``apply`` takes them.
      gram: whether to sum up products of all pairs of inputs, (inputs, inputs), not squares alone.
      leaves: paths or patterns of the leaves to look at (:func:`jaxsparse.trees.matching`); None: all.

    Returns:
      path -> :class:`Moments`, of the leaves that take part in a product.

    Raises:
      ValueError: for a pattern that matches no leaf.

    Warns:
      UserWarning: for leaves whose product is not recorded, naming the line where they were lost, such as those that an
        array among the arguments scales or selects before; and for leaves that ``leaves`` names and that nothing is
        multiplied by. A leaf that is added to something is taken for a table of positions.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"up": jnp.ones((2, 3)), "down": jnp.ones((3, 2))}
      >>> def mlp(params, x):
      ...     return (x @ params["up"]) @ params["down"]
      >>> moments = record(mlp, params, jnp.array([[1.0, 2.0], [3.0, 0.0]]))
      >>> float(moments["up"].rows), moments["up"].second.tolist(), moments["down"].mean.tolist()
      (2.0, [10.0, 4.0], [3.0, 3.0, 3.0])
    """
    paths = [path for path, leaf in by_path(params).items() if is_array(leaf) and jnp.ndim(leaf)]
    given = [leaves] if isinstance(leaves, str) else leaves
    chosen = paths if given is None else list(by_pattern(dict.fromkeys(given), paths, "leaves"))
    traced = trace(apply, params, *args)
    recorder = Recorder(chosen, gram)
    recorder.run(
        traced.closed,
        [
            leaf if path is None else whole_leaf(path, leaf)
            for path, leaf in zip(traced.paths, traced.leaves, strict=True)
        ],
    )
    found: dict[str, Moments] = {}
    for (path, _, inputs, _), moments in recorder.found.items():
        if path not in found:
            found[path] = moments
        else:
            recorder.missed.setdefault(path, f"is multiplied along axes {inputs} too, not only {found[path].inputs}")
    missed = {path: why for path, why in recorder.missed.items() if path in chosen}
    if given is not None:
        missed |= {path: "is multiplied by nothing" for path in chosen if path not in found and path not in missed}
    if missed:
        warnings.warn(
            "not all is recorded: " + "; ".join(f"{path} {why}" for path, why in missed.items()),
            UserWarning,
            stacklevel=2,
        )
    return {path: found[path] for path in paths if path in found}
