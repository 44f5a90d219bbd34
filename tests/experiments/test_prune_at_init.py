"""Pruning before training, as a method of the trainer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from experiments import data, program, tasks, train
from experiments.prune_at_init import prune_at_init
from jaxsparse import saliency
from tests.experiments.test_configs import config_of, random_images
from tests.experiments.test_program import smoke_config

SIZE = 64 * 300 + 300 * 100 + 100 * 10


def config_with(**method):
    config = smoke_config()
    with config.unlocked():
        config.method = {"name": "prune_at_init", "sparsity": 0.9, **method}
    return config


def masks_of(program, seed=0):
    state = program.init(seed)
    masks = jaxsparse.get_masks(state.opt_state, state.params)
    assert all(not np.any(np.asarray(w)[~np.asarray(m)]) for w, m in zip(*map(jax.tree.leaves, (state.params, masks)),
                                                                         strict=True) if m.ndim)  # fmt: skip
    return masks


@pytest.mark.slow
def test_the_scores_are_of_the_weights_that_the_run_starts_with_and_of_its_images():
    dataset = data.load("digits", examples=400)
    made = program.make_program(config_with(score="snip", examples=50), dataset)
    masks = masks_of(made)
    # The same by hand: the weights of the seed, before they are pruned, and images drawn by its key.
    init_key, _, mask_key = jax.random.split(jax.random.key(0), 3)
    rows = np.asarray(jax.random.permutation(jax.random.split(mask_key)[0], 400)[:50])
    images, labels = data.normalise(dataset.train.images[rows], dataset), dataset.train.labels[rows]

    @jax.jit
    def by_hand(key):
        params = made.model.init(key, jnp.zeros((1, *made.task.shape)))["params"]

        def loss(params):
            logits = made.model.apply({"params": params}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jaxsparse.score_masks(params, saliency.snip(loss, params), 0.9, scope="global")

    expected = by_hand(init_key)
    differ = sum(int(jnp.sum(a != b)) for a, b in zip(*map(jax.tree.leaves, (masks, expected)), strict=True))
    assert differ <= 4  # compiled otherwise, the last bits of scores are others
    assert int(jaxsparse.count(masks)) == int(jaxsparse.count(expected)) == SIZE // 10


@pytest.mark.slow
def test_every_score_prunes_and_every_seed_has_masks_of_its_own():
    dataset = data.load("digits", examples=400)
    kept = {}
    arms = {"grasp": {}, "synflow": {"rounds": 3}, "magnitude": {"scope": "layer"}, "random": {}}
    for score, options in arms.items():
        made = program.make_program(config_with(score=score, **options), dataset)
        first, second = masks_of(made, 0), masks_of(made, 1)
        kept[score] = int(jaxsparse.count(first))
        assert any(bool(jnp.any(a != b)) for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True))
        if score in ("magnitude", "random"):
            assert int(first["fc1"]["kernel"].sum()) == 1920
    assert kept == dict.fromkeys(arms, SIZE // 10)


@pytest.mark.slow
def test_grasp_scores_by_equally_many_images_of_every_class():
    dataset = data.load("digits", examples=400)
    pruner, task = prune_at_init("grasp", 0.9, examples=60), tasks.make_task(config_with(score="grasp"), dataset)
    images, labels = pruner.inputs(jax.random.key(3), task, data.Split(*map(jnp.asarray, dataset.train)))
    assert np.bincount(labels).tolist() == [6] * 10
    assert images.shape == (60, 8, 8, 1)


@pytest.mark.slow
def test_a_run_keeps_its_masks(tmp_path):
    config = config_with(score="synflow", rounds=2)
    config.update_from_flattened_dict({"epochs": 1, "eval_every_epochs": 1, "checkpoint_every_epochs": 1})
    state, [result] = train.train(config, tmp_path)
    assert result["density"] == pytest.approx(0.1, abs=1e-4)
    start = masks_of(program.make_program(config, data.load("digits", examples=config.data.examples)), config.seed)
    jax.tree.map(np.testing.assert_array_equal, jaxsparse.get_masks(state.opt_state, state.params), start)


@pytest.mark.slow
def test_convolutions_and_batch_statistics_too():
    config = config_of("cifar_rda", "resnet20")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.depth = 8
        for score in ("grasp", "synflow"):
            config.method = {"name": "prune_at_init", "score": score, "sparsity": 0.9, "rounds": 2}
            state = program.make_program(config, random_images(config, 300)).init(0)
            density = jaxsparse.density(jaxsparse.get_masks(state.opt_state, state.params))
            assert float(density) == pytest.approx(0.1, abs=1e-4)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"score": "snap"},
            "config.method: score is one of 'snip', 'grasp', 'synflow', 'magnitude', 'random', got 'snap'",
        ),
        ({"score": "snip", "sparsity": 1.0}, "config.method: sparsity is the fraction of zeros and must be in"),
        ({"score": "snip", "examples": 0}, "config.method: examples is a whole number of at least 1, got 0"),
        ({"score": "snip", "examples": 500}, "config.method: examples is at most the 400 train examples, got 500"),
        ({"score": "grasp", "examples": 9}, "config.method: examples is shared equally by the 10 classes"),
        ({"score": "synflow", "rounds": 0}, "config.method: rounds is a whole number of at least 1, got 0"),
        ({"score": "synflow", "scope": "layer"}, "config.method: synflow ranks the whole network"),
        (
            {"score": "synflow", "scope": "global", "allocation": "erdos_renyi"},
            "method: synflow ranks the whole network",
        ),
        ({"score": "synflow", "temperature": 2.0}, "config.method: temperature is above 0, and for the scores snip"),
        ({"score": "snip", "samples": 2}, "config.method: prune_at_init takes no 'samples'; did you mean 'examples'"),
    ],
)
def test_bad_options(method, message):
    with pytest.raises(ValueError, match=message):
        program.make_program(config_with(**method), data.load("digits", examples=400))


@pytest.mark.slow
def test_scores_that_are_not_finite_are_an_error(monkeypatch):
    made = program.make_program(config_with(score="magnitude"), data.load("digits", examples=400))
    monkeypatch.setattr(made, "_fresh", lambda params, key: jax.tree.map(lambda p: p / 0, params))
    with pytest.raises(ValueError, match="of the scores 'magnitude' are not finite"):
        made.init(0)
