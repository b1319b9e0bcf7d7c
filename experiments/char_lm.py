"""A character language model: an LSTM that reads a text as a few continuous lanes, its state carried from window to window.

python -m experiments.char_lm
python -m experiments.char_lm --text=mine.txt --window=32 --stateless --workdir=runs/mine

Interrupted in any way, the same command goes on from the last checkpoint and ends with the same bits. SIGTERM and SIGINT
(Ctrl-C) finish the call, save and exit with status 143 and 130; a second one exits at once.
"""

import itertools
import math
import statistics
import time
import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import tbptt_jax as tb
from experiments import launch, text
from experiments.text import loss
from tbptt_jax import sharding

PROMPT, SAMPLE = 100, 400

FLAGS = flags.FLAGS
flags.DEFINE_multi_string(
    "text", [], "A UTF-8 file; may be given again. None: the reference manual that ships in Python."
)
flags.DEFINE_integer("window", 16, "Steps of a window.", lower_bound=1)
flags.DEFINE_integer("lanes", 32, "Places of the text read side by side.", lower_bound=1)
flags.DEFINE_integer("hidden", 128, "Units of a layer.", lower_bound=1)
flags.DEFINE_integer("layers", 1, "LSTM layers.", lower_bound=1, upper_bound=1000)
flags.DEFINE_float(
    "learning_rate", 0.005, "Adam's rate at the start; it falls to zero along a cosine.", lower_bound=0.0
)
flags.DEFINE_integer("updates", 5000, "Updates, one a window.", lower_bound=1)
flags.DEFINE_integer("windows_per_call", 50, "Windows, and so updates, in one compiled call.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Of the parameters and the sample.")
flags.DEFINE_bool("stateless", False, "Begin each window from the initial carry, for comparison.")
flags.DEFINE_integer("checkpoint_every", 500, "Updates from one checkpoint to the next.", lower_bound=1)
flags.DEFINE_bool(
    "resume", True, "Go on from the checkpoint in the workdir, if there is one; --noresume begins afresh."
)
flags.DEFINE_string("workdir", "runs/char_lm", "Where results.json, figure.png, flags.txt and checkpoints go.")


def cut(ids: np.ndarray, lanes: int) -> tb.Window:
    """Windows in which each character is to be told from those before it."""
    windows = tb.split(tb.lanes(ids[:-1], ids[1:], lanes=lanes), min(FLAGS.window, -(-(len(ids) - 1) // lanes)))
    return tb.stateless(windows) if FLAGS.stateless else windows


def language_model(vocabulary: int) -> tb.Recurrence:
    embed, readout = nn.Embed(vocabulary, FLAGS.hidden), nn.Dense(vocabulary)
    return tb.lstm(FLAGS.hidden, layers=FLAGS.layers, encoder=embed, readout=readout)


def sample(model: tb.Recurrence, params: Any, prompt: np.ndarray, key: jax.Array) -> np.ndarray:
    """Reads ``prompt`` ``[time]`` and goes on from the carry, one character at a time: ids ``[SAMPLE]``."""

    @jax.jit
    def generate(params: Any, prompt: jax.Array, key: jax.Array) -> jax.Array:
        carry, logits = model.unroll(params, model.initial_carry(params, 1), prompt[None], None, None)

        def one_step(state: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
            carry, logits = state
            character = jax.random.categorical(key, logits.at[:, 0].set(-jnp.inf))
            carry, logits = model.unroll(params, carry, character[:, None], None, None)
            return (carry, logits[:, 0]), character[0]

        return jax.lax.scan(one_step, (carry, logits[:, -1]), jax.random.split(key, SAMPLE))[1]

    return np.asarray(generate(params, prompt, key))


def picture(curve: list[tuple[int, float]], held_out: float) -> Figure:
    figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
    characters, bits = zip(*curve, strict=True)
    axes.plot(characters, bits, label="training text, as read")
    axes.axhline(held_out, color="C1", linestyle="--", label=f"held-out text, at the end: {held_out:.3f}")
    axes.set(xlabel="characters read", ylabel="bits per character")
    axes.set_title(f"{'Stateless' if FLAGS.stateless else 'Stateful'} LSTM, windows of {FLAGS.window}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def main() -> None:
    resume.join_processes(FLAGS.lanes)
    corpus = text.encode(text.read(FLAGS.text), FLAGS.lanes, FLAGS.window)
    directory = launch.workdir(FLAGS.workdir)
    train_windows, held_out = cut(corpus.train, FLAGS.lanes), cut(corpus.held_out, 1)
    model = language_model(len(corpus.characters))
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(FLAGS.learning_rate, FLAGS.updates))
    )
    mesh = launch.mesh(lanes=FLAGS.lanes, window=FLAGS.window, units=FLAGS.hidden)
    step = tb.train_step(sharding.over_lanes(tb.gradient(model, loss), mesh), optimiser)
    init_key, sample_key = jax.random.split(jax.random.key(FLAGS.seed))

    def speed(calls: list[resume.Call]) -> float:
        return statistics.median(call.weight / call.seconds for call in calls)  # leaves out the calls that compiled

    names = "window", "lanes", "hidden", "layers", "learning_rate", "seed", "stateless"
    with launch.progress(FLAGS.updates, "updates") as report:
        state, calls = resume.train(
            step,
            lambda: step.init(init_key, jax.tree.map(lambda x: x[0], train_windows)),
            resume.windows_of(train_windows, FLAGS.lanes, mesh),
            lambda state, window: resume.first_not_finite(model, loss, state.params, state.stream.carry, window),
            updates=FLAGS.updates,
            per_call=FLAGS.windows_per_call,
            every=FLAGS.checkpoint_every,
            directory=directory / "checkpoints",
            settings={**{name: FLAGS[name].value for name in names}, "text": zlib.crc32(corpus.train.tobytes())},
            resume=FLAGS.resume,
            skip=FLAGS.not_finite == "skip",
            report=lambda done, calls: report(
                done, f"{calls[-1].loss / math.log(2):.3f} bits per character, {speed(calls):,.0f} characters/s"
            ),
        )

    began = time.perf_counter()
    params = jax.device_get(state.params)  # the rest is one device's work
    held_out_bits = float(tb.evaluate(model, loss, params, held_out).loss) / math.log(2)
    seconds = sum(call.seconds for call in calls) + time.perf_counter() - began
    read_by = itertools.accumulate(round(call.weight) for call in calls)
    curve = [(read, call.loss / math.log(2)) for read, call in zip(read_by, calls, strict=True)]
    ids = sample(model, params, corpus.held_out[:PROMPT], sample_key)
    prompt, told = ("".join(corpus.characters[i] for i in part) for part in (corpus.held_out[:PROMPT], ids))
    results = {
        "window": FLAGS.window,
        "stateless": FLAGS.stateless,
        "seed": FLAGS.seed,
        "bits_per_character": held_out_bits,
        "characters_per_second": speed(calls),
        "updates": FLAGS.updates,
        "steps": FLAGS.updates * FLAGS.window,  # of each lane
        **resume.health_of(calls),
        "train_characters": len(corpus.train),
        "held_out_characters": len(corpus.held_out),
        "vocabulary": len(corpus.characters),
        "seconds": seconds,
        "curve": curve,
        "prompt": prompt,
        "sample": told,
    }
    launch.write_results(directory, results, picture(curve, held_out_bits))
    launch.console.rule("read", align="left")
    launch.console.print(launch.plain(prompt, keep=launch.WHITE), markup=False, highlight=False)
    launch.console.rule("and went on", align="left")
    launch.console.print(launch.plain(told, keep=launch.WHITE), markup=False, highlight=False)
    launch.console.rule()
    kind = "stateless" if FLAGS.stateless else "stateful"
    launch.console.print(
        f"Held-out text, {kind}, windows of {FLAGS.window}: {held_out_bits:.4f} bits per character. "
        f"{speed(calls):,.0f} characters/s, {seconds:.0f} s in all."
    )
    launch.say(f"Written to {directory}: results.json, figure.png, flags.txt")


if __name__ == "__main__":
    launch.run(main)
