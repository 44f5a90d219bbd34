"""Train steps per second and memory of the CIFAR networks: dual averaging, sparse momentum, and dense.

The trainer's own program, augmentation included, on random images, each network and method in a process of its own, so
that the peak of its memory is seen. The alternatives do not take turns: compare rows that differ a lot.

Usage: ``python -m benchmarks.cifar [--networks vgg16 resnet20] [--steps 10] [--batch 128] [--dtype float32]``;
``taskset -c 0 python -m benchmarks.cifar --cores=1`` for one core.
"""

import argparse
import json
import os
import resource
import runpy
import subprocess
import sys
import time

import jax
import numpy as np

from benchmarks import timing
from experiments import data
from experiments.program import make_program

METHODS = ("dense", "rda", "sparse momentum")


def measure(network, method, steps, batch, dtype):
    """Steps a second of a chunk after the first, and the peak of the memory in MiB."""
    config = runpy.run_path("configs/cifar_rda.py")["get_config"](network)
    if method == "sparse momentum":
        model = config.model
        config = runpy.run_path("configs/cifar10_sparse_momentum.py")["get_config"]()
        config.model = model
    config.dense, config.data.batch_size, config.model.dtype = method == "dense", batch, dtype
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (50_000, 32, 32, 3)).astype(np.uint8)
    train = data.Split(images, random.randint(0, 10, 50_000).astype(np.int32))
    nothing = data.Split(images[:0], train.labels[:0])
    dataset = data.Dataset(train, nothing, nothing, 10, *np.float32([[122.0] * 3, [63.0] * 3]))
    program = make_program(config, dataset)
    on_device = dataset._replace(train=jax.device_put(dataset.train))
    start = time.perf_counter()
    state, _ = jax.block_until_ready(program.train_chunk(program.init(0), on_device, 0, steps))
    compiling = time.perf_counter() - start
    times = []
    for i in range(1, 4):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(program.train_chunk(state, on_device, i * steps, steps))
        times.append(time.perf_counter() - start)
    device = jax.devices()[0].memory_stats()
    peak = device["peak_bytes_in_use"] / 2**20 if device else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"speed": steps / float(np.median(times)), "memory": peak, "first": compiling}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--networks", nargs="+", default=["vgg16", "resnet20"], help="arguments of configs/cifar_rda.py"
    )
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="how many there are for it, for the table")
    parser.add_argument("--steps", type=int, default=10, help="in each of three timed chunks")
    parser.add_argument("--batch", type=int, default=128, help="images a step")
    parser.add_argument("--dtype", default="float32", help="of the computation, or bfloat16")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # network,method: what the processes are told
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one.split(","), args.steps, args.batch, args.dtype)))
        return
    rows = []
    for network in args.networks:
        for method in METHODS:
            options = [f"--steps={args.steps}", f"--batch={args.batch}", f"--dtype={args.dtype}"]
            command = [sys.executable, "-m", "benchmarks.cifar", f"--one={network},{method}", *options]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            speed = found["speed"]
            rows.append([
                network, method, f"{speed:.2f}", f"{speed * args.batch:.0f}", f"{found['memory']:.0f}",
                f"{found['first']:.0f}",
            ])  # fmt: skip
    timing.save(
        "cifar",
        f"Training the CIFAR networks, batches of {args.batch}, {args.dtype}",
        ["network", "method", "steps/s", "images/s", "peak memory, MiB", "first chunk, s"],
        rows,
        f"Medians of three chunks of {args.steps} steps; the first, with its compilation, apart. Memory is that of the "
        "device, or of the whole process where the CPU is the device, data included"
        + (f"; {args.cores} of {os.cpu_count()} cores." if jax.default_backend() == "cpu" else "."),
    )


if __name__ == "__main__":
    main()
