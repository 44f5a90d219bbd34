"""LeNet-300-100 or LeNet-5 on MNIST with sparse momentum, 5% of the weights kept.

Dettmers and Zettlemoyer, *Sparse Networks from Scratch: Faster Training without Losing Performance*, 2019
(arXiv:1907.04840), Table 1: test error 1.53 +- 0.020% (LeNet-300-100) and 0.69 +- 0.021% (LeNet-5), dense
1.34 +- 0.011% and 0.58 +- 0.010%. ``python -m experiments.reproduce sparse_momentum_table_1`` runs them all.

  python -m experiments.train --config=configs/mnist_sparse_momentum.py --config.data_dir=DIR --workdir=/tmp/mnist
  python -m experiments.train --config=configs/mnist_sparse_momentum.py:lenet5_caffe ...

DIR is where TensorFlow Datasets has MNIST as array_record. The recipe is that of the paper and of the authors' code:
the last tenth of the train images is held out and the rest trained on for 100 epochs, the test error is that of the
last epoch. (TensorFlow Datasets has the images in another order than the original files, so other images are held out.)

One thing differs: LeNet-5's gradients are clipped to norm 1. Without (``--config.clip_norm=inf``) the first
mask updates, which give the two small layers all their weights back at once, throw the loss up a hundredfold, and in
some seeds every unit dies. With the authors' code it is the same.
"""

from ml_collections import ConfigDict

from configs import common

EXPERIMENTS = ("lenet_300_100", "lenet5_caffe")


def get_config(model: str = "lenet_300_100") -> ConfigDict:
    """The configuration, for the model "lenet_300_100" or "lenet5_caffe"."""
    config = common.mnist(common.sparse_momentum(), model)
    if model == "lenet5_caffe":
        config.clip_norm = 1.0
    return config
