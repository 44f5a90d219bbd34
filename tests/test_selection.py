import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxsparse import bisection, reductions
from jaxsparse.selection import (
    count_true,
    global_top_k_masks,
    random_scores,
    top_k_mask,
    top_k_masks,
    top_k_of_all,
    top_k_of_stacks,
)

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def expected(scores, k, where=None):
    """The definition: sort by score descending, NaN last, ties by index; only where allowed."""
    scores = np.asarray(scores).astype(np.float64).ravel()
    allowed = np.ones(scores.shape, bool) if where is None else np.asarray(where).ravel()
    order = np.flatnonzero(allowed)[np.argsort(-scores[allowed], kind="stable")]
    mask = np.zeros(scores.shape, bool)
    mask[order[: max(k, 0)]] = True
    return mask


floats = st.one_of(
    # Many equal values after rounding. With its bounds: without them hypothesis rejects all it draws beyond them.
    st.floats(-65504, 65504, width=16),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan")]),
)


@settings(max_examples=30)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_top_k_mask_is_the_sorted_choice(data, dtype):
    # Few shapes, so that few programs are compiled.
    shape = data.draw(st.sampled_from([(1,), (12,), (3, 4), (2, 3, 2)]))
    scores = jnp.asarray(data.draw(hnp.arrays(np.float64, shape, elements=floats)), dtype)
    k = data.draw(st.integers(0, scores.size))
    where = data.draw(st.one_of(st.none(), hnp.arrays(bool, shape)))
    mask = jitted_top_k(scores, k, where)
    np.testing.assert_array_equal(np.asarray(mask).ravel(), expected(scores, k, where))


jitted_top_k = jax.jit(lambda scores, k, where: top_k_mask(scores, k, where=where))
jitted_top_k_along = jax.jit(lambda scores, k, where: top_k_mask(scores, k, where=where, axis=-1))
jitted_global_top_k = jax.jit(global_top_k_masks)


@settings(max_examples=40)
@given(data=st.data())
def test_global_top_k_ranks_all_leaves_together(data):
    arrays = [
        jnp.asarray(data.draw(hnp.arrays(np.float64, shape, elements=floats)), dtype)
        for shape, dtype in [((5,), jnp.float32), ((2, 3), jnp.bfloat16), ((4,), jnp.float32)]
    ]
    k = data.draw(st.integers(0, 15))
    masks = jitted_global_top_k(arrays, k)
    flat = np.concatenate([np.asarray(a).astype(np.float64).ravel() for a in arrays])
    np.testing.assert_array_equal(np.concatenate([np.asarray(m).ravel() for m in masks]), expected(flat, k))


@settings(max_examples=30)
@given(data=st.data())
def test_top_k_along_an_axis_is_top_k_of_every_slice(data):
    scores = jnp.asarray(data.draw(hnp.arrays(np.float64, (3, 2, 4), elements=floats)), jnp.float32)
    where = data.draw(hnp.arrays(bool, (3, 2, 4)))
    k = data.draw(hnp.arrays(np.int32, (4,), elements=st.integers(0, 6)))
    mask = jitted_top_k_along(scores, k, where)
    for j in range(4):
        np.testing.assert_array_equal(np.asarray(mask)[..., j].ravel(), expected(scores[..., j], k[j], where[..., j]))


def expected_of_units(arrays, sizes, k, wheres, absolute):
    """The definition: from the largest down, until one does not fit."""
    entries = [(i, j, np.asarray(a, np.float64).ravel()[j]) for i, a in enumerate(arrays) for j in range(a.size)]
    score = {(i, j): abs(x) if absolute else x for i, j, x in entries}
    order = sorted(score, key=lambda at: (np.isnan(score[at]), 0 if np.isnan(score[at]) else -score[at], at))
    masks = [np.zeros(a.size, bool) for a in arrays]
    for i, j in order:
        if wheres is None or wheres[i].ravel()[j]:
            if sizes[i] > k:
                break
            k -= sizes[i]
            masks[i][j] = True
    return np.concatenate(masks)


@pytest.mark.slow
@settings(max_examples=150)
@given(data=st.data(), sizes=st.sampled_from([(1, 1, 1), (3, 7, 4), (100, 1, 13), (5, 5, 5)]), absolute=st.booleans())
def test_entries_that_count_for_several_stay_as_long_as_they_fit(data, sizes, absolute):
    # Few values, so that many are equal: within a leaf and across.
    elements = st.one_of(st.sampled_from([0.0, 1.0, 2.0, -2.0, float("nan"), float("inf")]), floats)
    shapes = [(5,), (2, 3), (4,)]
    arrays = [jnp.asarray(data.draw(hnp.arrays(np.float64, shape, elements=elements)), jnp.float32) for shape in shapes]
    wheres = data.draw(st.one_of(st.none(), st.tuples(*(hnp.arrays(bool, shape) for shape in shapes))))
    where = None if wheres is None else list(wheres)
    total = sum(size * a.size for size, a in zip(sizes, arrays, strict=True))
    k = data.draw(st.integers(0, total))
    masks = jitted_units(arrays, k, where, sizes, absolute)
    ours = np.concatenate([np.asarray(m).ravel() for m in masks])
    np.testing.assert_array_equal(ours, expected_of_units(arrays, sizes, k, wheres, absolute))


@functools.partial(jax.jit, static_argnames=("sizes", "absolute"))
def jitted_units(arrays, k, where, sizes, absolute):
    return global_top_k_masks(arrays, k, where=where, absolute=absolute, sizes=list(sizes))


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="k must be between 0 and the number of entries, 21, got 22"):
        global_top_k_masks([jnp.ones(3)], 22, sizes=[7])
    with pytest.raises(ValueError, match=r"sizes must be at least 1, got \[0\]"):
        global_top_k_masks([jnp.ones(3)], 0, sizes=[0])


def test_top_k_along_several_axes():
    scores = jax.random.normal(jax.random.key(0), (3, 4, 5))
    mask = top_k_mask(scores, 2, axis=(0, 2))
    for i, j in np.ndindex(3, 5):
        np.testing.assert_array_equal(mask[i, :, j], expected(scores[i, :, j], 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_array_against_a_sort(dtype):
    scores = jnp.abs(jax.random.normal(jax.random.key(0), (300, 700))).astype(dtype)
    for k in (0, 1, 1000, 209_999, 210_000):
        mask = np.asarray(jitted_top_k(scores, k, None))
        assert mask.sum() == k
        np.testing.assert_array_equal(mask.ravel(), expected(scores, k))


def test_top_k_masks_takes_a_k_for_every_leaf():
    tree = {"a": jnp.array([3.0, 1.0, 2.0]), "b": jnp.array([[1.0, 1.0], [5.0, 1.0]])}
    masks = top_k_masks(tree, jnp.array([2, 3]))
    assert masks["a"].tolist() == [True, False, True]
    assert masks["b"].tolist() == [[True, True], [True, False]]


def test_k_is_traced_under_vmap():
    scores = jax.random.normal(jax.random.key(1), (20,))
    ks = jnp.arange(21)
    masks = jax.jit(jax.vmap(lambda k: top_k_mask(scores, k)))(ks)
    np.testing.assert_array_equal(masks.sum(1), ks)
    np.testing.assert_array_equal(masks[7], expected(scores, 7))


def test_empty_leaves_and_trees():
    assert global_top_k_masks({}, 0) == {}
    masks = global_top_k_masks({"a": jnp.zeros((0, 3)), "b": jnp.ones(2)}, 1)
    assert masks["a"].shape == (0, 3)
    assert masks["b"].tolist() == [True, False]


def test_random_scores_choose_uniformly():
    # 200 draws of 5 of 20: every entry near 50 times; 6 standard deviations are 37.
    draws = jax.vmap(lambda key: top_k_mask(random_scores(key, (20,)), 5))(jax.random.split(jax.random.key(0), 200))
    frequency = np.asarray(draws).sum(0)
    assert (draws.sum(1) == 5).all()
    assert abs(frequency - 50).max() < 37


@pytest.fixture
def on_one_device(monkeypatch):
    """Counts as on a CPU that is one device; these tests run on eight."""
    for module in (bisection, reductions):
        monkeypatch.setattr(module, "in_one_pass", lambda ndim, axis: axis is None or ndim - 1 in axis)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_candidates_in_one_pass_find_the_same(on_one_device, dtype):
    # With many ties, at which the values' search goes on to indices, and with few.
    for digits in (0, 4):
        scores = jnp.round(jax.random.normal(jax.random.key(0), (3, 7, 41)), digits).astype(dtype)
        scores = scores.at[0, 0, :2].set(jnp.asarray([jnp.nan, jnp.inf], dtype))
        where = jnp.abs(scores) < 1.5
        choose = jax.jit(lambda scores, k: top_k_mask(scores, k, where=where))  # noqa: B023
        for k in (0, 1, 100, 700, 861):
            np.testing.assert_array_equal(choose(scores, k).ravel(), expected(scores, k, where))
        rows = jax.jit(lambda scores: top_k_mask(scores, jnp.array([5, 287, 100]), axis=0))(scores)
        for row, values, k in zip(rows, scores, (5, 287, 100), strict=True):
            np.testing.assert_array_equal(row.ravel(), expected(values, k))


def test_several_candidates_in_one_pass_for_stacks_and_units(on_one_device):
    leaves, where = with_ties()
    found = top_k_of_stacks([jnp.stack(leaves[:3]), jnp.stack(leaves[3:5])], jnp.array([3, 30, 11, 0, 17]), [None] * 2)
    for mask, leaf, k in zip([*found[0], *found[1]], leaves, (3, 30, 11, 0, 17), strict=False):
        np.testing.assert_array_equal(mask.ravel(), expected(leaf, k))
    sizes = (3, 7, 4, 1, 2, 5)
    for k in (0, 5, 101, 397):
        masks = global_top_k_masks(leaves, k, where=where, sizes=list(sizes), absolute=True)
        ours = np.concatenate([np.asarray(mask).ravel() for mask in masks])
        given = [np.asarray(free) for free in where]
        np.testing.assert_array_equal(ours, expected_of_units(leaves, sizes, k, given, absolute=True))


@pytest.mark.parametrize("axis", [None, (1,), (0,), (1, 2)])
def test_count_true_in_one_pass(on_one_device, axis):
    mask = jax.random.bernoulli(jax.random.key(0), 0.3, (5, 6, 33))
    np.testing.assert_array_equal(count_true(mask, axis), np.sum(mask, axis, keepdims=axis is not None))
    np.testing.assert_array_equal(jax.vmap(lambda m: count_true(m))(mask), np.sum(mask, (1, 2)))


def test_count_true_is_exact_where_float32_would_not_be():
    assert int(count_true(jnp.ones((1 << 12, (1 << 12) + 1), bool))) == (1 << 24) + (1 << 12)
    assert int(count_true(jnp.ones((1 << 24) + 1, bool))) == (1 << 24) + 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_k_mask(jnp.arange(3), 1), "scores must be floats, got an array of dtype int32"),
        (lambda: top_k_mask(jnp.ones(3), 4), "k must be between 0 and the number of entries, 3, got 4"),
        (lambda: top_k_mask(jnp.ones(3), -1), "got -1"),
        (
            lambda: top_k_mask(jnp.ones(3), 1, where=jnp.ones(2, bool)),
            r"scores' shape \(3,\), got bool of shape \(2,\)",
        ),
        (lambda: top_k_mask(jnp.ones(3), 1, where=jnp.ones(3)), "got float32"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("spec", [PartitionSpec("x", None), PartitionSpec(None, "x"), PartitionSpec("x", "y")])
def test_sharded_selection_gathers_nothing(spec):
    shape = (4, 2) if "y" in spec else (8,)
    mesh = jax.make_mesh(shape, ("x", "y")[: len(shape)])
    sharding = NamedSharding(mesh, spec)
    # Rounded, so that ties are broken across the devices.
    scores = jnp.round(jax.random.normal(jax.random.key(0), (64, 96)), 1)
    sharded = jax.device_put(scores, sharding)
    select = jax.jit(top_k_mask, out_shardings=sharding)
    text = select.lower(sharded, 1000).compile().as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert "collective-permute" not in text
    # Every all-reduce is of scalars.
    reduced = re.findall(r"= (\S+) all-reduce", text)
    assert reduced
    assert all(re.fullmatch(r"(\()?\w+\[\](,.*)?", kind) for kind in reduced), reduced
    np.testing.assert_array_equal(select(sharded, 1000), top_k_mask(scores, 1000))


def with_ties():
    leaves = [jnp.round(2 * jax.random.normal(jax.random.key(i), (6, 5))) for i in range(5)] + [jnp.ones((4, 4))]
    return leaves, [leaf < 2 for leaf in leaves]


@pytest.mark.parametrize(("sizes", "least"), [((1, 1, 1), 0), pytest.param((3, 3, 1), 2, marks=pytest.mark.slow)])
def test_stacks_ranked_with_all_give_what_the_leaves_do_ties_included(sizes, least):
    leaves, where = with_ties()
    allowed = where if least == 0 else None
    stacks = [jnp.stack([leaves[i] for i in (0, 2, 4)]), jnp.stack([leaves[i] for i in (1, 3)]), leaves[5]]
    starts = ((0, 60, 120), (30, 90), 150)
    for k in (0, 17, 60, 166):
        plain = global_top_k_masks(
            leaves, k, absolute=True, where=allowed, sizes=[sizes[0]] * 5 + [sizes[2]], at_least=least
        )
        free = allowed and [stack < 2 for stack in stacks]
        found = top_k_of_all(stacks, k, free, starts, sizes, absolute=True, at_least=least)
        for stack, members in zip(found, ((0, 2, 4), (1, 3)), strict=False):
            for mask, i in zip(stack, members, strict=True):
                np.testing.assert_array_equal(mask, plain[i])
        np.testing.assert_array_equal(found[2], plain[5])


@pytest.mark.parametrize("enough", [False, True])
def test_members_of_stacks_are_ranked_by_themselves(enough):
    leaves, where = with_ties()
    half = leaves[1].astype(jnp.bfloat16)
    stacks = [jnp.stack(leaves[:3]), jnp.stack([half, -half]), jnp.stack(leaves[3:5])]
    given = [jnp.stack(where[:3]), None, jnp.stack(where[3:5])]
    members = [*leaves[:3], half, -half, *leaves[3:5]]
    eligible = [*where[:3], half == half, half == half, *where[3:5]]
    counts = [int(free.sum()) for free in eligible]
    ks = [jnp.int32(min(4 * i, n) if enough else 5 * i) for i, n in enumerate(counts)]
    found = top_k_of_stacks(stacks, jnp.stack(ks), given, absolute=True, enough=enough)
    masks = [mask for stack in found for mask in stack]
    for mask, leaf, k, free in zip(masks, members, ks, eligible, strict=True):
        np.testing.assert_array_equal(mask, top_k_mask(leaf, k, where=free, absolute=True))
