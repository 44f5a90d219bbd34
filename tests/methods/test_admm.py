import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from tests.problems import make_params

GOLDEN = Path(__file__).parents[1] / "golden" / "admm.npz"


@pytest.mark.parametrize("name", ["admm", "safe"])
def test_it_follows_the_authors_code(name):
    golden = np.load(GOLDEN)
    meta = json.loads(str(golden["meta"]))
    params = {layer: {"kernel": jnp.asarray(golden[f"init/{layer}"])} for layer in "ab"}
    decay = optax.add_decayed_weights(meta["weight_decay"])
    inner = optax.chain(decay, optax.sgd(meta["learning_rate"], momentum=meta["momentum"]))
    penalty = meta["penalty"] if name == "admm" else jaxsparse.rising_cosine(meta["penalty"], meta["steps"])
    tx = jaxsparse.admm(inner, meta["sparsity"], every=meta["every"], penalty=penalty)
    if name == "safe":
        ascent = optax.chain(optax.contrib.normalize(), optax.sgd(meta["radius"]))
        tx = optax.contrib.sam(tx, ascent, opaque_mode=True)

    def gradient(params, _=None):
        def loss(params):
            hidden = jnp.tanh(golden["x"] @ params["a"]["kernel"])
            return jnp.mean((hidden @ params["b"]["kernel"] - golden["y"]) ** 2)

        return jax.grad(loss)(params)

    @jax.jit
    def step(params, opt_state):
        extra = {"grad_fn": gradient} if name == "safe" else {}
        updates, opt_state = tx.update(gradient(params), opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for t in range(meta["steps"]):
        params, opt_state = step(params, opt_state)
        state = opt_state.opt_state if name == "safe" else opt_state
        for layer in "ab":
            for field, tree in (("params", params), ("z", state.target), ("u", state.dual)):
                expected = golden[f"{name}/{field}/{layer}"][t]
                np.testing.assert_allclose(tree[layer]["kernel"], expected, atol=2e-6, err_msg=f"{field} {layer} {t}")
        if (t + 1) % meta["every"] == 0:
            largest = jaxsparse.magnitude_masks(params, meta["sparsity"], allocation="global")
            jax.tree.map(np.testing.assert_array_equal, jaxsparse.get_masks(opt_state), largest)
            assert int(jaxsparse.count(largest)) == 10
        jaxsparse.check(opt_state, params)


def test_six_weights_by_hand():
    """Half of the weights, SGD with rate 1/2 and a penalty of 1/2, so w moves by -(w - z + u) / 4; every 2 steps.

    step  w                                          z                 u
    -     6, -5, 4, 3, -2, 1                         6, -5, 4, 0, 0, 0 0
    0     6, -5, 4, 2.25, -1.5, .75                  the same          0
    1     6, -5, 4, 1.6875, -1.125, .5625            the same          0, 0, 0, 1.6875, -1.125, .5625
    2     6, -5, 4, .84375, -.5625, .28125 + 8       the same          the same
    3     6, -5, 4, .2109375, -.140625, 6.0703125    6, -5, 0, 0, 0,   0, 0, 4, 1.8984375, -1.265625, 0
                                                     6.6328125

    In step 2 a gradient of -16 lifts the last weight by 8, and then it is among the largest, in place of the 4.
    """
    params = {"kernel": jnp.array([[6.0, -5, 4], [3, -2, 1]]), "bias": jnp.ones(3)}
    tx = jaxsparse.admm(optax.sgd(0.5), 0.5, every=2, penalty=0.5)
    opt_state = tx.init(params)
    params = jaxsparse.sparsify(opt_state, params)  # changes nothing
    first = [6, -5, 4, 0, 0, 0]
    table = (
        (0, [6, -5, 4, 2.25, -1.5, 0.75], first, [0] * 6, [1] * 6),
        (0, [6, -5, 4, 1.6875, -1.125, 0.5625], first, [0, 0, 0, 1.6875, -1.125, 0.5625], [1, 1, 1, 0, 0, 0]),
        (-16, [6, -5, 4, 0.84375, -0.5625, 8.28125], first, [0, 0, 0, 1.6875, -1.125, 0.5625], [1, 1, 1, 0, 0, 0]),
        (
            0,
            [6, -5, 4, 0.2109375, -0.140625, 6.0703125],
            [6, -5, 0, 0, 0, 6.6328125],
            [0, 0, 4, 1.8984375, -1.265625, 0],
            [1, 1, 0, 0, 0, 1],
        ),
    )
    for of_last, weights, target, dual, mask in table:
        grads = {"kernel": jnp.zeros((2, 3)).at[1, 2].set(of_last), "bias": None}
        updates, opt_state = tx.update(grads, opt_state, params)
        assert updates["bias"] is None
        params = {**params, "kernel": params["kernel"] + updates["kernel"]}
        np.testing.assert_array_equal(params["kernel"].reshape(-1), weights)
        np.testing.assert_array_equal(opt_state.target["kernel"].reshape(-1), target)
        np.testing.assert_array_equal(opt_state.dual["kernel"].reshape(-1), dual)
        evaluated = jaxsparse.eval_params(opt_state, params)
        np.testing.assert_array_equal(evaluated["kernel"].reshape(-1), np.multiply(weights, mask))
        jaxsparse.check(opt_state, params)


@pytest.mark.slow
def test_layers_by_themselves_units_and_the_fewest():
    params = make_params()
    sizes = {"attention": 256, "conv": 144, "dense": 384}
    for options, counts in (
        ({"scope": "layer"}, {name: size // 4 for name, size in sizes.items()}),
        ({"scope": "layer", "sparsity": 1.0, "at_least": 5}, dict.fromkeys(sizes, 5)),
        ({"sparsity": 1.0, "at_least": 5}, dict.fromkeys(sizes, 5)),
    ):
        tx = jaxsparse.admm(optax.sgd(0.1), **{"sparsity": 0.75, **options})
        target = jax.jit(tx.init)(params).target
        assert {name: int((target[name]["kernel"] != 0).sum()) for name in sizes} == counts, options
    structure = {"dense/kernel": jaxsparse.block(4, 4), "conv/kernel": "kernel", "*": "weight"}
    target = jax.jit(jaxsparse.admm(optax.sgd(0.1), 0.75, scope="layer", structure=structure).init)(params).target
    assert jaxsparse.block(4, 4).holds(target["dense"]["kernel"] != 0)
    assert int((target["dense"]["kernel"] != 0).sum()) == 96


def test_what_goes_wrong_is_said():
    for options, message in (
        ({"sparsity": 1.5}, "sparsity must be at least 0 and at most 1, got 1.5"),
        ({"sparsity": None}, "sparsity must be a number, got None"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"penalty": -1.0}, "penalty must be at least 0, got -1.0"),
        ({"penalty": None}, "penalty must be a number or a schedule, got NoneType"),
        ({"scope": "lamp"}, 'scope must be "global" or "layer", got \'lamp\''),
        ({"structure": "row"}, "structure must be one of"),
        ({"inner": 0.1}, "admm: inner must be an optimizer, .* got 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            jaxsparse.admm(**{"inner": optax.sgd(0.1), "sparsity": 0.9, **options})
    params = {"kernel": jnp.ones((2, 2))}
    opt_state = jaxsparse.admm(optax.sgd(0.1), 0.5).init(params)
    with pytest.raises(jaxsparse.SparsityError, match="admm: the weights of kernel are not finite"):
        jaxsparse.check(opt_state, {"kernel": jnp.full((2, 2), jnp.nan)})


@pytest.mark.slow
def test_sam_that_shows_its_steps_is_refused():
    # It would blend the masks with numbers.
    params = {"kernel": jnp.arange(4.0).reshape(2, 2)}
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    tx = optax.contrib.sam(jaxsparse.admm(optax.sgd(0.1), 0.5), ascent)
    updates, opt_state = tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="give it opaque_mode=True"):
        tx.update(params, opt_state, optax.apply_updates(params, updates))


@pytest.mark.slow
def test_a_schedule_of_the_penalty_can_be_injected():
    params, schedule = make_params(), optax.linear_schedule(0.0, 0.5, 4)
    static = ("inner", "scope", "structure", "prunable", "layout")
    injected = optax.inject_hyperparams(jaxsparse.admm, static_args=static)
    ends = []
    for tx in (injected(optax.sgd(0.1), 0.5, every=2, penalty=schedule),
               jaxsparse.admm(optax.sgd(0.1), 0.5, every=2, penalty=schedule)):  # fmt: skip
        p, opt_state, update = params, tx.init(params), jax.jit(tx.update)
        for _ in range(4):
            updates, opt_state = update(p, opt_state, p)
            p = optax.apply_updates(p, updates)
        ends.append((p, jaxsparse.get_masks(opt_state)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *ends)
