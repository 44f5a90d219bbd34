"""Pruning before training, by scores of the weights that a run starts with: a method of the trainer.

``config.method = {"name": "prune_at_init", "score": "snip", "sparsity": 0.98}`` makes the masks when a run starts, for
each seed its own, by examples of the train split where the score asks for a loss; after that they stay
(:func:`jaxsparse.mask_updates`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsparse
from experiments import data
from experiments.options import choose
from experiments.tasks import Task, TextTask
from jaxsparse import saliency
from jaxsparse.allocation import check_sparsities

_TEMPERATURES = {"snip": 1.0, "grasp": 200.0}  # of the scores that are of a loss, as their authors have them
_SCORES = ("snip", "grasp", "synflow", "magnitude", "random")


class Pruner(NamedTuple):
    """The options of :func:`prune_at_init`, which make masks of the weights that a run starts with."""

    score: str
    sparsity: Any
    examples: int
    temperature: float
    rounds: int
    options: Mapping[str, Any]

    def check(self, task: Task, streamed: bool) -> None:
        """Raises a ValueError if the train split has no such examples to score by."""
        dataset = task.dataset
        if isinstance(task, TextTask) and self.score in ("grasp", "synflow"):
            needs = "examples of every class" if self.score == "grasp" else "inputs that can be ones, not tokens"
            raise ValueError(f"the score {self.score!r} is for images: it takes {needs}")
        if self.score not in _TEMPERATURES:
            return
        if streamed:
            raise ValueError(
                f"the score {self.score!r} takes images that fit into the memory, not config.data.streamed"
            )
        if self.examples > data.count(dataset.train):
            raise ValueError(f"examples is at most the {data.count(dataset.train)} train examples, got {self.examples}")
        if self.score == "grasp":
            each, counts = self.examples // dataset.num_classes, _counts(dataset)
            if not 1 <= each <= counts.min():
                raise ValueError(
                    f"examples is shared equally by the {dataset.num_classes} classes, of which the smallest has "
                    f"{counts.min()} train examples, got {self.examples}"
                )

    def inputs(self, key: jax.Array, task: Task, train: Any) -> tuple[jax.Array, jax.Array]:
        """The inputs to score by, drawn at random, and what is to be predicted; for GraSP equally many of a class."""
        if isinstance(task, TextTask):
            numbers = jax.random.randint(key, (self.examples,), 0, len(train.tokens) - train.length)
        else:
            numbers = jax.random.permutation(key, len(train.labels))
        if self.score == "grasp":
            counts = _counts(task.dataset)
            by_class = numbers[jnp.argsort(train.labels[numbers], stable=True)]
            first = np.cumsum([0, *counts[:-1]])
            numbers = by_class[(first[:, None] + np.arange(self.examples // len(counts))).reshape(-1)]
        examples, targets, _ = task.look_up(numbers[: self.examples], train)
        return task.inputs(examples), targets

    def masks(
        self,
        key: jax.Array,
        params: Any,
        model: Any,
        collections: Mapping[str, Any],
        task: Task,
        train: Any,
    ) -> tuple[Any, jax.Array]:
        """The masks, and how many scores are not finite, int32.

        Args:
          key: PRNG key, of the examples and of random scores.
          params: the weights that the run starts with.
          model: a Flax module.
          collections: its other collections, such as batch statistics.
          task: of the run.
          train: its train split, on the device; None for scores that need none.
        """
        draw, key = jax.random.split(key)
        if self.score == "synflow":
            positive = jax.tree.map(jnp.abs, dict(collections))
            apply = functools.partial(_logits, model, positive)
            inputs = jax.ShapeDtypeStruct((1, *task.shape), task.dtype)
            scores = saliency.synflow(apply, params, inputs)
            options = {name: value for name, value in self.options.items() if name not in ("scope", "allocation")}
            masks = saliency.synflow_masks(apply, params, inputs, self.sparsity, self.rounds, **options)
            return masks, _not_finite(scores)
        if self.score in _TEMPERATURES:
            inputs, labels = self.inputs(draw, task, train)

            def loss(params):
                # GraSP's authors have batch statistics of these images, SNIP's those that the network starts with.
                logits = _logits(model, collections, params, inputs, mutable=self.score == "grasp")
                of_each = optax.softmax_cross_entropy_with_integer_labels(logits / self.temperature, labels)
                return jnp.mean(of_each)

            if self.score == "snip":
                scores = saliency.snip(loss, params)
            else:
                chosen = {name: self.options[name] for name in ("prunable", "layout")}
                scores = saliency.grasp(loss, params, **chosen)
        else:
            scores = saliency.magnitude(params) if self.score == "magnitude" else saliency.random(params, key)
        return jaxsparse.score_masks(params, scores, self.sparsity, **self.options), _not_finite(scores)


def prune_at_init(
    score: Literal["snip", "grasp", "synflow", "magnitude", "random"],
    sparsity: Any,
    *,
    examples: int = 100,
    temperature: float | None = None,
    rounds: int = 100,
    scope: Literal["global", "layer"] | None = None,
    allocation: str = "uniform",
    at_least: int = 0,
    structure: Any = "weight",
    prunable: Any = None,
    layout: Any = None,
) -> Pruner:
    """Prune before training, by a score of :mod:`jaxsparse.saliency`; the masks stay.

    Args:
      score: "snip", "grasp", "synflow", "magnitude" or "random".
      sparsity: the fraction of zeros among the prunable weights, in [0, 1); or one for each leaf.
      examples: how many train images, or windows of a text, SNIP and GraSP score by, int >= 1; for GraSP a multiple of
        the classes, or what is left over goes unused.
      temperature: what the logits are divided by for SNIP and GraSP; None: as their authors have it, 1 and 200.
      rounds: of SynFlow, int >= 1.
      scope: "global" or "layer", as for :func:`jaxsparse.score_masks`; None: "layer" for random scores, else "global".
      allocation, at_least, structure, prunable, layout: as for :func:`jaxsparse.score_masks`.

    Raises:
      ValueError: for options out of range, unknown, or without effect.
    """
    choose(dict.fromkeys(_SCORES), score, "score")
    check_sparsities(sparsity)
    scope = scope or ("layer" if score == "random" or allocation != "uniform" else "global")
    if score == "synflow" and (scope != "global" or allocation != "uniform"):
        raise ValueError("synflow ranks the whole network, and takes neither scope='layer' nor an allocation")
    for name, value in (("examples", examples), ("rounds", rounds)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is a whole number of at least 1, got {value!r}")
    if temperature is not None and (score not in _TEMPERATURES or not temperature > 0):
        raise ValueError(f"temperature is above 0, and for the scores {', '.join(_TEMPERATURES)}, got {temperature!r}")
    options = {"scope": scope, "allocation": allocation, "at_least": at_least, "structure": structure,
               "prunable": prunable, "layout": layout}  # fmt: skip
    return Pruner(score, sparsity, examples, temperature or _TEMPERATURES.get(score, 1.0), rounds, options)


def _logits(model: Any, collections: Mapping[str, Any], params: Any, images: jax.Array, mutable: bool = False) -> Any:
    """The model's outputs, in float32; with ``mutable``, by the batch statistics of these images."""
    variables = {"params": params, **collections}
    logits = model.apply(variables, images, mutable=list(collections))[0] if mutable else model.apply(variables, images)
    return logits.astype(jnp.float32)


def _counts(dataset: data.Dataset) -> np.ndarray:
    return np.bincount(dataset.train.labels, minlength=dataset.num_classes)


def _not_finite(scores: Any) -> jax.Array:
    count: Callable[[jax.Array], jax.Array] = lambda score: jnp.sum(~jnp.isfinite(score), dtype=jnp.int32)  # noqa: E731
    return sum(map(count, jax.tree.leaves(scores)), jnp.int32(0))
