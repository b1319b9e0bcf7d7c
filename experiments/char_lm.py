"""A language model of characters: an LSTM that reads a text as a few continuous lanes, its state carried from window to window.

python -m experiments.char_lm
python -m experiments.char_lm --text=mine.txt --window=32 --stateless --workdir=runs/mine
python -m experiments.char_lm --window=auto --lengths=8,16,32,64 --workdir=runs/auto
python -m experiments.char_lm --text=poems.txt --documents='\\n\\n' --unit=bytes --workdir=runs/poems
python -m experiments.char_lm --workdir=runs/mine --prompt="Once upon" --temperature=0.7     asks a finished run
python -m experiments.char_lm --text=other.txt --init_from=runs/mine --workdir=runs/other    begins from one

Interrupted in any way, the same command goes on from the last checkpoint and ends with the same bits. SIGTERM and SIGINT
(Ctrl-C) finish the call, save and exit with status 143 and 130; a second one exits at once. With more --updates it goes on
after its end, at another --learning_rate if you like.
"""

import itertools
import math
import statistics
from typing import Any

import numpy as np
from absl import flags
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import tbptt_jax as tb
from experiments import launch, tasks, training
from tbptt_jax import study
from tbptt_jax.study.tasks.text import check_codec, decode, prompt

READ = 100  # symbols of the held-out text that the sample goes on from

FLAGS = flags.FLAGS
tasks.define_text()
tasks.define_sizes(hidden=128, layers=1, lanes=32)
training.define("runs/char_lm", learning_rate=0.005, updates=5000)
flags.DEFINE_string("prompt", None, "Train nothing: let the run in the workdir go on from this text.")
flags.DEFINE_float("temperature", 1.0, "Below 1 it writes safer, above 1 bolder, at 0 the likeliest.", lower_bound=0.0)
flags.DEFINE_integer("length", 400, "Symbols that it writes.", lower_bound=0)


def picture(curve: list[tuple[int, float]], held_out: float, one: str) -> Figure:
    figure, axes = plt.subplots(figsize=(8, 4.4))
    characters, bits = zip(*curve, strict=True)
    axes.plot(characters, bits, label="training text, as read")
    axes.axhline(held_out, color="C1", linestyle="--", label=f"held-out text, at the end: {held_out:.3f}")
    axes.set(xlabel=f"{one}s read", ylabel=f"bits per {one}")
    axes.set_title(f"{'Stateless' if FLAGS.stateless else 'Stateful'} LSTM, {training.windows_told()}")
    axes.legend()
    return figure


def ask() -> None:
    """Prints what a finished run writes after ``--prompt``."""
    run = study.load(launch.expanded(FLAGS.workdir))
    print(launch.plain(FLAGS.prompt + written(run, FLAGS.prompt), keep=launch.WHITE))


def written(run: study.Run, text: str) -> str:
    how: Any = {"temperature": FLAGS.temperature, "seed": FLAGS.seed}
    return prompt(run.model, run.params, run.task.codec, text, FLAGS.length, **how)


def main() -> None:
    if FLAGS.prompt is not None:
        return ask()
    training.check()
    launch.join_processes(FLAGS.lanes)
    before = study.load(launch.expanded(FLAGS.init_from, "init_from")) if FLAGS.init_from else None
    arguments = tasks.given((*tasks.TEXT, *tasks.SIZES))
    if before is not None:
        check_codec(before.task.codec)
        made = before.task.source[1] if before.task.source else {}
        arguments |= {name: made[name] for name in ("hidden", "layers") if name in made and not FLAGS[name].present}
        arguments |= {"codec": before.task.codec}
    task = study.task("char_lm", **arguments)
    one = "byte" if task.codec["unit"] == "bytes" else "character"

    def speed(calls: list) -> float:
        return statistics.median(call.weight / call.seconds for call in calls)  # leaves out the calls that compiled

    def shown(calls: list) -> str:
        return f"{calls[-1].loss / math.log(2):.3f} bits per {one}, {speed(calls):,.0f} {one}s/s"

    run = training.fitted(task, updates=5000, start=before, show=shown)
    window = training.window() if isinstance(training.window(), int) else None
    how: Any = {"window": window, "stateless": FLAGS.stateless, "burn_in": FLAGS.burn_in}
    (scores,) = study.evaluate(task, run.params, **how).values()
    read_by = itertools.accumulate(round(call.weight) for call in run.calls)
    curve = [(read, call.loss / math.log(2)) for read, call in zip(read_by, run.calls, strict=True)]
    first = held_out_text(task)
    told = written(run, first) if first else ""
    results = {
        "window": window or FLAGS.window,
        "stateless": FLAGS.stateless,
        "seed": FLAGS.seed,
        f"bits_per_{one}": scores,
        f"{one}s_per_second": speed(run.calls),
        **training.told_of(run),
        "steps": run.calls[-1].steps or run.updates * (window or 0),  # of each lane
        "vocabulary": len(task.codec.get("vocabulary", range(256))),
        "curve": curve,
        "prompt": first,
        "sample": told,
    }
    for title, text in (("read", first), ("and went on", told)):
        launch.console.rule(title, align="left")
        launch.console.print(launch.plain(text, keep=launch.WHITE), markup=False, highlight=False)
    launch.console.rule()
    kind = "stateless" if FLAGS.stateless else "stateful"
    launch.say(
        f"Held-out text, {kind}, {training.windows_told()}: {scores:.4f} bits per {one}. {speed(run.calls):,.0f} {one}s/s, "
        f"{results['seconds']:.0f} s in all."
    )
    launch.write_results(FLAGS.workdir, results, picture(curve, scores, one), more=", run.json")


def held_out_text(task: study.Task) -> str:
    """The beginning of the held-out text, of those symbols that the vocabulary has; of documents the first half of one."""
    streams = task.test()  # type: ignore[misc]
    if isinstance(streams, tb.Window):
        ids = np.split(streams.inputs[0], np.flatnonzero(np.asarray(streams.resets)[0]))[1]
        ids = ids[: max(1, min(READ, len(ids) // 2))]
    else:
        ids = streams[0][:READ]
    return "".join(c for c in decode(ids, task.codec) if c != "\ufffd")


if __name__ == "__main__":
    launch.run(main)
