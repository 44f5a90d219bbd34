"""Densely connected networks for CIFAR images."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxsparse.models.blocks import BatchNorm, check_images, dense, he_normal, scaled
from jaxsparse.models.layers import Conv

__all__ = ["DenseNet", "DenseNet40"]


class DenseNet(nn.Module):
    """DenseNet without bottlenecks and without compression: 1,059,298 parameters at depth 40 and growth 12.

    A 3 x 3 convolution with 2 * ``growth`` channels, then three blocks of (depth - 4) / 3 layers, each of which appends
    ``growth`` channels to its input. Between blocks come a 1 x 1 convolution that keeps the number of channels and a
    2 x 2 average pool. Batch normalisation and ReLU precede every convolution but the first, and the mean of all pixels
    that the final dense layer reads. Convolutions start from N(0, sqrt(2 / fan_out)), the scales of batch normalisation
    from 0.5 (as in network slimming), the dense layer from U(-1/sqrt(fan_in), 1/sqrt(fan_in)). The model returns
    logits.

    Training and evaluation: if the collection ``"batch_stats"`` is mutable, batch normalisation uses the statistics of
    the batch and updates the running ones; otherwise it uses the running ones.

    Attributes:
      depth: number of layers with kernels, 3 n + 4 for n >= 1 layers per block.
      growth: channels that a layer adds, int >= 1.
      num_classes: number of logits, int >= 1.
      width: factor of ``growth``, which is rounded and at least 1, and thereby of all hidden channel numbers.
      dtype: dtype of the computation and of the logits; None promotes input and parameters. Parameters and batch
        statistics are float32.
      implementation: form of the convolutions, as in :func:`jaxsparse.models.layers.conv`; None chooses the fastest.
      axis_name: named axis of devices over which batch statistics are averaged; with None each device uses its own.

    Raises:
      ValueError: for any other depth or growth, and if the input is not (batch, height, width, channels) or smaller
        than 4 x 4.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxsparse import models
      >>> model = models.DenseNet(depth=7, growth=12)
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
      >>> {name: variables["params"][name]["conv"]["kernel"].shape for name in ("block1_1", "transition1", "block3_1")}
      {'block1_1': (3, 3, 24, 12), 'transition1': (1, 1, 36, 36), 'block3_1': (3, 3, 48, 12)}

    References:
      Huang et al., *Densely connected convolutional networks*, 2017; Liu et al., *Learning efficient convolutional
      networks through network slimming*, 2017, ``models/densenet.py`` in
      https://github.com/Eric-mingjie/network-slimming at b395dc0, without its channel selection, which passes all
      channels until a network is pruned. Siegel et al., *Training sparse neural networks using compressed
      sensing*, 2020, use that code.
    """

    depth: int
    growth: int = 12
    num_classes: int = 10
    width: float = 1.0
    dtype: Any = None
    implementation: str | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits (batch, num_classes) of ``images`` (batch, height, width, channels)."""
        if self.depth < 7 or (self.depth - 4) % 3:
            raise ValueError(f"DenseNet's depth is 3 n + 4 for n >= 1 layers per block, got {self.depth}")
        if self.growth < 1:
            raise ValueError(f"DenseNet's growth is an int >= 1, got {self.growth}")
        check_images(images, 4, "DenseNet")
        conv = partial(
            Conv, use_bias=False, dtype=self.dtype, kernel_init=he_normal("fan_out"), implementation=self.implementation
        )
        norm = partial(BatchNorm, dtype=self.dtype, scale_init=nn.initializers.constant(0.5), axis_name=self.axis_name)
        growth = scaled(self.growth, self.width)
        x = conv(2 * growth, 3, padding=1, name="conv1")(images)
        for block in (1, 2, 3):
            for i in range(1, (self.depth - 4) // 3 + 1):
                x = jnp.concatenate([x, _Layer(growth, 3, conv, norm, name=f"block{block}_{i}")(x)], axis=-1)
            if block < 3:
                x = _average_pool_2(_Layer(x.shape[-1], 1, conv, norm, name=f"transition{block}")(x))
        x = nn.relu(norm(name="bn")(x)).mean((1, 2))
        return dense(x, self.num_classes, name="fc", dtype=self.dtype)


class DenseNet40(DenseNet):
    """DenseNet-40, the :class:`DenseNet` of depth 40."""

    depth: int = 40


class _Layer(nn.Module):
    """Batch normalisation, ReLU, and a convolution that keeps the size of the image."""

    features: int
    kernel_size: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.norm(name="bn")(x))
        return self.conv(self.features, self.kernel_size, padding=self.kernel_size // 2, name="conv")(x)


def _average_pool_2(x: jax.Array) -> jax.Array:
    height, width = x.shape[1] // 2, x.shape[2] // 2
    x = x[:, : 2 * height, : 2 * width]  # an odd last row or column is dropped, as in PyTorch
    return x.reshape(x.shape[0], height, 2, width, 2, x.shape[3]).mean((2, 4))
