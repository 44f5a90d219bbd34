"""The part of a step that each device computes on its own part of the batch, and sums and means over the devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["AXIS", "local_gradients", "mean_over_devices", "split", "summed_over_devices"]

AXIS = "devices"


def local_gradients(loss_fn: Callable, accumulate: int) -> Callable:
    """(params, model_state, batch, common) -> (gradients, model_state, metrics), all of one device."""

    def local(params, model_state, batch, common):
        def part(model_state, batch):
            (_, (metrics, model_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                params, model_state, batch, common
            )
            return model_state, (grads, jax.tree.map(jnp.asarray, metrics))

        if accumulate == 1:
            model_state, (grads, metrics) = part(model_state, batch)
            return grads, model_state, metrics

        def body(carry, batch):
            model_state, sums = carry
            model_state, one = part(model_state, batch)
            return (model_state, jax.tree.map(lambda total, x: total + x.astype(total.dtype), sums, one)), None

        parts = jax.tree.map(lambda x: split(x, accumulate), batch)
        shapes = jax.eval_shape(part, model_state, jax.tree.map(lambda x: x[0], parts))[1]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, _sum_dtype(x.dtype)), shapes)
        (model_state, sums), _ = jax.lax.scan(body, (model_state, zeros), parts)
        grads, metrics = jax.tree.map(lambda x, like: _mean(x, accumulate, like.dtype), sums, shapes)
        return grads, model_state, metrics

    return local


def _sum_dtype(dtype: Any) -> Any:
    """Floats are summed in 32 bits at least: a sum of a few hundred in 16 no longer grows. Bools are counted."""
    if jnp.issubdtype(dtype, jnp.bool_):
        return np.int32
    return np.promote_types(dtype, np.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


def _mean(total: jax.Array, number: int, dtype: Any) -> jax.Array:
    return (total / number).astype(dtype) if jnp.issubdtype(dtype, jnp.floating) else total / number


def summed_over_devices(measure: Callable) -> Callable:
    """The function with its results summed over :data:`AXIS`."""

    def on_device(batch, common):
        return jax.lax.psum(measure(batch, common), AXIS)

    return on_device


def mean_over_devices(tree: Any) -> Any:
    """The mean over a leading axis of devices, in each leaf's own dtype; of bools, which have none, the first."""
    return jax.tree.map(lambda x: x[0] if x.dtype == bool else x.mean(0, dtype=x.dtype), tree)


def split(x: Any, parts: int) -> Any:
    """Split the first axis into equal parts: (examples, ...) -> (parts, examples / parts, ...).

    Raises:
      ValueError: if the parts cannot be equal.
    """
    if x.shape[0] % parts:
        raise ValueError(f"{x.shape[0]} examples cannot be split into {parts} equal parts")
    return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])
