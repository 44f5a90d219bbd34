"""Wrappers with latent weights beside plain training as their papers have it, with a loss of its own derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsparse

INNERS = {
    "sgd": lambda: optax.sgd(0.3),
    "momentum": lambda: optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.1, momentum=0.9)),
    "adam": lambda: optax.adam(0.05),
}


def make_problem():
    """A network of two layers, its weights and a loss."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, y = jax.random.normal(keys[0], (16, 8)), jax.random.normal(keys[1], (16, 4))
    params = {
        "fc1": {"kernel": jax.random.normal(keys[2], (8, 12)) / 3, "bias": jnp.zeros((1, 12))},
        "fc2": {"kernel": jax.random.normal(keys[3], (12, 4)) / 3, "bias": jnp.zeros((1, 4))},
    }

    def loss(params):
        hidden = jnp.tanh(x @ params["fc1"]["kernel"] + params["fc1"]["bias"])
        return jnp.mean((hidden @ params["fc2"]["kernel"] + params["fc2"]["bias"] - y) ** 2)

    return params, loss


def compare(tx, inner, image, *, first=None, moves=None, steps=8, atol=1e-6):
    """Trains with the wrapper, and the latent weights by the gradient of loss(image(latent weights)).

    Args:
      tx: the wrapper.
      inner: the optimizer inside.
      image: from the latent weights of a kernel to what the loss sees, with the paper's derivative.
      first: the first params, from the first latent weights of a kernel. None: what ``sparsify`` gives.
      moves: (weights of a kernel, their update) -> the update that they take; None: the same.
      steps: how many.
      atol: how near latent weights and params are.
    """
    weights, loss = make_problem()

    def of_kernels(function, *trees):
        rest = [{name: layer["kernel"] for name, layer in tree.items()} for tree in trees]
        return {name: {**layer, "kernel": function(*(other[name] for other in rest))}
                for name, layer in trees[0].items()}  # fmt: skip

    @jax.jit
    def plainly(weights, state):
        grads = jax.grad(lambda w: loss(of_kernels(image, w)))(weights)
        updates, state = inner.update(grads, state, weights)
        if moves is not None:
            updates = of_kernels(lambda u, w: moves(w, u), updates, weights)
        weights = optax.apply_updates(weights, updates)
        return weights, state, of_kernels(image, weights)

    @jax.jit
    def wrapped(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    opt_state, state = tx.init(weights), inner.init(weights)
    params = jaxsparse.sparsify(opt_state, weights) if first is None else of_kernels(first, weights)
    flips = 0
    for _ in range(steps):
        params, opt_state = wrapped(params, opt_state)
        weights, state, seen = plainly(weights, state)
        jaxsparse.check(opt_state, params)
        flips += int(opt_state.flips)
        for name, layer in seen.items():
            np.testing.assert_allclose(opt_state.weights[name]["kernel"], weights[name]["kernel"], atol=atol)
            for part in layer:
                np.testing.assert_allclose(params[name][part], layer[part], atol=atol)
    assert flips > 0


def straight(image, pull=lambda g, w: g):
    """``image`` with the gradient (g, w) -> that of w in place of its own."""

    @jax.custom_vjp
    def function(w):
        return image(w)

    function.defvjp(lambda w: (image(w), w), lambda w, g: (pull(g, w),))
    return function


def in_groups(w, m):
    """Groups of m inputs: (inputs / m, m, outputs)."""
    return w.reshape(-1, m, w.shape[-1])


def ranks(w, axis):
    """The place of each magnitude along an axis, from 0 for the largest."""
    return jnp.argsort(jnp.argsort(-jnp.abs(w), axis=axis, stable=True), axis=axis)
