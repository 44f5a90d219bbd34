"""Make the GPT of a finished dense run smaller for good: cut units, heads and blocks, heal, and measure the speed.

  python -m experiments.cut --run=runs/text_gpt/dense/seed_0 --units=0.5 --heads=0.25
  python -m experiments.cut ... --blocks=1                         # whole blocks too, before units and heads
  python -m experiments.cut ... --heal_epochs=3 --rate=0.5         # by default a tenth of the run, its learning rate

RUN is the folder of a run of experiments.train with models.GPT. The share --units of the hidden units of every MLP and
--heads of its heads go by the sizes of their activations in calibration data (Minitron's scores,
jaxsparse.post_training.prune_channels), and --blocks blocks by how little they change (block_scores). What is left is a
smaller GPT of equal widths in every block. The trainer heals it in --workdir, with its checkpoints, by distillation
from the dense network (--distill_weight, --distill_temperature).

RESULTS/NAME.json has the held-out loss before and after cutting and after healing, and the seconds of a train step and
of generated texts, dense and small in turns in one process: medians, and their ratio. NAME.md has it in words.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from experiments.command_line import as_path, not_empty
from experiments.finished import FinishedRun, errors_in_a_line, open_finished, train_on, write_start
from experiments.program import Program, make_program
from experiments.workdir import write_json
from jaxsparse import models, post_training
from jaxsparse.trees import by_path

TENTH = 0.1  # of the epochs of the dense run, to heal by default
STEPS = 5  # that are timed at once
TEXTS, PROMPT = 16, 16  # texts that are generated, and the tokens that they begin with
WIDTHS = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_width")


class Smaller(NamedTuple):
    """A GPT that was cut.

    Attributes:
      model: with its widths.
      params: that are left.
      blocks: the numbers of the blocks that went.
    """

    model: models.GPT
    params: Any
    blocks: tuple[int, ...]


def cut(run: FinishedRun, units: float, heads: float, blocks: int = 0, windows: int = 64, seed: int = 0) -> Smaller:
    """Cuts the GPT of a run.

    Args:
      run: the dense run.
      units, heads: the share of the hidden units of each MLP, and of the heads of each attention, that goes.
      blocks: how many blocks go.
      windows, seed: of the calibration data.

    Raises:
      ValueError: for another model, shares out of range, and as the functions of :mod:`jaxsparse.post_training`.
    """
    model, params, batches = run.program.model, run.params, run.calibration(windows, seed)
    if not isinstance(model, models.GPT):
        raise ValueError(f"--run={str(run.folder)!r} trained {type(model).__name__}, and this cuts a GPT")
    if not 0 <= blocks < model.num_layers:
        raise ValueError(f"--blocks is from 0 to less than the {model.num_layers} of the model, got {blocks}")
    removed: tuple[int, ...] = ()
    if blocks:
        where = "blocks" if model.scan else "block_*"
        scores = post_training.block_scores(run.apply, params, batches, where)
        removed = tuple(sorted(int(i) for i in np.argsort(scores, kind="stable")[:blocks]))
        params = post_training.drop_blocks(params, where, remove=removed)
        model = model.clone(num_layers=model.num_layers - blocks)
    shares = {kind: share for kind, share in (("units", units), ("heads", heads)) if share}
    if not shares and not blocks:
        raise ValueError("nothing is to be cut: --units, --heads and --blocks are 0")
    if shares:
        params = post_training.prune_channels(
            lambda params, tokens: model.apply({"params": params}, tokens), params, batches, shares
        ).params
    return Smaller(model.fitted(params), params, removed)


def smaller_config(config: ConfigDict, model: models.GPT) -> ConfigDict:
    """The config with the widths of a smaller GPT."""
    widths = {name: getattr(model, name) for name in WIDTHS}
    changed = config.to_dict()
    return ConfigDict(changed | {"model": changed["model"] | widths})


def heal(run: FinishedRun, small: Smaller, workdir: Path, epochs: float, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """Trains a smaller GPT on by the trainer, which resumes it; returns its params, and the contents of result.json.

    Args:
      run: the dense run, the teacher.
      small: the smaller GPT.
      workdir: folder of the run that heals.
      epochs: how long.
      **changes: ``rate``, what the learning rate is multiplied by, and keys of the config.
    """
    start = workdir / "start.safetensors"
    write_start(start, small.params)
    config = run.follow_up(
        epochs, dense=True, masks_from=None, start_from=str(start), distill_from=str(run.folder), **changes
    )
    state, result = train_on(smaller_config(config, small.model), workdir)
    return state.params, result


def speeds(programs: Mapping[str, Program], params: Mapping[str, Any], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of a train step and of generating texts, of several networks in turns.

    Train steps are of the data's loss with the batch of the run. Texts are as long as the model can read.
    """
    found = {}
    for what, make in (("train_step", _stepper), ("generate", _generator)):
        seconds = in_turns({name: make(programs[name], params[name]) for name in programs}, rounds)
        per = STEPS if what == "train_step" else 1
        found[what] = {name: value / per for name, value in seconds.items()}
    return found


def in_turns(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each function over rounds in which each is called once; they compile before that."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            start = perf_counter()
            jax.block_until_ready(function())
            if number:
                seconds[name].append(perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def _stepper(program: Program, params: Any) -> Callable[[], Any]:
    state = [program.layout.place(program.init(0)._replace(params=params))]
    dataset = program.task.dataset
    source = dataset._replace(train=program.layout.replicate(dataset.train))

    def steps():
        state[0], measured = program.train_chunk(state[0], source, 0, STEPS)
        return measured["losses"]

    return steps


def _generator(program: Program, params: Any) -> Callable[[], Any]:
    model, split = program.model, program.task.dataset.test
    prompts, _, _ = program.task.look_up(split.starts[np.arange(TEXTS) % len(split)], split)
    prompts = prompts[:, : min(PROMPT, model.max_length // 2)]
    return lambda: models.generate(model, params, prompts, model.max_length)


def block_weights(params: Any) -> int:
    """The weights of the matrices of all blocks."""
    return sum(leaf.size for path, leaf in by_path(params).items() if path.startswith("block") and "kernel" in path)


def cut_and_heal(
    run: FinishedRun,
    workdir: Path,
    *,
    units: float,
    heads: float,
    blocks: int = 0,
    windows: int = 64,
    seed: int = 0,
    epochs: float | None = None,
    rounds: int = 5,
    **changes: Any,
) -> dict[str, Any]:
    """Cuts, evaluates, heals, evaluates, and measures the speed: what is in RESULTS/NAME.json."""
    epochs = TENTH * run.config.epochs if epochs is None else epochs
    run.follow_up(epochs, **changes)  # raises before anything is cut
    if rounds < 1:
        raise ValueError(f"--rounds is at least 1, got {rounds}")
    before = run.evaluated(run.params)
    print(f"dense: {run.program.task.said(before)}", flush=True)
    small = cut(run, units, heads, blocks, windows, seed)
    params = {"dense": run.params, "small": small.params}
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}
    config = run.program_config
    programs = {
        "dense": run.program, "small": make_program(smaller_config(config, small.model), run.program.task.dataset)
    }  # fmt: skip
    after = run.evaluated(small.params, programs["small"])
    print(f"cut to {sizes['small']:,} of {sizes['dense']:,} params: {run.program.task.said(after)}", flush=True)
    params["small"], healed = heal(run, small, workdir, epochs, **changes)
    print(f"healed: {run.program.task.said(healed)}", flush=True)
    found = {
        "run": run.fingerprint, "units": units, "heads": heads, "blocks": list(small.blocks), "windows": windows,
        "seed": seed, "widths": {name: getattr(small.model, name) for name in WIDTHS}, "params": sizes,
        "kept": block_weights(small.params) / block_weights(run.params), "epochs": epochs,
        "steps": healed["steps"], "tokens": healed["tokens"], "dense_tokens": run.result["tokens"],
        "heal_seconds": healed["seconds"], "dense": before, "cut": after,
        "healed": {name: value for name, value in healed.items() if name.startswith(("validation", "test"))},
    }  # fmt: skip
    found["seconds"] = speeds(programs, params, rounds)
    found["times_faster"] = {what: each["dense"] / each["small"] for what, each in found["seconds"].items()}
    return found


def as_markdown(found: Mapping[str, Any], command: str) -> str:
    """The page of the results."""
    widths, speed, seconds = found["widths"], found["times_faster"], found["seconds"]
    bits = "test_bits_per_byte" in found["dense"]
    key, name = ("test_bits_per_byte", "bits a byte") if bits else ("test_loss", "nats a token")
    rows = [("dense", found["dense"]), ("cut", found["cut"]), ("healed", found["healed"])]
    more = found["healed"]["test_loss"] / found["dense"]["test_loss"] - 1
    lines = [
        "# Smaller for good", "",
        f"{found['units']:.0%} of the MLP units and {found['heads']:.0%} of the heads cut"
        + (f", and {len(found['blocks'])} of the blocks" if found["blocks"] else "")
        + f": {widths['num_heads']} heads and {widths['mlp_width']} units in each of {widths['num_layers']}, "
        f"{found['params']['small']:,} of {found['params']['dense']:,} params, {found['kept']:.1%} of the weights of "
        f"the blocks. Healed by distillation from the dense network on {found['tokens']:,} tokens, "
        f"{found['tokens'] / found['dense_tokens']:.0%} of those that it was trained on.", "",
        f"| | held-out loss ({name}) |", "| --- | --- |",
        *(f"| {what} | {row[key]:.4f} |" for what, row in rows), "",
        f"The loss is {abs(more):.1%} {'above' if more >= 0 else 'below'} that of the dense network. A step takes "
        f"{1e3 * seconds['train_step']['small']:.1f} ms instead of {1e3 * seconds['train_step']['dense']:.1f} ms, "
        f"{speed['train_step']:.2f} times as fast; generating {TEXTS} texts side by side "
        f"{seconds['generate']['small']:.3f} s instead of {seconds['generate']['dense']:.3f} s, "
        f"{speed['generate']:.2f} times as fast. Medians of rounds in which both take turns.", "",
        f"`{command}`, JAX {jax.__version__} on {jax.devices()[0].device_kind}.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; what the user can set right is told in a line, without a traceback."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.cut", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=as_path, required=True, help="folder of a dense run of a GPT that is finished")
    parser.add_argument("--units", type=float, default=0.5, help="share of the MLP units to cut (%(default)s)")
    parser.add_argument("--heads", type=float, default=0.25, help="share of the heads to cut (%(default)s)")
    parser.add_argument("--blocks", type=int, default=0, help="how many blocks to cut (%(default)s)")
    parser.add_argument("--windows", type=int, default=64, help="windows to calibrate with (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of their draw (%(default)s)")
    parser.add_argument("--heal_epochs", type=float, help="how long to heal; by default a tenth of the run")
    parser.add_argument("--rate", type=float, default=1.0, help="times the run's learning rate (%(default)s)")
    parser.add_argument("--distill_weight", type=float, default=0.5, help="of the teacher in the loss (%(default)s)")
    parser.add_argument("--distill_temperature", type=float, default=2.0, help="that softens it (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="in which speeds are measured (%(default)s)")
    parser.add_argument("--workdir", type=as_path, help="folder of the run that heals; by default beside RUN")
    parser.add_argument("--results", type=as_path, default=Path("results"), help="folder to write to (%(default)s)")
    parser.add_argument("--name", type=not_empty, default="cut", help="of the files there (%(default)s)")
    parser.add_argument("--data_dir", type=not_empty, help="where the data of the run are, if not where they were")
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.WARNING)
    workdir = args.workdir or args.run.with_name(f"{args.run.name}_{args.name}")
    file = args.results / f"{args.name}.json"
    names = ("units", "heads", "blocks", "windows", "seed", "rounds", "rate", "distill_weight", "distill_temperature")
    with errors_in_a_line():
        run = open_finished(args.run, args.data_dir)
        options = {name: getattr(args, name) for name in names}
        found = cut_and_heal(run, workdir, epochs=args.heal_epochs, **options)
        args.results.mkdir(parents=True, exist_ok=True)
        write_json(file, found)
        command = " ".join(["python -m experiments.cut", *(sys.argv[1:] if argv is None else argv)])
        file.with_suffix(".md").write_text(page := as_markdown(found, command))
        print(page)


if __name__ == "__main__":
    main()
