"""LeNet-300-100 or LeNet-5 on MNIST with iterative hard thresholding, 5% of the weights kept.

Blumensath and Davies, *Iterative Hard Thresholding for Compressed Sensing*, 2009 (arXiv:0805.0510), after every step of
the recipe of sparse momentum's MNIST experiments, so that both can be compared. The sparsity rises on the cubic
schedule of gradual magnitude pruning in the first 80 of 100 epochs.

  python -m experiments.train --config=configs/mnist_iterative_hard_thresholding.py --config.data_dir=DIR \\
      --workdir=/tmp/mnist
  python -m experiments.train --config=configs/mnist_iterative_hard_thresholding.py:lenet5_caffe ...

DIR is where TensorFlow Datasets has MNIST as array_record.
"""

from ml_collections import ConfigDict

from configs import common

EXPERIMENTS = ("lenet_300_100", "lenet5_caffe")


def get_config(model: str = "lenet_300_100") -> ConfigDict:
    """The configuration, for the model "lenet_300_100" or "lenet5_caffe"."""
    config = common.mnist(common.sparse_momentum(), model)
    config.method = ConfigDict({
        "name": "iterative_hard_thresholding",
        "sparsity": {
            "name": "polynomial_schedule",  # or a number, from the first step on
            "init_value": 0.0,
            "end_value": 0.95,
            "power": 3,
            "transition_steps_epochs": 80,
        },
        "every": 1,
        "scope": "layer",  # or "global"
        "structure": "weight",
    })  # fmt: skip
    config.smoke_overrides.method = ConfigDict({"sparsity": {"transition_steps_epochs": 3}})
    if model == "lenet5_caffe":
        config.clip_norm = 1.0
    return config
