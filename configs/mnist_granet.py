"""LeNet-300-100 or LeNet-5 on MNIST with GraNet, 5% of the weights kept.

Liu et al., *Sparse Training via Boosting Pruning Plasticity with Neuroregeneration*, 2021 (arXiv:2106.10404), on the
recipe of sparse momentum's MNIST experiments, so that both can be compared. The options are those of the authors'
experiments on CIFAR: masks change every two epochs, which are 1080 steps (they have 1000), half of the weights are kept
at the start (``--config.method.initial_sparsity=0.0``: all, "dense to sparse"), and the sparsity rises in the first
11/16 of training. The paper has no MNIST experiments.

  python -m experiments.train --config=configs/mnist_granet.py --config.data_dir=DIR --workdir=/tmp/mnist
  python -m experiments.train --config=configs/mnist_granet.py:lenet5_caffe ...

DIR is where TensorFlow Datasets has MNIST as array_record.
"""

from ml_collections import ConfigDict

from configs import common

EXPERIMENTS = ("lenet_300_100", "lenet5_caffe")


def get_config(model: str = "lenet_300_100") -> ConfigDict:
    """The configuration, for the model "lenet_300_100" or "lenet5_caffe"."""
    config = common.mnist(common.sparse_momentum(), model)
    config.method = ConfigDict({
        "name": "granet",
        "sparsity": 0.95,
        "initial_sparsity": 0.5,
        "update_every_epochs": 2,
        "steps_epochs": common.ALL_EPOCHS,
        "drop_fraction": 0.5,
        "allocation": "erdos_renyi_kernel",  # or "erdos_renyi", "uniform"
        "structure": "weight",
    })  # fmt: skip
    config.smoke_overrides.method = ConfigDict({"update_every_epochs": 1})
    if model == "lenet5_caffe":
        config.clip_norm = 1.0
    return config
