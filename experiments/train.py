"""Train a network with sparse momentum, or densely, and report what came out.

  python -m experiments.train --config=configs/digits_sparse_momentum.py --workdir=/tmp/digits
  python -m experiments.train ... --config.seed=1 --config.sparsity.sparsity=0.95   # change any key of the config
  python -m experiments.train ... --dense                                           # the same run without sparsity

WORKDIR, made if it is not there, then holds (a run that is started again writes over its files)

  config.json    the configuration as it was run
  metrics.jsonl  a line for each chunk of steps (the first line's speed includes compilation)
  masks.png      which weights were kept (not with --dense)
  result.json    test accuracy, density, time
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

import jaxsparse
from experiments import command_line, data
from jaxsparse import models

MODELS = {"lenet_300_100": models.LeNet300100, "lenet5_caffe": models.LeNet5Caffe}
PRUNE_RATES = {
    "cosine": jaxsparse.cosine_prune_rate,
    "linear": jaxsparse.linear_prune_rate,
    "constant": lambda prune_rate, total_steps: prune_rate,
}

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Python file with get_config(); --config.KEY=VALUE changes a key.")
flags.DEFINE_string("workdir", None, "Folder for the metrics, the result and the picture of the masks.")
flags.DEFINE_bool("dense", False, "Train with the same optimizer without the sparse link.")
flags.mark_flags_as_required(["config", "workdir"])


def make_optimizer(
    config: ConfigDict, steps_per_epoch: int, key: jax.Array, dense: bool = False
) -> optax.GradientTransformationExtraArgs:
    """SGD with Nesterov momentum and weight decay, and sparse momentum as its last link."""
    learning_rate = optax.exponential_decay(
        config.optimizer.learning_rate,
        transition_steps=config.optimizer.decay_every_epochs * steps_per_epoch,
        decay_rate=config.optimizer.decay_rate,
        staircase=True,
    )
    optimizer = [
        optax.add_decayed_weights(config.optimizer.weight_decay),
        optax.sgd(learning_rate, momentum=config.optimizer.momentum, nesterov=True),
    ]
    if dense:
        return jaxsparse.chain(*optimizer)
    prune_rate = choose(PRUNE_RATES, config.sparsity.prune_rate_decay, "config.sparsity.prune_rate_decay")
    sparse = jaxsparse.sparse_momentum(
        config.sparsity.sparsity,
        update_every=config.sparsity.update_every_epochs * steps_per_epoch,
        prune_rate=prune_rate(config.sparsity.prune_rate, config.epochs * steps_per_epoch),
        growth=config.sparsity.growth,
        redistribution=config.sparsity.redistribution,
        prune=config.sparsity.prune,
        allocation=config.sparsity.allocation,
        key=key,
    )
    return jaxsparse.chain(*optimizer, sparse)


def train(config: ConfigDict, workdir: str | Path, dense: bool = False) -> tuple[Any, Any, dict[str, Any]]:
    """One whole run: data, model, optimizer, loop, report.

    Args:
      config: as ``configs/digits_sparse_momentum.py`` gives it.
      workdir: folder for what the run leaves behind.
      dense: leave the sparse link out.

    Returns:
      The trained params, the optimizer's state, and what is in result.json.

    Raises:
      ValueError: on a bad configuration, before anything is computed.
      OSError: if ``workdir`` cannot be written, likewise.
      FloatingPointError: if a loss is not finite; it names the quantity and the step.
    """
    dataset = data.load(config.data.name)
    check_config(config, num_examples=len(dataset.train_labels))
    steps_per_epoch = len(dataset.train_labels) // config.data.batch_size  # the rest of an epoch is dropped
    total_steps = config.epochs * steps_per_epoch
    model = choose(MODELS, config.model.name, "config.model.name")(num_classes=dataset.num_classes)
    init_key, order_key, mask_key = jax.random.split(jax.random.key(config.seed), 3)
    tx = make_optimizer(config, steps_per_epoch, mask_key, dense)
    workdir = open_workdir(workdir, config)

    train_images, train_labels, test_images, test_labels = map(jnp.asarray, dataset[:4])
    params = model.init(init_key, train_images[:1])["params"]
    opt_state = tx.init(params)
    if not dense:
        params = jaxsparse.sparsify(params, opt_state)

    def masks_of(opt_state, params):
        return jax.tree.map(lambda _: True, params) if dense else jaxsparse.get_masks(opt_state, params)

    def loss_fn(params, images, labels):
        logits = model.apply({"params": params}, images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, jnp.mean(logits.argmax(-1) == labels)

    # All steps of a chunk in one scan, so that none of them waits for Python. That holds for convolutions too, because
    # jaxsparse.models takes the form of them that is fast inside a loop on the device at hand.
    @partial(jax.jit, static_argnames="length", donate_argnames=("params", "opt_state"))
    def train_chunk(params, opt_state, images, labels, start, length):
        def train_step(carry, rows):
            params, opt_state = carry
            (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, images[rows], labels[rows])
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            return (params, opt_state), (loss, accuracy)

        rows = batches(order_key, start, length, config.data.batch_size, num_examples=len(labels))
        (params, opt_state), (losses, accuracies) = jax.lax.scan(train_step, (params, opt_state), rows)
        return params, opt_state, losses, accuracies, jaxsparse.density(masks_of(opt_state, params))

    evaluate = jax.jit(loss_fn)
    eval_every_steps = config.eval_every_epochs * steps_per_epoch
    start_time = time.perf_counter()
    with open(workdir / "metrics.jsonl", "w") as metrics_file, progress_bar(total_steps) as bar:
        for start, stop in pairwise(chunk_grid(total_steps, config.log_every_steps, eval_every_steps)):
            chunk_time = time.perf_counter()
            params, opt_state, losses, accuracies, density = train_chunk(
                params, opt_state, train_images, train_labels, start, length=stop - start
            )
            losses, accuracies, density = jax.device_get((losses, accuracies, density))
            stop_unless_finite("train_loss", losses, first_step=start)
            metrics = {
                "step": stop,
                "epoch": stop / steps_per_epoch,
                "train_loss": losses.mean(dtype=float),
                "train_accuracy": accuracies.mean(dtype=float),
                "density": round(float(density), 6),
                "steps_per_second": (stop - start) / (time.perf_counter() - chunk_time),
            }
            if stop % eval_every_steps == 0 or stop == total_steps:
                shipped = params if dense else jaxsparse.eval_params(opt_state, params)
                test_loss, test_accuracy = map(float, evaluate(shipped, test_images, test_labels))
                stop_unless_finite("test_loss", [test_loss], first_step=stop)
                metrics |= {"test_loss": test_loss, "test_accuracy": test_accuracy}
            metrics_file.write(json.dumps(metrics) + "\n")
            metrics_file.flush()
            shown = {name: f"{metrics[name]:.4g}" for name in ("train_loss", "train_accuracy", "density")}
            bar.set_postfix(shown, refresh=False)
            bar.update(stop - start)
    seconds = time.perf_counter() - start_time

    masks = masks_of(opt_state, params)
    if not dense:
        jaxsparse.check(opt_state, params)
        jaxsparse.inspect.plot_masks(masks).savefig(workdir / "masks.png")
    result = {"dense": dense, "seed": config.seed, "steps": total_steps, "seconds": seconds}
    result |= {key: metrics[key] for key in ("density", "test_loss", "test_accuracy")}
    (workdir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(jaxsparse.summary(params, masks))
    print(
        f"test accuracy {result['test_accuracy']:.2%} at density {result['density']:g}, {seconds:.1f} s; see {workdir}"
    )
    return params, opt_state, result


def batches(key: jax.Array, start: jax.Array, length: int, batch_size: int, num_examples: int) -> jax.Array:
    """The examples of steps start, ..., start + length - 1: int32, (length, batch_size).

    The order of an epoch depends on ``key`` and the number of the epoch alone, wherever a chunk starts.
    """
    steps_per_epoch = num_examples // batch_size
    first_epoch = start // steps_per_epoch
    most_epochs = -(-length // steps_per_epoch) + 1  # the one more is for a chunk that starts inside an epoch
    epochs = first_epoch + jnp.arange(most_epochs)
    orders = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), num_examples))(epochs)
    rows = orders[:, : steps_per_epoch * batch_size].reshape(-1, batch_size)
    return jax.lax.dynamic_slice_in_dim(rows, start - first_epoch * steps_per_epoch, length)


def chunk_grid(total_steps: int, log_every_steps: int, eval_every_steps: int) -> list[int]:
    """The steps between which one compiled call runs: every evaluation, and every ``log_every_steps`` in between.

    A fixed grid of the absolute step, so that a run executes the same programs wherever it was started from.
    """
    grid = [0]
    while grid[-1] < total_steps:
        next_eval = (grid[-1] // eval_every_steps + 1) * eval_every_steps
        grid.append(min(grid[-1] + log_every_steps, next_eval, total_steps))
    return grid


def check_config(config: ConfigDict, num_examples: int) -> None:
    """Raises a ValueError for numbers out of range that nothing else would notice."""
    for key in ("epochs", "eval_every_epochs", "log_every_steps", "optimizer.decay_every_epochs"):
        value = attrgetter(key)(config)
        if value < 1:
            raise ValueError(f"config.{key} is at least 1, got {value}")
    if not 1 <= config.data.batch_size <= num_examples:
        raise ValueError(
            f"config.data.batch_size is between 1 and the {num_examples} train examples, got {config.data.batch_size}"
        )


def choose(options: Mapping[str, Any], name: str, key: str) -> Any:
    """``options[name]``, or a ValueError that lists the options."""
    if name not in options:
        raise ValueError(f"{key} is one of {', '.join(map(repr, options))}, got {name!r}")
    return options[name]


def open_workdir(workdir: str | Path, config: ConfigDict) -> Path:
    """Makes the folder and begins a run in it: a folder that cannot be written to is found before any work is done."""
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        for left_by_a_run_before in ("masks.png", "result.json"):
            (workdir / left_by_a_run_before).unlink(missing_ok=True)
        (workdir / "config.json").write_text(config.to_json(indent=2) + "\n")
    except OSError as error:
        raise OSError(f"workdir {str(workdir)!r} cannot be written: {error.strerror}") from error
    return workdir


def stop_unless_finite(name: str, values: Sequence[float], first_step: int) -> None:
    """Raises a FloatingPointError that names the first of the values, one a step, that is NaN or infinite."""
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise FloatingPointError(
            f"{name} is {values[bad[0]]} at step {first_step + bad[0]}; try a smaller config.optimizer.learning_rate"
        )


def progress_bar(total_steps: int) -> tqdm:
    """A bar with speed and time left."""
    # Without a terminal to draw on every refresh adds to the log: then only a few of them.
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(total=total_steps, unit="step", mininterval=interval, dynamic_ncols=True)


def main(argv: Sequence[str]) -> None:
    """Runs :func:`train` with the flags; what the user can set right is told in a line, without a traceback."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options start with --")
    try:
        train(FLAGS.config, FLAGS.workdir, FLAGS.dense)
    except (ValueError, OSError, FloatingPointError) as error:
        logging.debug("where it came from (shown with --verbosity=1)", exc_info=True)
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
