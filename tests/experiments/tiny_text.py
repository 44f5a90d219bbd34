"""A small text in files, and configurations of a tiny GPT that reads it."""

import runpy
from pathlib import Path

import numpy as np

from experiments import options

ROOT = Path(__file__).parents[2]
WORDS = b"if else for in while return def class import from x y z = + ( ) : \n".split(b" ")


def write(folder, files=16, words=120):
    """Files of random words, the same on every call."""
    random = np.random.RandomState(0)
    for i in range(files):
        path = folder / f"part_{i % 3}" / f"file_{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b" ".join(WORDS[j] for j in random.randint(0, len(WORDS), words)))
    return folder


def config(folder, method="rigl", **changes):
    """A GPT of one block and 8 channels; 6 steps an epoch, of 8 windows of 8 bytes."""
    made = runpy.run_path(str(ROOT / "configs/text_gpt.py"))["get_config"](method)
    made = options.small(made).lock()
    made.update_from_flattened_dict({
        "data.files": str(folder), "data.test": 0.2, "data.length": 8, "data.batch_size": 8, "data.examples": None,
        "data.epoch_tokens": 6 * 8 * 8, "data.eval_windows": None, "model.width": 8, "model.num_layers": 1,
        "model.num_heads": 2, "epochs": 2, "log_every_steps": 3, "eval_every_epochs": 1, "warmup_epochs": 0.5,
    })  # fmt: skip
    if "stop_at_epochs" in made.method:
        made.method.stop_at_epochs = 2
    made.update_from_flattened_dict(changes)
    return made
