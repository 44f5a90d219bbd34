"""What waits for a GPU, in its smallest form on a CPU."""

import time

import pytest

from benchmarks import gpt, gpu
from jaxsparse import kernels


def measured(rows, answers, until=None):
    """The last cells of the rows by name, when they answer so."""
    shown = {}

    def ask(row, seconds):
        assert seconds > 0
        return answers[row.name]

    def show(cells, name):
        shown.update({name: others[-1] for name, others in cells.items()})

    gpu.measure_all(rows, time.monotonic() + 60 if until is None else until, ask, show)
    return shown


def test_what_is_wrong_or_hangs_is_not_timed_and_what_fails_is_said():
    def row(kind, name, implementation, needs=None):
        return gpu.Row(kind, name, {"implementation": implementation}, needs)

    rows = [
        row("check", "right? a", "kernel"),
        row("check", "right? b", "kernel"),
        row("check", "right? c", "hanging"),
        row("product", "a", "kernel", "right? a"),
        row("product", "b", "kernel", "right? b"),
        row("product", "c", "hanging"),
        row("step", "d", None),
    ]
    answers = {
        "right? a": {"cells": ["", "", "", "right"], "wrong": False},
        "right? b": {"cells": ["", "", "", "WRONG, largest difference 3 (forward, 10% alive)"], "wrong": True},
        "right? c": {"error": "TimeoutError: no answer in 90 s", "lost": True},
        "a": {"cells": ["1.0", "0.5", "2.0", "beside"]},
        "d": {"error": "XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory"},
    }
    assert measured(rows, answers) == {
        **{name: answer["cells"][-1] for name, answer in answers.items() if "cells" in answer},
        "right? c": "TimeoutError: no answer in 90 s",
        "b": "left out: b is not right",
        "c": "left out: hanging gave no answer",
        "d": "XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory",
    }
    assert set(measured(rows, {}, until=time.monotonic()).values()) == {gpu.NOT_REACHED}


def test_a_wrong_kernel_is_found(monkeypatch):
    options = {"implementation": "xla_blocks", "dtype": "bfloat16", "block": (64, 64), "smallest": True}
    right = gpu.check(**options)
    assert not right["wrong"]
    assert right["cells"][-1].startswith("right, but for rounding")
    product = kernels.block_sparse_matmul
    monkeypatch.setattr(kernels, "block_sparse_matmul", lambda *args, **options: 1.01 * product(*args, **options))
    wrong = gpu.check(**options)
    assert wrong["wrong"]
    assert wrong["cells"][-1].startswith("WRONG, largest difference ")


def test_rows_of_a_gpu_and_of_a_cpu_have_names_of_their_own_and_checks_that_are_there():
    for platform, smallest in (("gpu", False), ("gpu", True), ("cpu", True)):
        rows = gpu.rows_for(platform, smallest)
        names = [row.name for row in rows]
        assert len(set(names)) == len(names)
        assert {row.needs for row in rows if row.needs} <= set(names)
        assert {row.kind for row in rows} == set(gpu.KINDS)
        assert set(gpu.GPT_LINKS) == set(gpt.LINKS)


@pytest.mark.parametrize("name", ["64, 10% alive, forward", "64, 10% alive, and gradients"])
def test_a_product_is_timed(name):
    row = next(row for row in gpu.rows_for("cpu", True) if row.name.endswith(name))
    *times, beside = gpu.answer({"kind": row.kind, "options": row.options})["cells"]
    assert all(float(cell) > 0 for cell in times)
    assert beside.startswith("masked copy ")


def test_a_table_that_nothing_was_reached_of(tmp_path):
    gpu.main(["--minutes", "0", "--only", "VGG16", "--output", str(tmp_path / "table.md")])
    text = (tmp_path / "table.md").read_text()
    assert "| VGG16 without half of its channels, evaluation |  |  |  | not reached |" in text
    assert "; jax 0." in text


@pytest.mark.long
def test_every_kind_of_row_runs(tmp_path, monkeypatch):
    """But for four of the five methods with which ResNet-50 is trained: a minute of compiling each."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "True")
    monkeypatch.setattr(gpu, "EXPERIMENTS", gpu.EXPERIMENTS[:1])
    gpu.main(["--minutes", "60", "--output", str(tmp_path / "table.md")])
    table = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:]]
    assert len(cells) == len(gpu.rows_for("cpu", True))
    for name, *times, beside in cells:
        if name.startswith("right?"):
            assert beside.startswith("right, but for rounding"), beside
        else:
            assert all(float(cell) > 0 for cell in times), (name, beside)
