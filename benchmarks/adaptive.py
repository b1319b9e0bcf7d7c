"""What windows that choose themselves cost, besides their looks and by them: ``python -m benchmarks.adaptive``.

Runs of ``study.fit`` take turns, a call each: windows of one length; ``study.adaptive`` whose looks always end with that length, alone
and among others; ``replay`` of one depth; ``study.adaptive_replay`` whose looks always end with it.
"""

import concurrent.futures
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags

import tbptt_jax as tb
from benchmarks.turns import quartiles, table
from tbptt_jax import study

FLAGS = flags.FLAGS
flags.DEFINE_integer("units", 64, "Units of the LSTM.", lower_bound=1)
flags.DEFINE_integer("lanes", 16, "Lanes.", lower_bound=1)
flags.DEFINE_integer("window", 8, "Steps of a window.", lower_bound=1)
flags.DEFINE_list("lengths", ["8", "16", "32", "64"], "Of the windows to choose from, that of --window among them.")
flags.DEFINE_integer("depth", 2, "Windows that replay goes back.", lower_bound=1)
flags.DEFINE_integer("updates", 4000, "Of each run.", lower_bound=1)
flags.DEFINE_integer("every", 500, "Updates from one look to the next.", lower_bound=1)

PER_CALL = 50
Ask = dict[str, Any]


def loss(h: jax.Array, window: tb.Window) -> jax.Array:
    return (h[..., 0] - window.targets[..., 0]) ** 2


def always(look: study.Look, window: int, depth: int = 0) -> study.Look:
    """A look that measures as this one does, and whose end is known."""

    def choose(*args: Any) -> tb.horizon.Suggestion:
        return look.choose(*args)._replace(window=window, depth=depth)

    return look._replace(choose=choose)


def sides() -> dict[str, Ask]:
    """The arguments of the runs."""
    size, depth, lengths = FLAGS.window, FLAGS.depth, sorted({FLAGS.window, *map(int, FLAGS.lengths)})
    alone = study.adaptive(lengths=[size], every=FLAGS.every)
    among = study.adaptive(lengths=lengths, every=FLAGS.every)
    assert among.look is not None
    deep = study.adaptive_replay(depths=sorted({0, 1, depth}), every=FLAGS.every)

    def deep_look(size: int) -> study.Look:
        return always(deep.look(size), size, depth)

    return {
        f"windows of {size}": {"window": size},
        f"adaptive, {size} alone": {"window": alone},
        f"adaptive, {size} of {', '.join(map(str, lengths))}": {
            "window": among._replace(look=always(among.look, size))
        },
        f"replay({depth})": {"window": size, "influence": f"replay:{depth}"},
        f"adaptive_replay, always {depth}": {"window": size, "influence": deep._replace(look=deep_look)},
    }


def take_turns(fit: Callable[..., study.Run], asked: dict[str, Ask]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Runs side by side, of which one after another makes a call: seconds of the calls ``[calls]``, and which began with a look."""
    order, moved = list(asked), threading.Condition()

    def alone(name: str) -> tuple[np.ndarray, np.ndarray]:
        seconds, began = [], 0.0

        def listen(event: study.Event) -> None:
            nonlocal began
            if event.kind == "call":
                seconds.append(time.perf_counter() - began)
            with moved:
                if event.kind == "call":
                    order.append(order.pop(0))
                    moved.notify_all()
                moved.wait_for(lambda: order[0] == name)
            began = time.perf_counter()

        try:
            run = fit(**asked[name], listeners=[listen])
        finally:
            with moved:
                order.remove(name)
                moved.notify_all()
        looked = {choice.updates for choice in run.choices}
        return np.array(seconds), np.array(
            [begin in looked for begin in [0, *(call.updates for call in run.calls[:-1])]]
        )

    with concurrent.futures.ThreadPoolExecutor(len(asked)) as threads:
        return dict(zip(asked, threads.map(alone, asked), strict=True))


def main(argv: list[str]) -> None:
    del argv
    data = tb.tasks.lag(jax.random.key(0), FLAGS.lanes, 64 * FLAGS.window)
    task = study.Task(tb.lstm(FLAGS.units), loss, train=data, lanes=FLAGS.lanes)

    def fit(**ask: Any) -> study.Run:
        return study.fit(task, updates=FLAGS.updates, windows_per_call=PER_CALL, devices=1, quiet=True, **ask)

    found, rows = take_turns(fit, sides()), []
    looked = np.any([looks for _, looks in found.values()], 0)
    plain = ~looked & (np.arange(len(looked)) > 1)  # the first calls compile
    looked[:2] = False
    fixed, replayed = (next(name for name in found if name.startswith(kind)) for kind in ("windows", "replay("))
    for name, (seconds, looks) in found.items():
        held = found[replayed if "replay" in name else fixed][0]
        update = 1e3 * seconds / PER_CALL
        row = [name, quartiles(update[plain], ".3f"), quartiles((seconds / held)[plain], ".3f"), "", ""]
        if looks.any():
            look = 1e3 * seconds[looked] - np.median(1e3 * seconds[plain])
            row[3:] = quartiles(look, ".1f"), f"{np.median(look) / np.median(update[plain]):.0f}"
        rows.append(row)
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}; an LSTM of {FLAGS.units} units, {FLAGS.lanes} lanes; median (quartiles) "
        f"of {plain.sum()} calls of {PER_CALL} updates, and of {looked.sum()} looks.\n"
    )
    head = ["", "ms an update, besides looks", "of the fixed run's call beside it", "ms a look", "a look, in updates"]
    print(table(head, rows))


if __name__ == "__main__":
    app.run(main)
