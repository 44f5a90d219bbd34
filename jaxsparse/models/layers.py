"""Convolution and max-pooling in the form that is fastest on the current device.

XLA's CPU backend has a fast convolution for images of the layout (batch, height, width, channels) and kernels (height,
width, channels, features) alone. The derivatives that JAX makes have others, and in a loop (``lax.scan``) take up to a
hundred times as long; written as convolutions of that layout too, they are as fast. For kernels of one pixel, and for
images of a few, shifted slices of the image and one matrix product are faster.

A max-pool written as a reshape is faster too, and faster still is one matrix product for all positions of a pooling
window. All forms are ordinary differentiable JAX, so the choice only affects speed.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import dtypes
from jax import lax

__all__ = ["IMPLEMENTATIONS", "Conv", "conv", "conv_max_pool", "fan_in_uniform", "max_pool", "output_size"]

IMPLEMENTATIONS = ("xla", "nhwc", "slices")

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[int | Sequence[int]] = "SAME",
    implementation: str | None = None,
) -> jax.Array:
    """Two-dimensional convolution (cross-correlation, as in all deep-learning libraries).

    The ``"slices"`` form puts kernel height x kernel width shifted copies of the image side by side and multiplies
    once, so it briefly holds that many copies of its input. The ``"nhwc"`` form is ``lax.conv_general_dilated`` with
    gradients that are convolutions of images (batch, height, width, channels) too.

    Args:
      x: images, (batch, height, width, channels).
      kernel: weights, (kernel height, kernel width, channels, features), of the dtype of ``x``.
      strides: one int >= 1, or one for each of height and width.
      padding: "VALID" (none), "SAME" (output = input / stride, rounded up), an int >= 0 for all four sides, or a pair
        for height and width whose members are an int or a pair (before, after).
      implementation: "xla" is ``lax.conv_general_dilated``; "nhwc" the same with derivatives for a CPU; "slices" is
        shifted slices and one matrix product. None chooses "xla" unless ``jax.default_backend()`` is the CPU; there
        "nhwc" for float32 and images from 8 x 8, if the kernel is more than one pixel, and "slices" for the others.

    Returns:
      (batch, new height, new width, features), the dtype of ``x``. The forms differ only by rounding.

    Raises:
      ValueError: for an unknown implementation or padding, for shapes or dtypes that do not match, and if the
        kernel does not fit in the padded image.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxsparse.models.layers import conv
      >>> conv(jnp.ones((1, 3, 3, 1)), jnp.ones((2, 2, 1, 1)), padding="VALID")[0, :, :, 0]
      Array([[4., 4.],
             [4., 4.]], dtype=float32)
    """
    chosen = _pick(implementation)
    _check_images(x, "conv")
    _check_kernel(kernel, x, "conv")
    kernel_size, strides = kernel.shape[:2], _pair(strides, "strides")
    padding = _explicit_padding(padding, x.shape[1:3], kernel_size, strides)
    out_size = _output_size(x.shape[1:3], kernel_size, strides, padding)

    if implementation is None and chosen == "slices" and _is_large(x, kernel_size):
        chosen = "nhwc"
    if chosen == "nhwc":
        return _conv_nhwc(x, kernel, strides, tuple(padding))
    if chosen == "xla":
        return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_LAYOUT)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    # The last row a kernel offset of i reads is i + (outputs - 1) * stride; the slice ends behind it.
    ends = [(size - 1) * stride + 1 for size, stride in zip(out_size, strides, strict=True)]
    patches = jnp.concatenate(
        [
            x[:, i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]]
            for i in range(kernel_size[0])
            for j in range(kernel_size[1])
        ],
        axis=-1,
    )
    return patches @ kernel.reshape(-1, kernel.shape[3])


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _conv_nhwc(x, kernel, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_LAYOUT)


@_conv_nhwc.defjvp
def _conv_nhwc_jvp(strides, padding, primals, tangents):
    """Two convolutions of which the transposes, the gradients, have the layout of :data:`_LAYOUT`."""
    (x, kernel), (dx, dkernel) = primals, tangents
    along_x = lax.conv_general_dilated(
        dx, kernel.swapaxes(2, 3), strides, padding, dimension_numbers=("NHWC", "HWOI", "NHWC")
    )
    # Its transpose takes the channels of x for a batch, its batch for channels, and the outputs' gradient for a kernel.
    along_kernel = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0), dkernel.transpose(2, 0, 1, 3), strides, padding,
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
    )  # fmt: skip
    return _conv_nhwc(x, kernel, strides, padding), along_x + along_kernel.transpose(2, 0, 1, 3)


def max_pool(
    x: jax.Array,
    window: int | Sequence[int] = 2,
    *,
    strides: int | Sequence[int] | None = None,
    padding: str | int | Sequence[int | Sequence[int]] = "VALID",
    implementation: str | None = None,
) -> jax.Array:
    """The largest value of each window of an image.

    Args:
      x: images, (batch, height, width, channels), float.
      window: one int >= 1, or one for each of height and width.
      strides: as ``window``; None means the window itself, so that windows do not overlap.
      padding: as in :func:`conv`; padding is never the maximum.
      implementation: "xla" is ``lax.reduce_window``; "slices" and "nhwc" are a reshape and a maximum if windows tile
        the image exactly, and ``lax.reduce_window`` for all other windows; None chooses "slices" on a CPU.

    Returns:
      (batch, new height, new width, channels), the dtype of ``x``, bit-equal in both forms.

    Raises:
      ValueError: for an unknown implementation or padding, for images that are not float, and if the window does not
        fit in the padded image.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxsparse.models.layers import max_pool
      >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0]
      Array([[ 5.,  7.],
             [13., 15.]], dtype=float32)

    .. warning::
      If several positions of a window share the maximum, "xla" sends the gradient to the first of them and the others
      divide it equally among them. Both are subgradients.
    """
    implementation = _pick(implementation)
    _check_images(x, "max_pool")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"max_pool needs float images, got {x.dtype}")
    window = _pair(window, "window")
    strides = window if strides is None else _pair(strides, "strides")
    padding = _explicit_padding(padding, x.shape[1:3], window, strides)
    height, width = _output_size(x.shape[1:3], window, strides, padding)

    tiles = strides == window and (height * window[0], width * window[1]) == x.shape[1:3] and not any(map(any, padding))
    if implementation != "xla" and tiles:
        return x.reshape(x.shape[0], height, window[0], width, window[1], x.shape[3]).max(axis=(2, 4))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, *window, 1), (1, *strides, 1), ((0, 0), *padding, (0, 0)))


def conv_max_pool(
    x: jax.Array,
    kernel: jax.Array,
    window: int | Sequence[int] = 2,
    *,
    padding: str | int | Sequence[int | Sequence[int]] = "SAME",
    implementation: str | None = None,
) -> jax.Array:
    """Convolution and max-pool in one matrix product: ``max_pool(conv(x, kernel, padding=padding), window)``.

    The ``"slices"`` form computes the outputs of one pooling window side by side: a convolution whose strides are the
    window, with a copy of the kernel for each position in it, shifted by that position and padded with zeros. It
    multiplies more zeros, but needs far fewer copies of the image (36 / 4 = 9 instead of 25 for a 5 x 5 kernel and a
    2 x 2 window) and has wider matrices. On a CPU that is faster.

    Args:
      x: images, (batch, height, width, channels).
      kernel: weights, (kernel height, kernel width, channels, features), of the dtype of ``x``.
      window: the window of the max-pool, one int >= 1, or one for each of height and width. Windows do not overlap.
      padding: the padding of the convolution, as in :func:`conv`.
      implementation: "xla" and "nhwc" call the two in turn, and so does "slices" if windows do not tile the image;
        None chooses "slices" on a CPU, and "xla" elsewhere.

    Returns:
      (batch, new height, new width, features), the dtype of ``x``.

    Raises:
      ValueError: as :func:`conv` and :func:`max_pool`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxsparse.models.layers import conv_max_pool
      >>> image = jnp.arange(25.0).reshape(1, 5, 5, 1)
      >>> conv_max_pool(image, jnp.ones((2, 2, 1, 1)), 2, padding="VALID")[0, :, :, 0]
      Array([[36., 44.],
             [76., 84.]], dtype=float32)
    """
    implementation = _pick(implementation)
    _check_images(x, "conv_max_pool")
    _check_kernel(kernel, x, "conv_max_pool")
    window = _pair(window, "window")
    padding = _explicit_padding(padding, x.shape[1:3], kernel.shape[:2], (1, 1))
    padded = [size + sum(pads) for size, pads in zip(x.shape[1:3], padding, strict=True)]
    rests = [(size - k + 1) % w for size, k, w in zip(padded, kernel.shape[:2], window, strict=True)]
    if implementation != "slices" or any(rests):
        y = conv(x, kernel, padding=padding, implementation=implementation)
        return max_pool(y, window, implementation=implementation)

    # Kernel and image are cut into cells of the size of the window, the cells' pixels made channels: strides become 1.
    cells = [-(-(k + w - 1) // w) for k, w in zip(kernel.shape[:2], window, strict=True)]
    rests = [n * w - k for n, k, w in zip(cells, kernel.shape[:2], window, strict=True)]
    shifted = [
        jnp.pad(kernel, ((i, rests[0] - i), (j, rests[1] - j), (0, 0), (0, 0)))
        for i in range(window[0])
        for j in range(window[1])
    ]
    features = kernel.shape[3]
    kernel = jnp.concatenate(shifted, axis=-1)
    kernel = kernel.reshape(cells[0], window[0], cells[1], window[1], -1, kernel.shape[-1])
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(*cells, -1, kernel.shape[-1])
    x = jnp.pad(x, ((0, 0), *((a, b + -n % w) for (a, b), n, w in zip(padding, padded, window, strict=True)), (0, 0)))
    x = x.reshape(x.shape[0], x.shape[1] // window[0], window[0], x.shape[2] // window[1], window[1], x.shape[3])
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], x.shape[1], x.shape[3], -1)
    y = conv(x, kernel, padding="VALID", implementation="slices")
    return y.reshape(*y.shape[:3], -1, features).max(axis=3)


class Conv(nn.Module):
    """A convolution layer with the parameters of ``nn.Conv`` and the choice of forms of :func:`conv`.

    Parameter names, shapes and initial values are those of ``nn.Conv``: ``kernel`` (kernel height, kernel width,
    channels, features) and ``bias`` (features,), float32 unless ``param_dtype`` says otherwise, so each layer can
    load the other's weights.

    Attributes:
      features: number of filters, int >= 1.
      kernel_size: (height, width) of a filter, or one int for both.
      strides: as in :func:`conv`.
      padding: as in :func:`conv`.
      max_pool: window of a max-pool after the convolution (:func:`conv_max_pool`, needs strides 1); None for none. An
        increasing function such as ReLU can be applied after it with the same result.
      use_bias: whether to add a bias.
      dtype: dtype of the computation and of the output; None promotes input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernel.
      bias_init: initialiser of the bias.
      implementation: as in :func:`conv`.

    Raises:
      ValueError: as :func:`conv`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxsparse.models.layers import Conv
      >>> layer = Conv(features=8, kernel_size=3)
      >>> params = layer.init(jax.random.key(0), jnp.ones((1, 5, 5, 2)))
      >>> jax.tree.map(jnp.shape, params)
      {'params': {'bias': (8,), 'kernel': (3, 3, 2, 8)}}
      >>> layer.apply(params, jnp.ones((4, 5, 5, 2))).shape
      (4, 5, 5, 8)
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] = 1
    padding: str | int | Sequence[int | Sequence[int]] = "SAME"
    max_pool: int | Sequence[int] | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Features (batch, new height, new width, features) of images ``x`` (batch, height, width, channels)."""
        _check_images(x, "Conv")
        shape = (*_pair(self.kernel_size, "kernel_size"), x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        x, kernel, bias = dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        if self.max_pool is None:
            y = conv(x, kernel, strides=self.strides, padding=self.padding, implementation=self.implementation)
        elif _pair(self.strides, "strides") == (1, 1):
            y = conv_max_pool(x, kernel, self.max_pool, padding=self.padding, implementation=self.implementation)
        else:
            raise ValueError(f"Conv with max_pool={self.max_pool} needs strides 1, got {self.strides}")
        return y if bias is None else y + bias.reshape(1, 1, 1, -1)


def fan_in_uniform(fan_in: int) -> nn.initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for kernel and bias of dense and convolution layers.

    Args:
      fan_in: number of inputs of one output, int >= 1. It is an argument because the shape of a bias does not show it.

    Returns:
      An initialiser ``(key, shape, dtype) -> array``.

    Raises:
      ValueError: if ``fan_in`` is below 1.

    Examples:
      >>> import jax
      >>> from jaxsparse.models.layers import fan_in_uniform
      >>> bias = fan_in_uniform(4)(jax.random.key(0), (1000,))
      >>> bool(abs(bias).max() <= 0.5)
      True
    """
    if fan_in < 1:
        raise ValueError(f"fan_in_uniform needs fan_in >= 1, got {fan_in}")
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def output_size(
    size: Sequence[int],
    kernel_size: int | Sequence[int],
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[int | Sequence[int]] = "SAME",
) -> tuple[int, int]:
    """Height and width of the result of :func:`conv` for an image of a given height and width; arguments as there.

    Examples:
      >>> output_size((28, 28), 5, padding="VALID")
      (24, 24)
    """
    window, strides = _pair(kernel_size, "kernel_size"), _pair(strides, "strides")
    return _output_size(size, window, strides, _explicit_padding(padding, size, window, strides))


def _pick(implementation: str | None) -> str:
    if implementation is None:
        return "slices" if jax.default_backend() == "cpu" else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is None or one of {IMPLEMENTATIONS}, got {implementation!r}")
    return implementation


def _is_large(x: jax.Array, kernel_size: tuple[int, ...]) -> bool:
    """Whether XLA's own convolution is the faster one on a CPU; of images of 2 x 2 it is a hundred times slower."""
    return x.dtype == jnp.float32 and min(x.shape[1:3]) >= 8 and max(kernel_size) > 1


def _check_images(x: jax.Array, caller: str) -> None:
    if x.ndim != 4:
        raise ValueError(f"{caller} needs images of shape (batch, height, width, channels), got {x.shape}")


def _check_kernel(kernel: jax.Array, x: jax.Array, caller: str) -> None:
    if kernel.ndim != 4 or kernel.shape[2] != x.shape[3]:
        raise ValueError(
            f"{caller} needs a kernel of shape (height, width, {x.shape[3]}, features) for images of shape {x.shape}, "
            f"got {kernel.shape}"
        )
    if kernel.dtype != x.dtype:
        raise ValueError(f"{caller} needs images and kernel of one dtype, got {x.dtype} and {kernel.dtype}")


def _pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name} is an int >= 1, or two of them for height and width, got {value!r}")
    return pair


def _explicit_padding(padding, size, window, strides) -> list[tuple[int, int]]:
    """((top, bottom), (left, right)) for each way of specifying a padding."""
    if padding in ("SAME", "VALID"):
        return lax.padtype_to_pads(size, window, strides, padding)
    sides = (padding, padding) if isinstance(padding, int) else padding
    try:
        pairs = [(side, side) if isinstance(side, int) else (int(side[0]), int(side[1])) for side in sides]
    except (TypeError, ValueError, IndexError):
        pairs = []
    if isinstance(padding, str) or len(pairs) != 2 or min(map(min, pairs)) < 0:
        raise ValueError(
            "padding is 'SAME', 'VALID', an int >= 0, or a pair for height and width whose members are an int or a "
            f"pair (before, after); got {padding!r}"
        )
    return pairs


def _output_size(size, window, strides, padding) -> tuple[int, int]:
    padded = tuple(n + before + after for n, (before, after) in zip(size, padding, strict=True))
    if padded[0] < window[0] or padded[1] < window[1]:
        raise ValueError(
            f"a window of {window} does not fit in an image of {padded} (height and width, padding included)"
        )
    return tuple((n - w) // s + 1 for n, w, s in zip(padded, window, strides, strict=True))
