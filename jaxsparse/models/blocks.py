"""Parts that the models share: batch normalisation, layers with PyTorch's initial values, checks."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from jaxsparse.models.layers import Conv, fan_in_uniform

__all__ = ["BatchNorm", "check_features", "check_images", "conv_bn_relu", "dense", "he_normal", "no_norm", "scaled"]


class BatchNorm(nn.BatchNorm):
    """``nn.BatchNorm`` with PyTorch's constants, which trains if ``apply`` makes batch statistics mutable.

    If the collection ``"batch_stats"`` is mutable, it normalises with mean and variance of the batch and updates the
    running ones (but not in ``init``); otherwise it normalises with the running ones. Statistics are float32 for every
    ``dtype``. The running variance is the average of the batches' biased variances, by which the batches are divided;
    PyTorch averages the unbiased ones, which are n / (n - 1) times as large for n values per channel.

    Attributes:
      momentum: share of the running statistics that an update keeps (1 minus PyTorch's ``momentum``).
      dtype: dtype of the output; None promotes input and parameters.
      axis_name: named axis of devices (that of ``pmap``, ``shard_map`` or ``vmap``) over which the statistics of the
        batch are taken; None: each device takes its own. ``init`` and running statistics do not need the axis. All
        other attributes are those of ``nn.BatchNorm``.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxsparse.models.blocks import BatchNorm
      >>> x = jnp.array([[1.0], [3.0]])
      >>> variables = BatchNorm().init(jax.random.key(0), x)
      >>> y, updates = BatchNorm().apply(variables, x, mutable=["batch_stats"])
      >>> y[:, 0].round(3), updates["batch_stats"]["mean"].round(3)
      (Array([-1.,  1.], dtype=float32), Array([0.2], dtype=float32))
      >>> bool(jnp.allclose(BatchNorm().apply(variables, x), x, rtol=1e-3))  # the running mean is 0, the variance 1
      True
    """

    momentum: float = 0.9

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise every channel of ``x`` (..., channels)."""
        return super().__call__(x, use_running_average=not self.is_mutable_collection("batch_stats"))


def no_norm(**options: Any) -> Callable[[jax.Array], jax.Array]:
    """Nothing, in place of :class:`BatchNorm` where it is folded into a layer."""
    return lambda x: x


def he_normal(mode: str) -> nn.initializers.Initializer:
    """N(0, sqrt(2 / fan)), not truncated, with the "fan_in" (inputs of a unit) or "fan_out" of a kernel.

    The fan of a convolution includes its k x k positions: k * k * inputs, or k * k * outputs.
    """
    return nn.initializers.variance_scaling(2.0, mode, "normal")


def dense(
    x: jax.Array,
    features: int,
    *,
    name: str,
    dtype: Any = None,
    kernel_init: nn.initializers.Initializer | None = None,
    bias_init: nn.initializers.Initializer | None = None,
) -> jax.Array:
    """A dense layer; initialisers that are None are PyTorch's, U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    default = fan_in_uniform(x.shape[-1])
    layer = nn.Dense(
        features, dtype=dtype, kernel_init=kernel_init or default, bias_init=bias_init or default, name=name
    )
    return layer(x)


def conv_bn_relu(
    x: jax.Array,
    features: int,
    kernel_size: int = 3,
    *,
    number: int,
    strides: int = 1,
    padding: int = 1,
    kernel_init: nn.initializers.Initializer | None = None,
    bias_init: nn.initializers.Initializer | None = None,
    dtype: Any = None,
    implementation: str | None = None,
    axis_name: str | None = None,
    batch_norm: bool = True,
) -> jax.Array:
    """A convolution with bias, batch normalisation and ReLU: the layers "conv<number>" and "bn<number>".

    Initialisers that are None are PyTorch's, U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
    """
    default = fan_in_uniform(kernel_size**2 * x.shape[-1])
    layer = Conv(
        features,
        kernel_size,
        strides=strides,
        padding=padding,
        dtype=dtype,
        kernel_init=kernel_init or default,
        bias_init=bias_init or default,
        implementation=implementation,
        name=f"conv{number}",
    )
    norm = BatchNorm if batch_norm else no_norm
    return nn.relu(norm(dtype=dtype, axis_name=axis_name, name=f"bn{number}")(layer(x)))


def scaled(channels: int, width: float) -> int:
    """``channels * width``, rounded, at least 1."""
    return max(1, round(channels * width))


def check_images(images: jax.Array, smallest: int, model: str) -> None:
    """Raise a ValueError unless ``images`` are (batch, height, width, channels), at least ``smallest`` pixels wide."""
    if images.ndim != 4 or min(images.shape[1:3]) < smallest:
        raise ValueError(
            f"{model} needs images of shape (batch, height, width, channels), at least {smallest} x {smallest}, got "
            f"{images.shape}"
        )


def check_features(model: nn.Module, number: int) -> None:
    """Raise a ValueError unless the attribute ``features`` of a model holds this number of ints >= 1."""
    if len(model.features) != number or min(model.features) < 1:
        raise ValueError(
            f"{type(model).__name__} needs features >= 1 for each of its {number} hidden layers, got "
            f"{len(model.features)}: {tuple(model.features)}"
        )
