import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from jaxsparse.masks import validate_masks
from jaxsparse.transforms import each, layers_of


def deep_params():
    """Four blocks of two kinds of layers, and two layers that stand alone."""
    shapes = {f"block{i}/{name}/kernel": shape for i in range(4) for name, shape in (("in", (8, 6)), ("out", (6, 8)))}
    shapes |= {"embed/kernel": (5, 8), "head/kernel": (8, 6)}
    return {path: jax.random.normal(jax.random.key(i), shape) for i, (path, shape) in enumerate(shapes.items())}


def layers_in_jit(params, masks):
    return layers_of(params, None, validate_masks(masks, params))


def stacked_paths(layers):
    return [[layers[i].path for i in stack.members] for stack in layers.stacks]


@pytest.mark.slow
def test_layers_of_one_size_are_stacked_under_jit_alone():
    params = deep_params()
    masks = jaxsparse.random_masks(params, 0.5)
    found = []

    def look(params):
        layers = layers_in_jit(params, masks)
        found.extend([stacked_paths(layers), stacked_paths(layers.shaped)])
        assert layers.stacks[0].layer.weight.shape == (9, 3, 16)

    jax.eval_shape(look, params)
    alike = [[f"block{i}/{name}/kernel" for i in range(4)] for name in ("in", "out")]
    assert found == [[sorted([*alike[0], *alike[1], "head/kernel"])], [[*alike[0], "head/kernel"], alike[1]]]
    assert layers_in_jit(params, masks).stacks == []


@pytest.mark.slow
def test_on_a_mesh_the_paths_of_a_stack_differ_in_numbers_alone():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    params = jax.device_put(deep_params(), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    masks = jaxsparse.random_masks(params, 0.5)
    found = []
    jax.jit(lambda params: found.append(stacked_paths(layers_in_jit(params, masks))))(params)
    assert found == [[[f"block{i}/{name}/kernel" for i in range(4)] for name in ("in", "out")]]


@pytest.mark.slow
def test_columns_are_lists_whatever_their_form():
    params = deep_params()
    masks = jaxsparse.random_masks(params, 0.5)

    def compute(params):
        layers = layers_in_jit(params, masks)
        column = each(layers, lambda layers: [2 * layer.weight for layer in layers])
        other = each(layers.shaped, lambda layers, twice: [x + 1 for x in twice], column)
        return list(column), [column[i] for i in range(len(layers))], column[2:4], list(other), len(column)

    listed, one_by_one, some, other, length = jax.jit(compute)(params)
    leaves = jax.tree.leaves(params)
    for i, leaf in enumerate(leaves):
        np.testing.assert_array_equal(listed[i], 2 * leaf)
        np.testing.assert_array_equal(one_by_one[i], 2 * leaf)
        np.testing.assert_array_equal(other[i], 2 * leaf + 1)
    np.testing.assert_array_equal(some[1], 2 * leaves[3])
    assert length == len(leaves)


def test_each_gives_every_layer_its_own_entries_in_order():
    params = deep_params()
    masks = jaxsparse.random_masks(params, 0.5)

    def compute(params):
        layers = layers_in_jit(params, masks)

        def function(layers, factors, shifts):
            sums = jnp.stack([layer.weight.sum() * f for layer, f in zip(layers, factors, strict=True)])
            return sums, [layer.weight + shift for layer, shift in zip(layers, shifts, strict=True)]

        shifts = [jnp.full(layer.weight.shape, i) for i, layer in enumerate(layers)]
        sums, moved = each(layers, function, jnp.arange(10.0), shifts)
        return sums, list(moved), list(each(layers, lambda layers: [x.mask for x in layers]))

    sums, moved, kept = jax.jit(compute)(params)
    for i, leaf in enumerate(jax.tree.leaves(params)):
        np.testing.assert_allclose(sums[i], i * leaf.sum(), rtol=1e-5)
        np.testing.assert_array_equal(moved[i], leaf + i)
        np.testing.assert_array_equal(kept[i], jax.tree.leaves(masks)[i])


def momentum(**options):
    return jaxsparse.sparse_momentum(0.6, 1, decay=0.9, **{"prune_rate": 0.4, **options})


RULES = [
    momentum,
    lambda: jaxsparse.asni(0.7, 1),
    lambda: momentum(growth="random"),
    lambda: momentum(growth="momentum_neuron", redistribution="magnitude"),
    lambda: momentum(prune="SET", redistribution="nonzeros"),
    lambda: momentum(prune="global_magnitude"),
    lambda: momentum(structure=jaxsparse.block(2, 2)),
    lambda: jaxsparse.sparse_momentum(0.5, 1, decay=0.9, structure={"*/out/*": jaxsparse.n_of_m(1, 2)}),
    lambda: jaxsparse.asni(0.7, 1, at_least=30),
    lambda: jaxsparse.asni(0.7, 1, structure={"*/in/*": jaxsparse.block(4, 2), "*/out/*": jaxsparse.n_of_m(1, 2)}),
    lambda: jaxsparse.magnitude_pruning(0.7, begin=1),
    lambda: jaxsparse.magnitude_pruning(0.7, begin=1, scope="lamp", structure={"*/in/*": "channel"}),
    lambda: jaxsparse.magnitude_pruning(0.7, begin=1, score=jaxsparse.saliency.movement),
    lambda: jaxsparse.granet(0.7, 1, steps=3, end=2, drop_fraction=0.4, structure={"*/in/*": jaxsparse.block(4, 2)}),
    lambda: jaxsparse.ac_dc(0.7, [0, 2], [1], scope="layer"),
    lambda: jaxsparse.iterative_hard_thresholding(0.7, scope="global", at_least=30),
]


@pytest.mark.slow
@pytest.mark.parametrize("make", RULES)
def test_stacked_layers_get_the_masks_that_they_get_by_themselves(make):
    params, tx = deep_params(), make()
    grads = {
        path: jax.random.normal(jax.random.key(100 + i), leaf.shape) for i, (path, leaf) in enumerate(params.items())
    }

    def trained(update):
        opt_state, weights = tx.init(params), params
        weights = jaxsparse.sparsify(opt_state, weights)
        for _ in range(3):
            updates, opt_state = update(grads, opt_state, weights, grad=grads)
            weights = optax.apply_updates(weights, updates)
        jaxsparse.check(opt_state, weights)
        return jaxsparse.get_masks(opt_state)

    jax.tree.map(np.testing.assert_array_equal, trained(jax.jit(tx.update)), trained(tx.update))
