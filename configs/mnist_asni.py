"""ASNI on MNIST: LeNet-300-100 and the small convolutional networks, pruned once an epoch, in one round of training.

Damadi, Nouri and Pirsiavash, *Amenable Sparse Network Investigator*, 2022 (arXiv:2202.09284), with the hyper-parameters
of the author's final runs. Test accuracy in % as in the author's logs: dense, ASNI-I (at so many % zeros), ASNI-II with
two numbers a layer, ASNI-II with two numbers of the biases too, and the same masks with the original random weights.

  argument  epochs  learning rate  magnitude  scale  dense          ASNI-I                  ASNI-II        biases too     original
  fc        50      1.2e-4         0.98       5      98.06 +- 0.10  97.62 +- 0.08 (96.87)   -              97.83 +- 0.06  97.89 +- 0.06
  conv2     20      2e-4           0.992      2      99.06 +- 0.18  99.06 +- 0.07 (97.40)   99.14 +- 0.07  99.10 +- 0.04  99.18 +- 0.01
  conv4     25      3e-4           0.985      2      99.31 +- 0.15  99.37 +- 0.03 (97.94)   99.40 +- 0.07  99.42 +- 0.07  99.33 +- 0.10
  conv6     30      3e-4           0.985      2      99.17 +- 0.23  99.44 +- 0.08 (98.27)   99.47 +- 0.08  99.45 +- 0.06  99.37 +- 0.07

(The deviations are those of single runs; dense fc had the learning rate 1.2e-3.)

  python -m experiments.stages --config=configs/stages/asni.py:mnist_fc --config.data_dir=DIR --workdir=/tmp/mnist_asni
  python -m experiments.train --config=configs/mnist_asni.py:conv2 ...               # ASNI-I alone

The first trains all of these one after another and shows them side by side. DIR is where TensorFlow Datasets has MNIST
as array_record. Adam with a constant learning rate, batches of 60, all 60,000 images. The last pruning would follow the
last epoch, so none comes of it: what is reported has the sparsity of the epoch before.
"""  # noqa: E501  # a table

from ml_collections import ConfigDict

from configs import common

# The model, epochs, learning rate, and arguments of the sparsity schedule.
EXPERIMENTS = {
    "fc": ("lenet_300_100", 50, 1.2e-4, {"magnitude": 0.98, "scale_epochs": 5.0}),
    "conv2": ("conv_2", 20, 2e-4, {"magnitude": 0.992, "scale_epochs": 2.0}),
    "conv4": ("conv_4", 25, 3e-4, {"magnitude": 0.985, "scale_epochs": 2.0}),
    "conv6": ("conv_6", 30, 3e-4, {"magnitude": 0.985, "scale_epochs": 2.0}),
}


def get_config(experiment: str = "fc") -> ConfigDict:
    """The configuration of ASNI-I, for one of :data:`EXPERIMENTS`."""
    if experiment not in EXPERIMENTS:
        raise ValueError(f"this config comes with the experiments {', '.join(EXPERIMENTS)}, got {experiment!r}")
    model, epochs, learning_rate, schedule = EXPERIMENTS[experiment]
    config = common.asni()
    config.epochs = epochs
    config.checkpoint_every_epochs = 10 if experiment == "fc" else 1
    config.log_every_steps = 1000 if experiment == "fc" else 100
    config.data.name = "mnist"
    config.data.batch_size = 60
    config.data.mean = (0.1307,)
    config.data.std = (0.3081,)
    config.model.name = model
    if experiment != "fc":
        common.set_width(config)
    config.optimizer.learning_rate = learning_rate
    config.method.sparsity.update(schedule)
    config.smoke_overrides.checkpoint_every_epochs = 2 if experiment == "fc" else 1
    return config
