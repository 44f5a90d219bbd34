"""The number by which runs are compared: accuracy for images, loss for text."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.results.table import with_error

TEXT = "text"  # the name of the data that are text


class Measure(NamedTuple):
    """A number of result.json, and how tables show it.

    Attributes:
      key: its name in result.json.
      name: its name in words.
      factor: what it is multiplied by in tables.
      unit: that of a value in words: "%" stands right behind it.
      difference: the unit of a difference between two runs, in words.
      form, error_form: of its mean and of its standard error.
      smaller_is_better: whether a smaller one is better.
    """

    key: str
    name: str
    factor: float
    unit: str
    difference: str
    form: str
    error_form: str
    smaller_is_better: bool

    def text(self, mean: float, error: float | None = None, unit: str = "") -> str:
        """ "98.12 ± 0.034", of numbers that were multiplied by the factor."""
        return with_error(mean, error, self.form, self.error_form) + unit

    def value(self, value: float) -> str:
        """A number of result.json in words, such as "98.12%"."""
        return f"{self.factor * value:{self.form}}{self.unit}"

    def gain(self, value: Any, over: Any) -> Any:
        """By how much a value is better than another one."""
        return over - value if self.smaller_is_better else value - over


ACCURACY = Measure("test_accuracy", "test accuracy", 100.0, "%", " points", ".2f", ".3f", False)
LOSS = Measure("test_loss", "test loss", 1.0, " nats a token", " nats", ".4f", ".4f", True)


def measure_of(config: Mapping[str, Any]) -> Measure:
    """The measure of a run, by its configuration, nested or with dotted keys."""
    name = config["data"]["name"] if "data" in config else config.get("data.name")
    return LOSS if name == TEXT else ACCURACY
