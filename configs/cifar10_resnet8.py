"""ResNet-8 of MLPerf Tiny on CIFAR-10, 78 thousand weights, with every kind of method: two CPU cores train it.

  python -m experiments.train --config=configs/cifar10_resnet8.py --config.data_dir=DIR --workdir=/tmp/resnet8
  python -m experiments.train --config=configs/cifar10_resnet8.py:rigl --config.method.sparsity=0.95 ...
  python -m experiments.stages --config=configs/stages/asni.py:cifar10_resnet8 ...      # ASNI-I, then II on its masks
  python -m experiments.reproduce cifar10_resnet8 --data_dir=DIR                          # all of them, side by side

  argument             weights kept
  sparse_momentum      10%, moved to where momentum is large
  rigl                 10%, moved to where gradients are large
  sparse_evolutionary  10%, moved at random
  magnitude_pruning    all at first; the smallest go along the cubic schedule until 10% are left
  asni                 the same over all layers together, along a sigmoid
  sr_ste               2 of every 4 inputs
  rda                  as many as the l1 leaves: generalised dual averaging
  rda_channel          the same by channels
  l0, dep_l0           channels whose gates stay open, independent or dependent
  dense                all

DIR is where TensorFlow Datasets has CIFAR-10 as array_record. All 50,000 train images, padded by 2 pixels, cropped and
mirrored, batches of 32, 25 epochs. Muon for convolutions, Adam for the rest; a learning rate that rises for an epoch
and falls along a cosine. Masks change until 20 epochs. The reference is trained for 500 epochs
(https://github.com/mlcommons/tiny) and has 87.0% accuracy. Dual averaging is an optimizer itself, so to compare methods
rather than optimizers, an argument that ends in "_sgd", such as magnitude_pruning_sgd, has SGD with Nesterov momentum.
"""

from ml_collections import ConfigDict

from configs import common

EPOCHS, LAST = 25, 20
UPDATES = {"update_every_epochs": 0.5, "stop_at_epochs": LAST}

METHODS = {
    "sparse_momentum": {
        "name": "sparse_momentum", "sparsity": 0.9, **UPDATES,
        "prune_rate": {"name": "cosine_prune_rate", "init_value": 0.5, "steps_epochs": LAST},
    },
    "rigl": {"name": "rigl", "sparsity": 0.9, **UPDATES},
    "sparse_evolutionary": {"name": "sparse_evolutionary", "sparsity": 0.9, **UPDATES},
    "magnitude_pruning": {
        "name": "magnitude_pruning", "sparsity": 0.9, "begin_epochs": 1, "end_epochs": LAST, "every_epochs": 0.5,
    },
    "asni": {
        "name": "asni",
        "sparsity": {
            "name": "sigmoid_sparsity", "magnitude": 0.9, "begin_epochs": 1, "steps_epochs": LAST, "scale_epochs": 3.0,
            "normalised": True,
        },
        "update_every_epochs": 1,
    },
    # The first convolution has 3 input channels: half of its weights stay, whichever are the largest.
    "sr_ste": {"name": "sr_ste", "n": 2, "m": 4, "ragged": "warn"},
}  # fmt: skip
SMOKE = {"stop_at_epochs": 3, "end_epochs": 3}
RDA, GATES = ("rda", "rda_channel"), ("l0", "dep_l0")
EXPERIMENTS = (*METHODS, *RDA, *GATES, "dense")
SGD = tuple(f"{name}_sgd" for name in (*METHODS, *GATES, "dense"))


def get_config(method: str = "sparse_momentum") -> ConfigDict:
    """The configuration of a method, or of the dense network."""
    if method not in (*EXPERIMENTS, *SGD):
        raise ValueError(f"this config comes with {', '.join(map(repr, (*EXPERIMENTS, *SGD)))}, got {method!r}")
    sgd, method = method in SGD, method.removesuffix("_sgd")
    base = common.rda() if method in RDA else common.gates(method) if method in GATES else common.training()
    config = common.cifar(base)
    config.epochs = EPOCHS
    config.eval_every_epochs = 5
    config.checkpoint_every_epochs = 1
    config.log_every_steps = 195
    config.data.batch_size = 32
    config.data.pad = 2
    config.model.name = "resnet_8"
    config.weight_decay = 2e-4
    config.dense = method == "dense"
    if method in RDA:
        config.optimizer.schedules.init_value = 0.5  # as far as SGD's 0.05 goes with its momentum of 0.9
        config.method.structure = "channel" if method == "rda_channel" else "weight"
        return config
    config.warmup_epochs = 1.0
    if sgd:
        config.optimizer = ConfigDict({"name": "sgd", "momentum": 0.9, "nesterov": True})
        common.cosine(config, 0.05)
    else:
        config.weight_decay = 0.0  # Muon's own is decoupled
        muon = {"adam_factor": 0.1, "ns_steps": 3, "beta": 0.9, "weight_decay": 0.01}
        config.optimizer = ConfigDict({"name": "muon_of_convolutions", **muon})
        common.cosine(config, 0.02)
    if method in GATES:
        config.method.penalty.update({"counts": "neighbours", "strength": 1e-6})
        config.method.gate_optimizer = ConfigDict({"name": "adam", "learning_rate": 1e-3})
        config.method.freeze_gates_at_epochs = LAST
        config.smoke_overrides.method = ConfigDict({"freeze_gates_at_epochs": 3})
        return config
    config.method = ConfigDict(METHODS["sparse_momentum" if config.dense else method])
    config.smoke_overrides.method = ConfigDict({key: SMOKE[key] for key in config.method if key in SMOKE})
    if method == "asni":
        config.smoke_overrides.method = ConfigDict({"sparsity": {"steps_epochs": 3, "scale_epochs": 0.4}})
    return config
