"""The floating-point leaves of params, which have scores; the others score 0."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse.trees import as_array, leaf_paths

__all__ = ["Floats", "require_scalar", "wide"]


class Floats(NamedTuple):
    """The floating-point leaves of params, apart from the others.

    Attributes:
      leaves: these leaves.
      paths: their paths.
      params: the whole tree.
      numbers: the places of these leaves among all.
    """

    leaves: list[jax.Array]
    paths: list[str]
    params: Any
    numbers: list[int]

    @classmethod
    def of(cls, params: Any) -> "Floats":
        """The floating-point leaves of params; a ValueError if there are none, or leaves that are no arrays."""
        named = list(zip(leaf_paths(params), jax.tree.leaves(params), strict=True))
        arrays = [jnp.asarray(as_array(path, leaf)) for path, leaf in named]
        numbers = [i for i, leaf in enumerate(arrays) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        if not numbers:
            raise ValueError(f"the params have no floats to score, got {[str(leaf.dtype) for leaf in arrays]}")
        return cls([arrays[i] for i in numbers], [named[i][0] for i in numbers], params, numbers)

    def whole(self, floats: list[jax.Array]) -> Any:
        """The params with other values in these leaves."""
        leaves, treedef = jax.tree.flatten(self.params)
        for i, value in zip(self.numbers, floats, strict=True):
            leaves[i] = value
        return treedef.unflatten(leaves)

    def scores(self, scores: list[jax.Array]) -> Any:
        """Scores of these leaves as a tree like the params; those of the others are 0."""
        leaves, treedef = jax.tree.flatten(self.params)
        found = dict(zip(self.numbers, scores, strict=True))
        return treedef.unflatten([found[i] if i in found else jnp.zeros(jnp.shape(leaf))
                                  for i, leaf in enumerate(leaves)])  # fmt: skip


def require_scalar(function: Callable[..., Any], *args: Any, what: str = "the loss") -> None:
    """Raises a ValueError if a function of these arguments does not return one number, a float."""
    found = jax.eval_shape(function, *args)
    if isinstance(found, jax.ShapeDtypeStruct) and found.shape == () and jnp.issubdtype(found.dtype, jnp.floating):
        return
    came = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", found)
    raise ValueError(f"{what} must return a scalar, one float, such as the mean over a batch; got {came}")


def wide(x: jax.Array) -> jax.Array:
    """An array in at least 32 bits: products of bfloat16 have many ties, and those of float16 underflow."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
