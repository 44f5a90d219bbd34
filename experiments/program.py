"""What a run computes: the model, the optimizer with its sparse link, and the compiled functions around them."""

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

import jaxsparse
from experiments import data
from experiments.optimizers import choose, is_gated, load_start, make_optimizer
from jaxsparse import groups, models
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
      init: seed -> TrainState.
      train_chunk: (state, dataset, start, length) -> the state after the steps start, ..., start + length - 1, and
        what :func:`make_program` says. Donates the state.
      evaluate: (state, dataset, split) -> mean loss and accuracy on a split of the dataset.
    """

    model: Any
    init: Callable[[Any], TrainState]
    train_chunk: Callable[..., tuple[TrainState, dict[str, Any]]]
    evaluate: Callable[..., tuple[jax.Array, jax.Array]]


def make_program(config: ConfigDict, dataset: data.Dataset, side_by_side: bool = False) -> Program:
    """The computations of a run, or with ``side_by_side`` those of several seeds in one.

    What ``train_chunk`` measures: "losses" and "accuracies" of the batches, (length,); "density" of all sparse leaves
    together; "layer_density" and "flips" by the path of every sparse leaf, the flips being the entries of its mask that
    the chunk has changed; "finite" by the path of every leaf, whether all of its weights are. Of gates, "density" is
    the share of the params that stay when closed channels are removed, "layer_density" and "flips" are of the channels
    by the name of their group, and "remaining" has the shares of the multiply-adds, and what is expected of both.
    """
    num_examples, batch_size = len(dataset.train.labels), config.data.batch_size
    steps_per_epoch = num_examples // batch_size  # the rest of an epoch is dropped
    model = make_model(config, dataset.num_classes)
    augmented = make_augmentation(config)
    first_image = data.normalise(jnp.asarray(dataset.train.images[:1]), dataset)
    tx = make_optimizer(config, steps_per_epoch, model=model)
    if is_gated(config):
        places = models.positions(model, first_image.shape[1:])

    start = None if config.dense or config.sparsity.method != "mask_updates" else load_start(config)
    fresh = choose(INITS, config.init, "config.init")

    def init(seed, start):
        init_key, order_key, mask_key = jax.random.split(jax.random.key(seed), 3)
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

    def variables(state, params):
        masks = {"masks": jaxsparse.get_masks(state.opt_state, state.params)} if takes_masks else {}
        return {"params": params, **state.model_state, **masks}

    def loss_fn(params, state, step, images, labels, dropout_key):
        # Layers with batch statistics use those of the batch, and update them, where the collection is mutable; there
        # is dropout where there is a key for it.
        how = {}
        if dense_gradient_steps is not None:  # all weights before masks change, for momentum to tell which to grow
            update_every = config.sparsity.update_every_epochs * steps_per_epoch
            how = {"dense_weight_grad": -step % update_every < dense_gradient_steps}
        logits, model_state = model.apply(
            variables(state, params), images, mutable=list(state.model_state), rngs={"dropout": dropout_key}, **how
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()
        return loss, (jnp.mean(logits.argmax(-1) == labels), dict(model_state))

    # All steps of a chunk in one scan, so that none of them waits for Python. That holds for convolutions too, because
    # jaxsparse.models takes the form of them that is fast inside a loop on the device at hand.
    def train_chunk(state, dataset, start, length, epochs):
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(state.order_key, NO_EPOCH))

        def train_step(state, step_and_rows):
            step, rows = step_and_rows
            # An image is augmented by its number and that of the epoch, in whatever batch it comes.
            epoch_key = jax.random.fold_in(augment_key, step // steps_per_epoch)
            images = augmented(dataset.train.images[rows], epoch_key, rows)
            images, labels = data.normalise(images, dataset), dataset.train.labels[rows]
            (loss, (accuracy, model_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                state.params, state, step, images, labels, jax.random.fold_in(dropout_key, step)
            )
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return TrainState(params, opt_state, model_state, state.order_key), (loss, accuracy)

        old = by_path(masks_of(config, state))
        rows = batches(state.order_key, start, length, batch_size, num_examples, epochs)
        state, (losses, accuracies) = jax.lax.scan(train_step, state, (start + jnp.arange(length), rows))
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
        return state, {
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

    def evaluate(state, dataset, split):
        params = state.params if config.dense else jaxsparse.eval_params(state.opt_state, state.params)

        def measure(batch):
            images, labels, real = batch
            logits = model.apply(variables(state, params), data.normalise(images, dataset))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
            return jnp.sum(losses, where=real), jnp.sum(logits.argmax(-1) == labels, where=real)

        losses, hits = jax.lax.map(measure, in_batches(split, EVAL_BATCH))
        return losses.sum() / len(split.labels), hits.sum() / len(split.labels)

    def for_seeds(function):
        if not side_by_side:
            return function
        return lambda each, *common: jax.vmap(lambda one: function(one, *common))(each)

    compiled_chunk = jax.jit(for_seeds(train_chunk), static_argnums=(3, 4), donate_argnums=0)

    def chunk(state, dataset, start, length):
        epochs = (start + length - 1) // steps_per_epoch - start // steps_per_epoch + 1
        return compiled_chunk(state, dataset, start, length, epochs)

    compiled_init = jax.jit(for_seeds(init))
    return Program(model, lambda seed: compiled_init(seed, start), chunk, jax.jit(for_seeds(evaluate)))


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


def make_model(config: ConfigDict, num_classes: int) -> Any:
    """The model ``config.model.name``, with the other keys of ``config.model`` that are not None as its attributes."""
    options = {name: value for name, value in config.model.items() if name != "name" and value is not None}
    if "dtype" in options:
        options["dtype"] = choose(DTYPES, options["dtype"], "config.model.dtype")
    try:
        return choose(MODELS, config.model.name, "config.model.name")(**{"num_classes": num_classes, **options})
    except TypeError as error:
        raise ValueError(f"config.model does not fit {config.model.name!r}: {error}") from None


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
        logits = jaxsparse.get_log_alpha(state.opt_state)
        return {name: jaxsparse.hard_concrete_mean(log_alpha) > 0 for name, log_alpha in logits.items()}
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
