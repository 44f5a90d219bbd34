"""LeNet-300-100 or LeNet-5 on MNIST with L0 hard-concrete gates on its channels, independent or dependent.

Louizos, Welling and Kingma, *Learning Sparse Neural Networks through L0 Regularization*, 2018 (arXiv:1712.01312),
report 1.4% error for 219-214-100 and 1.8% for 266-88-33 inputs and units (LeNet-300-100), 0.9% for 20-25-45-462 and
1.0% for 9-18-65-25 (LeNet-5). Li and Ji, *Dep-L0*, 2021 (arXiv:2107.00070), report no MNIST.

  python -m experiments.train --config=configs/mnist_l0.py --config.data_dir=DIR --workdir=/tmp/mnist_l0
  python -m experiments.train --config=configs/mnist_l0.py:lenet5_caffe ...
  python -m experiments.train --config=configs/mnist_l0.py:lenet_300_100_dep ...     # gates from a generator
  python -m experiments.train --config=configs/mnist_l0.py:lenet5_caffe_dep ...

DIR is where TensorFlow Datasets has MNIST as array_record. Adam, 1e-3, for weights and gates, batches of 100, pixels
from 0 to 1, all 60,000 images, as in the code of Louizos et al. In three things we differ: a weight is paid for as long
as both its ends are open (``counts``), gates start more open, and in the last fifth of the epochs they are frozen.
Their way is ``--config.method.penalty.counts=alone --config.method.log_alpha=0`` and
``--config.method.freeze_gates_at_epochs=100``.
"""

from ml_collections import ConfigDict

from configs import common

EXPERIMENTS = ("lenet_300_100", "lenet5_caffe", "lenet_300_100_dep", "lenet5_caffe_dep")


def get_config(model: str = "lenet_300_100") -> ConfigDict:
    """The configuration, for "lenet_300_100" or "lenet5_caffe", with "_dep" behind it for dependent gates."""
    network = model.removesuffix("_dep")
    dependent = network != model
    config = common.mnist(common.gates("dep_l0" if dependent else "l0"), network)
    config.epochs = 100 if network == "lenet_300_100" else 40
    config.data.validation = 0.0
    config.data.mean, config.data.std = (0.0,), (1.0,)
    config.weight_decay = 0.0
    config.optimizer = ConfigDict({"name": "adam"})
    common.decay_at(config, (), init_value=1e-3)
    config.method.penalty.update({"strength": 0.2 if dependent else 0.22, "counts": "all", "examples": 60_000})
    config.method.freeze_gates_at_epochs = config.epochs * 4 // 5
    if dependent:
        # Every weight of the generator moves every gate of a layer.
        config.method.gate_optimizer.learning_rate.init_value = 1e-4
    else:
        config.method.log_alpha = 2.0
        config.method.clamp = (-4.605, 4.605)  # log(0.01), log(100)
    return config
