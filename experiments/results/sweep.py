"""The results of a sweep: every run, tables by sparsity, what they say, and a picture."""

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from experiments.results.table import as_table, markdown, with_error
from jaxsparse.inspect.plots import style as plots

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("arm", "value", "sparsity", "seed", "test_accuracy", "kept", "seconds", "failed", "config")
DENSE = "dense"  # the arm that the others are held against
WITHIN = 0.3  # points below the dense network
# Text, ground and lines of the pictures, and colours that colour-blind people tell apart on this ground.
THEMES = {
    "light": ("#1f2328", "#ffffff", "#c4c9cf", plots.COLOURS),
    "dark": ("#d8dce2", "#131416", "#4a4f57", ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00")),
}
TICKS = (10, 20, 50, 80, 85, 90, 92, 94, 95, 96, 97, 98, 98.5, 99, 99.3, 99.6, 99.8, 99.9)  # of the accuracy


def outcomes(runs: Sequence[Any]) -> "pd.DataFrame":
    """A row for each run that is finished or has failed, by :data:`COLUMNS`; accuracy and weights kept in %."""
    rows = []
    for run in runs:
        if result := run.outcome():
            numbers = {"test_accuracy": "test_accuracy", "kept": "density"}
            rows.append({
                "arm": run.arm, "value": run.value, "sparsity": run.sparsity, "seed": run.seed,
                **{name: 100 * result.get(key, np.nan) for name, key in numbers.items()},
                "seconds": result.get("seconds"), "failed": result.get("failed", ""), "config": run.fingerprint,
            })  # fmt: skip
    return as_frame(rows)


def as_frame(rows: Any) -> "pd.DataFrame":
    """Rows with the columns and types of :func:`outcomes`."""
    import pandas as pd

    numbers = dict.fromkeys(("sparsity", "test_accuracy", "kept", "seconds"), float)
    texts = ("value", "failed", "config")
    found = pd.DataFrame(rows, columns=list(COLUMNS)).astype(numbers)
    return found.fillna(dict.fromkeys(texts, "")).astype({"arm": str, "seed": int, **dict.fromkeys(texts, str)})


def read(file: Any) -> "pd.DataFrame":
    """The runs in the .csv file of a sweep."""
    import pandas as pd

    return as_frame(pd.read_csv(file, dtype={"value": str, "failed": str, "config": str}))


def means(found: "pd.DataFrame") -> "pd.DataFrame":
    """A row for each arm and value: means over the seeds that did not fail, standard errors, and how many failed.

    The columns are "arm", "value", "sparsity", "accuracy", "accuracy_error", "kept", "kept_error", "seeds", "failures".
    """
    groups = found.groupby(["arm", "value"], sort=False)
    return groups.agg(
        sparsity=("sparsity", "first"),
        accuracy=("test_accuracy", "mean"),
        accuracy_error=("test_accuracy", "sem"),
        kept=("kept", "mean"),
        kept_error=("kept", "sem"),
        seeds=("test_accuracy", "count"),
        failures=("failed", lambda texts: int((texts != "").sum())),
    ).reset_index()


def by_sparsity(found: "pd.DataFrame") -> "pd.DataFrame":
    """The accuracies as text: a row for each arm that is told its sparsity, a column for each sparsity."""
    import pandas as pd

    rows = means(found)
    rows = rows[rows.sparsity.notna()]
    table = {
        arm: {f"{100 * row.sparsity:g}% zeros": _accuracy(row) for row in mine.itertuples()}
        for arm, mine in rows.groupby("arm", sort=False)
    }
    columns = [f"{100 * sparsity:g}% zeros" for sparsity in sorted(rows.sparsity.unique())]
    return pd.DataFrame.from_dict(table, orient="index").reindex(columns=columns).fillna("").reset_index(names="arm")


def by_value(found: "pd.DataFrame") -> "pd.DataFrame":
    """Weights kept and accuracies as text: a row for each value of the arms that are not told their sparsity."""
    import pandas as pd

    rows = means(found)
    rows = rows[rows.sparsity.isna()]
    return pd.DataFrame({
        "arm": rows.arm,
        "value": rows.value,
        "kept (%)": [with_error(row.kept, row.kept_error) for row in rows.itertuples()],
        "test accuracy (%)": [_accuracy(row) for row in rows.itertuples()],
    })  # fmt: skip


def _accuracy(row: Any, unit: str = "") -> str:
    """ "98.12 ± 0.034", and of how many seeds where some failed."""
    if not row.seeds:
        return "failed"
    text = with_error(row.accuracy, row.accuracy_error) + unit
    return f"{text} ({row.seeds} of {row.seeds + row.failures})" if row.failures else text


def paragraph(found: "pd.DataFrame") -> str:
    """The tables in words.

    The best arm at each sparsity, those within a standard error of it, those close to the dense network; what the arms
    keep whose sparsity follows from a penalty or a pattern; what failed.
    """
    rows = means(found)
    told, others = rows[rows.sparsity.notna() & rows.seeds.gt(0)], rows[rows.sparsity.isna() & rows.arm.ne(DENSE)]
    dense = rows[rows.arm.eq(DENSE) & rows.seeds.gt(0)]
    lines = [f"The dense network reaches {_accuracy(row, '%')}." for row in dense.itertuples()]
    for sparsity, mine in told.groupby("sparsity"):
        mine = mine.sort_values("accuracy", ascending=False, kind="stable")
        best, rest = next(mine.itertuples()), mine.iloc[1:]
        error = np.hypot(rest.accuracy_error.fillna(0), np.nan_to_num(best.accuracy_error))
        equal = list(rest.arm[best.accuracy - rest.accuracy <= error])
        line = f"At {100 * sparsity:g}% zeros {best.arm} is best, {_accuracy(best, '%')}"
        line += f", {_listed(equal)} within a standard error of the difference" if equal else ""
        for row in dense.itertuples():
            line += "; " + _close(mine, row.accuracy)
        lines.append(f"{line}.")
    for arm, mine in others[others.seeds.gt(0)].groupby("arm", sort=False):
        points = [f"{row.accuracy:.2f}% with {row.kept:.3g}% of the weights" for row in mine.itertuples()]
        lines.append(f"{arm} reaches {_listed(points)}.")
    failed = [
        f"{row.arm} {row.value} ({row.failures})".replace("  ", " ") for row in rows[rows.failures > 0].itertuples()
    ]
    if failed:
        lines.append(f"Runs that failed: {', '.join(failed)}.")
    return " ".join(lines)


def _close(rows: "pd.DataFrame", dense: float) -> str:
    """Which arms are at most ``WITHIN`` points below the dense network: those, or the others, whichever are fewer."""
    close = rows.accuracy >= dense - WITHIN
    near, far = list(rows.arm[close]), list(rows.arm[~close])
    what = f"within {WITHIN:g} points of the dense network"
    if not near:
        return f"none is {what}"
    if len(near) <= len(far):
        return f"{what}: {_listed(near)}"
    return f"{what}: all but {_listed(far)}" if far else f"all are {what}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def as_markdown(name: str, title: str, found: "pd.DataFrame", command: str) -> str:
    """The page of a sweep."""
    seeds = ", ".join(map(str, sorted(found.seed.unique())))
    lines = [
        f"# {title}",
        "",
        paragraph(found),
        "",
        f"Test accuracy in %, mean ± standard error over the seeds {seeds}. Weights kept are a share of those that may "
        "be pruned; with gates on channels, a share of all params, those of the network without its closed channels.",
    ]
    for table in (by_sparsity(found), by_value(found)):
        if len(table):
            lines += ["", *markdown(table.loc[:, (table != "").any()])]
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{name}_dark.png">'
    lines += ["", f'<picture>{source}<img src="{name}_light.png" alt="{title}"></picture>', ""]
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


@contextlib.contextmanager
def style(theme: str) -> Iterator[None]:
    """Matplotlib's style for one of :data:`THEMES`."""
    import matplotlib as mpl

    ink, ground, line, colours = THEMES[theme]
    options: dict[Any, Any] = {
        "axes.prop_cycle": mpl.rcsetup.cycler(color=colours), "axes.edgecolor": line, "axes.labelcolor": ink,
        "axes.facecolor": ground, "figure.facecolor": ground, "savefig.facecolor": ground, "grid.color": line,
        "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.3,
        **{f"{part}.color": ink for part in ("text", "xtick", "ytick")},
    }  # fmt: skip
    with mpl.rc_context(options):
        yield


def picture(found: "pd.DataFrame", title: str) -> Any:
    """Accuracy against weights kept: a line for each arm, the best at its sparsest above; in matplotlib's style.

    The accuracy's axis is logarithmic in the error, and ends at ten times the smallest one: the good ones would be
    pressed together by those that are not. What lies below is left out; the tables have it.
    """
    import matplotlib as mpl

    rows = means(found)
    rows = rows[rows.seeds > 0]
    colours = mpl.rcParams["axes.prop_cycle"].by_key()["color"]
    figure = plots.new_figure(10, 6.4)
    axes = figure.add_subplot()
    scale = (lambda y: -np.log10(np.maximum(100.05 - y, 1e-3)), lambda z: 100.05 - 10.0**-z)
    axes.set_yscale("function", functions=scale)
    arms = {arm: mine.sort_values("kept") for arm, mine in rows[rows.arm != DENSE].groupby("arm", sort=False)}
    for i, (arm, mine) in enumerate(arms.items()):
        axes.errorbar(
            mine.kept, mine.accuracy, mine.accuracy_error.fillna(0), label=plots.plain(arm), capsize=2, markersize=4.5,
            marker=plots.MARKERS[i % len(plots.MARKERS)], color=colours[i % len(colours)],
            linestyle=plots.LINES[i // len(colours) % len(plots.LINES)],
        )  # fmt: skip
    for row in rows[rows.arm == DENSE].itertuples():
        axes.axhline(row.accuracy, color=plots.ink(), linestyle="--", linewidth=1, label=DENSE)
    if len(arms):
        plots.logarithmic(axes, [max(kept, 0.01) for mine in arms.values() for kept in mine.kept])
    axes.xaxis.set_major_formatter("{x:g}")
    least = max(100 - rows.accuracy.max(), 0.05) if len(rows) else 1.0  # error in %
    most = min(100 - rows.accuracy.min(), 10 * least) if len(rows) else 10.0
    bottom, top = max(100 - 1.15 * most, 0), min(100 - least / 1.15, 100)
    axes.set_ylim(bottom, top)
    ticks = [tick for tick in TICKS if bottom <= tick <= top]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set(xlabel="weights kept (%)", ylabel="test accuracy (%)", title=title)
    axes.grid(alpha=0.5, linewidth=0.5)
    if len(rows):
        order = [DENSE, *sorted(arms, key=lambda arm: -arms[arm].accuracy.iloc[0])]
        handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        named = [plots.plain(arm) for arm in order if plots.plain(arm) in handles]
        figure.legend([handles[name] for name in named], named, loc="outside right upper", fontsize=8)
    return figure
