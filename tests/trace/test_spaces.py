"""Which entries live and die together: the laws of unions, conjunctions, merges and splits."""

import functools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsparse.trace.conditions import ALWAYS, NEVER, all_of, any_of, of_place, only
from jaxsparse.trace.spaces import Spaces


def alive(spaces, ids, n, living):
    """Which entries of an axis live, if ``living`` says it of the nodes that are no conjunctions."""
    ids = spaces.expand(ids)
    return np.ones(n, bool) if ids is None else (living[ids] | (ids == 0)).all(1)


def combined(parts):
    """An entry of all combinations lives as long as its entries in all parts do."""
    return lambda living: functools.reduce(np.logical_and.outer, [part(living) for part in parts]).ravel()


def test_unions_and_reasons():
    spaces = Spaces()
    a, b, c = (spaces.fresh(3) for _ in range(3))
    spaces.unify(a, b, "a + b")
    assert (spaces.expand(a) == spaces.expand(b)).all()
    assert not (spaces.expand(a) == spaces.expand(c)).any()
    spaces.freeze(b[1:2], "looked at")
    assert spaces.expand(a).ravel().tolist() == [a[0, 0], 0, a[2, 0]]
    assert spaces.why(a[1:2]) == ["looked at"]
    assert spaces.why(a[:1]) == []
    spaces.unify(c, None, "c + whole")
    assert spaces.expand(c) is None
    assert spaces.why(c) == ["c + whole"]
    spaces.unify(a, c, "a + c")  # the first reason is handed on
    assert spaces.expand(b) is None
    assert spaces.why(b) == ["c + whole", "looked at"]


def test_a_merged_axis_has_a_column_for_each():
    spaces = Spaces()
    heads, inner = spaces.fresh(2), spaces.fresh(3)
    merged = spaces.merge([heads, inner], [2, 3])
    assert merged.tolist() == [[h, i] for h in heads.ravel() for i in inner.ravel()]
    back = spaces.split(merged, [2, 3], "reshaped")
    assert [ids.tolist() for ids in back] == [heads.tolist(), inner.tolist()]
    assert spaces.merge([None, inner], [2, 3]).ravel().tolist() == 2 * inner.ravel().tolist()
    assert spaces.merge([None, None], [2, 3]) is None
    assert spaces.split(None, [2, 3], "reshaped") == [None, None]


def test_a_split_defines_what_it_splits():
    spaces = Spaces()
    flat = spaces.fresh(6)
    heads, inner = spaces.split(flat, [2, 3], "reshaped")
    assert spaces.expand(flat).tolist() == spaces.merge([heads, inner], [2, 3]).tolist()
    again = spaces.split(flat, [2, 3], "reshaped once more")
    assert [ids.tolist() for ids in again] == [heads.tolist(), inner.tolist()]
    spaces.freeze(heads, "heads stay")
    assert spaces.expand(flat).ravel().tolist() == 2 * inner.ravel().tolist()
    other = spaces.split(flat, [3, 2], "another way")  # the entries of a head are in several rows of this one
    living = np.random.default_rng(0).random(spaces.size) < 0.5
    rows, columns = (alive(spaces, ids, n, living) for ids, n in zip(other, (3, 2), strict=True))
    assert (np.outer(rows, columns).ravel() == alive(spaces, flat, 6, living)).all()


def test_equal_columns_are_one_and_constant_ones_stay():
    spaces = Spaces()
    units = spaces.fresh(4)
    assert spaces.expand(np.hstack([units, units])).shape == (4, 1)
    whole = np.repeat(spaces.fresh(1), 4, 0)
    assert spaces.split(whole, [2, 2], "reshaped") == [None, None]
    assert spaces.why(whole) == ["reshaped"]


def test_the_arrays_grow():
    spaces = Spaces()
    a, b = spaces.fresh(3000), spaces.fresh(3000)
    spaces.unify(a, b, "added")
    assert spaces.size == 6001
    assert (spaces.expand(b) == a).all()


SIZES = (12, 4, 3, 2, 6)
SHAPES = ((3, 4), (4, 3), (2, 6), (6, 2), (2, 2, 3), (3, 2, 2))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_was_unified_lives_and_dies_together(data):
    """Random operations; then, for random nodes alive, all that was ever said to be equal is."""
    spaces, axes, laws = Spaces(), [], []  # axes: (ids, length); laws: functions of living nodes that must hold
    for n in SIZES:
        axes.append((spaces.fresh(n), n))

    def draw(n=None):
        return data.draw(st.sampled_from([ids for ids, length in axes if n in (None, length)]))

    def law(left, right):
        laws.append(lambda living: (left(living) == right(living)).all())

    def lives(ids, n):
        return lambda living: alive(spaces, ids, n, living)

    for _ in range(data.draw(st.integers(1, 9))):
        kind = data.draw(st.sampled_from(["unify", "split", "merge", "freeze", "take"]))
        if kind == "unify":
            n = data.draw(st.sampled_from([12, 4, 3, 2, 6]))
            a, b = draw(n), draw(n)
            spaces.unify(a, b, "unified")
            law(lives(a, n), lives(b, n))
        elif kind == "split":
            shape, ids = data.draw(st.sampled_from(SHAPES)), draw(12)
            parts = spaces.split(ids, shape, "split")
            axes += list(zip(parts, shape, strict=True))
            of = [lives(part, n) for part, n in zip(parts, shape, strict=True)]
            law(
                lives(ids, 12),
                lambda living, of=of: functools.reduce(np.logical_and.outer, [f(living) for f in of]).ravel(),
            )
        elif kind == "merge":
            shape = data.draw(st.sampled_from(SHAPES))
            parts = [draw(n) for n in shape]
            merged = spaces.merge(parts, shape)
            axes.append((merged, 12))
            of = [lives(part, n) for part, n in zip(parts, shape, strict=True)]
            law(
                lives(merged, 12),
                lambda living, of=of: functools.reduce(np.logical_and.outer, [f(living) for f in of]).ravel(),
            )
        elif kind == "take":
            ids = draw(12)
            if ids is not None:
                order = np.array(data.draw(st.permutations(range(12))))
                axes.append((ids[order], 12))
        else:
            n = data.draw(st.sampled_from([12, 4, 3, 2, 6]))
            ids, at = draw(n), data.draw(st.integers(0, n - 1))
            if ids is not None:
                spaces.freeze(ids[at : at + 1], "frozen")
                laws.append(lambda living, ids=ids, at=at, n=n: alive(spaces, ids, n, living)[at])
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    for share in (0.2, 0.5, 0.9):
        living = rng.random(spaces.size) < share
        assert all(holds(living) for holds in laws)


A, B, C = (of_place(name, 0, 1) for name in "abc")
CONDITIONS = st.recursive(
    st.sampled_from([A, B, C, ALWAYS, NEVER]),
    lambda inner: st.builds(lambda f, *parts: f(*parts), st.sampled_from([all_of, any_of]), inner, inner),
    max_leaves=6,
)


def holds(condition, zero):
    return any(all(path in zero for path, _, _ in choice) for choice in condition)


@settings(max_examples=100, deadline=None)
@given(CONDITIONS, CONDITIONS, st.sets(st.sampled_from("abc")))
def test_conditions_are_those_of_logic(a, b, zero):
    assert holds(all_of(a, b), zero) == (holds(a, zero) and holds(b, zero))
    assert holds(any_of(a, b), zero) == (holds(a, zero) or holds(b, zero))
    assert holds(only(a, frozenset([("a", 0), ("b", 0)])), zero) == holds(a, zero | {"c"})
    assert bool(a) == holds(a, set("abc"))


def test_of_many_choices_vectors_are_kept():
    kernels = [of_place(f"kernel{i}", 3, 4) for i in range(9)]
    vectors = [of_place(f"scale{i}", 0, 1) for i in range(9)]
    found = all_of(*(any_of(*pair) for pair in zip(kernels, vectors, strict=True)))
    assert len(found) == 8
    assert frozenset((f"scale{i}", 0, 1) for i in range(9)) in found
