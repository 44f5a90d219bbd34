"""ASNI-II: the initialisation of a sparse network from two numbers per layer.

Damadi, Nouri and Pirsiavash, *Amenable Sparse Network Investigator*, 2022 (https://arxiv.org/abs/2202.09284), start
again from the signs of a network that :func:`jaxsparse.asni` has pruned: every weight of a layer is one of two numbers,
:func:`centroids` and :func:`amenable_init`, and is trained on these masks, :func:`jaxsparse.mask_updates`. The author's
code is followed (https://github.com/sdamadi/image-classification at 91f7b48, ``utils/init.py``).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsparse.masks import validate_masks
from jaxsparse.prunable import default_choice
from jaxsparse.selection import count_true
from jaxsparse.trees import is_masked_node, leaf_paths, path_name

__all__ = ["amenable_init", "centroids"]


def centroids(params: Any, masks: Any, *, biases: bool = False) -> dict[str, tuple[jax.Array, jax.Array]]:
    r"""The means of the negative and of the positive weights that each layer keeps.

    .. math:: c^-_l = \mathrm{mean} \{ w \in W_l : w < 0 \}, \qquad c^+_l = \mathrm{mean} \{ w \in W_l : w > 0 \}

    (Damadi et al., 2022: the points about which the weights of a trained sparse layer concentrate.) A leaf of stacked
    layers has two numbers for all of them.

    Args:
      params: the trained params.
      masks: like ``params``: bool arrays, the scalar True for dense leaves; as :func:`jaxsparse.get_masks` gives them.
      biases: those of the biases of the layers too, for :func:`amenable_init` to keep two numbers of each.

    Returns:
      path -> (negative, positive), float32 scalars, of every leaf that has a mask or that
      :func:`jaxsparse.prunable.prunable_leaves` would choose. 0 where a layer has no weights of that sign.

    Raises:
      ValueError: for masks that do not fit, naming the leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[1.0, 3.0], [-5.0, 9.0]])}
      >>> masks = {"kernel": jnp.array([[True, True], [True, False]])}
      >>> {path: tuple(map(float, pair)) for path, pair in centroids(params, masks).items()}
      {'kernel': (-5.0, 2.0)}
    """
    wanted = ("kernel", "bias") if biases else ("kernel",)
    return {leaf.path: leaf.centroids() for leaf in _leaves(params, masks) if leaf.role in wanted}


def amenable_init(params: Any, masks: Any, centroids: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Any:
    """The initialisation of ASNI-II: every kept weight becomes the mean of its layer and sign.

    Masks and signs are those of the trained network. Biases become 0 and the scales of normalisations 1, so the whole
    network is its masks, one bit a weight for the sign, and two numbers a layer. Where ``centroids`` has biases, these
    keep two numbers of theirs too, and those of normalisations stay as they are (the author's ``quantize_bias``).

    Args:
      params: the trained params, whose signs count.
      masks: like ``params``: bool arrays, the scalar True for dense leaves.
      centroids: path -> (negative, positive), as :func:`centroids` gives them.

    Returns:
      A pytree like ``params``, with the same dtypes. Weights whose sign has no number (0) stay as they are, and so do
      leaves that are none of kernel, bias or scale (by name, or 1-D beside a scale).

    Raises:
      ValueError: for masks that do not fit, and for centroids of leaves that the params lack, naming the leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[1.0, 3.0], [-5.0, 9.0]]), "bias": jnp.array([0.5, 0.1])}
      >>> masks = {"kernel": jnp.array([[True, True], [True, False]]), "bias": jnp.array(True)}
      >>> start = amenable_init(params, masks, centroids(params, masks))
      >>> start["kernel"].tolist(), start["bias"].tolist()
      ([[2.0, 2.0], [-5.0, 0.0]], [0.0, 0.0])
    """
    if unknown := sorted(set(centroids) - set(leaf_paths(params))):
        raise ValueError(f"there are centroids of {', '.join(unknown)}, which the params lack")
    leaves = _leaves(params, masks)
    quantised_biases = any(leaf.role == "bias" and leaf.path in centroids for leaf in leaves)

    def start(leaf):
        if leaf.path in centroids:
            return leaf.quantised(*centroids[leaf.path])
        if leaf.role == "scale":
            return jnp.ones_like(leaf.value)
        if leaf.role == "bias" or (leaf.role == "normalisation bias" and not quantised_biases):
            return jnp.zeros_like(leaf.value)
        return leaf.value

    return jax.tree.structure(params).unflatten([start(leaf) for leaf in leaves])


class _Leaf(NamedTuple):
    path: str
    value: jax.Array
    alive: jax.Array  # bool, the shape of the value
    role: str  # "kernel", "bias", "scale", "normalisation bias" or ""

    def centroids(self) -> tuple[jax.Array, jax.Array]:
        value = self.value.astype(jnp.float32)
        negative, positive = self.alive & (value < 0), self.alive & (value > 0)
        counts = [jnp.maximum(count_true(w), 1).astype(jnp.float32) for w in (negative, positive)]
        return jnp.sum(value, where=negative) / counts[0], jnp.sum(value, where=positive) / counts[1]

    def quantised(self, negative: ArrayLike, positive: ArrayLike) -> jax.Array:
        value, negative, positive = self.value, *(jnp.asarray(c, self.value.dtype) for c in (negative, positive))
        new = jnp.where((value < 0) & (negative != 0), negative, value)
        new = jnp.where((value > 0) & (positive != 0), positive, new)
        return jnp.where(self.alive, new, jnp.zeros_like(new))


def _leaves(params: Any, masks: Any) -> list[_Leaf]:
    """The leaves with their roles, by their names as Flax, Haiku and Equinox give them."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    checked = treedef.flatten_up_to(validate_masks(masks, params))
    parts = [path_name(path).rpartition("/") for path, _ in flat]
    scales = [name.endswith("scale") or (name == "weight" and jnp.ndim(leaf) == 1)
              for (_, leaf), (_, _, name) in zip(flat, parts, strict=True)]  # fmt: skip
    normalised = {layer for (layer, _, _), is_scale in zip(parts, scales, strict=True) if is_scale}
    matrices = default_choice(params)
    leaves = []
    for (path, value), mask, (layer, _, name), is_scale in zip(flat, checked, parts, scales, strict=True):
        if not is_masked_node(mask) or matrices[path_name(path)]:
            role = "kernel"
        elif is_scale:
            role = "scale"
        elif name.endswith(("bias", "offset")) or name == "b":
            role = "normalisation bias" if layer in normalised else "bias"
        else:
            role = ""
        alive = jnp.ones(jnp.shape(value), bool) if is_masked_node(mask) else jnp.asarray(mask)
        leaves.append(_Leaf(path_name(path), jnp.asarray(value), alive, role))
    return leaves
