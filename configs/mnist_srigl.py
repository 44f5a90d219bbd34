"""LeNet-300-100 or LeNet-5 on MNIST with SRigL: constant fan-in with ablation of outputs, at 5% of the weights.

Lasby, Golubeva, Evci, Nica and Ioannou, *Dynamic Sparse Training with Structured Sparsity*, 2024 (arXiv:2305.02299), on
the recipe of sparse momentum's MNIST experiments, so that both can be compared. The mask updates are the paper's: every
100 steps in the first three quarters of all. The paper has no MNIST experiments.

  python -m experiments.train --config=configs/mnist_srigl.py --config.data_dir=DIR --workdir=/tmp/mnist
  python -m experiments.train --config=configs/mnist_srigl.py:lenet5_caffe ...

DIR is where TensorFlow Datasets has MNIST as array_record.
"""

from ml_collections import ConfigDict

from configs import common

EXPERIMENTS = ("lenet_300_100", "lenet5_caffe")


def get_config(model: str = "lenet_300_100") -> ConfigDict:
    """The configuration, for the model "lenet_300_100" or "lenet5_caffe"."""
    config = common.mnist(common.sparse_momentum(), model)
    config.method = ConfigDict({
        "name": "srigl",
        "sparsity": 0.95,
        "update_every": 100,
        "stop_at_epochs": 75,
        "drop_fraction": 0.3,
        "min_salient": 0.3,  # of the inputs of an output
        "never_ablate": "fc3" if model == "lenet_300_100" else "fc2",
        "allocation": "erdos_renyi_kernel",  # or "erdos_renyi", "uniform"
    })  # fmt: skip
    config.smoke_overrides.method = ConfigDict({"update_every": 44, "stop_at_epochs": 3})
    if model == "lenet5_caffe":
        config.clip_norm = 1.0
    return config
