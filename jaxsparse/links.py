"""What the links of a chain share: the chain itself, its signals, and how a link acts.

A *link* is a transformation that stands last in the chain. It sees the update that
the optimizer proposes and the params, and emits the update that lands on the masks.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxsparse.allocation import check_precision
from jaxsparse.placement import steady
from jaxsparse.trees import align, by_path, is_function, is_masked_node, leaf_paths, path_name

__all__ = [
    "LinkState",
    "chain",
    "land_on_masks",
    "link_states",
    "on_update_steps",
    "refuse_replicated",
    "require_params",
]


@runtime_checkable
class LinkState(Protocol):
    """What the accessors ask of a link's state, wherever it lies in an optimizer state.

    It may also have ``notes()``, of what is legal but seldom meant, in the form of ``problems``, for warnings.
    That of a wrapper may also have an ``inner_state``, with further links in it; ``eval_weights()``, the leaves to
    evaluate with where they are not the params on their masks; and ``log_alpha`` and ``open_channels()``, of its gates.
    """

    def sparse_masks(self) -> Any:
        """The masks: bool arrays, ``optax.MaskedNode()`` for dense leaves."""

    def wants_momentum(self) -> bool:
        """Whether the link needs the momentum of an optimizer before it in the chain."""

    def problems(self, params: Any | None) -> list[str]:
        """The broken invariants, one sentence each. Runs outside of jit."""


def link_states(opt_state: Any) -> list[Any]:
    """The states of all sparse links in an optimizer state, however deep, also those inside of a wrapper's."""
    found = []
    for leaf in jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, LinkState)):
        if isinstance(leaf, LinkState):
            found += [leaf, *link_states(getattr(leaf, "inner_state", ()))]
    return found


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

    Args:
      *transforms: the members, in order; sparse links last.

    Returns:
      A gradient transformation, used like that of :func:`optax.chain`.

    Raises:
      ValueError: by ``init``, if a link needs a momentum that no member before it stores.

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
                if link.wants_momentum():  # of a chain in the chain, it may have one before it in there
                    _require_momentum(link, states[:i], states[i:], params)
        return states

    def update_fn(updates, state, params=None, *, grad=None, momentum=None, **extra_args):
        if len(state) != len(members):
            raise ValueError(f"the chain has {len(members)} members, but its state has {len(state)} parts")
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
        return updates, tuple(states)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def stored_momentum(states: Any, params: Any) -> Any:
    """The momentum in optimizer states, leaf by leaf.

    Args:
      states: optimizer states, later ones preferred.
      params: the params that the states belong to.

    Returns:
      A pytree like ``params``, with ``optax.MaskedNode()`` where no state stores a momentum.
    """
    found = {
        name: momentum if squares is None else momentum / (jnp.sqrt(squares) + 1e-8)
        for name, (momentum, squares, _) in _nearest_momenta(states, params).items()
    }
    return jax.tree.structure(params).unflatten([found.get(name, optax.MaskedNode()) for name in leaf_paths(params)])


def momentum_kinds(signal: Any, params: Any) -> list[Any]:
    """For every leaf of ``params`` the kind of optimizer that its momentum is of: those of one kind have one scale.

    Optimizers that stand for parts of the params, by ``optax.masked`` or ``optax.partition``, are of one kind if
    their states are of the same types. Of a signal that the caller handed in, all leaves are of one kind.
    """
    kinds = {}
    if isinstance(signal, _StoredMomentum):
        kinds = {name: kind for name, (_, _, kind) in _nearest_momenta(signal.states, signal.params).items()}
    return [kinds.get(name) for name in leaf_paths(params)]


def _nearest_momenta(states: Any, params: Any) -> dict[str, tuple[jax.Array, jax.Array | None, Any]]:
    """For the path of each leaf that has any the last momentum, Adam's nu beside it, and the kind of its optimizer."""
    found = {}
    shapes = dict(zip(leaf_paths(params), map(jnp.shape, jax.tree.leaves(params)), strict=True))
    for state, kind in _momentum_states(states):
        field = str(_momentum_field(state))
        squares = by_path(state.nu) if field == "mu" and hasattr(state, "nu") else {}
        for name, leaf in by_path(getattr(state, field)).items():
            if shapes.get(name) == jnp.shape(leaf):
                found[name] = leaf, squares.get(name), kind
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


class _StoredMomentum:
    """:func:`stored_momentum`, made when it is called."""

    def __init__(self, states: Any, params: Any):
        self.states, self.params = states, params

    def __call__(self) -> Any:
        return stored_momentum(self.states, self.params)


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


def on_update_steps(due: jax.Array, compute: Callable[[Any], Any], old: Any) -> Any:
    """``compute(old)`` on the steps on which it is due, ``old`` unchanged on the others, at no cost there.

    A loop that runs once or not at all, rather than a ``lax.cond``: XLA updates the carry of a loop in place, while
    a conditional copies what it passes on, twice, on every step. And under ``vmap`` a cond becomes a select that
    computes on every step; a loop runs only when some lane is due, and leaves the other lanes as they were.

    What ``compute`` reads should be ``old``, the params and the optimizer state just stored: anything that must first
    be made from these is best made inside.

    Args:
      due: bool scalar.
      compute: makes the new values from the old.
      old: the old values, a pytree. If ``compute`` took them from elsewhere, they would have to be copied.

    Returns:
      A pytree like ``old``.

    Examples:
      >>> import jax.numpy as jnp
      >>> on_update_steps(jnp.array(True), lambda x: x + 1, jnp.arange(3)).tolist()
      [1, 2, 3]
    """
    if not isinstance(due, jax.core.Tracer):  # outside of jit a loop would be compiled anew at every call
        return compute(old) if due else old
    compute, old = steady(compute, old)
    return jax.lax.while_loop(
        lambda carry: carry[0], lambda carry: (jnp.zeros_like(carry[0]), compute(carry[1])), (due, old)
    )[1]


def land_on_masks(updates: Any, params: Any, masks: Any) -> Any:
    """The update that leaves every pruned weight at exactly 0: ``-p``, since ``p + (-p)`` is 0.

    Args:
      updates: the proposed update, like ``params``; None for leaves without one, which stays so where they are dense.
      params: the params.
      masks: bool arrays, ``optax.MaskedNode()`` for dense leaves.

    Returns:
      The update, in the dtypes of the params.
    """

    def land(p, u, mask):
        if u is None and is_masked_node(mask):
            return None
        u = jnp.zeros_like(p) if u is None else jnp.asarray(u, jnp.result_type(p))
        if is_masked_node(mask):
            return u
        # Compared as a byte: on a CPU, XLA's select on a stored bool is not vectorised and takes a third longer.
        return jnp.where(mask.astype(jnp.uint8) != 0, u, -p)

    leaves, treedef = jax.tree.flatten(params)
    proposed, masks = treedef.flatten_up_to(updates), treedef.flatten_up_to(masks)
    return treedef.unflatten([land(*each) for each in zip(leaves, proposed, masks, strict=True)])


def check_range(name: str, value: Any, low: float, high: float | None = None, open_end: bool = False) -> None:
    """Raises a ValueError for a concrete value out of range or NaN, or of low precision; None and traced ones pass."""
    check_precision(name, value)
    if value is None or isinstance(value, jax.core.Tracer):
        return
    if not (value >= low and (high is None or value < high or (value == high and not open_end))):
        upper = "" if high is None else f" and {'below' if open_end else 'at most'} {high}"
        raise ValueError(f"{name} must be at least {low}{upper}, got {value}")


def check_steps(name: str, value: Any, low: int) -> None:
    """Raises a ValueError for a concrete number of steps that is not whole, or out of range; None, traced ones pass."""
    check_range(name, value, low)
    if value is None or isinstance(value, jax.core.Tracer):
        return
    if float(value) >= 2**31:
        raise ValueError(f"{name} must be below 2**31, for steps are counted in int32, got {value}")
    if int(value) != value:
        raise ValueError(f"{name} must be a whole number of steps, got {value}")


def require_params(params: Any, who: str) -> None:
    """Raises a ValueError if ``update`` was called without params."""
    if params is None:
        raise ValueError(f"{who} needs the params: call tx.update(grads, opt_state, params)")


def require_bool(masks: Any, who: str) -> None:
    """Raises a ValueError if the masks of a state are numbers: what computes with states makes them so."""
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
    """Says if masks (of one replica, or with leading replica axes) do not add up to their budget."""
    leaves = jax.tree.leaves(masks)
    budget = jax.tree.leaves(budget)[0]  # flax.nnx wraps the leaves of an optimizer state
    replica_axes = budget.ndim
    kept = sum(m.sum(tuple(range(replica_axes, m.ndim)), dtype=jnp.int32) for m in leaves)
    if leaves and bool(jnp.any(kept != budget)):
        return [f"{who}: the masks keep {kept} weights, but the budget is {budget}"]
    return []


def check_zeros(masks: Any, params: Any, who: str) -> list[str]:
    """Says which pruned weights are not zero, leaf by leaf."""
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


def _named(update: Callable[..., Any]) -> list[str]:
    """Which of the two signals an update function has a parameter for, beside what it takes of any name."""
    parameters = inspect.signature(update).parameters
    return [name for name in ("grad", "momentum") if name in parameters]


def hint_of_parts(name: str, weights: Mapping[str, Any]) -> str:
    """What to do where masks are of the parts of a complex leaf; nothing for any other leaf that is not there."""
    whole = name.rpartition("/")[0]
    if whole not in weights or not jnp.iscomplexobj(weights[whole]):
        return ""
    return (
        f". The real and imaginary parts of {whole} have masks of their own (optax.contrib.split_real_and_imaginary): "
        'give the params in such parts, {"real": w.real, "imaginary": w.imag} in the place of w'
    )


class _Absent:
    """A leaf that stands for a missing value (a MaskedNode has no leaves)."""


def _momentum_field(node: Any) -> str | None:
    fields = getattr(node, "_fields", ())
    return next((name for name in ("trace", "mu", "ema") if name in fields), None)


def _require_momentum(link: Any, states: Any, behind: Any, params: Any) -> None:
    found = by_path(jax.eval_shape(lambda: stored_momentum(states, params)))
    missing = [name for name in leaf_paths(link.sparse_masks()) if name not in found]
    if missing and missing[0] in by_path(jax.eval_shape(lambda: stored_momentum(behind, params))):
        raise ValueError("the sparse link stands before the optimizer in the chain: put it last")
    if missing:
        raise ValueError(
            f"no optimizer before the link in the chain stores a momentum (trace, mu or ema) of {missing[0]}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}. Use one with momentum, such as "
            "optax.sgd(0.1, momentum=0.9), or give the link its own: decay=0.9"
        )


def _has_replica_axis(leaf: ArrayLike) -> bool:
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array) or leaf.ndim == 0:
        return False
    devices = leaf.sharding.device_set
    split = leaf.sharding.shard_shape(leaf.shape)
    return len(devices) > 1 and leaf.shape[0] == len(devices) and split == (1, *leaf.shape[1:])
