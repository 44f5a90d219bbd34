"""Find the folders of runs, and read what they hold."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

import jaxsparse
from experiments import workdir
from experiments.measures import TEXT
from experiments.options import OF_OWN, OF_TEXT
from jaxsparse import inspect
from jaxsparse.trees import natural_order

if TYPE_CHECKING:
    import pandas as pd

# Keys that do not tell one experiment from another.
NOT_COMPARED = (*workdir.NOT_COMPARED, "seed", "side_by_side")


@dataclasses.dataclass(frozen=True)
class Run:
    """The contents of a run's folder.

    Attributes:
      name: as the page calls it.
      path: of the folder.
      config: of the run, by dotted key: "method.name".
      history: the metrics logged so far.
      result: the contents of result.json; None while the run is not finished.
      params: the params to evaluate, of a finished sparse run.
      masks: their masks; for methods with gates, the weights that are not zero.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    history: inspect.History
    result: Mapping[str, Any] | None
    params: Any = None
    masks: Any = None

    @property
    def method(self) -> str:
        """The name of the method, "mask_updates" for one with given masks, or "dense"."""
        if self.config.get("dense"):
            return "dense"
        return "mask_updates" if self.config.get("masks_from") else str(self.config.get("method.name", ""))

    @property
    def state(self) -> str:
        """How far the run has come, in words."""
        if not self.history.lines:
            return "nothing logged yet"
        line = self.history.lines[-1]
        finished = "not finished" if self.result is None else "finished"
        return f"{finished}, epoch {line.get('epoch', line['step']):g}"

    def last(self, name: str) -> float | None:
        """A number of the result, or else the last one logged under this name; None if there is none."""
        if self.result is not None and self.result.get(name) is not None:
            return float(self.result[name])
        return float(self.history.series(name)[1][-1]) if name in self.history.names else None


def find_runs(folders: Sequence[str | Path]) -> list[Path]:
    """The given run folders, and all runs found below folders that are not runs themselves; without duplicates.

    Raises:
      OSError: if a folder holds no run.
    """
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        below = [folder] if (folder / "config.json").exists() else [file.parent for file in folder.rglob("config.json")]
        if not below:
            raise OSError(f"{str(folder)!r} is not the folder of a run, nor is one in it: there is no config.json")
        for path in sorted(below, key=lambda path: natural_order(str(path))):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of a run, by dotted key."""
    return workdir.flat(workdir.read_json(path / "config.json") or {})


def read_run(path: Path, name: str) -> Run:
    """Reads the folder of a run.

    Raises:
      OSError, ValueError: if a file in it cannot be read; the message says which.
    """
    config, result = read_config(path), workdir.read_json(path / "result.json")
    logged = (path / "metrics.jsonl").exists()
    history = inspect.read_history(path) if logged else inspect.History(())
    params = masks = None
    if (path / "sparse.safetensors").exists():
        params, masks = jaxsparse.load_sparse(path / "sparse.safetensors")
        if masks is None or not any(np.ndim(mask) for mask in jax.tree.leaves(masks)):  # of gates
            masks = jaxsparse.nonzero_masks(params)
    return Run(name, path, config, history, result, params, masks)


def frame(runs: Sequence[Run]) -> "pd.DataFrame":
    """One row for each run: what it is, and the numbers that it ended with or has come to, NaN where it has none.

    The index is the place among ``runs``; "experiment" is equal for runs whose configurations differ by the seed alone.
    """
    import pandas as pd

    numbers = ("density", "test_accuracy", "test_loss", "validation_accuracy")
    rows = [
        {
            "run": run.name,
            "method": run.method,
            "state": run.state,
            "data": tested_on(run.config),
            "seed": run.config.get("seed"),
            "finished": run.result is not None,
            "experiment": experiment(run.config),
            "images/s": _logged(run, "speed/images_per_second", np.median),
            "tokens/s": _logged(run, "speed/tokens_per_second", np.median),
            "seconds": _logged(run, "seconds", np.sum),
            **{name: run.last(name) for name in numbers},
        }
        for run in runs
    ]
    return pd.DataFrame(rows).astype(dict.fromkeys(numbers, float))


def experiment(config: Mapping[str, Any]) -> str:
    """The configuration as text, without the seed, also where it stands in the name of a folder."""
    same = {key: value for key, value in config.items() if key not in NOT_COMPARED}
    return re.sub(rf'seed_{config.get("seed")}(?=[/"])', "seed", json.dumps(same, sort_keys=True))


def tested_on(config: Mapping[str, Any]) -> str:
    """The data that a run is tested on, by its configuration; runs on different data are not compared."""
    if config.get("data.name") == TEXT:
        return _text_of(config)
    classes, examples = config.get("data.classes"), config.get("data.examples")
    parts = [str(config.get("data.name", ""))]
    parts += [f"{name} {value}" for name in OF_OWN if (value := config.get(f"data.{name}")) is not None]
    parts += [f"classes {', '.join(map(str, classes))}"] if classes else []
    parts += [f"the first {examples:,} images"] if examples else []
    return ", ".join(parts)


def _text_of(config: Mapping[str, Any]) -> str:
    kept = {name: config.get(f"data.{name}") for name in OF_TEXT if name != "epoch_tokens"}
    source = kept.pop("files") or "standard library"
    named = [f"{name} {value}" for name, value in kept.items() if value is not None]
    examples = config.get("data.examples")
    return ", ".join([f"text of {source}", *named, *([f"the first {examples:,} windows"] if examples else [])])


def short_names(paths: Sequence[Path]) -> list[str]:
    """The paths without their common beginning; of a single path the last part."""
    if len(paths) == 1:
        return [paths[0].resolve().name]
    resolved = [path.resolve() for path in paths]
    common = Path(os.path.commonpath(resolved))
    return [str(path.relative_to(common)) if path != common else path.name for path in resolved]


def _logged(run: Run, name: str, summary: Any) -> float:
    kind, _, key = name.partition("/")
    if not any(key in line[kind] if key else True for line in run.history.lines if kind in line):
        return math.nan
    return float(summary(run.history.series(name)[1]))
