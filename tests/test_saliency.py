"""Scores before training against the authors' code, against plain loops, and by hand."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from jaxsparse import saliency

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "before_training.npz")
LAYERS = ("conv1", "conv2", "fc1", "fc2")


def network(params, x):
    kernels, biases = params["kernel"], params["bias"]
    for name, stride in (("conv1", 1), ("conv2", 2)):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernels[name], (stride, stride), [(1, 1)] * 2, dimension_numbers=numbers)
        x = jax.nn.relu(x + biases[name][None, None, None])
    x = jax.nn.relu(x.reshape(len(x), -1) @ kernels["fc1"] + biases["fc1"][None])
    return x @ kernels["fc2"] + biases["fc2"][None]


def golden_params():
    return {kind: {name: jnp.asarray(GOLDEN[f"{kind}/{name}"]) for name in LAYERS} for kind in ("kernel", "bias")}


def golden_loss(temperature):
    def loss(params):
        logits = network(params, GOLDEN["images"]) / temperature
        return optax.softmax_cross_entropy_with_integer_labels(logits, GOLDEN["labels"]).mean()

    return loss


def check_golden(method, scores, masks, divided_by):
    for name in LAYERS:
        found = np.asarray(scores["kernel"][name]) / divided_by
        np.testing.assert_allclose(found, GOLDEN[f"{method}/score/{name}"], rtol=1e-10, err_msg=name)
        np.testing.assert_array_equal(masks["kernel"][name], GOLDEN[f"{method}/mask/{name}"], err_msg=name)
        assert masks["bias"][name].shape == ()


def test_scores_of_the_loss_are_those_of_the_authors_code():
    @jax.jit
    def pruned(params):
        found = {"snip": saliency.snip(golden_loss(1.0), params), "grasp": saliency.grasp(golden_loss(200.0), params)}
        return {name: (scores, jaxsparse.score_masks(params, scores, 0.9, scope="global"))
                for name, scores in found.items()}  # fmt: skip

    with jax.enable_x64(True):
        for method, (scores, masks) in pruned(golden_params()).items():
            total = abs(sum(float(score.sum()) for score in scores["kernel"].values()))
            check_golden(method, scores, masks, total + (1e-10 if method == "grasp" else 0.0))


def test_synflow_and_its_rounds_are_those_of_the_authors_code():
    with jax.enable_x64(True):
        params, inputs = golden_params(), jax.ShapeDtypeStruct((1, 8, 8, 2), jnp.float64)
        scores = jax.jit(lambda params: saliency.synflow(network, params, inputs))(params)
        check_golden("synflow", scores, saliency.synflow_masks(network, params, inputs, 0.9), 1.0)


def test_grasp_by_hand():
    # L = a^2 c + b a at a = 1, c = 2, b = 0: dL/da = 2 a c + b = 4, dL/dc = a^2 = 1, dL/db = a = 1. The rows of the
    # Hessian: of a (2 c, 2 a, 1) = (4, 2, 1), of c (2 a, 0, 0) = (2, 0, 0), of b (1, 0, 0), for (a, c, b).
    # Without b in g, H g = (4 * 4 + 2, 2 * 4, 4) = (18, 8, 4), times the weights (18, 16, 0); with it a has 19.
    params = {"a": jnp.ones((1, 1)), "c": jnp.full((1, 1), 2.0), "bias": jnp.zeros(1), "n": jnp.ones((), int)}

    def loss(params):
        return jnp.sum(params["a"] ** 2 * params["c"]) + jnp.sum(params["bias"][None] * params["a"])

    scores = saliency.grasp(loss, params)
    assert jax.tree.map(lambda s: s.sum().item(), scores) == {"a": 18.0, "c": 16.0, "bias": 0.0, "n": 0.0}
    everything = saliency.grasp(loss, params, prunable={"a": True, "c": True, "bias": True, "n": False})
    assert everything["a"].item() == 19.0
    assert saliency.snip(loss, params)["c"].item() == 2.0


def two_layers(params, x):
    return (x @ params["fc1"]["kernel"] + params["fc1"]["bias"][None]) @ params["fc2"]["kernel"]


def two_layer_params():
    keys = jax.random.split(jax.random.key(0), 3)
    fc1 = {"kernel": jax.random.normal(keys[0], (6, 5)), "bias": jax.random.normal(keys[1], (5,))}
    return {"fc1": fc1, "fc2": {"kernel": jax.random.normal(keys[2], (5, 3))}}


def plain_loop(params, sparsity, rounds):
    """SynFlow of two linear layers by its formula, in NumPy; k smallest removed as in the authors' code."""
    weights = [np.abs(np.asarray(params[name]["kernel"], np.float64)) for name in ("fc1", "fc2")]
    bias, sizes = np.abs(np.asarray(params["fc1"]["bias"], np.float64)), [w.size for w in weights]
    kept = np.ones(sum(sizes), bool)
    for e in range(1, rounds + 1):
        first, second = (w * m.reshape(w.shape) for w, m in zip(weights, np.split(kept, sizes[:1]), strict=True))
        flow = np.concatenate([(first * second.sum(1)).ravel(), (second * (first.sum(0) + bias)[:, None]).ravel()])
        gone = int((1 - (1 - sparsity) ** (e / rounds)) * len(kept))
        kept = np.ones(len(kept), bool)
        kept[np.lexsort((-np.arange(len(kept)), flow))[:gone]] = False
    return kept


def flat(masks):
    return np.concatenate([np.ravel(masks[name]["kernel"]) for name in ("fc1", "fc2")])


@pytest.mark.slow
def test_synflow_masks_are_those_of_a_plain_loop_inside_of_jit_too():
    params, inputs = two_layer_params(), jnp.zeros((1, 6))
    for sparsity, rounds in ((0.8, 1), (0.7, 7)):
        masks = saliency.synflow_masks(two_layers, params, inputs, sparsity, rounds)
        np.testing.assert_array_equal(flat(masks), plain_loop(params, sparsity, rounds))
        assert masks["fc1"]["bias"].shape == ()
    lanes = jax.tree.map(lambda p: jnp.stack([p, jnp.flip(p)]), params)
    found = jax.jit(jax.vmap(lambda params: saliency.synflow_masks(two_layers, params, inputs, 0.7, 7)))(lanes)
    for lane in (0, 1):
        expected = plain_loop(jax.tree.map(lambda p, i=lane: p[i], lanes), 0.7, 7)
        np.testing.assert_array_equal(flat(jax.tree.map(lambda m, i=lane: m[i], found)), expected)


@pytest.mark.slow
def test_synflow_loses_no_layer_and_takes_structures():
    keys = jax.random.split(jax.random.key(1), 3)
    widths = (30, 40, 4, 30)  # the middle layers lose their few connections last
    params = {f"fc{i}": jax.random.normal(k, widths[i : i + 2]) for i, k in enumerate(keys)}

    def apply(params, x):
        return jax.nn.relu(jax.nn.relu(x @ params["fc0"]) @ params["fc1"]) @ params["fc2"]

    masks = saliency.synflow_masks(apply, params, jnp.ones((1, 30)), 0.99)
    assert sum(int(m.sum()) for m in masks.values()) == 15  # 1480 - int(0.99 * 1480)
    assert min(int(m.sum()) for m in masks.values()) >= 1
    flow = saliency.synflow(apply, jaxsparse.apply_masks(params, masks), jnp.ones((1, 30)))
    sums = [float(score.sum()) for score in flow.values()]
    np.testing.assert_allclose(sums, sums[0], rtol=1e-5)  # what flows in flows out
    assert sums[0] > 0
    structure = {"fc0": jaxsparse.block(2, 4)}
    masks = saliency.synflow_masks(apply, params, jnp.ones((1, 30)), 0.98, 5, structure=structure, at_least=9)
    assert jaxsparse.block(2, 4).holds(masks["fc0"])
    assert all(int(m.sum()) >= fewest for m, fewest in zip(masks.values(), (9 * 8, 9, 9), strict=True))


@pytest.mark.slow
def test_fisher_diagonal_is_the_mean_of_squares():
    params, inputs = two_layer_params(), jax.random.normal(jax.random.key(3), (4, 6))

    def loss(params, x):
        return jnp.sum(jnp.tanh(two_layers(params, x["x"][None])))

    found = saliency.fisher_diagonal(loss, params, {"x": inputs})
    each = [jax.grad(loss)(params, {"x": x}) for x in inputs]
    expected = jax.tree.map(lambda *g: np.mean(np.square(g), axis=0), *each)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


def test_numbers_are_weights():
    scores = saliency.lamp({"s": 2.0, "w": np.array([3.0, 4.0])})
    assert float(scores["s"]) == 1
    np.testing.assert_allclose(scores["w"], [9 / 25, 1])
    assert saliency.snip(lambda p: 3 * p["s"], {"s": 2.0})["s"] == 6


def test_low_precision_weights_have_scores_of_32_bits():
    def scores(params):
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        loss = lambda params: jnp.sum(two_layers(params, jnp.ones((1, 6), jnp.bfloat16)))  # noqa: E731
        return (
            saliency.snip(loss, params),
            saliency.grasp(loss, params),
            saliency.synflow(two_layers, params, jnp.ones((1, 6), jnp.bfloat16)),
            saliency.fisher_diagonal(lambda params, x: loss(params) * x, params, jnp.ones(2, jnp.bfloat16)),
            saliency.gradient_times_weight(params, params),
            saliency.movement(params, params),
            saliency.squared_gradient(params, params),
        )

    found = jax.eval_shape(scores, two_layer_params())
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("score", [saliency.snip, saliency.grasp])
def test_a_loss_that_is_no_scalar_is_an_error(score):
    params = {"w": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match=r"the loss must return a scalar, .*; got float32\[2, 3\]"):
        score(lambda params: params["w"], params)
    with pytest.raises(ValueError, match=r"the loss must return a scalar, .*; got \('float32\[\]', 'int32\[\]'\)"):
        score(lambda params: (params["w"].sum(), jnp.ones((), int)), params)
    with pytest.raises(ValueError, match=r"the params have no floats to score, got \['int32'\]"):
        score(lambda params: params["w"].sum(), {"w": jnp.ones((2, 3), int)})


def test_batches_that_count_no_examples_are_an_error():
    for batch in (jnp.ones(()), (jnp.ones(3), jnp.ones(4)), jnp.ones((0, 2)), ()):
        with pytest.raises(ValueError, match="the arrays of batch have the examples along their first axis, got"):
            saliency.fisher_diagonal(lambda params, x: jnp.sum(params["w"]), {"w": jnp.ones(2)}, batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity is the fraction of zeros and must be in \[0, 1\), got 1.0"),
        ({"sparsity": {"fc1/kernel": 0.5}}, "sparsity must be a number"),
        ({"rounds": 0}, "rounds must be an int of at least 1, got 0"),
        ({"rounds": 2.0}, "rounds must be an int of at least 1, got 2.0"),
        ({"inputs": jnp.ones((1, 6), int)}, "as floats, got inputs of dtype int32"),
        ({"apply": lambda params, x: (x, x)}, r"apply must return one array of floats, .*, got \('float32\[1, 6\]'"),
        (
            {"structure": {"fc2/kernel": jaxsparse.n_of_m(1, 5)}},
            r"n_of_m\(1, 5\) of fc2/kernel has as many in every group: score_masks",
        ),
        ({"prunable": "fc3"}, "prunable: 'fc3' matches none"),
    ],
)
def test_bad_options_of_synflow_masks(change, message):
    options = {"apply": two_layers, "params": two_layer_params(), "inputs": jnp.ones((1, 6)), "sparsity": 0.5, **change}
    with pytest.raises(ValueError, match=message):
        saliency.synflow_masks(**options)


def test_a_flow_that_overflows_is_an_error_and_one_that_stops_is_said():
    deep = {f"fc{i}": jnp.full((20, 20), 1e10) for i in range(4)}

    def apply(params, x):
        for kernel in params.values():
            x = x @ kernel
        return x

    for find in (saliency.synflow, lambda *args: saliency.synflow_masks(*args, 0.5, 1)):
        with pytest.raises(ValueError, match="synflow: scores of fc0, .* are not finite: .*jax.enable_x64"):
            find(apply, deep, jnp.ones((1, 20)))
    dead = {"fc0": jnp.ones((20, 20)), "fc1": jnp.zeros((20, 20))}
    with (
        pytest.warns(UserWarning, match="nothing flows through fc0, fc1, so their scores are all 0"),
        pytest.warns(UserWarning, match=r"no weight is left in fc1 \(of 400 weights\)"),
    ):
        saliency.synflow_masks(apply, dead, jnp.ones((1, 20)), 0.5, 1)
