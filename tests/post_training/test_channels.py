"""Heads and hidden units by their activations: scores by hand, choices, and whole models."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsparse import models, trace
from jaxsparse.post_training import channel_scores, lowest_channels, prune_channels
from jaxsparse.post_training.samples import arrays_of
from jaxsparse.post_training.stacks import check_interchangeable
from tests.trace.models import MODELS, TOKENS, filled, plain_gpt, rand
from tests.trace.slimming import gate_masks, masked


@pytest.fixture(autouse=True)
def _users_may_broadcast():
    with jax.numpy_rank_promotion("allow"):
        yield


def run(apply, params, *args):
    arrays, put = arrays_of(params)
    return jax.jit(lambda arrays, *args: apply(put(arrays), *args))(arrays, *args)


def mlp(width=6):
    params = {"up": rand(4, width, seed=1), "down": rand(width, 3, seed=2)}
    return (lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]), params


def minitron(*batches):
    """The score of each input by its definition: activations are (samples, places, inputs)."""
    means = [np.abs(np.asarray(x, np.float64)).mean(1) for x in batches]
    return np.sqrt(sum((mean**2).sum(0) for mean in means))


def test_scores_of_units_over_batches():
    apply, params = mlp()
    groups = trace.channel_groups(apply, params, jnp.zeros((2, 5, 4)))
    batches = [rand(2, 5, 4), rand(3, 7, 4, seed=3)]
    found = channel_scores(apply, params, batches, groups)
    assert set(found) == {"up"}
    want = minitron(*(np.tanh(x @ params["up"]) for x in batches))
    np.testing.assert_allclose(found["up"], want, rtol=1e-5)


def test_where_the_samples_are():
    apply, params = mlp()
    x, shift = rand(2, 5, 4), rand(4, seed=4)

    def shifted(p, x, shift):
        return apply(p, x + shift)

    groups = trace.channel_groups(shifted, params, x, shift)
    h = np.tanh((x + shift) @ params["up"])
    by_place = channel_scores(shifted, params, [(x.swapaxes(0, 1), shift)], groups, samples=(1, None))["up"]
    np.testing.assert_allclose(by_place, minitron(h), rtol=1e-5)
    whole = channel_scores(shifted, params, [(x, shift)], groups, samples=None)["up"]
    np.testing.assert_allclose(whole, minitron(h.reshape(1, 10, 6)), rtol=1e-5)
    with pytest.raises(ValueError, match=r"different numbers of samples, 2 in arg 0 and 4 in arg 1: give samples="):
        channel_scores(shifted, params, [(x, shift)], groups)
    with pytest.raises(
        ValueError, match=r"arg 1 after params has an array of shape \(\), without the axis 0 of samples"
    ):
        channel_scores(shifted, params, [(x, jnp.float32(1))], groups)
    with pytest.raises(ValueError, match="an axis, or one for each of the 2 args after params"):
        channel_scores(shifted, params, [(x, shift)], groups, samples=(0,))


def attention(heads=4, kv=2, dim=3, d=5):
    params = {
        "q": rand(d, heads, dim, seed=1),
        "k": rand(d, kv, dim, seed=2),
        "v": rand(d, kv, dim, seed=3),
        "out": rand(heads, dim, d, seed=4),
    }

    def inside(p, x):
        q, k, v = (jnp.einsum("bti,ihd->bthd", x, p[name]) for name in "qkv")
        k, v = (jnp.repeat(z, heads // kv, 2) for z in (k, v))
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(dim))
        return jnp.einsum("bhts,bshd->bthd", weights, v)

    return (lambda p, x: jnp.einsum("bthd,hdo->bto", inside(p, x), p["out"])), params, inside


def test_scores_of_heads_that_share_keys_and_values():
    apply, params, inside = attention()
    x = rand(2, 6, 5)
    groups = trace.channel_groups(apply, params, x)
    (name,) = groups.kinds
    assert (groups.kinds[name], groups[name].size) == ("heads", 2)
    found = channel_scores(apply, params, [x], groups, [name])[name]
    dims = minitron(inside(params, x).reshape(2, 6, 12)).reshape(2, 6)  # heads and dimensions of each pair of heads
    np.testing.assert_allclose(found, np.sqrt((dims**2).sum(1)), rtol=1e-5)
    with pytest.raises(ValueError, match="arrive at no product with a leaf, so their activations give no scores"):
        channel_scores(apply, params, [x], groups, [next(g.name for g in groups if not groups.reads[g.name])])


def test_a_residual_stream_counts_once_for_those_that_read_it_together():
    params = {"in": rand(4, 6), "a": rand(6, 3, seed=1), "b": rand(6, 3, seed=2), "c": rand(6, 2, seed=3)}

    def apply(p, x):
        h = x @ p["in"]
        y = jnp.maximum(h, 0)
        return (y @ p["a"]) * (y @ p["b"]), h @ p["c"]

    x = rand(3, 5, 4, seed=5)
    groups = trace.channel_groups(apply, params, x)
    assert not groups.kinds
    h = np.asarray(x @ params["in"])
    found = channel_scores(apply, params, [x], groups)["in"]
    np.testing.assert_allclose(found, minitron(np.maximum(h, 0)) + minitron(h), rtol=1e-5)


@pytest.mark.slow
def test_scores_of_stacked_layers_are_those_of_layers_written_out():
    apply, params, args = plain_gpt(scan=False)
    loop = channel_scores(apply, params, [args], trace.channel_groups(apply, params, *args))
    apply, params, args = plain_gpt()
    scan = channel_scores(apply, params, [args], trace.channel_groups(apply, params, *args))
    assert set(scan) == {"blocks/down", "blocks/qkv#2", "blocks/qkv#3", "blocks/qkv#4", "blocks/gate_up"}
    for name, found in scan.items():
        if name == "blocks/down":
            np.testing.assert_allclose(found, loop["blocks/0/down"], rtol=1e-4)
        else:
            want = [loop[name.replace("blocks", f"blocks/{i}")] for i in range(2)]
            np.testing.assert_allclose(found, want, rtol=1e-4)


def test_arguments_that_are_no_arrays_are_part_of_the_program():
    plain, params = mlp()
    x, calls = rand(2, 5, 4), []

    def apply(p, x, mode, options):
        calls.append(mode)
        assert mode in ("eval", "other")
        return plain(p, options["scale"](x + options["shift"]))

    options = {"scale": jnp.sin, "shift": jnp.ones(4)}
    batches = [(x, "eval", options), (x, "eval", options), (x, "other", options)]
    small = prune_channels(apply, params, batches, {"units": 0.5}, samples=(0, 0, None))
    by_hand = minitron(*3 * [np.tanh(np.sin(x + 1) @ params["up"])])
    np.testing.assert_array_equal(small.params["up"], params["up"][:, np.sort(np.argsort(by_hand)[3:])])
    groups = trace.channel_groups(apply, params, *batches[0])
    calls.clear()
    found = channel_scores(apply, params, batches, groups, samples=(0, None, None))
    np.testing.assert_allclose(found["up"], by_hand, rtol=1e-5)
    assert calls == ["eval", "other"]  # a program for each
    with pytest.raises(ValueError, match=r"batch 0, \(float32\[2, 5, 3\], 'eval', .*sin.*, float32\[4\]\): .*shape"):
        channel_scores(apply, params, [(x[..., :3], "eval", options)], groups, samples=(0, None, None))


def test_bad_batches():
    apply, params = mlp()
    x = rand(2, 5, 4)
    groups = trace.channel_groups(apply, params, x)
    with pytest.raises(ValueError, match=r"got one array of shape \(2, 5, 4\): give \[batch\]"):
        channel_scores(apply, params, x, groups)
    with pytest.raises(ValueError, match=r"batch 1, \(float32\[2, 5, 3\]\): .*dot_general"):
        channel_scores(apply, params, [x, x[..., :3]], groups)
    with pytest.raises(ValueError, match=r"batch 0, \(float32\[2, 5, 3\]\): .*dot_general"):
        prune_channels(apply, params, [x[..., :3]], {"units": 0.5})
    with pytest.raises(ValueError, match=r"must be an iterable of batches, got {'x': 1}: give"):
        channel_scores(apply, params, {"x": 1}, groups)
    with pytest.raises(ValueError, match=r"got None: give \[batch\]"):
        channel_scores(apply, params, None, groups)
    with pytest.raises(ValueError, match="batches has no batch"):
        prune_channels(apply, params, [], {"units": 0.5})
    with pytest.raises(ValueError, match="the activations of up are not all finite"):
        channel_scores(apply, params, [x.at[0, 0, 0].set(jnp.nan)], groups)


def two_layers():
    params = {"a": jnp.ones((2, 10)), "b": jnp.ones((10, 5)), "c": jnp.ones((5, 2))}
    apply = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]  # noqa: E731
    return trace.channel_groups(apply, params, jnp.ones((3, 2)))


def test_the_lowest_go_and_of_equal_scores_the_last():
    groups = two_layers()
    scores = {"a": [3.0, 1.0, 2.0, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0, 0.0], "b": [2.0, 2.0, 2.0, 2.0, 2.0]}
    found = lowest_channels(groups, scores, {"a": 0.3, "*": 0.5})
    assert np.flatnonzero(found["a"]).tolist() == [3, 4, 9]
    assert np.flatnonzero(found["b"]).tolist() == [3, 4]  # two and a half, rounded down


def test_channels_of_several_groups_against_each_other():
    groups = two_layers()
    scores = {"a": np.arange(10.0), "b": 100 * np.array([1.0, 1.1, 1.2, 1.3, 9.0])}
    found = lowest_channels(groups, scores, {"units": 0.4}, ranking="global")
    standard = [(s - s.mean()) / s.std() for s in scores.values()]
    least = np.argsort(np.concatenate(standard))[:6]
    assert np.flatnonzero(np.concatenate([found["a"], found["b"]])).tolist() == sorted(least.tolist())
    alone = {"a": np.arange(10.0), "b": np.zeros(5)}
    assert lowest_channels(groups, alone, {"units": 0.8}, ranking="global")["b"].sum() == 4
    with pytest.warns(UserWarning, match="a share of 0.05 of the 15 channels of a, b is less than one: all stay"):
        assert not any(
            shut.any() for shut in lowest_channels(groups, scores, {"units": 0.05}, ranking="global").values()
        )
    with pytest.raises(ValueError, match="a share of 0.95 of 'units' leaves none of the channels of one of a, b"):
        lowest_channels(groups, scores, {"units": 0.95}, ranking="global")


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"units": 1.0}, r"shares\['units'\] must be a number in \[0, 1\), got 1.0"),
        ({"units": True}, r"shares\['units'\] must be a number in \[0, 1\), got True"),
        ({"heads": 0.5}, "'heads' selects nothing, it names no group; the kinds are units, the groups a, b"),
        ({"units": 0.5, "b": 0.2}, "'b' selects nothing, all that it names have a share by a key before it"),
        ({}, "shares names no group of channels"),
    ],
)
def test_shares_that_make_no_sense(shares, message):
    with pytest.raises(ValueError, match=message):
        lowest_channels(two_layers(), {"a": np.ones(10), "b": np.ones(5)}, shares)


def test_choices_that_make_no_sense():
    groups = two_layers()
    with pytest.raises(ValueError, match="scores have nothing for group 'b', only a"):
        lowest_channels(groups, {"a": np.ones(10)}, {"units": 0.5})
    with pytest.raises(ValueError, match=r"scores of group 'b' must be finite and of shape \(5,\), got \(4,\)"):
        lowest_channels(groups, {"a": np.ones(10), "b": np.ones(4)}, {"units": 0.5})
    with pytest.raises(ValueError, match="ranking must be"):
        lowest_channels(groups, {}, {"units": 0.5}, ranking="all")
    with pytest.warns(UserWarning, match="a share of 0.1 of the 5 channels of 'b' is less than one: all stay"):
        assert not lowest_channels(groups, {"b": np.ones(5)}, {"b": 0.1})["b"].any()


def stacked_mlp(slopes=0.0):
    """Layers in a scan; with slopes each unit has a constant of its own."""
    params = {"up": rand(3, 4, 6, seed=1), "b": rand(3, 6, seed=3, scale=0.3), "down": rand(3, 6, 4, seed=2)}

    def apply(p, x):
        def layer(x, p):
            h = jnp.tanh(x @ p["up"] + p["b"])
            return x + (h * (1 + slopes * jnp.arange(6.0)) if slopes else h) @ p["down"], None

        return lax.scan(jax.checkpoint(layer), x, p)[0]

    return apply, params


def closed_by_hand(params, groups, closed):
    """The params in which the channels that each layer closes are zeros."""
    per_layer = groups.per_layer()
    dead = {g.name: np.ravel(closed.get(g.name, np.zeros(g.size, bool))) for g in per_layer}
    return masked(params, gate_masks(params, per_layer, dead))


@pytest.mark.slow
def test_each_layer_of_a_scan_keeps_its_own_best_units():
    apply, params = stacked_mlp()
    x = rand(2, 5, 4)
    groups = trace.channel_groups(apply, params, x)
    closed = lowest_channels(groups, channel_scores(apply, params, [x], groups), {"units": 0.5})
    (name,) = closed
    assert closed[name].sum(1).tolist() == [3, 3, 3]
    assert (closed[name][0] != closed[name][1]).any()
    momentum = jax.tree.map(lambda p: 10 * p, params)
    small = prune_channels(apply, params, [x], {"units": 0.5}, opt_state=(optax.EmptyState(), {"trace": momentum}))
    assert {path: shapes[1] for path, shapes in small.shapes.items()} == {
        "up": (3, 4, 3),
        "b": (3, 3),
        "down": (3, 3, 4),
    }
    jax.tree.map(lambda m, p: np.testing.assert_array_equal(m, 10 * p), small.opt_state[1]["trace"], small.params)
    shut = closed_by_hand(params, groups, closed)
    trace.same(lambda x: run(apply, shut, x), lambda x: run(small.apply, small.params, x), x, rtol=1e-5)
    stack = lowest_channels(groups, channel_scores(apply, params, [x], groups), {"units": 0.5}, ranking="stack")
    assert (stack[name].shape, int(stack[name].sum())) == ((6,), 3)
    with pytest.raises(ValueError, match=r'ranking="global" gives layers different widths, and those of .* stacked'):
        lowest_channels(groups, channel_scores(apply, params, [x], groups), {"units": 0.5}, ranking="global")


def test_units_with_constants_of_their_own_keep_their_places():
    apply, params = stacked_mlp(slopes=0.5)
    x = rand(2, 5, 4)
    with pytest.raises(ValueError, match=r"not all channels of up are interchangeable: .* Give ranking=\"stack\""):
        prune_channels(apply, params, [x], {"units": 0.5})
    small = prune_channels(apply, params, [x], {"units": 0.5}, ranking="stack")
    groups = trace.channel_groups(apply, params, x)
    closed = lowest_channels(groups, channel_scores(apply, params, [x], groups), {"units": 0.5}, ranking="stack")
    shut = masked(params, gate_masks(params, groups, closed))
    trace.same(lambda x: run(apply, shut, x), lambda x: run(small.apply, small.params, x), x, rtol=1e-5)


def test_outputs_that_are_infinite_in_any_case_say_nothing_of_channels():
    apply, params = stacked_mlp()
    x = rand(2, 5, 4)
    far = jnp.where(jnp.arange(4) < 2, -jnp.inf, 0)
    check_interchangeable(lambda p, x: apply(p, x) + far, params, params, (x,), ["up"])
    other = jax.tree.map(lambda p: 1.5 * p, params)
    with pytest.raises(ValueError, match="not all channels of up are interchangeable"):
        check_interchangeable(lambda p, x: apply(p, x) + far, params, other, (x,), ["up"])


LLAMA = {"num_kv_heads": 2, "positions": "rotary", "norm": "rms", "mlp": "gated", "bias": False}
OPTIONS = {
    "gpt2": {},
    "gpt2 scan+remat": {"scan": True, "remat": True},
    "llama": LLAMA,
    "llama scan+remat": LLAMA | {"scan": True, "remat": True, "tied": False},
}


def gpt(name, **changed):
    options = {"width": 16, "num_layers": 2, "max_length": 8, "head_dim": 4} | OPTIONS[name] | changed
    model = models.GPT(32, **options)
    params = filled(jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS)))["params"]
    return (lambda p, tokens: model.apply({"params": p}, tokens)), params, (TOKENS,)


WHOLE = ["gpt plain fused gqa rope scan", "gpt plain loop", "gpt eqx scan vmap", "gpt nnx mha",
         "gpt linen scan+remat rms",
         "gpt linen loop layernorm", "vit", "resnet", "experts", "haiku conv groupnorm"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OPTIONS, *WHOLE])
def test_the_small_model_is_the_masked_one(name):
    apply, params, args = gpt(name) if name in OPTIONS else MODELS[name]()
    groups = trace.channel_groups(apply, params, *args)
    shares = {kind: 0.5 if kind == "units" else 0.25 for kind in set(groups.kinds.values())}
    if "gqa" in name or "llama" in name or name == "gpt plain loop":
        shares["heads"] = 0.5  # one of two pairs
    closed = lowest_channels(groups, channel_scores(apply, params, [args], groups, [*groups.kinds]), shares)
    shut = closed_by_hand(params, groups, closed)
    small = prune_channels(apply, params, [args], shares, groups=groups)
    trace.same(lambda *x: run(apply, shut, *x), lambda *x: run(small.apply, small.params, *x), *args, rtol=1e-5)
    for group, shut in closed.items():
        assert (shut.sum(-1) == math.floor(shares[groups.kinds[group]] * groups[group].size)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_training_goes_on_and_a_smaller_module_takes_the_params(name):
    apply, params, args = gpt(name)
    tx = optax.adam(3e-3)

    def steps(apply, params, state, number):
        @jax.jit
        def step(params, state):
            def loss(params):
                logits = apply(params, TOKENS)[:, :-1]
                return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()

            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        losses = []
        for _ in range(number):
            params, state, value = step(params, state)
            losses.append(float(value))
        return params, state, losses

    params, state, _ = steps(apply, params, tx.init(params), 3)
    heads = 0.5 if "llama" in name else 0.25
    small = prune_channels(apply, params, [args], {"units": 0.5, "heads": heads}, opt_state=state)
    assert jax.tree.map(jnp.shape, small.opt_state[0].mu) == jax.tree.map(jnp.shape, small.params)
    less = {"num_heads": 2, "num_kv_heads": 1} if "llama" in name else {"num_heads": 3}
    native, shapes, _ = gpt(name, mlp_width=32, **less)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, small.params)
    trace.same(jax.jit(small.apply), jax.jit(native), small.params, TOKENS, rtol=1e-5)
    _, state, losses = steps(small.apply, small.params, small.opt_state, 8)
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0]
    assert int(state[0].count) == 11


@pytest.mark.slow
def test_bfloat16_and_many_devices():
    apply, params, (tokens,) = gpt("llama scan+remat", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    tokens = jnp.tile(tokens, (2, 1))
    shares = {"units": 0.5, "heads": 0.5}
    groups = trace.channel_groups(apply, params, tokens)
    scores = channel_scores(apply, params, [tokens], groups, [*groups.kinds])
    small = prune_channels(apply, params, [tokens], shares, groups=groups)
    assert {leaf.dtype for leaf in jax.tree.leaves(small.params)} == {jnp.dtype("bfloat16")}
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.tree.map(
        lambda p: jax.device_put(p, NamedSharding(mesh, P(*(None,) * (p.ndim - 1), "data") if p.ndim > 2 else P())),
        params,
    )
    batch = jax.device_put(tokens, NamedSharding(mesh, P("data")))
    many = channel_scores(apply, spread, [batch], groups, [*groups.kinds])
    for name, score in many.items():
        np.testing.assert_allclose(score, scores[name], rtol=2e-2)
    again = prune_channels(apply, spread, [batch], shares, groups=groups)
    assert jax.tree.map(jnp.shape, again.params) == jax.tree.map(jnp.shape, small.params)
    assert np.isfinite(np.asarray(run(again.apply, again.params, tokens), np.float32)).all()
