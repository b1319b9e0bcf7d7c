"""How long should the window be? One launch trains every window length, fairly, and ends in a report that shows the decision.

python -m experiments.truncation_sweep
python -m experiments.truncation_sweep --task=char_lm --windows=4,16,64 --influences=truncate,replay:3 --seeds=3
python -m experiments.truncation_sweep --task=forecast --train=past.csv --test=next.csv --targets=load

At equal data a short window makes more updates, and that is mostly what such a comparison shows; at equal updates it sees
less data. So both are told (``--budget``). A point is one budget, carry, influence and window; all its seeds and learning
rates are one program, spread over the devices, and statelessness and budget are its data, so that a window length is
compiled once. Each point is kept as it is done: the same command goes on with those that are missing.

Many machines: ``--points=2/5`` does the second fifth of the points, in a workdir of its own, and ``--merge=DIR,…`` makes one
report of them. Processes that work together on each point: ``--coordinator``, ``--processes``, ``--process``.
"""

import concurrent.futures
import functools
import itertools
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich import box
from rich.table import Table

import tbptt_jax as tb
from experiments import launch, resume, series, sweep_tasks
from experiments.sweep_tasks import Task
from tbptt_jax import sharding
from tbptt_jax.study import report
from tbptt_jax.tasks.first_bit import score_last

CALL = 500  # updates in a call
PLACES = 50  # of a learning curve
CARRIES, BUDGETS = ("stateful", "stateless"), ("data", "updates")
OF_FILES = "missing", "fill", "decimal"  # flags that say how a forecast's files are read

FLAGS = flags.FLAGS
flags.DEFINE_enum("task", "first_bit", sweep_tasks.NAMES, "What to train on.")
flags.DEFINE_list("windows", ["1", "2", "5", "10", "20"], "Window lengths, in steps.")
flags.DEFINE_list("carry", list(CARRIES), "stateful: carried from window to window; stateless: each begins anew.")
flags.DEFINE_list(
    "influences", ["truncate"], f"{launch.INFLUENCES} Stateless windows have no past: there it is truncate."
)
flags.DEFINE_list("learning_rates", ["0.02"], "Adam's rates at the start; each falls to zero along a cosine.")
flags.DEFINE_integer("seeds", 5, "Trainings of each point and learning rate, side by side.", lower_bound=1)
flags.DEFINE_enum("budget", "both", [*BUDGETS, "both"], "Equal data for all windows, or equal updates.")
flags.DEFINE_integer(
    "updates", 500, "Updates of each window, or with equal data of the longest; the others make more.", lower_bound=1
)
flags.DEFINE_integer("hidden", None, "Units of the LSTM; default the task's own.", lower_bound=1)
flags.DEFINE_integer("lanes", None, "Streams side by side; default the task's own.", lower_bound=1)
flags.DEFINE_multi_string("text", [], "Of char_lm: a UTF-8 file; may be given again. None: Python's own manual.")
flags.DEFINE_string("train", None, "Of forecast: a CSV file. None: two tanks, generated.")
flags.DEFINE_string("test", None, "Of forecast: another.")
flags.DEFINE_list("inputs", [], "Of forecast: columns to tell the targets from; none: their own past.")
flags.DEFINE_list("targets", [], "Of forecast: columns to be told.")
flags.DEFINE_list("missing", [], "Of forecast: what stands for a missing number besides blank fields, NA and NaN.")
flags.DEFINE_enum("fill", None, series.FILLS, "Of forecast: what is read where an input is missing.")
flags.DEFINE_enum(
    "decimal", None, [",", "."], "Of forecast: what decimals are written with, where files leave it open."
)
flags.DEFINE_string("points", None, "I/N: do only the I-th of N shares of the points.")
flags.DEFINE_list("merge", [], "Workdirs of the shares of a sweep, to make one report of.")
flags.DEFINE_bool("tensorboard", False, "Write TensorBoard event files as well.")
flags.DEFINE_string("workdir", "runs/truncation_sweep", "Where the report and all that is in it go.")


class Point(NamedTuple):
    budget: str
    carry: str
    influence: str
    window: int

    @property
    def name(self) -> str:
        return f"{self.budget}-{self.carry}-{self.influence.replace(':', '_')}-{self.window}"

    def __str__(self) -> str:
        return f"{self.carry}, {self.influence}, windows of {self.window}, equal {self.budget}"


class Program(NamedTuple):
    """Attributes:
    begin: ``() -> (states, data)`` of all runs.
    advance: ``(states, data, carried, first, last, updates) -> (states, losses, weights)``, each ``[runs, …]``.
    evaluate: ``(params, data, carried) -> scores [runs, 2]``, the loss and the metric.
    bytes: what a device needs for either.
    temp_bytes: what lies between the operations of the training.
    seconds: that it took to compile.
    """

    begin: Callable
    advance: Callable
    evaluate: Callable
    bytes: int
    temp_bytes: int
    seconds: float


# What is to be done


def settings() -> dict[str, Any]:
    """What makes it this sweep and no other, from the flags, checked.

    Raises:
      ValueError: if a flag is wrong.
    """
    windows = launch.positive_integers("windows", FLAGS.windows, at_most=10**9)
    launch.check_influences(FLAGS.influences)
    if not FLAGS.carry or set(FLAGS.carry) - set(CARRIES):
        raise ValueError(
            f"--carry has {launch.plain(','.join(FLAGS.carry) or 'nothing', launch.QUOTED)}: give stateful, stateless or both."
        )
    for rate in FLAGS.learning_rates:
        number = r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"
        if not re.fullmatch(number, rate.strip().lower()) or not 0 < float(rate) < float("inf"):
            raise ValueError(
                f"--learning_rates has {launch.plain(rate, launch.QUOTED)!r}: give positive numbers, such as --learning_rates=0.01,0.003."
            )
    if not FLAGS.learning_rates:
        raise ValueError("--learning_rates is empty: give at least one, such as --learning_rates=0.01.")
    of_others = {
        "text": FLAGS.task == "char_lm",
        **dict.fromkeys(("train", "test", "inputs", "targets", *OF_FILES), FLAGS.task == "forecast"),
        **dict.fromkeys(("hidden", "lanes"), FLAGS.task != "influence_balancing"),
    }
    for name, has in of_others.items():
        if FLAGS[name].value and not has:
            raise ValueError(f"--{name} was given, and --task={FLAGS.task} has no use for it: leave it out.")
    named: dict[str, list[Any]] = {name: [FLAGS[name].value] for name in ("train", "test")}
    named["text"] = FLAGS.text
    files = {
        name: [zlib.crc32(pathlib.Path(path).read_bytes()) for path in paths if path and pathlib.Path(path).is_file()]
        for name, paths in named.items()
    }
    return {
        "task": FLAGS.task,
        "windows": windows,
        "carry": [carry for carry in CARRIES if carry in FLAGS.carry],
        "influences": list(dict.fromkeys(FLAGS.influences)),
        "learning_rates": sorted({float(rate) for rate in FLAGS.learning_rates}),
        **{name: FLAGS[name].value for name in ("seeds", "budget", "updates", "hidden", "lanes", "inputs", "targets")},
        **{name: FLAGS[name].value or None for name in OF_FILES},
        "files": files,
    }


def all_points(chosen: dict[str, Any]) -> list[Point]:
    budgets = BUDGETS if chosen["budget"] == "both" else (chosen["budget"],)
    return [
        Point(budget, carry, influence, window)
        for window in chosen["windows"]
        for carry in chosen["carry"]
        for influence in (chosen["influences"] if carry == "stateful" else ["truncate"])
        for budget in budgets
    ]


def share(points: list[Point], wanted: str | None) -> list[Point]:
    """The I-th of N shares: every N-th of what is trained, so that each has of all windows, in all its budgets.

    Raises:
      ValueError: if there is no such share.
    """
    if wanted is None:
        return points
    parts = re.fullmatch(r"(\d{1,18})/(\d{1,18})", wanted)
    i, n = (int(part) for part in parts.groups()) if parts else (0, 0)
    if not 1 <= i <= n:
        raise ValueError(
            f"--points={launch.plain(wanted, launch.QUOTED)}: give I/N with I from 1 to N, such as --points=2/5."
        )
    mine = list(dict.fromkeys(point[1:] for point in points))[i - 1 :: n]
    return [point for point in points if point[1:] in mine]


def check_same_sweep(directory: pathlib.Path, chosen: dict[str, Any]) -> None:
    """Raises a ``ValueError`` if the directory holds another sweep."""
    path = directory / "sweep.json"
    if not path.exists():
        return
    try:
        there = dict(json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        name = launch.plain(str(path), launch.QUOTED)
        raise ValueError(f"{name} is broken, so the sweep there is not known: give another --workdir.") from error
    differ = [
        f"{name} {launch.plain(str(there.get(name)), launch.QUOTED)}, here {launch.plain(str(chosen[name]), launch.QUOTED)}"
        for name in chosen
        if there.get(name) != chosen[name]
    ]
    if differ:
        raise ValueError(
            f"{launch.plain(str(directory), launch.QUOTED)} holds another sweep: there {'; '.join(differ)}. Give its flags to go on with it, or another "
            "--workdir."
        )


def updates_of(point: Point, count: int, longest_count: int, chosen: dict[str, Any]) -> int:
    """Updates of a point whose window cuts the data into ``count``, and the longest into ``longest_count``."""
    if point.budget == "updates":
        return chosen["updates"]
    return max(1, round(chosen["updates"] * count / longest_count))


# How it is done


def cut(task: Task, streams: tb.Window, window: int, lanes: int) -> tb.Window:
    windows = tb.split(streams, window, lanes=min(lanes, len(jax.tree.leaves(streams.inputs)[0])))
    return score_last(windows) if task.last else windows


def windows_of(task: Task, window: int) -> tuple[int, int]:
    """How many windows the training data is cut into, and how many steps it has."""
    train = jax.eval_shape(lambda key: cut(task, task.data(key)[0], window, task.lanes), jax.random.key(0))
    streams = jax.eval_shape(lambda key: task.data(key)[0], jax.random.key(0))
    return len(train.resets), int(np.prod(jax.tree.leaves(streams.inputs)[0].shape[:2]))


def compiled(task: Task, window: int, influence: str, chosen: dict[str, Any], mesh: Mesh) -> Callable[[], Program]:
    """A window's program, traced now and compiled when it is asked for: compiling leaves Python to others."""
    each_rate, each_seed = np.meshgrid(chosen["learning_rates"], np.arange(chosen["seeds"]), indexing="ij")
    fill = 0, -each_rate.size % mesh.shape[sharding.RUN]  # every device has as many runs: none waits for another
    rates, seeds = (np.pad(each.ravel(), fill, "edge") for each in (each_rate.astype(np.float32), each_seed))
    count, _ = windows_of(task, window)
    past = launch.influence(influence, max(1, -(-task.steps // window) - 1))
    everywhere, by_run = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (sharding.RUN,)))
    of_data = everywhere if task.shared else by_run

    def data(key: jax.Array) -> tuple[tb.Window, tb.Window]:
        train, test = task.data(key)
        return cut(task, train, window, task.lanes), cut(task, test, window, len(test.inputs))

    def train_step(rate: jax.Array, updates: jax.Array) -> Any:
        def falling(done: jax.Array) -> jax.Array:
            return rate * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(done / updates, 1)))

        estimate = tb.gradient(task.model, task.loss, influence=past)
        return tb.train_step(estimate, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(falling)))

    def begin(seeds: jax.Array) -> tuple:
        shared = data(jax.random.key(0)) if task.shared else None

        def one(shared: Any, seed: jax.Array) -> tuple:
            key = jax.random.fold_in(jax.random.key(0), seed)
            own = shared or data(key)
            state = train_step(jnp.float32(0), jnp.int32(1)).init(
                jax.random.fold_in(key, 1), jax.tree.map(lambda x: x[0], own[0])
            )
            return state, None if task.shared else own

        states, own = jax.vmap(functools.partial(one, shared))(seeds)
        return states, shared if task.shared else own

    def advance(states: Any, data: Any, rates: jax.Array, *numbers: jax.Array) -> tuple:
        def one(
            shared: Any, carried: Any, first: Any, last: Any, updates: Any, state: Any, rate: Any, own: Any
        ) -> tuple:
            train, step = windows_anew((shared or own)[0], carried), train_step(rate, updates)

            def update(done: jax.Array, before: tuple) -> tuple:
                state, losses, weights = before
                window = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, done % count, keepdims=False), train)
                state, (loss, weight) = step.update(state, window)
                return state, losses.at[done - first].set(loss), weights.at[done - first].set(weight)

            empty = jnp.zeros(CALL)
            return lax.fori_loop(first, last, update, (state, empty, empty))

        shared, own = (data, None) if task.shared else (None, data)
        return sharding.over_runs(one, mesh, (shared, *numbers))(states, rates, own)

    def evaluate(params: Any, data: Any, carried: jax.Array) -> jax.Array:
        def figures(outputs: Any, window: tb.Window) -> tuple:
            return task.loss(outputs, window), task.score(outputs, window)

        def one(shared: Any, carried: Any, params: Any, own: Any) -> jax.Array:
            test = windows_anew((shared or own)[1], carried | task.free)
            return jnp.stack(tb.evaluate(task.model, figures, params, test).loss).astype(jnp.float32)

        shared, own = (data, None) if task.shared else (None, data)
        return sharding.over_runs(one, mesh, (shared, carried))(params, own)

    start = jax.jit(begin)  # by each process for itself: it is short, and what it draws is the same everywhere
    placed = (by_run, of_data, by_run, *[everywhere] * 4)
    go = jax.jit(advance, in_shardings=placed, out_shardings=by_run, donate_argnums=0)
    judge = jax.jit(evaluate, in_shardings=(by_run, of_data, everywhere), out_shardings=by_run)
    states, of_all = jax.eval_shape(start, seeds)
    number, carried = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), bool)
    each = jax.ShapeDtypeStruct(rates.shape, rates.dtype)
    lowered = (
        start.lower(seeds),
        go.lower(states, of_all, each, carried, number, number, number),
        judge.lower(states.params, of_all, carried),
    )

    def compile_all() -> Program:
        began = time.perf_counter()
        first, then, last = (each.compile() for each in lowered)
        (training, temporary), (judging, _) = launch.needs(then), launch.needs(last)

        def begin() -> tuple:
            states, data = first(seeds)
            return place(states, by_run), place(data, of_data)

        def advance(states: Any, data: Any, *numbers: Any) -> tuple:
            return then(states, data, place(rates, by_run), *numbers)

        return Program(begin, advance, last, max(training, judging), temporary, time.perf_counter() - began)

    return compile_all


def check_sizes(task: Task, chosen: dict[str, Any]) -> None:
    """Raises a ``ValueError`` if not even what must be there at once, of the smallest windows, fits."""
    runs = len(chosen["learning_rates"]) * chosen["seeds"]
    told = 24 * runs * max(CALL, chosen["updates"])  # losses and weights
    launch.check_fits("What is told of the training", told, "--seeds or --updates")
    streams = jax.eval_shape(lambda key: task.data(key)[0], jax.random.key(0))
    launch.check_fits("The data", launch.size(streams) * (1 if task.shared else runs), "--seeds or --lanes")
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, task.lanes, 1, *x.shape[2:]), x.dtype), streams)
    step = tb.train_step(tb.gradient(task.model, task.loss), optax.adam(1.0))
    launch.check_training(step, like, runs, "--hidden, --lanes, --seeds or the number of --learning_rates")


def windows_anew(windows: tb.Window, carried: jax.Array) -> tb.Window:
    """The same windows, each begun from the initial carry unless it is ``carried``."""
    here, anew = (jnp.asarray(w.resets) for w in (windows, tb.stateless(windows)))
    return windows._replace(resets=jnp.where(carried, here, anew))


def train(point: Point, program: Program, runs: int, updates: int, tell: Callable[[int, float], None]) -> tuple:
    """All runs of a point: losses and weights ``[runs, updates]``, scores ``[runs, 2]``, params, and the seconds."""
    began = time.perf_counter()
    states, data = program.begin()
    parts, carried = [], np.bool_(point.carry == "stateful")
    for first in range(0, updates, CALL):
        last = min(first + CALL, updates)
        numbers = (np.int32(n) for n in (first, last, updates))
        states, losses, weights = program.advance(states, data, carried, *numbers)
        losses, weights = (fetch(x, runs)[:, : last - first] for x in (losses, weights))  # waits for the call
        parts.append((losses, weights))
        scored = weights > 0
        tell(last, float(losses[scored].mean()) if scored.any() else float("nan"))
    losses, weights = (np.concatenate(each, 1).astype(np.float64) for each in zip(*parts, strict=True))
    scores = program.evaluate(states.params, data, carried)
    params = jax.tree.map(lambda x: fetch(x, runs), states.params)
    return losses, weights, fetch(scores, runs).astype(np.float64), params, time.perf_counter() - began


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays that every process has, where all of them read their part."""

    def leaf(x: Any) -> jax.Array:
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(leaf(jax.random.key_data(x)))
        return jax.device_put(np.asarray(x), sharding)

    return jax.tree.map(leaf, tree)


def fetch(x: jax.Array, runs: int) -> np.ndarray:
    """Those of an array ``[runs and what fills up the devices, ...]``, from all processes."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))[:runs]


def curve(losses: np.ndarray, weights: np.ndarray, steps_each: float) -> dict[str, list]:
    """The training loss along the way, of some stretches ``[places]``: mean, least and largest over seeds."""
    edges = np.unique(np.linspace(0, losses.shape[1], PLACES + 1).round().astype(int))
    told: dict[str, list] = {"updates": [], "steps": [], "loss": [], "low": [], "high": []}
    for first, last in itertools.pairwise(edges):
        weight = weights[:, first:last].sum(1)
        if not weight.all():
            continue
        with np.errstate(invalid="ignore", over="ignore"):
            each = (losses[:, first:last] * weights[:, first:last]).sum(1) / weight
        for name, value in zip(told, (last, last * steps_each, each.mean(), each.min(), each.max()), strict=True):
            told[name].append(float(value))
    return told


def rows_of(
    task: Task, point: Point, chosen: dict[str, Any], program: Program, found: tuple, steps_each: float
) -> list:
    losses, weights, scores, _, seconds = found
    seeds, updates = chosen["seeds"], losses.shape[1]
    rows = []
    for i, rate in enumerate(chosen["learning_rates"]):
        mine = slice(i * seeds, (i + 1) * seeds)
        rows.append(
            {
                "task": chosen["task"],
                **point._asdict(),
                "learning_rate": rate,
                "seeds": seeds,
                "updates": updates,
                "steps": round(updates * steps_each),
                "final_loss": float(scores[mine, 0].mean()),
                "final_metric": float(scores[mine, 1].mean()),
                "losses": scores[mine, 0].tolist(),
                "metrics": scores[mine, 1].tolist(),
                "exact_metric": task.exact(point.carry == "stateful", point.window),
                "curve": curve(losses[mine], weights[mine], steps_each),
                "seconds": seconds,
                "compile_seconds": program.seconds,
                "temp_bytes": program.temp_bytes,
            }
        )
    return rows


def keep(directory: pathlib.Path, point: Point, rows: list, params: Any, chosen: dict[str, Any]) -> None:
    """A point on disk: the parameters of its first seed at each rate, then its rows, which say that it is done."""
    if jax.process_index() > 0:
        return
    leaves = [leaf[:: chosen["seeds"]] for leaf in jax.tree.leaves(params)]
    with launch.whole(directory / f"{point.name}.npz") as path, path.open("wb") as file:
        np.savez(file, *leaves)
    with launch.whole(directory / f"{point.name}.json") as path:
        path.write_text(json.dumps(launch.finite(rows)) + "\n")
    (directory / f"{point.name}.failed.json").unlink(missing_ok=True)
    if FLAGS.tensorboard:
        write_events(directory.parent / "tensorboard", launch.finite(rows))


def keep_failed(directory: pathlib.Path, point: Point, error: Exception) -> str:
    """Why a point failed, on disk until it is done."""
    why = f"{type(error).__name__}: {error}".splitlines()[0]
    if jax.process_index() == 0:
        with launch.whole(directory / f"{point.name}.failed.json") as path:
            path.write_text(json.dumps({**point._asdict(), "error": why}) + "\n")
    return why


def mark(directory: pathlib.Path, chosen: dict[str, Any]) -> None:
    """Says which sweep the directory holds."""
    if jax.process_index() == 0:
        with launch.whole(directory / "sweep.json") as path:
            path.write_text(json.dumps(chosen, indent=1) + "\n")


def found_in(kept: list[pathlib.Path], points: list[Point], ending: str) -> dict[Point, pathlib.Path]:
    """Those points of which one of the directories has the file."""
    places = {p: [d / "points" / f"{p.name}{ending}" for d in kept] for p in points}
    return {
        p: next(path for path in each if path.exists()) for p, each in places.items() if any(x.exists() for x in each)
    }


# What it tells


def plan(
    points: list[Point], done: set[Point], updates: dict[Point, int], programs: dict, chosen: dict[str, Any]
) -> Table:
    title = f"{len(points)} points of {len(chosen['learning_rates']) * chosen['seeds']} trainings; {len(done)} are done"
    table = Table("window", box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for name in ("carry", "influence", "budget", "updates", "memory"):
        table.add_column(name, justify="right" if name in ("updates", "memory") else "left")
    for point in points:
        program = programs.get((point.window, point.influence))
        memory = (
            "done" if point in done else f"{program.bytes / 1e6:,.1f} MB" if isinstance(program, Program) else "failed"
        )
        table.add_row(str(point.window), point.carry, point.influence, point.budget, f"{updates[point]:,}", memory)
    return table


def gradients(task: Task, chosen: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    """The bias of each window and influence, and how the gradient fades, at these parameters."""
    streams = jax.jit(lambda key: task.data(key)[0])(jax.random.key(10**6))
    longest = max(chosen["windows"])
    steps = task.steps if task.steps <= 512 else min(task.steps, max(64, 4 * longest))
    probe = jax.tree.map(lambda x: x[:32, :steps], streams)
    found: dict[str, Any] = {"bias": [], "decay": {}, "suggested": {}}
    for name, at in params.items():
        at = jax.tree.map(jnp.asarray, at)
        for influence in chosen["influences"]:
            for window in chosen["windows"]:
                past = launch.influence(influence, max(1, -(-steps // window) - 1))
                draws = 1 if influence.startswith(("truncate", "rtrl")) or influence.count(":") == 1 else 16
                try:
                    bias = tb.horizon.bias(task.model, task.loss, at, probe, window, past, draws=draws)
                except ValueError:  # what cannot be trained cannot be measured: its points say why
                    continue
                noise = float(bias.relative_std) / draws**0.5 if draws > 1 else 0.0  # of the mean of so many draws
                told = {"relative_bias": bias.relative_bias, "standard_error": noise, "cosine": bias.cosine}
                found["bias"].append({"model": name, "influence": influence, "window": window, **told})
        try:
            fading = tb.horizon.decay(task.model, task.loss, at, probe, lags=min(steps, 2 * longest))
        except ValueError:  # no probe is scored, or the gradient explodes: there is no decay to tell of
            continue
        choice = tb.horizon.suggest(fading)
        found["decay"][name] = {"norms": fading.norms.tolist(), "rate": fading.rate}
        found["suggested"][name] = {"window": choice.window, "reason": choice.reason}
        if choice.window >= task.steps:
            why = f"No window shorter than a stream, {task.steps} steps, bounds the relative bias by a tenth. β̂ is {fading.rate:.4f}."
            found["suggested"][name] = {"window": task.steps, "reason": why}
    return found


def recommend(rows: list[dict[str, Any]], metric: dict[str, str], blind: float | None) -> dict[str, Any] | None:
    """The shortest window that is as good as the best, within the spread of seeds, in every budget that was run."""
    sign = 1 if metric["better"] == "higher" else -1
    best: dict[str, dict[tuple, dict]] = {}
    for row in rows:
        if not np.isfinite(row["metrics"]).all():
            continue
        mine = best.setdefault(row["budget"], {})
        place = row["carry"], row["influence"], row["window"]
        if place not in mine or sign * row["final_metric"] > sign * mine[place]["final_metric"]:
            mine[place] = row
    if not best:
        return None
    top = max((row for budget in best.values() for row in budget.values()), key=lambda row: sign * row["final_metric"])
    if blind is not None and sign * (top["final_metric"] - blind) < 0.02 * abs(blind):
        sentence = (
            f"No window learned anything yet: the best {metric['name']} is {top['final_metric']:.4g}, and {blind:.4g} is what can "
            "be had from one step alone. Give more --updates, other --learning_rates, or longer --windows."
        )
        return {"window": None, "carry": None, "influence": None, "sentence": sentence}

    def good(budget: dict[tuple, dict]) -> dict[tuple, dict]:
        top = max(budget.values(), key=lambda row: sign * row["final_metric"])
        worst = min(sign * row["final_metric"] for row in budget.values())
        # The best mean's own standard error, and no row's: where only some seeds learned, a spread would excuse the others.
        error = np.std(top["metrics"]) / np.sqrt(len(top["metrics"]))
        slack = max(error, 0.02 * (sign * top["final_metric"] - worst))
        return {
            place: row for place, row in budget.items() if sign * (top["final_metric"] - row["final_metric"]) <= slack
        }

    as_good = {name: good(budget) for name, budget in best.items()}
    everywhere = set.intersection(*(set(places) for places in as_good.values()))
    views = " and ".join(f"equal {name}" for name in best)
    if everywhere:
        told = f"at {views}"
    else:
        everywhere = set(as_good.get("data") or next(iter(as_good.values())))
        told = "at equal data, though not at equal updates"
    order = list(dict.fromkeys(row["influence"] for row in rows))
    carry, influence, window = min(everywhere, key=lambda place: (place[2], order.index(place[1]), place[0]))
    row = best.get("data", next(iter(best.values())))[carry, influence, window]
    longest = max(row["window"] for row in rows)
    of = "" if influence == "truncate" else f" with {influence}"
    sentence = (
        f"Use {carry} windows of {window}{of}: {metric['name']} {row['final_metric']:.4g}, the shortest that is as good as "
        f"any within the spread of {row['seeds']} seeds, {told}."
    )
    largest = next((r for r in rows if r["window"] == longest and r["influence"] == influence), None)
    if largest and window < longest and largest["temp_bytes"]:
        sentence += f" It takes {row['temp_bytes'] / largest['temp_bytes']:.0%} of the memory of windows of {longest}."
    other = next(
        (r for p, r in best.get("data", next(iter(best.values()))).items() if p[2] == window and p[0] != carry), None
    )
    if other:
        verb = "Without the carried state" if carry == "stateful" else "With the state carried"
        sentence += f" {verb} such windows reach {other['final_metric']:.4g}."
    return {"window": window, "carry": carry, "influence": influence, "sentence": sentence}


def git_revision() -> str | None:
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=pathlib.Path(__file__).parent
    )
    return asked.stdout.strip() or None if asked.returncode == 0 else None


def write_events(directory: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """TensorBoard's event files, one run for each row."""
    from tensorboardX import SummaryWriter

    for row in rows:
        name = f"{Point(*(row[field] for field in Point._fields)).name}-{row['learning_rate']:g}"
        shutil.rmtree(directory / name, ignore_errors=True)  # or its curves would be drawn twice
        with SummaryWriter(str(directory / name)) as writer:
            told = [("loss", *at) for at in zip(row["curve"]["updates"], row["curve"]["loss"], strict=True)]
            for name, update, value in [*told, ("final_metric", row["updates"], row["final_metric"])]:
                if value is not None:  # it diverged
                    writer.add_scalar(name, value, update)


def finish(task: Task, chosen: dict[str, Any], points: list[Point], kept: list[pathlib.Path]) -> None:
    """The report of all points that are done, found in the directories ``kept``."""
    resume.meet("all points are kept")
    at = found_in(kept, points, ".json")
    failures = found_in(kept, [p for p in points if p not in at], ".failed.json")
    rows = [row for path in at.values() for row in json.loads(path.read_text())]
    if not rows:
        raise ValueError("No point is done: there is nothing to report.")
    directory = launch.workdir(FLAGS.workdir)
    init = jax.jit(lambda key: task.model.init(key, task.data(key)[0].inputs[: task.lanes, :1]))
    params = {"untrained": init(jax.random.fold_in(jax.random.key(0), 0))}
    sign = 1 if task.metric["better"] == "higher" else -1
    done = [row for row in rows if None not in row["metrics"]]
    if done:  # the best of those that carry their state, if there are any
        best = max(done, key=lambda row: (row["carry"] == "stateful", sign * row["final_metric"]))
        point = Point(*(best[field] for field in Point._fields))
        which = chosen["learning_rates"].index(best["learning_rate"])
        with np.load(at[point].with_suffix(".npz")) as leaves:
            like, tree = jax.tree.flatten(params["untrained"])
            params["trained"] = jax.tree.unflatten(tree, [leaves[f"arr_{i}"][which] for i in range(len(like))])
    launch.console.print("Measuring the bias of each window, untrained and trained.", soft_wrap=True)
    results = {
        "task": chosen["task"],
        "about": task.about,
        "metric": task.metric,
        "rows": rows,
        **gradients(task, chosen, params),
        "failed": [json.loads(path.read_text()) for path in failures.values()],
        "recommendation": recommend(done, task.metric, task.exact(False, 1)),
        "command": shlex.join(["python", "-m", "experiments.truncation_sweep", *sys.argv[1:]]),
        "git": git_revision(),
        "settings": chosen,
    }
    launch.write_results(directory, results)
    if jax.process_index() == 0:
        report.write(directory, json.loads((directory / "results.json").read_text()))
        if FLAGS.tensorboard:
            write_events(directory / "tensorboard", rows)
    if results["recommendation"]:
        launch.say(results["recommendation"]["sentence"])
    launch.say(f"Written to {directory}: report.html, its charts, rows.csv, results.json, flags.txt")


def main() -> None:
    chosen = settings()
    points = all_points(chosen)
    mine = share(points, FLAGS.points)
    resume.join_processes(0)  # they share the trainings, not the lanes
    of_files: dict[str, Any] = {name: FLAGS[name].value for name in sweep_tasks.Files._fields}
    files = sweep_tasks.Files(**of_files)
    # cuDNN's LSTM, the default on a GPU, has no transpose, by which uoro moves forward.
    lstm = functools.partial(tb.lstm, implementation="fused" if "uoro" in chosen["influences"] else None)
    task = sweep_tasks.make(FLAGS.task, FLAGS.hidden, FLAGS.lanes, max(chosen["windows"]), files, lstm)
    if max(chosen["windows"]) > task.steps:
        raise ValueError(
            f"--windows has {max(chosen['windows'])}, and a stream of {FLAGS.task} has {task.steps} steps: choose from 1 to "
            f"{task.steps}."
        )
    directory = launch.expanded(FLAGS.workdir)
    kept = [directory, *(launch.expanded(path, "merge") for path in FLAGS.merge)]
    for each in kept:
        check_same_sweep(each, chosen)
    if FLAGS.merge:
        there = {**found_in(kept, points, ".json"), **found_in(kept, points, ".failed.json")}
        missing = [str(p) for p in points if p not in there]
        if missing:
            places = launch.plain(", ".join(map(str, kept)), 200)
            raise ValueError(
                f"{len(missing)} of {len(points)} points are in none of {places}, first {missing[0]}: "
                "do them first, with --points or without."
            )
        mark(launch.workdir(FLAGS.workdir), chosen)
        finish(task, chosen, points, kept)
        return

    check_sizes(task, chosen)
    launch.workdir(FLAGS.workdir)
    check_same_sweep(directory, chosen)  # nobody else writes there any more
    counts = {window: windows_of(task, window) for window in chosen["windows"]}
    longest_count, _ = counts[max(counts)]
    updates = {p: updates_of(p, counts[p.window][0], longest_count, chosen) for p in mine}
    done = {p for p in mine if (directory / "points" / f"{p.name}.json").exists()}
    programs: dict[tuple[int, str], Program | Exception] = {}
    runs = len(chosen["learning_rates"]) * chosen["seeds"]
    mesh = launch.mesh(runs=runs)
    with concurrent.futures.ThreadPoolExecutor(launch.cores()) as pool:
        asked: dict[tuple[int, str], Any] = {}
        for p in mine:
            kind = p.window, p.influence
            if p in done or kind in asked or kind in programs:
                continue
            try:
                asked[kind] = pool.submit(compiled(task, *kind, chosen, mesh))
            except Exception as error:  # as where a matrix of rtrl would be too large: the others go on
                programs[kind] = error
        for place, future in asked.items():
            programs[place] = future.exception() or future.result()
    launch.console.print(plan(mine, done, updates, programs, chosen))
    limit = launch.memory() // jax.local_device_count()
    for (window, influence), program in programs.items():
        if isinstance(program, Program) and program.bytes > limit:
            raise ValueError(
                f"Windows of {window} with {influence} need {program.bytes / 1e9:,.1f} GB, and a device has "
                f"{limit / 1e9:,.1f} GB: leave them out of --windows or --influences, or choose fewer --seeds, --lanes or "
                "--hidden."
            )

    kept_in = directory / "points"
    kept_in.mkdir(exist_ok=True)
    mark(directory, chosen)
    left = [p for p in mine if p not in done]
    failed, stop, number = False, 0, 0
    same: dict[tuple, list] = {}  # equal data and equal updates are one training where the updates are as many
    with (
        resume.stop_asked("after this point, kept") as stopping,
        launch.progress(len(left), "points") as tell,
    ):
        for number, point in enumerate(left):
            count, steps = counts[point.window]
            training = (*point[1:], updates[point])
            began = time.perf_counter()

            def told(
                update: int, loss: float, point: Point = point, number: int = number, began: float = began
            ) -> None:
                count, steps = counts[point.window]
                speed = runs * update * steps / count / (time.perf_counter() - began)
                tell(number + update / updates[point], f"{point}: loss {loss:.4g}, {speed:,.0f} steps/s")

            try:
                if training not in same:
                    program = programs[point.window, point.influence]
                    if isinstance(program, Exception):
                        raise program
                    found = train(point, program, runs, updates[point], told)
                    same[training] = [rows_of(task, point, chosen, program, found, steps / count), found[3]]
                rows, params = same[training]
                keep(kept_in, point, [{**row, "budget": point.budget} for row in rows], params, chosen)
                tell(number + 1, str(point))
            except Exception as error:  # whatever it is, the others go on
                failed = True
                why = keep_failed(kept_in, point, error)
                launch.say(f"{point} failed: {why}")
            stop = resume.largest(stopping())
            if stop:
                break
    if stop:
        launch.say(f"Stopped after {number + 1} of {len(left)} points; the same command does the others.")
        sys.exit(128 + stop)
    if FLAGS.points is None:
        finish(task, chosen, points, [directory])
    else:
        launch.say(f"Share {FLAGS.points} is in {directory}. When all are done: --merge with their directories.")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    launch.run(main)
