"""An MLP of 2,048 units a layer on MNIST with block sparse momentum: blocks of weights live and die, 10% are kept.

  python -m experiments.train --config=configs/mnist_mlp.py --config.data_dir=DIR --workdir=/tmp/mlp
  python -m experiments.train --config=configs/mnist_mlp.py:weights ...     # the same, by single weights
  python -m experiments.train --config=configs/mnist_mlp.py --config.dense_gradient_steps=20 ...

DIR is where TensorFlow Datasets has MNIST as array_record. Blocks are of 112 x 128 weights in the first layer, whose
784 inputs 128 does not divide, and of 128 x 128 in the second; the last layer's 20,480 weights are kept or dropped one
by one. The layers skip the blocks that are dead. Sparse momentum grows what has the largest momentum, so all weights
get gradients; with ``dense_gradient_steps`` they do so only on as many steps before each change of masks, and the other
steps multiply a tenth of the blocks in all three products. ``python -m experiments.reproduce mnist_mlp`` runs them all
beside the dense network.

The optimizer is that of sparse momentum's MNIST experiments (Dettmers and Zettlemoyer, 2019, arXiv:1907.04840), for 5
epochs with the learning rate divided by 10 after every second.
"""

from ml_collections import ConfigDict, config_dict

from configs import common

BLOCKS = ((112, 128), (128, 128), None)
EXPERIMENTS = ("blocks", "weights")


def get_config(unit: str = "blocks") -> ConfigDict:
    """The configuration, for the unit "blocks" or "weights"."""
    if unit not in ("blocks", "weights"):
        raise ValueError(f"this config comes with the units 'blocks' and 'weights', got {unit!r}")
    config = common.mnist(common.sparse_momentum(), "lenet_300_100")
    config.epochs = 5
    config.checkpoint_every_epochs = 1
    config.log_every_steps = 108
    config.model.name = "mlp"
    config.model.features = (2048, 2048)
    config.dense_gradient_steps = config_dict.placeholder(int)  # None: on all steps
    common.decay_every(config, 2 * 540)
    config.method.sparsity = 0.9
    if unit == "blocks":
        config.model.blocks = BLOCKS
        del config.method.structure
        config.method.structure = ConfigDict({
            f"fc{i}/kernel": {"name": "block", "bm": block[0], "bn": block[1]}
            for i, block in enumerate(BLOCKS, 1)
            if block is not None
        })  # fmt: skip
    config.smoke_overrides.checkpoint_every_epochs = 1
    config.smoke_overrides.model = ConfigDict({"features": (512, 512)})
    return config
