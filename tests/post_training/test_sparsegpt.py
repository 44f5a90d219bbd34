"""SparseGPT: the authors' kernels, a plain loop in NumPy, by hand, and Gram matrices that are not positive definite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse
from jaxsparse.post_training import sparsegpt, sparsegpt_with_damping
from tests.post_training.problems import GOLDEN, KERNEL, ROWS, correlated, moments_of

# R R^T with R = [[1, 1/2, 0, 0], [0, 1, 1/2, 0], ...], so U = R^-1 has the rows (1, -1/2, 1/4, -1/8),
# (0, 1, -1/2, 1/4), ..., and its diagonal is 1.
_R = np.eye(4) + 0.5 * np.eye(4, k=1)


def gram_of_bidiagonal(size):
    return jnp.asarray(_R[:size, :size] @ _R[:size, :size].T, jnp.float32)


@pytest.mark.parametrize(
    ("name", "sparsity", "structure", "block_size"),
    [
        ("50", 0.5, "weight", 128),
        ("80_block16", 0.8, "weight", 16),
        ("2_4", 0.5, jaxsparse.n_of_m(2, 4), 128),
        ("2_4_block16", 0.5, jaxsparse.n_of_m(2, 4), 16),
    ],
)
def test_it_is_that_of_the_authors_code(name, sparsity, structure, block_size):
    expected = GOLDEN[f"sparsegpt/{name}"]
    for gram in (GOLDEN["sparsegpt/hessian"], moments_of(ROWS).second):
        pruned, mask = sparsegpt(KERNEL, gram, sparsity, structure=structure, block_size=block_size)
        np.testing.assert_array_equal(pruned != 0, expected != 0)
        assert bool(jnp.all(mask | (pruned == 0)))
        np.testing.assert_allclose(pruned, expected, rtol=1e-4)


def published(kernel, gram, sparsity, block_size, damping=0.01, n_m=None):
    """The authors' algorithm for weights as they have them, (outputs, inputs), in float64."""
    w, h = np.array(kernel, np.float64).T, np.array(gram, np.float64)
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += damping * np.mean(np.diag(h)) * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    pruned = np.zeros_like(w)
    for start in range(0, len(h), block_size):
        end = min(start + block_size, len(h))
        block = w[:, start:end].copy()
        errors, u = np.zeros_like(block), upper[start:end, start:end]
        gone = np.zeros(block.shape, bool)
        if n_m is None:
            scores = block**2 / np.diag(u)[None] ** 2
            gone = scores <= np.sort(scores.flatten())[int(scores.size * sparsity)]
        for i in range(end - start):
            if n_m is not None and i % n_m[1] == 0:
                part = slice(i, i + n_m[1])
                order = np.argsort(block[:, part] ** 2 / np.diag(u)[None, part] ** 2, axis=1)
                np.put_along_axis(gone[:, part], order[:, : n_m[1] - n_m[0]], True, axis=1)
            left = np.where(gone[:, i], 0, block[:, i])
            error = (block[:, i] - left) / u[i, i]
            block[:, i:] -= np.outer(error, u[i, i:])
            pruned[:, start + i], errors[:, i] = left, error
        w[:, end:] -= errors @ upper[start:end, end:]
    return pruned.T


@pytest.mark.parametrize("n_m", [None, (1, 3)])
def test_a_block_that_is_not_full(n_m):
    kernel, rows = correlated(inputs=21, outputs=5)
    gram = moments_of(rows).second / 1e3
    structure = "weight" if n_m is None else jaxsparse.n_of_m(*n_m)
    pruned, mask = sparsegpt(kernel, gram, 0.6, structure=structure, block_size=8)
    # Groups of 3 do not lie in blocks of 8; what the authors' code prunes does not depend on its blocks then.
    expected = published(kernel, gram, 0.6, 8 if n_m is None else 21, n_m=n_m)
    np.testing.assert_array_equal(mask, expected != 0)
    np.testing.assert_allclose(pruned, expected, rtol=2e-3, atol=2e-3)
    # int(40 * 0.6) + 1 of each of the two full blocks, int(25 * 0.6) + 1 of the last one
    assert int(jnp.sum(~mask)) == (70 if n_m else 25 + 25 + 16)


def test_three_weights_by_hand():
    kernel, gram = jnp.array([[1.0], [2.0], [3.0]]), gram_of_bidiagonal(3)
    # One goes, int(3 * 0.3) + 1, the first. Its error is 1: 2 + 1/2 and 3 - 1/4.
    pruned, mask = sparsegpt(kernel, gram, 0.3, damping=0.0)
    np.testing.assert_allclose(pruned[:, 0], [0, 2.5, 2.75], rtol=1e-6)
    assert mask[:, 0].tolist() == [False, True, True]
    # Two go, int(3 * 0.4) + 1. The error of the second is 2.5: 2.75 + 2.5/2.
    np.testing.assert_allclose(sparsegpt(kernel, gram, 0.4, damping=0.0)[0][:, 0], [0, 0, 4], rtol=1e-6)


def test_groups_are_chosen_by_what_weights_have_become():
    # The first goes, its error is 2: 3 + 1, 3 - 1/2, -2.9 + 1/4. Now 2.5 is the smallest of the last two (3 was not):
    # it goes, and the last becomes -2.65 + 2.5/2.
    kernel = jnp.array([[2.0], [3.0], [3.0], [-2.9]])
    pruned, _ = sparsegpt(kernel, gram_of_bidiagonal(4), 0.0, structure=jaxsparse.n_of_m(1, 2),
                          damping=0.0)  # fmt: skip
    np.testing.assert_allclose(pruned[:, 0], [0, 4, 0, -1.4], rtol=1e-6)


def test_ties_leave_the_number_as_it_is():
    kernel, prune = np.ones((8, 3), np.float32), jax.jit(sparsegpt)
    for sparsity in (0.0, 0.1, 0.5, 0.9, 0.99):
        pruned, mask = jax.device_get(prune(kernel, np.eye(8, dtype=np.float32), sparsity))
        assert np.sum(~mask) == (int(24 * sparsity) + 1 if sparsity else 0)
        np.testing.assert_allclose(pruned, mask, rtol=1e-6)  # inputs that are not correlated
        assert mask.flatten().tolist() == sorted(mask.flatten().tolist(), reverse=True)  # those of lower index stay


def test_the_unit_of_the_gram_matrix_does_not_matter():
    kernel, rows = correlated()
    gram = moments_of(rows).second
    one, other = sparsegpt(kernel, gram, 0.5), sparsegpt(kernel, gram * 2.0**-20, 0.5)
    np.testing.assert_array_equal(one[1], other[1])
    np.testing.assert_array_equal(one[0], other[0])


def test_inputs_that_never_fire():
    kernel, rows = correlated()
    rows = np.array(rows)
    rows[:, 3:20] = 0
    for scale in (1.0, 1e-4):  # where activations are small, silent inputs must not rule the damping
        silent = jnp.asarray(rows * np.float32(scale))
        pruned, mask, used = sparsegpt_with_damping(kernel, moments_of(silent).second, 0.7)
        assert not pruned[3:20].any()
        assert float(used) == pytest.approx(0.01)
        assert int(jnp.sum(~mask)) == int(32 * 24 * 0.7) + 1
    # No input fires at all: nothing but the magnitude is known.
    pruned, mask = sparsegpt(kernel, jnp.zeros((32, 32)), 0.5)
    np.testing.assert_array_equal(mask, jaxsparse.top_k_mask(jnp.abs(kernel), 32 * 24 - 385))
    np.testing.assert_array_equal(pruned, jnp.where(mask, kernel, 0))


def test_the_damping_is_raised_until_the_gram_matrix_is_positive_definite():
    kernel, rows = correlated(rows=4)
    gram = moments_of(rows).second
    with pytest.warns(UserWarning, match=r"gram is not positive definite with damping 0, so 1e-0\d was used"):
        pruned, _ = sparsegpt(kernel, gram, 0.5, damping=0.0)
    assert bool(jnp.isfinite(pruned).all())
    used = jax.jit(lambda gram: sparsegpt_with_damping(kernel, gram, 0.5)[2])
    negative = gram - 0.5 * jnp.mean(jnp.diagonal(gram)) * jnp.eye(32)  # wants more than 0.5 * 0.01
    assert 0.5 < float(used(negative)) < 1e3
    assert float(used(gram)) == pytest.approx(0.01)
    assert np.isnan(used(gram.at[0, 0].set(jnp.nan)))
    with pytest.raises(ValueError, match="gram cannot be made positive definite"):
        sparsegpt(kernel, gram.at[0, 0].set(jnp.nan), 0.5)
    with pytest.raises(ValueError, match="values that are not finite, or negative ones"):
        sparsegpt(kernel, -jnp.eye(32), 0.5)  # negative squares are not inputs that never fire
    assert float(used((jnp.eye(32) * 4).at[0, 0].set(-1))) > 0.2


def test_matrices_without_weights():
    for shape in ((0, 3), (6, 0)):
        pruned, mask = sparsegpt(jnp.ones(shape), jnp.eye(shape[0]), 0.5)
        assert pruned.shape == mask.shape == shape


def test_options_that_do_not_fit_are_refused():
    kernel, gram = jnp.ones((6, 2)), jnp.eye(6)
    for message, options in (
        ("damping must be a number >= 0, got -1", {"damping": -1}),
        ("block_size must be at least 1, got 0", {"block_size": 0}),
        (
            r"n_of_m\(2, 4\) needs a number of inputs that 4 divides, got .* 6 inputs",
            {"structure": jaxsparse.n_of_m(2, 4)},
        ),
        ("structure must be", {"structure": jaxsparse.block(2, 2)}),
        ("structure must be", {"structure": jaxsparse.n_of_m(1, 2, axis="outputs")}),
        (r"sparsity is the fraction of zeros and must be in \[0, 1\)", {"sparsity": 1.0}),
        (r"gram must be .* expected floats of shape \(6, 6\) .* got float32 of \(5, 5\)", {"gram": jnp.eye(5)}),
    ):
        with pytest.raises(ValueError, match=message):
            sparsegpt(**{"kernel": kernel, "gram": gram, "sparsity": 0.5} | options)
