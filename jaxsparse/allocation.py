"""Layer-wise sparsity distribution: the number of weights that each layer keeps, with exact totals.

The numbers here decide counts, so sums that could depend on the order of their
terms are formed in integers or in fixed point: every layout of a computation (one
device, many, sharded) reaches the same counts.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsparse.layouts import Layout, LayoutLike, leaf_layouts
from jaxsparse.reductions import count_true, sums
from jaxsparse.selection import top_k_mask
from jaxsparse.trees import by_pattern

__all__ = [
    "Allocation",
    "apportion",
    "check_allocation",
    "check_precision",
    "check_sparsities",
    "check_sparsity",
    "check_total",
    "erdos_renyi",
    "exact_mean",
    "exact_sum",
    "layer_counts",
    "with_floor",
]

Allocation: TypeAlias = Literal["uniform", "erdos_renyi", "erdos_renyi_kernel"]
_FIXED_POINT_BITS = 23  # as many as a float32 has
Sparsity: TypeAlias = (
    float | jax.Array | Mapping[str, float] | Sequence[tuple[str, float]] | Callable[[str, Any], float]
)


def erdos_renyi(shapes: Any, density: ArrayLike, kernel: bool = True, *, layout: LayoutLike = None) -> Any:
    """Layer densities by the Erdos-Renyi rule: small layers stay denser.

    A layer's density is proportional to ``(inputs + outputs) / (inputs * outputs)``,
    scaled so that the whole has the given density; layers that would exceed 1 are dense and
    the others share the rest.

    Args:
      shapes: a sequence of shapes, the last two axes inputs and outputs; or a mapping from names to shapes, whose
        inputs and outputs are found as in :func:`jaxsparse.layouts.leaf_layouts`: a stack counts as its layers.
      density: the fraction of all weights to keep, in [0, 1], possibly traced.
      kernel: True for the kernel variant (ERK), in which a convolution's spatial
        sizes count too, in sum and product; False for the original rule.
      layout: which axes are inputs and outputs, where the names do not tell: pattern -> :class:`jaxsparse.Layout`.

    Returns:
      The densities, in the container that ``shapes`` came in.

    Raises:
      ValueError: if a concrete ``density`` is outside [0, 1].

    Examples:
      >>> densities = erdos_renyi({"fc1": (784, 300), "fc2": (300, 10)}, 0.05)
      >>> {name: round(float(d), 3) for name, d in densities.items()}
      {'fc1': 0.039, 'fc2': 0.883}

    References:
      Mocanu et al., Scalable training of artificial neural networks with adaptive
      sparse connectivity (SET), 2018; Evci et al., Rigging the Lottery, 2020 (ERK).
    """
    if isinstance(shapes, Mapping):
        leaves = {name: jax.ShapeDtypeStruct(tuple(shape), np.float32) for name, shape in shapes.items()}
        layouts = leaf_layouts(leaves, layout)
        densities = _densities(list(leaves.values()), density, kernel, [layouts[name] for name in leaves])
        return dict(zip(shapes, densities, strict=True))
    return _densities([jax.ShapeDtypeStruct(tuple(shape), np.float32) for shape in shapes], density, kernel)


def _densities(
    leaves: Sequence[Any], density: ArrayLike, kernel: bool, layouts: Sequence[Layout] | None = None
) -> list[Any]:
    xp = _namespace(density)
    if xp is np and not 0 <= density <= 1:  # type: ignore[operator]
        raise ValueError(f"density must be between 0 and 1, got {density}")
    sizes = xp.asarray([float(np.prod(leaf.shape)) for leaf in leaves])
    seen = [tuple(leaf.shape) for leaf in leaves]
    if layouts is not None:  # one layer of a stack
        seen = [at.matrix_shape(shape)[len(at.stack) :] for at, shape in zip(layouts, seen, strict=True)]  # type: ignore[arg-type]
    seen = [shape if kernel else shape[-2:] for shape in seen]
    scores = xp.asarray([float(sum(shape) / max(np.prod(shape), 1)) for shape in seen])
    full = xp.zeros(len(leaves), bool)
    scale = 0.0
    for _ in leaves:  # each round finds at least one more full layer, or is the last
        room = density * sizes.sum() - xp.where(full, sizes, 0).sum()
        weight = xp.where(full, 0, scores * sizes).sum()
        scale = xp.where(weight > 0, room / xp.where(weight > 0, weight, 1), 0)
        full = full | (scale * scores >= 1)
    return list(xp.where(full, 1.0, scale * scores))


def layer_counts(
    params: dict[str, Any],
    sparsity: Sparsity,
    allocation: Allocation = "uniform",
    unit_sizes: Sequence[int] | None = None,
    *,
    layouts: Mapping[str, Layout] | None = None,
    at_least: ArrayLike = 0,
    partial: bool = False,
) -> jax.Array:
    """The number of weights, or units of several weights, that each layer keeps.

    The counts add up to the rounded total exactly, and each is within one of its
    layer's share. That holds among the layers whose units are of one size: units
    of different sizes cannot make up for each other.

    Args:
      params: arrays (or shapes with ``shape`` and ``size``) by path.
      sparsity: the fraction of zeros, in [0, 1), possibly traced; or one for each
        layer, as a mapping (or pairs) from pattern to sparsity, of which the first match wins (see
        :func:`jaxsparse.trees.matching`), or a function of path and leaf.
      allocation: how one number is shared among layers: "uniform" (every layer has
        it), "erdos_renyi", or "erdos_renyi_kernel" (see :func:`erdos_renyi`).
      unit_sizes: of how many weights a layer's units are, which divides its size;
        None counts single weights.
      layouts: which axes of each layer are inputs and outputs, by path; None finds them by name.
      at_least: the fewest units that any layer keeps (all, if it has fewer). The others give up as many, in proportion;
        a budget too small for that is exceeded.
      partial: there are more layers than these: a pattern that matches none is no error.

    Returns:
      int32, one count of units a layer.

    Raises:
      ValueError: for an unknown allocation, a sparsity outside [0, 1), patterns
        that leave out a layer or match none.
    """
    check_allocation(allocation)
    if not params:
        return jnp.zeros(0, jnp.int32)
    sizes = np.asarray([leaf.size for leaf in params.values()], np.int64)
    check_total(sizes)
    if callable(sparsity):
        sparsity = {path: sparsity(path, leaf) for path, leaf in params.items()}
    if isinstance(sparsity, Mapping | list | tuple):
        found = by_pattern(sparsity, list(params), "sparsity", partial=partial)
        if missing := sorted(set(params) - set(found)):
            raise ValueError(
                f"sparsity must be given for every prunable leaf, missing {missing} (give 0.0 to one that starts "
                'dense, leave it out of prunable=, or let {..., "*": 0.9} catch the rest)'
            )
        per_layer = [found[path] for path in params]
        for path, value in zip(params, per_layer, strict=True):
            check_sparsity(value, path)
        xp = jnp if any(_namespace(value) is jnp for value in per_layer) else np
        densities = 1 - xp.asarray(per_layer)
    else:
        check_sparsity(sparsity)
        xp, density = _namespace(sparsity), 1 - sparsity  # type: ignore[operator]
        if allocation == "uniform":
            densities = density * xp.ones(len(sizes))
        else:
            known = leaf_layouts(params) if layouts is None else layouts
            at = [known[path] for path in params]
            densities = xp.stack(_densities(list(params.values()), density, allocation == "erdos_renyi_kernel", at))
    of_units = np.ones_like(sizes) if unit_sizes is None else np.asarray(unit_sizes, np.int64)
    units = sizes // of_units
    counts: Any = np.zeros(len(sizes), np.int32)
    for size in np.unique(of_units):
        layers = np.flatnonzero(of_units == size)
        quotas, capacity = (densities * units)[layers], units[layers].astype(np.int32)
        shared = apportion(quotas, xp.round(quotas.sum()).astype(np.int32), capacity)
        if isinstance(at_least, jax.core.Tracer) or at_least:
            shared = with_floor(shared, jnp.minimum(at_least, capacity))
        counts = jnp.asarray(counts).at[layers].set(shared)
    return counts


def with_floor(counts: jax.Array, floor: ArrayLike) -> jax.Array:
    """Raises counts to a floor and takes the difference from the counts above it, in proportion to their excess.

    Args:
      counts: int32, (layers,).
      floor: the least of each layer, integers, (layers,).

    Returns:
      int32 of shape (layers,) with the sum of ``counts``, or the floor itself if that has a larger sum.

    Examples:
      >>> import jax.numpy as jnp
      >>> with_floor(jnp.array([90, 10, 0]), [1, 1, 1]).tolist()
      [89, 10, 1]
    """
    floor = jnp.asarray(floor, jnp.int32)
    total, least = jnp.sum(counts), jnp.sum(floor)
    lifted = jnp.maximum(counts, floor)
    room = lifted - floor
    left = jnp.maximum(total - least, 0)
    scale = left.astype(jnp.float32) / jnp.maximum(jnp.sum(room), 1).astype(jnp.float32)
    quotas = room.astype(jnp.float32) * scale
    return jnp.where(jnp.all(counts >= floor), counts, floor + apportion(quotas, left, room, round_up=True))


def apportion(quotas: ArrayLike, total: ArrayLike, capacity: ArrayLike, *, round_up: bool = False) -> jax.Array:
    """Rounds quotas to integers that add up to ``total``, none above its capacity.

    What does not fit into a full layer is shared equally by all that have room,
    again and again until everything has a place. Quotas are rounded down, and the last
    few weights that do not divide go to the largest quotas; or they are rounded up, and the
    few that are then too many are taken from the largest, so that no small layer goes short.

    Args:
      quotas: what each layer should get, non-negative floats, shape (layers,).
        Their sum should be near ``total``.
      total: how many weights to share out, an integer below 2**31, possibly traced.
      capacity: the most each layer can take, integers, shape (layers,).
      round_up: which of the two.

    Returns:
      int32 of shape (layers,) that adds up to ``total``, or to the sum of the
      capacities if that is less.

    Examples:
      >>> apportion([6.5, 2.0, 1.5], 10, [3, 9, 9]).tolist()
      [3, 4, 3]
      >>> [apportion([6.7, 2.0, 0.3], 9, [9, 9, 9], round_up=up).tolist() for up in (False, True)]
      [[7, 2, 0], [6, 2, 1]]
    """
    if not any(isinstance(given, jax.Array) for given in jax.tree.leaves((quotas, total, capacity))):
        known = np.asarray(quotas, np.float32), int(total), np.asarray(capacity, np.int64)  # type: ignore[arg-type]
        return jnp.asarray(_apportion_known(*known, round_up))
    quotas, total, capacity = jnp.asarray(quotas, jnp.float32), jnp.asarray(total, jnp.int32), jnp.asarray(capacity)
    return _apportion(quotas, total, capacity.astype(jnp.int32), round_up=round_up)


def _apportion_known(quotas: np.ndarray, total: int, capacity: np.ndarray, round_up: bool) -> np.ndarray:
    """:func:`_apportion` of numbers that are known, which compiles nothing."""
    total = min(total, int(capacity.sum()))
    rounded = np.minimum(np.ceil(quotas) if round_up else np.floor(quotas), 2.0**29).astype(np.int64)

    def filled(level):
        return np.clip(rounded + level, 0, capacity)

    low, high = -int(rounded.max(initial=0)) - 1, int(capacity.max(initial=0)) + 1
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if filled(middle).sum() <= total else (low, middle)
    counts = filled(low)
    larger = np.flatnonzero(filled(low + 1) > counts)
    first = larger[np.argsort((quotas if round_up else -quotas)[larger], kind="stable")]
    counts[first[: total - counts.sum()]] += 1
    return counts.astype(np.int32)


@functools.partial(jax.jit, static_argnames="round_up")
def _apportion(quotas: jax.Array, total: jax.Array, capacity: jax.Array, round_up: bool) -> jax.Array:
    total = jnp.minimum(total, jnp.sum(capacity))
    rounded = jnp.ceil(quotas) if round_up else jnp.floor(quotas)
    rounded = jnp.minimum(rounded, 2.0**29).astype(jnp.int32)  # so that no sum below overflows

    def filled(level):
        return jnp.clip(rounded + level, 0, capacity)

    # The highest level at which what is handed out does not exceed the total.
    def halve(bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        fits = jnp.sum(filled(middle)) <= total
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    start = -jnp.max(rounded, initial=0) - 1, jnp.max(capacity, initial=0) + 1
    level, _ = jax.lax.while_loop(lambda bounds: bounds[0] + 1 < bounds[1], halve, start)
    counts = filled(level)
    # Fewer are left than layers that have more at the next level, else the level would be one higher.
    first = -quotas if round_up else quotas
    return counts + top_k_mask(first, total - jnp.sum(counts), where=filled(level + 1) > counts).astype(jnp.int32)


def exact_sum(values: jax.Array, where: jax.Array | None = None, axis: tuple[int, ...] | None = None) -> jax.Array:
    """Sums magnitudes in fixed point, with the same bits in any order of the terms.

    Args:
      values: floats; their absolute values are summed. Those that are not finite count as zero.
      where: bool, the shape of ``values``: only these are summed.
      axis: axes to sum over, which are kept with length 1; ``None`` for all of them and a scalar result.

    Returns:
      float32. Each term is rounded down to a multiple of 2**-22 of the largest (and cut off at 2**101).

    Examples:
      >>> import jax.numpy as jnp
      >>> float(exact_sum(jnp.array([1.0, -2.0, 0.5])))
      3.5
    """
    values = jnp.abs(values.astype(jnp.float32))
    usable = jnp.isfinite(values) if where is None else jnp.isfinite(values) & where
    values = jnp.where(usable, values, 0)
    # In units of a power of two, so that scaling rounds nothing.
    top = jnp.clip(jnp.max(values, initial=0), 2.0**-100, 2.0**100)
    exponent = jax.lax.bitcast_convert_type(top, jnp.int32) & 0x7F800000
    unit = jax.lax.bitcast_convert_type(exponent, jnp.float32)
    fixed = jnp.minimum(values / unit * 2.0 ** (_FIXED_POINT_BITS - 1), 2.0**_FIXED_POINT_BITS - 1).astype(jnp.int32)
    # Digits so short that as many of them as there are terms add up within an int32.
    terms = values.size if axis is None else int(np.prod([values.shape[d] for d in axis]))
    digit = max(1, min(_FIXED_POINT_BITS, 31 - max(terms, 1).bit_length()))
    total, shifts = jnp.float32(0), range(0, _FIXED_POINT_BITS, digit)
    for shift, part in zip(
        shifts, sums([(fixed >> shift) & ((1 << digit) - 1) for shift in shifts], axis), strict=True
    ):
        total = total + part.astype(jnp.float32) * 2.0**shift
    return total * (unit * 2.0 ** (1 - _FIXED_POINT_BITS))


def exact_mean(values: jax.Array, where: jax.Array | None = None, axis: tuple[int, ...] | None = None) -> jax.Array:
    """The mean of magnitudes, by :func:`exact_sum`; 0 where there is nothing to average."""
    if where is None:
        terms = values.size if axis is None else int(np.prod([values.shape[d] for d in axis]))
        return exact_sum(values, axis=axis) / max(terms, 1)
    return exact_sum(values, where, axis) / jnp.maximum(count_true(where, axis), 1).astype(jnp.float32)


def check_allocation(allocation: str, more: Sequence[str] = ()) -> None:
    """Raises a ValueError for an unknown allocation; ``more`` are further ones that the caller accepts."""
    known = [*get_args(Allocation), *more]
    if allocation not in known:
        raise ValueError(f"allocation must be one of {known}, got {allocation!r}")


def check_precision(name: str, value: Any) -> None:
    """Raises a ValueError for a float of fewer than 32 bits, which would round 0.999 to 1."""
    dtype = getattr(value, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"{name} must be a Python number or of float32, got {dtype}, in which 0.995 is {float(dtype.type(0.995))}. "
            "optax.inject_hyperparams gives numbers the dtype of the params, unless it is told another: "
            "optax.inject_hyperparams(..., hyperparam_dtype=jnp.float32)"
        )


def check_sparsity(sparsity: Any, path: str | None = None) -> None:
    """Raises a ValueError if a concrete sparsity is outside [0, 1) or of low precision; traced values pass."""
    of_leaf = f" of {path}" if path else ""
    check_precision(f"sparsity{of_leaf}", sparsity)
    if isinstance(sparsity, jax.core.Tracer):
        return
    if isinstance(sparsity, str | Mapping | Sequence) or sparsity is None:
        raise ValueError(
            f"sparsity{of_leaf} must be a number in [0, 1), or a mapping from the paths of leaves, such as "
            f"'fc1/kernel', to such numbers, got {sparsity!r}"
        )
    if not 0 <= float(sparsity) < 1:
        raise ValueError(f"sparsity{of_leaf} is the fraction of zeros and must be in [0, 1), got {sparsity}")


def check_sparsities(sparsity: Sparsity) -> None:
    """Raises a ValueError if a concrete sparsity, or one given by pattern, is outside [0, 1)."""
    if callable(sparsity):
        return
    if isinstance(sparsity, Mapping | list | tuple):
        for pattern, value in sparsity.items() if isinstance(sparsity, Mapping) else sparsity:
            check_sparsity(value, pattern)
    else:
        check_sparsity(sparsity)


def check_total(sizes: Iterable[int]) -> None:
    """Raises a ValueError if there are more weights than an int32 can count."""
    if (total := sum(map(int, sizes))) >= 1 << 31:
        raise ValueError(
            f"weights are counted in int32: one link can prune fewer than 2**31 of them, got {total}. Use several "
            "links, each for a part of the params, under optax.partition"
        )


def _namespace(value: Any) -> Any:
    """NumPy, in double precision, for concrete Python numbers; jax.numpy for the rest."""
    return jnp if isinstance(value, jax.Array) else np
