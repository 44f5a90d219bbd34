"""Products with sparse weights: ours, the dense product, and the dense product with a masked copy of the weights.

Forward, and forward with the gradients of x and w, in one process, the alternatives in turn. The dense product knows of
no mask; "masked copy" is ``x @ (w * mask)`` as XLA compiles it, whose gradient of w is masked too.

Usage: ``python -m benchmarks.kernels``; on a GPU ``python -m benchmarks.kernels --implementation=mosaic_gpu
--dtype=bfloat16 --shapes "4096 cubed" "transformer MLP, in" --peak_tflops=989 --minutes=9``
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from jaxsparse.kernels import block_sparse_matmul, masked_matmul
from jaxsparse.kernels.masked_matmul.arg_specs import BENCHMARKS


def forward(multiply):
    return jax.jit(lambda x, w, mask, dy: multiply(x, w, mask))


def both_ways(multiply):
    def run(x, w, mask, dy):
        y, pull = jax.vjp(lambda x, w: multiply(x, w, mask), x, w)
        return y, *pull(dy)

    return jax.jit(run)


def calls_in(run, args, seconds):
    """How many calls take so many seconds: short ones are timed together, lest the way to the device be what counts."""
    jax.block_until_ready(run(*args))
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    return max(1, min(100, int(seconds / (time.perf_counter() - start))))


def compiled_both(multiplies):
    """Each product forward, and each with both gradients, jitted: masks may change, and nothing is compiled anew."""
    return [{name: ways(multiply) for name, multiply in multiplies.items()} for ways in (forward, both_ways)]


def products(side, implementation):
    """The alternatives: ours is of blocks of that side, or for 1 of single weights."""

    def ours(x, w, mask):
        product = masked_matmul if side == 1 else block_sparse_matmul
        return product(x, w, mask, implementation=implementation)

    return {
        "dense": lambda x, w, mask: x @ w,
        "masked copy": lambda x, w, mask: masked_matmul(x, w, mask, implementation="xla"),
        "ours": ours,
    }


def operands(spec, dtype, random):
    """x, w and the gradient of their product, standard normal."""
    sizes = (spec.rows, spec.inputs), (spec.inputs, spec.outputs), (spec.rows, spec.outputs)
    return [jnp.asarray(random.standard_normal(size, np.float32), dtype) for size in sizes]


def random_blocks(spec, side, density, random):
    """A mask of blocks with that share of them alive, and the same of single weights."""
    shape = spec.inputs // side, spec.outputs // side
    ranks = random.permutation(shape[0] * shape[1]).reshape(shape)
    blocks = jnp.asarray(ranks < round(density * ranks.size))
    return blocks, jnp.repeat(jnp.repeat(blocks, side, 0), side, 1)


def measure(compiled_ways, args, rounds):
    """Median seconds of each product of :func:`compiled_both` forward, and with both gradients."""
    medians = []
    for compiled in compiled_ways:
        calls = {name: calls_in(run, args[name], 0.02) for name, run in compiled.items()}

        def repeated(name, compiled=compiled, calls=calls):
            return lambda: [compiled[name](*args[name]) for _ in range(calls[name])][-1]

        seconds = timing.rounds_of({name: repeated(name) for name in compiled}, rounds)
        medians.append({name: statistics.median(times) / calls[name] for name, times in seconds.items()})
    return medians


def row(shape, unit, live, spec, compiled, args, options):
    """A row of the table: milliseconds, ratios to the dense product, share of the peak."""
    cells = [shape, unit, f"{live:.1%}"]
    for times, products in zip(measure(compiled, args, options.rounds), (1, 3), strict=True):
        dense, ours = times["dense"], times["ours"]
        cells += [f"{1e3 * times[name]:.3f}" for name in ("dense", "masked copy", "ours")]
        ratio = dense / ours
        cells += [f"{ratio:.2f}", f"{times['masked copy'] / ours:.2f}"]
        if options.peak_tflops:
            work = 2 * spec.rows * spec.inputs * spec.outputs * products * live
            cells.append(f"{work / ours / options.peak_tflops / 1e12:.0%}")
    print(" | ".join(cells), flush=True)
    return cells, ratio > 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["2048 cubed"], choices=BENCHMARKS, metavar="SHAPE",
                        help=f"of {', '.join(BENCHMARKS)}")  # fmt: skip
    parser.add_argument("--blocks", nargs="+", type=int, default=[64, 128], help="sides of the square blocks")
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.5, 0.25, 0.1, 0.05])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--implementation", help="of ours; default: what the library chooses here")
    parser.add_argument("--unstructured", action="store_true", help="masks of single weights too")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of each alternative")
    parser.add_argument("--peak_tflops", type=float, help="of the device, for the share of it that live work takes")
    parser.add_argument("--minutes", type=float, default=60, help="begin no row after so long, and save what there is")
    options = parser.parse_args()

    begin, rows, left_out = time.monotonic(), [], 0
    wins: dict[str, float] = {}  # the largest share of live work with which ours wins, with both gradients
    for shape in options.shapes:
        spec = BENCHMARKS[shape]
        rng = np.random.default_rng(0)
        x, w, dy = operands(spec, options.dtype, rng)
        units = [(f"block {side}", side) for side in options.blocks] + [("weight", 1)] * options.unstructured
        for unit, side in units:
            if spec.inputs % side or spec.outputs % side:
                continue
            compiled = compiled_both(products(side, options.implementation))
            for density in options.densities:
                if time.monotonic() - begin > 60 * options.minutes:
                    left_out += 1
                    continue
                blocks, mask = random_blocks(spec, side, density, rng)
                args = {name: (x, w, blocks if name == "ours" else mask, dy) for name in compiled[0]}
                cells, won = row(shape, unit, float(blocks.mean()), spec, compiled, args, options)
                rows.append(cells)
                place = f"{shape}, {unit}"
                wins[place] = max(wins.get(place, 0.0), float(blocks.mean()) if won else 0.0)
    headers = ["shape (rows, inputs, outputs)", "unit", "live work left"]
    for ways in ("forward", "and gradients"):
        headers += [f"{ways}: dense, ms", "masked copy, ms", "ours, ms", "dense / ours", "masked copy / ours"]
        headers += ["ours, of peak"] * bool(options.peak_tflops)
    shapes = "; ".join(f"{name}: {BENCHMARKS[name][:3]}" for name in options.shapes)
    timing.save(
        "kernels",
        f"Products with sparse weights, {options.dtype}",
        headers,
        rows,
        "The largest share of live work with which ours beats the dense product, gradients included: "
        + "; ".join(f"{place}: {f'{most:.0%}' if most else 'none'}" for place, most in wins.items())
        + f".\n\nMedians of {options.rounds} rounds, alternatives in turn. {shapes}. Ours: "
        f"{options.implementation or 'what the library chooses'}; the lists of live blocks are made in the timed call."
        + (f" {left_out} rows were left out for want of time." if left_out else ""),
    )


if __name__ == "__main__":
    main()
