"""The trainings of a sweep: all seeds and learning rates of a window as one program, spread over the devices."""

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import tbptt_jax as tb
from tbptt_jax.sharding import RUN, over_runs
from tbptt_jax.study.influences import influence as named_influence
from tbptt_jax.study.lengths import Lengths
from tbptt_jax.study.process.machine import check_fits, check_training, needs, size
from tbptt_jax.study.task import Task, data_of, figures, is_drawn, keys_of

CALL = 500  # updates in a call
PLACES = 50  # of a learning curve


class Training(NamedTuple):
    """What is trained once: a window, its carry and influence, all seeds and learning rates, for so many updates."""

    window: int | Lengths
    carry: str  # "stateful" or "stateless"
    influence: str
    updates: int  # of each run
    rates: tuple[float, ...]  # Adam's at the start
    seeds: int  # runs of each rate
    epochs: float | None = (
        None  # of a schedule's run, instead of the updates; these are then as many as its data is worth
    )


class Trained(NamedTuple):
    """What came of it."""

    losses: np.ndarray  # of each update, [runs, updates], the runs of a rate side by side; none of a schedule's runs
    weights: np.ndarray  # likewise, how much was scored
    scores: np.ndarray  # the loss and the first figure on the test data, [runs, 2]
    params: Any  # of the first seed of each rate, [rates, ...]
    seconds: float  # that the training took
    compile_seconds: float  # besides
    temp_bytes: int | None  # what lies between the operations of the training, where that is known
    told: tuple[dict[str, Any], ...] = ()  # of each rate, what a schedule's runs did: see `scheduled.py`


class Program(NamedTuple):
    """A training, compiled."""

    begin: Callable  # () -> (states, data) of all runs
    advance: Callable  # (states, data, carried, first, last, updates) -> (states, losses, weights), each [runs, …]
    evaluate: Callable  # (params, data, carried) -> scores [runs, 2], the loss and the metric
    bytes: int  # what a device needs for either
    temp_bytes: int  # what lies between the operations of the training
    seconds: float  # that it took to compile


class Shape(NamedTuple):
    """Of the training streams: how many rows, steps of each, and streams side by side."""

    rows: int
    steps: int
    lanes: int


def streams_of(task: Task, which: str, key: jax.Array) -> tb.Window:
    """The streams of ``"train"`` or ``"test"`` as a Window; for want of a test, the validation data."""
    streams = task.train if which == "train" else task.valid if task.test is None else task.test
    if streams is None:
        raise ValueError(f"The task {task.name!r} has no test or validation data: a sweep has nothing to compare by.")
    data = data_of(streams, key)
    if isinstance(data, tb.Window):
        return data
    steps, lanes = len(jax.tree.leaves(data[0])[0]), task.lanes if which == "train" else 1
    if lanes > steps:
        raise ValueError(f"A corpus of {steps} steps cannot be read in {lanes} lanes: choose at most {steps}.")
    check_fits("The corpus, which a sweep holds in memory,", sum(x.nbytes for x in jax.tree.leaves(data)), "its length")
    return tb.lanes(*data, lanes=lanes)


def cut(task: Task, streams: tb.Window, window: int, lanes: int) -> tb.Window:
    return task.cut(streams, window, min(lanes, len(jax.tree.leaves(streams.inputs)[0])))


def is_shared(task: Task) -> bool:
    """Whether the data is the same for every seed."""
    return not is_drawn(task.train)


def shape_of(task: Task) -> Shape:
    streams = jax.eval_shape(lambda key: streams_of(task, "train", key), jax.random.key(0))
    rows, steps = jax.tree.leaves(streams.inputs)[0].shape[:2]
    return Shape(rows, steps, min(task.lanes, rows))


def windows_of(task: Task, window: int) -> tuple[int, int]:
    """How many windows the training data is cut into, and how many steps it has."""
    shape = shape_of(task)
    key = jax.random.key(0)
    train = jax.eval_shape(lambda key: cut(task, streams_of(task, "train", key), window, shape.lanes), key)
    return len(jax.tree.leaves(train.inputs)[0]), shape.rows * shape.steps


def compiled(task: Task, training: Training, mesh: Mesh) -> Callable[[], Program]:
    """A window's program, traced now and compiled when it is asked for: compiling leaves Python to others."""
    each_rate, each_seed = np.meshgrid(training.rates, np.arange(training.seeds), indexing="ij")
    fill = 0, -each_rate.size % mesh.shape[RUN]  # every device has as many runs: none waits for another
    rates, seeds = (np.pad(each.ravel(), fill, "edge") for each in (each_rate.astype(np.float32), each_seed))
    assert isinstance(training.window, int)
    window, shared_data, shape = training.window, is_shared(task), shape_of(task)
    count, _ = windows_of(task, window)
    past = named_influence(training.influence, max(1, -(-shape.steps // window) - 1))
    score = figures(task)[0].of
    everywhere, by_run = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (RUN,)))
    of_data = everywhere if shared_data else by_run

    def data(seed: jax.Array | int) -> tuple[tb.Window, tb.Window]:
        keys = keys_of(seed)
        train, test = streams_of(task, "train", keys.train), streams_of(task, "test", keys.test)
        return cut(task, train, window, shape.lanes), cut(task, test, window, len(jax.tree.leaves(test.inputs)[0]))

    def train_step(rate: jax.Array, updates: jax.Array) -> Any:
        def falling(done: jax.Array) -> jax.Array:
            return rate * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(done / updates, 1)))

        estimate = tb.gradient(task.model, task.loss, influence=past)
        return tb.train_step(estimate, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(falling)))

    def begin(seeds: jax.Array) -> tuple:
        shared = data(0) if shared_data else None

        def one(shared: Any, seed: jax.Array) -> tuple:
            own = shared or data(seed)
            first = jax.tree.map(lambda x: x[0], own[0])
            state = train_step(jnp.float32(0), jnp.int32(1)).init(keys_of(seed).init, first)
            return state, None if shared_data else own

        states, own = jax.vmap(functools.partial(one, shared))(seeds)
        return states, shared if shared_data else own

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

        shared, own = (data, None) if shared_data else (None, data)
        return over_runs(one, mesh, (shared, *numbers))(states, rates, own)

    def evaluate(params: Any, data: Any, carried: jax.Array) -> jax.Array:
        def figures(outputs: Any, window: tb.Window) -> tuple:
            return task.loss(outputs, window), score(outputs, window)

        def one(shared: Any, carried: Any, params: Any, own: Any) -> jax.Array:
            test = windows_anew((shared or own)[1], carried | task.free)
            return jnp.stack(tb.evaluate(task.model, figures, params, test).loss).astype(jnp.float32)

        shared, own = (data, None) if shared_data else (None, data)
        return over_runs(one, mesh, (shared, carried))(params, own)

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
        (training, temporary), (judging, _) = needs(then), needs(last)

        def begin() -> tuple:
            states, data = first(seeds)
            return place(states, by_run), place(data, of_data)

        def advance(states: Any, data: Any, *numbers: Any) -> tuple:
            return then(states, data, place(rates, by_run), *numbers)

        return Program(begin, advance, last, max(training, judging), temporary, time.perf_counter() - began)

    return compile_all


def check_sizes(task: Task, runs: int, updates: int) -> None:
    """Raises a ``ValueError`` if not even what must be there at once, of the smallest windows, fits."""
    recorded = 24 * runs * max(CALL, updates)  # losses and weights
    check_fits("What is recorded of the training", recorded, "`seeds` or `updates`")
    streams = jax.eval_shape(lambda key: streams_of(task, "train", key), jax.random.key(0))
    check_fits("The data", size(streams) * (1 if is_shared(task) else runs), "`seeds` or `lanes`")
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, min(task.lanes, x.shape[0]), 1, *x.shape[2:]), x.dtype), streams
    )
    step = tb.train_step(tb.gradient(task.model, task.loss), optax.adam(1.0))
    check_training(step, like, runs, "the model's size, `lanes`, `seeds` or the number of `learning_rates`")


def windows_anew(windows: tb.Window, carried: jax.Array) -> tb.Window:
    """The same windows, each begun from the initial carry unless it is ``carried``."""
    here, anew = (jnp.asarray(w.resets) for w in (windows, tb.stateless(windows)))
    return windows._replace(resets=jnp.where(carried, here, anew))


def train(
    training: Training, program: Program, report: Callable[[int, float], None] = lambda updates, loss: None
) -> Trained:
    """All runs of a training, with its program; ``report(updates, loss)`` after each call."""
    began, runs = time.perf_counter(), len(training.rates) * training.seeds
    states, data = program.begin()
    parts, carried = [], np.bool_(training.carry == "stateful")
    for first in range(0, training.updates, CALL):
        last = min(first + CALL, training.updates)
        numbers = (np.int32(n) for n in (first, last, training.updates))
        states, losses, weights = program.advance(states, data, carried, *numbers)
        losses, weights = (fetch(x, runs)[:, : last - first] for x in (losses, weights))  # waits for the call
        parts.append((losses, weights))
        scored = weights > 0
        report(last, float(losses[scored].mean()) if scored.any() else float("nan"))
    losses, weights = (np.concatenate(each, 1).astype(np.float64) for each in zip(*parts, strict=True))
    scores = fetch(program.evaluate(states.params, data, carried), runs).astype(np.float64)
    params = jax.tree.map(lambda x: fetch(x, runs)[:: training.seeds], states.params)
    seconds = time.perf_counter() - began
    return Trained(losses, weights, scores, params, seconds, program.seconds, program.temp_bytes)


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
    places: dict[str, list] = {"updates": [], "steps": [], "loss": [], "low": [], "high": []}
    for first, last in itertools.pairwise(edges):
        weight = weights[:, first:last].sum(1)
        if not weight.all():
            continue
        with np.errstate(invalid="ignore", over="ignore"):
            each = (losses[:, first:last] * weights[:, first:last]).sum(1) / weight
        for name, value in zip(places, (last, last * steps_each, each.mean(), each.min(), each.max()), strict=True):
            places[name].append(float(value))
    return places
