"""Layers that compute with sparse weights."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import jaxsparse
from jaxsparse.models import MLP
from jaxsparse.nn import SparseConv, SparseDense, mask_collection
from tests.problems import jit_once, slow_except

CONVOLUTIONS = {
    "1x1": ((1, 1), (1, 1), "SAME"),
    "1x1, strides": ((1, 1), (2, 2), "VALID"),
    "3x3": ((3, 3), (2, 1), "SAME"),
    "1x1, padded": ((1, 1), (1, 1), ((1, 1), (0, 2))),
}


def random_mask(shape, seed=0, block=None):
    units = shape if block is None else (*shape[:-2], shape[-2] // block[0], shape[-1] // block[1])
    mask = np.random.default_rng(seed).random(units) < 0.4
    if block is not None:
        mask = mask.repeat(block[0], -2).repeat(block[1], -1)
    return jnp.asarray(mask)


def gradients(layer, params, masks, x, **how):
    """Jitted, which compiles faster than step by step."""
    return jax.jit(jax.grad(lambda p: jnp.sin(layer.apply({"params": p, "masks": masks}, x, **how)).sum()))(params)


@pytest.mark.parametrize(
    "options", [{"strides": 2}, {"padding": 1}, {"padding": (1, (0, 2)), "strides": (1, 2)}, {"padding": "VALID"}]
)
def test_windows_are_said_as_to_flax(options):
    x = jax.random.normal(jax.random.key(0), (2, 8, 9, 3))
    ours, theirs = SparseConv(4, (3, 3), **options), nn.Conv(4, (3, 3), **options)
    variables = ours.init(jax.random.key(1), x)
    np.testing.assert_array_equal(ours.apply(variables, x), theirs.apply(variables, x))


def test_a_single_mask_is_true():
    layer, x = SparseDense(4), jnp.ones((1, 3))
    variables = layer.init(jax.random.key(0), x)
    np.testing.assert_array_equal(layer.apply(variables, x, jnp.array(True)), layer.apply(variables, x))
    for wrong in (jnp.array(False), jnp.array(1.0)):
        with pytest.raises(ValueError, match="mask of kernel must be bool of its shape .*, or True where it is dense"):
            layer.apply(variables, x, wrong)


@pytest.mark.parametrize("block", [None, (4, 8)])
def test_dense_layer_is_flax_with_masked_kernel(block):
    x = jax.random.normal(jax.random.key(0), (3, 5, 16))
    layer, plain = SparseDense(24, block=block), nn.Dense(24)
    params = layer.init(jax.random.key(1), x)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, plain.init(jax.random.key(1), x)["params"])
    mask = random_mask((16, 24), block=block)
    masked = {**params, "kernel": jnp.where(mask, params["kernel"], 0)}
    for masks in ({"kernel": mask, "bias": jnp.array(True)}, {"kernel": mask}):
        y = layer.apply({"params": params, "masks": masks}, x)
        np.testing.assert_allclose(y, plain.apply({"params": masked}, x), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(layer.apply({"params": params}, x, mask), y)
    # All weights have gradients, as growing methods need, or those that live.
    full = jax.grad(lambda p: jnp.sin(plain.apply({"params": p}, x)).sum())(masked)["kernel"]
    dense = gradients(layer, params, masks, x)["kernel"]
    sparse = gradients(layer, params, masks, x, dense_weight_grad=False)["kernel"]
    np.testing.assert_allclose(dense, full, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sparse, jnp.where(mask, full, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "block"),
    slow_except([("3x3", (2, 4)), ("1x1, padded", (2, 4))], itertools.product(CONVOLUTIONS, (None, (2, 4)))),
)
def test_convolution_is_flax_with_masked_kernel(name, block):
    size, strides, padding = CONVOLUTIONS[name]
    x = jax.random.normal(jax.random.key(0), (2, 6, 7, 4))
    layer = SparseConv(8, size, strides, padding, block=block)
    plain = nn.Conv(8, size, strides, padding)
    params = layer.init(jax.random.key(1), x)["params"]
    mask = random_mask((*size, 4, 8), block=block)
    masked = {**params, "kernel": jnp.where(mask, params["kernel"], 0)}
    y = layer.apply({"params": params, "masks": {"kernel": mask}}, x)
    np.testing.assert_allclose(y, plain.apply({"params": masked}, x), rtol=1e-5, atol=1e-5)
    full = jax.grad(lambda p: jnp.sin(plain.apply({"params": p}, x)).sum())(masked)["kernel"]
    for dense in (True, jnp.array(True), False, jnp.array(False)):
        ours = gradients(layer, params, {"kernel": mask}, x, dense_weight_grad=dense)["kernel"]
        np.testing.assert_allclose(ours, full if dense else jnp.where(mask, full, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masks", [{}, {"kernel": jnp.array(True)}])
def test_without_masks_layers_are_dense(masks):
    x = jnp.arange(12.0).reshape(3, 4)
    params = {"kernel": jnp.ones((4, 8)), "bias": jnp.arange(8.0)}
    y = SparseDense(8, block=(2, 2)).apply({"params": params, "masks": masks}, x)
    np.testing.assert_allclose(y, nn.Dense(8).apply({"params": params}, x))


def test_computes_in_the_dtype_it_is_told():
    x = jnp.ones((2, 4))
    layer = SparseDense(8, dtype=jnp.bfloat16)
    variables = {**layer.init(jax.random.key(0), x), "masks": {"kernel": jnp.ones((4, 8), bool)}}
    assert variables["params"]["kernel"].dtype == jnp.float32
    assert layer.apply(variables, x).dtype == jnp.bfloat16


def test_a_mask_that_does_not_fit_is_named():
    model = MLP(features=(8,), num_classes=2)
    x = jnp.ones((1, 4))
    params = model.init(jax.random.key(0), x)["params"]
    with pytest.raises(
        ValueError, match=r"mask of fc1/kernel must be bool of its shape \(4, 8\), .* got bool of .*8, 4"
    ):
        model.apply({"params": params, "masks": {"fc1": {"kernel": jnp.ones((8, 4), bool)}}}, x)
    with pytest.raises(ValueError, match=r"blocks for each of its 2 layers"):
        MLP(features=(8,), blocks=(None,)).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"needs x \(batch, 2 axes, inputs\), got \(1, 4\)"):
        SparseConv(3, (1, 1)).init(jax.random.key(0), x)


@pytest.mark.slow
def test_trains_with_block_sparse_momentum_and_evaluates_with_no_other_change():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)
    labels = x[:, :4].argmax(-1)
    model = MLP(num_classes=4, features=(32, 32), blocks=((8, 8), (8, 8), None))
    params = model.init(jax.random.key(0), x)["params"]
    block = jaxsparse.block(8, 8)
    tx = jaxsparse.chain(
        optax.sgd(0.1, momentum=0.9),
        jaxsparse.sparse_momentum(
            0.75, update_every=5, structure={"fc1/kernel": block, "fc2/kernel": block}, prune_rate=0.3
        ),
    )
    opt_state = tx.init(params)
    params = jaxsparse.sparsify(opt_state, params)
    first = jaxsparse.get_masks(opt_state, params)

    def loss_of(params, masks, dense):
        logits = model.apply({"params": params, "masks": masks}, x, dense_weight_grad=dense)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jit_once
    def step(params, opt_state, dense):
        masks = jaxsparse.get_masks(opt_state, params)
        loss, grads = jax.value_and_grad(loss_of)(params, masks, dense)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    losses = []
    for i in range(60):
        params, opt_state, loss = step(params, opt_state, jnp.array(i % 5 in (0, 3, 4)))
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2
    masks = jaxsparse.get_masks(opt_state, params)
    assert (masks["fc2"]["kernel"] != first["fc2"]["kernel"]).any()
    assert int(block.units(masks["fc2"]["kernel"]).sum()) * 64 == int(masks["fc2"]["kernel"].sum())
    # The pruned weights are 0 in the params, so the dense network computes the same.
    sparse = model.apply({"params": params, "masks": masks}, x)
    np.testing.assert_allclose(sparse, model.apply({"params": params}, x), rtol=1e-5, atol=1e-5)


def stacked(lift, axes):
    """A model of three layers with kernels (3, 8, 8), as nn.scan or nn.vmap stack them, and a plain one."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            y = SparseDense(8, block=(4, 4))(x)
            return (y, None) if lift is nn.scan else y

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"variable_axes": axes, "split_rngs": {"params": True}}
            if lift is nn.scan:
                x, _ = nn.scan(Block, length=3, **options)(name="layers")(x, None)
            else:
                x = nn.vmap(Block, axis_size=3, in_axes=None, **options)(name="layers")(x).sum(0)
            return nn.remat(SparseDense)(8, name="last")(x)

    return Model()


@pytest.mark.slow
@pytest.mark.parametrize("lift", slow_except([nn.scan], [nn.scan, nn.vmap]))
def test_layers_under_scan_and_vmap_take_their_masks(lift):
    x = jax.random.normal(jax.random.key(0), (2, 8))
    model = stacked(lift, {"params": 0, "masks": 0})
    params = model.init(jax.random.key(1), x)["params"]
    masks = jaxsparse.magnitude_masks(params, 0.5, structure=jaxsparse.block(4, 4))
    path = ("SparseDense_0", "kernel")
    kernel = masks["layers"][path[0]][path[1]]
    assert kernel.shape == (3, 8, 8)
    assert int(kernel.sum()) == 96
    sparse = model.apply({"params": params, "masks": mask_collection(masks)}, x)
    np.testing.assert_allclose(sparse, model.apply({"params": jaxsparse.apply_masks(params, masks)}, x), rtol=1e-5)
    for given in (masks, mask_collection(masks)):
        with pytest.raises(ValueError, match=r"a mask for layers/SparseDense_0/kernel, but .* variable_axes="):
            stacked(lift, {"params": 0}).apply({"params": params, "masks": given}, x)
    # Without masks, or with one of a layer that is reached, nothing is missing.
    dense = model.apply({"params": params}, x)
    np.testing.assert_array_equal(stacked(lift, {"params": 0}).apply({"params": params}, x), dense)
    stacked(lift, {"params": 0}).apply({"params": params, "masks": {"last": masks["last"]}}, x)
