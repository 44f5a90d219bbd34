"""Build the optimizer and the method of a run from the names that its config gives.

``config.optimizer`` and ``config.method`` are calls: ``name`` is looked up in jaxsparse, experiments.learning_rates,
experiments.optimizers, experiments.prune_at_init and optax, the other keys are the arguments. Among these

* a mapping with a ``name`` is a call itself, such as a schedule. If it gives several values by name, as
  :func:`jaxsparse.rda_cosine` does, they become the arguments of these names;
* the text ``"config.KEY"`` stands for what that key of the config gives;
* a key that ends in ``_epochs`` is the argument without that ending, times the steps of an epoch.
"""

import difflib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import optax
import optax.contrib
from ml_collections import ConfigDict

import jaxsparse
from experiments import learning_rates, optimizers, prune_at_init
from jaxsparse import models

ROOMS = (jaxsparse, learning_rates, optimizers, prune_at_init, optax, optax.contrib)
RATE = "config.optimizer.learning_rate"
CHECKED_STEPS = 50_400  # of an epoch, where a config is checked without its data; any usual part of it is whole
FROM_TRAINER = ("inner", "groups", "key")  # arguments of a method that the trainer gives


class Optimizer(NamedTuple):
    """The optimizer of a run, made for any seed.

    Attributes:
      make: (key, fixed masks or None) -> the optimizer with its method. All that the config names is looked up before.
      groups: of channels, for a method that takes them; None for others.
      pruner: what makes the fixed masks when a run starts, of a method that prunes before training; None for others.
    """

    make: Callable[..., optax.GradientTransformationExtraArgs]
    groups: Any = None
    pruner: prune_at_init.Pruner | None = None


def make_optimizer(config: ConfigDict, steps_per_epoch: int, model: Any = None) -> Optimizer:
    """The optimizer of a run, behind clipped gradients and weight decay, with its method unless it runs densely.

    The method, such as :func:`jaxsparse.sparse_momentum`, is the last link of the chain, or, if it has an argument
    ``inner``, a wrapper around the rest. With ``config.masks_from`` fixed masks take its place.

    Args:
      config: of the run.
      steps_per_epoch: of the run.
      model: for a method that takes its groups of channels.

    Raises:
      ValueError: for what the config names or gives wrongly; it begins with the key, such as "config.method".
    """
    calls, clip_norm = Calls(config, steps_per_epoch), config.clip_norm
    for name in ("warmup_epochs", "scale_with_batch", "start_epochs"):
        if config[name] and "learning_rate" not in config.optimizer:
            raise ValueError(f"config.{name} has no effect without config.optimizer.learning_rate")
    links = [
        optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm),
        optax.add_decayed_weights(config.weight_decay),
        calls.value(config.optimizer, "config.optimizer"),
    ]
    if config.dense:
        return Optimizer(lambda key=0, masks=None: jaxsparse.chain(*links))

    def on_masks(key: jax.Array | int = 0, masks: Any = None) -> optax.GradientTransformationExtraArgs:
        return jaxsparse.chain(*links, jaxsparse.mask_updates(masks))

    if config.masks_from:
        if config.sparse_init and config.start != "original":
            raise ValueError(
                f"config.sparse_init scales random weights, and with config.start={config.start!r} they are those of a "
                "trained network: it needs 'original'"
            )
        return Optimizer(on_masks)
    if config.sparse_init and config.get("start_from"):
        raise ValueError("config.sparse_init scales random weights, and with config.start_from there are none")
    every, total = update_every(config, steps_per_epoch), round(config.epochs * steps_per_epoch)
    if every > total:
        raise ValueError(f"config.method changes masks every {every} steps, and there are {total} steps in all")
    function, arguments = calls.call(config.method, "config.method")
    if function is prune_at_init.prune_at_init:
        with named("config.method"):
            return Optimizer(on_masks, pruner=function(**arguments))
    takes = inspect.signature(function).parameters
    if config.sparse_init and "inner" in takes:
        raise ValueError(
            f"config.sparse_init is for links, and {config.method.name} is a wrapper, which may train what masks hide"
        )
    groups = models.channel_groups(model) if "groups" in takes else None

    def make(key: jax.Array | int = 0, masks: Any = None) -> optax.GradientTransformationExtraArgs:
        given = {"inner": optax.chain(*links) if "inner" in takes else None, "groups": groups, "key": key}
        with named("config.method"):
            method = function(**{name: given[name] for name in FROM_TRAINER if name in takes} | arguments)
        if not hasattr(method, "update"):
            raise ValueError(f"config.method: {config.method.name} makes no optax.GradientTransformation")

        def init(params: Any, init: Callable[..., Any] = method.init) -> Any:
            with named("config.method", (ValueError,)):
                return init(params)

        method = method._replace(init=init)
        return method if "inner" in takes else jaxsparse.chain(*links, method)

    make()  # what is wrong with its arguments is found now
    return Optimizer(make, groups)


def update_every(config: ConfigDict, steps_per_epoch: int) -> int:
    """The steps between two changes of masks; 1 for a method that does not say."""
    calls = Calls(config, steps_per_epoch)
    for name in ("update_every", "every"):
        for key in (f"{name}_epochs", name):
            if key in config.method:
                where = f"config.method.{key}"
                value = calls.value(config.method[key], where)
                steps = in_steps(value, steps_per_epoch, where) if key != name else value
                return 1 if steps is None else steps
    return 1


class Calls:
    """The calls that the parts of a config name.

    Args:
      config: of the run.
      steps_per_epoch: of the run.
    """

    def __init__(self, config: ConfigDict, steps_per_epoch: int):
        self._config, self._steps_per_epoch = config, steps_per_epoch

    def call(self, call: Mapping[str, Any], key: str) -> tuple[Callable[..., Any], dict[str, Any]]:
        """The function that ``call`` names, and its arguments; ``key`` is where it stands in the config."""
        function = look_up(call.get("name"), key)
        takes = inspect.signature(function).parameters
        arguments: dict[str, Any] = {}
        for option, given in call.items():
            value = None if option == "name" else self.value(given, f"{key}.{option}")
            if option.endswith("_epochs"):
                value = in_steps(value, self._steps_per_epoch, f"{key}.{option}")
                option = option.removesuffix("_epochs")
            if option == "transition_steps" and value < 1:  # Optax would take it for a constant
                raise ValueError(f"{key}.{option} is at least 1, got {value}")
            several = getattr(value, "_asdict", dict)()
            if option in takes or not several.keys() & takes.keys():
                arguments |= {option: value} if option != "name" else {}
            else:
                arguments |= {name: part for name, part in several.items() if name in takes}
        if any(parameter.kind == parameter.VAR_KEYWORD for parameter in takes.values()):
            return function, arguments
        known = [name for name in takes if name not in FROM_TRAINER]
        for option in arguments:
            if option not in takes:
                near = difflib.get_close_matches(option, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                raise ValueError(f"{key}: {call['name']} takes no {option!r}{hint} It takes {', '.join(known)}")
        for name in known:
            if takes[name].default is inspect.Parameter.empty and name not in arguments:
                raise ValueError(f"{key} lacks {name!r}, which {call['name']} needs")
        return function, arguments

    def value(self, given: Any, key: str) -> Any:
        """The value at ``key`` of the config, with all calls in it made."""
        if key == RATE:
            return self._learning_rate(given)
        return self._made(given, key)

    def _made(self, given: Any, key: str) -> Any:
        if isinstance(given, str):
            if given.startswith("config."):
                return self._referred(given, key)
            given = from_text(given)
        if not isinstance(given, (Mapping, ConfigDict)):
            return given
        if "name" not in given:
            return {name: self.value(value, f"{key}.{name}") for name, value in given.items()}
        function, arguments = self.call(given, key)
        with named(key):
            return function(**arguments)

    def _referred(self, other: str, key: str) -> Any:
        found: Any = self._config
        for part in other.split(".")[1:]:
            if not isinstance(found, (Mapping, ConfigDict)) or part not in found:
                raise ValueError(f"{key} is that of {other}, which the config does not have")
            found = found[part]
        return self.value(found, other)

    def _learning_rate(self, given: Any) -> Any:
        """The learning rate: its schedule, scaled with the batch, times a warm-up, from ``start_epochs`` on."""
        config = self._config
        warmup, meant_for = config.warmup_epochs, config.scale_with_batch
        if not 0 <= warmup <= config.epochs:
            raise ValueError(f"config.warmup_epochs is from 0 to the {config.epochs} epochs, got {warmup}")
        if meant_for is not None:
            if meant_for < 1:
                raise ValueError(f"config.scale_with_batch is a batch size of at least 1, got {meant_for}")
            given = times(given, config.data.batch_size / meant_for)
        rate = self._made(given, RATE)
        if warmup:
            rate = learning_rates.warmed_up(rate, warmup * self._steps_per_epoch)
        return learning_rates.starting_at(rate, round(config.start_epochs * self._steps_per_epoch))


def times(rate: Any, factor: float) -> Any:
    """A learning rate times a factor; of a schedule all arguments whose name ends in "value"."""
    rate = from_text(rate) if isinstance(rate, str) else rate
    if isinstance(rate, str):
        raise ValueError(f"{RATE}={rate!r} cannot be scaled: give the number or the schedule itself")
    if not isinstance(rate, (Mapping, ConfigDict)):
        return rate * factor
    values = {name: value * factor for name, value in rate.items() if name.endswith("value")}
    if not values:
        raise ValueError(f"config.scale_with_batch cannot scale {rate['name']}, which has no init_value")
    return {**rate, **values}


def look_up(name: Any, key: str) -> Callable[..., Any]:
    """The function or class of that name, of jaxsparse, of the learning rates here, or of optax."""
    for room in ROOMS:
        if isinstance(name, str) and name.isidentifier() and callable(found := getattr(room, name, None)):
            return found
    known = {found for room in ROOMS for found in dir(room) if callable(getattr(room, found)) and found[0] != "_"}
    near = difflib.get_close_matches(str(name), sorted(known), n=3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"{key}.name is a function of jaxsparse or optax, got {name!r}{hint}")


def in_steps(epochs: Any, steps_per_epoch: int, key: str) -> Any:
    """Epochs as steps, whole ones as ints; also each of several. None stays."""
    if isinstance(epochs, (list, tuple)):
        return tuple(in_steps(one, steps_per_epoch, key) for one in epochs)
    if epochs is None:
        return None
    if isinstance(epochs, bool) or not isinstance(epochs, (int, float)):
        raise ValueError(f"{key} is a number of epochs, got {epochs!r}")
    steps = epochs * steps_per_epoch
    return round(steps) if abs(steps - round(steps)) < 1e-6 else steps


def from_text(text: str) -> Any:
    """The number or call that a text is in JSON, as the command line may put in the place of one; else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


@contextmanager
def named(key: str, kinds: tuple[type[Exception], ...] = (ValueError, TypeError)) -> Iterator[None]:
    """Puts the key of the config before the message of an error of one of these kinds."""
    try:
        yield
    except kinds as error:
        raise ValueError(f"{key}: {error}") from error
