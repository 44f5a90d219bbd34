"""Conditions under which the dead entries of a value are zeros: which slices of leaves must be zero for that.

A condition is a set of choices, each a set of places (path, axis): it holds if, for any one of the choices, the dead
entries of all its places are zeros. No choice, ``NEVER``, never holds; the empty choice, in ``ALWAYS``, always does.
As a truth value a condition says whether it can hold at all.
"""

import functools

__all__ = ["ALWAYS", "NEVER", "Condition", "Place", "all_of", "any_of", "cost", "of_place", "only"]

Place = tuple[str, int, int]  # the path of a leaf, the axis, and the rank of the leaf
Condition = frozenset[frozenset[Place]]

NEVER: Condition = frozenset()
ALWAYS: Condition = frozenset([frozenset()])
AT_MOST = 8  # choices: with fewer, less is found, but nothing wrong


def of_place(path: str, axis: int, rank: int) -> Condition:
    """The condition that the dead entries of a leaf along an axis are zeros."""
    return frozenset([frozenset([(path, axis, rank)])])


@functools.lru_cache(65536)
def all_of(*conditions: Condition) -> Condition:
    """The condition that holds where all of some do.

    Examples:
      >>> a, b = of_place("a", 0, 1), of_place("b", 0, 1)
      >>> all_of(a, any_of(a, b)) == a
      True
    """
    found = ALWAYS
    for condition in conditions:
        if condition != found:
            found = _fewest({one | other for one in found for other in condition})
    return found


@functools.lru_cache(65536)
def any_of(*conditions: Condition) -> Condition:
    """The condition that holds where any of some does."""
    return _fewest(set().union(*conditions))


@functools.lru_cache(65536)
def only(condition: Condition, places: frozenset[tuple[str, int]]) -> Condition:
    """Reduce a condition to some places, (path, axis), the only ones where entries are dead."""
    return _fewest({frozenset(place for place in choice if place[:2] in places) for choice in condition})


def _fewest(choices: set[frozenset[Place]]) -> Condition:
    """The choices of which no other is a part; of many, those with the smallest leaves: vectors rather than kernels."""
    if len(choices) < 2:
        return frozenset(choices)
    kept: list[frozenset[Place]] = []
    for choice in sorted(choices, key=cost):
        if len(kept) < AT_MOST and not any(other <= choice for other in kept):
            kept.append(choice)
    return frozenset(kept)


def cost(choice: frozenset[Place]) -> tuple:
    """The order of preference: vectors before kernels, few before many, and then by name."""
    return sum(rank for _, _, rank in choice), len(choice), sorted(choice)
