"""The parts that layouts of several devices share: a common state, and a model state on each device."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxsparse.parallel.base import DeviceLayout
from jaxsparse.parallel.on_device import AXIS, mean_over_devices
from jaxsparse.trees import by_path, is_key

__all__ = ["SeveralDevices", "of_numbers"]


@dataclasses.dataclass(frozen=True)
class SeveralDevices(DeviceLayout):
    """A layout in which the model state has a leading axis of devices, and all other fields are common to them."""

    def place(self, state: Any) -> Any:
        """Put a state of one device on all of them, with a copy of the model state on each.

        Raises:
          ValueError: for a model state with PRNG keys, which have no mean, naming the leaf.
        """
        keys = [path for path, leaf in by_path(state.model_state).items() if is_key(leaf)]
        if keys:
            raise ValueError(
                f"{keys[0]} of the model state is a PRNG key: every device has a model state of its own, and what "
                "is left of them is their mean. Keep keys, which have no mean, in another field of the state"
            )
        common = self._place_common(state._replace(model_state=()))
        return common._replace(model_state=self._copies(state.model_state))

    def restore(self, state: Any) -> Any:
        """Place a collected state again, with the mean of the model states if it is from another number of devices."""
        common, own = self._restore_common(state._replace(model_state=())), state.model_state
        if any(len(x) != self.size for x in jax.tree.leaves(own)):
            return common._replace(model_state=self._copies(mean_over_devices(jax.tree.map(np.asarray, own))))
        return common._replace(model_state=self._restore_own(own))

    def collected_shapes(self, state: Any, devices: int | None = None) -> Any:
        """Shapes, dtypes and shardings of a state collected from this many devices."""
        devices = self.size if devices is None else devices
        common = jax.tree.map(
            lambda x: _with_sharding(x, NamedSharding(self.mesh, self._spec(x))), state._replace(model_state=())
        )
        by_device = NamedSharding(self.mesh, PartitionSpec(AXIS) if devices == self.size else PartitionSpec())
        own = jax.tree.map(lambda x: _with_sharding(x, by_device, (devices, *x.shape)), state.model_state)
        return common._replace(model_state=own)

    def one_copy(self, state: Any) -> Any:
        """A placed state, gathered and copied to one device of this process, with the mean of the model states."""

        def whole(state):
            return state._replace(model_state=mean_over_devices(state.model_state))

        gathered = jax.jit(whole, out_shardings=NamedSharding(self.mesh, PartitionSpec()))(self.collect(state))
        return jax.tree.map(
            lambda x: of_numbers(x, lambda raw: raw.addressable_shards[0].data, on_host=False), gathered
        )

    def _spec(self, leaf: Any) -> PartitionSpec:
        """The sharding of a common leaf. It depends on the shape alone, so a mask lies as its weights do."""
        del leaf
        return PartitionSpec()

    def _copies(self, own: Any) -> Any:
        """A copy of one device's model state on each device."""
        return self._place_own(
            jax.tree.map(lambda x: np.broadcast_to(x, (self.size, *np.shape(x))), jax.device_get(own))
        )

    @abc.abstractmethod
    def _place_common(self, common: Any) -> Any:
        """Put the common part of a state on the devices."""

    @abc.abstractmethod
    def _place_own(self, own: Any) -> Any:
        """Give each device its entry of arrays on the host that have a leading axis of devices."""

    @abc.abstractmethod
    def _restore_common(self, common: Any) -> Any:
        """Place the common part of a collected state again."""

    @abc.abstractmethod
    def _restore_own(self, own: Any) -> Any:
        """Place the model states of a state again that was collected from as many devices."""


def of_numbers(x: Any, function: Callable, on_host: bool = True) -> Any:
    """Apply a function to an array, or to the numbers inside a typed PRNG key."""
    if is_key(x):
        data = jax.random.key_data(x)
        return jax.random.wrap_key_data(function(np.asarray(data) if on_host else data), impl=jax.random.key_impl(x))
    return function(np.asarray(x) if on_host else x)


def _with_sharding(x: Any, sharding: NamedSharding, shape: tuple[int, ...] | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape if shape is None else shape, x.dtype, sharding=sharding)
