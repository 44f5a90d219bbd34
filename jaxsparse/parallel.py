"""One train step, run on one device, pmapped, or over a mesh of devices, in one process or in many.

A :class:`Layout` says how devices share a step. The step itself is written once: the gradient of each device's part of
the batch (:meth:`Layout.gradients`), then the optimizer, which sees the mean over all devices and so decides the same
on all of them. Masks are bit-equal in every layout if params, momentum and gradients are.

================  ==========================================  ===================================================
layout            params, optimizer state, masks              how
================  ==========================================  ===================================================
``"one_device"``  on one device                               ``jax.jit``
``"pmap"``        a copy on each device, leading axis         ``jax.pmap`` with a donated, replicated state
``"data"``        a copy on each device                       ``jax.jit`` over a mesh, gradients in ``shard_map``
``"fsdp"``        a part on each device                       likewise; weights are gathered for a step and
                                                              gradients scattered, the update is of the parts
================  ==========================================  ===================================================

Batch statistics, and what else a model keeps in its state, are each device's own, with a leading axis for the devices
(none for ``"one_device"``); :meth:`Layout.synchronised` takes their mean for evaluation.

Several hosts: call ``jax.distributed.initialize()`` first, in every process. Layouts are then of the devices of all
processes, each process gives its share of the batch, and all call the same functions in the same order.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

__all__ = ["AXIS", "LAYOUTS", "ElsewhereError", "Layout", "any_process", "of_processes", "together"]

AXIS = "devices"
LAYOUTS = ("one_device", "pmap", "data", "fsdp")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How devices share a train step.

    A *state* below is a NamedTuple whose field ``model_state`` is each device's own; all other fields are common to the
    devices: ``params``, ``opt_state``, and what else there is. (So no gates that each device samples for itself: leave
    out the ``axis_name`` of :func:`jaxsparse.l0` here.)

    Args:
      name: one of :data:`LAYOUTS`.
      devices: the devices, int >= 1 of them; None: all of all processes, or for "one_device" the first.
      min_size: in "fsdp", leaves of fewer entries than this stay whole on every device, int >= 1.

    Raises:
      ValueError: for an unknown name, or for "one_device" with several devices or processes.

    Examples:
      >>> from typing import NamedTuple
      >>> import jax, jax.numpy as jnp, optax, jaxsparse
      >>> from jaxsparse.parallel import Layout
      >>> class State(NamedTuple):
      ...     params: dict
      ...     opt_state: tuple
      ...     model_state: dict
      >>> tx = jaxsparse.chain(optax.sgd(0.1, momentum=0.9), jaxsparse.sparse_momentum(0.75, update_every=10))
      >>> layout = Layout("pmap")
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

    name: str = "one_device"
    devices: Any = None
    min_size: int = 2**14

    def __post_init__(self):
        if self.name not in LAYOUTS:
            raise ValueError(f"a layout is one of {', '.join(map(repr, LAYOUTS))}, got {self.name!r}")
        if self.devices is None:
            everywhere = jax.devices()
            object.__setattr__(self, "devices", everywhere[:1] if self.name == "one_device" else everywhere)
        object.__setattr__(self, "devices", tuple(self.devices))
        if self.name == "one_device" and (self.size != 1 or jax.process_count() > 1):
            raise ValueError(
                f"the layout 'one_device' is for one device and process, got {self.size} and {jax.process_count()}; "
                "'pmap', 'data' and 'fsdp' are for more"
            )

    @property
    def size(self) -> int:
        """The number of devices, of all processes."""
        return len(self.devices)

    @property
    def local_size(self) -> int:
        """The number of devices of this process."""
        return len(self._local_devices)

    @property
    def axis_name(self) -> str | None:
        """The axis that ``loss_fn`` may reduce over, for instance in batch normalisation; None on one device."""
        return None if self.name == "one_device" else AXIS

    # --- Inside a step ------------------------------------------------------------------------------------------------

    def gradients(self, loss_fn: Callable, accumulate: int = 1) -> Callable:
        """The mean gradient over all devices, for use inside a step that :meth:`compile` compiles.

        Args:
          loss_fn: (params, model_state, batch, common) -> (loss, (metrics, model_state)), for one device: with its own
            model state and its part of the batch.
          accumulate: the device's part of the batch is taken in so many equal parts, one after another, int >= 1.

        Returns:
          A function (params, model_state, batch, common) -> (gradients, model_state, metrics), where ``common`` is any
          pytree that all devices share. Gradients and metrics are means over the parts and devices; metrics are a
          pytree of scalars.

        Raises:
          ValueError: by the function, if the batch cannot be split so.
        """
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {accumulate}")

        def local(params, model_state, batch, common):
            def part(model_state, batch):
                (_, (metrics, model_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                    params, model_state, batch, common
                )
                return model_state, (grads, metrics)

            if accumulate == 1:
                model_state, means = part(model_state, batch)
                return model_state, means

            def body(carry, batch):
                model_state, sums = carry
                model_state, one = part(model_state, batch)
                return (model_state, jax.tree.map(jnp.add, sums, one)), None

            parts = jax.tree.map(lambda x: _split(x, accumulate), batch)
            shapes = jax.eval_shape(part, model_state, jax.tree.map(lambda x: x[0], parts))[1]
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (model_state, sums), _ = jax.lax.scan(body, (model_state, zeros), parts)
            return model_state, jax.tree.map(lambda x: x / accumulate, sums)

        def gradients(params, model_state, batch, common):
            if self.name == "one_device":
                model_state, (grads, metrics) = local(params, model_state, batch, common)
                return grads, model_state, metrics
            if self.name == "pmap":
                model_state, means = local(params, model_state, batch, common)
                grads, metrics = jax.lax.pmean(means, AXIS)
                return grads, model_state, metrics
            specs = jax.tree.map(self._spec, params)

            def on_device(params, model_state, batch, common):
                model_state, (grads, metrics) = local(params, _first(model_state), batch, common)
                grads = jax.tree.map(self._mean_part, grads, specs)
                return grads, jax.tree.map(lambda x: x[None], model_state), jax.lax.pmean(metrics, AXIS)

            return self._shard_map(
                on_device,
                in_specs=(PartitionSpec(), PartitionSpec(AXIS), PartitionSpec(AXIS), PartitionSpec()),
                out_specs=(specs, PartitionSpec(AXIS), PartitionSpec()),
            )(params, model_state, batch, common)

        return gradients

    def sums(self, measure: Callable) -> Callable:
        """Sums over all devices, for use inside a function that :meth:`compile` compiles.

        Args:
          measure: (batch, common) -> a pytree of scalars, for one device's part of the batch.

        Returns:
          A function (batch, common) -> the sums over the devices.
        """
        if self.name == "one_device":
            return measure

        def on_device(batch, common):
            return jax.lax.psum(measure(batch, common), AXIS)

        if self.name == "pmap":
            return on_device
        return self._shard_map(
            on_device, in_specs=(PartitionSpec(AXIS), PartitionSpec()), out_specs=PartitionSpec()
        )  # fmt: skip

    def share(self, batch: Any) -> Any:
        """This device's part of a batch that every device has made for itself, inside a step.

        For batches that :meth:`place_batch` has placed there is nothing to do.
        """
        if self.name != "pmap":
            return batch  # shard_map hands out the parts
        return jax.tree.map(lambda x: _split(x, self.size)[jax.lax.axis_index(AXIS)], batch)

    def synchronised(self, model_state: Any) -> Any:
        """The mean of a model state over the devices, inside a step: what to evaluate with."""
        if self.name == "one_device":
            return model_state
        if self.name == "pmap":
            return jax.lax.pmean(model_state, AXIS)
        return _mean(model_state)

    # --- Around a step ------------------------------------------------------------------------------------------------

    def compile(self, function: Callable, static_argnums: Sequence[int] = (), donate: bool = True) -> Callable:
        """Compiles a step.

        Args:
          function: ``(state, batch, *others) -> (state or None, results)``. The batch comes from :meth:`place_batch` or
            :meth:`replicate`, or is itself a state; others are scalars, or what is static.
          static_argnums: which arguments are part of the program, as for ``jax.jit``.
          donate: whether the state that comes in is given up for that which goes out.

        Returns:
          The function for placed states. Results are of one device: they have to be alike on all.
        """
        donated = (0,) if donate else ()
        if self.name == "one_device":
            return jax.jit(function, static_argnums=static_argnums, donate_argnums=donated)
        if self.name == "pmap":
            return self._pmapped(function, static_argnums, donated)

        @functools.wraps(function)
        def constrained(*args):
            state, results = function(*args)
            if state is not None:
                model_state = self._constrain(state.model_state, lambda x: PartitionSpec(AXIS))
                state = self._constrain(state._replace(model_state=()), self._spec)._replace(model_state=model_state)
            return state, self._constrain(results, lambda x: PartitionSpec())

        return jax.jit(constrained, static_argnums=static_argnums, donate_argnums=donated)

    def place(self, state: Any) -> Any:
        """A state of one device, equal in all processes, on the devices."""
        if self.name == "one_device":  # a copy: a step gives up what it is given
            return jax.device_put(state, self.devices[0], may_alias=False)
        common = state._replace(model_state=())
        if self.name == "pmap":
            common = self.replicate(common)
        else:
            common = jax.tree.map(lambda x: self._put(x, self._spec(x)), common)
        return common._replace(model_state=self._spread(state.model_state))

    def collect(self, state: Any) -> Any:
        """A placed state as arrays that Orbax can write from all processes together, and that anyone can look at.

        Params, optimizer state and masks have their own shapes; ``model_state`` keeps its axis of devices. Nothing is
        copied to the host, and it may be the state itself, which the next step is given up for: keep a
        ``jax.device_get`` of it.
        """
        if self.name != "pmap":
            return state
        own = jax.tree.map(lambda x: self._joined(x, split=True), state.model_state)
        common = jax.tree.map(lambda x: self._joined(x, split=False), state._replace(model_state=()))
        return common._replace(model_state=own)

    def restore(self, state: Any) -> Any:
        """What :meth:`collect` has made, placed again.

        A model state of another number of devices is replaced by its mean.
        """
        if self.name == "one_device":
            return state
        common, own = state._replace(model_state=()), state.model_state
        if self.name == "pmap":
            common = self.replicate(common)
        if any(len(x) != self.size for x in jax.tree.leaves(own)):
            own = self._spread(_mean(jax.tree.map(np.asarray, own)))
        elif self.name == "pmap":
            own = jax.tree.map(self._parted, own)
        return common._replace(model_state=own)

    def collected_shapes(self, state: Any, devices: int | None = None) -> Any:
        """Shapes, dtypes and shardings of what :meth:`collect` gives, to restore a checkpoint with.

        Args:
          state: shapes and dtypes of the state of one device, from ``jax.eval_shape``.
          devices: the number of devices that it was collected from; None: those of this layout.
        """
        if self.name == "one_device":
            return state
        devices = self.size if devices is None else devices
        common = state._replace(model_state=())
        spec = self._spec if self.name == "fsdp" else lambda x: PartitionSpec()
        common = jax.tree.map(lambda x: _with_sharding(x, NamedSharding(self.mesh, spec(x))), common)
        by_device = NamedSharding(self.mesh, PartitionSpec(AXIS) if devices == self.size else PartitionSpec())
        own = jax.tree.map(lambda x: _with_sharding(x, by_device, (devices, *x.shape)), state.model_state)
        return common._replace(model_state=own)

    def one_copy(self, state: Any) -> Any:
        """A placed state as arrays of one device of this process, the model state :meth:`synchronised`.

        To evaluate, draw and write files with. All processes have to call this. On one device it is the state itself.
        """
        if self.name == "one_device":
            return state

        def whole(state):
            return state._replace(model_state=_mean(state.model_state))

        gathered = jax.jit(whole, out_shardings=NamedSharding(self.mesh, PartitionSpec()))(self.collect(state))
        return jax.tree.map(lambda x: _raw(x, lambda raw: raw.addressable_shards[0].data, on_host=False), gathered)

    def place_batch(self, batch: Any) -> Any:
        """This process's share of a batch, arrays whose first axis are examples, on its devices.

        Raises:
          ValueError: if the devices of the process cannot have equal parts.
        """
        if self.name == "one_device":
            return jax.device_put(batch, self.devices[0])
        if self.name == "pmap":
            return jax.device_put(jax.tree.map(lambda x: _split(x, self.local_size), batch), self._by_device)
        jax.tree.map(lambda x: _split(x, self.local_size), batch)
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)

    def replicate(self, tree: Any) -> Any:
        """Arrays, equal in all processes, on every device: what all devices read whole, such as a small data set."""
        if self.name == "one_device":
            return jax.device_put(tree, self.devices[0])
        if self.name == "pmap":
            return jax.tree.map(
                lambda x: _raw(
                    x, lambda raw: jax.device_put(np.broadcast_to(raw, (self.local_size, *raw.shape)), self._by_device)
                ),
                tree,
            )
        return jax.tree.map(lambda x: self._put(x, PartitionSpec()), tree)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The devices as a mesh with the one axis :data:`AXIS`."""
        return Mesh(np.array(self.devices), (AXIS,))

    # --- How ----------------------------------------------------------------------------------------------------------

    @property
    def _local_devices(self) -> list[jax.Device]:
        return [device for device in self.devices if device.process_index == jax.process_index()]

    @functools.cached_property
    def _by_device(self) -> NamedSharding:
        """Of the arrays of a pmapped function: the first axis are the devices of this process."""
        return NamedSharding(Mesh(np.array(self._local_devices), (AXIS,)), PartitionSpec(AXIS))

    def _shard_map(self, function, in_specs, out_specs):
        # As in a pmap, each device's gradients are its own until they are averaged here, which may be a scatter.
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def _spec(self, leaf: Any) -> PartitionSpec:
        """How a leaf that is common to the devices lies on them. By its shape alone: a mask lies as its weights do."""
        shape = np.shape(leaf)
        divisible = [d for d, length in enumerate(shape) if length % self.size == 0]
        if self.name != "fsdp" or not divisible or np.prod(shape) < self.min_size:
            return PartitionSpec()
        longest = max(divisible, key=lambda d: (shape[d], d))
        return PartitionSpec(*[None] * longest, AXIS)

    def _mean_part(self, grad: jax.Array, spec: PartitionSpec) -> jax.Array:
        """The mean of a gradient over the devices: of this device's part of the leaf."""
        if AXIS not in spec:
            return jax.lax.pmean(grad, AXIS)
        return jax.lax.psum_scatter(grad, AXIS, scatter_dimension=spec.index(AXIS), tiled=True) / self.size

    def _constrain(self, tree, spec):
        return jax.tree.map(
            lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec(x))), tree
        )  # fmt: skip

    def _pmapped(self, function, static_argnums, donated):
        # jax.pmap wants to know how many arguments there are: one program for each number, made when it is called.
        @functools.cache
        def program(arguments):
            return jax.pmap(
                function,
                axis_name=AXIS,
                in_axes=(0, 0, *[None] * (arguments - 2))[:arguments],
                static_broadcasted_argnums=static_argnums,
                donate_argnums=donated,
                devices=None if self.devices == tuple(jax.devices()) else self.devices,
            )

        @functools.wraps(function)
        def pmapped(*args):
            state, results = program(len(args))(*args)
            return state, jax.tree.map(_first_replica, results)

        like_jitted: Any = pmapped
        like_jitted.lower = lambda *args: program(len(args)).lower(*args)
        return like_jitted

    def _spread(self, own):
        """A model state of one device, on each."""
        spread = jax.tree.map(lambda x: np.broadcast_to(x, (self.size, *np.shape(x))), jax.device_get(own))
        if self.name == "pmap":
            local = jax.tree.map(lambda x: x[: self.local_size], spread)
            return jax.device_put(local, self._by_device)
        return jax.tree.map(lambda x: self._put(x, PartitionSpec(AXIS)), spread)

    def _put(self, x, spec):
        """An array that every process has whole, as one array of all of them."""
        sharding = NamedSharding(self.mesh, spec)
        return _raw(x, lambda raw: jax.make_array_from_callback(raw.shape, sharding, lambda index: raw[index]))

    def _joined(self, x, split):
        """A pmapped array as one of all processes: with their axis of devices, or without, a copy on each."""

        def joined(x):
            shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
            parts = [shard.data if split else shard.data.reshape(x.shape[1:]) for shard in shards]
            shape = (self.size, *x.shape[1:]) if split else x.shape[1:]
            sharding = NamedSharding(self.mesh, PartitionSpec(AXIS) if split else PartitionSpec())
            return jax.make_array_from_single_device_arrays(shape, sharding, parts)

        return _raw(x, joined, on_host=False)

    def _parted(self, x):
        """The other way: an array of all processes with an axis of devices as a pmapped one of this process."""
        parts = [shard.data for shard in sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)]
        return jax.make_array_from_single_device_arrays((self.local_size, *x.shape[1:]), self._by_device, parts)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process. All have to call this; where there is one, it costs nothing."""
    return bool(of_processes(flag).any())


def of_processes(number: float) -> np.ndarray:
    """The numbers of all processes, (processes,). All have to call this."""
    if jax.process_count() == 1:
        return np.asarray([number])
    return np.asarray(multihost_utils.process_allgather(np.asarray(number)))


@contextmanager
def together() -> Iterator[None]:
    """What fails in one process fails in all: those where it did not raise a :class:`ElsewhereError` at the end."""
    try:
        yield
    except Exception:
        any_process(True)
        raise
    if any_process(False):
        raise ElsewhereError("another process could not begin; it says why")


class ElsewhereError(RuntimeError):
    """Something went wrong in another process."""


def _split(x: Any, parts: int) -> Any:
    if x.shape[0] % parts:
        raise ValueError(f"{x.shape[0]} examples cannot be split into {parts} equal parts")
    return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)


def _mean(tree: Any) -> Any:
    """Over the axis of devices."""
    return jax.tree.map(lambda x: x.mean(0, dtype=x.dtype), tree)


def _first_replica(x: jax.Array) -> jax.Array:
    return x.addressable_shards[0].data.reshape(x.shape[1:])  # x[0] is many times slower


def _raw(x: Any, function: Callable, on_host: bool = True) -> Any:
    """The function of an array, or of the numbers in a typed PRNG key."""
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = jax.random.key_data(x)
        return jax.random.wrap_key_data(function(np.asarray(data) if on_host else data), impl=jax.random.key_impl(x))
    return function(np.asarray(x) if on_host else x)


def _with_sharding(x: Any, sharding: NamedSharding, shape: tuple[int, ...] | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape if shape is None else shape, x.dtype, sharding=sharding)
