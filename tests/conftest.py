"""Eight virtual CPU devices, no silent broadcasting of masks of the wrong rank, and nothing compiled twice.

Many tests train the same small networks, often in processes of their own: what one of them has compiled, the others of
the session find in a folder.
"""

import importlib.metadata
import os
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

# For the workers of pytest-xdist, and the programs that tests start.
CACHE = "JAX_COMPILATION_CACHE_DIR"
OWN_CACHE = CACHE not in os.environ
if OWN_CACHE:
    os.environ[CACHE] = tempfile.mkdtemp(prefix="jaxsparse_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Nearly all that is compiled runs for a moment: not worth a program that is as fast as can be.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "True")
# XLA's older emitters of CPU code compile in half the time. JAX 0.11 no longer has them, and an unknown flag would end
# the process.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
TPU_COMPILER = Path(sys.prefix) / "tpu/libtpu/libtpu.so"  # where the Makefile puts it
if TPU_COMPILER.exists():
    os.environ.setdefault("TPU_LIBRARY_PATH", str(TPU_COMPILER))
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it is for one process at a time that has a TPU

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# The same examples every time, or others. No deadline: the first call of what is jitted compiles.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None)
settings.load_profile("repeatable")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--part", default="1/1", metavar="K/N", help="run the K-th of N parts of the tests, from 1 to N")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """The examples of docstrings are slow tests, as those of the documentation are. Parts are spread by name."""
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker(pytest.mark.slow)
    part, parts = map(int, config.getoption("part").split("/"))
    others = [item for item in items if zlib.crc32(item.nodeid.encode()) % parts != part - 1]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if zlib.crc32(item.nodeid.encode()) % parts == part - 1]


def pytest_unconfigure(config):
    if OWN_CACHE:
        shutil.rmtree(os.environ[CACHE], ignore_errors=True)
