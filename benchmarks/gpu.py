"""All that has waited for a GPU, in the order of its importance, in as many minutes as there are: one table.

Kernels are compared with the reference first, forward and both gradients, and a wrong one is not timed. Then: products
at every density beside the vendor's (on a CPU: XLA's), updates of the masks, VGG16 without half of its channels, train
steps of a GPT and of ResNet-50, dense and with methods, a GPT without half of its units, other products. Every row
comes from a process that can be ended: one that hangs, crashes or needs more memory than there is becomes that row's
text. The table is written anew after every row, and says which rows were not reached.

Usage: ``python -m benchmarks.gpu --minutes 9``; without a GPU, or with --smallest, all of it in its smallest form.
"""

import argparse
import functools
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import timing
from benchmarks.processes import Measuring, clean_up_when_stopped, first_line, serve

HEADER = ["what", "baseline, ms", "ours, ms", "baseline / ours", "beside that"]
NOT_REACHED = "not reached"
PEAK_TFLOPS = {"H100": 989, "H200": 989}  # bfloat16, dense, by what is in the device's name
DENSITIES = (1.0, 0.1, 0.5, 0.25, 0.05)
CHECKED = (0.0, "one block", 0.1, 1.0)  # densities
EXPERIMENTS = ("sparse_momentum_10", "asni_80", "rda", "l0_hc", "dep_l0_forward")
GPT_LINKS = ("sparse_momentum", "rigl", "magnitude_pruning")
# How long a row may take, lest one that hangs takes all: of a kind that is not here, all that is left.
SECONDS = {"check": 90, "product": 120}


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      kind: how it is measured, a name of :data:`KINDS`; rows of one kind that follow each other share a process.
      name: what the table calls it.
      options: of the measurement, in JSON.
      needs: the row of a check that has to be right.
    """

    kind: str
    name: str
    options: Mapping[str, object]
    needs: str | None = None


def rows_for(platform: str, smallest: bool) -> list[Row]:
    """The rows, the most important first."""
    ours = "mosaic_gpu" if platform == "gpu" else "xla_blocks"
    dtype = "bfloat16" if platform == "gpu" else "float32"
    rows = list(_checks(platform, ours, smallest))
    right = f"right? {ours}, {dtype}, blocks of {{0}} x {{0}}"

    def products(shape, side, densities):
        for density in densities:
            for ways in ("forward", "and gradients"):
                name = f"{ours}, {dtype}, {shape}, blocks of {side}, {density:.0%} alive, {ways}"
                options = {"shape": shape, "side": side, "density": density, "ways": ways, "dtype": dtype}
                options |= {"implementation": ours, "rounds": 3 if smallest else 9}
                yield Row("product", name, options, right.format(side))

    if smallest:
        rows += products("smallest", 64, DENSITIES[:2])
        updates, update = [("SGD momentum", "sparse_momentum"), ("Adam", "asni")], {"leaves": 9, "rounds": 3}
        slim = {"batch": 4, "rounds": 3}
        step = {"size": 32, "batch": 4, "dtype": "float32", "width": 0.125, "steps": 1, "rounds": 3}
        gpt = {"size": "smallest", "batch": 2, "dtype": "float32", "steps": 1, "rounds": 3}
    else:
        rows += products("4096 cubed", 128, DENSITIES)
        rows += products("transformer MLP, in", 128, (1.0, 0.1, 0.25))
        links = ("sparse_momentum", "asni", "rigl")
        updates = [(optimizer, link) for optimizer in ("SGD momentum", "Adam") for link in links]
        update, slim = {"leaves": None, "rounds": 15}, {"batch": 128, "rounds": 15}
        step = {"size": 224, "batch": 256, "dtype": "bfloat16", "width": 1.0, "steps": 10, "rounds": 7}
        gpt = {"size": "124m", "batch": 16, "dtype": "bfloat16", "steps": 5, "rounds": 7}
    rows += [
        Row("update", f"update of a ResNet-50, {optimizer} + {link}", {"optimizer": optimizer, "link": link, **update})
        for optimizer, link in updates
    ]
    rows.append(Row("slim", "VGG16 without half of its channels, evaluation", slim))
    rows += [Row("gpt", f"train step of a GPT ({gpt['size']}), {link}", {"link": link, **gpt}) for link in GPT_LINKS]
    rows.append(Row("small gpt", f"a GPT ({gpt['size']}) without half of its units, train step", gpt))
    rows += [Row("step", f"train step of ResNet-50, {name}", {"experiment": name, **step}) for name in EXPERIMENTS]
    if not smallest:
        rows += products("4096 cubed", 64, DENSITIES)
        for shape in ("ResNet-50, 1x1 in", "ResNet-50, 1x1 out", "transformer MLP, out"):
            rows += products(shape, 128, (1.0, 0.1))
    return rows


def _checks(platform: str, ours: str, smallest: bool) -> Iterator[Row]:
    """Every implementation that the device has, in its dtypes."""
    sides = [(64, 64)] if smallest else [(128, 128), (64, 64), (256, 256), (64, 128), (32, 32)]
    if platform == "gpu":
        dtypes = {"mosaic_gpu": ("bfloat16", "float16"), "xla_blocks": ("bfloat16", "float32"), "xla": ("bfloat16",)}
    else:
        dtypes = {"xla_blocks": ("float32", "bfloat16"), "xla": ("float32",)}
    for implementation, of_it in dtypes.items():
        for dtype in of_it:
            for block in [*(sides if implementation == ours else sides[:1]), None]:
                if implementation == "xla_blocks" and block is None:
                    continue  # it is for blocks alone
                unit = "single weights" if block is None else f"blocks of {block[0]} x {block[1]}"
                options = {"implementation": implementation, "dtype": dtype, "block": block, "smallest": smallest}
                yield Row("check", f"right? {implementation}, {dtype}, {unit}", options)


# --- What is measured, in a process of its own ------------------------------------------------------------------------


def check(implementation, dtype, block, smallest):
    """Whether the product and both gradients are those of the reference."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxsparse.kernels import block_sparse_matmul, masked_matmul
    from jaxsparse.kernels.masked_matmul import reference

    rows, inputs, outputs = (40, 128, 256) if smallest else (300, 512, 768)  # rows fill no whole number of tiles
    side = block or (1, 1)
    random = np.random.default_rng(0)
    draw = random.standard_normal
    x, w, dy = (jnp.asarray(draw(s, np.float32), dtype) for s in ((rows, inputs), (inputs, outputs), (rows, outputs)))

    def ours(x, w, mask):
        product = masked_matmul if block is None else block_sparse_matmul
        return product(x, w, mask, implementation=implementation, precision="highest")

    def with_gradients(product):
        def run(x, w, mask, dy):
            y, pull = jax.vjp(lambda x, w: product(x, w, mask), x, w)
            return y, *pull(dy)

        return jax.jit(run)

    got_of, expected_of = with_gradients(ours), with_gradients(reference.masked_matmul)
    wide = [array.astype(jnp.float32) for array in (x, w, dy)]
    allowed = 3e-7 * max(rows, inputs, outputs)  # by how much a float32 sum of so many products may be off
    worst, largest, where = 0.0, 0.0, ""
    for density in CHECKED:
        ranks = random.permutation(inputs // side[0] * (outputs // side[1])).reshape(inputs // side[0], -1)
        live = ranks < (1 if density == "one block" else round(density * ranks.size))
        mask = np.kron(live, np.ones(side, bool))
        # What lies in dead places does not count, NaN neither.
        got = got_of(x, jnp.where(mask, w, jnp.nan), jnp.asarray(live), dy)
        expected = expected_of(wide[0], wide[1], jnp.asarray(mask), wide[2])
        for name, a, b in zip(("forward", "gradient of x", "gradient of w"), got, expected, strict=True):
            a, b = np.asarray(a.astype(jnp.float32)), np.asarray(b)
            off = np.abs(a - b)
            beyond = np.maximum(off - 0.5 * float(jnp.finfo(dtype).eps) * np.abs(b), 0)  # but for one rounding
            beyond[~np.isfinite(a) | ((b == 0) & (a != 0))] = np.inf
            if beyond.max() >= worst:
                worst, largest = float(beyond.max()), float(off.max())
                where = f"{name}, {density if isinstance(density, str) else f'{density:.0%}'} alive"
    wrong = worst > allowed
    if wrong:
        said = f"WRONG, largest difference {largest:.3g} ({where})"
    else:
        said = f"right, but for rounding the result within {worst:.0e} (of {allowed:.0e} that sums may be off)"
    return {"cells": ["", "", "", said], "wrong": wrong}


@functools.cache
def _products(shape, side, dtype, implementation):
    """Operands, and the alternatives compiled: the same for every density."""
    import numpy as np

    from benchmarks import kernels
    from jaxsparse.kernels.masked_matmul.arg_specs import BENCHMARKS, Product

    spec = Product(256, 256, 256, (64, 64)) if shape == "smallest" else BENCHMARKS[shape]
    compiled = kernels.compiled_both(kernels.products(side, implementation))
    return spec, kernels.operands(spec, dtype, np.random.default_rng(0)), compiled


def product(shape, side, density, ways, dtype, implementation, rounds):
    """The product beside the dense one."""
    import jax
    import numpy as np

    from benchmarks import kernels

    spec, (x, w, dy), compiled = _products(shape, side, dtype, implementation)
    blocks, mask = kernels.random_blocks(spec, side, density, np.random.default_rng(1))
    args = {name: (x, w, blocks if name == "ours" else mask, dy) for name in compiled[0]}
    both = ways == "and gradients"
    [seconds] = kernels.measure([compiled[both]], args, rounds)
    beside = f"masked copy {1e3 * seconds['masked copy']:.3f} ms"
    kind = jax.devices()[0].device_kind
    if peak := next((peak for name, peak in PEAK_TFLOPS.items() if name in kind), None):
        work = 2e-12 * spec.rows * spec.inputs * spec.outputs * (3 if both else 1)
        shares = work / seconds["dense"] / peak, work * float(blocks.mean()) / seconds["ours"] / peak
        beside += f"; of the peak: dense {shares[0]:.0%}, ours {shares[1]:.0%}"
    return {"cells": [*_pair(seconds["dense"], seconds["ours"]), beside]}


def update(optimizer, link, leaves, rounds):
    """One update of the first so many params of a ResNet-50 with a link, beside the dense optimizer's."""

    import jaxsparse
    from benchmarks import networks
    from benchmarks.update import LINKS, NEVER, OPTIMIZERS, runner

    whole = (networks.resnet50(seed) for seed in range(3))
    params, *grads = (dict(itertools.islice(tree.items(), leaves)) for tree in whole)

    def run(*links):
        return runner(jaxsparse.chain(OPTIMIZERS[optimizer](), *links), params, grads)

    seconds = timing.interleaved({"dense": run(), "no change": run(LINKS[link](NEVER))}, rounds)
    seconds |= timing.interleaved({"change": run(LINKS[link](1))}, 3)
    return {"cells": [*_pair(seconds["dense"], seconds["no change"]), f"mask update {1e3 * seconds['change']:.1f} ms"]}


def slim(batch, rounds):
    """The evaluation of VGG16 with half of its channels closed, and without them."""
    import numpy as np

    from benchmarks.slim import pair

    runs, _, away = pair("VGG16", 0.5, batch, np.random.RandomState(0))
    seconds = timing.interleaved(runs, rounds)
    return {"cells": [*_pair(seconds["whole"], seconds["slim"]), f"largest difference {away:.0e} of the largest logit"]}


@functools.cache
def _dense_steps(**options):
    """The dense network, by the optimizer of sparse momentum's recipe: compiled once, for all methods."""
    from benchmarks.imagenet import Steps

    return Steps(EXPERIMENTS[0], True, argparse.Namespace(**options))


def step(experiment, steps, rounds, **options):
    """A train step with a method beside the dense one."""
    from benchmarks.imagenet import EVERY_STEP, Steps, measure

    dense, sparse = _dense_steps(**options), Steps(experiment, False, argparse.Namespace(**options))
    median, (low, _, high), update = measure(sparse, dense, steps, rounds)
    speeds = [f"{options['batch'] / median[name]:.0f}" for name in ("dense", "sparse")]
    beside = f"images/s {speeds[0]} and {speeds[1]}; middle half of rounds {low:.3f} to {high:.3f}; mask update "
    beside += "every step" if experiment in EVERY_STEP else f"{1e3 * update:.0f} ms"
    return {"cells": [*_pair(median["dense"], median["sparse"]), beside]}


def gpt_step(link, batch, size, **options):
    """A train step of a GPT with a link beside the dense one."""
    from benchmarks.gpt import SIZES, with_link

    seconds = with_link(size, batch, link=link, **options)
    speeds = [f"{batch * SIZES[size][-1] / seconds[name]:,.0f}" for name in ("dense", "no change")]
    beside = f"tokens/s {speeds[0]} and {speeds[1]}; a step that changes masks {1e3 * seconds['change']:.1f} ms"
    return {"cells": [*_pair(seconds["dense"], seconds["no change"]), beside]}


def small_gpt(**options):
    """A train step of a GPT without half of its units and a quarter of its heads, beside the whole one's."""
    from benchmarks.gpt import without_channels

    train, texts, counts = without_channels(**options)
    beside = f"generating {texts['whole'] / texts['smaller']:.2f} times as fast, {counts['whole']:,} params and "
    return {"cells": [*_pair(train["whole"], train["smaller"]), f"{beside}{counts['smaller']:,}"]}


def _pair(baseline: float, ours: float) -> list[str]:
    return [f"{1e3 * baseline:.3f}", f"{1e3 * ours:.3f}", f"{baseline / ours:.3f}"]


KINDS: Mapping[str, Callable[..., dict]] = {
    "check": check,
    "product": product,
    "update": update,
    "slim": slim,
    "step": step,
    "gpt": gpt_step,
    "small gpt": small_gpt,
}


def answer(request: dict) -> dict:
    """What the process answers: of no kind, where it runs."""
    if "kind" in request:
        return KINDS[request["kind"]](**request["options"])
    import jax

    device = jax.devices()[0]
    return {"platform": device.platform, "device": device.device_kind, "machine": timing.machine()}


# --- The process that asks --------------------------------------------------------------------------------------------


class Measurer:
    """The process of the rows of one kind; begun anew for each kind, and after one that gave no answer."""

    def __init__(self):
        self._process, self._kind = None, None

    def ask(self, row: Row, seconds: float) -> dict:
        """The answer for a row, of {"cells": ...} or {"error": ...}, in so many seconds or less."""
        if self._process is None or self._kind != row.kind:
            self.close()
            self._process, self._kind = Measuring("benchmarks.gpu", "serve"), row.kind
        try:
            return self._process.ask({"kind": row.kind, "options": row.options}, seconds)
        except (RuntimeError, TimeoutError) as error:
            self.close()
            return {"error": first_line(error), "lost": True}

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.close()
        self._process = None


def measure_all(
    rows: Sequence[Row],
    until: float,
    ask: Callable[[Row, float], dict],
    show: Callable[[dict[str, list[str]], str], None],
) -> None:
    """Measures rows until a moment of ``time.monotonic``, and shows the cells of all after each, which is named.

    A row is begun if there is as much time left as the longest of its kind has taken.
    """
    cells = {row.name: ["", "", "", NOT_REACHED] for row in rows}
    longest: dict[str, float] = {}
    unfit: dict[str, str] = {}  # checks that are not right, and implementations that gave no answer
    show(cells, "")
    for row in rows:
        reason = unfit.get(row.needs or "") or unfit.get(str(row.options.get("implementation")))
        begin = time.monotonic()
        if reason:
            cells[row.name][-1] = f"left out: {reason}"
        elif (left := until - begin) > longest.get(row.kind, 0.0):
            answer = ask(row, min(left, SECONDS.get(row.kind, left)))
            longest[row.kind] = max(longest.get(row.kind, 0.0), time.monotonic() - begin)
            cells[row.name] = answer.get("cells") or ["", "", "", answer["error"]]
            if row.kind == "check" and (answer.get("wrong") or "error" in answer):
                unfit[row.name] = f"{row.name.removeprefix('right? ')} is not right"
            if row.kind == "check" and answer.get("lost"):
                unfit[str(row.options["implementation"])] = f"{row.options['implementation']} gave no answer"
        else:
            continue
        show(cells, row.name)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9, help="end after so many (%(default)s)")
    parser.add_argument("--smallest", action="store_true", help="small arrays, few rounds: to see that all of it runs")
    parser.add_argument("--only", default="", metavar="REGEX", help="only rows in whose name this is found")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="default: benchmarks/results/gpu_DEVICE.md")
    options = parser.parse_args(argv)
    until = time.monotonic() + 60 * options.minutes

    first = Measuring("benchmarks.gpu", "serve")
    where = first.ask({}, 300)
    first.close()
    if "error" in where:
        sys.exit(f"error: JAX finds no device: {where['error']}")
    smallest = options.smallest or where["platform"] == "cpu"
    device = "cpu" if where["platform"] == "cpu" else re.sub(r"\W+", "_", where["device"]).lower()
    output = options.output or timing.RESULTS / f"gpu_{device}.md"
    rows = [row for row in rows_for(where["platform"], smallest) if re.search(options.only, row.name)]

    def show(cells, name):
        page = timing.as_markdown(
            "gpu",
            "What waited for a GPU" + (", in its smallest form: to see that it runs, not how fast" if smallest else ""),
            HEADER,
            ([name, *others] for name, others in cells.items()),
            "Medians, alternatives in turn. Baseline: the dense product (of the vendor's library), the dense "
            "optimizer, the whole network, the dense train step by the optimizer of sparse momentum's recipe. A check "
            "compares the product and both gradients with the reference in float32: no block alive, one, a tenth, all.",
            where["machine"],
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page)
        if name:
            print(timing.line([name, *cells[name]]), flush=True)

    measurer = Measurer()
    try:
        measure_all(rows, until, measurer.ask, show)
    finally:
        measurer.close()
    print(f"see {output}")


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve(answer)
    else:
        clean_up_when_stopped()
        main()
