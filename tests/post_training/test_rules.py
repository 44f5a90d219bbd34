"""The rules by name: golden masks, exact numbers, traced sparsity, stacks, and which of them prunes best."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse
from jaxsparse.post_training import RULES, Rule, resolve
from jaxsparse.post_training.matrix import pruned_counts
from tests.post_training.problems import GOLDEN, KERNEL, ROWS, correlated, moments_of, output_error
from tests.problems import slow_except

WEIGHT, TWO_OF_FOUR = jaxsparse.structures.weight(), jaxsparse.n_of_m(2, 4)


def test_wanda_keeps_the_weights_that_the_authors_code_keeps():
    prune, moments = RULES["wanda"].prune, moments_of(ROWS, gram=False)
    for structure, name in ((WEIGHT, "mask_50"), (TWO_OF_FOUR, "mask_2_4")):
        pruned, mask = prune(KERNEL, moments, 0.5, structure)
        np.testing.assert_array_equal(mask, GOLDEN[f"wanda/{name}"])
        np.testing.assert_array_equal(pruned, KERNEL * GOLDEN[f"wanda/{name}"])


def test_wanda_of_six_weights_by_hand():
    # Inputs with the norms 1, 3, 2. Scores: 4, 3, 4 and 1, 6, 1: one of three goes, int(3 * 0.5), of equals the later.
    moments = moments_of(jnp.array([[1.0, 0, 0], [0, 3, 0], [0, 0, 2]]))
    kernel = jnp.array([[-4.0, 1.0], [1.0, 2.0], [2.0, 0.5]])
    pruned, mask = RULES["wanda"].prune(kernel, moments, 0.5, WEIGHT)
    assert pruned.tolist() == [[-4.0, 1.0], [0.0, 2.0], [2.0, 0.0]]
    assert mask.tolist() == [[True, True], [False, True], [True, False]]


def test_counts_are_exact_in_matrices_of_any_size():
    sizes = [10, 30, 1_000_003, 4097 * 4097, 4096 * 4096, 4096 * 11008]
    traced = jax.jit(pruned_counts)
    for sparsity in (0, 0.05, 0.25, 0.29, 0.3, 0.5, 0.55, 0.7, 0.9, 1.0):
        expected = [math.floor(size * Fraction(str(sparsity))) for size in sizes]
        for given in (sparsity, np.float32(sparsity), jnp.float32(sparsity)):
            assert pruned_counts(np.array(sizes), given).tolist() == expected
            assert traced(np.array(sizes), given).tolist() == expected
    assert int(pruned_counts(4096 * 4096, 0.5)) == 8388608
    assert int(traced(4096 * 11008, 0.5)) == 22544384
    for size in (3, 6, 7, 9):  # a fraction that is no decimal is a little less in float32 too
        for part in range(size):
            for given in (part / size, np.float32(part / size)):
                assert int(pruned_counts(size, given)) == part
    assert int(pruned_counts(10, 0.6999)) == int(pruned_counts(10, np.float32(0.6999))) == 6


@pytest.mark.slow
def test_numbers_are_exact_with_ties():
    inputs, outputs = 10, 3
    kernel, moments = jnp.ones((inputs, outputs)), moments_of(jnp.ones((4, inputs)))

    @jax.jit
    def masks(sparsity):
        return {name: rule.prune(kernel, moments, sparsity, WEIGHT)[1] for name, rule in RULES.items()}

    for sparsity in (0.0, 0.05, 0.25, 0.3, 0.55, 0.7, 0.9):
        found = jax.device_get(masks(sparsity))
        whole = jaxsparse.magnitude_masks({"w": kernel}, jnp.float32(sparsity))["w"]
        for name in ("magnitude", "ria"):
            np.testing.assert_array_equal(found[name], whole)
        gone = int(round(inputs * sparsity, 6))
        assert np.sum(~found["wanda"], 0).tolist() == [gone] * outputs
        assert found["wanda"][: inputs - gone].all()  # of equal scores those of lower index stay
        assert np.sum(~found["admm"]) == int(round(30 * sparsity, 6))
        assert np.sum(~found["sparsegpt"]) == (int(round(30 * sparsity, 6)) + 1 if sparsity else 0)


@pytest.mark.parametrize("name", slow_except(["wanda"], RULES))
def test_stacks_and_traced_sparsity_change_nothing(name):
    """vmap over three matrices, jitted, equals a loop, for single weights and for 2:4."""
    rule = RULES[name]
    kernels, rows = (np.stack(x) for x in zip(*(correlated(8, 6, 64, seed) for seed in range(3)), strict=True))
    rows[1] = 0  # where no input fires, weights go by magnitude
    moments = jax.jit(jax.vmap(lambda rows: moments_of(rows, gram=rule.needs == "gram")))(rows)

    def both(kernel, moments, sparsity):
        return [rule.prune(kernel, moments, sparsity, structure) for structure in (WEIGHT, TWO_OF_FOUR)]

    several = jax.device_get(jax.jit(jax.vmap(both, (0, 0, None)))(kernels, moments, 0.6))
    alone = jax.jit(both)
    for i in range(3):
        own = jax.tree.map(lambda x, i=i: x[i], moments)
        for (pruned, mask), (expected, expected_mask) in zip(several, alone(kernels[i], own, 0.6), strict=True):
            np.testing.assert_array_equal(mask[i], expected_mask)
            np.testing.assert_allclose(pruned[i], expected, rtol=1e-3, atol=1e-4)
            assert not pruned[i][~mask[i]].any()
        assert (np.sum(several[1][1][i].reshape(2, 4, 6), 1) == 2).all()
    if name in ("magnitude", "sparsegpt"):  # of the matrix as a whole
        mask = several[0][1][1]
        np.testing.assert_array_equal(mask, jaxsparse.top_k_mask(np.abs(kernels[1]), int(mask.sum())))


def test_kernels_of_bfloat16_are_pruned_in_float32():
    kernel, rows = correlated(8, 6, 64)
    kernel, moments = kernel.astype(jnp.bfloat16), moments_of(rows)
    for rule in (RULES["wanda"], RULES["sparsegpt"]):
        prune = jax.jit(lambda kernel, rule=rule: rule.prune(kernel, moments, 0.5, WEIGHT))
        pruned, mask = prune(kernel)
        expected, expected_mask = prune(kernel.astype(jnp.float32))
        assert pruned.dtype == jnp.float32
        np.testing.assert_array_equal(pruned, expected)
        np.testing.assert_array_equal(mask, expected_mask)


def test_what_arrives_and_what_makes_up_for_it_lower_the_error_in_the_outputs():
    @jax.jit
    def pruned(kernel, moments):
        return [{name: rule.prune(kernel, moments, 0.5, structure)[0] for name, rule in RULES.items()}
                for structure in (WEIGHT, TWO_OF_FOUR)]  # fmt: skip

    for seed in range(5):
        kernel, rows = correlated(seed=seed)
        for by_rule in pruned(kernel, moments_of(rows)):
            error = {name: output_error(found, kernel, rows) for name, found in by_rule.items()}
            assert error["sparsegpt"] < error["wanda"] < error["magnitude"], (seed, error)
            assert error["ria"] < error["magnitude"], (seed, error)
            assert error["admm"] < error["wanda"], (seed, error)


def test_a_structure_may_have_the_layout_of_its_leaf():
    layout = jaxsparse.Layout(inputs=1, outputs=0)
    structure = jaxsparse.n_of_m(2, 4, layout=layout)
    kernel, rows = correlated(8, 6, 64)
    moments = moments_of(rows)
    for rule in (RULES["wanda"], RULES["sparsegpt"]):
        one, other = (rule.prune(kernel, moments, 0.5, s)[1] for s in (structure, TWO_OF_FOUR))
        np.testing.assert_array_equal(one, other)


def test_rules_by_name_and_from_functions():
    assert all(resolve(name) is rule and resolve(rule) is rule for name, rule in RULES.items())

    def largest(kernel, moments, sparsity, structure):
        return kernel, kernel > 0

    assert resolve(largest) == Rule("largest", "squares", largest)
    largest.needs = "gram"
    assert resolve(largest).needs == "gram"
    with pytest.raises(
        ValueError, match=r"rule must be one of \['admm', .*'wanda'\], a Rule or a function, got 'wander'"
    ):
        resolve("wander")
    with pytest.raises(TypeError, match="or a function of kernel, moments, sparsity and structure .* got 3"):
        resolve(3)
    largest.needs = "cubes"
    with pytest.raises(ValueError, match="rule 'largest' must need one of .* got 'cubes'"):
        resolve(largest)


def test_structures_that_are_none_of_a_matrix_are_refused():
    kernel, moments = jnp.ones((6, 2)), moments_of(jnp.ones((3, 6)))
    for rule in RULES.values():
        with pytest.raises(ValueError, match='structure must be "weight" or made by jaxsparse.n_of_m along the inputs'):
            rule.prune(kernel, moments, 0.5, jaxsparse.block(2, 2))
        with pytest.raises(ValueError, match="needs a number of inputs that 4 divides"):
            rule.prune(kernel, moments, 0.5, TWO_OF_FOUR)
        with pytest.raises(ValueError, match="sparsity is the fraction of zeros"):
            rule.prune(kernel, moments, 1.5, WEIGHT)
