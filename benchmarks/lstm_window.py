"""Time of one LSTM train window, forward and backward: ``python -m benchmarks.lstm_window``.

The gradient of the weights, from zeros, for a given cotangent of the outputs. Everyone takes turns in one process, so
that what else the machine does meets all alike; a figure is the median, a ratio the median over the turns of peer / ours
with its quartiles. Columns: `call` is a window a call; `run` is the same window as part of one compiled run of several
windows, as ``tb.train_windows`` compiles them, which pays for its memory once (ours and Flax; PyTorch has no such run).
"""

import time
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import tbptt_jax as tb
from tbptt_jax.window import PyTree

SHAPES = (
    (32, 64, 64, 128),
    (32, 128, 128, 256),
    (16, 256, 256, 512),
    (64, 64, 512, 512),
    (20, 70, 400, 1150),
    (11, 20, 1, 10),
)
_SECONDS = flags.DEFINE_float("seconds", 10.0, "Time to measure each shape for.")
_WINDOWS = flags.DEFINE_integer("windows", 4, "Windows in one compiled run.")
_VECTOR = flags.DEFINE_integer("vector_width", 512, "XLA's preferred vector width on a CPU, for every JAX program.")


def jax_window(model: tb.Recurrence, shape: tuple[int, ...], windows: int | None) -> Callable[[], None]:
    """One window a call or, with ``windows``, a compiled run of so many, each from weights the last has moved."""
    lanes, steps, inputs, features = shape
    x = jax.random.normal(jax.random.key(0), (lanes, steps, inputs))
    cotangent = jax.random.normal(jax.random.key(1), (lanes, steps, features))
    params = model.init(jax.random.key(2), x)
    carry = model.initial_carry(params, lanes)

    def grads(params: PyTree, x: jax.Array, cotangent: jax.Array) -> PyTree:
        return jax.grad(lambda params: jnp.vdot(model.unroll(params, carry, x)[1], cotangent))(params)

    def run(params: PyTree, x: jax.Array, cotangent: jax.Array) -> PyTree:
        def one(params: PyTree, _: None) -> tuple[PyTree, None]:
            return jax.tree.map(lambda p, g: p - 1e-6 * g, params, grads(params, x, cotangent)), None

        return jax.lax.scan(one, params, length=windows)[0]

    options = {"xla_cpu_prefer_vector_width": _VECTOR.value} if jax.default_backend() == "cpu" else None
    compiled = jax.jit(grads if windows is None else run, compiler_options=options)

    def call() -> None:
        jax.block_until_ready(compiled(params, x, cotangent))

    return call


def torch_window(shape: tuple[int, ...]) -> Callable[[], None]:
    """PyTorch's own layer, eager."""
    import torch

    lanes, steps, inputs, features = shape
    layer = torch.nn.LSTM(inputs, features, batch_first=True)
    x, cotangent = torch.randn(lanes, steps, inputs), torch.randn(lanes, steps, features)

    def call() -> None:
        layer.zero_grad()
        layer(x)[0].backward(cotangent)

    return call


def flax_rnn(features: int) -> tb.Recurrence:
    """Flax's own loop over its own cell."""
    rnn = nn.RNN(nn.OptimizedLSTMCell(features))
    return tb.Recurrence(
        lambda key, x: rnn.init(key, x),
        lambda params, lanes: (),
        lambda params, carry, x: (carry, rnn.apply(params, x)),
    )


def measure(calls: dict[str, tuple[Callable[[], None], int]], seconds: float) -> dict[str, np.ndarray]:
    """Milliseconds a window ``[turns]`` of each of ``calls``, given as the call and the windows in it."""
    for call, _ in calls.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 5:
        for name, (call, windows) in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start) / windows)
    return {name: np.array(each) for name, each in times.items()}


def main(argv: list[str]) -> None:
    del argv
    windows = _WINDOWS.value
    names = ("torch", "flax call", "flax run", "ours call", "ours run")
    pairs = (("torch", "ours call"), ("flax call", "ours call"), ("torch", "ours run"), ("flax run", "ours run"))
    print(f"jax {jax.__version__} on {jax.devices()}; ms a window, then peer / ours [quartiles]")
    print(" ".join(["shape".ljust(20), *(n.rjust(9) for n in names), *(f"{a} / {b}".rjust(24) for a, b in pairs)]))
    means: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    for shape in SHAPES:
        calls = {"torch": (torch_window(shape), 1)}
        for name, model in {"flax": flax_rnn(shape[-1]), "ours": tb.lstm(shape[-1])}.items():
            calls[f"{name} call"] = (jax_window(model, shape, None), 1)
            calls[f"{name} run"] = (jax_window(model, shape, windows), windows)
        times = measure(calls, _SECONDS.value)
        row = [str(shape).ljust(20), *(f"{np.median(times[n]):9.2f}" for n in names)]
        for pair in pairs:
            ratio = times[pair[0]] / times[pair[1]]
            low, middle, high = np.percentile(ratio, [25, 50, 75])
            means[pair].append(middle)
            row.append(f"{middle:.2f} [{low:.2f}, {high:.2f}]".rjust(24))
        print(" ".join(row), flush=True)
    blank = " " * (20 + 10 * len(names))
    print(blank, " ".join(f"{np.exp(np.mean(np.log(means[p]))):.2f}".rjust(24) for p in pairs), "geometric mean")


if __name__ == "__main__":
    app.run(main)
