import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from tests.problems import SPARSE_SIZE, make_params, make_step, slow_except

# By hand, on sixteen weights in two layers, with SGD of rate 1 and momentum 0.5. Four of them are missing at the start.
# Masks change on steps 2 and 4, where half of every layer, rounded up, is exchanged, and j is 1 and 2 = j_f:
#            s_1 = 0.75 - 0.5 / 8 = 11/16, so that 5 are kept, and s_2 = 0.75, so that 4 are.
#            a: 9 -8 7 3 2 1 0.5 . . .                 b: 6 -2.5 1.5 0.75 0.25 .
#   step 0   a[0] has the gradient 1, b[0] -1: 9 becomes 8, and 6 becomes 7.
#   step 1   By the momentum 8 becomes 7.5, and 7 becomes 7.5.
#   step 2   Pruned together: the largest are 8, 7.5, 7.5, 7, 3, so a keeps [0, 1, 2, 3], and b [0].
#            a drops 2 of 4, 3 and 7. Its gradients are 2, 3, -1 on [5, 7, 9], so [5, 7] grow: 7 starts at 0 with a
#            momentum of 0, but 5, pruned in this very step, was never gone: it keeps 1 and moves by its gradient to -1.
#            b drops 1 of 1. Its gradients are -3, 4 on [2, 5]: 5 grows, and starts at 0 with a momentum of 0.
#            a[0] moves by its momentum, 0.25, to 7.25.
#   step 3   Gradients of 1 on a[7] and 2 on b[5]: they become -1 and -2, with their momenta a[0] 7.125, a[5] -2.
#   step 4   Pruned together: the largest are 8, 7.125, 2, 2, so a loses [7] and keeps [0, 1, 5], b [5].
#            a drops 2 of 3, [5] and [0], and its only gradient is 5 on [2]. So [2] grows, and by its index [0], which
#            keeps its value and moves by its momentum, to 7.0625. b drops [5]. Its gradients are 1, -0.5 on [0, 1], so
#            [0] grows.
#   step 5   Gradients of -1 on a[2] and 2 on b[0], which had a momentum of 0: they become 1 and -2. a[0]: 7.03125.
A = [9, -8, 7, 3, 2, 1, 0.5, 0, 0, 0]
B = [6, -2.5, 1.5, 0.75, 0.25, 0]
GRADS = [  # index -> gradient, of a and of b
    ({0: 1}, {0: -1}),
    ({}, {}),
    ({5: 2, 7: 3, 9: -1}, {2: -3, 5: 4}),
    ({7: 1}, {5: 2}),
    ({2: 5}, {0: 1, 1: -0.5}),
    ({2: -1}, {0: 2}),
]
ENDS = [
    ([8, -8, 7, 3, 2, 1, 0.5, 0, 0, 0], [7, -2.5, 1.5, 0.75, 0.25, 0]),
    ([7.5, -8, 7, 3, 2, 1, 0.5, 0, 0, 0], [7.5, -2.5, 1.5, 0.75, 0.25, 0]),
    ([7.25, -8, 0, 0, 0, -1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]),
    ([7.125, -8, 0, 0, 0, -2, 0, -1, 0, 0], [0, 0, 0, 0, 0, -2]),
    ([7.0625, -8, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]),
    ([7.03125, -8, 1, 0, 0, 0, 0, 0, 0, 0], [-2, 0, 0, 0, 0, 0]),
]
MASKS = {2: ([0, 1, 5, 7], [5]), 4: ([0, 1, 2], [0])}


def test_by_hand():
    params = {"a": jnp.asarray(A, jnp.float32), "b": jnp.asarray(B, jnp.float32)}
    link = jaxsparse.granet(
        0.75, 2, initial_sparsity=0.25, end=4, drop_fraction=optax.constant_schedule(0.5),
        masks=jax.tree.map(lambda p: p != 0, params),
    )  # fmt: skip
    tx = jaxsparse.chain(optax.sgd(1.0, momentum=0.5), link)
    opt_state, update, kept = tx.init(params), jax.jit(tx.update), []
    for step, (given, ends) in enumerate(zip(GRADS, ENDS, strict=True)):
        grads = {n: jnp.asarray([g.get(i, 0) for i in range(p.size)], jnp.float32)
                 for (n, p), g in zip(params.items(), given, strict=True)}  # fmt: skip
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        for name, end in zip("ab", ends, strict=True):
            assert params[name].tolist() == end, (step, name)
            if step in MASKS:
                mask = jaxsparse.get_masks(opt_state)[name]
                assert np.flatnonzero(mask).tolist() == MASKS[step]["ab".index(name)], (step, name)
        kept.append(int(opt_state[1].kept))
    assert kept == [12, 12, 5, 5, 4, 4]
    jaxsparse.check(opt_state, params)


def trained(tx, steps, params=None):
    """The number of weights that each leaf keeps after every step, and what is left."""
    params = make_params() if params is None else params
    opt_state, step, history = tx.init(params), make_step(tx), []
    params = jaxsparse.sparsify(opt_state, params)
    for count in range(steps):
        params, opt_state = step(params, opt_state, count)
        history.append([int(mask.sum()) for mask in jax.tree.leaves(jaxsparse.get_masks(opt_state)) if mask.ndim])
    jaxsparse.check(opt_state, params)
    return np.array(history), params, opt_state


@pytest.mark.parametrize(("initial", "begin"), slow_except([(0.5, 4)], [(0.5, 4), (0.0, 0)]))
def test_the_number_of_weights_follows_equation_1(initial, begin):
    fewest = 20 if begin == 0 else 0
    link = jaxsparse.granet(0.9, 2, steps=16, initial_sparsity=initial, begin=begin, at_least=fewest)
    history, *_ = trained(jaxsparse.chain(optax.sgd(0.05), link), 13)
    last, expected = 16 * 11 // 16 // 2, SPARSE_SIZE - round(initial * SPARSE_SIZE)
    for t, kept in enumerate(history):
        j = t // 2
        if t > 0 and t % 2 == 0 and t >= begin and j <= last:
            zeros = 0.9 + (initial - 0.9) * (1 - (j - begin // 2) / (last - begin // 2)) ** 3
            expected = SPARSE_SIZE - round(zeros * SPARSE_SIZE)
        assert kept.sum() == expected, t
        assert kept.min() >= fewest
    assert expected == SPARSE_SIZE - round(0.9 * SPARSE_SIZE)


@pytest.mark.slow
def test_the_drop_fraction_is_the_authors_cosine():
    """By what one layer of 1000 weights, which are pruned no more, loses of those that it has."""
    params = {"kernel": jnp.linspace(1.0, 2.0, 1000).reshape(20, 50)}
    expected = jaxsparse.cosine_prune_rate(0.5, 8)
    masks = {"kernel": jnp.arange(1000).reshape(20, 50) % 2 == 0}
    for fraction, of_step in ((0.5, expected), (0.0, optax.constant_schedule(0.0))):
        link = jaxsparse.granet(0.5, 2, steps=8, masks=masks, drop_fraction=fraction)
        tx = jaxsparse.chain(link)
        opt_state, update = tx.init(params), jax.jit(tx.update)
        for t in range(7):
            before = opt_state[0].masks["kernel"]
            weights, grad = jax.tree.map(lambda p, t=t: p + t, params), {"kernel": ~before * 1.0}
            _, opt_state = update(params, opt_state, weights, grad=grad)
            lost = int((before & ~opt_state[0].masks["kernel"]).sum())
            assert lost == (np.ceil(np.float32(of_step(t)) * np.float32(500)) if t in (2, 4, 6) else 0), (fraction, t)


@pytest.mark.slow
def test_units_and_n_of_m():
    structure = {"attention/kernel": jaxsparse.block(2, 4), "dense/kernel": jaxsparse.n_of_m(1, 4)}
    link = jaxsparse.granet(0.8, 2, steps=12, end=8, structure=structure, at_least=2)
    history, _, opt_state = trained(jaxsparse.chain(optax.sgd(0.05, momentum=0.9), link), 11)
    masks = jaxsparse.get_masks(opt_state)
    assert jaxsparse.block(2, 4).holds(masks["attention"]["kernel"].reshape(16, 16))
    assert jaxsparse.n_of_m(1, 4).holds(masks["dense"]["kernel"])
    assert (np.diff(history.sum(1)) <= 0).all()
    assert SPARSE_SIZE - round(0.8 * SPARSE_SIZE) - 8 < history[-1].sum() <= SPARSE_SIZE - round(0.8 * SPARSE_SIZE)


@pytest.mark.slow
def test_frozen_layers_are_pruned_and_exchange_nothing():
    frozen = {"attention": "frozen", "conv": "moves", "dense": "moves", "temperature": "moves"}
    optimizer = optax.partition({"frozen": optax.set_to_zero(), "moves": optax.sgd(0.1)}, frozen)
    tx = jaxsparse.chain(optimizer, jaxsparse.granet(0.8, 2, steps=40, end=4, initial_sparsity=0))
    params = make_params()
    opt_state, step, seen = tx.init(params), make_step(tx), []
    for count in range(9):
        params, opt_state = step(params, opt_state, count)
        seen.append(jaxsparse.get_masks(opt_state))
    still, moving = (np.array([mask[name]["kernel"] for mask in seen]) for name in ("attention", "dense"))
    assert still[1].sum() > still[2].sum() > still[4].sum()
    assert not (still[1:] & ~still[:-1]).any()
    assert (moving[1:] & ~moving[:-1]).any()
    with pytest.warns(UserWarning, match="granet: attention/kernel kept its mask"):
        jaxsparse.check(opt_state, params)


@pytest.mark.slow
def test_numbers_may_be_injected():
    given = {"steps": 12, "initial_sparsity": 0.4, "begin": 2, "end": 8, "drop_fraction": 0.4}
    links = optax.inject_hyperparams(jaxsparse.granet)(0.75, 2, **given), jaxsparse.granet(0.75, 2, **given)
    ends = [trained(jaxsparse.chain(optax.sgd(0.1, momentum=0.9), link), 9)[1] for link in links]
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_bad_options_are_named():
    for options, words in (
        ({"sparsity": 1.0}, "sparsity must be at least 0 and below 1, got 1.0"),
        ({"initial_sparsity": 0.95}, "initial_sparsity must be at most sparsity, 0.9, got 0.95"),
        ({"initial_sparsity": -0.1}, "initial_sparsity must be at least 0 and below 1, got -0.1"),
        ({"steps": None}, "granet needs steps, the number of all steps"),
        ({"steps": None, "end": 9}, "granet needs steps, the number of all steps"),
        ({"begin": 9, "end": 8}, "end must be at least begin, 9, got 8"),
        ({"begin": 900}, "end must be at least begin, 900, got 687"),
        ({"steps": 10.5}, "steps must be a whole number of steps"),
        ({"update_every": 0}, "update_every must be at least 1"),
        ({"update_every": 1000}, "granet would reach its sparsity on step 1000, but steps says that the run has 1000"),
        ({"steps": 90, "begin": 10, "end": 20}, "granet would reach its sparsity on step 100, .* the run has 90"),
        ({"drop_fraction": 1.5}, "drop_fraction must be at least 0 and at most 1, got 1.5"),
        ({"drop_fraction": lambda t: 2 - t / 100}, "drop_fraction of step 0 must be at least 0 and at most 1, got 2"),
        (
            {"drop_fraction": lambda t: 1 - t / 900},
            "drop_fraction of step 1000 must be at least 0 and at most 1, got -",
        ),
        ({"allocation": "erk"}, "allocation must be one of"),
        ({"bias_correction": 0.9}, "bias_correction must be the decays of Adam"),
        ({"structure": "row"}, "structure"),
    ):
        with pytest.raises(ValueError, match=words):
            jaxsparse.granet(**{"sparsity": 0.9, "steps": 1000, "update_every": 100, **options})
    params = {"w": jnp.ones(4)}
    tx = optax.chain(optax.sgd(0.1), jaxsparse.granet(0.9, steps=2000, masks={"w": jnp.ones(4, bool)}))
    with pytest.raises(ValueError, match="granet grows weights by their gradients and is handed none"):
        jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
