"""Checks of arguments and params, and of the invariants of states."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsparse.allocation import check_precision
from jaxsparse.trees import by_path

__all__ = [
    "check_budget",
    "check_range",
    "check_schedule",
    "check_steps",
    "check_zeros",
    "counted",
    "hint_of_parts",
    "refuse_replicated",
    "require_bool",
    "require_params",
    "whole_steps",
]


def check_range(
    name: str, value: Any, low: float, high: float | None = None, open_end: bool = False, required: bool = False
) -> None:
    """Raises a ValueError for a concrete value out of range, NaN or of low precision; traced values pass.

    None passes too, unless the method cannot do without the argument.
    """
    check_precision(name, value)
    if value is None and required:
        raise ValueError(f"{name} must be a number, got None")
    if value is None or isinstance(value, jax.core.Tracer):
        return
    if callable(value):
        raise ValueError(f"{name} must be a number here, not a schedule, got {value!r}")
    if not (value >= low and (high is None or value < high or (value == high and not open_end))):
        upper = "" if high is None else f" and {'below' if open_end else 'at most'} {high}"
        raise ValueError(f"{name} must be at least {low}{upper}, got {value}")


def check_schedule(
    name: str,
    value: Any,
    low: float = 0,
    high: float | None = 1,
    steps: Iterable[Any] = (0, 1, 10, 100, 1000, 10_000),
) -> None:
    """Raises a ValueError for what is neither number nor schedule, or out of range, of a schedule on one of some steps.

    None is neither: these are arguments that a method cannot do without.
    """
    fields = getattr(value, "_fields", ())  # of several schedules
    if value is None or fields:
        hint = f": it has {' and '.join(fields)}, hand over one of them" if fields else ""
        raise ValueError(f"{name} must be a number or a schedule, got {type(value).__name__}{hint}")
    if not callable(value):
        check_range(name, value, low, high)
        return
    for step in steps:
        if not isinstance(step, jax.core.Tracer):
            check_range(f"{name} of step {step}", value(jnp.asarray(step, jnp.int32)), low, high)


def check_steps(name: str, value: Any, low: int) -> None:
    """Raises a ValueError for a concrete number of steps that is no integer or out of range; None and tracers pass."""
    check_range(name, value, low)
    if value is None or isinstance(value, jax.core.Tracer):
        return
    if float(value) >= 2**31:
        raise ValueError(f"{name} must be below 2**31, for steps are counted in int32, got {value}")
    if int(value) != value:
        raise ValueError(f"{name} must be a whole number of steps, got {value}")


def whole_steps(name: str, value: Any, low: int) -> Any:
    """A number of steps that :func:`check_steps` has checked, as an int where it is a float, which counts to 2**24."""
    check_steps(name, value, low)
    return int(value) if isinstance(value, float) else value


def require_params(params: Any, who: str) -> None:
    """Raises a ValueError if ``update`` was called without params."""
    if params is None:
        raise ValueError(f"{who} needs the params: call tx.update(grads, opt_state, params)")


def require_bool(masks: Any, who: str) -> None:
    """Raises a ValueError if the masks of a state are numbers, as after arithmetic with optimizer states."""
    for mask in jax.tree.leaves(masks):
        if mask.dtype != jnp.bool_:
            raise ValueError(
                f"{who}: the masks in the optimizer state have become {mask.dtype}. Something around the chain "
                "computes with optimizer states, as optax.contrib.sam does: put it around the optimizer, inside the "
                "chain, or give it opaque_mode=True"
            )


def refuse_replicated(params: Any, who: str) -> None:
    """Raises a ValueError if the params carry a leading axis with one copy for each device.

    Such an axis would be taken for a dimension of the weights, and each device's copy
    would be pruned differently.
    """
    leaves = [leaf for leaf in jax.tree.leaves(params) if hasattr(leaf, "shape")]
    if leaves and all(map(_has_replica_axis, leaves)):
        raise ValueError(
            f"{who}: the params carry a leading axis of {leaves[0].shape[0]} replicas, one for each device. "
            "Initialise the optimizer with the params of one device and replicate params and state after that: "
            "opt_state = flax.jax_utils.replicate(tx.init(params))"
        )


def check_budget(masks: Any, budget: jax.Array, who: str) -> list[str]:
    """A sentence if masks (with or without leading replica axes) do not add up to their budget."""
    leaves = jax.tree.leaves(masks)
    budget = jax.tree.leaves(budget)[0]  # flax.nnx wraps the leaves of an optimizer state
    replica_axes = budget.ndim
    kept = sum(m.sum(tuple(range(replica_axes, m.ndim)), dtype=jnp.int32) for m in leaves)
    if leaves and bool(jnp.any(kept != budget)):
        return [f"{who}: the masks keep {kept} weights, but the budget is {budget}"]
    return []


def counted(masks: Any, like: Any) -> Any:
    """The number of weights that masks keep, in the form of the one in a state."""
    left = sum(mask.sum() for mask in jax.tree.leaves(masks))
    return jax.tree.map(lambda kept: jnp.asarray(left, kept.dtype), like)


def check_zeros(masks: Any, params: Any, who: str) -> list[str]:
    """A sentence for each leaf with pruned weights that are not zero."""
    problems: list[str] = []
    weights = by_path(params)
    for name, mask in by_path(masks).items():
        if name not in weights:
            hint = hint_of_parts(name, weights)
            raise ValueError(f"{who}: the params have no {name}, which the optimizer state has a mask for{hint}")
        lost = int(jnp.sum(~mask & (weights[name] != 0)))
        if lost:
            problems.append(
                f"{who}: {lost} pruned weights of {name} are not zero"
                + (
                    ""
                    if problems
                    else (
                        " (something moves the params after the link, which must stand last, with no schedule_free, "
                        "lookahead or averaging around it, or they were not put on the masks before the first step: "
                        "jaxsparse.sparsify)"
                    )
                )
            )
    return problems


def hint_of_parts(name: str, weights: Mapping[str, Any]) -> str:
    """A hint for masks of the parts of a complex leaf; "" for any other missing leaf."""
    whole = name.rpartition("/")[0]
    if whole not in weights or not jnp.iscomplexobj(weights[whole]):
        return ""
    return (
        f". The real and imaginary parts of {whole} have masks of their own (optax.contrib.split_real_and_imaginary): "
        'give the params in such parts, {"real": w.real, "imaginary": w.imag} in the place of w'
    )


def _has_replica_axis(leaf: ArrayLike) -> bool:
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array) or leaf.ndim == 0:
        return False
    devices = leaf.sharding.device_set
    split = leaf.sharding.shard_shape(leaf.shape)
    return len(devices) > 1 and leaf.shape[0] == len(devices) and split == (1, *leaf.shape[1:])
