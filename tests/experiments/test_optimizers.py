"""The learning rates of all configurations, and what those of ImageNet make; they are too large to run here."""

import math
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import networks, optimizers, program
from jaxsparse import models
from jaxsparse.allocation import layer_counts
from jaxsparse.trees import by_path
from tests.experiments.test_configs import ALL, FIRST, ROOT, config_of
from tests.problems import slow_except

IMAGENET = list(runpy.run_path(str(ROOT / "configs/imagenet.py"))["EXPERIMENTS"])
TRAIN_IMAGES = 1_281_167
ALL_OF_MNIST = (("mnist_sparse_momentum", "lenet_300_100"), ("mnist_asni", "fc"), ("mnist_l0", "lenet_300_100"))


def imagenet(experiment, **changes):
    config = config_of("imagenet", experiment)
    config.update_from_flattened_dict(changes)
    return config, TRAIN_IMAGES // config.data.batch_size


def learning_rate(steps, experiment, **changes):
    config, steps_per_epoch = imagenet(experiment, **changes)
    return np.asarray(jax.jit(jax.vmap(optimizers.learning_rate(config, steps_per_epoch)))(jnp.asarray(steps)))


@pytest.mark.parametrize(("name", "argument"), slow_except(FIRST, [pair for pair in ALL if "rda" not in pair[0]]))
def test_recipes_of_the_papers_neither_warm_up_nor_scale_and_are_decayed_as_they_say(name, argument):
    config, steps_per_epoch = config_of(name, argument), 391
    optimizer = config.optimizer
    if config.sparsity.method == "sparse_momentum":
        expected = optax.exponential_decay(0.1, optimizer.decay_every_steps, 0.1, staircase=True)
    elif optimizer.cosine_scale is not None:

        def expected(step):
            cosine = jnp.cos(jnp.pi * (step // steps_per_epoch) / (1.06 * (config.epochs + 1)))
            return 0.5 * optimizer.learning_rate * (1 + cosine)

    else:
        at = {epoch * steps_per_epoch: optimizer.decay_rate for epoch in optimizer.decay_at_epochs}
        expected = optax.piecewise_constant_schedule(optimizer.learning_rate, at)
    steps = jnp.arange(0, config.epochs * steps_per_epoch, 23)
    found = optimizers.learning_rate(config, steps_per_epoch)(steps)
    np.testing.assert_array_equal(np.float32(found), np.float32(expected(steps)))


def test_learning_rates_of_imagenet():
    epochs = 5004 * np.array([30, 60, 90])
    for experiment in ("sparse_momentum_10", "sparse_momentum_20", "dep_l0_forward", "dep_l0_backward", "l0_hc"):
        found = learning_rate([0, *(epochs - 1), *epochs, 500_399], experiment)
        np.testing.assert_allclose(found, [0.1, 0.1, 0.01, 0.001, 0.01, 0.001, 1e-4, 1e-4], rtol=1e-6)
    # Per step: the middle of 90 epochs of 5004 steps, and the last of five epochs of warm-up.
    found = learning_rate([0, 12_509, 25_019, 225_180, 450_360], "dense")
    expected = [0.1 / 25_020, 0.05 * 0.998097, 0.1 * 0.992405, 0.05, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)
    # Per epoch, of 1562 steps: cos(pi / 92.82) and cos(89 pi / 92.82).
    found = learning_rate([0, 1561, 1562, 140_579], "asni_80")
    np.testing.assert_allclose(found, [0.35, 0.35, 0.175 * 1.999427, 0.175 * 0.0083466], rtol=1e-4)


def test_learning_rate_grows_with_the_batch_and_at_first_with_the_steps():
    large = {"data.batch_size": 1024, "optimizer.warmup_epochs": 5.0}  # 1251 steps an epoch
    found = learning_rate([0, 624, 6254, 6255, 30 * 1251 - 1, 30 * 1251], "sparse_momentum_10", **large)
    np.testing.assert_allclose(found, [0.4 / 6255, 0.4 * 625 / 6255, 0.4, 0.4, 0.4, 0.04], rtol=1e-6)
    assert learning_rate([0], "asni_80", **{"data.batch_size": 816}) == pytest.approx(0.35 * 816 / 820)
    assert learning_rate([0], "imagenette", **{"optimizer.warmup_epochs": 0.0}) == pytest.approx(0.1 * 64 / 256)


def test_weights_move_by_the_learning_rate():
    config = config_of("imagenet", "l0_hc")
    config.update_from_flattened_dict({
        "dense": True, "data.batch_size": 512, "optimizer.warmup_epochs": 1.0, "optimizer.weight_decay": 0.0,
        "optimizer.momentum": 0.0, "optimizer.decay_at_epochs": (2,),
    })  # fmt: skip
    tx, params = optimizers.make_optimizer(config, steps_per_epoch=2), {"kernel": jnp.zeros(())}
    update, opt_state, found = jax.jit(tx.update), tx.init(params), []
    for _ in range(6):
        updates, opt_state = update({"kernel": jnp.ones(())}, opt_state, params)
        found.append(-float(updates["kernel"]))
    np.testing.assert_allclose(found, [0.1, 0.2, 0.2, 0.2, 0.02, 0.02], rtol=1e-6)


def test_learning_rate_of_gates_and_step_sizes_of_dual_averaging():
    config, steps = imagenet("l0_hc", **{"optimizer.warmup_epochs": 5.0, "data.batch_size": 512})
    sparsity = config.sparsity
    schedule = optimizers.decayed_at_epochs(config, sparsity.gate_learning_rate, sparsity.gate_decay_rate, steps)
    found = [float(schedule(step)) for step in (0, 30 * 2502 - 1, 30 * 2502, 90 * 2502)]
    np.testing.assert_allclose(found, [1e-3, 1e-3, 2e-4, 8e-6], rtol=1e-6)  # neither warmed up nor scaled
    config, steps = imagenet("rda")
    step_size, _ = optimizers.RDA_SCHEDULES[config.optimizer.schedule](config, steps)
    found = [float(step_size(step)) for step in (5003, 10_007, 500_399)]  # warmed up for two of a hundred epochs
    np.testing.assert_allclose(found, [0.5, 1, 10**-2.2], rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.warmup_epochs": -1.0}, "warmup_epochs is from 0 to the 100 epochs, got -1.0"),
        ({"optimizer.warmup_epochs": 101.0}, "warmup_epochs is from 0 to the 100 epochs, got 101.0"),
        ({"optimizer.scale_with_batch": 0}, "scale_with_batch is a batch size of at least 1, got 0"),
        ({"optimizer.schedule": "cosin"}, "schedule is one of 'every_steps', 'at_epochs', 'cosine', .*, got 'cosin'"),
    ],
)
@pytest.mark.parametrize("experiment", ["sparse_momentum_10", "l0_hc"])
def test_learning_rates_that_mean_nothing(experiment, changes, message):
    config, steps_per_epoch = imagenet(experiment, **changes)
    with pytest.raises(ValueError, match=f"config.optimizer.{message}"):
        optimizers.make_optimizer(config, steps_per_epoch)


@pytest.mark.parametrize("experiment", slow_except(["l0_hc"], IMAGENET))
def test_every_experiment_on_imagenet_makes_resnet_50_and_its_optimizer(experiment):
    config, steps_per_epoch = imagenet(experiment)
    model = networks.make_model(config, 1000, program.make_layout(config))
    size = config.data.image_size
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    leaves = by_path(variables["params"])
    assert sum(leaf.size for leaf in leaves.values()) == 25_557_032
    opt_state = jax.eval_shape(
        optimizers.make_optimizer(config, steps_per_epoch, model=model).init, variables["params"]
    )
    kernels = {path: leaf for path, leaf in leaves.items() if leaf.ndim > 1}
    assert sum(kernel.size for kernel in kernels.values()) == 25_502_912
    kept = {"sparse_momentum_10": 2_550_291, "sparse_momentum_20": 5_100_582, "imagenette": 5_100_582}
    if experiment in kept:
        counts = layer_counts(kernels, config.sparsity.sparsity, config.sparsity.allocation)
        assert counts.sum() == kept[experiment]
    if optimizers.is_gated(config):
        areas = [math.prod(leaves[group.kernel].shape[:2]) for group in models.channel_groups(model)]
        assert list(config.sparsity.penalty_factors) == areas
    if config.sparsity.method == "dep_l0":
        width = {"forward": 64, "backward": 512}[config.sparsity.direction]
        assert opt_state.generator[0]["kernel"].shape == (width, width)
    if config.sparsity.method == "asni":
        schedule = optimizers.SPARSITIES[config.sparsity.schedule](config.sparsity, config.epochs)
        assert schedule(88) == pytest.approx(0.8031, abs=1e-4)  # in the last epoch


def test_a_changed_key_that_has_no_effect_is_refused():
    mnist, asni, l0 = (config_of(*pair) for pair in ALL_OF_MNIST)
    for config, keys, needed in (
        (mnist, ("data.image_size", "data.workers", "data.classes"), "config.data.streamed"),
        (mnist, ("data.pad_mode",), "config.data.pad"),
        (mnist, ("optimizer.decay_at_epochs",), "config.optimizer.schedule='at_epochs'"),
        (asni, ("optimizer.momentum",), "config.optimizer.name='sgd'"),
        (asni, ("sparsity.masks_from", "sparsity.start"), "config.sparsity.method='mask_updates'"),
        (asni, ("optimizer.decay_every_steps",), "config.optimizer.schedule='every_steps'"),
    ):
        for key in keys:
            with pytest.raises(ValueError, match=f"config.{key} has no effect without {needed}"):
                optimizers.refuse_idle(config, ["seed", key])
    asni.sparsity.method = "mask_updates"
    with pytest.raises(ValueError, match="sparsity.magnitude has no effect without a .*method that prunes"):
        optimizers.refuse_idle(asni, ["sparsity.method", "sparsity.magnitude"])
    optimizers.refuse_idle(asni, ["sparsity.masks_from", "sparsity.start"])
    asni.sparsity.method = "asni"
    optimizers.refuse_idle(mnist, ["optimizer.decay_every_steps", "optimizer.decay_rate", "optimizer.momentum"])
    optimizers.refuse_idle(asni, ["sparsity.scale", "optimizer.cosine_scale", "sparsity.schedule"])
    optimizers.refuse_idle(l0, ["optimizer.decay_at_epochs", "sparsity.gate_decay_rate"])
    optimizers.refuse_idle(imagenet("rda")[0], ["data.image_size", "data.workers", "data.classes"])
    with pytest.raises(ValueError, match="halve_after_epochs has no effect without .*='halving'"):
        optimizers.refuse_idle(imagenet("rda")[0], ["optimizer.halve_after_epochs"])
