"""Methods side by side: LeNet-300-100 on MNIST, 20 epochs each, at 80, 90, 95, 98 and 99% zeros, three seeds.

  python -m experiments.sweep --config=configs/sweeps/mnist_lenet_300_100.py --config.data_dir=DIR --workdir=runs/sweep

DIR is where TensorFlow Datasets has MNIST as array_record. All arms have batches of 100, the same 54,000 images and,
unless an arm says otherwise, SGD with Nesterov momentum 0.9, a learning rate that falls from 0.1 to 0 along a cosine,
and weight decay 5e-4. Methods that prune gradually do so once an epoch until epoch 15, and until then those that grow
weights change their masks, once an epoch as well, RigL and SRigL five times; GraNet goes on to the end.

An arm is a change of the config, see experiments/sweep.py.
"""

from ml_collections import ConfigDict

from configs import common

EPOCHS, LAST = 20, 15
SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)
GRID = "config.sweep.sparsities"
TWO, ONE, SIXTEENTH, TENTH = ({"name": "n_of_m", "n": n, "m": m} for n, m in ((2, 4), (1, 4), (1, 16), (1, 10)))
# The layers have 784, 300 and 100 inputs, which 4 divides, but not 8 or 16.
N_OF_M = (TWO, ONE, {"fc1/kernel": SIXTEENTH, "fc2/kernel": TENTH, "fc3/kernel": TENTH})
ADAM = {"name": "adam", "learning_rate": 1e-3}
DROP = {"name": "cosine_prune_rate", "init_value": 0.3, "steps_epochs": LAST}
GATES = {"gate_optimizer": ADAM, "freeze_gates_at_epochs": 16}


def grown(**options: object) -> dict:
    """An arm whose masks change once an epoch."""
    return {"method": {"update_every_epochs": 1, **options}}


def pruned(**options: object) -> dict:
    """An arm that prunes along the cubic schedule, once an epoch."""
    return {"method": {"begin_epochs": 1, "end_epochs": LAST, "every_epochs": 1, **options}}


def gates(strengths: tuple, **options: object) -> dict:
    """An arm whose gates close under a penalty, by Adam."""
    penalty = {"name": "Penalty", "counts": "all", "examples": 54_000}
    return {
        "optimizer": ADAM, "weight_decay": 0.0, "method": {"penalty": penalty, **GATES, **options},
        "each": {"method.penalty.strength": strengths},
    }  # fmt: skip


def at_start(score: str) -> dict:
    """An arm that is pruned before it trains."""
    return {"method": {"name": "prune_at_init", "score": score}}


# Sparse momentum that replaces no weights: fixed random masks.
FIXED = {"name": "sparse_momentum", "prune_rate": 0.0, "redistribution": "none", "growth": "random"}
ARMS = {
    "dense": {"dense": True},
    "random": grown(**FIXED),
    "random_erdos_renyi": grown(**FIXED, allocation="erdos_renyi"),
    "snip": at_start("snip"),
    "grasp": at_start("grasp"),
    "synflow": at_start("synflow"),
    "sparse_momentum": grown(name="sparse_momentum", prune_rate=DROP | {"init_value": 0.5}, stop_at_epochs=LAST),
    "sparse_evolutionary": grown(name="sparse_evolutionary", stop_at_epochs=LAST),
    "rigl": {"method": {"name": "rigl", "update_every_epochs": 0.2, "stop_at_epochs": LAST}},
    "granet": grown(name="granet", steps_epochs=common.ALL_EPOCHS),
    "srigl": {
        "method": {"name": "srigl", "update_every_epochs": 0.2, "stop_at_epochs": LAST, "never_ablate": "fc3"}
    },
    "magnitude": pruned(name="magnitude_pruning"),
    "magnitude_global": pruned(name="magnitude_pruning", scope="global"),
    "magnitude_lamp": pruned(name="magnitude_pruning", scope="lamp"),
    "asni": grown(
        name="asni",
        sparsity={
            "name": "sigmoid_sparsity", "begin_epochs": 1, "steps_epochs": LAST, "scale_epochs": 2, "normalised": True
        },
    ) | {"each": {"method.sparsity.magnitude": GRID}},
    "ac_dc": {
        "method": {
            "name": "ac_dc",
            "phases": {"name": "ac_dc_phases", "steps_epochs": common.ALL_EPOCHS, "recipe": "imagenet"},
        },
    },
    "iterative_hard_thresholding": {
        "method": {
            "name": "iterative_hard_thresholding",
            "sparsity": {
                "name": "polynomial_schedule", "init_value": 0.0, "power": 3, "transition_steps_epochs": LAST
            },
        },
        "each": {"method.sparsity.end_value": GRID},
    },
    "straight_through": {"method": {"name": "straight_through"}},
    "top_kast": {"method": {"name": "top_kast", "backward_sparsity": 0.5}, "weight_decay": 0.0},
    "powerpropagation": {
        "weight_decay": 0.0,
        "method": {
            "name": "powerpropagation",
            "prune": {"name": "magnitude_pruning", "begin_epochs": 1, "end_epochs": LAST, "every_epochs": 1},
        },
        "each": {"method.prune.sparsity": GRID},
    },
    "admm": {
        "method": {
            "name": "admm",
            "every": 30,
            "penalty": {"name": "rising_cosine", "end_value": 1e-3, "steps_epochs": common.ALL_EPOCHS},
        },
    },
    "spartan": {"method": {"name": "spartan", "warmup_epochs": 4, "freeze_at_epochs": 16}},
    # Of the weights from every m inputs, n are kept.
    "sparse_momentum_n_of_m": grown(name="sparse_momentum", sparsity=0.0, prune_rate=DROP, stop_at_epochs=LAST)
    | {"each": {"method.structure": N_OF_M}},
    "sr_ste": {"method": {"name": "sr_ste", "m": 4}, "each": {"method.n": (2, 1)}},
    "s_ste": {"method": {"name": "s_ste", "m": 4}, "each": {"method.n": (2, 1)}},
    # How many weights stay follows from the strength.
    "rda": {
        "optimizer": {
            "name": "velocity",
            "schedules": {"name": "rda_cosine", "init_value": 1.0, "steps_epochs": common.ALL_EPOCHS},
            "momentum_time": 9.5,
        },
        "method": {
            "name": "reweighted_l1", "schedules": "config.optimizer.schedules", "max_factor": 500.0,
            "weight_time": "config.optimizer.momentum_time",
        },
        "each": {"method.l1": (1e-6, 5e-6, 1.5e-5)},
    },
    "l0": gates((0.5, 1.0, 2.0), name="l0", log_alpha=2.0, clamp=(-4.605, 4.605)),
    "dep_l0": gates((0.5, 1.0, 3.0), name="dep_l0"),
    "soft_threshold": {
        "method": {"name": "soft_threshold", "init": -5.0}, "each": {"weight_decay": (5e-4, 1e-3, 2e-3)}
    },
}  # fmt: skip

# The panels of the picture.
GROUPS = {
    "Fixed masks": ("random", "random_erdos_renyi", "snip", "grasp", "synflow"),
    "Dropped and grown": ("sparse_momentum", "sparse_evolutionary", "rigl", "granet", "srigl"),
    "From dense to sparse": (
        "magnitude", "magnitude_global", "magnitude_lamp", "asni", "ac_dc", "iterative_hard_thresholding",
    ),
    "Dense weights behind sparse ones": ("straight_through", "top_kast", "powerpropagation", "admm", "spartan"),
    "n of every m inputs": ("sparse_momentum_n_of_m", "sr_ste", "s_ste"),
    "Sparsity that follows from a penalty": ("rda", "l0", "dep_l0", "soft_threshold"),
}  # fmt: skip


def get_config() -> ConfigDict:
    """The sweep."""
    config = common.mnist(common.training(), "lenet_300_100")
    config.epochs = EPOCHS
    config.eval_every_epochs = 10
    config.optimizer = ConfigDict({"name": "sgd", "momentum": 0.9, "nesterov": True})
    common.cosine(config)

    config.smoke_overrides.optimizer = ConfigDict()  # arms may have another
    config.smoke_overrides.epochs = LAST + 2  # fewer would end before the masks do
    config.smoke_overrides.data.update({"examples": 6 * 64, "batch_size": 64})  # five steps in an epoch
    config.smoke_overrides.eval_every_epochs = EPOCHS
    config.sweep = ConfigDict({
        "name": "sweep_mnist_lenet_300_100",
        "title": "LeNet-300-100 on MNIST, 20 epochs",
        "sparsities": SPARSITIES,
        "seeds": (0, 1, 2),
        "arms": [{"name": name, **arm} for name, arm in ARMS.items()],
        "groups": tuple(GROUPS.items()),  # in this order
        # Of a run on two CPU cores, for the estimate before any run is finished.
        "seconds": {"epoch": 0.8, "start": 4.0},
    })  # fmt: skip
    return config
