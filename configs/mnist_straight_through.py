"""LeNet-300-100 or LeNet-5 on MNIST with straight-through top-k: the network computes with 5% of the weights.

Wortsman et al., *Discovering Neural Wirings*, 2019 (arXiv:1906.00586), on the recipe of sparse momentum's MNIST
experiments, so that both can be compared: 5% of every layer from the first step on, chosen anew at every step. The
paper has no MNIST experiments.

  python -m experiments.train --config=configs/mnist_straight_through.py --config.data_dir=DIR --workdir=/tmp/mnist
  python -m experiments.train --config=configs/mnist_straight_through.py:lenet5_caffe ...

DIR is where TensorFlow Datasets has MNIST as array_record.
"""

from ml_collections import ConfigDict

from configs import common

EXPERIMENTS = ("lenet_300_100", "lenet5_caffe")


def get_config(model: str = "lenet_300_100") -> ConfigDict:
    """The configuration, for the model "lenet_300_100" or "lenet5_caffe"."""
    config = common.mnist(common.sparse_momentum(), model)
    config.method = ConfigDict({
        "name": "straight_through",
        "sparsity": 0.95,  # or a schedule, {"name": ...}
        "scope": "layer",  # or "global"
        "allocation": "uniform",  # or "erdos_renyi", "erdos_renyi_kernel"
        "every": 1,
        "structure": "weight",
    })  # fmt: skip
    if model == "lenet5_caffe":
        config.clip_norm = 1.0
    return config
