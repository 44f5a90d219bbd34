"""The families of Hugging Face checkpoints: what their config.json says, as options of models.GPT and back."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxsparse.artifacts.hugging_face.tensors import GPT_2, LLAMA, Names
from jaxsparse.trees import listed

__all__ = ["FAMILIES", "Family", "family_for", "options_of"]

Config = Mapping[str, Any]
_MOST = 2**31 - 1  # of layers, heads, channels: products of a few of them still are sizes of arrays


class Family(NamedTuple):
    """A model_type of config.json.

    Attributes:
      architecture: the class in transformers that has a language model's head.
      names: the names and layouts of its tensors.
      takes: option of models.GPT -> the values of it that this family has.
      read: ``read(config, max_length)`` gives the options of models.GPT.
      write: ``write(model)`` gives the keys of config.json, but for those that all families share.
    """

    architecture: str
    names: Names
    takes: Mapping[str, tuple[Any, ...]]
    read: Callable[[Config, int | None], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]


def options_of(config: Config, max_length: int | None = None) -> tuple[Family, dict[str, Any]]:
    """The family of a config.json, and the options of models.GPT for it.

    Raises:
      ValueError: for what models.GPT cannot do, naming the key and its value.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"model_type is {kind!r}, expected one of {', '.join(FAMILIES)}")
    if (quantised := config.get("quantization_config")) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise ValueError(f"quantization_config is there ({method!r}): expected weights that are not quantised")
    _only(config, "pruned_heads", {}, None)
    family = FAMILIES[kind]
    return family, family.read(config, max_length)


def family_for(model: Any, name: str | None = None) -> tuple[str, Family]:
    """The family that a model goes back to, by its options; ``name`` asks for one.

    Raises:
      ValueError: if there is none, or not the one that was asked for, naming the options that do not fit.
    """
    if name is not None and name not in FAMILIES:
        raise ValueError(f"family must be None or one of {', '.join(FAMILIES)}, got {name!r}")
    options = {option: getattr(model, option) for option in ("positions", "norm", "mlp", "bias")}
    options |= {"attention_bias": _attention_bias(model), "width % num_heads": model.width % model.num_heads}
    misfits = {}
    for kind in FAMILIES if name is None else [name]:
        takes = FAMILIES[kind].takes
        misfits[kind] = [
            f"{option} = {options[option]!r} (only {' or '.join(map(repr, values))})"
            for option, values in takes.items()
            if options[option] not in values
        ]
        if not misfits[kind]:
            return kind, FAMILIES[kind]
    nearest = min(misfits, key=lambda kind: len(misfits[kind]))
    what = f"the family {nearest}" if name is not None else f"no family takes this model: {nearest}, the nearest,"
    raise ValueError(f"{what} does not take {', '.join(misfits[nearest])}")


def _attention_bias(model: Any) -> bool | str:
    return model.bias if model.attention_bias is None else model.attention_bias


def _read_gpt2(config: Config, max_length: int | None) -> dict[str, Any]:
    _only(config, "activation_function", "gelu_new", "gelu_pytorch_tanh")
    _only(config, "scale_attn_weights", True)
    _only(config, "scale_attn_by_inverse_layer_idx", False)
    _only(config, "add_cross_attention", False)
    width, heads = _count(config, "n_embd"), _count(config, "n_head")
    if width % heads:
        raise ValueError(f"n_embd is {width}, expected a multiple of n_head, {heads}")
    positions = _count(config, "n_positions")
    if max_length not in (None, positions):
        raise ValueError(
            f"max_length is {max_length}, but there are learned positions: expected n_positions, {positions}"
        )
    return {
        "vocab_size": _count(config, "vocab_size"), "width": width, "num_layers": _count(config, "n_layer"),
        "num_heads": heads, "num_kv_heads": heads, "head_dim": width // heads,
        "mlp_width": _count(config, "n_inner", 4 * width), "max_length": positions, "positions": "learned",
        "norm": "layer", "norm_eps": _number(config, "layer_norm_epsilon", 1e-5), "mlp": "gelu", "bias": True,
        "tied": bool(config.get("tie_word_embeddings", True)),
    }  # fmt: skip


def _write_gpt2(model: Any) -> dict[str, Any]:
    heads, kv_heads, head_dim = model.num_heads, model.num_kv_heads, model.head_dim
    if kv_heads != heads:
        raise ValueError(f"GPT-2 has as many key and value heads as query heads, got {kv_heads} and {heads}")
    if heads * head_dim != model.width:
        raise ValueError(
            f"GPT-2 cannot have {heads} heads of {head_dim} with width {model.width}, which transformers divides among "
            "the heads: of GPT-2 cut units of the MLPs and whole blocks, not heads"
        )
    return {
        "n_embd": model.width, "n_layer": model.num_layers, "n_head": heads, "n_inner": model.mlp_width,
        "n_positions": model.max_length, "activation_function": "gelu_new", "layer_norm_epsilon": float(model.norm_eps),
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), model.dropout),
    }  # fmt: skip


def _read_llama(config: Config, max_length: int | None) -> dict[str, Any]:
    return _read_rotary(config, max_length, _count(config, "max_position_embeddings", 2048)) | {
        "bias": bool(config.get("mlp_bias", False)),
        "attention_bias": bool(config.get("attention_bias", False)),
    }


def _write_llama(model: Any) -> dict[str, Any]:
    return _write_rotary(model) | {"attention_bias": _attention_bias(model), "mlp_bias": model.bias}


def _read_mistral(config: Config, max_length: int | None) -> dict[str, Any]:
    longest = _count(config, "max_position_embeddings", 4096 * 32)
    _no_window(config, longest if max_length is None else max_length)
    return _read_rotary(config, max_length, longest, kv_heads=8) | {"bias": False, "attention_bias": False}


def _write_mistral(model: Any) -> dict[str, Any]:
    return _write_rotary(model) | {"sliding_window": None}


def _read_qwen2(config: Config, max_length: int | None) -> dict[str, Any]:
    longest = _count(config, "max_position_embeddings", 32768)
    if config.get("use_sliding_window", False) or "sliding_attention" in (config.get("layer_types") or ()):
        _no_window(config, longest if max_length is None else max_length)
    return _read_rotary(config, max_length, longest, kv_heads=32) | {"bias": False, "attention_bias": "qkv"}


def _write_qwen2(model: Any) -> dict[str, Any]:
    return _write_rotary(model) | {"use_sliding_window": False}


def _read_rotary(config: Config, max_length: int | None, longest: int, kv_heads: int | None = None) -> dict[str, Any]:
    """Read the options common to Llama, Mistral and Qwen2; ``kv_heads`` where config.json does not say how many."""
    _only(config, "hidden_act", "silu", "swish")
    if max_length is not None and not 1 <= max_length <= longest:
        raise ValueError(f"max_length is {max_length}, expected 1 to {longest}, max_position_embeddings")
    width, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    missing = kv_heads if kv_heads is not None and "num_key_value_heads" not in config else heads
    kv_heads = _count(config, "num_key_value_heads", missing)
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads is {heads}, expected a multiple of num_key_value_heads, {kv_heads}")
    return {
        "vocab_size": _count(config, "vocab_size"), "width": width, "num_layers": _count(config, "num_hidden_layers"),
        "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": _count(config, "head_dim", width // heads),
        "mlp_width": _count(config, "intermediate_size"), "max_length": longest if max_length is None else max_length,
        "positions": "rotary", "rotary_base": _rotary_base(config), "norm": "rms",
        "norm_eps": _number(config, "rms_norm_eps", 1e-6), "mlp": "gated",
        "tied": bool(config.get("tie_word_embeddings", False)),
    }  # fmt: skip


def _write_rotary(model: Any) -> dict[str, Any]:
    return {
        "hidden_size": model.width, "num_hidden_layers": model.num_layers, "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads, "head_dim": model.head_dim, "intermediate_size": model.mlp_width,
        "max_position_embeddings": model.max_length, "hidden_act": "silu", "rms_norm_eps": float(model.norm_eps),
        "rope_theta": float(model.rotary_base),
    }  # fmt: skip


def _rotary_base(config: Config) -> float:
    """The base of the rotary angles, which transformers keeps under ``rope_parameters`` from its version 5 on."""
    base, part = _number(config, "rope_theta", 10_000.0), _number(config, "partial_rotary_factor", 1.0)
    for key in ("rope_scaling", "rope_parameters"):
        given = config.get(key) or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"{key} is {given!r}, expected an object")
        if kinds := [name for name, value in given.items() if isinstance(value, Mapping)]:
            raise ValueError(f"{key} has angles of their own for {listed(kinds)}: expected the same in all layers")
        kind = given.get("rope_type", given.get("type", "default"))
        if kind != "default":
            raise ValueError(f"{key} is of the type {kind!r}: expected angles that are not scaled")
        base, part = _number(given, "rope_theta", base), _number(given, "partial_rotary_factor", part)
    if part != 1:
        raise ValueError(f"partial_rotary_factor is {part}: expected angles for all of a head")
    return base


def _no_window(config: Config, max_length: int) -> None:
    if config.get("sliding_window", 0) is None:
        return
    if (window := _count(config, "sliding_window", 4096)) < max_length:
        raise ValueError(
            f"sliding_window is {window}, and models.GPT attends to all positions: expected at least its length, "
            f"{max_length}, or max_length={window}, up to which the two are the same"
        )


def _only(config: Config, key: str, *allowed: Any) -> None:
    """Refuses a key of config.json that is there with another value."""
    value = config.get(key, allowed[0])
    if value not in allowed:
        raise ValueError(
            f"{key} is {value!r}, and models.GPT has {' or '.join(repr(other) for other in allowed)} alone"
        )


def _count(config: Config, key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or value < 1:
        raise ValueError(f"{key} is {value!r}, expected an int >= 1" if key in config else f"{key} is missing")
    if value > _MOST:
        raise ValueError(f"{key} is {value}, expected at most {_MOST}")
    return value


def _number(config: Config, key: str, default: float) -> float:
    value = config.get(key, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{key} is {value!r}, expected a finite number above 0")
    return float(value)


_GPT_2 = {"positions": ("learned",), "norm": ("layer",), "mlp": ("gelu",), "bias": (True,), "attention_bias": (True,)}
_ROTARY = {"positions": ("rotary",), "norm": ("rms",), "mlp": ("gated",)}
# Transformers refuses a Llama whose heads do not divide its width, whatever head_dim is.
_LLAMA = _ROTARY | {"bias": (True, False), "attention_bias": (True, False), "width % num_heads": (0,)}
_MISTRAL = _ROTARY | {"bias": (False,), "attention_bias": (False,)}
_QWEN_2 = _ROTARY | {"bias": (False,), "attention_bias": ("qkv",)}

# In the order in which to_hf tries them.
FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT2LMHeadModel", GPT_2, _GPT_2, _read_gpt2, _write_gpt2),
    "llama": Family("LlamaForCausalLM", LLAMA, _LLAMA, _read_llama, _write_llama),
    "mistral": Family("MistralForCausalLM", LLAMA, _MISTRAL, _read_mistral, _write_mistral),
    "qwen2": Family("Qwen2ForCausalLM", LLAMA, _QWEN_2, _read_qwen2, _write_qwen2),
}
