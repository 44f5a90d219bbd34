"""Something small that two versions of the library can be timed with."""

import jax.numpy as jnp

import jaxsparse


def case(name):
    if name == "a method that is not there":
        raise AttributeError("module 'jaxsparse' has no attribute 'x'")
    masks = {"w": jnp.ones((2, 2), bool)}
    return lambda: jaxsparse.density(masks)
