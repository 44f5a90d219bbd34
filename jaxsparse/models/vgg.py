"""The VGG networks for which papers on sparse training and pruning report CIFAR results."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from flax import linen as nn

from jaxsparse.models.blocks import BatchNorm, check_images, conv_bn_relu, dense, he_normal, no_norm, scaled
from jaxsparse.models.layers import max_pool

__all__ = ["VGG"]

_CHANNELS = (64, 128, 256, 512, 512)  # of the convolutions of each block
_UNITS = 512  # of each hidden dense layer

_DEPTHS = {"11": (1, 1, 2, 2, 2), "13": (2, 2, 2, 2, 2), "16": (2, 2, 3, 3, 3), "19": (2, 2, 4, 4, 4)}
# Convolutions per block, hidden dense layers, and whether the mean of all pixels replaces the last max-pool.
_VARIANTS = {
    "C": (_DEPTHS["16"], 2, False),
    "D": (_DEPTHS["16"], 2, False),
    "like": (_DEPTHS["16"], 1, False),
    **{depth: (blocks, 0, False) for depth, blocks in _DEPTHS.items()},
    **{f"{depth}_bn": (blocks, 0, True) for depth, blocks in _DEPTHS.items()},
}


class VGG(nn.Module):
    """VGG with batch normalisation, in the variants of SNIP and sparse momentum, of xRDA, and of Dep-L0 and ASNI.

    Five blocks of 3 x 3 convolutions, each convolution with bias, batch normalisation and ReLU, each block followed by
    a max-pool. Then

    - "C", "D" and "like": two hidden dense layers (one in "like") of 512 units, each followed by ReLU and then batch
      normalisation. In "C" the last convolution of blocks 3 to 5 is 1 x 1, with a padding of 1 as in the authors' code:
      images grow by two pixels there, and 2 x 2 pixels reach the first dense layer. All kernels and biases
      start from U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
    - "11", "13", "16" and "19" (Dep-L0, ASNI): no hidden dense layer. Convolutions start from N(0, sqrt(2 / fan_out)),
      their biases from 0, the last layer from U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
    - "11_bn", "13_bn", "16_bn" and "19_bn" (xRDA): no max-pool after the last block, but the mean of all pixels, and
      no hidden dense layer. Convolutions start from N(0, sqrt(2 / fan_in)), the last layer from N(0, 0.01), biases
      from 0.

    The model returns logits.

    Training and evaluation: if the collection ``"batch_stats"`` is mutable, batch normalisation uses the statistics of
    the batch and updates the running ones; otherwise it uses the running ones.

    Attributes:
      variant: "C", "D", "like", "11", "13", "16", "19", "11_bn", "13_bn", "16_bn" or "19_bn".
      num_classes: number of logits, int >= 1.
      features: channels of every convolution and then units of every hidden dense layer, in network order, ints >= 1;
        None: the papers' numbers. A network that lost channels by pruning can be rebuilt like this.
      width: factor of the papers' channel and unit numbers, which are rounded and at least 1. Has no effect if
        ``features`` is given.
      dtype: dtype of the computation and of the logits; None promotes input and parameters. Parameters and batch
        statistics are float32.
      implementation: form of convolution and max-pool, as in :func:`jaxsparse.models.layers.conv`; None chooses the
        fastest.
      axis_name: named axis of devices over which batch statistics are averaged; with None each device uses its own.
      batch_norm: whether there is batch normalisation; without it the model is as :func:`fold_batch_norm` leaves it.

    Raises:
      ValueError: for an unknown variant, for ``features`` that are not one per hidden layer, and if the input is not
        (batch, height, width, channels) or smaller than 32 x 32 (16 x 16 for the variants "_bn").

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxsparse import models
      >>> model = models.VGG("16_bn", features=[8] * 13)
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
      >>> {name: variables["params"][name]["kernel"].shape for name in ("conv1", "conv13", "fc1")}
      {'conv1': (3, 3, 3, 8), 'conv13': (3, 3, 8, 8), 'fc1': (8, 10)}

    References:
      Simonyan and Zisserman, *Very deep convolutional networks for large-scale image recognition*, 2015; Dettmers and
      Zettlemoyer, *Sparse networks from scratch*, 2019, ``VGG16`` in https://github.com/TimDettmers/sparse_learning at
      e19ff16; Siegel et al., *Training sparse neural networks using compressed sensing*, 2020, ``models/vgg.py`` in
      https://github.com/dmaywald/xrda-sparse-training at 5f3ab13; Li and Ji, *Dep-L0*, 2021.
    """

    variant: str = "D"
    num_classes: int = 10
    features: Sequence[int] | None = None
    width: float = 1.0
    dtype: Any = None
    implementation: str | None = None
    axis_name: str | None = None
    batch_norm: bool = True

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits (batch, num_classes) of ``images`` (batch, height, width, channels)."""
        if self.variant not in _VARIANTS:
            raise ValueError(f"VGG's variant is one of {tuple(_VARIANTS)}, got {self.variant!r}")
        blocks, hidden, pooled = _VARIANTS[self.variant]
        check_images(images, 16 if pooled else 32, f"VGG({self.variant!r})")
        features = iter(self.widths())

        norm = partial(BatchNorm if self.batch_norm else no_norm, dtype=self.dtype, axis_name=self.axis_name)
        layer = partial(
            conv_bn_relu,
            dtype=self.dtype,
            implementation=self.implementation,
            axis_name=self.axis_name,
            batch_norm=self.batch_norm,
        )
        if not hidden:
            init = he_normal("fan_in" if pooled else "fan_out")
            layer = partial(layer, kernel_init=init, bias_init=nn.initializers.zeros_init())
        x, number = images, 0
        for block, convolutions in enumerate(blocks):
            for i in range(convolutions):
                number += 1
                kernel_size = 1 if self.variant == "C" and i == 2 else 3
                x = layer(x, next(features), kernel_size, number=number)
            if not (pooled and block == len(blocks) - 1):
                x = max_pool(x, 2, implementation=self.implementation)

        if pooled:
            last = {"kernel_init": nn.initializers.normal(0.01), "bias_init": nn.initializers.zeros_init()}
            return dense(x.mean((1, 2)), self.num_classes, name="fc1", dtype=self.dtype, **last)
        x = x.reshape(x.shape[0], -1)
        for i in range(1, hidden + 1):
            x = nn.relu(dense(x, next(features), name=f"fc{i}", dtype=self.dtype))
            x = norm(name=f"bn{number + i}")(x)
        return dense(x, self.num_classes, name=f"fc{hidden + 1}", dtype=self.dtype)

    def widths(self) -> Sequence[int]:
        """The channels of every convolution, then the units of every hidden dense layer."""
        blocks, hidden, _ = _VARIANTS[self.variant]
        if self.features is None:
            numbers = [n for n, times in zip(_CHANNELS, blocks, strict=True) for _ in range(times)] + [_UNITS] * hidden
            return [scaled(n, self.width) for n in numbers]
        if len(self.features) != sum(blocks) + hidden or min(self.features) < 1:
            raise ValueError(
                f"VGG({self.variant!r}) needs features >= 1 for each of its {sum(blocks)} convolutions and {hidden} "
                f"hidden dense layers, got {len(self.features)}: {tuple(self.features)}"
            )
        return self.features


def convolutions_and_hidden(variant: str) -> tuple[int, int]:
    """The numbers of convolutions and of hidden dense layers of a variant of :class:`VGG`."""
    blocks, hidden, _ = _VARIANTS[variant]
    return sum(blocks), hidden
