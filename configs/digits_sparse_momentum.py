"""LeNet-300-100 on 8 x 8 digits with sparse momentum, one weight in ten kept.

Dettmers and Zettlemoyer, *Sparse Networks from Scratch: Faster Training without Losing Performance*, 2019
(arXiv:1907.04840). The optimizer is that of its MNIST experiments, with smaller batches for the smaller data set.

  python -m experiments.train --config=configs/digits_sparse_momentum.py --workdir=/tmp/digits/sparse
  python -m experiments.train --config=configs/digits_sparse_momentum.py --workdir=/tmp/digits/dense --config.dense
  python -m experiments.compare /tmp/digits/dense /tmp/digits/sparse

Expected test accuracy, mean and standard error with ``--seeds=0,1,2,3,4``: 97.8 +- 0.1% with 10% of the weights,
98.1 +- 0.1% dense (one test image is 0.28 points). The batch size was chosen by cross-validation on the train images.
A run takes 2 to 5 seconds on two CPU cores, most of them compilation, and as long again for starting up.
"""

from ml_collections import ConfigDict, config_dict


def get_config(size: str = "full") -> ConfigDict:
    """The configuration; ``--config=configs/digits_sparse_momentum.py:smoke`` shrinks the run to a few seconds."""
    if size not in ("full", "smoke"):
        raise ValueError(f"this config comes as 'full' or 'smoke', got {size!r}")
    smoke = size == "smoke"
    config = ConfigDict()
    config.seed = 0
    config.dense = False  # True leaves the sparse link out
    config.data_dir = config_dict.placeholder(str)
    config.epochs = 4 if smoke else 100
    config.eval_every_epochs = 2 if smoke else 10
    config.checkpoint_every_epochs = 2 if smoke else 20
    config.log_every_steps = 44 if smoke else 440

    config.data = ConfigDict()
    config.data.name = "digits"
    config.data.batch_size = 32
    config.data.validation = 0.0
    config.data.mean = config_dict.placeholder(tuple)  # None: that of the train images
    config.data.std = config_dict.placeholder(tuple)

    config.model = ConfigDict()
    config.model.name = "lenet_300_100"

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 0.1
    config.optimizer.decay_rate = 0.1
    config.optimizer.decay_every_steps = 88 if smoke else 1980
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    config.optimizer.clip_norm = config_dict.placeholder(float)  # None: gradients are not clipped

    config.sparsity = ConfigDict()
    config.sparsity.sparsity = 0.9
    config.sparsity.update_every_epochs = 1
    config.sparsity.prune_rate = 0.5
    config.sparsity.prune_rate_decay = "cosine"  # or "linear", "constant"
    config.sparsity.prune = "magnitude"  # or "SET", "global_magnitude"
    config.sparsity.redistribution = "momentum"  # or "magnitude", "nonzeros", "none"
    config.sparsity.growth = "momentum"  # or "random", "momentum_neuron"
    config.sparsity.allocation = "uniform"  # or "erdos_renyi", "erdos_renyi_kernel"
    return config
