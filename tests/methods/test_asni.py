import chex
import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse
from jaxsparse import models, structures
from jaxsparse.trees import by_path
from tests.problems import SPARSE_SIZE, make_params, make_step, slow_except

# Totals of the author's logs: all params that are not zero, and the share of zeros at the last evaluation, in %.
LOGGED = {
    "vgg16": (0.99, 160, 16, 265_923, 98.149),  # logged 265,924
    "fc": (0.98, 50, 5, 7_868, 96.874),
    "conv4": (0.95, 25, 2, 129_470, 94.469),  # logged 129,466 to 129,469: a few biases that were 0 count as pruned
}
NETWORKS = {
    "vgg16": (models.VGG("16"), (32, 32, 3)),
    "fc": (models.LeNet300100(), (28, 28, 1)),
    "conv4": (models.Conv4(), (32, 32, 3)),
}


def shapes(name):
    model, shape = NETWORKS[name]
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))["params"]


def sizes(params):
    """Of prunable weights, and of the rest."""
    weights = sum(leaf.size for leaf in jax.tree.leaves(params) if len(leaf.shape) > 1)
    return weights, sum(leaf.size for leaf in jax.tree.leaves(params)) - weights


@pytest.mark.parametrize("name", LOGGED)
def test_counts_alone_give_the_totals_of_the_authors_logs(name):
    magnitude, stages, scale, nonzeros, zero_percent = LOGGED[name]
    weights, rest = sizes(shapes(name))
    counts = jaxsparse.asni_counts(jaxsparse.sigmoid_sparsity(magnitude, stages, scale, begin=1), weights, 1, stages)
    assert counts[-1] + rest == nonzeros
    assert 100 * (weights - counts[-2]) / (weights + rest) == pytest.approx(zero_percent, abs=5e-4)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("fc", marks=pytest.mark.slow),
        pytest.param("conv4", marks=pytest.mark.slow),
        pytest.param("vgg16", marks=pytest.mark.long),
    ],
)
def test_the_transformation_has_these_totals_on_the_params_of_the_networks(name):
    magnitude, stages, scale, nonzeros, zero_percent = LOGGED[name]
    params = shapes(name)
    keys = jax.tree.unflatten(jax.tree.structure(params), range(len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda s, i: jax.random.normal(jax.random.key(i), s.shape), params, keys)
    tx = jaxsparse.asni(jaxsparse.sigmoid_sparsity(magnitude, stages, scale, begin=1), update_every=1)
    zeros = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def step(params, opt_state):
        updates, opt_state = tx.update(zeros, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for _ in range(stages):  # to the end of training, after which nothing is pruned any more
        params, opt_state = step(params, opt_state)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    left = sum(int((leaf != 0).sum()) for leaf in jax.tree.leaves(params))
    assert 100 * (1 - left / total) == pytest.approx(zero_percent, abs=5e-4)
    params, opt_state = step(params, opt_state)  # one step past it
    assert sum(int((leaf != 0).sum()) for leaf in jax.tree.leaves(params)) == nonzeros
    jaxsparse.check(opt_state, params)


def authors_pruning(weights, percent):
    """utils/pruning.py in NumPy: the threshold is the k-th smallest magnitude of the weights that are not zero."""
    alive = np.concatenate([np.abs(w[w != 0]) for w in weights])
    k = int(len(alive) * percent / 100)
    if percent <= 0.1:
        return weights
    threshold = np.sort(alive)[k - 1]
    return [np.where(np.abs(w) > threshold, w, 0) for w in weights]


def test_the_same_weights_go_as_in_the_authors_code_while_they_train():
    params = make_params()
    schedule = jaxsparse.sigmoid_sparsity(0.95, steps=36, scale=4.5, begin=3)
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), jaxsparse.asni(schedule, 3))
    step = jax.jit(tx.update)
    opt_state, before = tx.init(params), 0.0
    for count in range(3 * 12):
        gradient = jax.tree.map(lambda p, c=count: jax.random.normal(jax.random.key(c), p.shape, p.dtype), params)
        updates, opt_state = step(gradient, opt_state, params)
        if count and count % 3 == 0:
            percent = 95 / (1 + np.exp(-(count // 3 - 1 - 6) / 1.5))
            names = [name for name, leaf in by_path(params).items() if leaf.ndim > 1 and "bias" not in name]
            weights = [np.asarray(by_path(params)[name]) for name in names]
            expected = authors_pruning(weights, 100 * (percent - before) / (100 - before))
            before = percent
            masks = by_path(jaxsparse.get_masks(opt_state))
            for name, kept in zip(names, expected, strict=True):
                np.testing.assert_array_equal(masks[name], kept != 0, err_msg=name)
        params = optax.apply_updates(params, updates)
        jaxsparse.check(opt_state, params)


def run(tx, params, steps):
    """The counts of weights after each step of no update."""
    opt_state, counts = tx.init(params), []
    zeros = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, opt_state = update(zeros, opt_state, params)
        params = optax.apply_updates(params, updates)
        counts.append(int(jaxsparse.count(jaxsparse.get_masks(opt_state))))
    return params, opt_state, counts


def test_weights_go_on_multiples_of_update_every_and_never_on_step_0():
    params = {"w": jnp.arange(1.0, 101.0).reshape(10, 10)}
    # A little more than 0.8: of 20 weights that are 19.999 after rounding, 19 would go.
    _, _, counts = run(jaxsparse.asni(optax.linear_schedule(0, 0.801, 8), update_every=2), params, 11)
    assert counts == [100, 100, 80, 80, 60, 60, 40, 40, 20, 20, 20]


def test_ties_are_pruned_to_the_exact_count_and_the_first_stay():
    params, _, counts = run(jaxsparse.asni(0.75, update_every=1), {"a": jnp.ones((2, 4)), "b": jnp.ones((2, 4))}, 2)
    assert counts == [16, 4]
    assert params["a"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]


def test_small_shares_are_skipped_and_not_made_up_for():
    params = {"w": jax.random.normal(jax.random.key(0), (100, 100))}
    schedule = optax.linear_schedule(0, 0.05, 100)  # 0.05% a step
    assert run(jaxsparse.asni(schedule, 1), params, 101)[2][-1] == 10_000
    exact = jaxsparse.magnitude_pruning(schedule, every=1, scope="global")
    assert run(exact, params, 101)[2][1::33] == [9_995, 9_830, 9_665, 9_500]


@pytest.mark.parametrize(
    "schedule",
    [lambda t: jnp.clip(1.1 - 0.2 * t, 0, 1), lambda t: jnp.where(t % 5 == 3, 2.0 * t - 3, 0.5), 1.0, 0.0],
)
def test_odd_schedules_never_bring_weights_back_nor_fail(schedule):
    _, opt_state, counts = run(jaxsparse.asni(schedule, 1), {"w": jnp.arange(1.0, 101.0).reshape(10, 10)}, 5)
    assert counts == sorted(counts, reverse=True)
    jaxsparse.check(opt_state)


@pytest.mark.parametrize("schedule", [lambda t: 90.0, lambda t: jnp.nan, lambda t: -0.1, 90.0])
def test_schedules_that_are_no_fractions_are_an_error(schedule):
    with pytest.raises(ValueError, match=r"sparsity( of step 0)? must be at least 0 and at most 1, got "):
        jaxsparse.asni(schedule, 1)


def test_weights_that_are_zero_already_go_first():
    params = {"a": jnp.zeros((5, 2)), "b": jnp.ones((5, 2))}
    masks = jaxsparse.get_masks(run(jaxsparse.asni(0.5, 1), params, 2)[1])
    assert not masks["a"].any()
    assert masks["b"].all()


def test_nan_weights_are_reported():
    params = {"w": jnp.array([[1.0, jnp.nan], [3.0, 4.0]])}
    opt_state = run(jaxsparse.asni(0.25, 1), params, 2)[1]
    with pytest.raises(jaxsparse.SparsityError, match="asni: 1 NaN"):
        jaxsparse.check(opt_state)


@pytest.mark.parametrize(
    ("args", "message"),
    [((1.5, 10), "sparsity must be at least 0 and at most 1, got 1.5"), ((0.5, 0), "update_every must be at least 1")],
)
def test_bad_input(args, message):
    with pytest.raises(ValueError, match=message):
        jaxsparse.asni(*args)


def test_an_injected_schedule_prunes_as_the_schedule_itself():
    schedule, params = optax.linear_schedule(0, 0.8, 4), {"w": jnp.arange(1.0, 101.0).reshape(20, 5)}
    tx = optax.inject_hyperparams(jaxsparse.asni, static_args="update_every")(schedule, update_every=2)
    assert run(tx, params, 5)[2] == run(jaxsparse.asni(schedule, 2), params, 5)[2] == [100, 100, 60, 60, 20]


# --- Units larger than a weight ---------------------------------------------------------------------------------------


def by_loop(scores, sizes, left):
    """From the largest unit down, until one does not fit: the masks, and how many weights they keep."""
    order = sorted(((-s, i, at) for i, each in enumerate(scores) for at, s in np.ndenumerate(each)))
    masks, kept = [np.zeros(each.shape, bool) for each in scores], 0
    for _, i, at in order:
        if kept + sizes[i] > left:
            break
        kept += sizes[i]
        masks[i][at] = True
    return masks, kept


@pytest.mark.parametrize("score", ["mean", "sum"])
def test_units_of_all_leaves_rank_together(score):
    shapes = {"a": (8, 12), "b": (3, 3, 2, 8), "c": (6, 5)}
    params = {name: jax.random.normal(jax.random.key(i), shape) for i, (name, shape) in enumerate(shapes.items())}
    structure = {"a": jaxsparse.block(2, 3, score=score), "b": structures.channel(score=score)}
    schedule = optax.linear_schedule(0, 0.7, 7)
    tx = jaxsparse.magnitude_pruning(schedule, every=1, scope="global", structure=structure)
    reduce = getattr(np, score)
    a, b, c = (np.abs(params[name]) for name in "abc")
    scores = [reduce(a.reshape(4, 2, 4, 3), (1, 3)), reduce(b, (0, 1, 2)), c]
    step, opt_state, counts, budgets = jax.jit(tx.update), tx.init(params), [], []
    zeros = jax.tree.map(jnp.zeros_like, params)
    for count in range(8):
        updates, opt_state = step(zeros, opt_state, params)
        left = 270 - round(270 * 0.1 * count)
        masks, kept = by_loop(scores, [6, 18, 1], left)
        ours = jaxsparse.get_masks(opt_state)
        np.testing.assert_array_equal(ours["a"], np.kron(masks[0], np.ones((2, 3), bool)))
        np.testing.assert_array_equal(ours["b"], np.broadcast_to(masks[1], (3, 3, 2, 8)))
        np.testing.assert_array_equal(ours["c"], masks[2])
        assert int(opt_state.kept) == kept
        counts.append(kept)
        budgets.append(left)
        jaxsparse.check(opt_state, optax.apply_updates(params, updates))
    assert all(left - 18 < kept <= left for kept, left in zip(counts, budgets, strict=True))
    assert counts != budgets  # of which some are met by no prefix


def test_what_is_short_of_the_schedule_is_made_up_for():
    # Four blocks of 16. Were each pruning counted from what the one before kept, nothing would be left at the end.
    params = {"w": jnp.arange(1.0, 65.0).reshape(8, 8)}
    schedule = optax.linear_schedule(0, 0.75, 9)
    _, opt_state, counts = run(jaxsparse.asni(schedule, 1, structure=jaxsparse.block(4, 4)), params, 10)
    left = jaxsparse.asni_counts(schedule, 64, 1, 9)
    assert counts == [64, *(16 * (n // 16) for n in left)]
    jaxsparse.check(opt_state)


@pytest.mark.parametrize("everywhere", slow_except([False], [True, False]))
def test_two_of_four(everywhere):
    rule = jaxsparse.n_of_m(2, 4)
    params = {"a": jax.random.normal(jax.random.key(0), (16, 12)),
              "b": 0.1 * jax.random.normal(jax.random.key(1), (3, 3, 8, 4))}  # fmt: skip
    structure = rule if everywhere else {"a": rule}
    schedule = optax.linear_schedule(0, 0.5, 5)
    tx = jaxsparse.magnitude_pruning(schedule, every=1, scope="global", structure=structure)
    trained, opt_state, counts = run(tx, params, 6)
    assert counts == [480, 432, 384, 336, 288, 240]
    masks = jaxsparse.get_masks(opt_state)
    assert (rule.counts(masks["a"]) >= 2).all()
    # Of every group the largest two are there, whatever else.
    assert (masks["a"] | ~rule.top(params["a"], absolute=True)).all()
    if everywhere:
        assert all(bool(rule.holds(mask)) for mask in masks.values())
    else:  # a network of which a part is free: it has smaller weights
        assert int(masks["b"].sum()) < 144
    # What a schedule asks beyond is not there to take.
    tx = jaxsparse.asni(0.9, 1, structure=structure)
    _, opt_state, counts = run(tx, trained, 2)
    assert counts[-1] == (240 if everywhere else 96)
    jaxsparse.check(opt_state)


@pytest.mark.slow
@pytest.mark.parametrize("structure", [{"attention/kernel": jaxsparse.block(2, 4), "conv/kernel": "channel",
                                        "dense/kernel": jaxsparse.n_of_m(1, 4)}])  # fmt: skip
def test_units_in_every_layout(structure):
    params = make_params()
    tx = jaxsparse.chain(
        optax.sgd(0.05, momentum=0.9), jaxsparse.asni(optax.linear_schedule(0, 0.6, 6), 2, structure=structure)
    )
    opt_state, step = tx.init(params), make_step(tx)

    def trained(params, opt_state, step):
        for count in range(7):
            params, opt_state = step(params, opt_state, jnp.int32(count))
        return params, opt_state

    alone, state = trained(params, opt_state, step)
    jaxsparse.check(state, alone)
    assert 0.3 * SPARSE_SIZE < int(state[-1].kept) < 0.45 * SPARSE_SIZE
    # Sharded over eight devices along the first axis that divides.
    mesh = jax.make_mesh((8,), ("d",))

    def shard(x):
        at = next((d for d, size in enumerate(x.shape) if size % 8 == 0), None)
        spec = jax.sharding.PartitionSpec(*("d" if d == at else None for d in range(x.ndim)))
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    placed = jax.tree.map(shard, (params, opt_state))
    _, sharded = trained(*placed, step)
    chex.assert_trees_all_equal(
        jax.device_get(jaxsparse.get_masks(sharded)), jax.device_get(jaxsparse.get_masks(state))
    )
    # And in the lanes of a vmap.
    lanes = jax.tree.map(lambda x: jnp.stack([x, x]), (params, opt_state))
    _, lanes = trained(*lanes, jax.jit(jax.vmap(step, in_axes=(0, 0, None))))
    for lane in range(2):
        one = jax.tree.map(lambda x, i=lane: x[i] if x.ndim else x, jaxsparse.get_masks(lanes))
        chex.assert_trees_all_equal(one, jaxsparse.get_masks(state))


@pytest.mark.slow
def test_leaves_that_do_not_fit_go_by_single_weights():
    params = make_params()
    tx = jaxsparse.asni(0.5, 1, structure=jaxsparse.block(8, 8))
    with pytest.warns(UserWarning, match="conv/kernel of shape .* go by single weights"):
        opt_state = tx.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for _ in range(2):
        _, opt_state = tx.update(zeros, opt_state, params)
    masks = by_path(jaxsparse.get_masks(opt_state))
    assert bool(jaxsparse.block(8, 8).holds(masks["dense/kernel"]))
    assert not bool(jaxsparse.block(2, 8).holds(masks["attention/kernel"]))
    assert SPARSE_SIZE // 2 - 64 < int(opt_state.kept) <= SPARSE_SIZE // 2
    with pytest.raises(ValueError, match="structure must be one of"):
        jaxsparse.asni(0.5, 1, structure="row")


# --- Two numbers a layer ----------------------------------------------------------------------------------------------


def network(key=0):
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)},
        "bn": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
        "fc": {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)},
    }
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    return treedef.unflatten([jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


@pytest.mark.slow
def test_every_weight_becomes_the_mean_of_its_layer_and_sign():
    params = network()
    masks = jaxsparse.magnitude_masks(params, 0.6, allocation="global")
    params = jaxsparse.apply_masks(params, masks)
    numbers = jaxsparse.centroids(params, masks)
    start = jaxsparse.amenable_init(params, masks, numbers)
    assert set(numbers) == {"conv/kernel", "fc/kernel"}
    for layer in ("conv", "fc"):
        w, new = np.asarray(params[layer]["kernel"]), np.asarray(start[layer]["kernel"])
        negative, positive = numbers[f"{layer}/kernel"]
        np.testing.assert_allclose(negative, w[w < 0].mean(), rtol=1e-6)
        np.testing.assert_allclose(positive, w[w > 0].mean(), rtol=1e-6)
        np.testing.assert_array_equal(new, np.where(w < 0, negative, np.where(w > 0, positive, 0)))
        np.testing.assert_array_equal(start[layer]["bias"], 0)
    np.testing.assert_array_equal(start["bn"]["scale"], 1)
    np.testing.assert_array_equal(start["bn"]["bias"], 0)
    chex.assert_trees_all_equal_shapes_and_dtypes(start, params)


def test_quantised_biases_keep_those_of_normalisations():
    params = network()
    masks = jax.tree.map(lambda _: jnp.array(True), params)  # dense layers have centroids too
    numbers = jaxsparse.centroids(params, masks, biases=True)
    start = jaxsparse.amenable_init(params, masks, numbers)
    assert set(numbers) == {"conv/kernel", "conv/bias", "fc/kernel", "fc/bias"}
    assert len(np.unique(start["fc"]["bias"])) <= 2
    assert (np.sign(start["fc"]["bias"]) == np.sign(params["fc"]["bias"])).all()
    np.testing.assert_array_equal(start["bn"]["bias"], params["bn"]["bias"])
    np.testing.assert_array_equal(start["bn"]["scale"], 1)


def test_a_layer_without_one_of_the_signs_stays_as_it_is_there():
    params = {"a": jnp.array([[1.0, 3.0]]), "b": jnp.array([[-1.0, -3.0]]), "c": jnp.array([[0.0, 0.0]])}
    masks = {name: jnp.ones((1, 2), bool) for name in params}
    numbers = jaxsparse.centroids(params, masks)
    assert {name: tuple(map(float, pair)) for name, pair in numbers.items()} == {
        "a": (0.0, 2.0), "b": (-2.0, 0.0), "c": (0.0, 0.0)
    }  # fmt: skip
    start = jaxsparse.amenable_init(params, masks, numbers)
    assert {name: leaf.tolist() for name, leaf in start.items()} == {
        "a": [[2.0, 2.0]], "b": [[-2.0, -2.0]], "c": [[0.0, 0.0]]
    }  # fmt: skip
    # Signs that the centroids know nothing of stay.
    other = jaxsparse.amenable_init({**params, "a": jnp.array([[-7.0, 3.0]])}, masks, numbers)
    assert other["a"].tolist() == [[-7.0, 2.0]]


def test_it_is_jittable_and_keeps_dtypes():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), network())
    masks = jaxsparse.magnitude_masks(params, 0.5)
    start = jax.jit(lambda p, m: jaxsparse.amenable_init(p, m, jaxsparse.centroids(p, m)))(params, masks)
    chex.assert_trees_all_equal_shapes_and_dtypes(start, params)


def nnx_params():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.fc, self.bn = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

    return nnx.state(Net(nnx.Rngs(0)), nnx.Param)


def haiku_params():
    def net(x):
        return hk.BatchNorm(True, True, 0.9)(hk.Linear(4, name="fc")(x), is_training=True)

    return hk.transform_with_state(net).init(jax.random.key(0), jnp.ones((2, 3)))[0]


def equinox_params():
    layers = [eqx.nn.Linear(3, 4, key=jax.random.key(0)), eqx.nn.LayerNorm(4)]
    return eqx.filter(eqx.nn.Sequential(layers), eqx.is_array)


@pytest.mark.parametrize("make", [nnx_params, haiku_params, equinox_params])
def test_the_roles_of_leaves_are_found_in_other_libraries(make):
    params = jax.tree.map(lambda p: p + 0.5, make())
    masks = jaxsparse.magnitude_masks(params, 0.5)
    start = jaxsparse.amenable_init(params, masks, jaxsparse.centroids(params, masks))
    distinct = {name: set(np.unique(leaf).tolist()) for name, leaf in by_path(start).items()}
    kernels = [values for name, values in distinct.items() if by_path(params)[name].size == 12]
    others = [values for name, values in distinct.items() if by_path(params)[name].size == 4]
    assert len(kernels) == 1
    assert len(kernels[0]) <= 3
    assert sorted(map(sorted, others)) == [[0.0], [0.0], [1.0]]


def test_centroids_of_another_tree_are_named():
    params = network()
    masks = jax.tree.map(lambda _: jnp.array(True), params)
    with pytest.raises(ValueError, match="there are centroids of conv9/kernel, which the params lack"):
        jaxsparse.amenable_init(params, masks, {"conv9/kernel": (-1.0, 1.0)})


@pytest.mark.slow
def test_training_goes_on_from_two_numbers_a_layer_on_the_masks():
    params = network()
    masks = jaxsparse.magnitude_masks(params, 0.5)
    start = jaxsparse.amenable_init(params, masks, jaxsparse.centroids(params, masks))
    tx = optax.chain(optax.adam(0.1), jaxsparse.mask_updates(masks))
    opt_state = tx.init(start)
    updates, opt_state = tx.update(network(1), opt_state, start)
    trained = optax.apply_updates(start, updates)
    jaxsparse.check(opt_state, trained)
    assert int((trained["fc"]["kernel"] != 0).sum()) == 10


@pytest.mark.slow
def test_at_least_so_many_weights_of_every_leaf_stay():
    params = {"big": jnp.arange(1.0, 101.0).reshape(10, 10), "out": jnp.full((4, 5), 1e-3)}
    for structure in ("weight", {"big": jaxsparse.block(1, 2)}):
        tx = jaxsparse.chain(optax.sgd(0.0), jaxsparse.asni(0.9, 1, at_least=3, structure=structure))
        state = tx.init(params)
        for _ in range(2):
            _, state = tx.update(params, state, params)
        masks = jaxsparse.get_masks(state)
        assert int(masks["out"].sum()) == 3
        assert int(jaxsparse.count(masks)) in (11, 12)
        jaxsparse.check(state)


def test_a_whole_number_of_steps_may_be_a_float():
    params = {"kernel": jnp.arange(1.0, 17).reshape(4, 4)}
    tx = jaxsparse.asni(optax.constant_schedule(0.5), 1e0)
    opt_state = tx.init(params)
    for _ in range(3):
        _, opt_state = tx.update(params, opt_state, params)
    assert int(jaxsparse.count(jaxsparse.get_masks(opt_state))) == 8
