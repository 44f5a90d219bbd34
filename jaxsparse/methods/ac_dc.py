"""AC/DC: dense and compressed phases of training in turn.

Peste, Iofinova, Vladu and Alistarh, *AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks*, 2021
(https://arxiv.org/abs/2106.12379). The authors' code is https://github.com/IST-DASLab/ACDC at ac53210
(``policies/pruners.py``, ``policies/recyclers.py``, ``policies/manager.py``).
"""

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxsparse.layouts import LayoutLike
from jaxsparse.structures import StructureLike, check_structure
from jaxsparse.transforms.checks import check_schedule, check_steps
from jaxsparse.transforms.layers import each
from jaxsparse.transforms.mask_link import MaskState, dense_start, mask_link
from jaxsparse.transforms.prune import prune_to
from jaxsparse.transforms.renewal import Restarting

__all__ = ["ACDCPhases", "ACDCState", "ac_dc", "ac_dc_phases"]

# By the epochs of the authors' configs: all of them, those that begin with a compression, those that end one.
_RECIPES = {
    "imagenet": (100, (10, 20, 30, 40, 50, 60, 70, 85), (15, 25, 35, 45, 55, 65, 75)),
    "cifar": (200, (10, 50, 90, 130, 170), (30, 70, 110, 150)),
}


class ACDCPhases(NamedTuple):
    """The phases of a run of :func:`ac_dc`.

    Attributes:
      compress_at: the first step of every compressed phase, increasing.
      decompress_at: the first step of every dense phase but the one that the run begins with, between these.
    """

    compress_at: tuple[int, ...]
    decompress_at: tuple[int, ...]


class ACDCState(MaskState):
    """State of :func:`ac_dc`; in a dense phase the masks keep every weight."""

    method = "ac_dc"
    restarts_all: ClassVar[bool] = True


def ac_dc(
    sparsity: ArrayLike | optax.Schedule,
    compress_at: Sequence[int],
    decompress_at: Sequence[int] = (),
    *,
    scope: Literal["global", "layer"] = "global",
    at_least: ArrayLike = 0,
    structure: StructureLike = "weight",
    prunable: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Train dense and compressed in turn, and end compressed (Peste et al., 2021).

    A link: last in a :func:`jaxsparse.chain`.

    Training begins dense. On a step of ``compress_at`` the weights of smallest magnitude go until a fraction
    ``sparsity`` is 0, and the masks then stay for the whole phase,

    .. math:: \theta_{t+1} = m \odot (\theta_t + u_t), \qquad m_i = [\, |\theta_{c,i}| \text{ among the } k
       \text{ largest} \,]

    with c the first step of the phase and u the proposed update. On a step of ``decompress_at`` all weights are there
    again: those that return start at exactly 0 and move by the gradient of this very step, and the optimizer starts
    anew: its averages of gradients and of their squares (``trace``, ``mu``, ``nu``, and what else Optax's optimizers
    call them) are set to 0 for all params, those without masks too, ahead of the step, and Adam's count, which corrects
    their bias. (Schedules of the learning rate go on. Of other arrays in its state, which stay, a warning tells.) The
    last phase is compressed. Counts are exact, ties included (the lowest indices stay).

    Args:
      sparsity: the fraction of zeros of a compressed phase, in [0, 1]; or a schedule, step -> fraction, which is read
        on the steps of ``compress_at``.
      compress_at: the steps on which a compressed phase begins, ints >= 0, increasing.
      decompress_at: the steps on which a dense one begins: one between any two of ``compress_at``.
        :func:`ac_dc_phases` gives both as the authors have them.
      scope: which weights are ranked together: all, "global", or those of each "layer", which all reach ``sparsity``.
      at_least: the fewest weights (or units) that any leaf keeps; all, if it has fewer.
      structure: what goes as one, see :mod:`jaxsparse.structures`. With ``n_of_m``, the n largest of every group always
        stay; in a dense phase all do.
      prunable, layout: as for :func:`jaxsparse.magnitude_pruning`.

    Returns:
      A gradient transformation with the state :class:`ACDCState`: one byte a weight of sparse leaves. Its ``update``
      needs the params.

    Raises:
      ValueError: for numbers out of range, unknown options, phases that do not alternate or that end dense, params with
        a replica axis, missing params.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxsparse
      >>> params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4), "bias": jnp.zeros(4)}
      >>> tx = jaxsparse.chain(
      ...     optax.sgd(0.1, momentum=0.9), jaxsparse.ac_dc(0.75, compress_at=[1, 5], decompress_at=[3])
      ... )
      >>> opt_state, kept = tx.init(params), []
      >>> for _ in range(6):
      ...     _, opt_state = tx.update(params, opt_state, params)
      ...     kept.append(int(jaxsparse.count(jaxsparse.get_masks(opt_state))))
      >>> kept
      [8, 2, 2, 8, 8, 2]

      The phases of the authors' runs on ImageNet, for 50,000 steps:

      >>> link = jaxsparse.ac_dc(0.9, *jaxsparse.ac_dc_phases(50_000))

    References:
      Peste et al., `AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks
      <https://arxiv.org/abs/2106.12379>`_, 2021.

    .. warning::
      In a compressed phase what stands before the optimizer, such as clipping by the global norm, sees the gradients of
      all weights, pruned ones too. The authors' code hands it those of kept weights alone.
    """
    check_schedule("sparsity", sparsity, steps=compress_at)
    check_steps("at_least", at_least, 0)
    check_structure(structure)
    if scope not in ("global", "layer"):
        raise ValueError(f"scope must be one of ['global', 'layer'], got {scope!r}")
    _check_phases(compress_at, decompress_at)

    def begins(count, steps):
        return jnp.any(jnp.asarray(count == jnp.asarray([*steps], jnp.int32)))

    def change(layers, state):
        compressed, few = prune_to(layers, sparsity, state.count, scope, at_least=at_least, revive=True)
        dense = begins(state.count, decompress_at)
        masks = each(layers, lambda _, masks: [mask | dense for mask in masks], compressed)
        return masks, jnp.where(dense, sum(layer.size for layer in layers), few), None

    return mask_link(
        ACDCState,
        dense_start(structure, prunable, layout),
        change,
        when=lambda count: begins(count, (*compress_at, *decompress_at)),
        structure=structure,
        layout=layout,
        renewing=Restarting(lambda count: begins(count + 1, decompress_at)),
    )


def ac_dc_phases(steps: int, recipe: Literal["imagenet", "cifar"] = "imagenet") -> ACDCPhases:
    """The phases of the authors' runs, stretched to a number of steps.

    Args:
      steps: of the whole run, int >= 1.
      recipe: "imagenet": of 100 epochs, 10 to warm up, then compressed and dense for 5 each in turn, dense from 75 to
        85, compressed to the end. "cifar": of 200 epochs, 10 to warm up, then 20 each in turn, compressed from 170 to
        the end.

    Returns:
      The first two arguments of :func:`ac_dc` after ``sparsity``.

    Raises:
      ValueError: for a recipe that there is none of, and for so few steps that phases would be empty.

    Examples:
      >>> ac_dc_phases(2000, "cifar")
      ACDCPhases(compress_at=(100, 500, 900, 1300, 1700), decompress_at=(300, 700, 1100, 1500))
    """
    check_steps("steps", steps, 1)
    if recipe not in _RECIPES:
        raise ValueError(f"recipe must be one of {list(_RECIPES)}, got {recipe!r}")
    epochs, *phases = _RECIPES[recipe]
    found = ACDCPhases(*(tuple(round(steps * epoch / epochs) for epoch in at) for at in phases))
    _check_phases(*found)
    return found


def _check_phases(compress_at: Sequence[int], decompress_at: Sequence[int]) -> None:
    """Raises a ValueError unless there is one decompression between any two compressions."""
    for name, steps in (("compress_at", compress_at), ("decompress_at", decompress_at)):
        for step in steps:
            check_steps(name, step, 0)
    if len(compress_at) != len(decompress_at) + 1:
        raise ValueError(
            "the phases alternate and the last one is compressed, so compress_at has one step more than decompress_at; "
            f"got {len(compress_at)} and {len(decompress_at)}"
        )
    starts = [step for pair in itertools.zip_longest(compress_at, decompress_at) for step in pair][:-1]
    if any(isinstance(step, jax.core.Tracer) for step in starts):
        return
    for number, (step, following) in enumerate(itertools.pairwise(starts)):
        if following <= step:
            one, other = ("decompress_at", "compress_at") if number % 2 else ("compress_at", "decompress_at")
            raise ValueError(
                f"the phases overlap: the one that begins on step {step} ({one}) must begin before the next, {other} "
                f"{following}"
            )
