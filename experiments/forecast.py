"""Forecasting a time series from files of your own: an LSTM whose state is carried from window to window.

python -m experiments.forecast
python -m experiments.forecast --train=2023.csv --valid=2024.csv --test=2025.csv --inputs=rain,melt --targets=flow
python -m experiments.forecast --train=past.csv --test=recent.csv --targets=load,price

With inputs, the targets of a row are told from the inputs of that row and all before it. With targets alone they are told
from the targets of the rows before. Everything is standardised with the mean and deviation of the training file, a column
that never changes there as if its deviation were 1. The test file is read in one go, from the initial carry.

A target that is missing (a blank field, NA, or what --missing names) is a step that is not scored. Where an input is, --fill
says what is read.

With no files, the data is that of two tanks, one emptying into the other: a pump fills the first, and the level of the
second is to be told from the pump alone, as it has been working for hundreds of steps.
"""

import csv
import io
import pathlib
import time
import zlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from absl import flags
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import tbptt_jax as tb
from experiments import launch, series
from experiments.series import loss
from tbptt_jax import sharding
from tbptt_jax.recurrence import unroll_window

STRETCH = 1000  # steps of a window in which a whole file is read
SHOWN = 600  # steps of the test file's end in the figure
BINS = 300  # of the whole test file there

FLAGS = flags.FLAGS
flags.DEFINE_string("train", None, "CSV file whose first line names the columns. None: two tanks, generated.")
flags.DEFINE_string("valid", None, "Another, told of while training.")
flags.DEFINE_string("test", None, "Another, for the forecast.")
flags.DEFINE_list("inputs", [], "Columns to tell the targets from; none: their own past.")
flags.DEFINE_list("targets", [], "Columns to be told.")
flags.DEFINE_integer("hidden", 32, "Units of a layer.", lower_bound=1)
flags.DEFINE_integer("layers", 1, "LSTM layers.", lower_bound=1, upper_bound=1000)
flags.DEFINE_integer("lanes", 16, "Places of the training file read side by side.", lower_bound=1)
flags.DEFINE_integer("window", 64, "Steps of a window.", lower_bound=1)
flags.DEFINE_list("missing", [], "What stands for a missing number, such as -9999, besides blank fields, NA and NaN.")
flags.DEFINE_enum(
    "fill",
    None,
    series.FILLS,
    "What is read where an input is missing: the last number before, the training file's mean, or 0; none: it is refused.",
)
flags.DEFINE_enum("decimal", None, [",", "."], "What decimals are written with, where the files leave it open.")
flags.DEFINE_integer(
    "burn_in",
    0,
    "Steps that a stateless window reads to find its state, before those it scores: windows overlap by so many, every step is "
    "scored once, and no gradient flows into the burn-in.",
    lower_bound=0,
)
flags.DEFINE_bool("stateful", None, "Carry the state from window to window; the default.")
flags.DEFINE_bool("stateless", None, "Begin each window from the initial carry, for comparison.")
flags.DEFINE_string("influence", "truncate", launch.INFLUENCES)
flags.DEFINE_float("learning_rate", 0.01, "Adam's rate at the start; it falls to zero along a cosine.", lower_bound=0.0)
flags.DEFINE_integer("updates", None, "Updates, one a window; default 4000.", lower_bound=1)
flags.DEFINE_integer("epochs", None, "Times to read the training file, instead.", lower_bound=1)
flags.DEFINE_integer("windows_per_call", 50, "Windows, and so updates, in one compiled call.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Of the parameters.")
flags.DEFINE_integer(
    "checkpoint_every", 500, "Updates from one checkpoint, and look at --valid, to the next.", lower_bound=1
)
flags.DEFINE_bool(
    "resume", True, "Go on from the checkpoint in the workdir, if there is one; --noresume begins afresh."
)
flags.DEFINE_string("workdir", "runs/forecast", "Where predictions.csv, results.json, figure.png and the rest go.")


def check_flags() -> None:
    """Raises a ``ValueError`` if the flags do not go together."""
    if FLAGS.train is None:
        given = [
            name for name in ("valid", "test", "inputs", "targets", "missing", "fill", "decimal") if FLAGS[name].value
        ]
        if given:
            raise ValueError(f"--{given[0]} needs --train=FILE: give --train, --test and --targets, or none of them.")
    elif FLAGS.test is None or not FLAGS.targets:
        raise ValueError("--train needs --test=FILE and --targets=COLUMN,… as well: what to forecast, and where.")
    twice = [name for name in FLAGS.inputs + FLAGS.targets if (FLAGS.inputs + FLAGS.targets).count(name) > 1]
    if twice:
        raise ValueError(
            f"--inputs and --targets name {twice[0]!r} more than once; for a target's own past, give --targets alone."
        )
    if FLAGS.stateful is not None and FLAGS.stateful == FLAGS.stateless:
        raise ValueError("--stateful and --stateless contradict each other: give one of them.")
    if FLAGS.updates and FLAGS.epochs:
        raise ValueError(f"--updates={FLAGS.updates} and --epochs={FLAGS.epochs} were both given: give one of them.")
    if FLAGS.burn_in and not is_stateless():
        raise ValueError(
            f"--burn_in={FLAGS.burn_in} is for stateless windows, which begin with no state: give --stateless, or leave it."
        )
    if FLAGS.burn_in >= FLAGS.window:
        raise ValueError(
            f"--burn_in={FLAGS.burn_in} leaves nothing of windows of {FLAGS.window} to score: choose less than --window."
        )
    launch.influence(FLAGS.influence, 1, "influence")


def is_stateless() -> bool:
    return FLAGS.stateless or FLAGS.stateful is False


def columns() -> tuple[list[str], list[str]]:
    """The names of the inputs, none for the targets' own past, and of the targets."""
    return (FLAGS.inputs, FLAGS.targets) if FLAGS.train else (["pump"], ["level"])


def cut(inputs: np.ndarray, targets: np.ndarray) -> tb.Window:
    """The training windows."""
    laid = series.lanes(inputs, targets, FLAGS.lanes)
    if is_stateless():
        return tb.overlap(laid, FLAGS.window, FLAGS.burn_in)
    return tb.split(laid, FLAGS.window)


def whole(inputs: np.ndarray, targets: np.ndarray) -> tb.Window:
    """A file as one lane, in long windows ``[windows, 1, time, ...]``."""
    return tb.split(series.lanes(inputs, targets, 1), min(STRETCH, len(inputs)))


def free_run(model: tb.Recurrence, params: Any, inputs: np.ndarray) -> np.ndarray:
    """The outputs ``[time, targets]`` over a whole file ``[time, inputs]``, read from the initial carry."""

    @jax.jit
    def read(params: Any, windows: tb.Window) -> jax.Array:
        start = model.initial_carry(params, 1)
        return jax.lax.scan(lambda carry, window: unroll_window(model, params, carry, window), start, windows)[1]

    outputs = np.asarray(read(params, whole(inputs, np.zeros_like(inputs[:, :1]))), np.float64)
    return outputs.reshape(-1, outputs.shape[-1])[: len(inputs)]


def table(names: list[str], rows: Any) -> bytes:
    """A CSV file."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([launch.cell(name) for name in names])
    writer.writerows([["" if value != value else value for value in row] for row in rows])  # a gap is blank
    return text.getvalue().encode()


def write(path: pathlib.Path, content: bytes) -> None:
    """Whole or not at all."""
    if jax.process_index() > 0:
        return
    with launch.whole(path) as part:
        part.write_bytes(content)


def picture(
    curve: list[tuple[int, float, float | None]], test: series.Series, predicted: np.ndarray, test_mse: float
) -> Figure:
    """Above, the test file and a stretch of it, its end, observed and predicted; below, the training."""
    names = columns()[1][:3]
    long, end = len(predicted) > SHOWN, slice(-SHOWN, None)
    rows: list[Any] = [[f"whole {name}", f"end {name}"] if long else [f"end {name}"] for name in names]
    figure, axes = plt.subplot_mosaic(
        [*rows, ["training"] * len(rows[0])],
        figsize=(11 if long else 9, 2.6 * (len(names) + 1)),
        width_ratios=[1, 2] if long else None,
        layout="constrained",
    )
    steps = test.first + np.arange(len(predicted))
    starts = np.arange(0, len(predicted), -(-len(predicted) // BINS))
    for i, name in enumerate(names):
        label = name.replace("$", r"\$")  # else matplotlib reads what is between two of them as mathematics
        right = axes[f"end {name}"]
        right.plot(steps[end], test.targets[end, i], color="0.6", linewidth=2, label="observed")
        right.plot(steps[end], predicted[end, i], color="C0", linewidth=1, label="predicted")
        right.set(
            xlabel="its last rows" if long else "row of the test file", ylabel="" if long else label, xmargin=0.01
        )
        if long:
            left = axes[f"whole {name}"]
            for values, colour in ((test.targets[:, i], "0.6"), (predicted[:, i], "C0")):
                low, high = (f.reduceat(values, starts) for f in (np.fmin, np.fmax))  # a line would be a block
                left.fill_between(steps[starts], low, high, color=colour, alpha=0.5, linewidth=0.5)
            left.axvline(steps[end][0], color="k", linestyle=":", linewidth=1)
            left.set(xlabel="row of the test file", ylabel=label, xmargin=0.01)
            left.locator_params(axis="x", nbins=4)
    legend = {"frameon": False, "ncols": 2, "loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0}
    axes[f"end {names[0]}"].legend(**legend)
    below = axes["training"]
    updates, losses, _ = zip(*curve, strict=True)
    below.plot(updates, losses, color="C0", label="training windows, as read")
    measured = [(n, error) for n, _, error in curve if error is not None]
    if measured:
        below.plot(*zip(*measured, strict=True), color="C1", marker="o", label="validation file, in one go")
    if np.isfinite(test_mse):
        below.axhline(test_mse, color="k", linestyle="--", linewidth=1, label=f"test file, in one go: {test_mse:.4g}")
    below.set(xlabel="updates", ylabel="squared error, standardised", yscale="log")
    below.legend(frameon=False)
    for each in axes.values():
        each.grid(alpha=0.3)
    kind = "Stateless" if is_stateless() else "Stateful"
    figure.suptitle(f"{kind} LSTM of {FLAGS.hidden} units, windows of {FLAGS.window}")
    return figure


def main() -> None:
    check_flags()
    resume.join_processes(FLAGS.lanes)
    names, target_names = columns()
    if FLAGS.train:
        data = series.read(
            {n: path for n in ("train", "valid", "test") if (path := FLAGS[n].value)},
            names,
            target_names,
            FLAGS.missing,
            FLAGS.fill,
            FLAGS.decimal,
        )
    else:
        data = series.generated()
    if FLAGS.train and (warning := series.sentinels(data, (names or target_names) + target_names)):
        launch.say(warning)
    steps, needed = len(data["train"].inputs), FLAGS.lanes * FLAGS.window
    if steps < needed:
        raise ValueError(
            f"{FLAGS.train or 'The series'} has {steps} steps; {FLAGS.lanes} lanes with windows of {FLAGS.window} need at "
            f"least {needed}. Give a longer file, or fewer --lanes or a shorter --window."
        )
    generated = {} if FLAGS.train else data
    own = {name: table(names + target_names, np.hstack(each[:2]).tolist()) for name, each in generated.items()}
    for name, content in own.items():
        there = launch.expanded(FLAGS.workdir) / f"{name}.csv"
        if there.exists() and there.read_bytes() != content:
            raise ValueError(
                f"{there} is not the series that is generated here, which would take its place: give it as --{name}, or "
                "another --workdir."
            )
    directory = launch.workdir(FLAGS.workdir)
    for name, content in own.items():
        write(directory / f"{name}.csv", content)
    scaled, targets = series.standardised(data)
    train_windows = cut(*scaled["train"])
    count = len(train_windows.inputs)
    updates = FLAGS.epochs * count if FLAGS.epochs else FLAGS.updates or 4000
    per_call, every = min(FLAGS.windows_per_call, -(-updates // 20)), min(FLAGS.checkpoint_every, -(-updates // 8))

    # cuDNN's LSTM, the default on a GPU, has no transpose, by which uoro moves forward.
    implementation: Any = "fused" if FLAGS.influence == "uoro" else None
    readout = nn.Dense(len(target_names))
    model = tb.lstm(FLAGS.hidden, layers=FLAGS.layers, readout=readout, implementation=implementation)
    influence = launch.influence(FLAGS.influence, count, "influence")
    mesh = launch.mesh(lanes=FLAGS.lanes, window=FLAGS.window, units=FLAGS.hidden)
    estimate = sharding.over_lanes(tb.gradient(model, loss, influence=influence), mesh)
    rate = optax.cosine_decay_schedule(FLAGS.learning_rate, updates)
    step = tb.train_step(estimate, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)))
    valid = whole(*scaled["valid"]) if "valid" in data else None

    def error_on(windows: tb.Window, state: Any) -> float:
        return float(tb.evaluate(model, loss, jax.device_get(state.params), windows).loss)

    def told(calls: list[resume.Call]) -> str:
        measured = [call.measured for call in calls if call.measured is not None]
        return f"training error {calls[-1].loss:.4g}" + (f", validation {measured[-1]:.4g}" if measured else "")

    settings = {name: FLAGS[name].value for name in ("window", "lanes", "hidden", "layers", "learning_rate", "seed")}
    settings |= {"stateless": bool(is_stateless()), "burn_in": FLAGS.burn_in, "influence": FLAGS.influence}
    settings |= {name: zlib.crc32(b"".join(x.tobytes() for x in scaled[name])) for name in scaled if name != "test"}
    with launch.progress(updates, "updates") as report:
        state, calls = resume.train(
            step,
            lambda: step.init(jax.random.key(FLAGS.seed), jax.tree.map(lambda x: x[0], train_windows)),
            resume.windows_of(train_windows, FLAGS.lanes, mesh),
            lambda state, window: resume.first_not_finite(model, loss, state.params, state.stream.carry, window),
            updates=updates,
            per_call=per_call,
            every=every,
            directory=directory / "checkpoints",
            settings=settings,
            resume=FLAGS.resume,
            skip=FLAGS.not_finite == "skip",
            report=lambda done, calls: report(done, told(calls)),
            measure=None if valid is None else lambda state: error_on(valid, state),
        )

    curve = [(call.updates, call.loss, call.measured) for call in calls]
    began = time.perf_counter()
    test = data["test"]
    outputs = free_run(model, jax.device_get(state.params), scaled["test"][0])
    exact = (test.targets - targets.mean) / targets.deviation
    test_mse = float(series.mean((outputs - exact) ** 2))
    predicted = outputs * targets.deviation + targets.mean
    rmse = np.sqrt(series.mean((outputs - exact) ** 2, 0)) * targets.deviation
    seconds = sum(call.seconds for call in calls) + time.perf_counter() - began
    before = None if names else float(series.mean(((test.inputs - test.targets) / targets.deviation) ** 2))
    results = {
        "window": FLAGS.window,
        "stateless": bool(is_stateless()),
        "influence": FLAGS.influence,
        "seed": FLAGS.seed,
        "test_mse": test_mse,
        "test_rmse": dict(zip(target_names, rmse.tolist(), strict=True)),
        "test_mse_of_the_mean": float(series.mean(exact**2)),
        "test_mse_of_the_row_before": before,
        "valid_mse": calls[-1].measured,
        "updates": updates,
        "epochs": updates / count,
        "seconds": seconds,
        **resume.health_of(calls),
        "steps": {name: len(each.inputs) for name, each in data.items()},
        "targets_missing": {name: int(np.isnan(each.targets).sum()) for name, each in data.items()},
        "fill": FLAGS.fill,
        "curve": curve,
    }
    interleaved = np.stack([test.targets, predicted], -1).reshape(len(predicted), -1)
    heads = ["row", *(f"{name}, {which}" for name in target_names for which in ("observed", "predicted"))]
    rows = ((test.first + t, *values) for t, values in enumerate(interleaved.tolist()))
    write(directory / "predictions.csv", table(heads, rows))
    launch.write_results(directory, results, picture(curve, test, predicted, test_mse))
    of = ", ".join(f"{name} {error:.4g}" for name, error in results["test_rmse"].items() if np.isfinite(error))
    others = f"{results['test_mse_of_the_mean']:.4g} for the mean" + (
        f" and {before:.4g} for the row before" if before else ""
    )
    scored = f"squared error {test_mse:.4g}, standardised ({others}); root mean square error {of}"
    launch.say(
        f"Test file, {'stateless' if is_stateless() else 'stateful'}, windows of {FLAGS.window}: "
        f"{scored if of else 'none of its targets is known, so none is scored'}. {seconds:.0f} s in all."
    )
    launch.say(f"Written to {directory}: predictions.csv, results.json, figure.png, flags.txt")


if __name__ == "__main__":
    launch.run(main)
