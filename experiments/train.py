"""Train a network with a method of the library, or densely, and report what came out.

  python -m experiments.train --config=configs/digits_sparse_momentum.py --workdir=/tmp/digits
  python -m experiments.train ... --config.seed=1 --config.method.sparsity=0.95     # change any key of the config
  python -m experiments.train ... --config.dense                                    # the same run without its method
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
  epoch_N.safetensors  the params after N epochs, for each of --config.keep_epochs
  result.json     test accuracy, or of a text the loss; density, time

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
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments import command_line, data, processes
from experiments.build import update_every
from experiments.checkpoints import KEPT, size_in_bytes
from experiments.inputs import open_dataset, open_source, report_replaced
from experiments.measures import measure_of
from experiments.options import as_seeds, check_config, for_run, refuse_idle, with_seed
from experiments.outcome import chunk_metrics, draw, finish, keep, one_a_run
from experiments.program import TrainState, chunk_grid, make_program
from experiments.prune_while_training import Gain, check_pruning, open_gates, without
from experiments.results.table import mean_and_error
from experiments.speed import speedometer
from experiments.stopping import Stopped, stop_signals, stop_unless_finite
from experiments.workdir import open_checkpoints, open_runs, refuse_other_seeds, require_space, write_json, writing
from jaxsparse.parallel import ElsewhereError, any_process, of_processes, together

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


def train(
    config: ConfigDict,
    workdir: str | Path,
    seeds: Sequence[int] | None = None,
    profile: bool = False,
    quiet: bool = False,
) -> tuple[TrainState | None, list[dict[str, Any]]]:
    """One whole run: data, model, optimizer, loop, report. Goes on with the one in ``workdir`` if there is one.

    Args:
      config: as ``configs/digits_sparse_momentum.py`` gives it.
      workdir: folder for what the run leaves behind.
      seeds: train with all of these instead of ``config.seed``, side by side in one vmapped program, which pays where
        one network does not fill the device. Each seed has its folder in ``workdir``, the checkpoints are of them all.
      profile: whether to write a trace of the second chunk of steps.
      quiet: whether to leave out the pictures, and the bar that shows the progress.

    Returns:
      The last state, of one device (its leaves have a leading axis for ``seeds``; None for a run that was finished
      before and has lost its checkpoints), and what is in result.json, a dict for each seed.

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
        check_pruning(config, program, side_by_side=seeds is not None)
        seed = np.asarray(config.seed if seeds is None else seeds, np.uint32)
        shapes = jax.eval_shape(program.init, seed)  # what does not fit together is found here, before writing
    layout = program.layout
    steps_per_epoch = data.count(dataset.train) // config.data.batch_size
    total_steps = round(config.epochs * steps_per_epoch)
    eval_every = config.eval_every_epochs * steps_per_epoch
    checkpoint_every = config.checkpoint_every_epochs * steps_per_epoch
    masks_change_every = update_every(config, steps_per_epoch)  # on the first step after each multiple of this
    prune_every = (config.get("prune_while_training_epochs") or 0) * steps_per_epoch or total_steps
    first_step = min(round(config.start_epochs * steps_per_epoch), total_steps - 1)
    keep_at = {epochs: round(epochs * steps_per_epoch) for epochs in config.keep_epochs}
    grid = chunk_grid(total_steps, config.log_every_steps, eval_every, checkpoint_every, prune_every)
    grid = sorted({*grid, first_step, *keep_at.values()})

    def for_checkpoint(about: dict[str, Any]) -> Any:  # its network may have lost channels
        nonlocal program
        if about.get("pruned", []) != list(program.pruned):
            program = make_program(config, dataset, pruned=about["pruned"])
        return layout.collected_shapes(jax.eval_shape(program.init, seed), about.get("devices"))

    with ExitStack() as stack:
        with together():
            runs = open_runs(stack, config, workdir, seeds)
        checkpoints = stack.enter_context(open_checkpoints(workdir))
        with together():
            if leads:
                require_space(workdir, (KEPT + 1 - len(checkpoints.steps())) * size_in_bytes(shapes) + 2**20)
        about = checkpoints.newest()
        program.task.refuse_another(about.get("data"))  # before other data or seeds pass for damage
        refuse_other_seeds(workdir, about, seeds)
        restored, gain = checkpoints.restore(for_checkpoint), Gain()
        about = checkpoints.about(restored[0]) if restored else {}
        speed = speedometer(config, program, jax.eval_shape(program.init, seed))
        if (not restored or restored[0] == total_steps) and not any_process(not all(run.result for run in runs)):
            if leads:
                print(f"finished before, see {workdir}" + ("" if restored else ", which has no checkpoint any more"))
            last = layout.one_copy(layout.restore(restored[1])) if restored else None
            return last, [run.result for run in runs]
        saved = restored[0] if restored else first_step
        state = layout.restore(restored[1]) if restored else layout.place(program.init(seed))
        if restored and leads:
            print(f"going on from step {saved} of {total_steps}", flush=True)
        stack.enter_context(writing(workdir, checkpoints))
        for run in runs:
            run.open_metrics(saved)
        source = open_source(stack, config, dataset, layout, about.get("stream"))
        examples = dataset if config.data.streamed else source
        splits = {
            name: getattr(examples, name) for name in ("validation", "test") if data.count(getattr(dataset, name))
        }
        if saved in keep_at.values():
            keep(runs, [epochs for epochs in keep_at if keep_at[epochs] == saved], layout.one_copy(state), seeds)
        told_to_stop = stack.enter_context(stop_signals())
        hidden = quiet or not leads
        bar = stack.enter_context(command_line.progress_bar(total_steps, initial=saved, disable=hidden))
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
            prunes = open_gates(program, state) if stop % prune_every == 0 and stop < total_steps else {}
            updated = (stop - 1) // masks_change_every > max(start - 1, 0) // masks_change_every
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
                logged = metrics | {"speed": speed(stop - start, seconds, waited) | gain.chunk(stop - start, seconds)}
                if prunes:
                    logged["pruned_channels"] = {name: bits.count("0") for name, bits in prunes.items()}
                run.log(logged)
            if prunes:
                state = without(state, program.optimizer.groups, prunes)
                program = make_program(config, dataset, pruned=(*program.pruned, prunes))
                speed = speedometer(config, program, jax.eval_shape(program.init, seed))
                gain.pruned()
            bar.set_postfix(
                {name: f"{metrics[name]:.4g}" for name in ("train_loss", "train_accuracy", "density")}, refresh=False
            )
            bar.update(stop - start)
            if stop in keep_at.values():  # before the checkpoint, from which nothing would come back to this step
                keep(runs, [epochs for epochs in keep_at if keep_at[epochs] == stop], layout.one_copy(state), seeds)
            stopping = any_process(bool(told_to_stop))  # the signal may have come to another host
            if stop % checkpoint_every == 0 or stop == total_steps or stopping:
                position = source.get_state() if config.data.streamed else None
                described = {"devices": layout.size, "stream": position, "pruned": program.pruned}
                described |= {"data": program.task.about} if program.task.about else {}
                described |= {} if seeds is None else {"seeds": list(seeds)}
                for run in runs:
                    run.keep_metrics()
                checkpoints.save(stop, layout.collect(state), **described)
            if stopping:
                break
        else:
            stop = total_steps
        checkpoints.wait()
        bar.close()  # what is printed now begins on a line of its own
        state = layout.one_copy(state)
        if leads:
            for run, mine in zip(runs, one_a_run(state, seeds), strict=True):
                if not quiet:
                    draw(run, mine, program)
                if stop == total_steps:
                    finish(run, mine, program, total_steps)
        if any_process(bool(told_to_stop)) or stop < total_steps:  # (the results are written)
            raise Stopped(f"at step {stop} of {total_steps}", told_to_stop[0] if told_to_stop else signal.SIGTERM)
        return state, [run.result for run in runs]


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
    measure = measure_of(config)
    values = [result[measure.key] for result in results]
    mean, error = mean_and_error(values)
    summary = {"seeds": list(seeds), measure.key: values, "mean": mean, "standard_error": error}
    if jax.process_index() == 0:
        write_json(workdir / "seeds.json", summary)
    rows = [f"seed {seed}: {measure.value(value)}" for seed, value in zip(seeds, values, strict=True)]
    last = f"mean {measure.value(mean)}"
    if error is not None:
        last += f", standard error {measure.factor * error:{measure.form}}{measure.difference}"
    return "\n".join([measure.name, *rows, last])


def config_of_flags() -> ConfigDict:
    """The config of the command line."""
    config, changed = FLAGS.config, config_flags.get_override_values(FLAGS["config"])
    refuse_idle(config, changed)
    return for_run(config, changed)


def main(argv: Sequence[str]) -> None:
    """Runs :func:`train` with the flags; what the user can set right is told in a line, without a traceback."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options start with --")
    workdir = Path(FLAGS.workdir)
    try:
        config = config_of_flags()
        if FLAGS.vmap_seeds and FLAGS.seeds is None:
            raise ValueError("--vmap_seeds has no effect without --seeds")
        if FLAGS.profile and FLAGS.seeds is not None:
            raise ValueError("--profile is for a single run, without --seeds")
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
