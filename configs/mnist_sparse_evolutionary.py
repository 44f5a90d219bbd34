"""LeNet-300-100 or LeNet-5 on MNIST with sparse evolutionary training (SET), 5% of the weights kept.

Mocanu et al., *Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity inspired by Network
Science*, 2018 (arXiv:1707.04780), on the recipe of sparse momentum's MNIST experiments, so that both can be compared.
Masks change once an epoch, as in the paper; its last layer is dense, ours is not.

  python -m experiments.train --config=configs/mnist_sparse_evolutionary.py --config.data_dir=DIR --workdir=/tmp/mnist
  python -m experiments.train --config=configs/mnist_sparse_evolutionary.py:lenet5_caffe ...

DIR is where TensorFlow Datasets has MNIST as array_record.
"""

from ml_collections import ConfigDict

from configs import common

EXPERIMENTS = ("lenet_300_100", "lenet5_caffe")


def get_config(model: str = "lenet_300_100") -> ConfigDict:
    """The configuration, for the model "lenet_300_100" or "lenet5_caffe"."""
    config = common.mnist(common.sparse_momentum(), model)
    config.method = ConfigDict({
        "name": "sparse_evolutionary",
        "sparsity": 0.95,
        "update_every_epochs": 1,
        "drop_fraction": 0.3,
        "drop": "sign",  # or "magnitude"
        "allocation": "erdos_renyi",  # or "erdos_renyi_kernel", "uniform"
        "structure": "weight",
    })  # fmt: skip
    if model == "lenet5_caffe":
        config.clip_norm = 1.0
    return config
