"""One table and one picture of the GPT on text: sparse from scratch, pruned after training, and smaller for good.

  python -m experiments.results.text_gpt                # reads and writes files in results/
  python -m experiments.results.text_gpt --results=DIR

It reads sweep_text_gpt.csv of experiments.sweep, text_gpt_after.json of experiments.prune_after and text_gpt_cut*.json
of experiments.cut, and writes text_gpt.md, text_gpt_light.png and text_gpt_dark.png. Rows that are not there yet are
left out; the page and the terminal say which.
"""

import argparse
import datetime
import math
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments import prune_after
from experiments.command_line import as_path
from experiments.prune_after import Case
from experiments.results import sweep, themes
from experiments.results.table import as_table, markdown, with_error
from experiments.workdir import read_json
from jaxsparse.inspect.plots import style as plots
from jaxsparse.tables import Table

if TYPE_CHECKING:
    import pandas as pd

SWEEP, AFTER, CUT, NAME = "sweep_text_gpt.csv", "text_gpt_after.json", "text_gpt_cut*.json", "text_gpt"
CONFIG = Path(__file__).parents[2] / "configs/sweeps/text_gpt.py"
TITLE = "A byte-level GPT of 3 million weights: trained sparse, pruned after training, made smaller"
DENSE, SCRATCH, AFTERWARDS, TUNED, SMALLER = "dense", "from scratch", "after training", "fine-tuned", "smaller"
COLUMNS = ("how", "method", "zeros", "kept", "bits", "error", "seeds", "dense")
HIGHEST = 1.5  # times the loss of the dense network: where the picture ends


class Found(NamedTuple):
    """The results that are there.

    Attributes:
      rows: by :data:`COLUMNS`: how a network came about, its method, the zeros that it was told to have as text, the
        weights of the blocks that it keeps in %, held-out bits a byte with their standard error, the seeds, and the
        bits a byte of the dense network that it is held against: of its seeds, or the one that was pruned.
      missing: what is not there yet, in words.
      cuts: the contents of the files of experiments.cut, by name.
    """

    rows: "pd.DataFrame"
    missing: tuple[str, ...]
    cuts: dict[str, Mapping[str, Any]]

    @property
    def dense(self) -> float:
        """The bits a byte of the dense network; NaN if nothing says."""
        mine = self.rows[self.rows.how == DENSE]
        return float(mine.bits.iloc[0]) if len(mine) else math.nan


def read(folder: Path) -> Found:
    """Reads the results in a folder.

    Raises:
      ValueError: for a file that has something else.
    """
    import pandas as pd

    scratch, missing = from_scratch(folder / SWEEP)
    after, more = afterwards(folder / AFTER)
    cuts: dict[str, Mapping[str, Any]] = {file.stem: read_json(file) or {} for file in sorted(folder.glob(CUT))}
    missing += more + ([] if cuts else [CUT])
    small = [
        (SMALLER, cut_name(one), "", 100 * one["kept"], _bits(one["healed"]), math.nan, 1, _bits(one["dense"]))
        for one in cuts.values()
    ]
    rows = pd.DataFrame([*scratch, *after, *small], columns=list(COLUMNS))
    if (rows.how == DENSE).sum() > 1:  # of the sweep, and what one of its runs was pruned from
        rows = rows.drop(index=rows.index[rows.how == DENSE][1:])
    return Found(rows.reset_index(drop=True), tuple(missing), cuts)


def from_scratch(file: Path) -> tuple[list[tuple[Any, ...]], list[str]]:
    """The rows of a sweep, and what it lacks."""
    if not file.exists():
        return [], [file.name]
    runs = sweep.read(file)
    rows, there, means = [], {}, sweep.means(runs)
    dense = runs[runs.arm == sweep.DENSE]
    for row in means.itertuples():
        told = "" if math.isnan(row.sparsity) else f"{row.sparsity:g}"
        there[row.arm, told] = row.seeds
        if row.seeds:
            how = DENSE if row.arm == sweep.DENSE else SCRATCH
            score, error = row.score / math.log(2), row.score_error / math.log(2)
            mine = runs[(runs.arm == row.arm) & (runs.value == row.value) & (runs.failed == "")]
            of_seeds = dense.test_loss[dense.seed.isin(mine.seed)].mean() / math.log(2)
            rows.append((how, row.arm, told, row.kept, score, error, row.seeds, of_seeds))
    planned: dict[tuple[str, str], int] = {}
    config = runpy.run_path(str(CONFIG))["get_config"]().sweep
    for seed in config.seeds:
        for arm in config.arms:
            sparsities = config.get("sparsities_of_seed", {}).get(str(seed), config.sparsities)
            for told in [""] if arm.get("dense") else [f"{sparsity:g}" for sparsity in sparsities]:
                planned[arm["name"], told] = planned.get((arm["name"], told), 0) + 1
    missing = [
        f"{arm} {told}".strip() + (f" ({there[arm, told]} of {seeds} seeds)" if there.get((arm, told)) else "")
        for (arm, told), seeds in planned.items()
        if there.get((arm, told), 0) < seeds
    ]
    return rows, missing


def afterwards(file: Path) -> tuple[list[tuple[Any, ...]], list[str]]:
    """The rows of experiments.prune_after, with its dense network, and what it lacks."""
    found = read_json(file)
    if found is None:
        return [], [file.name]
    dense = _bits(found["dense"])
    rows: list[tuple[Any, ...]] = [(DENSE, DENSE, "", 100.0, dense, math.nan, 1, dense)]
    there = set()
    for row in found["rows"]:
        case = Case(row["rule"], row["allocation"], row["sparsity"])
        there.add(case)
        for how, one in ((AFTERWARDS, row), (TUNED, row.get("finetuned"))):
            if one:
                rows.append((how, case.method, case.sparsity, 100 * row["kept"], _bits(one), math.nan, 1, dense))
    planned = prune_after.cases(prune_after.RULES, prune_after.SPARSITIES, prune_after.ALLOCATIONS)
    return rows, [f"{case}" for case in planned if case not in there]


def _bits(metrics: Mapping[str, Any]) -> float:
    if "test_bits_per_byte" not in metrics:
        raise ValueError("these results are of no bytes: they have no test_bits_per_byte")
    return float(metrics["test_bits_per_byte"])


def cut_name(one: Mapping[str, Any]) -> str:
    """The name of a smaller network: "50% of the units, 25% of the heads cut, healed"."""
    parts = [f"{one[kind]:.0%} of the {kind}" for kind in ("units", "heads") if one[kind]]
    blocks = len(one["blocks"])
    parts += [f"{blocks} block{'s' * (blocks > 1)}"] if blocks else []
    return ", ".join(parts) + " cut, healed"


def cells(found: Found) -> "pd.DataFrame":
    """The table as text."""
    import pandas as pd

    rows = found.rows
    return pd.DataFrame({
        "how": rows.how,
        "method": rows.method,
        "zeros": [zeros if ":" in zeros or not zeros else f"{float(zeros):.0%}" for zeros in rows.zeros],
        "weights of the blocks kept": [f"{kept:.1f}%" for kept in rows.kept],
        "bits a byte": [with_error(row.bits, row.error, ".4f", ".4f") for row in rows.itertuples()],
        "above dense": [
            "" if row.how == DENSE or math.isnan(row.dense) else f"{row.bits / row.dense - 1:+.1%}"
            for row in rows.itertuples()
        ],
    })  # fmt: skip


def paragraph(found: Found) -> str:
    """The table in words: the best from scratch and after training, and what smaller networks lose and gain."""
    lines = []
    scratch = found.rows[found.rows.how == SCRATCH]
    for zeros, mine in scratch.groupby("zeros"):
        best = mine.loc[mine.bits.idxmin()]
        lines.append(f"From scratch at {float(zeros):.0%} zeros {best.method} is best, {best.bits:.4f} bits a byte.")
    after = found.rows[found.rows.how == AFTERWARDS]
    for zeros, mine in after.groupby("zeros", sort=False):
        best = mine.loc[mine.bits.idxmin()]
        line = f"After training at {zeros if ':' in zeros else f'{float(zeros):.0%} zeros'} {best.method} is best, "
        line += f"{best.bits:.4f}"
        magnitude = mine[mine.method == "magnitude"]
        if len(magnitude) and len(mine) > 1:
            than = float(magnitude.bits.iloc[0])
            worse = list(mine.method[(mine.bits >= than) & (mine.method != "magnitude")])
            line += f", and magnitude has {than:.4f}"
            line += f"; not better than magnitude: {', '.join(worse)}" if worse else ""
        lines.append(line + ".")
    for one in found.cuts.values():
        more, speed = _bits(one["healed"]) / _bits(one["dense"]) - 1, one["times_faster"]
        lines.append(
            f"With {cut_name(one)} on {one['tokens'] / one['dense_tokens']:.0%} of the tokens, the loss is "
            f"{abs(more):.1%} {'above' if more >= 0 else 'below'} that of the dense network, which it was cut from; a "
            f"train step is {speed['train_step']:.2f} times as fast, generating {speed['generate']:.2f} times."
        )
    return " ".join(lines)


def as_markdown(found: Found, command: str) -> str:
    """The page."""
    seeds = sorted(set(found.rows.seeds))
    lines = [
        f"# {TITLE}", "",
        "Held-out loss in bits a byte, on files of Python's standard library. From scratch: mean"
        f"{' ± standard error' if max(seeds, default=1) > 1 else ''} over 1 or 2 seeds, all on the same tokens as the "
        "dense network, and held against that of the same seeds. After training: the dense network of seed 0, pruned "
        "without training on. Weights kept are those of the "
        "matrices in the blocks; embeddings, biases and norms are dense.", "",
        paragraph(found), "",
        themes.in_markdown(NAME, TITLE), "",
        *markdown(cells(found)), "",
    ]  # fmt: skip
    if found.missing:
        lines += [f"Not there yet: {', '.join(found.missing)}.", ""]
    lines += [f"`{command}`, {datetime.date.today()}."]
    return "\n".join(lines) + "\n"


def picture(found: Found) -> Any:
    """Bits a byte against weights kept: a line for each method from scratch and for each rule, points for the rest.

    It ends at 1.5 times the dense network's loss, :data:`HIGHEST`; what lies above is in the table.
    """
    import matplotlib as mpl

    colours = mpl.rcParams["axes.prop_cycle"].by_key()["color"]
    figure = plots.new_figure(10, 6.0)
    axes = figure.add_subplot()
    lines = found.rows[found.rows.how.isin([SCRATCH, AFTERWARDS, TUNED]) & ~found.rows.zeros.str.contains(":")]
    groups = list(lines.groupby(["how", "method"], sort=False))
    dashes = {SCRATCH: "-", AFTERWARDS: "--", TUNED: ":"}
    numbers, named = dict.fromkeys(dashes, 0), []
    for (how, method), mine in groups:
        number, mine = numbers[how], mine.sort_values("kept")
        numbers[how] += 1
        style = {"color": colours[number % len(colours)], "marker": plots.MARKERS[number % len(plots.MARKERS)]}
        named += [axes.errorbar(
            mine.kept, mine.bits, mine.error.fillna(0), label=plots.plain(f"{method}, {how}"), capsize=2, markersize=5,
            linestyle=dashes[how], **style,
        )]  # fmt: skip
        of_n = found.rows[(found.rows.how == how) & (found.rows.method == method) & found.rows.zeros.str.contains(":")]
        for row in of_n.itertuples():  # of the line's colour, but hollow
            named += axes.plot(
                row.kept, row.bits, linestyle="none", markerfacecolor="none", markersize=9,
                label=plots.plain(f"{method}, {row.zeros}, {how}"), **style,
            )  # fmt: skip
    for i, row in enumerate(found.rows[found.rows.how == SMALLER].itertuples()):
        named += axes.plot(
            row.kept, row.bits, linestyle="none", marker="*", markersize=13, color=colours[-1 - i % len(colours)],
            label=plots.plain(row.method),
        )  # fmt: skip
    if math.isfinite(found.dense):
        named.append(axes.axhline(found.dense, color=plots.ink(), linestyle="-.", linewidth=1, label=DENSE))
        inside = found.rows.bits[found.rows.bits <= HIGHEST * found.dense]
        margin = 0.05 * (inside.max() - inside.min()) + 0.002 * found.dense
        axes.set_ylim(inside.min() - margin, inside.max() + margin)
    if len(kept := list(found.rows.kept[found.rows.how != DENSE])):
        plots.logarithmic(axes, kept)
        ticks = [tick for tick in (5, 10, 20, 30, 40, 50, 70, 100) if min(kept) / 1.2 < tick < max(kept) * 1.2]
        axes.set_xticks(ticks)
        axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="weights of the blocks kept (%)", ylabel="held-out loss (bits a byte)", title=TITLE)
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.5, linewidth=0.5)
    if len(found.rows):
        figure.legend(named, [one.get_label() for one in named], loc="outside right upper", fontsize=8)
    return figure


def as_text(found: Found) -> Table:
    """The table for a terminal."""
    return as_table(dict(cells(found)), left=("how", "method", "zeros"))


def write(folder: Path, command: str) -> Found:
    """Reads the results in a folder and writes the page and the pictures into it.

    Raises:
      FileNotFoundError: if there are no results.
    """
    found = read(folder)
    if not len(found.rows):
        raise FileNotFoundError(f"{folder} has none of {SWEEP}, {AFTER} and {CUT}")
    (folder / f"{NAME}.md").write_text(as_markdown(found, command))
    themes.save(lambda: picture(found), folder, NAME)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.results.text_gpt",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=as_path, default=Path("results"), help="folder (%(default)s)")
    args = parser.parse_args(argv)
    try:
        found = write(args.results, "python -m experiments.results.text_gpt")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(as_text(found).text())
    if found.missing:
        print(f"not there yet: {', '.join(found.missing)}")
    print(f"see {args.results / NAME}.md")


if __name__ == "__main__":
    main()
