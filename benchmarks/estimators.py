"""What each influence costs beyond a step written by hand: compiled FLOPs, memory, and time.

    python -m benchmarks.estimators

FLOPs are XLA's ``cost_analysis`` of windows of 8 steps whose loop over time is written out, since it counts the body of a
loop once however often it runs. ``replay``'s loop over windows counts once too: the table adds its further passes.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import tbptt_jax as tb

FLAGS = flags.FLAGS
flags.DEFINE_integer("lanes", 16, "Lanes.")
flags.DEFINE_integer("inputs", 16, "Inputs a step.")
flags.DEFINE_integer("hidden", 32, "Units of the LSTM.")
flags.DEFINE_integer("window", 32, "Steps of the windows that are timed.")
flags.DEFINE_integer("repeats", 21, "Timed calls of each, in turn.")


def loss(outputs: jax.Array, window: tb.Window) -> jax.Array:
    return jnp.sum((outputs - window.targets) ** 2, -1)


def by_hand(unroll: Callable) -> Callable:
    """The step people write: the carry is a plain argument, and the gradient stops there."""

    def mean_loss(params: Any, carry: Any, window: tb.Window) -> tuple[jax.Array, Any]:
        carry, outputs = unroll(params, carry, window.inputs)
        return jnp.mean(loss(outputs, window)), carry

    return jax.grad(mean_loss, has_aux=True)


def main(argv: list[str]) -> None:
    del argv
    cell, readout = nn.OptimizedLSTMCell(FLAGS.hidden), nn.Dense(4)
    model = tb.from_linen(cell, readout=readout)
    rng = np.random.default_rng(0)

    def window(steps: int) -> tb.Window:
        x = rng.normal(size=(FLAGS.lanes, steps, FLAGS.inputs)).astype(np.float32)
        return tb.Window(jnp.asarray(x), jnp.asarray(x[..., :4]))

    params = model.init(jax.random.key(0), window(1).inputs)
    influences = {
        "truncate": tb.truncate(),
        "replay(1)": tb.replay(1),
        "replay(3)": tb.replay(3),
        "replay(3, survival=0.5)": tb.replay(3, 0.5),
        "uoro": tb.uoro(),
        "rtrl": tb.rtrl(),
    }

    def written_out(params: Any, carry: Any, inputs: jax.Array, *masks: None) -> tuple[Any, jax.Array]:
        outputs: list[Any] = []
        for t in range(inputs.shape[1]):
            carry, y = cell.apply(params["cell"], carry, inputs[:, t])
            outputs.append(y)
        return carry, jnp.asarray(readout.apply(params["readout"], jnp.stack(outputs, 1)))

    def compiled(name: str, steps: int, model: tb.Recurrence) -> tuple[Any, list]:
        probe = window(steps)
        if name == "by hand":
            args = [params, model.initial_carry(params, FLAGS.lanes), probe]
            return jax.jit(by_hand(lambda *args: model.unroll(*args, None, None))).lower(*args).compile(), args
        estimate = tb.gradient(model, loss, influence=influences[name])
        state = estimate.init(jax.random.key(0), params, probe)
        for _ in range(4):  # so that there is a past
            _, state, _ = jax.jit(estimate.update)(params, state, probe)
        return jax.jit(lambda *args: estimate.update(*args)[:2]).lower(params, state, probe).compile(), [
            params,
            state,
            probe,
        ]

    names = ["by hand", *influences]
    programs = {name: compiled(name, FLAGS.window, model) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(FLAGS.repeats + 2):
        for name, (program, args) in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(*args))
            times[name].append(time.perf_counter() - began)
    loops = model._replace(unroll=written_out)
    flops = {name: compiled(name, 8, loops)[0].cost_analysis()["flops"] for name in names if name != "rtrl"}
    flops["replay(3)"] += 2 * (flops["replay(1)"] - flops["truncate"])
    flops["replay(3, survival=0.5)"] += (0.5 + 0.25 + 0.125 - 1) * (flops["replay(1)"] - flops["truncate"])
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {FLAGS.lanes} lanes, {FLAGS.inputs} inputs, {FLAGS.hidden} units"
    )
    print(
        f"| influence | FLOPs / by hand | temporary memory, MB | ms for windows of {FLAGS.window}, median (quartiles) | time / by hand |"
    )
    print("|---|---|---|---|---|")
    base = times["by hand"][2:]
    for name in names:
        mine = times[name][2:]
        low, median, high = statistics.quantiles(mine, n=4)
        ratio = statistics.median(a / b for a, b in zip(mine, base, strict=True))
        cost = f"{flops[name] / flops['by hand']:.3f}" if name in flops else "–"  # its loop over units counts once
        memory = programs[name][0].memory_analysis().temp_size_in_bytes / 1e6
        print(
            f"| {name} | {cost} | {memory:.2f} | {1e3 * median:.2f} ({1e3 * low:.2f}–{1e3 * high:.2f}) | {ratio:.2f} |"
        )


if __name__ == "__main__":
    app.run(main)
