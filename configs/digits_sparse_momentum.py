"""LeNet-300-100 on 8 x 8 digits with sparse momentum, one weight in ten kept.

Dettmers and Zettlemoyer, *Sparse Networks from Scratch: Faster Training without Losing Performance*, 2019
(arXiv:1907.04840). The optimizer is that of its MNIST experiments, with smaller batches for the smaller data set.

  python -m experiments.train --config=configs/digits_sparse_momentum.py --workdir=/tmp/digits/sparse
  python -m experiments.train --config=configs/digits_sparse_momentum.py --workdir=/tmp/digits/dense --config.dense
  python -m experiments.compare /tmp/digits/dense /tmp/digits/sparse

Expected test accuracy, mean and standard error with ``--seeds=0,1,2,3,4``: 97.7 +- 0.1% with 10% of the weights,
98.1 +- 0.1% dense (one test image is 0.28 points). The batch size was chosen by cross-validation on the train images.
A run takes 2 to 5 seconds on two CPU cores, most of them compilation, and as long again for starting up.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The configuration."""
    config = common.sparse_momentum()
    config.eval_every_epochs = 10
    config.checkpoint_every_epochs = 20
    config.log_every_steps = 440
    config.data.name = "digits"
    config.data.batch_size = 32
    config.model.name = "lenet_300_100"
    common.decay_every(config, 1980)
    config.method.sparsity = 0.9
    config.smoke_overrides.eval_every_epochs = 2
    config.smoke_overrides.checkpoint_every_epochs = 2
    return config
