"""The metrics of the smoke runs of all configs by the code of a commit, beside those by the working tree.

Each side trains with its own configs, trainer and library, ``--config.smoke``, in a process of its own, one after the
other. Every number that metrics.jsonl then has, but for times, has to be equal: to the last bit, or with gates to 1e-6
of it or one in the sixth decimal, to which shares are rounded. Instead of the data sets that TensorFlow Datasets would
read there is noise.

Usage: ``python -m benchmarks.same_metrics --against COMMIT [CONFIG ...]``, CONFIG such as ``mnist_rda`` (with all its
arguments), ``mnist_rda:lenet5_caffe``, or ``asni_stages`` (ASNI-I, then II on its masks); all by default. With
``--set dense=True`` that key of the config is changed on both sides. Exits with 1 if anything differs.
"""

import argparse
import json
import math
import os
import runpy
import subprocess
import sys
import tempfile
import unittest.mock
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import against, timing
from benchmarks.processes import ROOT, clean_up_when_stopped

TIMES = ("seconds", "steps_per_second", "speed")
WITH_GATES = "expected_params"  # what their metrics have, and no others'
TOLERANCE = 1e-6
DECIMAL = 1.5e-6  # shares have six decimals, the last of which may be rounded either way
STAGES = "asni_stages"
IMAGES = {"mnist": (28, 28, 1)}  # of the data sets; (32, 32, 3) of the others
CLASSES = {"cifar100": 100, "imagenet2012": 1000}  # 10 in the others


def all_runs() -> list[str]:
    """Every config with every argument that it takes, as ``name:argument``, and the two stages of ASNI."""
    found = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        module = runpy.run_path(str(path))
        if "get_config" in module:
            arguments = [f":{argument}" for argument in module.get("EXPERIMENTS", ())]
            found += [f"{path.stem}{argument}" for argument in arguments or [""]]
    return [*found, STAGES]


def chosen(names: Sequence[str]) -> list[str]:
    """The runs that the command line names, or all.

    Raises:
      ValueError: for a name that is none.
    """
    known = all_runs()
    found = [run for name in names for run in known if name in (run, run.partition(":")[0])]
    if unknown := [name for name in names if not any(name in (run, run.partition(":")[0]) for run in known)]:
        raise ValueError(f"no such config: {unknown[0]}; there are {', '.join(known)}")
    return found if names else known


def train(run: str, workdir: str, changes: Sequence[str]) -> None:
    """Trains one run, with the ``experiments`` that Python finds."""
    from absl import app

    from experiments import command_line, data

    if Path(data.__file__).parents[1] != Path.cwd():
        raise RuntimeError(f"the experiments of {Path.cwd()} are to be run, but {data.__file__} was imported")
    with unittest.mock.patch.object(data, "_from_tfds", noise):
        if run == STAGES:
            names = "asni_1,asni_2_biases,original"
            try:
                from experiments import stages as program

                arguments = ["--config=configs/stages/asni.py:mnist_fc", f"--only={names}", "--seeds=0"]
            except ImportError:  # of old versions
                from experiments import asni as program

                arguments = ["--config=configs/mnist_asni.py:fc", f"--arms={names}"]
        else:
            from experiments import train as program

            name, _, argument = run.partition(":")
            arguments = [f"--config=configs/{name}.py{':' * bool(argument)}{argument}"]
            if name == "imagenet":
                arguments += ["--config.data.streamed=False"]
        arguments += [f"--config.{change}" for change in ("smoke", *changes)]
        sys.argv = ["same_metrics", f"--workdir={workdir}", *arguments]  # where ml_collections looks for changed keys
        app.run(program.main, flags_parser=command_line.parse_flags)


def noise(name: str, data_dir: str | None) -> tuple[Any, Any, int]:
    """Images and labels that go with no data set, in the shapes of this one."""
    import numpy as np

    from experiments import data

    del data_dir
    random, shape, classes = np.random.RandomState(0), IMAGES.get(name, (32, 32, 3)), CLASSES.get(name, 10)
    train, test = (
        data.Split(
            random.randint(0, 256, (44 * 32, *shape)).astype(np.uint8),
            random.randint(0, classes, 44 * 32).astype(np.int32),
        )
        for _ in range(2)
    )
    return train, test, classes


def metrics_of(tree: Path, run: str, changes: Sequence[str]) -> dict[str, Any]:
    """The metrics of a run with the code of a tree: "folder: step: name" -> number.

    Raises:
      RuntimeError: if the run fails; it has the last words of its process.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": f"{tree}{os.pathsep}{ROOT}"}
        command = [sys.executable, "-m", "benchmarks.same_metrics", "--train", run, "--workdir", folder]
        command += [word for change in changes for word in ("--set", change)]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
            raise RuntimeError(next((line for line in lines if "error:" in line.lower()), lines[-1]))
        found = {}
        for path in sorted(Path(folder).rglob("metrics.jsonl")):
            where = str(path.parent.relative_to(folder)) + ": "
            for line in map(json.loads, path.read_text().splitlines()):
                step = f"{'' if where == '.: ' else where}step {line['step']}: "
                found |= {step + name: value for name, value in flat(line) if name.partition("/")[0] not in TIMES}
        return found


def flat(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The numbers of nested mappings, by path."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{path}", number) for path, number in flat(value))
        else:
            yield name, value


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The numbers that are not the same in both, in order, with both values."""
    gates = any(name.endswith(WITH_GATES) for name in old)
    close, apart = (TOLERANCE, DECIMAL) if gates else (0.0, 0.0)
    return [
        f"{name}: {old.get(name, 'not there')} and {new.get(name, 'not there')}"
        for name in [*old, *(name for name in new if name not in old)]
        if name not in old or name not in new or not math.isclose(old[name], new[name], rel_tol=close, abs_tol=apart)
    ]


def compare(commit: str, runs: Sequence[str], changes: Sequence[str]) -> bool:
    """Prints a row for each run, as it is over; whether all are the same."""
    header = ["run", "numbers", "that differ", "of them the first, by the commit and by the working tree"]
    print(f"Smoke runs by {commit} and by the working tree, on {timing.machine()}\n")
    print(timing.line(header), timing.line(["---"] * len(header)), sep="\n", flush=True)
    same = True
    with against.library_of(commit, "experiments", "configs") as tree:
        for run in runs:
            try:
                old, new = (metrics_of(side, run, changes) for side in (tree, ROOT))
                found = differing(old, new)
                row = [run, str(len(old)), str(len(found)), *found[:1]]
            except RuntimeError as error:
                row = [run, "", "failed", str(error).replace("|", "/")]
            print(timing.line([*row, ""][:4]), flush=True)
            same &= row[2] == "0"
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="all by default")
    parser.add_argument("--against", metavar="COMMIT", help="the old version")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the config to change")
    parser.add_argument("--train", help=argparse.SUPPRESS)  # what the processes of both sides are asked
    parser.add_argument("--workdir", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(args.train, args.workdir, args.set)
        return
    if not args.against:
        parser.error("--against COMMIT says which code to compare with")
    clean_up_when_stopped()
    try:
        sys.exit(not compare(args.against, chosen(args.configs), args.set))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
