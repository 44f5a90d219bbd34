"""Pruning a GPT of random weights after training: seconds and peak memory, beside forward passes of the same batches.

Every alternative runs in a process of its own, whose time includes compiling and whose memory is that of the whole
process. Forward passes are those that compute the logits, jitted.

Usage: ``python -m benchmarks.prune_once [--rules magnitude wanda sparsegpt] [--ways weight 2:4 scan] [--blocks 12]``;
"scan" is single weights of a model whose blocks are scanned.
"""

import argparse
import itertools
import multiprocessing
import resource
import time

from benchmarks import timing

FORWARD = "forward passes"
WAYS = ("weight", "2:4", "scan")


def run(rule, way, args, queue):
    """One alternative, in a process of its own."""
    import jax
    import numpy as np

    from jaxsparse import models, n_of_m
    from jaxsparse.post_training import prune_once

    model = models.GPT(
        args.vocabulary, width=args.width, num_layers=args.blocks, num_heads=args.width // 64, max_length=args.length,
        scan=way == "scan",
    )  # fmt: skip
    shape = args.sequences // args.batches, args.length
    batches = [np.random.default_rng(i).integers(0, args.vocabulary, shape, np.int32) for i in range(args.batches)]
    params = jax.block_until_ready(jax.jit(model.init)(jax.random.key(0), batches[0])["params"])
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    before = resource.getrusage(resource.RUSAGE_SELF)

    def apply(params, tokens):
        return model.apply({"params": params}, tokens)

    start = time.perf_counter()
    if rule == FORWARD:
        step = jax.jit(apply)
        for batch in batches:
            jax.block_until_ready(step(params, batch))
    else:
        structure = n_of_m(2, 4) if way == "2:4" else "weight"
        jax.block_until_ready(prune_once(apply, params, batches, rule, args.sparsity, structure=structure))
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    queue.put((weights, seconds, after.ru_utime - before.ru_utime, before.ru_maxrss, after.ru_maxrss))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", default=["magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=20_000)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--batches", type=int, default=4, help="that the sequences come in")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows = []
    for way, rule in itertools.product(args.ways, (FORWARD, *args.rules)):
        if (way, rule) == ("2:4", FORWARD):
            continue  # those of single weights
        queue = context.Queue()
        process = context.Process(target=run, args=(rule, way, args, queue))
        process.start()
        process.join()
        weights, seconds, of_cpu, before, peak = queue.get(timeout=1)
        name = rule if way == "weight" else f"{rule}, {way}"
        rows.append([name, f"{seconds:.1f}", f"{of_cpu:.1f}", f"{before / 2**20:.2f}", f"{peak / 2**20:.2f}"])
        print(timing.line(rows[-1]), flush=True)
    timing.save(
        "prune_once",
        "Pruning a GPT after training",
        ["", "seconds", "of CPU time", "GiB before", "GiB at most"],
        rows,
        f"{weights / 1e6:.0f} million weights: width {args.width}, {args.blocks} blocks; {args.sequences} sequences of "
        f"{args.length} tokens. Seconds include compiling.",
    )


if __name__ == "__main__":
    main()
