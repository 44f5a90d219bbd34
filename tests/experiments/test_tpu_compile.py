"""Whole train steps compiled for slices of TPUs that are not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.tpu_compile import sent, shapes_of
from benchmarks.tpu_compile_gpt import lower_step, lower_update
from experiments import data, program
from jaxsparse.models import GPT
from jaxsparse.parallel import device_layout
from tests.experiments import parallel_runs
from tests.kernels.test_compile import chips


def compile_step(layout):
    config = parallel_runs.make_config("sparse_momentum", "")
    config.data.streamed = True
    config.data.image_size = 32
    config.data.batch_size = 64
    config.model.dtype = "bfloat16"
    mean = np.zeros(3, np.float32)
    dataset = data.Dataset(range(640), range(0), range(0), 10, mean, mean + 1)
    with parallel_runs.patched(layout, chips("v5e:4x4")):
        made = program.make_program(config, dataset)
    batch = tuple(jax.ShapeDtypeStruct((64, *shape), jnp.int32) for shape in ((), ()))
    batch = (jax.ShapeDtypeStruct((64, 32, 32, 3), jnp.uint8), *batch)
    state, batch = shapes_of(made.layout, jax.eval_shape(made.init, 0), batch)
    return made.train_step.lower(state, batch, 1).compile()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pmap", "fsdp"])
def test_a_train_step_compiles_for_a_slice_of_tpus(layout):
    compiled = compile_step(layout)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes > 0  # the state is given up for the new one
    assert 0 < memory.peak_memory_in_bytes < 2**30
    traffic = sent(compiled.as_text())
    assert traffic["all-reduce"][0] > 0
    assert ("all-gather" in traffic) == (layout == "fsdp")  # of the weights, for the step


def gpt(layers=4):
    return GPT(
        1024, 256, num_layers=layers, num_kv_heads=2, mlp_width=1024, max_length=512, positions="rotary", norm="rms",
        mlp="gated", bias=False, tied=False, scan=True, remat=True, dtype=jnp.bfloat16,
    )  # fmt: skip


@pytest.mark.slow
def test_masks_of_sharded_transformers_are_chosen_without_gathering_weights():
    model = gpt()
    compiled = lower_update(model, device_layout("fsdp", chips("v5e:4x4"))).compile()
    traffic = sent(compiled.as_text())
    assert set(traffic) == {"all-reduce"}
    assert traffic["all-reduce"][1] < 2**15  # of numbers that are counted: weights of one block have two megabytes
    weights = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(weights))
    assert compiled.memory_analysis().argument_size_in_bytes < 1.3 * (3.25 + 1) * size / 16


@pytest.mark.long
def test_a_step_of_sharded_transformers_compiles():
    compiled = lower_step(gpt(), device_layout("fsdp", chips("v5e:4x4")), sequences=2).compile()
    assert compiled.memory_analysis().alias_size_in_bytes > 0
    assert compiled.memory_analysis().peak_memory_in_bytes < 2**28
    assert "all-gather" in sent(compiled.as_text())  # of the weights, for the gradients
