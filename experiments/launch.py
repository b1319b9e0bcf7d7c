"""What every launch shares: one working directory, sentences for errors, progress, results written whole or not at all."""

import math
import pathlib
import platform
import re
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import matplotlib
from absl import app, flags, logging

from tbptt_jax.study import machine, process
from tbptt_jax.study.console import console as console
from tbptt_jax.study.console import progress as progress
from tbptt_jax.study.console import say as say
from tbptt_jax.study.influences import INFLUENCES as INFLUENCES
from tbptt_jax.study.influences import LARGEST as LARGEST
from tbptt_jax.study.influences import check_influences as check_influences
from tbptt_jax.study.influences import influence as influence
from tbptt_jax.study.lock import expanded as expanded
from tbptt_jax.study.lock import workdir as workdir
from tbptt_jax.study.machine import check_fits as check_fits
from tbptt_jax.study.machine import check_training as check_training
from tbptt_jax.study.machine import memory as memory
from tbptt_jax.study.machine import size as size
from tbptt_jax.study.machine import train_all as train_all
from tbptt_jax.study.writing import QUOTED as QUOTED
from tbptt_jax.study.writing import WHITE as WHITE
from tbptt_jax.study.writing import cell as cell
from tbptt_jax.study.writing import plain as plain
from tbptt_jax.study.writing import whole as whole
from tbptt_jax.study.writing import write_json as write_json

matplotlib.use("agg")  # figures go to files; no display is needed

FLAGS = flags.FLAGS
DEVICES = flags.DEFINE_integer(
    "devices",
    None,
    "JAX devices to use; default all, which on a CPU is one for each core.",
    lower_bound=1,
    upper_bound=4096,
)

flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of the first of several processes, the same for all; auto: found by itself on Slurm and Kubernetes.",
)
flags.DEFINE_enum(
    "not_finite",
    "stop",
    ["stop", "skip"],
    "What a loss, gradient or carry that is not finite does: stop the run, or leave its window out and count it.",
)
flags.DEFINE_integer("processes", None, "How many processes there are, each with lanes of its own.", lower_bound=1)
flags.DEFINE_integer("process", None, "Which of them this is, from 0.", lower_bound=0)


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
        machine.prepare(DEVICES.value)
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
    for module in (__name__, f"{__package__}.tasks"):
        for flag in FLAGS.get_key_flags_for_module(module):
            FLAGS.register_key_flag_for_module(sys.argv[0], flag)
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


def made_by() -> dict[str, Any]:
    """The flags, versions and devices of this launch."""
    own = FLAGS.get_key_flags_for_module(sys.argv[0])
    return {
        "flags": {flag.name: flag.value for flag in own},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("jax", "flax", "optax")}},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def write_flags(directory: pathlib.Path) -> None:
    """``flags.txt``, to launch it again with ``--flagfile``."""
    if jax.process_index() == 0:
        with whole(directory / "flags.txt") as path:
            own = FLAGS.get_key_flags_for_module(sys.argv[0])
            path.write_text("".join(f"{flag.serialize()}\n" for flag in own if flag.serialize()))


def write_results(directory: pathlib.Path, results: dict[str, Any], figure: Any = None) -> None:
    """Writes ``results.json`` with the flags and versions of this run, ``flags.txt`` and a figure, each whole or not at all.

    What is not finite, as where a training diverged, is written as null.
    """
    if jax.process_index() > 0:
        return
    write_flags(directory)
    if figure is not None:
        with whole(directory / "figure.png") as path:
            figure.savefig(path, dpi=150, bbox_inches="tight", format="png")
    write_json(directory / "results.json", {**results, **made_by()})


def join_processes(lanes: int) -> None:
    """Joins the processes that the flags name, before JAX computes anything; none are named: this is the only one.

    Raises:
      ValueError: if the flags do not go together, the others are not found, or the lanes do not divide by all devices.
    """
    if FLAGS.coordinator is None and FLAGS.processes is FLAGS.process is None:
        return
    automatic = FLAGS.coordinator == "auto" and FLAGS.processes is FLAGS.process is None
    if not automatic and (
        None in (FLAGS.coordinator, FLAGS.processes, FLAGS.process) or FLAGS.process >= FLAGS.processes
    ):
        raise ValueError(
            "Several processes need --coordinator=HOST:PORT, --processes=N and --process=I with I from 0 to N - 1, or "
            "--coordinator=auto alone."
        )
    try:
        jax.distributed.initialize(*(() if automatic else (FLAGS.coordinator, FLAGS.processes, FLAGS.process)))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"The processes did not meet: {str(error).splitlines()[0]}") from error
    console.quiet = jax.process_index() > 0
    if lanes % jax.device_count():
        raise ValueError(
            f"--lanes={lanes} cannot be spread over the {jax.device_count()} devices of {jax.process_count()} processes: "
            f"give a multiple of {jax.device_count()}."
        )


def mesh(**sizes: int) -> Any:
    """The devices that trainings or lanes are worth spreading over, of those that ``--devices`` allows."""
    return machine.mesh(devices=DEVICES.value, **sizes)
