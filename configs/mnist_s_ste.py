"""LeNet-300-100 or LeNet-5 on MNIST with S-STE: 2 of every 4 weights along the inputs, by a soft threshold.

Hu, Zhu and Chen, *S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training*, 2024 (arXiv:2409.09099),
on the recipe of sparse momentum's MNIST experiments, so that both can be compared. The paper trains transformers.

  python -m experiments.train --config=configs/mnist_s_ste.py --config.data_dir=DIR --workdir=/tmp/mnist
  python -m experiments.train --config=configs/mnist_s_ste.py:lenet5_caffe ...

DIR is where TensorFlow Datasets has MNIST as array_record. The first convolution of LeNet-5 has one input: half of its
weights stay, with one threshold for all.
"""

from ml_collections import ConfigDict

from configs import common

EXPERIMENTS = ("lenet_300_100", "lenet5_caffe")


def get_config(model: str = "lenet_300_100") -> ConfigDict:
    """The configuration, for the model "lenet_300_100" or "lenet5_caffe"."""
    config = common.mnist(common.sparse_momentum(), model)
    config.method = ConfigDict({"name": "s_ste", "n": 2, "m": 4, "ragged": "error"})
    if model == "lenet5_caffe":
        config.clip_norm = 1.0
        config.method.ragged = "warn"
    return config
