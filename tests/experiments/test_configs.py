"""Every configuration that the repository has."""

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxsparse
from experiments import data, networks, options, program, text, train
from experiments.workdir import read_metrics
from jaxsparse import inspect
from jaxsparse.groups import group_sizes
from jaxsparse.trees import by_path
from tests.problems import slow_except

ROOT = Path(__file__).parents[2]
ARGUMENTS = {
    path.stem: list(module.get("EXPERIMENTS", [None]))
    for path in sorted((ROOT / "configs").glob("*.py"))
    if "get_config" in (module := runpy.run_path(str(path)))
}
STREAMED = ("imagenet",)  # for these there is test_build.py: their images do not fit into arrays
ALL = [(name, argument) for name, arguments in ARGUMENTS.items() if name not in STREAMED for argument in arguments]
FIRST = [(name, arguments[0]) for name, arguments in ARGUMENTS.items()]
IMAGES = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "cifar10": (32, 32, 3), "cifar100": (32, 32, 3)}


def config_of(name, argument):
    get_config = runpy.run_path(str(ROOT / f"configs/{name}.py"))["get_config"]
    return (get_config() if argument is None else get_config(argument)).lock()


def random_images(config, count):
    """Noise in the shape of the config's data set."""
    random, shape = np.random.RandomState(0), IMAGES[config.data.name]
    split = data.Split(
        random.randint(0, 256, (count, *shape)).astype(np.uint8), random.randint(0, 10, count).astype(np.int32)
    )
    channels = np.ones(shape[-1], np.float32)
    classes = 100 if config.data.name == "cifar100" else 10
    return data.Dataset(split, data.Split(*(x[:0] for x in split)), split, classes, 128 * channels, 64 * channels)


def random_text(config, count):
    """Noise in the place of a text."""
    tokens = np.random.RandomState(0).randint(0, 256, count * config.data.length + 1).astype(np.uint8)
    split = text.Text(tokens, config.data.length, count)
    return text.TextDataset(split, text.Text(tokens[:0], config.data.length, 0), split, 256, {})


def test_configs_are_found():
    assert {"digits_sparse_momentum", "mnist_l0", "imagenet"} <= set(ARGUMENTS)
    assert "common" not in ARGUMENTS


@pytest.mark.parametrize(("name", "argument"), slow_except(FIRST, ALL))
def test_every_config_makes_a_network_and_its_masks(name, argument):
    config = config_of(name, argument)
    of_text = config.data.name == "text"
    dataset = (random_text if of_text else random_images)(config, count=256)
    made = program.make_program(config, dataset)
    state = jax.eval_shape(made.init, 0)
    masks = jax.eval_shape(inspect.current_masks, state.opt_state, state.params)
    sparse = [mask for mask in jax.tree.leaves(masks) if mask.ndim]
    kernels = [leaf for leaf in jax.tree.leaves(state.params) if leaf.ndim > 1]
    if of_text:  # embeddings stay dense, and biases of heads have two axes
        kernels = [leaf for path, leaf in by_path(state.params).items() if path.endswith("kernel")]
    if groups := made.optimizer.groups:
        assert sorted(masks) == sorted(group.name for group in groups)
        assert sorted(mask.size for mask in sparse) == sorted(group_sizes(groups, state.params))
    else:
        assert config.dense or [mask.shape for mask in sparse] == [kernel.shape for kernel in kernels]
    classes = config.model.get("num_classes", dataset.num_classes)
    assert of_text or kernels[-1].shape[-1] == classes or kernels[-1].ndim == 4
    small = networks.make_model(options.small(config), 10)
    first = np.zeros((1, 32), np.int32) if of_text else dataset.train.images[:1].astype(np.float32)
    variables = jax.eval_shape(small.init, jax.random.key(0), first)
    if config.model.name not in ("lenet_300_100", "lenet5_caffe", "mlp"):
        size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        assert size < sum(leaf.size for leaf in jax.tree.leaves(state.params)) / 15


@pytest.mark.parametrize("name", [name for name, arguments in ARGUMENTS.items() if arguments != [None]])
def test_an_argument_that_is_not_there_names_those_that_are(name):
    with pytest.raises(ValueError, match=f"this config comes with .*{ARGUMENTS[name][0]}.*, got 'resnet'"):
        config_of(name, "resnet")


def train_on_noise(config, workdir, monkeypatch):
    monkeypatch.setattr(data, "load", lambda name, data_dir, *, examples, **_: random_images(config, examples))
    return train.train(config, workdir)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "argument", "changes"),
    [
        ("cifar_rda", "resnet20", {"method.l1": 1e-4, "model.dtype": "bfloat16", "model.depth": 8}),
        ("cifar10_sparse_momentum", "alexnet_s", {}),
        ("mnist_mlp", "blocks", {"dense_gradient_steps": 2}),
        ("mnist_asni", "conv2", {"method.sparsity.magnitude": 0.99, "epochs": 3}),
        (
            "mnist_l0",
            "lenet5_caffe",
            {"method.penalty.strength": 1e5, "method.gate_optimizer.learning_rate.init_value": 1.0},
        ),
    ],
)
def test_a_small_run(tmp_path, monkeypatch, name, argument, changes):
    config = options.small(config_of(name, argument)).unlock()
    config.update_from_flattened_dict({"epochs": 2, "data.examples": 96, "log_every_steps": 3, **changes})
    state, [result] = train_on_noise(config, tmp_path, monkeypatch)
    losses = [line["train_loss"] for line in read_metrics(tmp_path)]
    assert len(losses) == config.epochs
    assert np.isfinite(losses).all()
    for statistic in jax.tree.leaves(state.model_state):
        assert statistic.dtype == np.float32
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state.params))
    jaxsparse.check(state.opt_state, state.params)
    assert 0 < result["density"] < 1


@pytest.mark.long
@pytest.mark.parametrize(("name", "argument"), ALL)
def test_every_config_runs_made_small(tmp_path, monkeypatch, name, argument):
    config = options.small(config_of(name, argument)).lock()
    state, [result] = train_on_noise(config, tmp_path, monkeypatch)
    assert read_metrics(tmp_path)[-1]["step"] == result["steps"] == 4 * 44
    jaxsparse.check(state.opt_state, state.params)
    lines = read_metrics(tmp_path)
    print(f"{name}:{argument}: first chunk {lines[0]['seconds']:.0f} s, the other three "
          f"{sum(line['seconds'] for line in lines[1:]):.0f} s, density {result['density']:.3f}")  # fmt: skip
