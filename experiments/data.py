"""The data sets, as arrays that fit in the device's memory.

Pixels stay bytes, a quarter of the memory of floats; :func:`normalise` turns them into numbers inside jit.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from experiments.command_line import progress_bar


class Split(NamedTuple):
    """A split of a data set: images and labels.

    Attributes:
      images: (n, height, width, channels), uint8.
      labels: (n,), int32, from 0 to the number of classes - 1.
    """

    images: Any
    labels: Any


class Dataset(NamedTuple):
    """Images and labels, and how to normalise the images.

    Attributes:
      train: the examples to train on.
      validation: examples held out from those of training; there may be none.
      test: the examples to test on.
      num_classes: int.
      mean: (channels,), float32: subtracted from the pixels, which are from 0 to 255.
      std: (channels,), float32: what they are then divided by.
      about: what result.json has about images of one's own; nothing for data that their name says.
    """

    train: Split
    validation: Split
    test: Split
    num_classes: int
    mean: np.ndarray
    std: np.ndarray
    about: Mapping[str, Any] = MappingProxyType({})


def load(
    name: str,
    data_dir: str | None = None,
    *,
    validation: float = 0.0,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    examples: int | None = None,
) -> Dataset:
    """The data set of that name.

    Args:
      name: "digits", the 1797 handwritten digits of 8 x 8 pixels that come with scikit-learn, or the name of an image
        set of TensorFlow Datasets ("mnist", "fashion_mnist", "cifar10") that was prepared as array_record: images of
        one size with one label each, in splits "train" and "test". TensorFlow is not needed to read it.
      data_dir: where TensorFlow Datasets keeps its data; None takes its default, ~/tensorflow_datasets.
      validation: the fraction of the train examples, the last of them, that is held out, in [0, 1).
      mean, std: of the pixels divided by 255, one number or one a channel; None takes those of the train images.
      examples: keep at most this many examples from the start of each split; None keeps all.

    Returns:
      The same :class:`Dataset` on every call and machine.

    Raises:
      ValueError: if there is no such data set, or it is not one of images with a label, or too large for the memory.
      FileNotFoundError: if it was not prepared; says how to.

    Examples:
      >>> from experiments import data
      >>> digits = data.load("digits", validation=0.1)
      >>> [split.images.shape for split in (digits.train, digits.validation, digits.test)]
      [(1294, 8, 8, 1), (144, 8, 8, 1), (359, 8, 8, 1)]

    References:
      Alpaydin and Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning Repository, 1998.
      `TensorFlow Datasets <https://www.tensorflow.org/datasets/catalog/overview>`_.
    """
    check_amounts(validation, examples)
    check_moments(mean, std)
    train, test, num_classes = _digits() if name == "digits" else _from_tfds(name, data_dir)
    splits = {"train": train, "test": test}
    return assembled(splits, num_classes, name, validation=validation, mean=mean, std=std, examples=examples)


def assembled(
    splits: Mapping[str, Split],
    num_classes: int,
    name: str,
    *,
    validation: float,
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    examples: int | None,
) -> Dataset:
    """The data set of the splits "train", "test" and maybe "validation"; the options are those of :func:`load`."""
    splits = {split: Split(*(part[:examples] for part in both)) for split, both in splits.items()}
    train = splits["train"]
    kept = kept_of(len(train.labels), validation, name)
    train, held_out = Split(*(part[:kept] for part in train)), Split(*(part[kept:] for part in train))
    found_mean, found_std = _moments(train.images) if mean is None or std is None else (None, None)
    mean = _channels(found_mean if mean is None else 255 * np.asarray(mean), train, "mean")
    if std is None and not np.all(found_std):
        channel = int(np.argmin(found_std))
        raise ValueError(
            f"channel {channel} is the same in every pixel of {name}'s train images: config.data.std says by what "
            "to divide"
        )
    std = _channels(found_std if std is None else 255 * np.asarray(std), train, "std")
    return Dataset(train, splits.get("validation", held_out), splits["test"], num_classes, mean, std)


def kept_of(count: int, validation: float, name: str) -> int:
    """How many train examples are left without the share held out; a ValueError if none is."""
    kept = count - round(validation * count)
    if not kept:
        raise ValueError(f"config.data.validation={validation} leaves none of {name}'s train examples")
    return kept


def check_amounts(validation: float, examples: int | None) -> None:
    """Raises a ValueError for a share or a number of examples out of range."""
    if not 0 <= validation < 1:
        raise ValueError(f"config.data.validation is in [0, 1), got {validation}")
    if examples is not None and examples < 1:
        raise ValueError(f"config.data.examples is at least 1, got {examples}")


def check_moments(mean: float | Sequence[float] | None, std: float | Sequence[float] | None) -> None:
    """Raises a ValueError for a mean or a std that no image can be normalised by; None is that of the images."""
    if mean is not None and not np.isfinite(np.asarray(mean, np.float32)).all():
        raise ValueError(f"config.data.mean is finite, got {mean}")
    if std is not None:
        divisors = np.asarray(std, np.float32)
        if not (np.isfinite(divisors) & (divisors > 0)).all():
            raise ValueError(f"config.data.std is finite and above 0, got {std}")


def count(split: Any) -> int:
    """The number of examples of a split, of arrays or of streamed images."""
    return len(split.labels) if isinstance(split, Split) else len(split)


def image_shape(dataset: Dataset, streamed_size: int) -> tuple[int, ...]:
    """(height, width, channels) of the images; streamed ones are cropped to squares of that size."""
    if isinstance(dataset.train, Split):
        return dataset.train.images.shape[1:]
    return streamed_size, streamed_size, 3


def normalise(images: jax.Array, dataset: Dataset) -> jax.Array:
    """(images - mean) / std, float32, of uint8 images (batch, height, width, channels)."""
    shape = (1, 1, 1, -1)
    return (images.astype(jnp.float32) - dataset.mean.reshape(shape)) / dataset.std.reshape(shape)


def augment(images: jax.Array, keys: jax.Array, *, pad: int, pad_mode: str, flip: bool) -> jax.Array:
    """Random crops of the padded images, and random mirroring, as is done with CIFAR.

    Args:
      images: (batch, height, width, channels).
      keys: (batch,), typed PRNG keys, one an image.
      pad: pixels added on each side; the crop has the size of the image.
      pad_mode: "constant" pads with 0, "reflect" with the image mirrored at its edge.
      flip: whether every second image, at random, is mirrored left to right.

    Returns:
      The images, in their shape and dtype.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> keys = jax.random.split(jax.random.key(0), 2)
      >>> augment(jnp.ones((2, 4, 4, 3), jnp.uint8), keys, pad=1, pad_mode="constant", flip=True).shape
      (2, 4, 4, 3)
    """
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode=pad_mode)

    def one(image, key):
        crop_key, flip_key = jax.random.split(key)
        row, column = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1)
        image = jax.lax.dynamic_slice(image, (row, column, 0), images.shape[1:])
        return jnp.where(flip & jax.random.bernoulli(flip_key), image[:, ::-1], image)

    return jax.vmap(one)(padded, keys)


def _moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, by exact sums of integers that take little memory."""
    sums = np.zeros((2, images.shape[-1]), np.int64)
    for start in range(0, len(images), 1000):
        pixels = images[start : start + 1000].astype(np.int32)
        sums += [power.sum((0, 1, 2), dtype=np.int64) for power in (pixels, pixels * pixels)]
    count = images.size // images.shape[-1]
    mean, square = sums / count
    return mean, np.sqrt(np.maximum(square - mean * mean, 0))


def _channels(values: Any, split: Split, what: str) -> np.ndarray:
    values = np.asarray(values, np.float32)
    channels = split.images.shape[-1]
    if values.shape not in ((), (1,), (channels,)):
        raise ValueError(f"config.data.{what} has one number or one for each of {channels} channels, got {values.size}")
    return np.broadcast_to(values, (channels,))


@cache
def _digits() -> tuple[Split, Split, int]:
    from sklearn import datasets  # takes a while, and other sets do without

    pixels, labels = datasets.load_digits(return_X_y=True)
    images, labels = pixels.reshape(-1, 8, 8, 1).astype(np.uint8), labels.astype(np.int32)
    test = _stratified(labels, fraction=0.2)
    return Split(images[~test], labels[~test]), Split(images[test], labels[test]), 10


def _stratified(labels: np.ndarray, fraction: float) -> np.ndarray:
    """A fixed random choice of that fraction of each class, as a bool array."""
    # RandomState, unlike default_rng, promises the same numbers from every version of NumPy.
    order = np.random.RandomState(0).permutation(len(labels))
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        chosen[members[: round(fraction * len(members))]] = True
    return chosen


def tfds_builder(name: str, data_dir: str | None, other_names: Sequence[str] = ()) -> Any:
    """TensorFlow Datasets' builder of that name; a ValueError names the nearest, or that of ``other_names``."""
    import tensorflow_datasets as tfds  # takes a while, and digits do without

    data_dir = None if data_dir is None else os.path.expanduser(data_dir)
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        known = [*other_names, *tfds.list_builders(with_community_datasets=False)]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        others = "".join(f"{other!r} and " for other in other_names)
        raise ValueError(
            f"unknown data set {name!r}{hint} Known are {others}those of TensorFlow Datasets, "
            "https://www.tensorflow.org/datasets/catalog/overview"
        ) from None


def as_source(name: str, builder: Any, split: str, before: str = "", **options: Any) -> Any:
    """A split of TensorFlow Datasets by number; if it is not there, a FileNotFoundError that says how to get it."""
    try:
        return builder.as_data_source(split=split, **options)
    except NotImplementedError:  # not there, or in a format without random access: TFDS makes no difference
        raise FileNotFoundError(_how_to_prepare(name, builder, before)) from None


@cache  # many runs in one process decode the images once
def _from_tfds(name: str, data_dir: str | None) -> tuple[Split, Split, int]:
    builder = tfds_builder(name, data_dir, other_names=("digits",))
    if missing := {"train", "test"} - set(builder.info.splits or ("train", "test")):
        raise ValueError(
            f"data set {name!r} has no split {', '.join(map(repr, sorted(missing)))}, it has "
            f"{', '.join(map(repr, builder.info.splits))}; sets of images of any size, such as imagenet2012, are "
            "streamed: --config.data.streamed"
        )
    sources = {split: as_source(name, builder, split) for split in ("train", "test")}
    features, keys = builder.info.features, builder.info.supervised_keys
    try:
        image_key, label_key = keys
        shape, num_classes = features[image_key].shape, features[label_key].num_classes
    except (TypeError, ValueError, KeyError, AttributeError):
        raise ValueError(f"data set {name!r} is not one of images with one label each; it has {features}") from None
    if len(shape) != 3 or None in shape or features[image_key].np_dtype != np.uint8:
        raise ValueError(
            f"data set {name!r} needs images of one size with 8 bits a channel, it has {features}; colour images of "
            "any size are streamed: --config.data.streamed"
        )
    size = sum(map(len, sources.values())) * int(np.prod(shape))
    if size > physical_memory() / 2:
        raise ValueError(f"data set {name!r} takes {size / 2**30:.0f} GiB, more than half of this machine's memory")
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # TFDS recommends OpenCV
    try:
        train, test = (_read(source, image_key, label_key, shape, name) for source in sources.values())
    finally:
        logging.set_verbosity(verbosity)
    return train, test, num_classes


def physical_memory() -> int:
    """Physical memory of this machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read(source: Any, image_key: str, label_key: str, shape: tuple[int, ...], name: str) -> Split:
    split = Split(np.empty((len(source), *shape), np.uint8), np.empty(len(source), np.int32))
    with progress_bar(len(source), f"reading {name}", unit="image", delay=1, leave=False) as bar:
        for start in range(0, len(source), 1000):
            for i, example in enumerate(source.__getitems__(range(start, min(start + 1000, len(source)))), start):
                split.images[i], split.labels[i] = example[image_key], example[label_key]
            bar.update(i + 1 - start)
    return split


def _how_to_prepare(name: str, builder: Any, before: str = "") -> str:
    """The message for a set that is not there; ``before`` says what comes first, for a folder ``{data_dir}``."""
    there = " in a format that has no random access" if os.path.exists(builder.data_path) else ""
    data_dir = str(builder.data_path).removesuffix(f"/{builder.info.full_name}")
    return (
        f"data set {name!r} is not in {data_dir} as array_record{f' (it is there{there})' if there else ''}. "
        "Say where it is by --config.data_dir, or download and prepare it, for which TensorFlow is needed"
        f"{'. ' + before.format(data_dir=data_dir) + ' Then' if before else ''}:\n"
        "  pip install tensorflow\n"
        f'  python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='{data_dir}', file_format='array_record').download_and_prepare()\""
    )
