import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.layouts import Layout
from jaxsparse.selection import top_k_along, top_k_mask
from jaxsparse.structures import weight as weights
from jaxsparse.transforms.chain import Signal
from jaxsparse.transforms.layers import Layer, Layers
from jaxsparse.transforms.matrices import kept_then_largest, matrices_of, to_column


def test_arrays_searched_together_are_what_they_are_alone():
    rng = np.random.default_rng(0)
    shapes, axes = [(4, 6), (2, 3, 4, 5), (300,)], [(0,), (0, 1, 2), (0,)]
    arrays = [jnp.asarray(rng.integers(-9, 9, shape), jnp.float32) for shape in shapes]
    where = [None, jnp.asarray(rng.random(shapes[1]) < 0.7), None]
    ks = [jnp.asarray(rng.integers(0, 5, (1, 6))), jnp.asarray(rng.integers(0, 20, (1, 1, 1, 5))), jnp.array([17])]
    found = top_k_along(arrays, ks, axes, where, absolute=True)
    for x, k, w, marked in zip(arrays, ks, where, found, strict=True):
        alone = top_k_mask(
            x, k.reshape(-1) if x.ndim > 1 else 17, where=w, absolute=True, axis=-1 if x.ndim > 1 else None
        )
        np.testing.assert_array_equal(marked, alone)


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("float16", "float16")])
def test_what_is_kept_comes_first_and_then_the_largest_signals(dtypes):
    rng = np.random.default_rng(1)
    weight, signal = (jnp.asarray(rng.standard_normal(40), dtype) for dtype in dtypes)
    signal = signal.at[:6].set(jnp.asarray([0, -0.0, jnp.inf, -1e-7, jnp.nan, 1e-7], dtypes[1]))
    kept = jnp.asarray(rng.random(40) < 0.4).at[:6].set(False)
    order = np.argsort(-np.asarray(kept_then_largest(kept, weight, signal), np.float64), kind="stable")
    first, rest = np.flatnonzero(kept), np.flatnonzero(~kept)
    by_weight = first[np.argsort(-abs(np.asarray(weight, np.float64))[first], kind="stable")]
    by_signal = rest[np.argsort(-abs(np.asarray(signal, np.float64))[rest], kind="stable")]
    assert order.tolist() == [*by_weight, *by_signal]
    assert order[-1] == 4  # NaN


def test_a_mask_goes_to_matrices_and_back():
    mask = jnp.asarray(np.random.default_rng(2).random((2, 5, 3, 4)) < 0.5)
    at = Layout(inputs=3, outputs=(1, 2), stack=0)
    layer = Layer("w", mask * 2.0, Signal((mask * 3.0,), None), mask, weights(), at, 0, None)
    (found,) = matrices_of(Layers([layer], flat=False))
    assert found.mask.shape == (2, 4, 15)
    assert (found.members, found.of_layer, found.of_output, found.fan_in, found.outputs) == ((0,), (1, 2), (1,), 4, 15)
    np.testing.assert_array_equal(found.weight, found.mask * 2.0)
    np.testing.assert_array_equal(found.signal, found.mask * 3.0)
    np.testing.assert_array_equal(to_column([found], [found.mask])[0], mask)
