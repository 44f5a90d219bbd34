import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import checksums

DTYPES = [np.bool_, np.uint8, np.float16, ml_dtypes.bfloat16, np.int32, np.float32, np.float64, np.complex64]


def checksum(state):
    return checksums.together(checksums.parts(state))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (40_000,), (3, 5, 2), (0, 4)])
def test_every_changed_bit_is_found(dtype, shape):
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    saved = checksum({"w": array, "rest": np.ones(3)})
    assert checksums.differing(saved, checksums.parts({"w": array.copy(), "rest": np.ones(3)})) == []
    rng = np.random.default_rng(1)
    for _ in range(min(array.size, 20)):
        broken = array.copy()
        words = broken.reshape(-1).view(np.uint8)
        words[rng.integers(words.size)] ^= 1 << (0 if dtype == np.bool_ else rng.integers(8))
        assert checksums.differing(saved, checksums.parts({"w": broken, "rest": np.ones(3)})) == ["w"]


@given(st.integers(0, 2**32 - 1))
def test_entries_that_change_places_are_found(seed):
    rng = np.random.default_rng(seed)
    array = rng.random((5, 6), np.float32)
    i, j = rng.choice(30, 2, replace=False)
    changed = array.copy()
    changed.flat[[i, j]] = array.flat[[j, i]]
    assert checksum({"w": array}) != checksum({"w": changed})
    assert checksum({"w": array}) != checksum({"w": array.T.copy()})
    assert checksum({"w": array}) != checksum({"v": array})


def test_dtypes_and_leaves_that_are_missing_are_found():
    saved = checksum({"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)})
    found = checksums.parts({"a": np.zeros(2, np.int32), "c": np.zeros(2, np.float32)})
    assert checksums.differing(saved, found) == ["a", "b", "c"]


@pytest.mark.parametrize("spec", [(), ("x",), (None, "y"), ("x", "y"), (("x", "y"),), ("y", None, "x")])
def test_sharded_arrays_have_the_checksum_of_the_whole(spec, monkeypatch):
    array = np.random.default_rng(0).random((8, 16, 12)).astype(ml_dtypes.bfloat16)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    sharded = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    whole = checksum({"w": array})
    assert checksum({"w": sharded}) == whole
    # As of several processes: none can see all.
    monkeypatch.setattr(type(sharded), "is_fully_addressable", property(lambda self: False))
    assert checksums.parts({"w": sharded})["w"].whole == (spec == ())
    assert checksum({"w": sharded}) == whole


def test_keys():
    assert checksum({"key": jax.random.key(1)}) != checksum({"key": jax.random.key(2)})
    assert checksum({"key": jnp.zeros((0,), jnp.float32)}) == checksum({"key": np.zeros((0,), np.float32)})
