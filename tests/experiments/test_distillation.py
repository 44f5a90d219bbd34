"""Distillation as a part of the loss."""

import json
import types
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from experiments import data, program, train
from experiments.checkpoints import Checkpoints
from experiments.distillation import Teacher, divergence_from, load_teacher, renormalised
from experiments.inputs import open_dataset
from experiments.workdir import read_metrics, write_json
from jaxsparse import models
from tests.experiments import tiny_text
from tests.experiments.test_program import smoke_config


def test_the_divergence_is_that_of_the_softened_outputs():
    random = np.random.RandomState(0)
    teacher, student = random.normal(size=(2, 3, 5, 7)).astype(np.float32)
    p, q = (np.exp(x / 3) / np.exp(x / 3).sum(-1, keepdims=True) for x in (teacher, student))
    expected = (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(divergence_from(teacher, student, 3.0), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(divergence_from(teacher, teacher + 2.0, 3.0), np.zeros((3, 5)), atol=1e-6)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A dense network of another seed, as a file."""
    tmp_path = tmp_path_factory.mktemp("teacher")
    params = models.LeNet300100().init(jax.random.key(7), np.zeros((1, 8, 8, 1), np.float32))["params"]
    jaxsparse.save_sparse(tmp_path / "teacher.safetensors", params)
    return str(tmp_path / "teacher.safetensors"), params


@pytest.mark.slow
def test_a_step_follows_the_mixed_loss_and_leaves_the_teacher(teacher):
    """A dense step of SGD is that of the gradient by hand, and the loss of the data is what is measured."""
    file, params = teacher
    dataset, rate = data.load("digits", examples=64), 0.1
    config = smoke_config(dense=True, distill_from=file, distill_temperature=3.0, distill_weight=0.25)
    with config.unlocked():
        config.optimizer = {"name": "sgd", "learning_rate": rate}
        config.weight_decay = 0.0
    made = program.make_program(config, dataset)
    state = made.init(0)
    before = state.params
    images, labels, _ = made.task.look_up(made.task.numbers(state.order_key, 0, 1, 1)[0], dataset.train)
    images = made.task.inputs(images)

    def loss(params, of_teacher):
        logits, theirs = (made.model.apply({"params": p}, images) for p in (params, of_teacher))
        of_data = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return 0.75 * of_data + 0.25 * 9 * divergence_from(theirs, logits, 3.0).mean(), of_data

    grads, of_data = jax.grad(loss, has_aux=True)(before, params)
    expected = jax.tree.map(lambda p, g: p - rate * g, before, grads)
    state, measured = made.train_chunk(state, dataset, 0, 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.params, expected)
    assert float(measured["losses"][0]) == pytest.approx(float(of_data), rel=1e-5)
    assert float(measured["divergences"][0]) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill_temperature": 0.0}, "config.distill_temperature is above 0, got 0.0"),
        ({"distill_weight": 1.5}, "config.distill_weight is above 0 and at most 1, got 1.5"),
        ({"distill_from": "NOWHERE"}, "NOWHERE"),
        ({"model.name": "conv_2"}, "config.distill_from=.* does not fit config.model: conv1/bias is not there in the"),
    ],
)
def test_teachers_that_do_not_fit(teacher, changes, message):
    config = smoke_config(distill_from=teacher[0])
    config.update_from_flattened_dict(changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        program.make_program(config, data.load("digits", examples=64))


def test_a_teacher_sees_images_as_it_was_trained_on_them():
    dataset = data.load("digits", examples=64)
    theirs = dataset._replace(mean=np.array([20.0], np.float32), std=np.array([50.0], np.float32))
    assert renormalised(dataset, dataset) is None
    own_inputs = renormalised(dataset, theirs)
    images = dataset.test.images
    found = own_inputs(data.normalise(images, dataset))
    np.testing.assert_allclose(found, data.normalise(images, theirs), rtol=1e-5, atol=1e-5)
    teacher = Teacher(types.SimpleNamespace(apply=lambda variables, inputs: inputs), {}, 1.0, 1.0, own_inputs)
    np.testing.assert_array_equal(teacher.logits({}, data.normalise(images, dataset)), found)


@pytest.mark.slow
def test_a_smaller_gpt_learns_from_the_folder_of_a_run(tmp_path):
    folder = tiny_text.write(tmp_path / "text")
    train.train(tiny_text.config(folder, "dense"), tmp_path / "teacher", quiet=True)
    config = tiny_text.config(folder, "static", distill_from=str(tmp_path / "teacher"), distill_weight=0.9)
    config.model.width = 4
    state, [result] = train.train(config, tmp_path / "student", quiet=True)
    assert state.params["embedding"]["embedding"].shape == (256, 4)
    lines = read_metrics(tmp_path / "student")
    assert lines[-1]["train_divergence"] < lines[0]["train_divergence"]
    assert result["test_loss"] < np.log(256)
    config.data.length = 16
    with pytest.raises(ValueError, match="does not take this run's inputs: 16 tokens are more than the max_length=8"):
        program.make_program(config, open_dataset(config))


@pytest.mark.slow
def test_layouts_and_seeds_have_the_same_teacher(teacher):
    losses, dataset = {}, data.load("digits", examples=64)
    for layout in ("one_device", "data", "pmap"):
        config = smoke_config(dense=True, distill_from=teacher[0], **{"parallel.layout": layout})
        made = program.make_program(config, dataset)
        placed = dataset._replace(train=made.layout.replicate(dataset.train))
        _, measured = made.train_chunk(made.layout.place(made.init(0)), placed, 0, 4)
        losses[layout] = np.stack([measured["losses"], measured["divergences"]])
    config = smoke_config(dense=True, distill_from=teacher[0])
    made = program.make_program(config, dataset, side_by_side=True)
    _, measured = made.train_chunk(made.init(jnp.arange(2)), dataset, 0, 4)
    losses["seeds"] = np.stack([measured["losses"][0], measured["divergences"][0]])
    for name, found in losses.items():
        np.testing.assert_allclose(found, losses["one_device"], rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_a_teacher_of_several_devices_has_the_mean_of_their_batch_statistics(tmp_path):
    dataset, changes = data.load("digits", examples=64), {"data.name": "digits", "data.examples": 64}
    config = smoke_config(dense=True, **changes, **{"parallel.layout": "data", "model.name": "resnet_20"})
    made = program.make_program(config, dataset)
    state = made.layout.collect(made.layout.place(made.init(0)))
    own = jax.tree.map(lambda x: x + jnp.arange(8.0).reshape(8, *[1] * (x.ndim - 1)), state.model_state)
    with closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        checkpoints.save(1, state._replace(model_state=own), devices=8, stream=None, pruned=())
    write_json(tmp_path / "config.json", json.loads(config.to_json()))
    config.update_from_flattened_dict({"parallel.layout": "one_device", "distill_from": str(tmp_path)})
    with pytest.raises(ValueError, match="is not finished, so that its weights may still change"):
        load_teacher(config, made.model, made.task)
    write_json(tmp_path / "result.json", {})
    teacher = load_teacher(config, made.model, made.task)
    jax.tree.map(
        lambda x, fresh: np.testing.assert_allclose(x, fresh[0] + 3.5, rtol=1e-6),
        teacher.variables["batch_stats"], state.model_state["batch_stats"],
    )  # fmt: skip
