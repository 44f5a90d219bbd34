import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from jaxsparse import Group, inspect

PARAMS = {"fc1": {"kernel": jnp.ones((5, 4))}, "fc2": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
POSITIONS = {"fc1/kernel": 10, "fc2/kernel": 1}
GROUP = Group("hidden", {"fc2/kernel": 0}, {"fc1/kernel": -1, "fc2/kernel": 0})


def gated(log_alpha):
    state = jaxsparse.l0(optax.sgd(0.1), [GROUP], penalty=1e-3).init(PARAMS)
    return state._replace(log_alpha={"hidden": jnp.asarray(log_alpha, jnp.float32)})


def test_masks_are_counted_by_layer_and_in_multiply_adds():
    masks = {"fc1": {"kernel": jnp.arange(20).reshape(5, 4) < 5}, "fc2": {"kernel": True, "bias": True}}
    opt_state = optax.chain(optax.sgd(0.1), jaxsparse.mask_updates(masks)).init(PARAMS)
    found = jax.jit(lambda state: inspect.measure(state, PARAMS, POSITIONS))(opt_state)
    assert found.density == 0.25
    assert found.layer_density == {"fc1/kernel": 0.25}
    assert found.flips == {}
    assert found.remaining.keys() == {"multiply_adds"}
    assert float(found.remaining["multiply_adds"]) == pytest.approx((5 * 10 + 12) / (20 * 10 + 12))
    assert inspect.measure(opt_state, PARAMS).remaining == {}


@pytest.mark.slow
def test_flips_are_counted_against_earlier_masks():
    tx = jaxsparse.chain(optax.sgd(0.1, momentum=0.9), jaxsparse.sparse_momentum(0.5, 1, key=3))
    opt_state = tx.init(PARAMS)
    before = inspect.current_masks(opt_state, PARAMS)
    assert not any(inspect.measure(opt_state, PARAMS, before=before).flips.values())
    gradients, params = jax.tree.map(jnp.ones_like, PARAMS), jaxsparse.sparsify(opt_state, PARAMS)
    for _ in range(2):
        updates, opt_state = tx.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
    flips = inspect.measure(opt_state, params, before=before).flips
    after = jaxsparse.get_masks(opt_state, params)
    for layer in ("fc1", "fc2"):
        assert flips[f"{layer}/kernel"] == (after[layer]["kernel"] != before[layer]["kernel"]).sum()
    assert sum(flips.values()) > 0


def test_gates_are_counted_as_the_network_without_closed_channels():
    opt_state = gated([5.0, 5.0, -9.0, 0.0])
    found = jax.jit(lambda state: inspect.measure(state, PARAMS, POSITIONS, groups=[GROUP]))(opt_state)
    counted = jaxsparse.remaining(PARAMS, [GROUP], jaxsparse.open_channels(opt_state), POSITIONS)
    assert float(found.density) == pytest.approx(counted.params)
    assert float(found.remaining["multiply_adds"]) == pytest.approx(counted.macs)
    chances = {"hidden": jaxsparse.prob_open(opt_state.log_alpha["hidden"])}
    expected = jaxsparse.remaining(PARAMS, [GROUP], chances, POSITIONS)
    assert float(found.remaining["expected_params"]) == pytest.approx(expected.params)
    assert float(found.remaining["expected_multiply_adds"]) == pytest.approx(expected.macs)
    assert {name: float(share) for name, share in found.layer_density.items()} == {"hidden": 0.75}
    before = inspect.current_masks(gated([5.0, -9.0, -9.0, 0.0]), PARAMS)
    without_positions = inspect.measure(opt_state, PARAMS, groups=[GROUP], before=before)
    assert without_positions.flips == {"hidden": 1}
    assert without_positions.remaining.keys() == {"expected_params"}


def test_a_dense_network_is_all_there():
    opt_state = optax.adam(1e-3).init(PARAMS)
    found = inspect.measure(opt_state, PARAMS, POSITIONS, before=inspect.current_masks(opt_state, PARAMS))
    assert (found.density, found.layer_density, found.flips) == (1, {}, {})
    assert found.remaining == {"multiply_adds": 1}
    np.testing.assert_array_equal(jax.tree.leaves(inspect.current_masks(opt_state, PARAMS)), True)


def test_what_cannot_be_counted_is_an_error():
    with pytest.raises(ValueError, match="there are gates in this optimizer state: groups"):
        inspect.measure(gated([0.0] * 4), PARAMS)
    with pytest.raises(ValueError, match="positions names fc3/kernel, which the params do not have"):
        inspect.measure(gated([0.0] * 4), PARAMS, {"fc3/kernel": 1}, groups=[GROUP])


def test_more_multiply_adds_than_int32_counts():
    positions = {path: 10**9 for path in POSITIONS}
    masks = {"fc1": {"kernel": jnp.arange(20).reshape(5, 4) < 5}, "fc2": {"kernel": True, "bias": True}}
    states = [optax.chain(optax.sgd(0.1), jaxsparse.mask_updates(masks)).init(PARAMS), gated([5.0, 5.0, -9.0, -9.0])]
    for opt_state, expected in zip(states, ((5 + 12) / 32, 0.5), strict=True):
        found = jax.jit(lambda state: inspect.measure(state, PARAMS, positions, groups=[GROUP]))(opt_state)
        assert float(found.remaining["multiply_adds"]) == pytest.approx(expected)
