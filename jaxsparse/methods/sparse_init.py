"""Sparse initialisation: weights whose variance fits the inputs that each output has left.

Evci, Ioannou, Keskin and Dauphin, *Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win*, 2022
(https://arxiv.org/abs/2010.03533), count the fan-in of every neuron under its own mask
(https://github.com/google-research/rigl at 112a9bf, ``rigl/experimental/jax/pruning/init.py``). Lasby et al., *Dynamic
Sparse Training with Structured Sparsity*, 2024 (https://arxiv.org/abs/2305.02299), start SRigL so
(https://github.com/calgaryml/condensed-sparsity at 22e3143, ``src/rigl_torch/utils/sparse_init.py``).
"""

import math
import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsparse.layouts import Layout, LayoutLike, leaf_layouts, warn_of_guesses
from jaxsparse.masks import as_key, validate_masks
from jaxsparse.selection import count_true
from jaxsparse.transforms.checks import check_range
from jaxsparse.trees import is_masked_node, path_name

__all__ = ["sparse_init"]


def sparse_init(
    params: Any,
    masks: Any,
    *,
    scope: Literal["output", "layer"] = "output",
    gain: ArrayLike | None = None,
    key: ArrayLike = 0,
    layout: LayoutLike = None,
) -> Any:
    r"""Random weights on their masks, with the variance that the fan-in left to each output asks for.

    An initialiser divides the variance of weights by the number of inputs of a layer. Under a mask most of these are
    gone, and activations and gradients fade from layer to layer. Here output j has its own fan-in, the number of
    weights that its mask :math:`m` keeps, places of a convolution included,

    .. math:: k_j = \sum_i m_{ij}, \qquad w_{ij} \leftarrow m_{ij}\, w_{ij} \sqrt{K / k_j}

    with the dense fan-in K. The given weights are scaled, so they keep the distribution and the gain of the user's
    initialiser: with He's normals of variance 2 / K this is :math:`w_{ij} \sim N(0, 2 / k_j)`, the rule of the paper.
    An output without inputs has zeros only.

    Args:
      params: fresh params, as the model initialises them. (Trained or rescaled ones would be scaled once more.)
      masks: like ``params``: bool arrays, the scalar True for dense leaves, such as those of
        :func:`jaxsparse.random_masks` or :func:`jaxsparse.get_masks`.
      scope: whose fan-in counts: that of each "output", as in the paper; or that of the "layer", the mean of its
        outputs, so that all weights of a layer have one factor, :math:`1 / \sqrt{\mathrm{density}}`, as in the sparse
        maximal update parameterization of Dey et al. (who also divide Adam's learning rate of the layer by its
        density). Layers of a stack count one by one.
      gain: None scales the given weights. A number > 0 draws new ones for the leaves with masks, from
        :math:`N(0, \mathrm{gain}^2 / k_j)`, as the authors of SRigL do: :math:`\sqrt 2` in front of ReLUs, 1 without.
      key: an int or a PRNG key, for ``gain``.
      layout: which axes of leaves are inputs, outputs and stacked layers, where names and shapes do not tell
        (:func:`jaxsparse.layouts.leaf_layouts`): pattern -> :class:`jaxsparse.Layout`.

    Returns:
      A pytree like ``params``, with the same dtypes, 0 where masks are False. Dense leaves are as they came, biases
      among them.

    Raises:
      ValueError: for masks that do not fit, an unknown scope, a gain that is not positive, and a mask on a leaf that
        has no inputs, such as a bias, naming it.

    Warns:
      UserWarning: for leaves with masks whose inputs and outputs had to be guessed.

    Examples:
      The first output keeps one of four inputs, the second all.

      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}
      >>> masks = {"kernel": jnp.array([[1, 1], [0, 1], [0, 1], [0, 1]], bool), "bias": jnp.array(True)}
      >>> sparse_init(params, masks)["kernel"].tolist()
      [[2.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]

    References:
      Evci et al., `Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win
      <https://arxiv.org/abs/2010.03533>`_, 2022; Lasby et al., `Dynamic Sparse Training with Structured Sparsity
      <https://arxiv.org/abs/2305.02299>`_, 2024; Dey et al., `Sparse maximal update parameterization
      <https://arxiv.org/abs/2405.15743>`_, 2024.

      For initialisers whose variance goes with 1 / fan-in the distribution is that of the code of Evci et al.; for
      Glorot's it is not, for there they also count the outputs that have inputs. In the code of SRigL "grad_flow_init"
      has 2 / k as the standard deviation, where the other code has it as the variance, and "kaiming_uniform" draws
      normals: neither is followed.
    """
    if scope not in ("output", "layer"):
        raise ValueError(f"scope must be one of ['output', 'layer'], got {scope!r}")
    check_range("gain", gain, 0)
    if gain is not None and not isinstance(gain, jax.core.Tracer) and not 0 < gain < math.inf:
        raise ValueError(f"gain must be a positive number, or None to scale the weights that are there, got {gain}")
    draw = as_key(key)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    checked = treedef.flatten_up_to(validate_masks(masks, params))
    layouts = leaf_layouts(params, layout)
    named = [(path_name(path), leaf, mask) for (path, leaf), mask in zip(leaves, checked, strict=True)]
    sparse = {path: layouts[path] for path, _, mask in named if not is_masked_node(mask)}
    for path, at in sparse.items():
        if not at.is_matrix:
            raise ValueError(
                f"sparse_init scales by the number of inputs, and {path}, which has a mask, looks like a bias or gain "
                'without any. Give it the mask True, or say its inputs by layout={"path": jaxsparse.Layout(...)}'
            )
    warn_of_guesses(sparse, "sparse_init")

    def start(path, leaf, mask):
        if is_masked_node(mask):
            return leaf
        leaf, mask = jnp.asarray(leaf), jnp.asarray(mask)
        fan_in, dense = _fan_in(mask, layouts[path], scope)
        if gain is None:
            weights, variance = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), dense / fan_in
        else:
            weights = jax.random.normal(jax.random.fold_in(draw, zlib.crc32(path.encode())), leaf.shape)
            variance = jnp.square(jnp.asarray(gain, jnp.float32)) / fan_in
        return jnp.where(mask, weights * jnp.sqrt(variance), 0).astype(leaf.dtype)

    return treedef.unflatten([start(path, leaf, mask) for path, leaf, mask in named])


def _fan_in(mask: jax.Array, layout: Layout, scope: str) -> tuple[jax.Array, float]:
    """The fan-in under a mask, float32 with the axes of the leaf, at least tiny; and that of the dense leaf."""
    of = (*layout.stack, *layout.outputs) if scope == "output" else layout.stack  # type: ignore[misc]
    summed = tuple(axis for axis in range(mask.ndim) if axis not in of)  # type: ignore[operator]
    outputs = 1 if scope == "output" else math.prod(mask.shape[axis] for axis in layout.outputs)  # type: ignore[union-attr]
    counts = count_true(mask, summed).astype(jnp.float32) / outputs
    dense = math.prod(mask.shape[axis] for axis in summed) / outputs
    return jnp.where(counts > 0, counts, 1.0), dense
