"""Models of transformers, read, pruned, cut, written, and loaded by transformers again: make test-interop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse
from jaxsparse import formats, trace
from tests.golden.hugging_face import GPT_2, ROTARY, logits_of, random_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = np.random.default_rng(1).integers(0, 48, (2, 15))
MODELS = {
    "gpt2": ("gpt2", GPT_2),
    "llama": ("llama", ROTARY | {"head_dim": 6, "tie_word_embeddings": True}),  # three heads of four: Mistral's
    "llama_biases": ("llama", ROTARY | {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", ROTARY | {"num_key_value_heads": 2, "head_dim": 10, "sliding_window": 16}),
    "qwen2": ("qwen2", ROTARY | {"num_key_value_heads": 2, "rope_theta": 1e6}),
}


def logits(model, params):
    """Computed in float32, whatever the dtype of the params."""
    apply = jax.jit(model.clone(dtype=jnp.float32).apply)
    return np.asarray(apply({"params": params}, jnp.asarray(TOKENS, jnp.int32)))


def same_logits(found, expected):
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def loaded(folder, kind):
    """The model that transformers makes of a checkpoint, in float32; the tensors of the two are the same."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, report = load(folder, dtype=torch.float32, output_loading_info=True)
    assert type(model.config) is type(transformers.AutoConfig.for_model(kind))
    assert not any(report.values()), report
    return model.eval()


def cut(model, params, heads):
    """Half of the MLPs' units removed, and of the heads one group of those that share keys and values."""

    def apply(params, tokens):
        return model.clone(dtype=jnp.float32).apply({"params": params}, tokens)

    tokens = jnp.asarray(TOKENS, jnp.int32)
    groups = trace.channel_groups(apply, params, tokens)
    closed = {}
    for group in groups:
        if "mlp" in group.name:
            closed[group.name] = np.arange(group.size) % 2 == 0
        elif heads and any(part.path.endswith("attention/key/kernel") and part.axis == 1 for part in group.removes):
            closed[group.name] = np.arange(group.size) == 1
    assert len(closed) == model.num_layers * (2 if heads else 1)
    small = trace.slim(apply, params, closed, tokens, groups=groups)
    assert small.params["block_0"]["mlp"]["down"]["kernel"].shape[0] == model.mlp_width // 2
    same_logits(small.apply(small.params, tokens), logits(model.fitted(small.params), small.params))
    return small.params


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name, dtype, tmp_path):
    kind, options = MODELS[name]
    was = random_model(kind, options, seed=7).to(getattr(torch, dtype))
    was.save_pretrained(tmp_path / "was", max_shard_size=10_000)
    max_length = 16 if name == "mistral" else None
    model, params = formats.from_hf(tmp_path / "was", max_length=max_length)
    assert model.param_dtype == jnp.dtype(dtype)
    same_logits(logits(model, params), logits_of(loaded(tmp_path / "was", kind), TOKENS))

    masks = jaxsparse.magnitude_masks(params, sparsity=0.5)
    params = jaxsparse.apply_masks(params, masks)
    formats.to_hf(tmp_path / "pruned", model, params, family=kind)
    pruned = loaded(tmp_path / "pruned", kind)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "pruned").dtype == getattr(torch, dtype)
    matrices = [p for p in pruned.parameters() if p.ndim > 1]
    assert sum((p == 0).sum().item() for p in matrices) >= 0.49 * sum(p.numel() for p in matrices)
    same_logits(logits_of(pruned, TOKENS), logits(model, params))

    params = cut(model, params, heads=name != "gpt2")
    family, kind = (None, "mistral") if name == "llama" else (kind, kind)
    small = model.fitted(params)
    assert small.num_heads < model.num_heads or name == "gpt2"
    formats.to_hf(tmp_path / "small", model, params, family=family, max_shard_size=4_000)
    again = loaded(tmp_path / "small", kind)
    assert again.num_parameters() < pruned.num_parameters()
    same_logits(logits_of(again, TOKENS), logits(small, params))
    assert again.generate(torch.from_numpy(TOKENS[:, :4]), max_new_tokens=3, do_sample=False).shape == (2, 7)
