"""Residual networks for CIFAR images: the thin ones of the ResNet paper, and ResNet-18 with a stem for small images."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxsparse.models.blocks import BatchNorm, check_images, dense, he_normal, scaled
from jaxsparse.models.layers import Conv

__all__ = ["ResNet18", "ResNet20", "ResNet56", "ResNetCIFAR"]


class ResNetCIFAR(nn.Module):
    """The CIFAR network of the ResNet paper: depth 20 has 269,722 parameters, depth 56 has 853,018.

    A 3 x 3 convolution, three stages of (depth - 2) / 6 basic blocks with 16, 32 and 64 channels, the mean of all
    pixels, a dense layer. Shortcuts have no parameters (option A of the paper): where a stage begins, every second
    pixel is kept and channels of zeros are added, half of them in front of the others and half behind. Kernels start
    from N(0, sqrt(2 / fan_in)), the dense layer's bias from U(-1/sqrt(fan_in), 1/sqrt(fan_in)). The model returns
    logits.

    Training and evaluation: where the collection ``"batch_stats"`` is mutable, batch normalisation uses the statistics
    of the batch and updates the running ones; elsewhere it uses the running ones.

    Attributes:
      depth: number of layers with kernels, 6 n + 2 for n >= 1 blocks per stage.
      num_classes: number of logits, int >= 1.
      width: factor of all hidden channel numbers, which are rounded and at least 1.
      dtype: dtype of the computation and of the logits; None promotes input and parameters. Parameters and batch
        statistics are float32.
      implementation: form of the convolutions, as in :func:`jaxsparse.models.layers.conv`; None takes the fastest.

    Raises:
      ValueError: on another depth, and if the input is not (batch, height, width, channels) or smaller than 4 x 4.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxsparse import models
      >>> model = models.ResNetCIFAR(depth=20)
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
      >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      269722
      >>> variables["params"]["block3_3"]["conv2"]["kernel"].shape
      (3, 3, 64, 64)

    References:
      He et al., *Deep residual learning for image recognition*, 2016, section 4.2; initial values as in
      https://github.com/akamaster/pytorch_resnet_cifar10 at d5489e8, which Siegel et al., *Training sparse neural
      networks using compressed sensing*, 2020, use.
    """

    depth: int
    num_classes: int = 10
    width: float = 1.0
    dtype: Any = None
    implementation: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits (batch, num_classes) of ``images`` (batch, height, width, channels)."""
        if self.depth < 8 or (self.depth - 2) % 6:
            raise ValueError(f"ResNetCIFAR's depth is 6 n + 2 for n >= 1 blocks per stage, got {self.depth}")
        init = he_normal("fan_in")
        x = _features(self, images, (16, 32, 64), (self.depth - 2) // 6, conv_init=init, project=False)
        return dense(x, self.num_classes, name="fc", dtype=self.dtype, kernel_init=init)


class ResNet20(ResNetCIFAR):
    """:class:`ResNetCIFAR` of depth 20."""

    depth: int = 20


class ResNet56(ResNetCIFAR):
    """:class:`ResNetCIFAR` of depth 56."""

    depth: int = 56


class ResNet18(nn.Module):
    """ResNet-18 with a stem for small images: 11,173,962 parameters.

    A 3 x 3 convolution with strides 1 and no max-pool behind it, four stages of two basic blocks with 64, 128, 256 and
    512 channels, the mean of all pixels, a dense layer. Where stages 2 to 4 begin, the shortcut is a 1 x 1 convolution
    with batch normalisation. Convolutions start from N(0, sqrt(2 / fan_out)), the dense layer from
    U(-1/sqrt(fan_in), 1/sqrt(fan_in)). The model returns logits.

    Training and evaluation: where the collection ``"batch_stats"`` is mutable, batch normalisation uses the statistics
    of the batch and updates the running ones; elsewhere it uses the running ones.

    Attributes:
      num_classes: number of logits, int >= 1.
      width: factor of all hidden channel numbers, which are rounded and at least 1.
      dtype: dtype of the computation and of the logits; None promotes input and parameters. Parameters and batch
        statistics are float32.
      implementation: form of the convolutions, as in :func:`jaxsparse.models.layers.conv`; None takes the fastest.

    Raises:
      ValueError: if the input is not (batch, height, width, channels) or smaller than 8 x 8.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxsparse import models
      >>> variables = jax.eval_shape(models.ResNet18().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
      >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      11173962
      >>> variables["params"]["block2_1"]["shortcut_conv"]["kernel"].shape
      (1, 1, 64, 128)

    References:
      He et al., *Deep residual learning for image recognition*, 2016; Siegel et al., *Training sparse neural networks
      using compressed sensing*, 2020, ``models/resnet.py`` in https://github.com/dmaywald/xrda-sparse-training at
      5f3ab13.
    """

    num_classes: int = 10
    width: float = 1.0
    dtype: Any = None
    implementation: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits (batch, num_classes) of ``images`` (batch, height, width, channels)."""
        x = _features(self, images, (64, 128, 256, 512), 2, conv_init=he_normal("fan_out"), project=True)
        return dense(x, self.num_classes, name="fc", dtype=self.dtype)


def _features(model, images, channels: Sequence[int], blocks: int, *, conv_init, project: bool) -> jax.Array:
    """Features (batch, channels[-1]) in front of a ResNet's dense layer, with the submodules of ``model``."""
    check_images(images, 2 ** (len(channels) - 1), type(model).__name__)
    conv = partial(Conv, use_bias=False, dtype=model.dtype, kernel_init=conv_init, implementation=model.implementation)
    norm = partial(BatchNorm, dtype=model.dtype)
    channels = [scaled(n, model.width) for n in channels]
    x = conv(channels[0], 3, padding=1, name="conv1")(images)
    x = nn.relu(norm(name="bn1")(x))
    for stage, features in enumerate(channels, 1):
        for i in range(1, blocks + 1):
            strides = 2 if stage > 1 and i == 1 else 1
            x = _Block(features, strides, project, conv, norm, name=f"block{stage}_{i}")(x)
    return x.mean((1, 2))


class _Block(nn.Module):
    """Two 3 x 3 convolutions, added to the block's input."""

    features: int
    strides: int
    project: bool  # whether a shortcut that changes the shape has parameters
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        y = self.conv(self.features, 3, strides=self.strides, padding=1, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y))
        y = self.norm(name="bn2")(self.conv(self.features, 3, padding=1, name="conv2")(y))
        if x.shape == y.shape:
            return nn.relu(x + y)
        if self.project:
            x = self.conv(self.features, 1, strides=self.strides, padding=0, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_bn")(x)
        else:
            added = self.features - x.shape[-1]
            x = x[:, :: self.strides, :: self.strides]
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (added // 2, added - added // 2)))
        return nn.relu(x + y)
