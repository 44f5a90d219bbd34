import json

import pytest

from experiments import data, footprint, options, train
from tests.experiments.test_configs import config_of, random_images


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Trains a config made small for a few steps on noise, and returns its result."""
    monkeypatch.setattr(data, "load", lambda name, data_dir, *, examples, **_: random_images(config, examples))

    def trained(name, argument, **changes):
        nonlocal config
        config = options.small(config_of(name, argument)).unlock()
        config.update_from_flattened_dict({"epochs": 2, "data.examples": 128, "log_every_steps": 3, **changes})
        config.eval_every_epochs = 2
        return train.train(config, tmp_path)[1][0]

    config = None
    return trained


@pytest.mark.slow
def test_of_masks(run, tmp_path, capsys):
    result = run("cifar10_resnet8", "magnitude_pruning", **{"method.end_epochs": 2})
    footprint.main([str(tmp_path)])
    found = json.loads((tmp_path / "footprint.json").read_text())
    assert found["test_accuracy_float32"] == pytest.approx(result["test_accuracy"], abs=1.5 / 128)  # folded is rounded
    assert 0 < found["multiply_adds"] < 0.5
    assert found["bytes_int8"] < found["bytes_float32"] < 12_000
    assert f"int8: {found['bytes_int8']:,} bytes, test accuracy" in capsys.readouterr().out
    (tmp_path / "footprint.json").write_text('{"bytes_int8": 1}')
    assert footprint.footprint(tmp_path) == {"bytes_int8": 1}  # it is measured once


@pytest.mark.slow
@pytest.mark.parametrize(("argument", "changes"), [("dense", {}), ("l0", {"method.penalty.strength": 1.0})])
def test_without_masks(run, tmp_path, argument, changes):
    result = run("cifar10_resnet8", argument, **changes)
    found = footprint.footprint(tmp_path)
    assert found["test_accuracy_float32"] == pytest.approx(result["test_accuracy"], abs=1.5 / 128)
    assert found["multiply_adds"] == pytest.approx(result.get("multiply_adds", 1), abs=1e-3)
    assert found["bytes_int8"] < 0.6 * found["bytes_float32"]


@pytest.mark.slow
def test_what_it_is_not_for(run, tmp_path):
    with pytest.raises(SystemExit, match="has no result.json"):
        footprint.main([str(tmp_path)])
    run("mnist_rigl", "lenet_300_100", **{"method.stop_at_epochs": 2, "method.update_every": 2})
    with pytest.raises(SystemExit, match="LeNet300100 has no batch normalisation to fold"):
        footprint.main([str(tmp_path)])
