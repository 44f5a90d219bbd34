"""LeNet-300-100 or LeNet-5 on MNIST with Top-KAST: 5% of the weights compute, 10% learn.

Jayakumar et al., *Top-KAST: Top-K Always Sparse Training*, 2020 (arXiv:2106.03517), on the recipe of sparse momentum's
MNIST experiments, so that both can be compared. The paper has no MNIST experiments, and trains without momentum:
``--config.optimizer.momentum=0 --config.optimizer.nesterov=False``.

  python -m experiments.train --config=configs/mnist_top_kast.py --config.data_dir=DIR --workdir=/tmp/mnist
  python -m experiments.train --config=configs/mnist_top_kast.py:lenet5_caffe ...

DIR is where TensorFlow Datasets has MNIST as array_record.
"""

from ml_collections import ConfigDict

from configs import common

EXPERIMENTS = ("lenet_300_100", "lenet5_caffe")


def get_config(model: str = "lenet_300_100") -> ConfigDict:
    """The configuration, for the model "lenet_300_100" or "lenet5_caffe"."""
    config = common.mnist(common.sparse_momentum(), model)
    config.weight_decay = 0.0  # the penalty of the method is one
    config.method = ConfigDict({
        "name": "top_kast",
        "sparsity": 0.95,
        "backward_sparsity": 0.9,
        "decay": 1e-4,
        "penalty": "l2",  # or "l1"
        "scope": "layer",  # or "global"
        "allocation": "uniform",  # or "erdos_renyi", "erdos_renyi_kernel"
        "every": 1,
        "structure": "weight",
    })  # fmt: skip
    if model == "lenet5_caffe":
        config.clip_norm = 1.0
    return config
