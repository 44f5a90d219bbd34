"""Residual networks: narrow ones for CIFAR images, the smallest that of MLPerf Tiny, and ResNet-18, -34 and -50."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxsparse.models.blocks import BatchNorm, check_images, dense, he_normal, no_norm, scaled
from jaxsparse.models.layers import Conv, max_pool

__all__ = ["ResNet8", "ResNet18", "ResNet20", "ResNet34", "ResNet50", "ResNet56", "ResNetCIFAR"]


class ResNetCIFAR(nn.Module):
    """The CIFAR network of the ResNet paper: depth 20 has 269,722 parameters, depth 56 has 853,018.

    A 3 x 3 convolution, three stages of (depth - 2) / 6 basic blocks with 16, 32 and 64 channels, the mean of all
    pixels, a dense layer. Shortcuts have no parameters (option A of the paper): at the start of a stage they keep every
    second pixel and add channels of zeros, half of them before the others and half after. With ``project`` they are
    1 x 1 convolutions with batch normalisation there (option B), as in Dep-L0. Kernels start from
    N(0, sqrt(2 / fan_in)), the dense layer's bias from U(-1/sqrt(fan_in), 1/sqrt(fan_in)). The model returns logits.

    Training and evaluation: if the collection ``"batch_stats"`` is mutable, batch normalisation uses the statistics of
    the batch and updates the running ones; otherwise it uses the running ones.

    Attributes:
      depth: number of layers with kernels, 6 n + 2 for n >= 1 blocks per stage.
      num_classes: number of logits, int >= 1.
      width: factor of all hidden channel numbers, which are rounded and at least 1.
      project: whether shortcuts that change the shape have parameters.
      inner: channels inside each block, ints >= 1; None: those of its stage. A network whose blocks lost channels by
        pruning can be rebuilt like this.
      dtype: dtype of the computation and of the logits; None promotes input and parameters. Parameters and batch
        statistics are float32.
      implementation: form of the convolutions, as in :func:`jaxsparse.models.layers.conv`; None chooses the fastest.
      axis_name: named axis of devices over which batch statistics are averaged; with None each device uses its own.
      zero_init: whether each block starts as its shortcut alone, because the scale of its last batch normalisation
        starts from 0 (Goyal et al., 2017, section 5.1).
      batch_norm: whether convolutions are followed by batch normalisation, and not by a bias alone, as
        :func:`fold_batch_norm` leaves them.

    Raises:
      ValueError: for any other depth, and if the input is not (batch, height, width, channels) or smaller than 4 x 4.

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
      networks using compressed sensing*, 2020, use. Goyal et al., *Accurate, large minibatch SGD: Training
      ImageNet in 1 hour*, 2017 (arXiv:1706.02677).
    """

    depth: int
    num_classes: int = 10
    width: float = 1.0
    project: bool = False
    inner: Sequence[int] | None = None
    dtype: Any = None
    implementation: str | None = None
    axis_name: str | None = None
    zero_init: bool = False
    batch_norm: bool = True

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits (batch, num_classes) of ``images`` (batch, height, width, channels)."""
        if self.depth < 8 or (self.depth - 2) % 6:
            raise ValueError(f"ResNetCIFAR's depth is 6 n + 2 for n >= 1 blocks per stage, got {self.depth}")
        init = he_normal("fan_in")
        conv, norm, x = _begin(self, images, init, smallest=4)
        x = conv(scaled(16, self.width), 3, padding=1, name="conv1")(x)
        x = nn.relu(norm(name="bn1")(x))
        block = partial(_Block, project=self.project, conv=conv, norm=norm, zero_init=self.zero_init)
        times = (self.depth - 2) // 6
        x = _stages(x, block, (16, 32, 64), [times] * 3, self.width, _inner(self, 3 * times))
        return dense(x, self.num_classes, name="fc", dtype=self.dtype, kernel_init=init)

    def inner_widths(self) -> tuple[int, ...]:
        """The number of channels inside each block."""
        stages = [scaled(n, self.width) for n in (16, 32, 64) for _ in range((self.depth - 2) // 6)]
        return tuple(stages if self.inner is None else self.inner)


class ResNet20(ResNetCIFAR):
    """ResNet-20, the :class:`ResNetCIFAR` of depth 20."""

    depth: int = 20


class ResNet56(ResNetCIFAR):
    """ResNet-56, the :class:`ResNetCIFAR` of depth 56."""

    depth: int = 56


class ResNet8(nn.Module):
    """ResNet-8 of the benchmark MLPerf Tiny, for CIFAR images: 78,186 parameters and 480 batch statistics.

    A 3 x 3 convolution, three basic blocks with 16, 32 and 64 channels, the mean of all pixels, a dense layer:
    12,501,632 multiply-adds an image. As in Keras, all convolutions have biases, padding is "SAME", and batch
    normalisation keeps 0.99 of its statistics and adds 0.001 to variances. The shortcuts of the second and third block
    are 1 x 1 convolutions without batch normalisation. Kernels start from N(0, sqrt(2 / fan_in)), truncated at two
    standard deviations, biases from 0. The model returns logits.

    (The network with 8 layers of the ResNet paper is ``ResNetCIFAR(8)``.)

    Training and evaluation: if the collection ``"batch_stats"`` is mutable, batch normalisation uses the statistics of
    the batch and updates the running ones; otherwise it uses the running ones.

    Attributes:
      num_classes: number of logits, int >= 1.
      width: factor of all hidden channel numbers, which are rounded and at least 1.
      inner: channels inside each block, 3 ints >= 1; None: those of its stage. A network whose blocks lost channels by
        pruning can be rebuilt like this.
      epsilon: what batch normalisation adds to variances.
      dtype: dtype of the computation and of the logits; None promotes input and parameters. Parameters and batch
        statistics are float32.
      implementation: form of the convolutions, as in :func:`jaxsparse.models.layers.conv`; None chooses the fastest.
      axis_name: named axis of devices over which batch statistics are averaged; with None each device uses its own.
      batch_norm: whether convolutions are followed by batch normalisation, and not by a bias alone, as
        :func:`fold_batch_norm` leaves them.

    Raises:
      ValueError: if the input is not (batch, height, width, channels) or smaller than 4 x 4.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxsparse import models
      >>> variables = jax.eval_shape(models.ResNet8().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
      >>> {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in sorted(variables.items())}
      {'batch_stats': 480, 'params': 78186}

    References:
      Banbury et al., *MLPerf Tiny Benchmark*, 2021 (arXiv:2106.07597), whose reference reaches 87.0% on CIFAR-10:
      https://github.com/mlcommons/tiny, ``benchmark/training/image_classification/keras_model.py``.
    """

    num_classes: int = 10
    width: float = 1.0
    inner: Sequence[int] | None = None
    epsilon: float = 1e-3
    dtype: Any = None
    implementation: str | None = None
    axis_name: str | None = None
    batch_norm: bool = True

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits (batch, num_classes) of ``images`` (batch, height, width, channels)."""
        init = nn.initializers.he_normal()
        conv, norm, x = _begin(self, images, init, smallest=4)
        conv, norm = partial(conv, use_bias=True), partial(norm, momentum=0.99, epsilon=self.epsilon)
        x = conv(scaled(16, self.width), 3, name="conv1")(x)
        x = nn.relu(norm(name="bn1")(x))
        block = partial(_Block, project=True, normalise_shortcut=False, padding="SAME", conv=conv, norm=norm)
        x = _stages(x, block, (16, 32, 64), (1, 1, 1), self.width, _inner(self, 3))
        return dense(
            x, self.num_classes, name="fc", dtype=self.dtype, kernel_init=init, bias_init=nn.initializers.zeros_init()
        )

    def inner_widths(self) -> tuple[int, ...]:
        """The number of channels inside each block."""
        return tuple([scaled(n, self.width) for n in (16, 32, 64)] if self.inner is None else self.inner)


class ResNet18(nn.Module):
    """ResNet-18, with a stem for small images (11,173,962 parameters) or for ImageNet (11,689,512 with 1000 classes).

    The stem, four stages of two basic blocks with 64, 128, 256 and 512 channels, the mean of all pixels, a dense layer.
    The stem "small" is a 3 x 3 convolution with strides 1 and no max-pool; "imagenet" is a 7 x 7 convolution
    with strides 2 and a 3 x 3 max-pool with strides 2, as in torchvision. At the start of stages 2 to 4 the shortcut is
    a 1 x 1 convolution with batch normalisation. Convolutions start from N(0, sqrt(2 / fan_out)), the dense layer
    from U(-1/sqrt(fan_in), 1/sqrt(fan_in)). The model returns logits.

    Training and evaluation: if the collection ``"batch_stats"`` is mutable, batch normalisation uses the statistics of
    the batch and updates the running ones; otherwise it uses the running ones.

    Attributes:
      num_classes: number of logits, int >= 1.
      stem: "small" or "imagenet".
      width: factor of all hidden channel numbers, which are rounded and at least 1.
      blocks: basic blocks of each stage.
      dtype: dtype of the computation and of the logits; None promotes input and parameters. Parameters and batch
        statistics are float32.
      implementation: form of the convolutions, as in :func:`jaxsparse.models.layers.conv`; None chooses the fastest.
      axis_name: named axis of devices over which batch statistics are averaged; with None each device uses its own.
      zero_init: whether each block starts as its shortcut alone, because the scale of its last batch normalisation
        starts from 0 (Goyal et al., 2017, section 5.1).
      batch_norm: whether convolutions are followed by batch normalisation, and not by a bias alone, as
        :func:`fold_batch_norm` leaves them.

    Raises:
      ValueError: for an unknown stem, and if the input is not (batch, height, width, channels) or smaller than 8 x 8
        ("imagenet": 32 x 32).

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
      5f3ab13; Goyal et al., *Accurate, large minibatch SGD: Training ImageNet in 1 hour*, 2017 (arXiv:1706.02677).
    """

    num_classes: int = 10
    stem: str = "small"
    width: float = 1.0
    blocks: Sequence[int] = (2, 2, 2, 2)
    dtype: Any = None
    implementation: str | None = None
    axis_name: str | None = None
    zero_init: bool = False
    batch_norm: bool = True

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits (batch, num_classes) of ``images`` (batch, height, width, channels)."""
        if self.stem not in ("small", "imagenet"):
            raise ValueError(f"{type(self).__name__}'s stem is 'small' or 'imagenet', got {self.stem!r}")
        small = self.stem == "small"
        conv, norm, x = _begin(self, images, he_normal("fan_out"), smallest=8 if small else 32)
        stem = {"kernel_size": 3, "padding": 1} if small else {"kernel_size": 7, "strides": 2, "padding": 3}
        x = conv(scaled(64, self.width), name="conv1", **stem)(x)
        x = nn.relu(norm(name="bn1")(x))
        if not small:
            x = max_pool(x, 3, strides=2, padding=1, implementation=self.implementation)
        block = partial(_Block, project=True, conv=conv, norm=norm, zero_init=self.zero_init)
        x = _stages(x, block, (64, 128, 256, 512), self.blocks, self.width, [(None,)] * sum(self.blocks))
        return dense(x, self.num_classes, name="fc", dtype=self.dtype)


class ResNet34(ResNet18):
    """ResNet-34, as :class:`ResNet18` with 3, 4, 6, 3 blocks: 21,797,672 parameters for ImageNet with its stem."""

    blocks: Sequence[int] = (3, 4, 6, 3)


class ResNet50(nn.Module):
    """ResNet-50 for ImageNet: 25,557,032 parameters.

    A 7 x 7 convolution with strides 2, a 3 x 3 max-pool with strides 2, four stages of 3, 4, 6 and 3 bottleneck blocks
    (1 x 1, 3 x 3 with the strides, 1 x 1 to four times the channels), the mean of all pixels, a dense layer. At
    the start of a stage, the shortcut is a 1 x 1 convolution with batch normalisation. Convolutions start from
    N(0, sqrt(2 / fan_out)), the dense layer from U(-1/sqrt(fan_in), 1/sqrt(fan_in)). The model returns logits.

    Training and evaluation: if the collection ``"batch_stats"`` is mutable, batch normalisation uses the statistics of
    the batch and updates the running ones; otherwise it uses the running ones.

    Attributes:
      num_classes: number of logits, int >= 1.
      width: factor of all hidden channel numbers, which are rounded and at least 1.
      inner: channels of the first and of the second convolution of each block, 32 ints >= 1; None: those of its stage.
        A network whose blocks lost channels by pruning can be rebuilt like this.
      dtype: dtype of the computation and of the logits; None promotes input and parameters. Parameters and batch
        statistics are float32.
      implementation: form of the convolutions, as in :func:`jaxsparse.models.layers.conv`; None chooses the fastest.
      axis_name: named axis of devices over which batch statistics are averaged; with None each device uses its own.
      zero_init: whether each block starts as its shortcut alone, because the scale of its last batch normalisation
        starts from 0 (Goyal et al., 2017, section 5.1).
      batch_norm: whether convolutions are followed by batch normalisation, and not by a bias alone, as
        :func:`fold_batch_norm` leaves them.

    Raises:
      ValueError: if the input is not (batch, height, width, channels) or smaller than 32 x 32.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxsparse import models
      >>> variables = jax.eval_shape(models.ResNet50().init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
      >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      25557032

    References:
      He et al., *Deep residual learning for image recognition*, 2016; strides in the 3 x 3 convolution as in
      torchvision and Dep-L0; Goyal et al., *Accurate, large minibatch SGD: Training ImageNet in 1 hour*, 2017
      (arXiv:1706.02677).
    """

    num_classes: int = 1000
    width: float = 1.0
    inner: Sequence[int] | None = None
    dtype: Any = None
    implementation: str | None = None
    axis_name: str | None = None
    zero_init: bool = False
    batch_norm: bool = True

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits (batch, num_classes) of ``images`` (batch, height, width, channels)."""
        conv, norm, x = _begin(self, images, he_normal("fan_out"), smallest=32)
        x = conv(scaled(64, self.width), 7, strides=2, padding=3, name="conv1")(x)
        x = nn.relu(norm(name="bn1")(x))
        x = max_pool(x, 3, strides=2, padding=1, implementation=self.implementation)
        block = partial(_Bottleneck, conv=conv, norm=norm, zero_init=self.zero_init)
        x = _stages(x, block, (64, 128, 256, 512), (3, 4, 6, 3), self.width, _inner(self, 16, 2))
        return dense(x, self.num_classes, name="fc", dtype=self.dtype)

    def inner_widths(self) -> tuple[int, ...]:
        """Channels of the first and of the second convolution of each block."""
        stages = zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True)
        widths = [scaled(n, self.width) for n, times in stages for _ in range(2 * times)]
        return tuple(widths if self.inner is None else self.inner)


def _begin(model, images: jax.Array, kernel_init, smallest: int):
    """The layers of a model, convolution and batch normalisation, and its images after a check."""
    check_images(images, smallest, type(model).__name__)
    conv = partial(
        Conv,
        use_bias=not model.batch_norm,
        dtype=model.dtype,
        kernel_init=kernel_init,
        implementation=model.implementation,
    )
    norm = BatchNorm if model.batch_norm else no_norm
    return conv, partial(norm, dtype=model.dtype, axis_name=model.axis_name), images


def _inner(model, blocks: int, each: int = 1) -> Sequence[Sequence[int | None]]:
    """The attribute ``inner`` by blocks."""
    if model.inner is None:
        return [(None,) * each] * blocks
    if len(model.inner) != blocks * each or min(model.inner) < 1:
        raise ValueError(
            f"{type(model).__name__} needs {blocks * each} inner channel numbers >= 1, got {len(model.inner)}: "
            f"{tuple(model.inner)}"
        )
    return [model.inner[i : i + each] for i in range(0, blocks * each, each)]


def _stages(x, block, channels: Sequence[int], blocks: Sequence[int], width: float, inner) -> jax.Array:
    """Features (batch, channels) in front of a ResNet's dense layer: the blocks, and the mean of all pixels."""
    numbers = iter(inner)
    for stage, (features, times) in enumerate(zip(channels, blocks, strict=True), 1):
        for i in range(1, times + 1):
            strides = 2 if stage > 1 and i == 1 else 1
            x = block(scaled(features, width), strides, next(numbers), name=f"block{stage}_{i}")(x)
    return x.mean((1, 2))


def _last_scale(block) -> nn.initializers.Initializer:
    """The initial scale of a block's last batch normalisation."""
    return nn.initializers.zeros_init() if block.zero_init else nn.initializers.ones_init()


class _Block(nn.Module):
    """Two 3 x 3 convolutions, added to the block's input."""

    features: int
    strides: int
    inner: Sequence[int | None]  # channels between the convolutions
    project: bool  # whether a shortcut that changes the shape has parameters
    conv: Any
    norm: Any
    zero_init: bool = False
    normalise_shortcut: bool = True
    padding: int | str = 1

    @nn.compact
    def __call__(self, x):
        wide, padding = self.inner[0] or self.features, self.padding
        y = self.conv(wide, 3, strides=self.strides, padding=padding, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y))
        y = self.conv(self.features, 3, padding=padding, name="conv2")(y)
        y = self.norm(name="bn2", scale_init=_last_scale(self))(y)
        if x.shape == y.shape:
            return nn.relu(x + y)
        if self.project:
            x = self.conv(self.features, 1, strides=self.strides, padding=0, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_bn")(x) if self.normalise_shortcut else x
        else:
            added = self.features - x.shape[-1]
            x = x[:, :: self.strides, :: self.strides]
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (added // 2, added - added // 2)))
        return nn.relu(x + y)


class _Bottleneck(nn.Module):
    """A 1 x 1, a 3 x 3 and a 1 x 1 convolution to four times the channels, added to the block's input."""

    features: int
    strides: int
    inner: Sequence[int | None]  # channels after the first and the second convolution
    conv: Any
    norm: Any
    zero_init: bool = False

    @nn.compact
    def __call__(self, x):
        y = self.conv(self.inner[0] or self.features, 1, padding=0, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y))
        y = self.conv(self.inner[1] or self.features, 3, strides=self.strides, padding=1, name="conv2")(y)
        y = nn.relu(self.norm(name="bn2")(y))
        y = self.conv(4 * self.features, 1, padding=0, name="conv3")(y)
        y = self.norm(name="bn3", scale_init=_last_scale(self))(y)
        if x.shape != y.shape:
            x = self.conv(4 * self.features, 1, strides=self.strides, padding=0, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_bn")(x)
        return nn.relu(x + y)
