"""Two versions of the library side by side."""

import subprocess

import pytest

from benchmarks import against
from benchmarks.processes import ROOT

pytestmark = pytest.mark.skipif(
    subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True).returncode != 0, reason="no git here"
)


def test_a_verdict_allows_two_percent_or_the_spread_of_old_beside_old():
    def judged(new, again):
        return against.judge({"old": [1.0] * 4, "new": [new] * 4, "old again": again})

    quiet, noisy = [0.99, 1.0, 1.0, 1.01], [0.8, 0.9, 1.1, 1.2]
    assert judged(1.02, quiet) == (1.02, pytest.approx((0.9925, 1.0075)), "ok")
    assert judged(1.03, quiet)[-1] == against.SLOWER
    assert judged(1.03, noisy)[-1] == "ok"
    assert judged(1.3, noisy)[-1] == against.SLOWER


def test_the_library_of_a_commit():
    with against.library_of("HEAD") as folder:
        assert (folder / "jaxsparse/__init__.py").exists()
        assert not (folder / "benchmarks").exists()
    assert not folder.exists()
    with (
        pytest.raises(ValueError, match="a commit that git knows here, got 'nonsense'"),
        against.library_of("nonsense"),
    ):
        pass


@pytest.mark.slow
def test_versions_are_timed_in_turn_and_what_one_lacks_is_said():
    cases = {"density": 4, "a method that is not there": 4}
    rows = list(against.compare("HEAD", "tests.benchmarks.double", cases))
    assert rows[0][0] == "density"
    assert float(rows[0][3]) > 0
    assert rows[0][-1] in ("ok", against.SLOWER)
    assert "old: AttributeError: module 'jaxsparse' has no attribute 'x'; new: " in rows[1][-1]
