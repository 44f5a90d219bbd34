"""Masks refined by DSnoT: those of the authors' code, by hand, and what holds for any mask."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse
from jaxsparse.post_training import RULES, dsnot, dsnot_rule
from tests.post_training.problems import correlated, moments_of

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "dsnot.npz")
KERNEL, *INPUTS, VARIANCE = (jnp.asarray(GOLDEN[name]) for name in ("kernel", "mean", "mean_square", "variance"))
TOKENS = 32  # of a sequence, over which the authors sum
TWO_OF_FOUR = jaxsparse.n_of_m(2, 4)


@pytest.mark.parametrize(
    ("before", "after", "options"),
    [
        ("50", "50", {}),
        ("50", "50_5_cycles", {"cycles": 5}),
        ("50", "50_power_0", {"power": 0}),
        ("50", "50_threshold_20", {"threshold": 20 / TOKENS}),
        ("70", "70", {"cycles": 30}),
        ("2_4", "2_4", {"structure": TWO_OF_FOUR}),
    ],
)
def test_masks_are_those_of_the_authors_code(before, after, options):
    options = {"variance": VARIANCE, "threshold": 0.1 / TOKENS} | options
    found = dsnot(KERNEL, GOLDEN[f"before/{before}"], *INPUTS, **options)
    np.testing.assert_array_equal(found, GOLDEN[f"after/{after}"])


def test_two_outputs_by_hand():
    # The first lacks 1 * 4 + 2 * 1 = 6: the weight 4 comes, as 4 / 1 > 2 / 1, and -1 goes: 6 - 4 - 1 = 1. Of the other
    # sign nothing is left, so it is done, though 1 is more than the threshold. The second lacks -3, and gets it back
    # for 2, whose score is lower than that of 5.
    kernel = jnp.array([[4.0, -3.0], [1.0, 5.0], [-1.0, 2.0], [3.0, 0.0]])
    mask = jnp.array([[False, False], [False, True], [True, True], [True, False]])
    mean, mean_square = jnp.array([1.0, 2.0, 1.0, 1.0]), jnp.array([2.0, 5.0, 2.0, 2.0])  # of variance 1
    found = dsnot(kernel, mask, mean, mean_square)
    assert found.tolist() == [[True, True], [False, True], [False, False], [True, False]]
    np.testing.assert_array_equal(dsnot(kernel, mask, mean, mean_square, cycles=0), mask)
    np.testing.assert_array_equal(dsnot(kernel, mask, mean, mean_square, threshold=7.0), mask)
    # With a small variance of its input the second weight comes first, if variances count.
    mean_square = mean_square.at[1].set(4.25)
    assert dsnot(kernel, mask, mean, mean_square)[:, 0].tolist() == [False, True, False, True]
    assert dsnot(kernel, mask, mean, mean_square, power=0.0)[:, 0].tolist() == [True, False, False, True]


def test_inputs_that_never_change_or_never_fire():
    """Of no variance: a constant comes before all others, and what is always zero never."""
    kernel = jnp.array([[1.0], [5.0], [2.0], [-1.0]])
    mask = jnp.array([[False], [False], [False], [True]])
    found = dsnot(kernel, mask, jnp.array([1.0, 2.0, 0.0, 1.0]), jnp.array([1.0, 5.0, 0.0, 2.0]))
    assert found[:, 0].tolist() == [True, False, False, False]
    nothing = dsnot(kernel, mask, jnp.zeros(4), jnp.zeros(4))
    np.testing.assert_array_equal(nothing, mask)


@pytest.mark.parametrize("structure", ["weight", TWO_OF_FOUR])
def test_outputs_and_groups_keep_their_numbers(structure):
    kernel, rows = correlated()
    moments = moments_of(rows + 1.0, gram=False)
    unit = jaxsparse.structures.weight() if structure == "weight" else structure
    before = RULES["wanda"].prune(kernel, moments, 0.6, unit)[1]
    pruned, after = RULES["dsnot"].prune(kernel, moments, 0.6, unit)
    np.testing.assert_array_equal(pruned, jnp.where(after, kernel, 0))
    assert (before != after).any()
    np.testing.assert_array_equal(before.sum(0), after.sum(0))
    if structure != "weight":
        assert (after.reshape(-1, 4, after.shape[1]).sum(1) == 2).all()


def test_of_many_inputs_the_means_of_outputs_come_near():
    mask = GOLDEN["before/70"]
    found = dsnot(KERNEL, mask, *INPUTS, variance=VARIANCE, cycles=30)

    def error(mask):
        return float(np.abs(INPUTS[0] @ jnp.where(mask, 0, KERNEL)).mean())

    assert error(found) < 0.5 * error(mask), (error(found), error(mask))


def test_swaps_that_must_lessen_the_error_do_so():
    kernel, rows = correlated()
    moments = moments_of(rows + 1.0)

    def errors(mask):
        return np.abs(moments.mean @ jnp.where(mask, 0, kernel))

    for unit in (jaxsparse.structures.weight(), TWO_OF_FOUR):
        before = RULES["wanda"].prune(kernel, moments, 0.6, unit)[1]
        steps = [errors(dsnot_rule(monotone=True, cycles=n).prune(kernel, moments, 0.6, unit)[1]) for n in range(6)]
        np.testing.assert_array_equal(steps[0], errors(before))
        for one, other in itertools.pairwise(steps):
            assert (other <= one).all()
        assert steps[-1].sum() < 0.8 * steps[0].sum()


def test_a_mask_of_any_rule_is_refined():
    kernel, rows = correlated()
    moments = moments_of(rows + 1.0)
    unit = jaxsparse.structures.weight()
    for name in ("magnitude", "sparsegpt"):
        pruned, mask = dsnot_rule(name, cycles=2).prune(kernel, moments, 0.5, unit)
        before = RULES[name].prune(kernel, moments, 0.5, unit)[1]
        mean_square = moments.squares / moments.rows
        np.testing.assert_array_equal(mask, dsnot(kernel, before, moments.mean, mean_square, cycles=2))
        np.testing.assert_array_equal(pruned, jnp.where(mask, kernel, 0))
    assert dsnot_rule("magnitude").needs == "squares"


def test_what_is_worked_out_under_jit_is_the_same():
    mask = GOLDEN["before/2_4"]
    expected = dsnot(KERNEL, mask, *INPUTS, structure=TWO_OF_FOUR, power=0.5)
    found = jax.jit(lambda mask, power: dsnot(KERNEL, mask, *INPUTS, structure=TWO_OF_FOUR, power=power))(mask, 0.5)
    np.testing.assert_array_equal(found, expected)


def test_what_does_not_fit_is_refused():
    mask = jnp.ones((8, 2), bool)
    fine = {"kernel": jnp.ones((8, 2)), "mask": mask, "mean": jnp.ones(8), "mean_square": jnp.ones(8)}
    for message, wrong in (
        (r"mask must be bools of the kernel's shape \(8, 2\), got float32 of \(8, 2\)", {"mask": jnp.ones((8, 2))}),
        (r"mask must be bools of the kernel's shape \(8, 2\), got bool of \(2, 8\)", {"mask": mask.T}),
        (r"mean must have an entry for each input .* got float32 of \(2,\)", {"mean": jnp.ones(2)}),
        (r"mean_square must have an entry for each input", {"mean_square": jnp.ones((8, 8))}),
        (r"variance must have an entry for each input", {"variance": jnp.ones(2)}),
        (r"cycles must be at least 0, got -1", {"cycles": -1}),
        (r"threshold must be at least 0, got -1", {"threshold": -1}),
        (r"power must be at least 0, got nan", {"power": float("nan")}),
        (r"mask must keep 2 of every 4 inputs, got groups of 4 to 4", {"structure": TWO_OF_FOUR}),
        (r"kernel must be a matrix of floats", {"kernel": jnp.ones(8)}),
    ):
        with pytest.raises(ValueError, match=message):
            dsnot(**(fine | wrong))
