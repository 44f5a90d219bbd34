import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from tests.problems import gradients, make_params, make_step

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
NAMES = ("conv", "d1", "d2")


def tree(data, group, at=None):
    return {name: jnp.asarray(data[f"{group}/{name}"] if at is None else data[f"{group}/{name}"][at]) for name in NAMES}


def test_golden_mask_updates():
    data = np.load(GOLDEN / "rigl_update.npz")
    for fraction in ("0.1", "0.3", "0.5"):
        new = jaxsparse.rigl_update(
            tree(data, "weights"), tree(data, "grads"), tree(data, "mask_before"), float(fraction)
        )
        for name, mask in new.items():
            differ = int((mask != data[f"mask_after_{fraction}/{name}"]).sum())
            # Half of 53 weights are 26.5: 26 stay here and 27 there, or the other way round.
            assert differ == (2 if (name, fraction) == ("conv", "0.5") else 0), (name, fraction)


def test_golden_trajectory():
    data = np.load(GOLDEN / "rigl_trajectory.npz")
    assert "skip_gradients=True" in json.loads(str(data["meta"]))["note"]
    tx = jaxsparse.chain(
        optax.sgd(0.1, momentum=0.9),
        jaxsparse.rigl(
            0.8, 3, masks=tree(data, "mask_init"), drop_fraction=optax.cosine_decay_schedule(0.3, 30), hold=True
        ),
    )
    params = tree(data, "init")
    opt_state = tx.init(params)
    params = jaxsparse.sparsify(opt_state, params)

    @jax.jit
    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    changed = 0
    for t in range(9):
        before = jaxsparse.get_masks(opt_state)
        params, opt_state = step(params, opt_state, tree(data, "grads", t))
        masks = jaxsparse.get_masks(opt_state)
        changed += any(bool((masks[name] != before[name]).any()) for name in NAMES)
        for name in NAMES:
            np.testing.assert_array_equal(masks[name], data[f"masks/{name}"][t])
            expected = data[f"params/{name}"][t] * data[f"masks/{name}"][t]
            np.testing.assert_allclose(params[name], expected, rtol=1e-5, atol=1e-6)
    assert changed == 2


# By hand, on ten weights, with SGD of rate 1 and momentum 0.5. Masks change on step 2, and half of four weights go.
#            kept: 8 4 2 1, missing: 0 0 0 0 0 0
#   step 0         grads 1 0 0 0 | 0 ...: 8 becomes 7
#   step 1         grads 0: by the momentum of 0.5 it becomes 6.5
#   step 2         grads 0 0 0 0.25 | 0 3 0 0 0 -2: it becomes 6.25, and masks change
#                  smallest: 2 and 1. Largest |g| of what is then missing (2, 1 and the zeros): places 5 and 9
#                  They start at 0, with a momentum of 0, although SGD has just stored their gradients, 3 and -2.
#   step 3         grads 0 0 0 0 | 0 1 0 0 0 0: place 5 moves by -1, place 9 stays, and 6.25 becomes 6.125
START = [8.0, 4.0, 2.0, 1.0, 0, 0, 0, 0, 0, 0]
GRADS = [[1, 0, 0, 0, 0, 0, 0, 0, 0, 0], [0] * 10, [0, 0, 0, 0.25, 0, 3, 0, 0, 0, -2], [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]]
ENDS = [
    [7, 4, 2, 1, 0, 0, 0, 0, 0, 0],
    [6.5, 4, 2, 1, 0, 0, 0, 0, 0, 0],
    [6.25, 4, 0, 0, 0, 0, 0, 0, 0, 0],
    [6.125, 4, 0, 0, 0, -1, 0, 0, 0, 0],
]


def by_hand(optimizer, **options):
    tx = jaxsparse.chain(
        optimizer,
        jaxsparse.rigl(
            0.6, 2, masks={"kernel": jnp.asarray(START) != 0}, drop_fraction=optax.constant_schedule(0.5), **options
        ),
    )
    params = {"kernel": jnp.asarray(START)}
    opt_state, found = tx.init(params), []
    for grads in GRADS:
        updates, opt_state = tx.update({"kernel": jnp.asarray(grads, jnp.float32)}, opt_state, params)
        params = optax.apply_updates(params, updates)
        found.append(params["kernel"].tolist())
    return found, opt_state


def test_by_hand():
    found, opt_state = by_hand(optax.sgd(1.0, momentum=0.5))
    assert found == ENDS
    assert np.flatnonzero(jaxsparse.get_masks(opt_state)["kernel"]).tolist() == [0, 1, 5, 9]
    # The momenta of places 5 and 9 started anew on step 3, where 3 and -2 would have gone on as 1.5 and -1.
    assert optax.tree.get(opt_state, "trace")["kernel"].tolist() == [0.125, 0, 0, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("optimizer", [optax.amsgrad(0.1), optax.contrib.ademamix(0.1), optax.rmsprop(0.1)])
def test_all_averages_of_a_regrown_weight_start_anew(optimizer):
    _, opt_state = by_hand(optimizer)
    # On step 3 place 9 has a gradient of 0, so what it had on step 2, -2, shows in no average.
    leaves = [leaf for leaf in jax.tree.leaves(opt_state[0]) if jnp.shape(leaf) == (10,)]
    assert leaves
    assert [float(leaf[9]) for leaf in leaves] == [0] * len(leaves)
    assert all(leaf[5] != 0 for leaf in leaves)


WITHIN = {
    "masked": lambda chain: optax.masked(chain, {"kernel": True}),
    "partition": lambda chain: optax.partition({"a": chain}, {"kernel": "a"}),
    "apply_if_finite": lambda chain: optax.apply_if_finite(chain, 3),
    "inject_hyperparams": lambda chain: optax.inject_hyperparams(lambda number: chain)(0.5),
}


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("wrapper", WITHIN)
def test_a_plain_chain_within_a_wrapper_starts_anew_too(wrapper, hold):
    link = jaxsparse.rigl(
        0.6, 2, masks={"kernel": jnp.asarray(START) != 0}, drop_fraction=optax.constant_schedule(0.5), hold=hold
    )
    optimizer, ends = optax.sgd(1.0, momentum=0.5), []
    for tx in (
        jaxsparse.chain(optimizer, link),
        jaxsparse.chain(WITHIN[wrapper](optax.chain(optimizer, link))),
    ):
        params = {"kernel": jnp.asarray(START)}
        opt_state = tx.init(params)
        for grads in GRADS:
            updates, opt_state = tx.update({"kernel": jnp.asarray(grads, jnp.float32)}, opt_state, params)
            params = optax.apply_updates(params, updates)
        ends.append((params["kernel"].tolist(), optax.tree.get(opt_state, "trace")["kernel"].tolist()))
    assert ends[0] == ends[1]
    assert ends[0][1][9] == 0


def test_accumulated_gradients_are_those_of_the_last_steps():
    params, seen = {"kernel": jnp.ones((4, 5))}, []
    tx = jaxsparse.chain(optax.sgd(0.1), jaxsparse.rigl(0.5, 4, stop_at=100, accumulate=3))
    opt_state = tx.init(params)
    for count in range(6):
        _, opt_state = tx.update({"kernel": jnp.full((4, 5), 2.0**count)}, opt_state, params)
        seen.append(float(opt_state[1].own["kernel"].max()))
    assert seen == [1, 1, 4, 12, 28, 28]  # steps 2, 3 and 4; of the first mask update that never comes, 0


@pytest.mark.slow
def test_held_steps_leave_the_optimizer_as_it_was():
    params = make_params()
    tx = jaxsparse.chain(optax.adam(0.1), jaxsparse.rigl(0.75, 2, stop_at=100, hold=True))
    opt_state, step = tx.init(params), make_step(tx)
    params = jaxsparse.sparsify(opt_state, params)
    for count in range(4):
        before = params
        params, opt_state = step(params, opt_state, count)
        moved = any(bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (before, params)), strict=True))
        assert moved or count == 2
        assert int(optax.tree.get(opt_state[0], "count")) == (1, 2, 2, 3)[count]
    assert (params["dense"]["bias"] != before["dense"]["bias"]).all()


def test_bias_correction_gives_a_regrown_weight_the_steps_of_a_young_adam():
    """A weight that is regrown on step 4, with a gradient of 1 from then on, moves as with an Adam of its own."""
    start = jnp.asarray([4.0, 3.0, 0.0, 0.0])
    grads = jnp.asarray([[0.01, 0.01, 0, 0]] * 4 + [[0.01, 0.01, 1, 0]] * 8)
    ends = {}
    for betas in (None, (0.9, 0.99)):
        tx = jaxsparse.chain(
            optax.adam(0.1, b2=0.99, eps=0.0, eps_root=1e-30),
            jaxsparse.rigl(
                0.5, 4, masks={"w": start != 0}, drop_fraction=optax.constant_schedule(0.5), stop_at=5,
                bias_correction=betas,
            ),
        )  # fmt: skip
        params, found = {"w": start}, []
        opt_state, update = tx.init(params), jax.jit(tx.update)
        for g in grads:
            updates, opt_state = update({"w": g}, opt_state, params)
            params = optax.apply_updates(params, updates)
            found.append(float(params["w"][2]))
        ends[betas] = np.array(found)
    own = optax.adam(0.1, b2=0.99, eps=0.0, eps_root=1e-30)
    w, state, expected = jnp.zeros(()), own.init(jnp.zeros(())), []
    for _ in range(7):
        updates, state = own.update(jnp.ones(()), state)
        w = optax.apply_updates(w, updates)
        expected.append(float(w))
    np.testing.assert_array_equal(ends[0.9, 0.99][:5], 0)
    np.testing.assert_allclose(ends[0.9, 0.99][5:], expected, rtol=1e-4)
    assert abs(ends[None][5] / expected[0]) < 0.6  # what is corrected: on step 5 it is 0.52, much later 3.2


def test_explored_weights_only_become_more():
    params = make_params()
    tx = jaxsparse.chain(optax.sgd(0.1), jaxsparse.rigl(0.75, 2, stop_at=100, track=True))
    opt_state, step = tx.init(params), make_step(tx)
    shares = []
    for count in range(5):
        params, opt_state = step(params, opt_state, count)
        ever = jaxsparse.inspect.explored(opt_state)
        shares.append(float(jaxsparse.density(ever)))
        for was, now in zip(*map(jax.tree.leaves, (ever, jaxsparse.get_masks(opt_state))), strict=True):
            assert not (now & ~was).any()
    assert shares[0] == shares[1] == 0.25 < shares[2] == shares[3] < shares[4]
    with pytest.raises(ValueError, match="track=True"):
        jaxsparse.inspect.explored(jaxsparse.rigl(0.5, stop_at=1).init(params))


def test_frozen_layers_keep_their_masks():
    params = make_params()
    frozen = {"attention": "frozen", "conv": "moves", "dense": "moves", "temperature": "moves"}
    tx = jaxsparse.chain(
        optax.partition({"frozen": optax.set_to_zero(), "moves": optax.sgd(0.1)}, frozen),
        jaxsparse.rigl(0.75, 2, stop_at=100),
    )
    opt_state, step = tx.init(params), make_step(tx)
    params = jaxsparse.sparsify(opt_state, params)
    before = jaxsparse.get_masks(opt_state)
    for count in range(5):
        params, opt_state = step(params, opt_state, count)
    after = jaxsparse.get_masks(opt_state)
    np.testing.assert_array_equal(before["attention"]["kernel"], after["attention"]["kernel"])
    assert (before["dense"]["kernel"] != after["dense"]["kernel"]).any()
    with pytest.warns(UserWarning, match="rigl: attention/kernel kept its mask"):
        jaxsparse.check(opt_state, params)


def test_bad_options_are_named():
    for options, words in (
        ({}, "rigl needs stop_at"),
        ({"drop_fraction": 1.5, "stop_at": 9}, "drop_fraction must be at least 0 and at most 1, got 1.5"),
        ({"stop_at": 9, "sparsity": 1.0}, r"sparsity is the fraction of zeros and must be in \[0, 1\), got 1.0"),
        ({"stop_at": 9, "update_every": 0}, "update_every must be at least 1"),
        ({"stop_at": 9, "accumulate": 101}, "accumulate must be at most update_every, 100, got 101"),
        ({"stop_at": 9, "bias_correction": 0.9}, "bias_correction must be the decays of Adam"),
        ({"stop_at": 9, "bias_correction": (0.9, 1.0)}, "bias_correction must be at least 0 and below 1, got 1.0"),
        ({"stop_at": 9, "allocation": "erk"}, "allocation must be one of"),
        ({"stop_at": 9, "structure": "row"}, "structure"),
    ):
        with pytest.raises(ValueError, match=words):
            jaxsparse.rigl(**{"sparsity": 0.9, **options})
    params = make_params()
    with pytest.raises(ValueError, match="must be at least 0 and at most 1, got 2"):
        jaxsparse.rigl_update(params, params, jaxsparse.random_masks(params, 0.5), 2)
    for tx, words in (
        (optax.chain(optax.sgd(0.1), jaxsparse.rigl(0.9, stop_at=9)), "rigl grows weights by their gradients and is"),
        (optax.chain(optax.sgd(0.1), jaxsparse.rigl(0.9, stop_at=9, accumulate=2)), "use jaxsparse.chain in place"),
    ):
        with pytest.raises(ValueError, match=words):
            jax.eval_shape(tx.update, gradients(params), jax.eval_shape(tx.init, params), params)
    tx = optax.chain(optax.sgd(0.1), jaxsparse.rigl(0.9, stop_at=9))
    with pytest.warns(UserWarning, match="rigl is in no jaxsparse.chain, so the optimizer state of regrown weights"):
        jax.eval_shape(lambda g, s, p: tx.update(g, s, p, grad=g), params, jax.eval_shape(tx.init, params), params)


@pytest.mark.slow
def test_numbers_may_be_injected():
    params = make_params()
    link = optax.inject_hyperparams(jaxsparse.rigl)(0.75, 2, stop_at=10, drop_fraction=0.5)
    plain = jaxsparse.rigl(0.75, 2, stop_at=10, drop_fraction=0.5)
    ends = []
    for tx in (jaxsparse.chain(optax.sgd(0.1, momentum=0.9), rigl) for rigl in (link, plain)):
        trained, opt_state, step = params, tx.init(params), make_step(tx)
        for count in range(5):
            trained, opt_state = step(trained, opt_state, count)
        ends.append(trained)
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_a_named_chain_is_warned_of():
    link = jaxsparse.rigl(0.5, 2, stop_at=10)
    tx = jaxsparse.chain(optax.named_chain(("optimizer", optax.sgd(0.1, momentum=0.9)), ("link", link)))
    params = {"kernel": jnp.ones((4, 5))}
    with pytest.warns(UserWarning, match=r"a link that regrows weights stands in optax\.named_chain"):
        jax.eval_shape(tx.update, params, tx.init(params), params)


def test_a_held_optimizer_moves_no_leaf_that_the_link_does_not_see():
    params = make_params()
    seen = {"attention": True, "conv": False, "dense": True, "temperature": False}
    link = jaxsparse.rigl(0.75, 2, stop_at=100, hold=True)
    tx = jaxsparse.chain(optax.sgd(0.1, momentum=0.9), optax.masked(link, seen))
    opt_state, step = tx.init(params), make_step(tx)
    params = jaxsparse.sparsify(opt_state, params)
    for count in range(3):
        before, (params, opt_state) = params, step(params, opt_state, count)
    np.testing.assert_array_equal(before["conv"]["kernel"], params["conv"]["kernel"])
    np.testing.assert_array_equal(before["dense"]["bias"], params["dense"]["bias"])


def test_no_array_of_the_state_is_empty():
    """Orbax saves none that is."""
    params = make_params()
    link = jaxsparse.rigl(0.75, 2, stop_at=9, accumulate=2, hold=True, bias_correction=(0.9, 0.99), track=True)
    shapes = jax.eval_shape(link.init, params)
    assert all(leaf.size for leaf in jax.tree.leaves(shapes))


def test_what_another_link_pruned_lands_on_zero_while_the_optimizer_is_held():
    params = {name: {"kernel": jax.random.normal(jax.random.key(i), (6, 6))} for i, name in enumerate("ab")}
    links = {name: jaxsparse.rigl(0.5, 2, stop_at=100, allocation="uniform", hold=True) for name in "ab"}
    each = optax.partition(links, {name: {"kernel": name} for name in "ab"})
    tx = jaxsparse.chain(optax.sgd(0.1, momentum=0.9), each)
    opt_state, update = tx.init(params), jax.jit(tx.update)
    params = jaxsparse.sparsify(opt_state, params)
    for count in range(6):
        grads = jax.tree.map(lambda p: jnp.cos(p + count), params)  # noqa: B023
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        jaxsparse.check(opt_state, params)


def test_links_beside_one_that_holds_the_optimizer_change_masks_on_their_own_steps():
    params = {name: {"kernel": jax.random.normal(jax.random.key(i), (6, 6))} for i, name in enumerate("ab")}
    link = jaxsparse.rigl(0.5, 3, stop_at=100, allocation="uniform", hold=True)
    only = {name: {other: {"kernel": other == name} for other in "ab"} for name in "ab"}
    tx = jaxsparse.chain(optax.sgd(0.1, momentum=0.9), *(optax.masked(link, only[name]) for name in "ab"))
    opt_state, update = tx.init(params), jax.jit(tx.update)
    params = jaxsparse.sparsify(opt_state, params)
    moved = []
    for count in range(7):
        before = jaxsparse.get_masks(opt_state, params)
        grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(count), p.shape), params)  # noqa: B023
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        after = jaxsparse.get_masks(opt_state, params)
        moved.append([bool((before[name]["kernel"] != after[name]["kernel"]).any()) for name in "ab"])
        jaxsparse.check(opt_state, params)
    assert moved == [[count in (3, 6)] * 2 for count in range(7)]
    assert [int(link.inner_state.count) for link in opt_state[1:]] == [7, 7]


def test_an_optimizer_state_in_other_shapes_is_told():
    params = {"kernel": jnp.arange(1.0, 37).reshape(6, 6)}
    tx = jaxsparse.chain(optax.flatten(optax.sgd(0.1, momentum=0.9)), jaxsparse.rigl(0.5, 2, stop_at=100))
    with pytest.warns(UserWarning, match="regrown weights keep the optimizer state .* 0/0/trace has other shapes"):
        tx.update(params, tx.init(params), params)


def test_the_state_of_a_dense_leaf_whose_path_ends_like_that_of_a_sparse_one_goes_on():
    params = {
        "Dense_0": {"kernel": jnp.arange(1.0, 17).reshape(4, 4)},
        "Block_0": {"Dense_0": {"kernel": jnp.ones((4, 4))}},
    }
    link = jaxsparse.rigl(0.5, 2, stop_at=100, prunable=jaxsparse.all_but("Block_0"))
    tx = jaxsparse.chain(optax.sgd(0.1, momentum=0.9), link)
    opt_state = tx.init(params)
    params = jaxsparse.sparsify(opt_state, params)
    for _ in range(5):
        updates, opt_state = tx.update(jax.tree.map(jnp.ones_like, params), opt_state, params)
        params = optax.apply_updates(params, updates)
    momentum = opt_state[0][0].trace["Block_0"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(momentum, sum(0.9**k for k in range(5)), rtol=1e-6)


@pytest.mark.parametrize(
    "link",
    [
        jaxsparse.rigl(0.5, 1, drop_fraction=optax.constant_schedule(0.2), allocation="uniform"),
        jaxsparse.rigl(0.5, jnp.int32(1), drop_fraction=optax.constant_schedule(0.2), allocation="uniform"),
        jaxsparse.sparse_evolutionary(0.5, 1, drop_fraction=0.2, drop="magnitude", allocation="uniform"),
    ],
)
def test_masks_that_change_on_every_step_let_regrown_weights_move(link):
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}
    tx = jaxsparse.chain(optax.sgd(0.1), link)
    opt_state, update = tx.init(params), jax.jit(tx.update)
    params = jaxsparse.sparsify(opt_state, params)
    for count in range(12):
        before = jaxsparse.get_masks(opt_state)["kernel"]
        grads = {"kernel": jax.random.normal(jax.random.key(count), (8, 8))}
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        mask = jaxsparse.get_masks(opt_state)["kernel"]
        # What has just been regrown is 0, what was there before is not.
        np.testing.assert_array_equal(params["kernel"] != 0, mask & before)
        assert int(mask.sum()) == 32


def test_bias_correction_refuses_mini_steps_inside_the_chain():
    link = jaxsparse.rigl(0.5, 40, stop_at=100, bias_correction=(0.9, 0.999))
    tx = jaxsparse.chain(optax.MultiSteps(optax.adam(1e-3), 4), link)
    with pytest.raises(ValueError, match=r"rigl: bias_correction counts .* optax\.MultiSteps"):
        tx.init({"kernel": jnp.ones((4, 4))})
    jaxsparse.chain(optax.adam(1e-3), link).init({"kernel": jnp.ones((4, 4))})


def test_accumulate_may_be_injected():
    tx = jaxsparse.chain(optax.sgd(0.1), optax.inject_hyperparams(jaxsparse.rigl)(0.5, 2, stop_at=10, accumulate=2))
    params = {"kernel": jnp.arange(1.0, 17).reshape(4, 4)}
    opt_state = tx.init(params)
    for _ in range(3):
        _updates, opt_state = jax.jit(tx.update)(params, opt_state, params)
    assert int(jaxsparse.count(jaxsparse.get_masks(opt_state))) == 8


def test_sums_of_gradients_in_bfloat16_are_float32():
    params = {"w": jnp.ones((2, 4), jnp.bfloat16)}
    tx = jaxsparse.chain(optax.sgd(0.1), jaxsparse.rigl(0.5, 8, stop_at=100, accumulate=8))
    opt_state, update = tx.init(params), jax.jit(tx.update)
    for value in (0.0, 256.0, *[1.0] * 7):
        _, opt_state = update({"w": jnp.full((2, 4), value, jnp.bfloat16)}, opt_state, params)
    np.testing.assert_array_equal(opt_state[1].own["w"], jnp.full((2, 4), 263.0))


def test_a_step_whose_gradient_overflows_changes_no_mask():
    params = {"w": jnp.arange(1.0, 9).reshape(2, 4), "v": jnp.arange(2.0, 10).reshape(2, 4)}
    link = jaxsparse.rigl(0.5, 2, drop_fraction=optax.constant_schedule(0.5))
    tx = jaxsparse.chain(optax.apply_if_finite(optax.sgd(0.1), 5), link)
    opt_state, update = tx.init(params), jax.jit(tx.update)
    params, seen = jaxsparse.sparsify(opt_state, params), []
    for count in range(5):
        grads = jax.tree.map(lambda p: jnp.where(p == 0, 1.0, 0.1), params)
        if count == 2:
            grads["w"] = grads["w"].at[1, 2].set(jnp.inf)
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        seen.append(jaxsparse.get_masks(opt_state))
        if count == 2:
            with pytest.warns(UserWarning, match="w kept its mask .* a gradient was not finite on that step"):
                jaxsparse.check(opt_state, params)
    jaxsparse.check(opt_state, params)
    changes = [{name: bool((a[name] != b[name]).any()) for name in a} for a, b in itertools.pairwise(seen)]
    assert [change["w"] for change in changes] == [False, False, False, True]
    assert [change["v"] for change in changes] == [False, True, False, True]


def test_a_leaf_without_gradient_is_named_on_the_first_step():
    params = {"w": jnp.ones((2, 4)), "v": jnp.ones((2, 4))}
    tx = jaxsparse.chain(optax.sgd(0.1), jaxsparse.rigl(0.5, 100, stop_at=1000))
    with pytest.raises(ValueError, match=r"no gradient of v: .* leave it out by prunable=jaxsparse.all_but\('v'\)"):
        tx.update({"w": params["w"], "v": None}, tx.init(params), params)


@pytest.mark.parametrize("method", [jaxsparse.rigl, jaxsparse.sparse_evolutionary])
def test_masks_that_would_never_change_are_warned_of(method):
    with pytest.warns(UserWarning, match=r"no multiple of update_every, 100, is in .*\[0, 75\)"):
        method(0.5, 100, stop_at=75)


def test_drop_fractions_are_read_until_masks_stay():
    jaxsparse.rigl(0.5, 100, stop_at=5000, drop_fraction=lambda step: 0.3 * (1 - step / 5000))
    with pytest.raises(ValueError, match="drop_fraction of step 5000 must be at least 0 .*, got -0.3"):
        jaxsparse.rigl(0.5, 100, stop_at=5000, drop_fraction=lambda step: 0.3 * (1 - step / 2500))


@pytest.mark.parametrize("method", [jaxsparse.rigl, jaxsparse.sparse_evolutionary])
def test_a_drop_fraction_in_percent_is_refused(method):
    with pytest.raises(ValueError, match="drop_fraction of step 0 must be at least 0 and at most 1, got 30"):
        method(0.5, 10, drop_fraction=optax.constant_schedule(30.0))
