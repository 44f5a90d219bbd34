"""Sparse from scratch, side by side: a byte-level GPT of 3 million weights at 80 and 90% zeros, equal tokens.

  python -m experiments.sweep --config=configs/sweeps/text_gpt.py --workdir=runs/text_gpt

The recipe is that of configs/text_gpt.py. The first seed is trained at both sparsities, the second at 90%. Runs are
compared by their loss on held-out files of the standard library.
"""

from ml_collections import ConfigDict

from configs import text_gpt

ARMS = {
    "dense": {"dense": True},
    **{name: {"method": {**method, "prunable": text_gpt.PRUNED}} for name, method in text_gpt.METHODS.items()},
}


def get_config() -> ConfigDict:
    """The sweep."""
    config = text_gpt.training()
    config.smoke_overrides.epochs = text_gpt.LAST + 2  # fewer would end before the masks do
    config.smoke_overrides.data.update({"epoch_tokens": 4 * 8 * 32})  # four steps in an epoch
    config.sweep = ConfigDict({
        "name": "sweep_text_gpt",
        "title": "A byte-level GPT of 3 million weights, 6.1 million tokens",
        "sparsities": (0.8, 0.9),
        "seeds": (0, 1),
        "sparsities_of_seed": {"1": (0.9,)},
        "arms": [{"name": name, **arm} for name, arm in ARMS.items()],
        # Of a run on two CPU cores, for the estimate before any run is finished.
        "seconds": {"epoch": 100.0, "start": 30.0},
    })  # fmt: skip
    return config
