"""The train step of a GPT of a billion weights, fully sharded over TPUs: does it fit, and what does a mask update send?

Compiled without a TPU, as :mod:`benchmarks.tpu_compile` does it.

Usage: ``JAX_PLATFORMS=cpu python -m benchmarks.tpu_compile_gpt``; ``--layers 2`` for a quick one
"""

import argparse
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.stages import Lowered

import jaxsparse
from benchmarks import timing
from benchmarks.tpu_compile import COLUMNS, compiled_as, shapes_of
from jaxsparse.models import GPT
from jaxsparse.parallel import DeviceLayout, device_layout

PARTS = ("train step", "mask update alone")


class State(NamedTuple):
    """What is trained."""

    params: Any
    opt_state: Any
    model_state: Any


def make_gpt(layers: int, length: int) -> GPT:
    """A GPT in the manner of Llama: with 20 layers 1.03 billion weights."""
    return GPT(
        32_000, 2048, layers, num_heads=16, num_kv_heads=4, mlp_width=5632, max_length=length, positions="rotary",
        norm="rms", mlp="gated", bias=False, tied=False, scan=True, remat=True, dtype=jnp.bfloat16,
    )  # fmt: skip


def transformation(update_every: int) -> optax.GradientTransformationExtraArgs:
    return jaxsparse.chain(optax.adamw(1e-3), jaxsparse.sparse_momentum(0.9, update_every))


def state_shapes(model: GPT, tx: optax.GradientTransformation) -> State:
    def init(key):
        params = model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        return State(params, tx.init(params), ())

    return jax.eval_shape(init, jax.random.key(0))


def lower_step(model: GPT, layout: DeviceLayout, sequences: int) -> Lowered:
    """The whole step: gradients, AdamW, and the masks, which change in one of a hundred steps."""
    tx = transformation(100)

    def loss_fn(params, model_state, batch, common):
        logits = model.apply({"params": params}, batch[:, :-1], train=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()
        return loss, (loss, model_state)

    gradients = layout.gradients(loss_fn)

    def step(state, batch):
        grads, model_state, loss = gradients(state.params, state.model_state, batch, None)
        return stepped(tx, state, grads, model_state), loss

    batch = jax.ShapeDtypeStruct((sequences * layout.size, model.max_length + 1), jnp.int32)
    return layout.compile(step).lower(*shapes_of(layout, state_shapes(model, tx), batch))


def lower_update(model: GPT, layout: DeviceLayout) -> Lowered:
    """What a step does with gradients that are there already, and masks that change in every step."""
    tx = transformation(1)

    def update(state, grads):
        return stepped(tx, state, grads, state.model_state), ()

    state = layout.collected_shapes(state_shapes(model, tx))
    return layout.compile(update).lower(state, state.params)


def stepped(tx, state, grads, model_state) -> State:
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    return State(optax.apply_updates(state.params, updates), opt_state, model_state)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--sequences", type=int, default=4, help="a chip")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=options.topology).devices
    layout, model = device_layout("fsdp", devices), make_gpt(options.layers, options.length)
    weights = sum(leaf.size for leaf in jax.tree.leaves(state_shapes(model, optax.identity()).params))
    rows = []
    for part in options.parts:
        made = lower_step(model, layout, options.sequences) if part == PARTS[0] else lower_update(model, layout)
        rows.append([f"{options.topology} ({len(devices)})", f"{weights / 1e9:.2f} billion", part])
        rows[-1] += compiled_as(made, options.topology)
        print(rows[-1], flush=True)
    timing.save(
        "tpu_compile_gpt",
        "The train step of a GPT of a billion weights, compiled for a slice of TPUs",
        ["slice (chips)", "weights", "what", *COLUMNS],
        rows,
        f"{options.sequences} sequences of {options.length} tokens a chip; bfloat16, weights and AdamW's moments in "
        "float32; scanned blocks that are computed again in the backward pass; sparse momentum at 90% in every matrix, "
        "embedding and head included. An n-th of weights, moments and masks is on each chip (fsdp). Compiled by libtpu "
        "without a TPU: nothing was run, and the time is this machine's. Memory, arguments and operations are of one "
        "chip, as XLA counts them; of a loop over blocks it counts one pass. The mask update is compiled alone to see "
        "what it sends: no weights.",
    )


if __name__ == "__main__":
    main()
