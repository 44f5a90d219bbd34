import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from jaxsparse.models import resnet
from jaxsparse.models.blocks import BatchNorm
from tests.models.networks import numpy_images, numpy_variables, quick_jit, variables_of
from tests.problems import slow_except


def outputs(model, variables, images):
    """What each block of a model gives in training, and its shortcut's batch normalisation, by path."""

    @quick_jit
    def run(variables, images):
        _, found = model.apply(variables, images, mutable=["batch_stats", "intermediates"], capture_intermediates=True)
        return {"/".join(path[:-1]): value[0] for path, value in flatten_dict(found["intermediates"]).items()}

    return run(variables, images)


def test_shortcut_without_parameters_keeps_every_second_pixel_and_surrounds_the_channels_with_zeros():
    model = resnet.ResNetCIFAR(8, width=3 / 16)
    variables = numpy_variables(model, (2, 5, 4, 3))
    for layer in ("conv2", "bn2"):  # the shortcut is all that is left
        variables["params"]["block2_1"][layer] = jax.tree.map(jnp.zeros_like, variables["params"]["block2_1"][layer])
    found = outputs(model, variables, numpy_images((2, 5, 4, 3)))
    x, y = found["block1_1"], found["block2_1"]
    assert (x.shape, y.shape) == ((2, 5, 4, 3), (2, 3, 2, 6))
    chex.assert_trees_all_equal(y[..., 1:4], x[:, ::2, ::2])
    chex.assert_trees_all_equal(y[..., :1].sum() + y[..., 4:].sum(), jnp.float32(0))


def as_keras(params, stats, images, training):
    """The network of MLPerf Tiny's ``keras_model.py``, by float64 arithmetic on arrays; and its new statistics."""
    new, (params, stats) = {}, jax.tree.map(np.float64, (params, stats))

    def conv(x, at, strides=1):
        kernel, (n, *size, _) = at["kernel"], x.shape
        out = [-(-d // strides) for d in size]
        pads = [max((o - 1) * strides + k - d, 0) for o, k, d in zip(out, kernel.shape, size, strict=False)]
        x = np.pad(x, ((0, 0), *((p // 2, p - p // 2) for p in pads), (0, 0)))  # the odd one at the end
        y = np.zeros((n, *out, kernel.shape[-1])) + at["bias"]
        for i, j in np.ndindex(kernel.shape[:2]):
            places = x[:, i : i + out[0] * strides : strides, j : j + out[1] * strides : strides]
            y += places[:, : out[0], : out[1]] @ kernel[i, j]
        return y

    def norm(x, path):
        own, at = ({name: leaf for (*where, name), leaf in flatten_dict(tree).items() if "/".join(where) == path}
                   for tree in (params, stats))  # fmt: skip
        mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if training else (at["mean"], at["var"])
        new[path] = {"mean": 0.99 * at["mean"] + 0.01 * mean, "var": 0.99 * at["var"] + 0.01 * var}
        return (x - mean) / np.sqrt(var + 0.001) * own["scale"] + own["bias"]

    x = np.maximum(norm(conv(np.float64(images), params["conv1"]), "bn1"), 0)
    for block, strides in (("block1_1", 1), ("block2_1", 2), ("block3_1", 2)):
        own = params[block]
        y = np.maximum(norm(conv(x, own["conv1"], strides), f"{block}/bn1"), 0)
        y = norm(conv(y, own["conv2"]), f"{block}/bn2")
        x = np.maximum(y + (conv(x, own["shortcut_conv"], strides) if strides == 2 else x), 0)
    return x.mean((1, 2)) @ params["fc"]["kernel"] + params["fc"]["bias"], new


@pytest.mark.slow
def test_resnet_8_computes_what_the_reference_of_mlperf_tiny_does():
    model, images = resnet.ResNet8(), numpy_images((2, 9, 12, 3))
    variables = numpy_variables(model, images.shape)
    wanted, new = as_keras(variables["params"], variables["batch_stats"], images, training=True)
    found, updates = model.apply(variables, images, mutable=["batch_stats"])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    for path, leaf in flatten_dict(updates["batch_stats"]).items():
        np.testing.assert_allclose(leaf, new["/".join(path[:-1])][path[-1]], rtol=1e-4, atol=1e-5)
    wanted, _ = as_keras(variables["params"], variables["batch_stats"], images, training=False)
    np.testing.assert_allclose(model.apply(variables, images), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_resnet_8_starts_as_keras_does():
    params = flatten_dict(resnet.ResNet8().init(jax.random.key(0), numpy_images((1, 8, 8, 3)))["params"])
    assert sum(leaf.size for leaf in params.values()) == 78_186
    for path, leaf in params.items():
        if path[-1] != "kernel":
            assert (leaf == (path[-1] == "scale")).all(), path
        elif leaf.size > 4000:
            deviation = (2 / np.prod(leaf.shape[:-1])) ** 0.5
            assert float(leaf.std()) == pytest.approx(deviation, rel=0.05), path
            assert float(abs(leaf).max()) < 2.3 * deviation, path  # cut off at 2 / 0.88


@pytest.mark.parametrize(("model", "parameters"), [(resnet.ResNet18, 11_689_512), (resnet.ResNet34, 21_797_672)])
def test_the_stem_of_imagenet_gives_torchvisions_numbers_of_parameters(model, parameters):
    model = model(num_classes=1000, stem="imagenet")
    assert sum(v.size for k, v in variables_of(model).items() if k[0] == "params") == parameters
    with pytest.raises(ValueError, match="at least 32 x 32"):
        variables_of(model, (1, 16, 16, 3))
    with pytest.raises(ValueError, match="ResNet18's stem is 'small' or 'imagenet', got 'large'"):
        variables_of(resnet.ResNet18(stem="large"))


def test_the_stem_of_imagenet_leaves_a_quarter_of_the_pixels_on_each_side():
    model = resnet.ResNet18(width=1 / 16, stem="imagenet")
    shapes = {}

    def look(call, args, kwargs, context):
        shapes["/".join(context.module.path)] = args[0].shape
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        variables_of(model, (1, 32, 32, 3))
    assert shapes["block1_1"] == (1, 8, 8, 4)
    assert shapes["block4_2"] == (1, 1, 1, 32)


@pytest.mark.parametrize(
    ("model", "before"),
    [
        pytest.param(resnet.ResNet18(width=1 / 16, zero_init=True), "bn1", id="basic", marks=pytest.mark.slow),
        pytest.param(resnet.ResNet50(width=1 / 16, zero_init=True), None, id="bottleneck", marks=pytest.mark.slow),
    ],
)
def test_blocks_start_as_their_shortcuts_if_the_last_scale_starts_from_zero(model, before):
    images = numpy_images((2, 32, 32, 3))
    found = outputs(model, quick_jit(model.init)(jax.random.key(1), images), images)
    blocks = [path for path in found if re.fullmatch(r"block\d_\d", path)]
    assert len(blocks) == (8 if before else 16)
    projected = 0
    for block, previous in zip(blocks, [before, *blocks], strict=False):
        if f"{block}/shortcut_bn" in found:
            shortcut, projected = found[f"{block}/shortcut_bn"], projected + 1
        else:
            shortcut = nn.relu(found[previous])
        chex.assert_trees_all_equal(found[block], nn.relu(shortcut))
    assert projected == (3 if before else 4)


@pytest.mark.parametrize("zero_init", [True, False])
@pytest.mark.parametrize(
    "model",
    slow_except([resnet.ResNet20()], [resnet.ResNet20(), resnet.ResNet18(), resnet.ResNet34(), resnet.ResNet50()]),
    ids=lambda m: type(m).__name__,
)
def test_zero_init_is_of_the_last_batch_normalisation_of_every_block(model, zero_init):
    model, starts = model.clone(zero_init=zero_init), {}

    def look(call, args, kwargs, context):
        if isinstance(context.module, BatchNorm):
            starts["/".join(context.module.path)] = context.module.scale_init
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        shapes = variables_of(model)
    assert shapes == variables_of(model.clone(zero_init=False))
    blocks = {path[1] for path in shapes if path[1].startswith("block")}
    last = {f"{block}/{'bn3' if isinstance(model, resnet.ResNet50) else 'bn2'}" for block in blocks}
    assert {path for path, init in starts.items() if init is nn.initializers.zeros_init()} == (
        last if zero_init else set()
    )
