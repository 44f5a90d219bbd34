"""LeNet-300-100 or LeNet-5 on MNIST, pruned before training to 5% of the weights: SNIP, GraSP, SynFlow or at random.

Lee, Ajanthan and Torr, *SNIP: Single-shot Network Pruning based on Connection Sensitivity*, 2019 (arXiv:1810.02340);
Wang, Zhang and Grosse, *Picking Winning Tickets Before Training by Preserving Gradient Flow*, 2020 (arXiv:2002.07376);
Tanaka, Kunin, Yamins and Ganguli, *Pruning neural networks without any data by iteratively conserving synaptic flow*,
2020 (arXiv:2006.05467). On the recipe of sparse momentum's MNIST experiments, so that all can be compared; SNIP's own
recipe has other steps and weight decay, and draws the weights anew once the masks are there.

  python -m experiments.train --config=configs/mnist_prune_at_init.py --config.data_dir=DIR --workdir=/tmp/mnist
  python -m experiments.train ... --config.method.score=grasp       # or synflow, magnitude, random
  python -m experiments.train --config=configs/mnist_prune_at_init.py:lenet5_caffe ...

DIR is where TensorFlow Datasets has MNIST as array_record.
"""

from ml_collections import ConfigDict, config_dict

from configs import common

EXPERIMENTS = ("lenet_300_100", "lenet5_caffe")


def get_config(model: str = "lenet_300_100") -> ConfigDict:
    """The configuration, for the model "lenet_300_100" or "lenet5_caffe"."""
    config = common.mnist(common.sparse_momentum(), model)
    config.method = ConfigDict({
        "name": "prune_at_init",
        "score": "snip",  # or "grasp", "synflow", "magnitude", "random"
        "sparsity": 0.95,
        "examples": 100,  # images that SNIP and GraSP score by
        "rounds": 100,  # of SynFlow
        "scope": config_dict.placeholder(str),  # "global" or "layer"; None: by layer if random, else global
        "allocation": "uniform",  # or "erdos_renyi", "erdos_renyi_kernel", by layer
    })  # fmt: skip
    if model == "lenet5_caffe":
        config.clip_norm = 1.0
    return config
