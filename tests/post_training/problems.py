"""A matrix, its inputs and what the authors' code made of them; and correlated inputs."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxsparse.trace import Moments

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "one_shot.npz")
KERNEL = jnp.asarray(GOLDEN["kernel"])
ROWS = jnp.asarray(GOLDEN["inputs"]).reshape(-1, len(KERNEL))


def moments_of(rows, gram=True):
    return Moments.of_rows(rows, (0,), (), gram=gram)


def correlated(inputs=32, outputs=24, rows=256, seed=0):
    """A kernel and rows of inputs that are sums of few sources, at scales from 0.1 to 10."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(rows, inputs // 4)) @ random.normal(size=(inputs // 4, inputs))
    mixed = (mixed + 0.3 * random.normal(size=mixed.shape)) * np.logspace(-1, 1, inputs)
    return jnp.asarray(random.normal(size=(inputs, outputs)), jnp.float32), jnp.asarray(mixed, jnp.float32)


def output_error(pruned, kernel, rows):
    return float(np.sum(np.square(np.asarray(rows) @ (np.asarray(pruned) - np.asarray(kernel)))))
