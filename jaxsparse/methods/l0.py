"""L0 regularisation: channels closed by hard-concrete gates, independent of each other or modelled by a generator.

Louizos, Welling and Kingma, *Learning Sparse Neural Networks through L0 Regularization*, 2018
(https://arxiv.org/abs/1712.01312), and Li and Ji, *Dep-L0: Improving L0-based Network Sparsification via Dependency
Modeling*, 2021 (https://arxiv.org/abs/2107.00070). Where the papers leave something open, the authors' code is followed
(https://github.com/AMLab-Amsterdam/L0_regularization, https://github.com/leo-yangli/dep-l0).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxsparse.groups import Group, expected_counts, group_sizes
from jaxsparse.links import check_range, check_steps, check_zeros, refuse_replicated, require_params
from jaxsparse.masks import as_key
from jaxsparse.placement import copied, mask_like, placed_like, varying_like
from jaxsparse.trees import by_path, is_masked_node, leaf_paths, path_name

__all__ = [
    "L0State", "Penalty", "dep_l0", "dependent_logits", "hard_concrete", "hard_concrete_mean", "l0", "prob_open",
]  # fmt: skip

GAMMA, ZETA, BETA = -0.1, 1.1, 2 / 3  # the interval to which the concrete distribution is stretched; its temperature
EPSILON = 1e-6
LOG_ALPHA_BOUND = math.log(100)  # of the generator's log_alpha, and of the clamp of Louizos et al.


class L0State(NamedTuple):
    """State of :func:`l0` and :func:`dep_l0`.

    Attributes:
      count: (), int32: the updates so far.
      key: (), typed PRNG key, of the gates to come.
      log_alpha: group's name -> (size,), float32; of :func:`dep_l0` what the generator gives.
      generator: of :func:`dep_l0` the params of the generator, see :func:`dependent_logits`; else ().
      gates: leaf path -> the gates in force, in the leaf's dimensions, of size 1 but along the axis of the channels.
      slopes: group's name -> (size,): the derivative of the gates in force by log_alpha.
      test_gates: like ``gates``: the gates to evaluate with.
      weights: the weights behind the gates, like the params, ``optax.MaskedNode()`` for leaves without gates.
      inner_state: of the inner optimizer.
      gate_state: of the optimizer of the gates.
    """

    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives it
    key: jax.Array
    log_alpha: Any
    generator: Any
    gates: Any
    slopes: Any
    test_gates: Any
    weights: Any
    inner_state: Any
    gate_state: Any

    def sparse_masks(self) -> Any:
        """Where the gates in force are not zero."""
        return self._gated(lambda w, path: mask_like(jnp.broadcast_to(_leaf(self.gates[path]) != 0, w.shape), w))

    def eval_weights(self) -> Any:
        """The weights times the test-time gates; ``optax.MaskedNode()`` for leaves without gates."""
        return self._gated(lambda w, path: _times(w, _leaf(self.test_gates[path])).astype(w.dtype))

    def open_channels(self) -> dict[str, jax.Array]:
        """Which channels of each group are open in evaluation."""
        return {name: hard_concrete_mean(log_alpha) > 0 for name, log_alpha in self.log_alpha.items()}

    def wants_momentum(self) -> bool:
        """The gates learn from the gradients."""
        return False

    def problems(self, params: Any | None) -> list[str]:
        """Gates and weights that are not finite, params that are not the weights times the gates."""
        who = "l0"
        found = [
            f"{who}: log_alpha of group {name!r} is not finite. The training has diverged"
            for name, log_alpha in self.log_alpha.items()
            if not bool(jnp.isfinite(_leaf(log_alpha)).all())
        ]
        found += [
            f"{who}: the weights of {path} are not finite. The training has diverged"
            for path, w in by_path(self.weights).items()
            if not bool(jnp.isfinite(w).all())
        ]
        if params is None or found:
            return found
        found = check_zeros(self.sparse_masks(), params, who)
        leaves = by_path(params)
        for path, w in by_path(self.weights).items():
            gated = _times(w, _leaf(self.gates[path])).astype(leaves[path].dtype)
            away = jnp.max(jnp.abs(leaves[path] - gated), initial=0)
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
        paths = iter(_names(self.weights))
        return treedef.unflatten([w if is_masked_node(w) else make(w, next(paths)) for w in leaves])


@dataclasses.dataclass(frozen=True)
class Penalty:
    r"""What gates pay for being open: a strength times the expected number of weights.

    With :math:`P_{gc}` the probability that channel c of group g is open, :math:`E_g = \sum_c P_{gc}`, and the kernels
    of the groups (:attr:`jaxsparse.Group.kernel`), N ``examples``, the penalty is one of

    .. math::
       \text{alone:}      &\quad \tfrac1N \sum_g \lambda_g n_g E_g \\
       \text{neighbours:} &\quad \tfrac1N \sum_g \lambda_g a_g E_{g-1} E_g \\
       \text{all:}        &\quad \tfrac1N \lambda \mathbb{E}[\text{params that stay}]

    n is the number of weights of a channel in its kernel when all others are open (Louizos et al.), a is the area of
    the kernel, kernel height x width, and :math:`E_0` the number of inputs of the first kernel (Li and Ji, for
    convolutions in network order). The last counts what a smaller network would have: it sees through every axis, over
    all leaves that a group removes something from.

    Attributes:
      strength: lambda >= 0, a float, or one for each group (not for "all").
      counts: "alone", "neighbours" or "all".
      weight_decay: c >= 0, the L2 penalty of Louizos et al. that only open channels pay: adds
        :math:`\tfrac1N \sum_g \sum_c P_{gc} \tfrac{c}{2} \|W_{gc}\|^2` over the kernels of the groups.
      examples: N >= 1; Louizos et al. take the number of train examples, Li and Ji 1.

    Raises:
      ValueError: for numbers out of range and unknown counts.
    """

    strength: Any
    counts: str = "alone"
    weight_decay: float = 0.0
    examples: int = 1

    def __post_init__(self):
        if self.counts not in ("alone", "neighbours", "all"):
            raise ValueError(f"counts must be one of ['alone', 'neighbours', 'all'], got {self.counts!r}")
        many = isinstance(self.strength, Sequence)
        if many and self.counts == "all":
            raise ValueError("counts='all' has one strength, not one for each group")
        for strength in self.strength if many else [self.strength]:
            check_range("the strength of the penalty", strength, 0)
        check_range("weight_decay", self.weight_decay, 0)
        check_range("examples", self.examples, 1)


def hard_concrete(log_alpha: ArrayLike, uniform: ArrayLike) -> jax.Array:
    r"""Gates between 0 and 1, both ends included, that are differentiable in ``log_alpha``.

    .. math:: z = \mathrm{clip}(\sigma((\log u - \log(1 - u) + \log\alpha) / \beta) (\zeta - \gamma) + \gamma, 0, 1)

    with :math:`\beta = 2/3, \gamma = -0.1, \zeta = 1.1` (Louizos et al., 2018, eqs. 10 and 11).

    Args:
      log_alpha: the location, any shape.
      uniform: u, random numbers in (0, 1), of the same shape.

    Returns:
      The gates. Closed and wholly open gates have no gradient.

    Examples:
      >>> import jax.numpy as jnp
      >>> hard_concrete(jnp.array([-3.0, 0.0, 3.0]), jnp.full(3, 0.5)).tolist()
      [0.0, 0.5, 1.0]
    """
    log_alpha, uniform = jnp.asarray(log_alpha), jnp.asarray(uniform)
    s = jax.nn.sigmoid((jnp.log(uniform) - jnp.log1p(-uniform) + log_alpha) / BETA)
    return jnp.clip(s * (ZETA - GAMMA) + GAMMA, 0, 1)


def hard_concrete_mean(log_alpha: ArrayLike) -> jax.Array:
    r"""The gates to evaluate with, :math:`\mathrm{clip}(\sigma(\log\alpha) (\zeta - \gamma) + \gamma, 0, 1)`.

    Louizos et al., 2018, eq. 13. Closed for log_alpha up to -2.398, wholly open from 2.398 on.

    Examples:
      >>> import jax.numpy as jnp
      >>> hard_concrete_mean(jnp.array([-2.4, 0.0, 2.4])).tolist()
      [0.0, 0.5, 1.0]
    """
    return jnp.clip(jax.nn.sigmoid(jnp.asarray(log_alpha)) * (ZETA - GAMMA) + GAMMA, 0, 1)


def prob_open(log_alpha: ArrayLike) -> jax.Array:
    r"""The probability that a gate is not zero, :math:`\sigma(\log\alpha - \beta \log(-\gamma / \zeta))`.

    Louizos et al., 2018, eq. 12; kept between 1e-6 and 1 - 1e-6, beyond which it has no gradient.

    Examples:
      >>> print(f"{prob_open(0.3):.4f}")
      0.8697
    """
    closed = jax.nn.sigmoid(BETA * math.log(-GAMMA / ZETA) - jnp.asarray(log_alpha))
    return 1 - jnp.clip(closed, EPSILON, 1 - EPSILON)


def dependent_logits(generator: Sequence[Any], direction: str = "forward") -> list[jax.Array]:
    r"""log_alpha of all groups from the generator of Dep-L0, in which each follows from its neighbour's.

    .. math:: h_0 = 1, \quad h_l = \log\alpha_l = \log(100) \tanh(h_{l-1} W_l + c_l)

    Args:
      generator: a layer for each group, ``{"kernel": (inputs, outputs), "bias": (outputs,)}``, in the order in which
        the chain runs: from the first group to the last, or, backward, from the last to the first.
      direction: "forward" or "backward".

    Returns:
      log_alpha of each group, (size,), in network order.

    Raises:
      ValueError: for an unknown direction and for layers whose widths do not chain.

    Examples:
      >>> import jax.numpy as jnp
      >>> layers = [{"kernel": jnp.zeros((4, n)), "bias": jnp.zeros(n)} for n in (4, 2)]
      >>> [log_alpha.shape for log_alpha in dependent_logits(layers, "backward")]
      [(2,), (4,)]

    References:
      Li and Ji, *Dep-L0*, 2021, section 3.2.
    """
    _check_direction(direction)
    width = None
    for number, layer in enumerate(generator):
        kernel, bias = jnp.shape(layer["kernel"]), jnp.shape(layer["bias"])
        if len(kernel) != 2 or bias != kernel[1:] or width not in (None, kernel[0]):
            raise ValueError(
                f"layer {number} of the generator has a kernel of shape {kernel} and a bias of shape {bias}, but must "
                f"have (inputs, outputs) and (outputs,){'' if width is None else f' with {width} inputs'}"
            )
        width = kernel[1]
    h = jnp.ones(generator[0]["kernel"].shape[0])
    logits = []
    for layer in generator:
        h = LOG_ALPHA_BOUND * jnp.tanh(jnp.dot(h, layer["kernel"], precision="highest") + layer["bias"])
        logits.append(h)
    return logits if direction == "forward" else logits[::-1]


def l0(
    inner: optax.GradientTransformation,
    groups: Sequence[Group],
    *,
    penalty: float | Penalty,
    log_alpha: float | Sequence[float] = 0.0,
    gate_optimizer: optax.GradientTransformation | None = None,
    freeze_gates_at: int | None = None,
    clamp: tuple[float, float] | None = None,
    axis_name: str | None = None,
    key: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""L0 regularisation by hard-concrete gates on channels (Louizos et al., 2018). A wrapper: around an optimizer.

    The params that training hands out are weights times random gates, :math:`p = w z`, with one gate a channel and new
    ones at every step. By the chain rule their gradient G is all that weights and gates need:

    .. math::
       g_w &= G z \\
       g_{\log\alpha} &= \frac{\partial z}{\partial\log\alpha} \sum G w + \frac{\partial}{\partial\log\alpha} R

    where the sum is over all that a gate multiplies and R is the penalty. The inner optimizer moves w by
    :math:`g_w`, the optimizer of the gates moves :math:`\log\alpha`, then gates are sampled (:func:`hard_concrete`) and
    the update lands on their product. So nothing changes in the training loop, the loss has no penalty in it, and
    :func:`jaxsparse.eval_params` gives the weights times the gates to evaluate with (:func:`hard_concrete_mean`).
    The gates are one in ``init``; sampling starts with the first update.

    Args:
      inner: the optimizer of the weights, with its weight decay and schedules.
      groups: which channels have gates, and what they multiply; see :class:`jaxsparse.Group` and, for the models of the
        library, :func:`jaxsparse.models.channel_groups`.
      penalty: a :class:`Penalty`; a float is its strength, with ``counts="alone"``.
      log_alpha: where the gates start, or one for each group, plus N(0, 0.01^2). log((1 - p) / p) for a drop rate p:
        0 for 0.5, as Louizos et al. have it, 3 is what Li and Ji take for independent gates behind batch normalisation.
      gate_optimizer: of log_alpha; None: ``optax.adam(1e-3)``.
      freeze_gates_at: the step from which on the gates are held at their test-time value, without penalty, while the
        weights train on. None: never.
      clamp: bounds of log_alpha; (log(0.01), log(100)) in the code of Louizos et al.
      axis_name: of a pmapped axis: each device samples its own gates, and the gradients of weights and gates are
        averaged here, after the chain rule. Hand in the gradients of the device, not their mean. An estimate of less
        variance for the same work. None: one sample for all.
      key: an int or a PRNG key, possibly traced.

    Returns:
      A gradient transformation with the state :class:`L0State`. Its ``update`` needs the params.

    Raises:
      ValueError: for numbers out of range, and, by ``init``, for groups that do not fit the params.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxsparse
      >>> params = {"fc1": {"kernel": jnp.ones((5, 4))}, "fc2": {"kernel": jnp.ones((4, 3))}}
      >>> hidden = jaxsparse.Group("hidden", multiplies={"fc2/kernel": 0}, removes={"fc1/kernel": -1, "fc2/kernel": 0})
      >>> tx = jaxsparse.l0(optax.sgd(1e-3), [hidden], penalty=jaxsparse.Penalty(1.0, examples=60_000))
      >>> opt_state = tx.init(params)
      >>> updates, opt_state = tx.update(params, opt_state, params)  # gradients of half the squared norm
      >>> params = optax.apply_updates(params, updates)
      >>> jaxsparse.eval_params(opt_state, params)["fc2"]["kernel"][:, 0].round(2).tolist()  # half open
      [0.5, 0.5, 0.5, 0.5]

    References:
      Louizos, Welling and Kingma, `Learning Sparse Neural Networks through L0 Regularization
      <https://arxiv.org/abs/1712.01312>`_, 2018.

    .. warning::
      Nothing may move the params after the wrapper: only :func:`jaxsparse.check` finds it. Gates multiply what is
      behind a batch normalisation, never the filter ahead of it.
    """
    groups = _as_tuple(groups)
    if clamp is not None and not clamp[0] < clamp[1]:
        raise ValueError(f"clamp must be bounds (low, high) of log_alpha, got {clamp}")
    starts = tuple(log_alpha) if isinstance(log_alpha, Sequence) else (log_alpha,) * len(groups)
    if len(starts) != len(groups):
        raise ValueError(f"log_alpha is one number, or one for each of the {len(groups)} groups, got {len(starts)}")

    def init_gates(sizes, key):
        keys = jax.random.split(key, len(groups))
        return [
            start + 0.01 * jax.random.normal(k, (size,)) for start, size, k in zip(starts, sizes, keys, strict=True)
        ]

    return _gated(
        "l0",
        inner,
        groups,
        penalty if isinstance(penalty, Penalty) else Penalty(penalty, "alone"),
        init_gates,
        generate=None,
        gate_optimizer=gate_optimizer,
        freeze_gates_at=freeze_gates_at,
        clamp=clamp,
        axis_name=axis_name,
        key=key,
    )


def dep_l0(
    inner: optax.GradientTransformation,
    groups: Sequence[Group],
    *,
    penalty: float | Penalty,
    direction: str = "forward",
    input_width: int | None = None,
    gate_optimizer: optax.GradientTransformation | None = None,
    freeze_gates_at: int | None = None,
    axis_name: str | None = None,
    key: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """L0 regularisation with gates that depend on those of the neighbouring layer (Li and Ji, 2021).

    As :func:`l0`, but log_alpha is the output of a generator network (:func:`dependent_logits`), whose params are in
    the state and train with the optimizer of the gates. They start from U(-1/sqrt(inputs), 1/sqrt(inputs)), the biases
    from N(3, 0.01^2), so about nine in ten gates start open.

    Args:
      inner, groups, gate_optimizer, freeze_gates_at, axis_name, key: as for :func:`l0`; groups in network order. The
        authors train the generator with Adam, 1e-3.
      penalty: a :class:`Penalty`; a float is its strength, with ``counts="neighbours"``.
      direction: "forward", each group's gates depend on those of the group before, or "backward", of the group behind.
      input_width: size of the generator's constant input; None: that of the group that the chain starts with.

    Returns:
      A gradient transformation with the state :class:`L0State`. Its ``update`` needs the params.

    Raises:
      ValueError: for an unknown direction, numbers out of range, and, by ``init``, groups that do not fit the params.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxsparse
      >>> params = {"fc1": {"kernel": jnp.ones((5, 4))}, "fc2": {"kernel": jnp.ones((4, 3))}}
      >>> groups = [
      ...     jaxsparse.Group("inputs", {"fc1/kernel": 0}, {"fc1/kernel": 0}),
      ...     jaxsparse.Group("hidden", {"fc2/kernel": 0}, {"fc1/kernel": -1, "fc2/kernel": 0}),
      ... ]
      >>> tx = jaxsparse.dep_l0(optax.sgd(0.1), groups, penalty=jaxsparse.Penalty(1e-3, "all"))
      >>> opt_state = tx.init(params)
      >>> {name: log_alpha.shape for name, log_alpha in jaxsparse.get_log_alpha(opt_state).items()}
      {'inputs': (5,), 'hidden': (4,)}

    References:
      Li and Ji, `Dep-L0: Improving L0-based Network Sparsification via Dependency Modeling
      <https://arxiv.org/abs/2107.00070>`_, 2021.
    """
    groups = _as_tuple(groups)
    _check_direction(direction)
    check_range("input_width", input_width, 1)

    def init_gates(sizes, key):
        order = sizes if direction == "forward" else sizes[::-1]
        widths = [order[0] if input_width is None else input_width, *order]
        layers = []
        for inputs, outputs, k in zip(widths, order, jax.random.split(key, len(order)), strict=False):
            kernel_key, bias_key = jax.random.split(k)
            bound = inputs**-0.5
            kernel = jax.random.uniform(kernel_key, (inputs, outputs), minval=-bound, maxval=bound)
            layers.append({"kernel": kernel, "bias": 3 + 0.01 * jax.random.normal(bias_key, (outputs,))})
        return layers

    return _gated(
        "dep_l0",
        inner,
        groups,
        penalty if isinstance(penalty, Penalty) else Penalty(penalty, "neighbours"),
        init_gates,
        generate=lambda generator: dependent_logits(generator, direction),
        gate_optimizer=gate_optimizer,
        freeze_gates_at=freeze_gates_at,
        clamp=None,
        axis_name=axis_name,
        key=key,
    )


def _gated(
    who: str,
    inner: optax.GradientTransformation,
    groups: tuple[Group, ...],
    penalty: Penalty,
    init_gates: Callable[..., Any],
    *,
    generate: Callable[[Any], list[jax.Array]] | None,
    gate_optimizer: optax.GradientTransformation | None,
    freeze_gates_at: int | None,
    clamp: tuple[float, float] | None,
    axis_name: str | None,
    key: ArrayLike,
) -> optax.GradientTransformationExtraArgs:
    """The wrapper that both methods are: ``generate`` makes log_alpha of the params of the gates."""
    gate_optimizer = optax.adam(1e-3) if gate_optimizer is None else gate_optimizer
    for name, optimizer in (("inner", inner), ("gate_optimizer", gate_optimizer)):
        if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
            raise ValueError(f"{who}: {name} must be an optimizer, such as optax.adam(1e-3), got {optimizer!r}")
    inner = optax.with_extra_args_support(inner)
    gate_optimizer = optax.with_extra_args_support(gate_optimizer)
    logits_of = generate or (lambda log_alpha: log_alpha)
    check_steps("freeze_gates_at", freeze_gates_at, 0)
    names = [getattr(group, "name", None) for group in groups]
    if isinstance(penalty.strength, Sequence) and len(penalty.strength) != len(groups):
        raise ValueError(f"the penalty has {len(penalty.strength)} strengths for {len(groups)} groups")

    def by_leaf(vectors, weights):
        """Vectors, one a group, in the dimensions of the leaves that they multiply."""
        ranks = {path: leaf.ndim for path, leaf in by_path(weights).items()}
        return {
            path: jnp.expand_dims(vector, _others(axis, ranks.get(path, 1)))
            for group, vector in zip(groups, vectors, strict=True)
            for path, axis in group.multiplies.items()
        }

    def init_fn(params):
        refuse_replicated(params, who)
        empty = not jax.tree.leaves(params)  # Optax's placeholder: only the structure matters
        sizes = (1,) * len(groups) if empty else group_sizes(groups, params)
        if not empty:
            _penalty_of(penalty, groups, params)  # raises if it does not fit
        multiplied = {path for group in groups for path in group.multiplies}
        weights = jax.tree_util.tree_map_with_path(
            # A copy: the state and the params may both be donated.
            lambda path, p: copied(p) if path_name(path) in multiplied else optax.MaskedNode(),
            params,
        )
        draw, gate_key = jax.random.split(as_key(key))
        gate_params = varying_like(init_gates(sizes, gate_key), params)
        logits = logits_of(gate_params)
        ones = [jnp.ones_like(log_alpha) for log_alpha in logits]
        return L0State(
            count=jnp.zeros([], jnp.int32),
            key=draw,
            log_alpha=dict(zip(names, logits, strict=True)),
            generator=() if generate is None else gate_params,
            gates=by_leaf(ones, weights),
            slopes=dict(zip(names, map(jnp.zeros_like, logits), strict=True)),
            test_gates=by_leaf([hard_concrete_mean(la) for la in logits], weights),
            weights=weights,
            inner_state=inner.init(params),
            gate_state=gate_optimizer.init(gate_params),
        )

    def sample(logits, key, count):
        """Gates for the step of this number, their slopes, and the gates to evaluate with; one vector a group."""
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        flat = jnp.concatenate(logits)
        uniform = jax.random.uniform(key, flat.shape, minval=EPSILON, maxval=1 - EPSILON)
        gates, slopes = jax.jvp(lambda la: hard_concrete(la, uniform), [flat], [jnp.ones_like(flat)])
        tested = hard_concrete_mean(flat)
        if freeze_gates_at is not None:
            gates = jnp.where(count >= freeze_gates_at, tested, gates)
            slopes = jnp.where(count >= freeze_gates_at, 0, slopes)
        ends = np.cumsum([la.size for la in logits])[:-1]
        return [jnp.split(vector, ends) for vector in (gates, slopes, tested)]

    def update_fn(updates, state, params=None, **extra_args):
        require_params(params, who)
        frozen = jnp.array(False) if freeze_gates_at is None else state.count >= freeze_gates_at
        paths, (leaves, treedef) = _names(params), jax.tree.flatten(params)
        behind = by_path(state.weights)
        real = treedef.unflatten([behind.get(path, p) for path, p in zip(paths, leaves, strict=True)])
        grads = dict(zip(paths, treedef.flatten_up_to(updates), strict=True))

        # The chain rule: what the gradient of weight x gate says of each.
        of_gates = [
            sum(
                jnp.sum(_times(grads[path].astype(jnp.float32), behind[path]), _others(axis, behind[path].ndim))
                for path, axis in group.multiplies.items()
            )
            for group in groups
        ]
        grads |= {path: _times(grads[path], state.gates[path]).astype(grads[path].dtype) for path in behind}

        gate_params = state.generator if generate is not None else [state.log_alpha[name] for name in names]
        gate_params = varying_like(gate_params, [*of_gates, state.slopes])
        logits, pull_back = jax.vjp(logits_of, gate_params)
        of_penalty = jax.grad(lambda logits: _penalty_of(penalty, groups, real, logits))(logits)
        of_gates = [placed_like(g, log_alpha) for log_alpha, g in zip(logits, of_gates, strict=True)]
        of_logits = [
            slope * g + jnp.where(frozen, 0, extra)
            for slope, g, extra in zip([state.slopes[name] for name in names], of_gates, of_penalty, strict=True)
        ]
        if penalty.weight_decay:  # the gradient of P c/2 W^2 by W
            kernels = by_path(real)
            for group, log_alpha in zip(groups, logits, strict=True):
                path, axis = _kernel_of(group, kernels)
                pull = jnp.where(frozen, 0, prob_open(log_alpha) * penalty.weight_decay / penalty.examples)
                pull = jnp.expand_dims(pull, _others(axis, kernels[path].ndim))
                grads[path] += _times(pull, kernels[path]).astype(grads[path].dtype)
        (of_gate_params,) = pull_back(of_logits)
        of_weights = treedef.unflatten([grads[path] for path in paths])
        if axis_name is not None:
            of_weights, of_gate_params = jax.lax.pmean((of_weights, of_gate_params), axis_name)

        if "grad" in extra_args:
            extra_args["grad"] = of_weights
        proposed, inner_state = inner.update(of_weights, state.inner_state, real, **extra_args)
        with jax.numpy_dtype_promotion("standard"):  # Optax's Adam knows no other
            moved, gate_state = gate_optimizer.update(of_gate_params, state.gate_state, gate_params)
        new_gate_params = optax.apply_updates(gate_params, moved)
        if clamp is not None:
            new_gate_params = jax.tree.map(lambda x: jnp.clip(x, *clamp), new_gate_params)
        gate_params = jax.tree.map(lambda old, new: jnp.where(frozen, old, new), gate_params, new_gate_params)
        logits = logits_of(gate_params)

        key, draw = jax.random.split(state.key)
        sampled, slopes, tested = sample(logits, draw, state.count + 1)
        gates = by_leaf(sampled, state.weights)

        # The weights move as the inner optimizer proposes, and the params land on their product with the gates.
        steps = dict(zip(paths, treedef.flatten_up_to(proposed), strict=True))
        weights = {path: (w + steps[path]).astype(w.dtype) for path, w in behind.items()}

        def land(path, p):
            if path not in weights:
                return steps[path].astype(p.dtype)
            return _times(weights[path], gates[path]).astype(p.dtype) - p

        return treedef.unflatten([land(path, p) for path, p in zip(paths, leaves, strict=True)]), L0State(
            count=optax.safe_increment(state.count),
            key=key,
            log_alpha=dict(zip(names, logits, strict=True)),
            generator=() if generate is None else gate_params,
            gates=gates,
            slopes=dict(zip(names, slopes, strict=True)),
            test_gates=by_leaf(tested, state.weights),
            weights=treedef.unflatten([weights.get(path, optax.MaskedNode()) for path in paths]),
            inner_state=inner_state,
            gate_state=gate_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _penalty_of(
    penalty: Penalty, groups: Sequence[Group], params: Any, logits: Sequence[jax.Array] | None = None
) -> jax.Array:
    """The penalty, see :class:`Penalty`; without logits only whether it fits the params."""
    leaves = by_path(params)
    kernels = [_kernel_of(group, leaves) for group in groups] if penalty.counts != "all" or penalty.weight_decay else []
    if penalty.counts == "neighbours":
        for group, (path, axis) in zip(groups, kernels, strict=True):
            if axis % leaves[path].ndim != leaves[path].ndim - 1:
                raise ValueError(
                    f"counts='neighbours' is for channels that a kernel makes, but group {group.name!r} gates the "
                    f"inputs of {path}: take counts='all'"
                )
    if logits is None:
        return jnp.zeros(())
    many = isinstance(penalty.strength, Sequence)
    strengths = penalty.strength if many else [penalty.strength] * len(groups)
    is_open = [prob_open(log_alpha) for log_alpha in logits]
    total = jnp.zeros(())
    if penalty.counts == "all":
        shapes = {path: leaves[path].shape for group in groups for path in group.removes if path in leaves}
        chances = {group.name: of_group for group, of_group in zip(groups, is_open, strict=True)}
        total += penalty.strength * sum(expected_counts(groups, shapes, chances).values())
    else:
        before = leaves[kernels[0][0]].shape[-2]  # E_0
        for strength, (path, axis), chances in zip(strengths, kernels, is_open, strict=True):
            shape = leaves[path].shape
            if penalty.counts == "alone":
                total += strength * (math.prod(shape) / shape[axis]) * chances.sum()
            else:
                total += strength * math.prod(shape[:-2]) * before * chances.sum()
                before = chances.sum()
    if penalty.weight_decay:
        for (path, axis), chances in zip(kernels, is_open, strict=True):
            norms = placed_like(jnp.sum(jnp.square(leaves[path]), _others(axis, leaves[path].ndim)), chances)
            total += penalty.weight_decay / 2 * jnp.sum(_times(chances, norms))
    return total / penalty.examples


def _kernel_of(group: Group, leaves: Any) -> tuple[str, int]:
    """The kernel of a group and the axis of its channels there."""
    if group.kernel is not None:
        return group.kernel, group.multiplies.get(group.kernel, -1)
    for path, axis in group.multiplies.items():
        if leaves[path].ndim > 1:
            return path, axis
    for path, removed in group.removes.items():
        if path in leaves and leaves[path].ndim > 1 and removed in (-1, leaves[path].ndim - 1):
            return path, -1
    raise ValueError(f"the penalty counts the weights of a kernel: say which, kernel=..., for group {group.name!r}")


def _others(axis: int, rank: int) -> list[int]:
    """All axes but one."""
    return [i for i in range(rank) if i != axis % rank]


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    """The product in the wider of two precisions: of gates and weights, of which either may be the wider."""
    dtype = np.promote_types(a.dtype, b.dtype)
    return a.astype(dtype) * b.astype(dtype)


def _as_tuple(groups: Sequence[Group]) -> tuple[Group, ...]:
    if isinstance(groups, Group):
        raise ValueError(f"groups must be a sequence of jaxsparse.Group, got a single one, {groups.name!r}: [group]")
    return tuple(groups)


def _check_direction(direction: str) -> None:
    if direction not in ("forward", "backward"):
        raise ValueError(f"direction must be 'forward' or 'backward', got {direction!r}")


def _names(tree: Any) -> list[str]:
    """The plain paths of all leaves, in the order of ``jax.tree.leaves``."""
    return [path for path in leaf_paths(tree)]


def _leaf(wrapped: Any) -> jax.Array:
    """The array, where flax.nnx wraps the leaves of an optimizer state."""
    return jax.tree.leaves(wrapped)[0]
