"""Sums, counts and places: the same by one pass and by sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import reductions
from jaxsparse.placement import lies_anywhere
from jaxsparse.positions import fold_in, random_bits, row_major
from jaxsparse.reductions import any_true, count_true, sums


@pytest.fixture(params=[False, True], ids=["sums", "one pass"])
def way(request, monkeypatch):
    """Of one device and of several; these tests run on eight."""
    if request.param:
        monkeypatch.setattr(reductions, "in_one_pass", lambda ndim, axis: axis is None or ndim - 1 in axis)


@pytest.mark.parametrize("axis", [None, (0, 1, 2), (1,), (2,), (1, 2)])
def test_sums(way, axis):
    rng = np.random.default_rng(0)
    shape = (3, 5, 40)
    arrays = [rng.random(shape) < 0.3, rng.integers(0, 1 << 32, shape, np.uint32), rng.integers(-9, 9, shape, np.int32)]
    for found, array in zip(sums(list(map(jnp.asarray, arrays)), axis), arrays, strict=True):
        dtype = np.int32 if array.dtype == bool else array.dtype
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, array.sum(axis, dtype, keepdims=axis is not None))


def test_one_of_two_sums_is_not_mixed_up_with_the_other_when_nobody_asks_for_it(way):
    mask = jnp.arange(70) % 3 == 0
    assert int(jax.jit(lambda mask: sums([mask, ~mask])[0])(mask)) == 24
    assert int(jax.jit(lambda mask: sums([mask, ~mask])[1])(mask)) == 46


@pytest.mark.parametrize("size", [0, 1, 32, 33, 72])
def test_any_true(way, size):
    mask = jnp.zeros(size, bool)
    assert not any_true(mask)
    assert not size or any_true(mask.at[-1].set(True))


def test_row_major():
    shape = (2, 3, 4)
    whole = np.arange(24).reshape(shape)
    np.testing.assert_array_equal(row_major(shape), whole)
    np.testing.assert_array_equal(row_major(shape, dtype=jnp.uint32), whole)
    np.testing.assert_array_equal(row_major(shape, (1, 2)), whole % 12)
    np.testing.assert_array_equal(row_major(shape, start=5), whole + 5)
    np.testing.assert_array_equal(row_major(shape, (0, 1, 2), np.array([100, 7])), whole % 12 + [[[100]], [[7]]])


def test_random_bits_look_random():
    key, like = jax.random.key(0), jnp.zeros((100, 1000))
    bits = np.asarray(random_bits(key, 3, like))
    assert bits.dtype == np.uint32
    assert len(np.unique(bits)) == bits.size  # one to one
    ones = np.unpackbits(bits.reshape(-1, 1).view(np.uint8), axis=1)
    assert abs(ones.mean(0) - 0.5).max() < 5 * 0.5 / np.sqrt(ones.shape[0])
    neighbours = ones[:-1] == ones[1:]
    assert abs(neighbours.mean(0) - 0.5).max() < 5 * 0.5 / np.sqrt(len(ones))
    # Another number, or another key, has other bits, not the same ones a few places on.
    for other in (random_bits(key, 4, like), random_bits(jax.random.key(1), 3, like)):
        assert not np.intersect1d(bits, other).size > 100
        assert abs(np.mean(np.unpackbits((bits ^ np.asarray(other)).view(np.uint8))) - 0.5) < 0.002


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_random_bits_do_not_depend_on_the_shape(impl):
    key = jax.random.key(7, impl=impl)
    flat = random_bits(key, jnp.int32(1), jnp.zeros(60, bool))
    np.testing.assert_array_equal(random_bits(key, 1, jnp.zeros((3, 4, 5), bool)).reshape(-1), flat)
    stacked = jax.vmap(lambda i, like: random_bits(key, i, like))(jnp.arange(3), jnp.zeros((3, 60)))
    np.testing.assert_array_equal(stacked[1], flat)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_fold_in_makes_other_keys(impl):
    key = jax.random.key(7, impl=impl)
    keys = [key, *(fold_in(key, number) for number in range(50)), fold_in(jax.random.key(8, impl=impl), 0)]
    assert {str(jax.random.key_impl(each)) for each in keys} == {str(jax.random.key_impl(key))}
    assert len({tuple(np.asarray(jax.random.key_data(each))) for each in keys}) == 52
    np.testing.assert_array_equal(
        *(jax.random.key_data(made(key, jnp.int32(3))) for made in (fold_in, jax.jit(fold_in)))
    )


@pytest.fixture
def mesh():
    """Eight devices on an axis of which types say where arrays lie."""
    return jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))


def test_lies_anywhere(mesh):
    spread = jax.device_put(jnp.zeros((8, 2)), jax.NamedSharding(mesh, jax.P("d")))
    assert lies_anywhere(jnp.zeros(3))
    assert not lies_anywhere(spread)
    told = []

    def local(x):
        told.append(lies_anywhere(x))
        return x

    jax.shard_map(local, mesh=mesh, in_specs=jax.P("d"), out_specs=jax.P("d"))(spread)
    assert told == [False]


def test_sums_of_what_is_spread(way, mesh):
    numbers = np.arange(16 * 40, dtype=np.int32).reshape(16, 40)
    spread = jax.device_put(jnp.asarray(numbers), jax.NamedSharding(mesh, jax.P("d")))

    def all_of(x):
        return *sums([x % 3 == 0, x]), any_true(x > 5)

    with jax.set_mesh(mesh):
        assert [int(n) for n in jax.jit(all_of)(spread)] == [(numbers % 3 == 0).sum(), numbers.sum(), 1]

        def local(x):
            return tuple(n[None] for n in all_of(x))

        found = jax.jit(jax.shard_map(local, in_specs=jax.P("d"), out_specs=jax.P("d")))(spread)
    parts = numbers.reshape(8, -1)
    for n, expected in zip(found, ((parts % 3 == 0).sum(1), parts.sum(1), (parts > 5).any(1)), strict=True):
        np.testing.assert_array_equal(n, expected)


def test_count_true_of_nothing(way):
    assert int(count_true(jnp.zeros((0, 3), bool))) == 0
