"""ASNI on CIFAR-10: small convolutional networks, VGG and ResNet, pruned once an epoch, in one round of training.

Damadi, Nouri and Pirsiavash, *Amenable Sparse Network Investigator*, 2022 (arXiv:2202.09284), with the hyper-parameters
of the author's final runs. Test accuracy in % as in the author's logs: dense, ASNI-I (at so many % zeros), ASNI-II with
two numbers a layer, ASNI-II with two numbers of the biases too, and the same masks with the original random weights.

  argument     magnitude  scale  dense          ASNI-I                  ASNI-II        biases too     original
  conv2        0.985      2      76.23 +- 0.84  74.49 +- 0.16 (96.71)   75.21 +- 0.51  76.66 +- 0.17  74.43 +- 0.18
  conv4        0.95       2      84.71 +- 0.47  84.12 +- 0.37 (94.47)   84.37 +- 0.26  84.99 +- 0.20  84.01 +- 0.25
  conv6        0.94       3      86.67 +- 0.36  86.47 +- 0.25 (92.72)   86.62 +- 0.28  87.14 +- 0.35  86.44 +- 0.36
  vgg11        0.97       16     92.34 +- 0.16  91.49 +- 0.12 (96.14)   90.85 +- 0.16  91.22 +- 0.29  89.98 +- 0.18
  vgg13        0.98       16     94.09 +- 0.04  92.81 +- 0.18 (97.14)   91.89 +- 0.07  92.21 +- 0.34  91.89 +- 0.22
  vgg16        0.99       16     93.83 +- 0.17  92.49 +- 0.15 (98.15)   91.86 +- 0.13  92.10 +- 0.17  91.79 +- 0.01
  vgg19        1.00       16     93.66 +- 0.08  91.53 +- 0.10 (99.15)   -              -              -
  vgg11_steep  0.962      4                     91.53 (96.08)
  vgg13_steep  0.972      4                     93.40 +- 0.25 (97.09)
  vgg16_steep  0.982      4                     93.42 +- 0.13 (98.10)
  vgg19_steep  0.992      4                     92.85 +- 0.11 (99.11)
  resnet18     0.97       16     88.17 +- 0.11  87.84 +- 0.44 (96.14)   87.37 +- 0.15  87.53 +- 0.44  87.89 +- 0.15
  resnet34     0.97       16     88.66 +- 0.19  88.46 +- 0.20 (96.15)   -              -              -

(The deviations are those of single runs.)

  python -m experiments.stages --config=configs/stages/asni.py:cifar_vgg16 --config.data_dir=DIR --workdir=/tmp/vgg16
  python -m experiments.train --config=configs/cifar_asni.py:vgg16_steep ...               # ASNI-I alone

The first trains all of these one after another and shows them side by side. DIR is where TensorFlow Datasets has
CIFAR-10 as array_record. All 50,000 train images, cropped and mirrored. The small networks have Adam, a constant
learning rate, batches of 60 and 20, 25 or 30 epochs; the others SGD with momentum, weight decay 5e-4, a cosine over
1.06 times the 160 epochs, batches of 128. The ResNets are those of ImageNet, with its stem and 1000 outputs, as the
author had them. ``--config.model.dtype=bfloat16`` for accelerators.
"""

from ml_collections import ConfigDict

from configs import common

# The keys of config.model, epochs, learning rate, magnitude and scale of the sparsity.
EXPERIMENTS = {
    "conv2": ({"name": "conv_2"}, 20, 2e-4, 0.985, 2.0),
    "conv4": ({"name": "conv_4"}, 25, 3e-4, 0.95, 2.0),
    "conv6": ({"name": "conv_6"}, 30, 3e-4, 0.94, 3.0),
    **{
        f"vgg{depth}": ({"name": "vgg", "variant": depth}, 160, 0.05, magnitude, 16.0)
        for depth, magnitude in {"11": 0.97, "13": 0.98, "16": 0.99, "19": 1.0}.items()
    },
    **{
        f"vgg{depth}_steep": ({"name": "vgg", "variant": depth}, 160, 0.05, magnitude, 4.0)
        for depth, magnitude in {"11": 0.962, "13": 0.972, "16": 0.982, "19": 0.992}.items()
    },
    **{
        f"resnet{depth}": (
            {"name": f"resnet_{depth}", "stem": "imagenet", "num_classes": 1000}, 160, 0.05, 0.97, 16.0
        )
        for depth in (18, 34)
    },
}  # fmt: skip


def get_config(experiment: str = "vgg16") -> ConfigDict:
    """The configuration of ASNI-I, for one of :data:`EXPERIMENTS`."""
    if experiment not in EXPERIMENTS:
        raise ValueError(f"this config comes with the experiments {', '.join(EXPERIMENTS)}, got {experiment!r}")
    model, epochs, learning_rate, magnitude, scale = EXPERIMENTS[experiment]
    config = common.cifar(common.asni())
    config.epochs = epochs
    config.model.update(model)
    config.method.sparsity.update({"magnitude": magnitude, "scale_epochs": scale})
    if experiment.startswith("conv"):
        config.data.batch_size = 60
        config.optimizer.learning_rate = learning_rate
    else:
        config.weight_decay = 5e-4
        config.optimizer = ConfigDict({"name": "sgd", "momentum": 0.9})
        common.epoch_cosine(config, learning_rate, scale=1.06)
    return config
