"""Sides that take turns, so that what else the machine does meets all alike, here or in processes of their own.

A side is made by a function and is itself a call ``() -> None`` that returns when its work is done.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.axes import Axes

Side = Callable[[], None]
Maker = Callable[[], Side]
VISIT = 0.15  # seconds: a shorter call is repeated to fill them, as training does
PAUSE = 0.02  # seconds, after which no thread of another side's waits for work at full speed, as those of OpenMP do


class Section(NamedTuple):
    """A part of the document: Markdown, and a function that draws its panel of the figure."""

    title: str
    text: str
    draw: Callable[[Axes], None]


class Timed(NamedTuple):
    """Attributes:
    times: seconds a call ``[turns]``, by side.
    failed: why a side could not run, by side.
    """

    times: dict[str, np.ndarray]
    failed: dict[str, str]


def prepare() -> None:
    """Sets JAX up before it computes: a device for each core of a CPU, vectors as wide as it has them, nothing kept.

    XLA prefers half of the vector's width; all JAX programs here, the peers' too, are given the whole.
    """
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_prefer_vector_width=512".strip()
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    jax.config.update("jax_enable_compilation_cache", False)


def take_turns(makers: dict[str, Maker], seconds: float, least: int = 5) -> Timed:
    """Makes the sides, warms them up, and lets them take turns for ``seconds``, and at least ``least`` times.

    Who begins a turn goes round. A side that cannot be made or run is left out, and why is kept.
    """
    sides: dict[str, tuple[Side, int]] = {}
    failed: dict[str, str] = {}
    for name, make in makers.items():
        try:
            side = make()
            side()  # compiles
            side()
            sides[name] = side, max(1, round(VISIT / clock(side)))
        except Exception as error:  # a peer's may be any
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
    times: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    end = time.perf_counter() + seconds
    while order and (time.perf_counter() < end or len(times[order[0]]) < least):
        for name in order:
            side, repeats = sides[name]
            time.sleep(PAUSE)
            if repeats > 1:
                side()  # the caches are another's
            times[name].append(clock(side, repeats))
        order.append(order.pop(0))
    return Timed({name: np.array(each) for name, each in times.items()}, failed)


def clock(side: Side, repeats: int = 1) -> float:
    """Seconds a call."""
    began = time.perf_counter()
    for _ in range(repeats):
        side()
    return (time.perf_counter() - began) / repeats


@contextlib.contextmanager
def elsewhere(make: Callable[..., Side], *args: Any, **environment: str) -> Iterator[Side]:
    """The side ``make(*args)`` in a process of its own, ready when this is entered; ``make`` is a module's function."""
    module = sys.modules[make.__module__].__spec__
    assert module is not None
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.turns", module.name, make.__name__, json.dumps(args)],
        env={**os.environ, **environment, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None

    def wait() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "done\n":
                return
            if line.startswith("failed "):
                raise RuntimeError(line.removeprefix("failed ").strip())
        raise RuntimeError(f"The process of `{make.__name__}` ended with status {process.wait()}.")

    def call() -> None:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        wait()

    try:
        wait()
        yield call
    finally:
        process.kill()
        process.communicate()


def _serve(module: str, name: str, args: str) -> None:
    prepare()
    try:
        side = getattr(importlib.import_module(module), name)(*json.loads(args))
        print("done", flush=True)
        for _ in sys.stdin:
            side()
            print("done", flush=True)
    except Exception as error:
        print("failed", type(error).__name__, " ".join(str(error).split())[:200], flush=True)


def quartiles(values: np.ndarray, digits: str = ".2f") -> str:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:{digits}} ({low:{digits}}–{high:{digits}})"


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def could_not_run(failed: dict[str, str]) -> str:
    return "".join(f"\n\n{name} could not run: `{why}`" for name, why in failed.items())


if __name__ == "__main__":
    _serve(*sys.argv[1:])
