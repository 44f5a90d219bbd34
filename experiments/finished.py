"""Dense runs that are finished: their weights, what they are evaluated on, data to calibrate with, and what follows."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

import jaxsparse
from experiments import data
from experiments.build import RATE, times
from experiments.export import restore_run
from experiments.measures import Measure, measure_of
from experiments.options import check_config
from experiments.program import Program, TrainState, make_program
from experiments.stopping import Stopped
from experiments.train import train
from experiments.workdir import WorkdirError, fingerprint, read_json


class FinishedRun(NamedTuple):
    """A dense network as a run left it, on one device.

    Attributes:
      folder: of the run.
      config: of the run.
      result: the contents of its result.json.
      program: the computations of the run, on one device.
      params: at its end.
      model_state: the other collections of the model, such as batch statistics.
    """

    folder: Path
    config: ConfigDict
    result: dict[str, Any]
    program: Program
    params: Any
    model_state: Any

    @property
    def measure(self) -> Measure:
        """The number by which runs on these data are compared."""
        return measure_of(self.config)

    @property
    def fingerprint(self) -> str:
        """A short name for the config: that of another one differs."""
        return fingerprint(self.config)

    @property
    def program_config(self) -> ConfigDict:
        """The config on one device."""
        on_one = {"layout": "one_device", "sync_batch_norm": False, "accumulate": 1}
        return ConfigDict(self.config.to_dict() | {"parallel": on_one})

    def apply(self, params: Any, inputs: jax.Array) -> jax.Array:
        """The outputs of the network as in evaluation."""
        return self.program.model.apply({"params": params, **self.model_state}, inputs)

    def evaluated(self, params: Any, program: Program | None = None) -> dict[str, float]:
        """The held-out metrics of params as the trainer names and computes them: "test_loss", "test_accuracy", ...

        ``program`` is that of another model on the same data.
        """
        program, dataset = program or self.program, self.program.task.dataset
        found: dict[str, float] = {}
        state = TrainState(params, (), self.model_state, jax.random.key(0))
        for name in ("validation", "test"):
            if data.count(split := getattr(dataset, name)):
                results = jax.device_get(program.evaluate(state, program.layout.replicate(split)))
                found |= {f"{name}_{quantity}": float(value) for quantity, value in results.items()}
        return found

    def calibration(self, number: int, seed: int = 0) -> list[jax.Array]:
        """Inputs of the model to calibrate with, from the train split, in batches as large as those of the run.

        Args:
          number: of windows of a text, which may overlap, or of images, which are all different.
          seed: of the draw.

        Raises:
          ValueError: for a number below 1, or more images than there are.
        """
        task, size = self.program.task, self.config.data.batch_size
        steps, steps_per_epoch = -(-number // size), data.count(task.dataset.train) // size
        if number < 1 or steps > steps_per_epoch:
            raise ValueError(
                f"--windows is from 1 to the {steps_per_epoch * size} train examples of an epoch, got {number}"
            )
        numbers = task.numbers(jax.random.key(seed), 0, steps, 1).reshape(-1)[:number]
        split = self.program.layout.replicate(task.dataset.train)
        return [task.inputs(task.look_up(numbers[start : start + size], split)[0]) for start in range(0, number, size)]

    def follow_up(self, epochs: float, rate: float, **changes: Any) -> ConfigDict:
        """The config of a run that trains on from this one's weights, with its learning rate anew and its data.

        Args:
          epochs: how long; may be a part of one.
          rate: what the learning rate is multiplied by.
          **changes: keys that replace those of the config.

        Raises:
          ValueError: for less than a step, and a rate where there is no learning rate to multiply.
        """
        config, before = self.config.to_dict(), self.config
        config |= {"keep_epochs": (), "start_epochs": 0.0, "sparse_init": False, "epochs": epochs, **changes}
        config["warmup_epochs"] = before.warmup_epochs * epochs / before.epochs  # the same share of the steps
        for key in ("eval_every_epochs", "checkpoint_every_epochs"):
            config[key] = max(1, min(config[key], int(epochs)))
        if "learning_rate" in config["optimizer"]:
            scaled = times(config["optimizer"]["learning_rate"], rate) if rate != 1 else {}
            config["optimizer"] |= {"learning_rate": scaled} if rate != 1 else {}
        elif rate != 1:
            raise ValueError(f"--rate={rate:g} has no effect: the run has no {RATE}")
        check_config(made := ConfigDict(config), data.count(self.program.task.dataset.train))
        return made


def open_finished(folder: Path, data_dir: str | None = None) -> FinishedRun:
    """Opens the folder of a dense run that is finished.

    Raises:
      OSError: if it is not the folder of a run, the run is not finished, or its data are not there.
      ValueError: for a sparse run, streamed images, and a text that is another one than the run's.
    """
    config, result = read_json(folder / "config.json"), read_json(folder / "result.json")
    if config is None:
        raise OSError(f"--run={str(folder)!r} is not the folder of a run: it has no config.json")
    if not config.get("dense"):
        method = "masks_from" if config.get("masks_from") else config.get("method", {}).get("name")
        raise ValueError(f"--run={str(folder)!r} is sparse already, by {method}: give a run with --config.dense")
    if config["data"].get("streamed"):
        raise ValueError(f"--run={str(folder)!r} streams its images; this takes data that fit into the memory")
    if result is None:
        raise OSError(f"--run={str(folder)!r} is not finished: it has no result.json. Its command goes on with it")
    program, _, state = restore_run(folder, data_dir)
    config.pop("side_by_side", None)  # of the seeds of --vmap_seeds this is one
    given = ConfigDict(config)
    given.data_dir = data_dir or given.data_dir
    program.task.refuse_another(result.get("data"))
    run = FinishedRun(folder, given, result, program, state.params, state.model_state)
    return run._replace(program=make_program(run.program_config, program.task.dataset))


def train_on(config: ConfigDict, folder: Path) -> tuple[TrainState, dict[str, Any]]:
    """Trains what follows a run, quietly; returns its last state and the contents of its result.json.

    Raises:
      WorkdirError: if it was finished before and has lost its checkpoints.
    """
    state, [result] = train(config, folder, quiet=True)
    if state is None:
        raise WorkdirError(f"{folder} is finished, but has no checkpoint with its weights any more: delete it")
    return state, result


def write_start(file: Path, params: Any, masks: Any = None) -> None:
    """Writes the params, and the masks if any, that a run starts from.

    Raises:
      ValueError: if the run was begun from others.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    again = file.with_suffix(".new")
    jaxsparse.save_sparse(again, params, masks)
    if file.exists() and file.read_bytes() != again.read_bytes():
        again.unlink()
        raise ValueError(f"a run was begun from another {file}: take another --workdir, or delete {file.parent}")
    again.replace(file)


@contextlib.contextmanager
def errors_in_a_line() -> Iterator[None]:
    """Ends a command line with what went wrong in a line, or with where it goes on if it was stopped."""
    try:
        yield
    except Stopped as stopped:
        print(f"stopped {stopped}; the same command goes on from there")
        sys.exit(128 + stopped.signal)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
