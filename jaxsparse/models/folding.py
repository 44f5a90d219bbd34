"""Batch normalisation folded into the layers beside it."""

from typing import Any, overload

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsparse.masks import validate_masks
from jaxsparse.models.alexnet import AlexNet
from jaxsparse.models.channels import EPSILON
from jaxsparse.models.resnet import ResNet8, ResNet18, ResNet50, ResNetCIFAR
from jaxsparse.models.vgg import VGG, convolutions_and_hidden

__all__ = ["fold_batch_norm"]


@overload
def fold_batch_norm(model: nn.Module, params: Any, batch_stats: Any) -> tuple[nn.Module, Any]: ...


@overload
def fold_batch_norm(model: nn.Module, params: Any, batch_stats: Any, masks: Any) -> tuple[nn.Module, Any, Any]: ...


def fold_batch_norm(model, params, batch_stats, masks=None):
    r"""Fold batch normalisation into kernels and biases: the same network in evaluation, with fewer numbers.

    With the running mean :math:`\mu` and variance :math:`v`, and the scale :math:`\gamma` and bias :math:`\beta` that
    are trained, batch normalisation multiplies each output of a layer with kernel :math:`W` and bias :math:`b` by
    :math:`s` and adds to it. The layer can do both:

    .. math::
        s = \frac{\gamma}{\sqrt{v + \varepsilon}}, \qquad W' = W s, \qquad b' = (b - \mu) s + \beta.

    Where ReLU lies between the layer and its normalisation, as in the hidden dense layers of :class:`VGG`, the next
    layer takes it over: its inputs are multiplied by :math:`s`, and its bias grows by :math:`W^\top (\beta - \mu s)`.
    Pruned weights stay +0, so masks stay as they are. What is new is computed in float64 and rounded once.

    Args:
      model: :class:`ResNet8`, :class:`ResNetCIFAR`, :class:`ResNet18`, :class:`ResNet34`, :class:`ResNet50`,
        :class:`VGG` or :class:`AlexNet`.
      params: its params.
      batch_stats: its batch statistics.
      masks: its masks, bool arrays like ``params`` with the scalar True for dense leaves; None for none.

    Returns:
      The model with ``batch_norm=False``, which has no batch statistics, and its params, with a bias for every layer.
      With masks also its masks, for :func:`jaxsparse.save_sparse`: those of the kernels, and True for folded biases.

    Raises:
      ValueError: for another model, one that is folded already, and params, statistics or masks that do not fit,
        naming them.

    Examples:
      >>> import jax
      >>> from jaxsparse import models
      >>> model = models.ResNet8(width=1 / 4)
      >>> shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
      >>> variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 2, leaf.dtype), shapes)  # in place of trained ones
      >>> folded, params = models.fold_batch_norm(model, variables["params"], variables["batch_stats"])
      >>> folded.batch_norm, list(params["block1_1"])
      (False, ['conv1', 'conv2'])
      >>> params["conv1"]["kernel"][0, 0, 0].round(4)  # 2 * 2 / sqrt(2 + 0.001)
      Array([2.8277, 2.8277, 2.8277, 2.8277], dtype=float32)

    References:
      Jacob et al., *Quantization and training of neural networks for efficient integer-arithmetic-only inference*,
      2018, section 3.2.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    stats = {path: np.asarray(leaf) for path, leaf in flatten_dict(batch_stats, sep="/").items()}
    norms = sorted(path.removesuffix("/scale") for path in leaves if path.endswith("/scale"))
    found = {}
    if masks is not None:
        validate_masks(masks, params)
        found = flatten_dict(masks, sep="/")
    for norm, (layer, reads) in _layers(model, norms).items():
        kernel, bias = f"{layer}/kernel", f"{layer}/bias"
        needed = {"params": (kernel, f"{norm}/scale", f"{norm}/bias"), "batch_stats": (f"{norm}/mean", f"{norm}/var")}
        for name, tree in (("params", leaves), ("batch_stats", stats)):
            if missing := [path for path in needed[name] if path not in tree]:
                raise ValueError(f"the {name} of this {type(model).__name__} have no {missing[0]}")
        scale, shift, mean, variance = (
            tree.pop(f"{norm}/{name}").astype(np.float64)
            for tree, name in ((leaves, "scale"), (leaves, "bias"), (stats, "mean"), (stats, "var"))
        )
        weights, dtype = leaves[kernel].astype(np.float64), leaves[kernel].dtype
        axis = 0 if reads else weights.ndim - 1
        for name, vector in (("scale", scale), ("bias", shift), ("mean", mean), ("var", variance)):
            if vector.shape != (weights.shape[axis],):
                raise ValueError(
                    f"{norm}/{name}: expected shape {(weights.shape[axis],)} beside {kernel} of shape {weights.shape}, "
                    f"got {vector.shape}"
                )
        factor = scale / np.sqrt(variance + getattr(model, "epsilon", EPSILON))
        added, before = shift - mean * factor, leaves.get(bias, np.zeros((), dtype))
        after = before + added @ weights if reads else before * factor + added
        weights = weights * (factor[:, None] if reads else factor)
        leaves[kernel] = (weights + 0.0).astype(dtype)  # not -0 where a pruned weight meets a negative factor
        leaves[bias] = after.astype(before.dtype)
        if masks is not None:
            del found[f"{norm}/scale"], found[f"{norm}/bias"]
            found[bias] = jnp.array(True)
    if stats:
        raise ValueError(f"the batch_stats have {min(stats)}, but a {type(model).__name__} has no such normalisation")
    folded = (
        model.clone(batch_norm=False),
        unflatten_dict({path: jnp.asarray(leaf) for path, leaf in sorted(leaves.items())}, sep="/"),
    )
    return folded if masks is None else (*folded, unflatten_dict(dict(sorted(found.items())), sep="/"))


def _layers(model: nn.Module, norms: list[str]) -> dict[str, tuple[str, bool]]:
    """The layer that takes over each batch normalisation, and whether it is the next one, which reads it."""
    kind = type(model).__name__
    if not isinstance(model, ResNet8 | ResNetCIFAR | ResNet18 | ResNet50 | VGG | AlexNet):
        raise ValueError(
            "fold_batch_norm is for ResNet8, ResNetCIFAR, ResNet18, ResNet34, ResNet50, VGG and AlexNet, whose batch "
            f"normalisation stands beside the layer that can take it over, got {kind}"
        )
    if not model.batch_norm:
        raise ValueError(f"this {kind} has no batch normalisation (batch_norm=False): it is folded already")
    if isinstance(model, VGG):
        convolutions, hidden = convolutions_and_hidden(model.variant)
        of_dense = {f"bn{convolutions + i}": (f"fc{i + 1}", True) for i in range(1, hidden + 1)}
        return {f"bn{i}": (f"conv{i}", False) for i in range(1, convolutions + 1)} | of_dense
    if isinstance(model, AlexNet):
        of_dense = {"bn6": ("fc1", False), "bn7": ("fc2", False)}
        return {f"bn{i}": (f"conv{i}", False) for i in range(1, 6)} | of_dense
    return {norm: (norm.replace("bn", "conv"), False) for norm in norms}
