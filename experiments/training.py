"""The flags of a training that lasts, and the run that they ask for."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

import tbptt_jax as tb
from experiments import launch
from tbptt_jax import study
from tbptt_jax.arrays import check_whole
from tbptt_jax.horizon.suggest import BOUNDS

FLAGS = flags.FLAGS
SCHEDULES = "auto, growing:FIRST:LAST:EPOCHS, random:BASE as AWD-LSTM has it, artbp:BASE."
PASSED = (
    *("stateless", "burn_in", "learning_rate", "epochs", "seed", "windows_per_call"),
    *("checkpoint_every", "patience", "not_finite", "profile", "resume"),
)


def define(workdir: str, *, window: int = 16, learning_rate: float = 0.01, updates: int = 2000) -> None:
    """Defines them, with these defaults."""
    flags.DEFINE_string("window", str(window), f"Steps of a window, or a schedule of them: {SCHEDULES}")
    flags.DEFINE_string("influence", "truncate", f"{launch.INFLUENCES} Or replay:auto, which chooses out of --depths.")
    define_auto(["8", "16", "32", "64"], 1000, "--window=auto and --influence=replay:auto")
    flags.DEFINE_list("depths", ["0", "1", "2", "4", "8"], "Of --influence=replay:auto: the windows to go back.")
    flags.DEFINE_bool("stateless", False, "Begin each window from the initial carry, for comparison.")
    flags.DEFINE_integer("burn_in", 0, "Steps that a stateless window reads to find its state, before those it scores: windows overlap by so many, every step is scored once, and no gradient flows into the burn-in.", lower_bound=0)  # fmt: skip
    flags.DEFINE_float("learning_rate", learning_rate, "Adam's rate at the start; it falls to zero along a cosine.", lower_bound=0.0)  # fmt: skip
    flags.DEFINE_integer("updates", None, f"Updates, one a window; default {updates}.", lower_bound=1)
    flags.DEFINE_integer("epochs", None, "Times to read the training data, instead.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the parameters, and of what is drawn.")
    flags.DEFINE_integer("windows_per_call", 50, "Windows, and so updates, in one compiled call.", lower_bound=1)
    flags.DEFINE_integer("checkpoint_every", 500, "Updates from a checkpoint, and look at the validation data, to the next.", lower_bound=1)  # fmt: skip
    flags.DEFINE_integer("patience", None, "Stop after so many looks without a better one.", lower_bound=1)
    flags.DEFINE_string("average", None, "ema:DECAY, such as ema:0.999, or asgd:LOOKS, as AWD-LSTM has it.")
    flags.DEFINE_list("log", [], "Any of jsonl, tensorboard, wandb: where metrics are written, in the workdir.")
    flags.DEFINE_integer("profile", None, "The call that makes this update is traced into the workdir's profile.")
    flags.DEFINE_string("init_from", None, "A run's workdir, whose parameters are begun from.")
    flags.DEFINE_bool("resume", True, "Go on from the checkpoint in the workdir, if there is one; --noresume begins afresh.")  # fmt: skip
    flags.DEFINE_string("workdir", workdir, "Where run.json, results.json, checkpoints and the rest go.")


def define_auto(lengths: list[str] | None, every: int | None, of: str) -> None:
    """Those of what chooses itself, with these defaults; None: as the launch says."""
    told = "default those of --windows" if lengths is None else "from short to long"
    flags.DEFINE_list("lengths", lengths, f"Of windows auto: the lengths to choose from, {told}.")
    flags.DEFINE_float("tolerance", 0.5, f"Of {of}: the relative bias of the gradient that is allowed.")
    flags.DEFINE_enum("bound", BOUNDS[0], BOUNDS, f"Of {of}: how the bias is bounded, of gradients by the parameters or, as the paper does, of norms.")  # fmt: skip
    told = "; default a fifth of --updates" if every is None else ""
    flags.DEFINE_integer("look_every", every, f"Of {of}: updates from one choice to the next{told}.", lower_bound=1)


def check() -> None:
    """Raises a ``ValueError`` if flags do not go together, or name no influence, average or listener."""
    if FLAGS.updates and FLAGS.epochs:
        raise ValueError(f"--updates={FLAGS.updates} and --epochs={FLAGS.epochs} were both given: give one of them.")
    influence()
    window()
    averaging(FLAGS.average)
    listeners(FLAGS.log, pathlib.Path())


def fitted(task: study.Task, updates: int, **more: Any) -> study.Run:
    """The run of a task that the flags ask for; ``updates`` by default, ``more`` as :func:`tbptt_jax.study.fit` has it."""
    directory = launch.expanded(FLAGS.workdir)
    asked: dict[str, Any] = {name: FLAGS[name].value for name in PASSED} | {
        "window": window(),
        "influence": influence(),
        "updates": None if FLAGS.epochs else FLAGS.updates or updates,
        "workdir": directory,
        "average": averaging(FLAGS.average),
        "listeners": listeners(FLAGS.log, directory),
        "start": FLAGS.init_from,
        "devices": launch.DEVICES.value,
    }
    return study.fit(task, **asked | more)


def told_of(run: study.Run) -> dict[str, Any]:
    """What ``results.json`` says of any run."""
    seconds = sum(call.seconds for call in run.calls)
    return {
        "updates": run.updates,
        "epochs": run.epochs,
        "seconds": seconds,
        "choices": [choice._asdict() for choice in run.choices],
        **study.health_of(run.calls),
    }


def window() -> int | study.Lengths:
    """What ``--window`` names."""
    return lengths_of(FLAGS.window, "window", FLAGS.lengths, FLAGS.look_every, FLAGS.seed)


def windows_told() -> str:
    """What ``--window`` names, in words."""
    return f"windows of {FLAGS.window}" if isinstance(window(), int) else f"windows {FLAGS.window}"


def lengths_of(wanted: str, flag: str, lengths: Sequence[int | str], every: int, seed: int = 0) -> int | study.Lengths:
    """Steps, or the schedule of the name ``wanted``, of which auto looks ``every`` so many updates and chooses from ``lengths``."""
    kind, *numbers = wanted.split(":")
    try:
        if kind == "auto" and not numbers:
            return study.adaptive(FLAGS.tolerance, lengths=list(map(int, lengths)), every=every, bound=FLAGS.bound)
        if kind == "growing":
            first, last, epochs = map(int, numbers)
            return study.growing(first, last, epochs=epochs)._replace(name=wanted)
        if kind in ("random", "artbp"):
            draw = tb.schedules.random_length if kind == "random" else tb.schedules.polynomial_tail
            return study.drawn(draw(*map(int, numbers)), seed=seed)._replace(name=wanted)
        check_whole(flag, steps := int(wanted))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--{flag}={launch.short(wanted)}: {launch.short(error)} Give steps, or {SCHEDULES}"
        ) from error
    return steps


def influence() -> str | study.Depths:
    """What ``--influence`` names."""
    if FLAGS.influence != "replay:auto":
        launch.influence(FLAGS.influence, 1, "influence")
        return FLAGS.influence
    try:
        return study.adaptive_replay(
            FLAGS.tolerance, depths=list(map(int, FLAGS.depths)), every=FLAGS.look_every, bound=FLAGS.bound
        )
    except ValueError as error:
        raise ValueError(f"--influence=replay:auto: {launch.short(error)}") from error


def averaging(wanted: str | None) -> Any:
    """The average that ``--average`` names."""
    kind, _, number = (wanted or "").partition(":")
    try:
        if not wanted:
            return None
        return {"ema": lambda: study.ema(float(number or 0.999)), "asgd": lambda: study.asgd(int(number or 5))}[kind]()
    except (KeyError, ValueError) as error:
        said = launch.short(wanted)
        raise ValueError(f"--average={said}: give ema:0.999 or asgd:5, with another number if you like.") from error


def listeners(wanted: list[str], workdir: pathlib.Path) -> list[Callable]:
    """Those that ``--log`` names."""
    ready = {
        "jsonl": lambda: study.jsonl(workdir / "metrics.jsonl"),
        "tensorboard": lambda: study.tensorboard(workdir / "tensorboard"),
        "wandb": lambda: study.wandb(workdir, workdir.absolute().name, project="tbptt_jax"),
    }
    unknown = [name for name in wanted if name not in ready]
    if unknown:
        raise ValueError(f"--log has {launch.short(unknown[0])}: give any of {', '.join(ready)}.")
    return [ready[name]() for name in wanted]
