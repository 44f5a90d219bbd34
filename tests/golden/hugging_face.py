"""Write small random checkpoints of transformers, and the logits that it computes with them.

python tests/golden/hugging_face.py, in an environment of Python that has torch and transformers
"""

import shutil
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).with_suffix("")
SMALL = {"vocab_size": 48, "bos_token_id": 0, "eos_token_id": 1}
ROTARY = SMALL | {
    "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32,
}  # fmt: skip
GPT_2 = SMALL | {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 20}
# name: (model_type, config, other arguments of save_pretrained). Grouped heads, heads of which head_dim is not the
# width by their number, tied and untied, biases, other constants, several files.
CHECKPOINTS = {
    "gpt2": ("gpt2", GPT_2, {}),
    "gpt2_untied": ("gpt2", GPT_2 | {"n_inner": 24, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3}, {}),
    "llama": ("llama", ROTARY, {}),
    "llama_biases": (
        "llama",
        ROTARY
        | {"num_key_value_heads": 2, "head_dim": 6, "attention_bias": True, "mlp_bias": True}
        | {"tie_word_embeddings": True, "rope_theta": 500.0, "rms_norm_eps": 1e-3},
        {},
    ),
    "mistral": (
        "mistral",
        ROTARY | {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": None},
        {"max_shard_size": 6000},
    ),
    "qwen2": ("qwen2", ROTARY | {"num_key_value_heads": 2, "tie_word_embeddings": True}, {}),
}  # fmt: skip


def random_model(kind, options, seed):
    """A model of transformers in which no bias is 0 and no scale 1."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + (parameter.std() == 0) * parameter)
    return model


def logits_of(model, tokens):
    """(batch, length, vocabulary), float32."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.float().numpy()


def main():
    """Writes all of them."""
    import torch
    import transformers

    shutil.rmtree(FOLDER, ignore_errors=True)
    tokens = np.random.default_rng(0).integers(0, SMALL["vocab_size"], (1, 12))
    logits = {}
    for seed, (name, (kind, options, saved)) in enumerate(CHECKPOINTS.items()):
        model = random_model(kind, options, seed)
        model.save_pretrained(FOLDER / name, **saved)
        (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
        logits[name] = logits_of(model, tokens)
    np.savez_compressed(FOLDER / "logits.npz", tokens=tokens.astype(np.int32), **logits)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
