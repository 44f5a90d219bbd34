"""The networks of sparse momentum's Table 2 on CIFAR-10.

Dettmers and Zettlemoyer, *Sparse Networks from Scratch: Faster Training without Losing Performance*, 2019
(arXiv:1907.04840), Table 2, test error in %, mean and standard error:

  argument     weights   sparse         dense
  alexnet_s    10%       14.35 +- .057  12.95 +- .056
  alexnet_b    10%       13.93 +- .048  12.85 +- .068
  vgg16_c      5%         6.77 +- .056   6.49 +- .038
  vgg16_d      5%         6.49 +- .045   6.59 +- .050
  vgg16_like   3%         6.71 +- .046   6.50 +- .054
  wrn_16_8     5%         5.66 +- .054   4.57 +- .022
  wrn_16_10    5%         4.59 +- .043   4.45 +- .040
  wrn_22_8     5%         4.96 +- .042   4.26 +- .032

  python -m experiments.train --config=configs/cifar10_sparse_momentum.py:vgg16_d --config.data_dir=DIR --workdir=W

W is the folder of the run, DIR where TensorFlow Datasets has CIFAR-10 as array_record. As the authors do: 250 epochs
on the first 45,000 train images, the last 5,000 held out, the learning rate divided by 10 every 30,000 steps, reflected
padding. (Theirs are augmented when validating too; ours are not.) ``--config.model.dtype=bfloat16`` for accelerators.
"""

from ml_collections import ConfigDict

from configs import common

# The keys of config.model, and the share of the weights that is kept.
EXPERIMENTS = {
    "alexnet_s": ({"name": "alexnet", "variant": "s"}, 0.1),
    "alexnet_b": ({"name": "alexnet", "variant": "b"}, 0.1),
    "vgg16_c": ({"name": "vgg", "variant": "C"}, 0.05),
    "vgg16_d": ({"name": "vgg", "variant": "D"}, 0.05),
    "vgg16_like": ({"name": "vgg", "variant": "like"}, 0.03),
    "wrn_16_8": ({"name": "wide_resnet", "depth": 16, "widen": 8}, 0.05),
    "wrn_16_10": ({"name": "wide_resnet", "depth": 16, "widen": 10}, 0.05),
    "wrn_22_8": ({"name": "wide_resnet", "depth": 22, "widen": 8}, 0.05),
}


def get_config(network: str = "vgg16_d") -> ConfigDict:
    """The configuration, for one of :data:`EXPERIMENTS`."""
    if network not in EXPERIMENTS:
        raise ValueError(f"this config comes with the networks {', '.join(EXPERIMENTS)}, got {network!r}")
    model, kept = EXPERIMENTS[network]
    config = common.cifar(common.sparse_momentum())
    config.epochs = 250
    config.data.validation = 0.1
    config.data.pad_mode = "reflect"
    config.model.update(model)
    common.decay_every(config, 30_000)
    config.method.sparsity = 1 - kept
    return config
