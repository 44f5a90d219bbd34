"""Train steps per second of the LeNets: sparse momentum, dense, and the dense network in PyTorch.

Ours is the trainer's own program (``configs/mnist_sparse_momentum.py``), an epoch of 540 batches of 100 with its mask
update. PyTorch's, on one thread, is written as its users do, once with a ``DataLoader`` and once with batches indexed
from tensors in memory. The images are random: what they show does not change the speed.

Usage: ``python -m benchmarks.training [--rounds 5]``, with PyTorch installed (``pip install torch``) for its columns;
``taskset -c 0 python -m benchmarks.training --cores=1`` for one core.
"""

import argparse
import functools
import itertools
import os
import runpy
import statistics

import jax
import numpy as np

from benchmarks import timing
from experiments import data
from experiments.program import make_program

try:
    import torch
    from torch import nn
except ImportError:
    torch = None

STEPS = 540


def random_images(count):
    """MNIST as the trainer holds it, but noise, and with nothing to evaluate on."""
    random = np.random.RandomState(0)
    train = data.Split(random.randint(0, 256, (count, 28, 28, 1)).astype(np.uint8), random.randint(0, 10, count))
    train = train._replace(labels=train.labels.astype(np.int32))
    nothing = data.Split(train.images[:0], train.labels[:0])
    return data.Dataset(train, nothing, nothing, 10, np.float32([33.3]), np.float32([78.6]))


def trains(config, dataset, steps):
    """A function that trains so many steps, each call the next."""
    program = make_program(config, dataset)
    state, turns = program.init(0), itertools.count()
    on_device = dataset._replace(train=jax.device_put(dataset.train))

    def run():
        nonlocal state
        state, measured = program.train_chunk(state, on_device, steps * next(turns), steps)
        return measured

    return run


def ours(model, dataset, dense):
    """A function that trains an epoch, each call the next."""
    config = runpy.run_path("configs/mnist_sparse_momentum.py")["get_config"](model)
    config.dense = dense
    return trains(config, dataset, STEPS)


def torch_network(model):
    if model == "lenet_300_100":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
        )
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)),
    )


def theirs(model, dataset, steps, with_loader):
    """A function that trains that many steps of the dense network in PyTorch."""
    images = torch.tensor((dataset.train.images.transpose(0, 3, 1, 2) - dataset.mean[0]) / dataset.std[0])
    labels = torch.tensor(dataset.train.labels).long()
    network, loss_fn = torch_network(model), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 100, shuffle=True)

    def indexed():
        for rows in torch.randperm(len(labels)).split(100):
            yield images[rows], labels[rows]

    def run():
        for batch, target in itertools.islice(loader if with_loader else indexed(), steps):
            optimizer.zero_grad()
            loss_fn(network(batch), target).backward()
            optimizer.step()

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each alternative")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="how many there are for ours, for the table")
    args = parser.parse_args()

    dataset, rows = random_images(100 * STEPS), []
    for model, torch_steps in (("lenet_300_100", STEPS), ("lenet5_caffe", STEPS // 10)):
        runs = {"dense": ours(model, dataset, dense=True), "sparse": ours(model, dataset, dense=False)}
        runs["sparse"]()  # the first epoch has no mask update
        seconds = timing.rounds_of(runs, args.rounds)
        speed = {name: STEPS / statistics.median(times) for name, times in seconds.items()}
        ratio = statistics.median(a / b for a, b in zip(seconds["dense"], seconds["sparse"], strict=True))
        row = [model, f"{speed['dense']:.0f}", f"{speed['sparse']:.0f}", f"{ratio:.3f}"]
        for with_loader in (True, False) if torch else ():
            torch.set_num_threads(1)
            run = functools.partial(theirs, model, dataset, torch_steps, with_loader)()
            peer = torch_steps / timing.interleaved({"torch": run}, args.rounds)["torch"]
            row += [f"{peer:.0f}", f"{speed['sparse'] / peer:.1f}"]
        rows.append(row)
    header = ["network", "dense", "sparse, 5% kept", "sparse / dense"]
    if torch:
        header += ["PyTorch with a DataLoader", "times", "PyTorch indexing tensors", "times"]
    timing.save(
        "training",
        "Train steps per second of the LeNets, batches of 100",
        header,
        rows,
        f"Medians of {args.rounds} rounds, of the ratio too; ours with {args.cores} of {os.cpu_count()} cores"
        + (f", PyTorch {torch.__version__} (dense) with one thread" if torch else "")
        + ". An epoch of ours has one mask update. Times: sparse over PyTorch.",
    )


if __name__ == "__main__":
    main()
