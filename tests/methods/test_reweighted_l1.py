import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import jax_utils
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Lasso

import jaxsparse
from jaxsparse import structures
from jaxsparse.transforms.rounding import rounded
from tests.problems import jit_once, make_params, make_step, signature

GOLDEN = sorted((pathlib.Path(__file__).parent.parent / "golden").glob("xrda_*.npz"))
LEAVES = ("conv", "dense", "bias")


# --- Against the authors' code ----------------------------------------------------------------------------------------


def golden(file):
    """The transformation, and what the authors' code was given and returned."""
    data = np.load(file)
    meta = json.loads(str(data["meta"]))
    step_size, averaging = (jnp.asarray(data[name], jnp.float32) for name in ("step_size", "averaging"))
    tx = jaxsparse.rda(
        lambda count: step_size[count],
        l1=meta["lam"],
        averaging=lambda count: averaging[count],
        momentum_time=meta["momentum_time_scale"],
        weight_time=meta["weight_time_scale"],
        weight_decay=meta["weight_decay"],
        max_factor=meta["maximum_factor"],
        structure="weight" if meta["mode"] == "normal" else meta["mode"],
    )
    init, grads, params = ({name: data[f"{part}/{name}"] for name in LEAVES} for part in ("init", "grads", "params"))
    return tx, jax.tree.map(jnp.asarray, init), grads, params


def assert_same(ours, theirs, threshold_distance):
    for name in LEAVES:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5, rtol=0)
        differ = (np.asarray(ours[name]) == 0) != (theirs[name] == 0)
        if name in threshold_distance:
            differ &= np.asarray(threshold_distance[name]) > 1e-6
        assert not differ.any(), name


def distance_to_threshold(state):
    return jax.tree.map(lambda y, t: jnp.abs(jnp.abs(y) - t), *({n: getattr(state, f)[n] for n in ("conv", "dense")}
                        for f in ("pre_prox", "threshold")))  # fmt: skip


@pytest.mark.parametrize("file", GOLDEN, ids=lambda f: f.stem)
def test_golden_trajectories(file):
    tx, params, grads, expected = golden(file)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    steps = len(grads["conv"])
    assert steps == 120
    for i in range(steps):
        params, opt_state = step(params, opt_state, {name: grads[name][i] for name in LEAVES})
        assert_same(params, {name: expected[name][i] for name in LEAVES}, distance_to_threshold(opt_state[-1]))
        jaxsparse.check(opt_state, params)
    assert float(jaxsparse.density(jaxsparse.get_masks(opt_state))) < 0.95


@pytest.mark.slow
@pytest.mark.parametrize("file", GOLDEN, ids=lambda f: f.stem)
def test_golden_trajectories_on_eight_devices(file):
    tx, params, grads, expected = golden(file)

    def step(carry, grads):
        params, opt_state = carry
        # Each device has its own gradient; their mean is the one that the authors' code was given.
        own = jax.tree.map(lambda g: g * 2 * (jax.lax.axis_index("d") + 1.0) / 9, grads)
        updates, opt_state = tx.update(jax.lax.pmean(own, "d"), opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), (params, distance_to_threshold(opt_state[-1]))

    replicas = jax_utils.replicate((params, tx.init(params)))
    trained = jax.pmap(lambda carry, grads: jax.lax.scan(step, carry, grads)[1], axis_name="d", in_axes=(0, None))
    history, distances = jax.device_get(trained(replicas, grads))
    for device in (0, 7):
        for i in range(120):
            assert_same(*(jax.tree.map(lambda x: x[i], tree) for tree in (  # noqa: B023
                jax.tree.map(lambda x: x[device], history), expected, jax.tree.map(lambda x: x[device], distances)  # noqa: B023
            )))  # fmt: skip


# --- State in bfloat16 ------------------------------------------------------------------------------------------------


def trained(state_dtype, steps=300):
    """Least squares with three weights that matter, of which the others are shrunk; the params and the state."""
    inputs = jax.random.normal(jax.random.key(0), (200, 40))
    target = inputs[:, :3] @ jnp.array([1.0, -2.0, 0.5])
    tx = jaxsparse.rda(0.05, l1=3e-4, momentum_time=1.0, state_dtype=state_dtype)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: jnp.mean((inputs @ p["kernel"][:, 0] - target) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), jnp.mean(state[-1].magnitude["kernel"].astype(jnp.float32))

    params = {"kernel": 0.3 * jax.random.normal(jax.random.key(1), (40, 1))}
    (params, state), magnitudes = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps))(params)
    return params["kernel"], state[-1], magnitudes


def test_bfloat16_state_finds_the_same_weights_in_half_the_bytes():
    exact, _, of_exact = trained(None)
    ours, state, magnitudes = trained("bfloat16")
    assert state.threshold["kernel"].dtype == state.magnitude["kernel"].dtype == jnp.bfloat16
    assert state.pre_prox["kernel"].dtype == jnp.float32
    assert ((exact != 0) == (ours != 0)).all()
    assert 3 <= (exact != 0).sum() < 40
    np.testing.assert_allclose(ours, exact, atol=3e-3)
    np.testing.assert_allclose(magnitudes, of_exact, rtol=0.02)  # to the nearest it would stand still, 10% off
    # Masks are of the thresholds that are stored.
    np.testing.assert_array_equal(state.sparse_masks()["kernel"], ours != 0)
    np.testing.assert_array_equal(trained("bfloat16")[0], ours)


def test_other_dtypes_of_the_state_are_refused():
    with pytest.raises(ValueError, match="state_dtype is None, float32 or bfloat16, got float16"):
        jaxsparse.rda(1.0, l1=0.0, state_dtype=jnp.float16)
    assert jaxsparse.reweighted_l1(1.0, l1=0.0, state_dtype="float32").init({"w": jnp.ones((2, 2))})


def test_rounding_at_random_is_right_in_the_mean():
    x = jnp.linspace(-3.0, 3.0, 100_000)
    one, other = rounded([x, jnp.abs(x)], jnp.bfloat16, jnp.int32(7), 3)
    for wide, half in ((x, one), (jnp.abs(x), other)):
        off = half.astype(jnp.float32) - wide
        spacing = jnp.abs(wide) / 128
        assert (jnp.abs(off) <= spacing + 1e-30).all()
        assert abs(float(jnp.mean(off / jnp.maximum(spacing, 1e-6)))) < 0.005
    # Another step and another leaf draw anew.
    again = [rounded([x], jnp.bfloat16, jnp.int32(step), leaf)[0] for step, leaf in ((7, 3), (8, 3), (7, 4))]
    assert (again[0] == one).all()
    assert (again[1] != one).mean() > 0.2
    assert (again[2] != one).mean() > 0.2
    kept = rounded([jnp.array([jnp.inf, -jnp.inf, jnp.nan, 0.0, 1.0])], jnp.bfloat16, jnp.int32(0), 0)[0]
    np.testing.assert_array_equal(kept.astype(jnp.float32), [jnp.inf, -jnp.inf, jnp.nan, 0.0, 1.0])


# --- What the formulas say --------------------------------------------------------------------------------------------


def test_under_the_cosine_pair_the_threshold_stays_at_l1_times_the_first_step_size():
    s0, steps, factor = 0.7, 2000, 500.0
    step_size, averaging = jaxsparse.rda_cosine(s0, steps)
    params = {"w": jnp.array([[0.0, 0.01, -0.5, 2.0]])}
    l1 = 1e-12  # so little that the weights, and with them w, stay
    tx = jaxsparse.reweighted_l1(step_size, l1=l1, averaging=averaging, max_factor=factor)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update({"w": jnp.zeros((1, 4))}, state, params)
        return (optax.apply_updates(params, updates), state), state.threshold["w"]

    _, thresholds = jax.lax.scan(step, (params, tx.init(params)), None, steps)
    w = factor / (1 + (factor - 1) * np.abs(params["w"]) / 2.0)
    np.testing.assert_allclose(np.asarray(thresholds) / (l1 * s0), np.broadcast_to(w, thresholds.shape), rtol=1e-4)


def test_the_integral_of_the_weight_is_the_log_penalty():
    x = jnp.linspace(0.0, 2.0, 200_001)[None, :]
    tx = jaxsparse.reweighted_l1(0.5, l1=1e-9, max_factor=500.0)
    _, state = tx.update({"w": jnp.zeros_like(x)}, tx.init({"w": x}), {"w": x})
    w = np.asarray(state.threshold["w"], np.float64)[0] / (0.5 * 1e-9)
    m, factor = 2.0, 500.0
    expected = m * factor / (factor - 1) * np.log(factor)
    assert expected == pytest.approx(12.454124, abs=1e-6)
    assert np.trapezoid(w, np.asarray(x, np.float64)[0]) == pytest.approx(expected, rel=1e-4)


def test_what_is_not_regularised_is_sgd_with_an_averaged_gradient_bit_by_bit():
    step_size, averaging = jaxsparse.rda_cosine(0.5, 40)
    options = {"averaging": averaging, "weight_decay": 0.01}
    params = {"kernel": jnp.ones((3, 4)), "bias": jnp.arange(4.0), "scale": jnp.float32(2.0)}
    regularised = jaxsparse.rda(step_size, l1=1e-3, **options)
    plain = optax.chain(optax.add_decayed_weights(0.01), jaxsparse.velocity(step_size))
    step, plain_step = make_step(regularised), make_step(plain)
    states, ours, theirs = [regularised.init(params), plain.init(params)], params, params
    for count in range(40):
        ours, states[0] = step(ours, states[0], count)
        theirs, states[1] = plain_step(theirs, states[1], count)
        for name in ("bias", "scale"):
            np.testing.assert_array_equal(ours[name], theirs[name])
    assert (np.asarray(ours["kernel"]) != np.asarray(theirs["kernel"])).any()


@pytest.mark.slow
def test_velocity_at_a_constant_step_size_is_momentum():
    decay = float(np.exp(-1 / 9.5))
    params = make_params()
    ours, theirs = jaxsparse.velocity(1.0, 9.5), optax.sgd(1 - decay, momentum=decay)
    states, trained = [ours.init(params), theirs.init(params)], [params, params]
    for count in range(10):
        for i, tx in enumerate((ours, theirs)):
            trained[i], states[i] = make_step(tx)(trained[i], states[i], count)
    chex.assert_trees_all_close(*trained, rtol=1e-4, atol=1e-5)


def test_averaging_zero_is_proximal_gradient_descent():
    params = {"w": jnp.array([[1.0, -0.2, 0.05]])}
    tx = optax.chain(optax.sgd(0.1), jaxsparse.reweighted_l1(0.1, l1=1.0, max_factor=1.0))
    opt_state, x = tx.init(params), params
    expected = np.asarray(params["w"])
    for g in ([[1.0, 1.0, 1.0]], [[-2.0, 0.5, 0.0]], [[0.0, 3.0, -3.0]]):
        updates, opt_state = tx.update({"w": jnp.array(g)}, opt_state, x)
        x = optax.apply_updates(x, updates)
        moved = expected - 0.1 * np.array(g)
        expected = np.sign(moved) * np.maximum(np.abs(moved) - 0.1, 0)
        np.testing.assert_allclose(x["w"], expected, atol=1e-6)


@pytest.mark.parametrize("averaging", [0.0, 0.5, 1.0], ids=["proximal", "between", "dual"])
def test_a_lasso_problem_is_solved_as_scikit_learn_solves_it(averaging):
    random = np.random.RandomState(0)
    features, alpha = random.randn(100, 30), 0.1
    targets = features[:, :5] @ np.array([2.0, -1.0, 0.5, 1.0, -3.0]) + 0.1 * random.randn(100)
    expected = Lasso(alpha=alpha, fit_intercept=False, tol=1e-10, max_iter=100_000).fit(features, targets).coef_
    a, b = jnp.asarray(features, jnp.float32), jnp.asarray(targets, jnp.float32)[:, None]

    def smooth(x):
        return jnp.sum((a @ x["w"] - b) ** 2) / (2 * len(b))

    rate = 0.1
    tx = optax.chain(optax.sgd(rate), jaxsparse.reweighted_l1(rate, l1=alpha, averaging=averaging, max_factor=1.0))

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(jax.grad(smooth)(x), state, x)
        return (optax.apply_updates(x, updates), state), None

    start = {"w": jnp.zeros((30, 1))}
    (x, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, 5000))((start, tx.init(start)))
    found = np.asarray(x["w"], np.float64)[:, 0]

    def objective(w):
        return np.sum((features @ w - targets) ** 2) / 200 + alpha * np.abs(w).sum()

    np.testing.assert_array_equal(found != 0, expected != 0)
    assert 0 < (expected != 0).sum() < 30
    assert objective(found) == pytest.approx(objective(expected), abs=1e-4)


def test_a_layer_of_zeros_is_left_alone_and_comes_back():
    params = {"w": jnp.zeros((2, 3))}
    tx = jaxsparse.rda(1.0, l1=1e-3)
    state = tx.init(params)
    updates, state = tx.update({"w": jnp.zeros((2, 3))}, state, params)
    np.testing.assert_array_equal(updates["w"], 0)
    updates, state = tx.update({"w": jnp.ones((2, 3))}, state, params)
    assert (np.asarray(updates["w"]) < 0).all()
    jaxsparse.check(state, optax.apply_updates(params, updates))


@pytest.mark.slow
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(1e-5, 0.1), st.floats(1, 1000))
@settings(max_examples=30)
def test_the_masks_are_where_the_weights_are_not_zero(seed, averaging, l1, factor):
    keys = jax.random.split(jax.random.key(seed), 6)
    params = {"conv": jax.random.normal(keys[0], (3, 3, 2, 4)), "fc": jax.random.normal(keys[1], (7, 5))}
    tx = jaxsparse.reweighted_l1(1.0, l1=l1, averaging=averaging, max_factor=factor)
    state = tx.init(params)
    for key in keys[2:]:
        proposed = jax.tree.map(lambda p, key=key: 0.1 * jax.random.normal(key, p.shape), params)
        updates, state = tx.update(proposed, state, params)
        params = optax.apply_updates(params, updates)
        jaxsparse.check(state, params)
        for name, mask in jaxsparse.get_masks(state).items():
            y, threshold = state.pre_prox[name], state.threshold[name]
            np.testing.assert_allclose(params[name], jnp.sign(y) * jnp.maximum(jnp.abs(y) - threshold, 0), atol=1e-6)
            # A mask may be true for a weight too close to its threshold for the update to tell it from zero.
            assert not np.asarray((params[name] != 0) & ~mask).any()
            assert (np.asarray((params[name] == 0) & mask) <= np.asarray(jnp.abs(y) - threshold < 1e-6)).all()


# --- Structures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("structure", "shape"),
    [("kernel", (1, 1, 4, 6)), ("channel", (1, 1, 1, 6)), (structures.kernel(), (1, 1, 4, 6)),
     (structures.channel(score="sum"), (1, 1, 1, 6))],
)  # fmt: skip
def test_groups_share_their_threshold(structure, shape):
    params = {"conv": jax.random.normal(jax.random.key(0), (3, 3, 4, 6)), "fc": jnp.ones((6, 5)), "bias": jnp.ones(5)}
    tx = jaxsparse.reweighted_l1(1.0, l1=1e-4, structure=structure)
    state = tx.init(params)
    assert state.threshold["conv"].shape == state.magnitude["conv"].shape == shape
    assert state.threshold["fc"].shape == (6, 5)
    assert isinstance(state.threshold["bias"], optax.MaskedNode)
    _, new = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    assert signature(new) == signature(state)
    # In numbers: the authors multiply by the square root of the group's size.
    axes = (0, 1) if shape[2] > 1 else (0, 1, 2)
    r = np.abs(np.asarray(params["conv"])).mean(axes, keepdims=True)
    w = 500 / (1 + 499 * r / r.max()) * np.sqrt(9 if shape[2] > 1 else 36)
    np.testing.assert_allclose(new.threshold["conv"], 1e-4 * w, rtol=1e-5)
    np.testing.assert_allclose(new.threshold["fc"], 1e-4, rtol=1e-5)


def test_channels_die_and_are_named():
    random = jax.random.normal(jax.random.key(1), (3, 3, 4, 6))
    size = jnp.array([1, 1e-3, 1, 1, 1e-3, 1.0]).reshape(1, 1, 1, 6)
    params = {"conv": random * size, "fc": jnp.ones((6, 5)), "bias": jnp.ones(5)}
    tx = jaxsparse.rda(1.0, l1=2e-5, structure={"conv": "channel"})
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(3):
        updates, state = step(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    closed = jaxsparse.closed_channels(params)
    assert {name: channels.tolist() for name, channels in closed.items()} == {"conv": [1, 4], "fc": []}
    assert float(jaxsparse.get_masks(state)["conv"].mean()) == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"attention/kernel": "kernel"}, r"structure 'kernel' does not fit attention/kernel of shape \(16, 2, 8\)"),
        ({"dense/kernel": "kernel"}, r"structure 'kernel' does not fit dense/kernel of shape \(16, 24\)"),
        ({"dense/kernle": "kernel"}, "structure: 'dense/kernle' matches none of attention/kernel, conv/kernel, "),
        ("filter", r"structure must be one of \['weight', 'kernel', 'channel'\], got 'filter'"),
        (jaxsparse.block(2, 2), r"must be one of \['weight', 'kernel', 'channel'\], got block\(2, 2\)"),
        ({"dense/kernel": jaxsparse.n_of_m(2, 4)}, r"got n_of_m\(2, 4\)"),
    ],
)
def test_a_structure_that_does_not_fit_is_refused(structure, message):
    with pytest.raises(ValueError, match=message):
        jaxsparse.rda(1.0, l1=1e-6, structure=structure).init(make_params())


# --- With others, and bad input ---------------------------------------------------------------------------------------


def test_after_adam_the_small_weights_go():
    target = jnp.where(jax.random.uniform(jax.random.key(0), (20, 20)) < 0.2, 1.0, 0.0)
    params = {"w": jax.random.normal(jax.random.key(1), (20, 20)) * 0.1}
    tx = optax.chain(optax.adam(0.01), jaxsparse.reweighted_l1(0.01, l1=1e-3))
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update({"w": params["w"] - target}, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(500):
        params, state = step(params, state)
    np.testing.assert_array_equal(np.asarray(params["w"] != 0), np.asarray(target != 0))


def test_hyperparams_can_be_injected_and_schedules_given():
    params = make_params()
    injected = optax.inject_hyperparams(jaxsparse.rda)(
        step_size=jaxsparse.rda_cosine(1.0, 10).step_size,
        l1=optax.linear_schedule(0.0, 1e-3, 5),
        averaging=jaxsparse.rda_cosine(1.0, 10).averaging,
        weight_decay=1e-4,
    )
    plain = jaxsparse.rda(
        jaxsparse.rda_cosine(1.0, 10).step_size,
        l1=optax.linear_schedule(0.0, 1e-3, 5),
        averaging=jaxsparse.rda_cosine(1.0, 10).averaging,
        weight_decay=1e-4,
    )
    trained = []
    for tx in (injected, plain):
        p, state, step = params, tx.init(params), jit_once(make_step(tx))
        for count in range(8):
            p, state = step(p, state, count)
        jaxsparse.check(state, p)
        trained.append(p)
    chex.assert_trees_all_close(*trained, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l1": -1e-6}, "l1 must be at least 0, got -1e-06"),
        ({"l1": float("nan")}, "l1 must be at least 0, got nan"),
        ({"averaging": 1.5}, "averaging must be at least 0 and at most 1, got 1.5"),
        ({"averaging": lambda step: step - 0.1}, "averaging of step 0 must be at least 0 and at most 1, got -0.1"),
        ({"step_size": lambda step: jnp.float32(jnp.nan)}, "step_size of step 0 must be at least 0, got nan"),
        ({"step_size": -1.0}, "step_size must be at least 0, got -1.0"),
        ({"weight_time": 0.0}, "weight_time must be above 0, got 0.0"),
        ({"momentum_time": -1.0}, "momentum_time must be above 0, got -1.0"),
        ({"max_factor": 0.5}, "max_factor must be at least 1, got 0.5"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jaxsparse.rda(**{"step_size": 1.0, "l1": 1e-6, **options})


def test_check_finds_a_step_size_that_becomes_nan():
    params = {"fc": {"kernel": jnp.ones((2, 3))}}
    tx = jaxsparse.rda(lambda step: jnp.where(step == 2, jnp.nan, 1.0), l1=1e-6)
    state = tx.init(params)
    for count in range(3):
        jaxsparse.check(state, params)
        params, state = make_step(tx)(params, state, count)
    with pytest.raises(jaxsparse.SparsityError, match="fc/kernel has weights that are not finite.*step size"):
        jaxsparse.check(state, params)


def test_an_empty_leaf_is_nothing():
    params = {"w": jnp.ones((4, 5)), "empty": jnp.zeros((0, 5))}
    tx = jaxsparse.rda(0.1, l1=1e-3)
    updates, opt_state = tx.update(params, tx.init(params), params)
    assert updates["empty"].shape == (0, 5)
    assert float(jaxsparse.density(jaxsparse.get_masks(opt_state, params))) == 1
    jaxsparse.check(opt_state, optax.apply_updates(params, updates))


def test_channels_of_an_attention_kernel_go_by_their_outputs():
    params = {"attention/query/kernel": jnp.ones((16, 2, 8)).at[:, 1, 3].set(1e-4)}
    tx = optax.chain(optax.sgd(1.0), jaxsparse.reweighted_l1(1.0, l1=1e-3, structure={"*": "channel"}))
    updates, opt_state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert opt_state[1].threshold["attention/query/kernel"].shape == (1, 2, 8)
    kept = jaxsparse.get_masks(opt_state, params)["attention/query/kernel"]
    assert np.argwhere(~np.asarray(kept).any(0)).tolist() == [[1, 3]]
    assert int(kept.sum()) == 16 * 15
    jaxsparse.check(opt_state, optax.apply_updates(params, updates))


def test_a_gradient_of_nan_shows_in_the_weights():
    params = {"kernel": jnp.ones((2, 2))}
    tx = optax.chain(optax.sgd(0.1), jaxsparse.reweighted_l1(0.1, l1=1e-4))
    updates, opt_state = tx.update({"kernel": jnp.full((2, 2), jnp.nan)}, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    assert bool(jnp.isnan(params["kernel"]).all())
    with pytest.raises(jaxsparse.SparsityError, match="reweighted_l1: kernel has weights that are not finite"):
        jaxsparse.check(opt_state, params)


def test_every_layer_of_a_stack_has_its_own_maximum():
    layers = jnp.arange(1.0, 13.0).reshape(2, 2, 3) * jnp.array([1.0, 0.01]).reshape(2, 1, 1)
    apart, together = {"a": layers[0], "b": layers[1]}, {"layers": {"kernel": layers}}
    layout = {"layers/kernel": jaxsparse.Layout(1, 2, stack=0)}

    def thresholds(params, **options):
        tx = jaxsparse.reweighted_l1(0.1, l1=1e-3, **options)
        return tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)[1].threshold

    found, expected = thresholds(together, layout=layout), thresholds(apart)
    np.testing.assert_array_equal(found["layers"]["kernel"], jnp.stack([expected["a"], expected["b"]]))


def test_mini_steps_go_around_the_whole_chain():
    params = {"w": jnp.ones((2, 2))}
    inside = jaxsparse.chain(optax.MultiSteps(optax.sgd(0.1), 4), jaxsparse.reweighted_l1(0.1, l1=1e-3))
    with pytest.raises(ValueError, match=r"multiplies the penalty: put optax\.MultiSteps around the whole chain"):
        inside.init(params)
    around = optax.MultiSteps(jaxsparse.chain(optax.sgd(0.1), jaxsparse.reweighted_l1(0.1, l1=1e-2)), 4)
    opt_state, once = around.init(params), params
    for _ in range(4):
        updates, opt_state = around.update(jax.tree.map(jnp.zeros_like, params), opt_state, once)
        once = optax.apply_updates(once, updates)
    np.testing.assert_allclose(once["w"], 1 - 1e-3, rtol=1e-6)


def test_what_is_no_schedule_is_an_error():
    pair = jaxsparse.rda_cosine(1.0, 100)
    with pytest.raises(ValueError, match="step_size must be a number or a schedule, .* has step_size and averaging"):
        jaxsparse.reweighted_l1(pair, l1=1e-3)
    with pytest.raises(ValueError, match="step_size must be a number or a schedule, got RDASchedules"):
        jaxsparse.velocity(pair)
    with pytest.raises(ValueError, match="l1 must be a number or a schedule, got NoneType"):
        jaxsparse.reweighted_l1(1.0, l1=None)


def test_a_leaf_without_a_gradient_stays():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    tx = jaxsparse.rda(1.0, l1=0.0)
    updates, _ = tx.update({"a": jnp.ones((2, 2)), "b": None}, tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    assert float(moved["a"][0, 0]) < 1
    np.testing.assert_array_equal(moved["b"], params["b"])
