"""SRigL: RigL with the same number of inputs for every output, and without the outputs that matter little.

Lasby, Golubeva, Evci, Nica and Ioannou, *Dynamic Sparse Training with Structured Sparsity*, 2024
(https://arxiv.org/abs/2305.02299). The authors' code is https://github.com/calgaryml/condensed-sparsity at 3052bb8
(``rigl_constant_fan.py``).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxsparse.allocation import Allocation, Sparsity, check_allocation, check_sparsities
from jaxsparse.layouts import LayoutLike, leaf_layouts
from jaxsparse.masks import validate_masks
from jaxsparse.prunable import prunable_leaves
from jaxsparse.reductions import count_true, sums
from jaxsparse.selection import top_k_along
from jaxsparse.transforms import fan_in
from jaxsparse.transforms.checks import check_range
from jaxsparse.transforms.exchange import check_fraction, gradient_of, sums_of_gradients
from jaxsparse.transforms.layers import as_layers, each
from jaxsparse.transforms.mask_link import MaskState, every, given_masks, mask_link
from jaxsparse.transforms.matrices import Matrices, kept_then_largest, layout_of, matrices_of, to_column
from jaxsparse.transforms.renewal import Renewing
from jaxsparse.trees import by_path, is_partial, leaf_paths

__all__ = ["LayerBudgets", "SRigLState", "srigl"]


class LayerBudgets(NamedTuple):
    """The numbers of weights that layers may keep, and the sums of their gradients.

    Attributes:
      budgets: like the masks: int32, of the leaf's rank: of each layer, with length 1 along all axes but a stack's.
      outputs: like the masks: True for each output, with length 1 along inputs. It says which axes are outputs.
      gradients: like the masks: the sums of the gradients before a mask update; () without ``accumulate``.
    """

    budgets: Any
    outputs: Any
    gradients: Any = ()


class SRigLState(MaskState):
    """State of :func:`srigl`; ``own`` is a :class:`LayerBudgets`."""

    method = "srigl"

    def recounted(self, before: Self | None) -> Self:
        """The state in which each layer may keep fewer weights, by those that it has lost."""
        own = self.own if before is None else fan_in.less(self.own, self.masks, before.masks)
        return super().recounted(before)._replace(own=own)

    def problems(self, params: Any | None) -> list[str]:
        """Problems of all masks, and layers whose outputs do not have the same number of inputs."""
        uneven = fan_in.uneven(self.masks, self.own.budgets, self.own.outputs)
        return super().problems(params) + [f"{self.method}: {sentence}" for sentence in uneven]


def srigl(
    sparsity: Sparsity,
    update_every: ArrayLike = 100,
    *,
    stop_at: ArrayLike | None = None,
    drop_fraction: ArrayLike | optax.Schedule = 0.3,
    min_salient: ArrayLike | None = 0.3,
    never_ablate: str | Sequence[str] | None = None,
    allocation: Allocation = "erdos_renyi_kernel",
    masks: Any = None,
    start_at: ArrayLike = 0,
    accumulate: int | None = None,
    hold: bool = False,
    bias_correction: tuple[ArrayLike, ArrayLike] | None = None,
    track: bool = False,
    prunable: Any = None,
    layout: LayoutLike = None,
    key: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Train a fixed number of weights, shared equally by the outputs of each layer (Lasby et al., 2024).

    A link: last in a :func:`jaxsparse.chain`.

    A layer has F inputs (of a convolution: places times input channels), R outputs and a budget of n weights. It starts
    with :math:`k_0 = \lfloor n / R \rfloor` random inputs for every output. On step t = ``update_every``, 2
    ``update_every``, ... before ``stop_at``, of its A weights :math:`K = \lfloor \alpha_t A \rfloor` are to go (or
    more, if fewer than A - K are not 0), where :math:`\alpha_t` falls from ``drop_fraction`` to 0 as for
    :func:`jaxsparse.rigl`:

    .. math::
       S &= \text{top}_{A-K}(|\theta|) \cup \text{top}_K(|\nabla_\theta L|), \qquad
            c_r = |\{i \in S \text{ that is an input of output } r\}| \\
       \tau &= \min\left(\max(1, \lfloor \gamma k_0 \rfloor),\;
               c_{(\lfloor n / F \rfloor + 1)}\right), \qquad
            \text{output } r \text{ is ablated if } c_r < \tau \\
       k' &= \lfloor n / |\{r : c_r \ge \tau\}| \rfloor

    with :math:`\gamma` = ``min_salient`` and the j-th largest count :math:`c_{(j)}`, so that k' fits into F. Ablated
    outputs lose all their weights. Of the others the A - K largest of the layer stay, but of one output at most the k'
    largest; then each grows the inputs of largest gradient, until it has k'. Gradients of all weights count in S, so an
    output that was ablated may return.

    Weights that are grown start at 0 with an optimizer state of zeros, as with :func:`jaxsparse.rigl`. All outputs of a
    layer that are not ablated have k' inputs at every step. What n leaves over when it is divided by outputs is not
    used: masks keep a few weights less than ``sparsity`` says, fewer than there are outputs. Layers that have
    not moved since their mask was chosen (``optax.freeze``) keep it.

    Args:
      sparsity, update_every, stop_at, drop_fraction, allocation, start_at: as for :func:`jaxsparse.rigl`. (The authors:
        "erdos_renyi_kernel" for convolutional networks, "uniform" for transformers.)
      min_salient: :math:`\gamma`: the part of :math:`k_0` that must be salient for an output to stay, in (0, 1); or the
        number of weights, from 1. (0.3; for transformers 0.95.) None: no output is ablated.
      never_ablate: patterns of the paths of leaves that keep all outputs (:func:`jaxsparse.trees.matching`); () for
        none. None: the last layer, which is a guess, and a warning names it: the one with a number of outputs that no
        other layer has as inputs; of several such, or if there is none, the last by name.
      masks: start from these instead of random ones: bool arrays in which all outputs of a layer keep equally many
        weights, or none; the scalar True for dense leaves.
      accumulate, hold, bias_correction, track: as for :func:`jaxsparse.rigl`.
      prunable: which leaves get masks; all must be matrices or convolutions.
      layout: which axes are inputs, outputs and stacked layers, where names and shapes do not tell: pattern ->
        :class:`jaxsparse.Layout`. The layers of a stack have masks, budgets and ablated outputs of their own.
      key: an int or PRNG key, possibly traced, for the initial masks.

    Returns:
      A gradient transformation with the state :class:`SRigLState`: one byte a weight of sparse leaves, and their
      gradients with ``accumulate``. Its ``update`` needs the params, and ``grad``, which :func:`jaxsparse.chain` hands
      it. With several devices that is to be the gradient of the whole batch.

    Raises:
      ValueError: for options out of range, a layer with fewer weights than outputs, a leaf without inputs and outputs,
        masks that do not fit; by ``update``, without params or gradients.

    Warns:
      UserWarning: for layers whose inputs and outputs had to be guessed, and for the guess of the last layer.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxsparse
      >>> params = {"fc1": {"kernel": jnp.ones((20, 10))}, "fc2": {"kernel": jnp.ones((10, 5))}}
      >>> tx = jaxsparse.chain(
      ...     optax.sgd(0.1, momentum=0.9),
      ...     jaxsparse.srigl(sparsity=0.8, update_every=100, stop_at=75_000, never_ablate="fc2"),
      ... )
      >>> opt_state = tx.init(params)
      >>> masks = jaxsparse.get_masks(opt_state)
      >>> masks["fc1"]["kernel"].sum(0).tolist(), masks["fc2"]["kernel"].sum(0).tolist()
      ([3, 3, 3, 3, 3, 3, 3, 3, 3, 3], [3, 3, 3, 3, 3])

    References:
      Lasby et al., `Dynamic Sparse Training with Structured Sparsity <https://arxiv.org/abs/2305.02299>`_, 2024. Where
      an output has more than k' of the largest weights, the authors' code keeps arbitrary ones, by sorting booleans;
      here the largest stay. It may keep missing weights too, where few others are left; here gradients fill places.
    """
    schedule = check_fraction(drop_fraction, stop_at, "srigl")
    check_allocation(allocation)
    _check_min_salient(min_salient)
    renewing = Renewing(hold, bias_correction, update_every, track)
    renewing.check()
    none = (lambda *_: (), lambda *_: ())
    first_sums, add = none if accumulate is None else sums_of_gradients(accumulate, update_every, "srigl")
    if masks is None:
        check_sparsities(sparsity)

    def looked_at(params, paths):
        leaves = by_path(params)
        sparse = {path: leaves[path] for path in paths}
        layouts = fan_in.layouts_with_outputs(sparse, leaf_layouts(params, layout), "srigl")
        if min_salient is not None:
            fan_in.last_layers(sparse, layouts, never_ablate, is_partial(params), tell="srigl never ablates outputs of")
        return sparse, layouts

    def random_start(params, key):
        chosen = by_path(prunable_leaves(params, prunable, layout=layout))
        sparse, layouts = looked_at(params, [path for path, prunes in chosen.items() if prunes])
        budgets = fan_in.fan_in_budgets(sparse, layouts, sparsity, allocation, is_partial(params))
        drawn = fan_in.random_fan_in(sparse, layouts, budgets, key)
        flat = [drawn.get(path, jnp.ones((), bool)) for path in leaf_paths(params)]
        return jax.tree.structure(params).unflatten(flat)

    def given_start(params, key):
        checked = validate_masks(masks, params)
        fan_in.check_masks(checked, looked_at(params, by_path(checked))[1])
        return given_masks(masks, "weight", layout)(params, key)

    def own(params, first):
        leaves, layouts, given = by_path(params), leaf_layouts(params, layout), by_path(first)
        sparse = {path: leaves[path] for path in given}
        if masks is None:
            budgets = fan_in.fan_in_budgets(sparse, layouts, sparsity, allocation, is_partial(params))
        else:
            budgets = {path: fan_in.counted(mask, layouts[path]) for path, mask in given.items()}
        outputs = [fan_in.outputs_of(leaf, layouts[path]) for path, leaf in sparse.items()]
        treedef = jax.tree.structure(first)
        budgets, outputs = (treedef.unflatten(list(leaves)) for leaves in (budgets.values(), outputs))
        return LayerBudgets(budgets, outputs, first_sums(params, first))

    def added(state, updates, params, extra_args):
        new = add(state._replace(own=state.own.gradients), updates, params, extra_args)
        return state.own._replace(gradients=new)

    def change(layers, state):
        layers, fraction = as_layers(layers), schedule(state.count)
        layouts = {layer.path: layout_of(layer) for layer in layers}
        last = fan_in.last_layers({x.path: x.mask for x in layers}, layouts, never_ablate, partial=True)
        whole = np.asarray([layer.path in last for layer in layers], bool)
        parts, budgets = matrices_of(layers), layers.column(jax.tree.leaves(state.own.budgets)).parts
        budgets = [part.view(budget) for part, budget in zip(parts, budgets, strict=True)]
        new = to_column(parts, _renewed(parts, budgets, whole, fraction, min_salient))
        resting = state.watched.resting
        new = each(layers, lambda layers, new, rests: [
            jnp.where(rest, layer.mask, mask) for layer, mask, rest in zip(layers, new, rests, strict=True)
        ], new, resting)  # fmt: skip
        return new, None, None

    return mask_link(
        SRigLState,
        random_start if masks is None else given_start,
        change,
        when=every(update_every, start_at=start_at, stop_at=stop_at),
        signal=lambda updates, own, extra_args: (
            own.gradients if accumulate is not None else gradient_of(extra_args, "srigl")
        ),
        own=own,
        own_update=None if accumulate is None else added,
        watch=True,
        layout=layout,
        key=key,
        draws=False,
        shaped=True,
        renewing=renewing,
    )


def _renewed(
    parts: Sequence[Matrices],
    budgets: Sequence[jax.Array],
    whole: np.ndarray,
    fraction: jax.Array,
    min_salient: ArrayLike | None,
) -> list[jax.Array]:
    """The next masks. All parts share each search, which compiles faster. Axes that are reduced stay, with length 1."""
    of_layer, nowhere = [part.of_layer for part in parts], [None] * len(parts)
    weights, masks, signals = ([getattr(part, x) for part in parts] for x in ("weight", "mask", "signal"))
    stay, go = [], []
    for part in parts:
        active, moving = sums([part.mask, part.mask & (part.weight != 0)], part.of_layer)
        goes = jnp.floor(jnp.asarray(fraction, jnp.float32) * active.astype(jnp.float32)).astype(jnp.int32)
        kept = jnp.minimum(active - goes, moving)
        stay.append(jnp.clip(kept, 0, active))
        go.append(active - stay[-1])

    among = masks
    live = [jnp.any(part.mask, part.of_output, keepdims=True) | True for part in parts]  # sharded as the masks are
    if min_salient is not None:
        # S: the largest weights and the largest gradients.
        found = top_k_along(weights + signals, stay + go, 2 * of_layer, masks + nowhere, absolute=True, enough=True)
        both = zip(parts, found[: len(parts)], found[len(parts) :], strict=True)
        salient = [count_true(large | grows, part.of_output) for part, large, grows in both]
        live = _live(parts, budgets, whole, salient, jnp.asarray(min_salient, jnp.float32))
        among = [mask & alive for mask, alive in zip(masks, live, strict=True)]

    left = top_k_along(weights, stay, of_layer, among, absolute=True)
    sizes = []
    for part, budget, alive in zip(parts, budgets, live, strict=True):
        size = jnp.minimum(jax.lax.div(budget, count_true(alive, part.of_layer)), part.fan_in)
        sizes.append(jnp.where(alive, size, 0))
    # Of each output the k' largest that are left, and if they are fewer, what grows by gradient.
    scores = [kept_then_largest(*three) for three in zip(left, weights, signals, strict=True)]
    return top_k_along(scores, sizes, [part.of_output for part in parts], nowhere, enough=True)


def _live(
    parts: Sequence[Matrices], budgets: Sequence[jax.Array], whole: np.ndarray, salient: Sequence[jax.Array], gamma: Any
) -> list[jax.Array]:
    """The outputs that are not ablated, by their numbers of salient weights: (stack..., 1..., outputs)."""
    live = []
    for part, n, count in zip(parts, budgets, salient, strict=True):
        of_fan_in = jnp.maximum(jnp.floor(gamma * (n // part.outputs).astype(jnp.float32)), 1)
        enough = jnp.where(gamma < 1, of_fan_in, gamma).astype(jnp.int32)
        # As many outputs stay as it takes for their fan-in to fit: those that reach the largest number that so many do.
        fewest = jnp.minimum(n // part.fan_in + 1, part.outputs)
        numbers = jnp.arange(1, part.fan_in + 1, dtype=jnp.int32).reshape(*[1] * (count.ndim - 2), -1, 1)
        reached = count_true(count_true(count >= numbers, part.of_layer[-1:]) >= fewest, part.of_layer)
        keeps_all = whole[list(part.members)].reshape(-1, *[1] * (count.ndim - 1))
        live.append((count >= jnp.minimum(enough, reached)) | keeps_all)
    return live


def _check_min_salient(value: Any) -> None:
    check_range("min_salient", value, 0)
    if value is None or isinstance(value, jax.core.Tracer):
        return
    if value == 0 or (value > 1 and value != int(value)):
        raise ValueError(
            "min_salient must be a fraction in (0, 1), a whole number of weights from 1, or None for no ablation, got "
            f"{value}"
        )
