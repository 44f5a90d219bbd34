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
