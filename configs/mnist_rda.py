"""LeNet-300-100 or LeNet-5 on MNIST, trained with compressed sensing from random weights.

Siegel, Chen, Zhang and Xu, *Training Sparse Neural Networks using Compressed Sensing*, 2020 (arXiv:2008.09661). The
paper has no MNIST; this is its CIFAR recipe (step size 1, cosine, momentum time 9.5, weight decay 5e-4, M = 500) with
the epochs, batches and held out images of sparse momentum's Table 1, beside which results/rda_mnist.md puts it.

  python -m experiments.train --config=configs/mnist_rda.py --config.data_dir=DIR --workdir=/tmp/mnist_rda
  python -m experiments.train --config=configs/mnist_rda.py:lenet5_caffe ... --config.method.l1=1e-5

How many weights stay follows from ``method.l1``, which was chosen on the held out images alone
(results/rda_mnist_l1.md). LeNet-5's gradients are clipped to norm 1, as for sparse momentum.
"""

from ml_collections import ConfigDict

from configs import common

EXPERIMENTS = ("lenet_300_100", "lenet5_caffe")


def get_config(model: str = "lenet_300_100") -> ConfigDict:
    """The configuration, for the model "lenet_300_100" or "lenet5_caffe"."""
    config = common.mnist(common.rda(), model)
    config.method.l1 = 3e-6
    if model == "lenet5_caffe":
        config.clip_norm = 1.0
    return config
