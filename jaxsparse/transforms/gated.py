"""Wrappers with hard-concrete gates on channels: the part that l0 and dep_l0 share."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxsparse.gates import EPSILON, Penalty, hard_concrete, hard_concrete_mean, of_channels, prob_open, spread, times
from jaxsparse.groups import Group, group_sizes
from jaxsparse.masks import as_key
from jaxsparse.placement import mask_like, placed_like, varying_like
from jaxsparse.transforms.checks import check_steps, check_zeros
from jaxsparse.transforms.latent import as_optimizer, latent, not_finite
from jaxsparse.transforms.renewal import has_state
from jaxsparse.trees import by_path, is_masked_node, leaf_paths, path_name

__all__ = ["GatedState", "gated", "group_tuple"]


class _Fields(NamedTuple):
    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives it
    weights: Any
    inner_state: Any
    key: Any = ()
    log_alpha: Any = ()
    generator: Any = ()
    gates: Any = ()
    slopes: Any = ()
    test_gates: Any = ()
    gate_state: Any = ()


class GatedState(_Fields):
    """State of a wrapper with hard-concrete gates; a subclass names the method.

    Attributes:
      count: (), int32: the updates so far.
      weights: the weights behind the gates, like the params, ``optax.MaskedNode()`` for leaves without gates.
      inner_state: the state of the inner optimizer.
      key: (), typed PRNG key: for the gates to come.
      log_alpha: group's name -> (size,), float32: the locations of the gates.
      generator: the params of the generator of :func:`jaxsparse.dep_l0`, see :func:`jaxsparse.dependent_logits`; ()
        for independent gates.
      gates: leaf path -> the gates in force, of the leaf's rank, with size 1 for all axes but that of the channels; if
        several slices of the leaf have gates, a tuple of them.
      slopes: group's name -> (size,): the derivative of the gates in force by log_alpha.
      test_gates: like ``gates``: the gates to evaluate with.
      gate_state: the state of the optimizer of the gates.
    """

    method: ClassVar[str] = "gates"

    def sparse_masks(self) -> Any:
        """Where the gates in force are not zero."""
        return self._gated(lambda w, path: mask_like(jnp.broadcast_to(_product(self.gates[path]) != 0, w.shape), w))

    def eval_weights(self) -> Any:
        """The weights times the gates to evaluate with; ``optax.MaskedNode()`` for leaves without gates."""
        return self._gated(lambda w, path: times(w, _product(self.test_gates[path])).astype(w.dtype))

    def open_channels(self) -> dict[str, jax.Array]:
        """The channels of each group that are open in evaluation."""
        return {name: hard_concrete_mean(log_alpha) > 0 for name, log_alpha in self.log_alpha.items()}

    def wants_momentum(self) -> bool:
        """False: the gates learn from the gradients."""
        return False

    def problems(self, params: Any | None) -> list[str]:
        """Gates and weights that are not finite, params that are not the weights times the gates."""
        who = self.method
        found = [
            f"{who}: log_alpha of group {name!r} is not finite. The training has diverged"
            for name, log_alpha in self.log_alpha.items()
            if not bool(jnp.isfinite(_leaf(log_alpha)).all())
        ]
        found += not_finite(self.weights, who)
        if params is None or found:
            return found
        found = check_zeros(self.sparse_masks(), params, who)
        leaves = by_path(params)
        for path, w in by_path(self.weights).items():
            product = times(w, _product(self.gates[path])).astype(leaves[path].dtype)
            away = jnp.max(jnp.abs(leaves[path] - product), initial=0)
            if away > 16 * jnp.finfo(w.dtype).eps * (1 + jnp.max(jnp.abs(w), initial=0)):
                found.append(
                    f"{who}: {path} is not its weights times their gates, but up to {float(away):.2g} away. Something "
                    "moves the params after the wrapper (it must stand last, with no schedule_free, lookahead or "
                    "averaging around it)"
                )
        return found

    def _gated(self, make):
        """``make(weights, path)`` for the leaves with gates."""
        leaves, treedef = jax.tree.flatten(self.weights, is_leaf=is_masked_node)
        paths = iter(leaf_paths(self.weights))
        return treedef.unflatten([w if is_masked_node(w) else make(w, next(paths)) for w in leaves])


def gated(
    state: type[GatedState],
    inner: optax.GradientTransformation,
    groups: tuple[Group, ...],
    penalty: Penalty,
    init_gates: Callable[..., Any],
    *,
    generate: Callable[[Any], list[jax.Array]] | None = None,
    gate_optimizer: optax.GradientTransformation | None = None,
    freeze_gates_at: int | None = None,
    clamp: tuple[float, float] | None = None,
    axis_name: str | None = None,
    key: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """A wrapper that multiplies channels by random gates and trains both weights and gates.

    Args:
      state: a subclass of :class:`GatedState` with the name of the ``method``.
      inner, groups, gate_optimizer, freeze_gates_at, clamp, axis_name, key: as for :func:`jaxsparse.l0`.
      penalty: the :class:`jaxsparse.Penalty`.
      init_gates: (sizes of the groups, key) -> the first params of the gates.
      generate: from the params of the gates to log_alpha of each group; None: they are log_alpha.

    Returns:
      A gradient transformation. Its ``update`` needs the params.
    """
    who = state.method
    inner = as_optimizer(inner, "inner", who)
    gate_optimizer = as_optimizer(optax.adam(1e-3) if gate_optimizer is None else gate_optimizer, "gate_optimizer", who)
    logits_of = generate or (lambda log_alpha: log_alpha)
    check_steps("freeze_gates_at", freeze_gates_at, 0)
    names = [getattr(group, "name", None) for group in groups]
    if not isinstance(penalty, Penalty):
        raise ValueError(f"{who}: penalty is made by jaxsparse.Penalty, got {penalty!r}")
    if isinstance(penalty.strength, Sequence) and len(penalty.strength) != len(groups):
        raise ValueError(f"the penalty has {len(penalty.strength)} strengths for {len(groups)} groups")

    def by_group(vectors):
        return dict(zip(names, vectors, strict=True))

    def by_leaf(vectors, weights):
        """Vectors, one for each group, in the rank of the leaves that they multiply."""
        leaves, found = by_path(weights), {}  # type: dict, dict[str, list]
        for group, vector in zip(groups, vectors, strict=True):
            for which in group.multiplies:
                gate = spread(vector, which, leaves[which.path].shape) if which.path in leaves else vector
                found.setdefault(which.path, []).append(gate)
        return {path: factors[0] if len(factors) == 1 else tuple(factors) for path, factors in found.items()}

    def latents(params):
        multiplied = {which.path for group in groups for which in group.multiplies}
        return jax.tree_util.tree_map_with_path(
            lambda path, p: p if path_name(path) in multiplied else optax.MaskedNode(), params
        )

    def start(state, params):
        empty = not jax.tree.leaves(params)  # Optax's placeholder: only the structure matters
        sizes = (1,) * len(groups) if empty else group_sizes(groups, params)
        if not empty:
            penalty.kernels(groups, params)  # raises if it does not fit
        for kind, wrapper in ((optax.MultiStepsState, "MultiSteps"), (optax.ApplyIfFiniteState, "apply_if_finite")):
            if has_state(state.inner_state, kind) and not has_state(gate_optimizer.init(()), kind):
                raise ValueError(
                    f"{who}: optax.{wrapper} around inner leaves out the gates, which move on every step: put it "
                    f"around {who}(...), or around gate_optimizer too"
                )
        draw, gate_key = jax.random.split(as_key(key))
        gate_params = varying_like(init_gates(sizes, gate_key), params)
        logits = logits_of(gate_params)
        return state._replace(
            key=draw,
            log_alpha=by_group(logits),
            generator=() if generate is None else gate_params,
            gates=by_leaf(map(jnp.ones_like, logits), state.weights),
            slopes=by_group(map(jnp.zeros_like, logits)),
            test_gates=by_leaf(map(hard_concrete_mean, logits), state.weights),
            gate_state=gate_optimizer.init(gate_params),
        )

    def frozen_at(count):
        return jnp.array(False) if freeze_gates_at is None else count >= freeze_gates_at

    def pull(grads, weights, state):
        """The chain rule: the gradient of weight x gate is passed on to both, and the gates move."""
        frozen, behind = frozen_at(state.count), by_path(weights)
        treedef = jax.tree.structure(weights)
        found = dict(zip(behind, treedef.flatten_up_to(grads), strict=True))

        others = {path: _others_of_each(gates) for path, gates in state.gates.items()}

        def of_gate(which, size):
            w, grad = behind[which.path], found[which.path]
            grad = jnp.zeros_like(w) if grad is None else grad
            grad = grad.astype(np.promote_types(grad.dtype, np.float32))  # under strict promotion too
            by_gate = functools.reduce(times, [grad, w, *others[which.path].pop(0)])
            return of_channels(by_gate, which, size)

        sizes = [state.log_alpha[name].size for name in names]
        of_gates = [
            sum(of_gate(which, size) for which in group.multiplies) for group, size in zip(groups, sizes, strict=True)
        ]
        for path, gates in state.gates.items():
            if found[path] is not None:
                found[path] = times(found[path], _product(gates)).astype(found[path].dtype)

        gate_params = [state.log_alpha[name] for name in names] if generate is None else state.generator
        gate_params = varying_like(gate_params, [*of_gates, state.slopes])
        logits, pull_back = jax.vjp(logits_of, gate_params)
        of_penalty = jax.grad(lambda logits: penalty.value(groups, weights, logits))(logits)
        of_gates = [placed_like(g, log_alpha) for log_alpha, g in zip(logits, of_gates, strict=True)]
        of_logits = [
            slope * g + jnp.where(frozen, 0, extra)
            for slope, g, extra in zip([state.slopes[name] for name in names], of_gates, of_penalty, strict=True)
        ]
        if penalty.weight_decay:  # the gradient of P c/2 W^2 by W
            for kernel, log_alpha in zip(penalty.kernels(groups, weights), logits, strict=True):
                path = kernel.path
                if found[path] is not None:
                    rate = jnp.where(frozen, 0, prob_open(log_alpha) * penalty.weight_decay / penalty.examples)
                    rate = spread(rate, kernel, behind[path].shape)
                    found[path] += times(rate, behind[path]).astype(found[path].dtype)
        (of_gate_params,) = pull_back(of_logits)
        grads = treedef.unflatten([found[path] for path in behind])
        if axis_name is not None:
            grads, of_gate_params = jax.lax.pmean((grads, of_gate_params), axis_name)

        with jax.numpy_dtype_promotion("standard"):  # Optax's Adam knows no other
            moves, gate_state = gate_optimizer.update(of_gate_params, state.gate_state, gate_params)
        moved = optax.apply_updates(gate_params, moves)
        if clamp is not None:
            moved = jax.tree.map(lambda x: jnp.clip(x, *clamp), moved)
        gate_params = jax.tree.map(lambda old, new: jnp.where(frozen, old, new), gate_params, moved)
        return grads, state._replace(
            log_alpha=by_group(logits_of(gate_params)),
            generator=() if generate is None else gate_params,
            gate_state=gate_state,
        )

    def forward(state):
        """The weights times the gates drawn for this step."""
        logits = [state.log_alpha[name] for name in names]
        key, draw = jax.random.split(state.key)
        if axis_name is not None:
            draw = jax.random.fold_in(draw, jax.lax.axis_index(axis_name))
        flat = jnp.concatenate(logits)
        uniform = jax.random.uniform(draw, flat.shape, minval=EPSILON, maxval=1 - EPSILON)
        gates, slopes = jax.jvp(lambda la: hard_concrete(la, uniform), [flat], [jnp.ones_like(flat)])
        tested = hard_concrete_mean(flat)
        if freeze_gates_at is not None:
            gates = jnp.where(frozen_at(state.count), tested, gates)
            slopes = jnp.where(frozen_at(state.count), 0, slopes)
        ends = np.cumsum([la.size for la in logits])[:-1]
        gates, slopes, tested = (jnp.split(vector, ends) for vector in (gates, slopes, tested))
        of_leaves = by_leaf(gates, state.weights)
        image = jax.tree_util.tree_map_with_path(
            lambda path, w: times(w, _product(of_leaves[path_name(path)])), state.weights
        )
        return image, state._replace(
            key=key, gates=of_leaves, slopes=by_group(slopes), test_gates=by_leaf(tested, state.weights)
        )

    return latent(state, inner, latents, forward, start=start, pull=pull)


def group_tuple(groups: Sequence[Group]) -> tuple[Group, ...]:
    """The groups as a tuple; a ValueError for a single one."""
    if isinstance(groups, Group):
        raise ValueError(f"groups must be a sequence of jaxsparse.Group, got a single one, {groups.name!r}: [group]")
    return tuple(groups)


def _product(gates: Any) -> jax.Array:
    """The product of all gates of a leaf."""
    return functools.reduce(times, jax.tree.leaves(gates))


def _others_of_each(gates: Any) -> list[list[jax.Array]]:
    """For each gate of a leaf the others."""
    factors = jax.tree.leaves(gates)
    return [factors[:i] + factors[i + 1 :] for i in range(len(factors))]


def _leaf(wrapped: Any) -> jax.Array:
    """The array, where flax.nnx wraps the leaves of an optimizer state."""
    return jax.tree.leaves(wrapped)[0]
