"""The first-bit study, from nothing to a trained model: in a fresh process, again in the same one, and swept over windows.

Made in processes of their own, so only what a side needs is imported, and that before the clock starts.
"""

import contextlib
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from benchmarks.turns import Section, Side, clock, elsewhere, quartiles, table

SEQUENCES, STEPS, HIDDEN, LANES, EPOCHS, RATE = 1000, 20, 10, 100, 15, 0.02
WINDOWS, SEEDS, WINDOW = (1, 2, 5, 10, 20), 8, 5
BACKENDS = ("jax", "torch")
STARTS = 3  # fresh processes of each side


def ours(windows: list[int], seeds: int) -> Side:
    """Data, parameters and all epochs of all seeds in one compiled call for each window length."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax

    import tbptt_jax as tb

    model = tb.lstm(HIDDEN, readout=nn.Dense(1))
    step = tb.train_step(
        tb.gradient(model, lambda y, w: optax.sigmoid_binary_cross_entropy(y, w.targets)[..., 0]), optax.adam(RATE)
    )

    def study(length: int) -> Any:
        def train(key: jax.Array) -> jax.Array:
            cut = tb.split(tb.tasks.first_bit(key, SEQUENCES, STEPS), length, lanes=LANES)
            cut = cut._replace(weights=jnp.zeros(cut.inputs.shape[:3]).at[..., -1].set(1))  # one answer a window
            state = step.init(key, jax.tree.map(lambda x: x[0], cut))

            def epoch(state: Any, _: None) -> tuple[Any, jax.Array]:
                state, metrics = tb.train_windows(step, state, cut)
                return state, metrics.loss.mean()

            return jax.lax.scan(epoch, state, length=EPOCHS)[1]

        return jax.jit(jax.vmap(train) if seeds > 1 else train)

    studies = [study(length) for length in windows]

    def call() -> None:
        key = jax.random.key(0)
        keys = jax.random.split(key, seeds) if seeds > 1 else key
        for study in studies:
            jax.block_until_ready(study(keys))

    return call


def keras_fit(window: int, anew: bool) -> Side:
    """As many updates by ``fit``: the first call makes the model; ``anew``, every call does."""
    import keras

    model: Any = None

    def call() -> None:
        nonlocal model
        bits = np.arange(SEQUENCES) % 2
        x = np.zeros((SEQUENCES, STEPS, 1), np.float32)
        x[:, 0, 0] = bits
        if model is None or anew:
            layers = [keras.Input((window, 1)), keras.layers.LSTM(HIDDEN), keras.layers.Dense(1)]
            model = keras.Sequential(layers)
            loss = keras.losses.BinaryCrossentropy(from_logits=True)
            model.compile(optimizer=keras.optimizers.Adam(RATE), loss=loss)
        labels = np.repeat(bits, STEPS // window).astype(np.float32)[:, None]
        model.fit(x.reshape(-1, window, 1), labels, batch_size=LANES, epochs=EPOCHS, shuffle=False, verbose=0)

    return call


def measure(seconds: float) -> Section:
    names = {
        "ours": "tbptt_jax",
        **{backend: f"Keras on {'JAX' if backend == 'jax' else 'PyTorch'}" for backend in BACKENDS},
    }

    def start(side: str) -> contextlib.AbstractContextManager[Side]:
        if side == "ours":
            return elsewhere(ours, [WINDOW], 1)
        return elsewhere(keras_fit, WINDOW, False, KERAS_BACKEND=side)

    cold: dict[str, list[float]] = {side: [] for side in names}
    warm: dict[str, list[float]] = {side: [] for side in names}
    failed: dict[str, str] = {}
    starts = max(1, min(STARTS, round(seconds)))
    for _ in range(starts):
        for side in [name for name in names if name not in failed]:
            try:
                with start(side) as call:
                    cold[side].append(clock(call))
                    warm[side].append(clock(call))
            except RuntimeError as error:
                failed[side] = str(error)
    middle = {side: float(np.median(cold[side])) for side in names if cold[side]}
    print("study", middle, {s: np.median(w) for s, w in warm.items() if w}, failed, flush=True)
    backend = min((side for side in middle if side != "ours"), key=middle.__getitem__, default=None)

    sweep: list[float] = []
    fits = []
    for window in WINDOWS:
        if len(sweep) < starts:
            with elsewhere(ours, WINDOWS, SEEDS) as call:
                sweep.append(clock(call))
        if backend is not None:
            with elsewhere(keras_fit, window, True, KERAS_BACKEND=backend) as call:
                fits.append((clock(call), clock(call)))
    theirs = sum(first + (SEEDS - 1) * again for first, again in fits)
    print("sweep", sweep, fits, flush=True)

    rows = [
        [
            names[side],
            quartiles(np.array(cold[side])),
            f"{middle[side] / middle['ours']:.1f}",
            quartiles(np.array(warm[side]), ".3f"),
            f"{np.median(warm[side]) / np.median(warm['ours']):.1f}",
        ]
        for side in middle
    ]
    sweeps = [[names["ours"], quartiles(np.array(sweep)), "1.0"]]
    if backend is not None:
        sweeps.append([names[backend], f"{theirs:.1f}", f"{theirs / np.median(sweep):.1f}"])
    notes = "".join(f"\n\n{names[side]} could not run: `{why}`" for side, why in failed.items())
    text = f"""{SEQUENCES} sequences of {STEPS} steps, LSTM of {HIDDEN} units and a dense layer, Adam, {EPOCHS} epochs in windows of
{WINDOW}, {LANES} lanes: {EPOCHS * SEQUENCES * STEPS // WINDOW // LANES} updates. Seconds, median (quartiles) of {starts} processes. *Cold* is the first training in
a fresh process, from data to trained parameters, with compilation and without imports; *warm* the second in it. Ours
carries the state. Keras trains as many windows by `fit`, without carrying it: with `stateful=True`, Keras 3.15 leaves the
state at zeros in training on JAX, and stops with an error of autograd's on PyTorch.

{table(["side", "cold, s", "times slower", "warm, s", "times slower"], rows)}

The whole study: windows of {", ".join(map(str, WINDOWS))}, {SEEDS} seeds each, in a fresh process with compilation. Ours trains the
seeds side by side under `vmap`. Keras, on its backend that is faster above, trains one model after another; two of each
window were run and the rest reckoned from them: first + {SEEDS - 1} × second.

{table(["side", f"{len(WINDOWS) * SEEDS} trainings, s", "times slower"], sweeps)}{notes}"""

    def draw(axes: Axes) -> None:
        groups = {
            "cold": middle,
            "warm": {side: float(np.median(warm[side])) for side in middle},
            f"{len(WINDOWS) * SEEDS} trainings": {
                "ours": float(np.median(sweep)),
                **({backend: theirs} if backend else {}),
            },
        }
        for i, (side, name) in enumerate(names.items()):
            heights = [group.get(side, np.nan) for group in groups.values()]
            bars = axes.bar(np.arange(len(groups)) + 0.27 * i, heights, 0.27, label=name)
            axes.bar_label(bars, ["" if np.isnan(h) else f"{h:.2g}" for h in heights], fontsize=8)
        axes.set_xticks(np.arange(len(groups)) + 0.27, list(groups))
        axes.set(yscale="log", ylabel="s")
        axes.set_title("The first-bit study")
        axes.legend(frameon=False, fontsize=8)

    return Section("The first-bit study", text, draw)
