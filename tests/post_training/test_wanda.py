"""Scores of Wanda and RIA: those of the authors' code, and by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.post_training import ria_scores, wanda_scores
from tests.post_training.problems import GOLDEN, KERNEL, ROWS, moments_of


def test_wanda_scores_are_those_of_the_authors_code():
    mean_square = moments_of(ROWS, gram=False).squares / 4  # the authors sum over tokens, and average over 4 sequences
    np.testing.assert_allclose(mean_square, GOLDEN["wanda/mean_square"], rtol=1e-5)
    np.testing.assert_allclose(wanda_scores(KERNEL, mean_square), GOLDEN["wanda/score"], rtol=1e-5)


def test_wanda_scores_by_hand():
    # roots of the squares: 2, 3, 0
    scores = wanda_scores(jnp.array([[1.0, -2.0], [-1.0, 0.5], [7.0, 9.0]]), jnp.array([4.0, 9.0, 0.0]))
    assert scores.tolist() == [[2.0, 4.0], [3.0, 1.5], [0.0, 0.0]]


def test_ria_scores_by_hand():
    # Sums of outputs: 4, 4, 0; of inputs: 4, 4. Roots of roots of the squares: 2, 3.
    #   1/4 + 1/4 = 1/2    3/4 + 3/4 = 3/2    0      times 2:  1    3    0
    #   3/4 + 3/4 = 3/2    1/4 + 1/4 = 1/2    0      times 3:  4.5  1.5  0
    kernel = jnp.array([[1.0, -3.0, 0.0], [-3.0, 1.0, 0.0]])
    np.testing.assert_allclose(ria_scores(kernel, jnp.array([16.0, 81.0])), [[1, 3, 0], [4.5, 1.5, 0]], rtol=1e-6)
    # Without the inputs (a = 0) weights of an input that never fires count like others.
    np.testing.assert_allclose(ria_scores(kernel, jnp.array([0.0, 81.0]), power=0.0)[0], [0.5, 1.5, 0], rtol=1e-6)


@pytest.mark.parametrize("scores", [wanda_scores, ria_scores])
def test_what_does_not_fit_is_refused(scores):
    with pytest.raises(ValueError, match=r"kernel must be a matrix of floats, .* got float32 of \(3,\)"):
        scores(jnp.ones(3), jnp.ones(3))
    with pytest.raises(ValueError, match=r"kernel must be a matrix of floats, .* got int32 of \(3, 2\)"):
        scores(jnp.ones((3, 2), int), jnp.ones(3))
    with pytest.raises(ValueError, match=r"mean_square .* expected floats of shape \(3,\) for a kernel of \(3, 2\)"):
        scores(jnp.ones((3, 2)), jnp.ones(2))


def test_they_are_computed_in_float32():
    scores = wanda_scores(jnp.full((2, 2), 1.5, jnp.bfloat16), jnp.ones(2, jnp.bfloat16))
    assert scores.dtype == jnp.float32
    assert scores.tolist() == [[1.5, 1.5], [1.5, 1.5]]
