"""The optimizers of the papers, each with its sparse link or wrapper or, dense, without."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

import jaxsparse
from jaxsparse import models, structures

SPARSITIES = {
    "sigmoid": lambda sparsity, stages: jaxsparse.sigmoid_sparsity(
        sparsity.magnitude, stages, sparsity.scale, sparsity.translation, normalised=sparsity.normalised
    ),
    "cubic": lambda sparsity, stages: jaxsparse.cubic_sparsity(sparsity.magnitude, max(stages - 2, 1)),
    "linear": lambda sparsity, stages: jaxsparse.linear_sparsity(sparsity.magnitude, stages),
}
PRUNE_RATES = {
    "cosine": jaxsparse.cosine_prune_rate,
    "linear": jaxsparse.linear_prune_rate,
    "constant": lambda prune_rate, total_steps: prune_rate,
}
# Of the config, the largest learning rate, and the steps of an epoch.
LEARNING_RATES = {
    "every_steps": lambda config, peak, steps: optax.exponential_decay(
        peak, config.optimizer.decay_every_steps, config.optimizer.decay_rate, staircase=True
    ),
    "at_epochs": lambda config, peak, steps: decayed_at_epochs(config, peak, config.optimizer.decay_rate, steps),
    "cosine": lambda config, peak, steps: optax.cosine_decay_schedule(peak, config.epochs * steps),
    "epoch_cosine": lambda config, peak, steps: epoch_cosine(config, peak, steps),
}
RDA_SCHEDULES = {
    "cosine": lambda config, steps: jaxsparse.rda_cosine(config.optimizer.step_size, config.epochs * steps),
    "log_cosine": lambda config, steps: jaxsparse.rda_log_cosine(config.optimizer.step_size, config.epochs * steps),
    "halving": lambda config, steps: jaxsparse.rda_halving(
        config.optimizer.step_size, [epoch * steps for epoch in config.optimizer.halve_after_epochs]
    ),
}


def make_optimizer(
    config: ConfigDict, steps_per_epoch: int, key: jax.Array | int = 0, model: Any = None
) -> optax.GradientTransformationExtraArgs:
    """The optimizer with its sparse link or wrapper, or without it if ``config.dense``; gradients are clipped first.

    Gates need the model, for its groups of channels.
    """
    clip_norm = config.optimizer.clip_norm
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    method = choose(METHODS, config.sparsity.method, "config.sparsity.method")
    return method(config, steps_per_epoch, clip, model, key)


def learning_rate(config: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate of SGD or Adam: its schedule, scaled with the batch, times a warm-up.

    With ``config.optimizer.scale_with_batch`` the linear scaling rule: the learning rate is meant for so many examples
    a step, and grows with the batch. In the first ``config.optimizer.warmup_epochs`` the schedule, which starts with
    step 0 all the same, is multiplied by 1/n, 2/n, ..., n/n over their n steps.

    Raises:
      ValueError: for an unknown schedule and numbers out of range.

    References:
      Goyal et al., *Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour*, 2017 (arXiv:1706.02677), section 2.
    """
    peak, warmup = config.optimizer.learning_rate, config.optimizer.warmup_epochs
    meant_for = config.optimizer.scale_with_batch
    if not 0 <= warmup <= config.epochs:
        raise ValueError(f"config.optimizer.warmup_epochs is from 0 to the {config.epochs} epochs, got {warmup}")
    if meant_for is not None:
        if meant_for < 1:
            raise ValueError(f"config.optimizer.scale_with_batch is a batch size of at least 1, got {meant_for}")
        peak *= config.data.batch_size / meant_for
    make = choose(LEARNING_RATES, config.optimizer.schedule, "config.optimizer.schedule")
    schedule = make(config, peak, steps_per_epoch)
    if not warmup:
        return schedule
    return lambda step: schedule(step) * jnp.minimum(1.0, (step + 1) / (warmup * steps_per_epoch))


def decayed_at_epochs(config: ConfigDict, peak: float, decay_rate: float, steps_per_epoch: int) -> optax.Schedule:
    """``peak``, multiplied by ``decay_rate`` at each of ``config.optimizer.decay_at_epochs``."""
    milestones = {epoch * steps_per_epoch: decay_rate for epoch in config.optimizer.decay_at_epochs}
    return optax.piecewise_constant_schedule(peak, milestones)


def epoch_cosine(config: ConfigDict, peak: float, steps_per_epoch: int) -> optax.Schedule:
    """ASNI's cosine: constant within an epoch, above 0 in the last one; constant if it has no ``cosine_scale``."""
    cosine_scale = config.optimizer.cosine_scale
    if cosine_scale is None:
        return optax.constant_schedule(peak)

    def cosine(step):
        epoch = step // steps_per_epoch
        return 0.5 * peak * (1 + jnp.cos(jnp.pi * epoch / (cosine_scale * (config.epochs + 1))))

    return cosine


def is_gated(config: ConfigDict) -> bool:
    """Whether gates on channels take the place of masks."""
    return not config.dense and config.sparsity.method in GATES


def make_structure(config: ConfigDict) -> Any:
    """What is kept or dropped as one, as ``config.sparsity.structure`` has it."""
    structure = config.sparsity.structure
    if structure in ("weight", "kernel", "channel"):
        return structure
    if structure == "model":
        blocks = config.model.get("blocks") or ()
        return {f"fc{i + 1}/kernel": structures.block(*block) for i, block in enumerate(blocks) if block is not None}
    if found := re.fullmatch(r"(\d+)x(\d+)", structure):
        return structures.block(*map(int, found.groups()))
    if found := re.fullmatch(r"(\d+):(\d+)", structure):
        return structures.n_of_m(*map(int, found.groups()))
    raise ValueError(
        "config.sparsity.structure must be 'weight', 'kernel', 'channel', 'model' (its blocks), blocks such as "
        f"'64x64', or n of m such as '2:4', got {structure!r}"
    )


def _sparse_momentum(config, steps_per_epoch, clip, model, key):
    """SGD with Nesterov momentum and weight decay, and sparse momentum as its last link."""
    del model
    optimizer = [
        clip,
        optax.add_decayed_weights(config.optimizer.weight_decay),
        optax.sgd(learning_rate(config, steps_per_epoch), momentum=config.optimizer.momentum, nesterov=True),
    ]
    if config.dense:
        return jaxsparse.chain(*optimizer)
    prune_rate = choose(PRUNE_RATES, config.sparsity.prune_rate_decay, "config.sparsity.prune_rate_decay")
    link = jaxsparse.sparse_momentum(
        config.sparsity.sparsity,
        update_every=config.sparsity.update_every_epochs * steps_per_epoch,
        prune_rate=prune_rate(config.sparsity.prune_rate, config.epochs * steps_per_epoch),
        growth=config.sparsity.growth,
        redistribution=config.sparsity.redistribution,
        prune=config.sparsity.prune,
        allocation=config.sparsity.allocation,
        structure=make_structure(config),
        key=key,
    )
    return jaxsparse.chain(*optimizer, link)


def _rda(config, steps_per_epoch, clip, model, key):
    """Generalised dual averaging with reweighted l1; dense is its SGD with averaged gradients alone."""
    del model, key  # nothing is random
    make = choose(RDA_SCHEDULES, config.optimizer.schedule, "config.optimizer.schedule")
    step_size, averaging = make(config, steps_per_epoch)
    if config.dense:
        return jaxsparse.chain(
            clip,
            optax.add_decayed_weights(config.optimizer.weight_decay),
            jaxsparse.velocity(step_size, config.optimizer.momentum_time),
        )
    link = jaxsparse.rda(
        step_size,
        l1=config.sparsity.l1,
        averaging=averaging,
        momentum_time=config.optimizer.momentum_time,
        weight_time=config.sparsity.weight_time,
        weight_decay=config.optimizer.weight_decay,
        max_factor=config.sparsity.max_factor,
        structure=config.sparsity.structure,
    )
    return jaxsparse.chain(clip, link)


def _asni(config, steps_per_epoch, clip, model, key):
    """SGD or Adam, with pruning by magnitude on a schedule as its last link, or on fixed masks."""
    del model, key  # nothing is random
    optimizer = _sgd_or_adam(config, steps_per_epoch, clip)
    if config.dense:
        return jaxsparse.chain(*optimizer)
    sparsity = config.sparsity
    if sparsity.method == "mask_updates":
        return jaxsparse.chain(*optimizer, jaxsparse.mask_updates(load_start(config)[1]))
    schedule = choose(SPARSITIES, sparsity.schedule, "config.sparsity.schedule")
    stages = config.epochs // sparsity.update_every_epochs
    if not stages:
        raise ValueError(
            f"config.sparsity.update_every_epochs={sparsity.update_every_epochs} is more than config.epochs="
            f"{config.epochs}: nothing would be pruned"
        )
    link = jaxsparse.asni(
        schedule(sparsity, stages),
        update_every=sparsity.update_every_epochs * steps_per_epoch,
        exact=sparsity.exact,
        structure=make_structure(config),
    )
    return jaxsparse.chain(*optimizer, link)


def _sgd_or_adam(config, steps_per_epoch, clip):
    """The links of ``config.optimizer.name``, behind clipping and weight decay."""
    rate = learning_rate(config, steps_per_epoch)
    optimizers = {
        "adam": lambda: optax.adam(rate),
        "sgd": lambda: optax.sgd(rate, momentum=config.optimizer.momentum),
    }
    return [
        clip,
        optax.add_decayed_weights(config.optimizer.weight_decay),
        choose(optimizers, config.optimizer.name, "config.optimizer.name")(),
    ]


def load_start(config):
    """Params and masks that a run with ``config.sparsity.masks_from`` starts from."""
    if not config.sparsity.masks_from:
        raise ValueError("config.sparsity.masks_from is the file of a sparse model, such as WORKDIR/sparse.safetensors")
    return jaxsparse.load_sparse(config.sparsity.masks_from)


def _gates(config, steps_per_epoch, clip, model, key):
    """SGD or Adam in a wrapper of L0 gates, which train with Adam; the gradients of the weights are clipped."""
    inner = optax.chain(*_sgd_or_adam(config, steps_per_epoch, clip))
    if config.dense:
        return inner
    sparsity, freeze = config.sparsity, config.sparsity.freeze_gates_at_epoch
    groups = models.channel_groups(model)
    strength = sparsity.penalty
    if sparsity.penalty_factors is not None:
        strength = tuple(sparsity.penalty * factor for factor in sparsity.penalty_factors)
    of_gates = decayed_at_epochs(config, sparsity.gate_learning_rate, sparsity.gate_decay_rate, steps_per_epoch)
    common = {
        "penalty": jaxsparse.Penalty(strength, sparsity.counts, examples=sparsity.examples),
        "gate_optimizer": optax.adam(of_gates),
        "freeze_gates_at": None if freeze is None else freeze * steps_per_epoch,
        "key": key,
    }
    if sparsity.method == "dep_l0":
        options = {"direction": sparsity.direction, "input_width": sparsity.input_width}
        return jaxsparse.dep_l0(inner, groups, **common, **options)
    return jaxsparse.l0(inner, groups, **common, log_alpha=sparsity.log_alpha, clamp=sparsity.clamp)


METHODS = {
    "asni": _asni,
    "mask_updates": _asni,
    "sparse_momentum": _sparse_momentum,
    "rda": _rda,
    "l0": _gates,
    "dep_l0": _gates,
}
GATES = ("l0", "dep_l0")


def refuse_idle(config: ConfigDict, changed: Iterable[str]) -> None:
    """Raises a ValueError if one of the keys ``changed``, such as "data.workers", has no effect in this run."""
    schedule, method = config.optimizer.get("schedule"), config.sparsity.method
    gates_decay = method in GATES and config.sparsity.gate_decay_rate != 1
    needs = {  # what is needed: whether it is there, and the keys that need it
        "config.data.streamed": (config.data.streamed, "data.image_size data.workers data.classes"),
        "config.data.pad": (config.data.pad, "data.pad_mode"),
        "config.optimizer.name='sgd'": (config.optimizer.get("name", "sgd") == "sgd", "optimizer.momentum"),
        "config.optimizer.schedule='every_steps'": (schedule == "every_steps", "optimizer.decay_every_steps"),
        "config.optimizer.schedule='at_epochs'": (schedule == "at_epochs" or gates_decay, "optimizer.decay_at_epochs"),
        "a config.optimizer.schedule with it": (schedule in ("every_steps", "at_epochs"), "optimizer.decay_rate"),
        "config.optimizer.schedule='epoch_cosine'": (schedule == "epoch_cosine", "optimizer.cosine_scale"),
        "config.optimizer.schedule='halving'": (schedule == "halving", "optimizer.halve_after_epochs"),
        "config.sparsity.method='mask_updates'": (method == "mask_updates", "sparsity.masks_from sparsity.start"),
        "a config.sparsity.method that prunes": (
            method != "mask_updates",
            "sparsity.schedule sparsity.magnitude sparsity.scale sparsity.translation sparsity.normalised "
            "sparsity.exact sparsity.structure sparsity.update_every_epochs",
        ),
        "config.sparsity.schedule='sigmoid'": (
            config.sparsity.get("schedule") == "sigmoid", "sparsity.scale sparsity.translation sparsity.normalised"
        ),
    }  # fmt: skip
    for what, (there, keys) in needs.items():
        if not there and (idle := sorted(set(keys.split()) & set(changed))):
            raise ValueError(f"config.{idle[0]} has no effect without {what}")


def choose(options: Mapping[str, Any], name: str, key: str) -> Any:
    """``options[name]``, or a ValueError that lists the options."""
    if name not in options:
        raise ValueError(f"{key} is one of {', '.join(map(repr, options))}, got {name!r}")
    return options[name]
