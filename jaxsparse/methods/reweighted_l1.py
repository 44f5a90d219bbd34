"""Reweighted l1: training with compressed sensing, by generalised regularised dual averaging.

Siegel, Chen, Zhang and Xu, *Training Sparse Neural Networks using Compressed Sensing*, 2020
(https://arxiv.org/abs/2008.09661). Where the paper leaves something open, the authors' code is followed (class xRDA and
its proximal operator, https://github.com/dmaywald/xrda-sparse-training at f88d0d5); the numbered lines of
:func:`reweighted_l1` are in its order.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxsparse.layouts import LayoutLike, leaf_layouts
from jaxsparse.placement import copied, zeros
from jaxsparse.prunable import prunable_leaves
from jaxsparse.structures import Structure, StructureLike, check_structure, leaf_structures
from jaxsparse.transforms.checks import check_range, check_schedule, check_zeros, refuse_replicated, require_params
from jaxsparse.transforms.rounding import check_state_dtype, rounded
from jaxsparse.transforms.velocity import at_step, check_time
from jaxsparse.trees import by_path, is_masked_node, leaf_paths

__all__ = ["ReweightedL1State", "reweighted_l1"]


class ReweightedL1State(NamedTuple):
    """State of :func:`reweighted_l1`. The trees are like the params, with ``optax.MaskedNode()`` for dense leaves.

    Attributes:
      count: (), int32: the updates so far.
      pre_prox: y, the weights before they are shrunk, in the shapes and dtypes of the params.
      threshold: b, by how much they are shrunk; of the leaf's shape, with 1 for the axes of a group, and of its
        dtype, or ``state_dtype``.
      magnitude: r, the running average of the weights' absolute values, in the shapes and dtypes of ``threshold``.
    """

    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives it
    pre_prox: Any
    threshold: Any
    magnitude: Any

    @property
    def shrinks_every_step(self) -> bool:
        """Whether every step moves weights, so that no optimizer in front may skip some."""
        return True

    def sparse_masks(self) -> Any:
        """The masks ``|y| > b``, computed from the state rather than stored in it. NaN is not pruned."""
        return jax.tree.map(lambda y, t: ~(jnp.abs(y) <= t.astype(y.dtype)), self.pre_prox, self.threshold)

    def wants_momentum(self) -> bool:
        """False: the magnitudes of the weights decide, not their momentum."""
        return False

    def problems(self, params: Any | None) -> list[str]:
        """Weights in the state that are not finite, pruned weights of the params that are not zero."""
        who, thresholds = "reweighted_l1", by_path(self.threshold)
        found = [
            f"{who}: {name} has weights that are not finite. The training has diverged, or the step size, l1 or "
            "averaging is NaN at some step"
            for name, y in by_path(self.pre_prox).items()
            if not bool(jnp.isfinite(y).all() & jnp.isfinite(thresholds[name]).all())
        ]
        return found + ([] if params is None else check_zeros(self.sparse_masks(), params, who))


def reweighted_l1(
    step_size: ArrayLike | optax.Schedule,
    *,
    l1: ArrayLike | optax.Schedule,
    averaging: ArrayLike | optax.Schedule = 0.0,
    weight_time: ArrayLike = 9.5,
    max_factor: ArrayLike = 500.0,
    structure: StructureLike = "weight",
    state_dtype: Any = None,
    prunable: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Find how few weights are needed, by a reweighted l1 penalty behind any optimizer (Siegel et al., 2020).

    A link: last in the chain. It is the proximal step of training with compressed sensing. ``optax.MultiSteps`` goes
    around the whole chain: the step shrinks the weights whenever it is called.

    It takes any update u that the optimizer proposes, already scaled by the step size s, and lands on the
    soft-thresholded weights. For each leaf, from the params x that come in:

    .. math::
       r &\leftarrow e^{-s/\tau} r + (1 - e^{-s/\tau}) |x| && (1) \\
       w &= M / (1 + (M - 1)\, r / \max r)                 && (2) \\
       b &\leftarrow a b + \lambda s w                     && (3) \\
       y &\leftarrow a y + (1 - a) x + u                   && (4) \\
       x &\leftarrow \mathrm{sign}(y) \max(|y| - b, 0)     && (5)

    where the maximum is that of the layer, also in a stack of layers, a is ``averaging``, :math:`\tau`
    ``weight_time``, M ``max_factor`` and :math:`\lambda` ``l1``. A weight as
    large as its layer's largest is shrunk by l1 and one at zero by M * l1, as by the penalty

    .. math:: \lambda \frac{m M}{M - 1} \sum_j \log\left(1 + (M - 1) |x_j| / m\right), \quad m = \max r

    so small weights vanish and large ones hardly change. Gradients are taken at the sparse x. If 1 - a = s / s_0, as in
    the schedules of the authors (:func:`jaxsparse.rda_cosine`), the threshold stays at :math:`\lambda s_0 w` while the
    step size s goes to zero, which keeps the zeros.

    The special cases:

    * proximal SGD: ``averaging=0``, then b = λ s w and y is the result of the step alone;
    * regularised dual averaging (Xiao, 2010): ``averaging=1``, then y and b accumulate forever;
    * plain l1: ``max_factor=1``, then w = 1;
    * Adam or any other optimizer: ``optax.chain(optax.adam(1e-3), reweighted_l1(1e-3, l1=1e-2))``.

    Args:
      step_size: s, the learning rate of the optimizer before it: a float >= 0 or a schedule of the step.
      l1: strength of the penalty, :math:`\lambda` >= 0, possibly traced, or a schedule of the step. (With ``averaging``
        b keeps what earlier steps added.) The final sparsity depends on l1 times the sum of the step sizes: start with
        ``l1 = 0.03 / (step_size * steps)``.
      averaging: a, in [0, 1], or a schedule of the step.
      weight_time: :math:`\tau` > 0, the time (sum of the step sizes) over which the absolute values are averaged.
      max_factor: M >= 1: how much more the smallest weights are shrunk than the largest.
      structure: the granularity of pruning: "weight"; "kernel" or "channel", for which the mean absolute value of the
        group takes the place of abs(x), and w is multiplied by the square root of its size, in leaves of four
        dimensions (matrices are pruned by single weights); a structure made by :func:`jaxsparse.structures.kernel` or
        ``channel``; or a mapping from path to these, see :func:`jaxsparse.structures.leaf_structures`, such as
        :meth:`jaxsparse.trace.ChannelGroups.structures` gives.
      state_dtype: of r and b, two of the three copies of the weights in the state: None for that of the params, or
        ``jnp.bfloat16``, which rounds up or down at random, by the step alone, so that averages are right in the mean.
        What is computed with them is float32 still. It saves memory; on a CPU it takes more time. (The authors: None.)
      prunable: which leaves are shrunk, see :func:`jaxsparse.prunable.prunable_leaves`; default: matrices and
        convolutions, the first and last layer included.
      layout: which axes of leaves are inputs, outputs and stacked layers, where names and shapes do not tell
        (:func:`jaxsparse.layouts.leaf_layouts`): pattern -> :class:`jaxsparse.Layout`.

    Returns:
      A gradient transformation with the state :class:`ReweightedL1State`: three copies of the leaves that are shrunk,
      two with ``state_dtype=jnp.bfloat16``, or little more than one if they are shrunk in groups. Its ``update`` needs
      the params. Leaves that are not shrunk take the proposed update. A layer whose average is all zero is not shrunk,
      so it may come back.

    Raises:
      ValueError: for numbers out of range, schedules whose first value is, an unknown structure or one that does not
        fit a leaf, leaves of less than float32 precision, params with a replica axis, missing params.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxsparse
      >>> params = {"kernel": jnp.array([[1.0, 0.01]])}
      >>> tx = optax.chain(optax.sgd(1.0), jaxsparse.reweighted_l1(1.0, l1=1e-3))
      >>> updates, opt_state = tx.update({"kernel": jnp.zeros((1, 2))}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()
      [[0.9990000128746033, 0.0]]
      >>> jaxsparse.get_masks(opt_state)["kernel"].tolist()
      [[True, False]]

    References:
      Siegel, Chen, Zhang and Xu, `Training Sparse Neural Networks using Compressed Sensing
      <https://arxiv.org/abs/2008.09661>`_, 2020; Xiao, *Dual Averaging Methods for Regularized Stochastic Learning and
      Online Optimization*, 2010; Candes, Wakin and Boyd, *Enhancing Sparsity by Reweighted l1 Minimization*, 2008.

    .. warning::
      The link must stand last. Params are float32: the thresholds are thousandths of the weights. Compute in bfloat16
      if you like.
    """
    check_schedule("step_size", step_size, 0, None, steps=[0])
    check_schedule("l1", l1, 0, None, steps=[0])
    check_schedule("averaging", averaging, steps=[0])
    check_time("weight_time", weight_time)
    check_range("max_factor", max_factor, 1)
    check_state_dtype(state_dtype, "reweighted_l1")
    check_structure(structure, known=("weight", "kernel", "channel"))

    def init_fn(params):
        refuse_replicated(params, "reweighted_l1")
        structures = leaf_structures(structure, params, prunable_leaves(params, prunable, layout=layout), layout=layout)

        leaves, shrunk = by_path(params), by_path(structures)
        for name, p in leaves.items():
            if name in shrunk and jnp.finfo(p.dtype).bits < 32:
                raise ValueError(
                    f"reweighted_l1 needs float32 params, but {name} is {p.dtype}: keep the weights in float32 and "
                    "compute in less (dtype=jnp.bfloat16 of the Flax layers)"
                )

        def for_each(make):
            return jax.tree.map(lambda p, unit: unit if is_masked_node(unit) else make(p, unit), params, structures)

        return ReweightedL1State(
            count=jnp.zeros([], jnp.int32),
            # Copies: the state and the params may both be donated.
            pre_prox=for_each(lambda p, _: copied(p)),
            threshold=for_each(lambda p, unit: zeros(p, _group_shape(unit, p.shape)).astype(state_dtype or p.dtype)),
            magnitude=for_each(lambda p, unit: zeros(p, _group_shape(unit, p.shape)).astype(state_dtype or p.dtype)),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        require_params(params, "reweighted_l1")
        s, a, strength = (at_step(value, state.count) for value in (step_size, averaging, l1))
        fading = s / weight_time
        layouts = leaf_layouts(params, layout)
        scalars = jnp.exp(-fading), jnp.expm1(-fading), a, 1 - a, strength * s

        def step(number, name, u, x, y, threshold, r):
            group = tuple(i for i, (size, full) in enumerate(zip(r.shape, x.shape, strict=True)) if size != full)
            size = _mean(jnp.abs(x), group) if group else jnp.abs(x)
            kept, lost, old, rest, pull = (scalar.astype(x.dtype) for scalar in scalars)
            stored = threshold.dtype
            threshold, r = threshold.astype(x.dtype), r.astype(x.dtype)
            r = kept * r - lost * size  # (1)
            stack: tuple = layouts[name].stack  # type: ignore[assignment]
            largest = jnp.max(r, axis=tuple(i for i in range(r.ndim) if i not in stack), keepdims=True)  # of each layer
            # (2), all multiplied by max r: one division, and 0 / 0 where the average is zero.
            w = max_factor * largest / jnp.where(largest > 0, largest + (max_factor - 1) * r, 1)
            w = jnp.where((largest == 0) & (max_factor == 1), 1, w)  # plain l1 has no weights to lack
            w *= math.sqrt(x.size / r.size)
            threshold = old * threshold + pull * w  # (3)
            threshold, r = rounded((threshold, r), stored, state.count, number)
            y = old * y + rest * x + u  # (4)
            pulled = threshold.astype(x.dtype)
            shrunk = jnp.where(jnp.abs(y) <= pulled, 0, y - jnp.copysign(pulled, y))  # (5); NaN stays NaN
            # -x where it is 0: x + (-x) is 0, exactly.
            return (shrunk - x).astype(x.dtype), y.astype(x.dtype), threshold, r

        leaves, treedef = jax.tree.flatten(params)
        flat = map(treedef.flatten_up_to, (updates, state.pre_prox, state.threshold, state.magnitude))
        stepped = [
            (u if u is None else jnp.asarray(u, jnp.result_type(x)), y, threshold, r)
            if is_masked_node(y) or not x.size
            else step(number, name, 0 if u is None else u, x, y, threshold, r)
            for number, (name, x, u, y, threshold, r) in enumerate(zip(leaf_paths(params), leaves, *flat, strict=True))
        ]
        updates, *trees = (treedef.unflatten([leaf[i] for leaf in stepped]) for i in range(4))
        return updates, ReweightedL1State(optax.safe_increment(state.count), *trees)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _group_shape(unit: Structure, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a leaf with 1 for the axes that a unit covers: the places, and for channels the inputs."""
    group = unit.axes(len(shape))
    return tuple(1 if axis in group else size for axis, size in enumerate(shape))


def _mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The mean over axes of an array, which are kept with size 1."""
    if axes != (0, 1) or math.prod(x.shape[:2]) > 64:
        return x.mean(axes, keepdims=True)
    # A slice for each place of a convolution's kernel: on a CPU, XLA's sum over leading axes takes five times as long.
    slices = [x[i : i + 1, j : j + 1] for i in range(x.shape[0]) for j in range(x.shape[1])]
    return functools.reduce(jnp.add, slices) / len(slices)
