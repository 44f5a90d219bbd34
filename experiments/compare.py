"""Print finished runs side by side.

  python -m experiments.compare WORKDIR WORKDIR ...

Of a folder with several runs in it, such as that of --seeds, all of them. The last column is the difference from the
test accuracy of the first run on the same data, in points.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.command_line import as_path
from experiments.workdir import flat, read_json
from jaxsparse.tables import Table
from jaxsparse.trees import natural_order


def find_runs(folders: Sequence[str | Path]) -> list[Path]:
    """The given run folders, and all runs found below folders that are no runs themselves; without duplicates.

    Raises:
      OSError: if there is none.
    """
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        below = [folder] if (folder / "config.json").exists() else [file.parent for file in folder.rglob("config.json")]
        if not below:
            raise OSError(f"{str(folder)!r} is not the folder of a run, nor is one in it: there is no config.json")
        for path in sorted(below, key=lambda path: natural_order(str(path))):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def table(workdirs: Sequence[str | Path]) -> Table:
    """One line a run.

    Raises:
      OSError: if there is no run in a folder, or one is not finished.
      ValueError: if a result is not what a run leaves.
    """
    results = {}
    for path in find_runs(workdirs):
        result = read_json(path / "result.json")
        if result is None:
            raise OSError(f"{str(path)!r} is not finished: it has no result.json")
        if missing := {"density", "test_accuracy"} - set(result):
            raise ValueError(f"{path / 'result.json'} has no {' and no '.join(sorted(missing))}")
        images = tested_on(flat(read_json(path / "config.json") or {}))
        results[path] = images, result["density"], result["test_accuracy"]
    first: dict[str, float] = {}
    rows = []
    for path, (images, density, accuracy) in results.items():
        difference = accuracy - first.setdefault(images, accuracy)
        rows.append((str(path), images, f"{density:.2%}", f"{accuracy:.2%}", f"{100 * difference:+.2f}"))
    if len(first) == 1:
        rows = [(path, "", *numbers) for path, _, *numbers in rows]
    header = ("run", "data", "density", "test accuracy", "difference")
    return Table(header, tuple(rows), left=(0, 1)).without_empty_columns()


def tested_on(config: Mapping[str, Any]) -> str:
    """Which images a run is tested on, by its configuration (keys such as "data.name"): others do not compare."""
    classes, examples = config.get("data.classes"), config.get("data.examples")
    told = [str(config.get("data.name", ""))]
    told += [f"classes {', '.join(map(str, classes))}"] if classes else []
    told += [f"the first {examples:,} images"] if examples else []
    return ", ".join(told)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error of the mean; of one value the error is not known."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+", type=as_path, metavar="WORKDIR", help="folder of a run or of runs")
    try:
        print(table(parser.parse_args(argv).workdirs).text())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
