"""How fast a run trains, to log."""

from collections.abc import Callable

from ml_collections import ConfigDict

from experiments.program import Program, TrainState
from jaxsparse.trees import by_path

# Of one device, in operations a second with 16-bit floats, as their makers give them.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def speedometer(config: ConfigDict, program: Program, shapes: TrainState) -> Callable[..., dict[str, float]]:
    """A function of steps, the seconds they took, and those of them spent waiting for images, to log.

    It gives images or tokens a second, milliseconds of a step on the devices, the share of the time that was spent
    waiting, and where the devices' peak is known, the model FLOPs utilisation: forward and backward pass of the dense
    network.
    """
    kind, layout = program.layout.devices[0].device_kind, program.layout
    unit, of_an_input = program.task.unit
    peak = next((peak for name, peak in PEAKS.items() if kind.startswith(name)), None)
    if peak is not None:
        places = program.positions()
        sizes = {path: leaf.size for path, leaf in by_path(shapes.params).items()}
        operations = 6 * sum(places[path] * sizes[path] for path in places)  # multiply and add; forward, and twice back

    def speed(steps, seconds, waited):
        inputs = steps * config.data.batch_size / seconds
        share = {} if peak is None else {"share_of_peak": operations * inputs / (peak * layout.size)}
        return {
            f"{unit}_per_second": inputs * of_an_input,
            "step_milliseconds": 1000 * (seconds - waited) / steps,
            "input_wait": waited / seconds,
            **share,
        }

    return speed
