"""The work of pruning once: weights and masks on the way, and what has to be said about them."""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.layouts import Layout
from jaxsparse.placement import copied
from jaxsparse.post_training.calibration import Calibration
from jaxsparse.post_training.leaf import Matrices, prune_leaf, written
from jaxsparse.post_training.memory import as_text
from jaxsparse.post_training.progress import Progress
from jaxsparse.post_training.rules import Rule
from jaxsparse.post_training.walk import Entry, Weights, in_step
from jaxsparse.structures import Structure, n_of_m
from jaxsparse.trace.moments import Moments
from jaxsparse.trees import listed
from jaxsparse.user_warnings import warn

__all__ = ["Job"]

logger = logging.getLogger("jaxsparse")

DAMPING = 0.01  # what rules begin with


class Job:
    """Prunes the leaves of a tree, one after the other.

    Args:
      rule: what prunes a matrix.
      leaves: path -> leaf, of all params.
      structures: path -> the structure of its matrices, of the leaves to prune.
      shares: path -> the sparsity, of the leaves to prune; or one for each entry of its stack.
      layouts: path -> layout.
      calibration: function and data.
      quiet: whether leaves that nothing is multiplied by are no cause for a warning.

    Attributes:
      weights: the weights as they are now.
      masks: path -> mask, of the leaves that are pruned.
      shares: as given; may be changed before the work begins.
    """

    def __init__(
        self,
        rule: Rule,
        leaves: Mapping[str, Any],
        structures: Mapping[str, Structure],
        shares: Mapping[str, np.ndarray],
        layouts: Mapping[str, Layout],
        calibration: Calibration,
        quiet: bool,
    ):
        self.rule, self.structures, self.layouts, self.calibration = rule, structures, layouts, calibration
        self.shares, self.quiet = dict(shares), quiet
        now = {path: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf for path, leaf in leaves.items()}
        self.weights = Weights(now, set(structures))
        self.masks: dict[str, Any] = {}
        self._missed: dict[str, str] = {}
        self._partly: dict[str, str] = {}
        self._silent: list[str] = []
        self._damped: list[str] = []
        self._stacks = {path: tuple(sorted(calibration.uses.stacks.get(path, ()))) for path in structures}
        total = sum(self._entries(path) for path in structures)
        self._progress = Progress(total, f"prune_once, {rule.name}")

    def _entries(self, path: str) -> int:
        return math.prod(self.weights.now[path].shape[axis] for axis in self._stacks[path])

    # Ways through.

    def by_layout(self) -> None:
        """Prune all leaves by a rule that needs nothing, by inputs and outputs as the layouts have them."""
        leaves = self.structures
        if self.quiet and self.calibration:  # as by the other rules
            leaves = {path: unit for path, unit in leaves.items() if path in self.calibration.multiplied()}
        with self._progress:
            for path in leaves:
                at, shape = self.layouts[path], self.weights.now[path].shape
                stack: tuple = at.stack  # type: ignore[assignment]
                inputs = (*at.places(len(shape)), *at.inputs)  # type: ignore[misc]
                self._prune(Entry(path), None, Matrices(shape, inputs, stack, tuple(shape[axis] for axis in stack)))

    def in_one_walk(self) -> None:
        """Prune each leaf by what arrives at it behind those that are pruned already."""
        largest = max(map(self._bytes, self.structures))
        self._say_memory(largest)
        gram = self.rule.needs == "gram"
        with self._progress:
            in_step(self.calibration.walks(self.weights, gram), self.weights, self._answer)
            self._answer(self._left(), None)

    def of_dense(self) -> None:
        """Prune all leaves at once by what arrives at them in the dense network."""
        self._say_memory(sum(self._bytes(path) * self._entries(path) for path in self.structures))
        with self._progress:
            self._answer(tuple(map(Entry, self.structures)), None)

    def _left(self) -> tuple[Entry, ...]:
        """The entries that the walk has not come to: of leaves that it could not follow."""
        left = []
        for path in self.structures:
            of_leaf = {entry for entry in self.weights.done if entry.path == path}
            if path not in self.weights.waiting:
                continue
            axes = self._stacks[path]
            every = itertools.product(*(range(self.weights.now[path].shape[axis]) for axis in axes))
            entries = [Entry(path, tuple(zip(axes, at, strict=True))) for at in every]
            done = {frozenset(entry.at) for entry in of_leaf}
            left += [entry for entry in entries if frozenset(entry.at) not in done] if of_leaf else [Entry(path)]
        return tuple(left)

    def _answer(self, entries: Sequence[Entry], moments: Moments | None) -> None:
        """Prune entries of leaves, by their moments or by those that are recorded now."""
        if moments is not None:
            (entry,) = entries
            self._prune(entry, moments)
            return
        if not entries:
            return
        paths = tuple(dict.fromkeys(entry.path for entry in entries))
        found, missed = self.calibration.recorded(self.weights.now, paths, self.rule.needs == "gram")
        for entry in entries:
            if entry.path in found:
                if entry.path in missed:
                    self._partly[entry.path] = missed[entry.path]
                self._prune(entry, _at(found[entry.path], entry.at))
            else:
                self.weights.waiting.discard(entry.path)
                self._missed[entry.path] = missed.get(entry.path, "")

    # One matrix, or all of a stack.

    def _prune(self, entry: Entry, moments: Moments | None, matrices: Matrices | None = None) -> None:
        path, structure = entry.path, self.structures[entry.path]
        leaf, at = self.weights.now[path], dict(entry.at)
        if moments is not None:
            if isinstance(structure, n_of_m):
                moments = _in_groups(moments, leaf.shape, self.layouts[path])
            matrices = Matrices.of(moments, [1 if axis in at else n for axis, n in enumerate(leaf.shape)])
        assert matrices is not None
        sparsity = _share(self.shares[path], self._stacks[path], at, matrices)
        found = prune_leaf(leaf, entry.at, self.rule, structure, sparsity, moments, matrices)
        silent, damping, arrives, finite = jax.device_get((found.silent, found.damping, found.arrives, found.finite))
        if not arrives:
            raise ValueError(f"what arrives at {entry} is not finite: do the batches or params have NaN or infinity?")
        if not finite:
            raise ValueError(f"rule {self.rule.name!r} made weights of {entry} that are not finite")
        self._note(entry, matrices, silent, damping)
        if at:
            if path not in self.masks:
                self.weights.now[path], self.masks[path] = copied(leaf), jnp.ones_like(leaf, bool)
            self.weights.now[path] = written(self.weights.now[path], found.leaf, entry.at)
            self.masks[path] = written(self.masks[path], found.mask, entry.at)
            self.weights.done.add(entry)
            if sum(other.path == path for other in self.weights.done) == self._entries(path):
                self.weights.waiting.discard(path)
        else:
            self.weights.now[path], self.masks[path] = found.leaf, found.mask
            self.weights.waiting.discard(path)
        self._progress.tick(str(entry), 1 if at else self._entries(path))

    def _note(self, entry: Entry, matrices: Matrices, silent: np.ndarray, damping: np.ndarray) -> None:
        inputs = math.prod(matrices.shape[axis] for axis in matrices.inputs)
        for index in np.ndindex(silent.shape):
            name = f"{entry}[{','.join(map(str, index))}]" if index else str(entry)
            if silent[index]:
                self._silent.append(f"{name} ({silent[index]} of {inputs} inputs)")
            if damping[index] > 1.5 * DAMPING:
                self._damped.append(f"{name} ({damping[index]:.2g})")

    # What is said.

    def _bytes(self, path: str) -> int:
        """The bytes of the moments of one matrix of a leaf."""
        at, shape = self.layouts[path], self.weights.now[path].shape
        inputs = math.prod(shape[axis] for axis in (*at.places(len(shape)), *at.inputs))  # type: ignore[misc]
        return 4 * inputs * (inputs if self.rule.needs == "gram" else 1)

    def _say_memory(self, moments: int) -> None:
        logger.info(
            "prune_once: beside params and masks at most %s of moments, and %s of activations of all batches",
            as_text(moments), as_text(self.calibration.widest()),
        )  # fmt: skip

    def report(self) -> None:
        """Say what is pruned, and warn of what is not, or not as it should be."""
        if unexplained := [path for path in self.structures if path not in self.masks and not self._missed.get(path)]:
            products = self.calibration.elsewhere()
            self._missed |= {
                path: f"is multiplied in another form at {products[path]}" for path in unexplained if path in products
            }
        told = {path: why or "is multiplied by nothing" for path, why in self._missed.items() if why or not self.quiet}
        if told:
            hint = f". Rule {self.rule.name!r} prunes what prunable= names" if self.rule.needs == "nothing" else ""
            warn(
                "not all leaves are pruned: " + "; ".join(f"{path} {why}" for path, why in told.items()) + hint,
            )
        if self._partly:
            warn(
                "not all that arrives at a leaf counts: "
                + "; ".join(f"{path} {why}, beside the products that count" for path, why in self._partly.items()),
            )
        if self._silent:
            warn(
                f"nothing but zeros arrives at inputs of {listed(self._silent)}: more calibration data may reach them. "
                "Where it is all inputs, weights went by magnitude",
            )
        if self._damped:
            warn(
                f"Gram matrices took more damping to be positive definite: {listed(self._damped)}. More rows of "
                "calibration data may help",
            )
        asked = [path for path, mask in self.masks.items() if mask.size and np.all(self.shares[path] > 0)]
        whole = [path for path in asked if bool(self.masks[path].all())]
        if whole:
            warn(
                f"no weight of {listed(whole)} is pruned: the sparsity rounds down to none of so few",
            )
        dense = [path for path in self.weights.now if path not in self.masks]
        logger.info("prune_once: pruned %s; dense: %s", ", ".join(self.masks), ", ".join(dense) or "nothing")


def _share(share: np.ndarray, stack: Sequence[int], at: Mapping[int, int], matrices: Matrices) -> np.ndarray:
    """The sparsity of each matrix, (leading...), from that of a leaf or those of the entries of its stack."""
    if share.ndim:
        share = share[tuple(at.get(axis, slice(None)) for axis in stack)]
        left = [axis for axis in stack if axis not in at]
        known = [axis for axis in left if axis in matrices.leading]
        share = share.reshape([share.shape[left.index(axis)] for axis in known])  # others have size 1
        order = [known.index(axis) for axis in matrices.leading if axis in known]
        share = share.transpose(order).reshape([
            n if axis in known else 1 for axis, n in zip(matrices.leading, matrices.sizes, strict=True)
        ])  # fmt: skip
    return np.broadcast_to(share, matrices.sizes)


def _at(moments: Moments, at: Sequence[tuple[int, int]]) -> Moments:
    """The moments of an entry of stacked layers."""
    leading = list(moments.leading)
    rows, first, second = moments.rows, moments.first, moments.second
    for axis, i in at:
        if axis in leading:
            where = leading.index(axis)
            rows, first, second = (jnp.take(part, i, where) for part in (rows, first, second))
            leading.pop(where)
    return Moments(rows, first, second, moments.inputs, tuple(leading))


def _in_groups(moments: Moments, shape: Sequence[int], layout: Layout) -> Moments:
    """Moments with the inputs in the order in which n of every m stay: the places of a convolution go first."""
    axes = moments.inputs
    order = [*(axis for axis in axes if axis not in layout.inputs), *(axis for axis in axes if axis in layout.inputs)]  # type: ignore[operator]
    if order == list(axes):
        return moments
    number = np.arange(math.prod(shape[axis] for axis in axes)).reshape([shape[axis] for axis in axes])
    number = number.transpose([axes.index(axis) for axis in order]).reshape(-1)
    first, second = moments.first[..., number], moments.second[..., number]
    if second.ndim > first.ndim:
        second = second[..., number, :]
    return Moments(moments.rows, first, second, tuple(order), moments.leading)
