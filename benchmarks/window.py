"""One train window of an LSTM or a GRU: forward, backward and the update, on given cotangents of the outputs."""

import contextlib
import functools
import os
from typing import Any

import jax
import numpy as np
import optax
from matplotlib.axes import Axes

import tbptt_jax as tb
from benchmarks.turns import Maker, Section, Side, Timed, could_not_run, elsewhere, quartiles, table, take_turns
from tbptt_jax import sharding

SHAPES = (
    (32, 64, 64, 128),
    (32, 128, 128, 256),
    (16, 256, 256, 512),
    (64, 64, 512, 512),
    (20, 70, 400, 1150),
    (11, 20, 1, 10),
)
NARROW = (
    (32, 64, 16, 10),
    (32, 256, 16, 10),
    (32, 64, 16, 64),
    (32, 256, 16, 64),
)  # on a GPU, where they fit on the chip
RUN = 4  # windows in one compiled run
RATE = 1e-6
SGD = optax.sgd(RATE)
CELLS = {"LSTM": "OptimizedLSTMCell", "GRU": "GRUCell"}  # Flax's name of each; the others have that
Shape = tuple[int, int, int, int]


def jax_window(model: tb.Recurrence, shape: Shape, windows: int = RUN, devices: int = 1, optimiser: Any = SGD) -> Side:
    """Our loop around a model, ours or a peer's: ``windows`` in one compiled run, lanes over ``devices``."""
    lanes, steps, inputs, features = shape
    rng = np.random.default_rng(0)
    x, cotangents = (rng.normal(size=(windows, lanes, steps, n)).astype(np.float32) for n in (inputs, features))
    cut = tb.Window(x, cotangents)
    estimate = tb.gradient(model, lambda y, window: (y * window.targets).sum(-1), normaliser=1)
    if devices > 1:
        mesh = sharding.mesh(lane=devices)
        estimate, cut = sharding.over_lanes(estimate, mesh), sharding.place(cut, mesh)
    cut = jax.device_put(cut)
    step = tb.train_step(estimate, optimiser)
    state = step.init(jax.random.key(0), jax.tree.map(lambda x: x[0], cut))

    def call() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(tb.train_windows(step, state, cut))

    return call


def flax_rnn(kind: str, shape: Shape) -> tb.Recurrence:
    import flax.linen as nn

    rnn = nn.RNN(getattr(nn, CELLS[kind])(shape[-1]))
    return tb.Recurrence(rnn.init, lambda params, lanes: (), lambda params, carry, x, *_: (carry, rnn.apply(params, x)))


def haiku_unroll(kind: str, shape: Shape) -> tb.Recurrence:
    import haiku as hk

    def unroll(x: jax.Array) -> jax.Array:
        core = getattr(hk, kind)(shape[-1])
        return hk.dynamic_unroll(core, x, core.initial_state(len(x)), time_major=False)[0]

    model: Any = hk.without_apply_rng(hk.transform(unroll))
    return tb.Recurrence(
        model.init, lambda params, lanes: (), lambda params, carry, x, *_: (carry, model.apply(params, x))
    )


def keras_on_jax(kind: str, shape: Shape) -> tb.Recurrence:
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    lanes, steps, inputs, features = shape
    layer = getattr(keras.layers, kind)(features, return_sequences=True)
    layer.build((lanes, steps, inputs))
    params, others = ([v.value for v in vs] for vs in (layer.trainable_variables, layer.non_trainable_variables))
    return tb.Recurrence(
        lambda key, x: params,
        lambda params, lanes: (),
        lambda params, carry, x, *_: (carry, layer.stateless_call(params, others, x)[0]),
    )


def keras_on_torch(kind: str, *shape: int) -> Side:
    """Keras's layer is a module of PyTorch's here, and runs eagerly. In a process with KERAS_BACKEND=torch."""
    import keras

    lanes, steps, inputs, features = shape
    layer = getattr(keras.layers, kind)(features, return_sequences=True)
    layer.build((lanes, steps, inputs))
    return torch_call(layer, layer, shape)


def torch_window(kind: str, shape: Shape, compiled: bool = False) -> Side:
    """PyTorch's own layer: on a GPU, cuDNN's."""
    import torch

    _, _, inputs, features = shape
    layer = getattr(torch.nn, kind)(inputs, features, batch_first=True).to(
        "cuda" if torch.cuda.is_available() else "cpu"
    )
    if compiled:
        torch.compiler.reset()  # or it would compile the second shape for any shape
    run = torch.compile(layer) if compiled else layer
    return torch_call(layer, lambda x: run(x)[0], shape)


def torch_call(layer, forward, shape: tuple[int, ...]) -> Side:  # type: ignore[no-untyped-def]
    import torch

    lanes, steps, inputs, features = shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, cotangents = (torch.randn(lanes, steps, n, device=device) for n in (inputs, features))
    optimiser = torch.optim.SGD(layer.parameters(), RATE)

    def call() -> None:
        optimiser.zero_grad()
        forward(x).backward(cotangents)
        optimiser.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def ours(kind: str) -> tuple[str, str]:
    """A run, on one device and with the lanes spread."""
    name = f"tb.{kind.lower()}"
    return f"{name}, run", f"{name}, run, lanes spread"


def sides(kind: str, shape: Shape, in_torch: Maker) -> dict[str, tuple[Maker, int]]:
    """Everyone, and the windows in a call."""
    jax_side = functools.partial(functools.partial, jax_window)
    make, devices = getattr(tb, kind.lower()), jax.device_count()
    model, (run, spread) = make(shape[-1]), ours(kind)
    everyone: dict[str, tuple[Maker, int]] = {
        f"tb.{kind.lower()}, call": (jax_side(model, shape, 1), 1),
        run: (jax_side(model, shape), RUN),
        spread: (jax_side(model, shape, RUN, devices), RUN),
        "PyTorch, eager": (functools.partial(torch_window, kind, shape), 1),
        "PyTorch, torch.compile": (functools.partial(torch_window, kind, shape, True), 1),
        "Flax nn.RNN, run": (lambda: jax_window(flax_rnn(kind, shape), shape), RUN),
        "Haiku dynamic_unroll, run": (lambda: jax_window(haiku_unroll(kind, shape), shape), RUN),
        "Keras on JAX, run": (lambda: jax_window(keras_on_jax(kind, shape), shape), RUN),
        "Keras on PyTorch, eager": (in_torch, 1),
    }
    if devices == 1 or shape[0] % devices:
        del everyone[spread]
    if jax.default_backend() == "gpu" and kind == "LSTM":
        for how in ("fused", "cudnn", "pallas"):
            one: Any = how
            everyone[f"tb.lstm, run, {how}"] = (jax_side(tb.lstm(shape[-1], implementation=one), shape), RUN)
    return everyone


def chosen(shape: Shape) -> int:
    """Devices, as the launches choose them."""
    lanes, steps, _, units = shape
    return sharding.lane_devices(lanes, steps, units)


def lstm(seconds: float) -> Section:
    return measure("LSTM", seconds)


def gru(seconds: float) -> Section:
    return measure("GRU", seconds)


def measure(kind: str, seconds: float) -> Section:
    run, spread = ours(kind)
    name_of_ours = f"tb.{kind.lower()}"
    results: dict[Shape, Timed] = {}
    names: list[str] = []
    failed: dict[str, str] = {}
    shapes = SHAPES + (NARROW if jax.default_backend() == "gpu" and kind == "LSTM" else ())
    for shape in shapes:
        with contextlib.ExitStack() as stack:

            def in_torch(shape: Shape = shape, stack: contextlib.ExitStack = stack) -> Side:
                return stack.enter_context(elsewhere(keras_on_torch, kind, *shape, KERAS_BACKEND="torch"))

            everyone = sides(kind, shape, in_torch)
            timed = take_turns({name: make for name, (make, _) in everyone.items()}, seconds)
        a_window = {name: 1e3 * times / everyone[name][1] for name, times in timed.times.items()}
        results[shape] = timed._replace(times=a_window)
        names += [name for name in everyone if name not in names]
        failed |= timed.failed
        jax.clear_caches()
        print(shape, {name: quartiles(times) for name, times in a_window.items()}, timed.failed, flush=True)

    def ratio(name: str, shape: Shape) -> float:
        times = results[shape].times
        over_all = 1 < chosen(shape) == jax.device_count()  # a side has the lanes over all devices, or on one
        own = times[spread if over_all else run]
        return float(np.median(times[name]) / np.median(own)) if name in times else np.nan

    ratios = {name: [ratio(name, shape) for shape in shapes] for name in names if name not in (run, spread)}
    ratios = {name: each for name, each in ratios.items() if np.isfinite(each).any()}
    columns = [", ".join(map(str, shape)) for shape in shapes]
    times_table = table(
        ["ms a window: lanes, time, inputs, units", *columns],
        [
            [name, *(quartiles(results[s].times[name]) if name in results[s].times else "–" for s in shapes)]
            for name in names
        ],
    )

    def mean(each: list[float]) -> float:
        return float(np.exp(np.nanmean(np.log(each))))

    families = {"the faster PyTorch": ("PyTorch",), "the fastest JAX peer": ("Flax", "Haiku", "Keras on JAX")}
    fastest = {
        family: np.nanmin([each for name, each in ratios.items() if name.startswith(own)], 0).tolist()
        for family, own in families.items()
        if any(name.startswith(own) for name in ratios)
    }
    ratios_table = table(
        [f"times slower than {name_of_ours}", *columns, "geometric mean"],
        [[name, *(f"{r:.2f}" for r in each), f"{mean(each):.2f}"] for name, each in {**ratios, **fastest}.items()],
    )
    devices_rows = []
    for shape in shapes:
        if spread in results[shape].times:
            one, over_all = (np.median(results[shape].times[name]) for name in (run, spread))
            row = f"{one:.2f}", f"{over_all:.2f}", f"{one / over_all:.2f}", chosen(shape), f"{ratio(run, shape):.2f}"
            devices_rows.append([", ".join(map(str, shape)), *row])
    devices_table = table(
        ["lanes, time, inputs, units", "one device, ms", "lanes spread, ms", "one / spread", "chosen", "one / chosen"],
        devices_rows,
    )
    text = f"""One {kind} layer, float32: forward, backward and an SGD update. Milliseconds a window, median (quartiles).
A *run* is {RUN} windows in one compiled call, as `tb.train_windows` makes them; the JAX peers are given the same loop, so
that only the layer differs. *Lanes spread*: each of the {jax.device_count()} devices reads its own lanes (`tb.sharding`).
Keras on PyTorch runs in a process of its own.

{times_table}

Ratios of medians, above 1 where `{name_of_ours}` is faster; it is the run, on as many devices as the launches choose.

{ratios_table}

What spreading the lanes over {jax.device_count()} devices brings, and how many `tb.sharding.lane_devices` chooses, as the launches do: on a
CPU all of them from 64 to 512 units, with 8 lanes for each device or more and 2 (units / 128)³ steps a window or more, and
else one. A wider layer's two copies of the weights no longer fit into the cache.

{devices_table}{could_not_run(failed)}"""

    def draw(axes: Axes) -> None:
        places, width = np.arange(len(shapes)), 0.85 / len(ratios)
        for i, (name, each) in enumerate(ratios.items()):
            axes.bar(places + i * width, each, width, label=f"{name}, {mean(each):.1f}")
        axes.axhline(1, color="black", linewidth=1)
        axes.set(yscale="log", ylabel=f"time / {run}")
        axes.set_title(f"One {kind} train window (number: geometric mean)")
        axes.set_xticks(places + 0.4, ["×".join(map(str, shape)) for shape in shapes])
        axes.legend(frameon=False, fontsize=8, ncols=2)

    return Section(f"The {kind} window", text, draw)
