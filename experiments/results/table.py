"""Numbers with their errors, and tables of them."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxsparse.tables import Table

if TYPE_CHECKING:
    import pandas as pd


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error of the mean; the error of a single value is None."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def with_error(mean: float, error: float | None, form: str = ".2f", error_form: str = ".3f") -> str:
    """ "1.23 ± 0.045", or the mean alone if the error is None or NaN; nothing for a mean of NaN."""
    if math.isnan(mean):
        return ""
    return f"{mean:{form}}" + ("" if error is None or math.isnan(error) else f" ± {error:{error_form}}")


def number(value: float | None, form: str) -> str:
    """The number in a format such as ".2%"; nothing for None, "nan" and "inf" as they are."""
    return "" if value is None else f"{value:{form}}" if math.isfinite(value) else str(value)


def numbers(values: Iterable[float], form: str) -> list[str]:
    """Numbers in a format; nothing for NaN."""
    return ["" if math.isnan(value) else f"{value:{form}}" for value in values]


def as_table(columns: Mapping[str, Any], left: Sequence[str]) -> Table:
    """A table of columns of text, without those that are empty; ``left`` are the columns that are set to the left."""
    import pandas as pd

    cells = pd.DataFrame(columns)
    places = tuple(i for i, name in enumerate(cells.columns) if name in left)
    return Table(
        tuple(cells.columns), tuple(cells.itertuples(index=False, name=None)), left=places
    ).without_empty_columns()


def markdown(cells: "pd.DataFrame") -> list[str]:
    """The lines of a table of text in Markdown."""
    rows = [list(cells.columns), ["---"] * len(cells.columns), *cells.itertuples(index=False, name=None)]
    return ["| " + " | ".join(row) + " |" for row in rows]
