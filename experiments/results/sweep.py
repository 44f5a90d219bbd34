"""The results of a sweep: every run, tables by sparsity, what they say, and a picture.

Runs are compared by test accuracy, or of a text by the loss: what the column of their numbers is named.
"""

import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from experiments.measures import ACCURACY, LOSS, Measure, measure_of
from experiments.results import themes
from experiments.results.table import as_table, markdown, with_error
from jaxsparse.inspect.plots import style as plots

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("arm", "value", "sparsity", "seed", "MEASURE", "kept", "seconds", "failed", "config")
DENSE = "dense"  # the arm that the others are held against
# How close to the dense network is close: points of accuracy, or a share of the loss.
WITHIN = {ACCURACY: 0.3, LOSS: 0.01}
TICKS = (10, 20, 50, 80, 85, 90, 92, 94, 95, 96, 97, 98, 98.5, 99, 99.3, 99.6, 99.8, 99.9)  # of the accuracy


def outcomes(runs: Sequence[Any]) -> "pd.DataFrame":
    """A row for each run that is finished or has failed, by :data:`COLUMNS`; accuracy and weights kept in %.

    In place of "MEASURE" is the name of what the runs are compared by: "test_accuracy", or "test_loss" in nats a token.
    """
    rows, measure = [], ACCURACY
    for run in runs:
        if result := run.outcome():
            measure = measure_of(run.config)
            rows.append({
                "arm": run.arm, "value": run.value, "sparsity": run.sparsity, "seed": run.seed,
                measure.key: measure.factor * result.get(measure.key, np.nan),
                "kept": 100 * result.get("density", np.nan),
                "seconds": result.get("seconds"), "failed": result.get("failed", ""), "config": run.fingerprint,
            })  # fmt: skip
    return as_frame(rows, measure)


def as_frame(rows: Any, measure: Measure = ACCURACY) -> "pd.DataFrame":
    """Rows with the columns and types of :func:`outcomes`."""
    import pandas as pd

    numbers = dict.fromkeys(("sparsity", measure.key, "kept", "seconds"), float)
    texts = ("value", "failed", "config")
    columns = [measure.key if name == "MEASURE" else name for name in COLUMNS]
    found = pd.DataFrame(rows, columns=columns).astype(numbers)
    return found.fillna(dict.fromkeys(texts, "")).astype({"arm": str, "seed": int, **dict.fromkeys(texts, str)})


def read(file: Any) -> "pd.DataFrame":
    """The runs in the .csv file of a sweep."""
    import pandas as pd

    found = pd.read_csv(file, dtype={"value": str, "failed": str, "config": str})
    return as_frame(found, measure_in(found))


def measure_in(found: "pd.DataFrame") -> Measure:
    """The measure by which runs are compared, by the columns of :func:`outcomes`."""
    return LOSS if LOSS.key in found.columns else ACCURACY


def means(found: "pd.DataFrame") -> "pd.DataFrame":
    """A row for each arm and value: means over the seeds that did not fail, standard errors, and how many failed.

    The columns are "arm", "value", "sparsity", "score", "score_error", "kept", "kept_error", "seeds", "failures"; a
    score is an accuracy or a loss.
    """
    key = measure_in(found).key
    groups = found.groupby(["arm", "value"], sort=False)
    return groups.agg(
        sparsity=("sparsity", "first"),
        score=(key, "mean"),
        score_error=(key, "sem"),
        kept=("kept", "mean"),
        kept_error=("kept", "sem"),
        seeds=(key, "count"),
        failures=("failed", lambda texts: int((texts != "").sum())),
    ).reset_index()


def by_sparsity(found: "pd.DataFrame") -> "pd.DataFrame":
    """The accuracies or losses as text: a row for each arm that is told its sparsity, a column for each sparsity."""
    import pandas as pd

    rows, measure = means(found), measure_in(found)
    rows = rows[rows.sparsity.notna()]
    table = {
        arm: {f"{100 * row.sparsity:g}% zeros": _score(row, measure) for row in mine.itertuples()}
        for arm, mine in rows.groupby("arm", sort=False)
    }
    columns = [f"{100 * sparsity:g}% zeros" for sparsity in sorted(rows.sparsity.unique())]
    return pd.DataFrame.from_dict(table, orient="index").reindex(columns=columns).fillna("").reset_index(names="arm")


def by_value(found: "pd.DataFrame") -> "pd.DataFrame":
    """Weights kept, and accuracies or losses, as text: a row for each value of the arms not told their sparsity."""
    import pandas as pd

    rows, measure = means(found), measure_in(found)
    rows = rows[rows.sparsity.isna()]
    return pd.DataFrame({
        "arm": rows.arm,
        "value": rows.value,
        "kept (%)": [with_error(row.kept, row.kept_error) for row in rows.itertuples()],
        f"{measure.name} ({measure.unit.strip()})": [_score(row, measure) for row in rows.itertuples()],
    })  # fmt: skip


def _score(row: Any, measure: Measure, unit: str = "") -> str:
    """ "98.12 ± 0.034", and of how many seeds where some failed."""
    if not row.seeds:
        return "failed"
    text = measure.text(row.score, row.score_error, unit)
    return f"{text} ({row.seeds} of {row.seeds + row.failures})" if row.failures else text


def paragraph(found: "pd.DataFrame") -> str:
    """The tables in words.

    The best arm at each sparsity, those within a standard error of it, those close to the dense network; what the arms
    keep whose sparsity follows from a penalty or a pattern; what failed.
    """
    rows, measure = means(found), measure_in(found)
    unit = measure.unit
    told, others = rows[rows.sparsity.notna() & rows.seeds.gt(0)], rows[rows.sparsity.isna() & rows.arm.ne(DENSE)]
    dense = rows[rows.arm.eq(DENSE) & rows.seeds.gt(0)]
    lines = [f"The dense network reaches {_score(row, measure, unit)}." for row in dense.itertuples()]
    for sparsity, mine in told.groupby("sparsity"):
        mine = mine.sort_values("score", ascending=measure.smaller_is_better, kind="stable")
        best, rest = next(mine.itertuples()), mine.iloc[1:]
        error = np.hypot(rest.score_error.fillna(0), np.nan_to_num(best.score_error))
        equal = list(rest.arm[measure.gain(best.score, rest.score) <= error])
        line = f"At {100 * sparsity:g}% zeros {best.arm} is best, {_score(best, measure, unit)}"
        line += f", {_listed(equal)} within a standard error of the difference" if equal else ""
        for row in dense.itertuples():
            line += "; " + _close(mine, row.score, measure)
        lines.append(f"{line}.")
    for arm, mine in others[others.seeds.gt(0)].groupby("arm", sort=False):
        points = [f"{measure.text(row.score)}{unit} with {row.kept:.3g}% of the weights" for row in mine.itertuples()]
        lines.append(f"{arm} reaches {_listed(points)}.")
    failed = [
        f"{row.arm} {row.value} ({row.failures})".replace("  ", " ") for row in rows[rows.failures > 0].itertuples()
    ]
    if failed:
        lines.append(f"Runs that failed: {', '.join(failed)}.")
    return " ".join(lines)


def _close(rows: "pd.DataFrame", dense: float, measure: Measure) -> str:
    """Which arms are as good as the dense network up to ``WITHIN``: those, or the others, whichever are fewer."""
    within, lower = WITHIN[measure], measure.smaller_is_better
    close = rows.score <= dense * (1 + within) if lower else rows.score >= dense - within
    near, far = list(rows.arm[close]), list(rows.arm[~close])
    what = f"within {f'{within:.0%}' if lower else f'{within:g} points'} of the dense network"
    if not near:
        return f"none is {what}"
    if len(near) <= len(far):
        return f"{what}: {_listed(near)}"
    return f"{what}: all but {_listed(far)}" if far else f"all are {what}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def as_markdown(name: str, title: str, found: "pd.DataFrame", command: str) -> str:
    """The page of a sweep."""
    seeds, measure = ", ".join(map(str, sorted(found.seed.unique()))), measure_in(found)
    lines = [
        f"# {title}",
        "",
        paragraph(found),
        "",
        f"{measure.name.capitalize()} in {measure.unit.strip()}, mean ± standard error over the seeds {seeds}. Weights "
        "kept are a share of those that may be pruned; with gates on channels, a share of all params, those of the "
        "network without its closed channels.",
    ]
    for table in (by_sparsity(found), by_value(found)):
        if len(table):
            lines += ["", *markdown(table.loc[:, (table != "").any()])]
    lines += ["", themes.in_markdown(name, title), ""]
    failed = found[found.failed != ""]
    lines += [f"- {row.arm} {row.value}, seed {row.seed} failed: {row.failed}" for row in failed.itertuples()]
    lines += [""] if len(failed) else []
    device = jax.devices()[0].device_kind
    lines += [f"Every run is in {name}.csv. `{command}`, JAX {jax.__version__} on {device}, {datetime.date.today()}."]
    return "\n".join(lines) + "\n"


def text(found: "pd.DataFrame") -> str:
    """The tables for a terminal."""
    tables = [table for table in (by_sparsity(found), by_value(found)) if len(table)]
    return "\n\n".join(as_table(dict(table), left=("arm", "value")).text() for table in tables)


# --- The picture ----------------------------------------------------------------------------------------------------


def picture(found: "pd.DataFrame", title: str, groups: Mapping[str, Sequence[str]] | None = None) -> Any:
    """Accuracy or loss against weights kept: a line for each arm, in matplotlib's style, named from top to bottom.

    An accuracy's axis is logarithmic in the error, and ends at ten times the smallest one: the good ones would be
    pressed together by those that are not. What lies below is left out; the tables have it.

    Args:
      found: the runs, as :func:`outcomes` has them.
      title: of the picture.
      groups: title -> arms: a panel for each group, with the others in the background. By default all are one.
    """
    rows, measure = means(found), measure_in(found)
    rows = rows[rows.seeds > 0]
    arms = {arm: mine.sort_values("kept") for arm, mine in rows[rows.arm != DENSE].groupby("arm", sort=False)}
    if groups:
        panels = {name: [arm for arm in group if arm in arms] for name, group in groups.items()}
        panels = {name: group for name, group in panels.items() if group}
    panels = panels if groups and panels else {title: list(arms)}
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    figure = plots.new_figure(*((10, 6.4) if len(panels) == 1 else (4.6 * across, 4.2 * down)))
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for axes, (name, group) in zip(grid.flat, panels.items(), strict=False):
        _draw(axes, rows, {arm: arms[arm] for arm in group}, measure)
        for arm in arms.keys() - set(group):
            axes.plot(arms[arm].kept, arms[arm].score, color=plots.ink(), alpha=0.15, linewidth=0.8, zorder=0)
        axes.set_title(name)
        handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        best_first = sorted(group, key=lambda arm: arms[arm].score.iloc[0], reverse=True)
        named = [name for name in (DENSE, *map(plots.plain, best_first)) if name in handles]
        legend = [handles[name] for name in named], named
        if len(panels) == 1:
            figure.legend(*legend, loc="outside right upper", fontsize=8)
        else:
            axes.legend(*legend, loc="upper right" if measure.smaller_is_better else "lower right", fontsize=8)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    axes = grid.flat[0]  # which the others share their axes with
    if len(arms):
        plots.logarithmic(axes, [max(kept, 0.01) for mine in arms.values() for kept in mine.kept])
    axes.xaxis.set_major_formatter("{x:g}")
    if not measure.smaller_is_better:
        _limit(grid.flat, rows)
    if len(panels) > 1:
        figure.suptitle(title)
        figure.supxlabel("weights kept (%)", fontsize="medium")
        figure.supylabel(f"{measure.name} ({measure.unit.strip()})", fontsize="medium")
    else:
        axes.set(xlabel="weights kept (%)", ylabel=f"{measure.name} ({measure.unit.strip()})")
    return figure


def _draw(axes: Any, rows: "pd.DataFrame", arms: Mapping[str, "pd.DataFrame"], measure: Measure) -> None:
    """Lines with error bars, and the dense network."""
    import matplotlib as mpl

    colours = mpl.rcParams["axes.prop_cycle"].by_key()["color"]
    if not measure.smaller_is_better:
        scale = (lambda y: -np.log10(np.maximum(100.05 - y, 1e-3)), lambda z: 100.05 - 10.0**-z)
        axes.set_yscale("function", functions=scale)
    for i, (arm, mine) in enumerate(arms.items()):
        axes.errorbar(
            mine.kept, mine.score, mine.score_error.fillna(0), label=plots.plain(arm), capsize=2, markersize=4.5,
            marker=plots.MARKERS[i % len(plots.MARKERS)], color=colours[i % len(colours)],
            linestyle=plots.LINES[i // len(colours) % len(plots.LINES)],
        )  # fmt: skip
    for row in rows[rows.arm == DENSE].itertuples():
        axes.axhline(row.score, color=plots.ink(), linestyle="--", linewidth=1, label=DENSE)
    axes.grid(alpha=0.5, linewidth=0.5)


def _limit(panels: Iterable[Any], rows: "pd.DataFrame") -> None:
    """Axes of accuracies that end at ten times the smallest error."""
    least = max(100 - rows.score.max(), 0.05) if len(rows) else 1.0  # error in %
    most = min(100 - rows.score.min(), 10 * least) if len(rows) else 10.0
    bottom, top = max(100 - 1.15 * most, 0), min(100 - least / 1.15, 100)
    ticks = [tick for tick in TICKS if bottom <= tick <= top]
    for axes in panels:
        axes.set_ylim(bottom, top)
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_yticks([], minor=True)
