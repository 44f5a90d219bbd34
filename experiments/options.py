"""Options of a config as a whole: the changes of a smoke run, and checks of its numbers."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.measures import TEXT

# Keys of config.data for a text, and those that are for images of one's own too.
OF_TEXT = ("files", "test_files", "test", "length", "vocab_size", "epoch_tokens", "eval_windows")
OF_OWN = ("files", "test")
OWN = ("npz", "folder", "function")  # the names of data that are images of one's own
SEEDS = 2**32  # how many there are: PRNG keys are made of 32 bits


def choose(options: Mapping[str, Any], name: str, key: str) -> Any:
    """``options[name]``, or a ValueError that lists the options."""
    if name not in options:
        raise ValueError(f"{key} is one of {', '.join(map(repr, options))}, got {name!r}")
    return options[name]


def or_none(given: Sequence[Any] | None) -> Sequence[Any] | None:
    """The values given for a key, or None where =None was given."""
    return None if given and list(given) == [None] else given  # (None,) on the command line, [None] in config.json


def small(config: ConfigDict, changed: Iterable[str] = ()) -> ConfigDict:
    """A copy made small, to see that it runs, by the values of ``config.smoke_overrides`` for all but some keys."""
    config = copy.deepcopy(config)  # ConfigDict(config) would share the placeholders
    with config.unlocked():
        for key in changed:  # which may have put something else in the place of a mapping
            *parents, last = key.split(".")
            within = config.smoke_overrides
            for parent in parents:
                within = within.get(parent, {})
            if last in within:
                del within[last]
        config.update(config.smoke_overrides)
        del config.smoke_overrides
    return config


def for_run(config: ConfigDict, changed: Mapping[str, Any]) -> ConfigDict:
    """The config that is run: made small by ``config.smoke``, but for the keys that the command line ``changed``."""
    config = copy.deepcopy(config)  # ConfigDict(config) would share the placeholders
    changed = {key: value for key, value in changed.items() if not key.startswith("smoke_overrides.")}
    if config.smoke:
        config = small(config, changed)
        config.update_from_flattened_dict(changed)
    else:
        with config.unlocked():
            del config.smoke_overrides
    return config


def with_seed(config: ConfigDict, seed: int) -> ConfigDict:
    """A copy of the config with another seed."""
    config = copy.deepcopy(config)  # ConfigDict(config) would share the placeholders
    config.seed = seed
    return config


def check_config(config: ConfigDict, num_examples: int) -> None:
    """Raises a ValueError for numbers out of range that nothing else would notice."""
    for key in ("eval_every_epochs", "checkpoint_every_epochs", "log_every_steps"):
        if config[key] < 1:
            raise ValueError(f"config.{key} is at least 1, got {config[key]}")
    steps_per_epoch = num_examples // max(config.data.batch_size, 1)
    if config.epochs <= 0 or (steps_per_epoch and not round(config.epochs * steps_per_epoch)):
        raise ValueError(f"config.epochs is at least one step, {1 / max(steps_per_epoch, 1):.3g}, got {config.epochs}")
    if "stages" in config:
        raise ValueError("config.stages is for experiments.stages, which trains one stage after another")
    start, epochs = config.start_epochs, config.epochs
    if not 0 <= start < epochs:
        raise ValueError(f"config.start_epochs is from 0 to less than the {epochs} epochs, got {start}")
    if start and not (config.dense or config.masks_from):
        raise ValueError(
            "config.start_epochs is for config.dense or config.masks_from: schedules of methods start at 0"
        )
    if start and config.data.streamed:
        raise ValueError("config.start_epochs is for images that fit into the memory, not for config.data.streamed")
    if not all(start <= epoch <= epochs for epoch in config.keep_epochs):
        raise ValueError(f"config.keep_epochs are from {start} to {epochs}, got {config.keep_epochs}")
    if not 0 <= config.seed < SEEDS:
        raise ValueError(f"config.seed is from 0 to 2^32 - 1, got {config.seed}")
    if or_none(config.data.classes) is not None and not config.data.streamed:
        raise ValueError("config.data.classes is for streamed images, config.data.streamed")
    if not 1 <= config.data.batch_size <= num_examples:
        raise ValueError(
            f"config.data.batch_size is between 1 and the {num_examples} train examples, got {config.data.batch_size}"
        )


def refuse_idle(config: ConfigDict, changed: Iterable[str]) -> None:
    """Raises a ValueError if one of the keys ``changed``, such as "data.workers", has no effect in this run."""
    methods = [key for key in changed if key.startswith("method.")]
    of_images = [f"data.{name}" for name in ("mean", "std", "pad", "flip", "streamed")]
    of_own, of_text = ([f"data.{name}" for name in names] for names in (OF_OWN, OF_TEXT))
    name, streamed = config.data.name, config.data.streamed
    needs = {  # what is needed: whether it is there, and the keys that need it
        "config.data.streamed": (streamed, ["data.workers", "data.classes"]),
        "config.data.streamed, or images in a folder": (streamed or name == "folder", ["data.image_size"]),
        "config.data.pad": (config.data.pad, ["data.pad_mode"]),
        "images": (name != TEXT, of_images),
        "a text": (name == TEXT, sorted({*of_text} - {*of_own})),
        f"a text or images of one's own, config.data.name={', '.join(map(repr, (TEXT, *OWN)))}": (
            name in (TEXT, *OWN),
            of_own,
        ),
        "config.masks_from": (config.masks_from, ["start"]),
        "config.distill_from": (config.get("distill_from"), ["distill_temperature", "distill_weight"]),
        "a method: with config.masks_from the masks are fixed": (not config.masks_from, methods),
    }
    for what, (there, keys) in needs.items():
        if not there and (idle := sorted(set(keys) & set(changed))):
            raise ValueError(f"config.{idle[0]} has no effect without {what}")


def as_seeds(texts: Sequence[str]) -> list[int]:
    """The seeds that a flag names."""
    try:
        seeds = [int(text) for text in texts]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds) or not 0 <= min(seeds) <= max(seeds) < SEEDS:
        raise ValueError(
            f"--seeds takes different whole numbers from 0 to 2^32 - 1, such as 0,1,2, got {','.join(texts)!r}"
        )
    return seeds
