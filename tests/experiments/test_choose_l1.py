"""What reweighted_l1 leaves follows from l1 times the sum of the step sizes, as the documentation says."""

import pytest

from experiments import choose_l1
from experiments.choose_l1 import Setting


@pytest.mark.slow
def test_the_l1_that_the_documentation_recommends_prunes():
    setting = Setting("Adam", 1e-3, 10)
    dense, recommended = choose_l1.measure(setting, (0.0, 0.03), seeds=1)
    assert dense.kept == [100]
    assert recommended.l1 == pytest.approx(0.03 / (1e-3 * 440))
    assert 15 < recommended.kept[0] < 35
    assert recommended.accuracy[0] > 93
    text = choose_l1.as_markdown({setting: [dense, recommended]}, (0.0, 0.03), 1, "command")
    assert "| **Adam, 0.001, 10 epochs**: l1 | 0 | 6.8e-02 |\n| weights kept (%) | 100.0 | " in text


def test_what_it_does_not_take_is_said_at_once(capsys):
    for argument, message in (
        ("--seeds=0", "--seeds is at least 1, got 0"),
        ("--only=LAMB", "--only=LAMB: there are "),
    ):
        with pytest.raises(SystemExit):
            choose_l1.main([argument])
        assert message in capsys.readouterr().err
