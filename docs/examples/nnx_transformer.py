"""A byte-level transformer of Flax NNX: trained, cut to smaller widths, made sparse, saved."""

from pathlib import Path

import jax
import optax
from flax import nnx

import jaxsparse
from jaxsparse.post_training import prune_channels, prune_once


class Block(nnx.Module):
    def __init__(self, heads, units, rngs):
        self.attention = nnx.MultiHeadAttention(heads, 64, 16 * heads, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(64, units, rngs=rngs), nnx.Linear(units, 64, rngs=rngs)

    def __call__(self, x):
        x += self.attention(jax.nn.standardize(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(jax.nn.standardize(x))))


def transformer(heads, units, rngs):
    first, last = nnx.Embed(256, 64, rngs=rngs), nnx.Linear(64, 256, rngs=rngs)
    return nnx.Sequential(first, Block(heads, units, rngs), Block(heads, units, rngs), last)


def loss(model, x):
    return optax.softmax_cross_entropy_with_integer_labels(model(x[:, :-1]), x[:, 1:]).mean()


def fit(model, tx, epochs):
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = nnx.jit(lambda model, opt, x: opt.update(model, nnx.grad(loss)(model, x)))
    for batch in batches * epochs:
        step(model, optimizer, batch)
    weights = sum(int((leaf != 0).sum()) for leaf in jax.tree.leaves(model))
    print(f"loss {nnx.jit(loss)(model, test):.3f}, {weights:,} weights")


text = Path(optax.adam.__code__.co_filename).read_bytes()[:38400]
*batches, test = jax.numpy.frombuffer(text, "uint8").reshape(40, 15, 64)
model = transformer(4, 256, nnx.Rngs(0))
fit(model, optax.adam(3e-3), epochs=8)
apply = nnx.Sequential.__call__
small = prune_channels(apply, model, batches[:4], {"units": 0.5, "heads": 0.5}).params
model = nnx.merge(nnx.graphdef(transformer(2, 128, nnx.Rngs(0))), nnx.state(small))
model, masks = prune_once(apply, model, batches[:4], "wanda", 0.5)
fit(model, jaxsparse.chain(optax.adam(1e-3), jaxsparse.mask_updates(nnx.state(masks))), 4)
jaxsparse.save_sparse("small.safetensors", nnx.state(model), nnx.state(masks), dtype="bfloat16")
nnx.update(model, jaxsparse.load_sparse("small.safetensors", like=nnx.state(model))[0])
size = Path("small.safetensors").stat().st_size
print(f"loaded: loss {nnx.jit(loss)(model, test):.3f}, {size:,} bytes")
