"""Where in a tree the params of blocks are: a path with a star for the number, or that of stacked layers."""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxsparse.trees import by_path, leaf_paths, listed

__all__ = ["numbered", "numbers_of", "outermost", "stack_below"]


def stack_below(blocks: str) -> re.Pattern[str]:
    """The paths of leaves of stacked layers; something may stand before, as in the state of an optimizer."""
    return re.compile(rf"(?P<before>|.*?/){re.escape(blocks.strip('/'))}(/.*|)$")


def numbered(blocks: str) -> re.Pattern[str]:
    """The paths of what is of a block with a number; something may stand before.

    Raises:
      ValueError: for a path with another number of stars than one, or that begins with it.
    """
    if blocks.count("*") != 1 or blocks.startswith("*"):
        raise ValueError(
            "blocks must be a path with one * for the number of the block, which does not stand first, or the path of "
            f"stacked layers, got {blocks!r}"
        )
    start, end = map(re.escape, blocks.strip("/").split("*"))
    return re.compile(rf"(?P<before>|.*?/){start}(?P<number>\d+){end}(/.*|)$")


def outermost(befores: Iterable[str]) -> set[str]:
    """The shortest of the paths that stand before blocks, without longer ones that begin with one of them.

    Examples:
      >>> sorted(outermost(["0/mu/", "0/mu/head/", "0/nu/"]))
      ['0/mu/', '0/nu/']
    """
    found = set(befores)
    return {one for one in found if not any(one != other and one.startswith(other) for other in found)}


def numbers_of(params: Any, blocks: str) -> tuple[dict[str, int], int]:
    """The number of the block of each leaf that has one, by path, 0 for all of a stack; and how many blocks there are.

    Raises:
      ValueError: if there are none, if numbers are missing, or if stacked leaves have different lengths.

    Examples:
      >>> import jax.numpy as jnp
      >>> numbers_of({"embed": jnp.ones(3), "block_0": jnp.ones(3), "block_1": jnp.ones(3)}, "block_*")
      ({'block_0': 0, 'block_1': 1}, 2)
    """
    paths = leaf_paths(params)
    stacked = "*" not in blocks
    pattern = stack_below(blocks) if stacked else numbered(blocks)
    matches = {path: match for path in paths if (match := pattern.match(path)) and not match["before"]}
    if not matches:
        raise ValueError(f"blocks={blocks!r} names none of the params, which are {listed(paths)}")
    if stacked:
        leaves = by_path(params)
        lengths = {path: np.shape(leaves[path])[0] for path in matches if np.ndim(leaves[path])}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"blocks={blocks!r} must name leaves with one axis of layers in front, got {lengths}")
        return dict.fromkeys(lengths, 0), next(iter(lengths.values()))
    number = {path: int(match["number"]) for path, match in matches.items()}
    found = sorted(set(number.values()))
    if found != list(range(len(found))):
        raise ValueError(f"blocks={blocks!r} must name params of blocks 0, 1, ..., and has those of {found}")
    return number, len(found)
