"""Options of RigL side by side: LeNet-300-100 on MNIST, 20 epochs each, at 90 and 98% zeros, three seeds.

  python -m experiments.sweep --config=configs/sweeps/mnist_rigl_options.py --config.data_dir=DIR --workdir=runs/rigl

DIR is where TensorFlow Datasets has MNIST as array_record. The recipe is that of mnist_lenet_300_100.py: SGD with
Nesterov momentum, and for the arms whose names begin with "adam" Adam, with a learning rate that falls from 0.001 to 0
along a cosine.

"hold" takes no optimizer step on the steps on which masks change, as in the paper; "accumulate" grows by the gradients
of eight steps; "bias_correction" corrects the averages of regrown weights by their own age.
"""

from ml_collections import ConfigDict

from configs import common

EPOCHS, LAST = 20, 15
ADAM = {
    "name": "adam",
    "learning_rate": {"name": "cosine_decay_schedule", "init_value": 1e-3, "decay_steps_epochs": common.ALL_EPOCHS},
}


def rigl(**options: object) -> dict:
    """An arm: RigL with these options, five mask updates an epoch."""
    return {"method": {"name": "rigl", "update_every_epochs": 0.2, "stop_at_epochs": LAST, **options}}


ARMS = {
    "dense": {"dense": True},
    "rigl": rigl(),
    "hold": rigl(hold=True),
    "accumulate": rigl(accumulate=8),
    "uniform": rigl(allocation="uniform"),
    "adam": rigl() | {"optimizer": ADAM, "weight_decay": 0.0},
    "adam_hold": rigl(hold=True) | {"optimizer": ADAM, "weight_decay": 0.0},
    "adam_bias_correction": rigl(bias_correction=(0.9, 0.999)) | {"optimizer": ADAM, "weight_decay": 0.0},
}


def get_config() -> ConfigDict:
    """The sweep."""
    config = common.mnist(common.training(), "lenet_300_100")
    config.epochs = EPOCHS
    config.eval_every_epochs = 10
    config.optimizer = ConfigDict({"name": "sgd", "momentum": 0.9, "nesterov": True})
    common.cosine(config)
    config.smoke_overrides.optimizer = ConfigDict()  # arms may have another
    config.smoke_overrides.epochs = LAST + 2  # fewer would end before the masks do
    config.smoke_overrides.data.update({"examples": 10 * 64, "batch_size": 64})
    config.smoke_overrides.eval_every_epochs = EPOCHS
    config.sweep = ConfigDict({
        "name": "sweep_mnist_rigl_options",
        "title": "RigL: LeNet-300-100 on MNIST, 20 epochs",
        "sparsities": (0.9, 0.98),
        "seeds": (0, 1, 2),
        "arms": [{"name": name, **arm} for name, arm in ARMS.items()],
        # Of a run on two CPU cores, for the estimate before any run is finished.
        "seconds": {"epoch": 0.8, "start": 4.0},
    })  # fmt: skip
    return config
