"""The trainings of a sweep whose windows a schedule decides: a :func:`tbptt_jax.study.fit` for each seed and learning rate.

One after another, since each run may choose windows of its own. What is told of a rate's runs, beside what is told of a window's:

    updates, steps     made and read, of all lanes, in the mean over seeds
    mean_window        steps of a lane over updates
    look_seconds       of all runs of all rates, as the other seconds are
    windows            of each seed: [[steps, window], ...], from which step on windows had that length at most; last, where it ended
    looks              of each seed: what was chosen at each, and the seconds that it took
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from tbptt_jax.study.fit import Run, fit
from tbptt_jax.study.lengths import Lengths
from tbptt_jax.study.loop import Event
from tbptt_jax.study.scoring import evaluate
from tbptt_jax.study.task import Figure, Task, figures
from tbptt_jax.study.trainings import PLACES, Trained, Training, is_shared, shape_of


def train(
    task: Task, training: Training, report: Callable[[int, float], None] = lambda updates, loss: None, devices: int | None = None
) -> Trained:  # fmt: skip
    """All runs of a training; ``report(updates, loss)`` after each call, the updates as if all runs were one."""
    assert isinstance(training.window, Lengths)
    began, score = time.perf_counter(), figures(task)[0]
    runs = [(rate, seed) for rate in training.rates for seed in range(training.seeds)]
    judged = task._replace(
        valid=None,  # the last parameters are judged, as of fixed windows
        test=task.valid if task.test is None else task.test,
        figures=(Figure("a step's loss", task.loss), score._replace(name="score")),
    )
    shape = shape_of(task)
    reading = shape.rows * shape.steps / shape.lanes  # steps of a lane
    done: list[Run] = []
    scores: list[list[float]] = []
    looked: list[list[float]] = []
    with compiling() as compiled:
        for rate, seed in runs:
            looked.append([])

            def on_the_way(event: Event) -> None:
                if event.kind == "call":
                    read = training.epochs and event.metrics["steps"] / (training.epochs * reading)
                    part = min(1.0, read or event.updates / training.updates)
                    report(round(training.updates * (len(done) + part) / len(runs)), event.metrics["loss"])

            run = fit(
                judged, window=_timed(training.window, looked[-1], compiled), influence=training.influence, seed=seed,
                updates=None if training.epochs else training.updates, epochs=training.epochs, learning_rate=rate,
                not_finite="skip", devices=devices, listeners=[on_the_way], quiet=True,
            )  # fmt: skip
            found = list(evaluate(judged, run.params, seed=0 if is_shared(task) else seed).values())
            scores.append([np.nan] * 2 if any(call.skipped for call in run.calls) else found)  # it diverged
            kept = jax.device_get(run.params) if seed == 0 else None
            done.append(run._replace(state=None, params=kept))  # type: ignore[arg-type]  # states are large
        compile_seconds = compiled()
    each_rate = [slice(i, i + training.seeds) for i in range(0, len(runs), training.seeds)]
    looks = sum(map(sum, looked))
    told = tuple(
        {**_told(done[mine], looked[mine], training.epochs is None, shape.rows * shape.steps), "look_seconds": looks}
        for mine in each_rate
    )
    params = jax.tree.map(lambda *x: np.stack(x), *(run.params for run in done[:: training.seeds]))
    seconds = time.perf_counter() - began - compile_seconds
    none = np.zeros((len(runs), 0))
    return Trained(none, none, np.array(scores), params, seconds, compile_seconds, None, told)


def _told(runs: list[Run], looked: list[list[float]], by_updates: bool, size: int) -> dict[str, Any]:
    """What a rate's runs did, the steps of all lanes, of which one reading of the data has ``size``."""
    lanes = [size / (run.steps or 1) for run in runs]
    steps = [(run.calls[-1].steps or 0) for run in runs]
    return {
        "updates": round(np.mean([run.updates for run in runs])),
        "steps": round(np.mean([n * x for n, x in zip(steps, lanes, strict=True)])),
        "mean_window": float(np.mean([n / run.updates for n, run in zip(steps, runs, strict=True)])),
        "curve": _curve(runs, lanes, by_updates),
        "windows": [_windows(run, n) for run, n in zip(runs, lanes, strict=True)],
        "looks": [
            [
                {**choice._asdict(), "steps": round(choice.steps * n), "seconds": seconds}
                for choice, seconds in zip(run.choices, each, strict=True)
            ]
            for run, n, each in zip(runs, lanes, looked, strict=True)
        ],
    }


def _windows(run: Run, lanes: float) -> list[list[int]]:
    found: list[list[int]] = []
    begin = 0
    for call in run.calls:
        if not found or found[-1][1] != call.window:
            found.append([round(begin * lanes), call.window or 0])
        begin = call.steps or 0
    return [*found, [round(begin * lanes), found[-1][1]]]


def _curve(runs: list[Run], lanes: list[float], by_updates: bool) -> dict[str, list]:
    """The training loss along the way, as :func:`tbptt_jax.study.trainings.curve` has it; within a call it is even."""
    totals = []
    for run, n in zip(runs, lanes, strict=True):
        of_calls = np.array([(c.updates, (c.steps or 0) * n, c.weight, c.loss * c.weight) for c in run.calls]).T
        of_calls[2:] = of_calls[2:].cumsum(1)
        totals.append(np.pad(of_calls, ((0, 0), (1, 0))))
    along = 0 if by_updates else 1
    places = np.linspace(
        0, min(total[along, -1] for total in totals), min(PLACES, *(t.shape[1] - 1 for t in totals)) + 1
    )
    at = np.array([[np.interp(places, total[along], row) for row in total] for total in totals])  # [runs, 4, places]
    weight, loss = np.diff(at[:, 2]), np.diff(at[:, 3])
    scored = (weight > 0).all(0)
    each = loss[:, scored] / weight[:, scored]
    numbers = (*at.mean(0)[:2, 1:][:, scored], each.mean(0), each.min(0), each.max(0))
    return {name: x.tolist() for name, x in zip(("updates", "steps", "loss", "low", "high"), numbers, strict=True)}


def _timed(lengths: Lengths, seconds: list[float], compiled: Callable[[], float]) -> Lengths:
    """The same schedule, which also says what each of its looks took, without what was compiled for it."""
    if (look := lengths.look) is None:
        return lengths

    def choose(*place: Any) -> Any:
        began, before = time.perf_counter(), compiled()
        found = look.choose(*place)
        seconds.append(time.perf_counter() - began - (compiled() - before))
        return found

    return lengths._replace(look=look._replace(choose=choose))


@contextlib.contextmanager
def compiling() -> Iterator[Callable[[], float]]:
    """Yields ``compiled() -> seconds`` that JAX has traced and compiled for since, what is nested counted once."""
    spans: list[tuple[float, float]] = []

    def listen(event: str, start_time: float, end_time: float, **kwargs: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            spans.append((start_time, end_time))

    def compiled() -> float:
        total = until = 0.0
        for begin, end in sorted(spans):
            total += max(0.0, end - max(begin, until))
            until = max(until, end)
        return total

    jax.monitoring.register_event_time_span_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_time_span_listener(listen)
