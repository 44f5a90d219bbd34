"""Channel groups of models of every framework, and of small functions with what is hard for them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxsparse import trace
from jaxsparse.groups import Slice
from jaxsparse.trace.analysis import Analysis
from jaxsparse.trace.program import trace as traced
from jaxsparse.trace.rules import RULES, rule
from tests.problems import slow_except
from tests.trace.closing import apart, check_exact, closed
from tests.trace.models import MODELS

QUICK = ("mlp", "lenet", "mlp eqx", "lstm", "experts")
SIZES = {  # of the groups of each model, in any order
    "mlp": [24, 32],
    "lenet": [8, 12, 20],
    "resnet": [8, 8, 16, 16],
    "densenet": [6, 6, 6, 8, 10],
    "mobilenet": [4, 8, 8, 24, 24],
    "gpt linen scan+remat rms": [4, 4, 4, 16, 24],
    "gpt linen loop layernorm": [4] * 9 + [16, 24, 24, 24],
    "gpt eqx scan vmap": [4, 4, 4, 24],
    "gpt plain fused gqa rope scan": [2, 2, 2, 4, 16, 24],
    "gpt plain loop": [2, 2, 2, 2, 2, 2, 4, 4, 16, 24, 24],
    "mlp eqx": [16, 16],
    "lstm": [12],
    "experts": [4, 12],
}


def rand(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def slices(which):
    return {(s.path, s.axis) for s in which}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in MODELS])
def test_models(name):
    apply, params, args = MODELS[name]()
    groups = trace.channel_groups(apply, params, *args)
    if name in SIZES:
        assert sorted(group.size for group in groups) == SIZES[name]
    assert not groups.unknown
    assert all(group.exact and group.multiplies == group.closed_by[0] for group in groups)
    outputs = apply if name != "dropout batchnorm train" else lambda *args: apply(*args)[0]  # without the statistics
    check_exact(outputs, params, args, groups)
    if groups.layers:
        per_layer = groups.per_layer()
        assert {g.name: g.size for g in per_layer} == {g.name: g.size * groups.layers.get(g.name, 1) for g in groups}
        check_exact(outputs, params, args, per_layer, every=5)
    shown = str(groups)
    assert all(group.name in shown for group in groups)


def test_a_group_lists_all_that_goes_with_a_channel():
    apply, params, args = MODELS["resnet"]()
    groups = trace.channel_groups(apply, params, *args)
    group = groups["params/ResBlock_0/Conv_0/kernel"]
    norm = "ResBlock_0/BatchNorm_0"
    stats = {(f"batch_stats/{norm}/{name}", 0) for name in ("mean", "var")}
    scales = {(f"params/{norm}/{name}", 0) for name in ("scale", "bias")}
    reader = {("params/ResBlock_0/Conv_1/kernel", 2)}
    assert slices(group.removes) == {("params/ResBlock_0/Conv_0/kernel", 3)} | stats | scales | reader
    assert slices(group.multiplies) == reader
    assert scales in [slices(choice) for choice in group.closed_by]
    assert {(f"params/{norm}/bias", 0)} not in [slices(choice) for choice in group.closed_by]
    assert groups.frozen["params/Dense_0/kernel", 1] == ("the output of the function",)
    assert "a window: conv_general_dilated at " in groups.frozen["params/ResBlock_0/Conv_0/kernel", 0][0]
    # An optimizer sees the params alone.
    own = groups.within("params")
    group = own["ResBlock_0/Conv_0/kernel"]
    assert (group.size, group.kernel) == (8, "ResBlock_0/Conv_0/kernel")
    assert len(group.removes) == 4
    assert all(not path.startswith("batch_stats") for choice in group.closed_by for path, *_ in choice)
    assert {group.name for group in own} == {group.name.removeprefix("params/") for group in groups}
    with pytest.raises(ValueError, match="no leaf is below 'weights', the function has batch_stats/"):
        groups.within("weights")
    with pytest.raises(KeyError, match="there is no group 'Conv', only params/"):
        groups["Conv"]


def test_fused_kernels_are_parts():
    apply, params, args = MODELS["gpt plain fused gqa rope scan"]()
    groups = trace.channel_groups(apply, params, *args)
    by_size = {group.size: group for group in groups}
    assert set(groups.layers.values()) == {2}
    assert by_size[16].name not in groups.layers  # layers share what is added to the residual stream
    assert len(by_size[16].sums) == 1
    assert "rms_norm" in by_size[16].sums[0]
    (half,) = (s for s in by_size[24].removes if s.path == "blocks/gate_up" and s.axis == 2)
    assert half.channels is None  # 0, ..., 23, 0, ..., 23: the gate's and the other half
    channels = np.array(next(s for s in by_size[4].removes if s.path == "blocks/qkv").channels)
    assert sorted(np.bincount(channels + 1)) == [2, 2, 2, 2, 24]  # places in a head of the values alone
    page = groups._repr_html_()
    assert "<table" in page
    assert "(part)" in page


def test_groups_come_in_the_order_of_the_program():
    apply, params, args = MODELS["lenet"]()
    names = [group.name for group in trace.channel_groups(apply, params, *args)]
    assert names == ["params/Conv_0/kernel", "params/Conv_1/kernel", "params/Dense_0/kernel"]


def test_groups_are_a_sequence():
    apply, params, args = MODELS["mlp"]()
    groups = trace.channel_groups(apply, params, *args)
    assert list(groups) == [groups[0], groups["fc2/kernel"]]
    assert (len(groups), groups[1:]) == (2, groups.groups[1:])
    assert repr(Slice("a", 0, tuple(range(9)))) == "Slice('a', 0, (0, 1, 2, ..., 8))"
    assert repr(Slice("a", (0, 2))) == "Slice('a', (0, 2))"


def test_shapes_are_enough():
    apply, params, args = MODELS["mlp"]()
    shapes = jax.eval_shape(lambda: (params, args))
    assert trace.channel_groups(apply, shapes[0], *shapes[1]) == trace.channel_groups(apply, params, *args)


PAIR = {"w": rand(4, 8), "v": rand(8, 3, seed=1)}
X = rand(2, 4, seed=2)


def between(f):
    return lambda p, x: f(x @ p["w"]) @ p["v"]


@pytest.mark.parametrize(
    ("name", "f", "size", "choices"),
    [
        ("relu", jax.nn.relu, 8, [{"v"}, {"w"}]),
        ("cosine", jnp.cos, 8, [{"v"}]),
        ("roll", lambda h: jnp.roll(h, 2, -1), 8, [{"v"}, {"w"}]),
        ("mirror image", lambda h: h + h[:, ::-1], 4, [{"v"}, {"w"}]),
        ("known places", lambda h: h + h[:, np.array([1, 0, 3, 2, 5, 4, 7, 6])], 4, [{"v"}, {"w"}]),
        ("running sum", lambda h: jnp.cumsum(h, -1), 8, [{"v", "w"}]),
        ("rows sorted", lambda h: jnp.sort(h, 0), 8, [{"v"}, {"w"}]),
        ("best rows", lambda h: lax.top_k(h.T, 2)[0].T, 8, [{"v"}, {"w"}]),
        ("rows transformed", lambda h: jnp.fft.fft(h.T).T.real, 8, [{"v"}, {"w"}]),
        ("tiled and folded", lambda h: jnp.tile(h, (1, 2)).reshape(2, 2, 8).sum(1), 8, [{"v"}, {"w"}]),
        ("stacked and taken apart", lambda h: sum(jnp.unstack(jnp.stack([h, 2 * h]))), 8, [{"v"}, {"w"}]),
        ("added to rows", lambda h: jnp.zeros((5, 8)).at[jnp.array([3, 1])].add(h)[:2], 8, [{"v"}, {"w"}]),
        ("padded with ones", lambda h: jnp.pad(h, ((0, 1), (0, 0)), constant_values=1.0), 8, [{"v"}]),
        ("padded with zeros", lambda h: jnp.pad(h, ((0, 1), (0, 0))), 8, [{"v"}, {"w"}]),
        ("to the power of a constant", lambda h: jnp.abs(h) ** 1.5, 8, [{"v"}, {"w"}]),
        ("to a power of its own", lambda h: jnp.abs(h) ** jnp.abs(h), 8, [{"v"}]),
        ("some rows", lambda h: jnp.where(jnp.arange(2)[:, None] < 1, h, 0.0), 8, [{"v"}, {"w"}]),
        ("some rows or ones", lambda h: jnp.where(jnp.arange(2)[:, None] < 1, h, 1.0), 8, [{"v"}]),
        ("either branch", lambda h: lax.cond(h.shape[0] > 1, jnp.tanh, jnp.cos, h), 8, [{"v"}]),
        ("a loop", lambda h: lax.fori_loop(0, 3, lambda i, h: jnp.sin(h), h), 8, [{"v"}, {"w"}]),
        ("a loop that leaves zero", lambda h: lax.fori_loop(0, 3, lambda i, h: jnp.cos(h), h), 8, [{"v"}]),
        ("a custom derivative", jax.nn.relu6, 8, [{"v"}, {"w"}]),
        ("remat", jax.checkpoint(jnp.tanh), 8, [{"v"}, {"w"}]),
        ("bits", lambda h: lax.bitcast_convert_type(h, jnp.int32).astype(jnp.float32), 8, [{"v"}]),
    ],
)
def test_what_a_function_makes_of_channels(name, f, size, choices):
    groups = trace.channel_groups(between(f), PAIR, X)
    (group,) = groups
    assert (group.size, groups.unknown) == (size, ())
    assert sorted(sorted({s.path for s in choice}) for choice in group.closed_by) == sorted(map(sorted, choices))
    check_exact(between(f), PAIR, (X,), groups)


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (jnp.sort, "looked at as a whole: sort at "),
        (jax.nn.softmax, "looked at as a whole: reduce_max at "),
        (lambda h: jnp.fft.fft(h).real, "looked at as a whole: fft at "),
        (lambda h: h * (h >= lax.top_k(h, 3)[0][..., -1:]), "looked at as a whole: top_k at "),
        (lambda h: h[:, jnp.argmax(h[0])][:, None] + h, "looked at as a whole: argmax at "),
        (lambda h: h * jnp.cos(h).mean(-1, keepdims=True), "summed over though not zero: reduce_sum at "),
        (lambda h: jnp.linalg.cholesky(jnp.eye(8) + h.T @ h)[:2], "not understood: cholesky at "),
    ],
)
def test_what_stays_is_named_with_the_line_of_the_user(f, reason):
    groups = trace.channel_groups(between(f), PAIR, X)
    assert not groups.groups
    for place in (("w", 1), ("v", 0)):
        assert any(why.startswith(reason + "tests/trace/test_channels.py:") for why in groups.frozen[place])
    assert groups.frozen["v", 1] == ("the output of the function",)
    assert len(groups.unknown) == reason.startswith("not understood")
    assert reason in str(groups)


def test_a_single_entry_that_is_taken_out_stays():
    groups = trace.channel_groups(between(lambda h: h * h[:, 2:3]), PAIR, X)
    (group,) = groups
    assert group.size == 7
    assert group.removes[0].channels == (0, 1, -1, 2, 3, 4, 5, 6)
    check_exact(between(lambda h: h * h[:, 2:3]), PAIR, (X,), groups)


def test_a_primitive_of_ones_own_needs_only_a_rule():
    def f(h):
        return jnp.linalg.cholesky(3 * jnp.eye(2)[None] + jnp.tanh(h.T)[:, :, None])[:, :, 1].T

    assert len(trace.channel_groups(between(f), PAIR, X).unknown) == 1
    try:

        @rule("cholesky")
        def cholesky(a, eqn, args):
            """A matrix for each channel, and of none is it zeros."""
            for ids in args[0].axes[-2:]:
                a.spaces.freeze(ids, "rows of a matrix")
            return dataclasses.replace(args[0], zero=[frozenset()] * 3, view=None, const=None)

        groups = trace.channel_groups(between(f), PAIR, X)
        assert [group.size for group in groups] == [8]
        check_exact(between(f), PAIR, (X,), groups)
    finally:
        del RULES["cholesky"]


def test_params_without_use_are_named():
    with pytest.warns(UserWarning, match="apply does not use these params: extra"):
        groups = trace.channel_groups(between(jnp.tanh), {**PAIR, "extra": rand(5, 5)}, X)
    assert [group.name for group in groups] == ["w"]
    assert groups.frozen["extra", 0] == groups.frozen["extra", 1] == ("the function does not use it",)


def test_what_could_only_go_at_once_is_no_group():
    mirrored = trace.channel_groups(between(lambda h: h + h[:, np.arange(8) - 1]), PAIR, X)
    assert len(mirrored) == 0
    assert mirrored.frozen["v", 0] == ("all of its entries could only go at once",)


def test_a_state_takes_the_place_of_a_leaf_and_an_output_does_not():
    def apply(p, x):
        h = x @ p["w"] - p["mean"][None]
        return jax.nn.relu(h) @ p["v"], {"mean": 0.9 * p["mean"] + 0.1 * h.mean(0)}

    params = {**PAIR, "mean": rand(8, seed=4)}
    (group,) = trace.channel_groups(apply, params, X)
    assert slices(group.removes) == {("w", 1), ("mean", 0), ("v", 0)}
    # The mean is not zero after a step, though it was before it, unless what it is the mean of is zero too.
    assert [slices(choice) for choice in group.closed_by] == [{("v", 0)}, {("mean", 0), ("w", 1)}]
    other = trace.channel_groups(lambda p, x: {"v": apply(p, x)[0], "mean": jnp.cos(x @ p["w"])[0]}, params, X)
    assert not other.groups
    assert other.frozen["w", 1] == ("output mean of the function",)


def test_zeros_are_not_divided_by_zeros():
    def scaled(h):
        return h / jnp.sqrt(jnp.sum(h * h, 0, keepdims=True))

    (group,) = trace.channel_groups(between(scaled), PAIR, X)
    assert [slices(choice) for choice in group.closed_by] == [{("v", 0)}]


def test_a_ragged_product_keeps_rows_and_matrices():
    def apply(p, x):
        sizes = jnp.array([2, 4])
        return lax.ragged_dot(jax.nn.relu(lax.ragged_dot(x, p["up"], sizes)), p["down"], sizes)

    params, x = {"up": rand(2, 5, 6), "down": rand(2, 6, 3, seed=1)}, rand(6, 5, seed=2)
    groups = trace.channel_groups(apply, params, x)
    (group,) = groups
    assert (group.size, slices(group.removes)) == (6, {("up", 2), ("down", 1)})
    assert "rows and matrices that belong together" in groups.frozen["up", 0][0]
    check_exact(apply, params, (x,), groups)


def test_shards_keep_what_is_sharded():
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def apply(p, x):
        def shard(p, x):
            h = jax.nn.relu(x @ p["w"])
            return h @ p["v"], lax.psum(h.sum(0), "data") @ p["v"]

        return jax.shard_map(shard, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=(spec("data"), spec()))(p, x)

    groups = trace.channel_groups(apply, PAIR, X)
    (group,) = groups
    assert (group.size, groups.unknown) == (8, ())
    check_exact(apply, PAIR, (X,), groups)
    sites = Analysis(traced(apply, PAIR, X)).sites
    assert [site.macs for site in sites] == [2 * 4 * 8, 2 * 8 * 3, 2 * 8 * 3]  # all devices

    def by_columns(p, x):
        def shard(p, x):
            return lax.psum(jax.nn.relu(x @ p["w"]) @ p["v"], "data")

        specs = ({"w": spec(None, "data"), "v": spec("data")}, spec())
        return jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=spec())(p, x)

    groups = trace.channel_groups(by_columns, PAIR, X)
    assert not groups.groups
    assert "sharded over devices: shard_map at " in groups.frozen["v", 0][0]


def test_layers_that_share_channels_have_no_gates_of_their_own():
    params = {"up": rand(3, 4, 8), "down": rand(3, 8, 4, seed=1)}

    def apply(p, x, shared):
        def layer(x, w):
            h = x @ w[0] + (p["shift"] if shared else 0.0)
            return x + jax.nn.relu(h) @ w[1], None

        return lax.scan(layer, x, (p["up"], p["down"]))[0]

    own = trace.channel_groups(lambda p, x: apply(p, x, False), params, X)
    assert own.layers == {"up": 3}
    assert own.per_layer()["up"].removes == (("down", (0, 1), None), ("up", (0, 2), None))
    shared = trace.channel_groups(lambda p, x: apply(p, x, True), {**params, "shift": rand(8)}, X[0])
    assert [group.size for group in shared] == [8]
    assert shared.layers == {}
    assert shared.per_layer() == shared
    also = trace.channel_groups(lambda p, x: apply(p, x, False) + (p["up"].sum((0, 1)) @ p["down"][1])[None], params, X)
    assert also.layers == {}


def test_closing_is_felt():
    """What the other tests compare is not the same for want of an effect."""
    apply, params, args = MODELS["lenet"]()
    for group in trace.channel_groups(apply, params, *args):
        dead = np.arange(group.size) % 3 == 1
        assert apart(apply(closed(params, group, group.multiplies, dead), *args), apply(params, *args)) > 1e-2


KINDS = {
    "mlp": {"fc1/kernel": "units", "fc2/kernel": "units"},
    "gpt plain fused gqa rope scan": {"blocks/qkv#2": "heads", "blocks/gate_up": "units"},
    "gpt linen scan+remat rms": {"params/blocks/Attention_0/k/kernel#2": "heads", "params/blocks/gate/kernel": "units"},
    "gpt eqx scan vmap": {"blocks/attention/key_proj/weight#2": "heads", "blocks/gate/weight": "units"},
    "gpt nnx mha": {f"blocks/{i}/{name}": kind for i in range(2)
                    for name, kind in (("attention/key/kernel#2", "heads"), ("gate/kernel", "units"))},
    "experts": {"in": "units"},
    "lstm": {},
}  # fmt: skip


@pytest.mark.parametrize("name", slow_except(["mlp", "gpt plain fused gqa rope scan"], KINDS))
def test_heads_and_units(name):
    apply, params, args = MODELS[name]()
    groups = trace.channel_groups(apply, params, *args)
    assert groups.kinds == KINDS[name]
    for group in groups:
        places = {(which.path, which.axis) for which in group.removes}
        assert set(groups.reads[group.name]) <= places
    if "linen" in name:
        part = groups.within("params")
        assert part.kinds == {path.removeprefix("params/"): kind for path, kind in KINDS[name].items()}
        assert part.reads["blocks/gate/kernel"] == (("blocks/down/kernel", 1),)
    if name == "gpt plain fused gqa rope scan":
        assert groups["blocks/qkv#2"].size == 2  # key and value heads, each with two query heads
        assert groups.reads["blocks/qkv#2"] == (("blocks/out", 1),)
        assert groups.reads["blocks/qkv"] == ()
        assert groups.reads["blocks/down"] == (("blocks/gate_up", 1), ("blocks/qkv", 1), ("embed", 1))


def test_gamma_samples_keep_their_parameter():
    params = {"w": jnp.ones((5, 8)), "a": jnp.ones(8), "v": jnp.ones((8, 3))}

    def apply(p, x):
        return (jnp.tanh(x @ p["w"]) * jax.random.gamma(jax.random.key(0), p["a"])[None]) @ p["v"]

    assert not trace.channel_groups(apply, params, jnp.ones((4, 5)))


def test_params_that_are_one_array_are_no_state_of_an_output_of_their_shape():
    def hop(w, x):
        return jnp.tanh(x @ w)

    assert not trace.channel_groups(hop, jnp.ones((8, 8)), jnp.ones((8, 8)))


def test_empty_slices_are_reshaped():
    params = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}

    def apply(p, x):
        hidden = jnp.pad(jax.nn.relu(x @ p["w"]), ((0, 0), (1, 1), (0, 0)), mode="edge")
        return hidden @ p["v"]

    trace.channel_groups(apply, params, jnp.ones((2, 5, 3)))
    assert trace.multiply_adds(apply, params, jnp.ones((2, 5, 3))).leaves["v"].macs == 2 * 7 * 4 * 2
