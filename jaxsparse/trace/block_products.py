"""A jaxpr evaluated with masked leaves: on block kernels where their masks can be followed, and masked elsewhere."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from jaxsparse.kernels import block_sparse_matmul
from jaxsparse.kernels.masked_matmul.api import DTYPES, default_implementation
from jaxsparse.kernels.masked_matmul.block_info import live_tiles
from jaxsparse.kernels.masked_weights import masked_weights
from jaxsparse.trace.block_sides import Sides, merged, moved
from jaxsparse.trace.evaluate import ITSELF, Evaluator
from jaxsparse.trace.products import as_matrices, dot_parts, is_pointwise_conv
from jaxsparse.trace.program import Where, scan_counts, where
from jaxsparse.trace.rules import COLLECTIVE, IDENTITY

__all__ = ["BlockProducts", "Masked", "Use"]

_MOVES = {"transpose", "squeeze", "reshape", "broadcast_in_dim", "slice", "rev", "dynamic_slice", "split"}
_SAME = IDENTITY - COLLECTIVE | {"device_put", "mesh_cast", "pcast", "pvary", "sharding_constraint"}
_LOOPS = {"scan", "while"}
_CUSTOM = {"custom_jvp_call", "custom_vjp_call"}


@dataclasses.dataclass(frozen=True)
class Masked:
    """A leaf of params, or what became of it by changes of layout, with its mask in the same layout.

    Attributes:
      value: an array; dead entries may be anything.
      mask: bool, of its shape.
      paths: the leaves that it is made of.
      of_axes: the side of each axis, see :mod:`~jaxsparse.trace.block_sides`.
    """

    value: Any
    mask: Any
    paths: tuple[str, ...]
    of_axes: Sides

    @property
    def sides(self) -> Sides:
        """The sides of the axes that are there: a scan slices off the first one."""
        return self.of_axes[len(self.of_axes) - self.value.ndim :]


jax.tree_util.register_dataclass(Masked, data_fields=["value", "mask"], meta_fields=["paths", "of_axes"])


@dataclasses.dataclass(frozen=True)
class Use:
    """A place where a masked leaf is used.

    Attributes:
      paths: the leaves, most often one.
      where: the place in the program.
      macs: the multiply-adds of a dense product, in all rounds of the scans around it; 0 for other uses.
      block: (inputs, outputs) of a block, for a product on kernels.
      runs_on: the implementation of the kernel, or "dense".
      why: why it is dense.
    """

    paths: tuple[str, ...]
    where: Where
    macs: int = 0
    block: tuple[int, int] | None = None
    runs_on: str = "dense"
    why: str = ""


class BlockProducts(Evaluator):
    """Multiplies by blocks where one side is a masked leaf; where a mask cannot be followed, the leaf is masked.

    The context is the number of rounds of the scans around.
    """

    def __init__(self, tile, implementation, dense_weight_grad):
        self.tile, self.implementation, self.dense = tile, implementation, dense_weight_grad
        self._found: dict[Any, Use] = {}

    @property
    def uses(self) -> list[Use]:
        """The use of each masked leaf, in the order of the program."""
        return list(self._found.values())

    def inner(self, context, eqn, which=0):
        """The rounds of a program inside this one."""
        return (context or 1) * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else context

    def plain(self, value):
        """The leaf times its mask."""
        return self._masked(value.value, value.mask) if isinstance(value, Masked) else value

    def _masked(self, value, mask):
        return masked_weights(value, mask, jnp.asarray(self.dense))

    def rule(self, eqn, args, context):
        """Follow masked operands, or take note of why they cannot be followed."""
        masked = [arg for arg in args if isinstance(arg, Masked)]
        if not masked:
            return ITSELF
        outs = self._follow(eqn, args, context)
        if isinstance(outs, str):  # the reason why not
            if outs:
                self._note(eqn, masked, context, why=outs)
            return ITSELF
        return outs

    def _note(self, eqn, masked, context, **what):
        paths = tuple(dict.fromkeys(path for leaf in masked for path in leaf.paths))
        place = where(eqn)  # a scan may be traced twice
        self._found[place, paths] = Use(paths, place, _macs(eqn) * (context or 1), **what)

    def _follow(self, eqn, args, context) -> Any:
        name, is_masked = eqn.primitive.name, [isinstance(arg, Masked) for arg in args]
        if name in _SAME and len(args) == 1:
            return [dataclasses.replace(args[0], value=self.bind(eqn, [args[0].value])[0])]
        if name in ("mul", "div", "neg"):
            return self._scaled(eqn, args, is_masked)
        if name in _MOVES and is_masked == [True] + [False] * (len(args) - 1):
            leaf = args[0]
            values, masks = (self.bind(eqn, [x, *args[1:]]) for x in (leaf.value, leaf.mask))
            sides = moved(eqn, leaf.sides)
            return [Masked(x, m, leaf.paths, own) for x, m, own in zip(values, masks, sides, strict=True)]
        if name == "concatenate":
            return self._joined(eqn, args) if all(is_masked) else "joined with values that have no mask"
        if name == "dot_general":
            return self._dot(eqn, args, is_masked, context)
        if name == "conv_general_dilated":
            return self._conv(eqn, args, is_masked, context)
        if name in _LOOPS:
            return self._carried(eqn, args, context)
        if name in _CUSTOM:
            return "inside a function with a custom derivative"
        return "" if hasattr(self, "do_" + name.replace("-", "_")) else f"{name} has no kernel"

    def _scaled(self, eqn, args, is_masked) -> Any:
        """A number, a gate or a scale times a leaf: zeros stay zeros.

        The gradient of a gate looks at the leaf, so dead entries must be zero there. That of the leaf looks at the gate
        alone, and stays dense where it is asked for.
        """
        at = is_masked.index(True)
        if sum(is_masked) > 1 or (at and eqn.primitive.name != "mul"):
            return f"{eqn.primitive.name} of two arrays that change zeros"
        if args[at].value.shape != eqn.outvars[0].aval.shape:
            return f"{eqn.primitive.name} that repeats it"
        gated = len(args) > 1 and not isinstance(eqn.invars[1 - at], Literal)
        value = self.plain(args[at]) if gated else args[at].value
        values = [value if i == at else arg for i, arg in enumerate(args)]
        return [dataclasses.replace(args[at], value=self.bind(eqn, values)[0])]

    def _joined(self, eqn, args) -> Any:
        along, sides = eqn.params["dimension"], [list(arg.sides) for arg in args]
        for own, arg in zip(sides[:-1], args[:-1], strict=True):
            own[along] = math.gcd(own[along], arg.value.shape[along])
        common = tuple(0 if 0 in each else math.gcd(*each) for each in zip(*sides, strict=True))
        values, masks = (self.bind(eqn, [getattr(arg, of) for arg in args])[0] for of in ("value", "mask"))
        return [Masked(values, masks, tuple(path for arg in args for path in arg.paths), common)]

    def _carried(self, eqn, args, context) -> str:
        """Name the leaves that a loop carries, which are masked before it; what it reads or scans goes on inside."""
        p = eqn.params
        start, stop = (
            scan_counts(p) if eqn.primitive.name == "scan" else (p["cond_nconsts"] + p["body_nconsts"], len(args))
        )
        carry = args[start:stop]
        if leaves := [arg for arg in carry if isinstance(arg, Masked)]:
            self._note(eqn, leaves, context, why="carried by a loop")
        return ""

    def _dot(self, eqn, args, is_masked, context) -> Any:
        if all(is_masked):
            return "both sides have masks"
        if eqn.params.get("out_sharding") is not None:
            return "its result has an explicit sharding"
        weight = is_masked.index(True)
        w, x = args[weight], args[1 - weight]
        (wb, wc, wf), _ = dot_parts(eqn, weight)
        block = tuple(merged([w.sides[i] for i in a], [w.value.shape[i] for i in a]) for a in (sorted(wc), wf))
        matrix, rows, back = as_matrices(eqn, weight, w.value, x)
        mask, _, _ = as_matrices(eqn, weight, w.mask, x)
        if not wb:
            matrix, mask, rows = matrix[0], mask[0], rows[0]
        y = self._product(eqn, w, rows, matrix, mask, block, context)
        return y if isinstance(y, str) else [back(y)]

    def _conv(self, eqn, args, is_masked, context) -> Any:
        p, d = eqn.params, eqn.params["dimension_numbers"]
        if is_masked != [False, True]:
            return "a convolution by something that has no mask"
        x, w = args
        if not is_pointwise_conv(eqn):
            window = " x ".join(str(w.value.shape[i]) for i in d.rhs_spec[2:])
            return f"a convolution of {window}, groups, padding or dilation"
        x = jnp.transpose(x, [d.lhs_spec[0], *d.lhs_spec[2:], d.lhs_spec[1]])
        x = x[(slice(None), *(slice(None, None, s) for s in p["window_strides"]))]
        order = [d.rhs_spec[1], d.rhs_spec[0], *d.rhs_spec[2:]]
        matrix, mask = (jnp.transpose(a, order)[(..., *[0] * (a.ndim - 2))] for a in (w.value, w.mask))
        y = self._product(eqn, w, x, matrix, mask, (w.sides[order[0]], w.sides[order[1]]), context)
        return y if isinstance(y, str) else [jnp.transpose(jnp.moveaxis(y, -1, 1), np.argsort(d.out_spec).tolist())]

    def _product(self, eqn, leaf, x, w, mask, block, context) -> Any:
        """``x @ (w * mask)`` by blocks, for every matrix of a batch; a string says why not."""
        out = eqn.outvars[0].aval.dtype
        for dtype in (jnp.result_type(x, w), out):
            if dtype.name not in DTYPES:
                return f"kernels do not take {dtype}"
        if any(side <= 1 for side in block) and self.tile is None:
            return "its block is not known"
        block = tuple(side if side > 1 else tile for side, tile in zip(block, self.tile or block, strict=True))
        if 1 in w.shape[-2:] or all(size <= side for size, side in zip(w.shape[-2:], block, strict=True)):
            return f"{w.shape[-2]} x {w.shape[-1]} is no more than one block of {block[0]} x {block[1]}"
        chosen = self.implementation or default_implementation(block, jnp.result_type(x, w))
        if chosen == "xla":
            return f"no kernel is chosen on {jax.default_backend()}, unless implementation= names one"
        how = {"dense_weight_grad": self.dense, "precision": eqn.params["precision"], "implementation": chosen}

        def one(x, w, mask):
            return block_sparse_matmul(x, w, live_tiles(mask, block), block=block, out_dtype=out, **how)

        for _ in range(w.ndim - 2):
            one = jax.vmap(one)
        try:
            y = one(x, self._masked(w, mask), mask)
        except ValueError as error:
            raise ValueError(f"{', '.join(leaf.paths)}, {where(eqn)}: {error}") from error
        self._note(eqn, [leaf], context, block=block, runs_on=chosen)
        return y


def _macs(eqn) -> int:
    """The multiply-adds of a product, 0 of other primitives."""
    name, out = eqn.primitive.name, math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return out * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    if name == "conv_general_dilated":
        return out * math.prod(eqn.invars[1].aval.shape[i] for i in eqn.params["dimension_numbers"].rhs_spec[1:])
    return 0
