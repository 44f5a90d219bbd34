import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from jaxsparse.masks import validate_masks
from jaxsparse.transforms import MaskState, every, given_masks, layers_of, mask_link, on_units, regrow
from tests.problems import gradients, make_params, make_step, slow_except


class RotatingState(MaskState):
    method = "rotating"


def rotating(**options):
    """Masks of a quarter that move on by one place at every change."""

    def start(params, key):
        del key
        return jaxsparse.magnitude_masks(params, 0.75)

    def change(layers, state):
        return [jnp.roll(layer.mask, 1) for layer in layers], state.kept, None

    return mask_link(RotatingState, start, change, **{"when": every(2), **options})


def test_masks_change_when_they_are_due_and_pruned_weights_are_zero():
    params = make_params()
    tx = optax.chain(optax.sgd(0.1), rotating())
    opt_state, step = tx.init(params), make_step(tx)
    first = before = jaxsparse.get_masks(opt_state)
    for count in range(5):
        params, opt_state = step(params, opt_state, count)
        masks = jaxsparse.get_masks(opt_state)
        expected = jax.tree.map(lambda m: jnp.roll(m, 1), before) if count in (2, 4) else before
        jax.tree.map(np.testing.assert_array_equal, masks, expected)
        jaxsparse.check(opt_state, params)
        before = masks
    assert int(jaxsparse.count(masks)) == int(jaxsparse.count(first))


def test_signals_are_made_on_due_steps_alone_and_seen_by_layer():
    params, made = make_params(), []

    def signal(updates, own, extra_args):
        del own
        assert extra_args["value"] == 3

        def make():
            made.append(True)
            return jax.tree.map(jnp.abs, updates)

        return make

    def change(layers, state):
        assert all((layer.signal >= 0).all() for layer in layers)
        assert [layer.path for layer in layers] == ["attention/kernel", "conv/kernel", "dense/kernel"]
        return [layer.mask for layer in layers], state.kept, None

    tx = mask_link(RotatingState, lambda p, key: jaxsparse.random_masks(p, 0.5), change, when=every(2), signal=signal)
    state = tx.init(params)
    for count in range(3):
        _, state = tx.update(gradients(params, count), state, params, value=3)
        assert len(made) == (count == 2)


def test_what_goes_wrong_is_said_with_the_methods_name():
    params = make_params()
    tx = rotating()
    state = tx.init(params)
    with pytest.raises(ValueError, match="rotating needs the params"):
        tx.update(params, state)
    with pytest.raises(jaxsparse.SparsityError, match="rotating: the masks keep 196 weights, but the budget is 7"):
        jaxsparse.check(state._replace(kept=jnp.int32(7)), None)
    broken = jax.tree.map(lambda p: p.at[(0,) * p.ndim].set(jnp.nan) if p.ndim > 1 else p, params)
    for _ in range(3):
        _, state = tx.update(params, state, broken)
    with pytest.raises(jaxsparse.SparsityError, match=r"rotating: \d NaN among the weights and signals"):
        jaxsparse.check(state, None)


def test_given_masks_are_checked_and_copied():
    params = make_params()
    masks = jaxsparse.random_masks(params, 0.5)
    state = mask_link(RotatingState, given_masks(masks)).init(params)
    held = {id(mask) for mask in jax.tree.leaves(state.masks)}
    assert not held & {id(mask) for mask in jax.tree.leaves(masks)}
    with pytest.raises(ValueError, match="must keep whole units"):
        mask_link(RotatingState, given_masks(masks, {"dense/kernel": jaxsparse.block(4, 4)})).init(params)


@pytest.mark.parametrize(
    "drop", slow_except([regrow.drop_smallest], [regrow.drop_smallest, regrow.drop_smallest_and_most_negative])
)
@pytest.mark.parametrize(
    "grow", slow_except([regrow.grow_largest], [regrow.grow_largest, regrow.grow_random, regrow.grow_by_output])
)
def test_drop_and_grow_have_exact_counts(drop, grow):
    params = make_params()
    masks = validate_masks(jaxsparse.random_masks(params, 0.7, key=1), params)
    lose = jnp.asarray([20, 7, 50])
    gains = jnp.asarray([30, 0, 47])

    def rule(layers):
        survivors = drop(layers, regrow.counts(layers), lose)
        np.testing.assert_array_equal(regrow.counts(layers, survivors), regrow.counts(layers) - lose)
        grown = grow(layers, survivors, gains)
        assert all((new | ~left).all() for new, left in zip(grown, survivors, strict=True))
        return grown, jnp.zeros(3, bool)

    layers = layers_of(params, gradients(params), masks, key=jax.random.key(0))
    new, _ = on_units(layers, rule)
    before = regrow.counts(layers)
    np.testing.assert_array_equal(regrow.counts(layers, new), before - lose + gains)


@pytest.mark.slow
def test_layers_of_units_are_grouped_by_size_and_n_of_m_stands_alone():
    params = make_params()
    structure = {"attention/kernel": jaxsparse.block(2, 4), "dense/kernel": jaxsparse.n_of_m(1, 4)}
    masks = jaxsparse.random_masks(params, 0.75, structure=structure)
    layers = layers_of(params, None, validate_masks(masks, params), structure=structure)
    seen = []

    def rule(units):
        seen.append({unit.path: unit.mask.shape for unit in units})
        return [unit.mask for unit in units], jnp.zeros(len(units), bool)

    new, resting = on_units(layers, rule)
    assert seen == [{"attention/kernel": (8, 4)}, {"conv/kernel": (3, 3, 2, 8)}, {"dense/kernel": (16, 24)}]
    for layer, mask in zip(layers, new, strict=True):
        np.testing.assert_array_equal(mask, layer.mask)
    assert not resting.any()


def test_whole_floats_count_steps_exactly():
    due = every(1000.0)
    counts = jnp.arange(16_777_990, 16_778_010)
    np.testing.assert_array_equal(counts[due(counts)], [16_778_000])


@pytest.mark.parametrize("method", [jaxsparse.admm, jaxsparse.spartan])
def test_a_schedule_in_place_of_a_number_is_named(method):
    options = {jaxsparse.admm: {}, jaxsparse.spartan: {"warmup": 1, "freeze_at": 2}}[method]
    with pytest.raises(ValueError, match="sparsity must be a number here, not a schedule"):
        method(optax.sgd(0.1), optax.constant_schedule(0.5), **options)
