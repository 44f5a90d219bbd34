"""The experiments of training with compressed sensing on CIFAR-10 and CIFAR-100.

Siegel, Chen, Zhang and Xu, *Training Sparse Neural Networks using Compressed Sensing*, 2020 (arXiv:2008.09661), with
the hyper-parameters of its authors' scripts (https://github.com/dmaywald/xrda-sparse-training at f88d0d5). The paper's
result tables were not available to us, so there are no published numbers to expect here.

  argument             network          epochs  step size  momentum time  l1      averaging
  vgg16                VGG16-BN         600     1          9.5            1e-6    cosine
  vgg19                VGG19-BN         600     1          10             1e-6    cosine
  resnet18             ResNet-18        500     1          9.5            1e-6    halving
  resnet20             ResNet-20        1000    1          9.5            2.8e-6  cosine
  resnet56             ResNet-56        600     0.25       12.37          1.3e-6  cosine
  vgg19_cifar100       VGG19-BN         500     1          9.5            1e-6    halving
  vgg16_kernel         VGG16-BN         600     1          9.5            8e-7    cosine
  vgg19_channel        VGG19-BN         500     1          9.5            1e-8    cosine
  vgg19_channel_cifar100     likewise
  densenet40_channel   DenseNet-40      160     1          9.5            5e-8    cosine
  densenet40_channel_cifar100           180     1          9.5            to set  cosine

  python -m experiments.train --config=configs/cifar_rda.py:resnet20 --config.data_dir=DIR --workdir=/tmp/resnet20

DIR is where TensorFlow Datasets has CIFAR-10 (or -100) as array_record. All 50,000 train images, batches of 128, crops
of images padded with zeros, mirrored. "halving" halves the step size after epochs 60, 100, ..., 420. The l1 of the last
script is 0 unless it is given one: ``--config.method.l1=...``. ``--config.model.dtype=bfloat16`` for accelerators.
"""

from ml_collections import ConfigDict

from configs import common

VGG16 = {"name": "vgg", "variant": "16_bn"}
VGG19 = {"name": "vgg", "variant": "19_bn"}
HALVING = tuple(range(60, 421, 40))
# The keys of config.model, the epochs, and what else differs from common.rda().
EXPERIMENTS = {
    "vgg16": (VGG16, 600, {}),
    "vgg19": (VGG19, 600, {"optimizer.momentum_time": 10.0}),
    "resnet18": ({"name": "resnet_18"}, 500, {}),
    "resnet20": ({"name": "resnet_20"}, 1000, {"method.l1": 2.8e-6}),
    "resnet56": (
        {"name": "resnet_56"},
        600,
        {"optimizer.schedules.init_value": 0.25, "optimizer.momentum_time": 12.37, "method.l1": 1.3e-6},
    ),
    "vgg19_cifar100": (VGG19, 500, {}),
    "vgg16_kernel": (VGG16, 600, {"method.l1": 8e-7, "method.structure": "kernel"}),
    "vgg19_channel": (VGG19, 500, {"method.l1": 1e-8, "method.structure": "channel"}),
    "vgg19_channel_cifar100": (VGG19, 500, {"method.l1": 1e-8, "method.structure": "channel"}),
    "densenet40_channel": ({"name": "densenet_40"}, 160, {"method.l1": 5e-8, "method.structure": "channel"}),
    "densenet40_channel_cifar100": ({"name": "densenet_40"}, 180, {"method.l1": 0.0, "method.structure": "channel"}),
}
HALVED = ("resnet18", "vgg19_cifar100")  # their step size; that of the others falls by a cosine


def get_config(experiment: str = "vgg16") -> ConfigDict:
    """The configuration, for one of :data:`EXPERIMENTS`."""
    if experiment not in EXPERIMENTS:
        raise ValueError(f"this config comes with the experiments {', '.join(EXPERIMENTS)}, got {experiment!r}")
    model, epochs, changes = EXPERIMENTS[experiment]
    halved = experiment in HALVED
    config = common.cifar(common.rda("rda_halving", boundaries_epochs=HALVING) if halved else common.rda())
    config.epochs = epochs
    config.model.update(model)
    config.update_from_flattened_dict(changes)
    if halved:
        config.smoke_overrides.optimizer = ConfigDict({"schedules": {"boundaries_epochs": (1, 2, 3)}})
    if experiment.endswith("cifar100"):
        config.data.name = "cifar100"
    return config
