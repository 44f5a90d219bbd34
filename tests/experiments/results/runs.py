"""Finished runs that were never trained."""

from pathlib import Path

from experiments.results.collect import Run
from jaxsparse import inspect


def made_up(name, *, accuracy, density=0.1, seed=0, dense=False, history=(), **method):
    """A finished run with this configuration and result."""
    config = {"dense": dense, "seed": seed, "method.name": "sparse_momentum"}
    config |= {f"method.{key}": value for key, value in method.items()}
    result = {"test_accuracy": accuracy, "density": 1.0 if dense else density}
    return Run(name, Path("runs") / name, config, inspect.History(history), result)
