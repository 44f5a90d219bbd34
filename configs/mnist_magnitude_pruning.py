"""LeNet-300-100 or LeNet-5 on MNIST with gradual magnitude pruning, to 5% of the weights.

Zhu and Gupta, *To prune, or not to prune: exploring the efficacy of pruning for model compression*, 2017
(arXiv:1710.01878), on the recipe of sparse momentum's MNIST experiments, so that both can be compared: pruned once an
epoch, on the cubic schedule, from the second epoch to the 80th of 100. The paper has no MNIST experiments.

  python -m experiments.train --config=configs/mnist_magnitude_pruning.py --config.data_dir=DIR --workdir=/tmp/mnist
  python -m experiments.train --config=configs/mnist_magnitude_pruning.py:lenet5_caffe ...

DIR is where TensorFlow Datasets has MNIST as array_record.
"""

from ml_collections import ConfigDict

from configs import common

EXPERIMENTS = ("lenet_300_100", "lenet5_caffe")


def get_config(model: str = "lenet_300_100") -> ConfigDict:
    """The configuration, for the model "lenet_300_100" or "lenet5_caffe"."""
    config = common.mnist(common.sparse_momentum(), model)
    config.method = ConfigDict({
        "name": "magnitude_pruning",
        "sparsity": 0.95,
        "begin_epochs": 1,
        "end_epochs": 80,
        "every_epochs": 1,
        "schedule": "cubic",  # or "linear"
        "scope": "layer",  # or "global", "lamp"
        "structure": "weight",
    })  # fmt: skip
    config.smoke_overrides.method = ConfigDict({"end_epochs": 3})
    if model == "lenet5_caffe":
        config.clip_norm = 1.0
    return config
