"""A train step on several devices, by ``jax.jit`` over a mesh: with whole weights, or with a part on each device."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxsparse.parallel.on_device import AXIS, mean_over_devices, split, summed_over_devices
from jaxsparse.parallel.several import SeveralDevices, of_numbers

__all__ = ["DataParallel", "FullySharded"]


@dataclasses.dataclass(frozen=True)
class DataParallel(SeveralDevices):
    """A copy of params, optimizer state and masks on each device, and a step jitted over a mesh.

    Args:
      devices: the devices; None: those of all processes.
    """

    name: ClassVar[str] = "data"

    def sums(self, measure: Callable) -> Callable:
        """The function with its results summed over the devices."""
        return self._shard_map(
            summed_over_devices(measure), in_specs=(PartitionSpec(AXIS), PartitionSpec()), out_specs=PartitionSpec()
        )

    def synchronised(self, model_state: Any) -> Any:
        """The mean of the model state over its axis of devices."""
        return mean_over_devices(model_state)

    def compile(self, function: Callable, static_argnums: Sequence[int] = (), donate: bool = True) -> Callable:
        """Jit a step, with the outgoing state sharded as the incoming one."""

        @functools.wraps(function)
        def constrained(*args):
            state, results = function(*args)
            if state is not None:
                model_state = self._constrain(state.model_state, lambda x: PartitionSpec(AXIS))
                state = self._constrain(state._replace(model_state=()), self._spec)._replace(model_state=model_state)
            return state, self._constrain(results, lambda x: PartitionSpec())

        return jax.jit(constrained, static_argnums=static_argnums, donate_argnums=(0,) if donate else ())

    def place_batch(self, batch: Any) -> Any:
        """Shard this process's share of a batch over its devices."""
        jax.tree.map(lambda x: split(x, self.local_size), batch)  # raises if the parts cannot be equal
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)

    def replicate(self, tree: Any) -> Any:
        """Copy arrays, equal in all processes, to every device."""
        return jax.tree.map(lambda x: self._put(x, PartitionSpec()), tree)

    def _averaged(self, local: Callable) -> Callable:
        def gradients(params, model_state, batch, common):
            specs = jax.tree.map(self._spec, params)

            def on_device(params, model_state, batch, common):
                own = jax.tree.map(lambda x: x[0], model_state)
                grads, own, metrics = local(params, own, batch, common)
                grads = jax.tree.map(self._mean_part, grads, specs)
                return grads, jax.tree.map(lambda x: x[None], own), jax.lax.pmean(metrics, AXIS)

            return self._shard_map(
                on_device,
                in_specs=(PartitionSpec(), PartitionSpec(AXIS), PartitionSpec(AXIS), PartitionSpec()),
                out_specs=(specs, PartitionSpec(AXIS), PartitionSpec()),
            )(params, model_state, batch, common)

        return gradients

    def _shard_map(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        # As in a pmap, each device's gradients are its own until they are averaged here, which may be a scatter.
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def _mean_part(self, grad: jax.Array, spec: PartitionSpec) -> jax.Array:
        """The mean of a gradient over the devices; of a divided leaf, only this device's part of it."""
        if AXIS not in spec:
            return jax.lax.pmean(grad, AXIS)
        return jax.lax.psum_scatter(grad, AXIS, scatter_dimension=spec.index(AXIS), tiled=True) / self.size

    def _constrain(self, tree: Any, spec: Callable[[Any], PartitionSpec]) -> Any:
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec(x))), tree)

    def _put(self, x: Any, spec: PartitionSpec) -> jax.Array:
        """An array that every process has whole, as one array of all of them."""
        sharding = NamedSharding(self.mesh, spec)
        return of_numbers(x, lambda raw: jax.make_array_from_callback(raw.shape, sharding, lambda index: raw[index]))

    def _place_common(self, common: Any) -> Any:
        return jax.tree.map(lambda x: self._put(x, self._spec(x)), common)

    def _place_own(self, own: Any) -> Any:
        return jax.tree.map(lambda x: self._put(x, PartitionSpec(AXIS)), own)

    def _restore_common(self, common: Any) -> Any:
        return common

    def _restore_own(self, own: Any) -> Any:
        return own


@dataclasses.dataclass(frozen=True)
class FullySharded(DataParallel):
    """A part of params, optimizer state and masks on each device, and a step jitted over a mesh.

    Weights are gathered to compute gradients, gradients are scattered, and each device updates its own part.

    Args:
      devices: the devices; None: those of all processes.
      min_size: leaves with fewer entries than this stay whole on every device, int >= 1. So do leaves with no axis that
        the number of devices divides.
    """

    min_size: int = 2**14
    name: ClassVar[str] = "fsdp"

    def _spec(self, leaf: Any) -> PartitionSpec:
        shape = np.shape(leaf)
        divisible = [d for d, length in enumerate(shape) if length % self.size == 0]
        if not divisible or np.prod(shape) < self.min_size:
            return PartitionSpec()
        longest = max(divisible, key=lambda d: (shape[d], d))
        return PartitionSpec(*[None] * longest, AXIS)
