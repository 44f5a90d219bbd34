"""Run a table of a paper, and write what came out beside what its authors report.

  python -m experiments.reproduce sparse_momentum_table_1 --data_dir=DIR

writes results/sparse_momentum_table_1.md, .png and .json (the test error of every run). The runs, a folder each with
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
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from experiments import plots
from experiments.tables import TABLES, Row, Table
from experiments.train import Stopped, as_seeds, mean_and_error, train
from experiments.workdir import WorkdirInUseError, read_json, write_json


def reproduce(
    table: Table,
    runs: Path,
    data_dir: str | None,
    seeds: Sequence[int] | None = None,
    only: str = "",
    known: Mapping[str, Mapping[int, float]] | None = None,
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
        try:
            train(config_of(row, seed, data_dir), workdir)
        except WorkdirInUseError:
            print("  left to the process that is at it")


def config_of(row: Row, seed: int, data_dir: str | None = None) -> ConfigDict:
    """The configuration of a run of a row."""
    path, _, argument = row.config.partition(":")
    config = runpy.run_path(path)["get_config"](*[argument] if argument else []).lock()
    config.update_from_flattened_dict({**row.changes, "seed": seed, "data_dir": data_dir})
    return config


def test_errors(table: Table, runs: Path) -> list[dict[int, float]]:
    """For each row the test errors in % of its finished runs, by seed."""
    found = []
    for row in table.rows:
        folders = sorted((runs / row.run).glob("seed_*"), key=lambda folder: int(folder.name.removeprefix("seed_")))
        results = [read_json(folder / "result.json") for folder in folders]
        found.append({result["seed"]: 100 * (1 - result["test_accuracy"]) for result in results if result})
    return found


def rounded(found: Mapping[int, float]) -> dict[int, float]:
    """The errors in the order of the seeds, without the digits that float32 made up."""
    return {seed: round(found[seed], 4) for seed in sorted(found)}


def as_markdown(name: str, table: Table, errors: Sequence[Mapping[int, float]], command: str) -> str:
    """The table with the published numbers, ours, and every run."""
    relative = table.relative_to is not None
    head = ["network", table.x, "paper", "ours", "seeds", "difference", "two standard errors"]
    lines = [f"# {table.title}", "", table.about, "", "Test error in %, mean ± standard error over the seeds."]
    lines[-1] += " In the last column twice the standard error of the difference."
    lines += ["", *_markdown_rows(head, [_compared(row, found) for row, found in zip(table.rows, errors, strict=True)])]
    if relative:
        changes = [_changed(table, errors, row, found) for row, found in zip(table.rows, errors, strict=True)]
        head = ["network", table.x, "paper", "ours"]
        lines += ["", f"Change against {table.relative_to}, in points:", "", *_markdown_rows(head, changes)]
    lines += ["", f"![{table.title.partition('.')[0]}]({name}.png)", "", "Every run, test error in %:", ""]
    seeds = sorted({seed for found in errors for seed in found})
    every = [
        [row.series, f"{row.x}", *(f"{found[seed]:.2f}" if seed in found else "" for seed in seeds)]
        for row, found in zip(table.rows, errors, strict=True)
    ]
    lines += _markdown_rows(["network", table.x, *(f"seed {seed}" for seed in seeds)], every)
    device = jax.devices()[0].device_kind
    lines += ["", f"`{command}`, JAX {jax.__version__} on {device}, {datetime.date.today()}."]
    return "\n".join(lines) + "\n"


def picture(table: Table, errors: Sequence[Mapping[int, float]]) -> Any:
    """The points of the table, ours, the paper's and other methods'."""
    ours: dict[str, dict[Any, tuple[float, float | None]]] = {}
    paper: dict[str, dict[Any, tuple[float, float | None]]] = {}
    baselines: dict[str, float] = {}
    for row, found in zip(table.rows, errors, strict=True):
        if row.x == "dense":
            if found:
                baselines[f"{row.series}, dense, ours"] = mean_and_error(list(found.values()))[0]
            continue
        if found:
            ours.setdefault(f"{row.series}, ours", {})[row.x] = mean_and_error(list(found.values()))
        if row.published:
            paper.setdefault(f"{row.series}, paper", {})[row.x] = row.published
    others = {label: {x: (error, None) for x, error in points.items()} for label, points in table.others.items()}
    title = table.title.partition(". ")[0]
    return plots.errors_against(table.x, {**ours, **paper, **others}, baselines, title)


def _compared(row: Row, found: Mapping[int, float]) -> list[str]:
    published = "" if row.published is None else _with_error(*row.published)
    if not found:
        return [row.series, f"{row.x}", published, "not run", "", "", ""]
    mean, error = mean_and_error(list(found.values()))
    difference = bar = ""
    if row.published is not None:
        difference = f"{mean - row.published[0]:+.3f}"
        bar = f"{2 * (error**2 + row.published[1] ** 2) ** 0.5:.3f}" if error and row.published[1] else ""
    seeds = ", ".join(map(str, sorted(found)))
    return [row.series, f"{row.x}", published, _with_error(mean, error), seeds, difference, bar]


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
    parser.add_argument("--data_dir", help="where TensorFlow Datasets has its data (~/tensorflow_datasets)")
    parser.add_argument("--seeds", help="these, such as 0,1,2, instead of the table's own")
    parser.add_argument("--only", default="", metavar="REGEX", help="only runs whose folder it is found in")
    parser.add_argument(
        "--add", action="store_true", help="keep what the .json of the results has, run what it has not"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"), help="folder of the runs (%(default)s)")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the table (%(default)s)")
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
            known = {run: {int(seed): error for seed, error in found.items()} for run, found in saved.items()}
        try:
            reproduce(table, args.runs, args.data_dir, seeds, args.only, known)
        except Stopped as stop:
            stopped = stop
        found = test_errors(table, args.runs)
        errors = [{**known.get(row.run, {}), **mine} for row, mine in zip(table.rows, found, strict=True)]
        write_json(kept, {row.run: rounded(mine) for row, mine in zip(table.rows, errors, strict=True)})
        command = f"python -m experiments.reproduce {args.table}" + (f" --seeds={args.seeds}" if args.seeds else "")
        (args.results / f"{args.table}.md").write_text(as_markdown(args.table, table, errors, command))
        picture(table, errors).savefig(args.results / f"{args.table}.png")
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    print(f"see {args.results / args.table}.md")
    if stopped:
        print(f"stopped by {signal.Signals(stopped.signal).name}; the same command goes on")
        sys.exit(128 + stopped.signal)


if __name__ == "__main__":
    main()
