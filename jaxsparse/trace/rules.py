"""Rules of the analysis, one for each primitive: what it makes of the axes of its operands.

``RULES`` maps the name of a primitive to a function (analysis, eqn, values of the operands) -> the value of the output,
or a list of several. :func:`rule` adds one for a primitive of your own; a primitive without a rule freezes what it
touches. Here are reductions and products; :mod:`jaxsparse.trace.moving` has the primitives that only move entries,
:mod:`jaxsparse.trace.indexing` those that take from, or write to, places that data say.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from jaxsparse.trace.conditions import NEVER, any_of
from jaxsparse.trace.products import dot_parts
from jaxsparse.trace.program import where
from jaxsparse.trace.values import Val, fixed

if TYPE_CHECKING:
    from jaxsparse.trace.analysis import Analysis

__all__ = ["COLLECTIVE", "ELEMENTWISE", "IDENTITY", "MADE", "RULES", "rule", "without"]

COLLECTIVE = {
    "device_put", "mesh_cast", "pcast", "pmax", "pmin", "ppermute", "psum", "psum_invariant", "pvary",
    "reduced_vary_cast", "reshard", "sharding_constraint",
}  # fmt: skip
IDENTITY = COLLECTIVE | {
    "convert_element_type", "copy", "layout_constraint", "name", "optimization_barrier", "reduce_precision",
    "stop_gradient",
}  # fmt: skip
ELEMENTWISE = {
    "add", "add_any", "sub", "mul", "div", "rem", "pow", "max", "min", "atan2", "nextafter", "and", "or", "xor",
    "not", "eq", "ne", "lt", "le", "gt", "ge", "select_n", "clamp", "neg", "sign", "floor", "ceil", "round",
    "abs", "exp", "exp2", "log", "log1p", "expm1", "sqrt", "rsqrt", "cbrt", "square", "integer_pow", "tanh",
    "logistic", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "erf",
    "erfc", "erf_inv", "lgamma", "digamma", "igamma", "igammac", "polygamma", "zeta", "bessel_i0e",
    "bessel_i1e", "regularized_incomplete_beta", "is_finite", "shift_left", "shift_right_logical",
    "shift_right_arithmetic", "population_count", "clz", "real", "imag", "conj", "complex",
    "log2", "mulhi", "one_minus_square", "polynomial", "igamma_grad_a",
}  # fmt: skip
MADE = {  # of a shape alone
    "iota", "random_bits", "rng_bit_generator", "rng_uniform", "empty", "axis_index",
}  # fmt: skip

Rule = Callable[["Analysis", Any, list[Val]], "Val | list[Val]"]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of primitives."""

    def register(function):
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


# value by value


@rule("bitcast_convert_type")
def bitcast_convert_type(a, eqn, args):
    """The bits of each entry, which need not be zeros for a zero: it may be negative."""
    out = eqn.outvars[0].aval
    if len(out.shape) != len(args[0].shape):
        return a.give_up(eqn, args)
    return Val(tuple(out.shape), list(args[0].axes), [NEVER] * len(out.shape))


# sums and other reductions


@rule("reduce_sum")
def reduce_sum(a, eqn, args):
    """Sum over axes whose dead entries are zeros."""
    for i in eqn.params["axes"]:
        if a.summed(args[0].axes[i], args[0].zero[i], eqn):
            a.sums.append((args[0].axes[i], where(eqn)))
    return [without(args[0], eqn.params["axes"])]


@rule("reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_xor", "reduce_prod", "argmax", "argmin")
def reduce_other(a, eqn, args):
    """Look at axes as a whole, which stay."""
    _whole(a, eqn, args, eqn.params["axes"])
    return [without(args[0], eqn.params["axes"]) for _ in eqn.outvars]


@rule("cumsum")
def cumsum(a, eqn, args):
    """Sum up to each entry, of which the dead ones are zeros."""
    x, axis = args[0], eqn.params["axis"]
    if a.summed(x.axes[axis], x.zero[axis], eqn):
        a.sums.append((x.axes[axis], where(eqn)))
    zero = [NEVER if i == axis else zero for i, zero in enumerate(x.zero)]
    return Val(x.shape, list(x.axes), zero)


@rule("cummax", "cummin", "cumprod", "cumlogsumexp", "sort")
def along(a, eqn, args):
    """Keep the axis along which entries follow one another; operands that are sorted together have the same others."""
    axis = eqn.params["axis" if "axis" in eqn.params else "dimension"]
    _whole(a, eqn, args, [axis])
    outs = [Val(x.shape, [], list(x.zero)) for x in args]
    axes = [a.unify_all([x.axes[i] for x in args], where(eqn)) for i in range(len(args[0].shape))]
    for out in outs:
        out.axes = list(axes)
        if eqn.primitive.name == "cumlogsumexp":  # of zeros it makes others
            out.zero = [NEVER] * len(axes)
    return outs


@rule("top_k")
def top_k(a, eqn, args):
    """Keep the axis in which the largest are looked for; the others pass."""
    x, axis = args[0], eqn.params.get("axis", -1) % len(args[0].shape)
    _whole(a, eqn, args, [axis])
    axes = [None if i == axis else ids for i, ids in enumerate(x.axes)]
    shape = tuple(eqn.outvars[0].aval.shape)
    return [Val(shape, axes, list(x.zero)), Val(shape, list(axes), [NEVER] * len(axes))]


@rule("fft")
def fft(a, eqn, args):
    """Keep the last axes, which are transformed; the others pass."""
    x, n = args[0], len(args[0].shape) - len(eqn.params["fft_lengths"])
    _whole(a, eqn, args, range(n, len(x.shape)))
    shape = tuple(eqn.outvars[0].aval.shape)
    axes = [ids if size == shape[i] else None for i, (ids, size) in enumerate(zip(x.axes, x.shape, strict=True))]
    return Val(shape, axes, list(x.zero))


def _whole(a: "Analysis", eqn: Any, args: Sequence[Val], axes: Iterable[int]) -> None:
    for i in axes:
        for x in args:
            a.spaces.freeze(x.axes[i], where(eqn, "looked at as a whole"))


def without(x: Val, axes: Sequence[int]) -> Val:
    """The value without some of its axes."""
    keep = [i for i in range(len(x.shape)) if i not in axes]
    return Val(tuple(x.shape[i] for i in keep), [x.axes[i] for i in keep], [x.zero[i] for i in keep])


# products


@rule("dot_general")
def dot_general(a, eqn, args):
    """Multiply and sum over the contracted axes; the batch axes are the same."""
    (contract, batch), (x, y) = eqn.params["dimension_numbers"], args
    for i, j in zip(*contract, strict=True):
        a.meet(eqn, x, i, y, j)
    axes = []
    for i, j in zip(*batch, strict=True):
        axes.append((a.unify_all([x.axes[i], y.axes[j]], where(eqn)), any_of(x.zero[i], y.zero[j])))
    for side, operand in enumerate(args):
        axes += [(operand.axes[i], operand.zero[i]) for i in dot_parts(eqn, side)[0][2]]
    if x.data and y.data:
        a.paired += [(ids, i in list(at)) for v, at in zip(args, batch, strict=True) for i, ids in enumerate(v.axes)]
    a.product(eqn, args)
    return Val(tuple(eqn.outvars[0].aval.shape), [ids for ids, _ in axes], [zero for _, zero in axes])


@rule("ragged_dot_general")
def ragged_dot_general(a, eqn, args):
    """Multiply runs of rows by a matrix of their own each; rows and matrices stay."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contract, batch), (x, y, sizes) = numbers.dot_dimension_numbers, args
    rows, groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    if batch[0] or len(groups) != 1 or set(rows) & set(contract[0]):
        return a.give_up(eqn, args)
    for operand, axes in ((x, rows), (y, groups), (sizes, range(len(sizes.shape)))):
        for i in axes:
            a.spaces.freeze(operand.axes[i], where(eqn, "rows and matrices that belong together"))
    for i, j in zip(*contract, strict=True):
        a.meet(eqn, x, i, y, j)
    free = [(x, i) for i in range(len(x.shape)) if i not in contract[0]]
    free += [(y, j) for j in range(len(y.shape)) if j not in contract[1] and j not in groups]
    shape = tuple(eqn.outvars[0].aval.shape)
    a.product(eqn, args, math.prod(shape) * math.prod(x.shape[i] for i in contract[0]))
    return Val(shape, [v.axes[i] for v, i in free], [v.zero[i] for v, i in free])


@rule("conv_general_dilated")
def conv_general_dilated(a, eqn, args):
    """Multiply windows by kernels; inputs of a group of channels meet its part of the kernel."""
    p, (x, w), out = eqn.params, args, fixed(eqn.outvars[0].aval)
    d, groups = p["dimension_numbers"], p["feature_group_count"]
    a.product(eqn, args)
    if p["batch_group_count"] != 1:
        return a.give_up(eqn, args)
    for i in d.rhs_spec[2:]:
        a.spaces.freeze(w.axes[i], where(eqn, "a window"))
    for i in d.lhs_spec[2:]:
        a.spaces.freeze(x.axes[i], where(eqn, "an axis that windows move over"))
    (xb, xc), (wo, wi), (ob, oc) = d.lhs_spec[:2], d.rhs_spec[:2], d.out_spec[:2]
    out.axes[ob], out.zero[ob], out.axes[oc], out.zero[oc] = x.axes[xb], x.zero[xb], w.axes[wo], w.zero[wo]
    if groups == 1:
        a.meet(eqn, x, xc, w, wi)
    else:
        of_x, within = a.spaces.split(x.axes[xc], [groups, x.shape[xc] // groups], where(eqn))
        of_w, _ = a.spaces.split(w.axes[wo], [groups, w.shape[wo] // groups], where(eqn))
        a.spaces.unify(of_x, of_w, where(eqn))
        if x.shape[xc] > groups:
            x = dataclasses.replace(x, axes=[*x.axes, within], zero=[*x.zero, x.zero[xc]], view=None)
            a.meet(eqn, x, len(x.axes) - 1, w, wi)
        elif w.shape[wo] == groups:  # depthwise: an output is zero where its only input is
            out.zero[oc] = any_of(w.zero[wo], x.zero[xc])
    return out


@rule("reduce_window_max", "reduce_window_sum", "reduce_window_min")
def reduce_window(a, eqn, args):
    """Pool; axes that no window moves over pass."""
    p, x, out = eqn.params, args[0], fixed(eqn.outvars[0].aval)
    for i, n in enumerate(p["window_dimensions"]):
        if n == p["window_strides"][i] == p["base_dilation"][i] == 1 and not any(p["padding"][i]):
            out.axes[i], out.zero[i] = x.axes[i], x.zero[i]
        else:
            a.spaces.freeze(x.axes[i], where(eqn, "an axis that windows move over"))
    return out
