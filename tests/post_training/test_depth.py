"""Scores of blocks: those of streams taken by hand, in layers that are stacked and written out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxsparse import models
from jaxsparse.post_training import block_influence, block_scores
from tests.problems import slow_except
from tests.trace.models import MODELS, TOKENS, filled, rand


@pytest.fixture(autouse=True)
def _users_may_broadcast():
    with jax.numpy_rank_promotion("allow"):
        yield


def by_hand(streams):
    """The score of each block from what goes through them, in float64."""
    streams = [np.asarray(x, np.float64) for x in streams]
    pairs = itertools.pairwise(streams)
    cosines = [(x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1) for x, y in pairs]
    return np.array([1 - cosine.mean() for cosine in cosines])


def block(x, p):
    """Two branches, of which the first is normalised."""
    h = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["scale"]
    x = x + jax.nn.relu(h @ p["up"]) @ p["down"]
    return x + jnp.tanh(x @ p["side"].astype(x.dtype))


def layers(n=3, d=6):
    each = [
        {"scale": 1 + rand(d, seed=9 * i), "up": rand(d, 8, seed=9 * i + 1), "down": rand(8, d, seed=9 * i + 2),
         "side": rand(d, d, seed=9 * i + 3)}
        for i in range(n)
    ]  # fmt: skip
    return {"embed": rand(12, d, seed=77), "norm": 1 + rand(d, seed=78), "blocks": each}


def unrolled(p, tokens):
    x = p["embed"][tokens]
    for q in p["blocks"]:
        x = jax.checkpoint(block)(x, q) if q is p["blocks"][1] else jax.jit(block)(x, q)
    return (x * p["norm"]) @ p["embed"].T


def scanned(p, tokens):
    x, n = p["embed"][tokens], jnp.int32(0)
    (x, _), _ = lax.scan(jax.checkpoint(lambda c, q: ((block(c[0], q), c[1] + 1), None)), (x, n), p["blocks"])
    return (x * p["norm"]) @ p["embed"].T


def stacked(params):
    return params | {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *params["blocks"])}


@pytest.mark.slow
def test_scores_of_blocks_stacked_and_written_out():
    params, batches = layers(), [jnp.arange(10).reshape(2, 5), jnp.arange(3)[None]]
    want = []
    for tokens in batches:
        streams = [params["embed"][tokens]]
        for q in params["blocks"]:
            streams.append(block(streams[-1], q))
        want.append(by_hand(streams))
    np.testing.assert_allclose(block_scores(unrolled, params, batches, "blocks/*"), np.mean(want, 0), rtol=1e-4)
    np.testing.assert_allclose(block_scores(scanned, stacked(params), batches, "blocks"), np.mean(want, 0), rtol=1e-4)


def test_arguments_that_are_no_arrays_are_part_of_the_program():
    params = {f"block_{i}": rand(4, 4, seed=i) for i in range(2)}

    def apply(p, x, act, mode):
        assert mode == "eval"
        for w in p.values():
            x = x + act(x @ w)
        return x

    x, found = rand(3, 4, seed=9), []
    for act in (jnp.tanh, jnp.sin):
        streams = [x, x + act(x @ params["block_0"])]
        streams.append(streams[1] + act(streams[1] @ params["block_1"]))
        found.append(by_hand(streams))
    scores = block_scores(apply, params, [(x, jnp.tanh, "eval"), (x, jnp.sin, "eval")], "block_*")
    np.testing.assert_allclose(scores, np.mean(found, 0), rtol=1e-4)
    with pytest.raises(ValueError, match=r"batch 0, \(float32\[3, 2\], .*tanh.*, 'eval'\): .*shape"):
        block_scores(apply, params, [(x[:, :2], jnp.tanh, "eval")], "block_*")


def test_blocks_that_read_an_argument():
    params, x = {"w": [rand(4, 4), rand(4, 4, seed=1)]}, rand(3, 4, seed=2)
    streams = [x, x + x @ params["w"][0]]
    streams.append(streams[1] + streams[1] @ params["w"][1])

    def apply(p, x):
        for w in p["w"]:
            x = x + x @ w
        return x

    np.testing.assert_allclose(block_scores(apply, params, [x], "w/*"), by_hand(streams), rtol=1e-4)


def test_samples_and_places_that_are_mapped_over():
    """``matrix @ vector`` under vmap puts the new axis last, so the embeddings are (features, places, samples)."""
    params = {"embed": rand(4, 4), "blocks": [rand(2, 4, 4, seed=i) for i in (1, 2)]}

    def streams(p, x):
        def one(x):
            found = [p["embed"] @ x]
            for up, down in p["blocks"]:
                found.append(found[-1] + down @ jnp.tanh(up @ found[-1]))
            return found

        return jax.vmap(jax.vmap(one))(x)

    x = rand(4, 4, 4, seed=3)
    found = block_scores(lambda p, x: streams(p, x)[-1], params, [x], "blocks/*")
    np.testing.assert_allclose(found, by_hand(streams(params, x)), rtol=1e-4)


def test_features_that_come_first():
    params, x = {"embed": rand(4, 4), "blocks": rand(2, 4, 4, seed=1)}, rand(4, 4, seed=2)
    streams = [params["embed"] @ x]
    for w in params["blocks"]:
        streams.append(streams[-1] + jnp.tanh(w @ streams[-1]))

    def apply(p, x):
        return lax.scan(lambda x, w: (x + jnp.tanh(w @ x), None), p["embed"] @ x, p["blocks"])[0]

    found = block_scores(apply, params, [x], "blocks")
    np.testing.assert_allclose(found, by_hand([x.T for x in streams]), rtol=1e-4)


LLAMA = {"num_kv_heads": 2, "positions": "rotary", "norm": "rms", "mlp": "gated", "bias": False, "tied": False}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
def test_gpt_stacked_and_written_out(options):
    loop, scan = (models.GPT(32, 16, 3, max_length=8, scan=scan, remat=True, **options) for scan in (False, True))
    params = filled(jax.eval_shape(lambda: loop.init(jax.random.key(0), TOKENS)))["params"]
    blocks = [params[f"block_{i}"] for i in range(3)]
    rest = {name: leaf for name, leaf in params.items() if not name.startswith("block")}
    _, seen = loop.apply(
        {"params": params}, TOKENS, capture_intermediates=lambda m, _: (m.name or "").startswith("block")
    )
    outs = [jax.tree.leaves(seen["intermediates"][f"block_{i}"])[0] for i in range(3)]
    found = block_scores(lambda p, x: loop.apply({"params": p}, x), params, [TOKENS], "block_*")
    np.testing.assert_allclose(found[1:], by_hand(outs), rtol=1e-4)
    both = rest | {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}
    again = block_scores(lambda p, x: scan.apply({"params": p}, x), both, [TOKENS], "blocks")
    np.testing.assert_allclose(again, found, rtol=1e-4)


OTHERS = {
    "gpt plain fused gqa rope scan": "blocks", "gpt plain loop": "blocks/*", "gpt eqx scan vmap": "blocks",
    "gpt nnx mha": "blocks/*", "gpt linen scan+remat rms": "params/blocks", "gpt linen loop layernorm": "params/block*",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_models_of_all_frameworks(name):
    apply, params, args = MODELS[name]()
    found = block_scores(apply, params, [args], OTHERS[name])
    assert found.shape == ((3,) if "eqx" in name or "linen" in name else (2,))
    assert (found > 0.01).all()
    assert (found < 2).all()


def two_streams(p, x):
    x, y = jnp.split(x, 2)
    for w in p["w"]:
        x, y = x @ w, y + x @ w
    return x + y


def no_scan(p, x):
    for i in range(2):
        x = x + x @ p["w"][i]
    return x


def two_carries(p, x):
    carry, _ = lax.scan(lambda c, w: ((c[0] @ w, c[1] + c[0]), None), (x, x), p["w"])
    return carry


W = {"w": [rand(4, 4), rand(4, 4, seed=1)]}
BAD = {
    "two streams": (two_streams, W, "w/*", "not a single array goes out of block 0, so there is no"),
    "no scan": (no_scan, {"w": rand(2, 4, 4)}, "w", "0 scans go over these layers, and it must be one"),
    "two carries": (two_carries, {"w": rand(2, 4, 4)}, "w", "carries 2 arrays of floats from layer to layer"),
    "unused": (lambda p, x: x @ p["w"][0], W, "w/*", "does not use the params of block 1"),
    "unknown": (no_scan, W, "layers/*", "'layers/.' names none of the params, which are w/0, w/1"),
    "lengths": (no_scan, W | {"w": {"a": rand(2, 3), "b": rand(3, 3)}}, "w", "one axis of layers in front, got"),
    "gaps": (no_scan, {"w": {"1": rand(2, 2)}}, "w/*", r"params of blocks 0, 1, ..., and has those of \[1\]"),
    "stars": (no_scan, W, "*/*", "must be a path with one . for the number"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:apply does not use")
@pytest.mark.parametrize("name", slow_except(["two streams", "unknown"], BAD))
def test_what_has_no_stream(name):
    apply, params, blocks, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        block_scores(apply, params, [rand(2, 4, seed=5)], blocks)


def test_streams_that_make_no_sense():
    with pytest.raises(ValueError, match=r"must keep its shape .*, got \(2, 3\) in and \(2, 4\) out"):
        block_influence(jnp.ones((2, 3)), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="the stream through the blocks is not finite"):
        block_scores(
            scanned, stacked(layers()) | {"embed": jnp.full((12, 6), jnp.nan)}, [jnp.arange(3)[None]], "blocks"
        )
    assert block_influence(jnp.zeros((1, 2), jnp.bfloat16), jnp.zeros((1, 2), jnp.bfloat16)) == 1
