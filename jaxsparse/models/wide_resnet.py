"""Wide residual networks for CIFAR images."""

from functools import partial
from typing import Any

import jax
from flax import linen as nn

from jaxsparse.models.blocks import BatchNorm, check_images, dense, he_normal, scaled
from jaxsparse.models.layers import Conv

__all__ = ["WideResNet"]


class WideResNet(nn.Module):
    """WRN-depth-widen: pre-activation residual blocks, few and wide. WRN-28-10 has 36,479,194 parameters.

    A 3 x 3 convolution with 16 channels, three stages of (depth - 4) / 6 blocks with 16, 32 and 64 times ``widen``
    channels, batch normalisation, ReLU, the mean of all pixels, a dense layer. A block is BatchNorm, ReLU, 3 x 3
    convolution, BatchNorm, ReLU, dropout, 3 x 3 convolution; if it changes the shape, its shortcut is a 1 x 1
    convolution of the activations after the first ReLU. Convolutions start from N(0, sqrt(2 / fan_out)), the dense
    layer from U(-1/sqrt(fan_in), 1/sqrt(fan_in)) with a bias of 0. The model returns logits.

    Training and evaluation: if the collection ``"batch_stats"`` is mutable, batch normalisation uses the statistics of
    the batch and updates the running ones; otherwise it uses the running ones. Dropout is on if ``apply`` gets an
    rng named ``"dropout"``.

    Attributes:
      depth: number of 3 x 3 convolutions plus the number of stages: 6 n + 4 for n >= 1 blocks per stage.
      widen: factor of the stages' channels, int >= 1.
      num_classes: number of logits, int >= 1.
      dropout_rate: fraction of activations that dropout sets to 0, in [0, 1).
      width: factor of all hidden channel numbers, which are rounded and at least 1.
      dtype: dtype of the computation and of the logits; None promotes input and parameters. Parameters and batch
        statistics are float32.
      implementation: form of the convolutions, as in :func:`jaxsparse.models.layers.conv`; None chooses the fastest.
      axis_name: named axis of devices over which batch statistics are averaged; with None each device uses its own.

    Raises:
      ValueError: for any other depth or ``widen``, and if the input is not (batch, height, width, channels) or smaller
        than 4 x 4.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxsparse import models
      >>> model = models.WideResNet(depth=16, widen=8)
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
      >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      10961370
      >>> variables["params"]["block1_1"]["shortcut"]["kernel"].shape
      (1, 1, 16, 128)

    References:
      Zagoruyko and Komodakis, *Wide residual networks*, 2016; Dettmers and Zettlemoyer, *Sparse networks from scratch*,
      2019, ``WideResNet`` in https://github.com/TimDettmers/sparse_learning at e19ff16.
    """

    depth: int
    widen: int
    num_classes: int = 10
    dropout_rate: float = 0.3
    width: float = 1.0
    dtype: Any = None
    implementation: str | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits (batch, num_classes) of ``images`` (batch, height, width, channels)."""
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ValueError(f"WideResNet's depth is 6 n + 4 for n >= 1 blocks per stage, got {self.depth}")
        if self.widen < 1:
            raise ValueError(f"WideResNet's widen is an int >= 1, got {self.widen}")
        check_images(images, 4, "WideResNet")
        conv = partial(
            Conv, use_bias=False, dtype=self.dtype, kernel_init=he_normal("fan_out"), implementation=self.implementation
        )
        norm = partial(BatchNorm, dtype=self.dtype, axis_name=self.axis_name)
        x = conv(scaled(16, self.width), 3, padding=1, name="conv1")(images)
        for stage, channels in enumerate((16, 32, 64), 1):
            features = scaled(channels * self.widen, self.width)
            for i in range(1, (self.depth - 4) // 6 + 1):
                strides = 2 if stage > 1 and i == 1 else 1
                x = _Block(features, strides, self.dropout_rate, conv, norm, name=f"block{stage}_{i}")(x)
        x = nn.relu(norm(name="bn")(x)).mean((1, 2))
        return dense(x, self.num_classes, name="fc", dtype=self.dtype, bias_init=nn.initializers.zeros_init())


class _Block(nn.Module):
    features: int
    strides: int
    dropout_rate: float
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        activations = nn.relu(self.norm(name="bn1")(x))
        y = self.conv(self.features, 3, strides=self.strides, padding=1, name="conv1")(activations)
        y = nn.relu(self.norm(name="bn2")(y))
        y = nn.Dropout(self.dropout_rate, deterministic=not self.has_rng("dropout"))(y)
        y = self.conv(self.features, 3, padding=1, name="conv2")(y)
        if x.shape != y.shape:
            x = self.conv(self.features, 1, strides=self.strides, padding=0, name="shortcut")(activations)
        return x + y
