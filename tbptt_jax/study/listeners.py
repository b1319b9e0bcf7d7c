"""Listeners: where the events of a run are written, each once, also over resumes.

A listener is a function of an :class:`tbptt_jax.study.Event`. After an interruption a run goes on from its newest checkpoint, and
reports again what it does again. ``"begin"`` therefore brings all that was reported up to there, and what a listener has
written is made to agree with it.
"""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from tbptt_jax.study.loop import Event
from tbptt_jax.study.process.writing import finite, whole

Listener = Callable[[Event], None]


def jsonl(path: str | pathlib.Path) -> Listener:
    """A line of JSON for each call: ``updates``, and the metrics. What is not finite is null.

    Args:
      path: of the file; its directory is made if missing.
    """
    path = pathlib.Path(path).expanduser()

    def line(event: Event) -> str:
        return json.dumps(finite({"updates": event.updates, **event.metrics}), allow_nan=False) + "\n"

    def listen(event: Event) -> None:
        if event.kind == "begin":
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole(path) as part:
                part.write_text("".join(map(line, event.history)))
        elif event.kind == "call":
            with path.open("a") as file:
                file.write(line(event))

    return listen


def tensorboard(directory: str | pathlib.Path) -> Listener:
    """TensorBoard's event files, a scalar for each metric at each call, its step the updates.

    Args:
      directory: of the run, and of nothing else: event files that are there are written anew from the run's history.

    Raises:
      ImportError: if tensorboardX is not there (extra ``experiments``).
    """
    from tensorboardX import SummaryWriter

    directory = pathlib.Path(directory).expanduser()
    writer: Any = None

    def write(event: Event) -> None:
        for name, value in event.metrics.items():
            writer.add_scalar(name, value, event.updates)

    def listen(event: Event) -> None:
        nonlocal writer
        if event.kind == "begin":
            for old in directory.glob("events.out.tfevents.*"):
                old.unlink()
            writer = SummaryWriter(str(directory))
            for past in event.history:
                write(past)
        elif event.kind == "call":
            write(event)
        writer.flush()
        if event.kind == "end":
            writer.close()

    return listen


def wandb(directory: str | pathlib.Path, name: str, **options: Any) -> Listener:
    """A run of Weights & Biases, its step the updates.

    Online, what its server has already is not sent again; offline (``mode="offline"``, or ``WANDB_MODE``), an offline run
    that was interrupted is written anew from the run's history.

    Args:
      directory: where W&B keeps its files, such as the workdir.
      name: the run's id, the same when it goes on; letters, digits, ``-`` and ``_``.
      options: of ``wandb.init``, such as ``project`` and ``config``.

    Raises:
      ImportError: if wandb is not there (extra ``wandb``).
    """
    import wandb as client

    directory = pathlib.Path(directory).expanduser()
    run: Any = None
    first = 0

    def write(event: Event) -> None:
        if event.updates >= first:
            run.log(event.metrics, step=event.updates)

    def listen(event: Event) -> None:
        nonlocal run, first
        if event.kind == "begin":
            directory.mkdir(parents=True, exist_ok=True)
            for old in (directory / "wandb").glob(f"offline-run-*-{name}"):
                shutil.rmtree(old)
            run = client.init(**{"dir": str(directory), "id": name, "name": name, "resume": "allow", **options})
            first = 0 if run.settings.mode == "offline" else run.step
            for past in event.history:
                write(past)
        elif event.kind == "call":
            write(event)
        else:
            run.finish()

    return listen
