"""Evaluation of a jaxpr with other rules for some of its primitives."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import Literal

from jaxsparse.trace.program import bind, live_eqns, opened, scan_counts, within

__all__ = ["ITSELF", "Evaluator"]

ITSELF: Any = object()  # returned by a rule to have the primitive bound as it is


class Evaluator:
    """Evaluates a jaxpr equation by equation, with values that may be any pytrees.

    A subclass overrides :meth:`rule`, which decides what an equation does with its operands; where it returns
    ``ITSELF``, control flow is rebuilt around what is inside, and any other primitive is bound on plain arrays. Values
    pass through scans, branches and ``jax.checkpoint`` as the pytrees that they are; carries and results are plain.

    ``context`` is what a subclass knows of this place in the program: :meth:`inner` gives that of a jaxpr inside.
    Results do not differ in a bit from those of the function, under jit, grad and vmap too, where no rule is given.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxsparse.trace.program import trace
      >>> class Halved(Evaluator):
      ...     def rule(self, eqn, args, context):
      ...         return [self.bind(eqn, args)[0] / 2] if eqn.primitive.name == "dot_general" else ITSELF
      >>> traced = trace(lambda p, x: jnp.tanh(x) @ p, jnp.ones((4, 1)), jnp.zeros((1, 4)) + jnp.inf)
      >>> traced.rebuild(Halved().run(traced.closed, traced.leaves))
      Array([[2.]], dtype=float32)
    """

    def rule(self, eqn: Any, args: list[Any], context: Any) -> Any:
        """The results of an equation as a list, or ITSELF."""
        return ITSELF

    def plain(self, value: Any) -> Any:
        """An array for a value, where one is needed."""
        return value

    def inner(self, context: Any, eqn: Any, which: int = 0) -> Any:
        """The context of a jaxpr of an equation: a branch of a cond; 0 the condition and 1 the body of a while."""
        return context

    def start(self, jaxpr: Any, consts: Sequence[Any], context: Any) -> Sequence[Any]:
        """The values of the constants of a jaxpr that is about to be evaluated."""
        return consts

    def opaque(self, eqn: Any, args: list[Any], context: Any) -> bool:
        """Whether a function with a derivative of its own is kept, and not evaluated inside."""
        return True

    def run(self, jaxpr: Any, args: Sequence[Any], context: Any = None, consts: Sequence[Any] | None = None) -> list:
        """Evaluates a jaxpr on operands.

        Args:
          jaxpr: with its constants or without.
          args: a value for each of its inputs.
          context: passed to the rules.
          consts: the constants, if others than those it has.

        Returns:
          A value for each output, as the rules gave it.
        """
        jaxpr, own = opened(jaxpr)
        consts = self.start(jaxpr, own if consts is None else consts, context)
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(v: Any) -> Any:
            return v.val if isinstance(v, Literal) else env[v]

        for eqn in live_eqns(jaxpr):
            stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
            with source_info_util.user_context(eqn.source_info.traceback, name_stack=stack), eqn.ctx.manager:
                outs = self.step(eqn, [read(v) for v in eqn.invars], context)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def step(self, eqn: Any, args: list[Any], context: Any) -> list[Any]:
        """One equation: by its rule, else by what rebuilds it, else as it is."""
        outs = self.rule(eqn, args, context)
        if outs is ITSELF:
            handler = getattr(self, "do_" + eqn.primitive.name.replace("-", "_"), None)
            if handler:
                with within(eqn):
                    outs = handler(eqn, args, context)
        return self.bind(eqn, [self.plain(arg) for arg in args]) if outs is ITSELF else outs

    def bind(self, eqn: Any, args: Sequence[Any], **changed: Any) -> list[Any]:
        """The results of the primitive itself, with some of its params changed."""
        return bind(eqn, args, **changed)

    def _inside(self, jaxpr: Any, context: Any) -> Callable[[Sequence[Any]], list[Any]]:
        """A jaxpr as a function of its operands whose results are plain."""
        return lambda args: [self.plain(out) for out in self.run(jaxpr, args, context)]

    # Programs inside of programs.

    def do_jit(self, eqn: Any, args: list[Any], context: Any) -> Any:
        """Evaluates what is jitted in its place."""
        return self.run(eqn.params["jaxpr"], args, self.inner(context, eqn))

    do_pjit = do_jit

    def do_closed_call(self, eqn: Any, args: list[Any], context: Any) -> Any:
        """Evaluates the call in its place."""
        return self.run(eqn.params["call_jaxpr"], args, self.inner(context, eqn))

    do_core_call = do_closed_call

    def do_custom_jvp_call(self, eqn: Any, args: list[Any], context: Any) -> Any:
        """Keeps the derivative unless the subclass wants to see the inside, whose own derivative then holds."""
        return ITSELF if self.opaque(eqn, args, context) else self.do_closed_call(eqn, args, context)

    do_custom_vjp_call = do_custom_jvp_call

    def do_remat2(self, eqn: Any, args: list[Any], context: Any) -> Any:
        """Recomputes the inside in the backward pass, as the function does."""
        p, inner = eqn.params, self.inner(context, eqn)

        def inside(args: list[Any]) -> list[Any]:
            return self.run(p["jaxpr"], args, inner)

        return jax.checkpoint(inside, prevent_cse=p["prevent_cse"], policy=p["policy"])(args)

    do_checkpoint = do_remat = do_remat2

    def do_scan(self, eqn: Any, args: list[Any], context: Any) -> Any:
        """Scans the evaluated body."""
        p = eqn.params
        n, m = scan_counts(p)
        inside = self._inside(p["jaxpr"], self.inner(context, eqn))

        def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
            outs = inside([*args[:n], *carry, *xs])
            return outs[: m - n], outs[m - n :]

        carry = [self.plain(arg) for arg in args[n:m]]
        carry, ys = lax.scan(body, carry, args[m:], length=p["length"], reverse=p["reverse"], unroll=p["unroll"])
        return [*carry, *ys]

    def do_while(self, eqn: Any, args: list[Any], context: Any) -> Any:
        """Loops over the evaluated body."""
        p = eqn.params
        n, m = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        cond = self._inside(p["cond_jaxpr"], self.inner(context, eqn, 0))
        body = self._inside(p["body_jaxpr"], self.inner(context, eqn, 1))
        return lax.while_loop(
            lambda carry: cond([*args[:n], *carry])[0],
            lambda carry: body([*args[n:m], *carry]),
            [self.plain(arg) for arg in args[m:]],
        )

    def do_cond(self, eqn: Any, args: list[Any], context: Any) -> Any:
        """Chooses among the evaluated branches."""
        insides = [self._inside(b, self.inner(context, eqn, i)) for i, b in enumerate(eqn.params["branches"])]
        branches = [lambda *operands, inside=inside: inside(operands) for inside in insides]
        return lax.switch(jnp.asarray(self.plain(args[0]), jnp.int32), branches, *args[1:])

    def do_shard_map(self, eqn: Any, args: list[Any], context: Any) -> Any:
        """Evaluates what runs on each device; all arrays of a value are sharded as the operand is."""
        p = eqn.params
        specs = [jax.tree.map(lambda _, spec=spec: spec, arg) for spec, arg in zip(p["in_specs"], args, strict=True)]
        return jax.shard_map(
            self._inside(p["jaxpr"], self.inner(context, eqn)),
            mesh=p["mesh"],
            in_specs=(specs,),
            out_specs=list(p["out_specs"]),
            check_vma=p["check_vma"],
            axis_names=set(p["newly_manual_axes"]),
        )(args)
