"""Train steps per second of an MLP of 2,048 units a layer: dense, by single weights, by blocks that are skipped.

The trainer's own program (``configs/mnist_mlp.py``), a fifth of an epoch at a time, the alternatives in turn; masks
change once in five turns. The images are random: what they show does not change the speed.

Usage: ``python -m benchmarks.mlp [--batches 100 500] [--rounds 5]``
"""

import argparse
import itertools
import runpy
import statistics

import jax
import numpy as np

from benchmarks import timing
from experiments import data
from experiments.program import make_program

PARTS = 5  # of an epoch
ALTERNATIVES = {
    "dense": ("weights", {"dense": True}),
    "weights": ("weights", {}),
    "blocks": ("blocks", {}),
    "blocks, dense gradients on 20 steps": ("blocks", {"sparsity.dense_gradient_steps": 20}),
}


def random_images(steps, batch):
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (steps * batch, 28, 28, 1)).astype(np.uint8)
    train = data.Split(images, random.randint(0, 10, steps * batch).astype(np.int32))
    nothing = data.Split(images[:0], train.labels[:0])
    return data.Dataset(train, nothing, nothing, 10, np.float32([33.3]), np.float32([78.6]))


def trains(unit, changes, batch, steps):
    """A function that trains a part of an epoch, each call the next."""
    config = runpy.run_path("configs/mnist_mlp.py")["get_config"](unit)
    config.data.batch_size = batch
    config.update_from_flattened_dict(changes)
    dataset = random_images(steps * PARTS, batch)
    program = make_program(config, dataset)
    state, on_device, parts = program.init(0), jax.device_put(dataset), itertools.count()

    def run():
        nonlocal state
        state, measured = program.train_chunk(state, on_device, steps * next(parts), steps)
        return measured

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[100, 500], help="images a batch")
    parser.add_argument("--steps", type=int, default=40, help="in a turn; masks change after five turns")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each")
    args = parser.parse_args()

    rows = []
    for batch in args.batches:
        runs = {name: trains(*how, batch, args.steps) for name, how in ALTERNATIVES.items()}
        seconds = timing.rounds_of(runs, args.rounds)
        for name, times in seconds.items():
            against = [dense / ours for dense, ours in zip(seconds["dense"], times, strict=True)]
            rows.append([
                str(batch), name, f"{args.steps / statistics.median(times):.1f}", f"{statistics.median(against):.2f}",
                f"{min(against):.2f} to {max(against):.2f}",
            ])  # fmt: skip
            print(" | ".join(rows[-1]), flush=True)
    timing.save(
        "mlp",
        "Training an MLP of 2,048 units a layer with block sparse momentum",
        ["batch", "kept by", "steps/s", "of dense", "range"],
        rows,
        f"784-2048-2048-10, 10% of the weights kept, SGD with Nesterov momentum. {args.rounds} turns of {args.steps} "
        "steps each; masks change every five turns, and that step is in it. All weights have gradients, or with 20 "
        "steps only those of the last 20 steps before a change.",
    )


if __name__ == "__main__":
    main()
