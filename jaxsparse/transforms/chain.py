"""The chain whose members see the gradient that entered it and the momentum stored in it."""

import inspect
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsparse.transforms.protocols import link_states
from jaxsparse.transforms.renewal import held, refuse_mini_steps, restarted, stilled
from jaxsparse.trees import align, by_path, is_function, is_masked_node, leaf_paths, path_name

__all__ = ["Signal", "align_signal", "chain", "signals_of", "stored_momentum"]


class Signal(NamedTuple):
    """The gradient or momentum of one leaf.

    Attributes:
      parts: the array; or the ``mu`` and ``nu`` of Adam, of which :meth:`value` is computed where it is needed.
      kind: the kind of optimizer that a momentum is of: those of one kind have one scale.
    """

    parts: tuple[jax.Array, ...]
    kind: Hashable = None

    def value(self) -> jax.Array:
        """The array; of Adam, mu / (sqrt(nu) + 1e-8)."""
        momentum, *squares = self.parts
        return momentum / (jnp.sqrt(squares[0]) + 1e-8) if squares else momentum


def chain(*transforms: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``optax.chain`` whose members may also see the gradient and the momentum.

    Members that hold a sparse link, or whose ``update`` names them, receive two more extra args:

    * ``grad``: the gradient as it entered the chain;
    * ``momentum``: a function of no arguments that returns the momentum which the
      members before have just stored. Made when it is called, it costs nothing on
      the steps on which nobody asks.

    The momentum of a leaf is SGD's ``trace``, the ``mu`` of Adam and its relatives
    divided by ``sqrt(nu) + 1e-8`` (no bias correction), or ``ema``, looked up by these
    names in the states of the earlier members, nested ones too (``chain``,
    ``partition``, ``masked``, ``inject_hyperparams``, ``MultiSteps``), the latest first; of a
    chain in a chain its own members', then those before it. Optimizers for parts of the params (``masked``,
    ``partition``, ``optax.contrib.muon``) have momenta of their own scales; links that compare layers are told which
    leaves have the same kind of optimizer. What the caller passes under these
    names wins, and goes to every member that accepts extra args, as in :func:`optax.chain`. (The others are not handed
    ours: line searches such as that of ``optax.lbfgs`` refuse what they do not know.)

    When a link has regrown weights, as :func:`jaxsparse.rigl` does, what members before it have stored of these is set
    to 0 ahead of the next step: all arrays of floats whose path ends with that of the param, in its shape, such as the
    ``mu`` and ``nu`` of Adam. What an optimizer keeps of whole rows, as ``optax.adafactor`` does, goes on.

    Args:
      *transforms: the members, in order; sparse links last.

    Returns:
      A gradient transformation, used like that of :func:`optax.chain`.

    Raises:
      ValueError: by ``init``, if a link needs a momentum that no member before it stores, or stands before a member
        that stores one.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxsparse
      >>> params = {"kernel": jnp.ones((4, 5)), "bias": jnp.zeros(5)}
      >>> tx = jaxsparse.chain(
      ...     optax.sgd(0.1, momentum=0.9),
      ...     jaxsparse.sparse_momentum(sparsity=0.5, update_every=100),
      ... )
      >>> opt_state = tx.init(params)
      >>> params = jaxsparse.sparsify(opt_state, params)
      >>> updates, opt_state = tx.update(params, opt_state, params)  # gradients of half the squared norm
      >>> params = optax.apply_updates(params, updates)
      >>> int((params["kernel"] != 0).sum())
      10

    .. warning::
      What moves the params after a sparse link (a scale behind it,
      ``optax.contrib.schedule_free``, ``optax.lookahead``, an average of the params)
      brings pruned weights back. :func:`jaxsparse.check` finds it.
    """
    members = [optax.with_extra_args_support(t) for t in transforms]
    named = [_named(member.update) for member in members]

    def init_fn(params):
        states = tuple(member.init(params) for member in members)
        for i, state in enumerate(states, 1):
            for link in link_states(state):
                refuse_mini_steps(link, states[:i])
                _refuse_optimizer_behind(link, states[i:], params)
                if link.wants_momentum():  # of a chain in the chain, it may have one before it in there
                    _require_momentum(link, states[:i], params)
        return states

    def update_fn(updates, state, params=None, *, grad=None, momentum=None, **extra_args):
        if len(state) != len(members):
            raise ValueError(f"the chain has {len(members)} members, but its state has {len(state)} parts")
        state = tuple(state) if params is None else restarted(tuple(state), params)
        entered, outer = updates, ()
        if isinstance(momentum, _StoredMomentum):  # of a chain around this one
            momentum, outer = None, momentum.states
        given = {name: signal for name, signal in (("grad", grad), ("momentum", momentum)) if signal is not None}
        states: list[Any] = []
        for member, names, member_state in zip(members, named, state, strict=True):
            ours = {"grad": entered, "momentum": _StoredMomentum((*outer, *states), params)}
            if not link_states(member_state):
                ours = {name: ours[name] for name in names}
            updates, new_state = member.update(updates, member_state, params, **{**ours, **given}, **extra_args)
            states.append(new_state)
        return stilled(updates, tuple(states)), held(state, tuple(states))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def stored_momentum(states: Any, params: Any) -> Any:
    """The momentum in optimizer states, leaf by leaf.

    Args:
      states: optimizer states, later ones preferred.
      params: the params that the states belong to.

    Returns:
      A pytree like ``params``, with ``optax.MaskedNode()`` where no state stores a momentum.
    """
    found = {name: signal.value() for name, signal in _nearest_momenta(states, params).items()}
    return jax.tree.structure(params).unflatten([found.get(name, optax.MaskedNode()) for name in leaf_paths(params)])


def signals_of(signal: Any, params: Any, what: str) -> list[Signal | None]:
    """The signal of every leaf of ``params``; None where there is none.

    Optimizers that stand for parts of the params, by ``optax.masked`` or ``optax.partition``, are of one kind if
    their states are of the same types. All leaves of a signal that the caller handed in are of one kind.

    Args:
      signal: a tree like ``params``, a function that makes one, or None.
      params: the params.
      what: the name of the signal in errors.
    """
    paths = leaf_paths(params)
    if signal is None:
        return [None] * len(paths)
    if isinstance(signal, _StoredMomentum):
        found = _nearest_momenta(signal.states, signal.params)
        return [found.get(path) for path in paths]
    return [None if leaf is None else Signal((leaf,)) for leaf in align_signal(signal, params, what)]


def align_signal(signal: Any, params: Any, what: str) -> list[jax.Array | None]:
    """The leaves of an extra arg (a tree, or a function that makes one) that belong to ``params``.

    ``None`` where the extra arg has it, or ``optax.MaskedNode()``.
    """
    tree = signal() if is_function(signal) else signal

    wanted = set(leaf_paths(params))

    def absent(path, leaf):  # a None may also be one that the params have
        return is_masked_node(leaf) or (leaf is None and path_name(path) in wanted)

    tree = jax.tree_util.tree_map_with_path(
        lambda path, leaf: _Absent() if absent(path, leaf) else leaf,
        tree,
        is_leaf=lambda node: node is None or is_masked_node(node),
    )
    return [None if isinstance(leaf, _Absent) else leaf for leaf in align(tree, params, what)]


class _StoredMomentum:
    """:func:`stored_momentum`, made when it is called."""

    def __init__(self, states: Any, params: Any):
        self.states, self.params = states, params

    def __call__(self) -> Any:
        return stored_momentum(self.states, self.params)


def is_stored(momentum: Any) -> bool:
    """Whether a momentum is what :func:`chain` hands its members: then they are in such a chain."""
    return isinstance(momentum, _StoredMomentum)


def _nearest_momenta(states: Any, params: Any) -> dict[str, Signal]:
    """The last momentum of every leaf that has any, by its path."""
    found = {}
    shapes = dict(zip(leaf_paths(params), map(jnp.shape, jax.tree.leaves(params)), strict=True))
    for state, kind in _momentum_states(states):
        field = str(_momentum_field(state))
        squares = by_path(state.nu) if field == "mu" and hasattr(state, "nu") else {}
        for name, leaf in by_path(getattr(state, field)).items():
            if shapes.get(name) == jnp.shape(leaf):
                found[name] = Signal((leaf, squares[name]) if name in squares else (leaf,), kind)
    return found


def _momentum_states(node: Any, around: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """The states with a momentum in them, each with what they are of: their type, and those in the same masked part."""
    if _momentum_field(node):
        yield node, (*around, type(node).__name__)
        return
    if isinstance(node, optax.MaskedState):
        around = tuple(_types(node.inner_state))
    for part in _parts(node):
        yield from _momentum_states(part, around)


def _types(node: Any) -> Iterator[str]:
    """The names of the states within an optimizer state that have arrays in them, beside counts."""
    if any(jnp.ndim(leaf) for leaf in jax.tree.leaves(node)):
        if hasattr(node, "_fields"):
            yield type(node).__name__
        for part in _parts(node):
            yield from _types(part)


def _parts(node: Any) -> list[Any]:
    parts = jax.tree.leaves(node, is_leaf=lambda part: part is not node)
    return [part for part in parts if part is not node]  # a leaf is its own


def _momentum_field(node: Any) -> str | None:
    fields = getattr(node, "_fields", ())
    return next((name for name in ("trace", "mu", "ema") if name in fields), None)


def _refuse_optimizer_behind(link: Any, behind: Any, params: Any) -> None:
    """Raises a ValueError if what stands behind a link stores momenta of its leaves, and so moves what is pruned."""
    optimizers = [state for state in behind if not link_states(state)]
    momenta = by_path(jax.eval_shape(lambda: stored_momentum(optimizers, params))) if optimizers else {}
    if set(_pruned_paths(link)) & set(momenta):
        raise ValueError("the sparse link stands before the optimizer in the chain: put it last")


def _require_momentum(link: Any, states: Any, params: Any) -> None:
    found = by_path(jax.eval_shape(lambda: stored_momentum(states, params)))
    missing = [name for name in _pruned_paths(link) if name not in found]
    if missing:
        raise ValueError(
            f"no optimizer before the link in the chain stores a momentum (trace, mu or ema) of {missing[0]}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}. Use one with momentum, such as "
            "optax.sgd(0.1, momentum=0.9), or give the link its own: decay=0.9"
        )


def _pruned_paths(link: Any) -> list[str]:
    """The paths of the leaves that a link has masks for, of which none is computed: the params may be shapes."""
    return leaf_paths(jax.eval_shape(lambda state: state.sparse_masks(), link))


def _named(update: Callable[..., Any]) -> list[str]:
    """Which of the two signals an update function has a parameter for, beside what it takes of any name."""
    parameters = inspect.signature(update).parameters
    return [name for name in ("grad", "momentum") if name in parameters]


class _Absent:
    """A leaf that stands for a missing value (a MaskedNode has no leaves)."""
