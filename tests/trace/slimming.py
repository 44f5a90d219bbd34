"""What tests of smaller networks share: channels to close, params with their slices at zero, gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.trees import by_path
from tests.trace.closing import closed


def is_float(leaf):
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def some_closed(groups, share=3, seed=0):
    """A third of the channels of each group, at random."""
    random = np.random.default_rng(seed)
    return {
        group.name: np.isin(np.arange(group.size), random.choice(group.size, group.size // share, replace=False))
        for group in groups
    }


def gate_masks(params, groups, dead):
    """Bools like the params: False for the slices that a group's gate multiplies, where its channels are closed."""
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool) if is_float(leaf) else True, params)
    for group in groups:
        masks = closed(masks, group, group.multiplies, dead[group.name])
    return masks


def masked(params, masks):
    return jax.tree.map(lambda p, m: jnp.where(m, p, 0) if is_float(p) else p, params, masks)


def floats_of(tree):
    """The float leaves, and what puts others in their places."""
    leaves, treedef = jax.tree.flatten(tree)

    def put(floats):
        values = iter(floats)
        return treedef.unflatten([next(values) if is_float(leaf) else leaf for leaf in leaves])

    return [leaf for leaf in leaves if is_float(leaf)], put


def outputs_and_gradients(apply, params, *args):
    """The outputs, and the gradient by the float leaves of an uneven function of them, without batch statistics."""
    floats, put = floats_of(params)

    def loss(floats):
        out = apply(put(floats), *args)
        ys = [y for path, y in by_path(out).items() if "batch_stats" not in path]
        uneven = [jnp.sin(0.7 * y) * jnp.cos(jnp.arange(y.size).reshape(y.shape)) for y in ys]
        return sum(y.sum() for y in uneven), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(floats)
    return out, put(grads)


def relative(a, b):
    """The largest difference of two trees, as a share of the largest entry of the second."""
    a, b = (np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in floats_of(tree)[0]]) for tree in (a, b))
    return np.abs(a - b).max() / np.abs(b).max()
