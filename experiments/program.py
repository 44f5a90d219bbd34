"""What a run computes: the model, the optimizer with its sparse link, and the compiled functions around them."""

import math
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import jaxsparse
from experiments import data
from experiments.optimizers import choose, is_gated, load_start, make_optimizer
from jaxsparse import groups, models
from jaxsparse.parallel import Layout
from jaxsparse.structures import by_path, path_name

MODELS = {
    "alexnet": models.AlexNet,
    "conv_2": models.Conv2,
    "conv_4": models.Conv4,
    "conv_6": models.Conv6,
    "densenet_40": models.DenseNet40,
    "lenet_300_100": models.LeNet300100,
    "lenet5_caffe": models.LeNet5Caffe,
    "mlp": models.MLP,
    "resnet_18": models.ResNet18,
    "resnet_20": models.ResNet20,
    "resnet_34": models.ResNet34,
    "resnet_50": models.ResNet50,
    "resnet_56": models.ResNet56,
    "vgg": models.VGG,
    "wide_resnet": models.WideResNet,
}
PADDINGS = {"zeros": "constant", "reflect": "reflect"}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
NO_EPOCH = 2**31  # what is drawn besides the orders of the epochs is drawn with a key that belongs to none of them
EVAL_BATCH = 500  # examples; more is no faster, and takes memory in convolutional networks


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


class Program(NamedTuple):
    """The compiled parts of a run. Side by side, every state, seed and result has a leading axis for the seeds.

    Attributes:
      model: the model.
      layout: how devices share the steps; ``train_chunk`` and ``evaluate`` take states that it has placed.
      image_shape: (height, width, channels) of the images that the model sees.
      init: seed -> TrainState, on one device.
      train_step: of streamed images, (state, (images, labels, numbers), step) -> the state after the step, and loss and
        accuracy; else None. Donates the state.
      train_chunk: (state, source, start, length) -> the state after the steps start, ..., start + length - 1, and
        what :func:`make_program` says. The source is the dataset, on the devices, or for streamed images the stream.
        Donates the state.
      evaluate: (state, split) -> mean loss and accuracy on a split, on the devices, or for streamed images its source.
    """

    model: Any
    layout: Layout
    image_shape: tuple[int, ...]
    init: Callable[[Any], TrainState]
    train_step: Callable[..., tuple[TrainState, tuple[jax.Array, jax.Array]]] | None
    train_chunk: Callable[..., tuple[TrainState, dict[str, Any]]]
    evaluate: Callable[..., tuple[jax.Array, jax.Array]]


def make_program(
    config: ConfigDict,
    dataset: data.Dataset,
    side_by_side: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> Program:
    """The computations of a run, or with ``side_by_side`` those of several seeds in one; on all devices, or on these.

    What ``train_chunk`` measures: "losses" and "accuracies" of the batches, (length,); "density" of all sparse leaves
    together; "layer_density" and "flips" by the path of every sparse leaf, the flips being the entries of its mask that
    the chunk has changed; "finite" by the path of every leaf, whether all of its weights are. Of gates, "density" is
    the share of the params that stay when closed channels are removed, "layer_density" and "flips" are of the channels
    by the name of their group, and "remaining" has the shares of the multiply-adds, and what is expected of both. Of
    streamed images also "input_wait", the seconds that were spent waiting for them, and "replaced", the numbers of
    those that could not be read.
    """
    layout = make_layout(config, devices)
    if side_by_side and layout.name != "one_device":
        raise ValueError(f"--vmap_seeds is for config.parallel.layout='one_device', got {layout.name!r}")
    num_examples, batch_size = data.count(dataset.train), config.data.batch_size
    if batch_size % (layout.size * config.parallel.accumulate):
        raise ValueError(
            f"config.data.batch_size={batch_size} cannot be split among {layout.size} devices, "
            f"{config.parallel.accumulate} parts each (config.parallel)"
        )
    steps_per_epoch = num_examples // batch_size  # the rest of an epoch is dropped
    model = make_model(config, dataset.num_classes, layout)
    augmented = make_augmentation(config)
    image_shape = data.image_shape(dataset, config.data.image_size)
    tx = make_optimizer(config, steps_per_epoch, model=model)
    if is_gated(config):
        places = models.positions(model, image_shape)

    start = None if config.dense or config.sparsity.method != "mask_updates" else load_start(config)
    fresh = choose(INITS, config.init, "config.init")

    def init(seed, start):
        init_key, order_key, mask_key = jax.random.split(jax.random.key(seed), 3)
        first_image = jnp.zeros((1, *image_shape), jnp.float32)
        variables = dict(model.init(init_key, first_image))
        params = fresh(variables.pop("params"), init_key)
        if start is not None:
            check_fits(start[0], params, config.sparsity.masks_from)
            params = choose(STARTS, config.sparsity.start, "config.sparsity.start")(params, *start)
        opt_state = make_optimizer(config, steps_per_epoch, mask_key, model).init(params)
        if not config.dense:
            params = jaxsparse.sparsify(params, opt_state)
        return TrainState(params, opt_state, variables, order_key)

    # Layers that skip dead blocks take the masks; to others pruned weights are zeros among the rest.
    takes_masks = not config.dense and bool(config.model.get("blocks"))
    dense_gradient_steps = None if config.dense else config.sparsity.get("dense_gradient_steps")
    if dense_gradient_steps is not None and not (takes_masks and dense_gradient_steps >= 0):
        raise ValueError(
            "config.sparsity.dense_gradient_steps is at least 0, and for models with config.model.blocks, "
            f"got {dense_gradient_steps} for {config.model.name!r} with blocks {config.model.get('blocks')}"
        )

    def constants(state):
        return {"masks": jaxsparse.get_masks(state.opt_state, state.params)} if takes_masks else {}

    def loss_fn(params, model_state, batch, common):
        # Layers with batch statistics use those of the batch, and update them, where the collection is mutable; there
        # is dropout where there is a key for it.
        images, labels, numbers = batch
        step, collections, augment_key, dropout_key = common
        # An image is augmented by its number and that of the epoch, in whatever batch and on whatever device it comes.
        images = augmented(images, jax.random.fold_in(augment_key, step // steps_per_epoch), numbers)
        how = {}
        if dense_gradient_steps is not None:  # all weights before masks change, for momentum to tell which to grow
            update_every = config.sparsity.update_every_epochs * steps_per_epoch
            how = {"dense_weight_grad": -step % update_every < dense_gradient_steps}
        dropout_key = jax.random.fold_in(jax.random.fold_in(dropout_key, step), numbers[0])  # each device its own
        logits, model_state = model.apply(
            {"params": params, **model_state, **collections},
            data.normalise(images, dataset),
            mutable=list(model_state),
            rngs={"dropout": dropout_key},
            **how,
        )
        loss = jnp.mean(cross_entropy(logits, labels, config.label_smoothing))
        return loss, ((loss, jnp.mean(logits.argmax(-1) == labels)), dict(model_state))

    def make_step(look_up):
        """A step; ``look_up`` finds images, labels and numbers of a batch among the examples."""

        def loss_of_batch(params, model_state, batch, common):
            shared, examples = common
            return loss_fn(params, model_state, look_up(batch, examples), shared)

        gradients = layout.gradients(loss_of_batch, config.parallel.accumulate)

        def train_step(state, batch, step, examples=None):
            augment_key, dropout_key = jax.random.split(jax.random.fold_in(state.order_key, NO_EPOCH))
            shared = (step, constants(state), augment_key, dropout_key)
            grads, model_state, measured = gradients(state.params, state.model_state, batch, (shared, examples))
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return TrainState(params, opt_state, model_state, state.order_key), measured

        return train_step

    def measured(old, state, losses, accuracies):
        old = by_path(old)
        new = {path: mask for path, mask in by_path(masks_of(config, state)).items() if mask.ndim}
        density, remaining = jaxsparse.density(new), {}
        if is_gated(config):
            logits = jaxsparse.get_log_alpha(state.opt_state)
            density, adds = shares(state, new)
            expected_params, expected_adds = shares(
                state, {name: jaxsparse.prob_open(la) for name, la in logits.items()}
            )
            remaining = {
                "multiply_adds": adds,
                "expected_params": expected_params,
                "expected_multiply_adds": expected_adds,
            }
        return {
            "losses": losses,
            "accuracies": accuracies,
            "density": density,
            "remaining": remaining,
            "layer_density": {path: jnp.mean(mask) for path, mask in new.items()},
            "flips": {path: jnp.sum(mask != old[path]) for path, mask in new.items()},
            "finite": {path: jnp.all(jnp.isfinite(leaf)) for path, leaf in by_path(state.params).items()},
        }

    def shares(state, open_channels):
        """Of the params and of the multiply-adds, how much stays."""
        shapes = {path: leaf.shape for path, leaf in by_path(state.params).items()}
        kept = groups.expected_counts(models.channel_groups(model), shapes, open_channels)
        sizes = {path: math.prod(shape) for path, shape in shapes.items()}
        adds = sum(places[path] * kept[path] for path in places) / sum(places[path] * sizes[path] for path in places)
        return sum(kept.values()) / sum(sizes.values()), adds

    # All steps of a chunk in one scan, so that none of them waits for Python. That holds for convolutions too, because
    # jaxsparse.models takes the form of them that is fast inside a loop on the device at hand.
    def resident_chunk(state, examples, start, length, epochs):
        train_step = make_step(lambda rows, examples: (examples.images[rows], examples.labels[rows], rows))

        def scanned(state, step_and_rows):
            step, rows = step_and_rows
            return train_step(state, layout.share(rows), step, examples)

        old = masks_of(config, state)
        rows = batches(state.order_key, start, length, batch_size, num_examples, epochs)
        state, (losses, accuracies) = jax.lax.scan(scanned, state, (start + jnp.arange(length), rows))
        return state, measured(old, state, losses, accuracies)

    def sums_of(state):
        """Sums of losses and of hits over a batch of (images, labels, which are real)."""
        params = state.params if config.dense else jaxsparse.eval_params(state.opt_state, state.params)
        variables = {"params": params, **layout.synchronised(state.model_state), **constants(state)}

        def measure(batch, variables):
            images, labels, real = batch
            logits = model.apply(variables, data.normalise(images, dataset))
            losses = cross_entropy(logits, labels)
            return jnp.sum(losses, where=real), jnp.sum(logits.argmax(-1) == labels, where=real)

        return lambda batch: layout.sums(measure)(batch, variables)

    def evaluate_resident(state, split):
        sums = sums_of(state)
        at_once = layout.size * max(1, EVAL_BATCH // layout.size)
        losses, hits = jax.lax.map(lambda batch: sums(layout.share(batch)), in_batches(split, at_once))
        return None, (losses.sum() / len(split.labels), hits.sum() / len(split.labels))

    def for_seeds(function):
        if not side_by_side:
            return function
        return lambda each, *common: jax.vmap(lambda one: function(one, *common))(each)

    if config.data.streamed:
        compiled_step = layout.compile(make_step(lambda batch, _: batch))
        chunk = streamed_chunk(config, layout, compiled_step, measured)
        evaluate = streamed_evaluation(config, layout, sums_of)
    else:
        compiled_step = None
        compiled_chunk = layout.compile(for_seeds(resident_chunk), static_argnums=(3, 4))
        compiled_evaluation = layout.compile(for_seeds(evaluate_resident), donate=False)

        def chunk(state, dataset, start, length):
            epochs = (start + length - 1) // steps_per_epoch - start // steps_per_epoch + 1
            return compiled_chunk(state, dataset.train, start, length, epochs)

        def evaluate(state, split):
            return compiled_evaluation(state, split)[1]

    compiled_init = jax.jit(for_seeds(init))
    return Program(model, layout, image_shape, lambda seed: compiled_init(seed, start), compiled_step, chunk, evaluate)


class _Masks(NamedTuple):
    """Masks in the form of a state."""

    masks: Any
    model_state: Any = ()


def streamed_chunk(config: ConfigDict, layout: Layout, compiled_step: Callable, measured: Callable) -> Callable:
    """The ``train_chunk`` of images that come while training: a program a step, called from Python."""
    # Of a copy: the state itself is given up by the first step.
    copy_masks = layout.compile(
        lambda state: (_Masks(jax.tree.map(jnp.copy, masks_of(config, state))), None), donate=False
    )
    compiled_measure = layout.compile(
        lambda state, old, *of_batches: (None, measured(old.masks, state, *of_batches)), donate=False
    )

    def chunk(state, stream, start, length):
        old, _ = copy_masks(state)
        waited, replaced, losses, accuracies = 0.0, [], [], []
        for step in range(start, start + length):
            before = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - before
            replaced += [int(number) for number in batch.replaced if number >= 0]
            placed = layout.place_batch((batch.images, batch.labels, batch.numbers))
            if step > start + 1:  # one step runs and one waits, so that the devices have something to do, and no more
                jax.block_until_ready(losses[-2])
            state, (loss, accuracy) = compiled_step(state, placed, step)
            losses.append(loss)
            accuracies.append(accuracy)
        losses, accuracies = jax.device_get((losses, accuracies))
        _, results = compiled_measure(state, old, np.stack(losses), np.stack(accuracies))
        return state, results | {"input_wait": waited, "replaced": np.asarray(replaced, np.int64)}

    return chunk


def streamed_evaluation(config: ConfigDict, layout: Layout, sums_of: Callable) -> Callable:
    """The ``evaluate`` of images that are read anew for it."""
    from experiments import streams

    compiled = layout.compile(lambda state, batch: (None, sums_of(state)(batch)), donate=False)

    def evaluate(state, source):
        loss, hits = 0.0, 0
        at_once = layout.local_size * max(1, max(EVAL_BATCH, config.data.batch_size) // layout.size)
        for batch in streams.eval_batches(
            source,
            batch_size=at_once,
            image_size=config.data.image_size,
            shard=(jax.process_index(), jax.process_count()),
            workers=config.data.workers,
        ):
            placed = layout.place_batch((batch.images, batch.labels, batch.real))
            sums = jax.device_get(compiled(state, placed)[1])
            loss, hits = loss + float(sums[0]), hits + int(sums[1])
        return np.float64(loss / len(source)), np.float64(hits / len(source))

    return evaluate


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Of each example, float32; ``smoothing`` of the labels' weight is spread over all classes."""
    logits = logits.astype(jnp.float32)
    if smoothing == 0:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def make_layout(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Layout:
    """How devices share the steps, as ``config.parallel`` has it."""
    if config.parallel.accumulate < 1:
        raise ValueError(f"config.parallel.accumulate is at least 1, got {config.parallel.accumulate}")
    if not 0 <= config.label_smoothing < 1:
        raise ValueError(f"config.label_smoothing is in [0, 1), got {config.label_smoothing}")
    try:
        return Layout(config.parallel.layout, devices)
    except ValueError as error:
        raise ValueError(f"config.parallel.layout: {error}") from None


def open_dataset(config: ConfigDict) -> data.Dataset:
    """The images of ``config.data``: as arrays, or if they are streamed as sources that are read while training."""
    if not config.data.streamed:
        return data.load(
            config.data.name,
            config.data_dir,
            validation=config.data.validation,
            mean=config.data.mean,
            std=config.data.std,
            examples=config.data.examples,
        )
    from experiments import streams  # takes a while, and small sets do without

    for key, given in (("mean", config.data.mean), ("std", config.data.std)):
        if given is None or len(given) not in (1, 3):
            raise ValueError(f"config.data.{key} of streamed images has one number or one for each colour, got {given}")
    images = streams.open_set(
        config.data.name,
        config.data_dir,
        validation=config.data.validation,
        examples=config.data.examples,
        classes=config.data.classes,
    )
    mean, std = (np.broadcast_to(255 * np.asarray(x, np.float32), (3,)) for x in (config.data.mean, config.data.std))
    return data.Dataset(images.train, images.validation, images.test, images.num_classes, mean, std)


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


def check_fits(trained: Any, params: Any, file: str) -> None:
    """Raises a ValueError if a model that was read from a file is not the one of the run."""
    there, here = ({path: leaf.shape for path, leaf in by_path(tree).items()} for tree in (trained, params))
    for path in sorted(there | here):
        if there.get(path) != here.get(path):
            raise ValueError(
                f"config.sparsity.masks_from={file!r} does not fit config.model: {path} is "
                f"{there.get(path, 'not there')} in the file and {here.get(path, 'not there')} in the model"
            )


def make_model(config: ConfigDict, num_classes: int, layout: Layout | None = None) -> Any:
    """The model ``config.model.name``, with the other keys of ``config.model`` that are not None as its attributes."""
    options = {name: value for name, value in config.model.items() if name != "name" and value is not None}
    if config.parallel.sync_batch_norm and layout is not None and layout.axis_name is not None:
        options["axis_name"] = layout.axis_name
    if "dtype" in options:
        options["dtype"] = choose(DTYPES, options["dtype"], "config.model.dtype")
    try:
        model = choose(MODELS, config.model.name, "config.model.name")(**{"num_classes": num_classes, **options})
    except TypeError as error:
        raise ValueError(f"config.model does not fit {config.model.name!r}: {error}") from None
    if model.num_classes < num_classes:
        raise ValueError(f"config.model.num_classes is {model.num_classes}, but the data have {num_classes} classes")
    return model


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


def masks_of(config: ConfigDict, state: TrainState) -> Any:
    """The masks, like the params; the scalar True for dense leaves. Of gates: which channels of each group are open."""
    if is_gated(config):
        return jaxsparse.open_channels(state.opt_state)
    if config.dense:
        return jax.tree.map(lambda _: jnp.ones((), bool), state.params)
    return jaxsparse.get_masks(state.opt_state, state.params)


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
