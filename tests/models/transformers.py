"""Small models of :class:`jaxsparse.models.GPT`, with uneven params."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.models import GPT
from tests.trace.linen_models import filled

VOCAB = 23
TOKENS = np.random.default_rng(5).integers(0, VOCAB, (2, 8), np.int32)
LLAMA = {
    "positions": "rotary",
    "norm": "rms",
    "mlp": "gated",
    "bias": False,
    "num_kv_heads": 2,
    "head_dim": 6,
    "mlp_width": 24,
}
OPTIONS = {
    "gpt-2": {},
    "llama": {**LLAMA, "num_heads": 6},
    "qwen2": {**LLAMA, "attention_bias": "qkv", "tied": False},
    "one key head": {"positions": "rotary", "num_kv_heads": 1, "norm_eps": 1e-3, "rotary_base": 100.0, "norm": "rms"},
    "learned and gated": {"mlp": "gated", "num_kv_heads": 2, "bias": False, "tied": False},
}


def gpt(name, form="loop", **options):
    """The model, its params, and apply(params, tokens), of blocks in a loop, or in one "scan", "scan+remat"."""
    form = {"scan": form != "loop", "remat": form.endswith("remat")}
    model = GPT(VOCAB, 16, num_layers=2, max_length=12, **OPTIONS[name], **form, **options)
    params = filled(jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"])
    return model, params, lambda params, tokens: model.apply({"params": params}, tokens)


def stacked_blocks(params):
    """The params of blocks in a loop as those of scanned ones."""
    blocks = [params[name] for name in sorted(params) if name.startswith("block_")]
    rest = {name: leaf for name, leaf in params.items() if not name.startswith("block_")}
    return rest | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}
