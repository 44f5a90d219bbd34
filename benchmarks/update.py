"""What links that change their masks add to one optimizer update of a ResNet-50.

Times ``tx.update`` and ``optax.apply_updates``, jitted, with params and state donated, on 25.6 million parameters: the
dense optimizer, and the same with a link behind it on a step that changes no mask and on one that does.

Usage: ``python -m benchmarks.update [--rounds 15]``; with ``--against COMMIT`` every method's update as that commit has
it beside the working tree's, each in a process of its own, in turn, and nothing is written.
"""

import argparse
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import optax

import jaxsparse
from benchmarks import against, networks, timing
from benchmarks.processes import clean_up_when_stopped

NEVER = 1 << 30
OPTIMIZERS = {
    "SGD momentum": functools.partial(optax.sgd, 0.1, momentum=0.9),
    "Adam": functools.partial(optax.adam, 1e-3),
}
LINKS = {  # with the steps between two changes of masks
    "sparse_momentum": functools.partial(jaxsparse.sparse_momentum, 0.9),
    "asni": functools.partial(jaxsparse.asni, optax.linear_schedule(0.009, 0.9, 100)),
    "rigl": lambda every: jaxsparse.rigl(0.9, every, drop_fraction=optax.constant_schedule(0.3)),
    "magnitude_pruning, global": lambda every: jaxsparse.magnitude_pruning(
        optax.linear_schedule(0.009, 0.9, 100), begin=every, every=every, scope="global"
    ),
}
NEED_GRAD = ("rigl",)  # which a plain optax.chain does not hand on


def fixed_masks(params):
    """The link that costs least: masks that keep all kernels, and never change."""
    return jaxsparse.mask_updates({name: jnp.ones(p.shape if p.ndim > 1 else (), bool) for name, p in params.items()})


# What --against compares, behind or around an optimizer: made when it is asked for, since an old version may lack it.
METHODS = {
    "mask_updates": lambda inner, params, every: optax.chain(inner, fixed_masks(params)),
    **{
        name: lambda inner, params, every, link=link: jaxsparse.chain(inner, link(every))
        for name, link in LINKS.items()
    },
    "reweighted_l1": lambda inner, params, every: optax.chain(inner, jaxsparse.reweighted_l1(1e-3, l1=1e-3)),
    "l0": lambda inner, params, every: jaxsparse.l0(
        inner, [jaxsparse.Group("features", {"head/kernel": 0})], penalty=jaxsparse.Penalty(1e-6, "all")
    ),
}
CHANGE = ", mask update"
FIXED = "mask_updates"  # whose masks never change: what it costs to read them, with every link


def runner(tx, params, grads):
    """A function that takes one step, on its own params and state, with the next of the gradients."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    held = jax.tree.map(lambda x: x.copy(), params), tx.init(params)
    turns = itertools.cycle(grads)

    def run():
        nonlocal held
        held = step(*held, next(turns))
        return held

    return run


@functools.cache
def trees():
    """Params and two gradients."""
    return [networks.resnet50(seed) for seed in range(3)]


def case(name):
    """What --against times by that name: one update."""
    params, *grads = trees()
    optimizer, _, method = name.removesuffix(CHANGE).partition(" + ")
    inner = OPTIMIZERS[optimizer]()
    tx = METHODS[method](inner, params, 1 if name.endswith(CHANGE) else NEVER) if method else inner
    return runner(tx, params, grads)


def compare(commit, rounds):
    """Prints the table of --against; whether nothing is slower than allowed."""
    cases = {}
    for optimizer in OPTIMIZERS:
        cases |= {optimizer: rounds}  # the same program twice, but for the process
        cases |= {f"{optimizer} + {method}": rounds for method in METHODS}
        cases |= {f"{optimizer} + {link}{CHANGE}": max(5, rounds // 3) for link in LINKS}
    header = ["update", "old, ms", "new, ms", "new / old", "old / old, middle half of rounds", "verdict"]
    print(f"{commit} (old) and the working tree (new), on {timing.machine()}\n")
    print(timing.line(header), timing.line(["---"] * len(header)), sep="\n", flush=True)
    slower = False
    for row in against.compare(commit, "benchmarks.update", cases):
        print(timing.line(row), flush=True)
        slower |= row[-1] == against.SLOWER
    return not slower


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each alternative")
    parser.add_argument("--against", metavar="COMMIT", help="compare this commit's library with the working tree's")
    args = parser.parse_args()
    if args.against:
        clean_up_when_stopped()
        try:
            sys.exit(not compare(args.against, args.rounds))
        except ValueError as error:
            sys.exit(f"error: {error}")

    params, *grads = trees()
    size = sum(p.size for p in params.values())
    rows = []
    for (name, optimizer), link_name in itertools.product(OPTIMIZERS.items(), (FIXED, *LINKS)):
        link = LINKS.get(link_name, lambda every: fixed_masks(params))
        alternatives = {
            "dense": runner(optimizer(), params, grads),
            "no change": runner(jaxsparse.chain(optimizer(), link(NEVER)), params, grads),
        }
        if link_name not in NEED_GRAD:
            alternatives["plain"] = runner(optax.chain(optimizer(), link(NEVER)), params, grads)
        median = timing.interleaved(alternatives, args.rounds)
        change = {}
        if link_name in LINKS:
            change = timing.interleaved({"change": runner(jaxsparse.chain(optimizer(), link(1)), params, grads)}, 3)
        rows.append([
            name, link_name, f"{1e3 * median['dense']:.1f}", f"{1e3 * median['no change']:.1f}",
            f"{median['no change'] / median['dense']:.2f}",
            f"{median['plain'] / median['dense']:.2f}" if "plain" in median else "-",
            f"{1e3 * change['change']:.0f}" if change else "-",
        ])  # fmt: skip
    held = {name: sum(x.nbytes for x in jax.tree.leaves(link(NEVER).init(params))) for name, link in LINKS.items()}
    state = ", ".join(f"of {name} {nbytes / size:.2f}" for name, nbytes in held.items())
    timing.save(
        "update",
        f"One optimizer update of a ResNet-50 ({size / 1e6:.1f} million parameters)",
        ["optimizer", "link", "dense, ms", "no mask change, ms", "ratio", "ratio in a plain optax.chain",
         "mask update, ms"],
        rows,
        f"Medians of {args.rounds} rounds, alternatives in turn (mask update: of 3). The state takes {state} bytes a "
        "parameter. 90% sparsity (asni and magnitude_pruning: the first of 100 stages towards it), all kernels; "
        f"{FIXED} has fixed masks, which all links read.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
