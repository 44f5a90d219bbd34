"""The interface of all layouts."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from jaxsparse.parallel.on_device import AXIS, local_gradients

__all__ = ["DeviceLayout"]


@dataclasses.dataclass(frozen=True)
class DeviceLayout(abc.ABC):
    """The distribution of a train step over devices: the interface of all layouts.

    A *state* below is a NamedTuple whose field ``model_state`` belongs to each device. All other fields are common to
    the devices: ``params``, ``opt_state``, and any others. Gates are common too, so leave out the ``axis_name`` of
    :func:`jaxsparse.l0`, with which each device would sample its own.

    Attributes:
      devices: the devices of all processes; None takes all that there are.
      name: the name of the layout in :data:`LAYOUTS`.
      axis_name: the axis that ``loss_fn`` may reduce over, as for batch normalisation; None on one device.

    Examples:
      >>> from typing import NamedTuple
      >>> import jax, jax.numpy as jnp, optax, jaxsparse
      >>> from jaxsparse.parallel import Pmapped
      >>> class State(NamedTuple):
      ...     params: dict
      ...     opt_state: tuple
      ...     model_state: dict
      >>> tx = jaxsparse.chain(optax.sgd(0.1, momentum=0.9), jaxsparse.sparse_momentum(0.75, update_every=10))
      >>> layout = Pmapped()
      >>> def loss_fn(params, model_state, batch, common):
      ...     inputs, targets = batch
      ...     loss = jnp.mean((inputs @ params["kernel"] - targets) ** 2)
      ...     return loss, (loss, model_state)
      >>> gradients = layout.gradients(loss_fn)
      >>> def train_step(state, batch):
      ...     grads, model_state, loss = gradients(state.params, state.model_state, batch, None)
      ...     updates, opt_state = tx.update(grads, state.opt_state, state.params)
      ...     return State(optax.apply_updates(state.params, updates), opt_state, model_state), loss
      >>> params = {"kernel": jnp.ones((4, 8))}
      >>> opt_state = tx.init(params)
      >>> state = layout.place(State(jaxsparse.sparsify(opt_state, params), opt_state, {}))
      >>> train_step = layout.compile(train_step)
      >>> n = layout.size
      >>> state, loss = train_step(state, layout.place_batch((jnp.ones((2 * n, 4)), jnp.ones((2 * n, 8)))))
      >>> int((layout.collect(state).params["kernel"] != 0).sum())
      8
    """

    devices: Any = None
    name: ClassVar[str]
    axis_name: ClassVar[str | None] = AXIS

    def __post_init__(self):
        object.__setattr__(self, "devices", tuple(jax.devices() if self.devices is None else self.devices))

    @property
    def size(self) -> int:
        """The number of devices in all processes."""
        return len(self.devices)

    @property
    def local_size(self) -> int:
        """The number of devices in this process."""
        return len(self._local_devices)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The devices as a mesh with the single axis :data:`AXIS`."""
        return Mesh(np.array(self.devices), (AXIS,))

    # --- Inside a step ------------------------------------------------------------------------------------------------

    def gradients(self, loss_fn: Callable, accumulate: int = 1) -> Callable:
        """Mean gradients over all devices, for use inside a step that :meth:`compile` compiles.

        Args:
          loss_fn: (params, model_state, batch, common) -> (loss, (metrics, model_state)), for one device: with its own
            model state and its part of the batch.
          accumulate: the number of equal parts into which each device splits its part of the batch, int >= 1. They are
            processed one after another.

        Returns:
          A function (params, model_state, batch, common) -> (gradients, model_state, metrics), where ``common`` is any
          pytree that all devices share. Gradients and metrics are means over the parts and devices; metrics are a
          pytree of scalars.

        Raises:
          ValueError: for ``accumulate`` below 1; and by the returned function, if the batch cannot be split like this.
        """
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {accumulate}")
        return self._averaged(local_gradients(loss_fn, accumulate))

    @abc.abstractmethod
    def sums(self, measure: Callable) -> Callable:
        """Sums over all devices, for use inside a function that :meth:`compile` compiles.

        Args:
          measure: (batch, common) -> a pytree of scalars, for one device's part of the batch.

        Returns:
          A function (batch, common) -> the sums over the devices.
        """

    def share(self, batch: Any) -> Any:
        """This device's part of a batch that every device has computed whole, inside a step.

        Batches from :meth:`place_batch` are already split and do not need this.
        """
        return batch

    @abc.abstractmethod
    def synchronised(self, model_state: Any) -> Any:
        """The mean of the model state over the devices, to evaluate with, inside a step."""

    # --- Around a step ------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def compile(self, function: Callable, static_argnums: Sequence[int] = (), donate: bool = True) -> Callable:
        """Compile a step.

        Args:
          function: ``(state, batch, *others) -> (state or None, results)``. The batch comes from :meth:`place_batch` or
            :meth:`replicate`, or is itself a state; the others are scalars or static.
          static_argnums: the arguments that are static, as for ``jax.jit``.
          donate: whether the buffers of the incoming state are reused for the outgoing one.

        Returns:
          The function for placed states. It returns the results of one device, so these have to be equal on all.
        """

    @abc.abstractmethod
    def place(self, state: Any) -> Any:
        """Put a state of one device, equal in all processes, on the devices."""

    def collect(self, state: Any) -> Any:
        """A placed state as arrays that Orbax can write from all processes together, and that can be inspected.

        Params, optimizer state and masks have their own shapes; ``model_state`` keeps its axis of devices. Nothing is
        copied to the host, and the result may be the placed state itself, whose buffers the next step reuses: to keep
        it, take a ``jax.device_get`` of it.
        """
        return state

    @abc.abstractmethod
    def restore(self, state: Any) -> Any:
        """Place a collected state again.

        If it was collected from another number of devices, each device gets the mean of the model states.
        """

    @abc.abstractmethod
    def collected_shapes(self, state: Any, devices: int | None = None) -> Any:
        """Shapes, dtypes and shardings of a collected state, to restore a checkpoint with.

        Args:
          state: shapes and dtypes of the state of one device, from ``jax.eval_shape``.
          devices: the number of devices that it was collected from; None: as many as this layout has.
        """

    @abc.abstractmethod
    def one_copy(self, state: Any) -> Any:
        """A placed state as arrays on one device of this process, with the mean of the model states.

        Meant for evaluation, plots and files. All processes have to call it together.
        """

    @abc.abstractmethod
    def place_batch(self, batch: Any) -> Any:
        """Put this process's share of a batch, arrays with the examples along their first axis, on its devices.

        Raises:
          ValueError: if it cannot be split equally among the devices of the process.
        """

    @abc.abstractmethod
    def replicate(self, tree: Any) -> Any:
        """Put arrays, equal in all processes, whole on every device; for instance a small data set."""

    # --- How ----------------------------------------------------------------------------------------------------------

    @property
    def _local_devices(self) -> list[jax.Device]:
        return [device for device in self.devices if device.process_index == jax.process_index()]

    @abc.abstractmethod
    def _averaged(self, local: Callable) -> Callable:
        """The mean over the devices of a function that computes the gradients of one of them."""
