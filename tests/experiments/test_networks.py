"""The weights that networks start with."""

import jax
import numpy as np
import pytest

import jaxsparse
from experiments import train
from experiments.networks import he_normal, positions
from jaxsparse import models
from tests.experiments.test_train import smoke_config


def test_positions_are_those_of_the_model_as_it_is_written():
    expected = {"conv1/kernel": 24 * 24, "conv2/kernel": 8 * 8, "fc1/kernel": 1, "fc2/kernel": 1}
    for implementation in (None, "slices", "xla"):
        assert positions(models.LeNet5Caffe(implementation=implementation), (28, 28, 1)) == expected
    assert set(positions(models.LeNet300100(), (28, 28, 1)).values()) == {1}


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
        ({"masks_from": "MISSING"}, "No such file"),
        ({"masks_from": "MODEL", "start": "zeros"}, "config.start is one of 'centroids'"),
        (
            {"masks_from": "MODEL", "model.name": "conv_2"},
            "does not fit config.model: conv1/bias is not there in the file and .64,. in the model",
        ),
        ({"masks_from": "MODEL", "init": "zeros"}, "config.init is one of 'model', 'he_normal', got 'zeros'"),
    ],
)
def test_a_bad_start_fails_before_the_workdir_is_made(tmp_path, changes, message):
    params = models.LeNet300100().init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))["params"]
    masks = jaxsparse.magnitude_masks(params, 0.9)
    model = tmp_path / "model.safetensors"
    jaxsparse.save_sparse(model, jaxsparse.apply_masks(params, masks), masks)
    config = smoke_config()
    config.update_from_flattened_dict({k: value.replace("MODEL", str(model)) for k, value in changes.items()})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
