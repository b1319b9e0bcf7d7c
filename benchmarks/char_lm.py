"""Training a character model: the whole loop of ``experiments.char_lm``, its text, its settings, its flags."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from matplotlib.axes import Axes

import tbptt_jax as tb
from benchmarks.turns import Maker, Section, Side, could_not_run, quartiles, table, take_turns
from tbptt_jax import sharding, study
from tbptt_jax.study import text

FLAGS = flags.FLAGS
OURS = "tb.train_windows, tb.lstm"


def fused(vocabulary: int, hidden: int) -> tb.Recurrence:
    return tb.lstm(hidden, encoder=nn.Embed(vocabulary, hidden), readout=nn.Dense(vocabulary))


def ours(model: tb.Recurrence, windows: tb.Window, devices: int = 1) -> Side:
    estimate = tb.gradient(model, text.loss)
    if devices > 1:
        mesh = sharding.mesh(lane=devices)
        estimate, windows = sharding.over_lanes(estimate, mesh), sharding.place(windows, mesh)
    step = tb.train_step(estimate, optax.adam(FLAGS.learning_rate))
    state = step.init(jax.random.key(0), jax.tree.map(lambda x: x[0], windows))

    def call() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(tb.train_windows(step, state, windows))

    return call


class FlaxModel(nn.Module):
    vocabulary: int

    @nn.compact
    def __call__(self, carry: tuple, x: jax.Array) -> tuple[tuple, jax.Array]:
        rnn = nn.RNN(nn.OptimizedLSTMCell(FLAGS.hidden), return_carry=True)
        carry, y = rnn(nn.Embed(self.vocabulary, FLAGS.hidden)(x), initial_carry=carry)
        return carry, nn.Dense(self.vocabulary)(y)


def flax_loop(vocabulary: int, x: np.ndarray, y: np.ndarray, compiled: bool) -> Side:
    """The loop that is written by hand: a compiled step a window or, with ``compiled``, all of them in a scan."""
    model, optimiser = FlaxModel(vocabulary), optax.adam(FLAGS.learning_rate)
    carry = (jnp.zeros((FLAGS.lanes, FLAGS.hidden)),) * 2
    params = model.init(jax.random.key(0), carry, x[0])
    state = jax.jit(lambda: (params, optimiser.init(params), carry))()

    def update(state: tuple, window: tuple) -> tuple[tuple, jax.Array]:
        params, moments, carry = state
        x, y = window

        def loss(params: dict) -> tuple[jax.Array, tuple]:
            after, logits = model.apply(params, carry, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), after

        (value, carry), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = optimiser.update(grads, moments)
        return (optax.apply_updates(params, updates), moments, carry), value

    one = jax.jit(update, donate_argnums=0)
    every = jax.jit(lambda state, windows: jax.lax.scan(update, state, windows), donate_argnums=0)
    windows = jax.device_put((x, y))
    each = list(zip(*windows, strict=True))

    def call() -> None:
        nonlocal state
        if compiled:
            state, _ = every(state, windows)
        else:
            for window in each:
                state, _ = one(state, window)
        jax.block_until_ready(state)

    return call


def torch_loop(vocabulary: int, x: np.ndarray, y: np.ndarray) -> Side:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    embed = torch.nn.Embedding(vocabulary, FLAGS.hidden)
    lstm = torch.nn.LSTM(FLAGS.hidden, FLAGS.hidden, batch_first=True)
    model = torch.nn.ModuleList([embed, lstm, torch.nn.Linear(FLAGS.hidden, vocabulary)]).to(device)
    optimiser = torch.optim.Adam(model.parameters(), FLAGS.learning_rate)
    xs, ys = (torch.tensor(ids, dtype=torch.long, device=device) for ids in (x, y))
    carry: tuple | None = None

    def call() -> None:
        nonlocal carry
        for x, y in zip(xs, ys, strict=True):
            outputs, after = lstm(embed(x), carry)
            loss = torch.nn.functional.cross_entropy(model[2](outputs).flatten(0, 1), y.flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            carry = tuple(h.detach() for h in after)
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def measure(seconds: float) -> Section:
    task = study.task("char_lm", text=FLAGS.text, hidden=FLAGS.hidden, lanes=FLAGS.lanes)
    _, read = tb.streams.cutter(*task.train(), lanes=FLAGS.lanes, length=FLAGS.window)
    windows = read(np.arange(FLAGS.windows_per_call))
    vocabulary, devices = text.symbols(task.codec), jax.device_count()
    x, y = windows.inputs, windows.targets
    model = fused(vocabulary, FLAGS.hidden)
    sides: dict[str, Maker] = {
        OURS: functools.partial(ours, model, windows),
        f"{OURS}, lanes spread": functools.partial(ours, model, windows, devices),
        "PyTorch, eager": lambda: torch_loop(vocabulary, x, y),
        "Flax nn.RNN, a compiled step": lambda: flax_loop(vocabulary, x, y, False),
        "Flax nn.RNN, a compiled loop": lambda: flax_loop(vocabulary, x, y, True),
    }
    if devices == 1 or FLAGS.lanes % devices:
        del sides[f"{OURS}, lanes spread"]
    timed = take_turns(sides, seconds)
    speeds = {name: x.size / times for name, times in timed.times.items()}
    base = max(np.median(each) for name, each in speeds.items() if name.startswith(OURS))
    rows = [[name, quartiles(each, ",.0f"), f"{base / np.median(each):.2f}"] for name, each in speeds.items()]
    text_ = f"""The loop of `experiments.char_lm` on its own text: {FLAGS.lanes} lanes, windows of {FLAGS.window}, embedding →
LSTM of {FLAGS.hidden} units → {vocabulary} characters, Adam, the state carried and the gradient cut, {len(x)} updates a call.
"Times slower" is against the faster of our first rows.

{table(["side", "characters/s, median (quartiles)", "times slower"], rows)}{could_not_run(timed.failed)}"""

    def draw(axes: Axes) -> None:
        names = list(speeds)[::-1]
        colours = ["C0" if name.startswith("tb.") else "C1" for name in names]
        axes.barh(range(len(names)), [np.median(speeds[name]) for name in names], color=colours)
        axes.set_yticks(range(len(names)), [name.replace(", ", ",\n", 1) for name in names], fontsize=8)
        axes.set(xlabel="characters/s")
        axes.set_title("Training a character model")

    return Section("A character model", text_, draw)
