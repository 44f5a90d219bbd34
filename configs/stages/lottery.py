"""Lottery tickets: train, prune a fifth of the weights that are left, rewind, and again, round after round.

Frankle and Carbin, *The Lottery Ticket Hypothesis*, 2019 (arXiv:1803.03635): LeNet-300-100 on MNIST, SGD with learning
rate 0.1, batches of 60, 50,000 steps, 5,000 images held out; a round takes a fifth of the weights of each layer, a
tenth of the last one's. Frankle et al., *Linear Mode Connectivity and the Lottery Ticket Hypothesis*, 2020
(arXiv:1912.05671), rewind not to the first step but to one soon after it; Renda, Frankle and Carbin, *Comparing
Rewinding and Fine-tuning in Neural Network Pruning*, 2020 (arXiv:2003.02389), keep the weights and rewind the learning
rate alone.

  argument              each round starts from
  mnist_original        the random weights of round 0
  mnist_late            the weights of round 0 after its first epoch, and goes on from that epoch
  mnist_learning_rate   the weights that the round before ended with, the learning rate from its start
  digits_original, digits_late, digits_learning_rate: the same on scikit-learn's digits
  digits_fine_tune      as the one before, but with the last learning rate throughout

  python -m experiments.stages --config=configs/stages/lottery.py:mnist_late --config.data_dir=DIR --workdir=runs/ticket
  python -m experiments.stages ... --seeds=0,1,2 --only=round_0,round_1,round_2

The optimizer starts afresh in every round; learning rate and order of the images are those of the epoch that it starts
at. (The learning rate of MNIST is constant, so there to rewind it is to go on training.) In three things this is not
the code of Frankle and Carbin: layers start from uniform weights, there are 55 epochs, which are 50,380 steps, and a
round prunes the fifth exactly, theirs one weight more.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import common, digits_sparse_momentum

ROUNDS = {"mnist": 20, "digits": 12}  # 0.8^20 is 1.2% of the weights, 0.8^12 6.9%
REWINDS = {
    "mnist": {
        "original": {"rewind": "round_0"},
        "late": {"rewind": "round_0", "start_epochs": 1.0},
        "learning_rate": {"start": "weights"},
    },
    "digits": {
        "original": {"rewind": "round_0"},
        "late": {"rewind": "round_0", "start_epochs": 2.0},
        "learning_rate": {"start": "weights"},
        "fine_tune": {
            "start": "weights", "optimizer.learning_rate.init_value": 1e-3, "optimizer.learning_rate.decay_rate": 1.0
        },
    },
}  # fmt: skip
EXPERIMENTS = tuple(f"{data}_{rewind}" for data, rewinds in REWINDS.items() for rewind in rewinds)


def get_config(experiment: str = "mnist_original") -> ConfigDict:
    """The rounds of an experiment, one of :data:`EXPERIMENTS`."""
    if experiment not in EXPERIMENTS:
        raise ValueError(f"this config comes with the experiments {', '.join(EXPERIMENTS)}, got {experiment!r}")
    data, _, rewind = experiment.partition("_")
    config = {"mnist": mnist, "digits": digits}[data]()
    config.stages = rounds(ROUNDS[data], REWINDS[data][rewind], lambda n: {"fc3": 1 - 0.9**n, "*": 1 - 0.8**n})
    return config


def rounds(count: int, how: dict, sparsity: Callable, **options: object) -> list[dict]:
    """The stages: round_0 is dense, and each one after it starts from the masks of the one before.

    Args:
      count: of the rounds after the first.
      how: keys of all stages but the first, which say what is rewound.
      sparsity: number of a round -> the fraction of all weights that are pruned then, of the network or by layer.
      **options: of jaxsparse.magnitude_masks, such as ``allocation="global"``.
    """
    stages: list[dict] = [{"name": "round_0", "dense": True}]
    for n in range(1, count + 1):
        prune = {"name": "magnitude_masks", "sparsity": sparsity(n), **options}
        stages.append({"name": f"round_{n}", "after": f"round_{n - 1}", "prune": prune, **how})
    return stages


def mnist() -> ConfigDict:
    """The recipe of Frankle and Carbin."""
    config = common.mnist(common.training(), "lenet_300_100")
    config.epochs = 55
    config.data.batch_size = 60
    config.data.validation = 1 / 12
    config.log_every_steps = 916
    config.weight_decay = 0.0
    config.optimizer = ConfigDict({"name": "sgd", "learning_rate": 0.1})
    return config


def digits() -> ConfigDict:
    """The recipe of configs/digits_sparse_momentum.py."""
    config = digits_sparse_momentum.get_config()
    config.method = ConfigDict()
    return config
