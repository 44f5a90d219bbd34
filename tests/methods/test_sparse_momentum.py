import functools
import json
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsparse
from jaxsparse.prunable import prunable_leaves
from jaxsparse.structures import check_units, leaf_structures
from jaxsparse.transforms.chain import _StoredMomentum
from jaxsparse.transforms.mask_link import fingerprints
from jaxsparse.transforms.regrow import losses
from tests.problems import SPARSE_SIZE, gradients, jit_once, make_params, make_step, slow_except

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
GROWTH = ("momentum", "random", "momentum_neuron")
REDISTRIBUTION = ("momentum", "magnitude", "nonzeros", "none")
PRUNE = ("magnitude", "SET", "global_magnitude")


def random_problem(seed, shapes, density):
    """Weights on masks of the given densities, and dense momenta."""
    masks, weights, momenta = {}, {}, {}
    for i, shape in enumerate(shapes):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), i), 3)
        name = f"layer{i}"
        size = int(np.prod(shape))
        masks[name] = jaxsparse.top_k_mask(jax.random.uniform(keys[0], shape), round(density[i] * size))
        weights[name] = jnp.where(masks[name], jax.random.normal(keys[1], shape), 0)
        momenta[name] = jax.random.normal(keys[2], shape) * (1 + i)
    return weights, momenta, masks


@functools.cache
def jitted(**options):
    return jax.jit(functools.partial(jaxsparse.momentum_regrowth, **options))


def regrow(weights, momentum, masks, rate, *, key=0, **options):
    """momentum_regrowth, jitted: it compiles once, and faster than step by step."""
    return jitted(**options)(weights, momentum, masks, rate, key=key)


def total(masks):
    return int(jaxsparse.count(masks))


# --- Against the authors' code ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("sparse_momentum_*.npz")), ids=lambda f: f.stem)
def test_golden_mask_updates(file):
    data = np.load(file)
    meta = json.loads(str(data["meta"]))

    def part(prefix):
        return {name.split("/")[1]: jnp.asarray(data[name]) for name in data.files if name.startswith(f"{prefix}/")}

    weights, momentum, before, after = map(part, ("weights", "momentum", "mask_before", "mask_after"))
    modes = {name: meta[name] for name in ("growth", "redistribution", "prune")}
    new = jax.jit(lambda *args: jaxsparse.momentum_regrowth(*args, **modes))(
        weights, momentum, before, meta["prune_rate"]
    )
    assert total(new) == total(before)
    for name, theirs in after.items():
        ours = np.asarray(new[name])
        # Their rounding lets layer counts drift by a few; where the counts agree, the positions are theirs exactly.
        difference = int(theirs.sum()) - int(ours.sum())
        assert abs(difference) <= 2, name
        assert int((ours != np.asarray(theirs)).sum()) == abs(difference), name
        # And so are the weights: a weight pruned and regrown at once keeps its value, a new one starts from 0.
        where_both = ours & np.asarray(theirs)
        np.testing.assert_array_equal(np.asarray(weights[name])[where_both], data[f"weights_after/{name}"][where_both])


# --- The rule, step by step -------------------------------------------------------------------------------------------


def test_by_hand_prune_redistribute_regrow():
    # Mean momentum of existing weights: a 1, b 3, so of the 2 + 2 pruned, a regrows 1 and b 3.
    weights = {"a": jnp.array([[4.0, 3.0, 0.2, 0.1, 0, 0, 0, 0]]), "b": jnp.array([[9.0, 8.0, 0.5, 0.4, 0, 0, 0, 0]])}
    momentum = {"a": jnp.array([[1.0, 1, 1, -1, 5, 0, 6, 0]]), "b": jnp.array([[3.0, 3, -3, 3, 0, -7, 8, 9]])}
    masks = {name: w != 0 for name, w in weights.items()}
    new = regrow(weights, momentum, masks, 0.5)
    assert new["a"].tolist() == [[True, True, False, False, False, False, True, False]]
    assert new["b"].tolist() == [[True, True, False, False, False, True, True, True]]


@pytest.mark.slow
def test_a_just_pruned_weight_may_return_and_keeps_its_value():
    weights = {"w": jnp.array([[4.0, 3.0, 0.2, 0.1, 0, 0, 0, 0]])}
    momentum = {"w": jnp.array([[0.0, 0, 9, 8, 1, 1, 1, 1]])}
    tx = jaxsparse.sparse_momentum(0.5, 1, masks={"w": weights["w"] != 0})
    state = tx.init(weights)
    state = state._replace(count=jnp.int32(1))
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, weights), state, weights, momentum=momentum)
    np.testing.assert_array_equal(optax.apply_updates(weights, updates)["w"], weights["w"])


@pytest.mark.slow
def test_full_layers_share_what_does_not_fit():
    # All momentum is in the small layer, which has 6 of 10 places left after pruning; 99% of that is 5.
    weights, momentum, masks = random_problem(0, [(1, 10), (10, 30), (10, 30)], [0.8, 0.2, 0.2])
    momentum["layer0"] = momentum["layer0"] * 1e6
    new = regrow(weights, momentum, masks, 0.5)
    kept = [int(new[f"layer{i}"].sum()) for i in range(3)]
    assert kept[0] == 4 + 5
    assert sum(kept) == 8 + 60 + 60
    assert abs(kept[1] - kept[2]) <= 1  # the rest is shared equally


def test_a_dense_growing_layer_prunes_at_most_its_sparsity():
    # 95 of 100 kept, sparsity 0.05, and almost all of the momentum: ceil(0.05 * 95) = 5 go, not 48.
    weights, momentum, masks = random_problem(1, [(10, 10), (20, 20)], [0.95, 0.1])
    momentum["layer1"] = momentum["layer1"] * 1e-3
    new = regrow(weights, momentum, masks, 0.5)
    smallest = np.sort(np.abs(np.asarray(weights["layer0"]))[np.asarray(masks["layer0"])])
    stays = np.abs(np.asarray(weights["layer0"])) > smallest[4]
    assert np.asarray(new["layer0"])[stays].all()
    # With as little momentum as the other, it prunes at the full rate.
    momentum["layer1"] = momentum["layer1"] * 1e9
    new = regrow(weights, momentum, masks, 0.5)
    assert int(new["layer0"].sum()) < 60


def test_without_momentum_every_layer_regrows_what_it_lost():
    weights, momentum, masks = random_problem(2, [(10, 10), (20, 20)], [0.5, 0.1])
    new = regrow(weights, jax.tree.map(jnp.zeros_like, momentum), masks, 0.4)
    assert {k: int(m.sum()) for k, m in new.items()} == {k: int(m.sum()) for k, m in masks.items()}


def test_prune_rate_zero_changes_nothing():
    weights, momentum, masks = random_problem(3, [(10, 10), (20, 20)], [0.5, 0.1])
    new = regrow(weights, momentum, masks, 0.0)
    for name in masks:
        np.testing.assert_array_equal(new[name], masks[name])


@pytest.mark.slow
def test_even_the_smallest_rate_swaps_a_weight_in_every_layer():
    weights, momentum, masks = random_problem(4, [(10, 10), (20, 20)], [0.5, 0.1])
    new = regrow(weights, momentum, masks, 0.005, redistribution="none")
    smallest = {n: int(jnp.argmin(jnp.where(masks[n], jnp.abs(weights[n]), jnp.inf))) for n in masks}
    gone = [not bool(new[n].ravel()[i]) for n, i in smallest.items()]
    assert any(gone)
    assert total(new) == total(masks)


@pytest.mark.slow
def test_redistribution_statistics_set_the_shares():
    # One statistic a mode: mean momentum, mean weight, number of nonzeros, size. Two layers, 20 + 20 pruned.
    masks = {"a": jnp.arange(400).reshape(20, 20) < 40, "b": jnp.arange(1200).reshape(20, 60) < 40}
    weights = {"a": jnp.where(masks["a"], 3.0, 0.0), "b": jnp.where(masks["b"], 1.0, 0.0)}
    weights["b"] = weights["b"].at[0, :20].set(0.0)  # 20 of b's existing weights are exactly 0
    momentum = {"a": jnp.ones((20, 20)), "b": jnp.full((20, 60), 4.0)}
    gains = {}
    for mode in REDISTRIBUTION:
        new = regrow(weights, momentum, masks, 0.5, redistribution=mode)
        gains[mode] = int(new["a"].sum()) - 20
        assert total(new) == 80
    # a's shares of 40: 1/5, 3/3.5 (34.3), 40/60 (26.7) and 400/1600, rounded up: one too many, taken from the larger.
    assert gains == {"momentum": 8, "magnitude": 34, "nonzeros": 26, "none": 10}


@pytest.mark.slow
def test_a_small_layer_does_not_dwindle():
    # Without redistribution its share of what is regrown is less than one weight, and each update prunes one of it.
    masks = {"big": jnp.arange(40_000).reshape(200, 200) < 2000, "small": jnp.arange(100).reshape(10, 10) < 5}
    keys = jax.random.split(jax.random.key(0), 2)
    for i in range(50):
        weights = {n: jnp.where(m, 1.0 + i + jnp.arange(m.size).reshape(m.shape), 0) for n, m in masks.items()}
        momentum = {n: jax.random.normal(k, m.shape) for k, (n, m) in zip(keys, masks.items(), strict=True)}
        masks = regrow(weights, momentum, masks, 0.005, redistribution="none")
        assert total(masks) == 2005
        assert int(masks["small"].sum()) >= 5


@pytest.mark.slow
def test_SET_prunes_half_the_smallest_and_half_the_most_negative():
    weights = {"w": jnp.array([[0.1, -0.2, 0.3, -5.0, -4.0, 6.0, 7.0, 8.0, 0.0, 0.0, 0.0, 0.0]])}
    masks = {"w": weights["w"] != 0}
    momentum = {"w": jnp.where(masks["w"], 0.0, 1.0)}
    new = regrow(weights, momentum, masks, 0.5, prune="SET")
    assert new["w"][0, :8].tolist() == [False, False, True, False, False, True, True, True]
    assert total(new) == 8


@pytest.mark.slow
def test_global_magnitude_prunes_the_smallest_of_the_whole_network():
    weights, momentum, masks = random_problem(5, [(20, 20), (20, 20)], [0.25, 0.25])
    weights["layer0"] = weights["layer0"] * 1e-3
    new = regrow(weights, momentum, masks, 0.3, prune="global_magnitude")
    assert np.asarray(new["layer1"])[np.asarray(masks["layer1"])].all()  # 60 go, all of layer0's 100
    assert total(new) == 200


@pytest.mark.slow
def test_momentum_neuron_grows_every_unit_by_its_share():
    # Two units; the second has 3 times the momentum of the first and so 3 times its growth: 15 and 45 of 60.
    size = 400
    masks = {"w": jnp.stack([jnp.arange(size) < 60, jnp.arange(size) < 60], axis=1)}
    weights = {"w": jnp.where(masks["w"], 1.0 + jnp.arange(size)[:, None], 0.0)}
    ramp = 1 + jnp.arange(size) / size
    momentum = {"w": jnp.stack([ramp, 3 * ramp], axis=1)}
    new = regrow(weights, momentum, masks, 0.5, growth="momentum_neuron")
    grown = np.asarray(new["w"]).sum(0) - 30
    assert abs(grown - [15, 45]).max() <= 1
    assert grown.sum() == 60
    # Without that, all of the growth goes to the second.
    new = regrow(weights, momentum, masks, 0.5)
    assert np.asarray(new["w"]).sum(0).tolist() == [30, 90]


@pytest.mark.slow
def test_random_growth_depends_on_the_key_alone():
    weights, momentum, masks = random_problem(6, [(20, 20)], [0.25])
    grow = [regrow(weights, momentum, masks, 0.5, growth="random", key=key)["layer0"] for key in (1, 1, 2)]
    assert (grow[0] == grow[1]).all()
    assert (grow[0] != grow[2]).any()


densities = st.lists(st.sampled_from([0.0, 0.02, 0.2, 0.5, 0.9, 1.0]), min_size=3, max_size=3)


@pytest.mark.slow
@settings(max_examples=12)
@given(st.integers(0, 1000), densities, st.floats(0, 1), st.sampled_from(["plain", "SET", "neuron"]))
def test_the_budget_is_exact_whatever_happens(seed, densities, rate, name):
    modes = {
        "plain": ("momentum", "momentum", "magnitude"),
        "SET": ("random", "magnitude", "SET"),
        "neuron": ("momentum_neuron", "nonzeros", "global_magnitude"),
    }
    keeps_its_budget(seed, densities, rate, *modes[name])


@pytest.mark.slow
@settings(max_examples=24)  # each combination compiles for seconds
@given(
    st.integers(0, 1000),
    densities,
    st.floats(0, 1),
    st.sampled_from(GROWTH),
    st.sampled_from(REDISTRIBUTION),
    st.sampled_from(PRUNE),
)
def test_the_budget_is_exact_with_all_options(seed, densities, rate, growth, redistribution, prune):
    keeps_its_budget(seed, densities, rate, growth, redistribution, prune)


def keeps_its_budget(seed, densities, rate, *modes):
    weights, momentum, masks = random_problem(seed, [(4, 5), (3, 3, 2, 8), (20, 30)], densities)
    options = dict(zip(("growth", "redistribution", "prune"), modes, strict=True))
    new = regrow(weights, momentum, masks, rate, key=seed, **options)
    assert total(new) == total(masks)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_non_finite_momentum_keeps_the_budget(bad):
    weights, momentum, masks = random_problem(7, [(10, 10), (20, 20)], [0.5, 0.1])
    momentum["layer0"] = momentum["layer0"].at[:5].set(bad)
    new = regrow(weights, momentum, masks, 0.5)
    assert total(new) == total(masks)


def test_nan_scores_are_counted_and_reported():
    params = make_params()
    tx = jaxsparse.chain(optax.sgd(0.05, momentum=0.9), jaxsparse.sparse_momentum(0.75, 1))
    opt_state = tx.init(params)
    params = jaxsparse.sparsify(opt_state, params)
    step = make_step(tx)
    params, opt_state = step(params, opt_state, 0)
    jaxsparse.check(opt_state)
    poisoned = jax.tree.map(lambda t: t.at[0].set(jnp.nan) if t.ndim > 1 else t, opt_state[0][0].trace)
    opt_state = ((opt_state[0][0]._replace(trace=poisoned), opt_state[0][1]), opt_state[1])
    params, opt_state = step(params, opt_state, 1)
    with pytest.warns(UserWarning, match="kept its mask in the last mask update"):
        jaxsparse.check(opt_state)
    params, opt_state = step(params, opt_state, 2)  # now there are NaN in the weights
    with pytest.raises(jaxsparse.SparsityError, match=r"\d+ NaN"):
        jaxsparse.check(opt_state)
    assert total(jaxsparse.get_masks(opt_state)) == SPARSE_SIZE // 4


# --- The link ---------------------------------------------------------------------------------------------------------


def train(tx, steps, params=None):
    params = make_params() if params is None else params
    opt_state = tx.init(params)
    params = jaxsparse.sparsify(opt_state, params)
    step = make_step(tx)
    for count in range(steps):
        params, opt_state = step(params, opt_state, count)
    return params, opt_state


def test_equals_the_steps_done_by_hand():
    params = make_params()
    link = jaxsparse.sparse_momentum(0.75, 3, prune_rate=lambda count: 0.4 / (1.0 + count))
    inner = optax.sgd(0.05, momentum=0.9)
    tx = jaxsparse.chain(inner, link)
    trained, opt_state = train(tx, 5)
    masks = jaxsparse.get_masks(tx.init(params))
    params, state, update = jaxsparse.apply_masks(params, masks), inner.init(params), jax.jit(inner.update)
    for count in range(5):
        updates, state = update(gradients(params, count), state, params)
        if count == 3:  # the first step after the boundary, from the params that came in and the momentum just stored
            masks = regrow(params, state[0].trace, masks, 0.1)
        params = jaxsparse.apply_masks(optax.apply_updates(params, updates), masks)
    for a, b in zip(jax.tree.leaves(jaxsparse.get_masks(opt_state)), jax.tree.leaves(masks), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_the_momentum_of_adam_is_mu_over_root_nu():
    seen = {}

    def spy(updates, state, params=None, *, momentum=None, grad=None, **extra):
        seen["momentum"], seen["grad"] = momentum(), grad
        return updates, state

    probe = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), spy)
    params = make_params()
    tx = jaxsparse.chain(optax.clip(0.1), optax.adam(0.1), probe)
    state = tx.init(params)
    grads = gradients(params)
    _, state = tx.update(grads, state, params)
    adam = state[1][0]
    for m, mu, nu in zip(*map(jax.tree.leaves, (seen["momentum"], adam.mu, adam.nu)), strict=True):
        np.testing.assert_allclose(m, mu / (np.sqrt(nu) + 1e-8), rtol=1e-5)
    for a, b in zip(jax.tree.leaves(seen["grad"]), jax.tree.leaves(grads), strict=True):
        np.testing.assert_array_equal(a, b)


def test_start_at_and_stop_at_bound_the_mask_updates():
    tx = jaxsparse.chain(optax.sgd(0.05, momentum=0.9), jaxsparse.sparse_momentum(0.75, 2, start_at=3, stop_at=6))
    params = make_params()
    opt_state = tx.init(params)
    params = jaxsparse.sparsify(opt_state, params)
    step, when = make_step(tx), []
    for count in range(10):
        before = opt_state[-1].masks
        params, opt_state = step(params, opt_state, count)
        if any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (before, opt_state[-1].masks)), strict=True)):
            when.append(count)
    assert when == [4]


@pytest.mark.slow
def test_inject_hyperparams_around_the_link():
    def tx(rate):
        link = optax.inject_hyperparams(jaxsparse.sparse_momentum)(sparsity=0.75, update_every=2, prune_rate=rate)
        return jaxsparse.chain(optax.sgd(0.05, momentum=0.9), link)

    params, opt_state = train(tx(0.3), 5)
    jaxsparse.check(opt_state, params)
    plain = jaxsparse.chain(optax.sgd(0.05, momentum=0.9), jaxsparse.sparse_momentum(0.75, 2, prune_rate=0.3))
    _, plain_state = train(plain, 5)
    ours, theirs = jaxsparse.get_masks(opt_state), jaxsparse.get_masks(plain_state)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
    params, opt_state = train(tx(optax.linear_schedule(0.5, 0.0, 10)), 5)
    jaxsparse.check(opt_state, params)
    assert total(jaxsparse.get_masks(opt_state)) == SPARSE_SIZE // 4


def test_given_masks_set_the_budget():
    params = make_params()
    masks = jaxsparse.magnitude_masks(params, 0.9, allocation="global")
    tx = jaxsparse.chain(optax.sgd(0.05, momentum=0.9), jaxsparse.sparse_momentum(0.0, 2, masks=masks))
    opt_state = tx.init(params)
    for a, b in zip(jax.tree.leaves(jaxsparse.get_masks(opt_state)), jax.tree.leaves(masks), strict=True):
        np.testing.assert_array_equal(a, b)
    params, opt_state = train(tx, 5)
    assert total(jaxsparse.get_masks(opt_state)) == round(0.1 * SPARSE_SIZE)
    jaxsparse.check(opt_state, params)


def test_sparsity_by_leaf():
    params = make_params()
    wanted = {"attention/kernel": 0.5, "conv/kernel": 0.0, "dense/kernel": 0.9}
    for sparsity in (wanted, lambda path, leaf: wanted[path]):
        state = jaxsparse.sparse_momentum(sparsity, 10).init(params)
        kept = [int(m.sum()) for m in jax.tree.leaves(state.masks)]
        assert kept == [128, 144, 38]


def test_the_state_is_one_byte_a_weight():
    params = {"kernel": jnp.ones((512, 256)), "bias": jnp.ones(256)}
    size = sum(x.nbytes for x in jax.tree.leaves(jaxsparse.sparse_momentum(0.9, 10).init(params)))
    assert size <= 512 * 256 + 64


def test_no_step_copies_the_masks():
    # A lax.cond around the mask update would, on every step: the reason for the form of links.on_update_steps.
    params = {"kernel": jnp.ones((512, 256))}
    tx = jaxsparse.chain(optax.sgd(0.1, momentum=0.9), jaxsparse.sparse_momentum(0.9, 100))
    text = make_step(tx, donate=True).lower(params, tx.init(params), 0).compile().as_text()
    entry = text[text.index("ENTRY") :]
    assert "pred[512,256]" in entry
    assert "pred[512,256]{1,0} copy(" not in entry


def test_a_copy_of_the_weights_only_with_decay():
    params = {"kernel": jnp.ones((512, 256), jnp.bfloat16), "bias": jnp.ones(256)}
    state = jaxsparse.sparse_momentum(0.9, 10, decay=0.9).init(params)
    assert [x.dtype for x in jax.tree.leaves(state.own)] == [jnp.float32]  # bfloat16(0.999) is 1


def test_a_gradient_that_overflows_is_no_part_of_the_average():
    params = {"w": jnp.ones((2, 2))}
    tx = jaxsparse.chain(optax.apply_if_finite(optax.sgd(0.1), 3), jaxsparse.sparse_momentum(0.5, 2, decay=0.5))
    state = tx.init(params)
    for value in (1.0, jnp.inf, 3.0):
        _, state = tx.update({"w": jnp.full((2, 2), value)}, state, params)
    np.testing.assert_array_equal(state[1].own["w"], jnp.full((2, 2), 0.25 + 1.5))


def test_an_average_of_updates_is_warned_of():
    params = {"w": jnp.ones((2, 2))}
    tx = optax.chain(optax.adam(1e-3), jaxsparse.sparse_momentum(0.5, 10, decay=0.9))
    with pytest.warns(UserWarning, match=r"decay=\.\.\.\) is handed no gradient and averages what it gets"):
        tx.update(params, tx.init(params), params)


def test_own_momentum_is_the_average_of_the_gradients():
    params = make_params()
    tx = jaxsparse.chain(optax.scale(-0.1), jaxsparse.sparse_momentum(0.75, 10, decay=0.9))
    state = tx.init(params)
    first, second = gradients(params, 0), gradients(params, 1)
    _, state = tx.update(first, state, params)
    _, state = tx.update(second, state, params)
    expected = 0.9 * (0.1 * first["dense"]["kernel"]) + 0.1 * second["dense"]["kernel"]
    np.testing.assert_allclose(state[1].own["dense"]["kernel"], expected, rtol=1e-5)
    assert state[1].own["dense"]["bias"] == optax.MaskedNode()


# --- Units larger than a weight ---------------------------------------------------------------------------------------


def regrown_units(weights, momentum, masks, rate, **options):
    """Jitted, which compiles faster than step by step."""
    return jax.jit(functools.partial(jaxsparse.momentum_regrowth, **options))(weights, momentum, masks, rate)


def test_by_hand_blocks_are_pruned_redistributed_and_regrown():
    # The problem of test_by_hand_prune_redistribute_regrow, of which each entry is a block now. Signs alternate within
    # a block: momenta do not cancel.
    tile = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    weights = {"a": jnp.array([[4.0, 3.0, 0.2, 0.1, 0, 0, 0, 0]]), "b": jnp.array([[9.0, 8.0, 0.5, 0.4, 0, 0, 0, 0]])}
    momentum = {"a": jnp.array([[1.0, 1, 1, -1, 5, 0, 6, 0]]), "b": jnp.array([[3.0, 3, -3, 3, 0, -7, 8, 9]])}
    weights, momentum = ({k: jnp.kron(v, tile) for k, v in tree.items()} for tree in (weights, momentum))
    masks = {name: w != 0 for name, w in weights.items()}
    structure = jaxsparse.block(2, 2)
    new = regrown_units(weights, momentum, masks, 0.5, structure=structure)
    assert all(bool(structure.holds(mask)) for mask in new.values())
    assert structure.units(new["a"]).tolist() == [[True, True, False, False, False, False, True, False]]
    assert structure.units(new["b"]).tolist() == [[True, True, False, False, False, True, True, True]]


@pytest.mark.slow
def test_layers_with_units_of_another_size_keep_what_they_have():
    # Two layers of 2x2 blocks and one of single weights, which has all the momentum but cannot take any from them.
    structure = {"layer0": jaxsparse.block(2, 2, score="sum"), "layer1": jaxsparse.block(4, 1)}
    weights, momentum, _ = random_problem(0, [(8, 10), (8, 30), (10, 10)], [1.0, 1.0, 1.0])
    momentum["layer2"] = momentum["layer2"] * 1e6
    momentum["layer1"] = momentum["layer1"] * 5
    masks = jaxsparse.random_masks(weights, 0.5, structure=structure)
    weights = jaxsparse.apply_masks(weights, masks)
    new = regrown_units(weights, momentum, masks, 0.5, structure=structure)
    before, after = ([int(tree[f"layer{i}"].sum()) for i in range(3)] for tree in (masks, new))
    assert before == [40, 120, 50]
    assert after[2] == 50
    assert after[0] + after[1] == 160
    # Of one size, 2x2 and 4x1, these two exchange units. Of 5 + 15 that go, 18 come back to the second, the mean of
    # whose momentum is 10 times that of the first (give or take one, for it is random).
    assert abs(after[1] - 4 * (15 + 18)) <= 4


def test_by_hand_two_of_four():
    # Columns are outputs; the groups are rows 0 to 3 and 4 to 7. Two of the eight kept weights go, the smallest of the
    # layer: both of the first column's first group. It regrows two, by momentum, the just pruned 0.1 among them.
    weights = {"w": jnp.array([[0.1, 9], [0.2, 8], [0, 0], [0, 0], [5, 7], [0, 0], [0, 6], [4, 0]])}
    momentum = {"w": jnp.array([[3.0, 0], [1, 0], [-4, 9], [2, 9], [0, 9], [9, 9], [9, 9], [9, 9]])}
    masks = {"w": weights["w"] != 0}
    rule = jaxsparse.n_of_m(2, 4)
    new = regrown_units(weights, momentum, masks, 0.25, structure=rule)["w"]
    assert new[:, 0].tolist() == [True, False, True, False, True, False, False, True]
    assert new[:, 1].tolist() == masks["w"][:, 1].tolist()
    # One that has three kept of some group is not 2:4; traced masks regrow what they lost all the same.
    cut = {"w": masks["w"].at[2, 0].set(True)}
    with pytest.raises(ValueError, match=r"masks must keep whole units, and n of every m, but do not in w of shape"):
        jaxsparse.momentum_regrowth(weights, momentum, cut, 0.25, structure=rule)
    traced = regrown_units(weights, momentum, cut, 0.25, structure=rule)
    np.testing.assert_array_equal(rule.counts(traced["w"]), rule.counts(cut["w"]))


@pytest.mark.slow
def test_random_growth_of_two_of_four_depends_on_the_key_alone():
    rule, weights = jaxsparse.n_of_m(2, 4), {"w": jax.random.normal(jax.random.key(0), (16, 16))}
    masks = {"w": rule.top(jax.random.normal(jax.random.key(1), (16, 16)))}
    grow = [
        regrown_units(weights, weights, masks, 0.5, growth="random", structure=rule, key=key)["w"] for key in (1, 1, 2)
    ]
    assert (grow[0] == grow[1]).all()
    assert (grow[0] != grow[2]).any()
    assert all(bool(rule.holds(mask)) for mask in grow)


@pytest.mark.slow
def test_global_magnitude_ranks_units_of_one_size():
    structure = {"layer0": jaxsparse.block(2, 2), "layer1": jaxsparse.block(2, 2)}
    weights, momentum, _ = random_problem(5, [(20, 20), (20, 20), (20, 20)], [1.0, 1.0, 1.0])
    weights["layer0"] = weights["layer0"] * 1e-3
    weights["layer2"] = weights["layer2"] * 1e-9
    masks = jaxsparse.random_masks(weights, 0.75, structure=structure)
    weights = jaxsparse.apply_masks(weights, masks)
    new = regrown_units(weights, momentum, masks, 0.3, prune="global_magnitude", structure=structure)
    assert np.asarray(new["layer1"])[np.asarray(masks["layer1"])].all()  # all that goes of the two is layer0's
    assert total(new) == total(masks)
    assert int(new["layer2"].sum()) == 100


@pytest.mark.slow
def test_momentum_neuron_shares_out_blocks():
    # As above: the second of two outputs of blocks has 3 times the momentum of the first and so 3 times its growth.
    size, tile = 400, jnp.ones((2, 2))
    live = jnp.stack([jnp.arange(size) < 60, jnp.arange(size) < 60], axis=1)
    weights = {"w": jnp.kron(jnp.where(live, 1.0 + jnp.arange(size)[:, None], 0.0), tile)}
    ramp = 1 + jnp.arange(size) / size
    momentum = {"w": jnp.kron(jnp.stack([ramp, 3 * ramp], axis=1), tile)}
    new = regrown_units(
        weights, momentum, {"w": weights["w"] != 0}, 0.5, growth="momentum_neuron", structure=jaxsparse.block(2, 2)
    )
    grown = np.asarray(jaxsparse.block(2, 2).units(new["w"])).sum(0) - 30
    assert abs(grown - [15, 45]).max() <= 1
    assert grown.sum() == 60


STRUCTURES = {
    "block": ({"dense/kernel": jaxsparse.block(4, 4), "attention/kernel": jaxsparse.block(2, 8)}, 196),
    "n_of_m": (jaxsparse.n_of_m(1, 2), 128 + 72 + 192),
    # A quarter of 256 weights, of 8 channels of 18 and of 24 of 16.
    "channel": ({name: "channel" for name in ("dense/kernel", "conv/kernel")}, 64 + 2 * 18 + 6 * 16),
    "kernel": (jaxsparse.structures.kernel(ragged="warn"), (256 + 384) // 4 + 4 * 9),
    "fallback": (jaxsparse.block(8, 8), 144 // 4 + 2 * 64),  # 2.5 of 10 blocks, rounded to even
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:structure .* does not fit")
@pytest.mark.parametrize("name", slow_except(["block"], STRUCTURES))
def test_every_step_keeps_the_budget_in_whole_units(name):
    structure, budget = STRUCTURES[name]
    params = make_params()
    units = leaf_structures(structure, params, prunable_leaves(params))
    tx = jaxsparse.chain(
        optax.sgd(0.05, momentum=0.9), jaxsparse.sparse_momentum(0.75, 2, prune_rate=0.4, structure=structure)
    )
    opt_state = tx.init(params)
    params = jaxsparse.sparsify(opt_state, params)
    step = jit_once(make_step(tx))
    assert int(opt_state[-1].kept) == budget
    changes = 0
    for count in range(8):
        before = opt_state[-1].masks
        params, opt_state = step(params, opt_state, count)
        masks = opt_state[-1].masks
        assert total(masks) == budget
        check_units(masks, units)
        jaxsparse.check(opt_state, params)
        changes += any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (before, masks)), strict=True))
    assert changes == 3


@pytest.mark.slow
def test_leaves_that_do_not_fit_are_told_once_for_a_link():
    params = make_params()
    with warnings.catch_warnings(record=True, action="always") as seen:
        train(jaxsparse.chain(optax.sgd(0.05, momentum=0.9),
                              jaxsparse.sparse_momentum(0.75, 2, structure=jaxsparse.block(8, 8))), 4)  # fmt: skip
    told = [str(w.message) for w in seen if "structure" in str(w.message)]
    assert len(told) == 1
    assert "conv/kernel of shape (3, 3, 2, 8)" in told[0]
    with pytest.raises(ValueError, match="does not fit conv/kernel"):
        jaxsparse.sparse_momentum(0.75, 2, structure=jaxsparse.block(8, 8, ragged="error")).init(params)


def test_given_masks_must_keep_whole_units():
    params, structure = make_params(), {"dense/kernel": jaxsparse.block(4, 4)}
    masks = jaxsparse.magnitude_masks(params, 0.75, structure=structure)
    state = jaxsparse.sparse_momentum(0.0, 2, masks=masks, structure=structure).init(params)
    assert int(state.kept) == SPARSE_SIZE // 4
    masks["dense"]["kernel"] = masks["dense"]["kernel"].at[:, 0].set(jnp.arange(16) < 2)
    link = jaxsparse.sparse_momentum(0.0, 2, masks=masks, structure=structure)
    for init in (link.init, jax.jit(link.init)):
        with pytest.raises(ValueError, match=r"masks must keep whole units.* in dense/kernel of shape \(16, 24\)"):
            init(params)


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity is the fraction of zeros and must be in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, "got -0.1"),
        ({"sparsity": float("nan")}, "got nan"),
        ({"sparsity": {"dense/kernel": 2.0}}, "got 2.0"),
        ({"update_every": 0}, "update_every must be at least 1, got 0"),
        ({"prune_rate": 1.5}, "prune_rate must be at least 0 and at most 1, got 1.5"),
        ({"prune_rate": lambda step: 0.5 - step / 20, "stop_at": 20}, "prune_rate of step 20 must be at least 0"),
        ({"decay": 1.0}, "decay must be at least 0 and below 1, got 1.0"),
        ({"start_at": -1}, "start_at must be at least 0"),
        ({"growth": "momentun"}, r"growth must be one of \['momentum', 'random', 'momentum_neuron'\], got 'momentun'"),
        ({"redistribution": "nonzero"}, "redistribution must be one of .*'nonzeros'.* got 'nonzero'"),
        ({"prune": "set"}, "prune must be one of .*'SET'.* got 'set'"),
        ({"allocation": "erk"}, "allocation must be one of .*'erdos_renyi_kernel'.* got 'erk'"),
        ({"structure": "row"}, r"structure must be one of \['weight', 'kernel', 'channel'\] or made by .*, got 'row'"),
        ({"structure": jaxsparse.block(2, 2), "prune": "SET"}, r"units have no sign: got block\(2, 2\)"),
        ({"structure": {"a": "channel"}, "growth": "momentum_neuron"}, "a channel is all of its output"),
        ({"structure": jaxsparse.n_of_m(2, 4), "growth": "momentum_neuron"}, "every group regrows what it lost"),
    ],
)
def test_options_are_checked_when_the_link_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        jaxsparse.sparse_momentum(**{"sparsity": 0.9, "update_every": 10, **options})


def with_leaf(path, value):
    """Masks of the shared problem, one of them replaced."""
    masks = jax.tree.map(lambda p: np.ones(p.shape, bool) if p.ndim > 1 else True, jax.eval_shape(make_params))
    masks[path[0]][path[1]] = value
    return masks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": with_leaf(("dense", "kernel"), np.ones((16, 23), bool))},
         r"masks of dense/kernel: expected bool of shape \(16, 24\).* got bool of shape \(16, 23\)"),
        ({"masks": with_leaf(("conv", "kernel"), np.ones((3, 3, 2, 8), np.float32))},
         "masks of conv/kernel.* got float32"),
        ({"masks": {"dense": {"kernel": jnp.ones((16, 24), bool)}}}, "has nothing for attention"),
        ({"prunable": jaxsparse.Prunable(lambda path, leaf: False)}, "prunable matches none of the params"),
        ({"prunable": lambda path, leaf: True}, "wrap the predicate"),
        ({"prunable": {"dense": True}}, "prunable must have the tree of the params"),
        ({"sparsity": {"dense/kernel": 0.5, "dense/kernle": 0.5}},
         "sparsity: 'dense/kernle' matches none of attention/kernel, conv/kernel, dense/kernel"),
        ({"sparsity": {"dense/*": 0.5}}, r"missing \['attention/kernel', 'conv/kernel'\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_params_is_named_by_init(options, message):
    link = jaxsparse.sparse_momentum(**{"sparsity": 0.9, "update_every": 10, **options})
    with pytest.raises(ValueError, match=message):
        link.init(make_params())


@pytest.mark.parametrize("inner", [optax.sgd(0.1), optax.rmsprop(0.1), optax.adafactor(0.1), optax.sm3(0.1)])
def test_an_optimizer_without_momentum_is_named_by_init(inner):
    tx = jaxsparse.chain(inner, jaxsparse.sparse_momentum(0.9, 10))
    with pytest.raises(ValueError, match=r"stores a momentum .* of attention/kernel and 2 more.*decay=0.9"):
        tx.init(make_params())
    # One that comes after the link does not count.
    tx = jaxsparse.chain(inner, jaxsparse.sparse_momentum(0.9, 10), optax.trace(0.9))
    with pytest.raises(ValueError, match="the sparse link stands before the optimizer"):
        tx.init(make_params())


@pytest.mark.parametrize(
    "inner",
    [
        optax.sgd(0.1, momentum=0.9), optax.adam(0.1), optax.amsgrad(0.1), optax.adamax(0.1), optax.lamb(0.1),
        optax.lion(0.1), optax.novograd(0.1), optax.rmsprop(0.1, momentum=0.9), optax.adafactor(0.1, momentum=0.9),
        optax.chain(optax.clip(1.0), optax.chain(optax.trace(0.9), optax.scale(-0.1))),
        optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
        optax.contrib.muon(0.1),
        optax.apply_if_finite(optax.adam(0.1), 3),
        optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
        optax.partition({"a": optax.adam(0.1), "b": optax.sgd(0.1, momentum=0.9)},
                        {"attention": "a", "conv": "b", "dense": "a", "temperature": "b"}),
    ],
)  # fmt: skip
def test_momentum_is_found_in(inner):
    tx = jaxsparse.chain(inner, jaxsparse.sparse_momentum(0.75, 1))

    def step(params):  # traced alone: what is found is read either way
        return tx.update(gradients(params), tx.init(params), params)[0]

    params = make_params()
    assert jax.eval_shape(step, params) == jax.eval_shape(lambda: params)


def test_momentum_of_the_wrong_shape_is_named():
    params = make_params()
    tx = jaxsparse.sparse_momentum(0.75, 1)
    momentum = jax.tree.map(lambda p: p[..., :1], {**params, "temperature": jnp.ones(1)})
    with pytest.raises(ValueError, match="momentum of attention/kernel: expected shape"):
        jax.jit(tx.update)(gradients(params), tx.init(params), params, momentum=momentum)


def test_random_growth_needs_a_key():
    weights, momentum, masks = random_problem(0, [(4, 4)], [0.5])
    with pytest.raises(ValueError, match="needs a key"):
        jaxsparse.momentum_regrowth(weights, momentum, masks, 0.5, growth="random")


@pytest.mark.slow
@pytest.mark.parametrize(
    "structure",
    [
        pytest.param(jaxsparse.block(2, 2), marks=pytest.mark.slow),
        {"a": jaxsparse.block(2, 2), "b": jaxsparse.n_of_m(1, 2)},
    ],
)
def test_structures_inside_of_other_transformations(structure):
    params = {"a": jnp.arange(1.0, 33.0).reshape(4, 8), "b": jnp.arange(1.0, 17.0).reshape(4, 4), "c": jnp.ones(3)}
    link = optax.inject_hyperparams(jaxsparse.sparse_momentum, static_args=("sparsity", "update_every"))(
        0.5, 1, decay=0.9, structure=structure, prune_rate=0.5
    )
    tx = optax.partition({"sparse": link, "rest": optax.sgd(0.1)}, {"a": "sparse", "b": "sparse", "c": "rest"})
    opt_state = tx.init(params)
    step = jax.jit(tx.update)
    for i in range(4):
        updates, opt_state = step(jax.tree.map(lambda p, i=i: jnp.cos(p + i), params), opt_state, params)
        params = optax.apply_updates(params, updates)
        masks = jaxsparse.get_masks(opt_state, params)
        assert int(masks["a"].sum()) == 16
        assert jaxsparse.block(2, 2).holds(masks["a"])
    jaxsparse.check(opt_state, params)


# --- Optimizers for parts of the params, frozen layers ----------------------------------------------------------------


def trained_masks(tx, params, steps=12, gradient=gradients):
    step, opt_state = jax.jit(tx.update), tx.init(params)
    params = jaxsparse.sparsify(opt_state, params)
    for count in range(steps):
        updates, opt_state = step(gradient(params, count), opt_state, params)
        params = optax.apply_updates(params, updates)
    return jaxsparse.get_masks(opt_state, params), opt_state, params


@pytest.mark.slow
def test_momenta_of_several_optimizers_are_brought_to_one_scale():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {name: jax.random.normal(key, (32, 32)) for name, key in zip("abc", keys, strict=True)}
    of = {"a": "adam", "b": "sgd", "c": "sgd"}
    sgd, adam, link = optax.sgd(1e-3, momentum=0.9), optax.adam(1e-3), jaxsparse.sparse_momentum(0.8, 3)

    def small(params, count):
        return jax.tree.map(lambda p: 1e-3 * jnp.cos(5 * p + count), params)

    is_adam = {name: label == "adam" for name, label in of.items()}
    parts = optax.partition({"adam": adam, "sgd": sgd}, of)
    masked = optax.chain(optax.masked(adam, is_adam), optax.masked(sgd, {name: not a for name, a in is_adam.items()}))
    for optimizer in (parts, masked):
        masks, _, _ = trained_masks(jaxsparse.chain(optimizer, link), params, gradient=small)
        kept = {name: int(mask.sum()) for name, mask in masks.items()}
        assert sum(kept.values()) == 614  # a fifth of all
        assert all(150 < n < 260 for n in kept.values()), kept  # without it the layer of Adam takes all

    # Of one kind they are compared as they are, to the last bit.
    whole, _, _ = trained_masks(jaxsparse.chain(sgd, link), params, gradient=small)
    split, _, _ = trained_masks(
        jaxsparse.chain(optax.partition({"adam": sgd, "sgd": sgd}, of), link), params, gradient=small
    )
    for name in params:
        np.testing.assert_array_equal(whole[name], split[name])


@pytest.mark.slow
def test_muon_and_its_adam_part_share_what_regrows():
    params = {"matrix": jax.random.normal(jax.random.key(0), (32, 32))}
    params["conv"] = jax.random.normal(jax.random.key(1), (3, 3, 8, 16))  # four dimensions go to Adam
    tx = jaxsparse.chain(optax.contrib.muon(1e-3), jaxsparse.sparse_momentum(0.8, 3))
    masks, _, _ = trained_masks(tx, params, gradient=lambda p, n: jax.tree.map(lambda x: 1e-3 * jnp.cos(5 * x + n), p))
    assert 100 < int(masks["matrix"].sum()) < 320
    assert 100 < int(masks["conv"].sum()) < 320


@pytest.mark.slow
def test_the_scale_of_one_optimizer_does_not_matter():
    weights, momentum, masks = random_problem(5, [(10, 10), (20, 20), (20, 10)], [0.5, 0.2, 0.3])
    tx = jaxsparse.sparse_momentum(0.5, 1, masks=masks)
    state = tx.init(jax.tree.map(lambda w: w + 1, weights))._replace(count=jnp.int32(1))

    def update(scale):
        hidden = {name: optax.MaskedNode() for name in momentum}
        first = hidden | {"layer0": momentum["layer0"] * scale, "layer1": momentum["layer1"] * scale}
        second = hidden | {"layer2": momentum["layer2"]}
        states = (
            optax.MaskedState(optax.TraceState(first)),
            optax.MaskedState(optax.ScaleByLionState(jnp.int32(0), second)),
        )
        signal = _StoredMomentum(states, weights)
        return tx.update(weights, state, weights, momentum=signal)[1].masks

    a, b = map(jax.jit(update), (1.0, 2.0**-20))
    assert any(bool((a[name] != masks[name]).any()) for name in masks)
    for name in masks:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.slow
def test_frozen_layers_keep_their_masks_and_the_others_do_as_without_them():
    # "frozen" does not move, whatever its momentum; "silent" has no gradient, but decays.
    names = ("frozen", "head", "silent", "tail")
    keys = jax.random.split(jax.random.key(0), 8)
    params = {name: jax.random.normal(key, (16, 16)) for name, key in zip(names, keys, strict=False)}
    masks = {name: jax.random.uniform(key, (16, 16)) < 0.3 for name, key in zip(names, keys[4:], strict=True)}

    def waves(params, count):
        return jax.tree.map(lambda p: jnp.cos(3 * p + count), params) | {"silent": jnp.zeros((16, 16))}

    def trained(masks, **options):
        optimizer = optax.adamw(0.1, weight_decay=0.1)
        freeze = optax.freeze({name: name == "frozen" for name in names})
        link = jaxsparse.sparse_momentum(0.5, 2, masks=masks, **options)
        return trained_masks(jaxsparse.chain(optimizer, freeze, link), params, 9, waves)

    after, opt_state, ended = trained(masks)
    for name in names:
        same = bool((after[name] == masks[name]).all())
        assert same == (name in ("frozen", "silent")), name
    np.testing.assert_array_equal(ended["frozen"], jnp.where(masks["frozen"], params["frozen"], 0))
    with pytest.warns(UserWarning, match=r"all_but\('(frozen|silent)'\)") as told:
        jaxsparse.check(opt_state, ended)
    assert len(told) == 2

    without, opt_state, ended = trained(masks | {"frozen": True, "silent": True})
    for name in ("head", "tail"):
        np.testing.assert_array_equal(after[name], without[name])
    with warnings.catch_warnings(action="error"):
        jaxsparse.check(opt_state, ended)

    options = {"growth": "random", "redistribution": "none", "prune": "global_magnitude"}  # which need no momentum
    after, *_ = trained(masks, **options)
    same = {name: bool((after[name] == masks[name]).all()) for name in names}
    assert same == {"frozen": True, "head": False, "silent": False, "tail": False}


@pytest.mark.slow
def test_fingerprints_change_with_any_bit():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        w = jax.random.normal(jax.random.key(0), (40, 30)).astype(dtype)
        mask = w > -0.5
        first = fingerprints([w], [mask])
        assert first.dtype == jnp.uint32
        swapped = jnp.where(mask, w, 7).at[0].add(jnp.finfo(dtype).eps)
        assert fingerprints([jnp.where(mask, w, 7)], [mask]) == first  # what is pruned does not count
        assert fingerprints([swapped], [mask]) != first
        steps = jnp.nextafter(
            w[0, :2], jnp.asarray([9, -9], dtype)
        )  # one up, one down: the sum of the bits is the same
        assert fingerprints([w.at[0, :2].set(steps)], [mask | True]) != fingerprints([w], [mask | True])
    assert fingerprints([], []).shape == (0,)


def test_fingerprints_of_large_leaves_change_with_a_step_and_with_the_mask():
    w = jax.random.normal(jax.random.key(0), (300, 40))
    mask = w > -0.5
    first = fingerprints([w], [mask])
    assert fingerprints([jnp.where(mask, w, 7)], [mask]) == first  # what is pruned does not count
    assert fingerprints([w.at[0, 0].set(-0.0)], [mask]) == fingerprints([w.at[0, 0].set(0.0)], [mask])
    assert fingerprints([w * (1 + 1e-6)], [mask]) != first
    assert fingerprints([w], [mask & (w < 2)]) != first


@pytest.mark.slow
def test_at_least_so_many_weights_of_a_layer_stay_and_a_layer_of_none_is_told():
    params = {"big": jax.random.normal(jax.random.key(0), (40, 30)), "out": jnp.full((4, 5), 1e-3)}
    weights = jax.tree.map(jnp.copy, params)
    tx = jaxsparse.chain(optax.sgd(0.1, momentum=0.9), jaxsparse.sparse_momentum(0.99, 1, at_least=2, prune_rate=1.0))
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(4):
        updates, state = step({"big": weights["big"], "out": 1e-6 * weights["out"] + 1e-9}, state, weights)
        weights = optax.apply_updates(weights, updates)
        masks = jaxsparse.get_masks(state)
        assert int(masks["out"].sum()) >= 2
        assert int(jaxsparse.count(masks)) == 12
    with pytest.warns(UserWarning, match="no weight is left in out"):
        jaxsparse.sparse_momentum(0.99, 1, decay=0.9).init({"big": params["big"], "out": jnp.ones((2, 2))})


@pytest.mark.slow
def test_neurons_are_outputs_wherever_they_lie():
    momentum = jax.random.normal(jax.random.key(1), (6, 40)) * jnp.array([[9.0], [1], [1], [1], [1], [9]])
    masks = jnp.zeros((6, 40), bool).at[:, ::4].set(True)
    weights = jnp.where(masks, 1.0, 0.0)

    def grown(name, turn):
        trees = ({name: turn(leaf)} for leaf in (weights, momentum, masks))
        return turn(jaxsparse.momentum_regrowth(*trees, 1.0, growth="momentum_neuron")[name])

    assert (grown("weight", lambda x: x) == grown("kernel", jnp.transpose)).all()


def test_drop_fractions_that_are_whole_in_decimals_are_not_rounded_up():
    kept = jnp.array([10, 50, 90, 100, 170, 1000, 7])
    assert losses(kept, 0.3).tolist() == [3, 15, 27, 30, 51, 300, 3]
    assert losses(kept, 0.7).tolist() == [7, 35, 63, 70, 119, 700, 5]
    assert losses(kept, 1.0).tolist() == kept.tolist()
    assert losses(kept, 0.0).tolist() == [0] * len(kept)
