"""Trains any task, so that it lasts: your own model and data, or one of the library's.

python -m experiments.fit --task=mine.py:task --window=32 --updates=2000 --workdir=runs/mine
python -m experiments.fit --task=lag --set=hidden=32 --window=10 --epochs=3

A task is a function that returns a ``study.Task``. Interrupted in any way, the same command goes on from the last checkpoint
and ends with the same bits; with more ``--updates`` it goes on after its end. ``study.load(workdir)`` gives the model back.
"""

import pathlib
from collections.abc import Callable
from typing import Any

from absl import flags

from experiments import launch, tasks
from tbptt_jax import study

FLAGS = flags.FLAGS
tasks.define(None)
flags.DEFINE_integer("window", 16, "Steps of a window.", lower_bound=1)
flags.DEFINE_string("influence", "truncate", launch.INFLUENCES)
flags.DEFINE_bool("stateless", False, "Begin each window from the initial carry, for comparison.")
flags.DEFINE_integer("burn_in", 0, "Steps that a stateless window reads before those it scores.", lower_bound=0)
flags.DEFINE_float("learning_rate", 0.01, "Adam's rate at the start; it falls to zero along a cosine.", lower_bound=0.0)
flags.DEFINE_integer("updates", None, "Updates, one a window; default 2000.", lower_bound=1)
flags.DEFINE_integer("epochs", None, "Times to read the training data, instead.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Of the parameters, and of data that is drawn.")
flags.DEFINE_integer("windows_per_call", 50, "Windows, and so updates, in one compiled call.", lower_bound=1)
flags.DEFINE_integer("checkpoint_every", 500, "Updates from a checkpoint, and look at the validation data, to the next.", lower_bound=1)  # fmt: skip
flags.DEFINE_integer("patience", None, "Stop after so many looks without a better one.", lower_bound=1)
flags.DEFINE_string("average", None, "ema:DECAY, such as ema:0.999, or asgd:LOOKS, as AWD-LSTM has it.")
flags.DEFINE_list("log", [], "Any of jsonl, tensorboard, wandb: where metrics are written, in the workdir.")
flags.DEFINE_integer("profile", None, "The call that makes this update is traced into the workdir's profile.")
flags.DEFINE_string("init_from", None, "A run's workdir, whose parameters are begun from.")
flags.DEFINE_bool("resume", True, "Go on from the checkpoint in the workdir, if there is one.")
flags.DEFINE_string("workdir", "runs/fit", "Where run.json, results.json, checkpoints and the rest go.")


def averaging(wanted: str | None) -> Any:
    """The average that ``--average`` names."""
    kind, _, number = (wanted or "").partition(":")
    try:
        if not wanted:
            return None
        return {"ema": lambda: study.ema(float(number or 0.999)), "asgd": lambda: study.asgd(int(number or 5))}[kind]()
    except (KeyError, ValueError) as error:
        given = launch.plain(str(wanted), launch.QUOTED)
        raise ValueError(f"--average={given}: give ema:0.999 or asgd:5, with another number if you like.") from error


def listeners(wanted: list[str], workdir: pathlib.Path) -> list[Callable]:
    """Those that ``--log`` names."""
    ready = {
        "jsonl": lambda: study.jsonl(workdir / "metrics.jsonl"),
        "tensorboard": lambda: study.tensorboard(workdir / "tensorboard"),
        "wandb": lambda: study.wandb(workdir, workdir.absolute().name, project="tbptt_jax"),
    }
    unknown = [name for name in wanted if name not in ready]
    if unknown:
        raise ValueError(f"--log has {launch.plain(unknown[0], launch.QUOTED)}: give any of {', '.join(ready)}.")
    return [ready[name]() for name in wanted]


def main() -> None:
    if FLAGS.updates and FLAGS.epochs:
        raise ValueError(f"--updates={FLAGS.updates} and --epochs={FLAGS.epochs} were both given: give one of them.")
    directory, average = launch.expanded(FLAGS.workdir), averaging(FLAGS.average)
    listen = listeners(FLAGS.log, directory)
    launch.influence(FLAGS.influence, 1, "influence")
    task = tasks.chosen()()
    launch.join_processes(task.lanes)
    names = (
        *("learning_rate", "stateless", "burn_in", "seed", "windows_per_call", "checkpoint_every", "patience"),
        *("not_finite", "profile", "resume"),
    )
    chosen: Any = {name: FLAGS[name].value for name in names}
    run = study.fit(
        task,
        window=FLAGS.window,
        updates=None if FLAGS.epochs else FLAGS.updates or 2000,
        epochs=FLAGS.epochs,
        workdir=directory,
        influence=FLAGS.influence,
        average=average,
        listeners=listen,
        start=FLAGS.init_from,
        devices=launch.DEVICES.value,
        **chosen,
    )
    how = {"stateless": FLAGS.stateless, "burn_in": FLAGS.burn_in, "window": FLAGS.window if FLAGS.stateless else None}
    data = {name: streams for name in ("valid", "test") if (streams := getattr(task, name)) is not None}
    scores = {name: study.evaluate(task, run.params, s, seed=FLAGS.seed, **how) for name, s in data.items()}
    seconds = sum(call.seconds for call in run.calls)
    results = {
        "task": task.name,
        "scores": scores,
        "updates": run.updates,
        "epochs": run.updates / run.windows,
        "seconds": seconds,
        **study.health_of(run.calls),
        "curve": [(call.updates, call.loss) for call in run.calls],
    }
    launch.write_results(directory, results)
    shown = "; ".join(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in each.items()) for name, each in scores.items())
    launch.say(
        f"{task.name}, windows of {FLAGS.window}, {run.updates} updates: {shown or f'loss {run.calls[-1].loss:.4g}'}. {seconds:.0f} s."
    )
    launch.say(f"Written to {directory}: run.json, results.json, flags.txt, checkpoints")


if __name__ == "__main__":
    launch.run(main)
