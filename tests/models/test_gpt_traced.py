"""What the library finds in its transformer, and makes of it: groups, smaller ones, moments, counts; and in others'."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from jaxsparse import trace
from jaxsparse.layouts import leaf_layouts
from jaxsparse.models import generate
from jaxsparse.prunable import prunable_leaves
from jaxsparse.trees import by_path
from tests.models.transformers import TOKENS, VOCAB, gpt, stacked_blocks
from tests.problems import slow_except
from tests.trace.models import MODELS
from tests.trace.slimming import gate_masks, masked, relative

FORMS = [
    ("gpt-2", "loop"),
    ("gpt-2", "scan"),
    ("qwen2", "loop"),
    ("qwen2", "scan+remat"),
    ("one key head", "scan"),
    ("learned and gated", "scan+remat"),
    ("llama", "scan+remat"),
    ("llama", "loop"),
]
QUICK = [("gpt-2", "loop"), ("qwen2", "scan+remat")]


def removing(groups, ends):
    """The groups that remove entries of just these leaves: the end of a path -> the axis of one block's leaf."""
    found = []
    for group in groups:
        axes = {which.path: np.max(which.axis) - which.path.startswith("blocks/") for which in group.removes}
        parts = {(path.partition("/")[2], axis) for path, axis in axes.items() if not path.endswith("bias")}
        if parts == set(ends.items()):
            found.append(group)
    return found


def units_and_heads(model, groups):
    """The groups of units and of heads, of each block; what else there is within a block."""
    blocks = 1 if model.scan else model.num_layers
    layers = ("up", "gate") if model.mlp == "gated" else ("up",)
    units = removing(groups, {"mlp/down/kernel": 0} | {f"mlp/{layer}/kernel": 1 for layer in layers})
    queries = {"attention/query/kernel": 1, "attention/out/kernel": 0}
    heads = removing(groups, queries | {"attention/key/kernel": 1, "attention/value/kernel": 1})
    places = removing(groups, queries)  # the same head of every group of heads that keys and values serve
    assert [group.size for group in units] == [model.mlp_width or 4 * model.width] * blocks
    kv_heads = model.num_kv_heads or model.num_heads
    assert [group.size for group in heads] == ([kv_heads] * blocks if kv_heads > 1 else [])
    served = model.num_heads // kv_heads
    assert [group.size for group in places] == ([served] * blocks if served > 1 else [])
    return units, heads or places


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), slow_except(QUICK[:1], FORMS))
def test_half_of_the_units_and_heads_are_cut(name, form):
    model, params, apply = gpt(name, form)
    groups = trace.channel_groups(apply, params, TOKENS)
    assert not groups.unknown
    units, heads = units_and_heads(model, groups)
    closed = {group.name: np.arange(group.size) % 2 == i % 2 for i, group in enumerate((*units, *heads))}
    ones = {group.name: closed.get(group.name, np.zeros(group.size, bool)) for group in groups}
    shut = masked(params, gate_masks(params, groups, ones))
    small = trace.slim(apply, shut, closed, TOKENS, groups=groups)
    logits = jax.jit(small.apply)(small.params, TOKENS)
    assert relative(logits, jax.jit(apply)(shut, TOKENS)) < 2e-6

    # The same, by a model of these widths.
    fitted = model.fitted(small.params)
    assert fitted.mlp_width == (model.mlp_width or 4 * model.width) // 2
    assert fitted.num_heads == model.num_heads // 2
    assert fitted.num_kv_heads == max((model.num_kv_heads or model.num_heads) // 2, 1)
    assert fitted.head_dim == params["blocks" if model.scan else "block_0"]["attention"]["key"]["kernel"].shape[-1]
    own = jax.jit(lambda params: fitted.apply({"params": params}, TOKENS))(small.params)
    assert relative(own, logits) < 2e-6
    if (name, form) == QUICK[0]:
        texts = generate(fitted, small.params, TOKENS, 9)
        np.testing.assert_array_equal(texts[:, -1], jnp.argmax(logits[:, -1], -1))


@pytest.mark.slow
def test_channels_of_single_heads_fit_no_gpt():
    model, params, apply = gpt("gpt-2", "scan")
    groups = trace.channel_groups(apply, params, TOKENS)
    (channels,) = removing(groups, {"attention/value/kernel": 2, "attention/out/kernel": 1})
    small = trace.slim(apply, params, {channels.name: np.arange(4) == 1}, TOKENS, groups=groups)
    with pytest.raises(ValueError, match=r"blocks/attention/(value|out)/kernel must have shape .* got "):
        model.fitted(small.params)


@pytest.mark.slow
def test_gram_matrices_of_scanned_blocks_are_apart():
    """They are those of blocks in a loop."""
    _, params, apply = gpt("qwen2", "loop")
    _, stacked, scanned = gpt("qwen2", "scan+remat")
    stacked = stacked_blocks(params)
    loop, scan = (
        jax.jit(lambda p, apply=apply: trace.record(apply, p, TOKENS, gram=True))(p)
        for p, apply in ((params, apply), (stacked, scanned))
    )
    assert set(scan) == {path for path in by_path(stacked) if path.endswith("kernel")}
    assert scan["blocks/mlp/down/kernel"].second.shape == (2, 24, 24)
    assert scan["blocks/attention/out/kernel"].second.shape == (2, 24, 24)  # 4 heads of 6 channels
    assert scan["blocks/attention/query/kernel"].second.shape == (2, 16, 16)
    for path, moments in scan.items():
        names = [path.replace("blocks", f"block_{i}") for i in range(2)] if path.startswith("blocks") else [path]
        wanted = np.stack([loop[name].second for name in names]).reshape(moments.second.shape)
        np.testing.assert_allclose(moments.second, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max(), err_msg=path)
    assert relative(scan["blocks/mlp/down/kernel"].second[0], scan["blocks/mlp/down/kernel"].second[1]) > 0.1


@pytest.mark.parametrize(("name", "form"), slow_except(QUICK, FORMS))
def test_multiply_adds_are_those_of_the_formula(name, form):
    model, params, apply = gpt(name, form)
    counts = trace.multiply_adds(apply, params, TOKENS)
    rows, length = TOKENS.size, TOKENS.shape[1]
    heads, kv_heads, head_dim = model.num_heads, model.num_kv_heads or model.num_heads, model.head_dim or 4
    attention = model.width * head_dim * (2 * heads + 2 * kv_heads)
    mlp = model.width * (model.mlp_width or 4 * model.width) * (3 if model.mlp == "gated" else 2)
    products = 2 * length * heads * head_dim  # queries and keys, weights and values
    assert counts.activations == rows * model.num_layers * products
    assert counts.total == rows * (model.num_layers * (attention + mlp + products) + model.width * VOCAB)
    assert counts.bounded
    assert not counts.uncounted


@pytest.mark.parametrize(("name", "form"), slow_except(QUICK, FORMS))
def test_axes_and_prunable_leaves_are_found_without_a_doubt(name, form):
    model, params, apply = gpt(name, form)
    found = trace.matrices(apply, params, TOKENS)
    front = (0,) if model.scan else ()
    for path, layout in found.items():
        if path.endswith(("query/kernel", "key/kernel", "value/kernel")):
            assert layout == jaxsparse.Layout(len(front), (len(front) + 1, len(front) + 2), front), path
        if path.endswith("out/kernel"):
            assert layout == jaxsparse.Layout((len(front), len(front) + 1), len(front) + 2, front), path
        if "mlp" in path and path.endswith("kernel"):
            assert layout == jaxsparse.Layout(len(front), len(front) + 1, front), path
    guessed = leaf_layouts(params)
    assert {path: guessed[path] for path in found} == found
    assert not {path: layout.guess for path, layout in guessed.items() if layout.guess}
    chosen = {path for path, choice in by_path(prunable_leaves(params)).items() if choice}
    assert chosen == {path for path in by_path(params) if path.endswith(("kernel", "embedding"))}


def linen_gpt():
    _, params, apply = gpt("gpt-2", "scan+remat", mlp="gated", mlp_width=24)
    return apply, params, (TOKENS,)


def equinox_gpt():
    """Its floats; flags and functions are leaves of such a module too."""
    apply, model, args = MODELS["gpt eqx scan vmap"]()
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    return (lambda params, tokens: apply(eqx.combine(params, rest), tokens)), params, args


TRANSFORMERS = {"linen": linen_gpt, "nnx": MODELS["gpt nnx mha"], "equinox": equinox_gpt}


@pytest.mark.parametrize("name", slow_except(["equinox"], TRANSFORMERS))
def test_transformers_of_every_framework_have_units_and_heads(name):
    apply, params, (tokens,) = TRANSFORMERS[name]()
    found = []
    for group in trace.channel_groups(apply, params, tokens):
        parts = {part for which in group.removes for part in which.path.split("/")[:-1]}
        found.append((group.size, {part.removesuffix("_proj") for part in parts}))
    blocks = 2 if name == "nnx" else 1
    assert len([names for size, names in found if size == 24 and {"up", "gate", "down"} <= names]) == blocks
    assert len([names for size, names in found if size == 4 and {"query", "key", "value"} <= names]) == blocks
    logits = jax.eval_shape(apply, params, tokens)
    assert logits.shape == (*tokens.shape, VOCAB if name == "linen" else 32)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_of_every_framework_train_with_zeros(name):
    apply, params, (tokens,) = TRANSFORMERS[name]()
    tx = jaxsparse.chain(optax.adam(3e-3), jaxsparse.magnitude_pruning(0.75, begin=0, end=4, every=1))

    @jax.jit
    def step(params, state):
        def loss(params):
            logits = apply(params, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(8):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < losses[4]  # since the last weights went
    jaxsparse.check(state, params)
    masks = by_path(jaxsparse.get_masks(state, params))
    sparse = {path: mask for path, mask in masks.items() if np.ndim(mask)}
    assert len(sparse) >= 6
    for path, mask in sparse.items():
        assert int(mask.sum()) == round(0.25 * mask.size), path
        assert not np.any(np.asarray(by_path(params)[path])[~np.asarray(mask)]), path
