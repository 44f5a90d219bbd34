"""Calibration data: a function traced with every batch, and what is recorded in it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.layouts import Layout
from jaxsparse.post_training.memory import widest
from jaxsparse.post_training.samples import checked_batches, kind, shapes_of
from jaxsparse.post_training.walk import Stops, Walk, Weights
from jaxsparse.prunable import default_choice
from jaxsparse.trace.analysis import Analysis
from jaxsparse.trace.layout import Followed, followed, layouts_of
from jaxsparse.trace.moments import Moments
from jaxsparse.trace.products import PRODUCTS
from jaxsparse.trace.program import Traced, is_array, trace
from jaxsparse.trace.record import moments_of
from jaxsparse.trees import by_path, leaf_paths

__all__ = ["Calibration"]


class Calibration:
    """A function with the batches that it is calibrated by. Batches of one shape share a program.

    Args:
      apply: a function of params.
      params: as ``apply`` takes them.
      batches: what ``apply`` takes after the params: tuples, or the one argument; or None.

    Attributes:
      programs: each program with the inputs of its batches, without those that are params.

    Raises:
      ValueError: for a batch that ``apply`` cannot be traced with.
    """

    def __init__(self, apply: Callable[..., Any], params: Any, batches: Iterable[Any] | None):
        self.programs: list[tuple[Traced, list[list[Any]]]] = []
        known: dict[Any, int] = {}
        for number, args in enumerate(checked_batches(() if batches is None else batches, least=0)):
            leaves, treedef = jax.tree.flatten(args)
            key = (treedef, *(kind(leaf) for leaf in leaves))
            if key not in known:
                known[key] = len(self.programs)
                try:
                    self.programs.append((trace(apply, params, *args), []))
                except Exception as error:
                    raise ValueError(
                        f"apply cannot take batch {number}, {shapes_of(args)}, after the params: {error}"
                    ) from error
            inputs = [jnp.asarray(leaf) if isinstance(leaf, np.ndarray | np.generic) else leaf for leaf in leaves]
            self.programs[known[key]][1].append([leaf for leaf in inputs if is_array(leaf)])
        self._steps: dict[tuple, tuple[Callable, dict[str, str]]] = {}
        self._followed = [followed(traced) for traced, _ in self.programs]

    def __bool__(self) -> bool:
        return bool(self.programs)

    @property
    def uses(self) -> Followed:
        """The products and lookups of the leaves, in the program of the first batch."""
        return self._followed[0] if self.programs else Followed({}, {})

    def layouts(self) -> dict[str, Layout]:
        """The inputs, outputs and stacks of the leaves, as far as the function tells."""
        return layouts_of(self.programs[0][0], self.uses) if self.programs else {}

    def multiplied(self) -> set[str]:
        """The leaves that take part in a product."""
        return {path for path, uses in self.uses.uses.items() if any(map(_is_product, uses))}

    def elsewhere(self) -> dict[str, str]:
        """The leaves that products are made of in whatever form, such as chosen by a condition: path -> the first one.

        Another walk through the programs, for what the usual one has no word of.
        """
        sites = [site for traced, _ in self.programs for site in Analysis(traced, outputs="ignore").sites]
        return {path: str(site.where) for site in reversed(sites) for path in site.leaves}

    def default(self, arrays: Any, layout: Mapping[str, Layout]) -> Any:
        """The leaves that are pruned by default: matrices, but for tables of tokens and the output layer behind them.

        Args:
          arrays: the params.
          layout: path -> layout.

        Returns:
          A bool for each leaf, like ``arrays``.
        """
        chosen = default_choice(arrays, layout)
        lookups = {path for path, uses in self.uses.uses.items() if not all(map(_is_product, uses))}
        dense = {path for path, leaf in by_path(arrays).items() if path in lookups and leaf.ndim == 2 and chosen[path]}
        if dense:
            last = max(self.uses.uses, key=lambda path: self.uses.uses[path][-1].number)
            dense |= {last}
        if any(flag and path not in dense for path, flag in chosen.items()):
            chosen = {path: flag and path not in dense for path, flag in chosen.items()}
        return jax.tree.structure(arrays).unflatten([chosen[path] for path in leaf_paths(arrays)])

    def walks(self, weights: Weights, gram: bool) -> list[Stops]:
        """A walk for each batch."""
        found = []
        for (traced, batches), uses in zip(self.programs, self._followed, strict=True):
            walk = Walk(traced, uses, weights, gram)
            found += [walk.start(_inputs(traced, {}, batch)) for batch in batches]
        return found

    def recorded(
        self, now: Mapping[str, Any], paths: Sequence[str], gram: bool
    ) -> tuple[dict[str, Moments], dict[str, str]]:
        """Sum up what arrives at leaves in the whole program, over all batches and all products of a leaf.

        Args:
          now: path -> leaf, of all params.
          paths: of the leaves to look at.
          gram: whether to sum up Gram matrices.

        Returns:
          path -> moments, and path -> why a product is not recorded.
        """
        total: dict[str, Moments] = {}
        why: dict[str, str] = {}
        for i, (traced, batches) in enumerate(self.programs):
            step, missed = self._step(i, tuple(paths), gram)
            nothing = not jax.eval_shape(step, _inputs(traced, now, batches[0]))
            why |= missed
            for batch in [] if nothing else batches:
                found = step(_inputs(traced, now, batch))
                total |= {
                    path: jax.tree.map(jnp.add, total[path], moments) if path in total else moments
                    for path, moments in found.items()
                }
                jax.block_until_ready(total)  # a batch at a time
        return total, why

    def _step(self, program: int, paths: tuple[str, ...], gram: bool) -> tuple[Callable, dict[str, str]]:
        key = (program, paths, gram)
        if key not in self._steps:
            traced, missed = self.programs[program][0], dict[str, str]()

            @jax.jit
            def step(inputs):
                found, why = moments_of(traced, inputs, paths, gram)
                missed.update(why)
                return found

            self._steps[key] = step, missed
        return self._steps[key]

    def widest(self) -> int:
        """The bytes of the activations of all batches, each at its widest point."""
        return sum(
            len(batches) * widest(traced.closed, [path is None for path in traced.paths])
            for traced, batches in self.programs
        )


def _is_product(use: Any) -> bool:
    return use.where.eqn.primitive.name in PRODUCTS


def _inputs(traced: Traced, now: Mapping[str, Any], batch: Sequence[Any]) -> list[Any]:
    rest = iter(batch)
    return [next(rest) if path is None else now.get(path) for path in traced.paths]
