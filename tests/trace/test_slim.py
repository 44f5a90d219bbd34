import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from jaxsparse import trace
from jaxsparse.trace.slim import kept_entries
from jaxsparse.trace.states import cut_params
from tests.trace.models import MODELS, mlp, rand
from tests.trace.slimming import floats_of, gate_masks, masked, outputs_and_gradients, relative, some_closed

FAST = ["mlp"]


def slimmed(name, **options):
    apply, params, args = MODELS[name]()
    groups = trace.channel_groups(apply, params, *args)
    closed = some_closed(groups)
    shut = masked(params, gate_masks(params, groups, closed))
    return apply, shut, trace.slim(apply, shut, closed, *args, groups=groups, **options), args, groups, closed


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_outputs_and_gradients_are_those_of_the_masked_model(name):
    apply, params, small, args, groups, closed = slimmed(name)
    sizes = [sum(leaf.size for leaf in floats_of(tree)[0]) for tree in (params, small.params)]
    assert sizes[1] < (sizes[0] if name == "gpt linen loop slow layernorm" else 0.9 * sizes[0])
    kept = kept_entries(groups, closed, small.apply.full)
    for batch in (args, jax.tree.map(lambda x: x[:1] if np.ndim(x) else x, args)):
        out, grads = outputs_and_gradients(apply, params, *batch)
        small_out, small_grads = outputs_and_gradients(small.apply, small.params, *batch)
        state = {"batch_stats": params["batch_stats"]} if name == "dropout batchnorm train" else {}
        out = cut_params(out, kept) if not state else (out[0], cut_params(dict(out[1]), kept))
        assert relative(small_out, out) < 2e-6
        assert relative(small_grads, cut_params(grads, kept)) < 2e-6


def test_the_table_has_old_and_new_shapes():
    _, _, small, _, _, _ = slimmed("mlp")
    assert small.shapes["fc2/kernel"] == ((32, 24), (22, 16))
    assert "fc2/kernel  32x24  22x16     768   352" in str(small)
    assert str(small).splitlines()[-1].split() == ["all", "1,608", "926"]


def test_training_goes_on_as_that_of_the_masked_model():
    apply, params, (x,) = mlp()
    groups = trace.channel_groups(apply, params, x)
    closed = some_closed(groups)
    masks = gate_masks(params, groups, closed)
    tx = optax.sgd(0.3, momentum=0.9)

    def steps(apply, params, state, masks, number):
        losses = []

        @jax.jit
        def step(params, state):
            loss, grads = jax.value_and_grad(lambda p: (apply(p, x) ** 2).mean())(params)
            grads = masked(grads, masks)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        for _ in range(number):
            params, state, loss = step(params, state)
            losses.append(float(loss))
        return params, state, losses

    params = masked(params, masks)
    params, state, _ = steps(apply, params, tx.init(params), masks, 3)
    small = trace.slim(apply, params, closed, x, groups=groups, opt_state=state)
    assert np.abs(small.opt_state[0].trace["fc2"]["kernel"]).max() > 0
    _, _, losses = steps(apply, params, state, masks, 5)
    nothing = jax.tree.map(lambda p: True, small.params)
    _, _, small_losses = steps(small.apply, small.params, small.opt_state, nothing, 5)
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(small_losses, losses, rtol=1e-5)


@pytest.mark.slow
def test_slim_of_slim_is_made_of_the_first_function():
    apply, _, small, (x,), _, _ = slimmed("mlp")
    groups = trace.channel_groups(small.apply, small.params, x)
    closed = some_closed(groups, share=2, seed=1)
    shut = masked(small.params, gate_masks(small.params, groups, closed))
    smaller = trace.slim(small.apply, shut, closed, x, groups=groups)
    assert smaller.apply.apply is apply
    assert repr(smaller.apply) == "<slim apply>"
    assert smaller.params["fc2"]["kernel"].shape == (11, 8)
    trace.same(lambda x: small.apply(shut, x), lambda x: smaller.apply(smaller.params, x), x, rtol=2e-6)


def test_it_is_an_ordinary_function():
    _, _, small, (x,), _, _ = slimmed("mlp")
    y = small.apply(small.params, x)
    each = jax.vmap(lambda row: small.apply(small.params, row[None])[0])(x)
    assert relative(each, y) < 2e-6
    with jax.numpy_dtype_promotion("strict"):
        np.testing.assert_array_equal(small.apply(small.params, np.asarray(x, np.float64)), y)
    exported = jax.export.export(jax.jit(small.apply))(small.params, x)
    assert relative(exported.call(small.params, x), y) < 2e-6
    assert "dot_general" in exported.mlir_module()
    assert "tensor<22x16xf32>" in exported.mlir_module()
    assert "tensor<32x24xf32>" not in exported.mlir_module()  # nothing at full size


def test_shapes_alone_are_enough():
    apply, params, (x,) = mlp()
    shapes = jax.eval_shape(lambda: params)
    small = trace.slim(apply, shapes, {"fc1/kernel": np.arange(32) < 7}, jax.ShapeDtypeStruct((2, 20), jnp.float32))
    assert small.params["fc2"]["kernel"].shape == (25, 24)
    assert jax.eval_shape(small.apply, small.params, x).shape == (5, 6)


def test_params_of_another_dtype():
    _, _, small, (x,), _, _ = slimmed("mlp")
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), small.params)
    assert small.apply(half, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_widths_become_multiples_by_the_best_closed_channels():
    apply, params, (x,) = mlp()
    closed = {"fc1/kernel": np.arange(32) >= 13, "fc2/kernel": np.arange(24) >= 16}
    params["fc1"]["kernel"] = params["fc1"]["kernel"].at[:, 20].multiply(30).at[:, 30].multiply(20)
    small = trace.slim(apply, params, closed, x, multiple_of=8)
    assert small.params["fc2"]["kernel"].shape == (16, 16)
    stay = np.flatnonzero(small.apply.kept["fc1/kernel", 1])
    assert set(stay) > {*range(13), 20, 30}
    with pytest.warns(UserWarning, match="multiple_of=64 is missed along .*axis 1 of fc2/kernel, axis 0 of fc3/kernel"):
        whole = trace.slim(apply, params, {"fc2/kernel": np.arange(24) < 1}, x, multiple_of=64)
    assert whole.params["fc3"]["kernel"].shape == (24, 6)


def test_widths_of_stacked_layers_become_multiples():
    def apply(params, x):
        def layer(h, p):
            return h + jax.nn.relu(h @ p["up"]) @ p["down"], None

        return jax.lax.scan(layer, x, params)[0]

    params, x = {"up": rand(3, 5, 16), "down": rand(3, 16, 5, seed=1)}, rand(2, 5)
    groups = trace.channel_groups(apply, params, x).per_layer()
    closed = {"up": np.arange(16) >= np.array([[5], [6], [7]])}  # channels 7 and more in all layers
    closed = {"up": np.where(np.arange(16) == 9, [[False], [True], [True]], closed["up"]).ravel()}
    shut = masked(params, gate_masks(params, groups, closed))
    for multiple_of, width in ((1, 8), (4, 8), (3, 9)):
        small = trace.slim(apply, shut, closed, x, groups=groups, multiple_of=multiple_of)
        assert small.params["up"].shape == (3, 5, width)
    trace.same(lambda x: apply(shut, x), lambda x: small.apply(small.params, x), x, rtol=2e-6)


def test_widths_with_an_entry_that_must_stay_become_multiples():
    def apply(params, x):
        h = jnp.tanh(x @ params["w"])
        return (h * h[:, 2:3]) @ params["v"]

    params, x = {"w": rand(5, 8), "v": rand(8, 3, seed=1)}, rand(2, 5)
    (group,) = groups = trace.channel_groups(apply, params, x)
    assert group.size == 7
    small = trace.slim(apply, params, {group.name: np.arange(7) >= 2}, x, groups=groups, multiple_of=4)
    assert small.params["w"].shape == (5, 4)


def test_widths_of_heads_and_their_inner_dimensions_become_multiples():
    def apply(params, x):
        heads = (x @ params["in"]).reshape(-1, 4, 4)
        heads = heads / (1 + jnp.abs(heads).sum(1, keepdims=True))
        return heads.reshape(-1, 16) @ params["out"]

    params, x = {"in": rand(5, 16), "out": rand(16, 3, seed=1)}, rand(2, 5)
    groups = trace.channel_groups(apply, params, x)
    closed = {group.name: np.arange(4) >= 2 for group in groups}
    small = trace.slim(apply, params, closed, x, groups=groups, multiple_of=8)
    assert (len(groups), small.params["in"].shape) == (2, (5, 8))


def test_layers_that_are_joined_each_become_multiples():
    def apply(params, x):
        return jnp.concatenate([jnp.tanh(x @ params["a"]), jnp.sin(x @ params["b"])], 1) @ params["out"]

    params, x = {"a": rand(5, 8), "b": rand(5, 9, seed=1), "out": rand(17, 3, seed=2)}, rand(2, 5)
    small = trace.slim(apply, params, {"a": np.arange(8) >= 3, "b": np.arange(9) >= 5}, x, multiple_of=4)
    assert [leaf.shape[1] for leaf in (small.params["a"], small.params["b"])] == [4, 8]
    message = "multiple_of=4 is missed along axis 1 of a: no closed channels were found that, kept, reach it"
    with pytest.warns(UserWarning, match=message):  # not both n and n + 9 are multiples
        small = trace.slim(apply, params, {"a": np.arange(8) >= 3}, x, multiple_of=4)
    assert small.params["out"].shape == (12, 3)


def test_heads_need_no_rounding():
    def apply(params, x):
        heads = jnp.tanh(jnp.einsum("bi,ihd->bhd", x, params["in"]))
        return jnp.einsum("bhd,hdo->bo", heads, params["out"])

    params = {"in": jnp.ones((5, 6, 8)), "out": jnp.ones((6, 8, 3))}
    groups = trace.channel_groups(apply, params, jnp.ones((2, 5)))
    (heads,) = (group for group in groups if group.size == 6)
    small = trace.slim(apply, params, {heads.name: np.arange(6) < 3}, jnp.ones((2, 5)), multiple_of=8)
    assert small.params["in"].shape == (5, 3, 8)


def test_closed_channels_of_masks_and_of_zeros():
    apply, params, (x,) = mlp()
    groups = trace.channel_groups(apply, params, x)
    masks = jax.tree.map(lambda p: np.ones(p.shape, bool), params)
    masks["fc2"]["kernel"][3] = False  # nothing reads channel 3 of fc1
    masks["fc1"]["kernel"][:, 5] = False  # it is still fed by a bias
    masks["fc2"]["bias"] = True  # dense
    closed = trace.closed_channels(groups, masks)
    assert np.flatnonzero(closed["fc1/kernel"]).tolist() == [3]
    assert not closed["fc2/kernel"].any()
    masks["fc1"]["bias"][5] = False
    assert np.flatnonzero(trace.closed_channels(groups, masks)["fc1/kernel"]).tolist() == [3, 5]
    zeros = jax.tree.map(lambda p, m: p * m, params, masks)
    assert np.flatnonzero(trace.closed_channels(groups, zeros)["fc1/kernel"]).tolist() == [3, 5]


def test_masks_of_a_part_of_the_params():
    apply, params, (x,) = mlp()
    groups = trace.channel_groups(lambda v, x: apply(v["params"], x), {"params": params}, x)
    masks = jax.tree.map(lambda p: np.ones(p.shape, bool), params)
    masks["fc2"]["kernel"][3] = False
    closed = trace.closed_channels(groups, masks)
    assert np.flatnonzero(closed["params/fc1/kernel"]).tolist() == [3]
    with pytest.raises(ValueError, match="the masks have none of the leaves of the groups, but fc9"):
        trace.closed_channels(groups, {"fc9": masks})


def test_masks_are_not_those_of_other_leaves_of_the_same_name():
    def apply(p, x):
        return jnp.tanh(jnp.tanh(x @ p["enc"]["w"]) @ p["w"]) @ p["v"]

    params = {"enc": {"w": rand(4, 8)}, "w": rand(8, 8, seed=1), "v": rand(8, 3, seed=2)}
    groups, mask = trace.channel_groups(apply, params, rand(2, 4)), np.arange(64).reshape(8, 8) % 8 != 2
    for dense in (None, True):
        closed = trace.closed_channels(groups, {"enc": {"w": dense}, "w": mask, "v": dense})
        assert not closed["enc/w"].any()
        assert np.flatnonzero(closed["w"]).tolist() == [2]
    both = {"enc": params, "dec": params}
    groups = trace.channel_groups(lambda p, x: apply(p["enc"], x) + apply(p["dec"], x), both, rand(2, 4))
    with pytest.raises(ValueError, match="the masks may be those of dec, enc: give them in the tree of the params"):
        trace.closed_channels(groups, {"w": mask})


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"v": np.ones((4, 3), bool)}, r"the mask of v must have shape \(8, 3\), got \(4, 3\)"),
        ({"w": np.ones((4, 9), bool)}, r"the mask of w must have shape \(4, 8\), got \(4, 9\)"),
        ({"w": False}, "the mask of w is the scalar False: a scalar can only be True, for a dense leaf"),
    ],
)
def test_masks_of_other_shapes(masks, message):
    params = {"w": rand(4, 8), "v": rand(8, 3, seed=1)}
    groups = trace.channel_groups(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], params, rand(2, 4))
    with pytest.raises(ValueError, match=message):
        trace.closed_channels(groups, params | masks)


def test_masks_that_do_not_have_the_channels_of_a_group():
    whole = jaxsparse.Group("whole", {"v": 0}, {"w": 1}, size=8)
    part = jaxsparse.Group("part", {"v": (0, (-1, 0, 1, 0, 1))}, {"w": 1})
    found = trace.closed_channels([part], {"v": np.arange(5) % 2 > 0})
    assert found["part"].tolist() == [False, True]
    for group, shape, message in [
        (whole, (4, 3), r"v has shape \(4, 3\), but group 'whole' needs a multiple of 8 entries along axis 0"),
        (part, (4, 3), r"v has shape \(4, 3\), but group 'part' needs 5 entries along axis 0"),
        (jaxsparse.Group("far", {"v": 2}), (4, 3), "group 'far' needs a multiple of"),
    ]:
        with pytest.raises(ValueError, match=message):
            trace.closed_channels([group], {"v": np.ones(shape, bool)})


def test_groups_written_by_hand():
    apply, params, (x,) = mlp()
    hidden = jaxsparse.Group("hidden", {"fc2/kernel": 0}, {"fc1/kernel": -1, "fc1/bias": 0, "fc2/kernel": 0})
    zeros = params | {"fc2": params["fc2"] | {"kernel": params["fc2"]["kernel"].at[4:].set(0)}}
    closed = trace.closed_channels([hidden], zeros)
    small = trace.slim(apply, zeros, closed, x, groups=[hidden])
    trace.same(lambda x: apply(zeros, x), lambda x: small.apply(small.params, x), x, rtol=2e-6)
    half = jaxsparse.Group("half", {"fc2/kernel": 0}, {"fc1/kernel": -1, "fc2/kernel": 0})
    with pytest.raises(ValueError, match="28 entries along axis 1 of fc1/kernel cannot go.*share their channels"):
        trace.slim(apply, zeros, {"half": closed["hidden"]}, x, groups=[half])
    rows = {"fc2/kernel": 0}
    both = [jaxsparse.Group("a", rows, rows), jaxsparse.Group("b", {"fc1/bias": 0}, rows)]
    with pytest.raises(ValueError, match="nothing is left along axis 0 of fc2/kernel, which several groups share"):
        trace.slim(apply, zeros, {"a": np.arange(32) < 9, "b": np.arange(32) >= 9}, x, groups=both)
    outputs = jaxsparse.Group("outputs", {"fc3/kernel": -1}, {"fc3/kernel": -1})
    with pytest.raises(ValueError, match="1 entries along axis 1 of fc3/kernel cannot go: the output of the function"):
        trace.slim(apply, zeros, {"outputs": np.arange(6) < 1}, x, groups=[outputs])


@pytest.mark.parametrize(
    ("closed", "message"),
    [
        ({"fc1/kernel": np.ones(32, bool)}, "all 32 channels of group 'fc1/kernel' are closed"),
        ({"fc1/kernle": np.ones(32, bool)}, "'fc1/kernle', which is no group of channels; near are fc1/kernel"),
        ({"fc1/kernel": np.ones(3, bool)}, r"shape \(32,\) for group 'fc1/kernel', got bool of shape \(3,\)"),
        ({"fc1/kernel": np.ones(32)}, "must have bools .* got float64"),
    ],
)
def test_closed_channels_that_cannot_go(closed, message):
    apply, params, (x,) = mlp()
    with pytest.raises(ValueError, match=message):
        trace.slim(apply, params, closed, x)


def test_multiple_of_is_a_number_of_channels():
    apply, params, (x,) = mlp()
    with pytest.raises(ValueError, match="multiple_of must be an int of at least 1, got 0"):
        trace.slim(apply, params, {}, x, multiple_of=0)


def test_params_that_do_not_fit_the_small_function():
    _, params, small, (x,), _, _ = slimmed("mlp")
    with pytest.raises(ValueError, match=r"fc1/bias has shape \(32,\), and \(22,\) in the params of slim"):
        small.apply(params, x)
    with pytest.raises(ValueError, match="only one of the two has fc1/bias, fc1/kernel"):
        small.apply({"fc2": small.params["fc2"], "fc3": small.params["fc3"]}, x)


@pytest.mark.parametrize("batch", [7, 8])
def test_features_that_are_put_out_under_the_name_of_a_kernel_are_no_state(batch):
    params = {"h": rand(8, 8), "o": rand(8, 2)}
    groups = trace.channel_groups(
        lambda p, x: {"h": jnp.tanh(x @ p["h"]), "y": x @ p["h"] @ p["o"]}, params, rand(batch, 8)
    )
    assert len(groups) == 0
    assert groups.frozen["h", 1] == ("output h of the function",)


def test_places_in_tuples_make_no_states_of_outputs():
    params = [rand(8, 8), rand(8)]
    groups = trace.channel_groups(lambda p, x: (x.sum(), jnp.tanh(x @ p[0] + p[1][None]).sum(0)), params, rand(3, 8))
    assert len(groups) == 0


def test_a_state_beside_a_kernel_shrinks():
    params = {"h": rand(8, 6), "mean": rand(6), "o": rand(6, 2)}

    def apply(p, x):
        y = jnp.tanh(x @ p["h"])
        return (y - p["mean"][None]) @ p["o"], {"mean": 0.9 * p["mean"] + 0.1 * y.mean(0)}

    small = trace.slim(apply, params, {"h": np.arange(6) < 2}, rand(3, 8))
    out, state = small.apply(small.params, rand(3, 8))
    assert (out.shape, state["mean"].shape) == ((3, 2), (4,))
