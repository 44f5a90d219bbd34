import math

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxsparse


def test_cosine_is_the_authors_formula():
    schedule = jaxsparse.cosine_prune_rate(0.5, 54_000)
    for t in (0, 540, 10_000, 27_000, 53_999):
        assert float(schedule(t)) == pytest.approx(
            0.005 + (0.5 - 0.005) * (1 + math.cos(math.pi * t / 54_000)) / 2, abs=1e-6
        )
    assert float(schedule(54_000)) == pytest.approx(0.005)
    assert float(schedule(100_000)) == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("args", "message"),
    [((1.5, 10), "init_value is a prune rate"), ((0.5, 0), "steps must be"), ((0.5, 10, -1), "end_value is a prune")],
)
def test_bad_input(args, message):
    with pytest.raises(ValueError, match=message):
        jaxsparse.cosine_prune_rate(*args)


# --- Dual averaging ---------------------------------------------------------------------------------------------------


def test_rda_cosine_is_the_authors_formula_counted_from_1():
    step_size, averaging = jaxsparse.rda_cosine(0.25, 234_600)
    for it in (1, 2, 1000, 117_300, 234_000, 234_599, 234_600):
        cosine = math.cos(math.pi * it / 234_600)
        assert float(step_size(it - 1)) == pytest.approx(0.25 * (1 + cosine) / 2, rel=2e-4, abs=1e-14)
        assert float(averaging(it - 1)) == pytest.approx((1 - cosine) / 2, rel=1e-5)
    assert float(step_size(10**6)) == pytest.approx(0, abs=1e-12)
    assert float(averaging(10**6)) == 1


@pytest.mark.slow
def test_rda_halving_is_the_authors_loop():
    boundaries = [391 * epoch for epoch in range(60, 421, 40)]
    assert len(boundaries) == 10
    step_size, averaging = jaxsparse.rda_halving(1.0, boundaries)
    s, a = 1.0, 0.0
    for step in range(0, 391 * 500, 391):
        if step in boundaries:
            s, a = s / 2, 1 - (1 - a) / 2
        assert (float(step_size(step)), float(averaging(step))) == (s, a)
    assert float(step_size(391 * 60 - 1)) == 1


def test_rda_log_cosine_is_the_authors_formula():
    step_size, averaging = jaxsparse.rda_log_cosine(2.0, 5000)
    for it in (1, 50, 100, 101, 2500, 5000):
        angle = (50 / 49) * it * math.pi / 5000 - math.pi / 49
        expected = 50 * 2 * it / 5000 if it <= 100 else 2 * math.exp(1.1 * math.log(10) * (math.cos(angle) - 1))
        assert float(step_size(it - 1)) == pytest.approx(expected, rel=1e-4)
        assert float(averaging(it - 1)) == pytest.approx((1 - math.cos(math.pi * it / 5000)) / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jaxsparse.rda_cosine(-1.0, 10), "init_value is a step size"),
        (lambda: jaxsparse.rda_cosine(1.0, 0), "steps must be at least 1"),
        (lambda: jaxsparse.rda_log_cosine(float("nan"), 10), "init_value is a step size"),
        (lambda: jaxsparse.rda_halving(1.0, [5, -1]), "boundaries are steps"),
    ],
)
def test_bad_input_of_dual_averaging(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- Sparsities -------------------------------------------------------------------------------------------------------


def test_sigmoid_has_the_values_of_the_authors_code():
    # Epochs, magnitude, scale in epochs, and the values in % after some epochs.
    for epochs, magnitude, scale, values in (
        (160, 0.99, 16, {0: 0.66, 80: 49.5, 158: 98.25, 159: 98.29}),
        (20, 0.985, 2, {0: 0.66, 10: 49.25, 18: 96.73, 19: 97.42}),
        (90, 0.814, 10, {0: 0.89, 88: 80.31, 89: 80.41}),
        (50, 0.98, 5, {48: 97.02, 49: 97.20}),
    ):
        schedule = jaxsparse.sigmoid_sparsity(magnitude, 7 * epochs, 7 * scale, begin=7)
        for epoch, percent in values.items():
            assert 100 * float(schedule(7 * (epoch + 1))) == pytest.approx(percent, abs=0.0051)


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 159])
@pytest.mark.parametrize("scale", [0.5, 4.0, 16.0])
def test_normalised_sigmoid_goes_from_0_to_its_magnitude_exactly(steps, scale):
    schedule = jaxsparse.sigmoid_sparsity(0.8, steps, scale, begin=1, normalised=True)
    values = [float(schedule(t)) for t in range(steps + 1)]
    assert values[0] == 0
    assert values[-1] == float(jnp.float32(0.8))
    assert values == sorted(values)
    assert float(schedule(steps + 100)) == values[-1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((1.2, 10, 1.0), "magnitude is a sparsity, a fraction of zeros"),
        ((0.9, 0, 1.0), "steps must be at least 1, got 0"),
        ((0.9, 10, 0.0), "scale is a number of steps and must be above 0, got 0.0"),
        ((0.9, 10, 1.0, 0.5, -1), "begin is a step and must be at least 0, got -1"),
    ],
)
def test_bad_sparsities(args, message):
    magnitude, steps, scale, *rest = args
    options = dict(zip(("translation", "begin"), rest, strict=False))
    with pytest.raises(ValueError, match=message):
        jaxsparse.sigmoid_sparsity(magnitude, steps, scale, **options)


def test_pruning_ends_where_its_schedule_says():
    params = {"w": jnp.arange(1.0, 101.0).reshape(10, 10)}
    for schedule in (
        optax.linear_schedule(0.0, 0.9, 18),
        optax.polynomial_schedule(0.0, 0.9, 3, 18),
        jaxsparse.sigmoid_sparsity(0.9, 18, 4, begin=2, normalised=True),
    ):
        assert float(schedule(18)) == float(jnp.float32(0.9))
        tx = jaxsparse.magnitude_pruning(schedule, begin=2, every=2, scope="global")
        update, opt_state, trained = jax.jit(tx.update), tx.init(params), params
        for _ in range(20):
            updates, opt_state = update(jax.tree.map(jnp.zeros_like, params), opt_state, trained)
            trained = optax.apply_updates(trained, updates)
        assert int((trained["w"] != 0).sum()) == 10


def test_the_prune_rate_ends_at_its_last_value_exactly():
    for init, end in ((0.5, 0.005), (0.3, 0.7), (0.1, 0.9)):
        for steps in (1, 3, 7, 100):
            schedule = jaxsparse.cosine_prune_rate(init, steps, end)
            assert float(schedule(steps)) == float(schedule(steps + 5)) == float(jnp.float32(end))


def test_methods_call_their_schedules_with_an_int32_step():
    params, seen = {"w": jnp.arange(1.0, 17.0).reshape(4, 4)}, []
    table = jnp.array([0.0, 0.3, 0.6, 0.9])

    def schedule(step):
        seen.append(step.dtype)
        return jax.lax.switch(step, [lambda: table[step], lambda: jnp.take(table, step), lambda: table[step >> 1]])

    for tx in (
        jaxsparse.asni(schedule, 1),
        jaxsparse.magnitude_pruning(schedule, every=1),
        jaxsparse.asni(schedule, 1, structure=jaxsparse.block(2, 2)),
        jaxsparse.sparse_momentum(0.5, 1, prune_rate=schedule, decay=0.9),
        jaxsparse.reweighted_l1(schedule, l1=schedule, averaging=schedule),
        jaxsparse.velocity(schedule),
    ):
        before = len(seen)
        jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
        assert len(seen) > before
    assert set(seen) == {jnp.dtype("int32")}
    assert jaxsparse.asni_counts(lambda step: table[step], 100, 1, 3) == [70, 40, 11]  # floored, as published


def test_a_sigmoid_that_does_not_rise_cannot_be_normalised():
    with pytest.raises(ValueError, match="step 500000 does not rise from step 0 to 1000, so it cannot be normalised"):
        jaxsparse.sigmoid_sparsity(0.9, 1000, 10, 500, normalised=True)
