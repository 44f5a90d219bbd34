"""The train step of ResNet-50 on ImageNet, compiled for slices of TPUs, without a TPU: does it fit, what does it send?

Needs the compiler, libtpu, which `make test` puts into .venv/tpu: set TPU_LIBRARY_PATH to its libtpu.so.

Usage: ``JAX_PLATFORMS=cpu python -m benchmarks.tpu_compile``; ``--topologies v5e:4x4 --layouts pmap`` for one of them
"""

import argparse
import collections
import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import timing
from configs import imagenet
from experiments import data, program
from jaxsparse.parallel import AXIS, DeviceLayout

GIB = 2**30
MEMORY = {"v5e": 16 * GIB, "v6e": 32 * GIB, "v5p": 95 * GIB, "v4": 32 * GIB}  # of a chip
COLUMNS = ["compiled in", "peak memory a chip", "arguments", "a chip and step"]
COLUMNS += ["collectives of a step, and what they give"]
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}


def shapes_of(layout: DeviceLayout, state, batch):
    """What the compiled step takes, as shapes: of all devices, whichever process has them."""
    if layout.name != "pmap":
        sharding = NamedSharding(layout.mesh, PartitionSpec(AXIS))
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch)
        return layout.collected_shapes(state), batch
    n = layout.size
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype), state)
    return state, jax.tree.map(lambda x: jax.ShapeDtypeStruct((n, x.shape[0] // n, *x.shape[1:]), x.dtype), batch)


def sent(text: str) -> dict[str, tuple[int, int]]:
    """How many collective operations of each kind the compiled program has, and how many bytes they give."""
    found: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({KINDS})(?:-start)?\(", line)
        if match:
            found[match[2]][0] += 1
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
                found[match[2]][1] += BYTES.get(dtype, 4) * math.prod(int(n) for n in shape.split(",") if n)
    return {kind: (number, size) for kind, (number, size) in found.items()}


def compile_step(topology: str, layout: str, experiment: str, images: int, size: int) -> list[str]:
    """A row of the table."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    config = imagenet.get_config(experiment)
    config.model.dtype = "bfloat16"
    config.data.image_size = size
    config.data.batch_size = images * len(devices)
    config.parallel.layout = layout
    nothing = range(1_281_167)  # as many as ImageNet has; none is read
    mean, std = (255 * np.asarray(x, np.float32) for x in (config.data.mean, config.data.std))
    dataset = data.Dataset(nothing, range(0), range(50_000), 1000, mean, std)
    made = program.make_program(config, dataset, devices=devices)
    batch = (
        jax.ShapeDtypeStruct((config.data.batch_size, *made.task.shape), jnp.uint8),
        jax.ShapeDtypeStruct((config.data.batch_size,), jnp.int32),
        jax.ShapeDtypeStruct((config.data.batch_size,), jnp.int32),
    )
    state, batch = shapes_of(made.layout, jax.eval_shape(made.init, 0), batch)
    return [
        f"{topology} ({len(devices)})",
        layout,
        experiment,
        str(images),
        *compiled_as(made.train_step.lower(state, batch, 1), topology),
    ]


def compiled_as(lowered, topology: str) -> list[str]:
    """Seconds of compiling, memory, arguments and operations of a chip, and collectives: the last columns."""
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    (cost,) = [compiled.cost_analysis()] if isinstance(compiled.cost_analysis(), dict) else compiled.cost_analysis()
    available = MEMORY[topology.partition(":")[0]]
    traffic = ", ".join(f"{n} {kind} ({b / 1e6:.1f} MB)" for kind, (n, b) in sorted(sent(compiled.as_text()).items()))
    return [
        f"{seconds:.0f} s",
        f"{memory.peak_memory_in_bytes / GIB:.1f} of {available / GIB:.0f} GiB",
        f"{memory.argument_size_in_bytes / 2**20:.0f} MiB",
        f"{cost['flops'] / 1e12:.2f} TFLOP",
        traffic or "none",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topologies", nargs="+", default=["v5e:4x4", "v5e:8x8"])
    parser.add_argument("--layouts", nargs="+", default=["pmap", "fsdp"])
    parser.add_argument("--experiments", nargs="+", default=["sparse_momentum_10"], help="of configs/imagenet.py")
    parser.add_argument("--images", type=int, default=256, help="a chip")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    options = parser.parse_args()
    head = ["slice (chips)", "layout", "config", "images a chip", *COLUMNS]
    rows = []
    for topology in options.topologies:
        for layout in options.layouts:
            for experiment in options.experiments:
                rows.append(compile_step(topology, layout, experiment, options.images, options.size))
                print(rows[-1], flush=True)
    timing.save(
        "tpu_compile",
        "ResNet-50's train step, compiled for slices of TPUs",
        head,
        rows,
        f"{options.size} x {options.size} pixels, bfloat16. Compiled by libtpu without a TPU: nothing was run, and the "
        "time is this machine's. Where a chip's memory does not do, the compiler ends with an error. Memory, arguments "
        "(images and state) and operations are of one chip, as XLA counts them. What is a reduce-scatter elsewhere is "
        "an all-reduce and a slice in one on these chips.",
    )


if __name__ == "__main__":
    main()
