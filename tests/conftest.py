"""All tests run in float64: laws that hold exactly are then tested to 1e-10."""

import gc
import importlib.metadata
import itertools
import os
import pathlib
import tempfile

# The tests, and the launches that they start, compile much more than they compute: this halves it.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    + ("--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else "")
).strip()  # a flag that XLA does not know ends the process

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_default_matmul_precision", "highest")  # on a GPU float32 means TF32 otherwise
jax.config.update("jax_num_cpu_devices", 2)  # for the tests of sharding

# All processes of the tests compile the same programs again and again; the first one removes them at its end.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="tbptt_jax_", ignore_cleanup_errors=True)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": COMPILED.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    jax.config.update("jax_compilation_cache_dir", COMPILED.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

MAPS, TESTS = pathlib.Path("/proc/self/maps"), itertools.count()


def pytest_collection_finish():
    """What has been imported stays: the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def few_programs():
    """Every compiled program takes pages of its own, and a process that has some ten thousands of them ends without a word."""
    yield
    if next(TESTS) % 8 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
