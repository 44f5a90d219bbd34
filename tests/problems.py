"""Small problems that the tests share: params of every kind, gradients, one training step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest


def make_params(dtype=jnp.float32, seed=0):
    """A convolution, two matrices, biases of one and two dimensions, a scalar."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))

    def normal(*shape):
        return jax.random.normal(next(keys), shape).astype(dtype)

    return {
        "attention": {"bias": normal(2, 8), "kernel": normal(16, 2, 8)},
        "conv": {"bias": normal(8), "kernel": normal(3, 3, 2, 8)},
        "dense": {"bias": normal(24), "kernel": normal(16, 24)},
        "temperature": normal(),
    }


SPARSE = ("attention/kernel", "conv/kernel", "dense/kernel")
SPARSE_SIZE = 16 * 2 * 8 + 3 * 3 * 2 * 8 + 16 * 24


def gradients(params, count=0):
    """Dense gradients that differ from step to step, elementwise in the params: equal bits in every layout."""
    wave = jnp.sin(jnp.asarray(count, jnp.float32) + 1)

    def gradient(path, p):
        rows = jax.lax.broadcasted_iota(jnp.int32, (*p.shape, 1), 0)[..., 0]
        pattern = ((rows * 7919 + len(str(path))) % 13 - 6).astype(jnp.float32) / 16
        return (0.5 * p.astype(jnp.float32) + wave * pattern + 0.25).astype(p.dtype)

    return jax.tree_util.tree_map_with_path(gradient, params)


def make_step(tx, donate=False):
    """The user's training step, jitted."""

    def step(params, opt_state, count):
        updates, opt_state = tx.update(gradients(params, count), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(step, donate_argnums=(0, 1) if donate else ())


def slow_except(quick, parameters, long=()):
    """The parameters of a test, of which only the quick ones run in ``make test``, and the others with the slow tests.

    Those that are ``long`` run with neither, but with ``-m long``.
    """

    def marked(x):
        mark = pytest.mark.long if x in long else pytest.mark.slow
        return x if x in quick else pytest.param(*(x if isinstance(x, tuple) else (x,)), marks=mark)

    return [marked(x) for x in parameters]


def jit_once(function):
    """``jax.jit``, for which a second trace fails: what the calls differ in must not make it compile again."""
    traced = []

    @functools.wraps(function)
    def once(*args):
        traced.append(args)
        assert len(traced) == 1, f"compiled anew: first for {signature(traced[0])}, then for {signature(args)}"
        return function(*args)

    return jax.jit(once)


def signature(tree):
    """Structure, shapes, dtypes and weak types: what decides whether a second call recompiles."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.shape, x.dtype, getattr(x, "weak_type", False)) for x in leaves]


def bits(tree):
    """The leaves as NumPy arrays, typed PRNG keys as their data."""

    def read(x):
        return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

    return [read(x) for x in jax.tree.leaves(tree)]
