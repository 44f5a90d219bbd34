"""A paper's table beside our results: the numbers, and the page that shows them."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from experiments import footprint
from experiments.results import themes
from experiments.results.published import PaperTable
from experiments.results.table import markdown, with_error
from experiments.workdir import read_json

if TYPE_CHECKING:
    import pandas as pd

FOOTPRINT = ["multiply_adds", "bytes_float32", "bytes_int8", "error_int8"]
QUANTITIES = ["test_error", "kept", "validation_error", *FOOTPRINT]
OUTCOMES = ["run", "seed", *QUANTITIES, "widths", "config"]  # the columns of results


def outcomes(table: PaperTable, runs: Path) -> "pd.DataFrame":
    """The results of the finished runs of a table, with the columns ``OUTCOMES``, errors and shares in %."""
    found = []
    for row in table.rows:
        for path in (runs / row.run).glob("seed_*/result.json"):
            result = read_json(path) or {}
            validation = result.get("validation_accuracy")
            files = read_json(path.with_name(footprint.NAME)) or {}
            found.append({
                "run": row.run,
                "seed": result["seed"],
                "test_error": 100 * (1 - result["test_accuracy"]),
                "kept": 100 * result["density"],
                "validation_error": None if validation is None else 100 * (1 - validation),
                "multiply_adds": 100 * files["multiply_adds"] if files else None,
                "error_int8": 100 * (1 - files["test_accuracy_int8"]) if files else None,
                **{name: files.get(name) for name in ("bytes_float32", "bytes_int8")},
                "widths": "-".join(map(str, result["widths"])) if "widths" in result else None,
            })  # fmt: skip
    return as_frame(found)


def as_frame(rows: Sequence[dict[str, Any]]) -> "pd.DataFrame":
    """Results as a row for each run, sorted by seed; missing numbers are NaN."""
    import pandas as pd

    kinds = dict.fromkeys(OUTCOMES, float) | {"run": object, "seed": int, "widths": object, "config": object}
    return pd.DataFrame(rows, columns=OUTCOMES).astype(kinds).sort_values("seed", kind="stable", ignore_index=True)


def read_outcomes(path: Path) -> "pd.DataFrame":
    """The results in a .json file; none if there is no such file."""
    saved = read_json(path) or {}
    return as_frame([{"run": run, "seed": seed, **one} for run, seeds in saved.items() for seed, one in seeds.items()])


def as_json(table: PaperTable, found: "pd.DataFrame") -> dict[str, dict[str, dict[str, Any]]]:
    """Results by run and seed, without missing numbers, rounded to four digits."""
    import pandas as pd

    saved: dict[str, dict[str, dict[str, Any]]] = {row.run: {} for row in table.rows}
    for run, seed, *numbers in found[OUTCOMES].itertuples(index=False):
        saved[run][str(seed)] = {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in zip(OUTCOMES[2:], numbers, strict=True)
            if not pd.isna(value)
        }
    return saved


def beside_paper(table: PaperTable, found: "pd.DataFrame") -> "pd.DataFrame":
    """The numbers of each row of a paper's table, published and measured.

    Args:
      table: the paper's table.
      found: the finished runs, with the columns :data:`OUTCOMES`; numbers in %, NaN where there is none.

    Returns:
      A row for each of ``table.rows``: "series", "x", "run", "published" and "published_error", the number of
      "seeds", and for each of :data:`QUANTITIES` its mean and, as "test_error_error", its standard error. NaN stands
      for what is not known, and for means over runs one of which lacks the number.
    """
    import pandas as pd

    rows = pd.DataFrame({"series": [row.series for row in table.rows], "run": [row.run for row in table.rows]})
    rows["x"] = pd.Series([row.x for row in table.rows], dtype=object)
    published = [row.published or (None, None) for row in table.rows]
    rows[["published", "published_error"]] = np.array(published, float)
    groups = found.groupby("run")
    means, errors, counts = (getattr(groups[QUANTITIES], name)() for name in ("mean", "sem", "count"))
    complete = counts.eq(groups.size(), axis=0)
    rows = rows.join(means.where(complete), on="run").join(errors.where(complete).add_suffix("_error"), on="run")
    return rows.join(groups.size().rename("seeds"), on="run").fillna({"seeds": 0})


def as_markdown(name: str, table: PaperTable, found: "pd.DataFrame", command: str) -> str:
    """The page of a paper's table: published numbers beside ours, and every run."""
    lines = [f"# {table.name}", "", *([f"After {table.source}.", ""] if table.source else []), table.about, ""]
    lines += ["Test error in %, mean ± standard error over the seeds."]
    if any(row.published for row in table.rows):
        lines[-1] += " In the last column twice the standard error of the difference."
    rows = beside_paper(table, found)
    compared = _compared(table, rows, found)
    lines += ["", *markdown(compared.loc[:, (compared != "").any()])]
    if table.relative_to is not None:
        lines += ["", f"Change against {table.relative_to}, in points:", "", *markdown(_changes(table, rows))]
    lines += ["", themes.in_markdown(name, table.name), "", "Every run, test error in %:", ""]
    lines += markdown(_every_run(table, rows, found))
    device = jax.devices()[0].device_kind
    lines += ["", f"`{command}`, JAX {jax.__version__} on {device}, {datetime.date.today()}."]
    return "\n".join(lines) + "\n"


def _compared(table: PaperTable, rows: "pd.DataFrame", found: "pd.DataFrame") -> "pd.DataFrame":
    seeds = {run: ", ".join(map(str, sorted(of_run.seed))) for run, of_run in found.groupby("run")}
    finds_its_sparsity = table.against_kept or table.with_kept  # otherwise the method was given it
    errors = 2 * np.hypot(rows.test_error_error, rows.published_error)
    cells = {
        "paper": _with_errors(rows.published, rows.published_error),
        "kept (%)": _with_errors(rows.kept, rows.kept_error) if finds_its_sparsity else "",
        "validation": _with_errors(rows.validation_error, rows.validation_error_error) if finds_its_sparsity else "",
        "ours": _with_errors(rows.test_error, rows.test_error_error, missing="not run"),
        "multiply-adds (%)": _with_errors(rows.multiply_adds, form=".1f"),
        "bytes, float32": _with_errors(rows.bytes_float32, form=",.0f"),
        "bytes, int8": _with_errors(rows.bytes_int8, form=",.0f"),
        "error, int8": _with_errors(rows.error_int8, rows.error_int8_error),
        "seeds": [seeds.get(run, "") for run in rows.run],
        "difference": _with_errors(rows.test_error - rows.published, form="+.3f"),
        "two standard errors": _with_errors(errors, form=".3f"),
    }
    return _named(table, rows, cells)


def _changes(table: PaperTable, rows: "pd.DataFrame") -> "pd.DataFrame":
    """The differences from the row ``table.relative_to`` of the same series."""
    is_base = rows.x == table.relative_to
    base = rows[is_base].set_index("series").loc[rows.series].reset_index()
    change, error = rows.test_error - base.test_error, np.hypot(rows.test_error_error, base.test_error_error)
    cells = {
        "paper": _with_errors(rows.published - base.published, form="+.2f"),
        "ours": _with_errors(change, error, "+.2f", missing="not run").mask(is_base, ""),
    }
    return _named(table, rows, cells)


def _every_run(table: PaperTable, rows: "pd.DataFrame", found: "pd.DataFrame") -> "pd.DataFrame":
    widths = [f" ({widths})" if isinstance(widths, str) else "" for widths in found.widths]
    runs = found.assign(cell=[f"{error:.2f}{of_run}" for error, of_run in zip(found.test_error, widths, strict=True)])
    by_seed = runs.pivot(index="run", columns="seed", values="cell").add_prefix("seed ")
    return _named(table, rows, by_seed.reindex(rows.run).fillna("").reset_index(drop=True))


def _named(table: PaperTable, rows: "pd.DataFrame", cells: Any) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame({"network": rows.series, table.x: rows.x.map(str), **cells})


def _with_errors(
    means: "pd.Series", errors: "pd.Series | None" = None, form: str = ".2f", missing: str = ""
) -> "pd.Series":
    """:func:`with_error` of each row; ``missing`` where the mean is NaN."""
    import pandas as pd

    errors = [None] * len(means) if errors is None else errors
    return pd.Series([with_error(*both, form) or missing for both in zip(means, errors, strict=True)], means.index)
