import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import jaxsparse
from jaxsparse import models
from tests.artifacts.test_artifacts import documented_reader, same_bits
from tests.models.networks import numpy_images, numpy_variables, quick_jit, variables_of
from tests.problems import slow_except

MODELS = {
    "ResNet-8, MLPerf Tiny": (models.ResNet8(width=0.25), (8, 8, 3)),
    "ResNet-8 for CIFAR": (models.ResNetCIFAR(8, width=0.25), (8, 8, 3)),
    "ResNet-8 for CIFAR, projections": (models.ResNetCIFAR(8, width=0.25, project=True), (8, 8, 3)),
    "ResNet-18": (models.ResNet18(width=1 / 32, blocks=(1, 1, 1, 1)), (8, 8, 3)),
    "ResNet-50": (models.ResNet50(num_classes=5, width=1 / 32), (32, 32, 3)),
    "VGG-11-BN": (models.VGG("11_bn", width=1 / 32), (16, 16, 3)),
    "VGG16-like": (models.VGG("like", width=1 / 32), (32, 32, 3)),
    "VGG16-C": (models.VGG("C", width=1 / 32), (32, 32, 3)),
    "AlexNet": (models.AlexNet(width=1 / 32), (32, 32, 3)),
}


def pruned(model, shape, density=0.3):
    """Variables with scales of both signs and statistics of several sizes, kernels with random zeros, and the masks."""
    variables = numpy_variables(model, (1, *shape))
    rng, masks = np.random.default_rng(0), {}
    params, stats = (flatten_dict(variables[name], sep="/") for name in ("params", "batch_stats"))
    for path, leaf in params.items():
        masks[path] = np.array(True)
        if path.endswith("/scale"):
            params[path] = np.float32(rng.uniform(0.5, 2, leaf.shape) * rng.choice([-1, 1], leaf.shape))
        elif path.endswith("/kernel"):
            masks[path] = np.zeros(leaf.size, bool)
            masks[path][rng.choice(leaf.size, round(density * leaf.size), replace=False)] = True
            masks[path] = masks[path].reshape(leaf.shape)
            params[path] = np.where(masks[path], leaf, np.float32(0)) / np.float32(density**0.5)
    for path, leaf in stats.items():
        stats[path] = leaf * np.float32(rng.uniform(0.2, 4, leaf.shape))
    return tuple(unflatten_dict(tree, sep="/") for tree in (params, stats, masks))


@pytest.mark.parametrize("name", slow_except(["ResNet-8 for CIFAR"], MODELS))
def test_params_are_those_of_the_model_without_batch_normalisation(name):
    model, shape = MODELS[name]
    params, stats, masks = pruned(model, shape)
    folded, new, new_masks = models.fold_batch_norm(model, params, stats, masks)
    shapes = {path[1:]: leaf.shape for path, leaf in variables_of(folded, (1, *shape)).items()}
    assert {path: leaf.shape for path, leaf in flatten_dict(new).items()} == shapes
    kept, was = flatten_dict(new_masks), flatten_dict(masks)
    assert kept.keys() == shapes.keys()
    for path, leaf in flatten_dict(new).items():
        if path[-1] == "kernel":
            assert kept[path] is was[path]
            np.testing.assert_array_equal(np.asarray(leaf).view(np.uint32) != 0, kept[path])  # no -0 either
        else:
            assert kept[path].shape == ()
            assert kept[path]


@pytest.mark.parametrize("name", slow_except([], MODELS))
def test_logits_are_the_same(name):
    model, shape = MODELS[name]
    params, stats, _ = pruned(model, shape)
    images = numpy_images((4, *shape))
    folded, new = models.fold_batch_norm(model, params, stats)
    wanted = quick_jit(model.apply)({"params": params, "batch_stats": stats}, images)
    logits = quick_jit(folded.apply)({"params": new}, images)
    spread = float(jnp.std(wanted))
    assert spread > 0
    assert float(jnp.std(wanted, axis=0).min()) > 1e-3 * spread  # the images reach them
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4 * spread)


@pytest.mark.slow
def test_numbers_by_hand():
    model, shape = MODELS["ResNet-8, MLPerf Tiny"]
    params, stats, _ = jax.tree.map(np.array, pruned(model, shape))
    params["conv1"]["kernel"][0, 0, 0, 0], params["conv1"]["bias"][0] = 3, 7
    params["bn1"]["scale"][0], params["bn1"]["bias"][0] = -4, 5
    stats["bn1"]["mean"][0], stats["bn1"]["var"][0] = 9, 4 - 1e-3  # epsilon is 0.001
    _, new = models.fold_batch_norm(model, params, stats)
    assert float(new["conv1"]["kernel"][0, 0, 0, 0]) == -6
    assert float(new["conv1"]["bias"][0]) == (7 - 9) * -2 + 5
    same_bits(new["fc"], params["fc"])
    model, shape = MODELS["VGG16-like"]  # fc1, ReLU, bn14, fc2: the last takes it over
    params, stats, _ = pruned(model, shape)
    _, new = models.fold_batch_norm(model, params, stats)
    same_bits(new["fc1"], params["fc1"])
    scale = params["bn14"]["scale"] / np.sqrt(stats["bn14"]["var"] + 1e-5)
    np.testing.assert_allclose(new["fc2"]["kernel"], params["fc2"]["kernel"] * scale[:, None], rtol=1e-5)
    shift = params["bn14"]["bias"] - stats["bn14"]["mean"] * scale
    np.testing.assert_allclose(
        new["fc2"]["bias"], params["fc2"]["bias"] + shift @ params["fc2"]["kernel"], rtol=1e-4, atol=1e-6
    )


@pytest.mark.slow
def test_resnet_8_with_a_twentieth_of_its_weights_fits_in_12_000_bytes(tmp_path):
    """Random masks: their positions have no pattern to be coded by."""
    model, path = models.ResNet8(), tmp_path / "model"
    params, stats, masks = pruned(model, (32, 32, 3), density=0.05)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 78_186
    _, params, masks = models.fold_batch_norm(model, params, stats, masks)
    sizes = {}
    for dtype in ("int8", "bfloat16", None):
        jaxsparse.save_sparse(path, params, masks, dtype=dtype)
        sizes[dtype] = path.stat().st_size
        assert f"{sizes[dtype]:,}" in jaxsparse.artifacts.describe(path)
    print(sizes)
    assert sizes["int8"] < 10_500
    assert sizes["bfloat16"] < 14_000
    assert sizes[None] < 22_000
    loaded, loaded_masks = jaxsparse.load_sparse(path)
    same_bits(loaded, params)
    same_bits(loaded_masks, masks)
    same_bits(documented_reader()(path), flatten_dict(params, sep="/"))


def test_what_cannot_be_folded_is_said():
    model, shape = MODELS["ResNet-8, MLPerf Tiny"]
    params, stats, masks = pruned(model, shape)

    def without(tree, path):
        flat = flatten_dict(tree, sep="/")
        del flat[path]
        return unflatten_dict(flat, sep="/")

    short = without(params, "bn1/bias")
    short["bn1"]["bias"] = np.ones(3, np.float32)
    more = stats | {"bn9": stats["bn1"]}
    for args, message in (
        ((models.WideResNet(10, 1), params, stats), "fold_batch_norm is for ResNet8, .* AlexNet, .*, got WideResNet"),
        ((models.LeNet300100(), params, {}), "got LeNet300100"),
        ((model.clone(batch_norm=False), params, stats), "this ResNet8 has no batch normalisation .*folded already"),
        ((model, without(params, "conv1/kernel"), stats), "the params of this ResNet8 have no conv1/kernel"),
        (
            (model, params, without(stats, "block2_1/bn2/var")),
            "the batch_stats of this ResNet8 have no block2_1/bn2/var",
        ),
        ((models.VGG("11"), params, stats), "the params of this VGG have no conv2/kernel"),
        ((model, params, more), "the batch_stats have bn9/mean, but a ResNet8 has no such normalisation"),
        ((model, short, stats), r"bn1/bias: expected shape \(4,\) beside conv1/kernel of shape .*, got \(3,\)"),
        ((model, params, stats, without(masks, "fc/kernel")), "masks must have the tree of the params"),
    ):
        with pytest.raises(ValueError, match=message):
            models.fold_batch_norm(*args)
    with pytest.raises(ValueError, match="channels of a ResNet8 are gated at its batch normalisation.*fold after slim"):
        models.channel_groups(model.clone(batch_norm=False))
