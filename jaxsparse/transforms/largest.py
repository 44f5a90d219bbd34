"""The largest weights at a sparsity: what wrappers with latent weights choose their masks by."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxsparse.allocation import Allocation, check_allocation, check_sparsities, layer_counts
from jaxsparse.layouts import LayoutLike, leaf_layouts
from jaxsparse.transforms.checks import check_range
from jaxsparse.transforms.layers import Layers
from jaxsparse.transforms.prune import prune_globally, prune_layers
from jaxsparse.trees import is_partial

__all__ = ["Largest", "Zeros", "n_largest"]

Zeros: TypeAlias = float | jax.Array | Mapping[str, float] | Sequence[tuple[str, float]] | optax.Schedule

_ROUNDING = 1e-6  # by which a schedule may leave its range


class Largest(NamedTuple):
    """The largest units of latent weights, as many as a sparsity says; all compete, pruned ones too.

    Attributes:
      sparsity: the fraction of zeros: a number, one for each leaf (see :func:`jaxsparse.random_masks`), or a schedule.
      scope: rank the weights of each "layer", or of the whole network, "global".
      allocation: how layers share a sparsity, see :func:`jaxsparse.erdos_renyi`; not for the scope "global".
      at_least: the fewest weights (or units) that any leaf keeps.
      layout: as the method got it.
    """

    sparsity: Zeros
    scope: Literal["layer", "global"] = "layer"
    allocation: Allocation = "uniform"
    at_least: ArrayLike = 0
    layout: LayoutLike = None

    def checked(self, name: str = "sparsity") -> "Largest":
        """Check the options, the first value of a schedule too, and return this very choice.

        Raises:
          ValueError: for options that are unknown or out of range.
        """
        by_leaf = isinstance(self.sparsity, Mapping | list | tuple)
        if callable(self.sparsity):
            first = self.sparsity(jnp.int32(0))
            if not isinstance(first, jax.core.Tracer) and not -_ROUNDING <= first <= 1 + _ROUNDING:
                raise ValueError(f"{name} is a schedule of fractions of zeros, in [0, 1], but gives {first} at step 0")
        else:
            check_sparsities(self.sparsity)
        if self.scope not in ("layer", "global"):
            raise ValueError(f"scope must be one of ['layer', 'global'], got {self.scope!r}")
        check_allocation(self.allocation)
        if self.scope == "global" and (self.allocation != "uniform" or by_leaf):
            given = "a sparsity for each leaf" if by_leaf else f"allocation={self.allocation!r}"
            raise ValueError(f"scope='global' ranks all layers together, which {given} contradicts")
        check_range("at_least", self.at_least, 0)
        return self

    def at(self, step: jax.Array) -> tuple[Any, jax.Array]:
        """The sparsity at a step, and whether a schedule had to be clipped to [0, 1], 0 or 1."""
        if not callable(self.sparsity):
            return self.sparsity, jnp.int32(0)
        value = jnp.asarray(self.sparsity(step))
        inside = (value >= -_ROUNDING) & (value <= 1 + _ROUNDING)
        return jnp.clip(jnp.where(jnp.isnan(value), 0, value), 0, 1), (~inside).astype(jnp.int32)

    def counts(self, layers: Layers, sparsity: Any, params: Any) -> jax.Array:
        """How many units each layer keeps at a sparsity, int32, (layers,); for "global" how many weights all keep.

        Layers that keep n of every m do so whatever it is. Numbers that are known are counted before the step runs.
        """
        known = not any(isinstance(value, jax.core.Tracer) for value in jax.tree.leaves((sparsity, self.at_least)))
        when = jax.ensure_compile_time_eval() if known else contextlib.nullcontext()
        # In double precision, for float32 cannot tell all the weights of a large network.
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), when:
            # A schedule may reach 1, a number may not: the last value below it keeps nothing either.
            wide = (
                jnp.minimum(jnp.asarray(sparsity, jnp.float64), 1 - 2.0**-53)
                if isinstance(sparsity, jax.Array)
                else sparsity
            )
            return self._counts(layers, wide, params)

    def masks(self, layers: Layers, counts: jax.Array) -> tuple[Sequence[jax.Array], jax.Array]:
        """The masks of as many units as :meth:`counts` says, and how many weights they keep, int32."""
        if self.scope == "global":
            return prune_globally(layers, counts, at_least=self.at_least, revive=True)
        return prune_layers(layers, counts, revive=True)

    def _counts(self, layers: Layers, sparsity: Any, params: Any) -> jax.Array:
        if self.scope == "global":
            total = sum(layer.size for layer in layers)
            return jnp.asarray(total - jnp.round(total * sparsity), jnp.int32)
        free = [i for i, layer in enumerate(layers) if layer.structure.exchanges]
        found = layer_counts(
            {layers[i].path: layers[i].weight for i in free},
            sparsity,
            self.allocation,
            [layers[i].structure.unit_size(layers[i].weight.shape) for i in free],
            layouts=None if self.allocation == "uniform" else leaf_layouts(params, self.layout),
            at_least=self.at_least,
            partial=is_partial(params),
        )
        return jnp.zeros(len(layers), jnp.int32).at[np.asarray(free, int)].set(found)


def n_largest(n: int, m: int) -> Callable[..., Any]:
    """Choose the n largest of every group of m, as :func:`masked_latent` has it.

    Of ragged leaves the same fraction stays, rounded, and at least one weight.
    """

    def choose(layers, state, params):
        del params
        left = np.asarray([max((2 * n * layer.size + m) // (2 * m), min(1, layer.size)) for layer in layers], np.int32)
        masks, kept = prune_layers(layers, left, revive=True)
        return masks, state._replace(kept=kept)

    return choose
