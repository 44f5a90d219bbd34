"""Warnings name the line of the user."""

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxsparse

PARAMS = {"conv": {"kernel": jnp.ones((3, 3, 4, 6))}, "fc": {"kernel": jnp.ones((10, 6))}}


@pytest.mark.parametrize("act", [
    lambda: jaxsparse.random_masks(PARAMS, 0.5, structure=jaxsparse.n_of_m(2, 4, ragged="warn")),
    lambda: jaxsparse.chain(optax.sgd(0.1), jaxsparse.rigl(0.999, 2, stop_at=4)).init(PARAMS),
    lambda: optax.chain(optax.sgd(0.1), jaxsparse.rigl(0.999, 2, stop_at=4)).init(PARAMS),
])  # fmt: skip
def test_the_line_that_called_is_named(act):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    assert caught
    assert {(warning.filename, warning.category) for warning in caught} == {(__file__, UserWarning)}


def test_of_what_is_traced_it_is_the_line_in_the_users_function():
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), jaxsparse.sparse_momentum(0.5, 2))
    state = tx.init(PARAMS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.jit(lambda grads: tx.update(grads, state, PARAMS)).lower(PARAMS)
    assert [warning.filename for warning in caught] == [__file__]
