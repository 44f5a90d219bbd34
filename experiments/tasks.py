"""The tasks of the trainer, to tell images apart and to continue a text: all that the two differ in."""

import abc
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments import data, text
from experiments.inputs import batches, in_batches, make_augmentation
from experiments.measures import ACCURACY, LOSS, Measure

EVAL_BATCH = 500  # images; more is no faster, and takes memory in convolutional networks
EVAL_TOKENS = 2**14  # of a text, at once


def make_task(config: ConfigDict, dataset: Any) -> "Task":
    """The task of a run: that of its data set."""
    return (TextTask if isinstance(dataset, text.TextDataset) else ImageTask)(config, dataset)


class Task(abc.ABC):
    """A data set as a program sees it: examples by number, and how inputs are made of them.

    Attributes:
      dataset: on the host.
      shape, dtype: of an input of the model, without the axis of the batch.
      eval_batch: how many inputs are evaluated at once.
      options: arguments of the model while it trains.
      unit: what is counted for the speed, and how many of them an input has.
      measure: the number by which runs are compared.
      other: other data of this kind, in words.
      about: what result.json has about the data; nothing for data that their name says.
    """

    dtype: ClassVar[Any]
    measure: ClassVar[Measure]
    other: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    shape: tuple[int, ...]
    eval_batch: int
    unit: tuple[str, int]
    about: Mapping[str, Any] = {}

    def __init__(self, config: ConfigDict, dataset: Any):
        self.dataset, self._batch_size = dataset, config.data.batch_size

    @property
    def first(self) -> jax.Array:
        """An input as the model takes it, a batch of one."""
        return jnp.zeros((1, *self.shape), self.dtype)

    @abc.abstractmethod
    def numbers(self, key: jax.Array, start: jax.Array, length: int, epochs: int) -> jax.Array:
        """The numbers of the examples of steps start, ..., start + length - 1: int32, (length, batch size).

        Those of a step depend on ``key`` and the number of the step alone. The steps touch ``epochs`` epochs.
        """

    @abc.abstractmethod
    def look_up(self, numbers: jax.Array, split: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The examples of these numbers as they are stored, what is to be predicted of them, and the numbers."""

    def augmented(self, examples: jax.Array, key: jax.Array, numbers: jax.Array) -> jax.Array:
        """The examples as they are changed at random while training, by the key of the epoch and their numbers."""
        return examples

    @abc.abstractmethod
    def inputs(self, examples: jax.Array) -> jax.Array:
        """The inputs of the model, of examples as they are stored."""

    @abc.abstractmethod
    def in_batches(self, split: Any, size: int) -> Any:
        """All that is evaluated in batches, the last filled up: arrays whose first axis are the batches."""

    def evaluated(self, batch: Any, split: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The examples of one of these batches, what is to be predicted, and which of that is real."""
        return batch

    @abc.abstractmethod
    def results(self, loss: jax.Array, hits: jax.Array, split: Any) -> dict[str, jax.Array]:
        """Loss, accuracy and what follows from them, of the sums of losses and of hits on a split."""

    def refuse_another(self, about: Mapping[str, Any] | None) -> None:
        """Raises a ValueError if a run was begun with other data, which ``about`` describes."""
        if about and about["sha256"] != self.about["sha256"]:
            raise ValueError(
                f"the run was begun with {self.other}: {self.described(about)}; now it is {self.described(self.about)}"
            )

    @abc.abstractmethod
    def described(self, about: Mapping[str, Any]) -> str:
        """The data that ``about`` is of, in words."""

    @abc.abstractmethod
    def said(self, result: Mapping[str, Any]) -> str:
        """The result in words."""


class ImageTask(Task):
    """Telling images apart; those of an epoch come in a random order, and each is changed at random."""

    dtype, measure, other = jnp.float32, ACCURACY, "other images"

    def __init__(self, config: ConfigDict, dataset: data.Dataset):
        super().__init__(config, dataset)
        self.shape = data.image_shape(dataset, config.data.image_size)
        self.eval_batch, self.unit = EVAL_BATCH, ("images", 1)
        self.about = dataset.about
        self._augmented: Callable[..., jax.Array] = make_augmentation(config)

    def numbers(self, key, start, length, epochs):
        """See :class:`Task`."""
        return batches(key, start, length, self._batch_size, data.count(self.dataset.train), epochs)

    def look_up(self, numbers, split):
        """See :class:`Task`."""
        return split.images[numbers], split.labels[numbers], numbers

    def augmented(self, examples, key, numbers):
        """See :class:`Task`."""
        return self._augmented(examples, key, numbers)

    def inputs(self, examples):
        """See :class:`Task`."""
        return data.normalise(examples, self.dataset)

    def in_batches(self, split, size):
        """See :class:`Task`."""
        return in_batches(split, size)

    def results(self, loss, hits, split):
        """See :class:`Task`."""
        return {"loss": loss / len(split.labels), "accuracy": hits / len(split.labels)}

    def described(self, about):
        """See :class:`Task`."""
        return f"{about['source']}, {about['train_images']:,} images to train on, SHA-256 {about['sha256'][:12]}..."

    def said(self, result):
        """See :class:`Task`."""
        return f"test accuracy {result['test_accuracy']:.2%}"


class TextTask(Task):
    """Predicting each next token, in windows at random places of the text; a window's number is where it begins.

    Losses are in nats a token.
    """

    dtype, measure, options, other = jnp.int32, LOSS, {"train": True}, "another text"

    def __init__(self, config: ConfigDict, dataset: text.TextDataset):
        super().__init__(config, dataset)
        self._length = dataset.train.length
        self.shape, self.unit = (self._length,), ("tokens", self._length)
        self.eval_batch = max(1, EVAL_TOKENS // self._length)
        self.about = dataset.about
        self._bytes = dataset.num_classes == text.BYTES and config.data.vocab_size is None

    def numbers(self, key, start, length, epochs):
        """See :class:`Task`."""
        places = len(self.dataset.train.tokens) - self._length  # the last target is a token too

        def of_step(step):
            return jax.random.randint(jax.random.fold_in(key, step), (self._batch_size,), 0, places)

        return jax.vmap(of_step)(start + jnp.arange(length))

    def look_up(self, numbers, split):
        """See :class:`Task`."""
        windows = text.at(split.tokens, numbers, self._length + 1)
        return windows[:, :-1], windows[:, 1:], numbers

    def inputs(self, examples):
        """See :class:`Task`."""
        return examples

    def in_batches(self, split, size):
        """See :class:`Task`."""
        missing = -len(split) % size
        return jnp.pad(split.starts, (0, missing), constant_values=len(split.tokens)).reshape(-1, size)

    def evaluated(self, batch, split):
        """See :class:`Task`."""
        examples, targets, _ = self.look_up(batch, split)
        return examples, targets, batch[:, None] + 1 + jnp.arange(self._length)[None] < len(split.tokens)

    def results(self, loss, hits, split):
        """See :class:`Task`."""
        targets = int((len(split.tokens) - 1 - split.starts).clip(max=self._length).sum())
        loss = loss / targets
        found = {"loss": loss, "accuracy": hits / targets, "perplexity": jnp.exp(loss)}
        return found | ({"bits_per_byte": loss / math.log(2)} if self._bytes else {})

    def described(self, about):
        """See :class:`Task`."""
        return f"{about['source']}, {about['bytes']:,} bytes in {about['files']} files"

    def said(self, result):
        """See :class:`Task`."""
        bits = f", {result['test_bits_per_byte']:.4f} bits a byte" if self._bytes else ""
        return f"test loss {result['test_loss']:.4f} nats a token{bits}"
