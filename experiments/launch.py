"""What every launch shares: one working directory, sentences for errors, progress, results written whole or not at all."""

import contextlib
import json
import math
import os
import pathlib
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import jax
import matplotlib
from absl import app, flags, logging
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import tbptt_jax as tb
from tbptt_jax import sharding

matplotlib.use("agg")  # figures go to files; no display is needed
INFLUENCES = "Any of truncate, replay:WINDOWS, replay:WINDOWS:SURVIVAL, rtrl, uoro; WINDOWS is a number, or all."

_DEVICES = flags.DEFINE_integer(
    "devices", None, "JAX devices to use; default all, which on a CPU is one for each core.", lower_bound=1
)

console = Console(width=None if sys.stdout.isatty() else 100)


def run(main: Callable[[], None]) -> None:
    """Runs ``main`` as an absl program. A ``ValueError`` or ``OSError`` ends it with its sentence and exit status 2."""

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}. Every setting is a flag, --name=value.")
        logging.set_verbosity(logging.WARNING)  # jax says at INFO which accelerators it did not find
        prepare(_DEVICES.value)
        try:
            for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]):
                if isinstance(flag.value, float) and not math.isfinite(flag.value):
                    raise ValueError(f"--{flag.name}={flag.value}: give a finite number.")
            main()
        except (ValueError, OSError) as error:
            print(f"{pathlib.Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
            sys.exit(2)

    # What `--help` and `flags.txt` tell of: the program's own flags, and those of what launches share.
    for name in (__name__, f"{__package__}.resume"):
        for flag in flags.FLAGS.get_key_flags_for_module(name):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(guarded)


def plain(text: str) -> str:
    """``text`` as a terminal shows it, and no more: what would move its cursor or turn its writing is shown escaped."""
    shown = (c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
    return "".join(shown).encode("utf-8", "backslashreplace").decode()


def say(text: str) -> None:
    """Prints a sentence as it is; what it has from a file, a flag or a path is no markup."""
    console.print(plain(text), markup=False, highlight=False, soft_wrap=True)


def no_formula(text: str) -> str:
    """A name for a table, such that no spreadsheet takes it for a formula (OWASP, *CSV injection*)."""
    return f"'{text}" if text[:1] in "=+-@\t\r" and text[:1] else text


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
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache / "tbptt_jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def mesh(*, runs: int = 1, lanes: int = 1, window: int = 1, units: int = 1) -> Mesh:
    """The devices that ``runs`` trainings side by side, or else ``lanes`` of an LSTM with ``units``, are worth spreading over.

    Several processes take all their devices, one those that :func:`tbptt_jax.sharding.lane_devices` says are faster.
    """
    devices = jax.device_count()
    if jax.process_count() > 1:
        return sharding.mesh(run=devices) if lanes == 1 else sharding.mesh(lane=devices)
    devices = min(devices, _DEVICES.value or devices)
    if lanes == 1:
        return sharding.mesh(run=min(runs, devices))
    return sharding.mesh(lane=sharding.lane_devices(lanes, window, units, devices))


def workdir(path: str) -> pathlib.Path:
    """The directory to write into, made if it is missing.

    Raises:
      ValueError: if it cannot be made or written to.
    """
    directory = pathlib.Path(path).expanduser()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(
            f"--workdir={path} cannot be written to ({error.strerror}): name a directory that can."
        ) from error
    return directory


def influence(name: str, windows: int, flag: str = "influences") -> tb.Influence:
    """The influence that a flag names, for a stream of ``windows`` windows.

    Raises:
      ValueError: if it names none.
    """
    kind, *settings = name.split(":")
    if kind in ("truncate", "rtrl", "uoro") and not settings:
        return {"truncate": tb.truncate, "rtrl": tb.rtrl, "uoro": tb.uoro}[kind]()
    if kind == "replay" and re.fullmatch(r"(all|\d+)(:[\d.]+(e-?\d+)?)?", ":".join(settings)):
        depth, *survival = settings
        try:
            return tb.replay(windows if depth == "all" else int(depth), *map(float, survival))
        except ValueError as error:
            raise ValueError(f"--{flag} has {name}: {error} {INFLUENCES}") from error
    raise ValueError(f"--{flag} has {name}, which is none. {INFLUENCES}")


def check_influences(names: list[str]) -> None:
    """Raises a ``ValueError`` unless each of ``names``, at least one, is an influence's."""
    if not names:
        raise ValueError(f"--influences is empty. {INFLUENCES}")
    for name in names:
        influence(name, 1)


def positive_integers(flag: str, values: list[str], at_most: int) -> list[int]:
    """The numbers of a list flag, each from 1 to ``at_most``.

    Raises:
      ValueError: if one is not.
    """
    for value in values:
        if not value.strip().isdecimal() or not 1 <= int(value) <= at_most:
            raise ValueError(f"--{flag} has {value!r}: give whole numbers from 1 to {at_most}, such as --{flag}=1,2,5.")
    if not values:
        raise ValueError(f"--{flag} is empty: give at least one number, such as --{flag}=1,2,5.")
    return sorted({int(value) for value in values})


def write_results(directory: pathlib.Path, results: dict[str, Any], figure: Any = None) -> None:
    """Writes ``results.json`` with the flags and versions of this run, ``flags.txt`` for ``--flagfile``, and a figure.

    Each file is written beside its place and moved into it, so that none is ever seen half-written. What is not finite,
    as where a training diverged, is written as null.
    """
    own = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    made_by = {
        "flags": {flag.name: flag.value for flag in own},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("jax", "flax", "optax")}},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    if jax.process_index() > 0:
        return
    with whole(directory / "flags.txt") as path:
        path.write_text("".join(f"{flag.serialize()}\n" for flag in own if flag.serialize()))
    if figure is not None:
        with whole(directory / "figure.png") as path:
            figure.savefig(path, dpi=150, bbox_inches="tight", format="png")
    with whole(directory / "results.json") as path:
        path.write_text(json.dumps(finite({**results, **made_by}), indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def progress(total: int, unit: str) -> Iterator[Callable[[float, str], None]]:
    """Shows ``report(done, text)``: a live bar on a terminal, elsewhere a plain line every few seconds."""
    if console.is_terminal:
        columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn(unit)
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda done, text: bar.update(task, completed=done, description=text)
        return

    began = last = time.monotonic()

    def report(done: float, text: str) -> None:
        nonlocal last
        if time.monotonic() - last > 5 or done == total:
            last = time.monotonic()
            left = (last - began) * (total - done) / done if done else 0
            print(f"{done:.4g} of {total} {unit}, {left:.0f} s left  {text}", flush=True)

    yield report


def finite(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


@contextlib.contextmanager
def whole(target: pathlib.Path) -> Iterator[pathlib.Path]:
    part = target.with_name(f".{target.name}.part")
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
