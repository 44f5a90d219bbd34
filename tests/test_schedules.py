import math

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
