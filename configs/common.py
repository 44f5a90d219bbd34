"""What the configurations share: all keys, with the recipes of the papers' authors as far as they are the same.

Every key can be changed on the command line: ``--config.optimizer.weight_decay=1e-4``.
"""

from ml_collections import ConfigDict, config_dict


def training() -> ConfigDict:
    """The keys of every run; those that are None or "" have to be set."""
    config = ConfigDict()
    config.seed = 0
    config.dense = False  # True leaves the sparse link out
    config.smoke = False  # True makes the run small, to see that it works
    config.data_dir = config_dict.placeholder(str)  # of TensorFlow Datasets; None: ~/tensorflow_datasets
    config.epochs = 100
    config.eval_every_epochs = 1
    config.checkpoint_every_epochs = 1
    config.log_every_steps = 500

    config.label_smoothing = 0.0  # share of every target that is spread over all classes
    config.init = "model"  # where the weights start: as the model has it, or "he_normal": by fan-in, with biases of 0

    config.data = ConfigDict()
    config.data.name = ""
    config.data.batch_size = 100
    config.data.validation = 0.0  # share of the train examples that is held out, the last of them
    config.data.mean = config_dict.placeholder(tuple)  # None: that of the train images
    config.data.std = config_dict.placeholder(tuple)
    config.data.examples = config_dict.placeholder(int)  # take the first so many; None: all
    config.data.pad = 0  # augmentation: random crops of images padded by so many pixels,
    config.data.pad_mode = "zeros"  # or "reflect",
    config.data.flip = False  # and mirrored at random
    config.data.streamed = False  # True: too large for the memory, read and decoded by worker processes while training
    config.data.image_size = 224  # of streamed images, which are cropped at random, resized and mirrored
    config.data.workers = 0  # processes that read and decode streamed images
    config.data.classes = config_dict.placeholder(tuple)  # of streamed sets: only these, by name or number; None: all

    config.parallel = ConfigDict()
    config.parallel.layout = "one_device"  # or "pmap", "data", "fsdp": how the devices share a step
    config.parallel.sync_batch_norm = False  # statistics of batch normalisation over the whole batch, not each device's
    config.parallel.accumulate = 1  # gradients of so many parts of a device's batch are averaged, one after another

    config.model = ConfigDict()
    config.model.name = ""
    config.model.dtype = "float32"  # or "bfloat16", of the computation; weights are float32

    config.optimizer = ConfigDict()
    config.optimizer.weight_decay = 5e-4  # of all params
    config.optimizer.clip_norm = config_dict.placeholder(float)  # None: gradients are not clipped
    config.sparsity = ConfigDict()
    return config


def add_learning_rate(config: ConfigDict, schedule: str) -> None:
    """The learning rate of SGD or Adam, for the methods that have one of them."""
    optimizer = config.optimizer
    optimizer.learning_rate = 0.1
    # "every_steps" and "at_epochs": multiplied by decay_rate then; "cosine": falls to 0, at every step; "epoch_cosine":
    # constant within an epoch, falls to 0 over cosine_scale times the epochs.
    optimizer.schedule = schedule
    optimizer.decay_rate = 0.1
    optimizer.decay_every_steps = 25_000
    optimizer.decay_at_epochs = ()
    optimizer.cosine_scale = config_dict.placeholder(float)  # None: constant
    optimizer.warmup_epochs = 0.0  # in the first so many it rises from 0 to its schedule, at every step
    # The batch size that the learning rate is meant for: k times as many examples have k times the learning rate. None:
    # the same for any batch size.
    optimizer.scale_with_batch = config_dict.placeholder(int)


def sparse_momentum() -> ConfigDict:
    """Sparse momentum (Dettmers and Zettlemoyer, 2019): SGD with Nesterov momentum, learning rate by steps."""
    config = training()
    add_learning_rate(config, "every_steps")
    config.optimizer.momentum = 0.9

    config.sparsity.method = "sparse_momentum"
    config.sparsity.sparsity = 0.95
    config.sparsity.update_every_epochs = 1
    config.sparsity.prune_rate = 0.5
    config.sparsity.prune_rate_decay = "cosine"  # or "linear", "constant"
    config.sparsity.prune = "magnitude"  # or "SET", "global_magnitude"
    config.sparsity.redistribution = "momentum"  # or "magnitude", "nonzeros", "none"
    config.sparsity.growth = "momentum"  # or "random", "momentum_neuron"
    config.sparsity.allocation = "uniform"  # or "erdos_renyi", "erdos_renyi_kernel"
    # What is kept or dropped as one: "weight", "kernel", "channel", blocks such as "64x64", n of m such as "2:4", or
    # "model": the blocks of config.model.
    config.sparsity.structure = "weight"
    return config


def rda() -> ConfigDict:
    """Training with compressed sensing (Siegel et al., 2020): generalised dual averaging with reweighted l1."""
    config = training()
    config.optimizer.step_size = 1.0
    config.optimizer.schedule = "cosine"  # or "halving", "log_cosine"; it sets the averaging too
    config.optimizer.halve_after_epochs = ()  # for "halving"
    config.optimizer.momentum_time = 9.5

    config.sparsity.method = "rda"
    config.sparsity.l1 = 1e-6
    config.sparsity.weight_time = config_dict.placeholder(float)  # None: momentum_time
    config.sparsity.max_factor = 500.0
    config.sparsity.structure = "weight"  # or "kernel", "channel"
    return config


def gates(method: str) -> ConfigDict:
    """L0 regularisation, "l0" (Louizos et al., 2018) or "dep_l0" (Li and Ji, 2021): SGD or Adam, gates on channels."""
    config = training()
    config.optimizer.name = "sgd"  # or "adam"
    add_learning_rate(config, "at_epochs")
    config.optimizer.momentum = 0.9

    config.sparsity.method = method
    config.sparsity.penalty = 1e-6  # strength of the penalty,
    config.sparsity.penalty_factors = config_dict.placeholder(tuple)  # times one factor for each group; None: 1
    config.sparsity.counts = "alone"  # or "neighbours", "all": which weights it counts, see jaxsparse.Penalty
    config.sparsity.examples = 1  # by what it is divided
    config.sparsity.gate_learning_rate = 1e-3  # of Adam, on the gates,
    config.sparsity.gate_decay_rate = 1.0  # multiplied by this at config.optimizer.decay_at_epochs
    config.sparsity.freeze_gates_at_epoch = config_dict.placeholder(int)  # from then on they are deterministic
    if method == "l0":
        config.sparsity.log_alpha = 0.0  # where gates start
        config.sparsity.clamp = config_dict.placeholder(tuple)  # bounds of log_alpha
    else:
        config.sparsity.direction = "forward"  # or "backward"
        config.sparsity.input_width = config_dict.placeholder(int)  # None: that of the first group of the chain
    return config


def asni() -> ConfigDict:
    """ASNI (Damadi et al., 2022): Adam or SGD, global magnitude pruning on a sigmoid schedule, once an epoch."""
    config = training()
    config.init = "he_normal"
    config.optimizer.name = "adam"  # or "sgd"
    add_learning_rate(config, "epoch_cosine")
    config.optimizer.learning_rate = 1.2e-4
    config.optimizer.momentum = 0.9  # of SGD
    config.optimizer.weight_decay = 0.0

    config.sparsity.method = "asni"  # or "mask_updates": fixed masks
    config.sparsity.update_every_epochs = 1
    config.sparsity.schedule = "sigmoid"  # or "cubic", "linear"
    config.sparsity.magnitude = 0.98  # of the sparsity
    config.sparsity.scale = 5.0  # of the sigmoid, in prunings: small is steep
    config.sparsity.translation = 0.5
    config.sparsity.normalised = False
    config.sparsity.exact = False  # True: as many as the schedule says, nothing skipped
    config.sparsity.structure = "weight"  # what goes as one: as for sparse momentum
    # For "mask_updates": the file of a sparse model, such as WORKDIR/sparse.safetensors of another run, and the weights
    # to start with on its masks: "centroids" (ASNI-II: two numbers a layer), "centroids_and_biases" (two of its biases
    # too), "original" (the random ones of this run's seed), "weights" (the model's own).
    config.sparsity.masks_from = config_dict.placeholder(str)
    config.sparsity.start = "centroids"
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
    config.model.width = 1.0  # factor of all channel numbers
    return config
