import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from jaxsparse.methods.ac_dc import ACDCPhases
from tests.problems import SPARSE_SIZE, make_params, make_step

# By hand, on six weights of two layers and a bias, with SGD of rate 1 and momentum 0.5. Half of the weights stay in the
# compressed phases, which begin on steps 1 and 5; the dense one between them on step 3.
#            a: 4 -3 2 1       b: 5 0.5     bias: 1
#   step 0   Gradients of 1 on a[0], 2 on a[3], 1 on the bias: a is 3 -3 2 -1, the bias 0.
#   step 1   The largest three are 5, 3 and -3. a[0] moves by its momentum, 0.5, to 2.5, the bias to -0.5. The gradient
#            of 4 on a[3] moves nothing.
#   step 2   A gradient of -1 on a[1], and 1 on a[2], which is pruned: a[1] becomes -2, a[0] 2.25, the bias -0.75. Then
#            all momenta start anew, those of a[0] (0.25), a[1] (-1) and the bias (0.25) too.
#   step 3   All weights are there, and move by their gradients alone: 1, -2 on a[2], a[3], 3 on b[1], 1 on the bias.
#   step 4   By their momenta of half of that.
#   step 5   The largest of 2.25 -2 -1.5 3 and 5 -4.5 are 5, -4.5 and 3. They move by their momenta: 0, 0.75 and -0.5.
START = {"a": [4, -3, 2, 1], "b": [5, 0.5], "bias": [1]}
GRADS = [
    {"a": [1, 0, 0, 2], "b": [0, 0], "bias": [1]},
    {"a": [0, 0, 0, 4], "b": [0, 0], "bias": [0]},
    {"a": [0, -1, 1, 0], "b": [0, 0], "bias": [0]},
    {"a": [0, 0, 1, -2], "b": [0, 3], "bias": [1]},
    {"a": [0, 0, 0, 0], "b": [0, 0], "bias": [0]},
    {"a": [0, 0, 0, 0], "b": [0, 0], "bias": [0]},
]
ENDS = [
    {"a": [3, -3, 2, -1], "b": [5, 0.5], "bias": [0]},
    {"a": [2.5, -3, 0, 0], "b": [5, 0], "bias": [-0.5]},
    {"a": [2.25, -2, 0, 0], "b": [5, 0], "bias": [-0.75]},
    {"a": [2.25, -2, -1, 2], "b": [5, -3], "bias": [-1.75]},
    {"a": [2.25, -2, -1.5, 3], "b": [5, -4.5], "bias": [-2.25]},
    {"a": [0, 0, 0, 3.5], "b": [5, -5.25], "bias": [-2.5]},
]
KEPT = [6, 3, 3, 6, 6, 3]
WEIGHTS = {"a": True, "b": True, "bias": False}


def as_arrays(tree):
    return {name: jnp.asarray(values, jnp.float32) for name, values in tree.items()}


def test_by_hand():
    link = jaxsparse.ac_dc(0.5, [1, 5], [3], prunable=WEIGHTS)
    tx = jaxsparse.chain(optax.sgd(1.0, momentum=0.5), link)
    params = as_arrays(START)
    opt_state, update = tx.init(params), jax.jit(tx.update)
    for step, grads in enumerate(GRADS):
        updates, opt_state = update(as_arrays(grads), opt_state, params)
        params = optax.apply_updates(params, updates)
        assert {name: p.tolist() for name, p in params.items()} == ENDS[step], step
        assert int(opt_state[1].kept) == KEPT[step], step
        if step == 3:  # all momenta have started anew
            trace = optax.tree.get(opt_state, "trace")
            assert {name: t.tolist() for name, t in trace.items()} == grads
    jaxsparse.check(opt_state, params)


def test_adam_starts_anew_with_its_count():
    params = make_params()
    tx = jaxsparse.chain(optax.adamw(0.01), jaxsparse.ac_dc(0.75, [0, 9], [3]))
    alone = optax.adamw(0.01)
    step, alone_step = make_step(tx), make_step(alone)
    opt_state = tx.init(params)
    for count in range(3):
        params, opt_state = step(params, opt_state, count)
    assert int((params["dense"]["kernel"] == 0).sum()) > 200
    mine, fresh = params, alone.init(params)
    for count in range(3, 6):
        mine, opt_state = step(mine, opt_state, count)
        params, fresh = alone_step(params, fresh, count)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), mine, params)
    assert int(optax.tree.get(opt_state[0], "count")) == 3
    assert int(opt_state[1].count) == 6


@pytest.mark.parametrize(
    "optimizer", [optax.adan(0.1), optax.adagrad(0.1, 0.0), optax.adadelta(0.1), optax.adafactor(0.1)]
)
def test_optimizers_with_other_names_for_their_averages_start_anew(optimizer):
    params = {"w": jnp.ones((2, 2))}
    tx = jaxsparse.chain(optimizer, jaxsparse.ac_dc(0.5, [1, 5], [3]))
    opt_state = tx.init(params)
    for _ in range(4):
        _, opt_state = tx.update(params, opt_state, params)
    _, opt_state = tx.update({"w": jnp.zeros((2, 2))}, opt_state, params)  # which is after the step of decompression
    _, fresh = tx.update(params, tx.init(params), params)
    _, fresh = tx.update({"w": jnp.zeros((2, 2))}, fresh, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), opt_state[0][0], fresh[0][0])


def test_what_of_an_optimizer_does_not_start_anew_is_told():
    params = {"w": jnp.ones((2, 2))}
    tx = jaxsparse.chain(optax.rprop(0.1), jaxsparse.ac_dc(0.5, [1, 5], [3]))
    with pytest.warns(UserWarning, match="starts anew, but 0/step_sizes/w in its state is of a kind"):
        tx.update(params, tx.init(params), params)


def test_phases_keep_their_masks_and_scopes_their_shares():
    sizes, schedule = np.array([256, 144, 384]), optax.piecewise_constant_schedule(0.5, {4: 1.8})
    for scope, sparsity in (("global", 0.75), ("layer", schedule)):
        params = make_params()
        tx = jaxsparse.chain(optax.sgd(0.05, momentum=0.9), jaxsparse.ac_dc(sparsity, [1, 5], [3], scope=scope))
        opt_state, step, seen = tx.init(params), make_step(tx), []
        for count in range(7):
            params, opt_state = step(params, opt_state, count)
            seen.append([mask for mask in jax.tree.leaves(jaxsparse.get_masks(opt_state)) if mask.ndim])
        jaxsparse.check(opt_state, params)
        kept = np.array([[int(mask.sum()) for mask in masks] for masks in seen])
        assert (kept[[0, 3, 4]] == sizes).all()
        for begin, zeros in ((1, 0.75 if scope == "global" else 0.5), (5, 0.75 if scope == "global" else 0.9)):
            jax.tree.map(np.testing.assert_array_equal, seen[begin], seen[begin + 1])
            if scope == "global":
                assert kept[begin].sum() == SPARSE_SIZE - round(zeros * SPARSE_SIZE)
            else:
                np.testing.assert_array_equal(kept[begin], sizes - np.round(zeros * sizes))


@pytest.mark.slow
def test_units_and_n_of_m():
    structure = {"attention/kernel": jaxsparse.block(2, 4), "dense/kernel": jaxsparse.n_of_m(2, 4)}
    for scope in ("global", "layer"):
        params = make_params()
        link = jaxsparse.ac_dc(0.5, [0, 4], [2], scope=scope, structure=structure)
        tx, numbers = jaxsparse.chain(optax.sgd(0.05, momentum=0.9), link), []
        opt_state, step = tx.init(params), make_step(tx)
        for count in range(5):
            params, opt_state = step(params, opt_state, count)
            jaxsparse.check(opt_state, params)
            masks = jaxsparse.get_masks(opt_state)
            numbers.append(int(jaxsparse.count(masks)))
        assert jaxsparse.block(2, 4).holds(masks["attention"]["kernel"].reshape(16, 16))
        assert jaxsparse.n_of_m(2, 4).counts(masks["dense"]["kernel"]).min() >= 2
        assert scope == "global" or jaxsparse.n_of_m(2, 4).holds(masks["dense"]["kernel"])
        assert numbers[2] == SPARSE_SIZE
        assert SPARSE_SIZE // 2 - 8 < numbers[-1] <= SPARSE_SIZE // 2


def test_phases_of_the_authors():
    expected = ACDCPhases((10, 20, 30, 40, 50, 60, 70, 85), (15, 25, 35, 45, 55, 65, 75))
    assert jaxsparse.ac_dc_phases(100) == expected
    assert jaxsparse.ac_dc_phases(200, "cifar") == ACDCPhases((10, 50, 90, 130, 170), (30, 70, 110, 150))
    assert jaxsparse.ac_dc_phases(176) == ACDCPhases(
        (18, 35, 53, 70, 88, 106, 123, 150), (26, 44, 62, 79, 97, 114, 132)
    )


def test_bad_options_are_named():
    for options, words in (
        ({"sparsity": 1.5}, "sparsity must be at least 0 and at most 1, got 1.5"),
        ({"sparsity": lambda t: t / 10}, "sparsity of step 20 must be at least 0 and at most 1, got 2"),
        ({"scope": "lamp"}, r"scope must be one of \['global', 'layer'\], got 'lamp'"),
        ({"compress_at": [10]}, "one step more than decompress_at; got 1 and 1"),
        ({"compress_at": [], "decompress_at": []}, "one step more than decompress_at; got 0 and 0"),
        ({"decompress_at": [15, 25]}, "the last one is compressed"),
        ({"decompress_at": [10]}, r"on step 10 \(compress_at\) must begin before the next, decompress_at 10"),
        ({"decompress_at": [20]}, r"on step 20 \(decompress_at\) must begin before the next, compress_at 20"),
        ({"compress_at": [20, 10]}, r"the phases overlap: the one that begins on step 20 \(compress_at\)"),
        ({"compress_at": [-1, 20]}, "compress_at must be at least 0, got -1"),
        ({"decompress_at": [12.5]}, "decompress_at must be a whole number of steps, got 12.5"),
        ({"at_least": -1}, "at_least must be at least 0"),
        ({"structure": "row"}, "structure must be one of"),
    ):
        with pytest.raises(ValueError, match=words):
            jaxsparse.ac_dc(**{"sparsity": 0.9, "compress_at": [10, 20], "decompress_at": [15], **options})
    with pytest.raises(ValueError, match=r"recipe must be one of \['imagenet', 'cifar'\], got 'mnist'"):
        jaxsparse.ac_dc_phases(100, "mnist")
    with pytest.raises(ValueError, match="the phases overlap"):
        jaxsparse.ac_dc_phases(8)
    params = make_params()
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), jaxsparse.ac_dc(0.9, [10]))
    with pytest.warns(UserWarning, match="ac_dc is in no jaxsparse.chain"):
        jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)


def test_the_schedule_of_velocity_goes_on_while_its_average_begins_anew():
    params = {"w": jnp.ones((4, 4))}
    tx = jaxsparse.chain(jaxsparse.velocity(0.1), jaxsparse.ac_dc(0.5, compress_at=[1, 5], decompress_at=[3]))
    opt_state = tx.init(params)
    for _ in range(6):
        updates, opt_state = tx.update(params, opt_state, params)
        params = optax.apply_updates(params, updates)
    assert int(opt_state[0].count) == 6
