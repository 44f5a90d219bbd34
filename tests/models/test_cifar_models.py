"""What holds for all convolutional models for CIFAR images."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsparse import models
from jaxsparse.models.layers import Conv
from tests.models.networks import CIFAR, SMALL, numpy_images, numpy_variables, quick_jit, variables_of
from tests.problems import slow_except

ALL = {
    "AlexNet-s": models.AlexNet("s"),
    "AlexNet-b": models.AlexNet("b"),
    "VGG16-C": models.VGG("C"),
    "VGG16-D": models.VGG("D"),
    "VGG16-like": models.VGG("like"),
    "VGG-11": models.VGG("11_bn"),
    "VGG-13": models.VGG("13_bn"),
    "VGG-16": models.VGG("16_bn"),
    "VGG-19": models.VGG("19_bn"),
    "ResNet-8": models.ResNet8(),
    "ResNet-18": models.ResNet18(),
    "ResNet-20": models.ResNet20(),
    "ResNet-56": models.ResNet56(),
    "WRN-28-2": models.WideResNet(28, 2),
    "WRN-16-8": models.WideResNet(16, 8),
    "WRN-16-10": models.WideResNet(16, 10),
    "WRN-22-8": models.WideResNet(22, 8),
    "WRN-28-10": models.WideResNet(28, 10),
    "DenseNet-40": models.DenseNet40(),
}


@pytest.mark.parametrize(
    ("name", "parameters", "weights"),
    [
        # SNIP (Lee et al. 2019, Table 1): 5.1M and 8.5M weights. The convolutions have 96 11^2 3 + 256 5^2 96
        # + 384 3^2 256 + 384 3^2 384 + 256 3^2 384 = 3,745,824, the dense layers 256 f + f^2 + 10 f, f = 1024 or 2048.
        ("AlexNet-s", 5_077_066, 5_066_784),
        pytest.param("AlexNet-b", 8_501_322, 8_484_896, marks=pytest.mark.slow),
        # SNIP, Table 1: 10.5M (C), 15.2M (D), 15.0M (like). The padding of the 1 x 1 convolutions (sparse momentum's
        # code) leaves 2 x 2 pixels in C, and adds (2048 - 512) * 512 weights to SNIP's 10,521,280.
        ("VGG16-C", 11_323_466, 10_521_280 + 786_432),
        pytest.param("VGG16-D", 15_255_626, 15_239_872, marks=pytest.mark.slow),
        pytest.param("VGG16-like", 14_991_946, 14_977_728, marks=pytest.mark.slow),
        # Sun et al., NeuralFuse (2023), Table 7, for 11, 16, 19; 13 has the two convolutions of 36,864 and 147,456
        # weights more than 11. Network slimming's README: 20.04M for 19.
        ("VGG-11", 9_231_114, 9_222_848),
        ("VGG-13", 9_416_010, 9_222_848 + 36_864 + 147_456),
        ("VGG-16", 14_728_266, 14_715_584),
        ("VGG-19", 20_040_522, 20_024_000),
        # MLPerf Tiny's reference: 78,666 with 480 statistics. Convolutions of 3 x 3 from 3 to 16, 16 to 16 twice, 16 to
        # 32, 32 to 32, 32 to 64 and 64 to 64 channels have 74,160 weights, two of 1 x 1 2,560, the dense layer 640.
        ("ResNet-8", 78_666 - 480, 74_160 + 2_560 + 640),
        # NeuralFuse, Table 7.
        ("ResNet-18", 11_173_962, 11_164_352),
        # He et al. 2016, Table 6: 0.27M and 0.85M. n blocks per stage have 432 + 2 n 48,384 - 13,824 weights in 3 x 3
        # convolutions (the first of stages 2 and 3 reads half the channels), 640 in the dense layer.
        ("ResNet-20", 269_722, 432 + 6 * 48_384 - 23_040 + 640),
        ("ResNet-56", 853_018, 432 + 18 * 48_384 - 23_040 + 640),
        # Zagoruyko and Komodakis 2016: 11.0M (16-8), 17.1M (16-10), 17.2M (22-8), 36.5M (28-10); 16-10 and 28-10 to the
        # digit in the tables of https://github.com/osmr/imgclsmob.
        ("WRN-28-2", 1_467_610, 1_463_984),
        pytest.param("WRN-16-8", 10_961_370, 10_954_160, marks=pytest.mark.slow),
        pytest.param("WRN-16-10", 17_116_634, 17_107_632, marks=pytest.mark.slow),
        pytest.param("WRN-22-8", 17_158_106, 17_147_312, marks=pytest.mark.slow),
        ("WRN-28-10", 36_479_194, 36_461_232),
        # Network slimming's README: 1.07M, of which the channel selection counts 9,360. Layers read 24, 36, ..., 156,
        # 168, ..., 300, 312, ..., 444 channels, together 8,424, and have 108 weights for each; transitions have 168^2
        # and 312^2.
        ("DenseNet-40", 1_059_298, 648 + 108 * 8_424 + 168**2 + 312**2 + 4_560),
    ],
)
def test_parameters_are_the_papers(name, parameters, weights):
    variables = variables_of(ALL[name])
    params = {path: v for path, v in variables.items() if path[0] == "params"}
    assert sum(v.size for v in params.values()) == parameters
    assert sum(v.size for path, v in params.items() if path[-1] == "kernel") == weights
    assert all(v.dtype == jnp.float32 for v in variables.values())


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("AlexNet", "conv1 bn1 conv2 bn2 conv3 bn3 conv4 bn4 conv5 bn5 fc1 bn6 fc2 bn7 fc3"),
        ("ResNet-8", "conv1 bn1 block1_1 block2_1 block3_1 fc"),
        ("WRN-16-2", "conv1 block1_1 block1_2 block2_1 block2_2 block3_1 block3_2 bn fc"),
        ("DenseNet-10", "conv1 block1_1 block1_2 transition1 block2_1 block2_2 transition2 block3_1 block3_2 bn fc"),
    ],
)
def test_layers_are_named_in_network_order(name, layers):
    assert list(dict.fromkeys(path[1] for path in variables_of(SMALL[name]) if path[0] == "params")) == layers.split()


# Differences of the logits of two images to the first logit, in training, from the authors' PyTorch code at the commits
# that the docstrings name: with its channels divided as in SMALL, the weights of `numpy_variables` (in PyTorch's
# layout), and no dropout.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param(
            "AlexNet", [[-1.29006, -4.2428, -3.77605], [-2.32349, -1.45326, -2.09637]], marks=pytest.mark.slow
        ),
        pytest.param(
            "VGG16-C", [[-2.87547, -1.02976, -4.52557], [-1.13053, -3.76032, -2.06789]], marks=pytest.mark.slow
        ),
        pytest.param("VGG-16", [[0.69434, -0.38252, -0.43033], [1.13199, 0.08423, 0.09074]], marks=pytest.mark.slow),
        ("ResNet-8", [[1.22583, 0.75467, 0.33545], [1.36005, 0.61745, 0.13189]]),
        pytest.param("ResNet-18", [[-0.68225, 0.64853, 0.4892], [-0.30738, 0.71076, 0.62358]], marks=pytest.mark.slow),
        ("WRN-16-2", [[-2.89006, -2.0782, -2.35447], [-2.65884, -2.22415, -2.11215]]),
        pytest.param(
            "DenseNet-10", [[-0.14596, 0.49181, 0.8316], [-0.11647, 0.27427, 0.74765]], marks=pytest.mark.slow
        ),
    ],
)
@pytest.mark.parametrize("form", slow_except(["slices"], ["xla", "slices"]))
def test_logits_are_those_of_the_authors_code(name, expected, form):
    model, variables = SMALL[name].clone(implementation=form), numpy_variables(SMALL[name])
    if name == "VGG16-C":  # PyTorch flattens its 32 x 2 x 2 features channels first
        fc1 = variables["params"]["fc1"]
        fc1["kernel"] = fc1["kernel"].reshape(32, 2, 2, 32).transpose(1, 2, 0, 3).reshape(128, 32)
    train = quick_jit(lambda variables, images: model.apply(variables, images, mutable=["batch_stats"]))
    logits, updates = train(variables, numpy_images((4, 32, 32, 3)))
    expected = np.array(expected)
    chex.assert_trees_all_close(
        logits[:2, :3] - logits[:2, :1], jnp.asarray(expected - expected[:, :1], jnp.float32), atol=1e-3
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(updates["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize("name", slow_except(["ResNet-8"], SMALL))
def test_batch_statistics_over_an_axis_are_those_of_the_whole_batch(name):
    model, variables = SMALL[name].clone(implementation="xla"), numpy_variables(SMALL[name])
    images = numpy_images((16, 32, 32, 3))

    def train(model):
        return lambda images: model.apply(variables, images, mutable=["batch_stats"])

    logits, whole = quick_jit(train(model))(images)
    parts = images.reshape(8, 2, 32, 32, 3)
    over_all = model.clone(axis_name="devices")
    found, of_parts = quick_jit(jax.vmap(train(over_all), axis_name="devices"))(parts)
    chex.assert_trees_all_close(found.reshape(logits.shape), logits, rtol=1e-3, atol=1e-3)
    for i in (0, 7):
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], of_parts), whole, rtol=1e-4, atol=1e-4)
    # Neither evaluating nor init needs the axis.
    chex.assert_trees_all_equal(jax.eval_shape(over_all.apply, variables, images), jax.eval_shape(lambda: logits))
    assert variables_of(over_all) == variables_of(model)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param("AlexNet", (2, 16, 18, 3), marks=pytest.mark.slow),
        pytest.param("VGG16-C", (2, 32, 32, 3), marks=pytest.mark.slow),
        pytest.param("VGG-16", (2, 18, 16, 3), marks=pytest.mark.slow),
        ("ResNet-8", (2, 7, 5, 1)),
        pytest.param("ResNet-18", (2, 9, 8, 3), marks=pytest.mark.slow),
        pytest.param("WRN-16-2", (2, 6, 5, 3), marks=pytest.mark.slow),
        pytest.param("DenseNet-10", (2, 7, 5, 3), marks=pytest.mark.slow),
    ],
)
def test_gradients_reach_every_parameter(name, shape):
    variables = numpy_variables(SMALL[name], shape)

    # Running statistics: those of the batch take the bias of a convolution away, and its gradient.
    def loss(params, images):
        model = SMALL[name].clone(implementation="xla")
        logits = model.apply({"params": params, "batch_stats": variables["batch_stats"]}, images)
        return jnp.sum(logits * jnp.sin(jnp.arange(logits.size)).reshape(logits.shape))

    grads = quick_jit(jax.grad(loss))(variables["params"], numpy_images(shape))
    for path, grad in flatten_dict(grads).items():
        assert jnp.any(grad != 0), path
        assert jnp.all(jnp.isfinite(grad)), path


@pytest.mark.slow
@pytest.mark.parametrize("form", ["xla", "slices"])
@pytest.mark.parametrize("name", SMALL)
def test_form_of_every_convolution_is_the_one_asked_for(name, form):
    model = SMALL[name].clone(implementation=form)
    variables, images = unflatten_dict(variables_of(model)), jax.ShapeDtypeStruct(CIFAR, jnp.float32)
    forms = []

    def look(call, args, kwargs, context):
        if isinstance(context.module, Conv):
            forms.append(context.module.implementation)
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        jax.eval_shape(model.apply, variables, images)
    kernels = sum(path[-1] == "kernel" and v.ndim == 4 for path, v in flatten_dict(variables).items())
    assert forms == [form] * kernels


@pytest.mark.parametrize("name", SMALL)
def test_dtype_is_of_the_computation_only(name):
    model = SMALL[name].clone(dtype=jnp.bfloat16, num_classes=7)
    variables, images = unflatten_dict(variables_of(model)), jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    logits, updates = jax.eval_shape(lambda v, x: model.apply(v, x, mutable=["batch_stats"]), variables, images)
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.bfloat16)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((variables, updates)))


@pytest.mark.parametrize("name", SMALL)
def test_no_layer_is_narrower_than_one_channel(name):
    variables = variables_of(SMALL[name].clone(width=1e-4))
    last = {path[1]: v for path, v in variables.items() if path[1].startswith("fc") and path[-1] == "bias"}
    *hidden, logits = last.values()
    assert logits.shape == (10,)
    assert all(layer.shape == (1,) for layer in hidden)
    assert variables["params", "conv1", "kernel"].shape[-1] == (2 if name == "DenseNet-10" else 1)


@pytest.mark.parametrize(
    ("name", "smallest"),
    [
        ("AlexNet", 7),
        ("VGG16-C", 32),
        ("VGG-16", 16),
        ("ResNet-8", 4),
        ("ResNet-18", 8),
        ("WRN-16-2", 4),
        ("DenseNet-10", 4),
    ],
)
def test_images_that_are_too_small_or_no_images(name, smallest):
    variables_of(SMALL[name], (1, smallest, smallest, 3))
    for shape in [(1, smallest - 1, 32, 3), (1, 32, smallest - 1, 3), (32, 32, 3)]:
        with pytest.raises(ValueError, match=f"at least {smallest} x {smallest}, got") as error:
            variables_of(SMALL[name], shape)
        assert type(SMALL[name]).__name__ in str(error.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.AlexNet("m"), r"AlexNet's variant is one of \('s', 'b'\), got 'm'"),
        (models.VGG("E"), r"VGG's variant is one of \('C', 'D', .*, got 'E'"),
        (models.ResNetCIFAR(18), "depth is 6 n [+] 2 for n >= 1 blocks per stage, got 18"),
        (models.ResNetCIFAR(2), "depth is 6 n [+] 2 for n >= 1 blocks per stage, got 2"),
        (models.WideResNet(18, 2), "depth is 6 n [+] 4 for n >= 1 blocks per stage, got 18"),
        (models.WideResNet(4, 2), "depth is 6 n [+] 4 for n >= 1 blocks per stage, got 4"),
        (models.WideResNet(16, 0), "widen is an int >= 1, got 0"),
        (models.DenseNet(41), "depth is 3 n [+] 4 for n >= 1 layers per block, got 41"),
        (models.DenseNet(4), "depth is 3 n [+] 4 for n >= 1 layers per block, got 4"),
        (models.DenseNet(40, growth=0), "growth is an int >= 1, got 0"),
    ],
)
def test_networks_that_do_not_exist(model, message):
    with pytest.raises(ValueError, match=message):
        variables_of(model)


# The standard deviation of a normal distribution by fan_in or fan_out (He et al.; 0.01 in VGG's last layer), the bounds
# of PyTorch's uniform distribution by fan_in, or the number that all entries start from.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            models.AlexNet(width=1 / 8),
            {
                "conv1/bias": ("uniform", 363**-0.5),
                "conv2/kernel": ("uniform", 300**-0.5),
                "fc2/kernel": ("uniform", 128**-0.5),
                "fc2/bias": ("uniform", 128**-0.5),
            },
        ),
        (
            models.VGG("C", width=1 / 4),
            {
                "conv5/kernel": ("uniform", 288**-0.5),
                "conv7/bias": ("uniform", 64**-0.5),
                "fc1/kernel": ("uniform", 512**-0.5),
            },
        ),
        (
            models.VGG("16_bn", width=1 / 4),
            {
                "conv5/kernel": ("normal", (2 / 288) ** 0.5),
                "conv5/bias": ("constant", 0),
                "fc1/kernel": ("normal", 0.01),
                "fc1/bias": ("constant", 0),
            },
        ),
        (
            models.ResNetCIFAR(8, num_classes=200),
            {
                "block3_1/conv1/kernel": ("normal", (2 / 288) ** 0.5),
                "fc/kernel": ("normal", (2 / 64) ** 0.5),
                "fc/bias": ("uniform", 1 / 8),
            },
        ),
        (
            models.ResNet18(width=1 / 8, num_classes=200),
            {
                "block4_1/conv1/kernel": ("normal", (2 / 576) ** 0.5),
                "block4_1/shortcut_conv/kernel": ("normal", (2 / 64) ** 0.5),
                "block4_1/shortcut_bn/scale": ("constant", 1),
                "fc/kernel": ("uniform", 1 / 8),
                "fc/bias": ("uniform", 1 / 8),
            },
        ),
        (
            models.WideResNet(10, 1, num_classes=200),
            {
                "block3_1/conv1/kernel": ("normal", (2 / 576) ** 0.5),
                "fc/kernel": ("uniform", 1 / 8),
                "fc/bias": ("constant", 0),
            },
        ),
        (
            models.DenseNet(7),
            {
                "block3_1/conv/kernel": ("normal", (2 / 108) ** 0.5),
                "transition1/bn/scale": ("constant", 0.5),
                "bn/scale": ("constant", 0.5),
                "bn/bias": ("constant", 0),
            },
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_parameters_start_as_the_authors_do(model, expected):
    @quick_jit
    def parameters(key):  # those of interest only, so that nothing else is compiled
        params = flatten_dict(model.init(key, jnp.zeros(CIFAR))["params"], sep="/")
        return {path: params[path] for path in expected}

    for path, value in parameters(jax.random.key(0)).items():
        kind, spread = expected[path]
        if kind == "constant":
            assert jnp.all(value == spread), path
        elif kind == "uniform":
            assert jnp.abs(value).max() <= spread, path
            assert value.min() < -0.7 * spread, path
            assert value.max() > 0.7 * spread, path
        else:
            assert abs(value.std() / spread - 1) < 0.08, path
            assert jnp.abs(value).max() > 2.5 * spread, path  # not truncated
