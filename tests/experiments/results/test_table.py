import math
import subprocess
import sys

import pytest

from experiments.results import table


def test_numbers_with_their_errors():
    assert table.mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    assert table.mean_and_error([1.0]) == (1.0, None)
    assert table.with_error(1.234, 0.0456) == "1.23 ± 0.046"
    assert table.with_error(1.234, None, "+.1f") == table.with_error(1.234, math.nan, "+.1f") == "+1.2"
    assert table.with_error(math.nan, math.nan) == ""
    assert table.numbers([0.5, math.nan], ".0%") == ["50%", ""]
    assert [table.number(value, ".0%") for value in (0.5, None, math.inf)] == ["50%", "", "inf"]


def test_columns_without_any_text_are_left_out():
    shown = table.as_table({"run": ["a", "b"], "data": "", "kept": ["1", ""]}, left=("run", "data"))
    assert shown == (("run", "kept"), (("a", "1"), ("b", "")), (), (0,))
    assert table.as_table({"run": [], "kept": []}, left=("run",)).rows == ()


@pytest.mark.slow
def test_training_does_without_pandas_and_jinja():
    command = "import sys, experiments.train; print(sorted({'pandas', 'jinja2'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
