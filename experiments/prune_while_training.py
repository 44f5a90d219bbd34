"""A network that loses its closed channels while it trains: ``config.prune_while_training_epochs``.

Every so many epochs the channels whose gates are closed in evaluation leave the network for good: its params, batch
statistics, the optimizer's state with its momentum, and the gates. The steps are compiled anew for what is left. Which
channels went is in the checkpoints, so that a run that was stopped goes on with the same network and the same bits.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

import jaxsparse
from experiments.program import Program, TrainState
from jaxsparse.groups import Group
from jaxsparse.trace.slim import kept_entries
from jaxsparse.trace.states import cut_params, cut_state, gone_channels
from jaxsparse.trees import by_path


def check_pruning(config: ConfigDict, program: Program, side_by_side: bool) -> None:
    """Raises a ValueError if channels cannot leave the network of this run while it trains."""
    every, key = config.get("prune_while_training_epochs"), "config.prune_while_training_epochs"
    if every is None:
        return
    if every < 1:
        raise ValueError(f"{key} is at least 1, or None, got {every}")
    if config.dense or config.masks_from or config.method.name != "l0":
        raise ValueError(f"{key} is for the method 'l0', whose gates close channels one by one")
    if side_by_side or program.layout.name != "one_device":
        raise ValueError(f"{key} is for config.parallel.layout='one_device' without --vmap_seeds")


def open_gates(program: Program, state: TrainState) -> dict[str, str]:
    """The channels that stay, of the groups that lose some: name -> "1" or "0" for each; one of each group stays.

    Those go whose gates are closed in evaluation.
    """
    found, log_alpha = {}, jaxsparse.get_log_alpha(state.opt_state)
    for group in program.optimizer.groups:
        stays = np.array(jaxsparse.open_channels(state.opt_state)[group.name])
        stays[np.argmax(np.asarray(log_alpha[group.name]))] = True
        if group.removes and not stays.all():
            found[group.name] = "".join(map(str, stays.astype(int)))
    kept, _, _ = _kept(state, program.optimizer.groups, found)
    if not all(stays.any() for stays in kept.values()):  # all inputs that are open are of filters that are closed
        del found["inputs"]
    return found


def without(state: TrainState, groups: Sequence[Group], stays: Mapping[str, str]) -> TrainState:
    """The state of a network without the channels that do not stay, see :func:`open_gates`."""
    kept, shapes, sizes = _kept(state, groups, stays)
    of_norms = {
        (path.removesuffix("scale") + name, 0): stays
        for (path, _), stays in kept.items() if path.endswith("/scale") for name in ("mean", "var")
    }  # fmt: skip
    statistics = {name: cut_params(tree, of_norms) for name, tree in state.model_state.items()}
    opt_state = cut_state(state.opt_state, state.params, kept, gone_channels(groups, kept, shapes, sizes))
    return state._replace(params=cut_params(state.params, kept), opt_state=opt_state, model_state=statistics)


def _kept(state, groups, stays):
    """The entries of leaves that stay, the shapes of the leaves, and the sizes of the groups."""
    shapes = {path: tuple(leaf.shape) for path, leaf in by_path(state.params).items()}
    log_alpha = jaxsparse.get_log_alpha(state.opt_state)
    sizes = {group.name: len(log_alpha[group.name]) for group in groups}
    shut = {name: np.array([c == "0" for c in stays.get(name, "1" * size)]) for name, size in sizes.items()}
    return kept_entries(groups, shut, shapes), shapes, sizes


class Gain:
    """The cost of pruning in compilation and its gain in speed, from the seconds of the chunks of steps."""

    def __init__(self) -> None:
        self._first: dict[int, float] = {}  # chunks of another length are compiled anew
        self._steady: float | None = None
        self._before: float | None = None

    def pruned(self) -> None:
        """Steps are compiled anew from here on."""
        self._first, self._before, self._steady = {}, self._steady or self._before, None

    def chunk(self, steps: int, seconds: float) -> dict[str, float]:
        """The numbers to log for a chunk: both, once after each pruning, for the first that is not compiled."""
        if steps not in self._first:
            self._first[steps] = seconds
            return {}
        first_time, self._steady = self._steady is None, seconds / steps
        if self._before is None or not first_time:
            return {}
        return {"compile_seconds": self._first[steps] - seconds, "times_faster": self._before / self._steady}
