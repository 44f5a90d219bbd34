"""LeNet-300-100 or LeNet-5 on MNIST with SR-STE: 2 of every 4 weights along the inputs.

Zhou et al., *Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch*, 2021 (arXiv:2102.04010), on the
recipe of sparse momentum's MNIST experiments, so that both can be compared. The paper has no MNIST experiments.

  python -m experiments.train --config=configs/mnist_sr_ste.py --config.data_dir=DIR --workdir=/tmp/mnist
  python -m experiments.train --config=configs/mnist_sr_ste.py:lenet5_caffe ...

DIR is where TensorFlow Datasets has MNIST as array_record. The first convolution of LeNet-5 has one input: half of its
weights stay, whichever are the largest.
"""

from ml_collections import ConfigDict

from configs import common

EXPERIMENTS = ("lenet_300_100", "lenet5_caffe")


def get_config(model: str = "lenet_300_100") -> ConfigDict:
    """The configuration, for the model "lenet_300_100" or "lenet5_caffe"."""
    config = common.mnist(common.sparse_momentum(), model)
    config.method = ConfigDict({
        "name": "sr_ste",
        "n": 2,
        "m": 4,
        "decay": 2e-4,  # 0 is the plain straight-through estimator
        "every": 1,
        "ragged": "error",
    })  # fmt: skip
    if model == "lenet5_caffe":
        config.clip_norm = 1.0
        config.method.ragged = "warn"
    return config
