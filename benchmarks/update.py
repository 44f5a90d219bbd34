"""What sparse momentum and ASNI add to one optimizer update of a ResNet-50.

Times ``tx.update`` and ``optax.apply_updates``, jitted, with params and state donated, on 25.6 million parameters: the
dense optimizer, and the same with a link behind it on a step that changes no mask and on one that does.

Usage: ``python -m benchmarks.update [--rounds 15]``
"""

import argparse
import functools
import itertools

import jax
import optax

import jaxsparse
from benchmarks import networks, timing

NEVER = 1 << 30
OPTIMIZERS = {
    "SGD momentum": functools.partial(optax.sgd, 0.1, momentum=0.9),
    "Adam": functools.partial(optax.adam, 1e-3),
}
LINKS = {  # with the steps between two changes of masks
    "sparse_momentum": functools.partial(jaxsparse.sparse_momentum, 0.9),
    "asni": functools.partial(jaxsparse.asni, jaxsparse.linear_sparsity(0.9, 100)),
}


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each alternative")
    args = parser.parse_args()

    params, *grads = (networks.resnet50(jax.random.key(seed)) for seed in range(3))
    size = sum(p.size for p in params.values())
    rows = []
    for (name, optimizer), link_name in itertools.product(OPTIMIZERS.items(), LINKS):
        link = LINKS[link_name]
        median = timing.interleaved(
            {
                "dense": runner(optimizer(), params, grads),
                "no change": runner(jaxsparse.chain(optimizer(), link(NEVER)), params, grads),
                "plain": runner(optax.chain(optimizer(), link(NEVER)), params, grads),
            },
            args.rounds,
        )
        change = timing.interleaved({"change": runner(jaxsparse.chain(optimizer(), link(1)), params, grads)}, 3)
        rows.append([
            name, link_name, f"{1e3 * median['dense']:.1f}", f"{1e3 * median['no change']:.1f}",
            f"{median['no change'] / median['dense']:.2f}", f"{median['plain'] / median['dense']:.2f}",
            f"{1e3 * change['change']:.0f}",
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
        "parameter. 90% sparsity (asni: the first of 100 stages towards it), every convolution and the head.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
