"""Both parts of ASNI beside dense training and a lottery ticket, on MNIST (mnist_fc) or CIFAR-10 (cifar_vgg16, ...).

Damadi, Nouri and Pirsiavash, *Amenable Sparse Network Investigator*, 2022 (arXiv:2202.09284). ``configs/mnist_asni.py``
and ``configs/cifar_asni.py`` have the experiments, and what came out of the author's; cifar10_resnet8 is the "asni" of
``configs/cifar10_resnet8.py``.

  dense           the same training without pruning
  asni_1          ASNI-I: pruned once an epoch
  asni_2          ASNI-II: on the masks of asni_1 every layer starts from two numbers, with biases of 0
  asni_2_biases   ASNI-II, and the biases of every layer start from two numbers too
  original        on the masks of asni_1, from the random weights that it started from: the lottery ticket

  python -m experiments.stages --config=configs/stages/asni.py:mnist_fc --config.data_dir=DIR --workdir=runs/mnist_asni
"""

from ml_collections import ConfigDict

from configs import cifar10_resnet8, cifar_asni, mnist_asni

DATA = {"mnist": mnist_asni, "cifar": cifar_asni}
RESNET8 = "cifar10_resnet8"


def get_config(experiment: str = "mnist_fc") -> ConfigDict:
    """The stages of an experiment, such as "mnist_fc" or "cifar_vgg16"."""
    data, _, name = experiment.partition("_")
    if data not in DATA and experiment != RESNET8:
        raise ValueError(
            f"this config comes with {RESNET8} and experiments such as mnist_fc and cifar_vgg16, got {experiment!r}"
        )
    config = cifar10_resnet8.get_config("asni") if experiment == RESNET8 else DATA[data].get_config(name)
    config.stages = [
        {"name": "dense", "dense": True},
        {"name": "asni_1"},
        {"name": "asni_2", "after": "asni_1", "start": "centroids"},
        {"name": "asni_2_biases", "after": "asni_1", "start": "centroids_and_biases"},
        {"name": "original", "after": "asni_1", "start": "original"},
    ]
    return config
