import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse
from jaxsparse import trace
from jaxsparse.artifacts import ArtifactError
from tests.trace.models import eqx_mlp, mlp

CLOSED = {"fc1/kernel": np.arange(32) % 3 == 0, "fc2/kernel": np.arange(24) >= 20}
AGAIN = """
import sys
import numpy as np
from jaxsparse import trace
from tests.trace.models import mlp
apply, _, (x,) = mlp()
small = trace.load_slim(sys.argv[1], apply, x)
np.save(sys.argv[2], np.asarray(small.apply(small.params, x)))
"""


@pytest.fixture
def small():
    apply, params, (x,) = mlp()
    return trace.slim(apply, params, CLOSED, x)


@pytest.mark.slow
def test_the_same_bits_in_another_process(small, tmp_path):
    small.save(tmp_path / "small")
    subprocess.run([sys.executable, "-c", AGAIN, tmp_path / "small", tmp_path / "y.npy"], check=True)
    _, _, (x,) = mlp()
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), small.apply(small.params, x))


def test_all_of_it_comes_back(small, tmp_path):
    small.save(tmp_path / "small")
    apply, _, (x,) = mlp()
    again = trace.load_slim(tmp_path / "small", apply, x[:1])
    assert again.shapes == small.shapes
    assert str(again) == str(small)
    jax.tree.map(np.testing.assert_array_equal, again.params, small.params)
    assert "params/fc2/kernel" in jaxsparse.artifacts.describe(tmp_path / "small")


@pytest.mark.slow
def test_dtypes_and_nodes_of_other_kinds(tmp_path):
    apply, model, (x,) = eqx_mlp()
    model = jax.tree.map(lambda p: p.astype(jnp.bfloat16) if hasattr(p, "dtype") else p, model)
    x = x.astype(jnp.bfloat16)
    (first, *_) = trace.channel_groups(apply, model, x)
    small = trace.slim(apply, model, {first.name: np.arange(16) < 6}, x)
    small.save(tmp_path / "small")
    again = trace.load_slim(tmp_path / "small", apply, x, like=model)
    assert again.params.layers[0].weight.dtype == jnp.bfloat16
    assert again.params.activation is model.activation
    np.testing.assert_array_equal(again.apply(again.params, x), small.apply(small.params, x))


def test_slim_twice_is_loaded_with_the_first_function(small, tmp_path):
    apply, _, (x,) = mlp()
    smaller = trace.slim(small.apply, small.params, {"fc1/kernel": np.arange(21) < 5}, x)
    smaller.save(tmp_path / "smaller")
    again = trace.load_slim(tmp_path / "smaller", apply, x)
    assert again.params["fc1"]["bias"].shape == (16,)
    np.testing.assert_array_equal(again.apply(again.params, x), smaller.apply(smaller.params, x))


def test_another_function_is_refused(small, tmp_path):
    small.save(tmp_path / "small")
    apply, _, (x,) = mlp()

    def other(params, x):
        return jnp.tanh(apply(params, x))

    with pytest.raises(ValueError, match=r"small: .*tanh 0 times then, 1 now.*args of .*float32\[5, 20\].*check=False"):
        trace.load_slim(tmp_path / "small", other, x)
    assert trace.load_slim(tmp_path / "small", other, x, check=False).apply(small.params, x).shape == (5, 6)

    def fewer(params, x):
        return x @ params["fc1"]["kernel"]

    with pytest.raises(ValueError, match="entries along axis 1 of fc1/kernel cannot go: the output of the function"):
        trace.load_slim(tmp_path / "small", fewer, x)


def test_files_of_another_kind(small, tmp_path):
    apply, params, (x,) = mlp()
    jaxsparse.save_sparse(tmp_path / "sparse", params)
    with pytest.raises(ArtifactError, match=r"sparse: a sparse model, but not from Slim.save"):
        trace.load_slim(tmp_path / "sparse", apply, x)
    small.save(tmp_path / "small")
    wide = params | {"fc2": params["fc2"] | {"kernel": jnp.ones((32, 30))}}
    with pytest.raises(ValueError, match=r"fc2/kernel had shape \(32, 24\) before .* has \(32, 30\) in like="):
        trace.load_slim(tmp_path / "small", apply, x, like=wide)
