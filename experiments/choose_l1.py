"""How to choose the l1 of reweighted_l1 behind Adam and SGD: weights kept, by l1 times the sum of the step sizes.

  python -m experiments.choose_l1 [--seeds 3] [--only "Adam, 0.001"]

trains LeNet-300-100 on scikit-learn's digits with l1 = pull / sum of the step sizes, for the same pulls behind every
optimizer, and writes results/choose_l1.md: weights kept and test accuracy. It takes some minutes on two CPU cores.
"""

import argparse
import datetime
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxsparse
from experiments import data
from experiments.results.table import markdown, mean_and_error, with_error
from jaxsparse import models

BATCH = 32
PULLS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3)


class Setting(NamedTuple):
    """An optimizer with a constant step size, the number of epochs, and whether it starts from a trained network."""

    optimizer: str
    step_size: float
    epochs: int
    trained: bool = False

    def __str__(self) -> str:
        start = ", from a trained network" if self.trained else ""
        return f"{self.optimizer}, {self.step_size:g}, {self.epochs} epochs{start}"

    def make(self, l1: jax.Array | float) -> optax.GradientTransformation:
        """The optimizer with its link."""
        optimizers = {
            "Adam": optax.adam,
            "SGD": optax.sgd,
            "SGD, momentum 0.9": functools.partial(optax.sgd, momentum=0.9),
        }
        link = jaxsparse.reweighted_l1(self.step_size, l1=l1)
        return optax.chain(optimizers[self.optimizer](self.step_size), link)


# An SGD step with momentum 0.9 goes ten times as far as its step size says; the link is told the step size alone.
SETTINGS = (
    Setting("Adam", 1e-3, 60),
    Setting("Adam", 1e-3, 300),
    Setting("Adam", 3e-3, 60),
    Setting("Adam", 3e-4, 60),
    Setting("Adam", 1e-4, 60),
    Setting("Adam", 1e-4, 60, trained=True),
    Setting("SGD", 0.1, 60),
    Setting("SGD, momentum 0.9", 0.1, 60),
)


class Measured(NamedTuple):
    """The results with one l1: the share of the weights kept and the test accuracy of each seed, in %."""

    l1: float
    kept: list[float]
    accuracy: list[float]


def measure(setting: Setting, pulls: Sequence[float], seeds: int) -> list[Measured]:
    """One result for each pull."""
    dataset, model = data.load("digits"), models.LeNet300100()
    images, test = (data.normalise(jnp.asarray(part.images), dataset) for part in (dataset.train, dataset.test))
    labels = jnp.asarray(dataset.train.labels)
    steps = len(labels) // BATCH

    def loss(params, batch):
        logits = model.apply({"params": params}, images[batch])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

    def train(params, tx, epochs, key):
        def step(carry, batch):
            params, opt_state = carry
            updates, opt_state = tx.update(jax.grad(loss)(params, batch), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        def epoch(carry, key):
            order = jax.random.permutation(key, len(labels))[: steps * BATCH]
            return jax.lax.scan(step, carry, order.reshape(steps, BATCH))

        return jax.lax.scan(epoch, (params, tx.init(params)), jax.random.split(key, epochs))[0]

    @jax.jit
    def run(l1, seed):
        init_key, dense_key, key = jax.random.split(jax.random.key(seed), 3)
        params = model.init(init_key, images[:1])["params"]
        if setting.trained:
            params, _ = train(params, optax.adam(1e-3), 30, dense_key)
        params, opt_state = train(params, setting.make(l1), setting.epochs, key)
        correct = model.apply({"params": params}, test).argmax(-1) == dataset.test.labels
        return jaxsparse.density(jaxsparse.get_masks(opt_state, params)), correct.mean()

    measured = []
    for pull in pulls:
        l1 = pull / (setting.step_size * setting.epochs * steps)
        kept, accuracy = zip(*(run(l1, seed) for seed in range(seeds)), strict=True)
        measured.append(Measured(l1, [100 * float(x) for x in kept], [100 * float(x) for x in accuracy]))
    return measured


def as_markdown(found: Mapping[Setting, Sequence[Measured]], pulls: Sequence[float], seeds: int, command: str) -> str:
    """The page of results, with a table that has a column for each pull."""
    import pandas as pd

    def cells(of_each):
        return [with_error(*mean_and_error(values), ".1f", ".2f") for values in of_each]

    rows = []
    for setting, measured in found.items():
        rows += [
            [f"**{setting}**: l1", *(f"{m.l1:.1e}" if m.l1 else "0" for m in measured)],
            ["weights kept (%)", *cells(m.kept for m in measured)],
            ["test accuracy (%)", *cells(m.accuracy for m in measured)],
        ]
    lines = [
        "# Choosing the l1 of reweighted_l1: LeNet-300-100 on digits",
        "",
        f"`{command}`, JAX {jax.__version__} on {jax.default_backend()}, {datetime.date.today()}. Mean ± standard "
        f"error of {seeds} seeds.",
        "",
        "Each optimizer with its step size, constant, and the epochs that it trains, in batches of "
        f"{BATCH}. Pull: l1 times the sum of the step sizes, so l1 = pull / (step size x steps). A trained network: 30 "
        "epochs of Adam, 0.001, without the link.",
        "",
        *markdown(pd.DataFrame(rows, columns=["pull", *(f"{pull:g}" for pull in pulls)])),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.choose_l1",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="print what has it in its name, and write nothing")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds is at least 1, got {args.seeds}")
    chosen = [setting for setting in SETTINGS if args.only in str(setting)]
    if not chosen:
        parser.error(f"--only={args.only}: there are {'; '.join(map(str, SETTINGS))}")
    page = Path("results/choose_l1.md")
    if not args.only:
        page.parent.mkdir(exist_ok=True)  # minutes before there is something to write
    found = {}
    for setting in chosen:
        found[setting] = measure(setting, PULLS, args.seeds)
        print(f"measured: {setting}", flush=True)
    command = "python -m experiments.choose_l1" + (f" --seeds {args.seeds}" if args.seeds != 3 else "")
    text = as_markdown(found, PULLS, args.seeds, command)
    print(text)
    if not args.only:
        page.write_text(text)


if __name__ == "__main__":
    main()
