"""Weights by ADMM: against a plain loop in NumPy, budgets, and inputs that never fire."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse
from jaxsparse.post_training import admm_update, reconstruct
from tests.post_training.problems import correlated, moments_of, output_error


def plain(kernel, gram, sparsity, per_group=None):
    """The authors' loop in float64, with the sparsity of each iteration (which they have for outputs and groups)."""
    norm = np.sqrt(np.diag(gram)) + 1e-8
    gram, start = gram / norm[:, None] / norm, kernel * norm[:, None]
    gram = gram + 0.1 * np.mean(np.diag(gram)) * np.eye(len(gram))
    inverse, target = np.linalg.inv(gram + np.eye(len(gram))), gram @ start
    weights, dual, mask = start, np.zeros_like(start), None
    for i in range(20):
        if i < 15:
            now = sparsity - sparsity * (1 - (i + 1) / 15) ** 3
            scores = np.abs(weights + dual)
            if per_group:
                groups = scores.reshape(-1, per_group[1], scores.shape[1])
                order = np.argsort(-groups, axis=1)[:, : per_group[0]]
                np.put_along_axis(groups, order, np.inf, axis=1)
            mask = np.ones(scores.size, bool)
            mask[np.argsort(scores, axis=None)[: int(scores.size * now + 1e-6)]] = False
            mask = mask.reshape(scores.shape)
        left = (weights + dual) * mask
        dual = dual + weights - left
        weights = inverse @ (target + left - dual)
    return (weights + dual) * mask / norm[:, None]


@pytest.mark.parametrize("per_group", [None, (2, 4)])
def test_it_is_the_plain_loop(per_group):
    kernel, rows = correlated(16, 7, 64)
    gram = moments_of(rows).second
    structure = jaxsparse.n_of_m(*per_group) if per_group else "weight"
    pruned, mask = admm_update(kernel, gram, 0.5, structure=structure)
    expected = plain(np.asarray(kernel, np.float64), np.asarray(gram, np.float64), 0.5, per_group)
    np.testing.assert_array_equal(mask, expected != 0)
    np.testing.assert_allclose(pruned, expected, rtol=1e-3, atol=1e-4)
    if per_group:
        assert (np.sum(np.asarray(mask).reshape(4, 4, 7), 1) == 2).all()


@pytest.mark.parametrize("unit", [jaxsparse.n_of_m(1, 4), jaxsparse.n_of_m(2, 3), jaxsparse.n_of_m(4, 4)])
def test_groups_keep_n_of_m_in_any_matrix(unit):
    kernel, rows = correlated(12, 7, 64)
    _, mask = admm_update(kernel, moments_of(rows).second, 0.0, structure=unit, iterations=3, pruning_iterations=2)
    assert (np.sum(np.asarray(mask).reshape(-1, unit.m, 7), 1) == unit.n).all()


@pytest.mark.slow
def test_groups_keep_n_of_m_in_a_large_matrix():
    """One weight too many in 2**22 would be taken of the n of a group."""
    kernel = jnp.cos(jnp.arange(2.0**23)).reshape(4, 2**21)
    pruned, mask = admm_update(
        kernel, jnp.eye(4), 0.5, structure=jaxsparse.n_of_m(2, 4), iterations=1, pruning_iterations=1
    )
    assert np.array_equal(np.unique(np.sum(np.asarray(mask), 0)), [2])
    assert not np.asarray(pruned)[~np.asarray(mask)].any()


def test_it_is_near_the_least_squares_weights_under_its_mask():
    kernel, rows = correlated(16, 7, 64)
    gram = moments_of(rows).second
    pruned, mask = admm_update(kernel, gram, 0.5)
    found = output_error(pruned, kernel, rows)
    assert output_error(reconstruct(kernel, gram, mask), kernel, rows) < found
    assert found < 0.5 * output_error(np.where(mask, kernel, 0), kernel, rows)


def test_numbers_and_inputs_that_never_fire():
    kernel, rows = correlated(16, 7, 64)
    rows = np.array(rows)
    rows[:, 3:7] = 0
    prune = jax.jit(admm_update)
    for sparsity in (0.0, 0.3, 0.95):
        pruned, mask = jax.device_get(prune(kernel, moments_of(jnp.asarray(rows)).second, sparsity))
        assert np.sum(~mask) == int(16 * 7 * sparsity)
        assert np.isfinite(pruned).all()
        assert not pruned[~mask].any()
        assert not mask[3:7].any() or sparsity < 0.25  # they go first
    pruned, mask = jax.device_get(prune(kernel, np.zeros((16, 16), np.float32), 0.5))  # no input fires
    largest = np.asarray(jaxsparse.top_k_mask(jnp.abs(kernel), 56))
    assert np.sum(mask) == 56
    assert np.sum(mask & largest) >= 54  # the iterations let weights near the threshold change places
    np.testing.assert_allclose(pruned, np.where(mask, kernel, 0), rtol=1e-2)


def test_options_out_of_range_are_refused():
    for message, options in (
        ("pruning_iterations must be at least 1 and at most iterations=5, got 15", {"iterations": 5}),
        ("pruning_iterations must be at least 1", {"pruning_iterations": 0}),
        ("damping must be a number >= 0", {"damping": -0.1}),
        ("sparsity is the fraction of zeros", {"sparsity": 1.0}),
    ):
        with pytest.raises(ValueError, match=message):
            admm_update(**{"kernel": jnp.ones((4, 2)), "gram": jnp.eye(4), "sparsity": 0.5} | options)


def test_a_gram_matrix_that_is_none():
    far = 4 * jnp.eye(4) - 3  # an eigenvalue of -8
    for gram in (jnp.full((4, 4), jnp.nan), -jnp.eye(4), far):
        with pytest.raises(ValueError, match="ADMM made weights that are not finite"):
            admm_update(jnp.ones((4, 2)), gram, 0.5)
