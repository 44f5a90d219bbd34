"""Distillation: a trained network, the teacher, whose outputs a run learns to give."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import jaxsparse
from experiments.networks import check_fits
from experiments.tasks import Task
from experiments.workdir import read_json


class Teacher(NamedTuple):
    """A trained network, which stays as it is.

    Attributes:
      model: a Flax module.
      variables: its params and other collections.
      temperature: what the logits of teacher and model are divided by.
      weight: of the distillation in the loss; the data have the rest.
      own_inputs: takes inputs as the run normalises them to those that the teacher was trained on; None: they are.
    """

    model: Any
    variables: Any
    temperature: float
    weight: float
    own_inputs: Callable[[jax.Array], jax.Array] | None = None

    def logits(self, variables: Any, inputs: jax.Array) -> jax.Array:
        """The teacher's outputs, as in evaluation, with the variables as they are passed into a step."""
        inputs = inputs if self.own_inputs is None else self.own_inputs(inputs)
        return jax.lax.stop_gradient(self.model.apply(variables, inputs))

    def mixed(self, loss: jax.Array, logits: jax.Array, teacher_logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The loss to train on, (1 - weight) loss + weight temperature² KL, and the KL divergence."""
        divergence = jnp.mean(divergence_from(teacher_logits, logits, self.temperature))
        return (1 - self.weight) * loss + self.weight * self.temperature**2 * divergence, divergence


def divergence_from(teacher_logits: jax.Array, logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    r"""How far a network's softened outputs are from its teacher's, of each prediction: float32, (...).

    .. math:: \mathrm{KL}(p \,\|\, q) = \sum_c p_c \log (p_c / q_c), \quad
              p = \mathrm{softmax}(t / T), \; q = \mathrm{softmax}(s / T)

    Args:
      teacher_logits: t, (..., classes).
      logits: s, (..., classes).
      temperature: T > 0. The gradient of the divergence falls with 1 / T², for which a loss makes up by a factor T².

    Examples:
      >>> import jax.numpy as jnp
      >>> logits = jnp.array([[2.0, 0.0, 1.0]])
      >>> [round(float(divergence_from(logits, s)[0]), 4) for s in (logits, logits + 1.0, jnp.zeros((1, 3)))]
      [0.0, 0.0, 0.2662]

    References:
      Hinton, Vinyals and Dean, `Distilling the Knowledge in a Neural Network <https://arxiv.org/abs/1503.02531>`_,
      2015, section 2.
    """
    of_teacher, mine = (jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (teacher_logits, logits))
    return optax.losses.kl_divergence_with_log_targets(mine, of_teacher)


def load_teacher(config: ConfigDict, model: Any, task: Task) -> Teacher | None:
    """The teacher ``config.distill_from``, or None.

    The teacher in the folder of a run sees images normalised by that run's mean and standard deviation, not by this
    one's.

    Args:
      config: of the run.
      model: that of the run, which a file's params are of, too; the folder of a run has a model of its own.
      task: what the run learns, of which data.

    Raises:
      ValueError: for a teacher that does not fit or is not finished, and numbers out of range.
      OSError: if it is not there.
    """
    source = config.get("distill_from")
    if not source:
        return None
    if not config.distill_temperature > 0:
        raise ValueError(f"config.distill_temperature is above 0, got {config.distill_temperature}")
    if not 0 < config.distill_weight <= 1:
        raise ValueError(f"config.distill_weight is above 0 and at most 1, got {config.distill_weight}")
    first, own_inputs = task.first, None
    shapes = jax.eval_shape(model.init, jax.random.key(0), first)
    if Path(source).is_dir():
        from experiments.export import restore_run  # it makes a program, as this is part of one

        if (Path(source) / "config.json").exists() and read_json(Path(source) / "result.json") is None:
            raise ValueError(f"config.distill_from={source!r} is not finished, so that its weights may still change")
        program, params, state = restore_run(Path(source), config.data_dir)
        teacher, variables = program.model, {"params": params, **state.model_state}
        own_inputs = renormalised(task.dataset, program.task.dataset)
    else:
        teacher, variables = model, {"params": jaxsparse.load_sparse(source)[0]}
        check_fits(variables["params"], shapes["params"], "config.distill_from", source)
        if others := sorted(set(shapes) - {"params"}):
            raise ValueError(
                f"config.distill_from={source!r} has params alone, and the model {', '.join(others)} too: give the "
                "folder of the run"
            )
    try:
        theirs = jax.eval_shape(teacher.apply, variables, first).shape
    except (TypeError, ValueError, flax.errors.FlaxError) as error:
        raise ValueError(f"config.distill_from={source!r} does not take this run's inputs: {error}") from error
    mine = jax.eval_shape(model.apply, shapes, first).shape
    if theirs != mine:
        raise ValueError(f"config.distill_from={source!r} has outputs {theirs[1:]}, and config.model {mine[1:]}")
    return Teacher(teacher, variables, config.distill_temperature, config.distill_weight, own_inputs)


def renormalised(mine: Any, theirs: Any) -> Callable[[jax.Array], jax.Array] | None:
    """Images normalised by one data set's mean and deviation -> by another's; None where that is the same."""
    if not hasattr(mine, "std") or not hasattr(theirs, "std") or mine.std.shape != theirs.std.shape:
        return None
    if np.array_equal(mine.mean, theirs.mean) and np.array_equal(mine.std, theirs.std):
        return None
    scale, shift = mine.std / theirs.std, (mine.mean - theirs.mean) / theirs.std
    return lambda inputs: inputs * scale + shift  # the channels are the last axis
