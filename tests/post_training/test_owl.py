"""Densities of blocks by their outliers: by hand, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.post_training import owl_densities


def block(outliers):
    """Two matrices of 20 scores, a few of 100 and the others 1; the mean is below 33, so those exceed 3 times it."""
    scores = np.ones(20, np.float32)
    scores[:outliers] = 100
    return {"a": jnp.asarray(scores[:5]), "b": jnp.asarray(scores[5:].reshape(3, 5))}


def test_three_blocks_by_hand():
    # Shares of outliers 0, 1/20, 4/20; r = 2 * 0.08 * (0, 1/4, 1) = 0, 0.04, 0.16, their mean is 0.2/3.
    found = owl_densities([block(0), block(1), block(4)], 0.7, outlier_ratio=3.0)
    np.testing.assert_allclose(found, [0.3 - 0.2 / 3, 0.34 - 0.2 / 3, 0.46 - 0.2 / 3], atol=1e-6)
    named = owl_densities({"x": block(4), "y": block(0)}, 0.7, outlier_ratio=3.0, max_shift=0.1)
    assert named == pytest.approx({"x": 0.4, "y": 0.2})


def test_blocks_that_are_alike_share_alike():
    assert owl_densities([block(2), block(2)], 0.5) == [0.5, 0.5]


def test_an_outlier_exceeds_a_multiple_of_the_mean():
    # The mean of (1, 1, 1, 5) is 2: 5 exceeds 2.4 times that, not 2.5 times.
    scores = [jnp.ones(4), jnp.array([1.0, 1.0, 1.0, 5.0])]
    assert owl_densities(scores, 0.5, outlier_ratio=2.5) == [0.5, 0.5]
    assert owl_densities(scores, 0.5, outlier_ratio=2.4) == pytest.approx([0.42, 0.58])


def test_what_is_out_of_range_is_refused():
    for message, scores, sparsity, options in (
        ("needs at least two, got 1", [block(1)], 0.5, {}),
        ("block y has no scores", {"x": block(1), "y": {}}, 0.5, {}),
        ("block 1 has scores that are not finite", [block(1), jnp.array([1.0, jnp.nan])], 0.5, {}),
        (r"sparsity is the fraction of zeros and must be in \[0, 1\)", [block(1), block(2)], 1.0, {}),
        (r"densities of blocks .* got y: 1.06: sparsity 0.02 leaves no room", {"x": block(0), "y": block(2)}, 0.02, {}),
        (r"densities of blocks .* got 0: -0.06", [block(0), block(2)], 0.98, {}),
        ("outlier_ratio must be positive", [block(1), block(2)], 0.5, {"outlier_ratio": 0}),
        ("max_shift must be at least 0", [block(1), block(2)], 0.5, {"max_shift": -0.1}),
    ):
        with pytest.raises(ValueError, match=message):
            owl_densities(scores, sparsity, **options)
