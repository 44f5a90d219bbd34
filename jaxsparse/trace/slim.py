"""Smaller networks for good: any function without its closed channels."""

import dataclasses
import difflib
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.groups import Group, Slice, entries, group_sizes
from jaxsparse.tables import Table, Tabular
from jaxsparse.trace.analysis import Analysis
from jaxsparse.trace.channels import ChannelGroups, channel_groups
from jaxsparse.trace.program import Traced, is_array, trace
from jaxsparse.trace.shrink import Shrunk, living_nodes
from jaxsparse.trace.states import Kept, cut_params, cut_state, gone_channels
from jaxsparse.trace.widths import rounded
from jaxsparse.trees import by_path, leaf_paths, listed, natural_order

__all__ = ["Slim", "SlimApply", "closed_channels", "slim"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SlimApply:
    """A function without its closed channels: ``small(small params, *args)``, for args of any shapes.

    It traces the function that it was made of at every call, so jit it. Under ``jax.jit``, gradients, ``jax.vmap`` and
    ``jax.export`` it is an ordinary function of arrays.

    Attributes:
      apply: the function as it was.
      full: the shapes of its params, by path.
      kept: (path, axis) -> which entries stay, (n,), bool; for the axes that lose some.
    """

    apply: Callable[..., Any]
    full: Mapping[str, tuple[int, ...]]
    kept: Kept

    def __repr__(self) -> str:  # jit asks for it, and arrays take a second to print
        return f"<slim {getattr(self.apply, '__name__', self.apply)}>"

    def __call__(self, params: Any, *args: Any) -> Any:
        """The outputs of the function with the small params."""
        traced, analysis, alive = self.analysed(params, *args)
        arrays = [
            jnp.asarray(leaf) if isinstance(leaf, np.ndarray | np.generic) else leaf  # in the dtype of the program
            for leaf in jax.tree.leaves((params, args))
            if is_array(leaf)
        ]
        return traced.rebuild(Shrunk(analysis, alive).run(traced.closed, arrays, analysis.root))

    def analysed(self, params: Any, *args: Any) -> tuple[Traced, Analysis, np.ndarray]:
        """The program at full shapes, its analysis, and which nodes of it live.

        Raises:
          ValueError: for params of other shapes than :func:`slim` made, and for channels that the program needs.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "apply does not use these params")  # which channel_groups said
            traced = trace(self.apply, self.full_shapes(params), *args)
        analysis = Analysis(traced)
        return traced, analysis, living_nodes(analysis, self.kept)

    def full_shapes(self, params: Any) -> Any:
        """The tree of small params with the shapes of the full ones; the dtypes are theirs."""
        leaves, treedef = jax.tree.flatten(params)
        paths = leaf_paths(params)
        if odd := sorted({path for path, leaf in zip(paths, leaves, strict=True) if is_array(leaf)} ^ set(self.full)):
            raise ValueError(f"the params are not those that slim gave: only one of the two has {listed(odd)}")
        found = []
        for path, leaf in zip(paths, leaves, strict=True):
            if is_array(leaf):
                expected = _small_shape(path, self.full[path], self.kept)
                if tuple(leaf.shape) != expected:
                    raise ValueError(f"{path} has shape {tuple(leaf.shape)}, and {expected} in the params of slim")
                weak = getattr(leaf, "weak_type", False)
                leaf = jax.ShapeDtypeStruct(self.full[path], leaf.dtype, weak_type=weak)
            found.append(leaf)
        return treedef.unflatten(found)


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Slim(Tabular):
    """The result of :func:`slim`; prints as a table of the old and new shapes, for those who rebuild their module.

    Attributes:
      apply: the smaller function, ``apply(params, *args)``, for args of any shapes. Jit it: it traces the function that
        it was made of at every call.
      params: its params.
      opt_state: its optimizer's state; None if none was given.
      shapes: path of a leaf -> its old and its new shape.
      args: the shapes of the arguments that it was made with.
    """

    apply: SlimApply
    params: Any
    opt_state: Any
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    args: tuple[Any, ...]

    def table(self) -> Table:
        """The cells of the table."""
        rows, old, new = [], 0, 0
        for path in sorted(self.shapes, key=natural_order):
            sizes = [math.prod(shape) for shape in self.shapes[path]]
            old, new = old + sizes[0], new + sizes[1]
            was, now = ("x".join(map(str, shape)) or "scalar" for shape in self.shapes[path])
            rows.append((path, was, "" if was == now else now, f"{sizes[0]:,}", f"{sizes[1]:,}"))
        total = ("all", "", "", f"{old:,}", f"{new:,}")
        return Table(("leaf", "shape", "slim", "params", "slim"), tuple(rows), (total,), left=(0, 1, 2))

    def save(self, path: str | os.PathLike) -> None:
        """Write the small params, and which entries they are, to a file for :func:`load_slim`.

        It is a file of :func:`jaxsparse.save_sparse` and is written as those are. It holds no code: loading
        takes the same ``apply``. The optimizer's state is not in it.

        Args:
          path: the file; an existing one is replaced.

        Raises:
          ValueError, OSError, ImportError: as :func:`jaxsparse.save_sparse`.
        """
        from jaxsparse.trace.slim_files import save_slim  # safetensors is an extra

        save_slim(path, self)


def slim(
    apply: Callable[..., Any],
    params: Any,
    closed: Mapping[str, Any],
    *args: Any,
    groups: Iterable[Group] | None = None,
    opt_state: Any = None,
    multiple_of: int = 1,
) -> Slim:
    """Remove closed channels from any function for good: from its params, its computations, its optimizer's state.

    ``slim.apply(slim.params, *args)`` is ``apply`` with the params in which the channels are closed (the slices at zero
    that a group multiplies), up to rounding, and so are gradients. Nothing of the model's code changes: its program is
    traced at full shapes, and evaluated on smaller arrays. Calling it again removes more; then ``slim.apply`` is made
    of the first function.

    Args:
      apply: ``apply(params, *args)``, a function that JAX can trace.
      params: its params, with all collections it takes (batch statistics too). A tree of ``jax.ShapeDtypeStruct`` gives
        the shapes alone.
      closed: name of a group -> (size,), bool, True for channels to remove, such as :func:`closed_channels` finds.
        Groups that it leaves out stay as they are.
      *args: arguments of ``apply``, or their shapes; the result takes args of other shapes, such as batches.
      groups: the groups of channels that ``closed`` names, of :func:`channel_groups` or written by hand; None: those of
        the same arguments.
      opt_state: a state of an optimizer of these params, or of ``params["params"]`` alone, of which momentum, masks and
        gates are kept. For gates give the groups of the method.
      multiple_of: the widths are to be multiples of this, for fast kernels, int >= 1. Closed channels stay, those with
        the largest norm of all their slices in ``params`` first, until in each leaf the size of the axis, times those
        of the axes after it, is a multiple. (Heads of 64 channels need no rounding.) A warning names the leaves for
        which no such channels are found. Give params in which the closed slices are zero: a channel that stays counts
        with what it has there.

    Returns:
      A :class:`Slim`: the function, params and optimizer's state, and a table of the shapes.

    Raises:
      ValueError: for unknown groups and vectors of the wrong size, if all channels of a group are closed, if the
        function needs a channel, and for a state that cannot be cut, naming it.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsparse import trace
      >>> params = {"fc1": jnp.ones((5, 4)), "fc2": jnp.ones((4, 3)).at[1:3].set(0)}
      >>> def apply(params, x):
      ...     return jax.nn.relu(x @ params["fc1"]) @ params["fc2"]
      >>> groups = trace.channel_groups(apply, params, jnp.ones((2, 5)))
      >>> small = trace.slim(apply, params, trace.closed_channels(groups, params), jnp.ones((2, 5)), groups=groups)
      >>> print(small)
      leaf  shape  slim  params  slim
      ----  -----  ----  ------  ----
      fc1   5x4    5x2       20    10
      fc2   4x3    2x3       12     6
      ----  -----  ----  ------  ----
      all                    32    16
      >>> jax.jit(small.apply)(small.params, jnp.ones((1, 5))).tolist()
      [[10.0, 10.0, 10.0]]
    """
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, int) or multiple_of < 1:
        raise ValueError(f"multiple_of must be an int of at least 1, got {multiple_of!r}")
    leaves, full = by_path(params), array_shapes(params)
    groups = tuple(channel_groups(apply, params, *args) if groups is None else groups)
    shut = _checked(groups, closed, params)
    if multiple_of > 1:
        shut = rounded(groups, shut, leaves, multiple_of)
    kept = kept_entries(groups, shut, full)
    if nothing := [place for place, stays in kept.items() if not stays.any()]:
        raise ValueError(f"nothing is left along axis {nothing[0][1]} of {nothing[0][0]}, which several groups share")
    small_params = cut_params(params, kept)
    small = SlimApply(apply, full, kept)
    if isinstance(apply, SlimApply):  # one step from the first function, instead of a step for each time
        small = SlimApply(apply.apply, apply.full, _composed(apply, kept))
    small.analysed(small_params, *args)
    if opt_state is not None:
        gone = gone_channels(groups, kept, full, {name: vector.size for name, vector in shut.items()})
        opt_state = cut_state(opt_state, params, kept, gone)
    shapes = {path: (full[path], shape) for path, shape in array_shapes(small_params).items()}
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if is_array(x) else x, args)
    return Slim(small, small_params, opt_state, shapes, structs)


def closed_channels(groups: Iterable[Group], masks: Any) -> dict[str, np.ndarray]:
    """Find the channels that masks, or zeros in params, have closed.

    A channel is closed if all of its slices of one of the group's choices (``closed_by``) are gone, such as all weights
    that read it, or all that make it.

    Args:
      groups: those of :func:`channel_groups`, or others.
      masks: like the params, or like ``params["params"]``: bool arrays, the scalar True for dense leaves, as are those
        without a mask; or the params to evaluate with (:func:`jaxsparse.eval_params`), whose zeros count.

    Returns:
      name of a group -> (size,), bool, for :func:`slim`.

    Raises:
      ValueError: if the masks have none of the leaves of the groups; for masks of another shape than their leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxsparse import trace
      >>> params = {"fc1": jnp.ones((5, 4)).at[:, 0].set(0), "fc2": jnp.ones((4, 3)).at[3].set(0)}
      >>> groups = trace.channel_groups(lambda p, x: (x @ p["fc1"]) @ p["fc2"], params, jnp.ones((2, 5)))
      >>> trace.closed_channels(groups, params)
      {'fc1': array([ True, False, False,  True])}
    """
    shapes = groups.shapes if isinstance(groups, ChannelGroups) else {}
    groups = tuple(groups)
    live = _live(groups, shapes, by_path(masks))
    found = {}
    for group in groups:
        size = _size(group, live)
        _check_masks(group, size, live)
        found[group.name] = np.zeros(size, bool)
        for choice in group.closed_by:
            shut = np.full(size, bool(choice) and all(which.path in live for which in choice))
            for which in choice if shut.any() else ():
                axes, channels = entries(which, live[which.path].shape, size)
                used = live[which.path].any(tuple(i for i in range(live[which.path].ndim) if i not in axes))
                shut[channels[(channels >= 0) & used]] = False
            found[group.name] |= shut
    return found


def kept_entries(
    groups: Iterable[Group], closed: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> dict[tuple[str, int], np.ndarray]:
    """Which entries of leaves stay when channels are closed: (path, axis) -> (n,), bool, for axes that lose some."""
    kept: dict[tuple[str, int], np.ndarray] = {}
    for group in groups:
        shut = np.append(closed[group.name], False)
        for which in group.removes:
            axes, channels = entries(which, shapes[which.path], len(shut) - 1)
            stays = ~shut[channels]
            if len(axes) > 1:  # stacked layers have one width: a channel goes if it is closed in all of them
                stays = stays.any(tuple(range(len(axes) - 1)))
            kept[which.path, axes[-1]] = kept.get((which.path, axes[-1]), True) & stays
    return {place: stays for place, stays in kept.items() if not stays.all()}


def array_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the leaves that are arrays, by path."""
    return {path: tuple(leaf.shape) for path, leaf in by_path(tree).items() if is_array(leaf)}


def _live(
    groups: tuple[Group, ...], shapes: Mapping[str, tuple[int, ...]], masks: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The live entries of the leaves that close channels: path -> bool array; dense leaves are left out."""
    paths = {which.path for group in groups for choice in group.closed_by for which in choice}
    start = ""
    if not masks.keys() & {*paths, *shapes}:  # for all leaves alike: a shorter path may be that of another leaf
        parts = {path.partition("/")[0] for path in paths if path.partition("/")[2] in masks}
        if len(parts) > 1 and "params" not in parts:
            raise ValueError(f"the masks may be those of {listed(sorted(parts))}: give them in the tree of the params")
        start = "params/" if "params" in parts else "".join(f"{part}/" for part in parts)
    live = {start + path: np.asarray(mask) != 0 for path, mask in masks.items() if start + path in paths}
    if groups and not live:
        raise ValueError(f"the masks have none of the leaves of the groups, but {listed(list(masks))}")
    for path, mask in live.items():
        if not mask.ndim and not mask:
            raise ValueError(f"the mask of {path} is the scalar False: a scalar can only be True, for a dense leaf")
        if mask.ndim and mask.shape != shapes.get(path, mask.shape):
            raise ValueError(f"the mask of {path} must have shape {shapes[path]}, got {mask.shape}")
    return {path: mask for path, mask in live.items() if mask.ndim}


def _check_masks(group: Group, size: int, live: Mapping[str, np.ndarray]) -> None:
    """Refuse masks that do not have the channels of a group."""
    for which in [which for choice in group.closed_by for which in choice if which.path in live]:
        length = _length(which, live[which.path].shape)
        if not (length and size) or (length % size if which.channels is None else length != len(which.channels)):
            wanted = f"a multiple of {size}" if which.channels is None else len(which.channels)
            raise ValueError(
                f"the mask of {which.path} has shape {live[which.path].shape}, but group {group.name!r} needs {wanted} "
                f"entries along axis {which.axis}"
            )


def _length(which: Slice, shape: tuple[int, ...]) -> int:
    """The number of entries of a slice in a leaf of some shape; 0 if it does not have the axes."""
    axes = which.axis if isinstance(which.axis, tuple) else (which.axis,)
    return math.prod(shape[axis] for axis in axes) if all(-len(shape) <= i < len(shape) for i in axes) else 0


def _size(group: Group, leaves: Mapping[str, Any]) -> int:
    """The number of channels of a group, given by it or by the first leaf of those there that it multiplies."""
    if group.size:
        return group.size
    which = next((which for which in group.multiplies if which.path in leaves), None)
    if which is None:
        raise ValueError(
            f"group {group.name!r} has no size, and no mask is an array where it multiplies: give its size"
        )
    return _length(which, leaves[which.path].shape) if which.channels is None else max(which.channels) + 1


def _checked(groups: tuple[Group, ...], closed: Mapping[str, Any], params: Any) -> dict[str, np.ndarray]:
    """The closed channels of every group; errors for those that cannot be removed."""
    sizes = dict(zip((group.name for group in groups), group_sizes(groups, params), strict=True)) if groups else {}
    for name in closed:
        if name not in sizes:
            near = difflib.get_close_matches(name, sizes, n=3, cutoff=0.4) or list(sizes)[:3]
            raise ValueError(f"closed names {name!r}, which is no group of channels; near are {listed(near)}")
    shut = {}
    for name, size in sizes.items():
        shut[name] = found = np.asarray(closed.get(name, np.zeros(size, bool)))
        if found.shape != (size,) or found.dtype != bool:
            raise ValueError(
                f"closed must have bools of shape ({size},) for group {name!r}, got {found.dtype} of shape "
                f"{found.shape}"
            )
        if found.all():
            raise ValueError(
                f"all {size} channels of group {name!r} are closed: at least one must stay, or nothing passes there"
            )
    return shut


def _composed(before: SlimApply, kept: Kept) -> Kept:
    """The entries of the first params that stay when a smaller function loses more."""
    places = {**before.kept, **kept}
    found = {}
    for path, axis in places:
        stays = before.kept.get((path, axis), np.ones(before.full[path][axis], bool)).copy()
        if (path, axis) in kept:
            stays[stays] = kept[path, axis]
        found[path, axis] = stays
    return found


def _small_shape(path: str, shape: tuple[int, ...], kept: Kept) -> tuple[int, ...]:
    return tuple(int(kept[path, i].sum()) if (path, i) in kept else n for i, n in enumerate(shape))
