"""Train in several stages, each from what a stage before it left: ASNI I and II, fine-tuning, lottery tickets.

  python -m experiments.stages --config=configs/stages/asni.py:mnist_fc --config.data_dir=DIR --workdir=runs/asni
  python -m experiments.stages --config=configs/stages/fine_tune.py --workdir=runs/fine_tune
  python -m experiments.stages --config=configs/stages/lottery.py:mnist_late --config.data_dir=DIR --workdir=runs/ticket
  python -m experiments.stages ... --seeds=0,1,2                  # every stage with each seed
  python -m experiments.stages ... --only=dense,asni_1            # these stages alone
  python -m experiments.stages ... --config.epochs=5              # a key of all stages that do not set it themselves
  python -m experiments.stages ... --config.stages[1].epochs=5    # a key that the second stage sets itself

The config is one of experiments.train with one key more, config.stages, a list. Each stage has a "name", the folder in
WORKDIR that holds its run (with --seeds, WORKDIR/NAME/seed_0), and may have

  after   the name of an earlier stage: its masks are kept, and config.start says from which weights training starts
  prune   a function of jaxsparse that makes the masks of that stage's weights instead: {"name": "magnitude_masks",
          "sparsity": 0.9}
  rewind  the name of an earlier stage: training starts from the weights which that one had after as many epochs as this
          stage's "start_epochs" (0 by default), on these masks; learning rate and order of the images go on from there
  teacher the name of an earlier stage, whose network this one is distilled from (config.distill_from)

Its other keys replace those of the config: "epochs", "method", or a single one such as "optimizer.learning_rate".

At the end the finished stages are printed side by side, and WORKDIR/result.json has their results. The same command
resumes a run that was stopped, in whatever stage, and ends with the same bits.
"""

import copy
import itertools
import re
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

import jaxsparse
from experiments import command_line
from experiments.build import CHECKED_STEPS, Calls, make_optimizer, named
from experiments.measures import ACCURACY, Measure, measure_of
from experiments.networks import STARTS, make_model
from experiments.options import as_seeds, choose, for_run, refuse_idle
from experiments.outcome import kept_file
from experiments.results.table import as_table
from experiments.stopping import Stopped
from experiments.train import FLAGS, train
from experiments.workdir import read_json, write_json
from jaxsparse.tables import Table
from jaxsparse.trees import by_path

flags.DEFINE_list("only", [], "Train these stages, or these arms of a sweep, only; by default all of them.")
for flag in ("config", "workdir", "seeds"):
    flags.declare_key_flag(flag)  # so that --help has them

OWN = ("name", "after", "prune", "rewind", "teacher")  # the keys of a stage that are not keys of the config
REFUSED = ("vmap_seeds", "distributed", "coordinator", "processes", "process", "profile")
SPARSE, DENSE, START = "sparse.safetensors", "dense.safetensors", "start.safetensors"


class MissingStageError(OSError):
    """A stage cannot begin, since the one that it starts from is not finished."""


def run(
    config: ConfigDict,
    workdir: Path,
    seeds: Sequence[int] | None = None,
    only: Sequence[str] = (),
    changed: Mapping[str, Any] | None = None,
) -> Table:
    """Trains the stages one after another, with every seed.

    Args:
      config: a config of the trainer with ``config.stages``.
      workdir: folder of all stages.
      seeds: instead of ``config.seed``; every run then has a folder such as ``workdir/asni_1/seed_0``.
      only: names of stages; all by default.
      changed: keys of the config that were changed on the command line, which ``config.smoke`` leaves as they are.

    Returns:
      A row for each finished stage: density, test accuracy (of a text the loss) with its standard error, and the
      difference from the first.

    Raises:
      ValueError: for stages that do not fit together or into the config; otherwise as :func:`experiments.train.train`.
      MissingStageError: if a stage that ``only`` leaves out is needed and not finished.
    """
    check(config, workdir, seeds, only)
    names, all_seeds = [stage["name"] for stage in config.stages], [None] if seeds is None else seeds
    for seed in all_seeds:
        for name in [name for name in names if not only or name in only]:
            folder = folder_of(workdir, name, seed)
            print(f"stage {name}: {folder}", flush=True)
            write_start(config, name, workdir, seed)
            if teacher := stage_of(config, name).get("teacher"):
                finished(folder_of(workdir, teacher, seed), name)
            mine = config_of(config, name, workdir, seed)
            own = (
                "stages",
                "masks_from",
                "keep_epochs",
                *(["distill_from"] if "teacher" in stage_of(config, name) else []),
                *stage_of(config, name),
                *(["start"] if "rewind" in stage_of(config, name) else []),
            )
            mine = for_run(mine, changes_besides(own, changed or {}))
            state, _ = train(mine, folder)
            if state is not None and not (folder / SPARSE).exists():
                jaxsparse.save_sparse(folder / DENSE, state.params)
    results: dict[str, dict[str, Any]] = {}
    for name, seed in itertools.product(names, all_seeds):
        if result := read_json(folder_of(workdir, name, seed) / "result.json"):
            results.setdefault(name, {})[f"{result['seed']}"] = result
    write_json(workdir / "result.json", results)
    return table(results, measure_of(config))


def check(config: ConfigDict, workdir: Path, seeds: Sequence[int] | None = None, only: Sequence[str] = ()) -> None:
    """Raises the errors of :func:`run` that can be found before anything is trained."""
    if not config.get("stages"):
        raise ValueError("this takes a config with config.stages, such as configs/stages/asni.py")
    leaves_masks: dict[str, bool] = {}
    for i, stage in enumerate(config.stages):
        name, after, where = stage.get("name"), stage.get("after"), f"config.stages[{i}]"
        if not name or "/" in name or name in leaves_masks:
            raise ValueError(f"{where}.name is the name of a folder, and no other stage has it, got {name!r}")
        if after is not None and after not in leaves_masks:
            raise ValueError(f"{where}.after is an earlier stage, one of {list(leaves_masks)}, got {after!r}")
        if after is None and "prune" in stage:
            raise ValueError(f"{where}.prune needs config.stages[{i}].after, the stage whose weights are pruned")
        if after is not None and "prune" not in stage and not leaves_masks[after]:
            raise ValueError(f"{where} needs 'prune': {after}, which it starts from, leaves no masks")
        if stage.get("teacher") is not None and stage["teacher"] not in leaves_masks:
            raise ValueError(
                f"{where}.teacher is an earlier stage, one of {list(leaves_masks)}, got {stage['teacher']!r}"
            )
        mine = config_of(config, name, workdir)
        if after is not None and mine.dense:
            raise ValueError(f"{where} starts from masks, those of {after}, but is dense")
        if (source := stage.get("rewind")) is not None:
            if source not in leaves_masks or "prune" not in stage or "start" in stage:
                raise ValueError(
                    f"{where}.rewind is an earlier stage, one of {list(leaves_masks)}, and comes with 'prune' and "
                    f"without 'start', got {source!r}"
                )
            first = config_of(config, source, workdir).start_epochs
            if not first <= mine.start_epochs:
                raise ValueError(f"{where} rewinds to epoch {mine.start_epochs:g}, but {source} starts at {first:g}")
        choose(STARTS, mine.start, f"{where}.start")
        if "prune" in stage:
            pruner(config, stage)
        with named(f"stage {name}"):
            optimizer = make_optimizer(mine, CHECKED_STEPS, make_model(mine, mine.model.get("num_classes") or 1000))
        leaves_masks[name] = not mine.dense and optimizer.groups is None
    if unknown := [name for name in only if name not in leaves_masks]:
        raise ValueError(f"--only takes {', '.join(leaves_masks)}, got {', '.join(unknown)}")
    for name in only:
        if (after := stage_of(config, name).get("after")) and after not in only:
            for seed in [None] if seeds is None else seeds:
                left_by(folder_of(workdir, after, seed), name)


def stage_of(config: ConfigDict, name: str) -> Mapping[str, Any]:
    """The stage with a name."""
    return next(stage for stage in config.stages if stage["name"] == name)


def folder_of(workdir: Path, name: str, seed: int | None = None) -> Path:
    """The folder of a stage, or of one of its seeds."""
    return workdir / name if seed is None else workdir / name / f"seed_{seed}"


def config_of(config: ConfigDict, name: str, workdir: Path, seed: int | None = None) -> ConfigDict:
    """The config of one stage, as :func:`experiments.train.train` takes it.

    Raises:
      ValueError: for a key that the config does not have.
    """
    stage, mine = stage_of(config, name), copy.deepcopy(config)  # ConfigDict(config) would share the placeholders
    with mine.unlocked():
        del mine.stages
    if seed is not None:
        mine.seed = seed
    for key, value in stage.items():
        if key not in OWN:
            replace_key(mine, key, value, f"stage {name}")
    if "after" in stage:
        pruned = folder_of(workdir, name, seed) / START
        file = pruned if "prune" in stage else folder_of(workdir, stage["after"], seed) / SPARSE
        mine.masks_from = str(file)
    if "rewind" in stage:
        mine.start = "weights"  # those of the file, which are the earlier ones
    if "teacher" in stage:
        mine.distill_from = str(folder_of(workdir, stage["teacher"], seed))
    later = {other.get("start_epochs", config.start_epochs) for other in config.stages if other.get("rewind") == name}
    mine.keep_epochs = tuple(sorted({*mine.keep_epochs, *later}))
    return mine


def replace_key(config: ConfigDict, key: str, value: Any, where: str, may_add: bool = False) -> None:
    """Sets a key, "epochs" or "optimizer.learning_rate", of a config that has it, or ``may_add`` it.

    Raises:
      ValueError: for a key that is not there; it begins with ``where``.
    """
    *parents, last = key.split(".")
    try:
        for parent in parents:
            config = config[parent]
        if last not in config and not may_add:
            raise KeyError(last)
        with config.unlocked():
            config[last] = ConfigDict(value) if isinstance(value, Mapping) else value
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: config.{key} cannot be {value!r}: {error}") from None


def changes_besides(own: Iterable[str], changed: Mapping[str, Any]) -> dict[str, Any]:
    """The changed keys that are none of the ``own`` ones of a stage, nor in them."""
    return {
        key: value for key, value in changed.items() if not any(re.match(rf"{re.escape(k)}(\W|$)", key) for k in own)
    }


def write_start(config: ConfigDict, name: str, workdir: Path, seed: int | None = None) -> None:
    """Writes the pruned network that a stage starts from, if the stage prunes.

    Raises:
      MissingStageError: if the stage before is not finished.
      ValueError: if the stage was begun from another network, or has weights that the one before had pruned.
    """
    stage = stage_of(config, name)
    if "after" not in stage:
        return
    before, folder = left_by(folder_of(workdir, stage["after"], seed), name), folder_of(workdir, name, seed)
    if "prune" not in stage:
        return
    params, before_masks = jaxsparse.load_sparse(before)
    masks = pruner(config, stage)(params)
    old = by_path(before_masks)
    if back := [path for path, mask in by_path(masks).items() if np.any(np.asarray(mask) & ~old[path])]:
        raise ValueError(f"stage {name}: prune keeps weights of {', '.join(back)} that {stage['after']} had pruned")
    if "rewind" in stage:
        params = rewound(config, name, workdir, seed)
    folder.mkdir(parents=True, exist_ok=True)
    again = folder / f"{START}.new"
    jaxsparse.save_sparse(again, jaxsparse.apply_masks(params, masks), masks)
    there = folder / START
    if there.exists() and there.read_bytes() != again.read_bytes():
        again.unlink()
        raise ValueError(f"stage {name} was begun from another {there}: take another workdir, or delete {folder}")
    again.replace(there)


def rewound(config: ConfigDict, name: str, workdir: Path, seed: int | None = None) -> Any:
    """The params that the stage to which ``name`` is rewound had at that time.

    Raises:
      MissingStageError: if they are not there.
    """
    source = folder_of(workdir, stage_of(config, name)["rewind"], seed)
    file = kept_file(source, config_of(config, name, workdir, seed).start_epochs)
    if not file.exists():
        raise MissingStageError(f"{name} starts from {file}, which is not there: delete {source} to train it again")
    return jaxsparse.load_sparse(file)[0]


def pruner(config: ConfigDict, stage: Mapping[str, Any]) -> Callable[[Any], Any]:
    """The function of the params that makes a stage's masks, its "prune"."""
    call = {"params": None, **stage["prune"]}
    function, arguments = Calls(config, steps_per_epoch=1).call(call, f"stage {stage['name']}: prune")
    return lambda params: function(**{**arguments, "params": params})


def left_by(folder: Path, name: str) -> Path:
    """The network that a finished stage left, from which the stage ``name`` starts."""
    finished(folder, name)
    for file in (folder / SPARSE, folder / DENSE):
        if file.exists():
            return file
    raise MissingStageError(f"{name} starts from the network of {folder}, which is not there")


def finished(folder: Path, name: str) -> None:
    """Raises a MissingStageError if a stage is not finished whose network the stage ``name`` needs."""
    if read_json(folder / "result.json") is None:
        raise MissingStageError(f"{name} starts from the network of {folder}, which is not finished")


def table(results: Mapping[str, Mapping[str, Mapping[str, Any]]], measure: Measure = ACCURACY) -> Table:
    """A row for each stage, of the results of its seeds."""
    import pandas as pd

    rows = [
        (stage, 100 * one["density"], measure.factor * one[measure.key])
        for stage in results
        for one in results[stage].values()
    ]
    groups = pd.DataFrame(rows, columns=["stage", "density", "score"]).groupby("stage", sort=False)
    means, errors = groups.mean(), groups.sem()
    return as_table({
        "stage": means.index,
        "density": means.density.map("{:.2f}%".format),
        measure.name: list(map(measure.text, means.score, errors.score)),
        "difference": (means.score - means.score.iloc[0]).map(f"{{:+{measure.form}}}".format),
    }, left=("stage",))  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Runs :func:`run` with the flags; bad options and files are an error of one line, without a traceback."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options start with --")
    try:
        if refused := [name for name in REFUSED if FLAGS[name].present]:
            raise ValueError(f"--{refused[0]} is an option of experiments.train; stages run one after another here")
        seeds = None if FLAGS.seeds is None else as_seeds(FLAGS.seeds)
        changed = config_flags.get_override_values(FLAGS["config"])
        refuse_idle(FLAGS.config, [key for key in changed if key != "start"])
        print(run(FLAGS.config, Path(FLAGS.workdir), seeds, FLAGS.only, changed).text())
    except Stopped as stopped:
        print(f"stopped by {signal.Signals(stopped.signal).name} {stopped}; the same command resumes")
        sys.exit(128 + stopped.signal)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
