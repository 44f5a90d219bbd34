"""Rules of post-training pruning: which weights of one matrix go, and what becomes of those that stay."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsparse.allocation import check_sparsity, layer_counts
from jaxsparse.post_training.admm_update import admm_update
from jaxsparse.post_training.dsnot import dsnot
from jaxsparse.post_training.matrix import as_kernel, of_matrix, pruned_counts
from jaxsparse.post_training.sparsegpt import sparsegpt_with_damping
from jaxsparse.post_training.wanda import ria_scores, wanda_scores
from jaxsparse.selection import top_k_mask
from jaxsparse.structures import Structure, n_of_m

__all__ = ["RULES", "Needs", "Rule", "dsnot_rule", "resolve"]

Needs = Literal["nothing", "squares", "gram"]


class Rule(NamedTuple):
    """A rule of post-training pruning.

    Attributes:
      name: the name, for messages.
      needs: the moments of the inputs that it needs: "nothing", the sums of their "squares", or the "gram" matrix.
      prune: ``prune(kernel, moments, sparsity, structure) -> (kernel, mask)``, of one matrix. It can be jitted and
        vmapped. The kernel is (inputs, outputs) in float32; ``moments`` are :class:`jaxsparse.trace.Moments` of its
        inputs, without leading axes, or None; ``sparsity`` is a float32 scalar, possibly traced; ``structure`` is
        ``weight()`` or :class:`jaxsparse.n_of_m` along the inputs, for which the sparsity counts for nothing. What it
        returns is the pruned kernel in float32, exactly 0 where the mask is False, and the mask.
      with_damping: as ``prune``, but returns the damping that was used as a third value, for rules that damp a Gram
        matrix; else None.
    """

    name: str
    needs: Needs
    prune: Callable[[jax.Array, Any, ArrayLike, Structure], tuple[jax.Array, jax.Array]]
    with_damping: Callable[[jax.Array, Any, ArrayLike, Structure], tuple[jax.Array, jax.Array, jax.Array]] | None = None


def _magnitude(kernel, moments, sparsity, structure):
    del moments
    kernel = as_kernel(kernel)
    return _keep(kernel, _of_matrix(jnp.abs(kernel), kernel, sparsity, structure))


def _wanda(kernel, moments, sparsity, structure):
    kernel = as_kernel(kernel)
    scores = wanda_scores(kernel, _squares(moments))
    unit, inputs = of_matrix(structure, kernel), kernel.shape[0]
    if isinstance(unit, n_of_m):
        return _keep(kernel, unit.top(scores))
    check_sparsity(sparsity)
    return _keep(kernel, top_k_mask(scores, inputs - pruned_counts(inputs, sparsity), axis=1))


def _ria(kernel, moments, sparsity, structure):
    kernel = as_kernel(kernel)
    return _keep(kernel, _of_matrix(ria_scores(kernel, _squares(moments)), kernel, sparsity, structure))


def _sparsegpt_with_damping(kernel, moments, sparsity, structure):
    return sparsegpt_with_damping(kernel, moments.second, sparsity, structure=structure)


def _sparsegpt(kernel, moments, sparsity, structure):
    return _sparsegpt_with_damping(kernel, moments, sparsity, structure)[:2]


def _admm(kernel, moments, sparsity, structure):
    return admm_update(kernel, moments.second, sparsity, structure=structure)


def _of_matrix(scores: jax.Array, kernel: jax.Array, sparsity: ArrayLike, structure: Structure) -> jax.Array:
    """The weights with the largest scores of the whole matrix, as many as :func:`jaxsparse.magnitude_masks` keeps."""
    unit = of_matrix(structure, kernel)
    if isinstance(unit, n_of_m):
        return unit.top(scores)
    return top_k_mask(scores, layer_counts({"kernel": kernel}, sparsity)[0])


def _squares(moments: Any) -> jax.Array:
    """The sums of squares of the inputs; where none has ever fired, 1 for all: weights then rank by magnitude."""
    squares = moments.squares
    return jnp.where(jnp.any(squares > 0), squares, jnp.ones_like(squares))


def _keep(kernel: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.where(mask, kernel, jnp.zeros_like(kernel)), mask


RULES: dict[str, Rule] = {
    "magnitude": Rule("magnitude", "nothing", _magnitude),
    "wanda": Rule("wanda", "squares", _wanda),
    "ria": Rule("ria", "squares", _ria),
    "sparsegpt": Rule("sparsegpt", "gram", _sparsegpt, _sparsegpt_with_damping),
    "admm": Rule("admm", "gram", _admm),
}


def resolve(rule: Any) -> Rule:
    """A rule from its name, from a function, or from a rule.

    Args:
      rule: a name in :data:`RULES`, a :class:`Rule`, or a function of kernel, moments, sparsity and structure as
        :attr:`Rule.prune` is. Its attribute ``needs``, if it has one, says which moments it needs; else "squares".

    Raises:
      ValueError: for an unknown name, or unknown ``needs``.
      TypeError: for anything else.

    Examples:
      >>> resolve("wanda").needs
      'squares'
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"rule must be one of {sorted(RULES)}, a Rule or a function, got {rule!r}")
        return RULES[rule]
    if not isinstance(rule, Rule):
        if not callable(rule):
            raise TypeError(
                f"rule must be one of {sorted(RULES)}, a Rule, or a function of kernel, moments, sparsity and "
                f"structure that returns a kernel and a mask, got {rule!r}"
            )
        name = getattr(rule, "__name__", type(rule).__name__)
        rule = Rule(name, getattr(rule, "needs", "squares"), rule)
    if rule.needs not in get_args(Needs):
        raise ValueError(f"rule {rule.name!r} must need one of {[*get_args(Needs)]}, got {rule.needs!r}")
    return rule


def dsnot_rule(start: Any = "wanda", **options: Any) -> Rule:
    """A rule whose mask is refined by :func:`dsnot`, while the weights stay as they were.

    Args:
      start: the rule that gives the mask before, as :func:`resolve` takes it.
      **options: those of :func:`dsnot`: ``cycles``, ``threshold``, ``power``, ``monotone``.

    Examples:
      >>> dsnot_rule("sparsegpt", monotone=True).needs
      'gram'
    """
    rule = resolve(start)

    def prune(kernel, moments, sparsity, structure):
        _, mask = rule.prune(kernel, moments, sparsity, structure)
        kernel, mean_square = as_kernel(kernel), moments.squares / jnp.maximum(moments.rows, 1)
        return _keep(kernel, dsnot(kernel, mask, moments.mean, mean_square, structure=structure, **options))

    name = "dsnot" if rule.name == "wanda" else f"{rule.name} and dsnot"
    return Rule(name, "gram" if rule.needs == "gram" else "squares", prune)


RULES["dsnot"] = dsnot_rule()
