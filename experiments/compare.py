"""Print finished runs side by side.

  python -m experiments.compare WORKDIR WORKDIR ...

The last column is the difference from the first run's test accuracy, in points.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path


def table(workdirs: Sequence[str]) -> str:
    """One line a run; raises an OSError if a run has not left a result.json."""
    results = [json.loads((Path(workdir) / "result.json").read_text()) for workdir in workdirs]
    width = max(map(len, ["run", *workdirs]))
    lines = [f"{'run':{width}}  density  test accuracy  difference"]
    for workdir, result in zip(workdirs, results, strict=True):
        points = 100 * (result["test_accuracy"] - results[0]["test_accuracy"])
        lines.append(f"{workdir:{width}}  {result['density']:7.2%}  {result['test_accuracy']:13.2%}  {points:+10.2f}")
    return "\n".join(lines)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error of the mean; of one value the error is not known."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__.strip())
    try:
        print(table(sys.argv[1:]))
    except OSError as error:
        sys.exit(f"error: {error}")
