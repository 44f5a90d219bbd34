"""What the configurations share: all keys, with the recipes of the papers' authors as far as they are the same.

Every key can be changed on the command line: ``--config.weight_decay=1e-4``. ``optimizer`` and ``method`` name
functions of Optax and jaxsparse and give their arguments, see ``experiments/build.py``: a mapping with a ``name`` is a
call, a key that ends in ``_epochs`` is the argument in steps, and ``"config.epochs"`` is what that key has.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

ALL_EPOCHS = "config.epochs"


def training() -> ConfigDict:
    """The keys of every run; those that are None or "" have to be set."""
    config = ConfigDict()
    config.seed = 0
    config.dense = False  # True leaves the method out
    config.smoke = False  # True makes the run small, to see that it works
    config.data_dir = config_dict.placeholder(str)  # of TensorFlow Datasets; None: ~/tensorflow_datasets
    config.epochs = 100
    config.eval_every_epochs = 1
    config.checkpoint_every_epochs = 1
    config.log_every_steps = 500
    # Start here, not necessarily after whole epochs: the learning rate and the order of the images are those from there
    # on, for runs with the masks of masks_from, and for dense ones.
    config.start_epochs = 0.0
    config.keep_epochs = ()  # after each of these, WORKDIR/epoch_N.safetensors gets the weights

    # Take the channels whose gates are closed out of the network for good, every so many epochs; None: never. For "l0".
    config.prune_while_training_epochs = config_dict.placeholder(int)

    config.label_smoothing = 0.0  # share of every target that is spread over all classes
    config.init = "model"  # where the weights start: as the model has it, or "he_normal": by fan-in, with biases of 0
    # Where there are masks from the start: scale the weights that they keep up to the inputs that each output has left,
    # by jaxsparse.sparse_init. For links, and fixed masks with config.start = "original".
    config.sparse_init = False
    # The file of a sparse model, such as WORKDIR/sparse.safetensors of another run: its masks are kept, in place of the
    # method. The weights start on them as "centroids" (ASNI-II: two numbers per layer), "centroids_and_biases" (two for
    # its biases too), "original" (the random ones of this run's seed), or "weights" (the model's own).
    config.masks_from = config_dict.placeholder(str)
    config.start = "centroids"

    # The file of params that the weights start from instead of random ones, such as WORKDIR/epoch_N.safetensors, to
    # train a network on, densely or with a method. Batch statistics start anew.
    config.start_from = config_dict.placeholder(str)

    # Learn from a dense network too: the folder of a run with its checkpoint, or a file of params of the same model,
    # such as WORKDIR/epoch_N.safetensors. The loss is (1 - weight) times that of the data, plus weight times
    # temperature squared times KL(teacher || student) of the outputs softened by the temperature.
    config.distill_from = config_dict.placeholder(str)
    config.distill_temperature = 2.0
    config.distill_weight = 0.5

    config.data = ConfigDict()
    # "digits", a set of TensorFlow Datasets, or your own images: "npz", "folder" or "function" with config.data.files,
    # the path of an .npz or of a folder, or "MODULE:FUNCTION".
    config.data.name = ""
    config.data.files = config_dict.placeholder(str)
    config.data.test = config_dict.placeholder(float)  # share of your own images to test on, without a split; None: 0.1
    config.data.batch_size = 100
    config.data.validation = 0.0  # share of the train examples that is held out, the last of them
    config.data.mean = config_dict.placeholder(tuple)  # None: that of the train images
    config.data.std = config_dict.placeholder(tuple)
    config.data.examples = config_dict.placeholder(int)  # take at most this many, from the start; None: all
    config.data.pad = 0  # augmentation: random crops of images padded by this many pixels,
    config.data.pad_mode = "zeros"  # or "reflect",
    config.data.flip = False  # and mirrored at random
    config.data.streamed = False  # True: too large for the memory, read and decoded by worker processes while training
    # Of streamed images, which are cropped at random, resized and mirrored; of a folder's, whose centres are resized.
    config.data.image_size = 224
    config.data.workers = 0  # processes that read and decode streamed images
    config.data.classes = config_dict.placeholder(tuple)  # of streamed sets: only these, by name or number; None: all

    config.parallel = ConfigDict()
    config.parallel.layout = "one_device"  # or "pmap", "data", "fsdp": how the devices share a step
    config.parallel.sync_batch_norm = False  # statistics of batch normalisation over the whole batch, not each device's
    config.parallel.accumulate = 1  # a device's batch is split into this many parts, whose gradients are averaged

    config.model = ConfigDict()
    config.model.name = ""
    config.model.dtype = "float32"  # or "bfloat16", of the computation; weights are float32

    config.clip_norm = config_dict.placeholder(float)  # None: gradients are not clipped
    config.weight_decay = 5e-4  # times all params is added to the gradients
    config.warmup_epochs = 0.0  # in these the learning rate rises from 0 to its schedule, at every step
    # The batch size that the learning rate is meant for: k times as many examples have k times the learning rate. None:
    # the same for any batch size.
    config.scale_with_batch = config_dict.placeholder(int)
    config.optimizer = ConfigDict()
    config.method = ConfigDict()

    # What --config.smoke changes: few examples, four epochs of 44 steps at most.
    config.smoke_overrides = ConfigDict({
        "epochs": 4, "log_every_steps": 44, "optimizer": {}, "method": {}, "model": {},
        "data": {"examples": 44 * 32, "batch_size": 32, "image_size": 64, "workers": 0},
    })  # fmt: skip
    return config


def set_learning_rate(config: ConfigDict, rate: Mapping[str, Any], **smoke: Any) -> None:
    """The schedule of the learning rate, and what a smoke run changes in it."""
    config.optimizer.learning_rate = ConfigDict(rate)
    config.smoke_overrides.optimizer = ConfigDict({"learning_rate": smoke})


def decay_every(config: ConfigDict, steps: int, init_value: float = 0.1) -> None:
    """The learning rate is divided by 10 every so often."""
    rate = {"init_value": init_value, "transition_steps": steps, "decay_rate": 0.1, "staircase": True}
    set_learning_rate(config, {"name": "exponential_decay", **rate}, transition_steps=2 * 44)


def decay_at(config: ConfigDict, epochs: tuple[int, ...], init_value: float = 0.1, decay_rate: float = 0.1) -> None:
    """The learning rate is multiplied by ``decay_rate`` after each of these epochs."""
    rate = {"init_value": init_value, "decay_rate": decay_rate, "at_epochs": epochs}
    set_learning_rate(config, {"name": "decays_at", **rate}, at_epochs=(1, 2, 3))


def cosine(config: ConfigDict, init_value: float = 0.1) -> None:
    """The learning rate falls to 0, at every step."""
    rate = {"name": "cosine_decay_schedule", "init_value": init_value, "decay_steps_epochs": ALL_EPOCHS}
    set_learning_rate(config, rate)


def epoch_cosine(config: ConfigDict, init_value: float, scale: float) -> None:
    """The learning rate is constant within an epoch, and would fall to 0 in ``scale`` times the epochs."""
    rate = {"init_value": init_value, "every_epochs": 1, "epochs": ALL_EPOCHS, "scale": scale}
    set_learning_rate(config, {"name": "epoch_cosine", **rate})


def sparse_momentum() -> ConfigDict:
    """Sparse momentum (Dettmers and Zettlemoyer, 2019): SGD with Nesterov momentum, learning rate by steps."""
    config = training()
    config.optimizer = ConfigDict({"name": "sgd", "momentum": 0.9, "nesterov": True})
    decay_every(config, 25_000)
    config.method = ConfigDict({
        "name": "sparse_momentum",
        "sparsity": 0.95,
        "update_every_epochs": 1,
        "prune_rate": {"name": "cosine_prune_rate", "init_value": 0.5, "steps_epochs": ALL_EPOCHS},
        "prune": "magnitude",  # or "SET", "global_magnitude"
        "redistribution": "momentum",  # or "magnitude", "nonzeros", "none"
        "growth": "momentum",  # or "random", "momentum_neuron"
        "allocation": "uniform",  # or "erdos_renyi", "erdos_renyi_kernel"
        "structure": "weight",  # what is kept or dropped as one, or "kernel", "channel", {"name": "block", ...}
    })  # fmt: skip
    return config


def rda(schedule: str = "rda_cosine", **options: Any) -> ConfigDict:
    """Training with compressed sensing (Siegel et al., 2020): generalised dual averaging with reweighted l1.

    Args:
      schedule: of the step size and the averaging: "rda_cosine", "rda_log_cosine", or "rda_halving".
      **options: of the schedule; by default it goes over all epochs.
    """
    config = training()
    schedules = {"name": schedule, "init_value": 1.0, **(options or {"steps_epochs": ALL_EPOCHS})}
    config.optimizer = ConfigDict({"name": "velocity", "schedules": schedules, "momentum_time": 9.5})
    config.method = ConfigDict({
        "name": "reweighted_l1",
        "schedules": "config.optimizer.schedules",  # step size and averaging
        "l1": 1e-6,
        "weight_time": "config.optimizer.momentum_time",
        "max_factor": 500.0,
        "structure": "weight",  # or "kernel", "channel"
        "state_dtype": config_dict.placeholder(str),  # "bfloat16": half of the state in half the bytes
    })  # fmt: skip
    return config


def gates(method: str) -> ConfigDict:
    """L0 regularisation, "l0" (Louizos et al., 2018) or "dep_l0" (Li and Ji, 2021): SGD or Adam, gates on channels."""
    config = training()
    config.optimizer = ConfigDict({"name": "sgd", "momentum": 0.9})
    decay_at(config, ())
    of_gates = {"init_value": 1e-3, "decay_rate": 1.0, "at_epochs": "config.optimizer.learning_rate.at_epochs"}
    config.method = ConfigDict({
        "name": method,
        # counts: which weights it counts, "neighbours", "all"; examples: by what it is divided. See jaxsparse.Penalty.
        "penalty": {"name": "Penalty", "strength": 1e-6, "counts": "alone", "examples": 1},
        "gate_optimizer": {"name": "adam", "learning_rate": {"name": "decays_at", **of_gates}},
    })  # fmt: skip
    config.method.freeze_gates_at_epochs = config_dict.placeholder(int)  # from then on they are deterministic
    if method == "l0":
        config.method.log_alpha = 0.0  # where gates start
        config.method.clamp = config_dict.placeholder(tuple)  # bounds of log_alpha
    else:
        config.method.direction = "forward"  # or "backward"
        config.method.input_width = config_dict.placeholder(int)  # None: that of the first group of the chain
    return config


def asni() -> ConfigDict:
    """ASNI (Damadi et al., 2022): Adam, global magnitude pruning on a sigmoid schedule, once an epoch."""
    config = training()
    config.init = "he_normal"
    config.weight_decay = 0.0
    config.optimizer = ConfigDict({"name": "adam", "learning_rate": 1.2e-4})
    config.method = ConfigDict({
        "name": "asni",
        "sparsity": {
            "name": "sigmoid_sparsity",
            "magnitude": 0.98,
            "begin_epochs": 1,  # the first pruning, as the author counts
            "steps_epochs": ALL_EPOCHS,
            "scale_epochs": 5.0,  # small is steep
            "translation": 0.5,
            "normalised": False,
        },
        "update_every_epochs": 1,
        "structure": "weight",  # what goes as one: as for sparse momentum
    })  # fmt: skip
    config.smoke_overrides.method = ConfigDict({"sparsity": {"scale_epochs": 0.4}})
    return config


def mnist(config: ConfigDict, model: str) -> ConfigDict:
    """LeNet-300-100 or LeNet-5 on MNIST as sparse momentum's Table 1 has it, a tenth of the images held out."""
    if model not in ("lenet_300_100", "lenet5_caffe"):
        raise ValueError(f"this config comes with the models 'lenet_300_100' and 'lenet5_caffe', got {model!r}")
    convolutional = model == "lenet5_caffe"
    config.eval_every_epochs = 5 if convolutional else 1
    config.checkpoint_every_epochs = 1 if convolutional else 10
    config.log_every_steps = 108 if convolutional else 540
    config.data.name = "mnist"
    config.data.validation = 0.1
    config.data.mean = (0.1307,)
    config.data.std = (0.3081,)
    config.model.name = model
    config.smoke_overrides.eval_every_epochs = 2 if convolutional else 1
    config.smoke_overrides.checkpoint_every_epochs = 1 if convolutional else 2
    return config


def cifar(config: ConfigDict) -> ConfigDict:
    """CIFAR-10 as both papers have it, but for the padding and the held out images."""
    config.checkpoint_every_epochs = 10
    config.log_every_steps = 50
    config.data.name = "cifar10"
    config.data.batch_size = 128
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2023, 0.1994, 0.2010)
    config.data.pad = 4
    config.data.flip = True
    config.smoke_overrides.checkpoint_every_epochs = 2
    set_width(config)
    return config


def text(config: ConfigDict) -> ConfigDict:
    """A text instead of images: by default the source of Python's standard library, byte by byte."""
    config.data.name = "text"
    config.data.files = config_dict.placeholder(str)  # a file, a folder or a pattern; None: the standard library
    config.data.test_files = config_dict.placeholder(str)  # the text to test on; None: a share of the files,
    config.data.test = 0.05  # this one, whole files by a hash of their path, as for config.data.validation
    config.data.vocab_size = config_dict.placeholder(int)  # None: bytes. The files are of ids below it, .npy or .bin
    config.data.length = 256  # of a window, in tokens
    config.data.epoch_tokens = config_dict.placeholder(int)  # the tokens of an epoch; None: as many as there are
    config.data.eval_windows = config_dict.placeholder(int)  # of a split at most this many are evaluated; None: all
    config.smoke_overrides.data = ConfigDict({
        "batch_size": 8, "length": 32, "examples": 44 * 8, "epoch_tokens": 44 * 8 * 32, "eval_windows": 16,
    })  # fmt: skip
    return config


def set_width(config: ConfigDict) -> None:
    """A model whose channel numbers have a factor; a smoke run has an eighth of them."""
    config.model.width = 1.0
    config.smoke_overrides.model = ConfigDict({"width": 1 / 8})
