"""Closing channels of groups by hand: slices at zero."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.groups import entries
from jaxsparse.trees import leaf_paths


def closed(params, group, slices, dead):
    """The params with zeros in those slices of a group whose channels are ``dead``, bool (size,)."""
    leaves, treedef = jax.tree.flatten(params)
    for number, path in enumerate(leaf_paths(params)):
        for which in slices:
            if which.path == path:
                axes, channels = entries(which, leaves[number].shape, group.size)
                gone = np.append(dead, False)[channels]
                gone = np.expand_dims(gone, [i for i in range(leaves[number].ndim) if i not in axes])
                leaves[number] = jnp.where(gone, jnp.zeros((), leaves[number].dtype), leaves[number])
    return treedef.unflatten(leaves)


def apart(found, wanted):
    """How far apart outputs are, relative to the largest number."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(float(jnp.max(jnp.abs(x - y)) / (1e-6 + jnp.max(jnp.abs(y)))) for x, y in pairs)


def check_exact(apply, params, args, groups, every=3, at_most=1e-5):
    """Each choice of slices alone closes channels: the outputs are those of all their slices at zero."""
    for group in groups:
        dead = np.arange(group.size) % every == 1 if every else np.ones(group.size, bool)
        wanted = apply(closed(params, group, group.removes, dead), *args)
        for choice in group.closed_by:
            found = apply(closed(params, group, choice, dead), *args)
            assert apart(found, wanted) < at_most, f"{group.name}: {choice}"
