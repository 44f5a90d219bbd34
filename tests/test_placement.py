"""States lie as the params do, and meet them: on meshes of either kind, in a shard_map, and of shapes alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxsparse
from jaxsparse.placement import zeros
from tests.problems import slow_except
from tests.test_contract import METHODS

SMALL = {
    "conv": {"kernel": jnp.linspace(-1, 1, 3 * 3 * 4 * 8).reshape(3, 3, 4, 8)},
    "dense": {"bias": jnp.zeros(8), "kernel": jnp.linspace(-1, 2, 16 * 8).reshape(16, 8)},
}


def mesh_of(kind):
    return jax.make_mesh((4,), ("x",), axis_types=(kind,), devices=jax.devices()[:4])


def sharded(params, mesh):
    """Along the last axis."""
    spec = {1: PartitionSpec("x"), 2: PartitionSpec(None, "x"), 4: PartitionSpec(None, None, None, "x")}
    return jax.tree.map(lambda p: jax.device_put(p, NamedSharding(mesh, spec[p.ndim])), params)


def around(name, params=SMALL):
    return METHODS[name].around(optax.sgd(0.05, momentum=0.9), params)


def trained(tx, params, state, scale, steps=3):
    @jax.jit
    def step(params, state, scale):
        grads = jax.tree.map(lambda p: (0.5 * p + 0.1) * jnp.mean(scale), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state, scale)
    return jax.device_get(params), state


@pytest.mark.parametrize("name", slow_except(["sparse_momentum", "l0"], METHODS))
def test_states_made_outside_of_jit_lie_as_the_params_do(name):
    params = sharded(SMALL, mesh_of(AxisType.Auto))
    state = around(name).init(params)
    whole = {p.shape: p.sharding for p in jax.tree.leaves(params)}
    alike = [x for x in jax.tree.leaves(state) if x.shape in whole and x.ndim > 1]
    assert len(alike) >= 4  # momentum, and masks or copies
    for x in alike:
        assert x.sharding.is_equivalent_to(whole[x.shape], x.ndim)
    masks = [jax.tree.leaves(jaxsparse.get_masks(x)) for x in (state, around(name).init(SMALL))]
    for mask, on_one_device in zip(*masks, strict=True):
        np.testing.assert_array_equal(mask, on_one_device)


@pytest.mark.parametrize("name", slow_except(["sparse_momentum"], METHODS))
def test_meshes_with_explicit_axes(name):
    mesh = mesh_of(AxisType.Explicit)
    tx = around(name)
    reference, _ = trained(tx, SMALL, tx.init(SMALL), jnp.ones(8))
    with jax.set_mesh(mesh):
        params = sharded(SMALL, mesh)
        scale = jax.device_put(jnp.ones(8), NamedSharding(mesh, PartitionSpec("x")))
        state = jax.jit(tx.init)(params)
        on_masks, evaluated = jax.jit(lambda p, s: (jaxsparse.sparsify(s, p), jaxsparse.eval_params(s, p)))(
            params, state
        )
        assert jax.typeof(on_masks["dense"]["kernel"]).sharding.spec == PartitionSpec(None, "x")
        assert jax.typeof(evaluated["dense"]["kernel"]).sharding.spec == PartitionSpec(None, "x")
        result, state = trained(tx, params, state, scale)
        jaxsparse.check(state, params | jax.tree.map(jnp.asarray, result))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), result, reference)


@pytest.mark.parametrize(
    "options",
    slow_except(
        [{"scope": "lamp"}],
        [{"scope": "lamp"}, {"scope": "output"}, {"score": jax.tree.map(jnp.sin, SMALL), "scope": "global"}],
    ),
)
def test_scopes_and_scores_of_magnitude_pruning_on_meshes_with_explicit_axes(options):
    tx = jaxsparse.magnitude_pruning(0.75, **options)
    alone = jax.jit(tx.update)(SMALL, tx.init(SMALL), SMALL)[1].masks
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = sharded(SMALL, mesh)
        masks = jax.jit(tx.update)(params, jax.jit(tx.init)(params), params)[1].masks
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(masks), jax.device_get(alone))
    assert masks["dense"]["kernel"].sharding.spec == PartitionSpec(None, "x")


@pytest.mark.slow
def test_data_on_a_mesh_and_all_else_where_it_was_made():
    tx = around("l0")
    reference, _ = trained(tx, SMALL, tx.init(SMALL), jnp.ones(8))
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(kind)
        scale = jax.device_put(jnp.ones(8), NamedSharding(mesh, PartitionSpec("x")))
        for params in (SMALL, sharded(SMALL, mesh)):
            result, _ = trained(tx, params, tx.init(params), scale)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), result, reference)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparse_momentum", "asni", "reweighted_l1", "l0", "s_ste", "top_kast"])
def test_in_a_shard_map_each_device_can_train_its_own(name):
    mesh = mesh_of(AxisType.Auto)
    tx = around(name)

    def train(params):
        params = jax.tree.map(lambda p: p[0], params)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.tree.map(lambda p: 0.5 * p + 0.1, params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=3)
        return jax.tree.map(lambda p: p[None], params)

    spec = PartitionSpec("x")
    together = jax.tree.map(lambda p: jnp.stack([p, 2 * p, p + 0.1, p]), SMALL)
    result = jax.jit(jax.shard_map(train, mesh=mesh, in_specs=spec, out_specs=spec))(together)
    alone, _ = trained(tx, SMALL, tx.init(SMALL), jnp.ones(8))
    for device in (0, 3):
        jax.tree.map(lambda a, b, i=device: np.testing.assert_allclose(a[i], b, atol=1e-5), result, alone)


DEEP = {
    f"block{i}": {"kernel": jnp.sin(jnp.arange(16.0 * 8) + i).reshape(16, 8), "bias": jnp.zeros(8)} for i in range(4)
} | {"head": {"kernel": jnp.cos(jnp.arange(8.0 * 4)).reshape(8, 4)}}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparse_momentum", "asni", "magnitude_pruning", "top_kast"])
def test_layers_that_are_stacked_at_mask_updates_lie_anywhere(name):
    tx = around(name, DEEP)
    alone, _ = trained(tx, DEEP, tx.init(DEEP), jnp.ones(8), steps=5)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(kind)
        with jax.set_mesh(mesh):
            params = sharded(DEEP, mesh)
            scale = jax.device_put(jnp.ones(8), NamedSharding(mesh, PartitionSpec("x")))
            result, state = trained(tx, params, jax.jit(tx.init)(params), scale, steps=5)
            jaxsparse.check(state, params | jax.tree.map(jnp.asarray, result))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), result, alone)
    lanes = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), DEEP)

    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.tree.map(lambda p: 0.5 * p + 0.1, params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=5)[0][0]

    vmapped = jax.jit(jax.vmap(train))(lanes)
    spec = PartitionSpec("x")
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    one = lambda lanes: jax.tree.map(lambda p: p[None], train(jax.tree.map(lambda p: p[0], lanes)))  # noqa: E731
    mapped = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec))(lanes)
    for results in (vmapped, mapped):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, atol=1e-5), results, alone)


@pytest.mark.parametrize("name", METHODS)
def test_shapes_alone_make_a_state_of_the_same_types(name):
    shapes = jax.eval_shape(lambda: SMALL)
    tx = around(name)
    of_shapes, of_arrays = tx.init(shapes), tx.init(SMALL)
    assert jax.tree.structure(of_shapes) == jax.tree.structure(of_arrays)
    for a, b in zip(*map(jax.tree.leaves, (of_shapes, of_arrays)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_zeros_of_a_reduced_shape_are_whole_along_the_axes_of_length_one():
    leaf = sharded(SMALL, mesh_of(AxisType.Auto))["conv"]["kernel"]
    assert zeros(leaf, (1, 1, 4, 8)).sharding.spec == PartitionSpec(None, None, None, "x")
    assert zeros(leaf, (1, 1, 4, 1)).sharding.spec == PartitionSpec(None, None, None, None)
    assert zeros(jax.ShapeDtypeStruct((4, 8), jnp.float32), (1, 8)).shape == (1, 8)
