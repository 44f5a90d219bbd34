"""Regrown weights: the value, the optimizer state and the first steps of a weight that returns.

A weight that a drop-and-grow method regrows starts at 0, with an optimizer state of zeros. The link that regrows it
sets its value; the optimizer state is another member's, so :func:`jaxsparse.chain` resets it. Weights that were dropped
and regrown at once were never gone: they keep their value and their state.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxsparse.placement import lies_anywhere, varying_like
from jaxsparse.transforms.checks import check_range
from jaxsparse.transforms.landing import on_update_steps
from jaxsparse.transforms.protocols import is_link_state, link_states
from jaxsparse.trees import by_path, is_masked_node, path_name
from jaxsparse.user_warnings import warn

__all__ = ["Renewal", "Renewing", "Restarting"]

_OLD = 255  # age of a weight that has been there from the start, or for as many mask updates


class Renewal(NamedTuple):
    """The last mask update of a link, as far as its regrown weights need it.

    Attributes:
      now: (), bool: whether masks changed in the last step.
      hold: (), bool, True, if the optimizer takes no step then; () if it does.
      changed_at: (), int32: the step of the last mask update; () without a bias correction.
      since: like the masks: uint8: the mask updates since the weight was regrown, 255 for older ones; () without a bias
        correction.
      explored: like the masks: bool: the weights that were ever kept; () if they are not tracked.
    """

    now: jax.Array
    hold: Any = ()
    changed_at: Any = ()
    since: Any = ()
    explored: Any = ()


class Renewing(NamedTuple):
    """The treatment of regrown weights by a link.

    Attributes:
      hold: the optimizer takes no step on the steps on which masks change.
      betas: the decays (beta_1, beta_2) of an Adam-like optimizer, whose bias correction regrown weights then have by
        their own age; None: by the age of the run.
      every: steps between two mask updates, for that age.
      track: keep track of the weights that were ever kept.
    """

    hold: bool = False
    betas: tuple[ArrayLike, ArrayLike] | None = None
    every: ArrayLike = 1
    track: bool = False

    @property
    def always(self) -> bool:
        """Whether masks may change on every step, inside of jit too."""
        return isinstance(self.every, jax.core.Tracer) or bool(np.asarray(self.every) == 1)

    def check(self) -> None:
        """Raises a ValueError for betas that are none."""
        if self.betas is None:
            return
        if not isinstance(self.betas, tuple | list) or len(self.betas) != 2:
            raise ValueError(f"bias_correction must be the decays of Adam, such as (0.9, 0.999), got {self.betas!r}")
        for beta in self.betas:
            check_range("bias_correction", beta, 0, 1, open_end=True)

    def init(self, params: Any, masks: Any) -> Renewal:
        """The first state, given the first masks."""
        aged = self.betas is not None
        no = varying_like(jnp.zeros([], bool), params)
        return Renewal(
            now=no,
            hold=varying_like(jnp.ones([], bool), params) if self.hold else (),
            changed_at=varying_like(jnp.zeros([], jnp.int32), params) if aged else (),
            since=jax.tree.map(lambda mask: jnp.full_like(mask, _OLD, jnp.uint8), masks) if aged else (),
            explored=jax.tree.map(lambda mask: mask | False, masks) if self.track else (),
        )

    def at(self, renewal: Renewal, now: jax.Array, count: jax.Array) -> Renewal:
        """The state of a step on which masks change, or do not."""
        del count
        return renewal._replace(now=jnp.asarray(now))

    def renewed(self, renewal: Renewal, old: Any, new: Any, count: jax.Array) -> Renewal:
        """The state after a mask update, in which the ``old`` masks became the ``new`` ones."""
        if self.betas is not None:

            def older(before, after, since):
                return jnp.where(after & ~before, 0, jnp.minimum(since, _OLD - 1) + 1).astype(jnp.uint8)

            renewal = renewal._replace(changed_at=count, since=jax.tree.map(older, old, new, renewal.since))
        if self.track:
            renewal = renewal._replace(explored=jax.tree.map(jnp.logical_or, renewal.explored, new))
        return renewal

    def updates(self, updates: Any, renewal: Renewal, params: Any, count: jax.Array) -> Any:
        """The proposed update, with steps for the age of regrown weights, and none for an optimizer that is held."""
        if self.betas is not None:
            aged = self._corrections(renewal, count)

            def corrected(u, since):
                dtype = np.promote_types(u.dtype, jnp.float32)
                return (u.astype(dtype) * aged(since).astype(dtype)).astype(u.dtype)

            treedef = jax.tree.structure(params)
            rows = zip(treedef.flatten_up_to(updates), treedef.flatten_up_to(renewal.since), strict=True)
            updates = treedef.unflatten(
                [u if u is None or is_masked_node(since) else corrected(u, since) for u, since in rows]
            )
        if self.hold:
            updates = jax.tree.map(lambda u: jnp.where(renewal.now, jnp.zeros_like(u), u), updates)
        return updates

    def _corrections(self, renewal: Renewal, count: jax.Array) -> Callable[[jax.Array], jax.Array]:
        r"""The step of a weight of age a over the one that Adam takes on step t, with m and v of its age.

        .. math:: \frac{\sqrt{1 - \beta_2^a}}{1 - \beta_1^a} \cdot \frac{1 - \beta_1^t}{\sqrt{1 - \beta_2^t}}
        """
        beta_1, beta_2 = (jnp.asarray(beta, jnp.float32) for beta in self.betas or ())

        def step(age):
            return jnp.sqrt(1 - beta_2**age) / (1 - beta_1**age)

        passed, whole = (count - renewal.changed_at).astype(jnp.float32), step(count.astype(jnp.float32) + 1)

        def of(since):
            age = since.astype(jnp.float32) * jnp.asarray(self.every, jnp.float32) + passed
            return jnp.where(since == _OLD, 1, step(jnp.maximum(age, 1)) / whole)

        # On a CPU two powers for each weight take three times as long as the rest of a step; a table takes no time.
        table = of(jnp.arange(_OLD + 1, dtype=jnp.uint8))

        def looked_up(since):
            if not lies_anywhere(since):
                return of(since)
            return jax.lax.platform_dependent(since, cpu=lambda since: table[since.astype(jnp.int32)], default=of)

        return looked_up


class Restarting(NamedTuple):
    """The treatment of regrown weights by a fresh start of the whole optimizer after some steps.

    For links whose state has ``restarts_all``, in the place of :class:`Renewing`, whose methods it has.

    Attributes:
      when: step -> whether the optimizer starts anew after it, and has a state of zeros on the next one.
    """

    when: Callable[[jax.Array], jax.Array]

    def init(self, params: Any, masks: Any) -> Renewal:
        """The first state."""
        del masks
        return Renewal(now=varying_like(jnp.zeros([], bool), params))

    def at(self, renewal: Renewal, now: jax.Array, count: jax.Array) -> Renewal:
        """The state of a step."""
        del now
        return renewal._replace(now=jnp.asarray(self.when(count)))

    def renewed(self, renewal: Renewal, old: Any, new: Any, count: jax.Array) -> Renewal:
        """The state after a mask update, which changes nothing in it."""
        del old, new, count
        return renewal

    def updates(self, updates: Any, renewal: Renewal, params: Any, count: jax.Array) -> Any:
        """The proposed update, which holds for all weights."""
        del renewal, params, count
        return updates


def has_state(states: Any, kind: type) -> bool:
    """Whether there is a state of a kind in optimizer states."""
    nodes = jax.tree.leaves(states, is_leaf=lambda node: isinstance(node, kind))
    return any(isinstance(node, kind) for node in nodes)


def refuse_mini_steps(link: Any, before: Any) -> None:
    """Raises a ValueError for what must not stand behind an optimizer that does not step whenever the link does."""
    renewal = getattr(link, "renewal", ())
    by_age = isinstance(renewal, Renewal) and not isinstance(renewal.changed_at, tuple)
    shrinks = getattr(link, "shrinks_every_step", False)
    if not (by_age or shrinks) or not has_state(before, optax.MultiStepsState):
        return
    if shrinks:
        raise ValueError(
            "reweighted_l1 shrinks weights on every step, but optax.MultiSteps in front of it takes a step on some of "
            "them only, which multiplies the penalty: put optax.MultiSteps around the whole chain"
        )
    raise ValueError(
        f"{link.method}: bias_correction counts the age of a weight in steps of the link, but optax.MultiSteps in "
        "front of it takes a step on some of them only: leave bias_correction out, or accumulate gradients outside "
        "the chain"
    )


def restarted(states: Any, params: Any) -> Any:
    """The states of a chain's members before a step, with zeros for what links in it regrew in the last step.

    Before the next step, not after the mask update: states that come in are changed in place, those that an update has
    just made would be copied. What was regrown is 0 then, and so is what is missing, whose state nothing needs: weights
    alone are compared with 0, for masks that are read here could not change in place afterwards.

    A link whose state has ``restarts_all`` asks for zeros in the states of all params, those without a mask too.

    Args:
      states: the tuple of states that the update begins with.
      params: the params.
    """
    if type(states) is not tuple:  # optimizer states of other types are no chains, but may have some inside
        if not _has_chains(states):
            return states
        if isinstance(states, dict) and any(is_link_state(state) for state in states.values()):
            # which has lost the order of its members
            warn(
                "a link that regrows weights stands in optax.named_chain, so their optimizer state cannot be set to "
                "zero: use jaxsparse.chain",
            )
        parts, treedef = _parts(states)
        return treedef.unflatten([restarted(part, params) for part in parts])
    done: list[Any] = []
    for member in states:
        member = restarted(member, params)
        for link in link_states(member):
            if not isinstance(getattr(link, "renewal", ()), Renewal):
                continue
            if getattr(link, "restarts_all", False):
                # Of averages that begin anew, the bias is that of their first steps: the counts beside them too.
                done = [_map_averages(functools.partial(_zero_if, link.renewal.now), state, params) for state in done]
            else:
                done = _zeroed_where_regrown(done, link, params)
        done.append(member)
    return tuple(done)


def held(old: Any, new: Any) -> Any:
    """The states of a chain's members after a step, which are the old ones before links that hold the optimizer.

    Other links are not held: they may have changed masks on the same step.
    """
    if type(new) is not tuple:
        if not _has_chains(new):
            return new
        (before, _), (after, treedef) = _parts(old), _parts(new)
        return treedef.unflatten([held(*both) for both in zip(before, after, strict=True)])
    done: list[Any] = []
    for i, (before, after) in enumerate(zip(old, new, strict=True)):
        after = held(before, after)
        for link in link_states(after):
            renewal = getattr(link, "renewal", ())
            if isinstance(renewal, Renewal) and not isinstance(renewal.hold, tuple):
                done = _chosen(renewal.now, old[:i], done)
        done.append(after)
    return tuple(done)


def stilled(updates: Any, states: Any) -> Any:
    """The updates of a chain whose optimizer is held: none for leaves that the links which hold it do not see.

    Pruned weights of other links land on 0 all the same.
    """
    links = link_states(states)
    for link in links:
        renewal = getattr(link, "renewal", ())
        if isinstance(renewal, Renewal) and not isinstance(renewal.hold, tuple):
            seen, now = set(by_path(link.sparse_masks())), renewal.now
            others = {path: mask for other in links if other is not link
                      for path, mask in by_path(other.sparse_masks()).items() if path not in seen}  # fmt: skip

            def still(path, u, seen=seen, now=now, others=others):
                name = path_name(path)
                return u if name in seen else _zero_if(now & others.get(name, True), u)

            updates = jax.tree_util.tree_map_with_path(still, updates)
    return updates


def _has_chains(state: Any) -> bool:
    """Whether an optimizer state that is no chain, such as that of ``optax.masked``, may have one with links inside."""
    links = [] if is_link_state(state) else link_states(state)
    return any(isinstance(getattr(link, "renewal", ()), Renewal) for link in links)


def _parts(state: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(state, is_leaf=lambda node: node is not state)


def _chosen(first: jax.Array, old: Any, new: list[Any]) -> list[Any]:
    def choose(before, after):
        if is_link_state(after):
            return after
        if jnp.issubdtype(jnp.result_type(after), jax.dtypes.prng_key):
            data = jnp.where(first, *map(jax.random.key_data, (before, after)))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(after))
        return jnp.where(first, before, after).astype(after.dtype)

    return list(jax.tree.map(choose, tuple(old), tuple(new), is_leaf=is_link_state))


def _zero_if(now: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.select(now, jnp.zeros_like(x), x)


def _zeroed_where_regrown(states: list[Any], link: Any, params: Any) -> list[Any]:
    sparse, weights = set(by_path(link.sparse_masks())), by_path(params)
    owners: list[str] = []  # the param that each slot is of: an optimizer may have several of one
    slots: list[jax.Array] = []
    unknown: list[str] = []

    def slot_of(path, leaf):
        name = _owner(path, leaf, weights)  # among all params: of two that end alike the longer path is meant
        return name if name in sparse else None

    def collect(path, leaf):
        if (name := slot_of(path, leaf)) is not None:
            owners.append(name)
            slots.append(leaf)
        elif jnp.ndim(leaf) and _owner(path, leaf, weights) is None and jnp.issubdtype(leaf.dtype, jnp.inexact):
            unknown.append(path_name(path))

    _map_outside_links(collect, states)
    if not slots:
        if unknown:
            warn(
                f"regrown weights keep the optimizer state that they have: {unknown[0]} has other shapes than the "
                "params, as in optax.flatten, so that theirs is not to be found"
            )
        return states

    @jax.custom_jvp  # a loop cannot be differentiated in reverse, and where can
    def zeroed(now, slots, weights):
        def without_regrown(slots):
            pruned = {name: weights[name] == 0 for name in dict.fromkeys(owners)}
            return [_zero_if(pruned[name], x) for name, x in zip(owners, slots, strict=True)]

        return on_update_steps(now, without_regrown, slots)

    @zeroed.defjvp
    def _(primals, tangents):
        now, _, weights = primals
        moved = [_zero_if(now & (weights[name] == 0), t) for name, t in zip(owners, tangents[1], strict=True)]
        return zeroed(*primals), moved

    new = iter(zeroed(link.renewal.now, slots, {name: weights[name] for name in owners}))
    return _map_outside_links(lambda path, leaf: leaf if slot_of(path, leaf) is None else next(new), states)


def _owner(path: tuple, leaf: Any, params: dict[str, jax.Array]) -> str | None:
    """The param whose path a leaf's path ends with, if it has its shape and is of floats; None for other leaves."""
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return None
    names = [*(path_name(path[begin:]) for begin in range(len(path))), ""]
    return next((name for name in names if name in params and jnp.shape(params[name]) == jnp.shape(leaf)), None)


def _map_outside_links(function: Callable[[Any, Any], Any], states: list[Any]) -> list[Any]:
    def outside(path, node):
        return node if is_link_state(node) else function(path, node)

    return jax.tree_util.tree_map_with_path(outside, states, is_leaf=is_link_state)


# Of Optax's optimizers; the averages of Adan have single letters, which say something only together.
_AVERAGES = ("trace", "mu", "nu", "ema", "nu_max", "m1", "m2", "e_g", "e_x", "sum_of_squares", "v_row", "v_col")
_LETTERS = ("m", "v", "n", "g")


def _has_averages(node: Any) -> bool:
    fields = getattr(node, "_fields", ())
    return any(name in fields for name in _AVERAGES) or set(_LETTERS) <= set(fields)


def _map_averages(function: Callable[[Any], Any], states: Any, params: Any) -> Any:
    """Maps over the averages that optimizers keep of gradients and their squares, and over the counts beside them.

    By name, for other arrays of the params' shapes may be copies of the params. It warns of those.
    """

    def of_state(node):
        if not _has_averages(node):
            return node
        counts = () if getattr(node, "counts_for_schedule", False) else ("count", "count_m2", "t")
        fields = [name for name in (*_AVERAGES, *_LETTERS, *counts) if name in node._fields]
        return node._replace(**{name: jax.tree.map(function, getattr(node, name)) for name in fields})

    weights = by_path(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        states, is_leaf=lambda node: _has_averages(node) or is_link_state(node)
    ):
        if not _has_averages(leaf) and not is_link_state(leaf) and _owner(path, leaf, weights):
            warn(
                f"the optimizer starts anew, but {path_name(path)} in its state is of a kind that is not known, and "
                "stays as it is",
            )
            break
    return jax.tree.map(of_state, states, is_leaf=_has_averages)
