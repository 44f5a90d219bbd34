import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse
from jaxsparse.counts import expected_counts, remaining
from jaxsparse.groups import Group, Slice, entries, group_sizes

PARAMS = {
    "conv": {"bias": jnp.zeros(4), "kernel": jnp.ones((3, 3, 2, 4))},
    "norm": {"bias": jnp.zeros(4), "scale": jnp.ones(4)},
    "fc": {"bias": jnp.zeros(5), "kernel": jnp.ones((2 * 2 * 4, 5))},
    "steps": jnp.arange(4),
    "empty": jnp.zeros((3, 0)),
}
NORM = {"norm/scale": 0, "norm/bias": 0}
CONV = Group("conv", NORM, {"conv/kernel": -1, "conv/bias": 0, **NORM, "fc/kernel": 0})
ROWS = Group("rows", {"fc/kernel": 0}, {"fc/kernel": 0})


OPEN = {"conv": np.array([1, 0, 0, 1]), "rows": np.arange(16) < 6}
ALL = {"conv": np.array([1, 0, 0, 1]), "rows": np.ones(16)}


def test_sizes():
    assert group_sizes([CONV, ROWS], PARAMS) == (4, 16)
    hidden = {**PARAMS, "conv": optax.MaskedNode()}
    assert group_sizes([CONV, ROWS], hidden) == (4, 16)  # what is not seen may be named where it goes away


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "one or more jaxsparse.Group"),
        ([{"name": "conv"}], "one or more jaxsparse.Group"),
        ([CONV, CONV], "two groups have the name 'conv'"),
        ([CONV, Group("other", {"norm/bias": 0})], "group 'other' and group 'conv' overlap: both multiply norm/bias"),
        ([Group("a", {})], "group 'a' multiplies nothing"),
        ([Group("a", {"empty": 1})], r"group 'a' has no channels: empty has shape \(3, 0\)"),
        ([Group("a", {"norm/scales": 0})], "'norm/scales', which the params do not have; they have norm/scale"),
        ([Group("a", {"norm/scale": 1})], r"axis 1 of norm/scale, whose shape is \(4,\)"),
        ([Group("a", {"norm/scale": 0, "fc/bias": 0})], "fc/bias has 5 channels.*norm/scale has 4"),
        ([Group("a", {"steps": 0})], "steps of dtype int32: only floats have gates"),
        (
            [Group("a", NORM, {"fc/bias": 0})],
            "has 4 channels, but axis 0 of fc/bias.*has length 5, which is not a multiple of 4",
        ),
        ([Group("a", NORM, {"fc/kernel": (0, [0, 1])})], r"has 16 entries.*from 0 to 3, got 2 from 0 to 1"),
        ([Group("a", NORM, {"conv/kernels": -1})], "which the params do not have"),
        ([Group("a", NORM, kernel="conv/kernels")], "which the params do not have"),
        (
            [Group("a", {"conv/kernel": -1}, {"conv/kernel": -1, **NORM})],
            r"multiplies the filters conv/kernel, but their outputs are normalised \(norm/scale\)",
        ),
    ],
)
def test_bad_groups_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        group_sizes(groups, PARAMS)


def test_expected_counts_are_the_mean_of_counts():
    shapes = {"conv/kernel": (3, 3, 2, 4), "fc/kernel": (16, 5), "fc/bias": (5,)}
    rng = np.random.default_rng(0)
    chances = [rng.uniform(size=4), rng.uniform(size=16)]
    expected = expected_counts([CONV, ROWS], shapes, dict(zip(("conv", "rows"), chances, strict=True)))
    counted = []
    for _ in range(4000):
        conv, rows = (rng.uniform(size=p.size) < p for p in chances)
        kept = np.ones((16, 5)) * (np.tile(conv, 4) * rows)[:, None]
        counted.append((conv.sum() * 18, kept.sum()))
    error = np.std(counted, 0) / len(counted) ** 0.5
    np.testing.assert_array_less(
        np.abs(np.mean(counted, 0) - [expected["conv/kernel"], expected["fc/kernel"]]), 4 * error
    )
    assert float(expected["fc/bias"]) == 5
    exact = expected_counts([CONV, ROWS], shapes, OPEN)
    assert {path: float(count) for path, count in exact.items()} == {"conv/kernel": 36, "fc/kernel": 15, "fc/bias": 5}


def test_channels_in_another_order():
    slowest = Group("conv", NORM, {"fc/kernel": (0, np.arange(16) // 4)})  # flattened with the channels first
    exact = expected_counts(
        [slowest, ROWS], {"fc/kernel": (16, 5)}, {"conv": np.array([1, 0, 0, 1]), "rows": np.arange(16) < 6}
    )
    assert float(exact["fc/kernel"]) == 20


def test_remaining_counts_params_and_macs():
    params = {name: layer for name, layer in PARAMS.items() if name not in ("steps", "empty")}
    found = remaining(
        params,
        [CONV, ROWS],
        ALL,
        {"conv/kernel": 100, "fc/kernel": 1},
    )
    assert found.params == (36 + 2 + 2 + 2 + 40 + 5) / (72 + 4 + 4 + 4 + 80 + 5)
    assert found.macs == (3600 + 40) / (7200 + 80)
    assert "conv/kernel      72    36   50.0%" in str(found)
    assert str(remaining(params, [ROWS], ALL)).count("100.0%") == 7
    assert "MACs" not in str(remaining(params, [ROWS], ALL))
    with pytest.raises(ValueError, match="positions names conv/weights"):
        remaining(params, [ROWS], ALL, {"conv/weights": 1})
    with pytest.raises(ValueError, match=r"group 'rows' has 16 channels, but open_channels has shape \(4,\) for it"):
        remaining(params, [ROWS], {"rows": np.ones(4)})
    shapes = jax.eval_shape(lambda: params)
    assert str(remaining(shapes, [ROWS], ALL)) == str(remaining(params, [ROWS], ALL))


def test_remaining_counts_above_what_float32_can():
    shapes = {"a": jax.ShapeDtypeStruct((50257, 1023), jnp.float32), "b": jax.ShapeDtypeStruct((1023,), jnp.float32)}
    group = Group("h", {"b": 0}, {"a": -1, "b": 0})
    found = remaining(shapes, [group], {"h": jnp.arange(1023) > 0}, {"a": 3})
    rows = {row.path: row for row in found.layers}
    assert rows["a"].kept_params == 50257 * 1022
    assert rows["a"].kept_macs == 3 * 50257 * 1022
    assert found.params == 50258 * 1022 / (50258 * 1023)
    assert "51,362,654" in str(found)


@pytest.mark.slow
def test_names_are_taken_as_they_are():
    params = {"head": {"value": jnp.ones((3, 4)), "raw_value": jnp.ones(4)}}
    group = Group("head", {"head/value": -1}, {"head/value": -1})
    rows = {row.path: row.kept_params for row in remaining(params, [group], {"head": np.arange(4) > 0}).layers}
    assert rows == {"head/value": 9, "head/raw_value": 4}
    tx = jaxsparse.l0(optax.sgd(0.1), [group], penalty=1e-3)
    gated, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(gated["head"]["raw_value"], np.full(4, -0.1, np.float32))
    assert len(np.unique(gated["head"]["value"])) > 1
    # The variables of flax.nnx add nothing to the names.
    state = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    assert group_sizes([Group("units", {"kernel": -1, "bias": 0})], state) == (4,)


HALF = tuple([0, 0, 1, 1] + 4 * [-1])
WIDE = {
    "qkv": jnp.ones((3, 8)),
    "wh": jnp.ones((4, 4)),
    "stack": jnp.ones((2, 5, 3)),
    "flat": jnp.ones((8, 2)),
}
WIDE_GROUPS = (
    Group("heads", [("qkv", 1, HALF)], [("qkv", 1, HALF)]),
    Group("inner", [Slice("qkv", -1, (0, 1, 0, 1, -1, -1, -1, -1))], [("qkv", 1, (0, 1, 0, 1, -1, -1, -1, -1))]),
    Group("units", [("wh", 0), ("wh", 1)], [("wh", 0), ("wh", 1), ("flat", 0)]),
    Group("layers", [("stack", (0, 2))], [("stack", (0, 2))]),
    Group("shared", [("stack", 1)], [("stack", 1)]),
)


def test_groups_of_several_axes_of_entries_without_channel_and_of_stacked_layers():
    assert group_sizes(WIDE_GROUPS, WIDE) == (2, 2, 4, 6, 5)
    assert hash(WIDE_GROUPS[0]) == hash(dataclasses.replace(WIDE_GROUPS[0]))
    assert WIDE_GROUPS[0].closed_by == (WIDE_GROUPS[0].multiplies,)
    assert not WIDE_GROUPS[0].exact
    is_open = {
        "heads": np.array([1, 0]),
        "inner": np.array([0, 1]),
        "units": np.array([1, 0, 1, 1]),
        "layers": np.array([1, 1, 0, 0, 0, 1]),
        "shared": np.array([1, 0, 1, 1, 1]),
    }
    counted = {}
    for path, leaf in WIDE.items():
        mask = np.ones(leaf.shape, bool)
        for group in WIDE_GROUPS:
            for which in group.removes:
                if which.path == path:
                    axes, channels = entries(which, leaf.shape, is_open[group.name].size)
                    kept = np.append(is_open[group.name], 1)[channels].astype(bool)
                    mask &= np.expand_dims(kept, [i for i in range(leaf.ndim) if i not in axes])
        counted[path] = mask.sum()
    assert counted == {"qkv": 3 * (1 + 4), "wh": 9, "stack": 3 * 4, "flat": 12}
    shapes = {path: leaf.shape for path, leaf in WIDE.items()}
    found = expected_counts(WIDE_GROUPS, shapes, is_open)
    assert {path: float(n) for path, n in found.items()} == counted
    rows = remaining(WIDE, WIDE_GROUPS, is_open).layers
    assert {row.path: row.kept_params for row in rows} == counted


def test_expected_counts_of_stacked_layers_are_means_over_all_gates():
    half = Group("half", [("stack", (0, 2))], [("stack", (0, 2))]), Group("rows", [("stack", 1)], [("stack", 1)])
    chances = {"half": np.linspace(0.1, 0.9, 6), "rows": np.linspace(0.2, 0.6, 5)}
    found = expected_counts(half, {"stack": (2, 5, 3)}, chances)
    assert float(found["stack"]) == pytest.approx(chances["half"].sum() * chances["rows"].sum())
    lines = Group("lines", [("stack", (0, 1))], [("stack", (0, 1))])
    chances["lines"] = np.linspace(0.3, 0.5, 10)
    found = expected_counts([half[0], lines], {"stack": (2, 5, 3)}, chances)
    by_layer = chances["half"].reshape(2, 3).sum(1) * chances["lines"].reshape(2, 5).sum(1)
    assert float(found["stack"]) == pytest.approx(by_layer.sum())


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([Group("a", [("stack", (2, 0))])], r"names axes \(2, 0\) of stack: several axes must be in rising order"),
        ([Group("a", [("stack", (0, 3))])], r"names axis 3 of stack, whose shape is \(2, 5, 3\)"),
        ([Group("a", [("qkv", 1, (0, 1))])], "has 8 entries, so it needs 8 channel numbers from 0 to 1, got 2"),
        ([Group("a", [("qkv", 1, (*HALF[:-1], -2))])], r"from -2 to 1 \(-1: no channel\)"),
        ([Group("a", [("qkv", 1, 8 * (-1,))])], "group 'a' has no channels"),
        ([WIDE_GROUPS[0], Group("a", [("qkv", 1, (0, 0, 1, 1, 2, 2, 2, 2))])], "overlap: both multiply qkv"),
        ([Group("a", [("wh", 0)], size=3)], "has 3 channels, but axis 0 of wh where it is multiplied has length 4"),
    ],
)
def test_bad_slices_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        group_sizes(groups, WIDE)


def test_what_is_no_slice_is_refused():
    with pytest.raises(ValueError, match=r"group 'a': multiplies must map paths to axes.*got 'kernel'"):
        Group("a", ["kernel"])


def test_numbers_and_leaves_without_channels_among_the_params_are_no_crash():
    assert group_sizes([Group("a", {"a": 0})], {"a": jnp.ones(3), "s": 1.0}) == (3,)
    with pytest.raises(ValueError, match="group 'a' names axis 0 of s, whose shape is"):
        group_sizes([Group("a", {"a": 0, "s": 0})], {"a": jnp.ones(3), "s": 1.0})
    group = Group("a", {"a": 0}, [Slice("z", 0, ())])
    assert group_sizes([group], {"a": jnp.ones(3), "z": jnp.ones((0, 2))}) == (3,)
