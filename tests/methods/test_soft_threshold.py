import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from tests.problems import make_params


def test_weights_are_lost_and_come_back_with_the_threshold():
    """Six weights, SGD with rate 1 and a weight decay of 1/2; sigmoid(0) = 0.5 with slope 0.25.

    step  gradient         of w       w then                       of s                       s then  threshold
    -                                 1, -1, .75, -.25, .5, 2                                 0       .5
    0     1, 1, 1, 1, 1, 1 1,1,1,0,0,1  1/2 w - that: -.5, -1.5,   -.25 (1 - 1 + 1 + 1) = -.5  .5      .62246
                                      -.625, -.125, .25, 0
    1     0, 2, 4, 9, 9, 9 0,2,4,0,0,0  -.25, -2.75, -4.3125,      .23500 (2 + 4) = 1.41002   .25 -   .23866
                                      -.0625, .125, 0                                         1.41002

    In step 0 the -.25 and the .5 are not above the threshold, .5. In step 1 all but the second and third are below
    .62246, where the slope is .62246 (1 - .62246) = .23500. Then the first one, of size .25, is above it again.
    """
    params = {"kernel": jnp.array([[1.0, -1.0, 0.75], [-0.25, 0.5, 2.0]])}
    tx = jaxsparse.soft_threshold(optax.chain(optax.add_decayed_weights(0.5), optax.sgd(1.0)), init=0.0)
    opt_state = tx.init(params)
    params = jaxsparse.eval_params(opt_state, params)
    np.testing.assert_array_equal(params["kernel"], [[0.5, -0.5, 0.25], [0, 0, 1.5]])
    for grads, latents, s, threshold in (
        ([1.0] * 6, [-0.5, -1.5, -0.625, -0.125, 0.25, 0], 0.5, 0.6224593),
        ([0.0, 2.0, 4.0, 9.0, 9.0, 9.0], [-0.25, -2.75, -4.3125, -0.0625, 0.125, 0], -1.1600223, 0.2386633),
    ):
        updates, opt_state = tx.update({"kernel": jnp.array(grads).reshape(2, 3)}, opt_state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(opt_state.weights["kernel"].reshape(-1), latents, rtol=1e-6)
        np.testing.assert_allclose(opt_state.own.raw["kernel"], [[s]], rtol=1e-6)
        shrunk = np.sign(latents) * np.maximum(np.abs(latents) - threshold, 0)
        np.testing.assert_allclose(params["kernel"].reshape(-1), shrunk, atol=1e-6)
        np.testing.assert_array_equal(jaxsparse.get_masks(opt_state)["kernel"].reshape(-1), shrunk != 0)
        jaxsparse.check(opt_state, params)


@pytest.mark.parametrize("scope", ["layer", pytest.param("channel", marks=pytest.mark.slow)])
def test_it_is_the_papers_formula_differentiated(scope):
    axes = {"attention": (0,), "conv": (0, 1, 2), "dense": (0,)} if scope == "channel" else {}
    dense = {"dense": make_params()["dense"], "conv": make_params()["conv"]}
    optimizer = optax.chain(optax.add_decayed_weights(0.05), optax.sgd(0.02, momentum=0.9))
    tx = jaxsparse.soft_threshold(optimizer, init=-1.0, scope=scope)

    def loss(params):
        return sum(jnp.sum(jnp.cos(2 * p + len(name))) for name, p in jax.tree.leaves_with_path(params))

    def seen(weights, raw):
        def shrink(w, s):
            return jnp.sign(w) * jax.nn.relu(jnp.abs(w) - jax.nn.sigmoid(s))

        kernels = {name: {"kernel": shrink(weights[name]["kernel"], raw[name])} for name in raw}
        return {name: {**weights[name], **kernels[name]} for name in weights}

    @jax.jit
    def both(carry):
        pair, pair_state, params, opt_state = carry
        moves, pair_state = optimizer.update(jax.grad(lambda pair: loss(seen(*pair)))(pair), pair_state, pair)
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(pair, moves), pair_state, optax.apply_updates(params, updates), opt_state

    first = {name: jnp.full([1 if not axes or d in axes[name] else n for d, n in enumerate(leaf["kernel"].shape)], -1.0)
             for name, leaf in dense.items()}  # fmt: skip
    opt_state = tx.init(dense)
    carry = (dense, first), optimizer.init((dense, first)), jaxsparse.eval_params(opt_state, dense), opt_state
    densities = []
    for _ in range(8):
        carry = both(carry)
        (weights, raw), _, params, opt_state = carry
        for name in dense:
            np.testing.assert_allclose(opt_state.weights[name]["kernel"], weights[name]["kernel"], atol=1e-6)
            np.testing.assert_allclose(opt_state.own.raw[name]["kernel"], raw[name], atol=2e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), params, seen(weights, raw))
        densities.append(float(jaxsparse.density(jaxsparse.get_masks(opt_state))))
        jaxsparse.check(opt_state, params)
    assert len(set(densities)) > 3
    assert 0.2 < densities[-1] < 0.95


def test_who_shares_a_threshold_and_its_dtype():
    params = {"layers": jnp.ones((3, 4, 5), jnp.bfloat16), "bias": jnp.ones(5, jnp.bfloat16)}
    layout = {"layers": jaxsparse.Layout(inputs=1, outputs=2, stack=0)}
    for scope, shape in (("layer", (3, 1, 1)), ("channel", (3, 1, 5))):
        tx = jaxsparse.soft_threshold(optax.sgd(0.1), scope=scope, layout=layout)
        raw = jax.eval_shape(tx.init, params).own.raw
        assert raw["layers"].shape == shape
        assert raw["layers"].dtype == jnp.float32
        assert isinstance(raw["bias"], optax.MaskedNode)


def test_thresholds_may_have_an_optimizer_of_their_own():
    params = {"kernel": jnp.array([[1.0, -1.0], [0.25, 4.0]])}
    tx = jaxsparse.soft_threshold(optax.sgd(0.5), init=0.0, threshold_optimizer=optax.sgd(4.0))
    _, opt_state = tx.update({"kernel": jnp.ones((2, 2))}, tx.init(params), params)
    # -0.25 (1 - 1 + 1), times -4
    np.testing.assert_array_equal(opt_state.own.raw["kernel"], [[1.0]])
    # Leaves without a gradient leave it where it is.
    _, opt_state = tx.update({"kernel": None}, tx.init(params), params)
    np.testing.assert_array_equal(opt_state.own.raw["kernel"], [[0.0]])
    pruned = jaxsparse.chain(optax.sgd(0.5), jaxsparse.magnitude_pruning(0.5))
    with pytest.raises(ValueError, match="soft_threshold: inner has a sparse link in it"):
        jaxsparse.soft_threshold(pruned).init(params)


def test_what_goes_wrong_is_said():
    for options, message in (
        ({"scope": "global"}, 'scope must be "layer" or "channel", got \'global\''),
        ({"init": float("nan")}, "init must be a finite number, got nan"),
        ({"threshold_optimizer": 0.1}, "threshold_optimizer must be an optimizer, .* got 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            jaxsparse.soft_threshold(optax.sgd(0.1), **options)
    params = {"kernel": jnp.ones((2, 2))}
    opt_state = jaxsparse.soft_threshold(optax.sgd(0.1)).init(params)
    lost = opt_state._replace(own=opt_state.own._replace(raw={"kernel": jnp.full((1, 1), jnp.nan)}))
    with pytest.raises(jaxsparse.SparsityError, match="the threshold of kernel is not finite"):
        jaxsparse.check(lost, params)


def test_matrices_that_start_at_zero_are_named():
    params = {"body": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.zeros((2, 2))}}
    with pytest.warns(UserWarning, match=r"soft_threshold: head/kernel is zero, .* prunable=jaxsparse\.all_but"):
        jaxsparse.soft_threshold(optax.sgd(0.1)).init(params)
