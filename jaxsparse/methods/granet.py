"""GraNet: prune gradually, and at every pruning exchange weights within the layers.

Liu et al., *Sparse Training via Boosting Pruning Plasticity with Neuroregeneration*, 2021
(https://arxiv.org/abs/2106.10404). The authors' code is https://github.com/VITA-Group/GraNet at f338a24
(``CIFAR/sparselearning/core.py``).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxsparse.allocation import Allocation, check_allocation
from jaxsparse.layouts import LayoutLike
from jaxsparse.structures import StructureLike, check_structure
from jaxsparse.transforms import regrow
from jaxsparse.transforms.checks import check_range, check_schedule, check_steps
from jaxsparse.transforms.exchange import gradient_of
from jaxsparse.transforms.layers import as_layers, on_units
from jaxsparse.transforms.mask_link import MaskState, every, given_masks, mask_link, random_start
from jaxsparse.transforms.prune import counts_at, prune_globally
from jaxsparse.transforms.renewal import Renewing

__all__ = ["GraNetState", "granet"]

_LAST_FRACTION = 0.005  # where the authors' cosine ends


class GraNetState(MaskState):
    """State of :func:`granet`; ``kept`` follows its schedule."""

    method = "granet"


def granet(
    sparsity: ArrayLike,
    update_every: ArrayLike = 1000,
    *,
    steps: ArrayLike | None = None,
    initial_sparsity: ArrayLike = 0.5,
    begin: ArrayLike = 0,
    end: ArrayLike | None = None,
    drop_fraction: ArrayLike | optax.Schedule = 0.5,
    allocation: Allocation = "erdos_renyi_kernel",
    at_least: ArrayLike = 0,
    masks: Any = None,
    bias_correction: tuple[ArrayLike, ArrayLike] | None = None,
    track: bool = False,
    structure: StructureLike = "weight",
    prunable: Any = None,
    layout: LayoutLike = None,
    key: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Prune gradually while weights move to where gradients are large (Liu et al., 2021).

    A link: last in a :func:`jaxsparse.chain`.

    On the steps t = ``update_every``, 2 ``update_every``, ..., from ``begin`` on, two things happen. First the weights
    of smallest magnitude of all layers together go, until a fraction :math:`s_j` of all is 0,

    .. math:: s_j = s_f + (s_i - s_f) \left(1 - \frac{j - j_i}{j_f - j_i}\right)^3, \qquad
       j = \lfloor t / \Delta T \rfloor, \quad j_i = \lfloor t_0 / \Delta T \rfloor, \quad
       j_f = \lfloor t_1 / \Delta T \rfloor \qquad (1)

    with :math:`s_i` = ``initial_sparsity``, :math:`s_f` = ``sparsity``, :math:`\Delta T` = ``update_every``,
    :math:`t_0` = ``begin`` and :math:`t_1` = ``end``, after which :math:`s_f` stays. (The authors' code prunes for the
    last time one ``update_every`` earlier, short of :math:`s_f`; the paper is followed.) Then, to the end of training,
    each layer l drops the :math:`\lceil p_t A_l \rceil` smallest of its :math:`A_l` weights and grows as many of those
    that it lacks, where the gradient of this step is largest (the authors' zero-cost neuroregeneration),

    .. math:: p_t = 0.005 + (p - 0.005) \frac{1 + \cos(\pi t / T)}{2} \qquad (2)

    with p = ``drop_fraction`` and T = ``steps``. A weight that is grown starts at 0 with an optimizer state of zeros
    and takes its first step on step t + 1; one that goes and is grown at once
    keeps its value and its state. Counts are exact, ties included (the lowest indices stay), and s is computed in
    double precision.

    Layers that have not moved since their mask was chosen (``optax.freeze``) are pruned, but exchange no weights.

    Args:
      sparsity: :math:`s_f`, the fraction of zeros at the end, in [0, 1), possibly traced.
      update_every: :math:`\Delta T`, steps between mask updates, int >= 1. (The authors: 1000 for CIFAR at a batch of
        100, 4000 for ImageNet at 128.)
      steps: T, all steps of the run, int >= 1. Needed by a ``drop_fraction`` that is a number, and without an ``end``.
      initial_sparsity: :math:`s_i`, in [0, ``sparsity``]: the first masks are random, with this fraction of zeros. 0
        is the authors' "dense to sparse", which starts with all weights.
      begin: the first step on which masks may change, int >= 0.
      end: the last step on which the sparsity rises, int >= begin. None: 11/16 of ``steps``, as the authors have it for
        CIFAR (110 of 160 epochs; ImageNet: 30 of 100).
      drop_fraction: p, in [0, 1], where eq. (2) starts; or a schedule from the step to the drop fraction. 0: nothing is
        exchanged.
      allocation: how the first masks share their zeros among the layers: "erdos_renyi_kernel" (the authors' default),
        "erdos_renyi" or "uniform".
      at_least: the fewest weights (or units) that any layer keeps; all, if it has fewer. 0, as published: nothing stops
        a layer from being emptied, which :func:`jaxsparse.check` then says.
      masks: start from these instead of random ones, as for :func:`jaxsparse.sparse_momentum`. Eq. (1) still starts at
        ``initial_sparsity``; nothing is pruned as long as they keep fewer.
      bias_correction, track: as for :func:`jaxsparse.rigl`.
      structure: as for :func:`jaxsparse.sparse_momentum`. Units of all layers are pruned together by their scores; what
        a layer exchanges has the mean of its weights' and gradients' absolute values.
      prunable, layout: as for :func:`jaxsparse.sparse_momentum`.
      key: an int or PRNG key, possibly traced, for the first masks.

    Returns:
      A gradient transformation with the state :class:`GraNetState`: one byte a weight of sparse leaves. Gradients are
      not stored. Its ``update`` needs the params, and ``grad``, which :func:`jaxsparse.chain` hands it. With several
      devices that is to be the gradient of the whole batch.

    Raises:
      ValueError: for options out of range, an ``initial_sparsity`` above ``sparsity``, an ``end`` before ``begin``,
        missing ``steps``, params with a replica axis, masks that do not fit; by ``update``, without params or
        gradients.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxsparse
      >>> params = {"kernel": jnp.arange(1.0, 201.0).reshape(20, 10), "bias": jnp.zeros(10)}
      >>> tx = jaxsparse.chain(optax.sgd(0.0), jaxsparse.granet(sparsity=0.9, update_every=2, steps=16, end=8))
      >>> opt_state, kept = tx.init(params), []
      >>> for _ in range(10):
      ...     _, opt_state = tx.update(params, opt_state, params)
      ...     kept.append(int(opt_state[1].kept))
      >>> kept
      [100, 100, 54, 54, 30, 30, 21, 21, 20, 20]

    References:
      Liu et al., `Sparse Training via Boosting Pruning Plasticity with Neuroregeneration
      <https://arxiv.org/abs/2106.10404>`_, 2021.

    .. warning::
      What stands before the optimizer, such as clipping by the global norm, sees the gradients of all weights, missing
      ones too.
    """
    check_allocation(allocation)
    check_structure(structure)
    for name, value in (("sparsity", sparsity), ("initial_sparsity", initial_sparsity)):
        check_range(name, value, 0, 1, open_end=True)
    if _known(sparsity, initial_sparsity) and initial_sparsity > sparsity:  # type: ignore[operator]
        raise ValueError(f"initial_sparsity must be at most sparsity, {sparsity}, got {initial_sparsity}")
    if steps is None and (end is None or not callable(drop_fraction)):
        raise ValueError(
            "granet needs steps, the number of all steps of the run: its drop_fraction falls until then, and without "
            "an end the sparsity rises in the first 11/16 of them"
        )
    lowest = (("steps", steps, 1), ("begin", begin, 0), ("end", end, 0), ("at_least", at_least, 0))
    for name, value, low in (("update_every", update_every, 1), *lowest):
        check_steps(name, value, low)
    last = steps * 11 // 16 if end is None else end  # type: ignore[operator]
    if _known(begin, last) and last < begin:  # type: ignore[operator]
        raise ValueError(f"end must be at least begin, {begin}, got {last}")
    if steps is not None and _known(begin, last, steps, update_every):
        interval = int(update_every)  # type: ignore[arg-type]
        reached = max(1, int(last) // interval, -(-int(begin) // interval)) * interval  # type: ignore[arg-type]
        if reached >= int(steps):  # type: ignore[arg-type]
            raise ValueError(
                f"granet would reach its sparsity on step {reached}, but steps says that the run has {steps}: masks "
                f"change on the multiples of update_every, {update_every}, which must be smaller"
            )
    check_schedule("drop_fraction", drop_fraction, steps=[s for s in (begin, last, steps) if s is not None])
    renewing = Renewing(False, bias_correction, update_every, track)
    renewing.check()

    def left(layers, count):
        with jax.enable_x64(True):  # float32 cannot tell all the weights of a large network
            passed = [jnp.asarray(step, jnp.int32) // update_every for step in (count, begin, last)]
            j, j_i, j_f = (number.astype(jnp.float64) for number in passed)
            time = jnp.where(j < j_f, (j - j_i) / jnp.maximum(j_f - j_i, 1), 1)
            s_i, s_f = (jnp.asarray(value, jnp.float64) for value in (initial_sparsity, sparsity))
            return counts_at(layers, s_f + (s_i - s_f) * (1 - time) ** 3)[1]  # (1)

    def fraction(count):
        if callable(drop_fraction):
            return jnp.clip(drop_fraction(count), 0, 1)
        passed, whole, first = (jnp.asarray(value, jnp.float32) for value in (count, steps, drop_fraction))
        low = jnp.minimum(_LAST_FRACTION, first)
        return low + (first - low) * (1 + jnp.cos(jnp.pi * jnp.minimum(passed / whole, 1))) / 2  # (2)

    def change(layers, state):
        pruned, kept = prune_globally(layers, left(layers, state.count), at_least=at_least)
        before, layers = regrow.counts(layers), as_layers(layers).with_masks(pruned)

        def exchanged(layers, resting):
            kept = regrow.counts(layers)
            lose = jnp.where(resting, 0, regrow.losses(kept, fraction(state.count)))
            return regrow.grow_largest(layers, regrow.drop_smallest(layers, kept, lose), lose), resting

        resting = state.watched.resting
        new, _ = on_units(layers, exchanged, resting)
        return new, kept, resting & (regrow.counts(layers) == before)

    return mask_link(
        GraNetState,
        random_start(initial_sparsity, allocation, at_least, structure, prunable, layout)
        if masks is None
        else given_masks(masks, structure, layout),
        change,
        when=every(update_every, start_at=begin),
        signal=lambda updates, own, extra_args: gradient_of(extra_args, "granet"),
        watch=True,
        structure=structure,
        layout=layout,
        key=key,
        draws=False,
        renewing=renewing,
        what="gradient",
    )


def _known(*values: Any) -> bool:
    return not any(isinstance(value, jax.core.Tracer) for value in values)
