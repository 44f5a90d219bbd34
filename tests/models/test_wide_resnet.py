from itertools import pairwise

import chex
import jax
import jax.numpy as jnp
import pytest

from jaxsparse import models
from tests.models.networks import numpy_images, numpy_variables, quick_jit

MODEL = models.WideResNet(10, 1, width=1 / 4)
IMAGES = (6, 8, 8, 3)


@pytest.fixture(scope="module")
def variables():
    return numpy_variables(MODEL, IMAGES)


@quick_jit
def evaluate(variables, images):
    return MODEL.apply(variables, images)


@quick_jit
def drop(variables, images, key):
    return MODEL.apply(variables, images, rngs={"dropout": key})


def test_dropout_is_on_where_it_has_an_rng(variables):
    images = numpy_images(IMAGES)
    first, second = (drop(variables, images, jax.random.key(seed)) for seed in (0, 1))
    chex.assert_trees_all_equal(first, drop(variables, images, jax.random.key(0)))
    for a, b in [(first, evaluate(variables, images)), (first, second)]:
        assert jnp.all(jnp.any(a != b, axis=1))  # in every image


def test_images_depend_on_each_other_in_training_alone(variables):
    @quick_jit
    def train(images):
        return MODEL.apply(variables, images, mutable=["batch_stats"])

    images = numpy_images(IMAGES)
    others = images.at[1:].add(1)
    chex.assert_trees_all_close(evaluate(variables, images)[0], evaluate(variables, others)[0], rtol=1e-5, atol=1e-6)
    (logits, updates), (other_logits, other_updates) = train(images), train(others)
    assert jnp.any(jnp.abs(logits[0] - other_logits[0]) > 1e-3)
    leaves = [jax.tree.leaves(tree["batch_stats"]) for tree in (variables, updates, other_updates)]
    for statistics in zip(*leaves, strict=True):
        assert all(jnp.any(a != b) for a, b in pairwise(statistics))
