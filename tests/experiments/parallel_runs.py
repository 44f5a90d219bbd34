"""A small run of every method in one layout, and what is left of it: the same in each. Also a program, for processes.

python -m tests.experiments.parallel_runs OUT COORDINATOR PROCESSES PROCESS LAYOUT METHOD... [update_masks]
"""

import sys
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import jaxsparse
from configs import common
from experiments import build, networks, program
from experiments.inputs import open_dataset
from jaxsparse import Group, inspect
from jaxsparse.models.blocks import BatchNorm, dense
from jaxsparse.models.layers import Conv
from jaxsparse.parallel import device_layout
from jaxsparse.trees import by_path
from tests.problems import gradients, make_params
from tests.test_contract import METHODS as METHODS_OF_CONTRACT
from tests.test_contract import UPDATE_EVERY, sgd

METHODS = ("sparse_momentum", "rda", "l0", "dep_l0", "asni", "mask_updates")
STEPS = 20
STEPS_PER_EPOCH = 6  # masks change on steps 6, 12 and 18


class Net(nn.Module):
    """Two convolutions with batch normalisation and a dense layer."""

    num_classes: int = 10
    dtype: str | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x):
        for i in (1, 2):
            x = Conv(16, 3, padding=1, use_bias=False, name=f"conv{i}")(x)
            x = nn.relu(BatchNorm(axis_name=self.axis_name, name=f"bn{i}")(x))
        return dense(x.mean((1, 2)), self.num_classes, name="fc")


GROUPS = tuple(
    Group(f"conv{i}", {f"bn{i}/scale": 0, f"bn{i}/bias": 0}, {reader: -2}, kernel=f"conv{i}/kernel")
    for i, reader in ((1, "conv2/kernel"), (2, "fc/kernel"))
)


def make_config(method, masks_file):
    """Batch normalisation over the whole batch, on digits that are cropped and mirrored."""
    config = {
        "dense": common.sparse_momentum,
        "sparse_momentum": common.sparse_momentum,
        "rda": common.rda,
        "l0": lambda: common.gates("l0"),
        "dep_l0": lambda: common.gates("dep_l0"),
        "asni": common.asni,
        "mask_updates": common.asni,
    }[method]()
    config.dense = method == "dense"
    config.epochs = 4
    config.data.update({"name": "digits", "batch_size": 16, "examples": 16 * STEPS_PER_EPOCH, "pad": 1, "flip": True})
    config.model.name = "net"
    config.label_smoothing = 0.1
    config.parallel.sync_batch_norm = True
    if method == "rda":
        config.optimizer.schedules.init_value = 0.02
        config.method.l1 = 0.01
    else:
        # Not Adam, which makes whole steps of gradients that are nothing but rounding.
        config.optimizer = ConfigDict(
            {"name": "sgd", "momentum": 0.9, "nesterov": config.method.name == "sparse_momentum"}
        )
        common.decay_at(config, (), init_value=0.002)
    if method == "sparse_momentum":
        config.method.sparsity = 0.75
    if method in ("l0", "dep_l0"):
        config.method.penalty.update({"strength": 1e-3, "counts": "neighbours"})
        config.method.gate_optimizer.learning_rate.init_value = 0.1
    if method == "asni":
        config.method.sparsity.scale_epochs = 1.0
    if method == "mask_updates":
        config.update({"masks_from": masks_file, "start": "weights"})
    return config


def patched(layout_name, devices=None):
    """The trainer knows the network above, and weights as few as its are sharded."""
    stack = ExitStack()
    stack.enter_context(mock.patch.dict(networks.MODELS, {"net": Net}))
    stack.enter_context(mock.patch.object(build.models, "channel_groups", return_value=GROUPS))
    stack.enter_context(mock.patch.object(program, "make_layout", return_value=device_layout(layout_name, devices, 64)))
    return stack


def write_masks(masks_file):
    """A sparse model for ``mask_updates`` to start from."""
    config = make_config("dense", "")
    with patched("pmap"):
        params = program.make_program(config, open_dataset(config)).init(1).params
    masks = jaxsparse.random_masks(params, 0.7)
    jaxsparse.save_sparse(masks_file, jax.tree.map(np.multiply, params, masks), masks)


def run(layout_name, method, masks_file):
    """Weights, masks or gates after the steps, losses and accuracy, on the host."""
    config = make_config(method, masks_file)
    dataset = open_dataset(config)
    with patched(layout_name):
        compiled = program.make_program(config, dataset)
        layout = compiled.layout
        state = layout.place(compiled.init(0))
        placed = dataset._replace(train=layout.replicate(dataset.train), test=layout.replicate(dataset.test))
        state, measured = compiled.train_chunk(state, placed, 0, STEPS)
        evaluated = jax.device_get(compiled.evaluate(state, placed.test))
    one = jax.device_get(layout.one_copy(state))
    result = {f"params/{path}": leaf for path, leaf in by_path(one.params).items()}
    result |= {
        f"masks/{path}": leaf for path, leaf in by_path(inspect.current_masks(one.opt_state, one.params)).items()
    }
    result |= {f"batch_stats/{path}": leaf for path, leaf in by_path(one.model_state).items()}
    if method in ("l0", "dep_l0"):
        result |= {f"log_alpha/{name}": leaf for name, leaf in jaxsparse.get_log_alpha(one.opt_state).items()}
    losses = {
        "evaluated": np.array([evaluated["loss"], evaluated["accuracy"]]),
        "train_losses": np.asarray(measured["losses"]),
    }
    return jax.device_get(result | losses)


class Few(NamedTuple):
    """A state without a model."""

    params: Any
    opt_state: Any
    model_state: Any = ()


def update_masks(layout_name):
    """The masks of every method of the contract after an update from given weights and gradients, on the host."""
    layout = device_layout(layout_name, min_size=64)
    masks = {}
    for name, method in METHODS_OF_CONTRACT.items():
        params = make_params()
        tx = method.around(sgd(), params)

        def step(state, grads, tx=tx):
            updates, opt_state = tx.update(grads.params, state.opt_state, state.params)
            return Few(optax.apply_updates(state.params, updates), opt_state), None

        opt_state = tx.init(params)
        state = layout.place(Few(jaxsparse.sparsify(opt_state, params), opt_state))
        grads, compiled = layout.place(Few(gradients(params), ())), layout.compile(step)
        for _ in range(UPDATE_EVERY + 1):
            state, _ = compiled(state, grads)
        one = layout.one_copy(state)
        masks |= {f"{name}/{path}": mask for path, mask in by_path(jaxsparse.get_masks(one.opt_state)).items()}
    return jax.device_get(masks)


def main(out, coordinator, processes, process, layout, *methods):
    """The first process writes."""
    jax.distributed.initialize(coordinator, int(processes), int(process))
    if jax.process_index() == 0 and "mask_updates" in methods:
        write_masks(f"{out}.safetensors")
    multihost_utils.sync_global_devices("masks")
    results = {
        f"{method}/{name}": leaf
        for method in METHODS
        if method in methods
        for name, leaf in run(layout, method, f"{out}.safetensors").items()
    }
    if "update_masks" in methods:
        results |= {f"update_masks/{name}": mask for name, mask in update_masks(layout).items()}
    if jax.process_index() == 0:
        np.savez(out, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
