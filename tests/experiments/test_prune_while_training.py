import contextlib
import runpy
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse
from experiments import data, export, options, program, train
from experiments.prune_while_training import Gain, open_gates, without
from experiments.workdir import read_metrics
from jaxsparse.trees import by_path

ROOT = Path(__file__).parents[2]
TIMES = ("seconds", "steps_per_second", "speed")


def make_config(name="mnist_l0", argument="lenet_300_100", **changes):
    config = options.small(runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"](argument)).lock()
    config.update_from_flattened_dict({"data_dir": None, "data.name": "digits", "data.mean": None, "data.std": None})
    config.update_from_flattened_dict({"prune_while_training_epochs": 2, **changes})
    return config


def with_closed_gates(state):
    """A state in which the gates of some channels of each group are about to close."""
    random = np.random.default_rng(0)
    log_alpha = {
        name: jnp.where(jnp.asarray(random.random(len(vector)) < 0.4), -6.0, 3.0)
        for name, vector in state.opt_state.log_alpha.items()
    }
    return state._replace(opt_state=state.opt_state._replace(log_alpha=log_alpha))


def a_step(made, state):
    """The state after a step that brings the gates in force."""
    grads = jax.tree.map(jnp.ones_like, state.params)
    updates, opt_state = jax.jit(made._tx.update)(grads, state.opt_state, state.params)
    return state._replace(params=jax.tree.map(jnp.add, state.params, updates), opt_state=opt_state)


def digits(shape):
    """A few digits, repeated to fill images of a shape."""
    dataset = data.load("digits", examples=128)

    def larger(split):
        tiled = np.tile(split.images, (1, -(-shape[0] // 8), -(-shape[1] // 8), shape[2]))
        return split._replace(images=tiled[:, : shape[0], : shape[1]])

    splits = {name: larger(getattr(dataset, name)) for name in ("train", "validation", "test")}
    return dataset._replace(**splits, mean=np.full(shape[2:], 100.0), std=np.full(shape[2:], 80.0))


@pytest.mark.parametrize(
    ("name", "argument", "shape"),
    [
        pytest.param("mnist_l0", "lenet_300_100", (8, 8, 1), marks=pytest.mark.slow),
        pytest.param("mnist_l0", "lenet5_caffe", (28, 28, 1), marks=pytest.mark.slow),
        pytest.param("cifar_l0", "vgg16_hc", (32, 32, 3), marks=pytest.mark.slow),
        pytest.param("cifar_l0", "resnet56_hc", (32, 32, 3), marks=pytest.mark.slow),
    ],
)
def test_the_network_computes_the_same_without_its_closed_channels(name, argument, shape):
    config, dataset = make_config(name, argument), digits(shape)
    dataset = dataset._replace(test=data.Split(dataset.test.images[:50], dataset.test.labels[:50]))
    made = program.make_program(config, dataset)
    state = a_step(made, with_closed_gates(made.init(0)))
    stays = open_gates(made, state)
    assert len(stays) > 1
    small = without(state, made.optimizer.groups, stays)
    pruned = program.make_program(config, dataset, pruned=[stays])
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, jax.eval_shape(pruned.init, 0))
    jaxsparse.check(small.opt_state, small.params)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree.params)) for tree in (state, small)]
    assert pruned.left["params"] == sizes[1] / sizes[0] < 0.9
    losses = [p.evaluate(s, dataset.test) for p, s in ((made, state), (pruned, small))]
    np.testing.assert_allclose(losses[1]["loss"], losses[0]["loss"], rtol=1e-5)


@pytest.mark.slow
def test_the_state_becomes_that_of_the_smaller_network():
    config, dataset = make_config(), data.load("digits", examples=128)
    made = program.make_program(config, dataset)
    state = with_closed_gates(made.init(0))
    stays = open_gates(made, state)
    assert {name: len(bits) for name, bits in stays.items()} == {"inputs": 64, "fc1": 300, "fc2": 100}
    small = without(state, made.optimizer.groups, stays)
    pruned = program.make_program(config, dataset, pruned=[stays])
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, jax.eval_shape(pruned.init, 0))
    rows, columns = (np.array(list(stays[name])) == "1" for name in ("fc1", "fc2"))
    np.testing.assert_array_equal(small.params["fc2"]["kernel"], state.params["fc2"]["kernel"][np.ix_(rows, columns)])
    np.testing.assert_array_equal(small.opt_state.gate_state[0].mu[1], state.opt_state.gate_state[0].mu[1][rows])


@contextlib.contextmanager
def stop_after(chunks):
    class Told(list):
        def __bool__(self):
            self.left -= 1
            return self.left <= 0

    told = Told([signal.SIGTERM])
    told.left = chunks
    yield told


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    gates = {"log_alpha": 0.0, "gate_optimizer.learning_rate.init_value": 0.1, "penalty.strength": 3e-3}
    gates |= {"penalty.examples": 1000, "freeze_gates_at_epochs": 5}
    config = make_config(epochs=6, checkpoint_every_epochs=1, **{f"method.{key}": to for key, to in gates.items()})
    whole, [result] = train.train(config, tmp_path / "whole")
    lines = read_metrics(tmp_path / "whole")
    assert [line["step"] for line in lines if "pruned_channels" in line] == [88, 176]
    costs = [line["step"] for line in lines if "compile_seconds" in line["speed"]]
    assert costs == [176, 264]
    assert result["density"] == pytest.approx(lines[-1]["density"], abs=1e-6)
    assert 0 < result["density"] < 0.5
    assert len(whole.params["fc1"]["bias"]) < 300

    with monkeypatch.context() as patched:
        patched.setattr(train, "stop_signals", lambda: stop_after(3))  # an epoch after the first pruning
        with pytest.raises(train.Stopped, match="at step 132 of 264"):
            train.train(config, tmp_path / "stopped")
    export.main([str(tmp_path / "stopped"), str(tmp_path / "model")])
    shapes = {path: leaf.shape for path, leaf in by_path(jaxsparse.load_sparse(tmp_path / "model")[0]).items()}
    assert shapes["fc1/kernel"][1] == 300 - lines[1]["pruned_channels"]["fc1"]

    state, _ = train.train(config, tmp_path / "stopped")
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.map(as_numbers, s) for s in (state, whole)))
    without_times = [
        [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(tmp_path / name)]
        for name in ("stopped", "whole")
    ]
    assert without_times[0] == without_times[1]


def as_numbers(leaf):
    return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def test_costs_and_gain_are_logged_once_for_each_pruning():
    gain = Gain()
    assert [gain.chunk(44, seconds) for seconds in (9.0, 4.4, 4.4)] == [{}, {}, {}]
    gain.pruned()
    assert gain.chunk(44, 7.2) == gain.chunk(20, 8.0) == {}
    assert gain.chunk(44, 2.2) == {"compile_seconds": 5.0, "times_faster": pytest.approx(2.0)}
    assert gain.chunk(44, 2.2) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune_while_training_epochs": 0}, "prune_while_training_epochs is at least 1, or None, got 0"),
        ({"dense": True}, "is for the method 'l0'"),
        ({"parallel.layout": "data"}, "is for config.parallel.layout='one_device' without --vmap_seeds"),
    ],
)
def test_runs_that_cannot_lose_channels(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.train(make_config(**changes), tmp_path)
