"""The data of a run: opened, in batches, and images augmented."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from experiments import data, text
from experiments.measures import TEXT
from experiments.options import OF_OWN, OWN, choose, or_none
from jaxsparse.parallel import DeviceLayout

PADDINGS = {"zeros": "constant", "reflect": "reflect"}


def open_dataset(config: ConfigDict) -> Any:
    """The data of ``config.data``: images as arrays, or if they are streamed as sources that are read; or a text."""
    if config.data.name == TEXT:
        if config.data.streamed:
            raise ValueError("config.data.streamed is for images, and a text is held in the memory")
        return text.load(
            config.data.files,
            length=config.data.length,
            vocab_size=config.data.vocab_size,
            validation=config.data.validation,
            test=config.data.test,
            test_files=config.data.test_files,
            epoch_tokens=config.data.epoch_tokens,
            eval_windows=config.data.eval_windows,
            examples=config.data.examples,
        )
    mean, std, classes = map(or_none, (config.data.mean, config.data.std, config.data.classes))
    name, own = config.data.name, config.data.name in OWN
    for key in () if own else OF_OWN:
        if config.data.get(key) is not None:
            raise ValueError(f"config.data.{key} has no effect for {name!r}; it is for text and {', '.join(OWN)}")
    options = {"validation": config.data.validation, "examples": config.data.examples}
    if own:
        from experiments import own_data  # with Pillow, which other data do without

        options["test"] = config.data.test
    if not config.data.streamed:
        options |= {"mean": mean, "std": std}
        if own:
            size = config.data.image_size
            return own_data.load(name, config.data.files, config.data_dir, image_size=size, **options)
        return data.load(name, config.data_dir, **options)
    from experiments import streams  # takes a while, and small sets do without

    if own and name != "folder":
        raise ValueError(f"config.data.streamed is for a folder and sets of TensorFlow Datasets, not for {name!r}")
    for key, given in (("mean", mean), ("std", std)):
        if given is None or len(given) not in (1, 3):
            raise ValueError(f"config.data.{key} of streamed images has one number or one for each colour, got {given}")
    data.check_moments(mean, std)
    options["classes"] = classes
    if own:
        images = own_data.open_set(config.data.files, config.data_dir, **options)
    else:
        images = streams.open_set(name, config.data_dir, **options)
    mean, std = (np.broadcast_to(255 * np.asarray(x, np.float32), (3,)) for x in (mean, std))
    return data.Dataset(images.train, images.validation, images.test, images.num_classes, mean, std, images.about)


def open_source(stack: ExitStack, config: ConfigDict, dataset: Any, layout: DeviceLayout, position: Any) -> Any:
    """The input of a program: the data on the devices, or the stream of images from a position on."""
    if not config.data.streamed:
        return dataset._replace(
            **{name: layout.replicate(getattr(dataset, name)) for name in ("train", "validation", "test")}
        )
    from experiments import streams

    stream = streams.train_stream(
        dataset.train,
        batch_size=config.data.batch_size // jax.process_count(),
        image_size=config.data.image_size,
        seed=config.seed,
        shard=(jax.process_index(), jax.process_count()),
        workers=config.data.workers,
    )
    stack.enter_context(closing(stream))
    if position is not None:
        stream.set_state(position)
    return stream


def report_replaced(source: Any, numbers: Sequence[int]) -> None:
    """Names images that could not be read, in whose place the next ones were taken."""
    for number in numbers:
        logging.warning("%s cannot be read: the next image was taken in its place", source.name_of(int(number)))


def make_augmentation(config: ConfigDict) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """A function of images, the epoch's key and the images' numbers, as ``config.data`` has it."""
    pad, flip = config.data.pad, config.data.flip
    if pad < 0:
        raise ValueError(f"config.data.pad is at least 0, got {pad}")
    pad_mode = choose(PADDINGS, config.data.pad_mode, "config.data.pad_mode")
    if not (pad or flip):
        return lambda images, key, rows: images

    def augmented(images, key, rows):
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
        return data.augment(images, keys, pad=pad, pad_mode=pad_mode, flip=flip)

    return augmented


def batches(
    key: jax.Array, start: jax.Array, length: int, batch_size: int, num_examples: int, epochs: int
) -> jax.Array:
    """The examples of steps start, ..., start + length - 1, which touch ``epochs`` epochs: int32, (length, batch_size).

    The order of an epoch depends on ``key`` and the number of the epoch alone, wherever a chunk starts.
    """
    steps_per_epoch = num_examples // batch_size
    first_epoch = start // steps_per_epoch
    numbers = first_epoch + jnp.arange(epochs)
    orders = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), num_examples))(numbers)
    rows = orders[:, : steps_per_epoch * batch_size].reshape(-1, batch_size)
    return jax.lax.dynamic_slice_in_dim(rows, start - first_epoch * steps_per_epoch, length)


def in_batches(split: data.Split, batch_size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Images, labels, and which of them are real: the last batch is filled up. Shapes (batches, batch_size, ...)."""
    missing = -len(split.labels) % batch_size
    real = jnp.ones(len(split.labels), bool)
    return tuple(
        jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))).reshape(-1, batch_size, *x.shape[1:])
        for x in (split.images, split.labels, real)
    )
