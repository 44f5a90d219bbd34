"""The networks of a run, and the weights that they start with."""

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import jaxsparse
from experiments.measures import TEXT
from experiments.options import choose
from jaxsparse import models
from jaxsparse.parallel import DeviceLayout
from jaxsparse.trace import multiply_adds
from jaxsparse.trees import by_path, path_name

MODELS = {
    "alexnet": models.AlexNet,
    "conv_2": models.Conv2,
    "conv_4": models.Conv4,
    "conv_6": models.Conv6,
    "densenet_40": models.DenseNet40,
    "gpt": models.GPT,
    "lenet_300_100": models.LeNet300100,
    "lenet5_caffe": models.LeNet5Caffe,
    "mlp": models.MLP,
    "resnet_8": models.ResNet8,
    "resnet_18": models.ResNet18,
    "resnet_20": models.ResNet20,
    "resnet_34": models.ResNet34,
    "resnet_50": models.ResNet50,
    "resnet_56": models.ResNet56,
    "vgg": models.VGG,
    "wide_resnet": models.WideResNet,
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def make_model(config: ConfigDict, num_classes: int, layout: DeviceLayout | None = None) -> Any:
    """The model ``config.model.name``, with the other keys of ``config.model`` that are not None as its attributes.

    A model of tokens has as many of them as ``num_classes``, and by default reads windows of ``config.data.length``.
    """
    options = {name: value for name, value in config.model.items() if name != "name" and value is not None}
    if "dtype" in options:
        options["dtype"] = choose(DTYPES, options["dtype"], "config.model.dtype")
    kind, name = choose(MODELS, config.model.name, "config.model.name"), config.model.name
    of_text = config.data.name == TEXT
    if (kind is models.GPT) != of_text:
        raise ValueError(f"config.model.name={name!r} is not for {'text' if of_text else 'images'}")
    outputs = "vocab_size" if of_text else "num_classes"
    given = {outputs: num_classes, **({"max_length": config.data.length} if of_text else {})}
    try:
        model = kind(**{**given, **options})
    except TypeError as error:
        raise ValueError(f"config.model does not fit {name!r}: {error}") from None
    if getattr(model, outputs) < num_classes:
        what = "tokens" if of_text else "classes"
        raise ValueError(f"config.model.{outputs} is {getattr(model, outputs)}, but the data have {num_classes} {what}")
    if config.parallel.sync_batch_norm and layout is not None and layout.axis_name is not None:
        if not hasattr(model, "axis_name"):
            raise ValueError(
                "config.parallel.sync_batch_norm is for models with batch normalisation, "
                f"config.model.name={config.model.name!r} has none"
            )
        model = model.clone(axis_name=layout.axis_name)
    return model


def positions(model: Any, shape: Sequence[int], dtype: Any = jnp.float32) -> dict[str, int | float]:
    """The number of positions of an input at which each kernel is applied, by path.

    It is that of the model as it is written, on any device: the form for CPUs may multiply more zeros to pool at once.
    """
    plain = model.clone(implementation="xla") if hasattr(model, "implementation") else model
    example = jax.ShapeDtypeStruct((1, *shape), dtype)
    variables = dict(jax.eval_shape(plain.init, jax.random.key(0), example))
    params = variables.pop("params")
    counts = multiply_adds(lambda p, rest, x: plain.apply({"params": p, **rest}, x), params, variables, example)
    return counts.positions(batch=1)


def he_normal(params: Any, key: jax.Array) -> Any:
    """Kernels from N(0, sqrt(2 / fan_in)), whatever the model has them start from, and biases of 0."""
    draw = jax.nn.initializers.variance_scaling(2.0, "fan_in", "normal")

    def fresh(path, leaf):
        if leaf.ndim > 1:
            return draw(jax.random.fold_in(key, zlib.crc32(path.encode())), leaf.shape, leaf.dtype)
        return jnp.zeros_like(leaf) if path.endswith("bias") else leaf

    return jax.tree_util.tree_map_with_path(lambda path, leaf: fresh(path_name(path), leaf), params)


def two_numbers_a_layer(trained: Any, masks: Any, biases: bool = False) -> Any:
    """The initialisation of ASNI-II."""
    return jaxsparse.amenable_init(trained, masks, jaxsparse.centroids(trained, masks, biases=biases))


INITS = {"model": lambda params, key: params, "he_normal": he_normal}
# Of fresh params, the params of another run, and its masks: what a run on these masks starts with.
STARTS = {
    "centroids": lambda fresh, trained, masks: two_numbers_a_layer(trained, masks),
    "centroids_and_biases": lambda fresh, trained, masks: two_numbers_a_layer(trained, masks, biases=True),
    "original": lambda fresh, trained, masks: fresh,
    "weights": lambda fresh, trained, masks: trained,
}


def load_start(config: ConfigDict) -> tuple[Any, Any] | None:
    """The params and masks in the file ``config.masks_from``, or the params in ``config.start_from`` and None.

    None if the weights start at random.
    """
    source = config.get("start_from")
    if config.masks_from and not config.dense:
        if source:
            raise ValueError("config.start_from and config.masks_from both say where the weights start: take one")
        choose(STARTS, config.start, "config.start")
        return jaxsparse.load_sparse(config.masks_from)
    return (jaxsparse.load_sparse(source)[0], None) if source else None


def started(fresh: Any, start: tuple[Any, Any], config: ConfigDict) -> Any:
    """The params that a run starts with, of random ones and what :func:`load_start` found.

    Raises:
      ValueError: if the file is of another model.
    """
    key = "start_from" if start[1] is None else "masks_from"
    check_fits(start[0], fresh, f"config.{key}", config[key])
    return start[0] if start[1] is None else choose(STARTS, config.start, "config.start")(fresh, *start)


def check_fits(trained: Any, params: Any, key: str, file: str) -> None:
    """Raises a ValueError if a model that was read from a file is not the one of the run."""
    there, here = ({path: leaf.shape for path, leaf in by_path(tree).items()} for tree in (trained, params))
    for path in sorted(there | here):
        if there.get(path) != here.get(path):
            raise ValueError(
                f"{key}={file!r} does not fit config.model: {path} is "
                f"{there.get(path, 'not there')} in the file and {here.get(path, 'not there')} in the model"
            )
