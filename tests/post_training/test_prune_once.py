"""Pruning in one walk: equal to layers pruned by hand, whatever a function is made of."""

import functools
import logging
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse
from jaxsparse import trace
from jaxsparse.post_training import RULES, Rule, made, prune_once
from jaxsparse.post_training.matrix import of_matrix
from jaxsparse.structures import weight
from jaxsparse.trace.program import bind
from jaxsparse.trees import by_path
from tests.problems import slow_except
from tests.trace.models import MODELS, mlp, plain_gpt, rand


@pytest.fixture(autouse=True)
def _users_may_broadcast():
    with jax.numpy_rank_promotion("allow"):
        yield


def above(kernel, moments, sparsity, structure):
    """Keeps what scores more than the mean of its output, which compiles in no time."""
    del sparsity, structure
    scores = jnp.abs(kernel) * jnp.sqrt(moments.squares)[:, None]
    mask = scores > scores.mean(0)
    return jnp.where(mask, kernel, 0), mask


def fitted(kernel, moments, sparsity, structure):
    """As ``above``, by Gram matrices, with another weight in the first row."""
    kernel, mask = above(kernel, moments, sparsity, structure)
    return jnp.where(mask, kernel + moments.second[0, 0] / moments.rows, 0), mask


fitted.needs = "gram"


def two_layers(p, x):
    return jnp.tanh(x @ p["up"] + p["bias"]) @ p["down"]


def moments_of(apply, params, batches, path, gram=False):
    found = [trace.record(apply, params, *batch, gram=gram, leaves=path)[path] for batch in batches]
    return functools.reduce(lambda a, b: a + b, found)


def by_hand(apply, params, batches, rule, paths, sparsity=0.5):
    """One leaf after the other, recorded, pruned, and on with what it is then; leaves are (inputs, outputs)."""
    names, treedef = list(by_path(params)), jax.tree.structure(params)
    masks = {}
    for path in paths:
        moments = moments_of(apply, params, batches, path, getattr(rule, "needs", "") == "gram")
        prune = getattr(rule, "prune", rule)
        kernel, masks[path] = prune(by_path(params)[path], moments, jnp.float32(sparsity), weight())
        params = treedef.unflatten([kernel if name == path else by_path(params)[name] for name in names])
    return params, masks


def assert_equal(got, want, tolerance=1e-6):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for path, leaf in by_path(want).items():
        np.testing.assert_array_equal(by_path(got)[path] == 0, leaf == 0, err_msg=path)
        np.testing.assert_allclose(by_path(got)[path], leaf, rtol=tolerance, atol=tolerance, err_msg=path)


def batches_like(args, number=2, seed=0):
    """Batches with other numbers in them."""
    random = np.random.default_rng(seed)

    def one(x):
        if not hasattr(x, "dtype") or jnp.issubdtype(x.dtype, jax.dtypes.extended) or not x.ndim:
            return x
        if jnp.issubdtype(x.dtype, jnp.integer):
            return random.integers(0, 32, x.shape, np.int32)
        return random.normal(size=x.shape).astype(np.float32)

    return [jax.tree.map(one, args) for _ in range(number)]


@pytest.mark.parametrize("rule", slow_except(["ria"], ["fitted", "wanda", "sparsegpt", "ria"]))
def test_equals_layers_by_hand(rule):
    apply, params, _ = mlp()
    batches = [(rand(n, 20, seed=n),) for n in (40, 30)]  # of different shapes
    chosen = fitted if rule == "fitted" else rule
    pruned, masks = prune_once(apply, params, batches, chosen, 0.5)
    paths = ["fc1/kernel", "fc2/kernel", "fc3/kernel"]
    want, kept = by_hand(apply, params, batches, RULES.get(rule, chosen), paths)
    assert_equal(pruned, want)
    for path, mask in by_path(masks).items():
        np.testing.assert_array_equal(mask, kept.get(path, True))
        assert mask.dtype == jnp.bool_


def test_what_is_made_of_params_is_computed_once_for_a_product(monkeypatch):
    """Each value is used three times by the next: computed anew for each use, they would take 3^6 steps."""
    steps = []
    monkeypatch.setattr(made, "bind", lambda eqn, *args, **more: steps.append(eqn) or bind(eqn, *args, **more))

    def normalised(p, x):
        w = p["w"]
        for _ in range(6):
            w = w / jnp.sqrt((w * w).sum())
        return x @ p["v"] @ w

    params = {"v": rand(4, 4), "w": rand(4, 3)}
    prune_once(normalised, params, [rand(8, 4)], above, 0.5, prunable=("v", "w"))
    assert len(steps) < 100


def test_of_the_dense_network_at_once():
    apply, params, args = mlp()
    pruned, _ = prune_once(apply, params, [args], above, 0.5, sequential=False)
    for path in ("fc1", "fc2", "fc3"):
        moments = moments_of(apply, params, [args], f"{path}/kernel")
        np.testing.assert_array_equal(pruned[path]["kernel"], above(params[path]["kernel"], moments, 0, 0)[0])


def test_a_token_is_looked_up_as_many_are():
    params = {"embed": rand(9, 4), "up": rand(4, 6, seed=1), "head": rand(6, 3, seed=2)}
    apply = lambda p, t: jnp.tanh(p["embed"][t] @ p["up"]) @ p["head"]  # noqa: E731
    for token in (np.int32(3), np.arange(3)):
        _, masks = prune_once(apply, params, [token], "magnitude", 0.5)
        assert {path for path, mask in masks.items() if mask.ndim} == {"up"}


def gpts():
    """The same transformer, its blocks in a scan and in a loop."""
    loop, params, args = plain_gpt(scan=False)
    scanned = {**params, "blocks": jax.tree.map(lambda *x: jnp.stack(x), *params["blocks"])}
    return (plain_gpt()[0], scanned), (loop, params), batches_like(args)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["above", "sparsegpt"])
def test_scanned_layers_are_pruned_as_those_of_a_loop(rule):
    (scan, stacked), (loop, params), batches = gpts()
    rule = above if rule == "above" else rule
    (p, m), (q, n) = prune_once(scan, stacked, batches, rule, 0.5), prune_once(loop, params, batches, rule, 0.5)
    assert_equal(p, {**q, "blocks": jax.tree.map(lambda *x: jnp.stack(x), *q["blocks"])}, 1e-4)
    for path, mask in by_path(m["blocks"]).items():
        each = [by_path(block)[path] for block in n["blocks"]]
        np.testing.assert_array_equal(mask, np.stack(each) if mask.ndim else all(each))
    assert {path for path, mask in by_path(n["blocks"][0]).items() if mask.ndim} == {"qkv", "out", "gate_up", "down"}
    assert m["embed"].ndim == 0  # looked up, and the output layer too


@pytest.mark.slow
def test_layers_in_loops_and_of_several_uses_are_recorded_with_all_of_them():
    params = {"in": rand(6, 8), "w": rand(8, 8, seed=1), "round": rand(8, 8, seed=2), "out": rand(8, 3, seed=3)}

    def apply(p, x):
        h = jnp.tanh(jnp.tanh(x @ p["in"]) @ p["w"]) @ p["w"]
        h = lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["round"]), h)
        return lax.cond(h[0, 0] > 9, lambda: h, lambda: 2 * h) @ p["out"]

    batches = [(rand(7, 6, seed=s),) for s in (4, 5)]
    pruned, _ = prune_once(apply, params, batches, above, 0.5)
    want, _ = by_hand(apply, params, batches, above, ["in", "w", "round", "out"])
    assert_equal(pruned, want)


@pytest.mark.slow
def test_stacks_in_any_order_and_stacks_of_stacks():
    params = {"w": rand(4, 2, 3, 4, seed=1), "one": rand(1, 4, 4), "last": rand(4, 2)}

    def layer(h, w):
        return jnp.tanh(h @ w), h.sum()

    def apply(p, x):
        h, sums = lax.scan(lambda h, w: lax.scan(layer, h, w), x, jnp.moveaxis(p["w"], 0, 2), reverse=True)
        h, more = lax.scan(layer, h, p["one"])
        return h @ p["last"] + sums.sum() + more[0]

    def loop(p, x):
        total = 0.0
        for i in (1, 0):
            for j in range(3):
                x, total = jnp.tanh(x @ p[f"w{i}{j}"]), total + x.sum()
        y = jnp.tanh(x @ p["one"])
        return y @ p["last"] + total + x.sum()

    flat = {f"w{i}{j}": params["w"][:, i, j] for i in range(2) for j in range(3)}
    flat |= {"one": params["one"][0], "last": params["last"]}
    batches = [(rand(5, 4, seed=s),) for s in (2, 3)]
    np.testing.assert_allclose(apply(params, *batches[0]), loop(flat, *batches[0]), rtol=1e-5)
    (p, _), (q, _) = (prune_once(f, tree, batches, above, 0.5) for f, tree in ((apply, params), (loop, flat)))
    assert_equal({f"w{i}{j}": p["w"][:, i, j] for i in range(2) for j in range(3)}, {k: q[k] for k in flat if "w" in k})
    assert_equal(p["one"][0], q["one"])
    assert_equal(p["last"], q["last"])


@pytest.mark.slow
def test_several_uses_in_scanned_layers():
    """Of split kernels and shared ones, too, each layer is recorded behind those before it."""
    params = {"w": rand(3, 4, 8, seed=1), "shared": rand(4, 4, seed=2), "out": rand(4, 2)}

    def layer(h, w, shared):
        query, key = jnp.split(w, 2, 1)
        return jnp.tanh(h @ query + jnp.sin(h @ key)) @ shared

    def apply(p, x):
        return lax.scan(lambda h, w: (layer(h, w, p["shared"]), None), x, p["w"])[0] @ p["out"]

    def loop(p, x):
        for i in range(3):
            x = layer(x, p[f"w{i}"], p["shared"])
        return x @ p["out"]

    flat = {**{f"w{i}": params["w"][i] for i in range(3)}, "shared": params["shared"], "out": params["out"]}
    batches = [(rand(5, 4, seed=s),) for s in (2, 3)]
    pruned, _ = prune_once(apply, params, batches, above, 0.5)
    want, _ = by_hand(loop, flat, batches, above, ["shared", "w0", "w1", "w2", "out"])  # first what all rounds share
    assert_equal({f"w{i}": pruned["w"][i] for i in range(3)} | {k: pruned[k] for k in ("shared", "out")}, want)


def test_magnitude_needs_no_batches():
    params = {"up": rand(8, 8), "bias": rand(8), "down": rand(8, 8, seed=1)}
    want = jaxsparse.magnitude_masks(params, 0.75)
    for batches in (None, [], [rand(3, 8)]):
        pruned, masks = prune_once(two_layers, params, batches, "magnitude", 0.75)
        jax.tree.map(np.testing.assert_array_equal, masks, want)
    jax.tree.map(np.testing.assert_array_equal, pruned, jaxsparse.apply_masks(params, want))


def test_low_precision_and_zeros_that_stay_in_fine_tuning():
    params = {"up": rand(8, 8), "bias": rand(8), "down": rand(8, 8, seed=1)}
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    seen = []

    def rule(kernel, moments, sparsity, structure):
        seen.append((kernel.dtype, moments.second.dtype))
        return above(kernel, moments, sparsity, structure)

    half = rand(5, 8).astype(jnp.bfloat16)
    pruned, masks = prune_once(two_layers, params, [half], rule, 0.5)
    assert set(seen) == {(jnp.dtype("float32"), jnp.dtype("float32"))}
    assert {leaf.dtype for leaf in jax.tree.leaves(pruned)} == {jnp.dtype("bfloat16")}
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), jaxsparse.mask_updates(masks))

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.square(two_layers(p, half)).sum())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    trained, state = step(pruned, tx.init(pruned))
    trained, _ = step(trained, state)
    assert not jnp.array_equal(trained["up"], pruned["up"])
    for path, mask in by_path(masks).items():
        if mask.ndim:
            np.testing.assert_array_equal(by_path(trained)[path] == 0, ~mask)
    assert 0 < float(masks["up"].mean()) < 1


def test_what_is_said_about_data(recwarn):
    params = {"w": rand(4, 3), "table": rand(5, 4), "lost": rand(4, 4)}

    def apply(p, x):
        return (x + p["table"]) @ (p["w"]) + (x @ (p["lost"] * x[:1].T))[:, :3]

    x = jnp.ones((5, 4)).at[:, 2].set(0)
    prune_once(apply, {**params, "table": 0 * params["table"]}, [x], above, 0.5)
    told = [str(warning.message) for warning in recwarn.list]
    assert any("lost goes into mul at" in text for text in told)
    assert any("zeros arrives at inputs of w (1 of 4 inputs)" in text for text in told)
    assert not any("table" in text for text in told)  # chosen by default alone
    with pytest.warns(UserWarning, match="table is multiplied by nothing"):
        prune_once(apply, params, [x], above, 0.5, prunable=["w", "table"])

    def damped(kernel, moments, sparsity, structure):
        return *above(kernel, moments, sparsity, structure), jnp.float32(0.1)

    rule = Rule("damped", "gram", lambda *args: damped(*args)[:2], damped)
    with pytest.warns(UserWarning, match="took more damping to be positive definite: w \\(0.1\\)"):
        prune_once(apply, params, [x], rule, 0.5, prunable="w")


@pytest.mark.slow
def test_experts_are_matrices_of_their_own_and_one_that_is_not_reached_is_named():
    params = {"experts": rand(3, 6, 5, seed=1), "out": rand(5, 2)}

    def apply(p, x):
        chosen = jnp.array([[1.0, 0.0, 1.0]]).T[..., None] * x[None]
        return jnp.tanh(jnp.einsum("eti,eio->eto", chosen, p["experts"])).sum(0) @ p["out"]

    x = rand(7, 6)
    with pytest.warns(UserWarning, match=r"inputs of experts\[1\] \(6 of 6 inputs\)"):
        pruned, masks = prune_once(apply, params, [x], "wanda", 0.5)
    np.testing.assert_array_equal(masks["experts"].sum(1), 3)
    for i, scale in enumerate((jnp.linalg.norm(x, axis=0), jnp.ones(6), jnp.linalg.norm(x, axis=0))):
        scores = jnp.abs(params["experts"][i]) * scale[:, None]
        assert float(jnp.where(masks["experts"][i], scores, jnp.inf).min(0)[0]) > float(
            jnp.where(masks["experts"][i], 0, scores).max(0)[0]
        )
    np.testing.assert_array_equal(pruned["experts"] != 0, masks["experts"])


@pytest.mark.slow
def test_what_is_pruned_may_be_chosen(caplog):
    (scan, stacked), _, batches = gpts()
    with caplog.at_level(logging.INFO, "jaxsparse"):
        pruned, masks = prune_once(scan, stacked, batches, above, 0.5, prunable=["embed", "blocks/down"])
    assert masks["embed"].shape == stacked["embed"].shape  # by what arrives at it as the output layer
    sparse = [path for path, mask in by_path(masks).items() if mask.ndim]
    assert sorted(sparse) == ["blocks/down", "embed"]
    np.testing.assert_array_equal(pruned["blocks"]["qkv"], stacked["blocks"]["qkv"])
    told = [record.getMessage() for record in caplog.records]
    assert any(text.startswith("prune_once: pruned blocks/down, embed; dense:") for text in told)
    assert any("of moments, and" in text and "activations of all batches" in text for text in told)


X = rand(5, 20, seed=9)
BAD = {
    "no batches": ({"batches": []}, "rule 'wanda' needs what arrives .*got none"),
    "one array": ({"batches": X}, "batches must be an iterable of batches"),
    "a dict": ({"batches": {"x": X}}, "batches must be an iterable of batches"),
    "a shape": ({"batches": [X, X[:, :7]]}, r"cannot take batch 1, \(float32\[5, 7\]\)"),
    "a rule": ({"rule": "wander"}, "rule must be one of"),
    "inputs": ({"structure": jaxsparse.n_of_m(2, 9)}, "does not fit fc1/kernel of shape .*, which has 20 inputs"),
    "outputs": ({"structure": jaxsparse.n_of_m(2, 4, axis="outputs")}, "along the inputs"),
    "a structure": ({"structure": "channel"}, "structure must be one of"),
    "a sparsity": ({"sparsity": 1.5}, "sparsity is the fraction"),
    "a leaf without": ({"sparsity": {"fc1": 0.5}}, "missing fc2/kernel, fc3/kernel"),
    "an allocation": ({"allocation": "own"}, "allocation must be one of"),
    "two": ({"sparsity": {"*": 0.5}, "allocation": "owl"}, "shares out one sparsity"),
    "no blocks": ({"allocation": "owl", "blocks": lambda path: "all"}, "found all among"),
    "blocks of what": ({"blocks": ["fc1"]}, "blocks are what allocation='owl' counts in"),
    "blocks": ({"allocation": "owl", "blocks": 3}, "blocks must be"),
    "shapes": ({"rule": lambda w, *_: (w[:3], w[:3] > 0)}, "bool mask of the shape of its kernel"),
    "a pair": ({"rule": lambda w, *_: w}, r"must return \(kernel, mask\)"),
    "weights": ({"rule": lambda w, *_: (w + jnp.nan, w > 0)}, "made weights of fc1/kernel that are not finite"),
    "data": ({"batches": [X + jnp.nan], "rule": above}, "what arrives at fc1/kernel is not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors_say_what_is_wrong(name):
    apply, params, args = mlp()
    given = {"batches": [args], "rule": "wanda", "sparsity": 0.5} | BAD[name][0]
    with pytest.raises(ValueError, match=BAD[name][1]):
        prune_once(apply, params, **given)


def test_traced_params_have_no_values():
    apply, params, args = mlp()
    with pytest.raises(ValueError, match=r"fc1/bias has none: call it outside of jax\.jit"):
        jax.jit(lambda params: prune_once(apply, params, [args], "wanda", 0.5))(params)


def test_a_sparsity_that_rounds_down_to_nothing_is_said():
    x, params = rand(5, 4), {"few": rand(4, 3), "many": rand(3, 20)}
    with pytest.warns(UserWarning, match="no weight of few is pruned: the sparsity rounds down"):
        prune_once(lambda p, x: x @ p["few"] @ p["many"], params, [x], "wanda", {"few": 0.2, "many": 0.5})


def owl_moments(caplog, apply, params, batches, **how):
    caplog.clear()
    with caplog.at_level(logging.INFO, "jaxsparse"):
        _, masks = prune_once(apply, params, batches, "magnitude", 0.7, allocation="owl", **how)
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("owl:")]
    return masks, dict(part.split(" ") for part in line.removeprefix("owl: ").split(", "))


@pytest.mark.slow
def test_owl_by_blocks(caplog):
    (scan, stacked), (loop, params), batches = gpts()
    params["blocks"][1]["down"] = params["blocks"][1]["down"].at[0].mul(30)
    stacked = {**params, "blocks": jax.tree.map(lambda *x: jnp.stack(x), *params["blocks"])}
    masks, found = owl_moments(caplog, loop, params, batches)
    assert list(found) == ["blocks/0", "blocks/1"]
    first, second = map(float, found.values())
    np.testing.assert_allclose(first + second, 0.6, atol=2e-3)
    np.testing.assert_allclose(abs(first - second), 0.16, atol=2e-3)
    for i, density in enumerate((first, second)):
        for path, mask in by_path(masks["blocks"][i]).items():
            if mask.ndim:
                np.testing.assert_allclose(mask.mean(), density, atol=1e-2, err_msg=path)
    again, found = owl_moments(caplog, scan, stacked, batches)
    assert list(found) == ["blocks[0]", "blocks[1]"]
    for path, mask in by_path(again["blocks"]).items():
        each = [by_path(block)[path] for block in masks["blocks"]]
        np.testing.assert_array_equal(mask, np.stack(each) if mask.ndim else all(each))
    _, found = owl_moments(caplog, loop, params, batches, blocks=lambda path: path.split("/")[-1])
    assert set(found) == {"qkv", "out", "gate_up", "down"}
    _, found = owl_moments(caplog, loop, params, batches, blocks=["blocks/1", "blocks/0/*"])
    assert list(found) == ["blocks/0/*", "blocks/1"]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["HWIO", "OIHW"])
def test_n_of_m_lies_along_the_channels_of_a_convolution(order):
    at = {"HWIO": (2, 3, (0, 1)), "OIHW": (1, 0, (2, 3))}[order]
    shape = {"HWIO": (3, 2, 8, 4), "OIHW": (4, 8, 3, 2)}[order]
    params = {"w": rand(*shape, seed=1)}

    def apply(p, x):
        return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", order, "NHWC"))

    def largest(kernel, moments, sparsity, structure):
        del sparsity
        scores = jnp.abs(kernel) * jnp.sqrt(moments.squares)[:, None]
        mask = of_matrix(structure, kernel).top(scores)
        return jnp.where(mask, kernel, 0), mask

    x = rand(2, 5, 5, 8, scale=1) * jnp.arange(1, 9)
    _, masks = prune_once(apply, params, [x], largest, 0.0, structure=jaxsparse.n_of_m(2, 4))
    groups = np.moveaxis(np.asarray(masks["w"]), at[0], -1).reshape(4, 3, 2, 2, 4) if order == "OIHW" else (
        np.moveaxis(np.asarray(masks["w"]), at[0], -1).reshape(3, 2, 4, 2, 4)
    )  # fmt: skip
    np.testing.assert_array_equal(groups.sum(-1), 2)
    moments = trace.record(apply, params, x)["w"]
    scores = jnp.abs(params["w"]) * moments.along(moments.norm, shape)
    layout = jaxsparse.Layout(at[0], at[1])
    np.testing.assert_array_equal(masks["w"], jaxsparse.structures.n_of_m(2, 4, layout=layout).top(scores))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["magnitude", "wanda", "sparsegpt"])
def test_over_eight_devices(rule):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    (apply, params), _, batches = gpts()
    specs = {"qkv": P(None, "data", "model"), "out": P(None, "model", "data"), "gate_up": P(None, "data", "model"),
             "down": P(None, "model", "data")}  # fmt: skip
    placed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(leaf, NamedSharding(mesh, specs.get(path[-1].key, P()))), params
    )
    want, _ = prune_once(apply, params, batches, rule, 0.5)
    got, masks = prune_once(apply, placed, batches, rule, 0.5)
    differ = total = 0
    for path, leaf in by_path(got["blocks"]).items():
        given = by_path(placed["blocks"])[path]
        assert leaf.sharding.is_equivalent_to(given.sharding, leaf.ndim)
        mask = by_path(masks["blocks"])[path]
        if mask.ndim:
            assert mask.sharding.is_equivalent_to(given.sharding, leaf.ndim)
            differ += int((np.asarray(leaf == 0) != np.asarray(by_path(want["blocks"])[path] == 0)).sum())
            total += leaf.size
    assert differ <= (0 if rule == "magnitude" else total / 1000)


def error_of(apply, params, dense, batches):
    """The squared error of all outputs."""
    total = 0.0
    for want, batch in zip(dense, batches, strict=True):
        for x, y in zip(jax.tree.leaves(apply(params, *batch)), want, strict=True):
            total += float(jnp.square(x - y).sum()) if jnp.issubdtype(x.dtype, jnp.floating) else 0.0
    return total


ZOO = {
    "resnet": 7, "dropout batchnorm train": 3, "unet": 7, "attention linen": 5, "rnn linen": 9, "mlp eqx": 3,
    "gpt linen scan+remat rms": 7, "gpt linen loop layernorm": 21, "gpt nnx mha": 14, "gpt eqx scan vmap": 7,
    "gpt plain fused gqa rope scan": 4, "haiku conv groupnorm": 4, "lstm": 3, "experts": 2,
}  # fmt: skip


# All their inputs are about equally large, of weights drawn at random: scores are then hardly more than magnitudes.
# Those of the experts are not correlated either, so that SparseGPT, which prunes one more of each 96 weights, gains
# nothing.
NORMALISED = {"gpt eqx scan vmap", "experts"}


# Each takes half a minute to compile, and what they are made of is in others too.
LONG = ("unet", "resnet", "gpt eqx scan vmap", "gpt linen scan+remat rms", "gpt linen loop layernorm", "rnn linen")


@pytest.mark.parametrize("name", slow_except([], ZOO, LONG))
def test_models_of_others(name):
    apply, params, args = MODELS[name]()
    batches = batches_like(args, number=4)
    dense = [jax.tree.leaves(apply(params, *batch)) for batch in batches]
    errors = {}
    for rule in ("magnitude", "wanda", "sparsegpt"):
        # Not the router, nor a head of 24 weights, of which SparseGPT prunes one more than magnitude.
        some = {"prunable": ["in", "out"]} if name == "experts" else {}
        pruned, masks = prune_once(apply, params, batches, rule, 0.5, **some)
        assert jax.tree.structure(pruned) == jax.tree.structure(params)
        sparse = {path: mask for path, mask in by_path(masks).items() if mask.ndim}
        assert len(sparse) == ZOO[name]
        for path, mask in sparse.items():
            leaf = by_path(pruned)[path]
            np.testing.assert_array_equal(leaf[~mask], 0)
            assert jnp.isfinite(leaf).all()
            matrices = mask.size / mask.shape[-1]
            assert abs(float(mask.mean()) - 0.5) <= 1.5 / min(matrices, mask.shape[-1])
        errors[rule] = error_of(apply, pruned, dense, batches)
    assert name == "experts" or errors["sparsegpt"] < errors["magnitude"]
    if name not in NORMALISED:
        assert errors["wanda"] < errors["magnitude"]


def heard(prune):
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prune()
    return [str(one.message) for one in caught]


def test_all_leaves_that_are_combined_before_a_product_are_named():
    keys = iter(jax.random.split(jax.random.key(0), 9))
    params = {name: jax.random.normal(next(keys), (8, 6)) for name in ("a", "b", "c")}
    x = jax.random.normal(next(keys), (4, 8))
    together = heard(
        lambda: prune_once(lambda p, x: x @ jnp.concatenate(list(p.values()), 1), params, [x], "wanda", 0.5)
    )
    assert len(together) == 1
    assert all(f"{name} is multiplied in another form at dot_general" in together[0] for name in params)

    params.pop("c")
    added = heard(lambda: prune_once(lambda p, x: x @ (p["a"] + p["b"]), params, [x], "wanda", 0.5))
    assert len(added) == 1
    assert "b is combined with a before the product at dot_general" in added[0]


@pytest.mark.parametrize("rule", ["magnitude", "wanda"])
def test_leaves_that_a_condition_chooses_from_are_named(rule):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {name: jax.random.normal(key, (8, 8)) for name, key in zip(("a", "b", "c"), keys, strict=False)}
    params["position"] = jnp.ones((4, 8))  # a matrix that nothing is multiplied by
    x = jax.random.normal(keys[3], (4, 8))

    def apply(p, x):
        chosen = jax.lax.cond(x.sum() > 0, lambda p: p["a"], lambda p: p["b"], p)
        return jnp.tanh((x + p["position"]) @ chosen) @ p["c"]

    (said,) = heard(lambda: prune_once(apply, params, [x], rule, 0.5))
    assert re.search("a is multiplied in another form at dot_general .*; b is multiplied in another form", said)
    assert "position" not in said
    assert ("prunes what prunable= names" in said) == (rule == "magnitude")
    named = {"a": True, "b": True, "c": True, "position": False}
    if rule == "magnitude":
        assert heard(lambda: prune_once(apply, params, [x], rule, 0.5, prunable=named)) == []


def test_a_leaf_that_is_used_in_another_form_too_is_named():
    params = {"w": jax.random.normal(jax.random.key(0), (8, 6))}
    x = jax.random.normal(jax.random.key(1), (4, 8))
    (said,) = heard(lambda: prune_once(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, params, [x], "wanda", 0.5))
    assert "not all that arrives at a leaf counts: w is multiplied along axes (1,) too" in said
