"""What every launch shares: one working directory, sentences for errors, progress, results written whole or not at all."""

import contextlib
import json
import math
import os
import pathlib
import platform
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import jax
import matplotlib
import numpy as np
from absl import app, flags, logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import tbptt_jax as tb
from experiments import lock, process
from tbptt_jax import sharding
from tbptt_jax.training import TrainStep

matplotlib.use("agg")  # figures go to files; no display is needed
INFLUENCES = "Any of truncate, replay:WINDOWS, replay:WINDOWS:SURVIVAL, rtrl, uoro; WINDOWS is a number, or all."

LARGEST = 2**31 - 1  # what counts and axes are numbered with has 32 bits
QUOTED = 80  # characters of a user's text in a sentence
WHITE = "\n\t"
# What moves a terminal's cursor, or turns the direction in which a line is read.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_DEVICES = flags.DEFINE_integer(
    "devices",
    None,
    "JAX devices to use; default all, which on a CPU is one for each core.",
    lower_bound=1,
    upper_bound=4096,
)

console = Console(width=None if sys.stdout.isatty() else 100, markup=False, emoji=False)


def run(main: Callable[[], None]) -> None:
    """Runs ``main`` as an absl program, and ends the process with its exit status.

    A ``ValueError``, an ``OSError`` or memory that ran out ends it with a sentence and exit status 2; SIGTERM and SIGINT at
    once with one and status 128 + the signal, but where a launch listens to them itself.
    """
    name = pathlib.Path(sys.argv[0]).stem

    def parsed(argv: list[str]) -> list[str]:
        try:
            for argument in argv[1:]:
                if argument.startswith("-") and len(argument.partition("=")[0]) > QUOTED:  # absl looks for one like it
                    raise flags.Error(f"No flag is called {plain(argument, QUOTED)} or like it.")
            return flags.FLAGS(argv)
        except flags.Error as error:
            said = re.sub(r"\S{81,}", lambda word: plain(word[0], QUOTED), str(error))
            print(
                f"FATAL Flags parsing error: {plain(said, keep=WHITE)}\nPass --help to see the flags.", file=sys.stderr
            )
            sys.exit(1)

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            said = plain(" ".join(argv[1:]), QUOTED)
            raise app.UsageError(f"Unknown arguments: {said}. Every setting is a flag, --name=value.")
        logging.set_verbosity(logging.WARNING)  # jax says at INFO which accelerators it did not find
        prepare(_DEVICES.value)
        try:
            check_flags()
            main()
        except OSError as error:
            where = f"{plain(str(error.filename), QUOTED)}: {error.strerror}." if error.filename else str(error)
            refuse(where)
        except ValueError as error:
            refuse(str(error))
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            sizes = "hidden", "layers", "lanes", "window", "windows", "steps", "updates", "windows_per_call", "seeds"
            own = [f"--{size}" for size in sizes if size in flags.FLAGS]
            refuse(f"This needs more memory than there is ({memory() / 1e9:,.1f} GB): lower one of {', '.join(own)}.")

    def refuse(sentence: str) -> None:
        print(f"{name}: {plain(sentence, keep=WHITE)}", file=sys.stderr)
        sys.exit(2)

    def stopped(number: int) -> None:
        if console.is_terminal:
            console.show_cursor()  # a bar that is alive hides it
        print(
            f"{name}: stopped by {signal.Signals(number).name}; the same command does what is missing.", file=sys.stderr
        )
        process.leave(number)

    def all_of_it() -> None:
        with process.heard(stopped):
            app.run(guarded, flags_parser=parsed)

    process.keep_streams()
    # What `--help` and `flags.txt` tell of: the program's own flags, and those of what launches share.
    for module in (__name__, f"{__package__}.resume"):
        for flag in flags.FLAGS.get_key_flags_for_module(module):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    process.end(all_of_it)


def check_flags() -> None:
    """Raises a ``ValueError`` if a number is none that can be counted with, or a text is not UTF-8."""
    for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]):
        value, most = flag.value, 2**63 - 1 if flag.name == "seed" else LARGEST
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{flag.name}={value}: give a finite number.")
        if isinstance(value, int) and not -most <= value <= most:
            raise ValueError(f"--{flag.name}={plain(str(value), QUOTED)}: give a number of at most {most}.")
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(f"--{flag.name}={plain(text, QUOTED)} is not UTF-8: give it another name.")


def plain(text: str, at_most: int | None = None, keep: str = "") -> str:
    """A user's text as it is safe to show: control characters, but those to ``keep``, as Python writes them.

    Of a text longer than ``at_most`` characters the middle is left out.
    """
    shown = CONTROL.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)
    if at_most is None or len(shown) <= at_most:
        return shown
    return f"{shown[: at_most // 2]}…{shown[at_most // 2 + 1 - at_most :]}"


def say(text: str) -> None:
    """Prints a line that may hold a user's words: nothing in it is interpreted, and it is not broken."""
    console.print(plain(text), markup=False, highlight=False, soft_wrap=True)


def cell(text: str) -> str:
    """A user's text as a field of a CSV file, such that no spreadsheet takes it for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


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
    """Raises a ``ValueError`` if ``what`` takes more bytes than there are; ``lower`` names the flags to lower."""
    if needed > memory():
        raise ValueError(
            f"{what} would take {needed / 1e9:,.1f} GB or more, and there are {memory() / 1e9:,.1f} GB: lower {lower}."
        )


def check_training(step: TrainStep, windows: Any, runs: int, lower: str) -> None:
    """Raises a ``ValueError`` if the state of so many trainings side by side, with a gradient, does not fit.

    Args:
      step: the train step.
      windows: of one training, ``[windows, lanes, time, ...]``, or their shapes.
      runs: how many trainings.
      lower: the flags to lower, as a sentence has them.
    """
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), windows)
    state = jax.eval_shape(step.init, jax.random.key(0), first)
    check_fits("The state of the training", runs * (size(state) + size(state.params)), lower)


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


def needs(program: Any) -> tuple[int, int]:
    """All bytes that a compiled program needs of a device, and of these the temporary ones; what is donated is not there twice."""
    found = program.memory_analysis()
    if not found:
        return 0, 0
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return found.temp_size_in_bytes + kept, found.temp_size_in_bytes


def train_all(train: Callable[..., Any], keys: jax.Array, lower: str) -> Any:
    """``train(keys)`` as one program, which is looked at before it runs.

    Raises:
      ValueError: if it needs more than there is; ``lower`` names the flags to lower.
    """
    program = jax.jit(train).lower(keys).compile()
    devices = len(jax.tree.leaves(program.output_shardings)[0].device_set)
    check_fits("The training", needs(program)[0] * devices, lower)
    return program(keys)


def expanded(path: str, flag: str = "workdir") -> pathlib.Path:
    """The path that a flag names, ``~`` as the home directory.

    Raises:
      ValueError: if it names none.
    """
    if not path:
        raise ValueError(f"--{flag} is empty: name a directory; . is the one you are in.")
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"--{flag}={plain(path, QUOTED)}: there is no such home directory. Write the path out, or ./~ for a name."
        ) from error


def workdir(path: str) -> pathlib.Path:
    """The directory to write into, made if it is missing, and this launch's alone until it ends.

    Of several processes of one launch, the first holds it for all.

    Raises:
      ValueError: if it cannot be made or written to, or another launch is at work there.
    """
    directory, given, refused = expanded(path), f"--workdir={plain(path, QUOTED)}", ""
    if re.search("[\n\r\ud800-\udfff]", str(directory.absolute())):
        raise ValueError(f"{given}: its path has a line's end in it, or is not UTF-8. Name another directory.")
    try:
        if jax.process_index() == 0:
            lock.take(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except BlockingIOError as error:
        refused = f"{given}: {error}"
    except OSError as error:
        refused = f"{given} cannot be written to ({error.strerror}): name a directory that can."
    if jax.process_count() > 1 and multihost_utils.process_allgather(np.bool_(bool(refused))).any():
        refused = refused or f"{given} was refused to another of the processes, which says why."
    if refused:
        raise ValueError(refused)
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
            if depth != "all" and (len(depth) > 10 or int(depth) > LARGEST):
                raise ValueError(f"there are never more than {LARGEST} windows.")
            return tb.replay(windows if depth == "all" else int(depth), *map(float, survival))
        except ValueError as error:
            raise ValueError(f"--{flag} has {plain(name, QUOTED)}: {plain(str(error), 200)} {INFLUENCES}") from error
    raise ValueError(f"--{flag} has {plain(name, QUOTED)}, which is none. {INFLUENCES}")


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
        if not re.fullmatch(r"\d{1,18}", value.strip()) or not 1 <= int(value) <= at_most:
            raise ValueError(
                f"--{flag} has {plain(value, QUOTED)!r}: give whole numbers from 1 to {at_most}, such as --{flag}=1,2,5."
            )
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
