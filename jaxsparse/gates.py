"""Hard-concrete gates: their distribution, the L0 penalty, and the generator of gates that depend on each other.

Louizos, Welling and Kingma, *Learning Sparse Neural Networks through L0 Regularization*, 2018
(https://arxiv.org/abs/1712.01312), and Li and Ji, *Dep-L0: Improving L0-based Network Sparsification via Dependency
Modeling*, 2021 (https://arxiv.org/abs/2107.00070). :func:`jaxsparse.l0` and :func:`jaxsparse.dep_l0` train with them.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsparse.counts import expected_counts
from jaxsparse.groups import Group, Slice, entries, of_entries
from jaxsparse.placement import placed_like
from jaxsparse.transforms.checks import check_range
from jaxsparse.trees import by_path

__all__ = ["Penalty", "dependent_logits", "hard_concrete", "hard_concrete_mean", "prob_open"]

GAMMA, ZETA, BETA = -0.1, 1.1, 2 / 3  # the interval to which the concrete distribution is stretched; its temperature
EPSILON = 1e-6
LOG_ALPHA_BOUND = math.log(100)  # of the generator's log_alpha, and of the clamp of Louizos et al.
_COUNTS = ["alone", "neighbours", "all"]


@dataclasses.dataclass(frozen=True)
class Penalty:
    r"""The L0 penalty of gates: a strength times the expected number of weights.

    With :math:`P_{gc}` the probability that channel c of group g is open, :math:`E_g = \sum_c P_{gc}`, and the kernels
    of the groups (:attr:`jaxsparse.Group.kernel`), N ``examples``, the penalty is one of

    .. math::
       \text{alone:}      &\quad \tfrac1N \sum_g \lambda_g n_g E_g \\
       \text{neighbours:} &\quad \tfrac1N \sum_g \lambda_g a_g E_{g-1} E_g \\
       \text{all:}        &\quad \tfrac1N \lambda \mathbb{E}[\text{params that remain}]

    n is the number of weights of a channel in its kernel when all others are open (Louizos et al.), a is the area of
    the kernel, kernel height x width, and :math:`E_0` the number of inputs of the first kernel (Li and Ji, for
    convolutions in network order). The last counts the params of the smaller network: along every axis, over all
    leaves that a group removes something from.

    Attributes:
      strength: lambda >= 0, a float, or one for each group (not for "all").
      counts: "alone", "neighbours" or "all".
      weight_decay: c >= 0, the L2 penalty of Louizos et al. on open channels only: adds
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
        if self.counts not in _COUNTS:
            raise ValueError(f"counts must be one of {_COUNTS}, got {self.counts!r}")
        if np.ndim(self.strength) == 1 and not isinstance(self.strength, Sequence):
            object.__setattr__(self, "strength", tuple(self.strength))
        many = isinstance(self.strength, Sequence)
        if many and self.counts == "all":
            raise ValueError("counts='all' has one strength, not one for each group")
        for strength in self.strength if many else [self.strength]:
            check_range("the strength of the penalty", strength, 0)
        check_range("weight_decay", self.weight_decay, 0)
        check_range("examples", self.examples, 1)

    def kernels(self, groups: Sequence[Group], params: Any) -> list[Slice]:
        """The kernel of each group, with the axis of its channels there; empty if none are counted.

        Raises:
          ValueError: for groups that the penalty cannot count.
        """
        leaves = by_path(params)
        for group in groups if self.counts == "all" else ():
            if not any(which.path in leaves for which in group.removes):
                raise ValueError(
                    f"counts='all' counts what closed channels remove, and group {group.name!r} removes nothing: give "
                    "it removes="
                )
        if self.counts == "all" and not self.weight_decay:
            return []
        found = [_kernel(group, leaves) for group in groups]
        if self.counts == "neighbours":
            for group, (path, axis, channels) in zip(groups, found, strict=True):
                if axis not in (-1, leaves[path].ndim - 1):
                    raise ValueError(
                        f"counts='neighbours' is for channels that a kernel makes, but group {group.name!r} gates the "
                        f"inputs of {path}: take counts='all'"
                    )
                if channels is not None or group.size not in (None, leaves[path].shape[-1]):
                    raise ValueError(
                        f"counts='neighbours' is for kernels with an output per channel, but group {group.name!r} is "
                        f"not all of the {leaves[path].shape[-1]} outputs of {path}: take counts='all'"
                    )
        return found

    def value(self, groups: Sequence[Group], params: Any, logits: Sequence[jax.Array]) -> jax.Array:
        """The penalty, (), of the weights ``params`` whose gates are at ``logits``, log_alpha of each group."""
        leaves, kernels = by_path(params), self.kernels(groups, params)
        many = isinstance(self.strength, Sequence)
        strengths = self.strength if many else [self.strength] * len(groups)
        is_open = [prob_open(log_alpha) for log_alpha in logits]
        total = jnp.zeros(())
        if self.counts == "all":
            paths = dict.fromkeys(which.path for group in groups for which in group.removes)
            shapes = {path: leaves[path].shape for path in paths if path in leaves}
            chances = {group.name: of_group for group, of_group in zip(groups, is_open, strict=True)}
            total += self.strength * sum(expected_counts(groups, shapes, chances).values())
        else:
            before = leaves[kernels[0].path].shape[-2]  # E_0
            for strength, kernel, chances in zip(strengths, kernels, is_open, strict=True):
                shape = leaves[kernel.path].shape
                if self.counts == "alone":
                    axes, numbers = entries(kernel, shape, chances.size)
                    weights = math.prod(shape) / math.prod(shape[axis] for axis in axes)
                    if not one_each(numbers, chances.size):
                        number = np.bincount(numbers[numbers >= 0], minlength=chances.size)
                        chances = times(chances, jnp.asarray(number, chances.dtype))
                    total += strength * weights * chances.sum()
                else:
                    total += strength * math.prod(shape[:-2]) * before * chances.sum()
                    before = chances.sum()
        if self.weight_decay:
            for kernel, chances in zip(kernels, is_open, strict=True):
                norms = of_channels(jnp.square(leaves[kernel.path]), kernel, chances.size)
                total += self.weight_decay / 2 * jnp.sum(times(chances, placed_like(norms, chances)))
        return total / self.examples


def hard_concrete(log_alpha: ArrayLike, uniform: ArrayLike) -> jax.Array:
    r"""Random gates between 0 and 1, both ends included, differentiable in ``log_alpha``.

    .. math:: z = \mathrm{clip}(\sigma((\log u - \log(1 - u) + \log\alpha) / \beta) (\zeta - \gamma) + \gamma, 0, 1)

    with :math:`\beta = 2/3, \gamma = -0.1, \zeta = 1.1` (Louizos et al., 2018, eqs. 10 and 11).

    Args:
      log_alpha: the location, any shape.
      uniform: u, random numbers in (0, 1), of the same shape.

    Returns:
      The gates. Closed and fully open gates have no gradient.

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

    Louizos et al., 2018, eq. 13. Closed for log_alpha up to -2.398, fully open from 2.398 on.

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
    r"""The log_alpha of all groups from the generator of Dep-L0, where each follows from its neighbour's.

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
    check_direction(direction)
    if not len(generator):
        raise ValueError("dependent_logits needs a layer for each group, got none")
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


def check_direction(direction: str) -> None:
    """Raise a ValueError for an unknown direction."""
    if direction not in ("forward", "backward"):
        raise ValueError(f"direction must be 'forward' or 'backward', got {direction!r}")


def one_each(numbers: np.ndarray, size: int) -> bool:
    """Whether the entries are the channels, one by one."""
    return numbers.size == size and bool((numbers.ravel() == np.arange(size)).all())


def spread(channels: jax.Array, which: Slice, shape: Sequence[int]) -> jax.Array:
    """Values of channels in the rank of a leaf, with size 1 along the other axes; 1 for entries of no channel."""
    axes, numbers = entries(which, shape, channels.size)
    if not one_each(numbers, channels.size) or len(axes) > 1:
        channels = of_entries(channels, numbers)
    return jnp.expand_dims(channels, _others(axes, len(shape)))


def of_channels(leaf: jax.Array, which: Slice, size: int) -> jax.Array:
    """The sum over all entries of each channel, (size,)."""
    axes, numbers = entries(which, leaf.shape, size)
    sums = jnp.sum(leaf, _others(axes, leaf.ndim))
    if one_each(numbers, size):
        return sums.reshape(size)
    return jnp.zeros(size + 1, sums.dtype).at[numbers.ravel()].add(sums.ravel())[:-1]  # the last one is for -1


def _others(axes: tuple[int, ...], rank: int) -> list[int]:
    return [i for i in range(rank) if i not in axes]


def times(a: jax.Array, b: jax.Array) -> jax.Array:
    """The product in the wider of two precisions: of gates and weights, of which either may be the wider."""
    dtype = np.promote_types(a.dtype, b.dtype)
    return a.astype(dtype) * b.astype(dtype)


def _kernel(group: Group, leaves: Any) -> Slice:
    """The kernel of a group, with the axis of its channels there."""
    if group.kernel is not None:
        named = [which for which in (*group.multiplies, *group.removes) if which.path == group.kernel]
        return named[0] if named else Slice(group.kernel, -1)
    for which in group.multiplies:
        if leaves[which.path].ndim > 1:
            return which
    for which in group.removes:
        if which.path in leaves and leaves[which.path].ndim > 1 and which.axis in (-1, leaves[which.path].ndim - 1):
            return which
    raise ValueError(f"the penalty counts the weights of a kernel: say which, kernel=..., for group {group.name!r}")
