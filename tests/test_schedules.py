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


def test_linear():
    schedule = jaxsparse.linear_prune_rate(0.5, 100)
    assert [float(schedule(t)) for t in (0, 25, 100, 200)] == [0.5, 0.375, 0.0, 0.0]


@pytest.mark.parametrize("make", [jaxsparse.cosine_prune_rate, jaxsparse.linear_prune_rate])
@pytest.mark.parametrize(
    ("args", "message"),
    [((1.5, 10), "init_value is a prune rate"), ((0.5, 0), "steps must be"), ((0.5, 10, -1), "end_value is a prune")],
)
def test_bad_input(make, args, message):
    with pytest.raises(ValueError, match=message):
        make(*args)


# --- Dual averaging ---------------------------------------------------------------------------------------------------


def test_rda_cosine_is_the_authors_formula_counted_from_1():
    step_size, averaging = jaxsparse.rda_cosine(0.25, 234_600)
    for it in (1, 2, 1000, 117_300, 234_000, 234_599, 234_600):
        cosine = math.cos(math.pi * it / 234_600)
        assert float(step_size(it - 1)) == pytest.approx(0.25 * (1 + cosine) / 2, rel=2e-4, abs=1e-14)
        assert float(averaging(it - 1)) == pytest.approx((1 - cosine) / 2, rel=1e-5)
    assert float(step_size(10**6)) == pytest.approx(0, abs=1e-12)
    assert float(averaging(10**6)) == 1


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
    # Stages, magnitude, scale, and the values in % at some stages.
    for stages, magnitude, scale, values in (
        (160, 0.99, 16, {0: 0.66, 80: 49.5, 158: 98.25, 159: 98.29}),
        (20, 0.985, 2, {0: 0.66, 10: 49.25, 18: 96.73, 19: 97.42}),
        (90, 0.814, 10, {0: 0.89, 88: 80.31, 89: 80.41}),
        (50, 0.98, 5, {48: 97.02, 49: 97.20}),
    ):
        schedule = jaxsparse.sigmoid_sparsity(magnitude, stages, scale)
        for stage, percent in values.items():
            assert 100 * float(schedule(stage)) == pytest.approx(percent, abs=0.0051)


@pytest.mark.parametrize("stages", [1, 2, 7, 50, 159])
@pytest.mark.parametrize("scale", [0.5, 4.0, 16.0])
def test_normalised_sigmoid_ends_at_its_magnitude_exactly(stages, scale):
    schedule = jaxsparse.sigmoid_sparsity(0.8, stages, scale, normalised=True)
    values = [float(schedule(t)) for t in range(-1, max(stages - 1, 1))]  # nothing is pruned after the last stage
    assert values[0] == 0
    assert values[-1] == float(jnp.float32(0.8))
    assert values == sorted(values)
    assert float(schedule(stages + 100)) == values[-1]


def test_the_other_sparsities():
    cubic = jaxsparse.cubic_sparsity(0.9, 100, init_value=0.1, start=10)
    assert [float(cubic(t)) for t in (0, 10)] == pytest.approx([0.1, 0.1])
    assert float(cubic(60)) == pytest.approx(0.9 - 0.8 * 0.5**3)
    assert [float(cubic(t)) for t in (110, 1000)] == pytest.approx([0.9, 0.9])
    linear = jaxsparse.linear_sparsity(0.8, 5, init_value=0.4)
    assert [float(linear(t)) for t in range(5)] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.8])
    assert float(jaxsparse.constant_sparsity(0.3)(5)) == pytest.approx(0.3)


def test_two_phases_are_the_authors_general_form():
    n, k = 30, 12
    schedule = jaxsparse.two_phase_sparsity(
        jaxsparse.sigmoid_sparsity(0.6, k, 1.5, 0.4), jaxsparse.sigmoid_sparsity(0.3, n - k, 2.0, 0.6), boundary=k
    )

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    first = [0.6 * sigmoid((t - 0.4 * k) / 1.5) for t in range(k)]
    second = [first[-1] + 0.3 * sigmoid((t - k - 0.6 * (n - k)) / 2.0) for t in range(k, n)]
    assert [float(schedule(t)) for t in range(n)] == pytest.approx(first + second, rel=1e-5)
    assert float(jax.jit(schedule)(20)) == pytest.approx(second[8], rel=1e-5)


@pytest.mark.parametrize(
    ("make", "args", "message"),
    [
        (jaxsparse.sigmoid_sparsity, (1.2, 10, 1.0), "magnitude is a sparsity, a fraction of zeros"),
        (jaxsparse.sigmoid_sparsity, (0.9, 0, 1.0), "stages must be at least 1, got 0"),
        (jaxsparse.sigmoid_sparsity, (0.9, 10, 0.0), "scale is a number of stages and must be above 0, got 0.0"),
        (jaxsparse.cubic_sparsity, (-0.1, 10), "final_value is a sparsity"),
        (jaxsparse.linear_sparsity, (0.9, -1), "stages must be"),
        (jaxsparse.constant_sparsity, (90,), "value is a sparsity, a fraction of zeros, and must be in .0, 1., got 90"),
        (jaxsparse.two_phase_sparsity, (lambda t: t, lambda t: t, 0), "boundary is a stage and must be at least 1"),
    ],
)
def test_bad_sparsities(make, args, message):
    with pytest.raises(ValueError, match=message):
        make(*args)


def test_so_many_stages_of_training_end_where_the_schedule_says():
    params = {"w": jnp.arange(1.0, 101.0).reshape(10, 10)}
    for schedule in (
        jaxsparse.linear_sparsity(0.9, stages=10),
        jaxsparse.linear_sparsity(0.9, stages=10, init_value=0.3),
        jaxsparse.sigmoid_sparsity(0.9, 10, 2, normalised=True),
        jaxsparse.cubic_sparsity(0.9, 8),
    ):
        left = jaxsparse.asni_counts(schedule, 100_000, 9, exact=True)
        assert left[-2] > left[-1] == 10_000
        assert float(schedule(8)) == float(jnp.float32(0.9))
    tx = jaxsparse.asni(jaxsparse.linear_sparsity(0.9, stages=10), 2, exact=True)
    update, opt_state = jax.jit(tx.update), tx.init(params)
    for _ in range(20):
        updates, opt_state = update(jax.tree.map(jnp.zeros_like, params), opt_state, params)
        params = optax.apply_updates(params, updates)
    assert int((params["w"] != 0).sum()) == 10


def test_schedules_end_at_their_last_value_exactly():
    for init, end in ((0.5, 0.005), (0.3, 0.7), (0.1, 0.9)):
        for steps in (1, 3, 7, 100):
            for schedule, last in (
                (jaxsparse.cosine_prune_rate(init, steps, end), steps),
                (jaxsparse.linear_prune_rate(init, steps, end), steps),
                (jaxsparse.cubic_sparsity(end, steps, init_value=init), steps),
                (jaxsparse.linear_sparsity(end, steps, init_value=init), steps),
            ):
                assert float(schedule(last)) == float(schedule(last + 5)) == float(jnp.float32(end))


def test_methods_call_their_schedules_with_an_int32_step():
    params, seen = {"w": jnp.arange(1.0, 17.0).reshape(4, 4)}, []
    table = jnp.array([0.0, 0.3, 0.6, 0.9])

    def schedule(step):
        seen.append(step.dtype)
        return jax.lax.switch(step, [lambda: table[step], lambda: jnp.take(table, step), lambda: table[step >> 1]])

    for tx in (
        jaxsparse.asni(schedule, 1),
        jaxsparse.asni(schedule, 1, exact=True),
        jaxsparse.asni(schedule, 1, structure=jaxsparse.block(2, 2)),
        jaxsparse.sparse_momentum(0.5, 1, prune_rate=schedule, decay=0.9),
        jaxsparse.reweighted_l1(schedule, l1=schedule, averaging=schedule),
        jaxsparse.velocity(schedule),
    ):
        before = len(seen)
        jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
        assert len(seen) > before
    assert set(seen) == {jnp.dtype("int32")}
    assert jaxsparse.asni_counts(lambda stage: table[stage], 100, 4, exact=True) == [100, 70, 40, 10]
