"""Flax layers that compute with sparse weights, without multiplying pruned blocks.

They have the params of ``flax.linen.Dense`` and ``flax.linen.Conv``, and take the masks of :func:`jaxsparse.get_masks`
as a collection of variables:

    masks = jaxsparse.get_masks(opt_state, params)
    y = model.apply({"params": params, "masks": masks}, x)

Without masks they are dense layers. ``nn.scan`` and ``nn.vmap`` pass on the collections named in ``variable_axes`` and
slice all their leaves, which is impossible for the scalar masks of dense leaves. Leave these out there:

    Layers = nn.scan(Block, variable_axes={"params": 0, "masks": 0}, ...)
    y = model.apply({"params": params, "masks": mask_collection(masks)}, x)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import module as linen_module
from flax.linen.dtypes import promote_dtype

from jaxsparse.kernels import block_sparse_matmul, masked_matmul
from jaxsparse.kernels.masked_matmul.block_info import live_tiles
from jaxsparse.kernels.masked_weights import masked_weights

__all__ = ["SparseConv", "SparseDense", "mask_collection"]


def mask_collection(masks: Any) -> dict[str, Any]:
    """Keep only the masks of sparse leaves, so that ``nn.scan`` and ``nn.vmap`` can slice them.

    Layers treat a leaf without a mask as dense, the same as a leaf with the scalar True.

    Args:
      masks: nested dicts, as from :func:`jaxsparse.get_masks`: bool arrays, the scalar True for dense leaves.

    Returns:
      The dicts without the scalars, for ``model.apply({"params": params, "masks": ...}, x)``.

    Examples:
      >>> import jax.numpy as jnp
      >>> masks = {"layers": {"kernel": jnp.ones((3, 4, 4), bool), "bias": jnp.array(True)}, "scale": jnp.array(True)}
      >>> jax.tree.map(jnp.shape, mask_collection(masks))
      {'layers': {'kernel': (3, 4, 4)}}
    """
    kept: dict[str, Any] = {}
    for key, mask in masks.items():
        if isinstance(mask, Mapping):
            if inner := mask_collection(mask):
                kept[key] = inner
        elif jnp.ndim(mask) > 0:
            kept[key] = mask
    return kept


class SparseDense(nn.Module):
    """A dense layer with a mask, ``x @ (kernel * mask) + bias``, that can skip dead blocks.

    The mask is an argument, or "kernel" of this layer in the collection "masks", where the scalar True or a missing
    mask means dense. (Within jit any scalar does: its value is not known there.) With ``block``, a block is live if any
    of its weights is. Pruned weights in live blocks are not masked but expected to be zero, as all methods of jaxsparse
    leave them. So results are right for all masks, and masks of whole blocks are fast.

    Take :func:`jaxsparse.trace.sparse_apply` first: it runs any model on the same kernels, as it is. Take this layer in
    functions with derivatives of their own (``jax.custom_vjp``, as of reversible blocks), where ``sparse_apply`` leaves
    products dense, and in models that are to say themselves how each layer is multiplied.

    Attributes:
      features: number of outputs.
      use_bias: whether there is a bias.
      block: (rows, columns) of a block, as for ``structures.block``; None: masks of single weights.
      dtype: dtype of the computation; None: the dtype that the arguments promote to.
      param_dtype: dtype of the params.
      precision: as for :func:`jax.numpy.matmul`.
      kernel_init, bias_init: initializers.
      dense_weight_grad: whether pruned weights get gradients too, for methods that grow weights by their momentum.
        Without them, a step does not compute them for dead blocks: of its three products, that of the inputs with the
        outputs' gradients then skips those blocks too.
      implementation: as for :func:`jaxsparse.kernels.block_sparse_matmul` or :func:`~jaxsparse.kernels.masked_matmul`.

    Raises:
      ValueError: for a mask that is not bool or does not have the kernel's shape.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> layer, x = SparseDense(4, block=(2, 2)), jnp.ones((1, 4))
      >>> params = {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}
      >>> layer.apply({"params": params, "masks": {"kernel": jnp.eye(4, dtype=bool)}}, x)[0].tolist()
      [1.0, 1.0, 1.0, 1.0]
    """

    features: int
    use_bias: bool = True
    block: tuple[int, int] | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros_init()
    dense_weight_grad: bool = True
    implementation: str | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, *, dense_weight_grad: bool | jax.Array | None = None
    ) -> jax.Array:
        """Compute the layer's output.

        Args:
          x: (..., inputs).
          mask: (inputs, features), bool; None: the mask in the collection "masks".
          dense_weight_grad: overrides the attribute; may be a bool scalar array that differs between steps.
        """
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        mask = _mask(self, mask, kernel)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        dense = self.dense_weight_grad if dense_weight_grad is None else dense_weight_grad
        return _product(self, x, kernel, mask, bias, dense)


class SparseConv(nn.Module):
    """A convolution with a mask, which skips dead blocks if its kernel is 1 x 1.

    Masks are given as for :class:`SparseDense`. Kernels that are not 1 x 1 are masked, and XLA convolves.

    Attributes:
      features: number of outputs.
      kernel_size: size of the window, such as (3, 3).
      strides: strides of the window, or one for all its axes; None: 1.
      padding: "SAME", "VALID", an int for all sides, or an int or a pair of them for each axis.
      block: (rows, columns) of a block of inputs and outputs, for a 1 x 1 kernel.
      use_bias, dtype, param_dtype, precision, kernel_init, bias_init, dense_weight_grad, implementation: as in
        :class:`SparseDense`.

    Raises:
      ValueError: for a mask that is not bool or does not have the kernel's shape.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> layer, x = SparseConv(8, (1, 1), block=(2, 4)), jnp.ones((1, 5, 5, 4))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> masks = {"kernel": jnp.ones((1, 1, 4, 8), bool).at[..., 4:].set(False)}
      >>> layer.apply({**variables, "masks": masks}, x)[0, 0, 0, 4:].tolist()
      [0.0, 0.0, 0.0, 0.0]
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = None
    padding: Any = "SAME"
    block: tuple[int, int] | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros_init()
    dense_weight_grad: bool = True
    implementation: str | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, *, dense_weight_grad: bool | jax.Array | None = None
    ) -> jax.Array:
        """Compute the layer's output.

        Args:
          x: ``(batch, *window axes, inputs)``.
          mask: ``(*kernel_size, inputs, features)``, bool; None: the mask in the collection "masks".
          dense_weight_grad: overrides the attribute; may be a bool scalar array that differs between steps.
        """
        size = (self.kernel_size,) if isinstance(self.kernel_size, int) else tuple(self.kernel_size)
        inputs, given = x.shape[-1], 1 if self.strides is None else self.strides
        strides = (given,) * len(size) if isinstance(given, int) else tuple(given)
        padding = [self.padding] * len(size) if isinstance(self.padding, int) else self.padding
        if not isinstance(padding, str):
            padding = [(sides, sides) if isinstance(sides, int) else tuple(sides) for sides in padding]
        if x.ndim != len(size) + 2 or len(strides) != len(size):
            raise ValueError(
                f"SparseConv of kernel_size {size} and strides {strides} needs x (batch, {len(size)} axes, inputs), "
                f"got {x.shape}"
            )
        kernel = self.param("kernel", self.kernel_init, (*size, inputs, self.features), self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        mask = _mask(self, mask, kernel)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        dense = self.dense_weight_grad if dense_weight_grad is None else dense_weight_grad
        if set(size) == {1} and padding in ("SAME", "VALID"):
            x = x[(slice(None), *(slice(None, None, stride) for stride in strides))]
            flat_mask = None if mask is None else mask.reshape(inputs, self.features)
            return _product(self, x, kernel.reshape(inputs, self.features), flat_mask, bias, dense)
        if mask is not None:
            kernel = masked_weights(kernel, mask, jnp.asarray(dense))
        axes = "".join("HWD"[i] if i < 3 else str(i) for i in range(len(size)))
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
            precision=self.precision,
        )
        return _with_bias(y, bias)


def _mask(layer: nn.Module, mask: Any, kernel: jax.Array) -> jax.Array | None:
    """The mask of a layer's kernel; None for a dense one."""
    if mask is None and layer.has_variable("masks", "kernel"):
        mask = layer.get_variable("masks", "kernel")
    elif mask is None:
        _refuse_masks_left_outside(layer)
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.ndim == 0 and mask.dtype == bool and (isinstance(mask, jax.core.Tracer) or bool(mask)):
        return None
    if mask.shape != kernel.shape or mask.dtype != jnp.bool_:
        raise ValueError(
            f"the mask of {'/'.join([*layer.path, 'kernel'])} must be bool of its shape {kernel.shape}, "
            f"or True where it is dense, got {mask.dtype} of shape {mask.shape}"
        )
    return mask


def _refuse_masks_left_outside(layer: nn.Module) -> None:
    """Raise a ValueError if the model has a mask for the layer that a lifted transformation did not pass on."""
    first, *rest = path = (*layer.path, "kernel")
    stack = getattr(getattr(linen_module, "_context", None), "module_stack", ())  # the modules that are being called
    for root in {id(outer.scope.root): outer.scope.root for outer in stack if outer and outer.scope}.values():
        found = root.get_variable("masks", first)
        for key in rest:
            found = found.get(key) if isinstance(found, Mapping) else None
        if found is not None and jnp.ndim(found) > 0:
            raise ValueError(
                f"there is a mask for {'/'.join(path)}, but a transformation around {type(layer).__name__} does not "
                'pass it on: nn.scan and nn.vmap need variable_axes={"params": 0, "masks": 0}'
            )


def _product(layer: Any, x: Any, kernel: Any, mask: jax.Array | None, bias: Any, dense: bool | jax.Array) -> jax.Array:
    if mask is None:
        return _with_bias(jnp.matmul(x, kernel, precision=layer.precision), bias)
    how = {"dense_weight_grad": dense, "precision": layer.precision, "implementation": layer.implementation}
    if layer.block is None:
        return masked_matmul(x, kernel, mask, bias, **how)
    return block_sparse_matmul(x, kernel, live_tiles(mask, layer.block), bias, block=layer.block, **how)


def _with_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
