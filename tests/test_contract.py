"""The contract that every method keeps. A new method adds one row to METHODS."""

import functools
import itertools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import jax_utils, nnx

import jaxsparse
from jaxsparse.prunable import prunable_leaves
from jaxsparse.trees import by_path
from tests.problems import (
    SPARSE,
    SPARSE_SIZE,
    bits,
    gradients,
    jit_once,
    make_params,
    make_step,
    signature,
    slow_except,
)

jax.config.update("jax_numpy_rank_promotion", "raise")
UPDATE_EVERY = 2


class Method(NamedTuple):
    make: Callable[..., optax.GradientTransformation]  # (params, own_momentum, prunable) -> the link
    changes: bool  # whether its masks change
    random: bool  # whether its masks depend on key=
    adaptive: bool = False  # whether the number of weights changes: from all of them, perhaps at any step
    low_precision: bool = True  # whether it takes bfloat16 params
    needs_grad: bool = False  # whether it needs grad=, which a plain optax.chain does not hand on
    wraps: bool = False  # whether it is a wrapper: make(..., inner=optimizer), and if not given, of the identity
    always: bool = False  # whether masks may change on every step, and not on every second one alone
    one_of: int = 4  # the budget: one of so many weights
    dense_params: bool = False  # whether the params stay dense, and only eval_params is on the masks
    starts: Callable[[int], int] | None = None  # size -> how many it starts with, if neither all nor a quarter

    def around(self, optimizer, params, **options):
        """The optimizer with the method."""
        if self.wraps:
            return self.make(params, inner=optimizer, **options)
        return jaxsparse.chain(optimizer, self.make(params, **options))

    def budget(self, size=SPARSE_SIZE):
        """How many of so many weights it starts with."""
        if self.starts is not None:
            return self.starts(size)
        return size if self.adaptive else size // self.one_of


def fixed(params, own_momentum=False, prunable=None, key=0):
    del own_momentum
    return jaxsparse.mask_updates(jaxsparse.random_masks(params, 0.75, prunable=prunable, key=key))


def sparse_momentum(**options):
    def make(params, own_momentum=False, prunable=None, key=0):
        del params
        decay = 0.9 if own_momentum else None
        return jaxsparse.sparse_momentum(0.75, UPDATE_EVERY, decay=decay, prunable=prunable, key=key, **options)

    return make


def asni(params, own_momentum=False, prunable=None, key=0):
    del params, own_momentum, key
    schedule = jaxsparse.sigmoid_sparsity(0.9, 4 * UPDATE_EVERY, UPDATE_EVERY, begin=UPDATE_EVERY)
    return jaxsparse.asni(schedule, UPDATE_EVERY, prunable=prunable)


def magnitude_pruning(params, own_momentum=False, prunable=None, key=0):
    del params, own_momentum, key
    return jaxsparse.magnitude_pruning(0.75, end=6, every=UPDATE_EVERY, prunable=prunable)


def rigl(**options):
    def make(params, own_momentum=False, prunable=None, key=0):
        del params, own_momentum
        return jaxsparse.rigl(0.75, UPDATE_EVERY, stop_at=100, prunable=prunable, key=key, **options)

    return make


def sparse_evolutionary(**options):
    def make(params, own_momentum=False, prunable=None, key=0):
        del params, own_momentum
        return jaxsparse.sparse_evolutionary(
            0.75, UPDATE_EVERY, allocation="uniform", prunable=prunable, key=key, **options
        )

    return make


def srigl(**options):
    def make(params, own_momentum=False, prunable=None, key=0):
        del params, own_momentum
        return jaxsparse.srigl(
            0.75,
            UPDATE_EVERY,
            stop_at=100,
            never_ablate=(),
            allocation="uniform",
            prunable=prunable,
            key=key,
            **options,
        )

    return make


def granet(**options):
    def make(params, own_momentum=False, prunable=None, key=0):
        del params, own_momentum
        return jaxsparse.granet(0.75, UPDATE_EVERY, prunable=prunable, key=key, **options)

    return make


def fixed_scores(params, own_momentum=False, prunable=None, key=0):
    del own_momentum, key
    scores = jax.tree.map(lambda p: jnp.sin(7 * p), params)
    return jaxsparse.magnitude_pruning(0.75, end=6, every=UPDATE_EVERY, scope="global", score=scores, prunable=prunable)


def ac_dc(params, own_momentum=False, prunable=None, key=0):
    del params, own_momentum, key
    return jaxsparse.ac_dc(0.75, [0, 4], [3], prunable=prunable)


def iterative_hard_thresholding(params, own_momentum=False, prunable=None, key=0):
    del params, own_momentum, key
    return jaxsparse.iterative_hard_thresholding(0.75, every=UPDATE_EVERY, prunable=prunable)


def srigl_starts(size):
    """Each of the convolution's 8 outputs keeps 4 of 18 inputs, in all 32, where a quarter of 144 weights is 36."""
    return size // 4 - (4 if size in (SPARSE_SIZE, 144 + 384) else 0)


def reweighted_l1(**options):
    def make(params, own_momentum=False, prunable=None, key=0):
        del params, own_momentum, key
        return jaxsparse.reweighted_l1(1.0, l1=0.005, averaging=0.5, max_factor=50.0, prunable=prunable, **options)

    return make


def straight_through(wrapper, *numbers, **options):
    """A wrapper with latent weights of which masks keep some."""

    def make(params, own_momentum=False, prunable=None, key=0, inner=None):
        del params, own_momentum, key
        inner = optax.identity() if inner is None else inner
        return wrapper(inner, *numbers, prunable=prunable, **options)

    return make


def gates(wrapper, **options):
    """On the inputs of every prunable leaf."""

    def make(params, own_momentum=False, prunable=None, key=0, inner=None):
        del own_momentum
        prunable = by_path(prunable_leaves(params, prunable))
        groups = [jaxsparse.Group(path, {path: 0}, {path: 0}) for path, sparse in prunable.items() if sparse]
        penalty = jaxsparse.Penalty(1e-3, "all")
        return wrapper(optax.identity() if inner is None else inner, groups, penalty=penalty, key=key, **options)

    return make


def soft_threshold(params, own_momentum=False, prunable=None, key=0, inner=None):
    """Thresholds that rise from nearly 0, by their decay, to prune in the third step."""
    del params, own_momentum, key
    rising = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(1.0))
    inner = optax.identity() if inner is None else inner
    return jaxsparse.soft_threshold(inner, init=-16.0, threshold_optimizer=rising, prunable=prunable)


def powerpropagation(params, own_momentum=False, prunable=None, key=0, inner=None):
    del own_momentum
    inner = optax.identity() if inner is None else inner
    return jaxsparse.powerpropagation(
        inner, 2, prune=magnitude_pruning(params, prunable=prunable, key=key), prunable=prunable
    )


def spartan(params, own_momentum=False, prunable=None, key=0, inner=None):
    del params, own_momentum, key
    inner = optax.identity() if inner is None else inner
    return jaxsparse.spartan(inner, 0.75, warmup=4, freeze_at=6, prunable=prunable)


def admm(params, own_momentum=False, prunable=None, key=0, inner=None):
    del params, own_momentum, key
    inner = optax.identity() if inner is None else inner
    return jaxsparse.admm(inner, 0.75, every=UPDATE_EVERY, penalty=0.1, prunable=prunable)


METHODS = {
    "mask_updates": Method(fixed, changes=False, random=True),
    "sparse_momentum": Method(sparse_momentum(), changes=True, random=True),
    "asni": Method(asni, changes=True, random=False, adaptive=True),
    "magnitude_pruning": Method(magnitude_pruning, changes=True, random=False, adaptive=True),
    "soft_threshold": Method(soft_threshold, changes=True, random=False, adaptive=True, wraps=True),
    "powerpropagation": Method(powerpropagation, changes=True, random=False, adaptive=True, wraps=True),
    "spartan": Method(spartan, changes=True, random=False, adaptive=True, wraps=True),
    "admm": Method(admm, changes=True, random=False, adaptive=True, wraps=True, dense_params=True),
    "reweighted_l1": Method(reweighted_l1(), changes=True, random=False, adaptive=True, low_precision=False),
    "rigl": Method(rigl(), changes=True, random=True, needs_grad=True),
    "sparse_evolutionary": Method(sparse_evolutionary(), changes=True, random=True),
    "s_ste": Method(
        straight_through(jaxsparse.s_ste, 1, 2), changes=True, random=False, wraps=True, always=True, one_of=2
    ),
    "sr_ste": Method(
        straight_through(jaxsparse.sr_ste, 1, 2, decay=0.01),
        changes=True,
        random=False,
        wraps=True,
        always=True,
        one_of=2,
    ),
    "straight_through": Method(
        straight_through(jaxsparse.straight_through, 0.75), changes=True, random=False, wraps=True, always=True
    ),
    "top_kast": Method(
        straight_through(jaxsparse.top_kast, 0.75, 0.5, decay=0.01), changes=True, random=False, wraps=True, always=True
    ),
    "granet": Method(granet(steps=100, initial_sparsity=0.75), changes=True, random=True, needs_grad=True),
    "ac_dc": Method(ac_dc, changes=True, random=False, adaptive=True),
    "iterative_hard_thresholding": Method(iterative_hard_thresholding, changes=True, random=False, adaptive=True),
    # What is ablated changes the number of weights, within its budget.
    "srigl": Method(srigl(), changes=True, random=True, adaptive=True, needs_grad=True, starts=srigl_starts),
    # Every gate starts open, whatever the key.
    "l0": Method(gates(jaxsparse.l0), changes=True, random=False, adaptive=True, wraps=True),
    "dep_l0": Method(
        gates(jaxsparse.dep_l0, gate_optimizer=optax.adam(1.0)), changes=True, random=False, adaptive=True, wraps=True
    ),
}
ABLATIONS = {
    "sparse_momentum_random_SET": Method(
        sparse_momentum(growth="random", prune="SET", redistribution="magnitude", allocation="erdos_renyi_kernel"),
        changes=True,
        random=True,
    ),
    "sparse_momentum_neuron_global": Method(
        sparse_momentum(growth="momentum_neuron", prune="global_magnitude", redistribution="nonzeros"),
        changes=True,
        random=True,
    ),
    # Every kind of unit, each with a budget of its own: 16 kernels of 9, 32 blocks of 8, 1 of every 4 of 384 weights.
    "sparse_momentum_units": Method(
        sparse_momentum(
            structure={
                "attention/kernel": jaxsparse.block(2, 4),
                "conv/kernel": "kernel",
                "dense/kernel": jaxsparse.n_of_m(1, 4),
            }
        ),
        changes=True,
        random=True,
    ),
    "rigl_options": Method(
        rigl(accumulate=2, bias_correction=(0.9, 0.999), track=True, allocation="uniform"),
        changes=True,
        random=True,
        needs_grad=True,
    ),
    "magnitude_pruning_scores": Method(fixed_scores, changes=True, random=False, adaptive=True),
    "granet_dense_to_sparse": Method(
        granet(steps=8, end=4, initial_sparsity=0, bias_correction=(0.9, 0.999)),
        changes=True,
        random=False,
        adaptive=True,
        needs_grad=True,
    ),
    "srigl_without_ablation": Method(
        srigl(min_salient=None, accumulate=2, bias_correction=(0.9, 0.999), track=True),
        changes=True,
        random=True,
        needs_grad=True,
        starts=srigl_starts,
    ),
    "reweighted_l1_channel": Method(
        reweighted_l1(structure={"conv/kernel": "channel", "attention/kernel": "channel"}),
        changes=True,
        random=False,
        adaptive=True,
        low_precision=False,
    ),
}
ALL = METHODS | ABLATIONS
# `make test` runs every method with one optimizer and in one wrapper, and this one with all; what compiles long or
# hardly depends on the method, it runs for one method. The rest are slow tests.
QUICK = ("mask_updates",)
# One method on each of the shared blocks. What depends on the block alone `make test-all` runs for these and not for
# the others, which `pytest -m long tests/test_contract.py` does.
BLOCKS = (
    "mask_updates", "sparse_momentum", "rigl", "magnitude_pruning", "reweighted_l1", "l0", "straight_through",
    "soft_threshold", "admm",
)  # fmt: skip
OTHERS = [name for name in METHODS if name not in BLOCKS]

# Inner optimizers: (the optimizer, whether it stores a momentum).
INNERS = {
    "sgd": (lambda: optax.sgd(0.05), False),
    "nesterov": (lambda: optax.sgd(0.05, momentum=0.9, nesterov=True), True),
    "adamw": (lambda: optax.adamw(0.01, weight_decay=0.1), True),
    "lion": (lambda: optax.lion(0.01), True),
    "rmsprop": (lambda: optax.rmsprop(0.01), False),
    "adafactor": (lambda: optax.adafactor(0.01), False),
}


def sgd():
    return optax.sgd(0.05, momentum=0.9)


def chosen(params, *names):
    """A bool tree: the leaves of these paths."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/") in names, params
    )


def in_plain_optax_chain(method, params):
    tx = optax.chain(optax.sgd(0.05, momentum=0.9), method.make(params))
    if method.needs_grad:  # and warns that nothing resets the optimizer state
        with_grad = functools.partial(_hand_in_grad, tx.update)
        tx = optax.GradientTransformationExtraArgs(tx.init, with_grad)
    return tx, method.budget()


def _hand_in_grad(update, grads, state, params, **extra_args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return update(grads, state, params, **{"grad": grads, **extra_args})


def in_optax_chain(method, params):
    return optax.chain(optax.clip(1.0), method.around(sgd(), params)), method.budget()


def in_jaxsparse_chain_of_chains(method, params):
    return jaxsparse.chain(optax.clip(1.0), optax.chain(sgd(), optax.scale(0.5)), method.make(params)), method.budget()


def link_masked(method, params):
    seen = chosen(params, "conv/kernel", "conv/bias", "dense/kernel")
    link = method.make(params, prunable=chosen(params, "conv/kernel", "dense/kernel"))
    return jaxsparse.chain(sgd(), optax.masked(link, seen)), method.budget(144 + 384)


def all_masked(method, params):
    seen = {"attention": False, "conv": True, "dense": True, "temperature": False}  # whole subtrees
    link = method.make(params, prunable=chosen(params, "conv/kernel", "dense/kernel"))
    return optax.masked(jaxsparse.chain(sgd(), link), seen), method.budget(144 + 384)


def partition_of_links(method, params):
    labels = {"attention": "a", "conv": "b", "dense": "b", "temperature": "a"}
    links = {
        "a": method.make(params, prunable=chosen(params, "attention/kernel"), key=1),
        "b": method.make(params, prunable=chosen(params, "conv/kernel", "dense/kernel"), key=2),
    }
    return jaxsparse.chain(sgd(), optax.partition(links, labels)), method.budget()


def partition_of_chains(method, params):
    labels = jax.tree.map(lambda chosen: "b" if chosen else "a", chosen(params, "dense/kernel", "dense/bias"))
    chains = {
        "a": method.around(sgd(), params, prunable=chosen(params, "attention/kernel", "conv/kernel")),
        "b": jaxsparse.chain(
            optax.adam(0.01), method.make(params, prunable=chosen(params, "dense/kernel"), own_momentum=True)
        ),
    }
    return optax.partition(chains, labels), method.budget()


def multi_steps_outside(method, params):
    return optax.MultiSteps(method.around(sgd(), params), 2).gradient_transformation(), method.budget()


def multi_steps_inside(method, params):
    return method.around(optax.MultiSteps(sgd(), 2).gradient_transformation(), params), method.budget()


def apply_if_finite(method, params):
    return optax.apply_if_finite(method.around(sgd(), params), 3), method.budget()


def inject_around_chain(method, params):
    def factory(learning_rate):
        return method.around(optax.sgd(learning_rate, momentum=0.9), params)

    return optax.inject_hyperparams(factory)(learning_rate=optax.linear_schedule(0.1, 0.01, 10)), method.budget()


WRAPPERS = [
    in_plain_optax_chain,
    in_optax_chain,
    in_jaxsparse_chain_of_chains,
    link_masked,
    all_masked,
    partition_of_links,
    partition_of_chains,
    multi_steps_outside,
    multi_steps_inside,
    apply_if_finite,
    inject_around_chain,
]


def run(tx, params, method, steps=7):
    """Trains, checks what must hold after every step, and returns the masks of all steps."""
    opt_state = tx.init(params)
    params = jaxsparse.sparsify(opt_state, params)
    step = jit_once(make_step(tx))  # nothing is compiled anew
    history = [jax.device_get(jaxsparse.get_masks(opt_state, params))]
    types = signature(params), signature(opt_state)
    budget = int(jaxsparse.count(history[0]))
    for count in range(steps):
        before = jax.device_get(params)
        params, opt_state = step(params, opt_state, jnp.int32(count))
        masks = jax.device_get(jaxsparse.get_masks(opt_state, params))
        evaluated = jaxsparse.eval_params(opt_state, params) if method.dense_params else params
        for p, mask in zip(jax.tree.leaves(evaluated), jax.tree.leaves(masks), strict=True):
            assert mask.shape == (p.shape if mask.ndim else ())
            np.testing.assert_array_equal(np.asarray(p)[~np.broadcast_to(mask, p.shape)], 0)
        assert method.adaptive or int(jaxsparse.count(masks)) == budget
        # Types do not change.
        assert (signature(params), signature(opt_state)) == types
        jaxsparse.check(opt_state, params)
        history.append(masks)
    # It trains: the last step moved every leaf.
    moved = [
        bool((np.asarray(a) != np.asarray(b)).any())
        for a, b in zip(*map(jax.tree.leaves, (before, params)), strict=True)
    ]
    return history, params, opt_state, moved


def changed(a, b):
    return any((x != y).any() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize(
    ("name", "inner"),
    slow_except(
        [(name, "nesterov") for name in METHODS] + [(name, inner) for name in QUICK for inner in INNERS],
        [(name, inner) for name in METHODS for inner in INNERS] + [(name, "nesterov") for name in ABLATIONS],
        [(name, inner) for name in OTHERS for inner in INNERS if inner != "adamw"],
    ),
)
def test_every_method_with_every_inner_optimizer(name, inner):
    method, params = ALL[name], make_params()
    optimizer, stores_momentum = INNERS[inner]
    tx = method.around(optimizer(), params, own_momentum=not stores_momentum)
    history, _, opt_state, moved = run(tx, params, method)
    assert int(jaxsparse.count(history[0])) == method.budget()
    assert all(moved)
    seen = [changed(a, b) for a, b in itertools.pairwise(history)]
    if method.adaptive:
        assert any(seen)
        assert int(jaxsparse.count(history[-1])) < SPARSE_SIZE
    elif method.always:
        assert any(seen)
    else:  # masks change on the first step after every boundary (count 2, 4, 6), and on no other
        assert seen == [method.changes and count in (2, 4, 6) for count in range(7)]
    # Dense leaves are dense, in the accessor and in the state.
    masks = history[-1]
    for path, mask in jax.tree_util.tree_flatten_with_path(masks)[0]:
        assert (mask.ndim > 0) == (jax.tree_util.keystr(path, simple=True, separator="/") in SPARSE)
    chex.assert_trees_all_equal_structs(masks, params)
    # The library's own map over params-like state, a no-op here, keeps the state.
    mapped = optax.tree.map_params(tx, lambda leaf: leaf, opt_state)
    for a, b in zip(bits(mapped), bits(opt_state), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("name", "wrapper"),
    slow_except(
        [(name, partition_of_chains) for name in METHODS] + [(name, wrapper) for name in QUICK for wrapper in WRAPPERS],
        itertools.product(METHODS, WRAPPERS),
        [(name, wrapper) for name in OTHERS for wrapper in WRAPPERS if wrapper is not in_plain_optax_chain],
    ),
    ids=lambda part: getattr(part, "__name__", part),
)
def test_every_method_in_every_wrapper(name, wrapper):
    method, params = METHODS[name], make_params()
    tx, budget = wrapper(method, params)
    if wrapper is multi_steps_inside and name in ("reweighted_l1", "l0", "dep_l0"):  # they move on every step
        with pytest.raises(ValueError, match=r"optax\.MultiSteps"):
            tx.init(params)
        return
    history, _, opt_state, _ = run(tx, params, method)
    assert int(jaxsparse.count(history[0])) == budget
    assert changed(history[0], history[-1]) == method.changes
    jax.eval_shape(lambda p, s: tx.update(gradients(p), s, p, value=1.0, something_else=None), params, opt_state)
    # Also without the params, the masks are found and merged.
    assert int(jaxsparse.count(jaxsparse.get_masks(opt_state))) == int(jaxsparse.count(history[-1]))


@pytest.mark.parametrize(
    ("name", "own_momentum"),
    slow_except([("sparse_momentum", True)], [("sparse_momentum", True), *((name, False) for name in METHODS)]),
)
def test_bfloat16_params_stay_bfloat16(name, own_momentum):
    method, params = METHODS[name], make_params(jnp.bfloat16)
    if not method.low_precision:
        with pytest.raises(ValueError, match="needs float32 params, but attention/kernel is bfloat16"):
            method.make(params).init(params)
        return
    _, params_out, _, _ = run(method.around(sgd(), params, own_momentum=own_momentum), params, method)
    chex.assert_trees_all_equal_dtypes(params, params_out)


@pytest.mark.parametrize("name", METHODS)
def test_updates_come_in_the_dtype_of_the_params(name):
    params = make_params(jnp.bfloat16 if METHODS[name].low_precision else jnp.float32)
    tx = (jaxsparse.chain if METHODS[name].needs_grad else optax.chain)(METHODS[name].make(params))
    other = jnp.float32 if METHODS[name].low_precision else jnp.bfloat16

    def update(params):
        wide = jax.tree.map(lambda g: g.astype(other), gradients(params))
        return tx.update(wide, tx.init(params), params)[0]

    updates = jax.eval_shape(update, params)
    chex.assert_trees_all_equal_dtypes(updates, params)


@pytest.mark.parametrize("name", METHODS)
def test_without_params_the_error_says_so(name):
    params = make_params()
    tx = METHODS[name].around(sgd(), params)
    with pytest.raises(ValueError, match="needs the params: call tx.update"):
        tx.update(gradients(params), tx.init(params))


@pytest.mark.parametrize("name", METHODS)
def test_donation_consumes_the_old_buffers_and_nothing_of_the_caller(name):
    method, params = METHODS[name], make_params()
    tx = method.around(sgd(), params)
    first = tx.init(params)
    put = jaxsparse.sparsify(first, jax.tree.map(jnp.copy, params))
    step = make_step(tx, donate=True)
    new_params, new_state = step(put, first, 0)
    arrays = [x for x in jax.tree.leaves(first) if x.size >= 100]  # what an update does not read cannot be donated
    assert arrays
    assert all(x.is_deleted() for x in arrays)
    assert all(p.is_deleted() for p in jax.tree.leaves(put) if p.ndim)
    step(new_params, new_state, 1)
    # A second init from the same transformation still has its masks.
    again = tx.init(params)
    assert int(jaxsparse.count(jaxsparse.get_masks(again))) == method.budget()


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_vmap_over_seeds_with_different_masks(name):
    method, params = ALL[name], make_params()

    def train(seed):
        tx = method.around(sgd(), params, key=seed)
        opt_state = tx.init(params)
        start = jaxsparse.get_masks(opt_state, params)

        def step(carry, count):
            p, s = carry
            updates, s = tx.update(gradients(p, count), s, p)
            return (optax.apply_updates(p, updates), s), None

        carry, _ = jax.lax.scan(step, (jaxsparse.sparsify(opt_state, params), opt_state), jnp.arange(5))
        return start, *carry

    seeds = jnp.arange(3)
    starts, trained, states = jax.jit(jax.vmap(train))(seeds)
    jaxsparse.check(states, trained)

    def lane(tree, i):
        return jax.tree.map(lambda x: x[i] if x.ndim else x, tree)

    lanes = [lane(starts, i) for i in range(3)]
    assert changed(lanes[0], lanes[1]) == method.random
    # Each lane is what its seed gives alone.
    for i in range(3):
        start, alone, state = jax.jit(train)(seeds[i])
        chex.assert_trees_all_equal(lanes[i], start)
        chex.assert_trees_all_equal(lane(jaxsparse.get_masks(states), i), jaxsparse.get_masks(state))
        chex.assert_trees_all_close(lane(trained, i), alone, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_except(["sparse_momentum"], METHODS, OTHERS))
def test_the_update_can_be_differentiated(name):
    # Meta-learning takes gradients through the optimizer; masks have none.
    params = make_params()
    tx = METHODS[name].around(sgd(), params)
    opt_state = tx.init(params)

    @jax.jit
    @jax.grad
    def meta_gradient(rate, params):
        state = opt_state
        for count in range(UPDATE_EVERY + 1):
            grads = jax.tree.map(lambda g: rate * g, gradients(params, count))
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return sum(jnp.sum(p**2) for p in jax.tree.leaves(params))

    assert np.isfinite(meta_gradient(0.5, jaxsparse.sparsify(opt_state, params)))
    assert meta_gradient(0.5, jaxsparse.sparsify(opt_state, params)) != 0


# --- Many devices -----------------------------------------------------------------------------------------------------


@functools.cache
def alone(name, steps=9):
    """The masks, and the params, after so many steps on one device: the reference."""
    params = make_params()
    tx = ALL[name].around(sgd(), params)
    step = make_step(tx)
    opt_state = tx.init(params)
    params = jaxsparse.sparsify(opt_state, params)
    for count in range(steps):
        params, opt_state = step(params, opt_state, count)
    return jaxsparse.get_masks(opt_state), params


@pytest.mark.parametrize("name", slow_except(["mask_updates"], ALL))
def test_pmapped_masks_are_bit_equal(name):
    method, params = ALL[name], make_params()
    tx = method.around(sgd(), params)
    masks, _ = alone(name)

    def step(p, s, count):
        grads = jax.lax.pmean(gradients(p, count), "devices")
        updates, s = tx.update(grads, s, p)
        return optax.apply_updates(p, updates), s

    step = jax.pmap(step, axis_name="devices", in_axes=(0, 0, None), donate_argnums=(0, 1))
    opt_state = tx.init(params)
    devices = jax.local_device_count()
    assert devices == 8
    replicas, states = jax_utils.replicate((jaxsparse.sparsify(opt_state, params), opt_state))
    for count in range(9):
        replicas, states = step(replicas, states, count)
    jaxsparse.check(states, replicas)
    for device in range(devices):
        seen = jax.tree.map(lambda x, d=device: x[d] if x.ndim else x, jaxsparse.get_masks(states))
        chex.assert_trees_all_equal(seen, masks)


@pytest.mark.parametrize("name", slow_except(["sparse_momentum"], ALL))
def test_sharded_masks_are_bit_equal(name):
    method, params = ALL[name], make_params()
    tx = method.around(sgd(), params)
    masks, trained = alone(name)
    mesh = jax.make_mesh((8,), ("d",))
    shapes = [p.shape for p in jax.tree.leaves(params)]

    def shard(x):
        axes = [None] * x.ndim
        for d, size in enumerate(x.shape):
            if size % 8 == 0 and x.shape in shapes:  # what is kept of whole groups is small, and replicated
                axes[d] = "d"
                break
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))

    opt_state = tx.init(params)
    params, opt_state = jax.tree.map(shard, (jaxsparse.sparsify(opt_state, params), opt_state))
    placed = jax.tree.map(lambda x: x.sharding, (params, opt_state))
    assert not params["dense"]["kernel"].sharding.is_fully_replicated
    step = jax.jit(make_step(tx), out_shardings=placed)
    for count in range(9):
        params, opt_state = step(params, opt_state, count)
    chex.assert_trees_all_equal(jax.device_get(jaxsparse.get_masks(opt_state)), jax.device_get(masks))
    # The compiler may fuse the roundings of another layout in another order: those of the weights, not of the masks.
    chex.assert_trees_all_close(jax.device_get(params), jax.device_get(trained), atol=1e-6)
    jaxsparse.check(opt_state, params)


# --- Other libraries' params ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_linen(name):
    model = nn.Sequential([nn.Dense(16), nn.LayerNorm(), nn.relu, nn.Dense(8)])
    params = model.init(jax.random.key(0), jnp.ones((1, 12)))["params"]
    history, *_ = run(METHODS[name].around(sgd(), params), params, METHODS[name])
    assert int(jaxsparse.count(history[0])) == METHODS[name].budget(12 * 16 + 16 * 8)


@pytest.mark.parametrize("name", slow_except(["sparse_momentum"], METHODS, OTHERS))
def test_nnx(name):
    model = nnx.Sequential(nnx.Linear(12, 16, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(16, 8, rngs=nnx.Rngs(1)))
    params = nnx.state(model, nnx.Param)
    link = METHODS[name].make(params)
    optimizer = nnx.Optimizer(model, jaxsparse.chain(sgd(), link), wrt=nnx.Param)
    nnx.update(model, jaxsparse.sparsify(optimizer.opt_state, params))

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.mean(m(jnp.ones((4, 12))) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(5):
        step(model, optimizer)
    params = nnx.state(model, nnx.Param)
    jaxsparse.check(optimizer.opt_state, params)
    kept = int(jaxsparse.count(jaxsparse.get_masks(optimizer.opt_state, params)))
    assert METHODS[name].adaptive or kept == METHODS[name].budget(12 * 16 + 16 * 8)
    if METHODS[name].dense_params:
        nnx.update(model, jaxsparse.eval_params(optimizer.opt_state, params))
    assert int((model.layers[0].kernel[...] != 0).sum() + (model.layers[2].kernel[...] != 0).sum()) <= kept < 320


@pytest.mark.parametrize("name", slow_except(["l0"], METHODS, OTHERS))
def test_equinox(name):
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(12, 8, 16, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    tx = METHODS[name].around(sgd(), params)
    opt_state = tx.init(params)
    params = jaxsparse.sparsify(opt_state, params)

    @jax.jit
    def step(params, opt_state):
        def loss(p):
            return jnp.mean(jax.vmap(eqx.combine(p, static))(jnp.ones((4, 12))) ** 2)

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(5):
        params, opt_state = step(params, opt_state)
    jaxsparse.check(opt_state, params)
    kept = int(jaxsparse.count(jaxsparse.get_masks(opt_state, params)))
    assert kept < 320 if METHODS[name].adaptive else kept == METHODS[name].budget(12 * 16 + 16 * 8)


@pytest.mark.parametrize("name", slow_except(["sparse_momentum"], METHODS, OTHERS))
def test_haiku(name):
    hk = pytest.importorskip("haiku")
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 8])(x)))
    params = net.init(jax.random.key(0), jnp.ones((1, 12)))
    history, *_ = run(METHODS[name].around(sgd(), params), params, METHODS[name])
    assert int(jaxsparse.count(history[0])) == METHODS[name].budget(12 * 16 + 16 * 8)


# --- What check catches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", slow_except(QUICK, [name for name in METHODS if not METHODS[name].dense_params], OTHERS)
)
def test_check_catches_what_moves_the_params_afterwards(name):
    method, params = METHODS[name], make_params()

    def train(tx, move=lambda p: p):
        opt_state, update = tx.init(params), jax.jit(tx.update)
        p = jaxsparse.sparsify(opt_state, params)
        for count in range(3):
            updates, opt_state = update(gradients(p, count), opt_state, p)
            p = move(optax.apply_updates(p, updates))
        return opt_state, p

    scaled = jaxsparse.chain(sgd(), method.make(params), optax.add_noise(0.1, 0.5, 0))
    with pytest.raises(jaxsparse.SparsityError, match="pruned weights of attention/kernel are not zero"):
        jaxsparse.check(*train(scaled))
    averaged = optax.contrib.schedule_free(method.around(sgd(), params), learning_rate=0.1)
    with pytest.raises(jaxsparse.SparsityError, match="schedule_free"):
        jaxsparse.check(*train(averaged, lambda p: jax.tree.map(lambda x: x + 0.01, p)))
    jaxsparse.check(*train(method.around(sgd(), params)))


@pytest.mark.parametrize("name", METHODS)
def test_replicated_params_are_refused(name):
    params = make_params()
    link = METHODS[name].make(params)
    with pytest.raises(ValueError, match="leading axis of 8 replicas"):
        link.init(jax_utils.replicate(params))


@pytest.mark.parametrize("name", slow_except(["sparse_momentum", "l0"], METHODS, OTHERS))
def test_nan_gradients_inside_apply_if_finite_change_nothing(name):
    method, params = METHODS[name], make_params()
    tx = optax.apply_if_finite(method.around(sgd(), params), max_consecutive_errors=100)
    opt_state = tx.init(params)
    params = jaxsparse.sparsify(opt_state, params)

    @jax.jit
    def step(params, opt_state, poison):
        grads = jax.tree.map(lambda g: jnp.where(poison, jnp.nan, g), gradients(params))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for count in range(8):
        params, opt_state = step(params, opt_state, count % 2 == 1)
        assert method.adaptive or int(jaxsparse.count(jaxsparse.get_masks(opt_state))) == method.budget()
        jaxsparse.check(opt_state, params)
    assert all(bool(jnp.isfinite(p).all()) for p in jax.tree.leaves(params))


@pytest.mark.parametrize("name", ALL)
def test_in_64_bits_a_state_keeps_its_dtypes(name):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: p.astype(jnp.float64), make_params())
        tx = ALL[name].around(sgd(), params)
        opt_state = jax.eval_shape(tx.init, params)

        def train(params, opt_state):
            return tx.update(params, opt_state, params)

        _, after = jax.eval_shape(train, params, opt_state)
        assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, opt_state)


@pytest.mark.parametrize("name", ALL)
def test_strict_dtype_promotion(name):
    params = make_params(jnp.bfloat16 if ALL[name].low_precision else jnp.float32)

    def train(params):
        tx = ALL[name].around(sgd(), params)
        opt_state = tx.init(params)
        updates, opt_state = tx.update(params, opt_state, jaxsparse.sparsify(opt_state, params))
        return updates, jaxsparse.eval_params(opt_state, params), jaxsparse.density(jaxsparse.get_masks(opt_state))

    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(train, params)
