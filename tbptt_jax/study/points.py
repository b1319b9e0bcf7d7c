"""The points of a sweep on disk: each whole or not at all, found again by its name."""

import json
import pathlib
import re
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np

from tbptt_jax.study.process.writing import finite, short, whole, write_json
from tbptt_jax.study.task import Task
from tbptt_jax.study.trainings import Trained, curve

MARK = "sweep.json"


class Point(NamedTuple):
    """What is trained, and compared with the others of its budget."""

    budget: str  # "data" or "updates", what is equal for all windows
    carry: str  # "stateful" or "stateless"
    influence: str
    window: int | str  # steps, or a schedule's name
    params: tuple[tuple[str, Any], ...] = ()  # of the task's arguments those that are swept

    @property
    def name(self) -> str:
        chosen = "".join(f"-{name}={value}" for name, value in self.params).replace("/", "_")
        window = re.sub(r"[^\w.-]", "_", str(self.window))
        return f"{self.budget}-{self.carry}-{self.influence.replace(':', '_')}-{window}{chosen}"

    def __str__(self) -> str:
        chosen = "".join(f", {name} {value}" for name, value in self.params)
        windows = f"windows of {self.window}" if isinstance(self.window, int) else f"windows {self.window}"
        return f"{self.carry}, {self.influence}, {windows}{chosen}, equal {self.budget}"


def rows_of(task: Task, point: Point, trained: Trained, settings: dict[str, Any], steps_each: float) -> list[dict]:
    """A row for each learning rate; ``steps_each`` are the steps of an update by windows of one length."""
    seeds, updates = settings["seeds"], trained.losses.shape[1]
    carried, window = point.carry == "stateful", point.window
    rows = []
    for i, rate in enumerate(settings["learning_rates"]):
        mine = slice(i * seeds, (i + 1) * seeds)
        told = (
            trained.told[i]
            if trained.told
            else {
                "updates": updates,
                "steps": round(updates * steps_each),
                "curve": curve(trained.losses[mine], trained.weights[mine], steps_each),
            }
        )
        rows.append(
            {
                "task": settings["task"],
                **point._asdict(),
                "params": dict(point.params),
                "learning_rate": rate,
                "seeds": seeds,
                **told,
                "final_loss": float(trained.scores[mine, 0].mean()),
                "final_metric": float(trained.scores[mine, 1].mean()),
                "losses": trained.scores[mine, 0].tolist(),
                "metrics": trained.scores[mine, 1].tolist(),
                "exact_metric": task.exact(carried, window) if task.exact and isinstance(window, int) else None,
                "seconds": trained.seconds,
                "compile_seconds": trained.compile_seconds,
                "temp_bytes": trained.temp_bytes,
            }
        )
    return rows


def keep(directory: pathlib.Path, point: Point, rows: list[dict], params: Any) -> None:
    """A point on disk: the parameters of its first seed at each rate, then its rows, which say that it is done."""
    if jax.process_index() > 0:
        return
    with whole(directory / f"{point.name}.npz") as path, path.open("wb") as file:
        np.savez(file, *jax.tree.leaves(params))
    write_json(directory / f"{point.name}.json", rows)
    (directory / f"{point.name}.failed.json").unlink(missing_ok=True)


def keep_failed(directory: pathlib.Path, point: Point, error: Exception) -> str:
    """Why a point failed, on disk until it is done."""
    why = f"{type(error).__name__}: {error}".splitlines()[0]
    row = {**point._asdict(), "params": dict(point.params), "error": why}
    write_json(directory / f"{point.name}.failed.json", row)
    return why


def mark(directory: pathlib.Path, settings: dict[str, Any]) -> None:
    """Says which sweep the directory holds."""
    write_json(directory / MARK, settings)


def check_same_sweep(directory: pathlib.Path, settings: dict[str, Any]) -> None:
    """Raises a ``ValueError`` if the directory holds another sweep."""
    path = directory / MARK
    if not path.exists():
        return
    try:
        there = dict(json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{short(path)} is broken, so its sweep is not known: give another --workdir.") from error
    here = json.loads(json.dumps(settings))
    every = {**here, **there}
    differ = [f"{k} {short(there.get(k))}, here {short(here.get(k))}" for k in every if there.get(k) != here.get(k)]
    if differ:
        other = f"{short(directory)} holds another sweep: there {'; '.join(differ)}."
        raise ValueError(f"{other} Give its flags to go on with it, or another --workdir.")


def found_in(kept: list[pathlib.Path], points: list[Point], ending: str) -> dict[Point, pathlib.Path]:
    """Those points of which one of the directories has the file."""
    places = {p: [d / "points" / f"{p.name}{ending}" for d in kept] for p in points}
    there = {p: [path for path in each if path.exists()] for p, each in places.items()}
    return {p: each[0] for p, each in there.items() if each}


def write_events(directory: pathlib.Path, point: Point, rows: list[dict[str, Any]]) -> None:
    """TensorBoard's event files, one run for each row."""
    from tensorboardX import SummaryWriter

    for row in finite(rows):
        name = f"{point.name}-{row['learning_rate']:g}"
        shutil.rmtree(directory / name, ignore_errors=True)  # or its curves would be drawn twice
        with SummaryWriter(str(directory / name)) as writer:
            losses = [("loss", *at) for at in zip(row["curve"]["updates"], row["curve"]["loss"], strict=True)]
            for tag, update, value in [*losses, ("final_metric", row["updates"], row["final_metric"])]:
                if value is not None:  # it diverged
                    writer.add_scalar(tag, value, update)
