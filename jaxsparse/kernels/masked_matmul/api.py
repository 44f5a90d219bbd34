"""The public functions: products of features with masked weights."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxsparse.kernels.masked_matmul.block_info import block_info, live_tiles
from jaxsparse.kernels.masked_matmul.config import Config
from jaxsparse.kernels.masked_matmul.manual_axes import vary_together
from jaxsparse.kernels.masked_matmul.ops import backend, product

__all__ = ["block_sparse_matmul", "masked_matmul"]

IMPLEMENTATIONS = ("xla", "xla_blocks", "mosaic_tpu", "mosaic_gpu", "interpret")
DTYPES = ("float32", "bfloat16", "float16")


def masked_matmul(
    x: ArrayLike,
    w: ArrayLike,
    mask: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    dense_weight_grad: bool | jax.Array = False,
    precision: jax.lax.PrecisionLike = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""Multiply by masked weights, ``x @ (w * mask) + bias``, with gradients, for masks of single weights.

    .. math::
       y = x (w \odot m), \qquad
       \frac{\partial L}{\partial x} = \frac{\partial L}{\partial y} (w \odot m)^T, \qquad
       \frac{\partial L}{\partial w} = \Big( x^T \frac{\partial L}{\partial y} \Big) \odot m

    On TPUs, a kernel applies the mask to each tile of the weights after fetching it, so that memory holds no masked
    copy, and skips tiles without weights; on other devices XLA's dense product takes a masked copy. Accumulates in
    float32. The mask has no gradient.

    Args:
      x: (..., inputs), float32, bfloat16 or float16.
      w: (inputs, outputs), one of the same dtypes; if they differ, both are promoted.
      mask: (inputs, outputs), bool. Weights where it is False are ignored, even NaN.
      bias: (outputs,), added to the result.
      dense_weight_grad: whether the gradient of ``w`` is that of a dense layer, for methods that grow weights by their
        gradients. A bool, or a bool scalar array that depends on the step: only steps with True compute it.
      precision: as for :func:`jax.numpy.matmul`.
      out_dtype: dtype of the result, one of the same; None: the one to which x and w promote. With bfloat16 operands
        and float32 here, the sums are not rounded, as with ``preferred_element_type`` of :func:`jax.lax.dot_general`;
        gradients have the dtypes of x and w. ("mosaic_gpu" multiplies 16 bits: it rounds the result's gradient to the
        operands' dtype first, so with float16 keep it in range, as loss scaling does.)
      implementation: "xla" (a dense product with a masked copy), "mosaic_tpu", "mosaic_gpu" (Hopper), "interpret" (the
        TPU kernel in Pallas' interpreter, for tests); None: "mosaic_tpu" on TPUs, "xla" elsewhere.

    Returns:
      (..., outputs), with the dtype to which x and w promote, or ``out_dtype``.

    Raises:
      ValueError: for shapes that do not contract, a mask that is not bool or does not have the shape of ``w``, and an
        unknown implementation; at compile time, for an implementation that cannot run on the device.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> x, w = jnp.ones((2, 3)), jnp.ones((3, 4))
      >>> mask = jnp.arange(12).reshape(3, 4) % 2 == 0
      >>> masked_matmul(x, w, mask)[0].tolist()
      [3.0, 0.0, 3.0, 0.0]
      >>> jax.grad(lambda w: masked_matmul(x, w, mask).sum())(w)[0].tolist()
      [2.0, 0.0, 2.0, 0.0]

    .. warning::
      On a mesh, call it inside ``jax.shard_map``, because XLA does not divide kernels among devices. Second derivatives
      and forward-mode derivatives are not defined.
    """
    x, w, bias = _checked(x, w, bias, "masked_matmul")
    mask = jnp.asarray(mask)
    if mask.shape != w.shape or mask.dtype != jnp.bool_:
        raise ValueError(f"masked_matmul needs a bool mask of the shape of w, {w.shape}, got {_described(mask)}")
    if implementation == "xla_blocks":
        raise ValueError("implementation='xla_blocks' is for masks of blocks: block_sparse_matmul")
    config, dense = _config(implementation, None, x, w, precision, dense_weight_grad, out_dtype)
    return _multiply(x, w, mask, None, bias, dense, config)


def block_sparse_matmul(
    x: ArrayLike,
    w: ArrayLike,
    block_mask: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    block: tuple[int, int] | None = None,
    dense_weight_grad: bool | jax.Array = False,
    precision: jax.lax.PrecisionLike = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""Multiply by block-sparse weights, ``x @ (w * mask) + bias``, with gradients, skipping dead blocks.

    As :func:`masked_matmul` with ``mask[i, j] = block_mask[i // rows, j // columns]``, but the work is proportional to
    the number of live blocks in all three products: y, and the gradients of x and w. The live blocks may change from
    call to call without recompilation. Accumulates in float32.

    Args:
      x: (..., inputs), float32, bfloat16 or float16.
      w: (inputs, outputs), one of the same dtypes.
      block_mask: (rows of blocks, columns of blocks), bool, such as ``structures.block(64, 64).units(mask)``.
      bias: (outputs,), added to the result.
      block: (rows, columns) of a block; the last ones may extend over the edges of ``w``. None: blocks that divide
        ``w`` evenly. The kernels support sides that divide 128 (on a GPU: 64) or are multiples of it.
      dense_weight_grad: as for :func:`masked_matmul`.
      precision: as for :func:`jax.numpy.matmul`.
      out_dtype: as for :func:`masked_matmul`.
      implementation: "xla_blocks" (a loop over the live blocks), "xla" (the dense product with a masked copy),
        "mosaic_tpu", "mosaic_gpu" (Hopper, 16-bit floats), "interpret" (the TPU kernel in Pallas' interpreter, for
        tests); None: "mosaic_tpu" on TPUs if it supports the blocks, "xla_blocks" on CPUs, "xla" elsewhere.

    Returns:
      (..., outputs), with the dtype to which x and w promote, or ``out_dtype``.

    Raises:
      ValueError: for shapes that do not contract, a mask whose blocks do not cover ``w``, blocks that the chosen
        implementation does not support, and an unknown implementation; at compile time, for an implementation that
        cannot run on the device.

    Examples:
      >>> import jax.numpy as jnp
      >>> x, w = jnp.ones((2, 4)), jnp.ones((4, 6))
      >>> block_sparse_matmul(x, w, jnp.array([[True, False], [True, True]]))[0].tolist()
      [4.0, 4.0, 4.0, 2.0, 2.0, 2.0]

    .. warning::
      The same as for :func:`masked_matmul`.
    """
    x, w, bias = _checked(x, w, bias, "block_sparse_matmul")
    live = jnp.asarray(block_mask)
    if live.ndim != 2 or live.dtype != jnp.bool_ or 0 in live.shape:
        raise ValueError(f"block_sparse_matmul needs a bool matrix as block_mask, got {_described(live)}")
    block = _block(block, live.shape, w.shape)
    config, dense = _config(implementation, block, x, w, precision, dense_weight_grad, out_dtype)
    parts = [side // of_tile for side, of_tile in zip(block, config.tile, strict=True)]
    if config.implementation == "xla" or any(side % of_tile for side, of_tile in zip(block, config.tile, strict=True)):
        return _multiply(x, w, _grown(live, block, w.shape), None, bias, dense, config)
    tiles = [-(-size // of_tile) for size, of_tile in zip(w.shape, config.tile, strict=True)]
    return _multiply(x, w, None, _grown(live, parts, tiles), bias, dense, config)


def _grown(mask: jax.Array, repeats: Sequence[int], shape: Sequence[int]) -> jax.Array:
    """Repeat every entry of a mask along both axes, and cut the result off at a shape."""
    return jnp.repeat(jnp.repeat(mask, repeats[0], 0), repeats[1], 1)[: shape[0], : shape[1]]


def _checked(x: Any, w: Any, bias: Any, who: str) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    x, w = jnp.asarray(x), jnp.asarray(w)
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"{who} needs x (..., inputs) and w (inputs, outputs), got {x.shape} and {w.shape}")
    dtype = jnp.result_type(x, w)
    if dtype.name not in DTYPES:
        raise ValueError(f"{who} takes {', '.join(DTYPES)}, got {x.dtype} and {w.dtype}")
    if bias is not None:
        bias = jnp.asarray(bias)
        if bias.shape != w.shape[1:]:
            raise ValueError(f"{who} needs a bias of shape {w.shape[1:]}, got {bias.shape}")
    return x.astype(dtype), w.astype(dtype), bias


def _described(array: jax.Array) -> str:
    return f"{array.dtype} of shape {array.shape}"


def _block(block: Any, blocks: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    if block is None:
        if any(size % count for size, count in zip(shape, blocks, strict=True)):
            raise ValueError(f"{blocks[0]} x {blocks[1]} blocks do not divide w of shape {shape} evenly: pass block=")
        return shape[0] // blocks[0], shape[1] // blocks[1]
    rows, columns = block
    if rows < 1 or columns < 1:
        raise ValueError(f"the sides of a block must be at least 1, got {block}")
    needed = (-(-shape[0] // rows), -(-shape[1] // columns))
    if blocks != needed:
        raise ValueError(
            f"w of shape {shape} has {needed[0]} x {needed[1]} blocks of {rows} x {columns}, got block_mask {blocks}"
        )
    return int(rows), int(columns)


def _config(implementation, block, x, w, precision, dense, out_dtype) -> tuple[Config, jax.Array | None]:
    """The static settings, and the traced flag for dense gradients, if it is traced."""
    traced = None if isinstance(dense, bool) else jnp.asarray(dense)
    if traced is not None and (traced.shape != () or traced.dtype != jnp.bool_):
        raise ValueError(f"dense_weight_grad must be a bool or a bool scalar, got {_described(traced)}")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation must be one of {list(IMPLEMENTATIONS)} or None, got {implementation!r}")
    out = x.dtype if out_dtype is None else jnp.dtype(out_dtype)
    if out.name not in DTYPES:
        raise ValueError(f"out_dtype must be one of {', '.join(DTYPES)}, got {out}")
    chosen = implementation or default_implementation(block, x.dtype)
    interpret = chosen == "interpret"
    tile, at_once = block or (max(1, w.shape[0]), max(1, w.shape[1])), 1
    if interpret or chosen in ("mosaic_tpu", "mosaic_gpu"):
        chosen = "mosaic_tpu" if interpret else chosen
        kernel = backend(chosen)
        tile = kernel.choose_tile(block, w.shape, x.dtype)
        at_once = kernel.choose_rows(tile, math.prod(x.shape[:-1]), x.dtype.itemsize, out.itemsize)
    config = Config(chosen, tile, at_once, precision, interpret, None if traced is not None else bool(dense), out.name)
    return config, traced


def default_implementation(block: tuple[int, int] | None, dtype: jnp.dtype) -> str:
    """The implementation that ``None`` stands for here; "xla" is the dense product with a masked copy."""
    here = jax.default_backend()
    if here == "tpu" and backend("mosaic_tpu").why_not(block, dtype) is None:
        return "mosaic_tpu"
    return "xla_blocks" if here == "cpu" and block is not None else "xla"


def _multiply(x, w, mask, live, bias, dense, config):
    """Pad the arguments to whole tiles and cut the result; either ``mask`` has weights, or ``live`` has tiles."""
    x, w, mask, live, bias, dense = vary_together([x, w, mask, live, bias, dense])
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    outputs = w.shape[1]
    if 0 in flat.shape or 0 in w.shape:
        y = jnp.zeros((flat.shape[0], outputs), config.out_dtype)
    elif config.implementation == "xla":
        y = product(flat, w, mask, None, dense, config)
    else:
        live = live_tiles(mask, config.tile) if live is None else live
        info = block_info(live, visit_empty=config.implementation == "mosaic_tpu")
        padded = [_whole(flat, (config.rows, config.tile[0])), _whole(w, config.tile)]
        padded.append(None if mask is None else _whole(mask, config.tile))
        y = product(*padded, info, dense, config)[: flat.shape[0], :outputs]
    y = y if bias is None else y + bias.astype(y.dtype)[None]
    return y.reshape(*x.shape[:-1], outputs)


def _whole(array: jax.Array, tile: tuple[int, int]) -> jax.Array:
    """Pad an array with zeros (False) to whole tiles."""
    widths = [(0, -size % side) for size, side in zip(array.shape, tile, strict=True)]
    return jnp.pad(array, widths) if any(after for _, after in widths) else array
