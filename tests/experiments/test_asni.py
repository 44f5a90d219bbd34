import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxsparse
from experiments import asni, train
from experiments.networks import he_normal
from experiments.program import make_program
from experiments.workdir import read_json
from jaxsparse.trees import by_path

ROOT = Path(__file__).parents[2]


def small_config(**changes):
    """LeNet-300-100 on digits."""
    config = train.shrink(runpy.run_path(str(ROOT / "configs/mnist_asni.py"))["get_config"]()).lock()
    changes = {"data.name": "digits", "data.mean": None, "data.std": None, "optimizer.learning_rate": 1e-3} | changes
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arms")
    return folder, asni.run(small_config(), folder, [0])


def start_of(arm, folder):
    """The config of an arm's run, and its first state."""
    config = small_config(**asni.ARMS[arm])
    if "sparsity.method" in asni.ARMS[arm]:
        config.sparsity.masks_from = str(folder / "asni_1/seed_0/sparse.safetensors")
    dataset = train.data.load("digits", None, examples=config.data.examples)
    return make_program(config, dataset).init(0)


@pytest.mark.slow
def test_one_command_trains_all_and_shows_them_side_by_side(arms):
    folder, table = arms
    assert [line.split()[0] for line in table.splitlines()[2:]] == list(asni.ARMS)
    results = {arm: read_json(folder / arm / "seed_0/result.json") for arm in asni.ARMS}
    assert results["dense"]["density"] == 1
    assert results["asni_1"]["density"] < 0.6
    assert all(results[arm]["density"] == results["asni_1"]["density"] for arm in list(asni.ARMS)[2:])
    assert all(result["test_accuracy"] > 0.6 for result in results.values())


@pytest.mark.slow
def test_what_is_finished_is_not_run_again(arms, capsys):
    folder, table = arms
    assert asni.run(small_config(), folder, [0]) == table
    assert capsys.readouterr().out.count("finished before") == 5


@pytest.mark.slow
def test_the_sparse_model_of_a_run_can_be_loaded(arms):
    folder, _ = arms
    params, masks = jaxsparse.load_sparse(folder / "asni_1/seed_0/sparse.safetensors")
    density = read_json(folder / "asni_1/seed_0/result.json")["density"]
    assert float(jaxsparse.density(masks)) == pytest.approx(density, abs=1e-6)
    assert all(
        (leaf[~mask] == 0).all() for leaf, mask in zip(*map(jax.tree.leaves, (params, masks)), strict=True) if mask.ndim
    )


@pytest.mark.slow
def test_every_arm_starts_from_what_its_name_says(arms):
    folder, _ = arms
    trained, masks = jaxsparse.load_sparse(folder / "asni_1/seed_0/sparse.safetensors")
    random = by_path(start_of("dense", folder).params)
    for arm in ("asni_2", "asni_2_biases", "original"):
        state = start_of(arm, folder)
        for path, leaf in by_path(state.params).items():
            leaf, of_trained, mask = np.asarray(leaf), by_path(trained)[path], by_path(masks)[path]
            if arm == "original":
                np.testing.assert_array_equal(leaf, np.where(mask, random[path], 0))
            elif mask.ndim or arm == "asni_2_biases":
                means = [of_trained[sign * of_trained > 0].mean() for sign in (-1, 1)]
                expected = np.where(of_trained < 0, means[0], np.where(of_trained > 0, means[1], 0))
                np.testing.assert_allclose(leaf, expected, rtol=1e-5)
            else:
                assert not leaf.any()


def test_the_published_start_is_normal_by_fan_in_with_biases_of_zero():
    params = {
        "a": {"kernel": np.zeros((3, 3, 20, 50), np.float32), "bias": np.ones(50, np.float32)},
        "scale": np.ones(5),
    }
    fresh = he_normal(params, jax.random.key(0))
    assert float(fresh["a"]["kernel"].std()) == pytest.approx((2 / 180) ** 0.5, rel=0.03)
    assert not fresh["a"]["bias"].any()
    np.testing.assert_array_equal(fresh["scale"], 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "config.sparsity.masks_from is the file of a sparse model, such as WORKDIR/sparse.safetensors"),
        ({"sparsity.masks_from": "MISSING"}, "No such file"),
        ({"sparsity.masks_from": "MODEL", "sparsity.start": "zeros"}, "config.sparsity.start is one of 'centroids'"),
        (
            {"sparsity.masks_from": "MODEL", "model.name": "conv_2"},
            "does not fit config.model: conv1/bias is not there in the file and .64,. in the model",
        ),
        ({"sparsity.masks_from": "MODEL", "init": "zeros"}, "config.init is one of 'model', 'he_normal', got 'zeros'"),
    ],
)
def test_bad_config_fails_before_the_workdir_is_made(arms, tmp_path, changes, message):
    changes = {
        key: value.replace("MODEL", str(arms[0] / "asni_1/seed_0/sparse.safetensors")) for key, value in changes.items()
    }
    config = small_config(**{"sparsity.method": "mask_updates", **changes})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "arms", "message"),
    [
        ({}, ["asni_1", "asni_3"], "--arms takes dense, asni_1, .* got asni_3"),
        (
            {},
            ["dense", "original"],
            "original starts from the masks of asni_1, of which there is no .*sparse.safetensors",
        ),
        ({"sparsity.method": "mask_updates"}, asni.ARMS, "this takes a config of ASNI-I, .* got 'mask_updates'"),
    ],
)
def test_bad_arms_and_configs_fail_before_anything_is_trained(tmp_path, changes, arms, message):
    with pytest.raises(ValueError, match=message):
        asni.run(small_config(**changes), tmp_path, [0], arms)
    assert not any(tmp_path.iterdir())
