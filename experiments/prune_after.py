"""Prune a finished dense run after training, by several rules at several sparsities, and evaluate what is left.

  python -m experiments.prune_after --run=runs/text_gpt/dense/seed_0
  python -m experiments.prune_after ... --rules=magnitude,wanda,sparsegpt --sparsities=0.5,0.6,0.7,2:4
  python -m experiments.prune_after ... --allocations=uniform,owl         # OWL's sparsities of blocks beside equal ones
  python -m experiments.prune_after ... --finetune_epochs=1 --rate=0.1    # and train on, with the masks held
  python -m experiments.prune_after ... --rules=experiments.wanda_rules:wanda_of_matrix   # one's own, MODULE:FUNCTION

RUN is the folder of a run of experiments.train, on text or images. Each rule prunes its last weights by
jaxsparse.prune_once: the leaves of config.method.prunable, or if that says nothing all matrices but tables of tokens
and the last layer. Calibration data are --windows windows of the train text, or images. Nothing is trained; what is
left is evaluated on the held-out data as the trainer does. "owl" is for rules that look at data, and not for n:m, which
leaves it nothing to share out.

RESULTS/NAME.json gets a row as soon as it is measured, and NAME.md the table. The same command skips the rows that are
there. Fine-tuning repeats the learning rate of the run in --finetune_epochs, times --rate; its runs are in --workdir,
and are resumed.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

import jaxsparse
from experiments.command_line import as_path, imported, not_empty
from experiments.finished import FinishedRun, errors_in_a_line, open_finished, train_on, write_start
from experiments.results.table import markdown
from experiments.workdir import read_json, write_json
from jaxsparse import post_training
from jaxsparse.trees import by_path

RULES, SPARSITIES, ALLOCATIONS = ("magnitude", "wanda", "sparsegpt"), ("0.5", "0.6", "0.7", "2:4"), ("uniform", "owl")


class Case(NamedTuple):
    """A way to prune: a rule, how leaves share the sparsity, and the sparsity, such as "0.5" or "2:4"."""

    rule: str
    allocation: str
    sparsity: str

    def __str__(self) -> str:
        return f"{self.method}, {self.sparsity}"

    @property
    def method(self) -> str:
        """The rule, and the allocation if it is not uniform."""
        rule = self.rule.rpartition(":")[2]
        return rule if self.allocation == "uniform" else f"{rule} + {self.allocation}"

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of :func:`jaxsparse.post_training.prune_once`."""
        if ":" in self.sparsity:
            n, m = map(int, self.sparsity.split(":"))
            return {"sparsity": 1 - n / m, "structure": jaxsparse.n_of_m(n, m)}
        return {"sparsity": float(self.sparsity), "allocation": self.allocation}


def cases(rules: Sequence[str], sparsities: Sequence[str], allocations: Sequence[str]) -> list[Case]:
    """All ways to prune, without those that "owl" does not go together with.

    Raises:
      ValueError: for a rule, a sparsity or an allocation that is not there.
    """
    needs = {rule: resolve(rule).needs for rule in rules}
    known = ("uniform", "erdos_renyi", "erdos_renyi_kernel", "owl")
    if unknown := [name for name in allocations if name not in known]:
        raise ValueError(f"--allocations takes {', '.join(known)}, got {', '.join(unknown)}")
    every = itertools.starmap(Case, itertools.product(rules, allocations, map(as_sparsity, sparsities)))

    def fits(case: Case) -> bool:
        blind = case.allocation == "owl" and needs[case.rule] == "nothing"
        return case.allocation == "uniform" or not (":" in case.sparsity or blind)

    found = list(dict.fromkeys(filter(fits, every)))
    if not found:
        raise ValueError(f"nothing is left to prune: {', '.join(allocations)} shares out no n:m, and 'owl' needs data")
    return found


def resolve(rule: str) -> post_training.Rule:
    """A rule by its name, or one's own as MODULE:FUNCTION."""
    return post_training.resolve(imported(rule, "--rules") if ":" in rule else rule)


def as_sparsity(text: str) -> str:
    """The fraction of zeros, or n:m, in the form that rows have it; a ValueError for what is neither."""
    try:
        n, colon, m = text.partition(":")
        if 0 < int(n) < int(m) if colon else 0 < float(n) < 1:
            return f"{int(n)}:{int(m)}" if colon else f"{float(n):g}"
    except ValueError:
        pass
    raise ValueError(f"--sparsities takes fractions of zeros between 0 and 1, and n:m such as 2:4, got {text!r}")


def prune_after(
    run: FinishedRun,
    todo: Sequence[Case],
    file: Path,
    *,
    windows: int = 64,
    seed: int = 0,
    finetune_epochs: float = 0.0,
    rate: float = 0.1,
    workdir: Path | None = None,
) -> dict[str, Any]:
    """Prunes and evaluates in all these ways but those that the file has.

    Args:
      run: the dense network.
      todo: the ways to prune.
      file: of the results, JSON, written after every row.
      windows: examples to calibrate with.
      seed: of their draw.
      finetune_epochs: how long to train on with the masks held; 0: not at all.
      rate: what the run's learning rate is multiplied by for that.
      workdir: folder of the runs that train on.

    Returns:
      The contents of the file.

    Raises:
      ValueError: if the file is of another run or other calibration data, and as
        :func:`jaxsparse.post_training.prune_once`.
    """
    batches = run.calibration(windows, seed)
    if finetune_epochs:
        run.follow_up(finetune_epochs, rate)  # raises before anything is pruned
    about = {"run": run.fingerprint, "windows": windows, "seed": seed, "finetune_epochs": finetune_epochs}
    about |= {"rate": rate if finetune_epochs else None}
    found: dict[str, Any] = read_json(file) or about | {"dense": run.evaluated(run.params), "rows": []}
    other = [f"{key} {found.get(key)!r} there, {about[key]!r} now" for key in about if found.get(key) != about[key]]
    if other:
        raise ValueError(f"{file} has other results, of {'; '.join(other)}: take another --name, or delete it")
    there = {case_of(row) for row in found["rows"]}
    print(f"dense: {said(run, found['dense'])}; {len(todo)} rows, {len(there & set(todo))} of them there", flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    for case in todo:
        if case in there:
            continue
        start = time.perf_counter()
        params, masks = prune(run, case, batches)
        row = case._asdict() | {"kept": float(jaxsparse.density(masks)), "seconds": time.perf_counter() - start}
        row |= run.evaluated(params)
        print(f"{case}: {said(run, row)}, {row['kept']:.2%} kept, {row['seconds']:.1f} s", flush=True)
        if finetune_epochs:
            folder = (workdir or run.folder.with_name(f"{run.folder.name}_pruned")) / file.stem
            folder /= "_".join(case).replace(":", "_of_")
            row["finetuned"] = finetune(run, params, masks, folder, finetune_epochs, rate)
            print(f"{case}, fine-tuned: {said(run, row['finetuned'])}", flush=True)
        found = read_json(file) or found  # with rows that other processes have measured meanwhile
        found["rows"] = [other for other in found["rows"] if case_of(other) != case] + [row]
        write_json(file, found)
    return found


def case_of(row: Mapping[str, Any]) -> Case:
    """The case that a row of the results is of."""
    return Case(row["rule"], row["allocation"], row["sparsity"])


def prune(run: FinishedRun, case: Case, batches: Sequence[Any]) -> tuple[Any, Any]:
    """The weights that are left of a run, and the masks."""
    prunable = run.config.method.get("prunable")
    prunable = tuple(prunable) if isinstance(prunable, list | tuple) else prunable
    rule = resolve(case.rule)
    return post_training.prune_once(run.apply, run.params, batches, rule, **case.options, prunable=prunable)


def finetune(run: FinishedRun, params: Any, masks: Any, folder: Path, epochs: float, rate: float) -> dict[str, Any]:
    """Trains on with the masks held, by the trainer, and returns the held-out metrics.

    Raises:
      ValueError: if the folder has a run that began from other weights, or a pruned weight is not zero at the end.
    """
    start = folder / "start.safetensors"
    write_start(start, params, masks)
    config = run.follow_up(epochs, rate, dense=False, masks_from=str(start), start="weights", start_from=None)
    state, result = train_on(config, folder)
    pruned = {path: ~np.asarray(mask) for path, mask in by_path(masks).items() if np.ndim(mask)}
    trained = by_path(state.params)
    if back := [path for path, gone in pruned.items() if np.any(np.asarray(trained[path])[gone])]:
        raise ValueError(f"{folder}: pruned weights of {', '.join(back)} are not zero after fine-tuning")
    return {name: value for name, value in result.items() if name.startswith(("validation", "test"))} | {
        "seconds": result["seconds"], "steps": result["steps"]
    }  # fmt: skip


def said(run: FinishedRun, row: Mapping[str, Any]) -> str:
    """The held-out metrics in words."""
    return run.program.task.said(row)


def score(row: Mapping[str, Any]) -> tuple[float, str, str]:
    """The number that rows are compared by, for bytes the bits a byte: its value, its format and its name."""
    if "test_bits_per_byte" in row:
        return row["test_bits_per_byte"], ".4f", "bits a byte"
    if "test_perplexity" in row:
        return row["test_loss"], ".4f", "test loss, nats a token"
    return 100 * row["test_accuracy"], ".2f", "test accuracy, %"


def as_markdown(found: Mapping[str, Any], title: str, command: str) -> str:
    """The page of the results: a row for each rule and allocation, a column for each sparsity."""
    import pandas as pd

    def table(rows: Mapping[Case, Mapping[str, Any]]) -> list[str]:
        columns = list(dict.fromkeys(case.sparsity for case in rows))
        cells: dict[str, dict[str, str]] = {}
        for case, row in rows.items():
            value, form, _ = score(row)
            cells.setdefault(case.method, {})[case.sparsity] = f"{value:{form}}"
        frame = pd.DataFrame.from_dict(cells, orient="index").reindex(columns=columns).fillna("")
        return markdown(frame.reset_index(names="rule"))

    rows = {case_of(row): row for row in found["rows"]}
    value, form, name = score(found["dense"])
    times: dict[str, list[float]] = {}
    for case, row in rows.items():
        times.setdefault(case.rule.rpartition(":")[2], []).append(row["seconds"])
    seconds = ", ".join(f"{rule} {np.median(taken):.1f} s" for rule, taken in times.items())
    lines = [
        f"# Pruned after training: {title}", "",
        f"Held-out data, {name}; dense {value:{form}}. The columns are the fraction of zeros, or n:m. Calibrated with "
        f"{found['windows']} examples of the train data, no fine-tuning. Median time to prune, with compilation: "
        f"{seconds}.", "", *table(rows),
    ]  # fmt: skip
    tuned = {case: row["finetuned"] for case, row in rows.items() if "finetuned" in row}
    if tuned:
        epochs = f"{found['finetune_epochs']:g} epochs"
        lines += ["", f"After {epochs} of fine-tuning with the masks held:", "", *table(tuned)]
    device = jax.devices()[0].device_kind
    return "\n".join([*lines, "", f"`{command}`, JAX {jax.__version__} on {device}."]) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; what the user can set right is told in a line, without a traceback."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.prune_after",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def listed(text: str) -> tuple[str, ...]:
        return tuple(filter(None, not_empty(text).split(",")))

    parser.add_argument("--run", type=as_path, required=True, help="folder of a dense run that is finished")
    parser.add_argument(
        "--rules", default=RULES, help=f"of {', '.join(post_training.RULES)}, MODULE:FUNCTION", type=listed
    )
    parser.add_argument("--sparsities", default=SPARSITIES, help="fractions of zeros, or n:m", type=listed)
    parser.add_argument("--allocations", default=ALLOCATIONS, help="uniform, owl, erdos_renyi", type=listed)
    parser.add_argument("--windows", type=int, default=64, help="examples to calibrate with (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of their draw (%(default)s)")
    parser.add_argument("--results", type=as_path, default=Path("results"), help="folder to write to (%(default)s)")
    parser.add_argument("--name", type=not_empty, default="prune_after", help="of the files there (%(default)s)")
    parser.add_argument("--finetune_epochs", type=float, default=0.0, help="train on with the masks held (%(default)s)")
    parser.add_argument("--rate", type=float, default=0.1, help="times the run's learning rate (%(default)s)")
    parser.add_argument("--workdir", type=as_path, help="folder of the runs that train on; by default beside RUN")
    parser.add_argument("--data_dir", type=not_empty, help="where the data of the run are, if not where they were")
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.WARNING)
    file = args.results / f"{args.name}.json"
    with errors_in_a_line():
        todo = cases(args.rules, args.sparsities, args.allocations)
        run = open_finished(args.run, args.data_dir)
        options = {name: getattr(args, name) for name in ("windows", "seed", "finetune_epochs", "rate", "workdir")}
        found = prune_after(run, todo, file, **options)
        given = sys.argv[1:] if argv is None else argv
        command = " ".join(["python -m experiments.prune_after", *given])
        file.with_suffix(".md").write_text(as_markdown(found, args.name, command))
        print(f"see {file.with_suffix('.md')}")


if __name__ == "__main__":
    main()
