"""A GPT of 3 million weights that predicts bytes: the source of Python's standard library, 6.1 million tokens.

  python -m experiments.train --config=configs/text_gpt.py --workdir=/tmp/gpt                # sparse momentum
  python -m experiments.train --config=configs/text_gpt.py:rigl --workdir=/tmp/rigl --config.method.sparsity=0.8
  python -m experiments.train --config=configs/text_gpt.py --config.data.files=FOLDER ...    # another text

  argument              weights of the blocks kept
  sparse_momentum       10%, moved to where momentum is large
  rigl                  10%, moved to where gradients are large
  rigl_bias_correction  the same; Adam's averages of weights that are grown are corrected by their own age
  magnitude_pruning     all at first; the smallest go along the cubic schedule until 10% are left
  static                10%, random ones, which stay
  dense                 all

Four blocks of 256 channels and 4 heads, windows of 256 bytes, batches of 16: 4,096 tokens a step. An epoch is 100 steps
and a run 15 of these, on all methods the same tokens. AdamW with clipped gradients, a warm-up of 100 steps, and a
learning rate that falls from 0.001 along a cosine. Embeddings, which are the last layer too, positions, biases and
norms stay dense. Masks change every 50 steps until three quarters of the steps. Of the weights that are kept, fixed
random masks and RigL have larger shares in smaller kernels (Erdős-Rényi), the others the same share in each to begin
with. Nothing of this was tuned. ``configs/sweeps/text_gpt.py`` has them side by side.
"""

from ml_collections import ConfigDict

from configs import common

EPOCHS, LAST = 15, 11  # after LAST epochs masks stay
BETAS = {"b1": 0.9, "b2": 0.95}
EXPERIMENTS = ("sparse_momentum", "rigl", "rigl_bias_correction", "magnitude_pruning", "static", "dense")

MOVED = {"update_every_epochs": 0.5, "stop_at_epochs": LAST}
METHODS = {
    "sparse_momentum": {
        "name": "sparse_momentum", **MOVED,
        "prune_rate": {"name": "cosine_prune_rate", "init_value": 0.3, "steps_epochs": LAST},
    },
    "rigl": {"name": "rigl", **MOVED},
    "rigl_bias_correction": {"name": "rigl", **MOVED, "bias_correction": tuple(BETAS.values())},
    "magnitude_pruning": {"name": "magnitude_pruning", "begin_epochs": 2, "end_epochs": LAST, "every_epochs": 0.5},
    # Sparse momentum that replaces no weights.
    "static": {
        "name": "sparse_momentum", "prune_rate": 0.0, "redistribution": "none", "growth": "random",
        "allocation": "erdos_renyi", "update_every_epochs": 1,
    },
}  # fmt: skip
SMOKE = {"stop_at_epochs": 3, "begin_epochs": 1, "end_epochs": 3}
PRUNED = ("block*/*",)  # of these all kernels; biases and norms are left out by default


def training() -> ConfigDict:
    """All keys but the method's."""
    config = common.text(common.training())
    config.epochs = EPOCHS
    config.eval_every_epochs = 5
    config.log_every_steps = 50
    config.data.batch_size = 16
    config.data.epoch_tokens = 100 * 16 * 256
    config.model.update({"name": "gpt", "width": 256, "num_layers": 4, "num_heads": 4, "dropout": 0.0})
    config.clip_norm = 1.0
    config.weight_decay = 0.0  # AdamW has its own, behind Adam
    config.warmup_epochs = 1.0
    config.optimizer = ConfigDict({"name": "adamw", **BETAS, "weight_decay": 0.1})
    common.cosine(config, init_value=1e-3)
    config.smoke_overrides.model = ConfigDict({"width": 32, "num_layers": 2})
    return config


def get_config(method: str = "sparse_momentum") -> ConfigDict:
    """The configuration of a method, or of the dense network."""
    if method not in EXPERIMENTS:
        raise ValueError(f"this config comes with {', '.join(map(repr, EXPERIMENTS))}, got {method!r}")
    config = training()
    config.dense = method == "dense"
    chosen = METHODS["sparse_momentum" if config.dense else method]
    config.method = ConfigDict({**chosen, "sparsity": 0.9, "prunable": PRUNED})
    config.smoke_overrides.method = ConfigDict({key: SMOKE[key] for key in chosen if key in SMOKE})
    return config
