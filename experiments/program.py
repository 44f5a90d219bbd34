"""The computations of a run: the model, the optimizer with its method, and the compiled functions around them."""

import abc
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from ml_collections import ConfigDict

import jaxsparse
from experiments import data, tasks
from experiments.build import make_optimizer, named, update_every
from experiments.distillation import load_teacher
from experiments.networks import INITS, load_start, make_model, positions, started
from experiments.options import choose
from jaxsparse import inspect
from jaxsparse.models.channels import narrowed
from jaxsparse.parallel import DeviceLayout, device_layout
from jaxsparse.trees import by_path

NO_EPOCH = 2**31  # what is drawn besides the orders of the epochs is drawn with a key that belongs to none of them


class TrainState(NamedTuple):
    """All that changes while training, and what a checkpoint holds.

    Attributes:
      params: the model's.
      opt_state: the optimizer's, with the masks.
      model_state: the model's other collections, such as batch statistics.
      order_key: (), typed PRNG key: of the order of the examples, of augmentation and dropout.
    """

    params: Any
    opt_state: Any
    model_state: Any
    order_key: jax.Array


def make_program(
    config: ConfigDict,
    dataset: Any,
    side_by_side: bool = False,
    devices: Sequence[jax.Device] | None = None,
    pruned: Sequence[Mapping[str, str]] = (),
) -> "Program":
    """The computations of a run, or with ``side_by_side`` those of several seeds in one; on all or on these devices.

    The dataset is of images (:class:`experiments.data.Dataset`) or text (:class:`experiments.text.TextDataset`).
    With ``pruned`` they are of the network without the channels that went while it trained: for each time which ones
    stayed, see :func:`experiments.prune_while_training.open_gates`.
    """
    kind = StreamedProgram if config.data.streamed else ResidentProgram
    return kind(config, dataset, side_by_side, devices, pruned)


class Program(abc.ABC):
    """The compiled parts of a run. Side by side, every state, seed and result has a leading axis for the seeds.

    Attributes:
      model: the model.
      layout: how devices share the steps; ``train_chunk`` and ``evaluate`` take states that it has placed.
      task: what it learns, of which data.
      optimizer: with its method.
      pruned: for each time that channels left the network, which ones stayed.
      left: how much of the network is left since then: the shares of "params" and "multiply_adds".
    """

    def __init__(
        self,
        config: ConfigDict,
        dataset: Any,
        side_by_side: bool,
        devices: Sequence[jax.Device] | None,
        pruned: Sequence[Mapping[str, str]],
    ):
        self.layout = make_layout(config, devices)
        if side_by_side and self.layout.name != "one_device":
            raise ValueError(f"--vmap_seeds is for config.parallel.layout='one_device', got {self.layout.name!r}")
        if side_by_side and config.data.streamed:
            raise ValueError("--vmap_seeds is for images that fit into the memory, not for config.data.streamed")
        num_examples, batch_size = data.count(dataset.train), config.data.batch_size
        if batch_size % (self.layout.size * config.parallel.accumulate):
            raise ValueError(
                f"config.data.batch_size={batch_size} cannot be split among {self.layout.size} devices, "
                f"{config.parallel.accumulate} parts each (config.parallel)"
            )
        self.model = make_model(config, dataset.num_classes, self.layout)
        self.task = tasks.make_task(config, dataset)
        self.pruned, whole = tuple(pruned), self.model
        for stays in pruned:
            self.model = narrowed(self.model, {name: np.array(list(bits)) == "1" for name, bits in stays.items()})
        self._config, self._side_by_side = config, side_by_side
        self._steps_per_epoch = num_examples // batch_size  # the rest of an epoch is dropped
        self._fresh = choose(INITS, config.init, "config.init")
        self._start = load_start(config)
        self.optimizer = make_optimizer(config, self._steps_per_epoch, self.model)
        self._tx = self.optimizer.make(masks=self._start and self._start[1])
        self._scored = None  # the examples that masks are made by
        if self.optimizer.pruner is not None:
            with named("config.method"):
                self.optimizer.pruner.check(self.task, config.data.streamed)
            self._scored = None if config.data.streamed else dataset.train
        self._positions = self.positions() if self.optimizer.groups else None
        self._teacher = load_teacher(config, whole, self.task)
        self.left = self._left_of(whole) if pruned else {"params": 1.0, "multiply_adds": 1.0}
        # Layers that skip dead blocks take the masks; to others pruned weights are zeros among the rest.
        self._takes_masks = not config.dense and bool(config.model.get("blocks"))
        self._dense_gradient_steps = None if config.dense else config.get("dense_gradient_steps")
        if self._dense_gradient_steps is not None and not (self._takes_masks and self._dense_gradient_steps >= 0):
            raise ValueError(
                "config.dense_gradient_steps is at least 0, and for models with config.model.blocks, got "
                f"{self._dense_gradient_steps} for {config.model.name!r} with blocks {config.model.get('blocks')}"
            )
        self._compiled_init = jax.jit(self._for_seeds(self._init))

    def positions(self, model: Any = None) -> dict[str, int | float]:
        """The number of positions of an input at which each kernel of the model is applied, by path."""
        return positions(self.model if model is None else model, self.task.shape, self.task.dtype)

    def init(self, seed: Any) -> TrainState:
        """The state that a seed starts with, on one device."""
        state, not_finite = self._compiled_init(seed, self._start, self._scored)
        if not isinstance(not_finite, jax.core.Tracer) and np.any(np.asarray(not_finite)):
            raise ValueError(
                f"config.method: {np.max(not_finite)} of the scores {self._config.method.score!r} are not finite: the "
                "weights that the run starts with are too large, or there are too many layers for float32"
            )
        return state

    @abc.abstractmethod
    def train_chunk(self, state: TrainState, source: Any, start: int, length: int) -> tuple[TrainState, dict[str, Any]]:
        """The state after the steps start, ..., start + length - 1, and measurements. Donates the state.

        Measured are "losses" and "accuracies" of the batches, (length,), and with a teacher the "divergences" from it;
        what :class:`jaxsparse.inspect.Measured` has, with the flips of the chunk; "finite" by the path of every leaf,
        whether all of its weights are. Of streamed images also "input_wait", the seconds that were spent waiting for
        them, and "replaced", the numbers of those that could not be read.
        """

    @abc.abstractmethod
    def evaluate(self, state: TrainState, source: Any) -> dict[str, Any]:
        """Mean "loss" and "accuracy" on a split; of text also what follows from the loss.

        Of streamed images also "unreadable": how many of them cannot be read, which are left out.
        """

    # --- What is compiled ---------------------------------------------------------------------------------------------

    def _for_seeds(self, function: Callable) -> Callable:
        if not self._side_by_side:
            return function
        return lambda each, *common: jax.vmap(lambda one: function(one, *common))(each)

    def _init(self, seed, start, scored):
        config = self._config
        init_key, order_key, mask_key = jax.random.split(jax.random.key(seed), 3)
        variables = dict(self.model.init(init_key, self.task.first))
        params = self._fresh(variables.pop("params"), init_key)
        if start is not None:
            params = started(params, start, config)
        masks, not_finite = start and start[1], jnp.int32(0)
        if self.optimizer.pruner is not None:
            with named("config.method", (ValueError,)):
                masks, not_finite = self.optimizer.pruner.masks(
                    mask_key, params, self.model, variables, self.task, scored
                )
        tx = self.optimizer.make(mask_key, masks)
        opt_state = tx.init(params)
        if config.sparse_init and not config.dense:
            params = jaxsparse.sparse_init(params, jaxsparse.get_masks(opt_state, params))
            opt_state = tx.init(params)  # optimizers may keep copies of the params
        if not config.dense:
            params = jaxsparse.sparsify(opt_state, params)
        return TrainState(params, opt_state, variables, order_key), not_finite

    def _constants(self, state):
        """The collections of the model's variables that are not trained."""
        return {"masks": jaxsparse.get_masks(state.opt_state, state.params)} if self._takes_masks else {}

    def _loss(self, params, model_state, batch, common):
        # Layers with batch statistics use those of the batch, and update them, where the collection is mutable; there
        # is dropout where there is a key for it.
        examples, targets, numbers = batch
        step, collections, augment_key, dropout_key, teacher = common
        # An example is changed by its number and that of the epoch, in whatever batch and on whatever device it comes.
        key = jax.random.fold_in(augment_key, step // self._steps_per_epoch)
        inputs = self.task.inputs(self.task.augmented(examples, key, numbers))
        options = dict(self.task.options)
        if self._dense_gradient_steps is not None:  # all weights before masks change: momentum tells which to grow
            every = update_every(self._config, self._steps_per_epoch)
            options["dense_weight_grad"] = -step % every < self._dense_gradient_steps
        dropout_key = jax.random.fold_in(jax.random.fold_in(dropout_key, step), numbers[0])  # each device its own
        logits, model_state = self.model.apply(
            {"params": params, **model_state, **collections},
            inputs,
            mutable=list(model_state),
            rngs={"dropout": dropout_key},
            **options,
        )
        loss = jnp.mean(cross_entropy(logits, targets, self._config.label_smoothing))
        measured = {"losses": loss, "accuracies": jnp.mean(logits.argmax(-1) == targets)}
        if self._teacher is not None:
            loss, divergence = self._teacher.mixed(loss, logits, self._teacher.logits(teacher, inputs))
            measured["divergences"] = divergence
        return loss, (measured, dict(model_state))

    def _step(self, look_up: Callable) -> Callable:
        """A step; ``look_up`` finds examples, targets and numbers of a batch in the split."""

        def loss_of_batch(params, model_state, batch, common):
            shared, split = common
            return self._loss(params, model_state, look_up(batch, split), shared)

        gradients = self.layout.gradients(loss_of_batch, self._config.parallel.accumulate)

        def train_step(state, batch, step, split=None, teacher=None):
            augment_key, dropout_key = jax.random.split(jax.random.fold_in(state.order_key, NO_EPOCH))
            shared = (step, self._constants(state), augment_key, dropout_key, teacher)
            grads, model_state, measured = gradients(state.params, state.model_state, batch, (shared, split))
            updates, opt_state = self._tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return TrainState(params, opt_state, model_state, state.order_key), measured

        return train_step

    def _measured(self, before, state, of_steps):
        found = inspect.measure(
            state.opt_state, state.params, self._positions, groups=self.optimizer.groups, before=before
        )
        if self.pruned:  # of the network as it was
            remaining = {
                name: share * self.left["params" if name.endswith("params") else "multiply_adds"]
                for name, share in found.remaining.items()
            }
            found = found._replace(density=found.density * self.left["params"], remaining=remaining)
        finite = {path: jnp.all(jnp.isfinite(leaf)) for path, leaf in by_path(state.params).items()}
        return {**of_steps, **found._asdict(), "finite": finite}

    def _left_of(self, whole):
        sizes = []
        for model in (self.model, whole):
            shapes = jax.eval_shape(model.init, jax.random.key(0), self.task.first)["params"]
            leaves = {path: leaf.size for path, leaf in by_path(shapes).items()}
            adds = sum(n * leaves[path] for path, n in self.positions(model).items())
            sizes.append((sum(leaves.values()), adds))
        (params, adds), (all_params, all_adds) = sizes
        return {"params": params / all_params, "multiply_adds": adds / all_adds}

    def _sums(self, state):
        """A function of (examples, targets, which are real): the sums of losses and of hits, and how many are real."""
        params = state.params if self._config.dense else jaxsparse.eval_params(state.opt_state, state.params)
        variables = {"params": params, **self.layout.synchronised(state.model_state), **self._constants(state)}

        def measure(batch, variables):
            examples, targets, real = batch
            logits = self.model.apply(variables, self.task.inputs(examples))
            losses = cross_entropy(logits, targets)
            return jnp.sum(losses, where=real), jnp.sum(logits.argmax(-1) == targets, where=real), jnp.sum(real)

        return lambda batch: self.layout.sums(measure)(batch, variables)


class ResidentProgram(Program):
    """Trains on a data set held in device memory: all steps of a chunk in one scan, without returning to Python.

    That is fast for convolutions too, because jaxsparse.models takes the form of them that is fast inside a loop on the
    device at hand.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self._compiled_chunk = self.layout.compile(self._for_seeds(self._chunk), static_argnums=(3, 4))
        self._compiled_evaluation = self.layout.compile(self._for_seeds(self._evaluation), donate=False)

    def train_chunk(self, state, source, start, length):
        """See :class:`Program`; the source is the dataset, on the devices."""
        first, last = start // self._steps_per_epoch, (start + length - 1) // self._steps_per_epoch
        return self._compiled_chunk(state, (source.train, self._on_devices), start, length, last - first + 1)

    def evaluate(self, state, source):
        """See :class:`Program`; the source is a split, on the devices."""
        return self._compiled_evaluation(state, source)[1]

    @functools.cached_property
    def _on_devices(self):
        """The teacher's variables."""
        return None if self._teacher is None else self.layout.replicate(self._teacher.variables)

    def _chunk(self, state, source, start, length, epochs):
        split, teacher = source
        train_step = self._step(self.task.look_up)

        def scanned(state, step_and_numbers):
            step, numbers = step_and_numbers
            return train_step(state, self.layout.share(numbers), step, split, teacher)

        before = inspect.current_masks(state.opt_state, state.params)
        numbers = self.task.numbers(state.order_key, start, length, epochs)
        state, of_steps = jax.lax.scan(scanned, state, (start + jnp.arange(length), numbers))
        return state, self._measured(before, state, of_steps)

    def _evaluation(self, state, split):
        sums, size = self._sums(state), self.layout.size
        in_parts = self.task.in_batches(split, size * max(1, self.task.eval_batch // size))
        losses, hits, _ = jax.lax.map(
            lambda batch: sums(self.layout.share(self.task.evaluated(batch, split))), in_parts
        )
        return None, self.task.results(losses.sum(), hits.sum(), split)


class _Masks(NamedTuple):
    """Masks in the fields of a train state, so that they can be passed where one is expected."""

    masks: Any
    model_state: Any = ()


class StreamedProgram(Program):
    """Trains on images that are read while it runs, with one compiled call per step.

    Attributes:
      train_step: (state, (images, labels, numbers), step) -> the state after the step, and what is measured of it.
        Donates the state.
    """

    def __init__(self, *args):
        super().__init__(*args)
        if self._teacher is not None:
            raise ValueError("config.distill_from is for data that fit into the memory, not for config.data.streamed")
        compile_ = self.layout.compile
        self.train_step = compile_(self._step(lambda batch, _: batch))
        # Of a copy: the state itself is given up by the first step.
        self._copied_masks = compile_(
            lambda state: (_Masks(jax.tree.map(jnp.copy, inspect.current_masks(state.opt_state, state.params))), None),
            donate=False,
        )
        self._compiled_measured = compile_(
            lambda state, before, *of_steps: (
                None,
                self._measured(before.masks, state, dict(zip(("losses", "accuracies"), of_steps, strict=True))),
            ),
            donate=False,
        )
        self._compiled_sums = compile_(lambda state, batch: (None, self._sums(state)(batch)), donate=False)
        self._left_out: set[str] = set()  # images that were named

    def train_chunk(self, state, source, start, length):
        """See :class:`Program`; the source is the stream."""
        before, _ = self._copied_masks(state)
        waited, replaced, losses, accuracies = 0.0, [], [], []
        for step in range(start, start + length):
            asked = time.perf_counter()
            batch = next(source)
            waited += time.perf_counter() - asked
            replaced += [int(number) for number in batch.replaced if number >= 0]
            placed = self.layout.place_batch((batch.images, batch.labels, batch.numbers))
            if step > start + 1:  # one step runs and one waits, so that the devices have something to do, and no more
                jax.block_until_ready(losses[-2])
            state, measured = self.train_step(state, placed, step)
            losses.append(measured["losses"])
            accuracies.append(measured["accuracies"])
        losses, accuracies = jax.device_get((losses, accuracies))
        _, results = self._compiled_measured(state, before, np.stack(losses), np.stack(accuracies))
        return state, results | {"input_wait": waited, "replaced": np.asarray(replaced, np.int64)}

    def evaluate(self, state, source):
        """See :class:`Program`; the source is what the stream's images are read from, of a split."""
        from experiments import streams  # takes a while, and small sets do without

        loss, hits, count, layout, config = 0.0, 0, 0, self.layout, self._config.data
        for batch in streams.eval_batches(
            source,
            batch_size=layout.local_size * max(1, max(self.task.eval_batch, config.batch_size) // layout.size),
            image_size=config.image_size,
            shard=(jax.process_index(), jax.process_count()),
            workers=config.workers,
        ):
            placed = layout.place_batch((batch.images, batch.labels, batch.real))
            sums = jax.device_get(self._compiled_sums(state, placed)[1])
            loss, hits, count = loss + float(sums[0]), hits + int(sums[1]), count + int(sums[2])
            for name in map(source.name_of, batch.replaced[batch.replaced >= 0]):
                if name not in self._left_out:
                    self._left_out.add(name)
                    logging.warning("%s cannot be read: it is left out of the evaluation", name)
        return {
            "loss": np.float64(loss / count),
            "accuracy": np.float64(hits / count),
            "unreadable": np.int64(len(source) - count),
        }


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """The loss of each example, float32; ``smoothing`` of the labels' weight is spread over all classes."""
    logits = logits.astype(jnp.float32)
    if smoothing == 0:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def make_layout(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> DeviceLayout:
    """How devices share the steps, as ``config.parallel`` has it."""
    if config.parallel.accumulate < 1:
        raise ValueError(f"config.parallel.accumulate is at least 1, got {config.parallel.accumulate}")
    if not 0 <= config.label_smoothing < 1:
        raise ValueError(f"config.label_smoothing is in [0, 1), got {config.label_smoothing}")
    try:
        return device_layout(config.parallel.layout, devices)
    except ValueError as error:
        raise ValueError(f"config.parallel.layout: {error}") from None


def chunk_grid(total_steps: int, log_every: int, *also: int) -> list[int]:
    """The steps between which one compiled call runs: all multiples of ``also``, and every ``log_every`` in between.

    A fixed grid of the absolute step, so that a run executes the same programs wherever it was started from.
    """
    grid = [0]
    while grid[-1] < total_steps:
        multiples = [(grid[-1] // every + 1) * every for every in also]
        grid.append(min(grid[-1] + log_every, total_steps, *multiples))
    return grid
