import runpy
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import jaxsparse
from experiments import build, data, inputs, options, program, tasks
from jaxsparse import structures

CONFIG = Path(__file__).parents[2] / "configs" / "digits_sparse_momentum.py"


def smoke_config(**changes):
    config = options.small(runpy.run_path(str(CONFIG))["get_config"]()).lock()
    config.update_from_flattened_dict(changes)
    return config


def test_seed_reaches_the_masks():
    params = {"kernel": jnp.ones((20, 30))}
    optimizer = build.make_optimizer(smoke_config(), 44)
    masks = [jaxsparse.get_masks(optimizer.make(jax.random.key(seed)).init(params)) for seed in (0, 1)]
    assert jnp.any(masks[0]["kernel"] != masks[1]["kernel"])


def test_dense_optimizer_is_the_sparse_one_without_its_last_link():
    params = {"kernel": jnp.ones((4, 5))}
    sparse, dense = (build.make_optimizer(smoke_config(dense=dense), 44).make().init(params) for dense in (False, True))
    chex.assert_trees_all_equal(sparse[:-1], dense)


def test_fixed_masks_are_read_once_and_take_the_place_of_the_method(tmp_path, monkeypatch):
    dataset, file = data.load("digits", examples=64), str(tmp_path / "sparse.safetensors")
    state = program.make_program(smoke_config(), dataset).init(1)
    masks = jaxsparse.get_masks(state.opt_state, state.params)
    jaxsparse.save_sparse(file, state.params, masks)
    read, load_sparse = [], jaxsparse.load_sparse
    monkeypatch.setattr(jaxsparse, "load_sparse", lambda path: read.append(path) or load_sparse(path))
    made = program.make_program(smoke_config(masks_from=file, start="original"), dataset)
    kept = made.init(2)
    chex.assert_trees_all_equal(jaxsparse.get_masks(kept.opt_state, kept.params), masks)
    assert kept.opt_state[-1].method == "mask_updates"
    assert read == [file]


@pytest.mark.slow
def test_weights_are_scaled_to_the_masks_that_they_start_on(tmp_path):
    dataset, file = data.load("digits", examples=64), str(tmp_path / "sparse.safetensors")
    plain, scaled = (program.make_program(smoke_config(sparse_init=on), dataset).init(1) for on in (False, True))
    masks = jaxsparse.get_masks(plain.opt_state, plain.params)
    chex.assert_trees_all_equal(jaxsparse.get_masks(scaled.opt_state, scaled.params), masks)
    chex.assert_trees_all_close(scaled.params, jaxsparse.sparse_init(plain.params, masks), rtol=1e-6)
    fan_in = masks["fc1"]["kernel"].sum(0)
    ratio = jnp.abs(scaled.params["fc1"]["kernel"]).sum(0) / jnp.abs(plain.params["fc1"]["kernel"]).sum(0)
    np.testing.assert_allclose(ratio[fan_in > 0], jnp.sqrt(64 / fan_in)[fan_in > 0], rtol=1e-5)
    jaxsparse.check(scaled.opt_state, scaled.params)
    jaxsparse.save_sparse(file, plain.params, masks)
    fixed = smoke_config(sparse_init=True, masks_from=file, start="original")
    state = program.make_program(fixed, dataset).init(1)
    chex.assert_trees_all_close(state.params, scaled.params, rtol=1e-6)
    fixed.start = "weights"
    with pytest.raises(ValueError, match="config.sparse_init scales random weights, and with config.start='weights'"):
        program.make_program(fixed, dataset)
    dense = program.make_program(smoke_config(sparse_init=True, dense=True), dataset).init(1)
    assert bool(jnp.all(dense.params["fc1"]["kernel"] != 0))
    wrapper = runpy.run_path(str(CONFIG.with_name("mnist_l0.py")))["get_config"]("lenet_300_100")
    wrapper.sparse_init = True
    with pytest.raises(ValueError, match="config.sparse_init is for links, and l0 is a wrapper"):
        build.make_optimizer(wrapper, 44)


@pytest.mark.parametrize(
    "prune_rate",
    [
        0.5,
        {"name": "cosine_prune_rate", "init_value": 0.5, "steps_epochs": "config.epochs"},
        {"name": "linear_schedule", "init_value": 0.5, "end_value": 0.0, "transition_steps_epochs": "config.epochs"},
    ],
)
def test_a_prune_rate_is_a_number_or_a_schedule(prune_rate):
    config = smoke_config()
    with config.unlocked():
        del config.method.prune_rate
        config.method.update({"prune_rate": prune_rate})
    opt_state = build.make_optimizer(config, 44).make(jax.random.key(0)).init({"kernel": jnp.ones((20, 30))})
    assert int(opt_state[-1].kept) == 60


@pytest.mark.parametrize(
    ("given", "structure"),
    [
        ("weight", "weight"),
        ("channel", "channel"),
        ({"name": "block", "bm": 16, "bn": 32}, structures.block(16, 32)),
        ({"name": "n_of_m", "n": 2, "m": 4}, structures.n_of_m(2, 4)),
        ({"fc1/kernel": {"name": "block", "bm": 8, "bn": 4}}, {"fc1/kernel": structures.block(8, 4)}),
    ],
)
def test_structures_by_name(given, structure):
    calls = build.Calls(smoke_config(), 44)
    assert calls.value(ConfigDict({"structure": given}), "config.method") == {"structure": structure}


def test_asni_takes_a_structure():
    config = options.small(runpy.run_path(str(CONFIG.parent / "mnist_asni.py"))["get_config"]())
    del config.method.structure
    config.method.structure = ConfigDict({"name": "block", "bm": 4, "bn": 4})
    params = {"kernel": jnp.arange(1.0, 8 * 12 + 1).reshape(8, 12)}
    tx = build.make_optimizer(config, steps_per_epoch=1).make()
    opt_state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(4):
        updates, opt_state = update(jax.tree.map(jnp.zeros_like, params), opt_state, params)
        params = optax.apply_updates(params, updates)
    kept = jaxsparse.get_masks(opt_state)["kernel"]
    assert 0 < kept.sum() < kept.size
    assert structures.block(4, 4).holds(kept)


def test_an_unknown_structure_is_an_error():
    with pytest.raises(ValueError, match="config.method: structure .* got 'wieght'"):
        build.make_optimizer(smoke_config(**{"method.structure": "wieght"}), 44)


@pytest.mark.parametrize(("unit", "steps"), [("weights", 20), ("blocks", -1)])
def test_dense_gradient_steps_that_mean_nothing_are_an_error(unit, steps):
    config = options.small(runpy.run_path(str(CONFIG.parent / "mnist_mlp.py"))["get_config"](unit))
    config.dense_gradient_steps = steps
    with pytest.raises(ValueError, match=f"at least 0, and for models with config.model.blocks, got {steps}"):
        program.make_program(config, data.load("digits", examples=1200))


@pytest.mark.slow
def test_gradients_are_dense_only_before_masks_change():
    config = options.small(runpy.run_path(str(CONFIG.parent / "mnist_mlp.py"))["get_config"]()).lock()
    config.update_from_flattened_dict({
        "data.name": "digits", "data.batch_size": 200, "model.features": (64, 64),
        "model.blocks": ((16, 16), (16, 16), None), "dense_gradient_steps": 2,
        **{f"method.structure.fc{layer}/kernel.{side}": 16 for layer in (1, 2) for side in ("bm", "bn")},
        "optimizer.momentum": 0.0, "weight_decay": 0.0,
    })  # fmt: skip
    dataset = data.load("digits", examples=1200)  # masks change every six steps
    chunk, state = program.make_program(config, dataset), None
    state, seen = chunk.init(0), []
    for step in range(8):
        state, _ = chunk.train_chunk(state, dataset, step, 1)
        masks = jaxsparse.get_masks(state.opt_state, state.params)
        trace = jaxsparse.transforms.stored_momentum(state.opt_state, state.params)
        seen.append(bool(((trace["fc2"]["kernel"] != 0) & ~masks["fc2"]["kernel"]).any()))
    # Masks change on the step counted 6, by the gradients of that and the one before.
    assert seen == [step % 6 in (0, 5) for step in range(8)]


@pytest.mark.parametrize(("clip_norm", "norm"), [(1.0, 1.0), (float("inf"), 30.0), (None, 30.0)])
def test_gradients_are_clipped(clip_norm, norm):
    config = smoke_config(dense=True)
    config.clip_norm = clip_norm
    config.weight_decay = config.optimizer.momentum = 0.0
    tx, params = build.make_optimizer(config, 44).make(), {"kernel": jnp.ones(9)}
    updates, _ = tx.update({"kernel": jnp.full(9, 10.0)}, tx.init(params), params)
    assert jnp.linalg.norm(updates["kernel"]) == pytest.approx(norm * config.optimizer.learning_rate.init_value)


@pytest.mark.parametrize(
    ("start", "length", "epochs"), [(0, 12, 3), (0, 3, 1), (3, 1, 1), (3, 2, 2), (2, 9, 3), (11, 1, 1), (4, 4, 1)]
)
def test_batches_do_not_depend_on_the_chunk(start, length, epochs):
    key, size, examples = jax.random.key(0), 5, 22  # four steps an epoch, two examples dropped
    whole = inputs.batches(key, 0, 12, size, examples, epochs=3)
    chunk = inputs.batches(key, start, length, size, examples, epochs)
    chex.assert_trees_all_equal(chunk, whole[start : start + length])
    for epoch in whole.reshape(3, 20):
        assert len(jnp.unique(epoch)) == 20
    assert jnp.any(whole[:4] != whole[4:8])


def test_smoothed_labels():
    logits, labels = jnp.array([[2.0, 0.0, -1.0], [0.5, 1.0, 0.0]]), jnp.array([0, 2])
    of_classes = -jax.nn.log_softmax(logits)
    plain = of_classes[jnp.arange(2), labels]
    chex.assert_trees_all_close(program.cross_entropy(logits, labels), plain, rtol=1e-6)
    smoothed = 0.9 * plain + 0.1 * of_classes.mean(-1)
    chex.assert_trees_all_close(program.cross_entropy(logits, labels, 0.1), smoothed, rtol=1e-6)


@pytest.mark.parametrize("batch_size", [3, 7, 10])
def test_in_batches_fills_the_last_up(batch_size):
    split = data.Split(np.arange(7 * 4, dtype=np.uint8).reshape(7, 2, 2, 1), np.arange(7, dtype=np.int32))
    images, labels, real = inputs.in_batches(split, batch_size)
    chex.assert_shape(images, (-(-7 // batch_size), batch_size, 2, 2, 1))
    chex.assert_trees_all_equal(images[real], split.images)
    chex.assert_trees_all_equal(labels[real], split.labels)


def test_evaluation_does_not_depend_on_the_batches(monkeypatch):
    dataset = data.load("digits")
    results = []
    for size in (359, 100):
        monkeypatch.setattr(tasks, "EVAL_BATCH", size)
        compiled = program.make_program(smoke_config(), dataset)
        results.append(compiled.evaluate(compiled.init(0), dataset.test))
    chex.assert_trees_all_close(*results, rtol=1e-6)


@pytest.mark.slow
def test_chunks_of_any_length_make_the_same_run():
    dataset, ends = data.load("digits"), []
    compiled = program.make_program(smoke_config(), dataset)
    for lengths in ((60,), (30, 30)):  # masks change on the step counted 44
        state, start = compiled.init(0), 0
        for length in lengths:
            state, _ = compiled.train_chunk(state, dataset, start, length)
            start += length
        ends.append(state.params)
    for end in ends[1:]:
        chex.assert_trees_all_equal(ends[0], end)
