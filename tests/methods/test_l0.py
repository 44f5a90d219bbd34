import itertools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsparse
from jaxsparse import Group, Penalty
from jaxsparse.gates import EPSILON
from jaxsparse.groups import entries
from tests.problems import slow_except

GOLDEN = np.load(pathlib.Path(__file__).parent.parent / "golden" / "hard_concrete.npz")


@pytest.fixture(autouse=True)
def as_users_compile():
    """Optimised, unlike the other tests: rounding is part of what is compared with the authors' numbers."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def test_the_gates_are_those_of_the_authors():
    log_alpha, uniform = jnp.asarray(GOLDEN["log_alpha"]), jnp.asarray(GOLDEN["uniform"])
    gates = jaxsparse.hard_concrete(log_alpha, uniform)
    np.testing.assert_allclose(gates, GOLDEN["gate"], atol=1e-6)
    slopes = jax.vmap(jax.grad(jaxsparse.hard_concrete))(log_alpha, uniform)
    np.testing.assert_allclose(slopes, GOLDEN["dgate_dlog_alpha"], atol=1e-6)
    np.testing.assert_allclose(jaxsparse.prob_open(log_alpha), GOLDEN["prob_open"], atol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(jax.grad(jaxsparse.prob_open))(log_alpha), GOLDEN["dprob_dlog_alpha"], atol=1e-6
    )
    np.testing.assert_allclose(jaxsparse.hard_concrete_mean(log_alpha), GOLDEN["test_gate"], atol=1e-6)
    assert 0 < int((np.asarray(gates) == 0).sum()) < gates.size  # the file has closed and open gates


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_generator_is_that_of_the_authors(direction):
    generator = [{name: GOLDEN[f"{direction}/{name}_{i}"] for name in ("kernel", "bias")} for i in range(4)]
    for i, log_alpha in enumerate(jaxsparse.dependent_logits(generator, direction)):
        np.testing.assert_allclose(log_alpha, GOLDEN[f"{direction}/log_alpha_layer_{i}"], atol=1e-5)


def test_the_probability_to_be_open_is_that_of_the_samples():
    uniform = jax.random.uniform(jax.random.key(0), (200_000,), minval=1e-6, maxval=1 - 1e-6)
    for log_alpha in (-2.0, 0.3, 1.5):
        share = float(jnp.mean(jaxsparse.hard_concrete(jnp.float32(log_alpha), uniform) > 0))
        assert abs(share - float(jaxsparse.prob_open(log_alpha))) < 4 * (0.25 / uniform.size) ** 0.5


@settings(max_examples=30)
@given(st.floats(-8, 8), st.floats(-8, 8), st.floats(1e-5, 1 - 1e-5))
def test_gates_grow_with_log_alpha_and_stay_between_0_and_1(a, b, uniform):
    low, high = sorted((a, b))
    for function in (
        lambda la: jaxsparse.hard_concrete(la, uniform),
        jaxsparse.hard_concrete_mean,
        jaxsparse.prob_open,
    ):
        smaller, larger = float(function(low)), float(function(high))
        assert 0 <= smaller <= larger <= 1


class ConvNet(nn.Module):
    """A convolution behind which is batch normalisation, one without, and a dense layer behind a flattening."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), name="conv1")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, name="bn1")(x))
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="conv2")(x))
        return nn.Dense(3, name="fc")(x.reshape(x.shape[0], -1))


GROUPS = (
    Group(
        "conv1",
        {"bn1/scale": 0, "bn1/bias": 0},
        {"conv1/kernel": -1, "conv1/bias": 0, "bn1/scale": 0, "bn1/bias": 0, "conv2/kernel": 2},
    ),
    Group("conv2", {"conv2/kernel": 3, "conv2/bias": 0}, {"conv2/kernel": -1, "conv2/bias": 0, "fc/kernel": 0}),
    Group("inputs", {"fc/kernel": 0}, {"fc/kernel": 0}),
)
IMAGES = jax.random.normal(jax.random.key(1), (16, 8, 8, 2))
LABELS = jnp.arange(16) % 3


@pytest.fixture(scope="module")
def problem():
    variables = ConvNet().init(jax.random.key(0), IMAGES)

    def loss(params, images=IMAGES, labels=LABELS):
        logits, _ = ConvNet().apply({**variables, "params": params}, images, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    # Biases and scales that are not their initial constants.
    noise = jax.random.normal(jax.random.key(2), (1000,))
    params = jax.tree.map(lambda p: p + 0.1 * jnp.resize(noise, p.shape), variables["params"])
    return params, loss


def gated(params, gates):
    """What the wrapper hands out, written out: each leaf times its gates."""
    conv1, conv2, inputs = gates
    return {
        "conv1": params["conv1"],
        "bn1": {name: leaf * conv1 for name, leaf in params["bn1"].items()},
        "conv2": {
            name: leaf * (conv2[None, None, None] if leaf.ndim > 1 else conv2) for name, leaf in params["conv2"].items()
        },
        "fc": {"kernel": params["fc"]["kernel"] * inputs[:, None], "bias": params["fc"]["bias"]},
    }


def train(tx, params, loss, steps):
    """The optimizer state and the params after so many steps."""
    step = stepper(tx, loss)
    opt_state = tx.init(params)
    for _ in range(steps):
        params, opt_state = step(params, opt_state)
    return opt_state, params


def stepper(tx, loss):
    @jax.jit
    def step(params, opt_state):
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def next_noise(opt_state):
    """The uniform numbers of which the next update makes its gates."""
    draw = jax.random.split(opt_state.key)[1]
    return jax.random.uniform(draw, (6 + 4 + 64,), minval=EPSILON, maxval=1 - EPSILON)


def behind(params, opt_state):
    """The weights behind the gates, and the params that have none."""
    return jax.tree.map(lambda p, w: p if isinstance(w, optax.MaskedNode) else w, params, opt_state.weights)


PENALTIES = {
    "alone": Penalty([0.02, 0.01, 0.03], "alone", weight_decay=0.1, examples=2),
    "all": Penalty(0.01, "all"),
}


def explicit_penalty(name, params, logits):
    """The penalties of Louizos et al. and the expected number of params, by hand for this network."""
    p1, p2, p3 = (jax.nn.sigmoid(la - 2 / 3 * jnp.log(0.1 / 1.1)) for la in logits)
    if name == "alone":
        total = 0.02 * 3 * 3 * 2 * p1.sum() + 0.01 * 3 * 3 * 6 * p2.sum() + 0.03 * 3 * p3.sum()
        for p, kernel, axes in (
            (p1, params["conv1"]["kernel"], (0, 1, 2)),
            (p2, params["conv2"]["kernel"], (0, 1, 2)),
            (p3, params["fc"]["kernel"], (1,)),
        ):
            total += 0.05 * jnp.sum(p * jnp.sum(kernel**2, axes))
        return total / 2
    rows = jnp.sum(jnp.tile(p2, 16) * p3)
    return 0.01 * (p1.sum() * (18 + 3) + 9 * p1.sum() * p2.sum() + p2.sum() + 3 * rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_except(["alone"], PENALTIES))
def test_the_gradients_are_those_of_the_explicit_loss(problem, name):
    params, loss = problem
    # Optimizers that store the gradient itself, so that it can be read from their state.
    inner, gates = optax.chain(optax.trace(0.0), optax.scale(-0.05)), optax.chain(optax.trace(0.0), optax.scale(-0.5))
    tx = jaxsparse.l0(inner, GROUPS, penalty=PENALTIES[name], log_alpha=0.3, gate_optimizer=gates, key=3)
    step = stepper(tx, loss)
    opt_state = tx.init(params)
    uniform = jnp.split(next_noise(opt_state), [6, 10])
    params, opt_state = step(params, opt_state)
    for _ in range(2):

        def explicit(weights, logits, uniform=uniform):
            gates = [jaxsparse.hard_concrete(la, u) for la, u in zip(logits, uniform, strict=True)]
            return loss(gated(weights, gates)) + explicit_penalty(name, weights, logits)

        logits = [opt_state.log_alpha[group.name] for group in GROUPS]
        wanted = jax.grad(explicit, argnums=(0, 1))(behind(params, opt_state), logits)
        uniform = jnp.split(next_noise(opt_state), [6, 10])
        params, opt_state = step(params, opt_state)
        jaxsparse.check(opt_state, params)
        found = opt_state.inner_state[0].trace, opt_state.gate_state[0].trace
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert all(float(jnp.abs(g).max()) > 1e-3 for g in wanted[1])


@pytest.mark.slow
def test_penalty_of_neighbours_is_the_product_of_expected_widths(problem):
    params, _ = problem
    logits = [jnp.linspace(-1, 1, 6), jnp.linspace(0, 2, 4)]

    def explicit(logits):
        first, second = (jaxsparse.prob_open(la).sum() for la in logits)
        return 1e-3 * 9 * (2 * first + first * second)

    gradient = optax.chain(optax.trace(0.0), optax.scale(-1.0))  # stores it
    penalty = Penalty(1e-3, "neighbours")
    tx = jaxsparse.l0(optax.sgd(0.1), GROUPS[:2], penalty=penalty, gate_optimizer=gradient)
    opt_state = tx.init(params)
    opt_state = opt_state._replace(log_alpha=dict(zip(opt_state.log_alpha, logits, strict=True)))
    _, opt_state = tx.update(jax.tree.map(jnp.zeros_like, params), opt_state, params)
    for found, wanted in zip(jax.tree.leaves(opt_state.gate_state[0].trace), jax.grad(explicit)(logits), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    with pytest.raises(ValueError, match="group 'inputs' gates the inputs of fc/kernel: take counts='all'"):
        jaxsparse.dep_l0(optax.sgd(0.1), GROUPS, penalty=1e-3).init(params)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_dep_l0_trains_its_generator_through_the_gates(problem, direction):
    params, loss = problem
    tx = jaxsparse.dep_l0(
        optax.sgd(0.05),
        GROUPS,
        penalty=Penalty(0.01, "all"),
        direction=direction,
        gate_optimizer=optax.chain(optax.trace(0.0), optax.scale(-0.5)),
        input_width=5,
    )
    opt_state = tx.init(params)
    shapes = [layer["kernel"].shape for layer in opt_state.generator]
    assert shapes == ([(5, 6), (6, 4), (4, 64)] if direction == "forward" else [(5, 64), (64, 4), (4, 6)])
    step = stepper(tx, loss)
    params, opt_state = step(params, opt_state)
    uniform = jnp.split(next_noise(opt_state), [6, 10])
    params, opt_state = step(params, opt_state)
    weights = behind(params, opt_state)

    def explicit(generator):
        logits = jaxsparse.dependent_logits(generator, direction)
        gates = [jaxsparse.hard_concrete(la, u) for la, u in zip(logits, uniform, strict=True)]
        return loss(gated(weights, gates)) + explicit_penalty("all", weights, logits)

    wanted = jax.grad(explicit)(opt_state.generator)
    _, opt_state = step(params, opt_state)
    for a, b in zip(jax.tree.leaves(opt_state.gate_state[0].trace), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(wanted)) > 1e-3


@pytest.mark.slow
def test_with_all_gates_frozen_open_it_is_the_inner_optimizer(problem):
    params, loss = problem
    inner = optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.1, momentum=0.9, nesterov=True))
    tx = jaxsparse.l0(inner, GROUPS, penalty=1.0, log_alpha=3.0, freeze_gates_at=0)
    (_, params_of_gates), (_, plain) = train(tx, params, loss, 5), train(inner, params, loss, 5)
    for a, b in zip(jax.tree.leaves(params_of_gates), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_freezing_takes_the_test_gates_and_holds_them(problem):
    params, loss = problem
    tx = jaxsparse.l0(optax.sgd(0.05), GROUPS, penalty=0.1, gate_optimizer=optax.adam(0.1), freeze_gates_at=4, key=1)
    opt_state, logits, gates = tx.init(params), [], []
    step = stepper(tx, loss)
    for _ in range(8):
        params, opt_state = step(params, opt_state)
        logits.append(jaxsparse.get_log_alpha(opt_state))
        gates.append(opt_state.gates)
    moved = [bool((a["conv1"] != b["conv1"]).any()) for a, b in itertools.pairwise(logits)]
    assert moved == [True, True, True, False, False, False, False]
    np.testing.assert_allclose(gates[3]["bn1/scale"], jaxsparse.hard_concrete_mean(logits[3]["conv1"]), atol=1e-6)
    assert bool((gates[2]["bn1/scale"] != opt_state.test_gates["bn1/scale"]).any())
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(jaxsparse.eval_params(opt_state, params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_eval_params_are_the_weights_times_the_test_gates(problem):
    params, loss = problem
    tx = jaxsparse.l0(optax.sgd(0.05), GROUPS, penalty=5.0, gate_optimizer=optax.adam(0.3), key=1)
    opt_state, params = train(tx, params, loss, 12)
    log_alpha = jaxsparse.get_log_alpha(opt_state)
    evaluated = jaxsparse.eval_params(opt_state, params)
    weights, gates = opt_state.weights["conv2"]["kernel"], jaxsparse.hard_concrete_mean(log_alpha["conv2"])
    np.testing.assert_allclose(evaluated["conv2"]["kernel"], np.asarray(weights) * np.asarray(gates), atol=1e-7)
    np.testing.assert_array_equal(evaluated["conv1"]["kernel"], params["conv1"]["kernel"])
    assert not any(which.any() for which in jaxsparse.open_channels(opt_state).values())
    half = opt_state._replace(log_alpha={**log_alpha, "conv2": log_alpha["conv2"].at[0].set(0.0)})
    assert {name: int(which.sum()) for name, which in jaxsparse.open_channels(half).items()} == {
        name: int(name == "conv2") for name in log_alpha
    }
    assert int((evaluated["conv2"]["bias"] == 0).sum()) > 0  # the penalty closes some


@pytest.mark.slow
def test_clamped_log_alpha_stays_in_its_bounds(problem):
    params, loss = problem
    tx = jaxsparse.l0(optax.sgd(0.05), GROUPS, penalty=5.0, gate_optimizer=optax.sgd(10.0), clamp=(-1.0, 2.0), key=1)
    opt_state, _ = train(tx, params, loss, 3)
    for log_alpha in jaxsparse.get_log_alpha(opt_state).values():
        assert -1.0 <= float(log_alpha.min()) <= float(log_alpha.max()) <= 2.0
    assert float(min(la.min() for la in jaxsparse.get_log_alpha(opt_state).values())) == -1.0


@pytest.mark.slow
def test_each_device_samples_its_own_gates_and_the_average_is_unbiased(problem):
    params, loss = problem
    gates = optax.chain(optax.trace(0.0), optax.scale(0.0))
    inner = optax.chain(optax.trace(0.0), optax.scale(0.0))

    def estimates(axis_name, keys):
        """Gradients of weights and log_alpha at the same point, one for each key; (keys, ...)."""

        def one(key):
            tx = jaxsparse.l0(inner, GROUPS, penalty=0.01, gate_optimizer=gates, axis_name=axis_name, key=0)
            opt_state, p = tx.init(params), params
            opt_state = opt_state._replace(key=key)
            for _ in range(2):
                updates, opt_state = tx.update(jax.grad(loss)(p), opt_state, p)
                p = optax.apply_updates(p, updates)
            return opt_state.inner_state[0].trace["fc"]["kernel"], opt_state.gate_state[0].trace[1]

        return jax.lax.map(one, keys)

    many = jax.random.split(jax.random.key(7), 8 * 40).reshape(8, 40)
    alone = jax.pmap(lambda keys: estimates(None, keys))(many)
    # The devices have the same keys, as a replicated state has.
    same = jnp.stack([jax.random.split(jax.random.key(8), 40)] * 8)
    averaged = jax.pmap(lambda keys: estimates("devices", keys), axis_name="devices")(same)
    for one, mean in zip(alone, averaged, strict=True):
        np.testing.assert_array_equal(mean[0], mean[7])  # all devices agree
        one, mean = np.asarray(one).reshape(320, -1), np.asarray(mean[0]).reshape(40, -1)
        error = np.sqrt(one.var(0) / 320 + mean.var(0) / 40) + 1e-7
        far = np.abs(one.mean(0) - mean.mean(0)) / error
        assert far.max() < 5
        assert far.mean() < 1.2
        assert mean.var(0).sum() < one.var(0).sum() / 4  # eight samples instead of one


@pytest.mark.slow
def test_works_around_a_sparse_optimizer(problem):
    params, loss = problem
    prunable = jax.tree.map(lambda p: p.ndim == 4, params)
    inner = jaxsparse.chain(optax.sgd(0.05, momentum=0.9), jaxsparse.sparse_momentum(0.5, 2, prunable=prunable))
    tx = jaxsparse.l0(inner, GROUPS[:1], penalty=0.1, key=1)
    opt_state = tx.init(params)
    params = jaxsparse.sparsify(opt_state, params)
    step = stepper(tx, loss)
    for _ in range(4):
        params, opt_state = step(params, opt_state)
        jaxsparse.check(opt_state, params)
    masks = jaxsparse.get_masks(opt_state, params)
    assert float(masks["conv1"]["kernel"].mean()) < 1
    assert masks["bn1"]["scale"].shape == (6,)
    assert int((params["conv1"]["kernel"] == 0).sum()) >= params["conv1"]["kernel"].size // 2 - 30


@pytest.mark.slow
def test_check_finds_params_that_moved(problem):
    params, loss = problem
    tx = jaxsparse.l0(optax.sgd(0.05), GROUPS, penalty=0.1)
    opt_state, params = train(tx, params, loss, 3)
    jaxsparse.check(opt_state, params)
    moved = {**params, "bn1": {**params["bn1"], "scale": params["bn1"]["scale"] * 1.01}}
    with pytest.raises(jaxsparse.SparsityError, match="bn1/scale is not its weights times their gates"):
        jaxsparse.check(opt_state, moved)
    broken = opt_state._replace(log_alpha={**opt_state.log_alpha, "conv1": jnp.full(6, jnp.nan)})
    with pytest.raises(jaxsparse.SparsityError, match="log_alpha of group 'conv1' is not finite"):
        jaxsparse.check(broken, params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jaxsparse.l0(optax.sgd(0.1), GROUPS, penalty=-1.0), "strength of the penalty must be at least 0"),
        (lambda: Penalty([1.0, -2.0]), "strength of the penalty must be at least 0, got -2"),
        (lambda: Penalty(1.0, "some"), r"counts must be one of \['alone', 'neighbours', 'all'\], got 'some'"),
        (lambda: Penalty([1.0], "all"), "counts='all' has one strength"),
        (lambda: Penalty(1.0, examples=0), "examples must be at least 1, got 0"),
        (lambda: Penalty(1.0, weight_decay=-1), "weight_decay must be at least 0"),
        (lambda: jaxsparse.l0(optax.sgd(0.1), GROUPS, penalty=[1.0]), "1 strengths for 3 groups"),
        (lambda: jaxsparse.l0(optax.sgd(0.1), GROUPS, penalty=1.0, log_alpha=[1.0]), "one for each of the 3 groups"),
        (lambda: jaxsparse.l0(optax.sgd(0.1), GROUPS, penalty=1.0, clamp=(1, 0)), r"clamp must be bounds"),
        (lambda: jaxsparse.l0(optax.sgd(0.1), GROUPS, penalty=1.0, freeze_gates_at=-1), "freeze_gates_at must be at"),
        (lambda: jaxsparse.dep_l0(optax.sgd(0.1), GROUPS, penalty=1.0, direction="up"), "direction must be 'forward'"),
        (lambda: jaxsparse.dep_l0(optax.sgd(0.1), GROUPS, penalty=1.0, input_width=0), "input_width must be at least"),
        (
            lambda: jaxsparse.dependent_logits([{"kernel": np.ones((2, 3)), "bias": np.ones(3)}] * 2),
            r"layer 1 of the generator has a kernel of shape \(2, 3\).*with 3 inputs",
        ),
        (lambda: jaxsparse.get_log_alpha(optax.sgd(0.1).init({})), "no gates in this optimizer state"),
        (lambda: jaxsparse.open_channels(optax.sgd(0.1).init({})), "no gates in this optimizer state"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_no_optimizer_is_told_at_once():
    group = jaxsparse.Group("w", {"w": 0}, {"w": 0})
    for wrapper in (jaxsparse.l0, jaxsparse.dep_l0):
        with pytest.raises(ValueError, match="inner must be an optimizer, such as .*, got 0.1"):
            wrapper(0.1, [group], penalty=1.0)
        with pytest.raises(ValueError, match="gate_optimizer must be an optimizer, such as .*, got <function adam"):
            wrapper(optax.sgd(0.1), [group], penalty=1.0, gate_optimizer=optax.adam)
        with pytest.raises(ValueError, match="a sequence of jaxsparse.Group, got a single one, 'w'"):
            wrapper(optax.sgd(0.1), group, penalty=1.0)


@pytest.mark.slow
def test_gates_of_wide_groups_learn_as_by_autodiff():
    """Two groups on one axis, a group on two axes of one leaf, one of stacked layers: the chain rule is that of JAX."""
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in {"qkv": (3, 8), "wh": (4, 4), "stack": (2, 5, 3)}.items()
    }
    groups = (
        Group("heads", [("qkv", 1, (0, 0, 1, 1, -1, -1, -1, -1))], size=2),
        Group("inner", [("qkv", 1, (0, 1, 0, 1, -1, -1, 2, 2))]),
        Group("units", [("wh", 0), ("wh", 1)]),
        Group("layers", [("stack", (0, 2))]),
    )

    def gated(weights, gates):
        out = dict(weights)
        for group in groups:
            for which in group.multiplies:
                axes, channels = entries(which, out[which.path].shape, gates[group.name].size)
                factor = jnp.append(gates[group.name], 1.0)[channels]
                others = [i for i in range(out[which.path].ndim) if i not in axes]
                out[which.path] = out[which.path] * jnp.expand_dims(factor, others)
        return out

    def loss(params):
        return sum(jnp.sum(jnp.sin(leaf) * jnp.arange(leaf.size).reshape(leaf.shape)) for leaf in params.values())

    tx = jaxsparse.l0(optax.sgd(0.01), groups, penalty=0.0, gate_optimizer=optax.sgd(0.1))
    state = tx.init(params)
    for _ in range(3):
        before = state
        updates, state = jax.jit(tx.update)(jax.grad(loss)(params), state, params)
        if before.count:
            gates = {  # as the state holds them: the first factor of each group
                "heads": before.gates["qkv"][0].ravel()[jnp.array([0, 2])],
                "inner": before.gates["qkv"][1].ravel()[jnp.array([0, 1, 6])],
                "units": before.gates["wh"][0].ravel(),
                "layers": before.gates["stack"].ravel(),
            }
            chex.assert_trees_all_close(gated(before.weights, gates), params, rtol=1e-5, atol=1e-6)
            by_weights, by_gates = jax.grad(lambda w, z: loss(gated(w, z)), (0, 1))(before.weights, gates)
            wanted = jax.tree.map(lambda w, g: w - 0.01 * g, before.weights, by_weights)
            chex.assert_trees_all_close(state.weights, wanted, rtol=1e-5, atol=1e-5)
            for name, log_alpha in before.log_alpha.items():
                moved = log_alpha - 0.1 * before.slopes[name] * by_gates[name]
                np.testing.assert_allclose(state.log_alpha[name], moved, rtol=1e-4, atol=1e-4)
        params = optax.apply_updates(params, updates)
        assert jaxsparse.inspect.check(state, params) is None
    is_open = jax.tree.map(lambda x: x > 0, jaxsparse.eval_params(state, params))
    assert bool(is_open["qkv"].any())


def test_the_penalty_counts_the_weights_of_each_channel_of_a_wide_group():
    params = {"qkv": jnp.arange(24.0).reshape(3, 8), "stack": jnp.ones((2, 5, 3))}
    groups = Group("heads", [("qkv", 1, (0, 0, 1, -1, -1, -1, 1, 1))]), Group("layers", [("stack", (0, 2))])
    logits = [jnp.array([0.3, -0.2]), jnp.linspace(-1.0, 1.0, 6)]
    chances = [jaxsparse.prob_open(log_alpha) for log_alpha in logits]
    found = Penalty([2.0, 1.0]).value(groups, params, logits)
    wanted = 2 * 3 * (2 * chances[0][0] + 3 * chances[0][1]) + 5 * chances[1].sum()
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)
    decayed = Penalty(0.0, weight_decay=0.5).value(groups, params, logits)
    squares = (params["qkv"] ** 2).sum(0)
    wanted = chances[0][0] * squares[:2].sum() + chances[0][1] * squares[jnp.array([2, 6, 7])].sum()
    assert float(decayed) == pytest.approx(0.25 * float(wanted + 5 * chances[1].sum()), rel=1e-6)
    with pytest.raises(ValueError, match="group 'heads' is not all of the 8 outputs of qkv: take counts='all'"):
        Penalty(1.0, "neighbours").value(groups[:1], params, logits[:1])


def test_wrappers_of_the_weights_alone_are_refused():
    params = {"fc1": {"kernel": jnp.ones((5, 4))}, "fc2": {"kernel": jnp.ones((4, 3))}}
    group = Group("hidden", {"fc2/kernel": 0}, {"fc1/kernel": -1, "fc2/kernel": 0})
    for wrap in (lambda tx: optax.MultiSteps(tx, 4), lambda tx: optax.apply_if_finite(tx, 5)):
        with pytest.raises(ValueError, match=r"l0: optax.* around inner leaves out the gates, .* around l0\(\.\.\.\)"):
            jaxsparse.l0(wrap(optax.sgd(0.1)), [group], penalty=1e-3).init(params)
        jaxsparse.l0(wrap(optax.sgd(0.1)), [group], penalty=1e-3, gate_optimizer=wrap(optax.adam(1e-3))).init(params)


def test_penalties_that_count_nothing_are_an_error():
    params = {"fc1": {"kernel": jnp.ones((5, 4))}, "fc2": {"kernel": jnp.ones((4, 3))}}
    group = Group("hidden", {"fc2/kernel": 0})
    with pytest.raises(ValueError, match="counts='all' .* group 'hidden' removes nothing: give it removes="):
        jaxsparse.l0(optax.sgd(0.1), [group], penalty=Penalty(1.0, "all")).init(params)
    with pytest.raises(ValueError, match="needs a layer for each group, got none"):
        jaxsparse.dependent_logits([])


def test_one_number_a_group_may_be_an_array():
    assert Penalty(jnp.array([1.0, 2.0])).strength == (1.0, 2.0)
    params = {"fc1": {"kernel": jnp.ones((5, 4))}, "fc2": {"kernel": jnp.ones((4, 4))}}
    groups = [Group(f"hidden{i}", {f"fc{i}/kernel": -1}, {f"fc{i}/kernel": -1}) for i in (1, 2)]
    tx = jaxsparse.l0(optax.sgd(0.1), groups, penalty=1e-3, log_alpha=np.array([2.0, -2.0]))
    logits = jaxsparse.get_log_alpha(tx.init(params))
    assert float(logits["hidden1"].min()) > 1 > -1 > float(logits["hidden2"].max())
