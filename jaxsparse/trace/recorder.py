"""A jaxpr evaluated with an eye on what arrives at the products with leaves of params."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from jaxsparse.trace.evaluate import ITSELF, Evaluator
from jaxsparse.trace.moments import Moments, Statistic
from jaxsparse.trace.products import dot_parts
from jaxsparse.trace.program import scan_counts, where
from jaxsparse.trace.shares import Share, local_leaf
from jaxsparse.trace.views import View, viewed, whole_axes

__all__ = ["Recorder"]

# A leaf that is added to data, such as a table of positions, most often takes part in no product after that.
_ADDED = {"add", "sub", "add_any", "scatter-add"}
_PRODUCTS = {"dot_general", "conv_general_dilated"}


class Recorder(Evaluator):
    """Sums up what arrives at products of a view of a leaf with anything that is not made of params alone.

    Attributes:
      found: (path, axes that scans around go over, axes of inputs, axes that lead) -> :class:`Moments`, or with a
        function as ``statistic`` :class:`Statistic`.
      missed: path -> why a product with it is not recorded.
    """

    def __init__(self, chosen, gram, statistic=None):
        self.chosen, self.gram, self.statistic = set(chosen), gram, statistic
        self.found: dict[tuple, Any] = {}
        self.missed: dict[str, str] = {}
        self._repeated: dict[int, tuple] = {}  # id of an array -> it, and the same before it was repeated on devices

    def plain(self, value):
        """The array of a view."""
        return value.value if isinstance(value, View) else value

    def opaque(self, eqn, args, context):
        """Look inside functions with custom derivatives: none are taken."""
        return False

    def start(self, jaxpr, consts, context):
        """Constants, which are no data."""
        return [const if isinstance(const, View) else View(const, None) for const in consts]

    def rule(self, eqn, args, context):
        """Follow views, and record the products that they meet data in."""
        name = eqn.primitive.name
        if hasattr(self, "do_" + name.replace("-", "_")):
            return ITSELF
        known = all(isinstance(arg, View | Literal) for arg in map(_literal_or, eqn.invars, args))
        if known and (name not in _PRODUCTS or all(arg.path is not None for arg in args)):
            return viewed(eqn, args, self.bind(eqn, [self.plain(arg) for arg in args]))
        if name in ("pvary", "pcast"):
            outs = self.bind(eqn, [self.plain(arg) for arg in args])
            self._repeated |= {id(out): (out, arg) for out, arg in zip(outs, args, strict=True)}
            return outs
        if name == "dot_general":
            self._dot(eqn, args)
        elif name == "conv_general_dilated":
            self._conv(eqn, args)
        elif name not in _ADDED:  # a table of two axes that is looked up in is none of matrices
            self._miss(args, f"goes into {where(eqn)}", axes=3 if name == "gather" else 2)
        return ITSELF

    def _miss(self, args, why, axes=2):
        for arg in args:
            if isinstance(arg, View) and arg.path is not None and sum(axis != () for axis in arg.axes) >= axes:
                for path in (arg.path, *arg.others):
                    self.missed.setdefault(path, why)

    def _dot(self, eqn, args):
        for side in (0, 1):
            w, x = args[side], args[1 - side]
            if not isinstance(w, View) or w.path is None or (isinstance(x, View) and x.path is not None):
                continue
            (wb, wc, _), (xb, xc, xf) = dot_parts(eqn, side)
            stack = [(i, j) for i, j in zip(wb, xb, strict=True) if w.axes[i] != ()]
            rows = [*xf, *(j for i, j in zip(wb, xb, strict=True) if w.axes[i] == ())]
            pairs = sorted(zip(wc, xc, strict=True), key=lambda pair: _place(w.axes[pair[0]]))
            inputs = whole_axes([w.axes[i] for i, _ in pairs])
            leading = [whole_axes([w.axes[i]]) for i, _ in stack]
            if inputs is None or any(axes is None or len(axes) != 1 for axes in leading):
                self._miss([w], f"is multiplied in another form at {where(eqn)}")
                continue
            order = [*(j for _, j in stack), *rows, *(j for _, j in pairs)]
            x = jnp.transpose(self._once(x), order)
            shape = x.shape[: len(stack)], x.shape[len(stack) + len(rows) :]
            x = x.reshape(*shape[0], -1 if 0 not in x.shape else 0, math.prod(shape[1]))
            self._add(eqn, w, inputs, tuple(axes[0] for axes in leading if axes), x)

    def _conv(self, eqn, args):
        x, w = args
        if not isinstance(w, View) or w.path is None:
            return
        p, d = eqn.params, eqn.params["dimension_numbers"]
        window = [eqn.invars[1].aval.shape[i] for i in d.rhs_spec[2:]]
        order = sorted(range(len(window) + 1), key=lambda i: _place(w.axes[d.rhs_spec[1:][i]]))
        inputs = whole_axes([w.axes[d.rhs_spec[1:][i]] for i in order])
        outputs = whole_axes([w.axes[d.rhs_spec[0]]])
        groups = p["feature_group_count"]
        if inputs is None or p["batch_group_count"] > 1 or (groups > 1 and (outputs is None or len(outputs) != 1)):
            self._miss([w], f"is convolved with in another form at {where(eqn)}")
            return
        x = jnp.transpose(self._once(x), d.lhs_spec)
        how = (p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"])
        patches = lax.conv_general_dilated_patches(x, window, *how, precision=lax.Precision.HIGHEST)
        # (batch, inputs slowest, window, places) to (groups, rows, the axes of inputs and window in the leaf's order)
        patches = patches.reshape(x.shape[0], groups, x.shape[1] // groups, *window, -1)
        rows = jnp.transpose(patches, [1, 0, patches.ndim - 1, *(i + 2 for i in order)])
        rows = rows.reshape(groups, rows.shape[1] * rows.shape[2], -1)
        leading = outputs if groups > 1 else ()
        self._add(eqn, w, inputs, leading, rows if groups > 1 else rows[0])

    def _once(self, x):
        """Data as it was before every device got the same, whose rows would count on each of them."""
        return self.plain(self._repeated[id(x)][1] if id(x) in self._repeated else x)

    def _add(self, eqn, w, inputs, leading, rows):
        """Add (*leading, rows, inputs) to what is found."""
        for other in w.others:
            self.missed.setdefault(other, f"is combined with {w.path} before the product at {where(eqn)}")
        if jnp.issubdtype(rows.dtype, jnp.complexfloating):
            self._miss([w], f"is multiplied by complex numbers at {where(eqn)}")
        elif w.path in self.chosen:
            key = (w.path, w.scanned, inputs, leading)
            if self.statistic:
                moments: Any = Statistic.of_rows(rows, inputs, leading, self.statistic)
            else:
                moments = Moments.of_rows(rows, inputs, leading, self.gram)
            self.found[key] = self.found[key] + moments if key in self.found else moments

    def _apart(self, run):
        """The outputs of a part of the program, and what it finds."""
        outer, self.found = self.found, {}
        outs = [self.plain(out) for out in run()]
        found, self.found = self.found, outer
        return outs, found

    def _merge(self, found):
        for key, moments in found.items():
            self.found[key] = self.found[key] + moments if key in self.found else moments

    def do_remat2(self, eqn, args, context):
        """Inline what is rematerialised."""
        return self.run(eqn.params["jaxpr"], args, context)

    do_checkpoint = do_remat = do_remat2

    def do_scan(self, eqn, args, context):
        """Stack what is found at slices of leaves, and sum up the rest over the rounds."""
        p = eqn.params
        n, m = scan_counts(p)
        self._miss(args[n:m], f"is carried by {where(eqn)}")
        xs, sliced = [], dict[tuple, tuple]()
        for arg in args[m:]:
            if isinstance(arg, View) and arg.path is not None:
                first = whole_axes([arg.axes[0]])
                if first is None or len(first) > 1:
                    arg = dataclasses.replace(arg, axes=(None,) * (arg.value.ndim - 1))
                else:
                    arg = dataclasses.replace(arg, axes=arg.axes[1:], scanned=(*arg.scanned, *first))
                    sliced |= {(arg.path, arg.scanned): first} if first else {}
            xs.append(arg)

        def body(carry, xs):
            outs, found = self._apart(lambda: self.run(p["jaxpr"], [*args[:n], *carry, *xs], context))
            return outs[: m - n], (outs[m - n :], found)

        how = {"length": p["length"], "reverse": p["reverse"], "unroll": p["unroll"]}
        carry, (ys, found) = lax.scan(body, [self.plain(arg) for arg in args[n:m]], xs, **how)
        for (path, scanned, inputs, leading), moments in found.items():
            if (path, scanned) in sliced:
                first = sliced[path, scanned]
                leading, scanned = (*first, *leading), scanned[: len(scanned) - len(first)]
                moments = dataclasses.replace(moments, leading=leading)
            else:
                moments = jax.tree.map(lambda x: x.sum(0), moments)
            self._merge({(path, scanned, inputs, leading): moments})
        return [*carry, *ys]

    def do_while(self, eqn, args, context):
        """Carry along what is found in the body."""
        p = eqn.params
        n, m = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        self._miss(args[m:], f"is carried by {where(eqn)}")

        def cond(state):
            (go_on,), found = self._apart(lambda: self.run(p["cond_jaxpr"], [*args[:n], *state[0]], context))
            self.missed |= {key[0]: f"is multiplied in the condition of {where(eqn)}" for key in found}
            return go_on

        def body(carry):
            return self._apart(lambda: self.run(p["body_jaxpr"], [*args[n:m], *carry], context))

        carry = [self.plain(arg) for arg in args[m:]]
        zeros = _zeros(jax.eval_shape(body, carry)[1])

        def step(state):
            carry, found = body(state[0])
            return carry, jax.tree.map(jnp.add, state[1], found)

        carry, found = lax.while_loop(cond, step, (carry, zeros))
        self._merge(found)
        return carry

    def do_cond(self, eqn, args, context):
        """Take what the branch finds that is taken, and nothing of the others."""

        def branch(i):
            return lambda *xs: self._apart(lambda: self.run(eqn.params["branches"][i], xs, context))

        branches = [branch(i) for i in range(len(eqn.params["branches"]))]
        every: dict = {}
        for run in branches:
            every |= jax.eval_shape(run, *args[1:])[1]

        def padded(run):
            def run_padded(*xs):
                outs, found = run(*xs)
                return outs, _zeros(every) | found

            return run_padded

        index = jnp.asarray(self.plain(args[0]), jnp.int32)
        outs, found = lax.switch(index, [padded(run) for run in branches], *args[1:])
        self._merge(found)
        return outs

    def do_shard_map(self, eqn, args, context):
        """Sum up over the devices that have rows of their own; inputs that are divided among devices stay so."""
        p = eqn.params
        axes = set(p["newly_manual_axes"])
        share = Share(args, p["in_specs"], p["check_vma"], self.gram, self.statistic)
        keys: list[tuple] = []

        def inside(args):
            local = [local_leaf(arg) if isinstance(arg, View) and arg.path is not None else arg for arg in args]
            outs, found = self._apart(lambda: self.run(p["jaxpr"], local, context))
            for key in [key for key in found if not share.can_join(key)]:
                self.missed.setdefault(key[0], f"has its inputs divided among devices at {where(eqn)}")
                del found[key]
            keys[:] = found
            return outs, {key: share.summed(key, moments) for key, moments in found.items()}

        def mapped(function, out_specs):
            specs = [
                jax.tree.map(lambda _, spec=spec: spec, arg) for spec, arg in zip(p["in_specs"], args, strict=True)
            ]
            how = {"mesh": p["mesh"], "check_vma": p["check_vma"], "axis_names": axes}
            return jax.shard_map(function, in_specs=(specs,), out_specs=out_specs, **how)

        # What is found has to be known before it can be an output.
        jax.eval_shape(mapped(lambda args: inside(args)[0], list(p["out_specs"])), args)
        out_specs = {key: share.specs(key) for key in keys}
        outs, found = mapped(inside, (list(p["out_specs"]), out_specs))(args)
        self._merge(found)
        return outs


def _literal_or(var, arg):
    return var if isinstance(var, Literal) else arg


def _place(axis):
    """Where an axis comes among those that the inputs are."""
    return (-1, 0) if not axis else (axis[0][0], -axis[0][1])


def _zeros(shapes):
    """Zeros that vary from device to device where what is added to them does."""

    def zeros(shape):
        axes = tuple(sorted(getattr(shape.manual_axis_type, "varying", ())))
        made = jnp.zeros(shape.shape, shape.dtype)
        return lax.pcast(made, axes, to="varying") if axes else made

    return jax.tree.map(zeros, shapes)
