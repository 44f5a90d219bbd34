import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from jaxsparse import Layout
from jaxsparse.transforms import fan_in
from tests.problems import gradients, make_params, make_step


def layers_of(x, at):
    """A leaf as NumPy matrices (layers, inputs, outputs), places among the inputs."""
    seen = at.to_matrices(np.asarray(x))
    stack = int(np.prod(seen.shape[: len(at.stack)]))
    return seen.reshape(stack, -1, seen.shape[-1])


# By hand: 4 inputs and 5 outputs, of which every one starts with 2 weights (n = 10), SGD with a rate of 1, and 0.35 as
# drop fraction. An output stays with 2 salient weights; at least 10 // 4 + 1 = 3 outputs do. Columns are outputs.
START = [
    [10, 7, 0, 3, 0],
    [8, 0, 5, 2, 0],
    [0, 6, 0, 0, 0.2],
    [0, 0, 4, 0, 0.1],
]
# Step 0: a gradient of 1 makes the first weight 9.
# Step 2: A = 10, so K = 3 and the 7 largest are 9 8 7 6 5 4 3. The 3 largest gradients are 5 4 3.
GRADS_2 = [
    [0, 0, 0.5, 0, 3],
    [0, 4, 0, 0, 0],
    [5, 0, -1, 0, 0],
    [0, 0, 0, 0, 0],
]
# Salient are 2 + 1, 2 + 1, 2, 1 and 0 + 1 weights: the last two outputs are ablated, and the others have 10 // 3 = 3
# inputs. They keep two each and grow one, by the gradients 5, 4 and -1 (3 is of an output that is ablated).
MASK_2 = [
    [1, 1, 0, 0, 0],
    [1, 1, 1, 0, 0],
    [1, 1, 1, 0, 0],
    [0, 0, 1, 0, 0],
]
# Step 3: a gradient of 10 makes the weight of input 2 and output 0, which has just been grown, -10.
# Step 4: A = 9, so K = 3 and the 6 largest are 10 9 8 7 6 5. The 3 largest gradients are 9 8 7.
GRADS_4 = [
    [0, 0, 7, 0, 1],
    [0, 0, 0, 8, 0],
    [0, 0, 0, 0, 0],
    [0, 0, 0, 9, 0],
]
# Salient are 3, 2, 1 + 1, 0 + 2 and 0 weights, so output 3 returns, and there are 10 // 4 = 2 inputs for each. Of
# output 0 the largest two stay, 10 and 9. Output 2 keeps 5 and grows by 7, output 3 grows by 9 and 8.
END = [
    [9, 7, 0, 0, 0],
    [0, 0, 5, 0, 0],
    [-10, 6, 0, 0, 0],
    [0, 0, 0, 0, 0],
]
MASK_4 = [
    [1, 1, 1, 0, 0],
    [0, 0, 1, 1, 0],
    [1, 1, 0, 0, 0],
    [0, 0, 0, 1, 0],
]


def test_by_hand_an_output_is_ablated_and_one_returns():
    start = jnp.asarray(START, jnp.float32)
    tx = jaxsparse.chain(
        optax.sgd(1.0),
        jaxsparse.srigl(
            0.5, 2, masks={"kernel": start != 0}, drop_fraction=optax.constant_schedule(0.35), min_salient=2,
            never_ablate=(),
        ),
    )  # fmt: skip
    params = {"kernel": start}
    opt_state, found, update = tx.init(params), [], jax.jit(tx.update)
    nothing = np.zeros((4, 5))
    for grads in (np.eye(4, 5) * [1, 0, 0, 0, 0], nothing, GRADS_2, 10 * (np.array(GRADS_2) == 5), GRADS_4):
        updates, opt_state = update({"kernel": np.asarray(grads, np.float32)}, opt_state, params)
        params = optax.apply_updates(params, updates)
        jaxsparse.check(opt_state, params)
        found.append((params["kernel"].tolist(), jaxsparse.get_masks(opt_state)["kernel"].astype(int).tolist()))
    assert found[0] == found[1] == ([[9, *START[0][1:]], *start[1:].tolist()], (start != 0).astype(int).tolist())
    assert found[2] == ((np.array(found[1][0]) * MASK_2).tolist(), MASK_2)
    assert found[3][1] == MASK_2
    assert found[4] == (END, MASK_4)
    assert int(opt_state[1].kept) == 8  # of a budget of 10


def test_golden_mask_updates():
    data = dict(np.load(pathlib.Path(__file__).parent.parent / "golden" / "srigl_update.npz"))
    cut = data.pop("cut")

    @jax.jit
    @jax.vmap
    def of_layers(weights, grads, mask_before, drop_fraction, min_salient, last, mask_after):
        del mask_after

        def after(never_ablate):
            tx = jaxsparse.chain(
                jaxsparse.srigl(
                    0, 1, masks={"w": mask_before}, drop_fraction=lambda _: drop_fraction, min_salient=min_salient,
                    never_ablate=never_ablate,
                )
            )  # fmt: skip
            # From other weights, since a layer that has not moved keeps its mask.
            (state,) = tx.init({"w": 2 * weights})
            state = (state._replace(count=jnp.ones((), jnp.int32)),)
            return jaxsparse.get_masks(tx.update({"w": grads}, state, {"w": weights})[1])["w"]

        return jnp.where(last, after("w"), after(()))

    masks, ablated = np.asarray(of_layers(*data.values())), 0
    for found, expected, arbitrary, before in zip(masks, data["mask_after"], cut, data["mask_before"], strict=True):
        np.testing.assert_array_equal(found[:, ~arbitrary], expected[:, ~arbitrary])
        np.testing.assert_array_equal(found.sum(0), expected.sum(0))
        ablated += (before.any(0) & ~found.any(0)).sum()
    assert (ablated, cut.sum()) == (10, 30)


LAYOUTS = {
    "conv": Layout((0, 1, 2), 3),
    "dense": Layout(0, 1),
    "first": Layout(1, 0),  # outputs first
    "query": Layout(0, (1, 2)),
    "stack": Layout(1, 2, stack=0),
}
SHAPES = {"conv": (3, 3, 2, 8), "dense": (12, 20), "first": (9, 16), "query": (16, 2, 4), "stack": (2, 10, 6)}


def updated(w, g, mask, n, fraction, gamma, whole):
    """One mask update of a layer (inputs, outputs) in loops, by the docstring of srigl; its outputs are columns."""
    inputs, outputs = mask.shape

    def largest(x, k, where):
        order = sorted(np.flatnonzero(where.reshape(-1)), key=lambda i: (-abs(x.reshape(-1)[i]), i))[:k]
        marked = np.zeros(x.size, bool)
        marked[order] = True
        return marked.reshape(x.shape)

    active = int(mask.sum())
    stays = min(active - int(np.float32(fraction) * np.float32(active)), int((mask & (w != 0)).sum()))
    salient = largest(w, stays, mask) | largest(g, active - stays, np.ones_like(mask))
    c = salient.sum(0)
    tau = min(max(1, int(gamma * (n // outputs))), sorted(c)[::-1][min(n // inputs, outputs - 1)])
    live = np.ones(outputs, bool) if whole else c >= tau
    size = min(n // live.sum(), inputs)
    left = largest(w, stays, mask & live)
    new = np.zeros_like(mask)
    for r in np.flatnonzero(live):
        row = largest(w[:, r], size, left[:, r])
        new[:, r] = row | largest(g[:, r], size - row.sum(), ~row)
    return new


@pytest.mark.slow
def test_random_updates_are_those_of_loops_and_keep_the_fan_in():
    fractions = jnp.asarray([0.9, 0.3, 1.0, 0.0, 0.5, 0.25])
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    params = {name: jax.random.normal(key, SHAPES[name]) for name, key in zip(SHAPES, keys, strict=True)}

    def link(fractions):
        return jaxsparse.chain(
            optax.sgd(0.1),
            jaxsparse.srigl(
                0.7, 1, drop_fraction=lambda step: fractions[step], min_salient=0.75, never_ablate="first",
                layout=LAYOUTS, key=3,
            ),
        )  # fmt: skip

    @jax.jit
    def step(params, opt_state, grads, fractions):
        updates, opt_state = link(fractions).update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = link(fractions).init(params)
    params = jaxsparse.sparsify(opt_state, params)
    budgets = jax.device_get(opt_state[1].own.budgets)
    assert budgets["stack"].shape == (2, 1, 1)
    ablated = returned = 0
    for count in range(6):
        # Some outputs have small gradients, others later.
        scale = jnp.exp(2 * jax.random.normal(jax.random.key(count), (30,)))
        grads = {
            name: jax.random.normal(jax.random.fold_in(jax.random.key(100), count), x.shape)
            * jnp.expand_dims(scale[: x.shape[at]], [d for d in range(x.ndim) if d != at % x.ndim])
            for name, x in params.items()
            for at in [0 if name == "first" else -1]
        }
        weights, before = jax.device_get((params, jaxsparse.get_masks(opt_state)))
        params, opt_state = step(params, opt_state, grads, fractions)
        jaxsparse.check(opt_state, params)
        for name, mask in jax.device_get(jaxsparse.get_masks(opt_state)).items():
            at = LAYOUTS[name]
            seen = [layers_of(x, at) for x in (weights[name], grads[name], before[name], mask)]
            for *old, new, n in zip(*seen, budgets[name].reshape(-1), strict=True):
                if count:
                    expected = updated(*old, n, fractions[count], 0.75, name == "first")
                    np.testing.assert_array_equal(new, expected, err_msg=f"{name} on step {count}")
                size, was = new.sum(0), old[2].sum(0)
                assert len(set(size[size > 0].tolist())) == 1
                assert n - size.sum() < (size > 0).sum()
                ablated += ((size == 0) & (was > 0)).sum()
                returned += ((size > 0) & (was == 0)).sum()
                assert name != "first" or size.all()
    assert ablated > 5
    assert returned > 0


def test_a_start_has_every_output_with_the_same_number_of_random_inputs():
    params = {"conv": jnp.ones((3, 3, 2, 8)), "dense": jnp.ones((16, 24))}
    state = jaxsparse.srigl(0.75, stop_at=9, min_salient=None).init(params)
    masks, budgets = jax.device_get((jaxsparse.get_masks(state), state.own.budgets))
    assert sum(budgets.values()) == (144 + 384) // 4
    for name, mask in masks.items():
        kept = mask.reshape(-1, mask.shape[-1]).sum(0)
        assert (kept == budgets[name].item() // kept.size).all()
    assert len({row.tobytes() for row in masks["dense"].T}) > 12  # they differ from output to output


def test_masks_change_on_update_steps_alone_and_a_broken_fan_in_is_a_problem():
    params = {"kernel": make_params()["dense"]["kernel"]}
    tx = jaxsparse.chain(
        optax.sgd(0.1), jaxsparse.srigl(0.75, 2, stop_at=5, accumulate=2, never_ablate="kernel", allocation="uniform")
    )
    opt_state, step = tx.init(params), make_step(tx)
    params = jaxsparse.sparsify(opt_state, params)
    for count in range(7):
        before = jaxsparse.get_masks(opt_state)
        params, opt_state = step(params, opt_state, count)
        after = jaxsparse.get_masks(opt_state)
        assert bool((before["kernel"] != after["kernel"]).any()) == (count in (2, 4))
    state = opt_state[1]
    kept = np.array(state.masks["kernel"])
    size = kept.sum(0)[0]
    kept[np.flatnonzero(kept[:, 0])[0], 0], kept[np.flatnonzero(~kept[:, 1])[0], 1] = False, True
    broken = state._replace(masks={"kernel": jnp.asarray(kept)})
    (problem,) = broken.problems(None)
    assert problem.startswith(f"srigl: outputs of kernel keep {size - 1} to {size + 1} inputs, but all of a")
    # Also of replicas, which have one axis more in front.
    many = jax.tree.map(lambda *x: np.stack(x), broken, state)
    assert many.problems(None) == [problem]


def test_the_last_layer_is_given_or_a_guess_that_is_told():
    params = {name: jnp.ones(shape) for name, shape in (("fc1", (20, 12)), ("fc2", (12, 10)), ("out", (10, 4)))}
    cases = (
        (params, {}, "takes out for it, because no other layer has as many inputs as it has outputs"),
        ({"a": jnp.ones((8, 6)), "b": jnp.ones((8, 5))}, {}, "takes b for it, because it is the last by name"),
        (params, {"never_ablate": "out"}, None),
        (params, {"never_ablate": ()}, None),
        (params, {"min_salient": None}, None),
    )
    for tree, options, words in cases:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            jax.eval_shape(jaxsparse.srigl(0.5, stop_at=900, **options).init, tree)
        assert [str(w.message) for w in caught if "never ablates" in str(w.message)] == [
            str(w.message) for w in caught if words and words in str(w.message)
        ]
        assert len(caught) == (words is not None), [str(w.message) for w in caught]
    layouts = dict.fromkeys(params, Layout(0, 1))
    for patterns, found in ((None, {"out"}), ("fc*", {"fc1", "fc2"}), ((), set()), (["fc1", "out"], {"fc1", "out"})):
        assert fan_in.last_layers(params, layouts, patterns, partial=False) == found


def test_bad_options_are_named():
    good = {"sparsity": 0.75, "stop_at": 9}
    for options, words in (
        ({"stop_at": None}, "srigl needs stop_at"),
        ({"min_salient": -0.1}, "min_salient must be at least 0, got -0.1"),
        ({"min_salient": 0}, r"min_salient must be a fraction in \(0, 1\), a whole number of weights from 1, or None"),
        ({"min_salient": 1.5}, "min_salient must be a fraction .* got 1.5"),
        ({"sparsity": 1.0}, r"sparsity is the fraction of zeros and must be in \[0, 1\), got 1.0"),
        ({"drop_fraction": 1.5}, "drop_fraction must be at least 0 and at most 1, got 1.5"),
        ({"accumulate": 101}, "accumulate must be at most update_every, 100, got 101"),
        ({"allocation": "erk"}, "allocation must be one of"),
    ):
        with pytest.raises(ValueError, match=words):
            jaxsparse.srigl(**good | options)
    params = {"fc": jnp.ones((20, 10)), "bias": jnp.ones(10)}
    uneven = {"fc": np.ones((20, 10), bool), "bias": True}
    uneven["fc"][0, 0] = False
    few = {"fc": np.zeros((20, 10), bool), "bias": True}
    few["fc"][0, 3:7] = True
    for options, words in (
        ({"sparsity": 0.96}, r"fc of shape \(20, 10\) would keep 8 weights for 10 outputs, so not one input for each"),
        ({"masks": uneven}, "masks: outputs of fc keep 19 to 20 inputs, but all of a layer keep equally many, or none"),
        ({"masks": few}, r"fc of shape \(20, 10\) would keep 4 weights for 10 outputs"),
        ({"prunable": ["fc", "bias"]}, r"srigl gives every output its inputs, but bias of shape \(10,\) has none"),
        ({"never_ablate": "fc9"}, "never_ablate: 'fc9' matches none of fc"),
        ({"layout": {"fc": Layout((), 1)}, "prunable": "fc"}, "but fc of shape"),
    ):
        link = jaxsparse.srigl(**good | {"never_ablate": ()} | options)
        with pytest.raises(ValueError, match=words):
            jax.eval_shape(link.init, params)
    del params["bias"]
    for options in ({}, {"accumulate": 2}):
        tx = optax.chain(
            optax.sgd(0.1), jaxsparse.srigl(**good, never_ablate=(), masks={"fc": np.ones((20, 10), bool)}, **options)
        )
        with pytest.raises(ValueError, match="srigl grows weights by their gradients and is handed none"):
            jax.eval_shape(tx.update, gradients(params), jax.eval_shape(tx.init, params), params)


@pytest.mark.slow
def test_numbers_may_be_injected():
    params = make_params()
    link = optax.inject_hyperparams(jaxsparse.srigl, static_args=("never_ablate",))(
        0.75, 2, stop_at=10, drop_fraction=0.5, min_salient=0.9, never_ablate=()
    )
    plain = jaxsparse.srigl(0.75, 2, stop_at=10, drop_fraction=0.5, min_salient=0.9, never_ablate=())
    ends = []
    for tx in (jaxsparse.chain(optax.sgd(0.1, momentum=0.9), srigl) for srigl in (link, plain)):
        trained, opt_state, step = params, tx.init(params), make_step(tx)
        for count in range(5):
            trained, opt_state = step(trained, opt_state, count)
        ends.append(trained)
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.slow
def test_layers_of_one_shape_are_what_they_are_alone():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {f"fc{i}": jax.random.normal(key, (16, 16)) for i, key in enumerate(keys)}
    masks = jaxsparse.get_masks(jaxsparse.srigl(0.75, stop_at=9, never_ablate=()).init(params))

    def train(names, last):
        tx = jaxsparse.chain(
            optax.sgd(0.1), jaxsparse.srigl(0.75, 1, stop_at=9, masks={n: masks[n] for n in names}, never_ablate=last)
        )
        part, step = {n: params[n] for n in names}, make_step(tx)
        opt_state = tx.init(part)
        part = jaxsparse.sparsify(opt_state, part)
        for count in range(4):
            part, opt_state = step(part, opt_state, count)
        return part

    together = train(list(params), "fc3")
    for name in params:
        alone = train([name], name if name == "fc3" else ())
        np.testing.assert_array_equal(together[name], alone[name])


@pytest.mark.slow
def test_ablated_outputs_can_be_cut_off_and_training_goes_on():
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"fc1": jax.random.normal(keys[0], (12, 10)), "fc2": jax.random.normal(keys[1], (10, 4))}
    masks = {"fc1": jnp.zeros((12, 10), bool).at[:4, :7].set(True), "fc2": jnp.zeros((10, 4), bool).at[4:9].set(True)}
    x = jax.random.normal(jax.random.key(1), (16, 12))

    def apply(params, x):
        return jnp.tanh(x @ params["fc1"]) @ params["fc2"]

    tx = jaxsparse.chain(
        optax.sgd(0.1, momentum=0.9), jaxsparse.srigl(0, 3, masks=masks, stop_at=50, never_ablate="fc2", accumulate=2)
    )

    def train(apply, params, state, number):
        @jax.jit
        def step(params, state):
            grads = jax.grad(lambda p: (apply(p, x) ** 2).mean())(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(number):
            params, state = step(params, state)
        return params, state

    state = tx.init(params)
    params, state = train(apply, jaxsparse.sparsify(state, params), state, 3)
    groups = jaxsparse.trace.channel_groups(apply, params, x)
    closed = jaxsparse.trace.closed_channels(groups, jaxsparse.get_masks(state))
    small = jaxsparse.trace.slim(apply, params, closed, x, groups=groups, opt_state=state)
    assert small.params["fc1"].shape == (12, 3)  # of 7 outputs that are left, fc2 reads 3
    own = small.opt_state[1].own
    assert own.outputs["fc1"].shape == (1, 3)
    assert own.budgets["fc1"].shape == (1, 1)
    assert int(own.budgets["fc1"].sum()) == 3 * 4  # of 28, without those of the outputs that are gone
    left = jaxsparse.get_masks(small.opt_state)
    assert int(own.budgets["fc2"].sum()) == int(left["fc2"].sum())
    end, state = train(small.apply, small.params, small.opt_state, 4)
    jaxsparse.check(state, end)
    masks = jaxsparse.get_masks(state)
    assert masks["fc1"].sum(0).tolist() == [4, 4, 4]
    assert masks["fc2"].sum(0).tolist() == [left["fc2"].sum() // 4] * 4
