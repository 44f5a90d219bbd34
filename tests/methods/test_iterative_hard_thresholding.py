import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from jaxsparse.trees import by_path
from tests.problems import SPARSE, SPARSE_SIZE, gradients, make_params, make_step, slow_except

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "iterative_hard_thresholding.npz"


def test_golden_trajectories():
    data = np.load(GOLDEN)

    def tree(group, at=...):
        return {layer: {name: jnp.asarray(data[f"{group}/{layer}/{name}"][at]) for name in ("kernel", "bias")}
                for layer in ("conv", "fc")}  # fmt: skip

    cubic = jnp.asarray(data["zeros"]) / (216 + 720)
    for name, scope, sparsity in (
        ("global", "global", 0.9),
        ("layer", "layer", 0.9),
        ("cubic", "global", lambda step: cubic[jnp.minimum(step, 9)]),
    ):
        tx = optax.chain(optax.sgd(0.2, momentum=0.9), jaxsparse.iterative_hard_thresholding(sparsity, scope=scope))
        params = tree("init")
        opt_state, update = tx.init(params), jax.jit(tx.update)
        for t in range(10):
            updates, opt_state = update(tree("grads", t), opt_state, params)
            params = optax.apply_updates(params, updates)
            for path, found in by_path(params).items():
                expected = data[f"{name}/{path}"][t]
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
                if path.endswith("kernel"):
                    np.testing.assert_array_equal(found != 0, expected != 0)
                    np.testing.assert_array_equal(found != 0, jaxsparse.get_masks(opt_state)[path[:-7]]["kernel"])


def largest(values, kept):
    """Bool of the shape of a vector: its largest magnitudes, of equal ones those that come first."""
    mask = np.zeros(len(values), bool)
    mask[np.argsort(-np.abs(values), kind="stable")[:kept]] = True
    return mask


@pytest.mark.parametrize(("scope", "every"), slow_except([("global", 3)], [("layer", 1), ("global", 3)]))
def test_against_a_loop(scope, every):
    """SGD with momentum in NumPy, and after every step, or every third, the largest stay."""
    params = make_params()
    tx = optax.chain(
        optax.sgd(0.5, momentum=0.5), jaxsparse.iterative_hard_thresholding(0.75, scope=scope, every=every)
    )
    opt_state, step = tx.init(params), make_step(tx)
    kept = {path: np.ones(p.shape, bool) for path, p in by_path(params).items()}
    momentum = {path: np.zeros(p.shape, np.float32) for path, p in by_path(params).items()}
    returned = 0
    for count in range(7):
        grads, weights = by_path(gradients(params, count)), by_path(params)
        momentum = {path: np.asarray(grads[path]) + np.float32(0.5) * m for path, m in momentum.items()}
        moved = {path: np.asarray(p) - np.float32(0.5) * momentum[path] for path, p in weights.items()}
        if count % every == 0:
            before = kept
            flat = {path: moved[path].reshape(-1) for path in SPARSE}
            if scope == "layer":
                found = {path: largest(x, x.size - round(0.75 * x.size)) for path, x in flat.items()}
            else:
                every_one = largest(np.concatenate([*flat.values()]), SPARSE_SIZE - round(0.75 * SPARSE_SIZE))
                ends = np.cumsum([x.size for x in flat.values()])[:-1]
                found = dict(zip(SPARSE, np.split(every_one, ends), strict=True))
            kept = kept | {path: mask.reshape(moved[path].shape) for path, mask in found.items()}
            returned += sum(int((kept[path] & ~before[path]).sum()) for path in SPARSE)
        params, opt_state = step(params, opt_state, count)
        masks = by_path(jaxsparse.get_masks(opt_state))
        for path, p in by_path(params).items():
            np.testing.assert_array_equal(np.broadcast_to(masks[path], p.shape), kept[path], err_msg=path)
            np.testing.assert_allclose(p, np.where(kept[path], moved[path], 0), rtol=1e-5, atol=1e-6)
    jaxsparse.check(opt_state, params)
    assert returned > 10


def test_a_weight_returns_with_the_update_that_exceeds_another():
    #   start  3 1 0 0, two stay: 3 and 1. SGD of rate 1, and a gradient of -0.4 on the third.
    #   with momentum 1 its update grows: 0.4, 0.8 and 1.2, by which it returns, and the weight of 1 goes.
    params = {"kernel": jnp.asarray([[3.0, 1.0, 0.0, 0.0]])}
    tx = optax.chain(optax.sgd(1.0, momentum=1.0), jaxsparse.iterative_hard_thresholding(0.5))
    opt_state, grads = tx.init(params), {"kernel": jnp.asarray([[0.0, 0.0, -0.4, 0.0]])}
    for expected in ([3, 1, 0, 0], [3, 1, 0, 0], [3, 0, 1.2, 0], [3, 0, 2.8, 0]):
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["kernel"][0], expected, rtol=1e-6)
    # A NaN in the update ranks last, and is counted.
    _, opt_state = tx.update({"kernel": jnp.asarray([[jnp.nan, 0, 0, 0]])}, opt_state, params)
    assert jaxsparse.get_masks(opt_state)["kernel"].tolist() == [[False, True, True, False]]
    with pytest.raises(jaxsparse.SparsityError, match="iterative_hard_thresholding: 1 NaN"):
        jaxsparse.check(opt_state)


@pytest.mark.slow
def test_units_n_of_m_and_low_precision():
    structure = {"attention/kernel": jaxsparse.block(2, 4), "dense/kernel": jaxsparse.n_of_m(1, 4)}
    params = make_params(jnp.bfloat16)
    link = jaxsparse.iterative_hard_thresholding(optax.linear_schedule(0.0, 0.75, 3), structure=structure, at_least=1)
    opt_state, step = link.init(params), make_step(link)
    for count in range(5):
        params, opt_state = step(params, opt_state, count)
    jaxsparse.check(opt_state, params)
    masks = jaxsparse.get_masks(opt_state)
    assert jaxsparse.block(2, 4).holds(masks["attention"]["kernel"].reshape(16, 16))
    assert jaxsparse.n_of_m(1, 4).holds(masks["dense"]["kernel"])
    assert int(opt_state.kept) == SPARSE_SIZE // 4
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


@pytest.mark.slow
def test_numbers_may_be_injected():
    factory = optax.inject_hyperparams(jaxsparse.iterative_hard_thresholding, static_args=("scope",))
    ends = []
    for link in (factory(0.75, every=2), jaxsparse.iterative_hard_thresholding(0.75, every=2)):
        params, step = make_params(), make_step(link)
        opt_state = link.init(params)
        for count in range(3):
            params, opt_state = step(params, opt_state, count)
        ends.append(params)
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_bad_options_are_named():
    for options, words in (
        ({"sparsity": -0.5}, "sparsity must be at least 0 and at most 1, got -0.5"),
        ({"sparsity": lambda t: t / 500}, "sparsity of step 1000 must be at least 0 and at most 1, got 2"),
        ({"sparsity": optax.constant_schedule(float("nan"))}, "sparsity of step 0 must be at least 0"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"every": 1.5}, "every must be a whole number of steps, got 1.5"),
        ({"scope": "lamp"}, r"scope must be one of \['layer', 'global'\], got 'lamp'"),
        ({"at_least": -1}, "at_least must be at least 0"),
        ({"structure": "row"}, "structure must be one of"),
    ):
        with pytest.raises(ValueError, match=words):
            jaxsparse.iterative_hard_thresholding(**{"sparsity": 0.9, **options})


@pytest.mark.parametrize("method", [jaxsparse.iterative_hard_thresholding, jaxsparse.magnitude_pruning])
def test_a_schedule_that_is_nan_on_a_step_prunes_nothing_there(method):
    params = {"w": jnp.arange(1.0, 9.0).reshape(2, 4)}
    options = {"every": 1} if method is jaxsparse.magnitude_pruning else {}
    tx = optax.chain(optax.sgd(0.0), method(lambda step: jnp.where(step == 3, jnp.nan, 0.5), **options))
    opt_state = tx.init(params)
    for _ in range(4):
        updates, opt_state = tx.update(params, opt_state, params)
        params = optax.apply_updates(params, updates)
    kept = jaxsparse.get_masks(opt_state)["w"]
    assert int(kept.sum()) == (8 if method is jaxsparse.iterative_hard_thresholding else 4)
