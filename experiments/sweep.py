"""Train many methods on one problem, at several sparsities and with several seeds, and put them side by side.

  python -m experiments.sweep --config=configs/sweeps/mnist_lenet_300_100.py --config.data_dir=DIR --workdir=runs/sweep
  python -m experiments.sweep ... --dry_run                      # the plan, and how long it takes
  python -m experiments.sweep ... --only=dense,rda --seeds=0     # these arms, these seeds
  python -m experiments.sweep ... --results=results              # write the tables and pictures to this folder instead
  python -m experiments.sweep ... --take_over=results/NAME.csv   # go on without the folders of runs in this table

The config is one of experiments.train with one key more, config.sweep. Each of its "arms" has a "name" and changes of
the config, as a stage of experiments.stages has: "method" replaces the whole method, "optimizer.learning_rate" a single
key. An arm is run at each of config.sweep.sparsities, as "method.sparsity"; with "each", {KEY: values}, at each of
these values of another key: "config.sweep.sparsities", or strengths of a penalty, or patterns, from which follows what
the runs keep. An arm that is dense is run once. A seed may have
sparsities of its own: config.sweep.sparsities_of_seed = {"1": (0.9,)}.

Every run has a folder WORKDIR/ARM/VALUE/seed_N, with all that experiments.train leaves but for its pictures. The same
command skips runs that are finished and goes on with one that was stopped; in a second terminal it takes part. Finished
runs of another configuration, such as those of config.smoke, are an error: they need another workdir. A run
that fails says so in the table, and the sweep goes on. Runs whose numbers were not finite are not tried again, unless
their folder is deleted.

At the end there are NAME.csv with every run, NAME.md with tables and what they say, NAME_light.png and NAME_dark.png.
"""

import contextlib
import copy
import datetime
import json
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

import jaxsparse
from experiments import command_line
from experiments.build import CHECKED_STEPS, ROOMS, make_optimizer, named
from experiments.measures import measure_of
from experiments.networks import make_model
from experiments.options import as_seeds, for_run, refuse_idle
from experiments.results import sweep as results
from experiments.results import themes
from experiments.stages import REFUSED, changes_besides, replace_key
from experiments.stopping import Stopped
from experiments.train import FLAGS, train
from experiments.workdir import WorkdirInUseError, fingerprint, read_json, refuse_another, write_json
from jaxsparse.tables import Table

flags.DEFINE_bool("dry_run", False, "Print the plan of a sweep and how long it takes, and train nothing.")
flags.DEFINE_alias("dry-run", "dry_run")
flags.DEFINE_string("results", None, "Folder for the tables and pictures of a sweep; by default its workdir.")
flags.DEFINE_string("take_over", None, "A .csv file of this sweep, whose runs are not trained again.")
for flag in ("config", "workdir", "seeds", "only"):
    flags.declare_key_flag(flag)  # so that --help has them

OWN = ("name", "each")  # the keys of an arm that are not keys of the config
GRID = "config.sweep.sparsities"


class Run(NamedTuple):
    """A run of a sweep.

    Attributes:
      arm: its name.
      value: of the key that varies within the arm, as text; "" for an arm that is run once.
      sparsity: the fraction of zeros that it is told to have; None where it follows from something else.
      seed: the seed.
      folder: of the run.
      config: as :func:`experiments.train.train` takes it.
    """

    arm: str
    value: str
    sparsity: float | None
    seed: int
    folder: Path
    config: ConfigDict

    @property
    def name(self) -> str:
        """Arm, value and seed."""
        return ", ".join(filter(None, (self.arm, self.value, f"seed {self.seed}")))

    @property
    def fingerprint(self) -> str:
        """A short name for the config: that of another one differs."""
        return fingerprint(self.config)

    def outcome(self) -> dict[str, Any] | None:
        """The contents of result.json, or of failed.json; None for a run that is not finished."""
        return read_json(self.folder / "result.json") or read_json(self.folder / "failed.json")


def plan(
    config: ConfigDict,
    workdir: Path,
    only: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    changed: Mapping[str, Any] | None = None,
) -> list[Run]:
    """All runs of a sweep, seed by seed, so that a whole table of one seed comes before the next.

    Args:
      config: a config of the trainer with ``config.sweep``.
      workdir: folder of the sweep.
      only: names of arms; all by default.
      seeds: instead of ``config.sweep.seeds``.
      changed: keys of the config that were changed on the command line, which ``config.smoke`` leaves as they are.

    Raises:
      ValueError: for an arm that does not fit into the config, naming it. For a method that is not there, the message
        has those that are.
    """
    if "sweep" not in config:
        raise ValueError("this takes a config with config.sweep, such as configs/sweeps/mnist_lenet_300_100.py")
    if missing := [key for key in ("name", "arms", "seeds") if key not in config.sweep]:
        raise ValueError(f"config.sweep lacks {', '.join(missing)}")
    if nameless := [i for i, arm in enumerate(config.sweep.arms) if not arm.get("name")]:
        raise ValueError(f"config.sweep.arms[{nameless[0]}] lacks 'name', which is that of a folder")
    if paths := [arm["name"] for arm in config.sweep.arms if "/" in arm["name"]]:
        raise ValueError(f"the name of an arm of config.sweep is that of a folder, without '/', got {paths[0]!r}")
    arms = {arm["name"]: arm for arm in config.sweep.arms}
    if len(arms) < len(config.sweep.arms):
        raise ValueError("two arms of config.sweep have the same name")
    if unknown := [name for name in only if name not in arms]:
        raise ValueError(f"--only takes {', '.join(arms)}, got {', '.join(unknown)}")
    runs = []
    of_seed = config.sweep.get("sparsities_of_seed", {})
    for seed in config.sweep.seeds if seeds is None else seeds:
        for name in only or arms:
            key, values, told = varied(arms[name], of_seed.get(str(seed), config.sweep.get("sparsities", ())))
            for value in values:
                text = "" if key is None else label(value)
                mine = config_of(config, arms[name], key, value, seed)
                own = ("sweep", "seed", *arms[name], *([key] if key else []))
                mine = for_run(mine, changes_besides(own, changed or {}))
                folder = workdir / name / text / f"seed_{seed}"
                runs.append(Run(name, text, value if told else None, seed, folder, mine))
    if len({run.folder for run in runs}) < len(runs):
        raise ValueError("two values of an arm of config.sweep look the same")
    for run in {(run.arm, run.value): run for run in runs}.values():
        with named(f"arm {run.arm}"):
            check(run.config)
    return runs


def varied(arm: Mapping[str, Any], sparsities: Sequence[float]) -> tuple[str | None, tuple[Any, ...], bool]:
    """The key that varies within an arm, its values, and whether these are the sparsities.

    The key is None, with a single value, for an arm that is run once.
    """
    each = arm.get("each", {"method.sparsity": GRID})
    if arm.get("dense") and "each" not in arm:
        return None, (None,), False
    if len(each) != 1 or not all(each.values()):
        raise ValueError(f"arm {arm['name']}: 'each' is one key with its values, got {dict(each)}")
    ((key, values),) = each.items()
    if values == GRID and not sparsities:
        raise ValueError(f"arm {arm['name']} is run at each of {GRID}, which the config lacks")
    return key, tuple(sparsities if values == GRID else values), values == GRID


def config_of(config: ConfigDict, arm: Mapping[str, Any], key: str | None, value: Any, seed: int) -> ConfigDict:
    """The config of a run: that of its arm, with a value of the key that varies."""
    mine = copy.deepcopy(config)  # ConfigDict(config) would share the placeholders
    with mine.unlocked():
        del mine.sweep
        mine.seed = seed
    for name, given in arm.items():
        if name not in OWN:
            replace_key(mine, name, given, f"arm {arm['name']}")
    if key is not None:
        replace_key(mine, key, value, f"arm {arm['name']}", may_add=True)
    return mine


def check(config: ConfigDict) -> None:
    """Raises a ValueError for a method that is not there, or does not take its arguments."""
    if not config.dense and (name := config.method.get("name")) not in (known := methods()):
        raise ValueError(f"there is no method {name!r}; there are {', '.join(known)}")
    make_optimizer(config, CHECKED_STEPS, make_model(config, config.model.get("num_classes") or 10))


def check_finished(runs: Sequence[Run]) -> None:
    """Raises a WorkdirError for a finished run of another configuration, which a table must not have beside others."""
    for run in runs:
        if run.outcome() is not None:
            refuse_another(run.folder, run.config)


def take_over(runs: Sequence[Run], file: Path) -> int:
    """Makes the folders of runs that are not there from the table of an earlier sweep, and returns how many.

    Raises:
      ValueError: for a run of another configuration, naming it, and a file without the fingerprints of configs.
    """
    rows = {(row.arm, row.value, row.seed): row for row in results.read(file).itertuples() if not row.failed}
    taken = 0
    for run in runs:
        row = rows.get((run.arm, run.value, run.seed))
        if row is None or run.outcome() is not None:
            continue
        if row.config != run.fingerprint:
            raise ValueError(
                f"{file} has {run.name} with another configuration, {row.config or 'which it does not say'}"
            )
        run.folder.mkdir(parents=True, exist_ok=True)
        write_json(run.folder / "config.json", json.loads(run.config.to_json()))
        measure = measure_of(run.config)
        found = getattr(row, measure.key) / measure.factor
        result = {measure.key: found, "density": row.kept / 100, "seconds": row.seconds}
        write_json(run.folder / "result.json", result)
        taken += 1
    return taken


def methods() -> list[str]:
    """The names that ``config.method`` takes: links and wrappers of jaxsparse, and functions named as their module."""
    rooms = {room.__name__.rpartition(".")[2]: room for room in ROOMS}
    of_trainer = [name for name, room in rooms.items() if callable(getattr(room, name, None))]
    returned = {
        name: getattr(getattr(jaxsparse, name), "__annotations__", {}).get("return") for name in jaxsparse.__all__
    }
    return [*(name for name, kind in returned.items() if "GradientTransformation" in str(kind)), *of_trainer]


def label(value: Any) -> str:
    """A value as a name of a folder: 0.9, 1e-05, or for {"name": "n_of_m", "n": 1, "m": 4} n_of_m_1_4."""
    if isinstance(value, Mapping | ConfigDict):
        return "_".join(label(part) for part in value.values())
    return f"{value:g}" if isinstance(value, float) else re.sub(r"[^\w.+-]+", "_", str(value)).strip("_")


def train_all(runs: Sequence[Run]) -> None:
    """Trains the runs that are not finished, with a bar that shows the time left.

    Raises:
      Stopped: after SIGTERM or Ctrl-C.
      OSError: if a folder cannot be written to, or the data are not there.
    """
    todo = [run for run in runs if _is_open(run)]
    with contextlib.closing(command_line.progress_bar(len(todo), label="sweep", unit="run")) as bar:
        for run in todo:
            if _is_open(run):  # still, as there may be another process
                said = train_one(run)
                bar.write(f"{run.name}: {said}", file=sys.stdout)
                sys.stdout.flush()
            bar.update()


def _is_open(run: Run) -> bool:
    outcome = run.outcome()
    return outcome is None or outcome.get("kind") not in (None, FloatingPointError.__name__)


def train_one(run: Run) -> str:
    """Trains a run, and returns what came out in words; an error is written to its folder."""
    failed = run.folder / "failed.json"
    run.folder.mkdir(parents=True, exist_ok=True)
    failed.unlink(missing_ok=True)
    try:
        with (run.folder / "output.txt").open("a") as file, contextlib.redirect_stdout(file):
            _, (result,) = train(run.config, run.folder, quiet=True)
    except WorkdirInUseError:
        return "left to the process that trains it"
    except (Stopped, OSError):
        raise
    except Exception as error:  # whatever a method does, the others are to be compared
        message = (str(error) or repr(error)).splitlines()[0]
        write_json(failed, {"failed": message, "kind": type(error).__name__})
        return f"failed: {message}"
    measure = measure_of(run.config)
    said = f"{measure.name} {measure.value(result[measure.key])}"
    return f"{said}, {result['density']:.2%} kept, {result['seconds']:.0f} s"


def seconds_left(runs: Sequence[Run], known: Mapping[str, float]) -> float | None:
    """How long the runs that are not finished will take, if anything is there to go by.

    It goes by the finished ones of the same arm, or else by those of all arms, or else by ``known``: the seconds of an
    "epoch", and those that a run takes to "start".
    """
    took: dict[str, list[float]] = {}
    for run in runs:
        if seconds := (run.outcome() or {}).get("seconds"):
            took.setdefault(run.arm, []).append(seconds / run.config.epochs)
    every = [epoch for epochs in took.values() for epoch in epochs]
    if not every and "epoch" not in known:
        return None
    every = every or [known["epoch"]]

    def estimate(run):
        epochs = took.get(run.arm, every)
        return sum(epochs) / len(epochs) * run.config.epochs + known.get("start", 0)

    return sum(estimate(run) for run in runs if _is_open(run))


def plan_table(runs: Sequence[Run]) -> Table:
    """A row for each arm of the plan: its values, its seeds, and how many of its runs are finished and failed."""
    rows = []
    for arm in dict.fromkeys(run.arm for run in runs):
        mine = [run for run in runs if run.arm == arm]
        outcomes = [run.outcome() or {} for run in mine]
        rows.append((
            arm, ", ".join(dict.fromkeys(run.value for run in mine)), f"{len({run.seed for run in mine})}",
            f"{len(mine)}", f"{sum('density' in one for one in outcomes)}",
            f"{sum('failed' in one for one in outcomes)}",
        ))  # fmt: skip
    return Table(("arm", "values", "seeds", "runs", "finished", "failed"), tuple(rows), left=(0, 1))


def write(config: ConfigDict, runs: Sequence[Run], folder: Path, command: str) -> str:
    """Writes the tables and pictures of what is finished, and returns the tables and what they say as text."""
    found = results.outcomes(runs)
    folder.mkdir(parents=True, exist_ok=True)
    name = config.sweep.name
    title = config.sweep.get("title", name)
    found.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
    (folder / f"{name}.md").write_text(results.as_markdown(name, title, found, command))
    groups = dict(config.sweep.get("groups") or ())
    themes.save(lambda: results.picture(found, title, groups), folder, name)
    return f"{results.text(found)}\n\n{results.paragraph(found)}"


@contextlib.contextmanager
def compiled_once(folder: Path) -> Iterator[None]:
    """Keeps compiled programs in a folder: those of one arm and value are the same for all seeds."""
    options = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0.1}
    before = {name: getattr(jax.config, name) for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def main(argv: Sequence[str]) -> None:
    """The command line; what the user can set right is told in a line, without a traceback."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options start with --")
    config, workdir, stopped = FLAGS.config, Path(FLAGS.workdir), None
    try:
        if refused := [name for name in REFUSED if FLAGS[name].present]:
            raise ValueError(
                f"--{refused[0]} is an option of experiments.train; the runs of a sweep follow one another"
            )
        seeds = None if FLAGS.seeds is None else as_seeds(FLAGS.seeds)
        changed = config_flags.get_override_values(FLAGS["config"])
        refuse_idle(config, changed)
        runs = plan(config, workdir, FLAGS.only, seeds, changed)
        every = plan(config, workdir, (), sorted({*config.sweep.seeds, *(seeds or ())}), changed)
        check_finished(every)
        if FLAGS.take_over is not None and not FLAGS.dry_run:
            print(f"{take_over(every, Path(FLAGS.take_over))} runs are taken over from {FLAGS.take_over}")
        left = seconds_left(runs, config.sweep.get("seconds", {}))
        about = "" if left is None else f", in about {datetime.timedelta(seconds=round(left))}"
        print(plan_table(runs).text())
        print(f"{sum(map(_is_open, runs))} of {len(runs)} runs are to be trained{about}", flush=True)
        if FLAGS.dry_run:
            return
        with compiled_once(workdir / "compiled"):
            try:
                train_all(runs)
            except Stopped as stop:
                stopped = stop
        folder = workdir if FLAGS.results is None else Path(FLAGS.results)
        command = f"python -m experiments.sweep --config={config_flags.get_config_filename(FLAGS['config'])}"
        print(write(config, every, folder, command))
        print(f"see {folder / config.sweep.name}.md")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if stopped:
        print(f"stopped by {signal.Signals(stopped.signal).name} {stopped}; the same command goes on from there")
        sys.exit(128 + stopped.signal)


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
