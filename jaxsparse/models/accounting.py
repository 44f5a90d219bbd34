"""At how many places of an example each kernel of a model is applied, which makes multiply-adds of weights."""

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxsparse.models import layers
from jaxsparse.nn import SparseConv, SparseDense
from jaxsparse.prunable import default_choice

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
      the input), 1 for a dense layer on a vector, the length for one on a sequence; the sum over its calls for a layer
      that is called several times. A warning names the weights of layers of other types, which are not there, and
      recurrent layers, of which one time step is counted.

    Examples:
      >>> from jaxsparse import models
      >>> positions(models.LeNet5Caffe(), (28, 28, 1))
      {'conv1/kernel': 576, 'conv2/kernel': 64, 'fc1/kernel': 1, 'fc2/kernel': 1}
    """
    found: dict[str, int] = {}
    looked_up, recurrent = set(), set()

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
            path = "/".join((*module.path, "kernel"))
            found[path] = found.get(path, 0) + math.prod(places)
        elif isinstance(module, nn.Embed):
            looked_up.add("/".join((*module.path, "embedding")))
        elif isinstance(module, nn.RNN):
            recurrent.add("/".join(module.path))
        return y

    with nn.intercept_methods(look):
        key, example = jax.random.key(0), jnp.zeros((1, *shape))
        variables = jax.eval_shape(lambda key, x: model.init(key, x, **kwargs), key, example)
    weights = {path for path, chosen in default_choice(variables.get("params", {})).items() if chosen}
    if others := sorted(weights - set(found) - looked_up):
        warnings.warn(f"positions does not know the layers of {', '.join(others)}: they are left out", stacklevel=2)
    if recurrent:
        warnings.warn(f"positions counts one time step of {', '.join(sorted(recurrent))}", stacklevel=2)
    return found
