"""The first-bit study as it was first run, from nothing to trained models, and its sweep over windows and seeds.

Made in processes of their own, so only what a side needs is imported, and that before the clock starts.
"""

import concurrent.futures
import functools
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from benchmarks.turns import Section, Side, clock, could_not_run, elsewhere, table

SEQUENCES, STEPS, HIDDEN, EPOCHS, RATE, BATCH = 1000, 20, 10, 15, 0.01, 11
SYSTEMS = {  # window, stride, lanes and whether the state is carried
    "whole sequences": (STEPS, STEPS, BATCH, False),
    "sliding windows of 10": (10, 1, BATCH, False),
    "stateful, a step at a time": (1, 1, 1, True),
}
WINDOWS, SEEDS = (1, 2, 5, 10, 20), 8
BACKENDS = {"jax": "Keras on JAX", "torch": "Keras on PyTorch"}
STARTS = 3  # fresh processes of each side


def updates(window: int, stride: int, lanes: int) -> int:
    """Of an epoch."""
    return -(-SEQUENCES * ((STEPS - window) // stride + 1) // lanes)


def ours(systems: list[tuple[int, int, int, bool]], seeds: int) -> Side:
    """The first call makes data and parameters, and compiles a program for each system, as many at a time as there are
    cores; every call trains all of them, each with its seeds side by side."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax

    import tbptt_jax as tb
    from tbptt_jax import sharding

    mesh = sharding.mesh(run=min(seeds, jax.device_count()))
    loss = lambda y, window: optax.sigmoid_binary_cross_entropy(y, window.targets)[..., 0]  # noqa: E731
    step = tb.train_step(tb.gradient(tb.lstm(HIDDEN, readout=nn.Dense(1)), loss), optax.adam(RATE))

    def begin(key: jax.Array) -> tuple[tb.Window, Any]:
        sequences = tb.tasks.first_bit(key, SEQUENCES, STEPS)
        return sequences, step.init(key, jax.tree.map(lambda x: x[:BATCH, :1], sequences))

    def train(window: int, stride: int, lanes: int, carried: bool, sequences: tb.Window, state: Any) -> jax.Array:
        cut = sequences if carried or stride == window else tb.slide(sequences, window, stride)
        cut = tb.split(cut, window, lanes=lanes)
        answers = jnp.zeros(cut.inputs.shape[:3]).at[..., -1].set(1)  # one a window
        cut = cut._replace(weights=answers if cut.valid is None else answers * cut.valid)
        cut = cut if carried else tb.stateless(cut)
        carry = jax.tree.map(lambda x: x[:lanes], state.stream.carry)
        state = state._replace(stream=state.stream._replace(carry=carry))

        def epoch(state: Any, _: None) -> tuple[Any, jax.Array]:
            state, metrics = tb.train_windows(step, state, cut)
            return state, metrics.loss.mean()

        return jax.lax.scan(epoch, state, length=EPOCHS)[1]

    programs: list[Any] = []
    start: Any = None

    def call() -> None:
        nonlocal start
        if not programs:
            keys = jax.random.split(jax.random.key(0), seeds)
            first = jax.jit(sharding.over_runs(begin, mesh))
            each = [jax.jit(sharding.over_runs(functools.partial(train, *system), mesh)) for system in systems]
            lowered = [first.lower(keys), *(program.lower(*jax.eval_shape(first, keys)) for program in each)]
            with concurrent.futures.ThreadPoolExecutor(jax.device_count()) as pool:
                made, *rest = pool.map(lambda program: program.compile(), lowered)
            start, programs[:] = made(keys), rest
        jax.block_until_ready([program(*start) for program in programs])

    return call


def keras_fit(window: int, stride: int, lanes: int, epochs: int, anew: bool) -> Side:
    """As many updates of as many windows by ``fit``: the first call makes the model; ``anew``, every call does."""
    import keras

    model: Any = None

    def call() -> None:
        nonlocal model
        bits = np.arange(SEQUENCES) % 2
        sequences = np.zeros((SEQUENCES, STEPS), np.float32)
        sequences[:, 0] = bits
        windows = np.lib.stride_tricks.sliding_window_view(sequences, window, 1)[:, ::stride]
        labels = np.repeat(bits, windows.shape[1]).astype(np.float32)
        if model is None or anew:
            layers = [keras.Input((window, 1)), keras.layers.LSTM(HIDDEN), keras.layers.Dense(1)]
            model = keras.Sequential(layers)
            loss = keras.losses.BinaryCrossentropy(from_logits=True)
            model.compile(optimizer=keras.optimizers.Adam(RATE), loss=loss)
        x, y = windows.reshape(-1, window, 1), labels[:, None]
        model.fit(x, y, batch_size=lanes, epochs=epochs, shuffle=False, verbose=0)

    return call


def measure(seconds: float) -> Section:
    starts = max(1, min(STARTS, round(seconds)))
    failed: dict[str, str] = {}
    cold: dict[str, dict[str, list[float]]] = {name: {} for name in ("tbptt_jax", *BACKENDS.values())}
    warm: dict[str, dict[str, list[float]]] = {name: {} for name in cold}

    def visit(name: str, what: str, make: Any, *args: Any, times: float = 1, **environment: str) -> None:
        """A fresh process's first call and the mean of the next two; ``times`` as long, where a part was run."""
        try:
            with elsewhere(make, *args, **environment) as call:
                first, again = clock(call), clock(call, 2)
        except RuntimeError as error:
            failed[name] = str(error)
            return
        cold[name].setdefault(what, []).append(first + (times - 1) * again)
        warm[name].setdefault(what, []).append(times * again)
        print(name, what, first, again, flush=True)

    for _ in range(starts):
        for what, (window, stride, lanes, carried) in SYSTEMS.items():
            visit("tbptt_jax", what, ours, [(window, stride, lanes, carried)], 1)
            for backend, name in BACKENDS.items():
                epochs = 1 if carried else EPOCHS
                visit(
                    name,
                    what,
                    keras_fit,
                    window,
                    stride,
                    lanes,
                    epochs,
                    False,
                    times=EPOCHS / epochs,
                    KERAS_BACKEND=backend,
                )
        visit("tbptt_jax", "all", ours, list(SYSTEMS.values()), 1)
        visit("tbptt_jax", "sweep", ours, [(window, window, BATCH, True) for window in WINDOWS], SEEDS)

    def middle(times: dict[str, list[float]], whats: Any) -> float:
        return float(sum(np.median(times[what]) for what in whats))

    theirs = {name: middle(warm[name], SYSTEMS) for name in BACKENDS.values() if name not in failed}
    fastest = min(theirs, key=theirs.__getitem__, default=None)
    backend = next((b for b, name in BACKENDS.items() if name == fastest), "")
    for window in WINDOWS if fastest else ():
        visit(fastest or "", str(window), keras_fit, window, window, BATCH, EPOCHS, True, KERAS_BACKEND=backend)

    def row(name: str, what: str) -> list[str]:
        if name == "tbptt_jax" or what != "all":
            return [f"{np.median(times[name][what]):.3g}" for times in (cold, warm)]
        return [f"{middle(times[name], SYSTEMS):.3g}" for times in (cold, warm)]

    def ratios(what: str) -> list[str]:
        if fastest is None:
            return ["–", "–"]
        return [
            f"{float(them) / float(us):.1f}"
            for them, us in zip(row(fastest, what), row("tbptt_jax", what), strict=True)
        ]

    sides = ["tbptt_jax", *theirs]
    whats = [*SYSTEMS, "all"]
    rows = [
        [
            "all three" if what == "all" else what,
            f"{EPOCHS * sum(updates(*SYSTEMS[s][:3]) for s in (SYSTEMS if what == 'all' else [what])):,}",
            *(cell for name in sides for cell in row(name, what)),
            *ratios(what),
        ]
        for what in whats
    ]
    head = ["system", "updates", *(f"{name}, {kind}" for name in sides for kind in ("cold", "warm"))]
    one_by_one = SEEDS * middle(warm[fastest], map(str, WINDOWS)) if fastest else np.nan
    ours_cold, ours_warm = (float(np.median(times["tbptt_jax"]["sweep"])) for times in (cold, warm))
    sweeps = [
        ["tbptt_jax, a fresh process, with compilation", f"{ours_cold:.2f}", f"{one_by_one / ours_cold:.1f}"],
        ["tbptt_jax, again", f"{ours_warm:.2f}", f"{one_by_one / ours_warm:.1f}"],
        [f"{fastest}, run after run", f"{one_by_one:.1f}", "1.0"],
    ]
    text = f"""The study's systems as they were first run: {SEQUENCES} sequences of {STEPS} steps, an LSTM of {HIDDEN} units, Adam, {EPOCHS} epochs;
batches of {BATCH}, and of 1 where the state is carried a step at a time. Seconds, medians of {starts} processes. *Cold* is the first
training in a fresh process, from data to trained parameters, with compilation and without imports; *warm* those after it.
Keras trains by `fit`, never carrying the state, which is less work than the study's third system asks: with `stateful=True`
Keras 3.15 leaves the state at zeros in training on JAX, and stops with an error of autograd's on PyTorch. Of that system
one of Keras's epochs was timed and counted {EPOCHS} times.

{table([*head, f"{fastest} / ours, cold", "warm"], rows)}

The sweep: stateful windows of {", ".join(map(str, WINDOWS))}, {SEEDS} seeds each, {EPOCHS} epochs in batches of {BATCH}. Ours trains the seeds of a window
side by side, spread over the devices. Keras, on its backend that is faster above, makes and trains one model after another.

{table(["side", f"{len(WINDOWS) * SEEDS} trainings, s", "times faster"], sweeps)}{could_not_run(failed)}"""

    def draw(axes: Axes) -> None:
        groups = [*whats[:-1], "sweep"]
        for i, name in enumerate(sides):
            heights = [np.median(warm[name][what]) if what in warm[name] else np.nan for what in groups]
            if name == fastest:
                heights[-1] = one_by_one
            bars = axes.bar(np.arange(len(groups)) + 0.27 * i, heights, 0.27, label=name)
            axes.bar_label(
                bars, ["" if np.isnan(h) else f"{h:.0f}" if h >= 10 else f"{h:.2g}" for h in heights], fontsize=8
            )
        axes.set_xticks(np.arange(len(groups)) + 0.27, [g.replace(" ", "\n", 1).replace(", ", ",\n") for g in groups])
        axes.set(yscale="log", ylabel="s, warm")
        axes.set_title(f"The first-bit study; its sweep of {len(WINDOWS) * SEEDS} trainings")
        axes.legend(frameon=False, fontsize=8)

    return Section("The first-bit study", text, draw)
