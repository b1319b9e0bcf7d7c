"""What is done with a trained forecaster: forecasts several steps ahead and past the end, their scores, naive forecasts beside.

An *origin* is a row before which everything is known: all rows before it, and of the row itself and those after it the
inputs that are no target.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import tbptt_jax as tb
from tbptt_jax.recurrence import Recurrence, unroll_window
from tbptt_jax.study.tasks.series import Layout, features, known
from tbptt_jax.study.tasks.tables import Series, mean_of

STRETCH = 1000  # steps of a window in which series are read
AT_ONCE = 100_000  # steps of forecasts from many origins that are computed side by side


class Forecasts(NamedTuple):
    """Of one series, in the data's units; NaN where what has to be read is not known.

    Attributes:
      ahead: ``[time + 1, ahead, targets]``: ``ahead[t, k]`` is of row t + k, made at origin t.
      beyond: ``[steps, targets]``, of the rows after the last known one, from there on.
    """

    ahead: np.ndarray
    beyond: np.ndarray


def forecasts(model: Recurrence, params: Any, layout: Layout, data: Sequence[Series]) -> list[Forecasts]:
    """Forecasts from every row of every series, each series read from the initial carry on.

    Args:
      model: the recurrence, as a :func:`tbptt_jax.study.tasks.series.forecast` has it.
      params: its parameters.
      layout: of its task, ``Layout(**task.codec)``.
      data: the series.

    Returns:
      The forecasts of each series.
    """
    params = jax.device_get(params)  # of several processes, each forecasts by itself
    read = [features(layout, series) for series in data]
    length = np.array([known(layout, series) for series in data])
    time, targets = max(len(x) for x in read), len(layout.targets)
    inputs = np.zeros((len(data), time + layout.ahead, len(layout.inputs)), np.float32)
    for i, x in enumerate(read):
        inputs[i, : len(x)] = np.nan_to_num(x)
    feed = functools.partial(_fed, model, params, tuple(layout.late), tuple(layout.past))
    recursive = layout.ahead > 1 and not layout.direct
    carry = model.initial_carry(params, len(data))
    ahead = np.full((len(data), time, layout.ahead, targets), np.nan)
    lanes = len(data) * (layout.ahead if recursive else 1)
    # The known rows, some at a time. To look ahead from each by recursion, the carries before them become lanes.
    step = max(1, min(STRETCH, int(length.max()), AT_ONCE // lanes))
    for first in range(0, int(length.max()), step):
        rows = first + np.arange(step)
        at = inputs[:, np.minimum(rows, time - 1)]
        carry, before, outputs = _read(model, params, carry, tb.Window(at, valid=rows < length[:, None]), recursive)
        if recursive:
            reach = inputs[:, np.minimum(rows[:, None] + np.arange(layout.ahead), inputs.shape[1] - 1)]
            before = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), before)
            outputs = np.asarray(feed(before, reach.swapaxes(0, 1).reshape(-1, *reach.shape[2:])))
            outputs = outputs.reshape(step, len(data), layout.ahead, targets).swapaxes(0, 1)
        else:
            outputs = np.asarray(outputs).reshape(len(data), step, layout.ahead, targets)
        inside = rows[rows < time]
        ahead[:, inside] = outputs[:, : len(inside)]
    # From the row after the last known one on, which the carry is now before.
    ends = np.array([len(series.rows) for series in data])
    steps = max(layout.ahead, int((ends - length).max()))
    rows = np.minimum(length[:, None] + np.arange(steps), inputs.shape[1] - 1)
    outputs = np.asarray(feed(carry, inputs[np.arange(len(data))[:, None], rows]), np.float64)
    heads = outputs[:, 0] if layout.direct else outputs[:, : layout.ahead]
    ahead[np.arange(len(data)), length] = heads.reshape(len(data), layout.ahead, targets)
    mean, deviation = layout.scale(layout.targets)
    others = len(layout.late) < len(layout.inputs)  # columns that are known no further than the file
    result = []  # in the data's units, without what was read of rows that are not known
    for i in range(len(data)):
        near = ahead[i, : ends[i] + 1] * deviation + mean
        near[np.isnan(read[i]).any(1) | (np.arange(ends[i] + 1) > length[i])] = np.nan
        if others and not layout.direct:
            near[np.add.outer(np.arange(ends[i] + 1), np.arange(layout.ahead)) >= ends[i]] = np.nan
        left = ends[i] - length[i] if others else max(layout.ahead, ends[i] - length[i])
        beyond = outputs[i, :left, :targets] * deviation + mean
        if len(beyond) and np.isnan(read[i][length[i]]).any():
            beyond[:] = np.nan
        result.append(Forecasts(near, beyond))
    return result


@functools.partial(jax.jit, static_argnames=("model", "carries"))
def _read(model: Recurrence, params: Any, carry: Any, window: tb.Window, carries: bool) -> tuple[Any, Any, Any]:
    """``(carry, before, outputs)``: with ``carries`` the carry before each step ``[time, lanes, ...]``, else the outputs."""
    if not carries:
        carry, outputs = unroll_window(model, params, carry, window)
        return carry, None, outputs

    def one(carry: Any, at: Any) -> tuple[Any, Any]:
        return unroll_window(model, params, carry, jax.tree.map(lambda x: x[:, None], at))[0], carry

    return *jax.lax.scan(one, carry, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), window)), None


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _fed(
    model: Recurrence, params: Any, late: tuple[int, ...], past: tuple[int, ...], carry: Any, inputs: jax.Array
) -> jax.Array:
    """The outputs ``[lanes, time, outputs]``, from the second step on fed back as the targets' past."""
    late_at, past_at = np.array(late, int), np.array(past, int)

    def one(state: tuple[Any, jax.Array], x: jax.Array) -> tuple[Any, jax.Array]:
        carry, fed = state
        carry, outputs = unroll_window(model, params, carry, tb.Window(x.at[:, late_at].set(fed)[:, None]))
        return (carry, outputs[:, 0, past_at].astype(x.dtype)), outputs[:, 0]

    outputs = jax.lax.scan(one, (carry, inputs[:, 0, late_at]), jnp.swapaxes(inputs, 0, 1))[1]
    return jnp.swapaxes(outputs, 0, 1)


def by_row(series: Series, forecast: Forecasts) -> np.ndarray:
    """The forecasts of each row, ``[rows, ahead, targets]``: ``[r, k]`` is of row r, made k rows before it.

    There are as many rows as the series has, and those past its end of which there is a forecast.
    """
    origins, ahead, targets = forecast.ahead.shape
    rows = np.full((origins - 1 + ahead, ahead, targets), np.nan)
    for k in range(ahead):
        rows[k : k + origins, k] = forecast.ahead[: len(rows) - k, k]
    predicted = np.flatnonzero(~np.isnan(rows).all((1, 2)))
    return rows[: max(len(series.rows), int(predicted[-1]) + 1 if len(predicted) else 0)]


def nearest(layout: Layout, series: Series, forecast: Forecasts) -> np.ndarray:
    """Of each row of :func:`by_row`, or past it of ``beyond``, the forecast made the fewest steps before, ``[rows, targets]``."""
    rows, first = by_row(series, forecast), known(layout, series)
    nearest = np.full((max(len(rows), first + len(forecast.beyond)), rows.shape[2]), np.nan)
    for k in reversed(range(rows.shape[1])):
        nearest[: len(rows)] = np.where(np.isnan(rows[:, k]), nearest[: len(rows)], rows[:, k])
    beyond = nearest[first : first + len(forecast.beyond)]
    nearest[first : first + len(forecast.beyond)] = np.where(np.isnan(beyond), forecast.beyond, beyond)
    return nearest


def naive(series: Series, ahead: int, season: int | None = None) -> np.ndarray:
    """Naive forecasts ``[time, ahead, targets]`` as :func:`by_row` has them: the last number before the origin.

    Args:
      series: of ``time`` rows.
      ahead: how many steps ahead.
      season: rows of a season: the number so many rows before, or as many seasons as are needed to be before the origin.
    """
    time, targets = series.targets.shape
    naive = np.full((time, ahead, targets), np.nan)
    seen = np.where(np.isnan(series.targets), -1, np.arange(time)[:, None])
    last = np.maximum.accumulate(seen, 0)  # the row of the last number
    for k in range(ahead):
        if season is not None:
            back = season * (k // season + 1)
            naive[back:, k] = series.targets[: max(0, time - back)]
        else:
            row = last[: max(0, time - 1 - k)]
            naive[k + 1 :, k] = np.where(row < 0, np.nan, np.take_along_axis(series.targets, np.maximum(row, 0), 0))
    return naive


def scores(
    layout: Layout, train: Sequence[Series], test: Sequence[Series], predictions: Sequence[Forecasts], season: int | None = None
) -> list[dict[str, Any]]:  # fmt: skip
    """How well a test is forecast, by steps ahead, beside naive forecasts of the same rows.

    Args:
      layout: of the forecasts.
      train: the training series, for the scale of MASE.
      test: the test series.
      predictions: their :func:`forecasts`.
      season: rows of a season, for a seasonal naive forecast as well.

    Returns:
      For each step ahead ``{"ahead", "rows", "rmse": {"model": {target: …}, "naive": …, "seasonal": …}, "mase": {target: …}}``.
      Rows are those of which all have a forecast and a target is there. MASE is the mean absolute error over that of the naive
      forecast, seasonal if there is a season, one step ahead in the training file (Hyndman and Koehler 2006, *Another look at
      measures of forecast accuracy*).
    """
    lag = season or 1
    scale = mean_of(np.concatenate([np.abs(s.targets[lag:] - s.targets[:-lag]) for s in train]), 0)
    wanted = {"naive": None} | ({"seasonal": season} if season else {})
    errors: dict[str, list[np.ndarray]] = {name: [] for name in ("model", *wanted)}
    for series, forecast in zip(test, predictions, strict=True):
        by = {"model": by_row(series, forecast)[: len(series.rows)]}
        by |= {name: naive(series, layout.ahead, of) for name, of in wanted.items()}
        for name, values in by.items():
            errors[name].append((values - series.targets[:, None])[series.warm :])
    joined = {name: np.concatenate(parts) for name, parts in errors.items()}
    if season and np.isnan(joined["seasonal"]).all():
        del joined["seasonal"]  # the test is shorter than a season
    there = ~np.isnan(sum(joined.values()))
    rows = []
    for k in range(layout.ahead):
        error = {name: np.where(there[:, k], x[:, k], np.nan) for name, x in joined.items()}
        rmse = {name: _named(layout, np.sqrt(mean_of(x**2, 0))) for name, x in error.items()}
        mase = _named(layout, mean_of(np.abs(error["model"]), 0) / np.where(scale > 0, scale, np.nan))
        rows.append({"ahead": k + 1, "rows": _named(layout, there[:, k].sum(0)), "rmse": rmse, "mase": mase})
    return rows


def origins(layout: Layout, series: Series, count: int) -> np.ndarray:
    """Rows of a series to forecast from, ``count`` of them spread over it, or as many as there are."""
    first = max(series.warm, 1 if layout.late else 0)
    last = known(layout, series) - layout.ahead
    spread = np.linspace(first, max(first, last), count).round().astype(int)
    return np.unique(spread[spread <= last])


def backtest(layout: Layout, test: Sequence[Series], predictions: Sequence[Forecasts], count: int) -> list[dict]:
    """The root mean square error over all steps ahead, from each of ``count`` origins spread over each series.

    Returns:
      ``{"series", "row", "rmse": {target: …}}`` for each origin.
    """
    result = []
    for series, forecast in zip(test, predictions, strict=True):
        for t in origins(layout, series, count):
            error = forecast.ahead[t] - series.targets[t : t + layout.ahead]
            rmse = _named(layout, np.sqrt(mean_of(error**2, 0)))
            result.append({"series": series.name, "row": int(series.rows[t]), "rmse": rmse})
    return result


def check_test(layout: Layout, test: Sequence[Series], count: int | None = None) -> None:
    """Raises a ``ValueError`` if a test has nothing to forecast from, or not so many origins."""
    if layout.late and not any(known(layout, each) for each in test):
        raise ValueError(
            "The test file has no target that is there, and their past is read: give rows before it that have them, or "
            "--warm_up=train, which reads the training file's."
        )
    most = max(known(layout, s) - layout.ahead + 1 - max(s.warm, 1 if layout.late else 0) for s in test)
    if count is not None and count > most:
        raise ValueError(
            f"{count} origins were asked for, and the test file has {max(0, most)} rows from which {layout.ahead} steps ahead are "
            "there to be compared with: give fewer, or a longer test file."
        )


def shown(layout: Layout, test: Sequence[Series], predictions: Sequence[Forecasts]) -> tuple[np.ndarray, np.ndarray]:
    """What was observed, NaN past the end, and the nearest forecast ``[rows, targets]``, series after series."""
    predicted = [nearest(layout, s, f)[s.warm :] for s, f in zip(test, predictions, strict=True)]
    observed = [np.full_like(x, np.nan) for x in predicted]
    for series, x in zip(test, observed, strict=True):
        x[: len(series.rows) - series.warm] = series.targets[series.warm :]
    return np.concatenate(observed), np.concatenate(predicted)


def evaluate(
    layout: Layout, train: Sequence[Series], test: Sequence[Series], predictions: Sequence[Forecasts],
    season: int | None = None, count: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The scores of a test, as ``results.json`` of a launch has them.

    Returns:
      ``test_mse``, standardised, and ``test_rmse`` of each target, one step ahead; ``test_mse`` of the training file's mean and,
      where only the targets' past is read, of the row before; ``steps_ahead``, the :func:`scores`; and with ``count``
      ``origins``, the :func:`backtest`, and ``origins_mean``.
    """
    mean, deviation = layout.scale(layout.targets)
    pairs = list(zip(test, predictions, strict=True))
    errors = np.concatenate([(by_row(s, f)[: len(s.rows), 0] - s.targets)[s.warm :] for s, f in pairs]) / deviation
    exact = np.concatenate([s.targets[s.warm :] for s in test])
    before = np.concatenate([(naive(s, 1)[:, 0] - s.targets)[s.warm :] for s in test]) / deviation
    only_past = len(layout.late) == len(layout.inputs)
    results: dict[str, Any] = {
        "ahead": layout.ahead,
        "ahead_by": None if layout.ahead == 1 else "direct" if layout.direct else "recursive",
        "test_mse": float(mean_of(errors**2)),
        "test_rmse": _named(layout, np.sqrt(mean_of(errors**2, 0)) * deviation),
        "test_mse_of_the_mean": float(mean_of(((exact - mean) / deviation) ** 2)),
        "test_mse_of_the_row_before": float(mean_of(before**2)) if only_past else None,
        "steps_ahead": scores(layout, train, test, predictions, season),
    }
    if count is not None:
        results["origins"] = backtest(layout, test, predictions, count)
        rmse = np.array([list(origin["rmse"].values()) for origin in results["origins"]])
        results["origins_mean"] = _named(layout, mean_of(rmse, 0))
    return results


def summary(results: dict[str, Any]) -> str:
    """A sentence of :func:`evaluate`'s results."""
    of = ", ".join(f"{name} {error:.4g}" for name, error in results["test_rmse"].items() if np.isfinite(error))
    if not of:
        return "none of its targets is known, so none is scored"
    before = results["test_mse_of_the_row_before"]
    others = f"{results['test_mse_of_the_mean']:.4g} for the mean"
    others += f" and {before:.4g} for the row before" if before else ""
    text = f"squared error {results['test_mse']:.4g}, standardised ({others}); root mean square error {of}"
    steps = [step for step in results["steps_ahead"] if any(step["rows"].values())]
    for step in steps if len(steps) < 2 else (steps[0], steps[-1]):
        text += f"; {step['ahead']} ahead: " if len(steps) > 1 else "; "
        errors = {
            name: ", ".join(f"{by} {error[name]:.4g}" for by, error in step["rmse"].items())
            for name in results["test_rmse"]
        }
        mase = {name: f", MASE {x:.3g}" if np.isfinite(x) else "" for name, x in step["mase"].items()}
        errors = {name: x + mase[name] for name, x in errors.items()}
        text += "; ".join(x if len(errors) == 1 else f"{name} {x}" for name, x in errors.items())
    if "origins" in results:
        mean = ", ".join(f"{name} {error:.4g}" for name, error in results["origins_mean"].items())
        text += f"; mean over {len(results['origins'])} origins {mean}"
    return text


def table(
    layout: Layout, test: Sequence[Series], predictions: Sequence[Forecasts], series: str | None = None, time: str | None = None
) -> tuple[list[str], list[list[Any]]]:  # fmt: skip
    """Header and rows of a table of forecasts: every row of the test, and those past its end.

    Args:
      layout: of the forecasts.
      test: the test series.
      predictions: their :func:`forecasts`.
      series: heads the column of the series' names; None: there is none.
      time: heads the column of what the file says of when; None: there is none.
    """
    heads = ["row", *(name for name in (series, time) if name is not None)]
    for name in layout.targets:
        heads += [f"{name}, observed", f"{name}, predicted"]
        heads += [f"{name}, predicted {k + 1} ahead" for k in range(1, layout.ahead)]
    rows: list[list[Any]] = []
    for each, forecast in zip(test, predictions, strict=True):
        predicted, ahead = nearest(layout, each, forecast), by_row(each, forecast)
        for r in range(each.warm, len(predicted)):
            inside = r < len(each.rows)
            beyond = "" if series else int(each.rows[-1]) + 1 + r - len(each.rows)
            row: list[Any] = [int(each.rows[r]) if inside else beyond]
            row += [each.name] if series is not None else []
            row += [each.times[r] if inside and each.times else ""] if time is not None else []
            for i in range(len(layout.targets)):
                row += [float(each.targets[r, i]) if inside else "", float(predicted[r, i])]
                row += [float(ahead[r, k, i]) if r < len(ahead) else "" for k in range(1, layout.ahead)]
            rows.append(["" if value != value else value for value in row])  # a gap is blank
    return heads, rows


def _named(layout: Layout, values: np.ndarray) -> dict[str, Any]:
    return dict(zip(layout.targets, values.tolist(), strict=True))
