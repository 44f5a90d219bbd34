"""LeNet-300-100 or LeNet-5 on MNIST with powerpropagation, pruned by magnitude near the end.

Schwarz et al., *Powerpropagation: A sparsity inducing weight reparameterisation*, 2021 (arXiv:2110.00296), prune
LeNet-300-100 once after training. As there: plain SGD with a learning rate of 0.1, batches of 60, 50,000 steps (56
epochs with a tenth of the images held out) without weight decay. Two things differ: every layer is pruned to the same
sparsity, while they leave the last at half of it, and the last epoch trains on what is left.

  python -m experiments.train --config=configs/mnist_powerpropagation.py --config.data_dir=DIR --workdir=/tmp/mnist
  python -m experiments.train --config=configs/mnist_powerpropagation.py:lenet5_caffe ...

DIR is where TensorFlow Datasets has MNIST as array_record. ``--config.method.alpha=1`` is the network without powers.
"""

from ml_collections import ConfigDict

from configs import common

EXPERIMENTS = ("lenet_300_100", "lenet5_caffe")


def get_config(model: str = "lenet_300_100") -> ConfigDict:
    """The configuration, for the model "lenet_300_100" or "lenet5_caffe"."""
    config = common.mnist(common.training(), model)
    config.epochs = 56
    config.data.batch_size = 60
    config.weight_decay = 0.0
    config.optimizer = ConfigDict({"name": "sgd"})
    common.decay_at(config, (), init_value=0.1)
    config.method = ConfigDict({
        "name": "powerpropagation",
        "alpha": 3.0,
        "prune": {
            "name": "magnitude_pruning",
            "sparsity": 0.95,
            "begin_epochs": 55,
            "scope": "layer",  # or "global", "lamp"
        },
    })  # fmt: skip
    config.smoke_overrides.method = ConfigDict({"prune": {"begin_epochs": 3}})
    return config
