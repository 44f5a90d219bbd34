"""Regrown weights: the value, the optimizer state and the first steps of a weight that returns.

A weight that a drop-and-grow method regrows starts at 0, with an optimizer state of zeros. The link that regrows it
sets its value; the optimizer state is another member's, so :func:`jaxsparse.chain` resets it. Weights that were dropped
and regrown at once were never gone: they keep their value and their state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsparse.placement import varying_like
from jaxsparse.transforms.checks import check_range
from jaxsparse.transforms.protocols import link_states
from jaxsparse.trees import by_path, is_masked_node, path_name

__all__ = ["Renewal", "Renewing", "Restarting"]

_SLOTS = ("trace", "mu", "nu", "ema")  # what Optax's optimizers call their averages of gradients and their squares
_OLD = 255  # age of a weight that has been there from the start, or for as many mask updates


class Renewal(NamedTuple):
    """The last mask update of a link, as far as its regrown weights need it.

    Attributes:
      now: (), bool: whether masks changed in the last step.
      hold: (0,), bool, if the optimizer takes no step then; () if it does.
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
            hold=jnp.zeros(0, bool) if self.hold else (),
            changed_at=varying_like(jnp.zeros([], jnp.int32), params) if aged else (),
            since=jax.tree.map(lambda mask: jnp.full_like(mask, _OLD, jnp.uint8), masks) if aged else (),
            explored=jax.tree.map(lambda mask: mask | False, masks) if self.track else (),
        )

    def at(self, renewal: Renewal, now: jax.Array, count: jax.Array) -> Renewal:
        """The state of a step on which masks change, or do not."""
        del count
        return renewal._replace(now=jnp.asarray(now))

    def renewed(self, renewal: Renewal, params: Any, masks: Any, count: jax.Array) -> Renewal:
        """The state after a mask update, in which ``masks`` became the masks."""
        new = renewal
        if self.betas is not None:

            def older(p, mask, since):
                return jnp.where(mask & (p == 0), 0, jnp.minimum(since, _OLD - 1) + 1).astype(jnp.uint8)

            new = new._replace(changed_at=count, since=_map_masked(older, params, masks, renewal.since))
        if self.track:
            new = new._replace(explored=jax.tree.map(jnp.logical_or, renewal.explored, masks))
        return new

    def updates(self, updates: Any, renewal: Renewal, params: Any, masks: Any, count: jax.Array) -> Any:
        """The proposed update, as far as it holds for weights that have just been regrown: these stay at 0."""
        now, bound = renewal.now, _bound(renewal.now)

        def first(p, mask, u):
            return None if u is None else jnp.where(jnp.abs(p) <= bound.astype(p.dtype), jnp.zeros_like(u), u)

        updates = _map_masked(first, params, masks, updates, dense=lambda u: u)
        if self.betas is not None:
            aged = self._corrections(renewal, count)

            def corrected(p, since, u):
                return None if u is None else (u.astype(jnp.float32) * aged(since)).astype(u.dtype)

            updates = _map_masked(corrected, params, renewal.since, updates, dense=lambda u: u)
        if self.hold:
            updates = jax.tree.map(lambda u: jnp.where(now, 0, u).astype(u.dtype), updates)
        return updates

    def _corrections(self, renewal: Renewal, count: jax.Array) -> Callable[[jax.Array], jax.Array]:
        r"""The step of a weight of age a over the one that Adam takes on step t, with m and v of its age.

        .. math:: \frac{\sqrt{1 - \beta_2^a}}{1 - \beta_1^a} \cdot \frac{1 - \beta_1^t}{\sqrt{1 - \beta_2^t}}
        """
        beta_1, beta_2 = (jnp.asarray(beta, jnp.float32) for beta in self.betas or ())

        def step(age):
            return jnp.sqrt(1 - beta_2**age) / (1 - beta_1**age)

        passed, whole = (count - renewal.changed_at).astype(jnp.float32), step((count + 1).astype(jnp.float32))

        def of(since):
            age = since.astype(jnp.float32) * jnp.asarray(self.every, jnp.float32) + passed
            return jnp.where(since == _OLD, 1, step(jnp.maximum(age, 1)) / whole)

        return of


class Restarting(NamedTuple):
    """A fresh start of the whole optimizer after some steps: the other treatment of weights that return.

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

    def renewed(self, renewal: Renewal, params: Any, masks: Any, count: jax.Array) -> Renewal:
        """The state after a mask update: the same."""
        del params, masks, count
        return renewal

    def updates(self, updates: Any, renewal: Renewal, params: Any, masks: Any, count: jax.Array) -> Any:
        """The proposed update, which holds for all weights."""
        del renewal, params, masks, count
        return updates


def restarted(states: Any, params: Any) -> Any:
    """The states of a chain's members before a step, with zeros for what links in it regrew in the last step.

    A weight that has just been regrown is 0, so only weights are compared with 0, and those that are missing may be
    reset as well: what is kept of them is never used. That reads no mask and costs no loop, which would copy the slots.
    A link whose state has ``restarts_all`` asks for zeros in the states of all params, those without a mask too.

    Args:
      states: the tuple of states that the update begins with.
      params: the params, in which what was regrown in the last step is still 0.
    """
    if type(states) is not tuple:  # optimizer states of other types are no chains
        return states
    done: list[Any] = []
    for member in states:
        member = restarted(member, params)
        for link in link_states(member):
            if isinstance(getattr(link, "renewal", ()), Renewal):
                done = _zeroed(done, link, params)
        done.append(member)
    return tuple(done)


def held(old: Any, new: Any) -> Any:
    """The states of a chain's members after a step, which are the old ones before links that hold the optimizer."""
    if type(new) is not tuple:
        return new
    done: list[Any] = []
    for i, (before, after) in enumerate(zip(old, new, strict=True)):
        after = held(before, after)
        for link in link_states(after):
            renewal = getattr(link, "renewal", ())
            if isinstance(renewal, Renewal) and not isinstance(renewal.hold, tuple):
                done = _chosen(renewal.now, old[:i], done)
        done.append(after)
    return tuple(done)


def _chosen(first: jax.Array, old: Any, new: list[Any]) -> list[Any]:
    def choose(before, after):
        if jnp.issubdtype(jnp.result_type(after), jax.dtypes.prng_key):
            data = jnp.where(first, *map(jax.random.key_data, (before, after)))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(after))
        return jnp.where(first, before, after).astype(after.dtype)

    return list(jax.tree.map(choose, tuple(old), tuple(new)))


def _zeroed(states: list[Any], link: Any, params: Any) -> list[Any]:
    now = link.renewal.now
    if getattr(link, "restarts_all", False):  # of averages that begin anew, the bias is that of their first steps
        everything = (*_SLOTS, "count")
        return list(_map_slots(lambda _, x: jnp.where(now, jnp.zeros_like(x), x), tuple(states), everything))
    masks, weights, bound = by_path(link.sparse_masks()), by_path(params), _bound(now)

    def zeroed(path, slot):
        name = path_name(path)
        if name not in masks or jnp.shape(slot) != jnp.shape(weights.get(name)):
            return slot
        return jnp.where(jnp.abs(weights[name]) <= bound.astype(weights[name].dtype), jnp.zeros_like(slot), slot)

    return list(_map_slots(zeroed, tuple(states)))


def _bound(now: jax.Array) -> jax.Array:
    """A number that the magnitude of zero alone does not exceed, or none does: 0, if ``now``, or -1.

    One comparison with a number: on a CPU, XLA does not vectorise what is made of bools.
    """
    return jnp.where(now, 0.0, -1.0)


def _map_slots(function: Callable[[Any, Any], Any], states: Any, fields: tuple[str, ...] = _SLOTS) -> Any:
    def has_slots(node):
        return any(name in getattr(node, "_fields", ()) for name in _SLOTS)

    def of_state(node):
        if not has_slots(node):
            return node
        return node._replace(**{
            name: jax.tree_util.tree_map_with_path(function, getattr(node, name))
            for name in fields if name in node._fields
        })  # fmt: skip

    return jax.tree.map(of_state, states, is_leaf=has_slots)


def _map_masked(function: Callable[..., Any], params: Any, masks: Any, tree: Any, dense: Any = None) -> Any:
    """Maps over the leaves that have masks: function(param, mask, leaf). Others become ``dense`` of their leaf."""
    leaves, treedef = jax.tree.flatten(params)
    rows = zip(leaves, treedef.flatten_up_to(masks), treedef.flatten_up_to(tree), strict=True)
    return treedef.unflatten([
        (mask if dense is None else dense(leaf)) if is_masked_node(mask) else function(p, mask, leaf)
        for p, mask, leaf in rows
    ])  # fmt: skip
