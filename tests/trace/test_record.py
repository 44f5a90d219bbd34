"""Moments of what arrives at products: those of inputs collected by hand."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsparse import trace
from jaxsparse.trees import by_path
from tests.problems import slow_except
from tests.trace.models import GPT, MODELS, TOKENS, linen, rand


@pytest.fixture(autouse=True)
def _users_may_broadcast():
    with jax.numpy_rank_promotion("allow"):
        yield


def assert_moments(moments, rows, gram=True, tolerance=1e-5):
    """The moments of these rows, (*leading, rows, inputs), computed in NumPy."""
    rows = np.asarray(rows, np.float64)
    second = np.einsum("...rk,...rl->...kl", rows, rows) if gram else (rows**2).sum(-2)
    np.testing.assert_array_equal(moments.rows, np.full(rows.shape[:-2], rows.shape[-2]))
    np.testing.assert_allclose(moments.first, rows.sum(-2), rtol=tolerance, atol=tolerance * np.abs(rows).sum(-2).max())
    np.testing.assert_allclose(moments.second, second, rtol=tolerance, atol=tolerance * np.abs(second).max())


def assert_same(got, want, tolerance=1e-5):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * float(jnp.abs(y).max()))


@pytest.mark.parametrize("gram", [False, True])
def test_mlp_over_batches(gram):
    apply, params, (x,) = MODELS["mlp"]()
    step = jax.jit(functools.partial(trace.record, apply, gram=gram))
    got = jax.tree.map(jnp.add, step(params, x), step(params, 2 * x))
    x = jnp.concatenate([x, 2 * x])
    h = jax.nn.relu(x @ params["fc1"]["kernel"] + params["fc1"]["bias"])
    arrives = {"fc1/kernel": x, "fc2/kernel": h,
               "fc3/kernel": jax.nn.sigmoid(h @ params["fc2"]["kernel"] + params["fc2"]["bias"])}  # fmt: skip
    assert list(got) == list(arrives)
    for path, rows in arrives.items():
        assert_moments(got[path], rows, gram)
        assert got[path].inputs == (0,)
        rows = np.asarray(rows)
        np.testing.assert_allclose(got[path].mean, rows.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(got[path].variance, rows.var(0), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(got[path].norm, np.linalg.norm(rows, axis=0), rtol=1e-5)


def through_layers(*stack):
    """What arrives at each of stacked layers of 8 x 8."""

    def arrives(x):
        rows = [x]
        for w in rand(*stack, 8, 8, seed=1).reshape(-1, 8, 8):
            rows.append(jnp.tanh(rows[-1] @ w))
        return jnp.stack(rows[:-1]).reshape(*stack, *x.shape)

    return arrives


def layer(x, w):
    return jnp.tanh(x @ w), None


# Each: the function of (w, x), the shape of w, what arrives at w, (*leading, rows, inputs), inputs, leading axes.
VIEWS = {
    "transposed": (lambda w, x: x @ w.T, (3, 8), lambda x: x, (1,), ()),
    "cast and scaled": (lambda w, x: x.astype("bfloat16") @ (2 * w).astype("bfloat16"), (8, 3),
                        lambda x: x.astype("bfloat16").astype("float32"), (0,), ()),
    "left": (lambda w, x: jnp.einsum("io,bi->ob", w, x), (8, 3), lambda x: x, (0,), ()),
    "two axes": (lambda w, x: jnp.einsum("bhd,hdo->bo", x.reshape(6, 2, 4), w), (2, 4, 3), lambda x: x, (0, 1), ()),
    "two axes, turned": (lambda w, x: jnp.einsum("bhd,dho->bo", x.reshape(6, 2, 4), w), (4, 2, 3),
                         lambda x: x.reshape(6, 2, 4).swapaxes(1, 2).reshape(6, 8), (0, 1), ()),
    "an axis in two": (lambda w, x: jnp.einsum("bhd,hdo->bo", x.reshape(6, 2, 4), w.reshape(2, 4, 3)), (8, 3),
                       lambda x: x, (0,), ()),
    "axes joined": (lambda w, x: x @ w.transpose(1, 0, 2).reshape(8, 6), (2, 8, 3), lambda x: x, (1,), ()),
    "outputs split": (lambda w, x: x @ jnp.split(w, 2, 1)[1], (8, 6), lambda x: x, (0,), ()),
    "experts": (lambda w, x: jnp.einsum("ebi,eio->ebo", jnp.stack([x, 3 * x]), w), (2, 8, 3),
                lambda x: jnp.stack([x, 3 * x]), (1,), (0,)),
    "shared by experts": (lambda w, x: jnp.einsum("bi,eio->ebo", x, w), (2, 8, 3), lambda x: x, (1,), ()),
    "vmap": (lambda w, x: jax.vmap(lambda w, x: w @ x)(w, x), (6, 3, 8), lambda x: x[:, None], (2,), (0,)),
    "vmap of rows": (lambda w, x: jax.vmap(lambda x: w @ x)(x), (3, 8), lambda x: x, (1,), ()),
    "low rank beside": (lambda w, x: x @ (w + w[:, :2] @ w[:2]), (8, 8), lambda x: x, (0,), ()),
    "remat": (lambda w, x: jax.checkpoint(lambda x: jnp.sin(x @ w))(x), (8, 3), lambda x: x, (0,), ()),
    "scan over layers": (lambda w, x: lax.scan(layer, x, w)[0], (3, 8, 8), through_layers(3), (1,), (0,)),
    "scan in a scan": (lambda w, x: lax.scan(lambda x, w: (lax.scan(layer, x, w)[0], None), x, w)[0], (2, 2, 8, 8),
                       through_layers(2, 2), (2,), (0, 1)),
    "scan over one layer": (lambda w, x: lax.scan(layer, x, w)[0], (1, 8, 8), lambda x: x, (1,), ()),
    "while": (lambda w, x: lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, 2 * c[1] + 0 * (c[1] @ w)), (0, x)),
              (8, 8), lambda x: jnp.concatenate([x, 2 * x]), (0,), ()),
    "rounds": (lambda w, x: lax.fori_loop(0, 2, lambda i, y: 2 * y + 0 * (y @ w), x), (8, 8),
               lambda x: jnp.concatenate([x, 2 * x]), (0,), ()),
    "closed over": (lambda w, x: rand(4, 8) @ w, (8, 3), lambda x: rand(4, 8), (0,), ()),
}  # fmt: skip


@pytest.mark.parametrize("name", slow_except(["two axes, turned", "an axis in two", "experts", "while",
                         "scan over layers"], VIEWS))  # fmt: skip
def test_views(name):
    function, shape, arrives, inputs, leading = VIEWS[name]
    w, x = rand(*shape, seed=1), rand(6, 8, seed=2)
    (moments,) = jax.jit(lambda w, x: trace.record(lambda p, x: function(p["w"], x), {"w": w}, x, gram=True))(
        w, x
    ).values()
    assert_moments(moments, arrives(x))
    assert (moments.inputs, moments.leading) == (inputs, leading)
    assert moments.along(moments.norm, shape).shape == tuple(
        n if i in inputs + leading else 1 for i, n in enumerate(shape)
    )


def sum_of_squares(rows):
    return jnp.square(rows).sum(-2)


def as_statistic(function, *args):
    """Second moments as the statistic of a caller, beside the library's own."""
    own = trace.record(function, *args, statistic=sum_of_squares)
    moments = trace.record(function, *args)
    assert set(own) == set(moments)
    return own, moments


def assert_statistics(own, moments):
    for path, one in own.items():
        np.testing.assert_array_equal(one.value, moments[path].second)
        np.testing.assert_array_equal(one.rows, moments[path].rows)
        assert (one.inputs, one.leading) == (moments[path].inputs, moments[path].leading)


@pytest.mark.parametrize("name", slow_except(["vmap", "scan over layers"], VIEWS))
def test_a_statistic_of_the_caller(name):
    function, shape, *_ = VIEWS[name]
    w, x = rand(*shape, seed=1), rand(6, 8, seed=2)
    assert_statistics(*jax.jit(lambda w, x: as_statistic(lambda p, x: function(p["w"], x), {"w": w}, x))(w, x))


def test_a_statistic_of_each_sample():
    params, x = {"w": rand(4, 8, 8, seed=1)}, rand(3, 5, 8)

    def apply(p, x):
        return lax.scan(jax.checkpoint(layer), x, p["w"])[0]

    @jax.jit
    @jax.vmap
    def mean_abs(x):
        return trace.record(apply, params, x, statistic=lambda rows: jnp.abs(rows).sum(-2))["w"]

    found, h = mean_abs(x), x
    assert (found.rows == 5).all()
    for i in range(4):
        np.testing.assert_allclose(found.mean[:, i], np.abs(np.asarray(h)).mean(1), rtol=1e-5)
        h = jnp.tanh(h @ params["w"][i])


def test_what_a_statistic_must_be():
    apply, params, (x,) = MODELS["mlp"]()
    with pytest.raises(ValueError, match=r"of shape \(20,\), of rows .* of shape \(5, 20\), got float32 of \(5,\)"):
        trace.record(apply, params, x, statistic=lambda rows: rows.sum(-1))
    with pytest.raises(ValueError, match=r"got int32 of \(20,\)"):
        trace.record(apply, params, x, statistic=lambda rows: (rows > 0).sum(-2))
    with pytest.raises(ValueError, match="gram=True and statistic= exclude each other"):
        trace.record(apply, params, x, gram=True, statistic=sum_of_squares)


def test_only_the_branch_that_is_taken():
    def apply(p, x):
        return lax.cond(x[0, 0] > 0, lambda: x @ p["a"], lambda: (2 * x) @ p["b"])

    params, x = {"a": rand(8, 3), "b": rand(8, 3, seed=1)}, jnp.abs(rand(6, 8))
    found = trace.record(apply, params, x, gram=True)
    assert_moments(found["a"], x)
    assert float(found["b"].rows) == float(jnp.abs(found["b"].second).max()) == 0
    assert_moments(trace.record(apply, params, -x, gram=True)["b"], -2 * x)
    assert_statistics(*as_statistic(apply, params, x))


CONVOLUTIONS = {
    "3x3": ((3, 3), 1, "SAME", (1, 1)),
    "strided": ((3, 2), 1, "VALID", (2, 1)),
    "1x1": ((1, 1), 1, "SAME", (2, 2)),
    "groups": ((3, 3), 2, "SAME", (1, 1)),
    "depthwise": ((3, 3), 4, "SAME", (1, 1)),
}


@pytest.mark.parametrize("name", slow_except(["3x3", "groups"], CONVOLUTIONS))
def test_convolutions(name):
    window, groups, padding, strides = CONVOLUTIONS[name]
    model = nn.Conv(8, window, strides, padding, feature_group_count=groups, use_bias=False)
    x = rand(2, 5, 6, 4, scale=1)
    params = model.init(jax.random.key(0), x)
    moments = jax.jit(functools.partial(trace.record, model.apply, gram=True))(params, x)["params/kernel"]
    (h, w), (sh, sw) = window, strides
    pads = [(0, 0), *[((n - 1) // 2, n // 2) for n in window], (0, 0)] if padding == "SAME" else [(0, 0)] * 4
    y = model.apply(params, x)
    padded = np.pad(np.asarray(x), pads)
    rows = np.stack([
        padded[:, i * sh : i * sh + h, j * sw : j * sw + w] for i in range(y.shape[1]) for j in range(y.shape[2])
    ])  # fmt: skip
    rows = rows.reshape(-1, h, w, groups, 4 // groups)
    kernel = np.asarray(params["params"]["kernel"]).reshape(h * w * 4 // groups, groups, -1)
    per_group = rows.transpose(3, 0, 1, 2, 4).reshape(groups, len(rows), -1)
    # The rows are the right ones: they give the outputs.
    outputs = np.einsum("grk,kgo->rgo", per_group, kernel).reshape(y.shape[1], y.shape[2], 2, 8).transpose(2, 0, 1, 3)
    np.testing.assert_allclose(outputs, y, rtol=1e-4, atol=1e-5)
    assert_moments(moments, per_group if groups > 1 else per_group[0])
    assert moments.inputs == tuple(axis for axis, n in enumerate((h, w, 4 // groups)) if n > 1)
    assert moments.leading == ((3,) if groups > 1 else ())
    norm = moments.along(moments.norm, (h, w, 4 // groups, 8))
    assert norm.shape == (h, w, 4 // groups, 8 if groups > 1 else 1)
    np.testing.assert_allclose(norm[..., -1].reshape(-1), np.linalg.norm(per_group[-1], axis=0), rtol=1e-5)


def mesh_of(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes))


@pytest.mark.slow
@pytest.mark.parametrize("checked", slow_except([True], [True, False]))
def test_devices_share_a_batch_and_the_inputs(checked):
    mesh = mesh_of(data=2, model=2)

    def device(p, x):
        h = jax.nn.relu(x @ p["up"])
        return lax.psum(h @ p["down"], "model") @ p["out"]

    def apply(p, x):
        specs = {"up": P(None, "model"), "down": P("model"), "out": P()}
        return jax.shard_map(device, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"), check_vma=checked)(
            p, x
        )

    params = {"up": rand(4, 8), "down": rand(8, 4, seed=1), "out": rand(4, 4, seed=2)}
    x = rand(6, 4, seed=3)
    found = jax.jit(functools.partial(trace.record, apply))(params, x)
    h = jax.nn.relu(x @ params["up"])
    for path, rows in {"up": x, "down": h, "out": h @ params["down"]}.items():
        assert_moments(found[path], rows, gram=False)
    assert_statistics(jax.jit(lambda p, x: trace.record(apply, p, x, statistic=sum_of_squares))(params, x), found)
    with pytest.warns(UserWarning, match="down has its inputs divided among devices at shard_map"):
        found = trace.record(apply, params, x, gram=True)
    assert set(found) == {"up", "out"}
    assert_moments(found["up"], x)


@pytest.mark.slow
def test_devices_with_control_flow_of_their_own():
    def device(p, x):
        x = lax.cond(x[0, 0] > 0, lambda: x @ p["a"], lambda: 0 * x)
        return lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.sin(c[1] @ p["b"])), (0, x))[1]

    def apply(p, x):
        return jax.shard_map(device, mesh=mesh_of(data=2), in_specs=(P(), P("data")), out_specs=P("data"))(p, x)

    params, x = {"a": rand(4, 4), "b": rand(4, 4, seed=1)}, rand(6, 4, seed=2).at[0, 0].set(-1.0).at[3, 0].set(1.0)
    found = jax.jit(functools.partial(trace.record, apply))(params, x)
    assert_moments(found["a"], x[3:], gram=False)
    h = jnp.concatenate([0 * x[:3], x[3:] @ params["a"]])
    assert_moments(found["b"], jnp.concatenate([h, jnp.sin(h @ params["b"])]), gram=False)


def test_sharded_batch_under_jit():
    mesh, x = mesh_of(data=4), rand(8, 4)
    params = {"w": rand(4, 3, seed=1)}
    sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
    found = jax.jit(lambda p, x: trace.record(lambda p, x: x @ p["w"], p, x, gram=True))(params, sharded)
    assert_moments(found["w"], x)


def test_leaves_are_chosen_by_pattern():
    apply, params, (x,) = MODELS["mlp"]()
    with pytest.warns(UserWarning, match="fc2/bias is multiplied by nothing"):
        assert list(trace.record(apply, params, x, leaves="fc2")) == ["fc2/kernel"]
    assert list(trace.record(apply, params, x, leaves=["fc3/*", "*1/kernel"])) == ["fc1/kernel", "fc3/kernel"]
    with pytest.raises(ValueError, match=r"leaves: 'fc4' matches none of fc1/bias"):
        trace.record(apply, params, x, leaves="fc4")


def noise(p, x):
    return x @ (p["w"] * x[:8])


LOST = {
    "changed by data": (noise, r"w goes into mul at .*test_record\.py:\d+.*\(noise\)"),
    "one of a stack": (lambda p, x: x @ p["w"].reshape(2, 4, 8)[0].T, "w is multiplied in another form"),
    "part of the inputs": (lambda p, x: x[:, :4] @ p["w"][:4], "w is multiplied in another form at dot_general"),
    "both ways": (lambda p, x: (x @ p["w"]) @ p["w"].T, r"w is multiplied along axes \(1,\) too, not only \(0,\)"),
    "carried": (lambda p, x: lax.fori_loop(0, 2, lambda i, w: x[:8] @ w, p["w"]), "w is carried by scan at"),
    "chosen by data": (lambda p, x: x @ jnp.where(x[:8] > 0, p["w"], 0), "w goes into select_n at"),
    "an expert chosen by data": (
        lambda p, x: jnp.einsum("bi,bij->bj", x[:, :4], p["w"].reshape(2, 4, 8)[(x[:, 0] > 0).astype(int)]),
        "w goes into gather at",
    ),
    "a layer of a round": (
        lambda p, x: lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, p["w"][c[0]] * c[1]), (0, x)),
        "w goes into dynamic_slice at",
    ),
    "in a condition": (
        lambda p, x: lax.while_loop(lambda x: (x @ p["w"]).sum() > 0, lambda x: x - 1, x),
        "w is multiplied in the condition of while at",
    ),
    "complex": (lambda p, x: (1j * x) @ p["w"].astype(complex), "w is multiplied by complex numbers at"),
    "scan of parts": (
        lambda p, x: lax.scan(lambda x, w: (x + x[:, :4] @ w, None), x, p["w"].reshape(2, 4, 8))[0],
        "w is multiplied in another form at dot_general",
    ),
    "sorted": (lambda p, x: x @ jnp.sort(p["w"]), "w is multiplied in another form"),
}


@pytest.mark.parametrize("name", slow_except(["changed by data", "both ways"], LOST))
def test_what_is_not_recorded_is_named(name):
    function, message = LOST[name]
    with pytest.warns(UserWarning, match=message):
        trace.record(function, {"w": rand(8, 8)}, rand(9, 8))


def collected(model, params, *args):
    """What arrives at the layers of a Linen model, as rows by path: taken by an interceptor."""
    rows = {}

    def take(call, layer_args, kwargs, context):
        layer = context.module
        if context.method_name == "__call__" and isinstance(layer, nn.Dense | nn.DenseGeneral):
            kernel = layer.get_variable("params", "kernel")
            inputs = int(np.prod(kernel.shape[: len(np.atleast_1d(getattr(layer, "axis", -1)))]))
            rows["/".join(("params", *layer.path, "kernel"))] = layer_args[0].reshape(-1, inputs)
        return call(*layer_args, **kwargs)

    with nn.intercept_methods(take):
        model.apply(params, *args)
    return rows


@pytest.mark.slow
def test_gpt_by_hand_and_a_scan_is_the_loop():
    loop, (_, params, _) = GPT(scan=False), linen(GPT(scan=False), TOKENS)
    record = jax.jit(functools.partial(trace.record, gram=True), static_argnums=0)
    found = record(loop.apply, params, TOKENS)
    rows = collected(loop, params, TOKENS)
    assert len(rows) == 3 * 7
    assert set(found) == {*rows, "params/embed/embedding"}
    for path, own in rows.items():
        assert_moments(found[path], own, tolerance=2e-5)
    blocks = [params["params"][f"block{i}"] for i in range(3)]
    rest = {key: leaf for key, leaf in params["params"].items() if not key.startswith("block")}
    stacked = {"params": {**rest, "blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}}
    scanned = record(GPT().apply, stacked, TOKENS)
    assert len(scanned) == 8
    for path, moments in scanned.items():
        if "blocks" in path:
            each = [found[path.replace("blocks", f"block{i}")] for i in range(3)]
            want = jax.tree.map(lambda *x: jnp.stack(x), *each)
            assert moments.leading == (0,)
            assert moments.inputs == tuple(axis + 1 for axis in each[0].inputs)
            for x, y in zip(*map(jax.tree.leaves, (moments, want)), strict=True):
                np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5 * float(jnp.abs(y).max()))
        else:
            assert_same(moments, found[path], 2e-5)


RECORDED = {
    "lenet": 4, "resnet": 7, "densenet": 6, "mobilenet": 10, "gpt nnx mha": 15, "gpt eqx scan vmap": 8,
    "gpt plain fused gqa rope scan": 5, "gpt plain loop": 9, "mlp eqx": 3, "haiku conv groupnorm": 4,
    "resnet flax example": 13, "convnext": 5, "unet": 7, "dropout batchnorm train": 3, "vit": 14, "attention linen": 5,
    "rnn linen": 9, "lstm": 3, "experts": 4,
    "own gpt-2 loop": 13, "own qwen2 scan+remat": 8, "own one key head scan": 7,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED)
def test_models_are_recorded_whole(name, recwarn):
    apply, params, args = MODELS[name]()
    shapes = {path: leaf.shape for path, leaf in by_path(params).items() if hasattr(leaf, "shape")}
    found = trace.record(apply, params, *args, gram=True)
    assert not recwarn.list
    assert len(found) == RECORDED[name]
    for path, moments in found.items():
        matrices = [path for path in found if len(shapes[path]) > 1]
        assert path in matrices
        assert moments.squares.shape == moments.first.shape
        assert float(moments.squares.min()) >= 0
        assert float(moments.rows.min()) > 0
        assert moments.first.shape[-1] == np.prod([shapes[path][axis] for axis in moments.inputs])
