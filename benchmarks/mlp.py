"""Train steps per second of an MLP of 2,048 units a layer: dense, by single weights, by blocks that are skipped.

The trainer's own program (``configs/mnist_mlp.py``), a fifth of an epoch at a time, the alternatives in turn; masks
change once in five turns. The images are random: what they show does not change the speed.

Usage: ``python -m benchmarks.mlp [--batches 100 500] [--rounds 5]``
"""

import argparse
import runpy
import statistics

from benchmarks import timing
from benchmarks.training import random_images, trains

PARTS = 5  # of an epoch
ALTERNATIVES = {
    "dense": ("weights", {"dense": True}),
    "weights": ("weights", {}),
    "blocks": ("blocks", {}),
    "blocks, dense gradients on 20 steps": ("blocks", {"dense_gradient_steps": 20}),
}


def alternative(unit, changes, batch, steps):
    """A function that trains a part of an epoch, each call the next."""
    config = runpy.run_path("configs/mnist_mlp.py")["get_config"](unit)
    config.data.batch_size = batch
    config.update_from_flattened_dict(changes)
    return trains(config, random_images(steps * PARTS * batch), steps)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[100, 500], help="images a batch")
    parser.add_argument("--steps", type=int, default=40, help="in a turn; masks change after five turns")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each")
    args = parser.parse_args()

    rows = []
    for batch in args.batches:
        runs = {name: alternative(*how, batch, args.steps) for name, how in ALTERNATIVES.items()}
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
