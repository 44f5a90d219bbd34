"""LeNet-300-100 or LeNet-5 on MNIST with ADMM, to 5% of the weights.

Zhang et al., *A Systematic DNN Weight Pruning Framework using Alternating Direction Method of Multipliers*, 2018
(arXiv:1804.03294), with the projections and the penalty of SAFE (Lee et al., 2025, arXiv:2506.06866), on the recipe of
sparse momentum's MNIST experiments, so that both can be compared: weights are dense while they are trained, and what is
evaluated are the largest 5%.

  python -m experiments.train --config=configs/mnist_admm.py --config.data_dir=DIR --workdir=/tmp/mnist
  python -m experiments.train --config=configs/mnist_admm.py:lenet5_caffe ...

DIR is where TensorFlow Datasets has MNIST as array_record. An epoch has 540 steps, which 30 divides: so masks are those
of the weights that are evaluated. (The authors of SAFE project every 32 steps.)
"""

from ml_collections import ConfigDict

from configs import common

EXPERIMENTS = ("lenet_300_100", "lenet5_caffe")


def get_config(model: str = "lenet_300_100") -> ConfigDict:
    """The configuration, for the model "lenet_300_100" or "lenet5_caffe"."""
    config = common.mnist(common.sparse_momentum(), model)
    config.method = ConfigDict({
        "name": "admm",
        "sparsity": 0.95,
        "every": 30,
        "penalty": {"name": "rising_cosine", "end_value": 1e-3, "steps_epochs": common.ALL_EPOCHS},
        "scope": "global",  # or "layer"
        "structure": "weight",
    })  # fmt: skip
    config.smoke_overrides.method = ConfigDict({"every": 11, "penalty": {"end_value": 0.1}})
    if model == "lenet5_caffe":
        config.clip_norm = 1.0
    return config
