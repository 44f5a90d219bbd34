"""LeNet-300-100 or LeNet-5 on MNIST with AC/DC, 5% of the weights kept at the end.

Peste et al., *AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks*, 2021 (arXiv:2106.12379), on
the recipe of sparse momentum's MNIST experiments, so that both can be compared. The phases are those of the authors'
100 epochs on ImageNet: dense for 10 epochs, then compressed and dense for 5 each in turn, dense from epoch 75 to 85,
compressed to the end. (``--config.method.phases.recipe=cifar``: those of CIFAR.) The paper has no MNIST experiments.

  python -m experiments.train --config=configs/mnist_ac_dc.py --config.data_dir=DIR --workdir=/tmp/mnist
  python -m experiments.train --config=configs/mnist_ac_dc.py:lenet5_caffe ...

DIR is where TensorFlow Datasets has MNIST as array_record. For other phases, give ``compress_at_epochs`` and
``decompress_at_epochs``, tuples of epochs, in place of ``phases``.
"""

from ml_collections import ConfigDict

from configs import common

EXPERIMENTS = ("lenet_300_100", "lenet5_caffe")


def get_config(model: str = "lenet_300_100") -> ConfigDict:
    """The configuration, for the model "lenet_300_100" or "lenet5_caffe"."""
    config = common.mnist(common.sparse_momentum(), model)
    config.method = ConfigDict({
        "name": "ac_dc",
        "sparsity": 0.95,
        "phases": {"name": "ac_dc_phases", "steps_epochs": common.ALL_EPOCHS, "recipe": "imagenet"},  # or "cifar"
        "scope": "global",  # or "layer"
        "structure": "weight",
    })  # fmt: skip
    if model == "lenet5_caffe":
        config.clip_norm = 1.0
    return config
