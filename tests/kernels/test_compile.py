"""Kernels compiled for devices that are not there, ahead of time."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxsparse.kernels import block_sparse_matmul, masked_matmul
from tests.problems import slow_except

# Blocks that are tiles themselves; that a TPU takes four of as one, with a mask; single weights.
PRODUCTS = {
    "blocks": ((128, 128), "bfloat16"),
    "small blocks": ((64, 64), "float32"),
    "single weights": (None, "bfloat16"),
}


def step(block, implementation):
    """A product and both its gradients."""

    def loss(x, w, mask):
        if block is None:
            return masked_matmul(x, w, mask, implementation=implementation).astype(jnp.float32).sum()
        y = block_sparse_matmul(x, w, mask, block=block, implementation=implementation)
        return y.astype(jnp.float32).sum()

    return jax.value_and_grad(loss, (0, 1))


def arguments(block, dtype, sharding=None):
    rows, inputs, outputs = 500, 1024, 700
    mask = (inputs, outputs) if block is None else (-(-inputs // block[0]), -(-outputs // block[1]))
    shapes = ((rows, inputs), dtype), ((inputs, outputs), dtype), (mask, "bool")
    return [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]


def chips(topology):
    """TPUs that are not there."""
    if "TPU_LIBRARY_PATH" not in os.environ:
        pytest.importorskip("libtpu", reason="no compiler for TPUs here: `make test` installs it")
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


@pytest.fixture(scope="module", params=slow_except(["v5e:2x2"], ["v4:2x2x1", "v5e:2x2", "v6e:2x2"]))
def tpu(request):
    return SingleDeviceSharding(chips(request.param)[0])


@pytest.mark.parametrize("name", slow_except([], PRODUCTS))
def test_compiles_for_tpus(tpu, name):
    block, dtype = PRODUCTS[name]
    compiled = jax.jit(step(block, "mosaic_tpu")).lower(*arguments(block, dtype, tpu)).compile()
    text = compiled.as_text()
    for part in ("forward", "backward_x", "backward_w"):
        assert f"masked_matmul_{part}" in text, part


def test_compiles_for_each_chip_of_a_mesh():
    """Inside shard_map, the rows divided: each chip runs the kernels on its own, and dw is summed over them."""
    mesh = Mesh(np.array(chips("v5e:2x2")), ("batch",))
    block, dtype = PRODUCTS["blocks"]
    specs = (P("batch"), P(), P())

    def of_a_chip(x, w, mask):
        loss, gradients = step(block, "mosaic_tpu")(x, w, mask)
        return jax.lax.psum(loss, "batch"), gradients

    shared = jax.shard_map(of_a_chip, mesh=mesh, in_specs=specs, out_specs=(P(), (P("batch"), P())))
    args = [
        jax.ShapeDtypeStruct(arg.shape, arg.dtype, sharding=NamedSharding(mesh, spec))
        for arg, spec in zip(arguments(block, dtype), specs, strict=True)
    ]
    text = jax.jit(shared).lower(*args).compile().as_text()
    assert "all-reduce" in text
    assert "masked_matmul_backward_w" in text


@pytest.mark.parametrize("mask", [(32, 32), (4096, 4096)])
def test_no_masked_copy_of_the_weights(mask):
    """The kernel reads weights and mask themselves: what the program holds beside arguments and results is small."""
    sharding = SingleDeviceSharding(chips("v5e:2x2")[0])
    shapes = [((128, 4096), "float32"), ((4096, 4096), "float32"), (mask, "bool")]
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    product = masked_matmul if mask == (4096, 4096) else block_sparse_matmul
    compiled = jax.jit(lambda x, w, m: product(x, w, m, implementation="mosaic_tpu")).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 4096 * 4 / 100


@pytest.mark.parametrize(("block", "x64"), [((128, 128), False), ((32, 64), False), ((32, 64), True)])
def test_lowers_for_gpus(block, x64):
    args = arguments(block, "bfloat16")
    with jax.enable_x64(x64):
        text = jax.jit(step(block, "mosaic_gpu")).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    for part in ("forward", "backward_x", "backward_w"):
        assert f"block_sparse_matmul_{part}" in text, part


@pytest.mark.parametrize(
    ("implementation", "platform", "message"),
    [
        ("mosaic_gpu", "tpu", "'mosaic_gpu' cannot run on tpu: it is a kernel for NVIDIA GPUs"),
        ("mosaic_gpu", "cpu", "'mosaic_gpu' cannot run on cpu"),
        ("mosaic_tpu", "cuda", "'mosaic_tpu' cannot run on cuda: it is a kernel for TPUs"),
    ],
)
def test_a_kernel_for_another_device_is_an_error(implementation, platform, message):
    traced = jax.jit(step((128, 128), implementation)).trace(*arguments((128, 128), "bfloat16"))
    with pytest.raises(ValueError, match=message):
        traced.lower(lowering_platforms=(platform,))
