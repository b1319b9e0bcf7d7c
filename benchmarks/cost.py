"""What a stream costs: memory that does not grow with its length, time that grows no faster than its steps."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes

import tbptt_jax as tb
from benchmarks.turns import Maker, Section, Side, quartiles, table, take_turns
from tbptt_jax.recurrence import Segment

LENGTHS = (10**3, 10**4, 10**5, 10**6)
LANES, WINDOW, HIDDEN, VOCABULARY = 32, 50, 128, 96
ONE_WINDOW = 4096
KEPT: tuple[Segment, ...] = (None, 64, "sqrt", (64, 8), (256, 32, 4))  # segments of one window
STREAM_LANES, STREAM_HIDDEN = 4, 64  # small, for a million steps
WIDTHS, BATCHES = (16, 32, 64, 128, 256, 512, 1024), (1, 4, 16, 64, 256)


def train_step(hidden: int, checkpoint: Segment = None) -> tb.training.TrainStep:
    model = tb.lstm(hidden, encoder=nn.Embed(VOCABULARY, hidden), readout=nn.Dense(1), checkpoint=checkpoint)
    estimate = tb.gradient(model, lambda y, window: (y[..., 0] - window.targets) ** 2)
    return tb.train_step(estimate, optax.adam(1e-3))


def bytes_of(steps: int, window: int, checkpoint: Segment = None) -> tuple[int, int]:
    """Arguments and temporary memory of ``tb.train_windows``, compiled for a stream and never run."""
    step = train_step(HIDDEN, checkpoint)
    run = jax.jit(functools.partial(tb.train_windows, step), donate_argnums=0)
    ids = jax.ShapeDtypeStruct((steps // window, LANES, window), jnp.int32)
    windows = tb.Window(ids, jax.ShapeDtypeStruct(ids.shape, jnp.float32))
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), windows)
    state = jax.eval_shape(step.init, jax.random.key(0), first)
    analysis = run.lower(state, windows).compile().memory_analysis()
    assert analysis is not None
    return analysis.argument_size_in_bytes, analysis.temp_size_in_bytes


def memory(seconds: float) -> Section:
    kinds = {
        f"windows of {WINDOW}": lambda steps: bytes_of(steps, WINDOW),
        "one window, checkpoint='sqrt'": lambda steps: bytes_of(steps, steps, "sqrt"),
        "one window (full BPTT)": lambda steps: bytes_of(steps, steps),
    }
    found = {name: [kind(steps) for steps in LENGTHS] for name, kind in kinds.items()}
    data = [arguments for arguments, _ in found[f"windows of {WINDOW}"]]
    used = {name: [temporary / 1e6 for _, temporary in each] for name, each in found.items()}
    rows = [
        [f"{steps:,}", f"{data[i] / 1e6:,.1f}", *(f"{each[i]:,.1f}" for each in used.values())]
        for i, steps in enumerate(LENGTHS)
    ]
    text = f"""Temporary memory of the compiled `tb.train_windows`, MB, by XLA's `memory_analysis`: {LANES} lanes, an LSTM of
{HIDDEN} units that reads characters and tells a number at every step, Adam. The arguments are the parameters, Adam's moments and
the stream itself, which need not be on the device at once.

{table(["steps of a lane", "arguments", *used], rows)}

{segments(seconds)}"""

    def draw(axes: Axes) -> None:
        for name, each in used.items():
            axes.plot(LENGTHS, each, marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel="steps of the stream", ylabel="temporary memory, MB")
        axes.set_title("Memory")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)

    return Section("Memory", text, draw)


def segments(seconds: float) -> str:
    """What a window costs in segments, and in segments within segments."""
    sides: dict[str, Maker] = {
        str(kept): functools.partial(stream, ONE_WINDOW, LANES, HIDDEN, ONE_WINDOW, kept) for kept in KEPT
    }
    timed = take_turns(sides, seconds, least=3)
    assert not timed.failed, timed.failed
    rows = [
        [
            f"`checkpoint={kept!r}`",
            f"{bytes_of(ONE_WINDOW, ONE_WINDOW, kept)[1] / 1e6:,.1f}",
            quartiles(timed.times[str(kept)]),
        ]
        for kept in KEPT
    ]
    return f"""One window of {ONE_WINDOW:,} steps in segments, and in segments within segments, of the same model.

{table(["", "temporary memory, MB", "seconds an update, median (quartiles)"], rows)}"""


def stream(steps: int, lanes: int, hidden: int, window: int = WINDOW, checkpoint: Segment = None) -> Side:
    step = train_step(hidden, checkpoint)
    ids = np.random.default_rng(0).integers(VOCABULARY, size=(steps // window, lanes, window), dtype=np.int32)
    windows = jax.device_put(tb.Window(ids, ids.astype(np.float32)))
    state = step.init(jax.random.key(0), jax.tree.map(lambda x: x[0], windows))

    def call() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(tb.train_windows(step, state, windows))

    return call


def cost(seconds: float) -> Section:
    short = 4 * WINDOW
    sweeps = {
        "length": {steps: (steps, STREAM_LANES, STREAM_HIDDEN) for steps in LENGTHS},
        "units": {hidden: (short, LANES, hidden) for hidden in WIDTHS},
        "lanes": {lanes: (short, lanes, HIDDEN) for lanes in BATCHES},
    }
    found: dict[str, dict[int, np.ndarray]] = {}
    for name, settings in sweeps.items():
        timed = take_turns({str(n): functools.partial(stream, *each) for n, each in settings.items()}, seconds, least=3)
        assert not timed.failed, timed.failed
        found[name] = {n: 1e6 * timed.times[str(n)] / steps for n, (steps, _, _) in settings.items()}
        print(name, {n: quartiles(times) for n, times in found[name].items()}, flush=True)
    heads = {
        "length": ["steps of the stream", "µs a step, median (quartiles)"],
        "units": ["units", "µs a step, median (quartiles)"],
        "lanes": ["lanes", "µs a step, median (quartiles)", "µs a lane and step"],
    }
    tables = {
        name: table(
            heads[name],
            [
                [f"{n:,}", quartiles(times), *([f"{np.median(times) / n:.2f}"] if name == "lanes" else [])]
                for n, times in found[name].items()
            ],
        )
        for name in found
    }
    medians = [np.median(times) for times in found["length"].values()]
    text = f"""Microseconds a step of all lanes, in windows of {WINDOW} under `tb.train_windows` on one device; the model is that of "Memory".

By the stream's length, {STREAM_LANES} lanes and {STREAM_HIDDEN} units. The medians lie within {100 * (max(medians) / min(medians) - 1):.0f} %,
with what a call costs besides its steps counted in:

{tables["length"]}

By units, {LANES} lanes:

{tables["units"]}

By lanes, {HIDDEN} units:

{tables["lanes"]}"""

    def draw(axes: Axes) -> None:
        labels = {"length": "steps of the stream", "units": f"units, {LANES} lanes", "lanes": f"lanes, {HIDDEN} units"}
        for name, label in labels.items():
            axes.plot(list(found[name]), [np.median(t) for t in found[name].values()], marker="o", label=label)
        axes.set(xscale="log", yscale="log", xlabel="steps, units or lanes", ylabel="µs a step")
        axes.set_title("Time")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)

    return Section("Time", text, draw)
