import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

from jaxsparse import models
from jaxsparse.inspect import class_activity, class_specialization


def by_the_authors_steps(sums, drop=0.05):
    """What sparselearning/utils.py computes, step by step: the shares in increasing order of the channels' activity."""
    of_channel = sums.sum(1) / sums.sum()
    order = np.argsort(of_channel)
    kept = order[np.searchsorted(np.cumsum(np.sort(of_channel)), drop) :]
    return (sums[kept] / sums[kept].sum(1, keepdims=True)).max(1)


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(2, 12))
def test_specialization_is_the_authors(seed, channels, classes):
    sums = np.random.default_rng(seed).gamma(0.5, size=(channels, classes)) + 1e-6
    found = class_specialization({"conv": sums})["conv"]
    np.testing.assert_allclose(np.sort(found), np.sort(by_the_authors_steps(sums)))
    assert (found >= 1 / classes - 1e-12).all()
    assert (found <= 1).all()


def test_the_channels_that_do_next_to_nothing_are_left_out():
    activity = {"conv": np.array([[0.01, 0.0], [3.0, 1.0], [0.0, 0.0], [1.0, 1.0]])}
    np.testing.assert_allclose(class_specialization(activity)["conv"], [0.75, 0.5])
    np.testing.assert_allclose(class_specialization(activity, drop=0.0)["conv"], [1.0, 0.75, 0.5])
    assert class_specialization({"dead": np.zeros((4, 3))})["dead"].shape == (0,)


def test_activity_sums_over_examples_and_places_of_a_class():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(11, 4, 3, 5)).astype(np.float32), rng.integers(0, 3, 11)
    expected = np.stack([np.abs(features[labels == k]).sum((0, 1, 2)) for k in range(3)], 1)
    found = jax.jit(class_activity, static_argnums=2)({"conv": features}, labels, 3)
    np.testing.assert_allclose(found["conv"], expected, rtol=1e-5)
    halves = [class_activity({"conv": features[half]}, labels[half], 3) for half in (slice(0, 4), slice(4, None))]
    np.testing.assert_allclose(jax.tree.map(jnp.add, *halves)["conv"], expected, rtol=1e-5)
    of_units = class_activity({"fc": features[:, 0, 0]}, labels, 3)["fc"]
    assert of_units.shape == (5, 3)


@pytest.mark.slow
def test_features_of_a_flax_model():
    model, images = models.LeNet5Caffe(), jnp.ones((6, 28, 28, 1))
    variables = model.init(jax.random.key(0), images)
    _, state = model.apply(variables, images, capture_intermediates=True, mutable=["intermediates"])
    features = {
        name: nn.relu(value["__call__"][0]) for name, value in state["intermediates"].items() if name != "__call__"
    }
    activity = class_activity(features, jnp.arange(6) % 3, 3)
    assert {path: value.shape for path, value in activity.items()} == {
        "conv1": (20, 3), "conv2": (50, 3), "fc1": (500, 3), "fc2": (10, 3),
    }  # fmt: skip
    for shares in class_specialization(activity).values():  # all images are the same
        np.testing.assert_allclose(shares, 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("features", [jnp.ones((5, 3)), jnp.ones(4)])
def test_activations_that_do_not_fit_the_labels(features):
    with pytest.raises(ValueError, match=r"activations of conv: expected \(examples, ..., channels\) with 4 examples"):
        class_activity({"conv": features}, jnp.zeros(4, int), 2)


def test_activities_that_are_none():
    for bad in (np.ones(3), -np.ones((2, 2)), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="activity of conv: expected"):
            class_specialization({"conv": bad})
    with pytest.raises(ValueError, match=r"drop: expected a share in \[0, 1\), got 1"):
        class_specialization({}, drop=1)
