"""Small networks, one for each way that the code of the CIFAR models can take, and numbers to put into them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsparse import models

CIFAR = (1, 32, 32, 3)
SMALL = {
    "AlexNet": models.AlexNet(width=1 / 16),
    "VGG16-C": models.VGG("C", width=1 / 16),
    "VGG-16": models.VGG("16_bn", width=1 / 16),
    "ResNet-8": models.ResNetCIFAR(8),
    "ResNet-18": models.ResNet18(width=1 / 16),
    "WRN-16-2": models.WideResNet(16, 2, width=1 / 4),
    "DenseNet-10": models.DenseNet(10, growth=3),
}


class Attends(nn.Module):
    """A model of layers that the library's own have not, with an argument that has no default."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), strides=2)(x)
        x = nn.BatchNorm(use_running_average=not train)(nn.ConvTranspose(6, (2, 2), strides=(2, 2))(x))
        x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4)(x.reshape(x.shape[0], -1, 6))
        return nn.Dense(3)(x.mean(1))


def variables_of(model, shape=CIFAR):
    """Shapes and dtypes of the variables by path, in the order in which the model creates them."""
    variables = {}

    def init(key):
        variables.update(flatten_dict(model.init(key, jnp.zeros(shape))))

    jax.eval_shape(init, jax.random.key(0))
    return {path: jax.ShapeDtypeStruct(v.shape, v.dtype) for path, v in variables.items()}


def numpy_variables(model, shape=CIFAR):
    """Numbers that NumPy gives alike everywhere: the i-th parameter from RandomState(i), and the i-th statistic."""
    values, counts = {}, {"params": 0, "batch_stats": 0}
    for path, variable in variables_of(model, shape).items():
        value = np.random.RandomState(counts[path[0]]).standard_normal(variable.shape)
        counts[path[0]] += 1
        if path[-1] == "kernel":
            value *= (2 / np.prod(variable.shape[:-1])) ** 0.5
        elif path[-1] == "scale":
            value = 1 + 0.1 * value
        elif path[-1] == "var":
            value = 1 + abs(0.1 * value)
        else:
            value *= 0.1
        values[path] = jnp.asarray(value, jnp.float32)
    return unflatten_dict(values)


def numpy_images(shape):
    return jnp.asarray(np.random.RandomState(99).standard_normal(shape), jnp.float32)


def quick_jit(f):
    """``jax.jit`` that compiles fast: these networks are deep, and run once."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})
