"""The top-k mask of 25 million weights: by counting, by ``jnp.sort``, by ``jax.lax.top_k``.

Usage: ``python -m benchmarks.selection [--size 25000000] [--rounds 3]``
"""

import argparse

import jax
import jax.numpy as jnp

from benchmarks import timing
from jaxsparse import top_k_mask


def by_sort(scores, k):
    """The mask by a threshold from a full sort. (Ties at the threshold are all kept.)"""
    return scores >= jnp.sort(scores)[scores.size - k]


def by_top_k(scores, k):
    """The mask by scattering the indices that ``lax.top_k`` returns."""
    return jnp.zeros(scores.shape, bool).at[jax.lax.top_k(scores, k)[1]].set(True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=25_000_000, help="number of weights")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each alternative")
    args = parser.parse_args()

    rows = []
    for dtype in (jnp.float32, jnp.bfloat16):
        scores = jnp.abs(jax.random.normal(jax.random.key(0), (args.size,), dtype))
        for density in (0.05, 0.2):
            k = int(args.size * density)
            count = jax.jit(top_k_mask)
            sort, top = (jax.jit(f, static_argnums=1) for f in (by_sort, by_top_k))
            median = timing.interleaved(
                {
                    "counting": lambda count=count, scores=scores, k=k: count(scores, k),
                    "jnp.sort": lambda sort=sort, scores=scores, k=k: sort(scores, k),
                    "lax.top_k": lambda top=top, scores=scores, k=k: top(scores, k),
                },
                args.rounds,
            )
            assert int(count(scores, k).sum()) == k
            ours = median["counting"]
            rows.append([
                jnp.dtype(dtype).name, f"{density:.0%}", *(f"{median[n]:.3f}" for n in median),
                f"{median['jnp.sort'] / ours:.1f}", f"{median['lax.top_k'] / ours:.1f}",
            ])  # fmt: skip
    timing.save(
        "selection",
        f"Top-k mask of {args.size:,} weights",
        ["dtype", "k / size", "counting, s", "jnp.sort, s", "lax.top_k, s", "sort / counting", "top_k / counting"],
        rows,
        f"Medians of {args.rounds} rounds, alternatives in turn. Counting takes k as a traced number and breaks ties "
        "by index; the others are compiled for one k.",
    )


if __name__ == "__main__":
    main()
