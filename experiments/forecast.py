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

from experiments import launch, pictures, tasks, training
from tbptt_jax import study
from tbptt_jax.study import forecasting, series, tables
from tbptt_jax.study.process.writing import check_own, csv_bytes, write_files
from tbptt_jax.study.task import reader

FLAGS = flags.FLAGS
tasks.define_series()
tasks.define_sizes(hidden=32, layers=1, lanes=16)
training.define("runs/forecast", window=64, updates=4000)
flags.DEFINE_bool("stateful", None, "Carry the state from window to window; the default.")
flags.DEFINE_integer("origins", None, "Rows of the test file, spread over it, from which --ahead steps are scored together.", lower_bound=1)  # fmt: skip
flags.DEFINE_integer("season", None, "Rows of a season, for a seasonal naive forecast beside.", lower_bound=1)


def check_flags() -> None:
    """Raises a ``ValueError`` if the flags do not go together."""
    if FLAGS.train is None:
        given = [name for name in tasks.FILES if FLAGS[name].value]
        if given:
            raise ValueError(f"--{given[0]} needs --train=FILE: give --train, --test and --targets, or none of them.")
    elif FLAGS.test is None or not FLAGS.targets:
        raise ValueError("--train needs --test=FILE and --targets=COLUMN,… as well: what to forecast, and where.")
    if FLAGS.stateful is not None and FLAGS["stateless"].present and FLAGS.stateful == FLAGS.stateless:
        raise ValueError("--stateful and --stateless contradict each other: give one of them.")
    if FLAGS.burn_in and not is_stateless():
        raise ValueError(f"--burn_in={FLAGS.burn_in} is for windows that begin anew: give --stateless as well.")
    window = training.window()
    if isinstance(window, int) and FLAGS.burn_in >= window:
        raise ValueError(
            f"--burn_in={FLAGS.burn_in} leaves no step to score: choose less than --window={FLAGS.window}."
        )
    training.check()


def is_stateless() -> bool:
    return bool(FLAGS.stateless or FLAGS.stateful is False)


def main() -> None:
    check_flags()
    launch.join_processes(FLAGS.lanes)
    arguments = tasks.given((*tasks.SERIES, *tasks.SIZES))
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
    window = training.window()
    longest = window if isinstance(window, int) else max(window.sizes, default=1)
    series.check_long_enough(streams, data["train"], FLAGS.lanes, longest, FLAGS.train or "The series")
    how: dict[str, Any] = {"stateless": is_stateless(), "burn_in": FLAGS.burn_in}
    count, *_ = reader(task, streams, longest, FLAGS.lanes, **how)
    updates = FLAGS.epochs * count if FLAGS.epochs else FLAGS.updates or 4000
    directory = launch.workdir(FLAGS.workdir)
    write_files(directory, own)
    run = training.fitted(
        task,
        updates,
        stateless=is_stateless(),
        windows_per_call=min(FLAGS.windows_per_call, -(-updates // 20)),
        checkpoint_every=min(FLAGS.checkpoint_every, -(-updates // 8)),
        settings={name: FLAGS[name].value for name in ("hidden", "layers")},
    )
    began = time.perf_counter()
    predictions = forecasting.forecasts(task.model, run.params, layout, data["test"])
    results = forecasting.evaluate(layout, data["train"], data["test"], predictions, FLAGS.season, FLAGS.origins)
    write_files(directory, {"predictions.csv": csv_bytes(*forecasting.table(layout, data["test"], predictions, FLAGS.series, FLAGS.time))})  # fmt: skip
    curve = [(call.updates, call.loss, next(iter((call.valid or {}).values()), None)) for call in run.calls]
    kind = f"{'stateless' if is_stateless() else 'stateful'}, {training.windows_told()}"
    shown, title = forecasting.shown(layout, data["test"], predictions), f"LSTM of {FLAGS.hidden} units, {kind}"
    figure = pictures.forecast(layout.targets, *shown, curve, results["test_mse"], title)
    results |= {name: FLAGS[name].value for name in ("influence", "seed", "fill", "season")}
    results["window"] = window if isinstance(window, int) else FLAGS.window
    results["warm_up"] = FLAGS.warm_up or "0"
    results |= {"stateless": is_stateless(), "valid_mse": min((x for *_, x in curve if x is not None), default=None)}
    results |= {**tables.counts(data), **training.told_of(run), "curve": curve}
    results["seconds"] += time.perf_counter() - began
    launch.say(f"Test file, {kind}: {forecasting.summary(results)}. {results['seconds']:.0f} s in all.")
    launch.write_results(directory, results, figure, more=", run.json, predictions.csv")


if __name__ == "__main__":
    launch.run(main)
