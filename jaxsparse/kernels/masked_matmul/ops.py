"""The product with its gradients, on padded arrays; :mod:`api` validates, chooses a backend and pads."""

import functools
import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jaxsparse.kernels.masked_matmul import xla_dense
from jaxsparse.kernels.masked_matmul.block_info import BlockInfo
from jaxsparse.kernels.masked_matmul.config import Config
from jaxsparse.kernels.masked_matmul.platforms import only_on

__all__ = ["backend", "product"]

_MODULES = {"xla": "xla_dense", "xla_blocks": "xla_blocks", "mosaic_tpu": "pallas_tpu", "mosaic_gpu": "pallas_gpu"}
_PLATFORMS = {"mosaic_tpu": "tpu", "mosaic_gpu": "cuda"}


def backend(implementation: str) -> ModuleType:
    """Import the module of a backend, when it is first used: Pallas is slow to import."""
    return importlib.import_module(f"{__package__}.{_MODULES[implementation]}")


@functools.partial(jax.jit, static_argnames="config")  # jitted, or eager calls would recompile a loop each time
def product(
    x: jax.Array, w: jax.Array, mask: jax.Array | None, info: BlockInfo | None, dense: jax.Array | None, config: Config
) -> jax.Array:
    """Compute ``x @ (w * mask)``, differentiable with respect to x and w.

    Args:
      x: (rows, inputs).
      w: (inputs, outputs), with the dtype of ``x``.
      mask: like ``w``, bool; None if the live tiles are the mask.
      info: the live tiles; None for a backend that only needs the mask.
      dense: bool scalar: whether the gradient of ``w`` is dense; None if ``config`` decides.
      config: the static settings.
    """
    return _product(x, w, mask, info, dense, config)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _product(x, w, mask, info, dense, config):
    del dense
    return _run("forward", config, jnp.dtype(config.out_dtype or x.dtype), x, w, mask, info)


def _forward(x, w, mask, info, dense, config):
    return _product(x, w, mask, info, dense, config), (x, w, mask, info, dense)


def _backward(config, residuals, dy):
    x, w, mask, info, dense = residuals

    def masked_gradient():
        return _run("backward_w", config, x.dtype, x, dy, mask, info)

    def dense_gradient():
        return xla_dense.backward_w(x, dy, None, None, config, x.dtype)

    if config.dense_weight_grad is None:
        dw = jax.lax.cond(dense, dense_gradient, masked_gradient)
    else:
        dw = dense_gradient() if config.dense_weight_grad else masked_gradient()
    return _run("backward_x", config, x.dtype, dy, w, mask, info), dw, None, None, None


_product.defvjp(_forward, _backward)


def _run(
    part: str, config: Config, dtype: Any, a: jax.Array, b: jax.Array, mask: jax.Array | None, info: Any
) -> jax.Array:
    """Compute one of the three products with the backend; under vmap, rows of all examples are multiplied at once."""

    def compute(a, b, mask, info):
        if config.implementation in _PLATFORMS and not config.interpret:
            a = only_on(_PLATFORMS[config.implementation], config.implementation, a)
        return getattr(backend(config.implementation), part)(a, b, mask, info, config, dtype)

    def batched(axis_size, in_batched, a, b, mask, info):
        args = (a, b, mask, info)
        if in_batched[0] and part != "backward_w" and not any(jax.tree.leaves(in_batched[1:])):
            out = run(a.reshape(-1, a.shape[-1]), b, mask, info)
            return out.reshape(axis_size, -1, out.shape[-1]), True
        # Each has its own weights or mask: one after another.
        leaves, treedef = jax.tree.flatten(args)
        flags = jax.tree.leaves(in_batched)

        def one(own):
            own = iter(own)
            each = [next(own) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]
            return run(*treedef.unflatten(each))

        return jax.lax.map(one, [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]), True

    run = custom_vmap(compute)
    run.def_vmap(batched)
    return run(a, b, mask, info)
