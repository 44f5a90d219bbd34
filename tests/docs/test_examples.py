"""The examples of the documentation run as they are, and are as short as they say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.mark.slow
def test_a_transformer_of_flax_nnx(tmp_path):
    script = EXAMPLES / "nnx_transformer.py"
    assert sum(bool(line.strip()) for line in script.read_text().splitlines()) < 40
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    dense, small, loaded = done.stdout.splitlines()
    losses = [float(re.search(r"loss ([\d.]+)", line)[1]) for line in (dense, small, loaded)]
    weights = [int(re.search(r"([\d,]+) weights", line)[1].replace(",", "")) for line in (dense, small)]
    assert max(losses) < 3.0  # nats a byte; ln(256) is 5.5
    assert losses[1] < losses[0] + 0.6  # trained on for half as many epochs
    assert abs(losses[2] - losses[1]) < 0.02  # bfloat16
    assert weights[1] < 0.5 * weights[0]
    assert int(re.search(r"([\d,]+) bytes", loaded)[1].replace(",", "")) < 4 * weights[1]
