"""Train a network with a method of the library, or densely, and report what came out.

  python -m experiments.train --config=configs/digits_sparse_momentum.py --workdir=/tmp/digits
  python -m experiments.train ... --config.seed=1 --config.sparsity.sparsity=0.95   # change any key of the config
  python -m experiments.train ... --config.dense                                    # the same run without sparsity
  python -m experiments.train ... --config.smoke                                    # made small: does it run?
  python -m experiments.train ... --seeds=0,1,2,3,4                                 # mean and standard error

A run that was stopped, by SIGTERM, Ctrl-C or anything worse, goes on where it was when the same command is given
again, and ends with the same bits. WORKDIR, made if it is not there, holds

  config.json     the configuration; a run with another one is refused
  metrics.jsonl   a line for each chunk of steps (the first line's speed includes compilation)
  tensorboard/    the same, for tensorboard --logdir=WORKDIR
  checkpoints/    the newest two
  *.png           learning curve, density of the layers, masks, weights, the first layer's masks as receptive fields
  sparse.safetensors   of a sparse run: the params to evaluate, and its masks (jaxsparse.load_sparse reads it)
  result.json     test accuracy, density, time

and with --seeds one such folder for each seed, and seeds.json. What is evaluated are the weights that the network
computes with (jaxsparse.eval_params), and what is reported is the last step, not the best.

Several devices share the steps as --config.parallel.layout says; config.data.batch_size is of all of them together. On
several hosts, start the same command on each, with a WORKDIR that all see:

  python -m experiments.train ... --config.parallel.layout=data --distributed       # on Cloud TPU, Slurm, Open MPI
  python -m experiments.train ... --coordinator=HOST:PORT --processes=2 --process=0     # elsewhere; on the other 1

SIGTERM on one of them saves and stops all. If one dies, the others end with an error within a minute; the same commands
go on from the last checkpoint.
"""

import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import jaxsparse
from experiments import command_line, data, processes
from experiments.checkpoints import KEPT, Checkpoints
from experiments.compare import mean_and_error
from experiments.optimizers import is_gated, refuse_idle
from experiments.program import Program, TrainState, make_program, masks_of, open_dataset
from experiments.workdir import Follower, Workdir, require_space, write_json, writing
from jaxsparse import inspect, models
from jaxsparse.groups import group_sizes
from jaxsparse.parallel import ElsewhereError, any_process, of_processes, together
from jaxsparse.trees import by_path

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Python file with get_config(); --config.KEY=VALUE changes a key.")
flags.DEFINE_string("workdir", None, "Folder of the run: metrics, checkpoints, pictures, result.")
flags.DEFINE_list("seeds", None, "Train with each of these seeds (0,1,2) and report mean and standard error.")
flags.DEFINE_bool("vmap_seeds", False, "Train all --seeds side by side in one program, for GPUs and TPUs.")
flags.DEFINE_bool("distributed", False, "One of several processes, which find each other: Cloud TPU, Slurm, Open MPI.")
flags.DEFINE_string("coordinator", None, "Of several processes elsewhere: HOST:PORT of the first.")
flags.DEFINE_integer("processes", None, "With --coordinator: how many processes there are.")
flags.DEFINE_integer("process", None, "With --coordinator: which of them this is, from 0.")
flags.DEFINE_bool("profile", False, "Write a trace of the second chunk of steps to WORKDIR/profile, for TensorBoard.")
flags.mark_flags_as_required(["config", "workdir"])

SEEDS = 2**32  # how many there are: PRNG keys are made of 32 bits

# Of one device, in operations a second with 16-bit floats, as their makers give them.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


class Stopped(Exception):  # noqa: N818  # not an error
    """The run was stopped by a signal and can be resumed.

    Attributes:
      signal: the number of the signal.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def train(
    config: ConfigDict, workdir: str | Path, seeds: Sequence[int] | None = None, profile: bool = False
) -> tuple[TrainState, list[dict[str, Any]]]:
    """One whole run: data, model, optimizer, loop, report. Goes on with the one in ``workdir`` if there is one.

    Args:
      config: as ``configs/digits_sparse_momentum.py`` gives it.
      workdir: folder for what the run leaves behind.
      seeds: train with all of these instead of ``config.seed``, side by side in one vmapped program, which pays where
        one network does not fill the device. Each seed has its folder in ``workdir``, the checkpoints are of them all.
      profile: whether to write a trace of the second chunk of steps.

    Returns:
      The last state, of one device (its leaves have a leading axis for ``seeds``), and what is in result.json, a dict
      for each seed.

    Raises:
      ValueError: on a bad configuration, before anything is computed; or if streamed images cannot be read any more.
      OSError: if the data are not there, or ``workdir`` cannot be written to or holds another run, likewise; if the
        disk gets full, which leaves the last checkpoint as it is.
      FloatingPointError: if a loss is not finite; it names the quantity and the step. The last checkpoint stays.
      Stopped: after SIGTERM or Ctrl-C, with a checkpoint of the step that the run had come to.
    """
    workdir = Path(workdir)
    leads = jax.process_index() == 0  # of several processes one writes, draws and prints
    with together():
        dataset = open_dataset(config)
        check_config(config, num_examples=data.count(dataset.train))
        program = make_program(config, dataset, side_by_side=seeds is not None)
        seed = np.asarray(config.seed if seeds is None else seeds, np.uint32)
        shapes = jax.eval_shape(program.init, seed)  # what does not fit together is found here, before writing
    layout = program.layout
    steps_per_epoch = data.count(dataset.train) // config.data.batch_size
    total_steps = config.epochs * steps_per_epoch
    eval_every = config.eval_every_epochs * steps_per_epoch
    checkpoint_every = config.checkpoint_every_epochs * steps_per_epoch
    # Masks change on the first step after each multiple of this; those of dual averaging at any step.
    update_every = (
        config.sparsity.update_every_epochs * steps_per_epoch if "update_every_epochs" in config.sparsity else 1
    )
    grid = chunk_grid(total_steps, config.log_every_steps, eval_every, checkpoint_every)
    speed = speedometer(config, program, shapes)

    with ExitStack() as stack:
        with together():
            runs = open_runs(stack, config, workdir, seeds)
        checkpoints = stack.enter_context(closing(Checkpoints(workdir / "checkpoints")))
        with together():
            if leads:
                require_space(workdir, (KEPT + 1 - len(checkpoints.steps())) * size_in_bytes(shapes) + 2**20)
        restored = checkpoints.restore(lambda about: layout.collected_shapes(shapes, about.get("devices")))
        if restored and restored[0] == total_steps and not any_process(not all(run.result for run in runs)):
            if leads:
                print(f"finished before, see {workdir}")
            return layout.one_copy(layout.restore(restored[1])), [run.result for run in runs]
        saved = restored[0] if restored else 0
        state = layout.restore(restored[1]) if restored else layout.place(program.init(seed))
        if saved and leads:
            print(f"going on from step {saved} of {total_steps}", flush=True)
        stack.enter_context(writing(workdir, checkpoints))
        for run in runs:
            run.open_metrics(saved)
        source = open_source(stack, config, dataset, program, checkpoints.about(saved).get("stream") if saved else None)
        examples = dataset if config.data.streamed else source
        splits = {
            name: getattr(examples, name) for name in ("validation", "test") if data.count(getattr(dataset, name))
        }
        told_to_stop = stack.enter_context(stop_signals())
        bar = stack.enter_context(command_line.progress_bar(total_steps, initial=saved, disable=not leads))
        for number, (start, stop) in enumerate(pairwise(grid[grid.index(saved) :])):
            chunk_time = time.perf_counter()
            with jax.profiler.trace(str(workdir / "profile")) if profile and leads and number == 1 else nullcontext():
                state, measured = program.train_chunk(state, source, start, stop - start)
                measured = one_a_run(jax.device_get(measured), seeds)
            seconds = time.perf_counter() - chunk_time
            evaluated = [{} for _ in runs]
            if stop % eval_every == 0 or stop == total_steps:
                losses = {name: program.evaluate(state, split) for name, split in splits.items()}
                evaluated = one_a_run(jax.device_get(losses), seeds)
            updated = (stop - 1) // update_every > max(start - 1, 0) // update_every
            for run, chunk, losses in zip(runs, measured, evaluated, strict=True):
                of_run = "" if seeds is None else f" of {run.path.name}"
                stop_unless_finite(f"train_loss{of_run}", chunk["losses"], first_step=start)
                metrics = {"step": stop, "epoch": stop / steps_per_epoch} | chunk_metrics(chunk, updated)
                if config.data.streamed:
                    metrics["replaced_images"] = int(of_processes(len(chunk["replaced"])).sum())
                    report_replaced(dataset.train, chunk["replaced"])
                for name, found in losses.items():
                    stop_unless_finite(f"{name}_loss{of_run}", [found["loss"]], first_step=stop)
                    metrics |= {f"{name}_{quantity}": np.asarray(value).item() for quantity, value in found.items()}
                for path, finite in chunk["finite"].items():  # else a checkpoint of broken weights might be written
                    stop_unless_finite(path + of_run, [0.0 if finite else np.nan], first_step=stop)
                metrics |= {"seconds": seconds, "steps_per_second": (stop - start) / seconds}
                waited = chunk.get("input_wait", 0.0)
                run.log(metrics | {"speed": speed(stop - start, seconds, waited)})
            bar.set_postfix(
                {name: f"{metrics[name]:.4g}" for name in ("train_loss", "train_accuracy", "density")}, refresh=False
            )
            bar.update(stop - start)
            stopping = any_process(bool(told_to_stop))  # the signal may have come to another host
            if stop % checkpoint_every == 0 or stop == total_steps or stopping:
                position = source.get_state() if config.data.streamed else None
                checkpoints.save(stop, layout.collect(state), devices=layout.size, stream=position)
            if stopping:
                break
        else:
            stop = total_steps
        checkpoints.wait()
        bar.close()  # what is printed now begins on a line of its own
        state = layout.one_copy(state)
        if leads:
            for run, mine in zip(runs, one_a_run(state, seeds), strict=True):
                draw(run, mine, program.image_shape)
                if stop == total_steps:
                    finish(run, mine, program.model, program.image_shape)
        any_process(False)  # the results are written
        if stop < total_steps:
            raise Stopped(f"at step {stop} of {total_steps}", *(told_to_stop or [signal.SIGTERM])[:1])
        return state, [run.result for run in runs]


def open_source(stack: ExitStack, config: ConfigDict, dataset: data.Dataset, program: Program, position: Any) -> Any:
    """What :attr:`Program.train_chunk` takes: the data on the devices, or the stream of images from a position on."""
    if not config.data.streamed:
        if program.layout.name == "one_device":
            return jax.device_put(dataset)
        return dataset._replace(
            **{name: program.layout.replicate(getattr(dataset, name)) for name in ("train", "validation", "test")}
        )
    from experiments import streams

    stream = streams.train_stream(
        dataset.train,
        batch_size=config.data.batch_size // jax.process_count(),
        image_size=config.data.image_size,
        seed=config.seed,
        shard=(jax.process_index(), jax.process_count()),
        workers=config.data.workers,
    )
    stack.enter_context(closing(stream))
    if position is not None:
        stream.set_state(position)
    return stream


def report_replaced(source: Any, numbers: Sequence[int]) -> None:
    """Names images that could not be read, in whose place the next ones were taken."""
    for number in numbers:
        logging.warning("%s cannot be read: the next image was taken in its place", source.name_of(int(number)))


def speedometer(config: ConfigDict, program: Program, shapes: TrainState) -> Callable[..., dict[str, float]]:
    """A function of steps, the seconds they took, and those of them spent waiting for images, to log.

    It gives images a second, milliseconds of a step on the devices, the share of the time that was spent waiting, and
    where the devices' peak is known, the model FLOPs utilisation: forward and backward pass of the dense network.
    """
    kind, layout = program.layout.devices[0].device_kind, program.layout
    peak = next((peak for name, peak in PEAKS.items() if kind.startswith(name)), None)
    if peak is not None:
        places = models.positions(program.model, program.image_shape)
        sizes = {path: leaf.size for path, leaf in by_path(shapes.params).items()}
        operations = 6 * sum(places[path] * sizes[path] for path in places)  # multiply and add; forward, and twice back

    def speed(steps, seconds, waited):
        images = steps * config.data.batch_size / seconds
        share = {} if peak is None else {"share_of_peak": operations * images / (peak * layout.size)}
        return {
            "images_per_second": images,
            "step_milliseconds": 1000 * (seconds - waited) / steps,
            "input_wait": waited / seconds,
            **share,
        }

    return speed


def train_seeds(config: ConfigDict, workdir: str | Path, seeds: Sequence[int], side_by_side: bool = False) -> str:
    """Trains with each seed, one after another or side by side, in folders seed_0, ... of ``workdir``.

    Returns:
      A table of the results with mean and standard error, which seeds.json has too.
    """
    workdir = Path(workdir)
    if side_by_side:
        results = train(config, workdir, seeds)[1]
    else:
        results = []
        for seed in seeds:
            results += train(with_seed(config, seed), workdir / f"seed_{seed}")[1]
    accuracies = [result["test_accuracy"] for result in results]
    mean, error = mean_and_error(accuracies)
    summary = {"seeds": list(seeds), "test_accuracy": accuracies, "mean": mean, "standard_error": error}
    if jax.process_index() == 0:
        write_json(workdir / "seeds.json", summary)
    rows = [f"seed {seed}: {accuracy:.2%}" for seed, accuracy in zip(seeds, accuracies, strict=True)]
    last = f"mean {mean:.2%}" if error is None else f"mean {mean:.2%}, standard error {100 * error:.2f} points"
    return "\n".join(["test accuracy", *rows, last])


def shrink(config: ConfigDict) -> ConfigDict:
    """A copy made small, to see that it runs: a narrow network, few examples, four epochs of 44 steps at most."""
    config = ConfigDict(config)
    with config.unlocked():
        config.data.examples, config.data.batch_size = 44 * 32, 32
        for key, at_most in (("epochs", 4), ("eval_every_epochs", 2), ("checkpoint_every_epochs", 2)):
            config[key] = min(config[key], at_most)
        config.log_every_steps = 44
        config.data.image_size, config.data.workers = 64, 0  # of streamed images
        if "width" in config.model:
            config.model.width /= 8
        if "features" in config.model:
            config.model.features = tuple(width // 4 for width in config.model.features)
        if "warmup_epochs" in config.optimizer:
            config.optimizer.warmup_epochs = min(config.optimizer.warmup_epochs, 1.0)
        if "decay_every_steps" in config.optimizer:
            config.optimizer.decay_every_steps = 2 * 44
        if "halve_after_epochs" in config.optimizer:
            config.optimizer.halve_after_epochs = (1, 2, 3)
        if "scale" in config.sparsity:
            config.sparsity.scale = min(config.sparsity.scale, 0.4)
        if "decay_at_epochs" in config.optimizer:
            config.optimizer.decay_at_epochs = (1, 2, 3)
    return config


def draw(run: Workdir, state: TrainState, image_shape: Sequence[int]) -> None:
    """The pictures of a run, as far as it has come."""
    history = inspect.read_history(run.path)
    inspect.plot_history(history).savefig(run.path / "learning_curve.png")
    if run.config.dense:
        return
    masks = masks_of(run.config, state)
    inspect.plot_layer_densities(history).savefig(run.path / "layer_densities.png")
    inspect.plot_masks(masks).savefig(run.path / "masks.png")
    if not is_gated(run.config):
        params = jaxsparse.eval_params(state.opt_state, state.params)
        inspect.plot_weights(masks, params).savefig(run.path / "weights.png")
    for mask in jax.tree.leaves(masks):
        if mask.shape == (np.prod(image_shape),):  # gates on the pixels
            mask = mask[:, None]
        of_pixels = mask.ndim == 2 and len(mask) == np.prod(image_shape)
        if of_pixels or (mask.ndim == 4 and mask.shape[2] == image_shape[2]):
            inspect.plot_receptive_fields(mask, image_shape).savefig(run.path / "receptive_fields.png")
            break


def finish(run: Workdir, state: TrainState, model: Any, image_shape: tuple[int, ...]) -> None:
    """Checks the masks, writes and prints the result. Of gates, it is that of the model without closed channels."""
    if not run.config.dense:
        jaxsparse.check(state.opt_state, state.params)
    lines = run.metrics()
    result = {"dense": run.config.dense, "seed": run.config.seed, "steps": lines[-1]["step"]}
    names = ("density", "validation", "test", "multiply_adds")
    result |= {name: value for name, value in lines[-1].items() if name.startswith(names)}
    result["seconds"] = sum(line["seconds"] for line in lines)
    masks, widths = masks_of(run.config, state), ""
    places = models.positions(model, image_shape)
    if is_gated(run.config):
        params = jaxsparse.eval_params(state.opt_state, state.params)
        small, slim_params, _ = models.slim(model, params, state.model_state.get("batch_stats"))
        sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (slim_params, params)]
        result["density"] = sizes[0] / sizes[1]
        result["widths"] = list(group_sizes(models.channel_groups(small), slim_params))
        widths = f" ({'-'.join(map(str, result['widths']))})"
        print(jaxsparse.remaining(state.params, models.channel_groups(model), masks, places))
        jaxsparse.save_sparse(run.path / "sparse.safetensors", params)
    else:
        print(jaxsparse.summary(masks, state.params, positions=places))
        if not run.config.dense:
            params = jaxsparse.eval_params(state.opt_state, state.params)
            jaxsparse.save_sparse(run.path / "sparse.safetensors", params, masks)
    run.finish(result)
    print(
        f"test accuracy {result['test_accuracy']:.2%} at density {result['density']:g}{widths}, "
        f"{result['seconds']:.1f} s; see {run.path}"
    )


def chunk_metrics(chunk: Mapping[str, Any], updated: bool) -> dict[str, Any]:
    """What is logged of a chunk of steps; the flips only where masks were updated in it."""
    metrics = {
        "train_loss": chunk["losses"].mean(dtype=float),
        "train_accuracy": chunk["accuracies"].mean(dtype=float),
        "density": round(float(chunk["density"]), 6),
    }
    metrics |= {name: round(float(share), 6) for name, share in chunk["remaining"].items()}
    if chunk["layer_density"]:
        metrics["layer_density"] = {path: round(float(share), 6) for path, share in chunk["layer_density"].items()}
        if updated:
            metrics["flips"] = {path: int(flips) for path, flips in chunk["flips"].items()}
    return metrics


def open_runs(stack: ExitStack, config: ConfigDict, workdir: Path, seeds: Sequence[int] | None) -> list[Workdir]:
    """The folder of the run, or of each seed; closed with the stack."""
    if jax.process_index() > 0:
        return [Follower(workdir, config)]
    if seeds is None:
        return [stack.enter_context(closing(Workdir(workdir, config)))]
    runs = []
    for seed in seeds:
        mine = with_seed(config, seed)
        with mine.unlocked():
            mine.side_by_side = list(seeds)
        runs.append(stack.enter_context(closing(Workdir(workdir / f"seed_{seed}", mine))))
    return runs


def with_seed(config: ConfigDict, seed: int) -> ConfigDict:
    """A copy of the config with another seed."""
    config = ConfigDict(config)
    config.seed = seed
    return config


def one_a_run(tree: Any, seeds: Sequence[int] | None) -> list[Any]:
    """The tree, or for each seed its part of a tree with a leading axis."""
    if seeds is None:
        return [tree]
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(len(seeds))]


def chunk_grid(total_steps: int, log_every: int, *also: int) -> list[int]:
    """The steps between which one compiled call runs: all multiples of ``also``, and every ``log_every`` in between.

    A fixed grid of the absolute step, so that a run executes the same programs wherever it was started from.
    """
    grid = [0]
    while grid[-1] < total_steps:
        multiples = [(grid[-1] // every + 1) * every for every in also]
        grid.append(min(grid[-1] + log_every, total_steps, *multiples))
    return grid


def check_config(config: ConfigDict, num_examples: int) -> None:
    """Raises a ValueError for numbers out of range that nothing else would notice."""
    at_least_1 = (
        "epochs",
        "eval_every_epochs",
        "checkpoint_every_epochs",
        "log_every_steps",
        "optimizer.decay_every_steps",
        "sparsity.update_every_epochs",
    )
    for key in at_least_1:
        part, _, name = key.rpartition(".")
        value = (config[part] if part else config).get(name, 1)  # which of them there are depends on the method
        if value < 1:
            raise ValueError(f"config.{key} is at least 1, got {value}")
    if not 0 <= config.seed < SEEDS:
        raise ValueError(f"config.seed is from 0 to 2^32 - 1, got {config.seed}")
    if config.data.classes is not None and not config.data.streamed:
        raise ValueError("config.data.classes is for streamed images, config.data.streamed")
    if not 1 <= config.data.batch_size <= num_examples:
        raise ValueError(
            f"config.data.batch_size is between 1 and the {num_examples} train examples, got {config.data.batch_size}"
        )


def size_in_bytes(state: Any) -> int:
    """Bytes of all arrays of a tree, or of what ``jax.eval_shape`` gives for them."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def stop_unless_finite(name: str, values: Sequence[float], first_step: int) -> None:
    """Raises a FloatingPointError that names the first of the values, one a step, that is NaN or infinite."""
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise FloatingPointError(
            f"{name} is {values[bad[0]]} at step {first_step + bad[0]}; try a smaller learning rate or step size"
        )


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list to which SIGTERM and SIGINT add their number, in place of ending the program; a second one ends it."""
    received: list[int] = []

    def receive(number, frame):
        del frame
        received.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def as_seeds(texts: Sequence[str]) -> list[int]:
    """The seeds that a flag names."""
    try:
        seeds = [int(text) for text in texts]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds) or not 0 <= min(seeds) <= max(seeds) < SEEDS:
        raise ValueError(
            f"--seeds takes different whole numbers from 0 to 2^32 - 1, such as 0,1,2, got {','.join(texts)!r}"
        )
    return seeds


def config_of_flags() -> ConfigDict:
    """The config of the command line. Made small by ``--config.smoke``, but for the keys that are changed there."""
    config, changed = FLAGS.config, config_flags.get_override_values(FLAGS["config"])
    refuse_idle(config, changed)
    if config.smoke:
        config = shrink(config)
        config.update_from_flattened_dict(changed)
    return config


def main(argv: Sequence[str]) -> None:
    """Runs :func:`train` with the flags; what the user can set right is told in a line, without a traceback."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options start with --")
    workdir = Path(FLAGS.workdir)
    try:
        config = config_of_flags()
        processes.join(FLAGS.distributed, FLAGS.coordinator, FLAGS.processes, FLAGS.process)
        if FLAGS.seeds is None:
            train(config, workdir, profile=FLAGS.profile)
        else:
            table = train_seeds(config, workdir, as_seeds(FLAGS.seeds), FLAGS.vmap_seeds)
            if jax.process_index() == 0:
                print(table)
    except Stopped as stopped:
        if jax.process_index() == 0:
            print(f"stopped by {signal.Signals(stopped.signal).name} {stopped}; the same command goes on from there")
        processes.part()
        sys.exit(128 + stopped.signal)
    except (ValueError, OSError, FloatingPointError, ElsewhereError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() == 1:
            raise
        logging.debug("where it came from (shown with --verbosity=1)", exc_info=True)
        processes.leave(f"error: {processes.lost(error) or error}")
    except Exception:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        processes.leave("error: this process of the run ends, see above, and with it the others")
    processes.part()


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
