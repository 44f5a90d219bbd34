import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsparse
from jaxsparse.allocation import apportion, exact_mean, exact_sum, layer_counts


def test_erdos_renyi_by_hand():
    # No layer full: densities proportional to (in + out) / (in * out).
    densities = jaxsparse.erdos_renyi([(100, 50), (50, 20)], 0.1)
    scale = 0.1 * 6000 / (150 + 70)
    np.testing.assert_allclose(densities, [scale * 150 / 5000, scale * 70 / 1000], rtol=1e-6)


def test_erdos_renyi_fills_small_layers_and_shares_the_rest():
    densities = jaxsparse.erdos_renyi({"a": (1000, 1000), "b": (10, 10), "c": (1000, 10)}, 0.3)
    assert densities["b"] == densities["c"] == 1.0
    assert densities["a"] == pytest.approx((0.3 * 1_010_100 - 10_100) / 1_000_000)


def test_the_kernel_variant_counts_spatial_sizes():
    shapes = [(3, 3, 64, 64), (1, 1, 64, 64)]
    with_kernel = jaxsparse.erdos_renyi(shapes, 0.1, kernel=True)
    without = jaxsparse.erdos_renyi(shapes, 0.1, kernel=False)
    assert with_kernel[1] / with_kernel[0] == pytest.approx((130 / 4096) / (134 / 36864))
    assert without[0] == without[1] == pytest.approx(0.1)


def test_erdos_renyi_is_that_of_jaxpruner():
    golden = np.load(pathlib.Path(__file__).parent / "golden" / "jaxpruner_masks.npz")
    shapes = [golden[f"scores/{name}"].shape for name in ("conv", "d1", "d2")]
    sizes = np.array([np.prod(shape) for shape in shapes])
    for sparsity in (0.8, 0.9, 0.95):
        rounded = sizes - np.floor(sparsity * sizes)  # it shares out what layers of that sparsity have, rounded up
        densities = jaxsparse.erdos_renyi(shapes, rounded.sum() / sizes.sum())
        np.testing.assert_allclose(1 - np.array(densities), golden[f"erk_{sparsity}"], rtol=0, atol=1e-6)


@pytest.mark.slow
@settings(max_examples=15)
@given(
    shapes=st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4), min_size=1, max_size=6),
    density=st.floats(0.001, 1.0),
)
def test_erdos_renyi_has_the_density_asked_for(shapes, density):
    sizes = np.array([np.prod(s) for s in shapes])
    densities = np.array(jaxsparse.erdos_renyi(shapes, density))
    assert (densities <= 1 + 1e-9).all()
    assert (densities * sizes).sum() == pytest.approx(density * sizes.sum())
    traced = jax.jit(lambda d: jnp.stack(jaxsparse.erdos_renyi(shapes, d)))(density)
    np.testing.assert_allclose(traced, densities, rtol=1e-4)


@settings(max_examples=60)
@given(
    layers=st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 10**6)), min_size=4, max_size=4),
    share=st.floats(0, 1.2),
    round_up=st.booleans(),
)
def test_apportion_adds_up_and_overfills_nothing(layers, share, round_up):
    quotas, capacity = np.array([q for q, _ in layers], np.float32), np.array([c for _, c in layers], np.int32)
    total = int(share * capacity.sum())
    counts = np.asarray(apportion(quotas, total, capacity, round_up=round_up))
    computed = apportion(jnp.asarray(quotas), jnp.int32(total), jnp.asarray(capacity), round_up=round_up)
    np.testing.assert_array_equal(counts, computed)  # of numbers that are known NumPy computes the same
    assert counts.sum() == min(total, capacity.sum())
    assert (counts >= 0).all()
    assert (counts <= capacity).all()
    # Layers with room get the same on top of (or below) their quota, to within rounding.
    room = (counts < capacity) & (counts > 0)
    extra = counts[room] - (np.ceil(quotas) if round_up else np.floor(quotas))[room]
    assert extra.size == 0 or extra.max() - extra.min() <= 1


def test_apportion_takes_lists_and_nothing():
    assert apportion([], 0, []).tolist() == []
    assert apportion([1.5, 1.5], 3, [3.0, 9.0]).tolist() == [2, 1]
    assert jax.jit(lambda quota: apportion([quota, 2 * quota], 3, [5, 5]))(1.0).tolist() == [1, 2]


@settings(max_examples=60)
@given(quotas=st.lists(st.integers(0, 10**5).map(lambda n: np.float32(n / 1000)), min_size=2, max_size=6))
def test_rounded_up_no_layer_goes_short_but_the_largest(quotas):
    total = int(np.round(sum(map(float, quotas))))
    counts = np.asarray(apportion(quotas, total, np.full(len(quotas), 1000), round_up=True))
    short = np.ceil(quotas) - counts
    assert counts.sum() == total
    assert set(short) <= {0, 1}
    served = np.array([q for q, lacks in zip(quotas, short, strict=True) if q > 0 and not lacks])
    assert all(q >= served.max(initial=0) for q, lacks in zip(quotas, short, strict=True) if lacks)


def test_layer_counts_of_a_network():
    params = {name: np.zeros(shape) for name, shape in {"a": (10, 10), "b": (7, 3)}.items()}
    assert layer_counts(params, 0.9).tolist() == [10, 2]
    assert layer_counts(params, {"a": 0.5, "b": 0.0}).tolist() == [50, 21]
    assert layer_counts({}, 0.9).tolist() == []
    # In units of 10, 3 and 10 weights: 3.2 of a and c together, 0.7 of b.
    params["c"] = jnp.zeros((22, 10))
    assert layer_counts(params, 0.9, unit_sizes=[10, 3, 10]).tolist() == [1, 1, 2]


@settings(max_examples=30)
@given(seed=st.integers(0, 100), exponent=st.integers(-30, 30))
def test_exact_sum_is_near_the_sum_and_free_of_order(seed, exponent):
    values = np.random.default_rng(seed).normal(size=(50, 40)).astype(np.float32) * np.float32(2.0**exponent)
    shuffled = np.random.default_rng(seed).permutation(values.ravel()).reshape(50, 40)
    total = jax.jit(exact_sum)(values)
    assert total == jax.jit(exact_sum)(shuffled)
    np.testing.assert_allclose(total, np.abs(values.astype(np.float64)).sum(), rtol=2e-6)


@pytest.mark.slow
def test_exact_sum_of_many_terms():
    values = jnp.full((3000, 3000), 0.7)
    np.testing.assert_allclose(exact_sum(values), 0.7 * 9e6, rtol=1e-6)
    np.testing.assert_allclose(exact_sum(values, axis=(0,)), np.full((1, 3000), 2100.0), rtol=1e-6)


def test_exact_mean_over_a_mask_an_axis_and_nothing():
    values = jnp.array([[1.0, -2.0], [3.0, jnp.nan]])
    assert float(exact_mean(values, values > 0)) == 2.0
    assert float(exact_mean(values, jnp.zeros((2, 2), bool))) == 0.0
    np.testing.assert_allclose(exact_mean(values[:, :1], axis=(0,)), [[2.0]])


@pytest.mark.parametrize("density", [-0.1, 1.1])
def test_a_density_out_of_range(density):
    with pytest.raises(ValueError, match="density must be between 0 and 1"):
        jaxsparse.erdos_renyi([(2, 2)], density)
