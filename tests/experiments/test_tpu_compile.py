"""Whole train steps compiled for slices of TPUs that are not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.tpu_compile import sent, shapes_of
from experiments import data, program
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
