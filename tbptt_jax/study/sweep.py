"""How long should the window be? Every length is trained, fairly, and a report shows the decision.

At equal data a short window makes more updates, and that is mostly what such a comparison shows; at equal updates it sees
less data. So both are done. A point is one budget, carry, influence and window, and one choice of the task's arguments;
all its seeds and learning rates are one program. Each point is kept as it is done: the same call goes on with those that
are missing.
"""

import itertools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.table import Table

from tbptt_jax.study.engines import Engine, Job, local
from tbptt_jax.study.feed import check_longest, check_schedule
from tbptt_jax.study.findings import gradients, recommend
from tbptt_jax.study.influences import check_influences
from tbptt_jax.study.lengths import Lengths
from tbptt_jax.study.points import Point, check_same_sweep, found_in, keep, keep_failed, mark, rows_of, write_events
from tbptt_jax.study.process.console import console, progress, say, table
from tbptt_jax.study.process.lock import expanded, holding
from tbptt_jax.study.process.machine import largest, meet
from tbptt_jax.study.process.signals import stop_asked
from tbptt_jax.study.process.writing import finite, plain, short, write_json
from tbptt_jax.study.report import report
from tbptt_jax.study.report.reading import on_schedules
from tbptt_jax.study.task import Task, checksum, data_of, figures, is_drawn, keys_of
from tbptt_jax.study.trainings import Training, check_sizes, shape_of, streams_of, windows_of

CARRIES, BUDGETS = ("stateful", "stateless"), ("data", "updates")


class Plan(NamedTuple):
    """A sweep as it was asked for, checked."""

    tasks: dict[tuple, Task]  # of each choice of the arguments that are swept
    points: list[Point]
    updates: dict[Point, int]
    steps: dict[Point, float]  # of an update
    schedules: dict[str, Lengths]  # of windows, by name
    epochs: dict[Point, float]  # of a schedule's runs, at equal data
    settings: dict[str, Any]  # what makes it this sweep and no other, as JSON


def sweep(
    task: Task | Callable[..., Task],
    windows: Sequence[int | Lengths],
    *,
    carry: Sequence[str] = CARRIES,
    influences: Sequence[str] = ("truncate",),
    learning_rates: Sequence[float] = (0.02,),
    seeds: int = 5,
    budget: str = "both",
    updates: int = 500,
    params: Mapping[str, Sequence[Any]] | None = None,
    workdir: str | pathlib.Path,
    engine: Engine | None = None,
    share: tuple[int, int] | None = None,
    merge: Sequence[str | pathlib.Path] = (),
    tensorboard: bool = False,
    about_launch: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains a task with every window length, carried and not, at equal data and at equal updates, and reports.

    Args:
      task: the task, or what makes it of the arguments in ``params``.
      windows: lengths in steps; beside them schedules of lengths, such as :func:`adaptive`, each of a name of its own. They carry
        the state, and leave out replay, which keeps windows of one length. Each of their trainings is a :func:`fit`.
      carry: of ``"stateful"`` and ``"stateless"``.
      influences: names, such as ``"replay:3"``. Stateless windows have no past: there it is truncate.
      learning_rates: Adam's at the start; each falls to zero along a cosine.
      seeds: trainings of each point and learning rate.
      budget: ``"data"``, ``"updates"`` or ``"both"``.
      updates: of each window, or with equal data of the longest; the others make more.
      params: arguments of the task to sweep as well, name → values.
      workdir: where all of it is kept.
      engine: :func:`local`, the default, or :func:`ray`.
      share: ``(i, n)``: do only the i-th of n shares of the points, from 1.
      merge: workdirs of the shares of a sweep, to make one report of.
      tensorboard: write TensorBoard event files as well.
      about_launch: what is written into ``results.json`` besides, as JSON.

    Returns:
      The results, as ``results.json`` has them, none for a share, and ``"all_done"``: whether no point failed.

    Raises:
      ValueError: before anything is trained, if an argument is not as described, does not fit, or the workdir holds another
        sweep. A point that fails is reported, and the others go on.
    """
    plan = plan_of(
        task, windows, carry=carry, influences=influences, learning_rates=learning_rates, seeds=seeds, budget=budget,
        updates=updates, params=params or {},
    )  # fmt: skip
    mine = _share(plan.points, share)
    directory, places = expanded(workdir), [expanded(path, "merge") for path in merge]
    for each in (directory, *places):
        check_same_sweep(each, plan.settings)
    with holding(workdir):
        check_same_sweep(directory, plan.settings)  # nobody else writes there any more
        if merge:
            found = [directory, *places]
            there = {**found_in(found, plan.points, ".json"), **found_in(found, plan.points, ".failed.json")}
            missing = [str(p) for p in plan.points if p not in there]
            if missing:
                none = f"{len(missing)} of {len(plan.points)} points are in none of {plain(', '.join(map(str, found)), 200)}"
                raise ValueError(f"{none}, first {missing[0]}: do them first, with --points or without.")
            mark(directory, plan.settings)
            return {**_finish(plan, directory, found, tensorboard, about_launch or {}), "all_done": True}
        failed = _do(plan, mine, directory, engine or local(), tensorboard)
        if share is not None:
            say(f"Share {share[0]}/{share[1]} is in {directory}. When all are done: --merge with their directories.")
            results = {}
        else:
            results = _finish(plan, directory, [directory], tensorboard, about_launch or {})
    return {**results, "all_done": not failed}


def plan_of(
    task: Task | Callable[..., Task], windows: Sequence[int | Lengths], *, carry: Sequence[str], influences: Sequence[str],
    learning_rates: Sequence[float], seeds: int, budget: str, updates: int, params: Mapping[str, Sequence[Any]],
) -> Plan:  # fmt: skip
    """The sweep that is asked for; refuses what is not as :func:`sweep` describes it."""
    check_influences(list(influences))
    if not carry or set(carry) - set(CARRIES):
        raise ValueError(f"--carry has {short(','.join(carry) or 'nothing')}: give stateful, stateless or both.")
    if budget not in (*BUDGETS, "both"):
        raise ValueError(f"`budget` is {budget!r}; it needs to be 'data', 'updates' or 'both'.")
    if not learning_rates or not all(0 < rate < float("inf") for rate in learning_rates):
        raise ValueError(f"`learning_rates` is {list(learning_rates)}: give positive numbers, such as 0.01.")
    chosen = [tuple(zip(params, values, strict=True)) for values in itertools.product(*params.values())]
    if params and isinstance(task, Task):
        raise ValueError("`params` are arguments of what makes the task: give the function that makes it, not a Task.")
    tasks = {each: task if isinstance(task, Task) else task(**dict(each)) for each in chosen}
    schedules = _schedules(windows, carry, influences)
    lengths = sorted({window for window in windows if not isinstance(window, Lengths)})
    for each in tasks.values():
        steps = shape_of(each).steps
        if not lengths or max(lengths) > steps:
            most = max(lengths, default="no number")
            raise ValueError(
                f"--windows has {most}; streams of {each.name} have {steps} steps: give from 1 to {steps}."
            )
        for schedule in schedules.values():
            check_schedule(each, schedule)
            check_longest(schedule, steps)
        check_sizes(each, len(learning_rates) * seeds, updates)
    budgets = BUDGETS if budget == "both" else (budget,)
    every: list[Any] = [*lengths, *schedules]
    points = [
        Point(each, state, influence, window, choice)
        for window in every
        for choice in chosen
        for state in CARRIES
        if state in carry and (state == "stateful" or window not in schedules)
        for influence in (list(dict.fromkeys(influences)) if state == "stateful" else ["truncate"])
        if window not in schedules or not influence.startswith("replay")
        for each in budgets
    ]
    counts: dict[Any, tuple[int, int]] = {(c, k): windows_of(tasks[c], k) for c in chosen for k in lengths}
    counts |= {(c, name): counts[c, lengths[-1]] for c in chosen for name in schedules}  # as much data as the longest

    def updates_of(point: Point) -> int:
        if point.budget == "updates":
            return updates
        (count, _), (longest, _) = counts[point.params, point.window], counts[point.params, lengths[-1]]
        return max(1, round(updates * count / longest))

    first = tasks[chosen[0]]
    data = None if is_drawn(first.train) else [checksum(data_of(s, keys_of(0).train)) for s in (first.train, first.test) if s is not None]  # fmt: skip
    settings = {
        "task": first.name,
        "arguments": first.source and {k: v for k, v in first.source[1].items() if k not in params and isinstance(v, int | float | bool)},
        "windows": lengths,
        **({"schedules": {name: schedule.settings for name, schedule in schedules.items()}} if schedules else {}),
        "carry": [state for state in CARRIES if state in carry],
        "influences": list(dict.fromkeys(influences)),
        "learning_rates": sorted(set(map(float, learning_rates))),
        "seeds": seeds, "budget": budget, "updates": updates, "lanes": first.lanes,
        "params": {name: list(values) for name, values in params.items()},
        "data": data,
    }  # fmt: skip
    steps_each = {p: counts[p.params, p.window][1] / counts[p.params, p.window][0] for p in points}
    read = {p: updates / counts[p.params, p.window][0] for p in points if p.window in schedules and p.budget == "data"}
    return Plan(tasks, points, {p: updates_of(p) for p in points}, steps_each, schedules, read, settings)


def _schedules(windows: Sequence[int | Lengths], carry: Sequence[str], influences: Sequence[str]) -> dict[str, Lengths]:
    """Those of the windows that schedules decide, by name; refuses what they cannot be trained with."""
    found: dict[str, Lengths] = {}
    for schedule in (window for window in windows if isinstance(window, Lengths)):
        name = schedule.name
        if not name or name.isdecimal() or found.get(name, schedule).settings != schedule.settings:
            raise ValueError(
                f"A schedule of windows is called {short(name)!r}, which is a number, empty or another's name: give it one of its own, "
                "schedule._replace(name='auto .1')."
            )
        if "stateful" not in carry:
            raise ValueError(f"--windows has {short(name)}, and --carry no stateful: its windows carry the state on.")
        if all(influence.startswith("replay") for influence in influences):
            raise ValueError(
                f"--windows has {short(name)}, and --influences only replay, which keeps windows of one length: add truncate."
            )
        if jax.process_count() > 1:
            raise ValueError(f"--windows has {short(name)}, whose windows are trained by one process: give numbers.")
        found[name] = schedule
    return found


def _do(plan: Plan, mine: list[Point], directory: pathlib.Path, engine: Engine, tensorboard: bool) -> bool:
    """Does those points that are missing, each kept as it is done. Whether one failed."""
    kept_in = directory / "points"
    done = {p for p in mine if (kept_in / f"{p.name}.json").exists()}
    groups: dict[Any, list[Point]] = {}  # equal data and equal updates are one training where the updates are as many
    for point in mine:
        if point not in done:
            groups.setdefault((point[1:], plan.updates[point], plan.epochs.get(point)), []).append(point)
    jobs = [Job(plan.tasks[p.params], _training(plan, p), str(p)) for p, *_ in groups.values()]
    members, began, failed, stop, ended = list(groups.values()), time.perf_counter(), False, 0, 0
    runs = len(plan.settings["learning_rates"]) * plan.settings["seeds"]
    if not jobs:
        console.print(_table(plan, mine, done, {}))
        return False

    def planned(needed: dict[int, int]) -> None:
        bytes_of = {p: needed[i] for i, group in enumerate(members) for p in group if i in needed}
        console.print(_table(plan, mine, done, bytes_of))

    with stop_asked("after this point, kept") as stopping, progress(sum(map(len, members)), "points") as tell:

        def on_the_way(i: int, update: int, loss: float) -> None:
            training = jobs[i].training
            speed = runs * update * plan.steps[members[i][0]] / (time.perf_counter() - began)
            tell(
                ended + len(members[i]) * update / training.updates,
                f"{jobs[i].name}: loss {loss:.4g}, {speed:,.0f} steps/s",
            )

        for i, trained in engine(jobs, planned, on_the_way):
            kept_in.mkdir(exist_ok=True)
            mark(directory, plan.settings)
            for point in members[i]:
                if isinstance(trained, Exception):
                    failed = True
                    say(f"{point} failed: {keep_failed(kept_in, point, trained)}")
                else:
                    rows = rows_of(plan.tasks[point.params], point, trained, plan.settings, plan.steps[point])
                    keep(kept_in, point, rows, trained.params)
                    if tensorboard and jax.process_index() == 0:
                        write_events(directory / "tensorboard", point, rows)
            ended += len(members[i])
            began = time.perf_counter()
            tell(ended, jobs[i].name)
            stop = largest(stopping())
            if stop:
                break
    if stop:
        say(f"Stopped after {ended} of {sum(map(len, members))} points; the same command does the others.")
        sys.exit(128 + stop)
    return failed


def _training(plan: Plan, point: Point) -> Training:
    window = point.window if isinstance(point.window, int) else plan.schedules[point.window]
    rates, seeds = tuple(plan.settings["learning_rates"]), plan.settings["seeds"]
    return Training(window, point.carry, point.influence, plan.updates[point], rates, seeds, plan.epochs.get(point))


def _table(plan: Plan, points: list[Point], done: set[Point], needed: dict[Point, int]) -> Table:
    each = len(plan.settings["learning_rates"]) * plan.settings["seeds"]
    rows = []
    for point in points:
        memory = "done" if point in done else f"{needed[point] / 1e6:,.1f} MB" if point in needed else "–"
        window = f"{point.window}" + "".join(f", {name} {value}" for name, value in point.params)
        updates = "as it chooses" if point in plan.epochs else f"{plan.updates[point]:,}"
        rows.append((window, point.carry, point.influence, point.budget, updates, memory))
    title = f"{len(points)} points of {each} trainings; {len(done)} are done"
    return table(title, ("window", "carry", "influence", "budget", "updates", "memory"), rows, left=4)


def _share(points: list[Point], share: tuple[int, int] | None) -> list[Point]:
    """The i-th of n shares: every n-th of what is trained, so that each has of all windows, in all its budgets."""
    if share is None:
        return points
    i, n = share
    if not 1 <= i <= n:
        raise ValueError(f"`share` is {share}: give (i, n) with i from 1 to n, such as (2, 5).")
    mine = list(dict.fromkeys(point[1:] for point in points))[i - 1 :: n]
    return [point for point in points if point[1:] in mine]


def _finish(
    plan: Plan, directory: pathlib.Path, kept: list[pathlib.Path], tensorboard: bool, about_launch: dict[str, Any]
) -> dict[str, Any]:
    """The report of all points that are done, found in the directories ``kept``."""
    meet("all points are kept")
    at = found_in(kept, plan.points, ".json")
    failures = found_in(kept, [p for p in plan.points if p not in at], ".failed.json")
    rows_at = {point: json.loads(path.read_text()) for point, path in at.items()}
    rows = [row for each in rows_at.values() for row in each]
    if not rows:
        raise ValueError("No point is done: there is nothing to report.")
    sign = 1 if figures(next(iter(plan.tasks.values())))[0].better == "higher" else -1
    done = [(row, point) for point, each in rows_at.items() for row in each if None not in row["metrics"]]
    # Of those that carry their state, if there are any, the best is what gradients are measured at.
    best, point = max(
        done, key=lambda x: (x[0]["carry"] == "stateful", sign * x[0]["final_metric"]), default=(None, plan.points[0])
    )
    task = plan.tasks[point.params]
    figure = figures(task)[0]

    def init(key: jax.Array) -> Any:
        inputs = streams_of(task, "train", keys_of(0).train).inputs
        return task.model.init(key, jax.tree.map(lambda x: x[: task.lanes, :1], inputs))

    params = {"untrained": jax.jit(init)(keys_of(0).init)}
    if best is not None:
        which = plan.settings["learning_rates"].index(best["learning_rate"])
        with np.load(at[point].with_suffix(".npz")) as leaves:
            like, tree = jax.tree.flatten(params["untrained"])
            params["trained"] = jax.tree.unflatten(tree, [leaves[f"arr_{i}"][which] for i in range(len(like))])
    console.print("Measuring the bias of each window, untrained and trained.", soft_wrap=True)
    fixed = [row for row, p in done if p.window not in plan.schedules]
    metric = {"name": figure.name, "unit": figure.unit, "better": figure.better}
    results = {
        "task": plan.settings["task"],
        "about": task.about,
        "metric": metric,
        "rows": rows,
        **gradients(task, plan.settings["windows"], plan.settings["influences"], params),
        "failed": [json.loads(path.read_text()) for path in failures.values()],
        "recommendation": recommend(fixed, metric, task.exact(False, 1) if task.exact else None),
        "settings": plan.settings,
        **about_launch,
    }
    results = finite(results)
    write_json(directory / "results.json", results)
    if jax.process_index() == 0:
        report(directory, json.loads((directory / "results.json").read_text()))
        for each, of_point in rows_at.items() if tensorboard else ():
            write_events(directory / "tensorboard", each, of_point)
    if results["recommendation"]:
        say(results["recommendation"]["sentence"])
    for told in on_schedules(results["rows"], metric):
        say(told["sentence"])
    say(f"Written to {directory}: report.html, its charts, rows.csv, results.json")
    return results
