"""Least squares under a mask: against NumPy, by hand, and never worse than what came in."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.post_training import reconstruct, sparsegpt
from tests.post_training.problems import correlated, moments_of, output_error


def masks(shape):
    """A mask that keeps 4 of 10 weights, of the first output none and of the second all."""
    mask = np.random.default_rng(3).random(shape) < 0.4
    mask[:, 0], mask[:, 1] = False, True
    return jnp.asarray(mask)


def test_it_is_the_least_squares_solution():
    kernel, rows = correlated(inputs=16, outputs=7, rows=64)
    mask = masks(kernel.shape)
    found = reconstruct(kernel, moments_of(rows).second, mask, damping=0.0)
    rows, kernel, mask, expected = *(np.asarray(x) for x in (rows, kernel, mask)), np.zeros(kernel.shape)
    for j in range(7):
        expected[mask[:, j], j] = np.linalg.lstsq(rows[:, mask[:, j]], rows @ kernel[:, j])[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_chunks_traced_masks_and_float64_change_nothing(monkeypatch):
    kernel, rows = correlated(inputs=16, outputs=7, rows=64)
    gram = moments_of(rows).second
    mask = masks(kernel.shape)
    found = reconstruct(kernel, gram, mask)
    module = importlib.import_module("jaxsparse.post_training.reconstruct")
    monkeypatch.setattr(module, "_ENTRIES", 2 * 16**2)  # two at a time, and one is left
    np.testing.assert_allclose(jax.jit(reconstruct)(kernel, gram, mask), found, rtol=1e-4, atol=1e-5)
    assert not found[~mask].any()
    with jax.enable_x64(True):
        precise = reconstruct(np.asarray(kernel, np.float64), gram, mask)
        assert precise.dtype == jnp.float64
        np.testing.assert_allclose(precise, found, rtol=1e-3, atol=1e-4)


def test_the_error_in_the_outputs_only_falls():
    kernel, rows = correlated(inputs=16, outputs=7, rows=64)
    gram = moments_of(rows).second
    for sparsity in (0.3, 0.8):
        pruned, mask = (np.asarray(x) for x in sparsegpt(kernel, gram, sparsity))
        found = np.asarray(reconstruct(kernel, gram, mask))
        dense = np.asarray(kernel)
        before, after = output_error(pruned, dense, rows), output_error(found, dense, rows)
        assert after < before < output_error(np.where(mask, dense, 0), dense, rows)
        for j in range(7):  # of each output, but for rounding
            one = output_error(found[:, j], dense[:, j], rows)
            assert one <= output_error(pruned[:, j], dense[:, j], rows) * 1.001 + 1e-6 * before


def test_damping_keeps_weights_nearer_to_what_they_were():
    kernel, rows = correlated(inputs=16, outputs=7, rows=64)
    gram, mask = moments_of(rows).second, masks(kernel.shape)
    found = [np.asarray(reconstruct(kernel, gram, mask, damping=d)) for d in (1e-4, 0.01, 1.0, 100.0)]
    changes = [np.sum(np.where(mask, weights - kernel, 0) ** 2) for weights in found]
    assert changes == sorted(changes, reverse=True)
    assert changes[-1] < 0.01 * changes[0]


def test_inputs_that_never_fire_and_masks_that_keep_nothing():
    kernel, rows = correlated(inputs=16, outputs=7, rows=64)
    gram = moments_of(rows.at[:, 4].set(0)).second
    mask = jnp.ones_like(kernel, bool).at[0].set(False)
    np.testing.assert_array_equal(reconstruct(kernel, gram, mask)[4], kernel[4])
    np.testing.assert_array_equal(reconstruct(kernel, jnp.zeros_like(gram), mask), jnp.where(mask, kernel, 0))
    assert not reconstruct(kernel, gram, jnp.zeros_like(mask)).any()


def test_a_gram_matrix_that_is_not_positive_definite():
    kernel, rows = correlated(inputs=16, outputs=7, rows=4)
    gram, mask = moments_of(rows).second, jnp.abs(kernel) > 0.5
    with pytest.warns(UserWarning, match="gram is not positive definite with damping 0, so"):
        found = reconstruct(kernel, gram, mask, damping=0.0)
    assert bool(jnp.isfinite(found).all())
    with pytest.raises(ValueError, match="gram cannot be made positive definite"):
        reconstruct(kernel, gram.at[1, 1].set(jnp.inf), mask)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"mask must be bool of the kernel's shape \(3, 2\), got float32 of \(3, 2\)"):
        reconstruct(jnp.ones((3, 2)), jnp.eye(3), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r"gram must be .* expected floats of shape \(3, 3\)"):
        reconstruct(jnp.ones((3, 2)), jnp.ones(3), jnp.ones((3, 2), bool))
    with pytest.raises(ValueError, match="damping must be a number >= 0, got nan"):
        reconstruct(jnp.ones((3, 2)), jnp.eye(3), jnp.ones((3, 2), bool), damping=float("nan"))
