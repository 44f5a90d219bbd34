"""LeNet-300-100 or LeNet-5 on MNIST with trained soft thresholds (STR), which find the sparsity.

Kusupati et al., *Soft Threshold Weight Reparameterization for Learnable Sparsity*, 2020 (arXiv:2002.03231), on the
recipe of sparse momentum's MNIST experiments, so that both can be compared. The paper has no MNIST experiments.

  python -m experiments.train --config=configs/mnist_soft_threshold.py --config.data_dir=DIR --workdir=/tmp/mnist
  python -m experiments.train --config=configs/mnist_soft_threshold.py:lenet5_caffe ...

DIR is where TensorFlow Datasets has MNIST as array_record. The weight decay sets the sparsity, of the weights and
of the thresholds alike: ``--config.weight_decay=1e-3`` gives more zeros. A lower ``method.init`` only starts later.
"""

from ml_collections import ConfigDict

from configs import common

EXPERIMENTS = ("lenet_300_100", "lenet5_caffe")


def get_config(model: str = "lenet_300_100") -> ConfigDict:
    """The configuration, for the model "lenet_300_100" or "lenet5_caffe"."""
    config = common.mnist(common.sparse_momentum(), model)
    config.method = ConfigDict({
        "name": "soft_threshold",
        "init": -10.0,
        "scope": "layer",  # or "channel"
    })  # fmt: skip
    if model == "lenet5_caffe":
        config.clip_norm = 1.0
    return config
