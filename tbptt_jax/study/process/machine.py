"""The machine that a study runs on: its devices, its memory, and what of a training fits."""

import contextlib
import math
import os
import pathlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import tbptt_jax as tb
from tbptt_jax.training import TrainStep


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare(devices: int | None = None) -> None:
    """Sets JAX up, before it computes anything: a CPU's cores as ``devices`` devices, programs kept from run to run.

    Compiled programs go to ``~/.cache/tbptt_jax``, or where ``JAX_COMPILATION_CACHE_DIR`` says. Vectors are as wide as the
    CPU has them (XLA prefers half of that), which makes the gates of an LSTM faster.
    """
    options = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_prefer_vector_width" not in options:
        os.environ["XLA_FLAGS"] = f"{options} --xla_cpu_prefer_vector_width=512".strip()
    jax.config.update("jax_num_cpu_devices", devices or cores())
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with contextlib.suppress(RuntimeError):  # nobody's home
            cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
            jax.config.update("jax_compilation_cache_dir", str(cache / "tbptt_jax"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def memory() -> int:
    """Bytes that the devices of this host have; a CPU's, which have it in common, what this process may use."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("bytes_limit" in each for each in stats):
        return sum(each["bytes_limit"] for each in stats)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container
        with contextlib.suppress(OSError, ValueError):
            there = min(there, int(pathlib.Path("/sys/fs/cgroup", limit).read_text()))
    return there


def size(tree: Any) -> int:
    """Bytes of a tree's arrays, or of what will be arrays."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def check_fits(what: str, needed: int, lower: str) -> None:
    """Raises a ``ValueError`` if ``what`` takes more bytes than there are; ``lower`` names what to lower."""
    if needed > memory():
        there = f"and there are {memory() / 1e9:,.1f} GB"
        raise ValueError(f"{what} would take {needed / 1e9:,.1f} GB or more, {there}: lower {lower}.")


def check_training(step: TrainStep, windows: Any, runs: int, lower: str) -> None:
    """Raises a ``ValueError`` if the state of ``runs`` trainings side by side, with a gradient, does not fit.

    ``windows`` are of one training, ``[windows, lanes, time, ...]``, or their shapes.
    """
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), windows)
    state = jax.eval_shape(step.init, jax.random.key(0), first)
    check_fits("The state of the training", runs * (size(state) + size(state.params)), lower)


def needs(program: Any) -> tuple[int, int]:
    """All bytes that a compiled program needs of a device, and of these the temporary ones; what is donated is not there twice."""
    found = program.memory_analysis()
    if not found:
        return 0, 0
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return found.temp_size_in_bytes + kept, found.temp_size_in_bytes


def mesh(*, runs: int = 1, lanes: int = 1, window: int = 1, units: int = 1, devices: int | None = None) -> Mesh:
    """The devices that ``runs`` trainings side by side, or else ``lanes`` of a model with ``units``, are worth spreading over.

    Several processes take all their devices, one those that :func:`tbptt_jax.sharding.lane_devices` says are faster.
    """
    there = jax.device_count()
    if jax.process_count() > 1:
        return tb.sharding.mesh(run=there) if lanes == 1 else tb.sharding.mesh(lane=there)
    there = min(there, devices or there)
    if lanes == 1:
        return tb.sharding.mesh(run=min(runs, there))
    return tb.sharding.mesh(lane=tb.sharding.lane_devices(lanes, window, units, there))


def meet(where: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def largest(number: int) -> int:
    """Of the numbers that the processes give."""
    return number if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int32(number)).max())
