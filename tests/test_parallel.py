"""One step in every layout: what it computes, what it sends, what becomes of the state."""

import collections
import functools
import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import jaxsparse
from jaxsparse.parallel import (
    LAYOUTS,
    DataParallel,
    ElsewhereError,
    FullySharded,
    OneDevice,
    any_process,
    device_layout,
    of_processes,
    together,
)
from jaxsparse.trees import by_path
from tests.problems import slow_except
from tests.test_contract import METHODS, sparse_momentum

MANY = [name for name in LAYOUTS if name != "one_device"]
BATCH = 32


class State(NamedTuple):
    params: Any
    opt_state: Any
    model_state: Any
    key: jax.Array


def make_params():
    keys = iter(jax.random.split(jax.random.key(0), 4))
    return {
        "first": {"kernel": jax.random.normal(next(keys), (24, 64)) / 5, "bias": jnp.zeros(64)},
        "second": {"kernel": jax.random.normal(next(keys), (64, 40)) / 8, "bias": jnp.zeros(40)},
    }


def make_state(tx=None):
    """With SGD's state, or that of an optimizer with a sparse link."""
    params = make_params()
    opt_state = sgd().init(params) if tx is None else tx.init(params)
    if tx is not None:
        params = jaxsparse.sparsify(opt_state, params)
    return State(params, opt_state, {"seen": jnp.zeros((3,))}, jax.random.key(7))


def loss_fn(params, model_state, batch, scale):
    inputs, targets = batch
    hidden = jnp.tanh(inputs @ params["first"]["kernel"] + params["first"]["bias"][None])
    outputs = hidden @ params["second"]["kernel"] + params["second"]["bias"][None]
    loss = scale * jnp.mean((outputs - targets) ** 2)
    model_state = {"seen": model_state["seen"] + inputs.sum() / BATCH}
    return loss, ({"loss": loss}, model_state)


def make_batch(seed=0):
    draw = np.random.RandomState(seed)
    return draw.standard_normal((BATCH, 24)).astype(np.float32), draw.standard_normal((BATCH, 40)).astype(np.float32)


def make_step(layout, tx, accumulate=1):
    gradients = layout.gradients(loss_fn, accumulate)

    def step(state, batch, scale):
        grads, model_state, metrics = gradients(state.params, state.model_state, batch, scale)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return State(optax.apply_updates(state.params, updates), opt_state, model_state, state.key), metrics

    return layout.compile(step)


def sgd():
    return optax.sgd(0.1, momentum=0.9)


# --- What it computes -------------------------------------------------------------------------------------------------


def test_gradients_in_16_bits_are_accumulated_in_32():
    def loss_fn(w, model_state, x, _):
        about = {"loss": (w * x).mean(), "seen": jnp.int32(3), "size": x.size, "positive": x.sum() > 0}
        return (w * x).mean(), (about, model_state)

    x, w = jnp.ones((1024,), jnp.bfloat16), jnp.ones((), jnp.bfloat16)
    gradient, _, metrics = OneDevice().gradients(loss_fn, accumulate=1024)(w, (), x, None)
    assert (gradient.dtype, float(gradient)) == (jnp.bfloat16, 1.0)
    assert (metrics["loss"].dtype, float(metrics["loss"]), float(metrics["seen"])) == (jnp.bfloat16, 1.0, 3.0)
    assert (float(metrics["size"]), float(metrics["positive"])) == (1.0, 1.0)


def test_model_states_with_bools_and_keys():
    layout, state = DataParallel(), make_state()
    placed = layout.place(state._replace(model_state={"begun": jnp.array(True)}))
    assert layout.one_copy(placed).model_state["begun"].tolist() is True
    with pytest.raises(ValueError, match="rngs/key of the model state is a PRNG key"):
        layout.place(state._replace(model_state={"rngs": {"key": jax.random.key(0)}}))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", slow_except(["pmap", "fsdp"], LAYOUTS))
def test_a_step_is_that_of_the_whole_batch(name, accumulate):
    layout, state = device_layout(name, min_size=64), make_state()
    (loss, (_, model_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params, state.model_state, make_batch(), 2.0
    )
    updates, _ = sgd().update(grads, state.opt_state, state.params)
    expected = optax.apply_updates(state.params, updates)
    placed, metrics = make_step(layout, sgd(), accumulate)(layout.place(state), layout.place_batch(make_batch()), 2.0)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    one = layout.one_copy(placed)
    chex.assert_trees_all_close(one.params, expected, rtol=1e-6, atol=1e-7)
    # Each device has seen its own part of the batch: all of them together, the whole.
    np.testing.assert_allclose(one.model_state["seen"] * layout.size, model_state["seen"], rtol=1e-4)
    own = layout.collect(placed).model_state["seen"]
    if name != "one_device":
        assert own.shape == (8, 3)
        assert len(np.unique(np.asarray(own))) == 8


@pytest.mark.parametrize("name", LAYOUTS)
def test_sums_and_shares(name):
    layout = device_layout(name)

    def evaluate(state, batch):
        mean = layout.synchronised(state.model_state)
        whole = layout.sums(lambda part, scale: jnp.sum(part[0]) * scale)(batch, mean["seen"][0])
        return None, (whole, mean)

    def made_here(state, rows):
        return None, layout.sums(lambda part, _: {"rows": jnp.sum(part), "devices": 1})(layout.share(rows), None)

    model_state = {"seen": jnp.array([2.0, 3.0, 4.0]), "steps": jnp.int32(7), "begun": jnp.array(True)}
    state = make_state()._replace(model_state=model_state)
    placed = layout.place(state)
    _, (whole, mean) = layout.compile(evaluate, donate=False)(placed, layout.place_batch(make_batch()))
    np.testing.assert_allclose(whole, 2 * make_batch()[0].sum(), rtol=1e-4)
    np.testing.assert_allclose(mean["seen"], [2, 3, 4])
    assert (mean["steps"].dtype, int(mean["steps"])) == (jnp.int32, 7)
    assert mean["begun"].dtype == bool
    assert mean["begun"]
    rows = layout.replicate(jnp.arange(BATCH))
    _, sums = layout.compile(made_here, donate=False)(placed, rows)
    assert (int(sums["rows"]), int(sums["devices"])) == (BATCH * (BATCH - 1) // 2, layout.size)


# --- What becomes of the state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_gives_up_the_state_that_comes_in_and_nothing_of_the_caller(name):
    layout, tx = device_layout(name, min_size=64), sgd()
    state = make_state()
    placed = layout.place(state)
    after, _ = make_step(layout, tx)(placed, layout.place_batch(make_batch()), 1.0)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((placed.params, placed.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((state, after)))


@pytest.mark.parametrize("name", slow_except(["fsdp"], LAYOUTS))
def test_collected_and_restored_it_goes_on_with_the_same_bits(name):
    layout = device_layout(name, min_size=64)
    tx = jaxsparse.chain(sgd(), jaxsparse.sparse_momentum(0.75, update_every=2))
    step = make_step(layout, tx)
    state, _ = step(layout.place(make_state(tx)), layout.place_batch(make_batch()), 1.0)
    collected = layout.collect(state)
    shapes = layout.collected_shapes(jax.eval_shape(lambda: make_state(tx)))
    for shape, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(collected), strict=True):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
        assert shape.sharding is None or shape.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    assert jax.random.key_data(collected.key).tolist() == [0, 7]
    saved = jax.tree.map(jnp.copy, collected)
    on, _ = step(state, layout.place_batch(make_batch(1)), 1.0)
    again, _ = step(layout.restore(saved), layout.place_batch(make_batch(1)), 1.0)
    chex.assert_trees_all_equal(*(jax.device_get(layout.collect(x)._replace(key=0)) for x in (on, again)))


@pytest.mark.parametrize("name", MANY)
def test_a_state_of_another_number_of_devices_is_restored_with_the_mean_of_the_model_state(name):
    four, eight = device_layout(name, jax.devices()[:4], min_size=64), device_layout(name, min_size=64)
    state, _ = make_step(four, sgd())(four.place(make_state()), four.place_batch(make_batch()), 1.0)
    mean = four.one_copy(state)
    on_disk = jax.device_get(four.collect(state)._replace(key=0))
    shapes = eight.collected_shapes(jax.eval_shape(lambda: make_state()), devices=4)
    key = jax.device_put(mean.key, getattr(shapes.key, "sharding", None))
    shapes = shapes._replace(key=0)
    read = jax.tree.map(lambda x, like: jax.device_put(x, getattr(like, "sharding", None)), on_disk, shapes)
    restored = eight.restore(read._replace(key=key))
    chex.assert_trees_all_equal(eight.one_copy(restored).params, mean.params)
    seen = eight.collect(restored).model_state["seen"]
    assert seen.shape == (8, 3)
    np.testing.assert_allclose(seen, np.broadcast_to(mean.model_state["seen"], (8, 3)), rtol=1e-6)
    make_step(eight, sgd())(restored, eight.place_batch(make_batch()), 1.0)


def test_fsdp_splits_large_leaves_alone_and_masks_as_their_weights():
    tx = jaxsparse.chain(sgd(), jaxsparse.sparse_momentum(0.75, update_every=2))
    layout = FullySharded(min_size=1000)
    state = layout.place(make_state(tx))
    specs = {path: leaf.sharding.spec for path, leaf in by_path(state.params).items()}
    assert specs["first/kernel"] == PartitionSpec(None, "devices")
    assert specs["second/kernel"] == PartitionSpec("devices")
    assert specs["first/bias"] == specs["second/bias"] == PartitionSpec()
    for tree in (jaxsparse.get_masks(state.opt_state), state.opt_state[0][0].trace):
        for path, leaf in by_path(tree).items():
            assert leaf.ndim == 0 or leaf.sharding.spec == specs[path]  # a dense leaf's mask is a scalar
    state, _ = make_step(layout, tx)(state, layout.place_batch(make_batch()), 1.0)
    assert {path: leaf.sharding.spec for path, leaf in by_path(state.params).items()} == specs
    # An eighth of the large ones on each device.
    assert state.params["first"]["kernel"].addressable_shards[0].data.shape == (24, 8)


# --- What it sends ----------------------------------------------------------------------------------------------------


def collectives(layout, tx):
    """How often the compiled step sends how many numbers of which type, by the kind of the operation."""
    step = make_step(layout, sgd() if tx is None else tx)
    text = step.lower(layout.place(make_state(tx)), layout.place_batch(make_batch()), 1.0).compile().as_text()
    found: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line)
        if match:
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
                found[match[2]][dtype, int(np.prod([int(n) for n in shape.split(",") if n]))] += 1
    return found


def around(name):
    if name == "blocks":
        return jaxsparse.chain(sgd(), sparse_momentum(structure=jaxsparse.block(8, 8))(make_params()))
    return METHODS[name].around(sgd(), make_params())


dense_collectives = functools.cache(lambda layout: collectives(layout, None))
NAMES = [*METHODS, "blocks"]


@pytest.mark.parametrize(
    ("name", "layout"),
    slow_except([("sparse_momentum", "pmap")], [("sparse_momentum", "pmap"), *((name, "data") for name in NAMES)]),
)
def test_with_whole_weights_a_step_sends_what_a_dense_one_does(name, layout):
    layout = device_layout(layout)
    dense, sparse = dense_collectives(layout), collectives(layout, around(name))
    assert sum(dense["all-reduce"].values()) > 0
    assert sparse == dense


@pytest.mark.parametrize("name", slow_except(["sparse_momentum"], NAMES))
def test_with_sharded_weights_nothing_large_is_sent_for_masks(name):
    layout = FullySharded(min_size=64)
    dense, sparse = dense_collectives(layout), collectives(layout, around(name))
    assert dense["all-gather"]
    assert dense["reduce-scatter"]
    for kind, sent in sparse.items():
        more = sent - dense[kind]
        # Scalars, and vectors with a number for each layer or channel.
        assert all(size <= 64 for _, size in more), (kind, more)


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_errors():
    with pytest.raises(ValueError, match="a layout is one of 'one_device', 'pmap', 'data', 'fsdp', got 'mesh'"):
        device_layout("mesh")
    with pytest.raises(ValueError, match="'one_device' is for one device and process, got 8 and 1"):
        OneDevice(jax.devices())
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        OneDevice().gradients(loss_fn, 0)
    for name in MANY:
        with pytest.raises(ValueError, match="30 examples cannot be split into 8 equal parts"):
            device_layout(name).place_batch((np.zeros((30, 2)),))
    layout = OneDevice()
    with pytest.raises(ValueError, match="32 examples cannot be split into 3 equal parts"):
        make_step(layout, sgd(), 3)(layout.place(make_state()), layout.place_batch(make_batch()), 1.0)


def test_what_processes_tell_each_other_is_plain_in_one():
    assert any_process(True)
    assert not any_process(False)
    assert of_processes(3).tolist() == [3]
    with together():
        pass
    with pytest.raises(KeyError, match="mine"), together():
        raise KeyError("mine")
    assert issubclass(ElsewhereError, RuntimeError)
