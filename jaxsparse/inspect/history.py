"""The log of a run: the numbers of its metrics.jsonl over the epochs."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxsparse.tables import Table, Tabular
from jaxsparse.trees import natural_order

__all__ = ["History", "read_history"]

_MOST_ROWS = 12
# Columns of the table, shown if they were logged: name, heading, format.
_COLUMNS = (
    ("train_loss", "train loss", "{:.4f}"),
    ("train_accuracy", "train accuracy", "{:.2%}"),
    ("validation_accuracy", "validation accuracy", "{:.2%}"),
    ("test_loss", "test loss", "{:.4f}"),
    ("test_accuracy", "test accuracy", "{:.2%}"),
    ("density", "density", "{:.2%}"),
)


@dataclasses.dataclass(frozen=True, repr=False)
class History(Tabular):
    """The log of a run, from :func:`read_history`; prints as a table of at most twelve of its lines.

    Attributes:
      lines: one mapping for each logged point, with "step" and, if there are epochs, "epoch". Values are numbers, or
        mappings from layer path to number. Without epochs, steps are used in their place.
    """

    lines: tuple[Mapping[str, Any], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All logged names, in order of first appearance."""
        return tuple(dict.fromkeys(name for line in self.lines for name in line))

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The values of one quantity over the epochs.

        Args:
          name: such as "test_accuracy", or, for quantities logged by layer, "layer_density/fc1/kernel".

        Returns:
          The epochs at which it was logged, and its values; both float64, (points,).

        Raises:
          KeyError: if it was never logged.
        """
        kind, _, path = name.partition("/")
        lines = self._having(kind)
        by_layer = isinstance(lines[0][kind], Mapping)
        if by_layer and not path:
            raise KeyError(f"{name} was logged by layer, as {name}/{next(iter(lines[0][kind]), 'LAYER')}")
        if path and not by_layer:
            raise KeyError(f"{kind} was logged as one number, not by layer")
        if path:
            lines = [line for line in lines if path in line[kind]]
            if not lines:
                paths = dict.fromkeys(path for line in self._having(kind) for path in line[kind])
                raise KeyError(f"{name} was not logged; {kind} has {', '.join(paths) or 'no layers'}")
        values = [line[kind][path] if path else line[kind] for line in lines]
        return np.array([_epoch(line) for line in lines], float), np.array(values, float)

    def layers(self, name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The values of one quantity in every layer over the epochs.

        Args:
          name: a quantity that was logged by layer, such as "layer_density" or "flips".

        Returns:
          The epochs at which it was logged, (points,), and its values by path of the layer, (points,).

        Raises:
          KeyError: if it was never logged.
        """
        lines = self._having(name)
        if not isinstance(lines[0][name], Mapping):
            raise KeyError(f"{name} was logged as one number, not by layer")
        paths = sorted(dict.fromkeys(path for line in lines for path in line[name]), key=natural_order)
        values = {path: np.array([line[name].get(path, np.nan) for line in lines], float) for path in paths}
        return np.array([_epoch(line) for line in lines], float), values

    def table(self) -> Table:
        """The cells of the table."""
        evaluated = [line for line in self.lines if "test_accuracy" in line] or self.lines
        chosen = sorted({round(i) for i in np.linspace(0, len(evaluated) - 1, _MOST_ROWS)}) if evaluated else []
        columns = [column for column in _COLUMNS if column[0] in self.names]
        rows = [
            (f"{_epoch(line):g}", f"{line['step']:,}",
             *(form.format(line[name]) if line.get(name) is not None else "" for name, _, form in columns))
            for line in (evaluated[i] for i in chosen)
        ]  # fmt: skip
        return Table(("epoch", "step", *(heading for _, heading, _ in columns)), tuple(rows), left=())

    def _having(self, name: str) -> list[Mapping[str, Any]]:
        lines = [line for line in self.lines if name in line]
        if not lines:
            raise KeyError(f"{name} was not logged; the log has {', '.join(self.names) or 'no lines'}")
        return lines


def _epoch(line: Mapping[str, Any]) -> float:
    return line.get("epoch", line["step"])


def read_history(path: str | Path) -> History:
    """Read the log that a run of the trainer has written so far; it may still be running.

    Args:
      path: the folder of a run, or its metrics.jsonl, with one JSON object per line that has a "step".

    Returns:
      A :class:`History`. An incomplete last line, as of a run that was killed, is ignored.

    Raises:
      FileNotFoundError: if there is no metrics.jsonl.
      ValueError: if a line is not such an object, naming it.

    Examples:
      >>> import os, tempfile
      >>> file = os.path.join(tempfile.mkdtemp(), "metrics.jsonl")
      >>> with open(file, "w") as f:
      ...     _ = f.write('{"step": 9, "epoch": 1, "train_loss": 0.5, "flips": {"fc/kernel": 4}}' + chr(10))
      >>> history = read_history(file)
      >>> print(history)
      epoch  step  train loss
      -----  ----  ----------
          1     9      0.5000
      >>> history.series("flips/fc/kernel")
      (array([1.]), array([4.]))
    """
    path = Path(path)
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(f"{str(path)!r} is not the folder of a run: it has no metrics.jsonl")
    written = file.read_text().splitlines()
    lines: list[Mapping[str, Any]] = []
    for number, text in enumerate(written, 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if number == len(written):
                break
            raise ValueError(f"{file}, line {number} is not JSON: {error}") from error
        if not isinstance(line, dict) or "step" not in line:
            raise ValueError(f'{file}, line {number}: expected an object with a "step", got {text[:80]}')
        lines.append(line)
    return History(tuple(lines))
