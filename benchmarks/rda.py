"""What one update of generalised dual averaging costs on a ResNet-50, by the bytes that it has to move.

Times ``tx.update`` and ``optax.apply_updates``, jitted, with params and state donated, on 25.6 million parameters: SGD
with momentum, and :func:`jaxsparse.rda` with each structure. Bytes are those of the arrays that an update cannot do
without reading or writing; whatever else it touches shows in the time.

Usage: ``python -m benchmarks.rda [--rounds 15]``
"""

import argparse
import functools

import jax
import optax

import jaxsparse
from benchmarks import networks, timing
from benchmarks.update import runner

# Reads and writes of 4 bytes a parameter. SGD: gradient, param, velocity in; param, velocity out.
DENSE = 4 * 5
# Besides: y in and out, and the param once more, for the layer's largest average; with single weights the threshold in
# and out, the average r in twice and out.
GROUPS = DENSE + 4 * 3
WEIGHTS = GROUPS + 4 * 5
HALVES = GROUPS + 2 * 5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each alternative")
    args = parser.parse_args()

    params, *grads = (networks.resnet50(seed) for seed in range(3))
    step_size, averaging = jaxsparse.rda_cosine(1.0, 10_000)
    alternatives = {"SGD momentum": (optax.sgd(0.1, momentum=0.9), DENSE)}
    rda = functools.partial(jaxsparse.rda, step_size, l1=1e-6, averaging=averaging)
    for structure, size in (("weight", WEIGHTS), ("kernel", GROUPS), ("channel", GROUPS)):
        alternatives[f"rda, {structure}"] = (rda(structure=structure), size)
    alternatives["rda, weight, state in bfloat16"] = (rda(state_dtype="bfloat16"), HALVES)
    runs = {name: runner(tx, params, grads) for name, (tx, _) in alternatives.items()}
    median = timing.interleaved(runs, args.rounds)
    dense = median["SGD momentum"] / DENSE
    count = sum(p.size for p in params.values())
    rows = []
    for name, (tx, size) in alternatives.items():
        held = sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))
        rows.append([
            name, f"{1e3 * median[name]:.1f}", f"{median[name] / median['SGD momentum']:.2f}", f"{size}",
            f"{median[name] / size / dense:.2f}", f"{held / count:.1f}",
        ])  # fmt: skip
    timing.save(
        "rda",
        f"One update of generalised dual averaging, a ResNet-50 ({count / 1e6:.1f} million parameters)",
        ["optimizer", "ms", "times", "bytes moved a parameter", "time per byte, times", "state, bytes a parameter"],
        rows,
        f"Medians of {args.rounds} rounds, alternatives in turn.",
    )


if __name__ == "__main__":
    main()
