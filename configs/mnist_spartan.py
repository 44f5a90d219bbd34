"""LeNet-300-100 or LeNet-5 on MNIST with Spartan, to 5% of the weights.

Tai et al., *Spartan: Differentiable Sparsity via Regularized Transportation*, 2022 (arXiv:2205.14107), on the recipe of
sparse momentum's MNIST experiments, so that both can be compared: dense for no more than a fifth of the epochs, with a
choice that is fixed in the last fifth, as in the paper, which has no MNIST experiments.

  python -m experiments.train --config=configs/mnist_spartan.py --config.data_dir=DIR --workdir=/tmp/mnist
  python -m experiments.train --config=configs/mnist_spartan.py:lenet5_caffe ...

DIR is where TensorFlow Datasets has MNIST as array_record.
"""

from ml_collections import ConfigDict

from configs import common

EXPERIMENTS = ("lenet_300_100", "lenet5_caffe")


def get_config(model: str = "lenet_300_100") -> ConfigDict:
    """The configuration, for the model "lenet_300_100" or "lenet5_caffe"."""
    config = common.mnist(common.sparse_momentum(), model)
    config.method = ConfigDict({
        "name": "spartan",
        "sparsity": 0.95,
        "warmup_epochs": 20,
        "freeze_at_epochs": 80,
        "sharpness": 20.0,
        "scope": "global",  # or "layer"
    })  # fmt: skip
    config.smoke_overrides.method = ConfigDict({"warmup_epochs": 1, "freeze_at_epochs": 3})
    if model == "lenet5_caffe":
        config.clip_norm = 1.0
    return config
