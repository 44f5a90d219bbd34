"""Data sets too large for the memory, such as ImageNet: read, decoded and cropped batch by batch in training.

TensorFlow Datasets gives the files of the images, Grain the order and the worker processes. What a batch holds follows
from its number alone: not from the workers, nor from what was read before it, so a run goes on where it stopped.
"""

import dataclasses
import difflib
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np
from absl import flags

from experiments import pictures
from experiments.command_line import progress_bar

MOST_UNREADABLE = 100  # files in a row: with more the set itself is broken
IMAGENET = (
    "Its images are not for everyone to download: register at https://image-net.org/download-images, put "
    "ILSVRC2012_img_train.tar (138 GB) and ILSVRC2012_img_val.tar (6.3 GB) into\n  {data_dir}/downloads/manual\n"
    "and leave room for 145 GB more."
)


class StreamError(ValueError):
    """The end of the images by an error: a broken data set, or a dead process."""


class Batch(NamedTuple):
    """Some examples, as NumPy arrays.

    Attributes:
      images: (b, size, size, 3), uint8.
      labels: (b,), int32.
      numbers: (b,), int32: the example's number in its source.
      real: (b,), bool: False for what fills up the last batches of an evaluation, whose images and labels are 0, and
        there for examples that cannot be read.
      replaced: (b,), int32: the number of the unreadable example in whose place this one stands, else -1.
    """

    images: np.ndarray
    labels: np.ndarray
    numbers: np.ndarray
    real: np.ndarray
    replaced: np.ndarray


class Source(Protocol):
    """Encoded images with labels, by number; it is sent to the worker processes."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> tuple[bytes, int]:
        """The image's file and its label."""

    def name_of(self, number: int) -> str:
        """A name of the example for messages."""


class ImageSet(NamedTuple):
    """A set of images.

    Attributes:
      train: the examples to train on.
      validation: examples held out from those of training; there may be none.
      test: the examples to test on.
      num_classes: int.
      about: what result.json has about images of one's own; nothing for data that their name says.
    """

    train: Source
    validation: Source
    test: Source
    num_classes: int
    about: Mapping[str, Any] = MappingProxyType({})


def open_set(
    name: str,
    data_dir: str | None = None,
    *,
    validation: float = 0.0,
    examples: int | None = None,
    classes: Sequence[str | int] | None = None,
) -> ImageSet:
    """An image set of TensorFlow Datasets, with images of any size; nothing is decoded yet.

    Args:
      name: "imagenet2012", "imagenette/320px-v2", or another with one label an image, prepared as array_record.
        TensorFlow is not needed to read it. The split to test on is "validation", as ImageNet's labels of "test" are
        secret, or "test" where there is no other.
      data_dir: where TensorFlow Datasets keeps its data; None takes its default, ~/tensorflow_datasets.
      validation: the fraction of the train examples, the last of them, that is held out, in [0, 1).
      examples: keep at most this many examples from the start of each split; None keeps all.
      classes: take the images of these classes only, given by name ("n01440764") or number; they become the labels 0,
        1, ... in this order. This reads the whole set once.

    Raises:
      ValueError: if there is no such data set or class, it is not one of images with a label, or there is none to train
        or to test on.
      FileNotFoundError: if it was not prepared; says how to.
    """
    from experiments import data  # with JAX, which the worker processes do without

    data.check_amounts(validation, examples)
    builder = data.tfds_builder(name, data_dir)
    import tensorflow_datasets as tfds

    features, keys = builder.info.features, builder.info.supervised_keys
    try:
        image_key, label_key = keys
        shape, names = features[image_key].shape, features[label_key].names
    except (TypeError, ValueError, KeyError, AttributeError):
        raise ValueError(f"data set {name!r} is not one of images with one label each; it has {features}") from None
    if tuple(shape) != (None, None, 3):
        raise ValueError(f"data set {name!r} needs images of any size with three channels, it has {features}")
    decoders = {image_key: tfds.decode.SkipDecoding()}
    before = IMAGENET if builder.name == "imagenet2012" else ""
    sources = []
    numbers = None if classes is None else numbers_of(classes, names, name)
    for split in ("train", "validation" if "validation" in builder.info.splits else "test"):
        try:
            records = data.as_source(name, builder, split, before, decoders=decoders)
        except ValueError:
            raise ValueError(f"data set {name!r} has no split {split!r}, but {[*builder.info.splits]}") from None
        source = TfdsSource(f"{name} {split}", records, image_key, label_key, range(len(records)), numbers)
        if classes is not None:
            source = source.of_its_classes()
        sources.append(source[: examples or len(source)])
    train, test = sources
    check_filled(train, test, classes, f"data set {name!r}")
    kept = data.kept_of(len(train), validation, name)
    return ImageSet(train[:kept], train[kept:], test, len(names if classes is None else classes))


def train_stream(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    seed: int,
    shard: tuple[int, int] = (0, 1),
    workers: int = 0,
    prefetch: int = 2,
) -> "Stream":
    """Random crops of the examples, without end, in a new random order each epoch.

    An epoch is ``len(source) // (batch_size * count)`` batches; what is left over waits for another epoch, in another
    order. A crop covers 8 to 100% of the image, at an aspect from 3/4 to 4/3, and every second one is mirrored. It
    depends on the seed, the epoch and the example, not on batches or shards.

    Args:
      source: the examples.
      batch_size: of this shard.
      image_size: height and width of the pictures in pixels.
      seed: of order and crops, from 0 to 2^32 - 1.
      shard: this one's number and how many there are. All shards' k-th batches, one after the other, are the k-th batch
        of a single shard with as many times the ``batch_size``.
      workers: processes that build batches; with 0 threads of this one do.
      prefetch: batches built ahead, by each worker.

    Returns:
      An iterator of :class:`Batch` that can save and restore where it is.

    References:
      Szegedy et al., *Going Deeper with Convolutions*, 2015, section 6: the crops.
    """
    steps = len(source) // (batch_size * shard[1])
    if not steps:
        raise ValueError(f"a batch of {batch_size * shard[1]} is more than the {len(source)} train examples")
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle()
    return Stream(_Batches(source, batch_size, image_size, shard, steps, seed, order), workers, prefetch)


def eval_batches(
    source: Source, *, batch_size: int, image_size: int, shard: tuple[int, int] = (0, 1), workers: int = 0
) -> "Stream":
    """Centre crops of all examples, once each, in order.

    Every shard gets equally many batches; the last is padded. Padding and images that cannot be read have
    ``real=False``. The picture is the centre of the image whose shorter side was made ``image_size`` * 256/224.

    Args:
      source: the examples.
      batch_size, image_size, shard, workers: as those of :func:`train_stream`.

    Returns:
      An iterator of :class:`Batch`.
    """
    steps = -(-len(source) // (batch_size * shard[1]))
    return Stream(_Batches(source, batch_size, image_size, shard, steps), workers, prefetch=2)


class Stream:
    """Batches one after another, built ahead by threads or processes, which start with the first batch asked for."""

    def __init__(self, batches: "_Batches", workers: int, prefetch: int):
        self._batches, self._workers, self._prefetch = batches, workers, prefetch
        self._given, self._iterator = 0, None

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        if self._given >= len(self._batches):
            self.close()
            raise StopIteration
        if self._iterator is None:
            ahead = grain.MapDataset.source(self._batches)[self._given :]
            if self._workers:
                if not flags.FLAGS.is_parsed():
                    flags.FLAGS.mark_as_parsed()  # for Grain, which reads its own even where absl has no part in it
                options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=max(self._prefetch, 1))
                ahead = ahead.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
                ahead = ahead.mp_prefetch(options, worker_init_fn=_start_worker)
            else:
                ahead = ahead.to_iter_dataset(grain.ReadOptions(self._prefetch, self._prefetch))
            self._iterator = iter(ahead)
        try:
            batch = next(self._iterator)
        except RuntimeError as error:  # of Grain
            raise StreamError(
                f"one of the {self._workers} processes that read images has died (config.data.workers): {error} Each "
                "of them takes memory; is there enough?"
            ) from error
        self._given += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """The position, for JSON; it can be restored with another number of workers or shards of the same batch."""
        return {"batches": self._given} | self._batches.identity()

    def set_state(self, state: dict[str, int]) -> None:
        """Moves to the position of a stream over the same batches.

        Raises:
          ValueError: if that one had other examples, another seed, or batches of another size.
        """
        for key, ours in self._batches.identity().items():
            if state[key] != ours:
                raise ValueError(f"the saved stream of examples has {key} {state[key]}, this one {ours}")
        self.close()
        self._given = state["batches"]

    def close(self) -> None:
        """Ends its threads and processes."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """Examples of a split of TensorFlow Datasets.

    Attributes:
      title: the set and the split, for messages.
      records: TFDS's data source.
      image_key, label_key: of its features.
      chosen: the records' numbers.
      labels: from the set's labels to ours, None if they are the same.
    """

    title: str
    records: Any
    image_key: str
    label_key: str
    chosen: Sequence[int] | np.ndarray
    labels: dict[int, int] | None

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            return dataclasses.replace(self, chosen=self.chosen[number])
        record = self.records[int(self.chosen[number])]
        label = int(record[self.label_key])
        return record[self.image_key], label if self.labels is None else self.labels[label]

    def name_of(self, number: int) -> str:
        """The file's name, if the set has it."""
        record = self.records[int(self.chosen[number])]
        return record["file_name"].decode() if "file_name" in record else f"{self.title} {self.chosen[number]}"

    def of_its_classes(self) -> "TfdsSource":
        """The examples whose label is one of ``labels``."""
        chosen = []
        with progress_bar(len(self), f"labels of {self.title}", unit="image", delay=1, leave=False) as bar:
            for start in range(0, len(self), 100):  # files of 100 images take little memory
                some = self.chosen[start : start + 100]
                records = zip(some, self.records.__getitems__(list(some)), strict=True)
                chosen += [number for number, record in records if int(record[self.label_key]) in self.labels]
                bar.update(len(some))
        return dataclasses.replace(self, chosen=np.asarray(chosen, np.int64))


def numbers_of(classes: Sequence[str | int], names: Sequence[str], set_name: str) -> dict[int, int]:
    """From the set's labels to 0, 1, ..., for the classes that are given by name or number."""
    numbers = []
    for given in classes:
        if given in names:
            numbers.append(names.index(given))
        elif isinstance(given, int) and 0 <= given < len(names):
            numbers.append(given)
        else:
            near = difflib.get_close_matches(given, names, n=1) if isinstance(given, str) else []
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"data set {set_name!r} has no class {given!r}{hint} It has {len(names)} classes")
    if len(set(numbers)) < len(numbers) or not numbers:
        raise ValueError(f"config.data.classes needs classes that differ, got {tuple(classes)}")
    return {number: i for i, number in enumerate(numbers)}


def check_filled(train: Source, test: Source, classes: Sequence[str | int] | None, where: str, hint: str = "") -> None:
    """Raises a ValueError if there is no image to train on, or none to test on."""
    for split, what in ((train, "train"), (test, "test")):
        if not len(split):
            of = "" if classes is None else f" of config.data.classes={tuple(classes)}"
            raise ValueError(f"{where} has no image{of} to {what} on{hint}")


# --- Batches ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Batches:
    """The batches by number; those to train on where there is an order."""

    source: Source
    batch_size: int
    image_size: int
    shard: tuple[int, int]
    steps: int  # in an epoch
    seed: int = 0
    order: grain.MapDataset | None = None

    def __len__(self) -> int:
        return self.steps if self.order is None else 1 << 40

    def identity(self) -> dict[str, int]:
        """What two streams must have in common to give the same batches."""
        return {"examples": len(self.source), "global_batch": self.batch_size * self.shard[1], "seed": self.seed}

    def __getitem__(self, step: int) -> Batch:
        size, (index, count), examples = self.image_size, self.shard, len(self.source)
        images = np.zeros((self.batch_size, size, size, 3), np.uint8)
        labels, numbers, replaced = np.zeros(self.batch_size, np.int32), *np.full((2, self.batch_size), -1, np.int32)
        epoch, step = divmod(step, self.steps)
        first = (step * count + index) * self.batch_size
        real = np.arange(first, first + self.batch_size) < examples
        for i in range(real.sum()):
            number = first + i if self.order is None else self.order[epoch * examples + first + i]
            numbers[i], labels[i] = self._read(number, epoch, images[i])
            replaced[i] = -1 if numbers[i] == number else number
        if self.order is None:  # no example counts twice in an evaluation
            real &= replaced < 0
        return Batch(images, labels, numbers, real, replaced)

    def _read(self, number: int, epoch: int, out: np.ndarray) -> tuple[int, int]:
        """The number and label of the example, or of the next that can be read; its picture is put into ``out``."""
        if self.order is None:
            box_of, mirrored = functools.partial(pictures.centre_box, size=self.image_size), False
        else:
            # Philox takes the three as they are. What it gives may not change with NumPy's version, as others' may.
            draws = np.random.Generator(np.random.Philox(key=[self.seed, (epoch << 32) + number])).random(41)
            box_of, mirrored = functools.partial(pictures.random_box, draws=draws[1:].tolist()), draws[0] < 0.5
        for following in range(min(MOST_UNREADABLE + 1, len(self.source))):
            found = (number + following) % len(self.source)
            file, label = self.source[found]
            try:
                pictures.crop(file, box_of, out, mirrored)
            except Exception as error:  # Pillow raises nearly anything when it meets a broken file
                why = error
                continue
            return found, label
        raise StreamError(
            f"{following + 1} images in a row, from {self.source.name_of(number)} on, cannot be read: is the data "
            f"set broken? The last one: {why}"
        ) from why


def _start_worker(index: int, count: int) -> None:
    """Makes a worker process end with its parent, even one that was killed, and keep off the accelerator."""
    for number in (signal.SIGINT, signal.SIGTERM):  # may reach the workers too, as Ctrl-C does; the parent ends them
        signal.signal(number, signal.SIG_IGN)

    def end_with(parent):
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
