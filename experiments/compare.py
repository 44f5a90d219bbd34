"""Print finished runs side by side.

  python -m experiments.compare WORKDIR WORKDIR ...

Of a folder with several runs in it, such as that of --seeds, all of them. The last column is the difference from the
first run's test accuracy, in points.
"""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.workdir import read_json
from jaxsparse.structures import natural_order
from jaxsparse.tables import Table


def find_runs(folders: Sequence[str | Path]) -> list[Path]:
    """The folders of runs: those given, or, where one is none itself, all runs below it; each once.

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
        results[path] = result["density"], result["test_accuracy"]
    first = next(accuracy for _, accuracy in results.values())
    rows = [
        (str(path), f"{density:.2%}", f"{accuracy:.2%}", f"{100 * (accuracy - first):+.2f}")
        for path, (density, accuracy) in results.items()
    ]
    return Table(("run", "density", "test accuracy", "difference"), tuple(rows))


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error of the mean; of one value the error is not known."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__.strip())
    try:
        print(table(sys.argv[1:]).text())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
