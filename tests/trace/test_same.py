import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import trace


def raises(f, g, message, *args, **options):
    with pytest.raises(ValueError, match=message):
        trace.same(f, g, *args, **options)


def test_outputs_within_the_tolerance():
    trace.same(lambda x: {"a": [x]}, lambda x: {"a": [x * (1 + 1e-6)]}, jnp.arange(3.0))
    trace.same(lambda: np.zeros((2, 0)), lambda: np.zeros((2, 0)))
    trace.same(lambda: (1.0, None), lambda: (1.0, None))


def test_the_worst_output_is_named():
    y = np.array([[1.0, 4.0], [2.0, 2.0]], np.float32)
    wrong = y.copy()
    wrong[1, 0], wrong[0, 0] = 3, 1.1
    raises(
        lambda: {"a": y, "b": 100 * y},
        lambda: {"a": wrong, "b": 101 * y},
        r"a differs most at \[1, 0\]: 2.0 and 3.0, a relative error of 0.25 \(rtol=0.1\)",
        rtol=0.1,
    )
    raises(lambda: 2.0, lambda: 3.0, "the output differs most: 2.0 and 3.0")


def test_values_that_have_no_relative_error():
    special = np.array([np.nan, np.inf, -np.inf, 0.0])
    trace.same(lambda: special, lambda: special)
    for i in range(4):
        other = special.copy()
        other[i] = 1.0
        raises(lambda: special, lambda other=other: other, rf"at \[{i}\]: .* relative error of inf")
    raises(lambda: np.arange(3), lambda: np.array([0, 1, 3]), r"at \[2\]: 2 and 3")
    raises(lambda: np.array([True]), lambda: np.array([False]), r"at \[0\]: True and False")


def test_keys_of_random_numbers():
    keys = jax.random.wrap_key_data(np.arange(6, dtype=np.uint32).reshape(3, 2))
    trace.same(lambda: {"key": keys, "y": 1.0}, lambda: {"key": keys, "y": 1.0})
    other = jax.random.wrap_key_data(np.array([[0, 1], [2, 3], [4, 9]], np.uint32))
    raises(lambda: {"key": keys}, lambda: {"key": other}, r"the key data of key differs most at \[2, 1\]: 5 and 9")


def test_outputs_of_other_kinds():
    raises(lambda: {"a": 1.0, "b": 1.0}, lambda: {"a": 1.0, "c": 1.0}, "only one of the functions has the outputs b, c")
    raises(lambda: jnp.ones(3), lambda: jnp.ones(2), r"float32 of shape \(3,\), and float32 of shape \(2,\)")
    raises(lambda: jnp.ones(3), lambda: jnp.ones(3, jnp.bfloat16), "float32 .*, and bfloat16")
    raises(lambda: jax.random.key(0), lambda: np.uint32(0), r"key<fry> of shape \(\), and uint32")
    raises(lambda: np.uint32(0), lambda: jax.random.key(0), r"uint32 of shape \(\), and key<fry>")
    raises(lambda: jax.random.key(0), lambda: jax.random.key(0, impl="rbg"), "key<fry> .*, and key<rbg>")
    trace.same(lambda: jnp.ones(3, jnp.bfloat16), lambda: jnp.ones(3, jnp.bfloat16))
