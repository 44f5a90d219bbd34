"""Pruning of any function of params after training, in one walk through it with calibration data."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.allocation import check_allocation, check_sparsities, erdos_renyi
from jaxsparse.layouts import Layout, leaf_layouts
from jaxsparse.post_training.blocks import BlocksLike, block_names, owl_sparsities
from jaxsparse.post_training.calibration import Calibration
from jaxsparse.post_training.job import Job
from jaxsparse.post_training.rules import Rule, resolve
from jaxsparse.prunable import prunable_leaves
from jaxsparse.structures import Structure, StructureLike, n_of_m
from jaxsparse.structures.leaves import check_structure, made_of
from jaxsparse.trace.program import is_array
from jaxsparse.trees import by_path, by_pattern, listed

__all__ = ["prune_once"]


def prune_once(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any] | None,
    rule: str | Rule | Callable,
    sparsity: Any,
    *,
    structure: StructureLike = "weight",
    allocation: str = "uniform",
    prunable: Any = None,
    blocks: BlocksLike = None,
    sequential: bool = True,
) -> tuple[Any, Any]:
    r"""Prune any function of params after training, in one walk through it with calibration data.

    All batches go through ``apply(params, *batch)`` in step. At each matrix product or convolution with a prunable leaf
    the walk stops, sums up what arrives there, behind all that is pruned already, over all batches:

    .. math:: r_i = \sum_x x_i^2, \qquad G = \sum_x x x^T

    The rule gets the leaf's matrix, (inputs, outputs), and the sums that it needs, and the walk goes on with the pruned
    weights, as the authors of Wanda and SparseGPT go through the layers of a network. It works on the jaxpr, so
    ``apply`` may be of any framework and its leaves in any layout. Layers that are scanned are pruned one by one, as
    those of a loop are; experts and groups of a convolution are matrices of their own. For a leaf that is used in
    several products, or in a loop, the sums are over all of its uses; the network as it is then runs once more for
    them. All leaves that every round of a loop uses, such as those of a model under ``jax.lax.map``, are pruned at once
    before it, by what arrives there until then: to prune them in sequence, give it batches without the loop.

    Weights may be of any float dtype, moments are float32, and so are the matrices that the rule gets.

    Args:
      apply: a pure function of params.
      params: as ``apply`` takes them; they may be divided among devices.
      batches: calibration data, an iterable of what ``apply`` takes after the params: a tuple, or the one argument.
        They may have different shapes, and are all held at once. None, or empty, for rules that need nothing.
      rule: "magnitude", "wanda", "ria", "dsnot", "sparsegpt" or "admm"; a :class:`jaxsparse.post_training.Rule`; or a
        function ``(kernel, moments, sparsity, structure) -> (kernel, mask)`` of one matrix.
      sparsity: the fraction of zeros of every leaf, in [0, 1), or one for each, as for
        :func:`jaxsparse.magnitude_masks`.
      structure: "weight", or n of every m inputs, ``jaxsparse.n_of_m(2, 4)``; or by a mapping from patterns of paths.
      allocation: how one sparsity is shared among leaves: "uniform"; "erdos_renyi" or "erdos_renyi_kernel"
        (:func:`jaxsparse.erdos_renyi`); or "owl", by blocks (:func:`jaxsparse.post_training.owl_densities`, of Wanda's
        scores of the dense network).
      prunable: as for all methods (:func:`jaxsparse.prunable.prunable_leaves`). By default the matrices that take part
        in products; in a function that looks up tokens, these tables (also where the same leaf is the output layer) and
        the last layer stay dense, as the authors of all these rules have it. The log (INFO, "jaxsparse") says which.
      blocks: the blocks that "owl" counts in: a function from the path of a leaf to the name of its block, or None; or
        patterns of paths, one a block. By default leaves that share a path up to their layer number, such as
        "layers/3". Entries of stacked layers are blocks of their own.
      sequential: whether layers see what comes out of layers that are pruned. False: all see the dense network.

    Returns:
      The params, in their tree, dtypes and shardings, but as arrays of JAX where they are pruned: NumPy's float64 comes
      back in float32 unless ``jax_enable_x64`` is set. And the masks: bool arrays, the scalar True for dense leaves. To
      go on training with these zeros, add ``jaxsparse.mask_updates(masks)`` to the optimizer.

    Raises:
      ValueError: before anything is pruned: for batches that do not fit, or are missing; an unknown rule or option;
        inputs that m does not divide; fewer than two blocks for "owl". While it is pruned: for moments or weights that
        are not finite, and what a rule returns that does not fit.

    Warns:
      UserWarning: for leaves that were to be pruned and are in no product, or in one that cannot be followed, with the
        reason; they stay dense. For inputs at which nothing but zeros arrives, and Gram matrices that took more
        damping.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = {"up": jnp.array([[1.0, 0.1], [2.0, 3.0]]), "down": jnp.ones((2, 4))}
      >>> def mlp(params, x):
      ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> pruned, masks = prune_once(mlp, params, [jnp.array([[9.0, 1.0]])], "wanda", 0.5)
      >>> pruned["up"].tolist()
      [[1.0, 0.0], [0.0, 3.0]]

    References:
      Frantar and Alistarh, *SparseGPT*, 2023; Sun et al., *A Simple and Effective Pruning Approach for Large Language
      Models* (Wanda), 2024; Yin et al., *Outlier Weighed Layerwise Sparsity*, 2024.
    """
    rule = resolve(rule)
    check_allocation(allocation, more=("owl",))
    check_sparsities(sparsity)
    check_structure(structure, known=("weight", "n_of_m"))
    arrays = jax.tree.map(lambda leaf: leaf if is_array(leaf) else None, params)
    leaves = by_path(arrays)
    if traced := [path for path, leaf in leaves.items() if isinstance(leaf, jax.core.Tracer)]:
        raise ValueError(f"prune_once looks at values as it goes, and {traced[0]} has none: call it outside of jax.jit")
    if blocks is not None and allocation != "owl":
        raise ValueError(f"blocks are what allocation='owl' counts in, got allocation={allocation!r}")
    calibration = Calibration(apply, params, batches)
    if not calibration and (rule.needs != "nothing" or allocation == "owl"):
        what = f"rule {rule.name!r} needs what arrives" if rule.needs != "nothing" else "allocation 'owl' needs scores"
        raise ValueError(f"{what} at the products of apply: batches must have at least one batch, got none")
    layouts = leaf_layouts(arrays, calibration.layouts())
    flags = calibration.default(arrays, layouts) if prunable is None else prunable
    flat = by_path(prunable_leaves(arrays, flags, layout=calibration.layouts()))
    chosen = {path: leaves[path] for path, flag in flat.items() if flag}
    structures = _structures(structure, chosen, layouts)
    shares = _sparsities(sparsity, allocation, chosen, structures, layouts)
    job = Job(rule, leaves, structures, shares, layouts, calibration, quiet=prunable is None)
    if allocation == "owl":
        names = block_names({path: leaf.shape for path, leaf in chosen.items()}, calibration.uses, blocks)
        moments, _ = calibration.recorded(job.weights.now, list(chosen), gram=False)
        job.shares |= owl_sparsities(chosen, moments, names, calibration.uses.stacks, float(sparsity))
    if rule.needs == "nothing":
        job.by_layout()
    elif sequential:
        job.in_one_walk()
    else:
        job.of_dense()
    job.report()
    given = by_path(params)
    pruned = [job.weights.now[path] if path in job.masks else leaf for path, leaf in given.items()]
    dense = jnp.ones((), bool)
    masks = [job.masks.get(path, dense) if is_array(leaf) else None for path, leaf in given.items()]
    treedef = jax.tree.structure(params)
    return treedef.unflatten(pruned), treedef.unflatten(masks)


def _structures(
    structure: StructureLike, leaves: Mapping[str, Any], layouts: Mapping[str, Layout]
) -> dict[str, Structure]:
    """The structure of the matrices of each leaf."""
    given: dict[str, Any] = dict.fromkeys(leaves, structure)
    if isinstance(structure, Mapping):
        given = dict.fromkeys(leaves, "weight") | by_pattern(structure, list(leaves), "structure")
    found = {path: made_of(unit) for path, unit in given.items()}
    misfits = []
    for path, unit in found.items():
        if not isinstance(unit, n_of_m):
            continue
        if unit.axis != "inputs":
            raise ValueError(f"structure of {path} must keep n of every m along the inputs, got {unit}")
        at, shape = layouts[path], leaves[path].shape
        if not dataclasses.replace(unit, layout=at).fits(shape):
            inputs = math.prod(shape[axis] for axis in at.inputs)  # type: ignore[union-attr]
            misfits.append(f"{path} of shape {tuple(shape)}, which has {inputs} inputs")
    if misfits:
        raise ValueError(
            f"structure {structure!r} does not fit {listed(misfits)}: leave them out by prunable=, or say it leaf by "
            'leaf, structure={"path or pattern": ...}'
        )
    return found


def _sparsities(
    sparsity: Any,
    allocation: str,
    leaves: Mapping[str, Any],
    structures: Mapping[str, Structure],
    layouts: Mapping[str, Layout],
) -> dict[str, np.ndarray]:
    """The sparsity of each leaf; those that keep n of every m have that of their structure."""
    fixed = {path: 1 - unit.n / unit.m for path, unit in structures.items() if isinstance(unit, n_of_m)}
    free = {path: leaf for path, leaf in leaves.items() if path not in fixed}
    if allocation != "uniform" and not free:
        raise ValueError(f"allocation {allocation!r} has no effect where all leaves keep n of every m")
    if allocation != "uniform" and (callable(sparsity) or isinstance(sparsity, Mapping | list | tuple)):
        raise ValueError(f"allocation {allocation!r} shares out one sparsity, got one for each leaf")
    if callable(sparsity):
        sparsity = {path: sparsity(path, leaf) for path, leaf in free.items()}
    if isinstance(sparsity, Mapping | list | tuple):
        found = by_pattern(sparsity, list(free), "sparsity")
        if missing := [path for path in free if path not in found]:
            raise ValueError(
                f"sparsity must be given for every prunable leaf, missing {listed(missing)}: let "
                '{..., "*": 0.5} catch the rest'
            )
    elif allocation.startswith("erdos_renyi"):
        shapes = {path: leaf.shape for path, leaf in free.items()}
        known = {path: layouts[path] for path in free}
        densities = erdos_renyi(shapes, 1 - float(sparsity), allocation == "erdos_renyi_kernel", layout=known)
        found = {path: 1 - float(density) for path, density in densities.items()}
    else:
        found = dict.fromkeys(free, sparsity)
    check_sparsities(found)
    return {path: np.asarray(fixed.get(path, found.get(path)), np.float32) for path in leaves}
