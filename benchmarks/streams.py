"""Training from a memory-mapped file against the same data in memory: ``python -m benchmarks.streams --megabytes=16``.

A character model, an LSTM of bytes: its steps a second, the two taking turns in one process. Then the whole file is read
once without training, which shows how fast the windows come and what stays in this process's memory (Linux).
"""

import pathlib
import tempfile
import time

import flax.linen as nn
import jax
import numpy as np
import optax
from absl import app, flags

import tbptt_jax as tb

FLAGS = flags.FLAGS
flags.DEFINE_integer("megabytes", 16, "Size of the file, one byte a step.", lower_bound=1)
flags.DEFINE_integer("lanes", 32, "Places of the file read side by side.", lower_bound=1)
flags.DEFINE_integer("window", 64, "Steps of a window.", lower_bound=1)
flags.DEFINE_integer("per_call", 20, "Windows in one compiled call.", lower_bound=1)
flags.DEFINE_integer("units", 128, "Units of the LSTM.", lower_bound=1)
flags.DEFINE_integer("calls", 8, "Timed calls in a turn.", lower_bound=1)
flags.DEFINE_integer("turns", 7, "Timed turns of each.", lower_bound=1)
flags.DEFINE_string("directory", None, "Where the file is written, and deleted after. None: the temporary directory.")


def loss(logits: jax.Array, window: tb.Window) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, window.targets)


def resident() -> float:
    """MiB of this process in memory, mapped pages included."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def write(path: pathlib.Path) -> None:
    """Bytes without pattern, a megabyte at a time."""
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (FLAGS.megabytes << 20,))
    rng = np.random.default_rng(0)
    for start in range(0, len(array), 1 << 20):
        array[start : start + (1 << 20)] = rng.integers(0, 256, 1 << 20, np.uint8)


def train(path: pathlib.Path) -> None:
    cut = {"lanes": FLAGS.lanes, "length": FLAGS.window, "per_call": FLAGS.per_call}
    mapped = tb.streams.open_npy(path)
    part = np.array(mapped[: 1 + FLAGS.lanes * FLAGS.window * FLAGS.per_call * FLAGS.calls])
    windows = tb.split(tb.lanes(part[:-1], part[1:], lanes=FLAGS.lanes), FLAGS.window)
    calls = [
        jax.tree.map(lambda x, i=i: x[i * FLAGS.per_call : (i + 1) * FLAGS.per_call], windows)
        for i in range(FLAGS.calls)
    ]
    model = tb.lstm(FLAGS.units, encoder=nn.Embed(256, FLAGS.units), readout=nn.Dense(256))
    step = tb.train_step(tb.gradient(model, loss), optax.adam(1e-3))
    # One reader goes on from turn to turn, as it would in training: what it reads ahead is paid for where it is read.
    reader = iter(tb.streams.windows(mapped[:-1], mapped[1:], **cut))
    sides = {"in memory": lambda: iter(calls), "from disk": lambda: (next(reader) for _ in range(FLAGS.calls))}
    states = {name: step.init(jax.random.key(0), jax.tree.map(lambda x: x[0], calls[0])) for name in sides}
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(FLAGS.turns + 1):  # the first compiles
        for name, side in sides.items():
            began = time.perf_counter()
            for call in side():
                states[name], metrics = tb.train_windows(step, states[name], call)
                float(metrics.loss[-1])  # as a loop that reports does
            speeds[name].append(FLAGS.calls * calls[0].inputs.size / (time.perf_counter() - began))
    memory, disk = (np.array(speeds[name][1:]) for name in sides)
    low, middle, high = np.percentile(disk / memory, [25, 50, 75])
    print("| steps/s, in memory | from disk | disk / memory [quartiles] |\n|---|---|---|")
    print(f"| {np.median(memory):,.0f} | {np.median(disk):,.0f} | {middle:.3f} [{low:.3f}, {high:.3f}] |\n")


def read(path: pathlib.Path) -> None:
    mapped = tb.streams.open_npy(path)
    reader = iter(
        tb.streams.windows(
            mapped[:-1], mapped[1:], lanes=FLAGS.lanes, length=FLAGS.window, per_call=FLAGS.per_call, epochs=1
        )
    )
    jax.block_until_ready(next(reader))
    before, most, began = resident(), 0.0, time.perf_counter()
    for call in reader:
        jax.block_until_ready(call)
        most = max(most, resident())
    speed = len(mapped) / (time.perf_counter() - began)
    print("| file, MiB | steps/s, without training | memory before, MiB | at most while reading |\n|---|---|---|---|")
    print(f"| {FLAGS.megabytes} | {speed:,.0f} | {before:.0f} | {most:.0f} |")


def main(argv: list[str]) -> None:
    del argv
    if (FLAGS.megabytes << 20) < 1 + FLAGS.lanes * FLAGS.window * FLAGS.per_call * FLAGS.calls:
        raise app.UsageError("The file is shorter than one turn: give more --megabytes or fewer --calls.")
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}; {FLAGS.lanes} lanes, windows of {FLAGS.window}, "
        f"{FLAGS.per_call} a call, {FLAGS.units} units\n"
    )
    with tempfile.TemporaryDirectory(dir=FLAGS.directory) as directory:
        path = pathlib.Path(directory) / "corpus.npy"
        write(path)
        train(path)
        read(path)


if __name__ == "__main__":
    app.run(main)
