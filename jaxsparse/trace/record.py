"""Statistics of what arrives at every product of a function, for saliencies that look at activations."""

from collections.abc import Callable, Sequence
from typing import Any, overload

import jax.numpy as jnp

from jaxsparse.trace.moments import Moments, Statistic
from jaxsparse.trace.program import Traced, is_array, trace
from jaxsparse.trace.recorder import Recorder
from jaxsparse.trace.views import whole_leaf
from jaxsparse.trees import by_path, by_pattern
from jaxsparse.user_warnings import warn

__all__ = ["moments_of", "record"]


@overload
def record(
    apply: Callable, params: Any, *args: Any, gram: bool = False, leaves: str | Sequence[str] | None = None
) -> dict[str, Moments]: ...


@overload
def record(
    apply: Callable, params: Any, *args: Any, leaves: str | Sequence[str] | None = None, statistic: Callable
) -> dict[str, Statistic]: ...


def record(
    apply: Callable,
    params: Any,
    *args: Any,
    gram: bool = False,
    leaves: str | Sequence[str] | None = None,
    statistic: Callable | None = None,
) -> dict[str, Any]:
    """Sum up second moments, Gram matrices, or a statistic of your own, of what arrives at every product with a leaf.

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

    A statistic is a function of rows, which are those of all samples of a batch and of all places in them, in no
    certain order. For statistics of one sample, give one sample at a time, as by ``jax.vmap``; the example does so.

    Args:
      apply: a pure function of params.
      params: as ``apply`` takes them.
      *args: as ``apply`` takes them.
      gram: whether to sum up products of all pairs of inputs, (inputs, inputs), not squares alone.
      leaves: paths or patterns of the leaves to look at (:func:`jaxsparse.trees.matching`); None: all.
      statistic: a function of what arrives at one product, ``(*leading, rows, inputs)`` in float32, which returns a
        number for each input, ``(*leading, inputs)``. It is called wherever products are, inside of ``scan`` too, and
        its results are added up, so it should be a sum over rows; and each input counts by itself, since devices may
        have some of them only. None: moments.

    Returns:
      path -> :class:`Moments`, or with a statistic :class:`Statistic`, of the leaves that take part in a product.

    Raises:
      ValueError: for a pattern that matches no leaf, and for a statistic that returns another shape.

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

      The mean of the absolute inputs in each of three samples of two rows each:

      >>> import jax
      >>> def mean_abs(x):
      ...     found = record(mlp, params, x, statistic=lambda rows: jnp.abs(rows).sum(-2))
      ...     return {path: sums.mean for path, sums in found.items()}
      >>> x = jnp.arange(12.0).reshape(3, 2, 2) - 6
      >>> jax.vmap(mean_abs)(x)["up"].tolist()
      [[5.0, 4.0], [1.0, 1.0], [3.0, 4.0]]
    """
    paths = [path for path, leaf in by_path(params).items() if is_array(leaf) and jnp.ndim(leaf)]
    if statistic is not None and gram:
        raise ValueError("record gives moments or a statistic: gram=True and statistic= exclude each other")
    given = [leaves] if isinstance(leaves, str) else leaves
    chosen = paths if given is None else list(by_pattern(dict.fromkeys(given), paths, "leaves"))
    traced = trace(apply, params, *args)
    found, missed = moments_of(traced, traced.leaves, chosen, gram, statistic)
    missed = {path: why for path, why in missed.items() if path in chosen}
    if given is not None:
        missed |= {path: "is multiplied by nothing" for path in chosen if path not in found and path not in missed}
    if missed:
        warn(
            "not all is recorded: " + "; ".join(f"{path} {why}" for path, why in missed.items()),
        )
    return {path: found[path] for path in paths if path in found}


def moments_of(
    traced: Traced, leaves: Sequence[Any], chosen: Sequence[str], gram: bool, statistic: Callable | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """As :func:`record`, of a function that is traced.

    Args:
      traced: the function.
      leaves: its inputs.
      chosen: paths of the leaves to look at.
      gram: whether to sum up products of all pairs of inputs.
      statistic: a function of rows, as there.

    Returns:
      path -> :class:`Moments`, or :class:`Statistic`, and path -> why a product with it is not recorded.
    """
    recorder = Recorder(chosen, gram, statistic)
    recorder.run(
        traced.closed,
        [leaf if path is None else whole_leaf(path, leaf) for path, leaf in zip(traced.paths, leaves, strict=True)],
    )
    found: dict[str, Any] = {}
    for (path, _, inputs, _), moments in recorder.found.items():
        if path not in found:
            found[path] = moments
        else:
            recorder.missed.setdefault(path, f"is multiplied along axes {inputs} too, not only {found[path].inputs}")
    return found, recorder.missed
