"""The outputs of a run: the lines of its metrics, its pictures, and its result."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxsparse
from experiments.program import Program, TrainState
from experiments.workdir import Workdir, WorkdirError
from jaxsparse import inspect, models
from jaxsparse.groups import group_sizes


def chunk_metrics(chunk: Mapping[str, Any], updated: bool) -> dict[str, Any]:
    """The metrics to log for a chunk of steps; the flips only if masks were updated in it."""
    metrics = {
        "train_loss": chunk["losses"].mean(dtype=float),
        "train_accuracy": chunk["accuracies"].mean(dtype=float),
        "density": round(float(chunk["density"]), 6),
    }
    if "divergences" in chunk:
        metrics["train_divergence"] = chunk["divergences"].mean(dtype=float)
    metrics |= {name: round(float(share), 6) for name, share in chunk["remaining"].items()}
    if chunk["layer_density"]:
        metrics["layer_density"] = {path: round(float(share), 6) for path, share in chunk["layer_density"].items()}
        flips = {path: int(flips) for path, flips in chunk["flips"].items()}
        if updated or any(flips.values()):
            metrics["flips"] = flips
    return metrics


def draw(run: Workdir, state: TrainState, program: Program) -> None:
    """The pictures of a run, as far as it has come."""
    history = inspect.read_history(run.path)
    inspect.plot_history(history).savefig(run.path / "learning_curve.png")
    if run.config.dense:
        return
    masks = inspect.current_masks(state.opt_state, state.params)
    inspect.plot_layer_densities(history).savefig(run.path / "layer_densities.png")
    inspect.plot_masks(masks).savefig(run.path / "masks.png")
    if program.optimizer.groups is None:
        params = jaxsparse.eval_params(state.opt_state, state.params)
        inspect.plot_weights(masks, params).savefig(run.path / "weights.png")
    image_shape = program.task.shape
    if len(image_shape) != 3:  # of text: no filters to see
        return
    for mask in jax.tree.leaves(masks):
        if mask.shape == (np.prod(image_shape),):  # gates on the pixels
            mask = mask[:, None]
        of_pixels = mask.ndim == 2 and len(mask) == np.prod(image_shape)
        if of_pixels or (mask.ndim == 4 and mask.shape[2] == image_shape[2]):
            inspect.plot_receptive_fields(mask, image_shape).savefig(run.path / "receptive_fields.png")
            break


def finish(run: Workdir, state: TrainState, program: Program, steps: int) -> None:
    """Checks the masks, writes and prints the result; with gates, that of the model without its closed channels.

    Raises:
      WorkdirError: if nothing was logged of the last of the ``steps``, as where metrics.jsonl was deleted.
    """
    model, groups = program.model, program.optimizer.groups
    if not run.config.dense:
        jaxsparse.check(state.opt_state, state.params)
    lines = run.metrics()
    if not lines or lines[-1]["step"] != steps:
        raise WorkdirError(
            f"{run.path / 'metrics.jsonl'} has lost the last steps: delete the newest folder in checkpoints, and the "
            "same command repeats them from the one before"
        )
    result = {"dense": run.config.dense, "seed": run.config.seed, "steps": lines[-1]["step"]}
    names = ("density", "validation", "test", "multiply_adds")
    result |= {name: value for name, value in lines[-1].items() if name.startswith(names)}
    what, of_an_input = program.task.unit
    if what == "tokens":
        result["tokens"] = result["steps"] * run.config.data.batch_size * of_an_input
    if program.task.about:
        result["data"] = program.task.about
    result["seconds"] = sum(line["seconds"] for line in lines)
    masks, widths = inspect.current_masks(state.opt_state, state.params), ""
    places = program.positions()
    if groups is not None:
        params = jaxsparse.eval_params(state.opt_state, state.params)
        small, slim_params, _ = models.slim(model, params, state.model_state.get("batch_stats"))
        sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (slim_params, params)]
        result["density"] = sizes[0] / sizes[1] * program.left["params"]
        result["widths"] = list(group_sizes(models.channel_groups(small), slim_params))
        widths = f" ({'-'.join(map(str, result['widths']))})"
        print(jaxsparse.remaining(state.params, groups, masks, places))
        jaxsparse.save_sparse(run.path / "sparse.safetensors", params)
    else:
        print(jaxsparse.summary(masks, state.params, positions=places))
        if not run.config.dense:
            params = jaxsparse.eval_params(state.opt_state, state.params)
            jaxsparse.save_sparse(run.path / "sparse.safetensors", params, masks)
    run.finish(result)
    print(
        f"{program.task.said(result)} at density {result['density']:g}{widths}, "
        f"{result['seconds']:.1f} s; see {run.path}"
    )


def keep(runs: Sequence[Any], epochs: Sequence[float], state: TrainState, seeds: Sequence[int] | None) -> None:
    """Writes the params that every run has after this many epochs to a file of their own."""
    if jax.process_index() == 0:
        for run, params in zip(runs, one_a_run(state.params, seeds), strict=True):
            for number in epochs:
                jaxsparse.save_sparse(kept_file(run.path, number), params)


def kept_file(folder: Path, epochs: float) -> Path:
    """The file of the params that a run had after one of ``config.keep_epochs``."""
    return folder / f"epoch_{epochs:g}.safetensors"


def one_a_run(tree: Any, seeds: Sequence[int] | None) -> list[Any]:
    """The tree, or for each seed its part of a tree with a leading axis."""
    if seeds is None:
        return [tree]
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(len(seeds))]
