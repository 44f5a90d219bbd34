"""The two LeNets for which pruning papers report MNIST results, with PyTorch's initial values."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from jaxsparse.models.blocks import check_features, dense
from jaxsparse.models.layers import Conv, fan_in_uniform

__all__ = ["LeNet5Caffe", "LeNet300100"]


class LeNet300100(nn.Module):
    """LeNet-300-100, two hidden dense layers: 266,200 weights and 410 biases for MNIST's 784 pixels.

    Hidden layers of 300 and 100 units with ReLU. Images of any shape are flattened. Kernels and biases start from
    U(-1/sqrt(fan_in), 1/sqrt(fan_in)). The model returns logits; the papers' log-softmax followed by the negative
    log-likelihood is the softmax cross-entropy of these logits.

    Attributes:
      num_classes: number of logits, int >= 1.
      features: units of the two hidden layers.
      inputs: the pixels to read, by their index in the flattened image; None: all. Together with ``features`` this
        rebuilds a network that lost inputs and units by pruning.
      dtype: dtype of the computation and of the logits; None promotes input and parameters. Parameters are float32.

    Raises:
      ValueError: if the input has no batch axis.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxsparse import models
      >>> model = models.LeNet300100()
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
      >>> {name: layer["kernel"].shape for name, layer in params.items()}
      {'fc1': (784, 300), 'fc2': (300, 100), 'fc3': (100, 10)}
      >>> model.apply({"params": params}, jnp.zeros((5, 28, 28, 1))).shape
      (5, 10)

    References:
      LeCun et al., *Gradient-based learning applied to document recognition*, 1998.
    """

    num_classes: int = 10
    features: Sequence[int] = (300, 100)
    inputs: Sequence[int] | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits (batch, num_classes) of ``images`` (batch, ...)."""
        check_features(self, 2)
        if images.ndim < 2:
            raise ValueError(f"LeNet300100 needs images of shape (batch, ...), got {images.shape}")
        x = _read(images.reshape(images.shape[0], -1), self.inputs)
        x = nn.relu(dense(x, self.features[0], name="fc1", dtype=self.dtype))
        x = nn.relu(dense(x, self.features[1], name="fc2", dtype=self.dtype))
        return dense(x, self.num_classes, name="fc3", dtype=self.dtype)


class LeNet5Caffe(nn.Module):
    """LeNet-5 as in Caffe: 430,500 weights and 580 biases for MNIST's 28 x 28 x 1 images.

    20 filters of 5 x 5, ReLU, max-pool 2, 50 filters of 5 x 5, ReLU, max-pool 2, 500 units with ReLU, the logits. No
    padding. Kernels and biases start from U(-1/sqrt(fan_in), 1/sqrt(fan_in)). The model returns logits; the papers'
    log-softmax followed by the negative log-likelihood is the softmax cross-entropy of these logits.

    Attributes:
      num_classes: number of logits, int >= 1.
      features: filters of the two convolutions and units of the hidden layer.
      inputs: the flattened outputs of the convolutions that the hidden layer reads, by index, channels varying fastest;
        None: all. Together with ``features`` this rebuilds a network that lost channels, inputs and units by pruning.
      dtype: dtype of the computation and of the logits; None promotes input and parameters. Parameters are float32.
      implementation: form of convolution and max-pool, as in :func:`jaxsparse.models.layers.conv`; None chooses the
        fastest.

    Raises:
      ValueError: if the input is not (batch, height, width, channels), or smaller than 16 x 16.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxsparse import models
      >>> model = models.LeNet5Caffe()
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
      >>> {name: layer["kernel"].shape for name, layer in params.items()}
      {'conv1': (5, 5, 1, 20), 'conv2': (5, 5, 20, 50), 'fc1': (800, 500), 'fc2': (500, 10)}
      >>> model.apply({"params": params}, jnp.zeros((3, 28, 28, 1))).shape
      (3, 10)

    References:
      LeCun et al., *Gradient-based learning applied to document recognition*, 1998; Caffe's
      ``examples/mnist/lenet.prototxt``.
    """

    num_classes: int = 10
    features: Sequence[int] = (20, 50, 500)
    inputs: Sequence[int] | None = None
    dtype: Any = None
    implementation: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits (batch, num_classes) of ``images`` (batch, height, width, channels)."""
        if images.ndim != 4 or min(images.shape[1:3]) < 16:
            raise ValueError(
                "LeNet5Caffe needs images of shape (batch, height, width, channels), at least 16 x 16 for its two "
                f"5 x 5 convolutions and 2 x 2 max-pools, got {images.shape}"
            )
        check_features(self, 3)
        x = images
        for name, features in (("conv1", self.features[0]), ("conv2", self.features[1])):
            init = fan_in_uniform(5 * 5 * x.shape[-1])
            x = Conv(
                features,
                kernel_size=5,
                padding="VALID",
                max_pool=2,
                dtype=self.dtype,
                kernel_init=init,
                bias_init=init,
                implementation=self.implementation,
                name=name,
            )(x)
            x = nn.relu(x)  # after the max-pool instead of before it: the same result for a quarter of the work
        x = _read(x.reshape(x.shape[0], -1), self.inputs)
        x = nn.relu(dense(x, self.features[2], name="fc1", dtype=self.dtype))
        return dense(x, self.num_classes, name="fc2", dtype=self.dtype)


def _read(x: jax.Array, inputs: Sequence[int] | None) -> jax.Array:
    return x if inputs is None else x[:, np.asarray(inputs)]
