"""Every method does the same in every layout of the devices, and in several processes."""

import functools

import jax
import numpy as np
import pytest

from tests.experiments import parallel_runs, processes

slow, long = pytest.mark.slow, pytest.mark.long
LAYOUTS = ("pmap", "data", "fsdp")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a method in a layout, once."""
    masks_file = tmp_path_factory.mktemp("masks") / "model.safetensors"

    @functools.cache
    def run(layout, method):
        if method == "mask_updates" and not masks_file.exists():
            parallel_runs.write_masks(str(masks_file))
        return parallel_runs.run(layout, method, str(masks_file))

    return run


def run_in_processes(folder, layout, methods):
    out = folder / f"{layout}.npz"
    command = ["-m", "tests.experiments.parallel_runs", str(out), "<COORDINATOR>", "<PROCESSES>", "<PROCESS>", layout]
    outputs, codes = processes.ends(processes.start([*command, *methods]), timeout=1500)
    assert codes == [0, 0], outputs
    with np.load(out) as results:
        return dict(results)


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


@pytest.mark.slow
def test_a_run_is_the_same_in_two_processes(run, tmp_path):
    """One method, in the layout that does most, to the end of the run."""
    found = under(run_in_processes(tmp_path, "fsdp", ["sparse_momentum"]), "sparse_momentum/")
    compare(found, run("one_device", "sparse_momentum"), "sparse_momentum")


@slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", parallel_runs.METHODS)
def test_a_run_is_the_same_in_every_layout(layout, method, run):
    compare(run(layout, method), run("one_device", method), method)


@pytest.fixture(scope="module")
def masks_alone():
    return parallel_runs.update_masks("one_device")


@slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mask_update_is_bit_equal_in_every_layout(layout, masks_alone):
    masks = parallel_runs.update_masks(layout)
    assert masks.keys() == masks_alone.keys()
    jax.tree.map(np.testing.assert_array_equal, masks, masks_alone)


@pytest.mark.parametrize(
    "layout",
    [pytest.param("pmap", marks=long), pytest.param("data", marks=long), pytest.param("fsdp", marks=slow)],
)
def test_every_method_is_the_same_in_two_processes(layout, run, masks_alone, tmp_path):
    results = run_in_processes(tmp_path, layout, [*parallel_runs.METHODS, "update_masks"])
    for method in parallel_runs.METHODS:
        compare(under(results, f"{method}/"), run("one_device", method), method)
    masks = under(results, "update_masks/")
    assert masks.keys() == masks_alone.keys()
    jax.tree.map(np.testing.assert_array_equal, masks, masks_alone)
