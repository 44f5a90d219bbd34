import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from jaxsparse.transforms.latent import filled
from tests.methods.published import INNERS, compare, ranks, straight
from tests.problems import SPARSE_SIZE, jit_once, make_params, make_step, slow_except


def trained(tx, steps, params=None):
    """The state, the params and the masks after every step, from that of init on."""
    params = make_params() if params is None else params
    opt_state, step = tx.init(params), jit_once(make_step(tx))
    params, history = jaxsparse.sparsify(opt_state, params), [jaxsparse.get_masks(opt_state)]
    for count in range(steps):
        params, opt_state = step(params, opt_state, jnp.int32(count))
        history.append(jaxsparse.get_masks(opt_state))
    return opt_state, params, history


def kept(masks):
    return [int(mask.sum()) for mask in jax.tree.leaves(masks) if mask.ndim]


def test_two_steps_by_hand():
    # SGD with a rate of 1, two of five weights. Start: the largest of 1, -2, 3, -4, 2 are 3 and -4.
    # Gradients 0, 3, 2, -1, 0: w = 1, -5, 1, -3, 2, of which -5 and -3 are seen: the pruned -2 learned, and is back.
    # Gradients 0, 0, 1, -1, 0: w = 1, -5, 0, -2, 2. Of -2 and 2 the first stays.
    params, tx = {"w": jnp.array([[1.0, -2.0, 3.0, -4.0, 2.0]])}, jaxsparse.straight_through(optax.sgd(1.0), 0.6)
    update = jax.jit(tx.update)
    opt_state = tx.init(params)
    params = jaxsparse.sparsify(opt_state, params)
    np.testing.assert_array_equal(params["w"], [[0, 0, 3, -4, 0]])
    for grads, weights, seen, flips in (
        ([0.0, 3.0, 2.0, -1.0, 0.0], [1, -5, 1, -3, 2], [0, -5, 0, -3, 0], 2),
        ([0.0, 0.0, 1.0, -1.0, 0.0], [1, -5, 0, -2, 2], [0, -5, 0, -2, 0], 0),
    ):
        updates, opt_state = update({"w": jnp.array([grads])}, opt_state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(opt_state.weights["w"], [weights])
        np.testing.assert_array_equal(params["w"], [seen])
        assert (int(opt_state.flips), int(opt_state.kept)) == (flips, 2)


@pytest.mark.parametrize("inner", slow_except(["adam"], ["adam", "momentum"]))
def test_it_is_the_published_training(inner):
    image = straight(lambda w: jnp.where(ranks(w.reshape(-1), 0).reshape(w.shape) < w.size // 4, w, 0))
    optimizer = INNERS[inner]()
    compare(jaxsparse.straight_through(optimizer, 0.75), optimizer, image)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"scope": "global", "at_least": 20}, marks=pytest.mark.slow),
        pytest.param({"allocation": "erdos_renyi_kernel", "at_least": 3}, marks=pytest.mark.slow),
        pytest.param({"sparsity": {"conv/*": 0.5, "*": 0.8}}, marks=pytest.mark.slow),
        pytest.param(
            {"structure": {"dense/*": jaxsparse.n_of_m(1, 4), "attention/kernel": jaxsparse.block(2, 4)}},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_masks_are_the_magnitude_masks_of_the_latent_weights(options):
    options = {"sparsity": 0.75, **options}
    tx = jaxsparse.straight_through(optax.sgd(0.05, momentum=0.9), **options)
    opt_state, params, history = trained(tx, 5)
    jaxsparse.check(opt_state, params)
    if options.pop("scope", "layer") == "global":
        options["allocation"] = "global"
    wanted = jaxsparse.magnitude_masks(filled(opt_state.weights, params), **options)
    jax.tree.map(np.testing.assert_array_equal, history[-1], wanted)
    assert int(opt_state.kept) == sum(kept(wanted))
    flips = jaxsparse.inspect.measure(opt_state, params, before=history[-2]).flips
    assert int(opt_state.flips) == sum(map(int, flips.values())) > 0


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_schedule_is_that_of_the_step_that_sees_the_masks(scope):
    schedule = optax.linear_schedule(0.25, 0.75, 4)
    tx = jaxsparse.straight_through(optax.sgd(0.05), schedule, scope=scope)
    totals = [SPARSE_SIZE - round(SPARSE_SIZE * min(0.25 + t / 8, 0.75)) for t in range(6)]
    opt_state, _, history = trained(tx, 5)
    assert [sum(kept(masks)) for masks in history] == totals
    assert int(opt_state.clipped) == 0
    injected = optax.inject_hyperparams(jaxsparse.straight_through, static_args=("scope",))
    _, _, history = trained(injected(optax.sgd(0.05), schedule, scope=scope), 5)
    # Its state has the numbers of the step before.
    assert [sum(kept(masks)) for masks in history] == [totals[0], *totals[:-1]]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_schedule_may_reach_1_outside_of_jit_too(scope):
    weights = {"w": jnp.arange(1.0, 9.0).reshape(2, 4)}
    tx = jaxsparse.straight_through(optax.sgd(0.0), optax.linear_schedule(0.0, 1.0, 2), scope=scope, at_least=1)
    opt_state, found = tx.init(weights), []
    for _ in range(3):
        _, opt_state = tx.update(weights, opt_state, weights)
        found.append(int(opt_state.kept))
    assert (found, int(opt_state.clipped)) == ([4, 1, 1], 0)


@pytest.mark.slow
def test_masks_are_chosen_on_the_multiples_of_every():
    tx = jaxsparse.straight_through(optax.sgd(0.3), optax.linear_schedule(0.2, 0.8, 6), every=3)
    opt_state, params, history = trained(tx, 7)
    jaxsparse.check(opt_state, params)
    changed = [any((a != b).any() for a, b in zip(*map(jax.tree.leaves, pair), strict=True))
               for pair in itertools.pairwise(history)]  # fmt: skip
    # The update of step 2 hands out the params of step 3.
    assert changed == [False, False, True, False, False, True, False]
    assert [sum(kept(history[t])) for t in (0, 3, 6)] == [627, 392, 157]


def test_what_goes_wrong_is_counted():
    tx = jaxsparse.straight_through(optax.sgd(0.05), lambda step: 0.5 + 0.3 * step, every=2)
    opt_state, params, history = trained(tx, 5, {"conv": {"kernel": jnp.arange(1.0, 21.0).reshape(2, 5, 2)}})
    assert [sum(kept(masks)) for masks in history] == [10, 10, 0, 0, 0, 0]
    with pytest.raises(jaxsparse.SparsityError, match=r"2 times when masks were chosen, the schedule .* left \[0, 1\]"):
        jaxsparse.check(opt_state)
    fine = opt_state._replace(clipped=jnp.int32(0))
    more = fine._replace(masks=jax.tree.map(jnp.ones_like, opt_state.masks))
    with pytest.raises(jaxsparse.SparsityError, match="the masks keep 20 weights, but the budget is 0"):
        jaxsparse.check(more)
    broken = fine._replace(weights=jax.tree.map(lambda w: w * jnp.nan, opt_state.weights))
    with pytest.raises(jaxsparse.SparsityError, match="the weights of conv/kernel are not finite"):
        jaxsparse.check(broken, params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": 0.1}, "straight_through: inner must be an optimizer, .* got 0.1"),
        ({"inner": None}, "straight_through: inner must be an optimizer, .* got None"),
        ({"sparsity": 1.0}, r"sparsity is the fraction of zeros and must be in \[0, 1\), got 1.0"),
        ({"sparsity": lambda step: 1.5}, r"sparsity is a schedule of fractions of zeros, .* gives 1.5 at step 0"),
        ({"scope": "network"}, r"scope must be one of \['layer', 'global'\], got 'network'"),
        ({"scope": "global", "allocation": "erdos_renyi"}, "ranks all layers together, which allocation='erdos_renyi'"),
        ({"allocation": "fair"}, "allocation must be one of .*, got 'fair'"),
        ({"every": 0}, "every must be at least 1"),
        ({"at_least": -1}, "at_least must be at least 0"),
        ({"structure": "row"}, "structure must be one of"),
    ],
)
def test_options_are_checked_when_the_wrapper_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        jaxsparse.straight_through(**{"inner": optax.sgd(0.1), "sparsity": 0.9, **options})
