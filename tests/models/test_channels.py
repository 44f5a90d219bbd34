import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse
from jaxsparse import models
from jaxsparse.groups import group_sizes
from jaxsparse.trees import by_path
from tests.models.networks import Attends, numpy_images, numpy_variables, quick_jit, variables_of
from tests.problems import slow_except

MODELS = {
    "LeNet-300-100": (models.LeNet300100(features=(30, 12)), (28, 28, 1)),
    "LeNet-5": (models.LeNet5Caffe(features=(4, 6, 20)), (28, 28, 1)),
    "VGG-11": (models.VGG("11", width=1 / 16), (32, 32, 3)),
    "VGG-11-BN": (models.VGG("11_bn", width=1 / 16), (32, 32, 3)),
    "VGG16-C": (models.VGG("C", width=1 / 16), (32, 32, 3)),
    "ResNet-8": (models.ResNetCIFAR(8, project=True, width=0.5), (32, 32, 3)),
    "ResNet-8, MLPerf Tiny": (models.ResNet8(width=0.5), (32, 32, 3)),
    "ResNet-50": (models.ResNet50(num_classes=5, width=1 / 16), (32, 32, 3)),
}


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def evaluated(model, variables, images):
    return quick_jit(model.apply)(variables, images)


@pytest.fixture(scope="module", params=slow_except(["LeNet-5", "VGG-11-BN"], MODELS))
def network(request):
    model, shape = MODELS[request.param]
    return model, numpy_variables(model, (1, *shape)), numpy_images((8, *shape))


def by_groups(model, params, vectors, apply):
    """The params with ``apply(slice of a leaf, vector)`` where the groups multiply."""
    leaves, treedef = by_path(params), jax.tree.structure(params)
    for group, vector in zip(models.channel_groups(model), vectors, strict=True):
        for path, axis, _ in group.multiplies:
            shape = [1] * leaves[path].ndim
            shape[axis] = -1
            leaves[path] = apply(leaves[path], vector.reshape(shape))
    return treedef.unflatten(list(leaves.values()))


def test_slim_equals_the_network_with_gates(network):
    model, variables, images = network
    groups = models.channel_groups(model)
    sizes = group_sizes(groups, variables["params"])
    rng = np.random.default_rng(0)
    gates = [jnp.asarray(np.clip(rng.uniform(-0.6, 1.4, n), 0, 1), jnp.float32) for n in sizes]
    params = by_groups(model, variables["params"], gates, lambda leaf, gate: leaf * gate)
    stats = variables.get("batch_stats")
    wanted = evaluated(model, {**variables, "params": params}, images)
    small, slim_params, slim_stats = models.slim(model, params, stats)
    slim_variables = {"params": slim_params} | ({} if slim_stats is None else {"batch_stats": slim_stats})
    found = evaluated(small, slim_variables, images)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(jnp.abs(wanted).max()))
    # The variables are those that the smaller model makes, and as few as the groups say.
    shapes = {"/".join(path): v.shape for path, v in variables_of(small, images[:1].shape).items()}
    assert shapes == {path: v.shape for path, v in by_path(slim_variables).items()}
    is_open = {group.name: gate != 0 for group, gate in zip(groups, gates, strict=True)}
    expected = jaxsparse.remaining(params, groups, is_open)
    assert size(slim_params) <= sum(row.kept_params for row in expected.layers)
    assert size(slim_params) >= 0.8 * sum(row.kept_params for row in expected.layers)
    assert size(slim_params) < 0.75 * size(params)
    # Nothing is left to remove.
    again, params_again, _ = models.slim(small, slim_params, slim_stats)
    assert again == small
    for a, b in zip(jax.tree.leaves(params_again), jax.tree.leaves(slim_params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_slim_folds_what_dead_channels_add(network):
    """Channels without a filter, whose bias or normalisation still makes them a constant, not zero."""
    model, variables, images = network
    params, stats = variables["params"], variables.get("batch_stats")
    leaves = by_path(params)
    rng = np.random.default_rng(1)
    for group in models.channel_groups(model):
        path = next((p for p, axis, _ in group.removes if axis == -1), None)
        if path is not None:
            dead = rng.permutation(leaves[path].shape[-1])[: leaves[path].shape[-1] // 2]
            leaves[path] = leaves[path].at[..., dead].set(0)
    params = jax.tree.structure(params).unflatten(list(leaves.values()))
    wanted = evaluated(model, {**variables, "params": params}, images)
    small, slim_params, slim_stats = models.slim(model, params, stats)
    found = evaluated(
        small, {"params": slim_params} | ({} if slim_stats is None else {"batch_stats": slim_stats}), images
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(jnp.abs(wanted).max()))
    assert size(slim_params) < 0.9 * size(params)


def test_a_layer_whose_channels_are_all_closed_keeps_one():
    model = models.LeNet300100(features=(30, 12))
    variables = numpy_variables(model, (1, 28, 28, 1))
    params = variables["params"] | {"fc2": jax.tree.map(jnp.zeros_like, variables["params"]["fc2"])}
    small, slim_params, _ = models.slim(model, params)
    assert (len(small.inputs), small.features) == (1, (1, 1))
    images = numpy_images((4, 28, 28, 1))
    np.testing.assert_allclose(
        small.apply({"params": slim_params}, images), model.apply({"params": params}, images), atol=1e-6
    )


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        (models.LeNet300100(), (784, 300, 100)),
        (models.LeNet5Caffe(), (20, 50, 800, 500)),
        (models.VGG("16"), (64,) * 2 + (128,) * 2 + (256,) * 3 + (512,) * 6),
        (models.ResNetCIFAR(56, project=True), (16,) * 10 + (32,) * 9 + (64,) * 9),
        (models.ResNet8(), (16, 16, 32, 64)),
        (models.ResNet50(), (64,) * 7 + (128,) * 8 + (256,) * 12 + (512,) * 6),
    ],
    ids=lambda value: type(value).__name__,
)
def test_groups_are_those_of_the_papers(model, sizes):
    shape = (28, 28, 1) if "LeNet" in type(model).__name__ else (32, 32, 3)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))["params"]
    assert group_sizes(models.channel_groups(model), params) == sizes


@pytest.mark.slow
def test_statistics_are_not_gathered_in_evaluation():
    variables = Attends().init(jax.random.key(0), jnp.ones((1, 8, 8, 1)), train=True)
    arguments = (Attends(), variables["params"], variables["batch_stats"], [jnp.ones((4, 8, 8, 1))])
    found = models.reestimate_batch_stats(*arguments, train=True)
    assert float(jnp.abs(found["BatchNorm_0"]["mean"]).max()) > 0
    with pytest.raises(ValueError, match=r"gathered no statistics: call it as in training, .*train=True"):
        models.reestimate_batch_stats(*arguments, train=False)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99, 0.9997])
def test_batch_statistics_are_right_whatever_the_momentum(momentum):
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            frozen = nn.BatchNorm(use_running_average=True, name="frozen")(x)
            return nn.BatchNorm(use_running_average=False, momentum=momentum, name="own")(x) + frozen

    variables = Two().init(jax.random.key(0), jnp.ones((2, 1)))
    batches = [jnp.array([[100.0], [300.0]]), jnp.array([[-1.0], [1.0]])]
    found = models.reestimate_batch_stats(Two(), variables["params"], variables["batch_stats"], batches)
    np.testing.assert_allclose(found["own"]["mean"], 100, rtol=1e-3)
    np.testing.assert_allclose(found["own"]["var"], (1e4 + 1) / 2, rtol=1e-3)
    assert found["frozen"]["var"] == 1  # as it was


def test_slim_names_variables_that_are_not_there():
    model = models.ResNetCIFAR(8, width=0.25)
    variables = numpy_variables(model)
    with pytest.raises(ValueError, match="batch_stats of this ResNetCIFAR must have block1_1/bn1/mean, "):
        models.slim(model, variables["params"])
    with pytest.raises(ValueError, match="params of this LeNet300100 must have fc1/kernel, "):
        models.slim(models.LeNet300100(), variables["params"])


def test_batch_statistics_are_the_mean_over_batches():
    model = models.VGG("11", width=1 / 16)
    variables = numpy_variables(model, (1, 32, 32, 3))
    images = numpy_images((3, 16, 32, 32, 3)) * 2 + 1
    stats = models.reestimate_batch_stats(model, variables["params"], variables["batch_stats"], list(images))
    kernel, bias = variables["params"]["conv1"]["kernel"], variables["params"]["conv1"]["bias"]
    outputs = [models.layers.conv(x, kernel, padding=1) + bias.reshape(1, 1, 1, -1) for x in images]
    means, variances = ([getattr(y, name)((0, 1, 2)) for y in outputs] for name in ("mean", "var"))
    np.testing.assert_allclose(stats["bn1"]["mean"], np.mean(means, 0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(stats["bn1"]["var"], np.mean(variances, 0), rtol=1e-3)
    with pytest.raises(ValueError, match="needs at least one batch"):
        models.reestimate_batch_stats(model, variables["params"], variables["batch_stats"], [])


def test_slim_keeps_the_axis_of_batch_normalisation_and_the_statistics_made_anew_do_not_need_it():
    model = models.ResNetCIFAR(8, width=0.5, axis_name="devices", zero_init=True)
    assert [group.name for group in models.channel_groups(model)][:2] == ["conv1", "block1_1/conv1"]
    variables = numpy_variables(model)
    params, stats = variables["params"], variables["batch_stats"]
    params["block2_1"]["bn1"] = jax.tree.map(lambda x: x.at[:3].set(0), params["block2_1"]["bn1"])
    small, slim_params, slim_stats = models.slim(model, params, stats)
    assert small == model.clone(inner=(8, 13, 32))
    images = numpy_images((4, 32, 32, 3))
    alone = models.reestimate_batch_stats(small.clone(axis_name=None), slim_params, slim_stats, [images])
    again = models.reestimate_batch_stats(small, slim_params, slim_stats, [images])
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_channels_of_unstructured_masks_and_of_other_models():
    model = models.LeNet300100()
    params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    sparse = jaxsparse.apply_masks(params, jaxsparse.random_masks(params, 0.995))
    small, slim_params, _ = models.slim(model, sparse)
    images = numpy_images((4, 28, 28, 1))
    np.testing.assert_allclose(
        small.apply({"params": slim_params}, images), model.apply({"params": sparse}, images), rtol=1e-4, atol=1e-5
    )
    assert size(slim_params) < 0.2 * size(params)
    with pytest.raises(ValueError, match="there are groups for LeNet300100.*got AlexNet"):
        models.slim(models.AlexNet(), {})


@pytest.mark.parametrize("name", slow_except(["LeNet-300-100"], ["LeNet-300-100", "LeNet-5", "VGG-11-BN"]))
def test_slim_keeps_dtypes(name):
    model, shape = MODELS[name]
    variables = numpy_variables(model, (1, *shape))
    rng = np.random.default_rng(0)

    def with_dead_channels(leaf):
        leaf = np.asarray(leaf)
        return jnp.asarray(leaf * (rng.random(leaf.shape[-1]) < 0.5) + 0.1 * (leaf.ndim == 1), jnp.bfloat16)

    params = jax.tree.map(with_dead_channels, variables["params"])
    stats = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), variables.get("batch_stats"))
    small, slim_params, slim_stats = models.slim(model, params, stats)
    assert size(slim_params) < 0.75 * size(params)
    assert {leaf.dtype for leaf in jax.tree.leaves((slim_params, slim_stats))} == {jnp.dtype(jnp.bfloat16)}
    # What is folded into biases is rounded once.
    images = numpy_images((8, *shape))
    wanted, found = (
        evaluated(net, jax.tree.map(jnp.float32, {"params": p} | ({} if s is None else {"batch_stats": s})), images)
        for net, p, s in ((model, params, stats), (small, slim_params, slim_stats))
    )
    np.testing.assert_allclose(found, wanted, atol=0.02 * float(jnp.abs(wanted).max()))
