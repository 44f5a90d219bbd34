"""The axes of leaves as products use them, against guesses by name where these are right, and where they are not."""

import logging

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxsparse
from jaxsparse import Layout
from jaxsparse.layouts import leaf_layouts
from jaxsparse.trace import matrices
from tests.problems import slow_except
from tests.trace.models import MODELS, linen, rand

X = jnp.ones((2, 4))

# Where the trace knows better: attention's output without a bias beside it, gains that are scanned over, all experts
# on the same inputs.
BETTER = {
    "attention linen": {"params/MultiHeadDotProductAttention_0/out/kernel": Layout((0, 1), 2)},
    "gpt plain fused gqa rope scan": {"blocks/n1": Layout((), 1, 0), "blocks/n2": Layout((), 1, 0)},
    "experts": {"in": Layout(1, (0, 2))},
}
# In no product, or in two ways.
LEFT = ("pos", "embedding", "embed", "embed/weight")


QUICK = (*BETTER, "mlp", "lenet", "rnn linen", "gpt linen scan+remat rms", "gpt nnx mha", "gpt eqx scan vmap", "lstm")


@pytest.mark.parametrize("name", slow_except(QUICK, MODELS))
def test_layouts_are_those_of_the_guess_or_better(name):
    apply, params, args = MODELS[name]()
    found = matrices(apply, params, *args)
    guessed = leaf_layouts(eqx.filter(params, eqx.is_array))
    left = {path for path, layout in guessed.items() if layout.is_matrix and path not in found}
    assert {path for path in left if not path.endswith(LEFT)} == set()
    assert len(found) >= 3
    assert {path: layout for path, layout in found.items() if layout != guessed[path]} == BETTER.get(name, {})
    assert leaf_layouts(eqx.filter(params, eqx.is_array), found).items() >= found.items()


def one(apply, shape, *args):
    return matrices(lambda p, *args: apply(p["leaf"], *args), {"leaf": jnp.ones(shape)}, *args).get("leaf")


@pytest.mark.parametrize(
    ("apply", "shape", "expected"),
    [
        (lambda w, x: x @ w, (4, 6), Layout(0, 1)),
        (lambda w, x: x @ w.T, (6, 4), Layout(1, 0)),
        (lambda w, x: w @ x.T, (6, 4), Layout(1, 0)),
        (lambda w, x: jnp.einsum("bi,hid->bhd", x, w), (3, 4, 5), Layout(1, (0, 2))),
        (lambda w, x: x @ w.reshape(4, -1), (4, 2, 3), Layout(0, (1, 2))),
        (lambda w, x: jnp.einsum("bi,ihd->bhd", x, w.reshape(4, 2, 3)), (4, 6), Layout(0, 1)),
        (lambda w, x: jnp.split(x @ w, 2, -1)[0] + x @ w[:, 6:], (4, 12), Layout(0, 1)),
        (lambda w, x: x[:, :2] @ w[:2] + x[:, 2:] @ w[2:], (4, 6), Layout(0, 1)),
        (lambda w, x: x @ (w.astype(jnp.bfloat16) * 2), (4, 6), Layout(0, 1)),
        (lambda w, x: x @ jnp.where(jnp.eye(4, 6) > 0, w, 0), (4, 6), Layout(0, 1)),
        (lambda w, x: jnp.tanh(x @ w[0]) @ w[1], (2, 4, 4), Layout(1, 2, stack=0)),
        (lambda w, x: lax.scan(lambda x, w: (x @ w.T, None), x, w)[0], (3, 4, 4), Layout(2, 1, stack=0)),
        (lambda w, x: lax.fori_loop(0, 3, lambda i, x: x @ w[i], x), (3, 4, 4), Layout(1, 2, stack=0)),
        (lambda w, x: lax.fori_loop(0, 3, lambda i, x: x @ w, x), (4, 4), Layout(0, 1)),
        (lambda w, x: lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w * 2), (4, 6), Layout(0, 1)),
        (lambda w, x: jax.vmap(lambda w: jax.checkpoint(jnp.dot)(x, w), 1)(w), (4, 3, 6), Layout(0, (1, 2))),
        (lambda w, x: jax.vmap(jnp.dot, (1, None))(w, x[0]), (6, 3, 4), Layout(2, (0, 1))),
        (lambda w, x: jax.vmap(jnp.dot, (1, 0))(w, jnp.stack([x] * 3)[..., 0]), (6, 3, 2), Layout(2, 0, stack=1)),
        (lambda w, x: lax.ragged_dot(x, w, jnp.array([1, 0, 1])), (3, 4, 6), Layout(1, 2, stack=0)),
        (lambda w, x: w[x[:, 0].astype(int)], (9, 5), Layout(0, 1)),
        (lambda w, x: jnp.take(w, x.astype(int), 0), (9, 5), Layout(0, 1)),
        (lambda w, x: jax.nn.one_hot(x[:, 0].astype(int), 9) @ w, (9, 5), Layout(0, 1)),
        (lambda w, x: x[:, None] @ w[None, 0, 0], (1, 1, 4, 6), Layout(2, 3)),
        (lambda w, x: x + w[None], (4,), None),
        (lambda w, x: x * w.sum(), (4, 4), None),
    ],
    ids=[
        "plain", "transposed", "on the left", "heads", "merged outputs", "split outputs", "part of the outputs",
        "parts of the inputs", "cast and scaled", "masked", "indexed layers", "scanned", "indexed in a loop",
        "constant in a loop", "branches", "mapped outputs", "mapped over another axis", "batch of matrices", "ragged",
        "lookup",
        "take", "one-hot", "1 x 1", "bias", "sum",
    ],
)  # fmt: skip
def test_axes_of_a_product(apply, shape, expected):
    assert one(apply, shape, X) == expected


TABLE, KERNEL, BIASES = rand(9, 4), rand(4, 5, seed=1), rand(3, 4, seed=2)


@pytest.mark.parametrize(
    "apply",
    [
        lambda p, t: p["e"][t] @ p["w"],
        lambda p, t: jnp.take(p["e"], t, 0) @ p["w"],
        lambda p, t: jnp.tanh(2 * p["e"].astype(jnp.float32)[t] + 1) @ p["w"],
        lambda p, t: (jnp.ones(4) * lax.dynamic_slice(p["e"].T, (0, t), (4, 1))[:, 0])[None] @ p["w"],
        lambda p, t: lax.scan(lambda h, t: (h, p["e"][t] @ p["w"]), 0.0, t[None]),
        lambda p, t: lax.fori_loop(0, 3, lambda i, t: jnp.argmax(p["e"][t] @ p["w"]), t),
    ],
    ids=["indexed", "take", "scaled", "a column", "scanned tokens", "generated tokens"],
)
def test_one_token_is_looked_up_as_many_are(apply):
    """What stands in a table is activations, so the leaf behind it is in a product."""
    found = matrices(apply, {"e": TABLE, "w": KERNEL}, np.int32(3))
    assert found == {"e": Layout(0, 1), "w": Layout(0, 1)}


def test_what_data_chooses_is_a_table_only_as_a_row():
    params = {"w": jnp.ones((3, 4, 4)), "b": BIASES, "e": TABLE}

    def expert(p, x, i):
        return p["e"][i] @ (2 * p["w"][i]) + x @ p["w"][i]

    def layers(p, x, i):
        return lax.fori_loop(0, 3, lambda n, x: x @ p["w"][n] + p["b"][n], x) * p["e"][i].sum()

    for apply in (expert, layers):  # a counter of layers is no token, so there are no biases among the tables
        used = {path: params[path] for path in ("w", "e", *(["b"] if apply is layers else []))}
        assert matrices(apply, used, jnp.ones(4), np.int32(1)) == {"e": Layout(0, 1), "w": Layout(1, 2, stack=0)}


def test_windows_of_convolutions_are_places():
    image = jnp.ones((2, 6, 6, 4))
    found = one(lambda w, x: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "OIHW", "NHWC")),
                (8, 4, 3, 3), image)  # fmt: skip
    assert found == Layout(1, 0)
    assert found.places(4) == (2, 3)
    depthwise = lambda w, x: lax.conv_general_dilated(  # noqa: E731
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
    )
    assert one(depthwise, (3, 3, 1, 8), image) == Layout(2, 3)


def test_a_leaf_in_two_ways_is_left_out_and_named(caplog):
    params = {"tied": jnp.ones((9, 4)), "half": jnp.ones((6, 4)), "w": jnp.ones((4, 4))}

    def apply(p, x):
        h = p["tied"][x[:, 0].astype(int)] @ p["w"]
        parts = jnp.einsum("bhd,hdo->bho", jnp.ones((2, 3, 2)) * h.sum(), p["half"].reshape(3, 2, 4))
        return h @ p["tied"].T, jnp.einsum("bd,hdo->bho", h[:, :2], p["half"].reshape(3, 2, 4)), parts

    with caplog.at_level(logging.INFO, "jaxsparse"):
        assert set(matrices(apply, params, X)) == {"w"}
    (record,) = caplog.records
    line = apply.__code__.co_firstlineno + 1
    assert f"tied (Layout(inputs=(0,), outputs=(1,), stack=()) in gather at tests/trace/test_layout.py:{line}" in (
        record.message
    )
    assert f"Layout(inputs=(1,), outputs=(0,), stack=()) in dot_general at tests/trace/test_layout.py:{line + 2}" in (
        record.message
    )
    assert "half (part of an axis as inputs in dot_general" in record.message


def turned(p, x):
    """A plain function whose kernels are (outputs, inputs), though they are called as those that are not."""
    h = jax.nn.relu(x @ p["fc1"]["kernel"].T + p["fc1"]["bias"][None])
    return h @ p["fc2"]["kernel"].T


TURNED = {"fc1": {"kernel": rand(24, 8), "bias": jnp.zeros(24)}, "fc2": {"kernel": rand(12, 24, seed=1)}}


@pytest.mark.slow
def test_the_library_takes_what_the_trace_finds():
    layout = matrices(turned, TURNED, rand(5, 8))
    assert layout == {"fc1/kernel": Layout(1, 0), "fc2/kernel": Layout(1, 0)}
    assert leaf_layouts(TURNED)["fc2/kernel"] == Layout(0, 1)  # by name, and wrong

    half = jaxsparse.magnitude_masks(TURNED, 0.5, structure=jaxsparse.n_of_m(2, 4), layout=layout)
    for name in ("fc1", "fc2"):  # two of four along the inputs, the last axis
        assert (np.asarray(half[name]["kernel"]).reshape(-1, 4).sum(1) == 2).all()

    filters = jaxsparse.magnitude_masks(TURNED, 0.5, structure={"*/kernel": "channel"}, layout=layout)
    mask = np.asarray(filters["fc1"]["kernel"])
    assert (mask.all(1) | ~mask.any(1)).all()  # whole outputs, along the first axis
    row = {row.path: row for row in jaxsparse.summary(filters, TURNED, layout=layout).layers}["fc1/kernel"]
    assert (row.dead_outputs, row.dead_inputs) == (12, 0)


@pytest.mark.slow
def test_a_method_takes_what_the_trace_finds():
    layout = matrices(turned, TURNED, rand(5, 8))
    tx = jaxsparse.chain(
        optax.sgd(0.1, momentum=0.9),
        jaxsparse.sparse_momentum(0.5, update_every=1, structure=jaxsparse.n_of_m(2, 4), layout=layout),
    )

    @jax.jit
    def step(params):
        updates, opt_state = tx.update(jax.tree.map(jnp.cos, params), tx.init(params), params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = step(TURNED)
    for name in ("fc1", "fc2"):  # two of four along the inputs, the last axis
        mask = np.asarray(jaxsparse.get_masks(opt_state, params)[name]["kernel"])
        assert (mask.reshape(-1, 4).sum(1) == 2).all()


def test_allocations_count_in_these_axes():
    shape = (2, 8, 4, 16)  # of outputs, window, inputs, window: nothing in the name says so
    params = {"a": jnp.ones(shape), "b": jnp.ones((32, 64))}

    def apply(p, x):
        y = lax.conv_general_dilated(x, p["a"], (1, 1), "SAME", dimension_numbers=("NHWC", "OHIW", "NHWC"))
        return y, x.reshape(-1, 32) @ p["b"]

    layout = matrices(apply, params, jnp.ones((1, 8, 8, 4)))
    assert layout == {"a": Layout(2, 0), "b": Layout(0, 1)}
    densities = jaxsparse.erdos_renyi({path: leaf.shape for path, leaf in params.items()}, 0.05, False, layout=layout)
    expected = {"a": (2 + 4) / (2 * 4), "b": (32 + 64) / (32 * 64)}
    assert float(densities["a"] / densities["b"]) == pytest.approx(expected["a"] / expected["b"])


def test_shapes_are_enough():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            over = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}, "length": 3}
            return nn.scan(lambda layer, x, _: (layer(x), None), **over)(nn.Dense(4), x, None)[0]

    apply, params, args = linen(Stack(), X)
    shapes = jax.eval_shape(lambda: (params, args))
    (kernel,) = [path for path in matrices(apply, params, *args) if path.endswith("kernel")]
    assert matrices(apply, shapes[0], *shapes[1])[kernel] == Layout(0, 2, stack=1)
