"""Logits, params and errors of the transformer; its scanned form, and smaller ones that its params were cut to."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.models import GPT
from jaxsparse.trees import by_path
from tests.models.networks import quick_jit
from tests.models.transformers import LLAMA, OPTIONS, TOKENS, VOCAB, gpt, stacked_blocks
from tests.problems import slow_except

GPT2 = {
    "embedding/embedding": (VOCAB, 16),
    "positions/embedding": (12, 16),
    "block_0/norm_1/scale": (16,),
    "block_0/norm_1/bias": (16,),
    "block_0/attention/query/kernel": (16, 4, 4),
    "block_0/attention/query/bias": (4, 4),
    "block_0/attention/key/kernel": (16, 4, 4),
    "block_0/attention/key/bias": (4, 4),
    "block_0/attention/value/kernel": (16, 4, 4),
    "block_0/attention/value/bias": (4, 4),
    "block_0/attention/out/kernel": (4, 4, 16),
    "block_0/attention/out/bias": (16,),
    "block_0/norm_2/scale": (16,),
    "block_0/norm_2/bias": (16,),
    "block_0/mlp/up/kernel": (16, 64),
    "block_0/mlp/up/bias": (64,),
    "block_0/mlp/down/kernel": (64, 16),
    "block_0/mlp/down/bias": (16,),
    "norm/scale": (16,),
    "norm/bias": (16,),
}
QWEN2 = {
    "embedding/embedding": (VOCAB, 16),
    "blocks/norm_1/scale": (2, 16),
    "blocks/attention/query/kernel": (2, 16, 4, 6),
    "blocks/attention/query/bias": (2, 4, 6),
    "blocks/attention/key/kernel": (2, 16, 2, 6),
    "blocks/attention/key/bias": (2, 2, 6),
    "blocks/attention/value/kernel": (2, 16, 2, 6),
    "blocks/attention/value/bias": (2, 2, 6),
    "blocks/attention/out/kernel": (2, 4, 6, 16),
    "blocks/norm_2/scale": (2, 16),
    "blocks/mlp/gate/kernel": (2, 16, 24),
    "blocks/mlp/up/kernel": (2, 16, 24),
    "blocks/mlp/down/kernel": (2, 24, 16),
    "norm/scale": (16,),
    "head/kernel": (16, VOCAB),
}


def shapes(model):
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    return {path: leaf.shape for path, leaf in by_path(params).items()}


def test_params_have_the_names_and_shapes_of_the_documentation():
    assert shapes(GPT(VOCAB, 16, num_layers=1, max_length=12)) == GPT2
    assert shapes(GPT(VOCAB, 16, num_layers=2, **LLAMA, attention_bias="qkv", tied=False, scan=True)) == QWEN2
    own = shapes(GPT(VOCAB, 16, num_layers=1, mlp="gated", attention_bias=False))
    assert [path for path in own if path.startswith("block_0/attention") and "bias" in path] == []
    assert own["block_0/mlp/gate/bias"] == (64,)


def by_hand(model, params, tokens):
    """The logits in NumPy, in float64, one head at a time."""
    p = {path: np.asarray(leaf, np.float64) for path, leaf in by_path(params).items()}

    def dense(name, x, axes=1):
        return np.tensordot(x, p[f"{name}/kernel"], axes) + p.get(f"{name}/bias", 0.0)

    def norm(name, x):
        if model.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + model.norm_eps)
        return x * p[f"{name}/scale"] + p.get(f"{name}/bias", 0.0)

    def rotated(x):  # of one head: (length, head_dim), the pairs as complex numbers
        half = x.shape[-1] // 2
        angles = np.arange(len(x))[:, None] * model.rotary_base ** (-np.arange(half) / half)
        z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
        return np.concatenate([z.real, z.imag], -1)

    def attention(name, x):
        query, key, value = (dense(f"{name}/{which}", x) for which in ("query", "key", "value"))
        served = query.shape[1] // key.shape[1]
        heads = []
        for h in range(query.shape[1]):
            q, k, v = query[:, h], key[:, h // served], value[:, h // served]
            q, k = (rotated(y) if model.positions == "rotary" else y for y in (q, k))
            scores = np.where(np.tri(len(x), dtype=bool), q @ k.T / math.sqrt(q.shape[-1]), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v)
        return dense(f"{name}/out", np.stack(heads, 1), 2)

    def mlp(name, x):
        up = dense(f"{name}/up", x)
        if model.mlp == "gated":
            gate = dense(f"{name}/gate", x)
            return dense(f"{name}/down", gate / (1 + np.exp(-gate)) * up)
        return dense(f"{name}/down", up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3))) / 2)

    logits = []
    for text in np.asarray(tokens):
        x = p["embedding/embedding"][text]
        x = x + p["positions/embedding"][: len(text)] if model.positions == "learned" else x
        for i in range(model.num_layers):
            x = x + attention(f"block_{i}/attention", norm(f"block_{i}/norm_1", x))
            x = x + mlp(f"block_{i}/mlp", norm(f"block_{i}/norm_2", x))
        x = norm("norm", x)
        logits.append(x @ p["embedding/embedding"].T if model.tied else dense("head", x))
    return np.stack(logits)


FORMS = [(name, form) for name in OPTIONS for form in ("loop", "scan+remat")]


@pytest.mark.parametrize(("name", "form"), slow_except([("gpt-2", "loop"), ("qwen2", "scan+remat")], FORMS))
def test_logits_are_those_of_the_formulas(name, form):
    model, params, _ = gpt(name)
    _, _, apply = gpt(name, form)
    logits = quick_jit(apply)(params if form == "loop" else stacked_blocks(params), TOKENS)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, by_hand(model, params, TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [True, False])
def test_scanned_blocks_compute_what_the_loop_does(remat):
    model, params, _ = gpt("gpt-2", "loop")
    scanned, _, _ = gpt("gpt-2", "scan")
    scanned = scanned.clone(remat=remat)
    stacked = stacked_blocks(params)

    def loss(model, params):
        logits = model.apply({"params": params}, TOKENS)
        return jnp.sum(jnp.sin(logits)), logits

    one, other = (quick_jit(jax.value_and_grad(lambda p, m=m: loss(m, p), has_aux=True))
                  for m in (model, scanned))  # fmt: skip
    (_, logits), grads = one(params)
    (_, scanned_logits), scanned_grads = other(stacked)
    np.testing.assert_allclose(scanned_logits, logits, rtol=1e-5, atol=1e-5)
    for path, grad in by_path(stacked_blocks(grads)).items():
        found = by_path(scanned_grads)[path]
        np.testing.assert_allclose(found, grad, rtol=1e-4, atol=1e-5 * float(jnp.abs(grad).max()), err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_starts_are_gpt_2s(scan):
    model = GPT(400, 64, num_layers=2, mlp="gated", positions="rotary", tied=False, scan=scan)
    params = by_path(quick_jit(model.init)(jax.random.key(0), TOKENS)["params"])
    for path, leaf in params.items():
        if path.endswith(("scale", "bias")):
            np.testing.assert_array_equal(leaf, 1.0 if path.endswith("scale") else 0.0)
            continue
        deviation = 0.02 / 2 if path.endswith(("out/kernel", "down/kernel")) else 0.02
        np.testing.assert_allclose(leaf.std(), deviation, rtol=0.06, err_msg=path)
        if scan and path.startswith("blocks"):
            assert not (leaf[0] == leaf[1]).any()


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_dropout_is_for_training_alone(scan):
    model = GPT(VOCAB, 16, num_layers=2, dropout=0.5, scan=scan)
    params = quick_jit(model.init)(jax.random.key(0), TOKENS)

    @quick_jit
    def apply(key):
        return model.apply(params, TOKENS, train=True, rngs={"dropout": key}), model.apply(params, TOKENS)

    (dropped, whole), (again, _), (others, _) = (apply(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(dropped, again)
    assert (dropped != others).any()
    assert (dropped != whole).any()


@pytest.mark.parametrize("param_dtype", slow_except(["bfloat16"], ["float32", "bfloat16"]))
def test_half_precision_mixes_no_types(param_dtype):
    """Norms, softmax and logits are float32 all the same, and generation has a cache of the computation's type."""
    model, params, _ = gpt("qwen2", dtype=jnp.bfloat16, param_dtype=jnp.dtype(param_dtype))
    variables = {"params": params}
    with jax.numpy_dtype_promotion("strict"):
        logits = jax.eval_shape(model.apply, variables, TOKENS)
        _, cache = jax.eval_shape(lambda v: model.apply(v, TOKENS, cache_length=12, mutable=["cache"]), variables)
        text = str(jax.make_jaxpr(lambda v: model.apply(v, TOKENS))(variables))
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(param_dtype)}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(cache)} == {"bfloat16", "int32"}
    assert not [line for line in text.splitlines() if "bf16" in line.partition("=")[0] and "rsqrt" in line]


@pytest.mark.slow
def test_half_precision_is_near():
    _, params, apply = gpt("qwen2")
    half, _, _ = gpt("qwen2", dtype=jnp.bfloat16)
    whole, rounded = apply(params, TOKENS), half.apply({"params": params}, TOKENS)
    assert float(jnp.abs(whole - rounded).max()) < 0.05 * float(jnp.abs(whole).max())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"positions": "sinus"}, r"positions must be one of \('learned', 'rotary'\), got 'sinus'"),
        ({"norm": "batch"}, "norm must be one of"),
        ({"mlp": "relu"}, "mlp must be one of"),
        ({"attention_bias": "qk"}, "attention_bias must be None, a bool or 'qkv', got 'qk'"),
        ({"num_layers": 0}, "num_layers must be an int of at least 1, got 0"),
        ({"mlp_width": 2.5}, "mlp_width must be an int of at least 1, got 2.5"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads=4.*, got 3"),
        ({"num_heads": 3}, "num_heads=3 does not divide width=16: give head_dim="),
        ({"positions": "rotary", "head_dim": 3}, "head_dim must be even, got 3"),
        ({"dropout": 1.0}, "dropout must be from 0 to below 1, got 1.0"),
        ({"max_length": 7}, "8 tokens are more than the max_length=7"),
    ],
)
def test_errors_name_the_option(options, error):
    with pytest.raises(ValueError, match=error):
        jax.eval_shape(GPT(VOCAB, 16, **options).init, jax.random.key(0), TOKENS)


@pytest.mark.parametrize("tokens", [TOKENS[0], TOKENS.astype(np.float32)])
def test_tokens_are_ints_of_two_axes(tokens):
    with pytest.raises(ValueError, match=r"GPT needs tokens \(batch, length\) of ints, got (int32|float32) of shape"):
        jax.eval_shape(GPT(VOCAB, 16).init, jax.random.key(0), tokens)


@pytest.mark.parametrize("scan", [False, True])
def test_fitted_reads_all_widths(scan):
    small = GPT(VOCAB, 20, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=4, mlp_width=9, max_length=11, scan=scan)
    params = jax.eval_shape(small.init, jax.random.key(0), TOKENS)["params"]
    assert GPT(99).fitted(params) == small.clone(max_length=11)
    with pytest.raises(ValueError, match=r"positions/embedding is in the params, and not in those of a GPT of posit"):
        GPT(99, positions="rotary").fitted(params)


def test_what_fits_no_gpt_is_named():
    model = GPT(VOCAB, 16, num_layers=3, max_length=11)
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]

    def changed(path, shape):
        wanted = by_path(params) | ({path: jax.ShapeDtypeStruct(shape, jnp.float32)} if shape else {})
        wanted = {name: leaf for name, leaf in wanted.items() if shape or name != path}
        tree: dict = {}
        for name, leaf in wanted.items():
            *modules, last = name.split("/")
            node = tree
            for module in modules:
                node = node.setdefault(module, {})
            node[last] = leaf
        return tree

    for path, shape, error in [
        ("block_2/mlp/up/kernel", (16, 63), r"block_2/mlp/up/kernel must have shape \(16, 64\).*got \(16, 63\)"),
        ("block_0/attention/value/kernel", (16, 4, 3), r"block_0/attention/value/kernel must have shape \(16, 4, 4\)"),
        ("block_1/mlp/up/bias", (), "have block_1/mlp/up/bias too, which these lack"),
        ("embedding/embedding", (), "params of a GPT have embedding/embedding; these have block_0/"),
        ("block_0/attention/query/kernel", (16, 16), "block_0/attention/query/kernel must have 3 axes .* scan=False"),
        ("head/kernel", (16, VOCAB), "head/kernel is in the params, and not in those of a GPT of .*tied=True"),
    ]:
        with pytest.raises(ValueError, match=error):
            model.fitted(changed(path, shape))
