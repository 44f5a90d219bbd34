"""The experiments of Dep-L0 on CIFAR-10 and CIFAR-100, and L0 with independent gates beside them.

Li and Ji, *Dep-L0: Improving L0-based Network Sparsification via Dependency Modeling*, 2021 (arXiv:2107.00070), with
the hyper-parameters of its authors' commands (https://github.com/leo-yangli/dep-l0). The paper's result tables were not
available to us, so there are no published numbers to expect here.

  argument            network     gates                     penalty
  vgg16_forward       VGG16       dependent, forward        1e-6
  vgg16_backward      VGG16       dependent, backward       1e-6
  vgg16_hc            VGG16       independent               5e-7
  resnet56_forward    ResNet-56   dependent, forward        5e-7
  resnet56_backward   ResNet-56   dependent, backward       1e-6
  resnet56_hc         ResNet-56   independent               5e-7

and each with "_cifar100" behind it.

  python -m experiments.train --config=configs/cifar_l0.py:vgg16_forward --config.data_dir=DIR --workdir=/tmp/vgg16

DIR is where TensorFlow Datasets has CIFAR-10 (or -100) as array_record. 299 epochs, all 50,000 train images, batches of
128, crops of images padded with zeros, mirrored. The authors report the best epoch, we the last; they sample gates for
each example, we for each batch.
"""

from ml_collections import ConfigDict

from configs import common

GATES = ("forward", "backward", "hc")
PENALTIES = {"vgg16": (1e-6, 1e-6, 5e-7), "resnet56": (5e-7, 1e-6, 5e-7)}
EXPERIMENTS = {
    f"{network}_{gates}{data}": (network, gates, data)
    for network in PENALTIES
    for gates in GATES
    for data in ("", "_cifar100")
}


def get_config(experiment: str = "vgg16_forward") -> ConfigDict:
    """The configuration, for one of :data:`EXPERIMENTS`."""
    if experiment not in EXPERIMENTS:
        raise ValueError(f"this config comes with the experiments {', '.join(EXPERIMENTS)}, got {experiment!r}")
    network, gates, data = EXPERIMENTS[experiment]
    config = common.cifar(common.gates("l0" if gates == "hc" else "dep_l0"))
    config.epochs = 299
    config.method.penalty.update({"strength": PENALTIES[network][GATES.index(gates)], "counts": "neighbours"})
    if gates == "hc":
        config.method.log_alpha = 3.0
    else:
        config.method.direction = gates
    if network == "vgg16":
        config.model.update({"name": "vgg", "variant": "16"})
        common.decay_at(config, (60, 120, 180, 240), init_value=0.05, decay_rate=0.2)
        if gates != "hc":
            config.method.input_width = 64
    else:
        config.model.update({"name": "resnet_56", "project": True})
        common.decay_at(config, (60, 120, 180, 240))
        config.method.gate_optimizer.learning_rate.decay_rate = 0.1
    config.data.mean = (0.4914, 0.4824, 0.4467)  # 125.3, 123.0, 113.9 of 255
    config.data.std = (0.2471, 0.2435, 0.2616)  # 63.0, 62.1, 66.7
    if data:
        config.data.name = "cifar100"
        config.data.mean = (0.5071, 0.4867, 0.4408)  # 129.3, 124.1, 112.4
        config.data.std = (0.2675, 0.2565, 0.2761)  # 68.2, 65.4, 70.4
    return config
