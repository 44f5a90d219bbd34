"""Blocks of a network, and the sparsity of every matrix, for allocations that differ from block to block."""

import itertools
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.post_training.leaf import Matrices
from jaxsparse.post_training.owl import owl_densities
from jaxsparse.post_training.wanda import wanda_scores
from jaxsparse.trace.layout import Followed
from jaxsparse.trace.moments import Moments
from jaxsparse.trees import by_pattern, is_function, listed, natural_order

__all__ = ["Blocks", "BlocksLike", "block_names", "owl_sparsities"]

logger = logging.getLogger("jaxsparse")

NUMBERED = re.compile(r"(.*\D)?\d+")

Blocks = dict[str, np.ndarray]  # path -> the name of the block of each entry of its stack, None for none
BlocksLike: TypeAlias = Callable[[str], str | None] | Sequence[str] | None


def block_names(shapes: Mapping[str, Sequence[int]], leaves: Followed | None, blocks: BlocksLike) -> Blocks:
    """The blocks that leaves are parts of.

    Args:
      shapes: path -> shape, of the leaves that are pruned.
      leaves: the uses of the leaves, which tell the stacks; None where nothing is traced.
      blocks: a function from the path of a leaf to the name of its block, or None; patterns of paths, one for each
        block; or None: leaves that share a path up to their layer number. Each entry of a stack is a block of its own.

    Returns:
      path -> names, an array of the shape of the stack axes, scalar for a leaf that is in no stack.
    """
    stacks = {path: tuple(sorted(leaves.stacks.get(path, ()))) if leaves else () for path in shapes}
    named = _named(list(shapes), leaves, blocks, stacks)
    found = {}
    for path, shape in shapes.items():
        names = np.full([shape[axis] for axis in stacks[path]], None, object)
        for at in itertools.product(*map(range, names.shape)):
            if named[path] is not None:
                names[at] = named[path] + (f"[{','.join(map(str, at))}]" if at else "")
        found[path] = names
    return found


def _named(paths: list[str], leaves: Followed | None, blocks: Any, stacks: Mapping[str, tuple]) -> dict[str, Any]:
    """The block of each leaf, of a stack that of all its entries."""
    if blocks is not None:
        if is_function(blocks):
            return {path: blocks(path) for path in paths}
        patterns = [blocks] if isinstance(blocks, str) else blocks
        if not (isinstance(patterns, list | tuple) and all(isinstance(pattern, str) for pattern in patterns)):
            raise ValueError(
                f"blocks must be a function from a path to the name of its block, or patterns of paths, got {blocks!r}"
            )
        found = by_pattern([(pattern, pattern) for pattern in patterns], paths, "blocks")
        return {path: found.get(path) for path in paths}
    scans: dict[int, list[str]] = {}
    for path in paths:
        if stacks[path] and leaves is not None:
            around = [eqn for use in leaves.uses.get(path, []) for eqn in use.where.outer]
            outer = [eqn for eqn in around if eqn.primitive.name == "scan"]
            scans.setdefault(id(outer[-1]) if outer else 0, []).append(path)
    names: dict[str, Any] = {path: _numbered(path) for path in paths if not stacks[path]}
    for together in scans.values():
        name = _shared(together)
        while name in names.values():
            name += "'"
        names |= dict.fromkeys(together, name)
    return names


def _numbered(path: str) -> str | None:
    """A path up to its first part that ends with a number."""
    parts = path.split("/")
    end = next((i for i, part in enumerate(parts) if NUMBERED.fullmatch(part)), None)
    return None if end is None else "/".join(parts[: end + 1])


def _shared(paths: Sequence[str]) -> str:
    """The first parts that all paths share."""
    parts = zip(*(path.split("/") for path in paths), strict=False)
    return "/".join(part[0] for part in itertools.takewhile(lambda part: len(set(part)) == 1, parts)) or "stack"


def owl_sparsities(
    leaves: Mapping[str, Any],
    moments: Mapping[str, Moments],
    blocks: Blocks,
    stacks: Mapping[str, Any],
    sparsity: float,
) -> dict[str, np.ndarray]:
    """The sparsity of every leaf by OWL, for each entry of its stack.

    Args:
      leaves: path -> leaf.
      moments: path -> moments of the dense network.
      blocks: of :func:`block_names`.
      stacks: path -> its axes that scans go over.
      sparsity: of the whole.
    """
    scores: dict[str, list[Any]] = {}
    for path, names in blocks.items():
        if path not in moments:
            continue
        found, leading = _scores(leaves[path], moments[path]), moments[path].leading
        order = [leading.index(axis) for axis in sorted(stacks.get(path, ())) if axis in leading]
        found = jnp.moveaxis(found, order, range(len(order)))
        names = names.reshape([n for n in names.shape if n > 1] if len(order) < names.ndim else names.shape)
        for at in itertools.product(*map(range, names.shape)):
            if names[at] is not None:
                scores.setdefault(names[at], []).append(found[at])
    if len(scores) < 2:
        raise ValueError(
            f"allocation 'owl' shares out among blocks, and found {listed([*scores]) or 'none'} among the leaves "
            f"{listed([*blocks])}: name them by blocks=, a function from a path to the name of its block"
        )
    ordered = {name: scores[name] for name in sorted(scores, key=natural_order)}
    densities = owl_densities(ordered, sparsity)
    logger.info("owl: %s", ", ".join(f"{name} {float(d):.3f}" for name, d in densities.items()))
    if left := [path for path, names in blocks.items() if None in names.reshape(-1)]:
        logger.info("owl: in no block, so as sparse as the whole: %s", listed(left))
    one = np.vectorize(lambda name: 1 - float(densities[name]) if name in densities else sparsity, otypes=[np.float64])
    return {path: one(names) for path, names in blocks.items()}


def _scores(leaf: Any, moments: Moments) -> jax.Array:
    """Wanda's scores of all matrices of a leaf, (leading..., inputs, outputs)."""
    matrices = Matrices.of(moments, leaf.shape)
    mean = moments.squares / jnp.maximum(moments.rows, 1)[..., None]

    @jax.jit
    def scores(leaf, mean):
        kernels = matrices.apart(leaf).astype(jnp.float32)
        flat = kernels.reshape(math.prod(matrices.sizes), *kernels.shape[-2:])
        return jax.vmap(wanda_scores)(flat, mean.reshape(len(flat), -1)).reshape(kernels.shape)

    return scores(leaf, mean)
