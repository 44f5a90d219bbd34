import pytest

from benchmarks import same_metrics


def test_runs_are_named_by_config_and_argument():
    assert same_metrics.chosen(["mnist_rda:lenet5_caffe"]) == ["mnist_rda:lenet5_caffe"]
    assert same_metrics.chosen(["mnist_mlp", "asni_stages"]) == ["mnist_mlp:blocks", "mnist_mlp:weights", "asni_stages"]
    everything = same_metrics.chosen([])
    assert "digits_sparse_momentum" in everything
    assert not any("common" in run for run in everything)
    with pytest.raises(ValueError, match="no such config: mnist_rad; there are cifar10_resnet8:sparse_momentum, "):
        same_metrics.chosen(["mnist_rda", "mnist_rad"])


def test_numbers_that_differ_are_named():
    old = {"step 1: density": 0.1, "step 1: train_loss": 2.0, "step 2: test_loss": float("nan")}
    assert same_metrics.differing(old, old) == ["step 2: test_loss: nan and nan"]  # a run that diverges shows nothing
    new = {"step 1: density": 0.1, "step 1: train_loss": 2.000001, "step 1: flips": 3}
    assert same_metrics.differing(old, new) == [
        "step 1: train_loss: 2.0 and 2.000001",
        "step 2: test_loss: nan and not there",
        "step 1: flips: not there and 3",
    ]


def test_with_gates_a_millionth_is_allowed():
    old = {"step 1: expected_params": 0.5, "step 1: train_loss": 2.0}
    assert not same_metrics.differing(old, old | {"step 1: train_loss": 2.000001})
    assert same_metrics.differing(old, old | {"step 1: train_loss": 2.00001})


def test_metrics_are_flat_numbers():
    assert dict(same_metrics.flat({"a": {"b/c": 1}, "d": 2.5})) == {"a/b/c": 1, "d": 2.5}
