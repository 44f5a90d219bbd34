"""Params and states of optimizers without some blocks."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxsparse.post_training.block_names import numbered, outermost, stack_below
from jaxsparse.trace.states import recounted, select
from jaxsparse.transforms.gated import GatedState
from jaxsparse.transforms.mask_link import MaskState
from jaxsparse.trees import listed, path_name

__all__ = ["drop_blocks"]

logger = logging.getLogger("jaxsparse")


def drop_blocks(tree: Any, blocks: str, remove: Sequence[int]) -> Any:
    """Remove whole blocks from params, masks, or the state of an optimizer; the others are numbered anew.

    The model that takes the result is the same module with fewer layers. What is removed best,
    :func:`block_scores` says: ``remove=np.argsort(scores)[:2]``.

    Args:
      tree: any pytree of dicts, sequences, modules and states of optimizers, in which the blocks are entries of dicts,
        items of lists or tuples, or layers that a scan stacks. Leaves are arrays or their shapes.
      blocks: where they are: a path with ``*`` for the number of the block, such as ``"block_*"`` or ``"layers/*"``, or
        the path of what a scan stacks along the first axis of its leaves, such as ``"blocks"``. Anything may stand
        before it, as does ``0/mu/`` in the state of an optimizer, but where it fits it is not looked for further down,
        so ``"layers/*"`` leaves ``layers/0/mlp/layers/1`` and ``head/layers/1`` alone. What it fits is logged.
      remove: the numbers of the blocks to remove, from 0 on.

    Returns:
      The tree without these blocks. States of methods of this library count the weights that their masks keep anew.

    Raises:
      ValueError: if nothing has this path, if ``remove`` has anything but numbers of the blocks or leaves none, and for
        states that have numbers for each leaf, naming them.

    Examples:
      >>> import jax.numpy as jnp
      >>> tree = {"block_0": {"w": 0.0}, "block_1": {"w": 1.0}, "block_2": {"w": 2.0}, "head": 3.0}
      >>> drop_blocks(tree, "block_*", remove=[1])
      {'block_0': {'w': 0.0}, 'block_1': {'w': 2.0}, 'head': 3.0}
      >>> drop_blocks({"blocks": {"w": jnp.arange(3.0)}}, "blocks", remove=[0])["blocks"]["w"].tolist()
      [1.0, 2.0]
    """
    given = np.asarray(remove)
    if given.ndim != 1 or (given.size and not np.issubdtype(given.dtype, np.integer)):
        raise ValueError(f"remove must be the numbers of the blocks to remove, such as [0, 2], got {remove!r}")
    gone = sorted(set(given.tolist()))
    _refuse(tree, "*" in blocks)
    dropped = _numbered(tree, blocks, gone) if "*" in blocks else _stacked(tree, blocks, gone)
    return recounted(dropped)


def _refuse(tree: Any, written_out: bool) -> None:
    for node in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, GatedState | MaskState)):
        if isinstance(node, GatedState):
            raise ValueError(
                f"{node.method}: gates cannot be dropped with blocks: give the state of the optimizer inside, "
                "opt_state.inner_state, with the params to evaluate with"
            )
        if isinstance(node, MaskState) and written_out and jax.tree.leaves((node.watched, node.renewal)):
            raise ValueError(
                f"{type(node).__name__} has numbers for each leaf, which cannot be dropped with blocks: train on with "
                "jaxsparse.mask_updates of the masks, or start the method anew with them"
            )


def _stays(gone: Sequence[int], count: int, blocks: str) -> np.ndarray:
    """Which blocks stay, (count,), bool."""
    if wrong := [one for one in gone if not 0 <= one < count]:
        raise ValueError(f"remove names {wrong}, but blocks={blocks!r} has the numbers 0 to {count - 1}")
    if len(gone) == count:
        raise ValueError(f"all {count} of blocks={blocks!r} are to be removed: one must stay at least")
    return ~np.isin(np.arange(count), gone)


def _stacked(tree: Any, blocks: str, gone: Sequence[int]) -> Any:
    pattern = stack_below(blocks)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    matches = {i: match for i, (path, _) in enumerate(leaves) if (match := pattern.match(path_name(path)))}
    before = outermost(match["before"] for match in matches.values())
    layers = {i: match[0] for i, match in matches.items() if match["before"] in before and np.ndim(leaves[i][1])}
    lengths = {path: np.shape(leaves[i][1])[0] for i, path in layers.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"blocks={blocks!r} must name leaves with one axis of layers in front, got {lengths}")
    stays = _stays(gone, next(iter(lengths.values())), blocks)
    logger.info("blocks=%r are layers of %s", blocks, listed(list(lengths)))
    return treedef.unflatten([select(leaf, stays, 0) if i in layers else leaf for i, (_, leaf) in enumerate(leaves)])


def _numbered(tree: Any, blocks: str, gone: Sequence[int]) -> Any:
    pattern = numbered(blocks)
    before = outermost(match["before"] for path in _paths(tree) if (match := pattern.match(path)))
    counts: dict[str, int] = {}

    def number_in(path: str, key: Any) -> tuple[int, int, int] | None:
        """The number of a block in a key, and where it begins and ends in its text."""
        match, start = pattern.match(path + str(key)), len(path)
        if match is None or match["before"] not in before or match.start("number") < start:
            return None
        return int(match["number"]), match.start("number") - start, match.end("number") - start

    def walked(node: Any, path: str) -> Any:
        keys, values, treedef = _children(node)
        if treedef is None:
            return node
        named = isinstance(node, Mapping)
        found = [number_in(path, key) for key in keys]
        inside = [walked(value, f"{path}{key}/") for key, value in zip(keys, values, strict=True)]
        numbers = sorted({one[0] for one in found if one})
        if not numbers:
            return _like(node, zip(keys, inside, strict=True)) if named else treedef.unflatten(inside)
        if numbers != list(range(len(numbers))):
            raise ValueError(f"{path or 'the tree'} must have the blocks 0, 1, ..., and has {numbers}")
        counts[path] = len(numbers)
        stays = _stays(gone, len(numbers), blocks)
        kept = [
            (key, one, value) for key, one, value in zip(keys, found, inside, strict=True) if not one or stays[one[0]]
        ]
        if named:
            texts = [key[slice(*one[1:])] for key, one, _ in kept if one and isinstance(key, str)]
            padded = any(len(text) > 1 and text[0] == "0" for text in texts)  # layer_00, layer_01, ..., layer_11
            width = max(map(len, texts)) if padded else 1
            return _like(node, [(_renamed(key, one, stays, width), value) for key, one, value in kept])
        if isinstance(node, list | tuple) and not hasattr(node, "_fields"):
            return type(node)([value for _, _, value in kept])
        raise ValueError(f"the blocks of {path or 'the tree'} are attributes of {type(node).__name__}, which stay")

    dropped = walked(tree, "")
    if not counts:
        raise ValueError(f"blocks={blocks!r} names nothing in the tree")
    if len(set(counts.values())) > 1:
        raise ValueError(f"blocks={blocks!r} names different numbers of blocks, {counts}: give more of the path")
    logger.info("blocks=%r are in %s", blocks, listed([path or "the tree" for path in counts]))
    return dropped


def _children(node: Any) -> tuple[list[Any], list[Any], Any]:
    """The keys and children of a node, and its tree; None for that of a leaf, which has neither."""
    children, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
    if len(children) == 1 and not children[0][0]:
        return [], [], None
    if isinstance(node, Mapping):
        return list(node), [node[key] for key in node], treedef
    return [path_name(key) for key, _ in children], [child for _, child in children], treedef


def _paths(node: Any, path: str = "") -> Iterator[str]:
    """The paths of all that is below a node."""
    keys, values, _ = _children(node)
    for key, value in zip(keys, values, strict=True):
        yield f"{path}{key}"
        yield from _paths(value, f"{path}{key}/")


def _like(node: Mapping[Any, Any], items: Iterable[tuple[Any, Any]]) -> Any:
    """A mapping of a node's type with other items."""
    if isinstance(node, defaultdict):
        return defaultdict(node.default_factory, items)
    return type(node)(dict(items))  # type: ignore[call-arg]


def _renamed(key: Any, one: tuple[int, int, int] | None, stays: np.ndarray, width: int) -> Any:
    """The key with its number counted among the blocks that stay, in so many digits at least."""
    if one is None:
        return key
    number, start, end = one
    new = int(stays[:number].sum())
    return f"{key[:start]}{new:0{width}d}{key[end:]}" if isinstance(key, str) else new
