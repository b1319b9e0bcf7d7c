"""What every launch shares: one working directory, sentences for errors, progress, results written whole or not at all."""

import atexit
import contextlib
import fcntl
import io
import json
import math
import os
import pathlib
import platform
import re
import signal
import socket
import sys
import tempfile
import threading
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
from tbptt_jax.window import quoted

matplotlib.use("agg")  # figures go to files; no display is needed
INFLUENCES = "Any of truncate, replay:WINDOWS, replay:WINDOWS:SURVIVAL, rtrl, uoro; WINDOWS is a number, or all."

_DEVICES = flags.DEFINE_integer(
    "devices",
    None,
    "JAX devices to use; default all, which on a CPU is one for each core.",
    lower_bound=1,
    upper_bound=1024,
)

console = Console(width=None if sys.stdout.isatty() else 100)


LARGEST = 2**31 - 1  # of a flag: what JAX counts in


def run(main: Callable[[], None]) -> None:
    """Runs ``main`` as an absl program. A ``ValueError`` or ``OSError`` ends it with its sentence and exit status 2.

    SIGTERM and SIGINT end it at once, with nothing half-written and status 143 and 130, unless ``main`` listens to them
    itself. So do other threads not: what they wait for does not hold it up once it is done.
    """

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}. Every setting is a flag, --name=value.")
        logging.set_verbosity(logging.WARNING)  # jax says at INFO which accelerators it did not find
        sys.stdout = output = Output(sys.stdout)
        status: Any = 0
        try:
            check_numbers()
            prepare(_DEVICES.value)
            with stop_asked("stopped; nothing is half-written.", at_once=True):
                main()
        except (ValueError, OSError) as error:
            print(f"{pathlib.Path(sys.argv[0]).stem}: {short(plain(str(error)))}", file=sys.stderr)
            status = 2
        except SystemExit as asked:
            status = asked.code
        output.flush()
        if output.error is not None and status == 0:
            print(f"What was to be told could not be written: {output.error}. The files are whole.", file=sys.stderr)
            status = 1
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        atexit._run_exitfuncs()
        os._exit(status if isinstance(status, int) else 1)

    # What `--help` and `flags.txt` tell of: the program's own flags, and those of what launches share.
    for name in (__name__, f"{__package__}.resume"):
        for flag in flags.FLAGS.get_key_flags_for_module(name):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(guarded)


class Output(io.TextIOBase):
    """Standard output that outlives its reader: after a write has failed, nothing more is written, and training goes on."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.error: str | None = None

    def attempt(self, write: Callable[[], Any]) -> None:
        try:
            if self.stream is not None:
                write()
        except OSError as error:
            self.error = (
                None if isinstance(error, BrokenPipeError) else error.strerror
            )  # who stops reading has read enough
            self.stream = None
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered goes there

    def write(self, text: str) -> int:
        self.attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self.attempt(lambda: self.stream.flush())

    def isatty(self) -> bool:
        return self.stream is not None and self.stream.isatty()

    def fileno(self) -> int:
        return 1

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.stream, "encoding", None) or "utf-8"


def check_numbers() -> None:
    """Raises a ``ValueError`` for a flag of the program that no number of its kind can be."""
    for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]):
        if isinstance(flag.value, float) and not math.isfinite(flag.value):
            raise ValueError(f"--{flag.name}={flag.value}: give a finite number.")
        if isinstance(flag.value, int) and abs(flag.value) > LARGEST:
            raise ValueError(f"--{flag.name}={quoted(flag.value)}: give a number up to {LARGEST}.")


def short(text: str) -> str:
    """``text`` with what has no end in it cut off."""
    return re.sub(r"\S{301,}", lambda found: f"{found[0][:77]}...", text)


STOP = signal.SIGTERM, signal.SIGINT


@contextlib.contextmanager
def stop_asked(promise: str, at_once: bool = False) -> Iterator[Callable[[], int]]:
    """Yields ``asked() -> int``: the first SIGTERM or SIGINT that has come, or 0. A second one ends the process at once.

    Python runs its handlers between two instructions of the main thread, so not while a call compiles or runs. A thread
    therefore listens, woken by what the interpreter writes the moment a signal comes.

    Args:
      promise: what is said when it comes.
      at_once: end the process with the first, with status 128 + the signal.
    """
    told: list[int] = []
    here, there = socket.socketpair()
    there.setblocking(False)

    def listen() -> None:
        while number := here.recv(1):
            if number[0] in STOP:
                told.append(number[0])
                if len(told) > 1:
                    os._exit(128 + told[0])
                with contextlib.suppress(OSError):
                    print(f"{signal.Signals(told[0]).name}: {promise}", file=sys.stderr, flush=True)
                if at_once:
                    os._exit(128 + told[0])

    before = {number: signal.signal(number, lambda *_: None) for number in STOP}
    waker = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield lambda: told[0] if told else 0
    finally:
        signal.set_wakeup_fd(waker)
        for number, handler in before.items():
            signal.signal(number, handler)
        there.close()
        thread.join()
        here.close()


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
    """The directory to write into, made if it is missing, and this launch's own until it ends.

    Raises:
      ValueError: if it cannot be made or written to, or another launch is writing into it.
    """
    directory = path_of(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (OSError, ValueError) as error:
        raise ValueError(_not_writable(path, getattr(error, "strerror", None) or str(error))) from error
    if jax.process_index() == 0:
        own(directory)
    return directory


def path_of(path: str) -> pathlib.Path:
    """The path that ``--workdir`` names.

    Raises:
      ValueError: if it can name none.
    """
    try:
        path.encode()
        if not path or not path.isprintable():
            raise ValueError("it is empty" if not path else "it holds control characters")
        return pathlib.Path(path).expanduser()
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            _not_writable(path, "it is not UTF-8" if isinstance(error, UnicodeError) else str(error))
        ) from error


def _not_writable(path: str, why: str) -> str:
    return f"--workdir={quoted(plain(path))[1:-1]} cannot be written to ({why.rstrip('.')}): name a directory that can."


_OWNED: dict[pathlib.Path, Any] = {}  # the open files whose locks make directories this process's


def own(directory: pathlib.Path) -> None:
    """Takes a directory for this process. The lock is the operating system's, and ends with the process, however it does.

    Raises:
      ValueError: if another process has it.
    """
    path = directory.resolve() / ".lock"
    if path in _OWNED:
        return
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read(200).strip() or "another process"
            file.close()
            raise ValueError(
                f"{directory} is being written to by {owner}. Wait until that launch has ended, stop it, or give another "
                "--workdir."
            ) from error
        if (
            path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino
        ):  # not one that its owner just removed
            break
        file.close()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _OWNED[path] = file
    atexit.register(lambda: path.unlink(missing_ok=True))


def memory_limit() -> int:
    """Bytes that a device has."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def check_fits(needs: dict[str, float]) -> None:
    """Raises a ``ValueError`` if what a launch is about to allocate is more than there is.

    Args:
      needs: what for, with its flags → bytes, by rough count.
    """
    there = memory_limit() * jax.local_device_count()
    total = sum(needs.values())
    if total > there:
        most = max(needs, key=lambda name: needs[name])
        raise ValueError(
            f"This needs some {total / 1e9:,.0f} GB, and there are {there / 1e9:,.0f} GB; most of it is {most}. Lower these flags."
        )


def lstm_bytes(
    hidden: int, layers: int, inputs: int, outputs: int, lanes: int, window: int, past: int = 0
) -> tuple[float, float]:
    """Bytes of an LSTM's training: of its parameters with what Adam keeps of them, and of a window on its way back, ``past``
    of them kept besides."""
    params = 4 * hidden * (inputs + hidden + 1) + 8 * (layers - 1) * hidden * (hidden + 1) + outputs * (hidden + 1)
    step = inputs + 8 * hidden * layers + 3 * outputs
    return 4 * 5 * params, 4 * lanes * window * step * (1 + past)


def past_of(*names: str) -> int:
    """The most windows that one of these influences keeps, as far as its name says."""
    kept = [re.fullmatch(r"replay:(\d+)(:.*)?", name) for name in names]
    return max([int(found[1]) for found in kept if found], default=0)


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
        told = "".join(f"{flag.serialize()}\n" for flag in own if flag.serialize())
        path.write_text(told, encoding="utf-8", errors="surrogateescape")
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
            print(f"{done:.4g} of {total} {unit}, {left:.0f} s left  {plain(text)}", flush=True)

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
