"""All tests run in float64: laws that hold exactly are then tested to 1e-10."""

import contextlib
import gc
import importlib.metadata
import itertools
import os
import pathlib
import tempfile
import time

# The tests, and the launches that they start, compile much more than they compute: this halves it.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1 "
    + ("--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else "")
).strip()  # a flag that XLA does not know ends the process

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_default_matmul_precision", "highest")  # on a GPU float32 means TF32 otherwise
jax.config.update("jax_num_cpu_devices", 2)  # for the tests of sharding

# Launches compile the same programs again and again: they share them, and the first process removes them at its end.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="tbptt_jax_", ignore_cleanup_errors=True)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": COMPILED.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
# What the tests' own processes compile is there the next time. No launch writes into it: some are killed as they write.
OWN = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "compiled"
jax.config.update("jax_compilation_cache_dir", str(OWN))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

MAPS, TESTS = pathlib.Path("/proc/self/maps"), itertools.count()


def pytest_configure():
    for program in OWN.glob("*-cache"):  # of two weeks ago
        with contextlib.suppress(FileNotFoundError):
            if program.stat().st_mtime < time.time() - 14 * 24 * 3600:
                program.unlink()


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
