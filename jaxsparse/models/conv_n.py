"""Conv-2, Conv-4 and Conv-6, the small convolutional networks of the lottery ticket paper."""

from typing import Any

import jax
from flax import linen as nn

from jaxsparse.models.blocks import check_images, dense, he_normal, scaled
from jaxsparse.models.layers import Conv, max_pool

__all__ = ["Conv2", "Conv4", "Conv6", "ConvN"]

_CHANNELS = (64, 128, 256)
_UNITS = 256


class ConvN(nn.Module):
    """Conv-2, Conv-4 or Conv-6: pairs of 3 x 3 convolutions, then two hidden layers of 256 units.

    Convolutions have 64, 128 and 256 channels, are padded with 1 pixel and followed by ReLU, each pair by a 2 x 2
    max-pool. Parameters for CIFAR's 32 x 32 x 3 images: Conv-2 has 4,301,642, Conv-4 2,425,930, Conv-6 2,262,602.
    Kernels start from N(0, sqrt(2 / fan_in)), biases from 0, as in ASNI. The model returns logits.

    Attributes:
      convolutions: 2, 4 or 6.
      num_classes: number of logits, int >= 1.
      width: factor of all channel and unit numbers, which are rounded and at least 1.
      dtype: dtype of the computation and of the logits; None promotes input and parameters. Parameters are float32.
      implementation: form of convolution and max-pool, as in :func:`jaxsparse.models.layers.conv`; None chooses the
        fastest.

    Raises:
      ValueError: for any other number of convolutions, and if the input is not (batch, height, width, channels) or
        smaller than 8 x 8.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxsparse import models
      >>> variables = jax.eval_shape(models.Conv4().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
      >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      2425930

    References:
      Frankle and Carbin, *The lottery ticket hypothesis*, 2019; Damadi et al., *Amenable sparse network investigator*,
      2022.
    """

    convolutions: int
    num_classes: int = 10
    width: float = 1.0
    dtype: Any = None
    implementation: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits (batch, num_classes) of ``images`` (batch, height, width, channels)."""
        if self.convolutions not in (2, 4, 6):
            raise ValueError(f"ConvN has 2, 4 or 6 convolutions, got {self.convolutions}")
        check_images(images, 8, f"Conv{self.convolutions}")
        init, zeros = he_normal("fan_in"), nn.initializers.zeros_init()
        x = images
        for i in range(self.convolutions):
            x = Conv(
                scaled(_CHANNELS[i // 2], self.width),
                kernel_size=3,
                padding=1,
                dtype=self.dtype,
                kernel_init=init,
                bias_init=zeros,
                implementation=self.implementation,
                name=f"conv{i + 1}",
            )(x)
            if i % 2:  # before ReLU: the same result for a quarter of the work
                x = max_pool(x, 2, implementation=self.implementation)
            x = nn.relu(x)
        x = x.reshape(x.shape[0], -1)
        for i, features in enumerate((scaled(_UNITS, self.width), scaled(_UNITS, self.width), self.num_classes), 1):
            x = dense(x, features, name=f"fc{i}", dtype=self.dtype, kernel_init=init, bias_init=zeros)
            x = nn.relu(x) if i < 3 else x
        return x


class Conv2(ConvN):
    """Conv-2, the :class:`ConvN` with 2 convolutions."""

    convolutions: int = 2


class Conv4(ConvN):
    """Conv-4, the :class:`ConvN` with 4 convolutions."""

    convolutions: int = 4


class Conv6(ConvN):
    """Conv-6, the :class:`ConvN` with 6 convolutions."""

    convolutions: int = 6
