"""One train step, run on one device, pmapped, or over a mesh of devices, in one process or in several.

A :class:`DeviceLayout` defines how devices share a step. The step itself is written once: the gradients of each
device's part of the batch (:meth:`DeviceLayout.gradients`), then the optimizer, which gets their mean over all devices
and therefore decides the same on each of them. If params, momentum and gradients are bit-equal, so are the masks, in
every layout.

================  =====================  ============================  =================================================
name              class                  params, opt. state, masks     how the step runs
================  =====================  ============================  =================================================
``"one_device"``  :class:`OneDevice`     on one device                 ``jax.jit``
``"pmap"``        :class:`Pmapped`       a copy on each device, with   ``jax.pmap`` with a donated, replicated state
                                         a leading axis
``"data"``        :class:`DataParallel`  a copy on each device         ``jax.jit`` over a mesh, gradients in
                                                                       ``shard_map``
``"fsdp"``        :class:`FullySharded`  a part on each device         as ``"data"``, but weights are gathered for the
                                                                       gradients, which are scattered; each device
                                                                       updates its own part
================  =====================  ============================  =================================================

Batch statistics, and whatever else a model keeps in its state, belong to each device and have a leading axis of devices
(none on one device). :meth:`DeviceLayout.synchronised` averages them for evaluation.

On several hosts, call ``jax.distributed.initialize()`` first, in every process. A layout then covers the devices of all
processes, each process passes its share of the batch, and all call the same functions in the same order.
"""

from collections.abc import Sequence

import jax

from jaxsparse.parallel.base import DeviceLayout
from jaxsparse.parallel.mesh import DataParallel, FullySharded
from jaxsparse.parallel.on_device import AXIS
from jaxsparse.parallel.one_device import OneDevice
from jaxsparse.parallel.pmapped import Pmapped
from jaxsparse.parallel.processes import ElsewhereError, any_process, of_processes, together

__all__ = [
    "AXIS", "LAYOUTS", "DataParallel", "DeviceLayout", "ElsewhereError", "FullySharded", "OneDevice", "Pmapped",
    "any_process", "device_layout", "of_processes", "together",
]  # fmt: skip

_CLASSES: dict[str, type[DeviceLayout]] = {
    layout.name: layout for layout in (OneDevice, Pmapped, DataParallel, FullySharded)
}
LAYOUTS = tuple(_CLASSES)


def device_layout(name: str, devices: Sequence[jax.Device] | None = None, min_size: int = 2**14) -> DeviceLayout:
    """Make the layout of a given name, as a config has it.

    Args:
      name: one of :data:`LAYOUTS`.
      devices: the devices, at least one; None: those of all processes, or for "one_device" the first.
      min_size: for "fsdp", see :class:`FullySharded`; the other layouts keep every leaf whole.

    Raises:
      ValueError: for an unknown name, or for "one_device" with several devices or processes.

    Examples:
      >>> device_layout("data").name
      'data'
    """
    if name not in LAYOUTS:
        raise ValueError(f"a layout is one of {', '.join(map(repr, LAYOUTS))}, got {name!r}")
    layout = _CLASSES[name]
    return layout(devices, min_size=min_size) if issubclass(layout, FullySharded) else layout(devices)
