"""What configs call for: learning rates, methods, errors; and what those of ImageNet make, too large to run here."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import jaxsparse
from experiments import build, networks, options, program
from jaxsparse import models
from jaxsparse.allocation import layer_counts
from jaxsparse.trees import by_path
from tests.experiments.test_configs import ALL, ARGUMENTS, FIRST, config_of
from tests.problems import slow_except

TRAIN_IMAGES = 1_281_167
ALL_OF_MNIST = (("mnist_sparse_momentum", "lenet_300_100"), ("mnist_asni", "fc"), ("mnist_l0", "lenet_300_100"))


def imagenet(experiment, **changes):
    config = config_of("imagenet", experiment)
    config.update_from_flattened_dict(changes)
    return config, TRAIN_IMAGES // config.data.batch_size


def learning_rate(steps, experiment, **changes):
    return values(rate(*imagenet(experiment, **changes)), steps)


def rate(config, steps_per_epoch):
    """The learning rate, as the optimizer gets it."""
    return build.Calls(config, steps_per_epoch).value(config.optimizer.learning_rate, build.RATE)


def values(schedule, steps):
    schedule = schedule if callable(schedule) else optax.constant_schedule(schedule)
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.asarray(steps)))


OWN = ("cifar10_resnet8", "text_gpt")  # with recipes that are no paper's
OF_PAPERS = [pair for pair in ALL if "rda" not in pair[0] and pair[0] not in OWN]


@pytest.mark.parametrize(("name", "argument"), slow_except([pair for pair in FIRST if pair[0] not in OWN], OF_PAPERS))
def test_recipes_of_the_papers_neither_warm_up_nor_scale_and_are_decayed_as_they_say(name, argument):
    config, steps_per_epoch = config_of(name, argument), 391
    given = config.optimizer.learning_rate
    if getattr(given, "name", None) == "exponential_decay":
        expected = optax.exponential_decay(0.1, given.transition_steps, 0.1, staircase=True)
    elif isinstance(given, float):
        expected = optax.constant_schedule(given)
    elif "scale" in given:

        def expected(step):
            cosine = jnp.cos(jnp.pi * (step // steps_per_epoch) / (1.06 * (config.epochs + 1)))
            return 0.5 * given.init_value * (1 + cosine)

    else:
        at = {epoch * steps_per_epoch: given.decay_rate for epoch in given.at_epochs}
        expected = optax.piecewise_constant_schedule(given.init_value, at)
    steps = jnp.arange(0, config.epochs * steps_per_epoch, 23)
    found = rate(config, steps_per_epoch)
    found = found(steps) if callable(found) else found
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
    large = {"data.batch_size": 1024, "warmup_epochs": 5.0}  # 1251 steps an epoch
    found = learning_rate([0, 624, 6254, 6255, 30 * 1251 - 1, 30 * 1251], "sparse_momentum_10", **large)
    np.testing.assert_allclose(found, [0.4 / 6255, 0.4 * 625 / 6255, 0.4, 0.4, 0.4, 0.04], rtol=1e-6)
    assert learning_rate([0], "asni_80", **{"data.batch_size": 816}) == pytest.approx(0.35 * 816 / 820)
    assert learning_rate([0], "imagenette", **{"warmup_epochs": 0.0}) == pytest.approx(0.1 * 64 / 256)


def test_weights_move_by_the_learning_rate():
    config = config_of("imagenet", "l0_hc")
    config.update_from_flattened_dict({
        "dense": True, "data.batch_size": 512, "warmup_epochs": 1.0, "weight_decay": 0.0,
        "optimizer.momentum": 0.0, "optimizer.learning_rate.at_epochs": (2,),
    })  # fmt: skip
    tx, params = build.make_optimizer(config, steps_per_epoch=2).make(), {"kernel": jnp.zeros(())}
    update, opt_state, found = jax.jit(tx.update), tx.init(params), []
    for _ in range(6):
        updates, opt_state = update({"kernel": jnp.ones(())}, opt_state, params)
        found.append(-float(updates["kernel"]))
    np.testing.assert_allclose(found, [0.1, 0.2, 0.2, 0.2, 0.02, 0.02], rtol=1e-6)


def test_learning_rate_of_gates_and_step_sizes_of_dual_averaging():
    config, steps = imagenet("l0_hc", **{"warmup_epochs": 5.0, "data.batch_size": 512})
    of_gates = config.method.gate_optimizer.learning_rate
    schedule = build.Calls(config, steps).value(of_gates, "config.method.gate_optimizer.learning_rate")
    found = [float(schedule(step)) for step in (0, 30 * 2502 - 1, 30 * 2502, 90 * 2502)]
    np.testing.assert_allclose(found, [1e-3, 1e-3, 2e-4, 8e-6], rtol=1e-6)  # neither warmed up nor scaled
    config, steps = imagenet("rda")
    step_size, _ = build.Calls(config, steps).value("config.optimizer.schedules", "")
    found = [float(step_size(step)) for step in (5003, 10_007, 500_399)]  # warmed up for two of a hundred epochs
    np.testing.assert_allclose(found, [0.5, 1, 10**-2.2], rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_epochs": -1.0}, "config.warmup_epochs is from 0 to the 100 epochs, got -1.0"),
        ({"warmup_epochs": 101.0}, "config.warmup_epochs is from 0 to the 100 epochs, got 101.0"),
        ({"scale_with_batch": 0}, "config.scale_with_batch is a batch size of at least 1, got 0"),
        (
            {"optimizer.learning_rate.name": "decay_at"},
            "config.optimizer.learning_rate.name .*; did you mean 'decays_at'",
        ),
    ],
)
@pytest.mark.parametrize("experiment", ["sparse_momentum_10", "l0_hc"])
def test_learning_rates_that_mean_nothing(experiment, changes, message):
    config, steps_per_epoch = imagenet(experiment, **changes)
    with pytest.raises(ValueError, match=message):
        build.make_optimizer(config, steps_per_epoch)


@pytest.mark.parametrize("experiment", slow_except(["l0_hc"], ARGUMENTS["imagenet"]))
def test_every_experiment_on_imagenet_makes_resnet_50_and_its_optimizer(experiment):
    config, steps_per_epoch = imagenet(experiment)
    model = networks.make_model(config, 1000, program.make_layout(config))
    size = config.data.image_size
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    leaves = by_path(variables["params"])
    assert sum(leaf.size for leaf in leaves.values()) == 25_557_032
    optimizer = build.make_optimizer(config, steps_per_epoch, model)
    opt_state = jax.eval_shape(optimizer.make().init, variables["params"])
    kernels = {path: leaf for path, leaf in leaves.items() if leaf.ndim > 1}
    assert sum(kernel.size for kernel in kernels.values()) == 25_502_912
    kept = {"sparse_momentum_10": 2_550_291, "sparse_momentum_20": 5_100_582, "imagenette": 5_100_582}
    if experiment in kept:
        counts = layer_counts(kernels, config.method.sparsity, config.method.allocation)
        assert counts.sum() == kept[experiment]
    if optimizer.groups is not None:
        areas = [math.prod(leaves[group.kernel].shape[:2]) for group in models.channel_groups(model)]
        np.testing.assert_allclose(config.method.penalty.strength, [5e-9 * area for area in areas])
    if config.method.name == "dep_l0":
        width = {"forward": 64, "backward": 512}[config.method.direction]
        assert opt_state.generator[0]["kernel"].shape == (width, width)
    if config.method.name == "asni":
        schedule = build.Calls(config, steps_per_epoch).value(config.method.sparsity, "config.method.sparsity")
        assert schedule(89 * steps_per_epoch) == pytest.approx(0.8031, abs=1e-4)  # in the last epoch


def test_a_changed_key_that_has_no_effect_is_refused():
    mnist, asni, l0 = (config_of(*pair) for pair in ALL_OF_MNIST)
    for config, keys, needed in (
        (mnist, ("data.image_size", "data.workers", "data.classes"), "config.data.streamed"),
        (mnist, ("data.pad_mode",), "config.data.pad"),
        (asni, ("start",), "config.masks_from"),
    ):
        for key in keys:
            with pytest.raises(ValueError, match=f"config.{key} has no effect without {needed}"):
                options.refuse_idle(config, ["seed", key])
    asni.masks_from = "model"
    with pytest.raises(ValueError, match="config.method.sparsity.magnitude has no effect without a method: .*fixed"):
        options.refuse_idle(asni, ["masks_from", "method.sparsity.magnitude"])
    options.refuse_idle(asni, ["masks_from", "start"])
    options.refuse_idle(l0, ["optimizer.learning_rate.at_epochs", "method.penalty.strength"])
    options.refuse_idle(imagenet("rda")[0], ["data.image_size", "data.workers", "data.classes"])
    config, steps_per_epoch = imagenet("rda", warmup_epochs=1.0)
    with pytest.raises(ValueError, match="config.warmup_epochs has no effect without config.optimizer.learning_rate"):
        build.make_optimizer(config, steps_per_epoch)


def test_copies_of_a_config_share_nothing():
    config = config_of("digits_sparse_momentum", None)
    small = options.small(config)
    assert (small.epochs, small.data.examples, small.is_locked) == (4, 1408, True)
    other = options.with_seed(config, 3)
    other.masks_from = "model"
    assert (config.seed, config.masks_from, config.data.examples, config.epochs) == (0, None, None, 100)
    assert "smoke_overrides" not in options.for_run(config, {})


def digits(**changes):
    config = config_of("digits_sparse_momentum", None)
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict(changes)
    return config


def made(call, key="config.x", **changes):
    return build.Calls(digits(**changes), steps_per_epoch=44).value(ConfigDict(call), key)


def test_epochs_become_steps_in_one_place():
    calls = build.Calls(digits(), steps_per_epoch=44)
    options = {"update_every_epochs": 0.5, "sparsity": 0.9, "start_at_epochs": 2, "stop_at_epochs": None}
    _, arguments = calls.call(ConfigDict({"name": "sparse_momentum", **options}), "config.method")
    assert arguments == {"update_every": 22, "sparsity": 0.9, "start_at": 88, "stop_at": None}
    assert type(arguments["update_every"]) is int
    assert build.in_steps([1, 2.5], 44, "") == (44, 110)
    assert build.in_steps(0.3, 44, "") == pytest.approx(13.2)
    with pytest.raises(ValueError, match="config.method.x_epochs is a number of epochs, got 'ten'"):
        build.in_steps("ten", 44, "config.method.x_epochs")


def test_other_keys_are_referred_to_and_numbers_take_their_place():
    schedule = {"name": "cosine_decay_schedule", "init_value": 1.0, "decay_steps_epochs": "config.epochs"}
    assert made(schedule, epochs=10)(220) == pytest.approx(0.5)
    assert made(schedule | {"decay_steps_epochs": "5"}, epochs=10)(220) == 0  # as the command line gives it
    penalty = made({"name": "Penalty", "strength": "config.optimizer.momentum"})
    assert penalty == jaxsparse.Penalty(0.9)
    learning_rate = made({"x": "config.optimizer.learning_rate"}, **{"scale_with_batch": 16, "warmup_epochs": 1.0})["x"]
    assert learning_rate(43) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="config.x.strength is that of config.optimizer.momentun, .* does not have"):
        made({"name": "Penalty", "strength": "config.optimizer.momentun"})


def test_the_steps_between_changes_of_masks_may_be_said_elsewhere():
    config = digits(**{"method.update_every_epochs": "config.eval_every_epochs"})
    assert build.update_every(config, 44) == 44 * config.eval_every_epochs
    assert build.update_every(digits(**{"method.update_every_epochs": None}), 44) == 1


def test_learning_rates_are_scaled_as_they_are_given():
    assert build.times("0.5", 2) == 1.0
    assert build.times('{"name": "cosine_decay_schedule", "init_value": 0.5}', 2)["init_value"] == 1.0
    with pytest.raises(
        ValueError, match="learning_rate='config.seed' cannot be scaled: give the number or the schedule"
    ):
        build.times("config.seed", 2)


def test_a_pair_of_schedules_fills_two_arguments():
    config = config_of("mnist_rda", "lenet_300_100")
    calls = build.Calls(config, steps_per_epoch=10)
    _, velocity = calls.call(config.optimizer, "config.optimizer")
    _, link = calls.call(config.method, "config.method")
    assert velocity.keys() == {"step_size", "momentum_time"}
    assert link.keys() == {"step_size", "averaging", "l1", "weight_time", "max_factor", "structure", "state_dtype"}
    assert link["weight_time"] == 9.5
    assert link["averaging"](999) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method.sparsity": 1.5}, "config.method: sparsity .* got 1.5"),
        ({"method.growth": "momentun"}, "config.method: growth must be one of"),
        ({"method.update_every_epochs": 0}, "config.method: update_every .* got 0"),
        (
            {"method.name": "sparse_momentun"},
            "config.method.name .* got 'sparse_momentun'; did you mean 'sparse_momentum'",
        ),
        ({"method.name": "masks"}, "config.method.name is a function of jaxsparse or optax, got 'masks'"),
        ({"method.name": "block"}, "config.method: block takes no 'allocation'. It takes bm, bn"),
        ({"method.growht": "random"}, "config.method: sparse_momentum takes no 'growht'; did you mean 'growth'"),
        ({"method.prune_rate.init_value": 2.0}, "config.method.prune_rate: init_value .* got 2.0"),
        ({"optimizer.name": "adam"}, "config.optimizer: adam takes no 'momentum'"),
        ({"optimizer.learning_rate.transition_steps": 0}, "learning_rate.transition_steps is at least 1, got 0"),
        ({"method.update_every_epochs": 101}, "config.method changes masks every 4444 steps, and there are 4400"),
    ],
)
def test_errors_begin_with_the_key(changes, message):
    with pytest.raises(ValueError, match=message):
        build.make_optimizer(digits(**changes), 44)


def test_an_argument_that_is_missing_is_named():
    config = digits()
    with config.unlocked():
        del config.method.sparsity
    with pytest.raises(ValueError, match="config.method lacks 'sparsity', which sparse_momentum needs"):
        build.make_optimizer(config, 44)


def test_what_makes_no_optimizer_is_no_method():
    config = digits()
    with config.unlocked():
        config.method = ConfigDict({"name": "block", "bm": 2, "bn": 2})
    with pytest.raises(ValueError, match="config.method: block makes no optax.GradientTransformation"):
        build.make_optimizer(config, 44)


def test_phases_of_ac_dc_come_in_epochs_or_by_the_recipe():
    config = config_of("mnist_ac_dc", "lenet_300_100")
    calls = build.Calls(config, 10)
    _, arguments = calls.call(config.method, "config.method")
    assert arguments["compress_at"] == (100, 200, 300, 400, 500, 600, 700, 850)
    given = {"name": "ac_dc", "sparsity": 0.9, "compress_at_epochs": (1, 3), "decompress_at_epochs": (2.5,)}
    _, arguments = calls.call(ConfigDict(given), "config.method")
    assert arguments == {"sparsity": 0.9, "compress_at": (10, 30), "decompress_at": (25,)}
