"""N:M sparsity: n of every m consecutive weights stay."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsparse.selection import count_true, top_k_mask
from jaxsparse.structures.base import Structure, merged, split_axis

__all__ = ["n_of_m"]


@dataclasses.dataclass(frozen=True, repr=False)
class n_of_m(Structure):  # noqa: N801
    """N:M sparsity: ``n`` of every ``m`` consecutive weights along the inputs stay, as in 2:4.

    Its units are single weights; what it adds is the number that stays of each group.

    Attributes:
      n: how many stay, from 1 to m.
      m: how many there are in a group.
      axis: what groups lie along: the "inputs", which sparse matrix hardware sums over, the "outputs", or an axis of
        the leaf by its number.

    Raises:
      ValueError: for numbers that are none of these.

    Examples:
      >>> import jax.numpy as jnp
      >>> n_of_m(2, 4).top(jnp.array([[0.1], [3.0], [2.0], [0.5]])).tolist()
      [[False], [True], [True], [False]]
    """

    splits_outputs: ClassVar[bool] = False
    exchanges: ClassVar[bool] = False

    n: int
    m: int
    axis: Literal["inputs", "outputs"] | int = dataclasses.field(default="inputs", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axis not in ("inputs", "outputs") and type(self.axis) is not int:
            raise ValueError(f'axis must be "inputs", "outputs" or the number of an axis, got {self.axis!r}')
        self._whole("n", "m")
        if not 1 <= self.n <= self.m:
            raise ValueError(f"n_of_m needs 1 <= n <= m, got {self}")

    def _fits(self, seen: Sequence[int]) -> bool:
        axis = self._axis(len(seen))
        return len(seen) >= 2 and 0 <= axis < len(seen) and seen[axis] % self.m == 0

    def top(
        self, scores: jax.Array, n: ArrayLike | None = None, *, where: jax.Array | None = None, absolute: bool = False
    ) -> jax.Array:
        """Marks the largest of every group.

        Args:
          scores: floats of a leaf's shape.
          n: how many, an integer or one for each group, as :meth:`counts` has them; default ``self.n``.
          where: bool, the shape of ``scores``: only these may be marked.
          absolute: rank by absolute value.

        Returns:
          A bool array of the leaf's shape.
        """
        groups, axis = self._grouped(scores)
        where = None if where is None else self._grouped(where)[0]
        axes = tuple(other for other in range(groups.ndim) if other != axis + 1)
        marked = top_k_mask(groups, self.n if n is None else n, where=where, absolute=absolute, axis=axes)
        if not self._by_layout:
            return merged(marked, scores)
        return self.layout.from_matrices(merged(marked, self.layout.to_matrices(scores)), scores)  # type: ignore[union-attr]

    def counts(self, mask: jax.Array) -> jax.Array:
        """The number of weights that each group keeps, int32 of shape (..., inputs / m, outputs)."""
        groups, axis = self._grouped(mask)
        return jnp.squeeze(count_true(groups, (axis + 1,)), axis + 1)

    def group_max(self, values: jax.Array, where: jax.Array) -> jax.Array:
        """The largest value of each group, at each of its weights.

        Args:
          values: floats of a leaf's shape, at least 0.
          where: bool, the shape of ``values``: the others count as 0.

        Returns:
          Floats of the leaf's shape.

        Examples:
          >>> import jax.numpy as jnp
          >>> n_of_m(1, 2, axis=0).group_max(jnp.array([[1.0], [2.0], [4.0], [3.0]]), jnp.ones((4, 1), bool)).tolist()
          [[2.0], [2.0], [4.0], [4.0]]
        """
        groups, axis = self._grouped(jnp.where(where, values, 0))
        largest = jnp.broadcast_to(jnp.max(groups, axis=axis + 1, keepdims=True), groups.shape)
        if not self._by_layout:
            return merged(largest, values)
        return self.layout.from_matrices(merged(largest, self.layout.to_matrices(values)), values)  # type: ignore[union-attr]

    def reserved(self, scores: jax.Array, mask: jax.Array, *, absolute: bool = True) -> jax.Array:
        """The n largest of every group."""
        return self.top(scores, where=mask, absolute=absolute)

    def grow(self, scores: jax.Array, before: jax.Array, survivors: jax.Array, gain: ArrayLike) -> jax.Array:
        """Returns to every group as many weights as it lost: of the others those with the largest scores."""
        del gain
        lost = self.counts(before) - self.counts(survivors)
        return survivors | self.top(scores, lost, where=~survivors, absolute=True)

    def holds(self, mask: jax.Array) -> jax.Array:
        """Whether a mask keeps exactly n of every group: a bool scalar."""
        return jnp.all(self.counts(mask) == self.n)

    @property
    def _by_layout(self) -> bool:
        """Whether groups lie along an axis of the leaf seen as matrices."""
        return self.layout is not None and isinstance(self.axis, str)

    def _seen_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return super()._seen_shape(shape) if self._by_layout else tuple(shape)

    def _axis(self, rank: int) -> int:
        """The axis along which groups lie; negative, or the rank and more, where there is none."""
        if isinstance(self.axis, str):
            return rank - (2 if self.axis == "inputs" else 1)
        return self.axis + rank if self.axis < 0 else self.axis

    def _grouped(self, x: jax.Array) -> tuple[jax.Array, int]:
        """An array with the axis along which groups lie split in two, (groups, m), and the first of these two."""
        self.unit_shape(x.shape)  # raises if it does not fit
        seen = self.layout.to_matrices(x) if self._by_layout else x  # type: ignore[union-attr]
        axis = self._axis(seen.ndim)
        return split_axis(seen, axis, self.m), axis
