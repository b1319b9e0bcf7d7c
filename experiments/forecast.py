"""Forecasting time series from files of your own: an LSTM whose state is carried from window to window.

python -m experiments.forecast
python -m experiments.forecast --train=2023.csv --valid=2024.csv --test=2025.csv --inputs=rain,melt --targets=flow
python -m experiments.forecast --train=past.csv --test=recent.csv --inputs=sun,load --targets=load --ahead=24 --season=24
python -m experiments.forecast --train=past.csv --test=recent.csv --targets=sales --series=shop --time=day --warm_up=train

The targets of a row are told from the inputs of that row and all before it. An input that is a target as well is read one row
late: its past. With no inputs that is all that is read. Everything is standardised with the mean and deviation of the training
file. The test file is read in one go. Rows at its end whose targets are blank are forecast, and where only the targets' past
is read, --ahead rows past its end.

With no files, the data is that of two tanks, one emptying into the other: a pump fills the first, and the level of the second
is to be told from the pump alone, as it has been working for hundreds of steps.
"""

import time
from typing import Any

from absl import flags

from experiments import launch, pictures
from tbptt_jax import study
from tbptt_jax.study import forecasting, series, tables
from tbptt_jax.study.process.writing import check_own, csv_bytes, write_files
from tbptt_jax.study.task import reader

FLAGS = flags.FLAGS
flags.DEFINE_string("train", None, "CSV file whose first line names the columns. None: two tanks, generated.")
flags.DEFINE_string("valid", None, "Another, looked at while training: the parameters that are best there are used.")
flags.DEFINE_string("test", None, "Another, for the forecast.")
flags.DEFINE_list("inputs", [], "Columns to read; one that is a target too is read one row late: its past. None: the targets' past.")  # fmt: skip
flags.DEFINE_list("targets", [], "Columns to be told.")
flags.DEFINE_integer("ahead", 1, "Steps ahead to forecast, the first being the row whose inputs were read last.", lower_bound=1)  # fmt: skip
flags.DEFINE_enum("ahead_by", None, ["recursive", "direct"], "recursive: forecasts are fed back as the targets' past, other inputs are those of the file. direct: the model has outputs for each step ahead. Default recursive where the targets' past is read.")  # fmt: skip
flags.DEFINE_string("series", None, "Column that tells many series of one file apart; each begins from the initial carry.")  # fmt: skip
flags.DEFINE_string("time", None, "Column that is kept as text in predictions.csv.")
flags.DEFINE_string("warm_up", "0", "train: the test goes on where the training file ends, or its last so many rows. 0: it begins from the initial carry.")  # fmt: skip
flags.DEFINE_integer("origins", None, "Rows of the test file, spread over it, from which --ahead steps are scored together.", lower_bound=1)  # fmt: skip
flags.DEFINE_integer("season", None, "Rows of a season, for a seasonal naive forecast beside.", lower_bound=1)
flags.DEFINE_integer("hidden", 32, "Units of a layer.", lower_bound=1)
flags.DEFINE_integer("layers", 1, "LSTM layers.", lower_bound=1, upper_bound=1000)
flags.DEFINE_integer("lanes", 16, "Places of the training file, or series of it, read side by side.", lower_bound=1)
flags.DEFINE_integer("window", 64, "Steps of a window.", lower_bound=1)
flags.DEFINE_list("missing", [], "What stands for a missing number, such as -9999, besides blank fields, NA and NaN.")
flags.DEFINE_enum("fill", None, tables.FILLS, "What is read where an input is missing: the last number before, the training file's mean, or 0; none: it is refused.")  # fmt: skip
flags.DEFINE_enum("decimal", None, [",", "."], "What decimals are written with, where the files leave it open.")
flags.DEFINE_integer("burn_in", 0, "Steps that a stateless window reads to find its state, before those it scores: windows overlap by so many, every step is scored once, and no gradient flows into the burn-in.", lower_bound=0)  # fmt: skip
flags.DEFINE_bool("stateful", None, "Carry the state from window to window; the default.")
flags.DEFINE_bool("stateless", None, "Begin each window from the initial carry, for comparison.")
flags.DEFINE_string("influence", "truncate", launch.INFLUENCES)
flags.DEFINE_float("learning_rate", 0.01, "Adam's rate at the start; it falls to zero along a cosine.", lower_bound=0.0)
flags.DEFINE_integer("updates", None, "Updates, one a window; default 4000.", lower_bound=1)
flags.DEFINE_integer("epochs", None, "Times to read the training file, instead.", lower_bound=1)
flags.DEFINE_integer("windows_per_call", 50, "Windows, and so updates, in one compiled call.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Of the parameters.")
flags.DEFINE_integer("checkpoint_every", 500, "Updates from a checkpoint, and look at --valid, to the next.", lower_bound=1)  # fmt: skip
flags.DEFINE_bool("resume", True, "Go on from the checkpoint in the workdir, if there is one; --noresume begins afresh.")  # fmt: skip
flags.DEFINE_string("workdir", "runs/forecast", "Where predictions.csv, results.json, figure.png and the rest go.")
ARGUMENTS = (
    *("train", "valid", "test", "inputs", "targets", "missing", "fill", "decimal", "series", "time", "warm_up"),
    *("ahead", "ahead_by", "hidden", "layers", "lanes"),
)


def check_flags() -> None:
    """Raises a ``ValueError`` if the flags do not go together."""
    if FLAGS.train is None:
        given = [name for name in ARGUMENTS[:10] if FLAGS[name].value]
        if given:
            raise ValueError(f"--{given[0]} needs --train=FILE: give --train, --test and --targets, or none of them.")
    elif FLAGS.test is None or not FLAGS.targets:
        raise ValueError("--train needs --test=FILE and --targets=COLUMN,… as well: what to forecast, and where.")
    if FLAGS.stateful is not None and FLAGS.stateful == FLAGS.stateless:
        raise ValueError("--stateful and --stateless contradict each other: give one of them.")
    if FLAGS.updates and FLAGS.epochs:
        raise ValueError(f"--updates={FLAGS.updates} and --epochs={FLAGS.epochs} were both given: give one of them.")
    if FLAGS.burn_in and not is_stateless():
        raise ValueError(
            f"--burn_in={FLAGS.burn_in} is for windows that begin with no state: give --stateless as well."
        )
    if FLAGS.burn_in >= FLAGS.window:
        raise ValueError(
            f"--burn_in={FLAGS.burn_in} leaves no step to score: choose less than --window={FLAGS.window}."
        )
    launch.influence(FLAGS.influence, 1, "influence")


def is_stateless() -> bool:
    return bool(FLAGS.stateless or FLAGS.stateful is False)


def main() -> None:
    check_flags()
    launch.join_processes(FLAGS.lanes)
    arguments: dict[str, Any] = {name: FLAGS[name].value for name in ARGUMENTS}
    if FLAGS.influence == "uoro":
        arguments["implementation"] = "fused"  # cuDNN's LSTM, the default on a GPU, has no transpose
    task = study.task("forecast", **arguments)
    layout, data = series.Layout(**task.codec), series.data_of(**arguments)
    forecasting.check_test(layout, data["test"], FLAGS.origins)
    if FLAGS.train and (warning := tables.sentinels(data, layout.inputs, layout.targets)):
        launch.say(warning)
    if late := [layout.inputs[i] for i in layout.late]:
        launch.say(f"Read one row late, as the past of what is told: {', '.join(late)}.")
    own = {} if FLAGS.train else {f"{name}.csv": csv_bytes(*tables.columns(each)) for name, each in data.items()}
    check_own(launch.expanded(FLAGS.workdir), own)
    streams = task.train()
    series.check_long_enough(streams, data["train"], FLAGS.lanes, FLAGS.window, FLAGS.train or "The series")
    how: dict[str, Any] = {"stateless": is_stateless(), "burn_in": FLAGS.burn_in}
    count, *_ = reader(task, streams, FLAGS.window, FLAGS.lanes, **how)
    how |= {name: FLAGS[name].value for name in ("learning_rate", "seed", "resume", "not_finite")}
    updates = FLAGS.epochs * count if FLAGS.epochs else FLAGS.updates or 4000
    directory = launch.workdir(FLAGS.workdir)
    write_files(directory, own)
    run = study.fit(
        task,
        window=FLAGS.window,
        updates=updates,
        workdir=directory,
        influence=FLAGS.influence,
        devices=launch.DEVICES.value,
        windows_per_call=min(FLAGS.windows_per_call, -(-updates // 20)),
        checkpoint_every=min(FLAGS.checkpoint_every, -(-updates // 8)),
        settings={name: FLAGS[name].value for name in ("hidden", "layers")},
        **how,
    )
    began = time.perf_counter()
    predictions = forecasting.forecasts(task.model, run.params, layout, data["test"])
    results = forecasting.evaluate(layout, data["train"], data["test"], predictions, FLAGS.season, FLAGS.origins)
    write_files(directory, {"predictions.csv": csv_bytes(*forecasting.table(layout, data["test"], predictions, FLAGS.series, FLAGS.time))})  # fmt: skip
    curve = [(call.updates, call.loss, next(iter((call.valid or {}).values()), None)) for call in run.calls]
    seconds = sum(call.seconds for call in run.calls) + time.perf_counter() - began
    kind = f"{'stateless' if is_stateless() else 'stateful'}, windows of {FLAGS.window}"
    shown, title = forecasting.shown(layout, data["test"], predictions), f"LSTM of {FLAGS.hidden} units, {kind}"
    figure = pictures.forecast(layout.targets, *shown, curve, results["test_mse"], title)
    results |= {name: FLAGS[name].value for name in ("window", "influence", "seed", "fill", "warm_up", "season")}
    results |= {"stateless": is_stateless(), "valid_mse": min((x for *_, x in curve if x is not None), default=None)}
    results |= {"updates": run.updates, "epochs": run.updates / run.windows, "seconds": seconds}
    results |= {**tables.counts(data), **study.health_of(run.calls), "curve": curve}
    launch.write_results(directory, results, figure)
    launch.say(f"Test file, {kind}: {forecasting.summary(results)}. {seconds:.0f} s in all.")
    launch.say(f"Written to {directory}: predictions.csv, results.json, figure.png, flags.txt")


if __name__ == "__main__":
    launch.run(main)
