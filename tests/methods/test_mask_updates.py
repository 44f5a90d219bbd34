import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from tests.problems import gradients, make_params


def test_pruned_weights_land_on_zero_and_kept_ones_follow_the_optimizer():
    params = make_params()
    masks = jaxsparse.random_masks(params, 0.5)
    tx = optax.chain(optax.sgd(0.1), jaxsparse.mask_updates(masks))
    updates, _ = tx.update(gradients(params), tx.init(params), params)
    new = optax.apply_updates(params, updates)
    plain = optax.apply_updates(params, jax.tree.map(lambda g: -0.1 * g, gradients(params)))
    for n, p, mask in zip(*map(jax.tree.leaves, (new, plain, masks)), strict=True):
        np.testing.assert_allclose(n, jnp.where(mask, p, 0), rtol=1e-6)
        np.testing.assert_array_equal(np.asarray(n)[~np.broadcast_to(mask, n.shape)], 0)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (np.ones((16, 23), bool), r"masks of dense/kernel: expected bool of shape \(16, 24\)"),
        (np.ones((16, 24), np.float32), "got float32 of shape"),
        (np.zeros((), bool), "the scalar False would remove the whole leaf"),
        (None, "masks must have the tree of the params, but has nothing for dense/kernel"),
    ],
)
def test_masks_that_do_not_fit_are_named(kernel, message):
    masks = jaxsparse.random_masks(make_params(), 0.5)
    masks["dense"]["kernel"] = kernel
    with pytest.raises(ValueError, match=message):
        jaxsparse.mask_updates(masks).init(make_params())


def test_masks_of_leaves_that_are_not_there_are_named():
    masks = {**jaxsparse.random_masks(make_params(), 0.5), "extra": jnp.array(True)}
    with pytest.raises(ValueError, match="has extra beyond them"):
        jaxsparse.mask_updates(masks).init(make_params())


def test_numpy_masks_and_one_dimensional_leaves_are_taken():
    params = {"w": jnp.arange(1.0, 5.0)}
    tx = jaxsparse.mask_updates({"w": np.array([True, False, True, False])})
    state = tx.init(params)
    assert jaxsparse.sparsify(state, params)["w"].tolist() == [1.0, 0.0, 3.0, 0.0]
