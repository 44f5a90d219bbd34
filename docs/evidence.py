"""Numbers of the committed results, for the tables of docs/choose.md, which ``python -m docs.tables`` writes."""

import csv
import statistics
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SWEEP = ROOT / "results" / "sweep_mnist_lenet_300_100.csv"
SPEED = ROOT / "benchmarks" / "results"
WITHIN = 0.3  # points of accuracy below the dense network's that are set in bold

# Groups of arms of the sweep -> arm -> (name, page in docs/, row in benchmarks/results/compile_time_cpu.md).
ARMS = {
    "masks that never change": {
        "random": ("random masks, equal shares", "methods/mask_updates.md", "mask_updates"),
        "random_erdos_renyi": ("random masks, Erdős-Rényi", "methods/mask_updates.md", "mask_updates"),
        "snip": ("SNIP", "howto/prune_before_training.md", "mask_updates"),
        "grasp": ("GraSP", "howto/prune_before_training.md", "mask_updates"),
        "synflow": ("SynFlow", "howto/prune_before_training.md", "mask_updates"),
    },
    "a fixed number of weights that move": {
        "sparse_momentum": ("`sparse_momentum`", "methods/sparse_momentum.md", "sparse_momentum"),
        "rigl": ("`rigl`", "methods/rigl.md", "rigl"),
        "sparse_evolutionary": ("`sparse_evolutionary`", "methods/sparse_evolutionary.md", "sparse_evolutionary"),
        "srigl": ("`srigl`", "methods/srigl.md", "srigl"),
    },
    "pruned as training goes on": {
        "magnitude": ("`magnitude_pruning`", "methods/magnitude_pruning.md", "magnitude_pruning"),
        "magnitude_global": ('`magnitude_pruning(scope="global")`', "methods/magnitude_pruning.md", None),
        "magnitude_lamp": (
            '`magnitude_pruning(scope="lamp")`', "methods/magnitude_pruning.md", "magnitude_pruning, lamp"
        ),
        "granet": ("`granet`", "methods/granet.md", "granet"),
        "asni": ("`asni`", "methods/asni.md", "asni"),
        "powerpropagation": ("`powerpropagation`", "methods/powerpropagation.md", None),
        "admm": ("`admm`", "methods/admm.md", "admm"),
    },
    "the largest weights, chosen anew while the others learn too": {
        "ac_dc": ("`ac_dc`", "methods/ac_dc.md", "ac_dc"),
        "iterative_hard_thresholding": (
            "`iterative_hard_thresholding`", "methods/iterative_hard_thresholding.md", "iterative_hard_thresholding"
        ),
        "straight_through": ("`straight_through`", "methods/straight_through.md", "straight_through"),
        "top_kast": ("`top_kast`", "methods/top_kast.md", "top_kast"),
        "spartan": ("`spartan`", "methods/spartan.md", None),
    },
}  # fmt: skip
# Arms without a sparsity: n of every m weights, or a strength that decides how many are kept.
FREE = {
    "n of every m weights": {
        "sr_ste": ("`sr_ste`", "methods/sr_ste.md"),
        "s_ste": ("`s_ste`", "methods/s_ste.md"),
        "sparse_momentum_n_of_m": (
            "`sparse_momentum(structure=n_of_m(n, m))`",
            "methods/sparse_momentum.md",
        ),
    },
    "as few weights as are needed": {
        "rda": ("`rda`", "methods/reweighted_l1.md"),
        "soft_threshold": ("`soft_threshold`", "methods/soft_threshold.md"),
    },
    "whole channels": {
        "l0": ("`l0`", "methods/l0.md"),
        "dep_l0": ("`dep_l0`", "methods/dep_l0.md"),
    },
}


class Mean(NamedTuple):
    """The runs of an arm at one value: weights kept and test accuracy in %, each with one number a seed."""

    kept: list[float]
    accuracies: list[float]

    @property
    def accuracy(self) -> float:
        """The mean accuracy."""
        return statistics.mean(self.accuracies)

    def __str__(self) -> str:
        """The mean, and the standard error where there are several seeds."""
        if len(self.accuracies) == 1:
            return f"{self.accuracy:.2f}"
        error = statistics.stdev(self.accuracies) / len(self.accuracies) ** 0.5
        return f"{self.accuracy:.2f} ± {error:.2f}"


def sweep() -> dict[tuple[str, str], Mean]:
    """The runs of the sweep on MNIST by arm and value ("" for the dense network's), in the order of the file."""
    found: dict[tuple[str, str], Mean] = defaultdict(lambda: Mean([], []))
    with SWEEP.open() as file:
        for row in csv.DictReader(file):
            if not row["failed"]:
                mean = found[row["arm"], row["value"]]
                mean.kept.append(float(row["kept"]))
                mean.accuracies.append(float(row["test_accuracy"]))
    return dict(found)


def cell(page: Path, column: str, **where: str) -> str:
    """One cell of the tables in a page of results: of the column, in the row whose other cells are as given.

    In ``where``, what is no letter or digit in the name of a column is an underscore. None or several such rows are a
    ValueError.
    """
    rows: list[dict[str, str]] = []
    header: list[str] = []
    for line in page.read_text().splitlines():
        cells = (
            [part.strip() for part in line.strip("|").split("|")]
            if line.startswith("|")
            else []
        )
        if not cells:
            header = []
        elif not header:
            header = cells
        elif not set(line) <= set("| -"):
            rows.append(dict(zip(header, cells, strict=True)))

    def named(row: dict[str, str]) -> dict[str, str]:
        return {
            "".join(c if c.isalnum() else "_" for c in name): text for name, text in row.items()
        }

    fits = [row for row in rows if column in row and where.items() <= named(row).items()]
    if len(fits) != 1:
        raise ValueError(
            f"{page.name}: {len(fits)} rows have {where} and a column {column!r}, expected one"
        )
    return fits[0][column]


def link(name: str, page: str) -> str:
    """A link in docs/choose.md."""
    return f"[{name}]({page})"


def accuracies() -> str:
    """The table of accuracies by method and sparsity, with the time to compile the update."""
    runs = sweep()
    sparsities = sorted({value for arm, value in runs if arm == "magnitude"}, key=float)
    dense = runs["dense", ""]
    heads = [
        "| | "
        + " | ".join(f"{100 * float(s):g}% zeros" for s in sparsities)
        + " | to compile |"
    ]
    lines = [*heads, "| --- |" + " --- |" * (len(sparsities) + 1)]
    for group, arms in ARMS.items():
        lines.append(f"| *{group}* |" + " |" * (len(sparsities) + 1))
        for arm, (name, page, compiled) in arms.items():
            cells = []
            for sparsity in sparsities:
                mean = runs[arm, sparsity]
                cells.append(
                    f"**{mean}**" if mean.accuracy >= dense.accuracy - WITHIN else f"{mean}"
                )
            cells.append(compile_time(compiled) if compiled else "")
            lines.append(f"| {link(name, page)} | " + " | ".join(cells) + " |")
    seeds = sorted({len(mean.accuracies) for mean in runs.values()})
    told = f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else f"{seeds[0]} seeds"
    return (
        f"Test accuracy in % of LeNet-300-100 on MNIST, 20 epochs; mean ± standard error, {told} (without ±: one). "
        f"The dense network reaches {dense}. Bold: at most {WITHIN} points below it. The last column is the time to "
        "compile one update for a 12-layer transformer, as a multiple of AdamW's.\n\n"
        + "\n".join(lines)
    )


def free() -> str:
    """The table of methods whose number of weights follows from something else than a sparsity."""
    lines = ["| | weights kept → test accuracy, % |", "| --- | --- |"]
    runs = sweep()
    for group, arms in FREE.items():
        lines.append(f"| *{group}* | |")
        for arm, (name, page) in arms.items():
            found = [mean for (other, _), mean in runs.items() if other == arm]
            found.sort(key=lambda mean: -statistics.mean(mean.kept))
            pairs = " · ".join(f"{statistics.mean(mean.kept):.3g}% → {mean}" for mean in found)
            lines.append(f"| {link(name, page)} | {pairs} |")
    return (
        "\n".join(lines)
        + "\n\nFor `l0` and `dep_l0` it is the share of all params that is left without the closed channels."
    )


def compile_time(chain: str) -> str:
    """The compile time of one update, as a multiple of AdamW's."""
    return cell(SPEED / "compile_time_cpu.md", "of AdamW's", chain=chain)


def goals() -> str:
    """The table of goals, what to take for each, and what was measured."""
    runs = sweep()
    files, slim, mlp = (SPEED / f"{name}_cpu.md" for name in ("artifacts", "slim", "mlp"))
    blocks, l0, rda = (
        SPEED / "trace_sparse_cpu.md",
        ROOT / "results" / "l0_mnist.md",
        ROOT / "results" / "rda_mnist.md",
    )
    dense = runs["dense", ""]
    n_of_m = {n: runs["sr_ste", n] for n in ("2", "1")}
    few, beside = (
        {"network": f"LeNet-300-100, {name}", "setting": setting}
        for name, setting in (("rda", "l1 = 3e-06"), ("sparse momentum", "3.2%"))
    )
    lenet = "LeNet-300-100"
    rows = [
        (
            "a smaller file",
            "[`magnitude_pruning`](methods/magnitude_pruning.md) while you train, or [three lines](prune.md) "
            "afterwards; then [`save_sparse`](howto/save_and_convert.md#a-small-file-to-ship)",
            f"{lenet} with 5% of its weights in bfloat16: "
            f"{cell(files, 'bytes', network=lenet, file='sparse, bfloat16')} bytes instead of "
            f"{cell(files, 'bytes', network=lenet, file='dense, safetensors')}; a ResNet-50 with 10% has "
            f"{cell(files, 'of the dense file', network='ResNet-50', file='sparse, bfloat16')} of the dense file",
        ),
        (
            "a smaller dense model, fast anywhere",
            "[`l0`, `dep_l0`](methods/l0.md) while you train, [`prune_channels`, `drop_blocks`]"
            "(howto/remove_heads_and_blocks.md) afterwards; then [`trace.slim`](howto/any_model.md#a-smaller-network)",
            f"`dep_l0`: {cell(l0, 'ours', network=f'{lenet}, dep_l0')}% error with "
            f"{cell(l0, 'kept (%)', network=f'{lenet}, dep_l0')}% of the params; a VGG16 without half of its channels "
            f"is {cell(slim, 'times faster', network='VGG16')} times faster",
        ),
        (
            "a faster train step",
            "`structure=block(128, 128)` of [`sparse_momentum`](methods/sparse_momentum.md), and [products that skip "
            "dead blocks](howto/blocks.md)",
            f"an MLP of 2,048 units by blocks, 10% kept: "
            f"{cell(mlp, 'of dense', batch='500', kept_by='blocks, dense gradients on 20 steps')} times the steps per "
            f"second of the dense one; by single weights {cell(mlp, 'of dense', batch='500', kept_by='weights')}. A "
            f"GPT of width 1,024: {cell(blocks, 'times as fast', width__blocks='1024, 2')} times",
        ),
        (
            "a fixed number of weights from the first step",
            "[`rigl`](methods/rigl.md), or [`sparse_momentum`](methods/sparse_momentum.md), which "
            "moves weights between layers too",
            f"at 95% zeros {runs['rigl', '0.95']} and {runs['sparse_momentum', '0.95']}% accuracy, dense {dense}",
        ),
        (
            "the best accuracy for a number of weights, where dense training is no problem",
            "[`granet`](methods/granet.md), [`ac_dc`](methods/ac_dc.md); simpler is "
            "[`magnitude_pruning`](methods/magnitude_pruning.md) with `scope=\"global\"`",
            f"at 98% zeros {runs['granet', '0.98']}, {runs['ac_dc', '0.98']} and {runs['magnitude_global', '0.98']}%, "
            f"dense {dense}",
        ),
        (
            "as few weights as the accuracy allows",
            "[`rda`](methods/reweighted_l1.md); behind your own optimizer "
            "[`reweighted_l1`](methods/reweighted_l1.md)",
            f"{cell(rda, 'ours', **few)}% error with {cell(rda, 'kept (%)', **few)}% of the weights; "
            f"`sparse_momentum` with 3.2%: {cell(rda, 'ours', **beside)}%",
        ),
        (
            "to prune without training",
            "[`prune_once`](prune.md#with-calibration-data-transformers) with some data, `magnitude_masks` with none",
            "on small networks only: [here](prune.md), and in {doc}`a notebook </notebooks/07_prune_a_transformer>`",
        ),
        (
            "masks before training that never change",
            "[SynFlow, SNIP](howto/prune_before_training.md), `random_masks` with Erdős-Rényi shares",
            f"at 95% zeros SNIP {runs['snip', '0.95']}%, random masks {runs['random_erdos_renyi', '0.95']}%, with "
            f"equal shares {runs['random', '0.95']}%",
        ),
        (
            "2:4 for sparse matrix hardware",
            "from scratch [`sr_ste`](methods/sr_ste.md); of a trained network `magnitude_masks` or `prune_once` with "
            "`structure=n_of_m(2, 4)`",
            f"`sr_ste` at 2:4 {n_of_m['2']}%, at 1:4 {n_of_m['1']}%, dense {dense}; on no GPU yet",
        ),
        (
            "a sparse transformer",
            "[one page for all of it](howto/transformers.md): `prune_once` for a trained one, "
            "`magnitude_pruning` or `rigl` from scratch",
            f"compiling an update of 12 layers takes {compile_time('rigl')} times as long with `rigl` as with AdamW "
            f"alone, {compile_time('magnitude_pruning')} times with `magnitude_pruning`",
        ),
    ]  # fmt: skip
    lines = ["| you want | take | measured |", "| --- | --- | --- |"]
    return "\n".join(
        [*lines, *(f"| **{goal}** | {take} | {measured} |" for goal, take, measured in rows)]
    )


def choose() -> str:
    """What is written of docs/choose.md."""
    return f"{goals()}\n\n## The methods side by side\n\n{accuracies()}\n\n{free()}"
