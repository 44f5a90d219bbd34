"""Run a table of a paper, and write what came out beside what its authors report.

  python -m experiments.reproduce sparse_momentum_table_1 --data_dir=DIR

writes results/sparse_momentum_table_1.md, .png and .json (what came out of every run). The runs, a folder each with
all that experiments.train leaves, are kept in runs/reproduce; a table that was stopped goes on where it was when the
same command is given again, and tables share the runs that they have in common. The same command in a second terminal
takes part: each takes runs that nobody has begun, so on a CPU that is how to use more cores. With --add only what the
.json does not have yet is run, for instance more seeds, or on another machine.
"""

import argparse
import datetime
import re
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging
from ml_collections import ConfigDict

from experiments import plots
from experiments.asni import masks_of
from experiments.command_line import as_path, not_empty
from experiments.compare import mean_and_error
from experiments.tables import TABLES, Row, Table
from experiments.train import Stopped, as_seeds, shrink, train
from experiments.workdir import WorkdirInUseError, read_json, write_json


class Outcome(NamedTuple):
    """What came out of a run, in %.

    Attributes:
      test_error: of the last step.
      kept: the share of the weights that the masks kept, of all layers that have masks; 100 if none has.
      validation_error: likewise of the examples that were held out; None if there were none, or it was not recorded.
      widths: of the layers that are left of a network with gates, such as "266-88-33"; None for others.
    """

    test_error: float
    kept: float
    validation_error: float | None = None
    widths: str | None = None


def reproduce(
    table: Table,
    runs: Path,
    data_dir: str | None,
    seeds: Sequence[int] | None = None,
    only: str = "",
    known: Mapping[str, Mapping[int, Outcome]] | None = None,
) -> None:
    """Runs what has not been run of a table, seed by seed.

    Args:
      table: one of :data:`experiments.tables.TABLES`.
      runs: folder of the runs.
      data_dir: as ``config.data_dir``.
      seeds: these instead of each row's own.
      only: a regular expression: leave out runs whose folder it is not found in.
      known: leave out these, by folder and seed.
    """
    known = known or {}
    todo = [
        (row, seed)
        for row in table.rows
        for seed in (range(row.seeds) if seeds is None else seeds)
        if re.search(only, row.run) and seed not in known.get(row.run, {})
    ]
    todo.sort(key=lambda row_and_seed: row_and_seed[1])  # a whole table of few seeds comes before more seeds
    for i, (row, seed) in enumerate(todo):
        workdir = runs / row.run / f"seed_{seed}"
        if read_json(workdir / "result.json") is None:
            print(f"run {i + 1} of {len(todo)}: {workdir}", flush=True)
        if row.after and not masks_of(runs / row.after, seed).exists():
            print(f"  left for later: it starts from the masks of {runs / row.after / f'seed_{seed}'}")
            continue
        try:
            train(config_of(row, seed, data_dir, runs), workdir)
        except WorkdirInUseError:
            print("  left to the process that is at it")


def config_of(row: Row, seed: int, data_dir: str | None = None, runs: Path = Path("runs/reproduce")) -> ConfigDict:
    """The configuration of a run of a row."""
    path, _, argument = row.config.partition(":")
    config = runpy.run_path(path)["get_config"](*[argument] if argument else []).lock()
    config.update_from_flattened_dict({**row.changes, "seed": seed, "data_dir": data_dir})
    if row.after:
        config.sparsity.masks_from = str(masks_of(runs / row.after, seed))
    return shrink(config) if config.smoke else config


def outcomes(table: Table, runs: Path) -> list[dict[int, Outcome]]:
    """For each row what came out of its finished runs, by seed."""
    found = []
    for row in table.rows:
        folders = sorted((runs / row.run).glob("seed_*"), key=lambda folder: int(folder.name.removeprefix("seed_")))
        results = [read_json(folder / "result.json") for folder in folders]
        found.append({result["seed"]: _outcome(result) for result in results if result})
    return found


def _outcome(result: Mapping[str, Any]) -> Outcome:
    validation = result.get("validation_accuracy")
    return Outcome(
        test_error=100 * (1 - result["test_accuracy"]),
        kept=100 * result["density"],
        validation_error=None if validation is None else 100 * (1 - validation),
        widths="-".join(map(str, result["widths"])) if "widths" in result else None,
    )


def as_json(found: Mapping[int, Outcome]) -> dict[int, dict[str, Any]]:
    """In the order of the seeds, without what is None, and without the digits that float32 made up."""
    return {
        seed: {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in found[seed]._asdict().items()
            if value is not None
        }
        for seed in sorted(found)
    }


def as_markdown(name: str, table: Table, found: Sequence[Mapping[int, Outcome]], command: str) -> str:
    """The table with the published numbers, ours, and every run."""
    errors = [{seed: outcome.test_error for seed, outcome in of_row.items()} for of_row in found]
    lines = [f"# {table.title}", "", table.about, "", "Test error in %, mean ± standard error over the seeds."]
    if any(row.published for row in table.rows):
        lines[-1] += " In the last column twice the standard error of the difference."
    compared = [_compared(table, row, of_row) for row, of_row in zip(table.rows, found, strict=True)]
    columns = [column for column in compared[0] if any(row[column] for row in compared)]
    lines += ["", *_markdown_rows(columns, [[row[column] for column in columns] for row in compared])]
    if table.relative_to is not None:
        changes = [_changed(table, errors, row, of_row) for row, of_row in zip(table.rows, errors, strict=True)]
        head = ["network", table.x, "paper", "ours"]
        lines += ["", f"Change against {table.relative_to}, in points:", "", *_markdown_rows(head, changes)]
    lines += ["", f"![{table.title.partition('.')[0]}]({name}.png)", "", "Every run, test error in %:", ""]
    seeds = sorted({seed for of_row in errors for seed in of_row})
    every = [
        [row.series, f"{row.x}", *(_one_run(of_row[seed]) if seed in of_row else "" for seed in seeds)]
        for row, of_row in zip(table.rows, found, strict=True)
    ]
    lines += _markdown_rows(["network", table.x, *(f"seed {seed}" for seed in seeds)], every)
    device = jax.devices()[0].device_kind
    lines += ["", f"`{command}`, JAX {jax.__version__} on {device}, {datetime.date.today()}."]
    return "\n".join(lines) + "\n"


def picture(table: Table, found: Sequence[Mapping[int, Outcome]]) -> Any:
    """The points of the table, ours, the paper's and other methods'."""
    ours: dict[str, dict[Any, tuple[float, float | None]]] = {}
    paper: dict[str, dict[Any, tuple[float, float | None]]] = {}
    baselines: dict[str, float] = {}
    for row, of_row in zip(table.rows, found, strict=True):
        if of_row:
            errors, kept, *_ = zip(*of_row.values(), strict=True)
            x = round(mean_and_error(kept)[0], 2) if table.against_kept else row.x
            if row.x == "dense":
                baselines[f"{row.series}, dense, ours"] = mean_and_error(errors)[0]
            else:
                ours.setdefault(f"{row.series}, ours", {})[x] = mean_and_error(errors)
        if row.published and row.x != "dense":
            paper.setdefault(f"{row.series}, paper", {})[row.x] = row.published
    others = {label: {x: (error, None) for x, error in points.items()} for label, points in table.others.items()}
    title = table.title.partition(". ")[0]
    xlabel = "weights kept (%)" if table.against_kept else table.x
    return plots.errors_against(xlabel, {**ours, **paper, **others}, baselines, title)


def _compared(table: Table, row: Row, found: Mapping[int, Outcome]) -> dict[str, str]:
    """The cells of a row by column; a column that is empty in all rows is left out."""
    columns = ("network", table.x, "paper", "kept (%)", "validation", "ours", "seeds", "difference")
    cells = {**dict.fromkeys([*columns, "two standard errors"], ""), "network": row.series, table.x: f"{row.x}"}
    if row.published is not None:
        cells["paper"] = _with_error(*row.published)
    if not found:
        return cells | {"ours": "not run"}
    errors, kept, validation, _ = zip(*found.values(), strict=True)
    mean, error = mean_and_error(errors)
    cells |= {"ours": _with_error(mean, error), "seeds": ", ".join(map(str, sorted(found)))}
    if table.against_kept or table.with_kept:  # else the method was told how many to keep
        cells["kept (%)"] = _with_error(*mean_and_error(kept))
        if None not in validation:
            cells["validation"] = _with_error(*mean_and_error(validation))
    if row.published is not None:
        cells["difference"] = f"{mean - row.published[0]:+.3f}"
        if error and row.published[1]:
            cells["two standard errors"] = f"{2 * (error**2 + row.published[1] ** 2) ** 0.5:.3f}"
    return cells


def _one_run(outcome: Outcome) -> str:
    return f"{outcome.test_error:.2f}" + (f" ({outcome.widths})" if outcome.widths else "")


def _changed(table: Table, errors: Sequence[Mapping[int, float]], row: Row, found: Mapping[int, float]) -> list[str]:
    base_row, base = next(
        (other, errors[i])
        for i, other in enumerate(table.rows)
        if (other.series, other.x) == (row.series, table.relative_to)
    )
    published = "" if row.published is None else f"{row.published[0] - base_row.published[0]:+.2f}"
    if not found or not base or row is base_row:
        return [row.series, f"{row.x}", published, "" if row is base_row else "not run"]
    (mean, error), (base_mean, base_error) = (mean_and_error(list(values.values())) for values in (found, base))
    combined = (error**2 + base_error**2) ** 0.5 if error and base_error else None
    return [row.series, f"{row.x}", published, _with_error(mean - base_mean, combined, "+.2f")]


def _with_error(mean: float, error: float | None, form: str = ".2f") -> str:
    return f"{mean:{form}}" if error is None else f"{mean:{form}} ± {error:.3f}"


def _markdown_rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(row) + " |" for row in cells]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    about = "\n".join(f"  {name}: {table.title.partition('. ')[0]}" for name, table in TABLES.items())
    parser.epilog = f"tables:\n{about}"
    parser.add_argument("table", choices=TABLES, metavar="TABLE", help="one of those below")
    parser.add_argument(
        "--data_dir", type=not_empty, help="where TensorFlow Datasets has its data (~/tensorflow_datasets)"
    )
    parser.add_argument("--seeds", help="these, such as 0,1,2, instead of the table's own")
    parser.add_argument("--only", default="", metavar="REGEX", help="only runs whose folder it is found in")
    parser.add_argument(
        "--add", action="store_true", help="keep what the .json of the results has, run what it has not"
    )
    for name, default, what in (("--runs", "runs/reproduce", "runs"), ("--results", "results", "table")):
        parser.add_argument(name, type=as_path, default=Path(default), help=f"folder of the {what} (%(default)s)")
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.WARNING)
    table, stopped = TABLES[args.table], None
    try:
        seeds = None if args.seeds is None else as_seeds(args.seeds.split(","))
        args.results.mkdir(parents=True, exist_ok=True)
        kept = args.results / f"{args.table}.json"
        known = {}
        if args.add:
            saved = read_json(kept) or {}
            known = {
                run: {int(seed): Outcome(**outcome) for seed, outcome in found.items()} for run, found in saved.items()
            }
        try:
            reproduce(table, args.runs, args.data_dir, seeds, args.only, known)
        except Stopped as stop:
            stopped = stop
        found = outcomes(table, args.runs)
        found = [{**known.get(row.run, {}), **mine} for row, mine in zip(table.rows, found, strict=True)]
        write_json(kept, {row.run: as_json(mine) for row, mine in zip(table.rows, found, strict=True)})
        command = f"python -m experiments.reproduce {args.table}" + (f" --seeds={args.seeds}" if args.seeds else "")
        (args.results / f"{args.table}.md").write_text(as_markdown(args.table, table, found, command))
        picture(table, found).savefig(args.results / f"{args.table}.png")
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    print(f"see {args.results / args.table}.md")
    if stopped:
        print(f"stopped by {signal.Signals(stopped.signal).name}; the same command goes on")
        sys.exit(128 + stopped.signal)


if __name__ == "__main__":
    main()
