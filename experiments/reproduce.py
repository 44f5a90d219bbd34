"""Run a table of a paper, and write what came out beside what its authors report.

  python -m experiments.reproduce sparse_momentum_table_1 --data_dir=DIR

writes results/sparse_momentum_table_1.md, two pictures, and .json (the numbers of every run). The runs, a folder each
with all that experiments.train leaves, are kept in runs/reproduce; the same command resumes a table that was stopped,
and tables share the runs that they have in common. The same command in a second terminal takes part: each takes runs
that no other has begun, so that a CPU's cores share the work. With --add only runs that the .json lacks are trained,
for instance more seeds, or on another machine.
"""

import argparse
import re
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import logging
from ml_collections import ConfigDict

from experiments import stages
from experiments.command_line import as_path, not_empty
from experiments.footprint import footprint
from experiments.options import as_seeds, for_run
from experiments.results import themes
from experiments.results.paper import as_frame, as_json, as_markdown, outcomes, read_outcomes
from experiments.results.plot import picture
from experiments.results.published import TABLES, PaperTable, Row
from experiments.stopping import Stopped
from experiments.train import train
from experiments.workdir import WorkdirInUseError, fingerprint, read_json, refuse_another, write_json

if TYPE_CHECKING:
    import pandas as pd


def reproduce(
    table: PaperTable,
    runs: Path,
    data_dir: str | None,
    seeds: Sequence[int] | None = None,
    only: str = "",
    known: "pd.DataFrame | None" = None,
) -> list[str]:
    """Runs the part of a table that has not been run, seed by seed.

    Args:
      table: one of :data:`experiments.results.published.TABLES`.
      runs: folder of the runs.
      data_dir: as ``config.data_dir``.
      seeds: these instead of each row's own.
      only: a regular expression; runs whose folder does not match are left out.
      known: runs to leave out, by the columns "run" and "seed".

    Returns:
      The folders of runs whose loss was not finite.
    """
    failed: list[str] = []
    done = set() if known is None else set(zip(known.run, known.seed, strict=True))
    todo = [(row, seed) for row, seed in chosen(table, seeds, only) if (row.run, seed) not in done]
    todo.sort(key=lambda row_and_seed: row_and_seed[1])  # a whole table of few seeds comes before more seeds
    for i, (row, seed) in enumerate(todo):
        workdir = runs / row.run / f"seed_{seed}"
        if read_json(workdir / "result.json") is None:
            print(f"run {i + 1} of {len(todo)}: {workdir}", flush=True)
        try:
            if row.stage:
                stages.write_start(read_config(row), row.stage, (runs / row.run).parent, seed)
            train(config_of(row, seed, data_dir, runs), workdir)
            if table.footprint:
                footprint(workdir, data_dir)
        except stages.MissingStageError as missing:
            print(f"  left for later: {missing}")
        except WorkdirInUseError:
            print("  left to the process that trains it")
        except FloatingPointError as error:  # the same each time: the rest of the table is not to wait for it
            print(f"  failed: {error}")
            failed.append(str(workdir))
    return failed


def config_of(row: Row, seed: int, data_dir: str | None = None, runs: Path = Path("runs/reproduce")) -> ConfigDict:
    """The configuration of a run of a row."""
    config = read_config(row)
    if row.stage:
        config = stages.config_of(config, row.stage, (runs / row.run).parent, seed)
    return _changed(config, row, seed, data_dir)


def _changed(config: ConfigDict, row: Row, seed: int, data_dir: str | None = None) -> ConfigDict:
    config.update_from_flattened_dict({**row.changes, "seed": seed, "data_dir": data_dir})
    return for_run(config, {})


def read_config(row: Row) -> ConfigDict:
    """The config that the file of a row gives."""
    path, _, argument = row.config.partition(":")
    return runpy.run_path(path)["get_config"](*[argument] if argument else []).lock()


def chosen(table: PaperTable, seeds: Sequence[int] | None, only: str) -> list[tuple[Row, int]]:
    """The rows of a table with their seeds, as for :func:`reproduce`."""
    return [
        (row, seed)
        for row in table.rows
        for seed in (range(row.seeds) if seeds is None else seeds)
        if re.search(only, row.run)
    ]


def named_by_config(table: PaperTable, found: "pd.DataFrame") -> "pd.DataFrame":
    """Results with the column "config": the fingerprints of the configurations that the table has for these runs."""
    rows = {row.run: row for row in table.rows}
    names = [
        fingerprint(_changed(read_config(rows[run]), rows[run], seed))
        for run, seed in zip(found.run, found.seed, strict=True)
    ]
    return found.assign(config=names)


def refuse_others(table: PaperTable, runs: Path, known: "pd.DataFrame", file: Path) -> None:
    """Raises an error for finished runs, and results in a file, of other configurations than the table has now."""
    for row in table.rows:
        for path in (runs / row.run).glob("seed_*/result.json"):
            seed = int(path.parent.name.removeprefix("seed_"))
            refuse_another(path.parent, config_of(row, seed, None, runs))
    for run, seed, there, now in zip(
        known.run, known.seed, known.config, named_by_config(table, known).config, strict=True
    ):
        if isinstance(there, str) and there != now:
            raise ValueError(
                f"{file} has {run}, seed {seed}, of another configuration than the table has now: delete its numbers "
                "there, or write elsewhere by --results=DIR"
            )


def refuse_to_forget(file: Path, there: "pd.DataFrame", todo: Sequence[tuple[Row, int]]) -> None:
    """Raises a ValueError if a file of results has runs that are neither in the folder of runs nor to be trained."""
    if not file.exists():
        return
    recorded, found = (set(zip(frame.run, frame.seed, strict=True)) for frame in (read_outcomes(file), there))
    if lost := sorted(recorded - found - {(row.run, seed) for row, seed in todo}):
        raise ValueError(
            f"{file} has {len(lost)} runs that would be left out of it, such as {lost[0][0]}, seed {lost[0][1]}: --add "
            "keeps them, --results=DIR writes elsewhere"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    import pandas as pd

    parser = argparse.ArgumentParser(
        prog="python -m experiments.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    about = "\n".join(f"  {name}: {table.name}" for name, table in TABLES.items())
    parser.epilog = f"tables:\n{about}"
    parser.add_argument("table", choices=TABLES, metavar="TABLE", help="one of those below")
    parser.add_argument(
        "--data_dir", type=not_empty, help="where TensorFlow Datasets has its data (~/tensorflow_datasets)"
    )
    parser.add_argument("--seeds", help="these, such as 0,1,2, instead of the table's own")
    parser.add_argument("--only", default="", metavar="REGEX", help="only runs whose folder it is found in")
    parser.add_argument("--add", action="store_true", help="keep the results in the .json, and run what they lack")
    for name, default, what in (("--runs", "runs/reproduce", "runs"), ("--results", "results", "table")):
        parser.add_argument(name, type=as_path, default=Path(default), help=f"folder of the {what} (%(default)s)")
    args = parser.parse_args(argv)
    try:
        re.compile(args.only)
    except re.error as error:
        parser.error(f"--only: {error}")
    logging.set_verbosity(logging.WARNING)
    table, stopped = TABLES[args.table], None
    try:
        seeds = None if args.seeds is None else as_seeds(args.seeds.split(","))
        args.results.mkdir(parents=True, exist_ok=True)
        kept = args.results / f"{args.table}.json"
        known = read_outcomes(kept) if args.add else as_frame([])
        known = known[known.run.isin([row.run for row in table.rows])]
        refuse_others(table, args.runs, known, kept)
        if not args.add:
            refuse_to_forget(kept, outcomes(table, args.runs), chosen(table, seeds, args.only))
        failed: list[str] = []
        try:
            failed = reproduce(table, args.runs, args.data_dir, seeds, args.only, known)
        except Stopped as stop:
            stopped = stop
        there = named_by_config(table, outcomes(table, args.runs))
        found = pd.concat([known, there]).drop_duplicates(["run", "seed"], keep="last")
        write_json(kept, as_json(table, found))
        command = f"python -m experiments.reproduce {args.table}" + (f" --seeds={args.seeds}" if args.seeds else "")
        (args.results / f"{args.table}.md").write_text(as_markdown(args.table, table, found, command))
        themes.save(lambda: picture(table, found), args.results, args.table)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    print(f"see {args.results / args.table}.md")
    if stopped:
        print(f"stopped by {signal.Signals(stopped.signal).name}; the same command resumes")
        sys.exit(128 + stopped.signal)
    if failed:
        sys.exit(f"error: the loss was not finite in {', '.join(failed)}, which the table lacks")


if __name__ == "__main__":
    main()
