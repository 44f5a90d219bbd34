"""LeNet-300-100 or LeNet-5 on MNIST with RigL, 5% of the weights kept.

Evci et al., *Rigging the Lottery: Making All Tickets Winners*, 2020 (arXiv:1911.11134), on the recipe of sparse
momentum's MNIST experiments, so that both can be compared. Masks change every 100 steps in the first three quarters of
training, by the drop fraction of the paper.

  python -m experiments.train --config=configs/mnist_rigl.py --config.data_dir=DIR --workdir=/tmp/mnist
  python -m experiments.train --config=configs/mnist_rigl.py:lenet5_caffe ...

DIR is where TensorFlow Datasets has MNIST as array_record.
"""

from ml_collections import ConfigDict

from configs import common

EXPERIMENTS = ("lenet_300_100", "lenet5_caffe")


def get_config(model: str = "lenet_300_100") -> ConfigDict:
    """The configuration, for the model "lenet_300_100" or "lenet5_caffe"."""
    config = common.mnist(common.sparse_momentum(), model)
    config.method = ConfigDict({
        "name": "rigl",
        "sparsity": 0.95,
        "update_every": 100,
        "stop_at_epochs": 75,
        "drop_fraction": 0.3,
        "allocation": "erdos_renyi_kernel",  # or "erdos_renyi", "uniform"
        "hold": False,
        "structure": "weight",
    })  # fmt: skip
    config.smoke_overrides.method = ConfigDict({"update_every": 22, "stop_at_epochs": 3})
    if model == "lenet5_caffe":
        config.clip_norm = 1.0
    return config
