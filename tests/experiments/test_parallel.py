"""Every method does the same in every layout of the devices, and in several processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.experiments import parallel_runs

ROOT = Path(__file__).parents[2]
LAYOUTS = ("pmap", "data", "fsdp")
IN_PROCESSES = ("fsdp", "pmap")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_processes(command, processes=2, devices=4, **options):
    """The same command in several processes of so many devices each; "COORDINATOR", "PROCESSES", "PROCESS" in it."""
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    words = {"COORDINATOR": f"127.0.0.1:{free_port()}", "PROCESSES": str(processes)}
    started = []
    for process in range(processes):
        mine = words | {"PROCESS": str(process)}
        arguments = [sys.executable]
        for word in command:
            for name, value in mine.items():
                word = word.replace(f"<{name}>", value)
            arguments.append(word)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(arguments, cwd=ROOT, env=environment, **pipes, **options))
    return started


@pytest.fixture(scope="module")
def masks_file(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("masks") / "model.safetensors")
    parallel_runs.write_masks(path)
    return path


@pytest.fixture(scope="module")
def alone(masks_file):
    return {method: parallel_runs.run("one_device", method, masks_file) for method in parallel_runs.METHODS}


@pytest.fixture(scope="module")
def in_processes(tmp_path_factory):
    out = tmp_path_factory.mktemp("processes") / "out"
    program = "tests.experiments.parallel_runs"
    command = ["-m", program, str(out), "<COORDINATOR>", "<PROCESSES>", "<PROCESS>", *IN_PROCESSES]
    for run in start_processes(command):
        output, _ = run.communicate(timeout=600)
        assert run.returncode == 0, output
    return out


def compare(result, alone, method):
    assert set(result) == set(alone)
    for name, expected in alone.items():
        if name.startswith("masks/"):
            np.testing.assert_array_equal(result[name], expected, err_msg=name)
        else:
            np.testing.assert_allclose(result[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)
    masks = [mask for name, mask in alone.items() if name.startswith("masks/") and mask.ndim]
    # Something was pruned, and something not; free gates move alike in so few steps, and close all at once.
    assert method == "l0" or 0 < sum(int(mask.sum()) for mask in masks) < sum(mask.size for mask in masks)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", parallel_runs.METHODS)
def test_a_run_is_the_same_in_every_layout(layout, method, alone, masks_file):
    compare(parallel_runs.run(layout, method, masks_file), alone[method], method)


@pytest.mark.parametrize("layout", IN_PROCESSES)
@pytest.mark.parametrize("method", parallel_runs.METHODS)
def test_a_run_is_the_same_in_two_processes(layout, method, alone, in_processes):
    with np.load(f"{in_processes}_{layout}.npz") as results:
        prefix = f"{method}/"
        result = {name.removeprefix(prefix): results[name] for name in results if name.startswith(prefix)}
    compare(result, alone[method], method)


@pytest.fixture(scope="module")
def masks_alone():
    return parallel_runs.update_masks("one_device")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mask_update_is_bit_equal_in_every_layout(layout, masks_alone):
    masks = parallel_runs.update_masks(layout)
    assert masks.keys() == masks_alone.keys()
    jax.tree.map(np.testing.assert_array_equal, masks, masks_alone)


@pytest.mark.parametrize("layout", IN_PROCESSES)
def test_a_mask_update_is_bit_equal_in_two_processes(layout, masks_alone, in_processes):
    with np.load(f"{in_processes}_{layout}_masks.npz") as masks:
        assert set(masks) == set(masks_alone)
        for name, expected in masks_alone.items():
            np.testing.assert_array_equal(masks[name], expected, err_msg=name)
