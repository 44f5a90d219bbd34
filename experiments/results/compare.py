"""Compare runs: accuracies on the same data, means over seeds, masks, and the keys that differ."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.measures import ACCURACY, LOSS, measure_of
from experiments.results.collect import NOT_COMPARED, Run, find_runs, frame, read_config, tested_on
from experiments.results.table import as_table, number, numbers, with_error
from experiments.workdir import read_json
from jaxsparse import inspect
from jaxsparse.tables import Table
from jaxsparse.trees import by_path, natural_order

MOST_KEYS = 3  # of a configuration in a picture's legend


def finished_runs(workdirs: Sequence[str | Path]) -> Table:
    """One row for each finished run: density, accuracy or loss, difference from the first run on the same data.

    Of accuracies the difference is in points, of losses in nats a token.

    Raises:
      OSError: if a folder holds no run, or a run is not finished.
      ValueError: if a result lacks a number.
    """
    import pandas as pd

    rows = []
    for path in find_runs(workdirs):
        result = read_json(path / "result.json")
        if result is None:
            raise OSError(f"{str(path)!r} is not finished: it has no result.json")
        config = read_config(path)
        measure = measure_of(config)
        if missing := {"density", measure.key} - set(result):
            raise ValueError(f"{path / 'result.json'} has no {' and no '.join(sorted(missing))}")
        rows.append((str(path), tested_on(config), result["density"], result[measure.key], measure))
    runs = pd.DataFrame(rows, columns=["run", "data", "density", "value", "measure"])
    first = runs.groupby("data").value.transform("first")

    def cells(measure):
        return [one.value(value) if one is measure else "" for one, value in zip(runs.measure, runs.value, strict=True)]

    return as_table({
        "run": runs.run,
        "data": runs.data if runs.data.nunique() > 1 else "",
        "density": runs.density.map("{:.2%}".format),
        ACCURACY.name: cells(ACCURACY),
        LOSS.name: cells(LOSS),
        "difference": [
            f"{one.factor * change:+{one.form}}" for one, change in zip(runs.measure, runs.value - first, strict=True)
        ],
    }, left=("run", "data"))  # fmt: skip


def by_data(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs by the images that they are tested on."""
    sets: dict[str, list[Run]] = {}
    for run in runs:
        sets.setdefault(tested_on(run.config), []).append(run)
    return sets


def runs_table(runs: Sequence[Run]) -> Table:
    """One row for each run on one data set: what it is and what came out."""

    def column(name, form):
        return [number(run.last(name), form) for run in runs]

    found = frame(runs)
    measure = measure_of(runs[0].config)
    change = numbers(measure.factor * (found[measure.key] - found[measure.key][0])[1:], f"+{measure.form}")
    of_text = {LOSS.name: column(LOSS.key, LOSS.form)} if measure is LOSS else {}
    return as_table({
        "run": found.run,
        "method": found.method,
        "state": found.state,
        "kept": column("density", ".2%"),
        **of_text,
        "test accuracy": column("test_accuracy", ".2%"),
        "difference": ["", *(text and f"{text}{measure.difference}" for text in change)],
        "validation": column("validation_accuracy", ".2%"),
        "images/s": numbers(found["images/s"], ",.0f"),
        "tokens/s": numbers(found["tokens/s"], ",.0f"),
        "seconds": numbers(found.seconds, ",.0f"),
    }, left=("run", "method", "state"))  # fmt: skip


def experiments_of(runs: Sequence[Run]) -> list[tuple[list[Run], Mapping[str, tuple[float, float]]]]:
    """Finished runs grouped by configuration (ignoring the seed), with mean and standard error of their numbers.

    A mean over runs one of which lacks the number, or has a NaN, is NaN; so is the standard error of a single run.
    """
    found = frame(runs)
    found = found[found.finished].drop_duplicates(["experiment", "seed"])
    groups = []
    for _, group in found.groupby("experiment", sort=False):
        values = group[["density", "test_accuracy", "test_loss"]].replace([np.inf, -np.inf], np.nan)
        means, errors = values.mean(skipna=False), values.sem(skipna=False)
        groups.append(([runs[i] for i in group.index], {name: (means[name], errors[name]) for name in values}))
    return groups


def seeds_table(runs: Sequence[Run]) -> Table:
    """One row for each experiment that was run with several seeds: mean and standard error."""
    several = [(group, found) for group, found in experiments_of(runs) if len(group) > 1]

    def cells(name):
        of_all = [with_error(*(100 * value for value in found[name])) for _, found in several]
        return [text and f"{text}%" for text in of_all]

    losses = [LOSS.text(*found["test_loss"]) if measure_of(group[0].config) is LOSS else "" for group, found in several]
    return as_table({
        "runs": [name_of(group) for group, _ in several],
        "seeds": [f"{len(group)}" for group, _ in several],
        "kept": cells("density"),
        LOSS.name: losses,
        "test accuracy": cells("test_accuracy"),
    }, left=("runs",))  # fmt: skip


def overlap_table(runs: Sequence[Run]) -> Table:
    """Overlap of the masks of each run with those of the first sparse run, for runs of one network."""
    sparse = [run for run in runs if run.masks is not None]
    rows = []
    for run in sparse[1:]:
        if _shapes(run.masks) == _shapes(sparse[0].masks):
            compared = inspect.compare_masks(sparse[0].masks, run.masks)
            total = compared.total
            chance = sum(row.first * row.second / row.weights for row in compared.layers)
            by_chance = chance / (total.first + total.second - chance) if total.first + total.second else 1.0
            rows.append((run.name, f"{total.both:,}", f"{total.flips:,}", f"{total.jaccard:.3f}", f"{by_chance:.3f}"))
    first = f"against {sparse[0].name}" if sparse else ""
    return Table((first, "kept by both", "flips", "Jaccard", "by chance"), tuple(rows))


def accuracy_against_kept(runs: Sequence[Run]) -> Any:
    """A picture: a point for the seeds of an experiment, a line for experiments that differ in one number alone."""
    series: dict[str, list[tuple[float, ...]]] = {}
    baselines: dict[str, float] = {}
    groups = [
        (group, found)
        for group, found in experiments_of(runs)
        if all(math.isfinite(found[name][0]) for name in ("density", "test_accuracy"))
    ]
    for method in dict.fromkeys(group[0].method for group, _ in groups):
        of_method = [(group, found) for group, found in groups if group[0].method == method]
        keys = differing_keys([group[0] for group, _ in of_method])
        if method == "dense":
            keys = [key for key in keys if not key.startswith("method.")]
        numeric = [key for key in keys if key.startswith("method.") and _is_number(of_method[0][0][0].config.get(key))]
        named = [key for key in keys if numeric != [key]]
        for group, found in of_method:
            values = [f"{key.removeprefix('method.')} {value_of(group[0].config, key)}" for key in named]
            label = ", ".join([method, *(values if len(values) <= MOST_KEYS else [name_of(group)])])
            accuracy, error = found["test_accuracy"]
            if method == "dense":
                baselines[label] = accuracy
            else:
                errors = () if math.isnan(error) else (error,)
                series.setdefault(label, []).append((found["density"][0], accuracy, *errors))
    return inspect.plot_accuracy_against_kept(series, baselines=baselines) if series else None


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """The keys that do not have the same value in all configurations."""
    keys = sorted({key for run in runs for key in run.config if key not in NOT_COMPARED}, key=natural_order)
    return [key for key in keys if len({json.dumps(run.config.get(key)) for run in runs}) > 1]


def name_of(group: Sequence[Run]) -> str:
    """A name for runs that differ by the seed: the folder that they have in common, or that of the first."""
    folders = {run.path.resolve().parent.name for run in group}
    return folders.pop() if len(group) > 1 and len(folders) == 1 else group[0].name


def value_of(config: Mapping[str, Any], key: str) -> str:
    """The value of a key, written as JSON; a dash for None and for a key that is not there."""
    return "—" if config.get(key) is None else json.dumps(config[key])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shapes(masks: Any) -> dict[str, tuple[int, ...]]:
    return {path: np.shape(mask) for path, mask in by_path(masks).items()}
