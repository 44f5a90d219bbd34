"""Weights times their mask, with the gradient that a method asks for."""

import jax
import jax.numpy as jnp

__all__ = ["masked_weights"]


@jax.custom_vjp
def masked_weights(weights: jax.Array, mask: jax.Array, dense_weight_grad: jax.Array) -> jax.Array:
    """Multiply weights by their mask: dead ones are 0, even where they are NaN.

    Args:
      weights: floats.
      mask: bool, of their shape.
      dense_weight_grad: bool scalar array: whether dead weights get the gradient of a dense layer, else 0.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> w, mask = jnp.array([1.0, 2.0]), jnp.array([True, False])
      >>> masked_weights(w, mask, jnp.array(False)).tolist()
      [1.0, 0.0]
      >>> jax.grad(lambda w: masked_weights(w, mask, jnp.array(True)).sum())(w).tolist()
      [1.0, 1.0]
    """
    del dense_weight_grad
    return jnp.where(mask, weights, jnp.zeros_like(weights))


def _forward(weights, mask, dense):
    return masked_weights(weights, mask, dense), (mask, dense)


def _backward(residuals, gradient):
    mask, dense = residuals
    return jnp.where(mask | dense, gradient, jnp.zeros_like(gradient)), None, None


masked_weights.defvjp(_forward, _backward)
