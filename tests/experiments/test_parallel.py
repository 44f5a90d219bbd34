"""Every method does the same in every layout of the devices, and in several processes."""

import jax
import numpy as np
import pytest

from tests.experiments import parallel_runs, processes

LAYOUTS = ("pmap", "data", "fsdp")
IN_PROCESSES = ("sparse_momentum", "rda", "dep_l0")  # the others take the same ways: with -m long


@pytest.fixture(scope="module")
def masks_file(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("masks") / "model.safetensors")
    parallel_runs.write_masks(path)
    return path


@pytest.fixture(scope="module")
def alone(masks_file):
    return {method: parallel_runs.run("one_device", method, masks_file) for method in parallel_runs.METHODS}


def run_in_processes(folder, layout, methods):
    out = folder / f"{layout}.npz"
    command = ["-m", "tests.experiments.parallel_runs", str(out), "<COORDINATOR>", "<PROCESSES>", "<PROCESS>", layout]
    outputs, codes = processes.ends(processes.start([*command, *methods]), timeout=1500)
    assert codes == [0, 0], outputs
    with np.load(out) as results:
        return dict(results)


@pytest.fixture(scope="module")
def in_processes(tmp_path_factory):
    return run_in_processes(tmp_path_factory.mktemp("processes"), "fsdp", IN_PROCESSES)


def under(results, prefix):
    return {name.removeprefix(prefix): leaf for name, leaf in results.items() if name.startswith(prefix)}


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


@pytest.mark.parametrize("method", IN_PROCESSES)
def test_a_run_is_the_same_in_two_processes(method, alone, in_processes):
    compare(under(in_processes, f"{method}/"), alone[method], method)


@pytest.fixture(scope="module")
def masks_alone():
    return parallel_runs.update_masks("one_device")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mask_update_is_bit_equal_in_every_layout(layout, masks_alone):
    masks = parallel_runs.update_masks(layout)
    assert masks.keys() == masks_alone.keys()
    jax.tree.map(np.testing.assert_array_equal, masks, masks_alone)


def test_a_mask_update_is_bit_equal_in_two_processes(masks_alone, in_processes):
    masks = under(in_processes, "update_masks/")
    assert masks.keys() == masks_alone.keys()
    jax.tree.map(np.testing.assert_array_equal, masks, masks_alone)


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_method_is_the_same_in_two_processes_in_every_layout(layout, alone, masks_alone, tmp_path):
    results = run_in_processes(tmp_path, layout, parallel_runs.METHODS)
    for method in parallel_runs.METHODS:
        compare(under(results, f"{method}/"), alone[method], method)
    jax.tree.map(np.testing.assert_array_equal, under(results, "update_masks/"), masks_alone)
