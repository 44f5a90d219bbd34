"""At how many places of an example each kernel of a model is applied, which makes multiply-adds of weights."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxsparse.models import layers
from jaxsparse.nn import SparseConv, SparseDense

__all__ = ["positions"]

_LAYERS = (layers.Conv, nn.Conv, nn.ConvTranspose, nn.Dense, nn.DenseGeneral, SparseConv, SparseDense)


def positions(model: nn.Module, shape: tuple[int, ...], **kwargs: Any) -> dict[str, int]:
    """At how many places of an example each kernel is applied: its weights times this are its multiply-adds.

    Args:
      model: a Flax model, of which Flax's dense layers (those of attention too) and convolutions and the library's own
        are counted.
      shape: of one example, such as (32, 32, 3).
      **kwargs: what else the model is called with, such as ``train=False``.

    Returns:
      path of the kernel -> output height x width of a convolution (ahead of its max-pool; of a transposed one those of
      the input), 1 for a dense layer on a vector, the length for one on a sequence.

    Examples:
      >>> from jaxsparse import models
      >>> positions(models.LeNet5Caffe(), (28, 28, 1))
      {'conv1/kernel': 576, 'conv2/kernel': 64, 'fc1/kernel': 1, 'fc2/kernel': 1}
    """
    found: dict[str, int] = {}

    def look(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y, module = call(*args, **kwargs), context.module
        if context.method_name == "__call__" and isinstance(module, _LAYERS):
            x = args[0] if args else next(iter(kwargs.values()))
            places = x.shape[1:-1] if isinstance(module, nn.ConvTranspose) else y.shape[1:-1]
            if isinstance(module, nn.DenseGeneral):
                axes = module.axis if isinstance(module.axis, tuple) else (module.axis,)
                summed = {axis % x.ndim for axis in axes}
                places = [size for axis, size in enumerate(x.shape) if axis and axis not in summed]
            if isinstance(module, layers.Conv) and module.max_pool is not None:
                places = layers.output_size(x.shape[1:3], module.kernel_size, module.strides, module.padding)
            found["/".join((*module.path, "kernel"))] = math.prod(places)
        return y

    with nn.intercept_methods(look):
        jax.eval_shape(lambda key, x: model.init(key, x, **kwargs), jax.random.key(0), jnp.zeros((1, *shape)))
    return found
