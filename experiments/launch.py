"""What every launch shares: one working directory, sentences for errors, progress, results written whole or not at all."""

import pathlib
import re
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import matplotlib
import numpy as np
from absl import app, flags, logging

from experiments.checks import check_flags, positive_integers
from experiments.processes import join_processes
from experiments.results import made_by, write_flags, write_results
from tbptt_jax import sharding
from tbptt_jax.study.influences import INFLUENCES, LARGEST, check_influences, influence
from tbptt_jax.study.process import machine, signals
from tbptt_jax.study.process.console import console, progress, say, table
from tbptt_jax.study.process.lock import expanded, workdir
from tbptt_jax.study.process.machine import check_fits, check_training, memory
from tbptt_jax.study.process.writing import QUOTED, WHITE, cell, plain, short

matplotlib.use("agg")  # figures go to files; no display is needed
matplotlib.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False})
matplotlib.rcParams["figure.constrained_layout.use"] = True

FLAGS = flags.FLAGS
DEVICES = flags.DEFINE_integer("devices", None, "JAX devices to use; default all, which on a CPU is one for each core.", lower_bound=1, upper_bound=4096)  # fmt: skip
flags.DEFINE_enum("not_finite", "stop", ["stop", "skip"], "What a loss, gradient or carry that is not finite does: stop the run, or leave its window out and count it.")  # fmt: skip


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
                    raise flags.Error(f"No flag is called {short(argument)} or like it.")
            return flags.FLAGS(argv)
        except flags.Error as error:
            said = re.sub(r"\S{81,}", lambda word: short(word[0]), str(error))
            said = f"FATAL Flags parsing error: {plain(said, keep=WHITE)}"
            print(f"{said}\nPass --help to see the flags.", file=sys.stderr)
            sys.exit(1)

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            said = short(" ".join(argv[1:]))
            raise app.UsageError(f"Unknown arguments: {said}. Every setting is a flag, --name=value.")
        logging.set_verbosity(logging.WARNING)  # jax says at INFO which accelerators it did not find
        machine.prepare(DEVICES.value)
        try:
            check_flags()
            main()
        except OSError as error:
            where = f"{short(error.filename)}: {error.strerror}." if error.filename else str(error)
            refuse(where)
        except ValueError as error:
            refuse(str(error))
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
                print(
                    f"{name}: another of the processes has ended: see what it says, and launch all of them again to go on.",
                    file=sys.stderr,
                )
                signals.leave()  # a shutdown would wait for it
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
        sent = signal.Signals(number).name
        print(f"{name}: stopped by {sent}; the same command does what is missing.", file=sys.stderr)
        signals.leave(number)

    def all_of_it() -> None:
        with signals.heard(stopped):
            app.run(guarded, flags_parser=parsed)

    signals.keep_streams()
    # What `--help` and `flags.txt` tell of: the program's own flags, and those of what launches share.
    for module in (__name__, f"{__package__}.processes", f"{__package__}.tasks", f"{__package__}.training"):
        for flag in FLAGS.get_key_flags_for_module(module):
            FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    signals.end(all_of_it)


def train_seeds(train: Callable[[jax.Array], Any], seeds: int, lower: str) -> tuple[Any, float]:
    """``train(key)`` of each seed, as one program over the devices, and its seconds; a ``ValueError`` if it needs more than there is."""
    began, keys = time.perf_counter(), jax.random.split(jax.random.key(0), seeds)
    program = jax.jit(sharding.over_runs(train, mesh(runs=seeds))).lower(keys).compile()
    devices = len(jax.tree.leaves(program.output_shardings)[0].device_set)
    check_fits("The training", machine.needs(program)[0] * devices, lower)
    found = jax.tree.map(np.asarray, program(keys))
    return found, time.perf_counter() - began


def mesh(**sizes: int) -> Any:
    """The devices that trainings or lanes are worth spreading over, of those that ``--devices`` allows."""
    return machine.mesh(devices=DEVICES.value, **sizes)
