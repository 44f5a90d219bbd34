"""A train step on several devices, by ``jax.pmap``."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsparse.parallel.on_device import AXIS, split, summed_over_devices
from jaxsparse.parallel.several import SeveralDevices, of_numbers

__all__ = ["Pmapped"]


@dataclasses.dataclass(frozen=True)
class Pmapped(SeveralDevices):
    """A copy of the whole state on each device, with a leading axis of devices, and a pmapped step.

    Args:
      devices: the devices; None: those of all processes.
    """

    name: ClassVar[str] = "pmap"

    def sums(self, measure: Callable) -> Callable:
        """The function with its results summed over the devices."""
        return summed_over_devices(measure)

    def share(self, batch: Any) -> Any:
        """This device's part of a batch that every device has computed whole, inside a step."""
        return jax.tree.map(lambda x: split(x, self.size)[jax.lax.axis_index(AXIS)], batch)

    def synchronised(self, model_state: Any) -> Any:
        """The mean of the model state over the devices, inside a step, in its dtypes; of bools the first device's."""

        def mean(x):
            return jax.lax.all_gather(x, AXIS)[0] if x.dtype == bool else jax.lax.pmean(x, AXIS).astype(x.dtype)

        return jax.tree.map(mean, model_state)

    def compile(self, function: Callable, static_argnums: Sequence[int] = (), donate: bool = True) -> Callable:
        """Pmap a step; state and batch have an axis of devices, the other arguments do not."""

        # jax.pmap needs the number of arguments: one program for each number, made when it is first called.
        @functools.cache
        def program(arguments):
            return jax.pmap(
                function,
                axis_name=AXIS,
                in_axes=(0, 0, *[None] * (arguments - 2))[:arguments],
                static_broadcasted_argnums=static_argnums,
                donate_argnums=(0,) if donate else (),
                devices=None if self.devices == tuple(jax.devices()) else self.devices,
            )

        @functools.wraps(function)
        def pmapped(*args):
            state, results = program(len(args))(*args)
            return state, jax.tree.map(_first_replica, results)

        like_jitted: Any = pmapped
        like_jitted.lower = lambda *args: program(len(args)).lower(*args)
        return like_jitted

    def collect(self, state: Any) -> Any:
        """A placed state as arrays of all processes: without the axis of devices, which only ``model_state`` keeps."""
        own = jax.tree.map(lambda x: self._joined(x, by_device=True), state.model_state)
        common = jax.tree.map(lambda x: self._joined(x, by_device=False), state._replace(model_state=()))
        return common._replace(model_state=own)

    def place_batch(self, batch: Any) -> Any:
        """Split this process's share of a batch among its devices, along a new leading axis."""
        return jax.device_put(jax.tree.map(lambda x: split(x, self.local_size), batch), self._by_device)

    def replicate(self, tree: Any) -> Any:
        """Copy arrays, equal in all processes, to every device, along a new leading axis."""

        def copies(raw):
            return jax.device_put(np.broadcast_to(raw, (self.local_size, *raw.shape)), self._by_device)

        return jax.tree.map(lambda x: of_numbers(x, copies), tree)

    @functools.cached_property
    def _by_device(self) -> NamedSharding:
        """The sharding of a pmapped function's arrays: this process's devices along the first axis."""
        return NamedSharding(Mesh(np.array(self._local_devices), (AXIS,)), PartitionSpec(AXIS))

    def _averaged(self, local: Callable) -> Callable:
        def gradients(params, model_state, batch, common):
            grads, model_state, metrics = local(params, model_state, batch, common)
            grads, metrics = jax.lax.pmean((grads, metrics), AXIS)
            return grads, model_state, metrics

        return gradients

    def _place_common(self, common: Any) -> Any:
        return self.replicate(common)

    def _place_own(self, own: Any) -> Any:
        return jax.device_put(jax.tree.map(lambda x: x[: self.local_size], own), self._by_device)

    def _restore_common(self, common: Any) -> Any:
        return self.replicate(common)

    def _restore_own(self, own: Any) -> Any:
        return jax.tree.map(self._parted, own)

    def _joined(self, x: Any, by_device: bool) -> Any:
        """A pmapped array as one of all processes: with an axis of all devices, or without it, a copy on each."""

        def joined(x):
            parts = [shard if by_device else shard.reshape(x.shape[1:]) for shard in _shards(x)]
            shape = (self.size, *x.shape[1:]) if by_device else x.shape[1:]
            sharding = NamedSharding(self.mesh, PartitionSpec(AXIS) if by_device else PartitionSpec())
            return jax.make_array_from_single_device_arrays(shape, sharding, parts)

        return of_numbers(x, joined, on_host=False)

    def _parted(self, x: jax.Array) -> jax.Array:
        """An array of all processes with an axis of devices as a pmapped array of this process."""
        return jax.make_array_from_single_device_arrays((self.local_size, *x.shape[1:]), self._by_device, _shards(x))


def _shards(x: jax.Array) -> list[jax.Array]:
    """This process's shards of an array with an axis of devices, in their order."""
    return [shard.data for shard in sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)]


def _first_replica(x: jax.Array) -> jax.Array:
    return x.addressable_shards[0].data.reshape(x.shape[1:])  # x[0] is many times slower
