"""A train step on one device, by ``jax.jit``."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax

from jaxsparse.parallel.base import DeviceLayout

__all__ = ["OneDevice"]


@dataclasses.dataclass(frozen=True)
class OneDevice(DeviceLayout):
    """Everything on one device: a step is jitted, and the model state has no axis of devices.

    Args:
      devices: the one device, in a list; None: the first.

    Raises:
      ValueError: for several devices or processes.
    """

    name: ClassVar[str] = "one_device"
    axis_name: ClassVar[str | None] = None

    def __post_init__(self):
        if self.devices is None:
            object.__setattr__(self, "devices", jax.devices()[:1])
        super().__post_init__()
        if self.size != 1 or jax.process_count() > 1:
            raise ValueError(
                f"the layout 'one_device' is for one device and process, got {self.size} and {jax.process_count()}; "
                "'pmap', 'data' and 'fsdp' are for more"
            )

    def sums(self, measure: Callable) -> Callable:
        """The function itself."""
        return measure

    def synchronised(self, model_state: Any) -> Any:
        """The model state itself."""
        return model_state

    def compile(self, function: Callable, static_argnums: Sequence[int] = (), donate: bool = True) -> Callable:
        """Jit a step."""
        return jax.jit(function, static_argnums=static_argnums, donate_argnums=(0,) if donate else ())

    def place(self, state: Any) -> Any:
        """Copy a state to the device: a step reuses the buffers of the state that it gets."""
        return jax.device_put(state, self.devices[0], may_alias=False)

    def restore(self, state: Any) -> Any:
        """The collected state itself."""
        return state

    def collected_shapes(self, state: Any, devices: int | None = None) -> Any:
        """The shapes and dtypes as they are."""
        return state

    def one_copy(self, state: Any) -> Any:
        """The placed state itself."""
        return state

    def place_batch(self, batch: Any) -> Any:
        """Put a batch on the device."""
        return jax.device_put(batch, self.devices[0])

    def replicate(self, tree: Any) -> Any:
        """Put arrays on the device."""
        return jax.device_put(tree, self.devices[0])

    def _averaged(self, local: Callable) -> Callable:
        return local
