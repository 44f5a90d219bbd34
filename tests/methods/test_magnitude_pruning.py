import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from tests.problems import SPARSE_SIZE, make_params, make_step

SIZES = {"attention/kernel": 256, "conv/kernel": 144, "dense/kernel": 384}


def kept_by_step(tx, steps, params=None):
    """How many weights each leaf keeps after every step, and the params and masks at the end."""
    params = make_params() if params is None else params
    opt_state, step, history = tx.init(params), make_step(tx), []
    for count in range(steps):
        params, opt_state = step(params, opt_state, count)
        masks = jaxsparse.get_masks(opt_state)
        history.append([int(mask.sum()) for mask in jax.tree.leaves(masks) if mask.ndim])
    jaxsparse.check(opt_state, params)
    return np.array(history), params, masks


def test_every_layer_follows_equation_1_and_ends_where_it_says():
    tx = jaxsparse.chain(optax.sgd(0.05), jaxsparse.magnitude_pruning(0.9, begin=2, end=11, every=4))
    history, *_ = kept_by_step(tx, 14)
    sizes = np.array([*SIZES.values()])
    reached = np.zeros(3)
    for t, kept in enumerate(history):
        if t in (2, 6, 10, 11):
            reached = np.round(sizes * 0.9 * (1 - (1 - (t - 2) / 9) ** 3))
        np.testing.assert_array_equal(kept, sizes - reached)
    np.testing.assert_array_equal(history[-1], sizes - np.round(0.9 * sizes))


def test_the_cubic_schedule_is_that_of_jaxpruner_a_step_later():
    golden = np.load(pathlib.Path(__file__).parents[1] / "golden" / "jaxpruner_masks.npz")
    params = {"w": jnp.arange(1.0, 10_001).reshape(100, 100)}
    tx = jaxsparse.magnitude_pruning(0.9, begin=100, end=1000, every=1)
    update, state = jax.jit(tx.update), tx.init(params)
    for step, sparsity in zip(golden["cubic/steps"], golden["cubic/sparsity"], strict=True):
        state = state._replace(count=jnp.int32(min(step + 1, 1000)))  # which counts from t + 1, and has no end
        _, state = update(params, state, params)
        assert int(state.kept) == 10_000 - round(10_000 * float(sparsity))


def test_it_starts_at_another_sparsity_and_falls_with_another_power():
    params = {"w": jnp.arange(1.0, 201).reshape(20, 10)}
    link = optax.inject_hyperparams(jaxsparse.magnitude_pruning, static_args=("schedule", "every"))
    for more, power in (({}, 3), ({"power": 2}, 2), ({"schedule": "linear"}, 1)):
        tx = link(0.9, begin=1, end=5, every=1, initial=0.5, **more)
        update, state, kept = jax.jit(tx.update), tx.init(params), []
        for _ in range(6):
            _, state = update(params, state, params)
            kept.append(int(state.inner_state.kept))
        zeros = [0.9 + (0.5 - 0.9) * (1 - x / 4) ** power for x in range(5)]
        assert kept == [200, *(200 - round(200 * s) for s in zeros)]


def test_at_once_it_is_magnitude_masks():
    params = make_params()
    _, _, masks = kept_by_step(jaxsparse.magnitude_pruning(0.75, begin=0), 1, params)
    expected = jaxsparse.magnitude_masks(params, 0.75)
    jax.tree.map(np.testing.assert_array_equal, masks, expected)
    _, _, masks = kept_by_step(jaxsparse.magnitude_pruning(0.75, scope="global"), 1, params)
    jax.tree.map(np.testing.assert_array_equal, masks, jaxsparse.magnitude_masks(params, 0.75, allocation="global"))
    _, _, masks = kept_by_step(jaxsparse.magnitude_pruning(0.75, scope="output"), 1, params)
    by_output = jaxsparse.score_masks(params, jaxsparse.saliency.magnitude(params), 0.75, per_output=True)
    jax.tree.map(np.testing.assert_array_equal, masks, by_output)


def test_a_schedule_of_steps_is_read_as_it_is_and_can_be_injected():
    linear = optax.linear_schedule(0.0, 0.5, 4)
    plain = jaxsparse.magnitude_pruning(linear, end=6, every=1, scope="global")
    history, *_ = kept_by_step(plain, 7)
    totals = [SPARSE_SIZE - round(SPARSE_SIZE * min(t / 8, 0.5)) for t in range(7)]
    assert history.sum(1).tolist() == totals
    injected = optax.inject_hyperparams(jaxsparse.magnitude_pruning, static_args=("end", "every", "schedule", "scope"))
    history, *_ = kept_by_step(injected(linear, end=6, every=1, schedule="constant", scope="global"), 7)
    assert history.sum(1).tolist() == totals
    forgotten = optax.inject_hyperparams(jaxsparse.magnitude_pruning, static_args="every")(linear, every=1)
    state = forgotten.init(make_params())
    with pytest.warns(
        UserWarning, match="traced number, .* weights go once, on step begin. .* add schedule='constant'"
    ):
        jax.eval_shape(forgotten.update, make_params(), state, make_params())
    named = jaxsparse.magnitude_pruning(0.5, end=4, every=2, schedule="linear", scope="global")
    assert kept_by_step(named, 5)[0].sum(1).tolist() == [SPARSE_SIZE, SPARSE_SIZE] + [totals[2]] * 2 + [totals[4]]


@pytest.mark.slow
def test_lamp_scores_are_those_of_a_loop_and_lose_no_layer():
    weights = jax.random.normal(jax.random.key(0), (5, 7))
    mask = jax.random.bernoulli(jax.random.key(1), 0.6, (5, 7))
    squares = np.where(mask, np.square(np.asarray(weights, np.float64)), 0)
    expected = [s / squares[squares >= s].sum() if s else 0 for s in squares.flat]
    np.testing.assert_allclose(jaxsparse.saliency.lamp_scores(weights, mask).reshape(-1), expected, rtol=1e-5)

    params = {"large": 10 * jax.random.normal(jax.random.key(2), (20, 10)), "small": jnp.linspace(0.01, 0.02, 8)[None]}
    by_scope = {scope: kept_by_step(jaxsparse.magnitude_pruning(0.9, scope=scope), 1, params)[0][-1].tolist()
                for scope in ("layer", "global", "lamp")}  # fmt: skip
    assert by_scope["layer"] == [20, 1]
    assert by_scope["global"] == [21, 0]
    assert sum(by_scope["lamp"]) == 21
    assert min(by_scope["lamp"]) > 0
    # Within a layer, the largest stay: what its mask would be at that number.
    _, _, masks = kept_by_step(jaxsparse.magnitude_pruning(0.9, scope="lamp"), 1, params)
    for name, mask in masks.items():
        order = np.argsort(-np.abs(np.asarray(params[name])).reshape(-1))
        assert mask.reshape(-1)[order[: int(mask.sum())]].all()


@pytest.mark.slow
def test_scores_of_ones_own_replace_the_magnitudes():
    params = make_params()

    def first_order(params, gradients):
        return {path: -params[path] * gradients[path] for path in params}

    tx = jaxsparse.chain(optax.sgd(0.1), jaxsparse.magnitude_pruning(0.5, score=first_order))
    grads = jax.tree.map(jnp.sin, params)
    _, state = tx.update(grads, tx.init(params), params)
    mask = jaxsparse.get_masks(state)["dense"]["kernel"]
    scores = -params["dense"]["kernel"] * grads["dense"]["kernel"]
    np.testing.assert_array_equal(mask, jaxsparse.top_k_mask(scores, 192))


def test_fixed_scores_are_a_tree_like_the_params():
    params = make_params()
    scores = jax.tree.map(lambda p: jnp.sin(7 * p), params)
    tx = jaxsparse.chain(optax.sgd(0.1), jaxsparse.magnitude_pruning(0.5, end=2, every=1, scope="global", score=scores))
    history, _, masks = kept_by_step(tx, 3, params)
    expected = jaxsparse.score_masks(params, scores, 0.5, scope="global")
    jax.tree.map(np.testing.assert_array_equal, masks, expected)
    assert history.sum(1).tolist() == [SPARSE_SIZE, SPARSE_SIZE - round(SPARSE_SIZE * 0.5 * 7 / 8), SPARSE_SIZE // 2]
    state = tx.init(params)
    mine = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)}
    assert not mine & {x.unsafe_buffer_pointer() for x in jax.tree.leaves(scores)}  # the state may be donated
    assert isinstance(state[-1].own["dense"]["bias"], optax.MaskedNode)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ({"w": None, "b": jnp.ones(4)}, r"score of w: expected shape \(3, 4\), got none"),
        ({"b": jnp.ones(4)}, r"score of w: expected shape \(3, 4\), got none"),
        ({"w": jnp.ones((4, 3))}, r"score of w: expected shape \(3, 4\), got shape \(4, 3\)"),
        ({"w": jnp.ones((3, 4), int)}, "score of w: expected floats, got int32"),
        ({"w": jnp.ones((3, 4)), "v": jnp.ones(2)}, "score must have the tree of the params, but has v beyond them"),
        (lambda params, grads: {}, r"score of w: expected shape \(3, 4\), got none"),
        (lambda params, grads: {"w": params["w"].T}, r"score of w: expected shape \(3, 4\), got shape \(4, 3\)"),
        (lambda params, grads: params["w"], "score must return scores by path"),
    ],
)
@pytest.mark.parametrize("link", [jaxsparse.magnitude_pruning, jaxsparse.asni])
def test_scores_that_do_not_fit_are_named(link, score, message):
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
    tx = link(0.5, score=score) if link is jaxsparse.magnitude_pruning else link(0.5, 1, score=score)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda params: tx.update(params, tx.init(params), params), params)


def test_scores_that_are_nan_rank_last_and_are_counted():
    params = {"w": jnp.arange(1.0, 9).reshape(2, 4)}
    odd = jnp.where(params["w"] > 6, jnp.nan, -params["w"])  # two of them
    for score in ({"w": odd}, lambda params, grads: {"w": odd}):
        tx = jaxsparse.magnitude_pruning(0.5, score=score)
        _, state = tx.update(params, tx.init(params), params)
        assert jaxsparse.get_masks(state)["w"].tolist() == [[True] * 4, [False] * 4]
        with pytest.raises(ValueError, match="magnitude_pruning: 2 NaN among the weights and signals"):
            jaxsparse.check(state)
    given = {"w": params["w"].at[0, 0].set(jnp.nan)}  # counted once, in the weights
    tx = jaxsparse.magnitude_pruning(0.5, score=jaxsparse.saliency.magnitude)
    assert int(tx.update(params, tx.init(given), given)[1].nan_scores) == 1


@pytest.mark.slow
def test_asni_takes_scores():
    params = make_params()
    scores = jax.tree.map(lambda p: jnp.sin(7 * p), params)
    history, _, masks = kept_by_step(jaxsparse.asni(0.5, 1, score=scores), 2, params)
    names = ("attention", "conv", "dense")
    best = jaxsparse.global_top_k_masks([scores[name]["kernel"] for name in names], history[-1].sum())
    for name, mask in zip(names, best, strict=True):
        np.testing.assert_array_equal(masks[name]["kernel"], mask)


@pytest.mark.slow
def test_units_and_n_of_m():
    structure = {"attention/kernel": jaxsparse.block(2, 4), "dense/kernel": jaxsparse.n_of_m(1, 4)}
    for scope in ("layer", "global", "lamp"):
        tx = jaxsparse.magnitude_pruning(0.8, end=2, every=1, scope=scope, structure=structure, at_least=1)
        history, _, masks = kept_by_step(tx, 3)
        assert jaxsparse.block(2, 4).holds(masks["attention"]["kernel"].reshape(16, 16))
        assert jaxsparse.n_of_m(1, 4).counts(masks["dense"]["kernel"]).min() >= 1
        assert (history[-1] >= [8, 1, 8]).all()  # a block, a weight, and one of four


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.5}, "sparsity must be at least 0 and at most 1, got 1.5"),
        ({"begin": 5, "end": 4}, "end must be at least begin, 5, got 4"),
        ({"every": 0}, "every must be at least 1"),
        ({"scope": "network"}, r"scope must be one of \['layer', 'global', 'lamp', 'output'\], got 'network'"),
        ({"schedule": "sudden"}, r"schedule must be one of \['cubic', 'linear', 'constant'\], got 'sudden'"),
        ({"structure": "row"}, "structure must be one of"),
        ({"structure": "channel", "scope": "output"}, "scope='output' ranks single weights, got structure='channel'"),
        ({"initial": 0.95}, "initial must be at most sparsity, 0.9, got 0.95"),
        ({"initial": -0.1}, "initial must be at least 0 and at most 1, got -0.1"),
        ({"power": 0}, "power must be above 0, got 0"),
        ({"power": 2, "schedule": "constant"}, "initial and power belong to eq"),
        ({"score": "size"}, 'score must be "magnitude", a function of params and gradients, or a tree of scores'),
        ({"score": {}}, 'score must be "magnitude", a function of params and gradients, or a tree of scores'),
    ],
)
def test_options_are_checked_when_the_link_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        jaxsparse.magnitude_pruning(**{"sparsity": 0.9, **options})


def test_a_constant_schedule_needs_no_end():
    params = {"kernel": jnp.arange(1.0, 17).reshape(4, 4)}
    for tx in (
        jaxsparse.magnitude_pruning(0.5, schedule="constant", every=1),
        optax.inject_hyperparams(jaxsparse.magnitude_pruning)(0.5, schedule="constant", every=1),
    ):
        _, opt_state = tx.update(params, tx.init(params), params)
        assert int(jaxsparse.count(jaxsparse.get_masks(opt_state))) == 8


@pytest.mark.parametrize("scope", ["global", "lamp"])
def test_layers_with_n_of_m_count_towards_the_budget_of_all(scope):
    params = {name: jax.random.normal(jax.random.key(i), (16, 16)) for i, name in enumerate(("a", "b", "c"))}
    structure = {"a": jaxsparse.n_of_m(1, 4), "*": "weight"}
    tx = jaxsparse.magnitude_pruning(0.75, schedule="constant", every=1, scope=scope, structure=structure)
    _, opt_state = tx.update(params, tx.init(params), params)
    kept = {name: int(mask.sum()) for name, mask in jaxsparse.get_masks(opt_state).items()}
    assert kept["a"] == 64 or scope == "global"
    assert sum(kept.values()) == 192


def test_steps_may_be_whole_floats():
    params = make_params()
    with jax.numpy_dtype_promotion("strict"):
        for make, steps in (
            (jaxsparse.magnitude_pruning, {"begin": 0, "end": 2, "every": 1}),
            (jaxsparse.iterative_hard_thresholding, {"every": 2}),
        ):
            by_ints, by_floats = make(0.5, **steps), make(0.5, **{name: float(n) for name, n in steps.items()})
            found = [tx.update(params, tx.init(params), params)[1].masks for tx in (by_ints, by_floats)]
            jax.tree.map(np.testing.assert_array_equal, *found)
