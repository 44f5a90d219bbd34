"""The number of positions at which each kernel of a model is applied, from which MACs are counted."""

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
    """Count the output positions of an example at which each kernel is applied.

    The weights of a kernel times its positions are its multiply-accumulate operations (MACs).

    Args:
      model: a Flax model. Counted are dense layers (including those of attention) and convolutions, of Flax and of this
        library.
      shape: the shape of one example, such as (32, 32, 3).
      **kwargs: further arguments of the model's call, such as ``train=False``.

    Returns:
      path of the kernel -> its number of positions: output height x width for a convolution (before its max-pool;
      input height x width if it is transposed), 1 for a dense layer on a vector, the length for one on a sequence. For
      a layer that is called several times it is the sum over the calls. A warning names the weights of layers of other
      types, which are left out, and recurrent layers, for which one time step is counted.

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
            sizes = x.shape[1:-1] if isinstance(module, nn.ConvTranspose) else y.shape[1:-1]
            if isinstance(module, nn.DenseGeneral):
                axes = module.axis if isinstance(module.axis, tuple) else (module.axis,)
                summed = {axis % x.ndim for axis in axes}
                sizes = [size for axis, size in enumerate(x.shape) if axis and axis not in summed]
            if isinstance(module, layers.Conv) and module.max_pool is not None:
                sizes = layers.output_size(x.shape[1:3], module.kernel_size, module.strides, module.padding)
            path = "/".join((*module.path, "kernel"))
            found[path] = found.get(path, 0) + math.prod(sizes)
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
        warnings.warn(f"positions does not support the layers of {', '.join(others)}: they are left out", stacklevel=2)
    if recurrent:
        warnings.warn(f"positions counts one time step of {', '.join(sorted(recurrent))}", stacklevel=2)
    return found
