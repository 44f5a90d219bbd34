"""Train steps of ResNet-50 on ImageNet: each method beside the dense network, in turn, on images made up on the device.

The whole step that ``experiments.train`` runs: augmented images in, gradients, optimizer, masks. On the steps that are
compared no mask changes, but for rda and gates, whose masks change on every step; one mask update is timed beside them.

Usage: ``python -m benchmarks.imagenet`` on a CPU; ``--size=224 --batch=256 --dtype=bfloat16 --steps=20`` on a GPU
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import timing
from configs import imagenet
from experiments import build, data, program

EXPERIMENTS = ["sparse_momentum_10", "rda", "dep_l0_forward", "l0_hc", "asni_80"]
EVERY_STEP = ("rda", "dep_l0_forward", "dep_l0_backward", "l0_hc")  # whose masks change on every step


class Steps:
    """Steps of one experiment, which go on where the last ones ended."""

    def __init__(self, experiment: str, dense: bool, options: argparse.Namespace):
        config = imagenet.get_config(experiment)
        config.dense = dense
        config.model.dtype = options.dtype
        config.model.width = options.width
        config.data.image_size, config.data.batch_size = options.size, options.batch
        nothing = range(1_281_167)  # as many as ImageNet has; none is read
        mean, std = (255 * np.asarray(x, np.float32) for x in (config.data.mean, config.data.std))
        made = program.make_program(config, data.Dataset(nothing, range(0), range(0), 1000, mean, std))
        self.step = made.train_step
        self.state = made.init(0)
        draw = np.random.RandomState(0)
        images = draw.randint(0, 256, (options.batch, *made.task.shape), np.uint8)
        numbers = np.arange(options.batch, dtype=np.int32)
        labels = draw.randint(0, 1000, options.batch).astype(np.int32)
        self.batch = jax.device_put((images, labels, numbers))
        self.update_every = build.update_every(config, len(nothing) // options.batch)

    def __call__(self, steps: int):
        loss = None
        for _ in range(steps):
            self.state, measured = self.step(self.state, self.batch, 1)
            loss = measured["losses"]
        return loss

    def mask_update(self):
        """Seconds of the step on which masks change."""
        state = optax.tree.set(self.state.opt_state, count=jnp.asarray(self.update_every, jnp.int32))
        state = jax.tree.map(jnp.copy, state)  # each count an array of its own, to be donated
        self.state = jax.block_until_ready(self.state._replace(opt_state=state))
        start = time.perf_counter()
        jax.block_until_ready(self(1))
        return time.perf_counter() - start


def measure(sparse, dense, steps, rounds):
    """Median seconds of a step of each, the quartiles of sparse / dense speed, and seconds that a mask update adds."""
    seconds = timing.rounds_of({"dense": lambda: dense(steps), "sparse": lambda: sparse(steps)}, rounds)
    median = {name: statistics.median(times) / steps for name, times in seconds.items()}
    quartiles = statistics.quantiles([a / b for a, b in zip(seconds["dense"], seconds["sparse"], strict=True)], n=4)
    update = statistics.median(sparse.mask_update() for _ in range(5)) - median["sparse"]
    return median, quartiles, update


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="+", default=EXPERIMENTS, help="of configs/imagenet.py")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--batch", type=int, default=16, help="images")
    parser.add_argument("--width", type=float, default=1.0, help="factor of all channel numbers")
    parser.add_argument("--dtype", default="float32", help="of the computation, or bfloat16")
    parser.add_argument("--steps", type=int, default=2, help="a turn")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    rows = []
    for experiment in options.experiments:  # one after another: each pair has the memory to itself
        sparse = Steps(experiment, False, options)
        dense = Steps(experiment, True, options)  # by the same optimizer
        median, (low, ratio, high), update = measure(sparse, dense, options.steps, options.rounds)
        rows.append(
            [
                experiment,
                *(f"{options.batch / median[name]:.1f}" for name in ("dense", "sparse")),
                f"{ratio:.3f}",
                f"{low:.3f} to {high:.3f}",
                "every step" if experiment in EVERY_STEP else f"{1000 * update:.0f} ms",
            ]
        )
        print(rows[-1], flush=True)
        del sparse, dense
    timing.save(
        "imagenet",
        "Train steps of ResNet-50 on made-up images",
        ["config", "dense, images/s", "sparse, images/s", "sparse / dense", "middle half of rounds", "a mask update"],
        rows,
        f"{options.size} x {options.size} pixels, batches of {options.batch}, {options.dtype}, width {options.width}: "
        f"medians of {options.rounds} rounds of {options.steps} steps, sparse and dense in turn. Dense is the same "
        "optimizer without the method, and sparse / dense the median of what the rounds give, not of the two columns "
        "before. What a mask update costs is beyond a step without one.",
    )


if __name__ == "__main__":
    main()
