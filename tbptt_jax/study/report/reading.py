"""What a sweep's rows say: the best row of each point, who reached a loss when, how a measured window and a suggested one differ."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

Row = dict[str, Any]

BUDGETS = {"data": "equal data", "updates": "equal updates"}


def series_of(row: Row) -> str:
    """What tells a line of a chart from the others: carry, influence and, where given, the task's own parameters."""
    params = [f"{name} {value(told)}" for name, told in (row.get("params") or {}).items()]
    return ", ".join(str(part) for part in (row.get("carry"), row.get("influence"), *params) if part)


def name_of(row: Row) -> str:
    window = f"window {row['window']}" if is_fixed(row) else row["window"]
    return f"{window}, {row['series']}"


def is_fixed(row: Row) -> bool:
    """Whether its windows have one length, or else those that a schedule of the name ``window`` decides."""
    return not isinstance(row["window"], str)


def in_order(windows: Iterable[Any]) -> list[Any]:
    """Lengths from short to long, then the names of schedules as they come."""
    each = dict.fromkeys(windows)
    return [*sorted(k for k in each if not isinstance(k, str)), *(k for k in each if isinstance(k, str))]


def columns(rows: list[Row]) -> dict[Any, int]:
    """Where a window stands on the axis of windows: at its length, and a schedule beyond the longest, as far as lengths are apart."""
    windows = in_order(row["window"] for row in rows)
    names = [window for window in windows if isinstance(window, str)]
    lengths = windows[: len(windows) - len(names)]
    first, last = (lengths[0], lengths[-1]) if lengths else (1, 1)
    apart = min(max((last / first) ** (1 / max(1, len(lengths) - 1)), 1.7), 4)
    return {k: k for k in lengths} | {name: round(last * apart**i) for i, name in enumerate(names, 1)}


def column(row: Row) -> Any:
    """Where a row stands on the axis of windows."""
    return row["column"] if "column" in row else row["window"]


def best_rates(rows: list[Row], *, higher: bool) -> list[Row]:
    """Of each budget, series and window the row whose learning rate did best, ordered by window."""
    points: dict[tuple, list[Row]] = {}
    for row in rows:
        points.setdefault((row["budget"], row["series"], row["window"]), []).append(row)
    found = [best_of(mine, higher=higher) for mine in points.values()]
    order = in_order(row["window"] for row in found)
    return sorted(found, key=lambda row: order.index(row["window"]))


def best_of(rows: list[Row], *, higher: bool) -> Row:
    """The row of the best metric, what is not finite being worst; of equals the lowest loss, then the first."""

    def worth(row: Row) -> tuple[float, ...]:
        scores = number(row["final_metric"]) * (1 if higher else -1), -number(row["final_loss"])
        return tuple(score if math.isfinite(score) else -math.inf for score in scores)

    return max(rows, key=worth)


def as_good(best: list[Row], *, higher: bool) -> list[Row]:
    """The rows as good as the best one: within its standard error over seeds, or 2 % of the way to the worst."""
    if not best:
        return []
    top = best_of(best, higher=higher)
    behind = [abs(number(top["final_metric"]) - number(row["final_metric"])) for row in best]
    error = float(np.std(finite(top["metrics"]) or [0.0])) / len(top["metrics"] or [0.0]) ** 0.5
    slack = max(error, 0.02 * max(finite(behind), default=0.0))
    return [row for row, gap in zip(best, behind, strict=True) if gap <= slack]


def one_budget(best: list[Row]) -> tuple[str, list[Row]]:
    """The rows at equal data, or where there are none at equal updates, and how that is called."""
    budget = "data" if any(row["budget"] == "data" for row in best) else "updates"
    return BUDGETS[budget], [row for row in best if row["budget"] == budget]


def time_to_reach(best: list[Row], *, higher: bool) -> tuple[float, list[Row]]:
    """The training loss at which the slowest of the windows as good as the best ends, NaN if there is none, and when each row
    first had it: its updates, steps and seconds, each of a row's updates as long as any other, or NaN.
    """
    _, mine = one_budget(best)
    ends = [losses[-1] for row in as_good(mine, higher=higher) if (losses := finite((row["curve"] or {}).get("loss")))]
    level, reached = max(ends, default=math.nan), []
    for row in mine if ends else []:
        told = zip(*((row["curve"] or {}).get(name) or [] for name in ("loss", "updates", "steps")), strict=False)
        at = next((place[1:] for place in told if number(place[0]) <= level), (None, None))
        seconds = number(row["seconds"]) * number(at[0]) / (number(row["updates"]) or math.nan)
        when = dict(zip(("updates", "steps", "seconds"), (*map(number, at), seconds), strict=True))
        reached.append({"series": row["series"], "window": row["window"], "column": column(row), **when})
    return level, reached


def two_windows(recommended: Row, suggested: Row, best: list[Row], bias: list[Row], *, higher: bool) -> Row | None:
    """The numbers that explain a measured window beside the one that the gradients suggest; None if one is missing.

    Of the suggestions that of the trained model counts. ``recommended`` has a window, a carry and an influence, and perhaps
    ``params``; without, its row is the best of those.
    """
    model = next((m for m in ("trained", "untrained") if (suggested.get(m) or {}).get("window") is not None), None)
    mine = [row for row in one_budget(best)[1] if finite([row["final_metric"]])]
    alike = [key for key in ("carry", "influence", "params") if key in recommended]
    series = [row for row in mine if all(row.get(key) == recommended[key] for key in alike)]
    here = [row for row in series if row["window"] == recommended.get("window")]
    if model is None or not here:
        return None
    row, top = (best_of(rows, higher=higher) for rows in (here, mine))
    at, ask, place = row["window"], suggested[model]["window"], (model, recommended.get("influence"))
    return {
        "at": at,
        "ask": ask,
        "score": row["final_metric"],
        "top": top["final_metric"],
        "as_good": row in as_good(mine, higher=higher),
        "off": [r["relative_bias"] for r in bias if (r["model"], r["influence"], r["window"]) == (*place, at)],
        "shorter": [row for row in series if ask <= row["window"] < at],
        "carried": recommended.get("carry") == "stateful",
    }


def on_schedules(rows: list[Row], metric: Row) -> list[Row]:
    """Of each budget, series and schedule of windows its best row, and a sentence on what it chose, how well it did and what it cost.

    The cost is that of all seeds and rates, beside that of all windows of one length in the same budget and series.
    """
    higher, found = metric["better"] == "higher", []
    best = best_rates([{**row, "series": series_of(row)} for row in rows], higher=higher)
    for row in (row for budget in BUDGETS for row in best if row["budget"] == budget and not is_fixed(row)):
        fixed = [r for r in best if is_fixed(r) and (r["budget"], r["series"]) == (row["budget"], row["series"])]
        said = f"{capital(row['window'])} ({row['series']}), at {BUDGETS[row['budget']]}, ends at {metric['name']} {value(row['final_metric'])}"
        if finite(r["final_metric"] for r in [row]) and finite(r["final_metric"] for r in fixed):
            top = best_of(fixed, higher=higher)
            good = as_good([*fixed, row], higher=higher)
            how = "as good as" if row in good and top in good else "better than" if row in good else "worse than"
            said += f", {how} the best window of one length, {top['window']}, with {value(top['final_metric'])}"
            said += ", within the spread of seeds" if how == "as good as" else ""
        shares = [f"{share:.0%} in windows of {k}" for k, share in _shares(row.get("windows") or []).items()]
        read = " and ".join([*filter(None, [", ".join(shares[:-1])]), *shares[-1:]])
        said += f". Of its steps it read {read}; a window had {value(row['mean_window'])} steps in the mean. "
        looks = [look for each in row.get("looks") or [] for look in each]
        if unsafe := sum(not look["safe"] for look in looks):
            said += f"At {unsafe} of {len(looks)} looks no window was known to be safe, and the longest was used. "
        found.append({**row, "sentence": said + _cost(row, fixed, looks)})
    return found


def looks_of(rows: list[Row]) -> list[Row]:
    """A row for each look of each run: where it was, and what was chosen."""
    place = "budget", "carry", "influence", "params", "window", "learning_rate"
    return [
        {**{name: row.get(name) for name in place}, "seed": seed, **look, "chosen": look["window"], "window": row["window"]}
        for row in rows
        for seed, each in enumerate(row.get("looks") or [])
        for look in each
    ]  # fmt: skip


def _cost(row: Row, fixed: list[Row], looks: list[Row]) -> str:
    """What a schedule's trainings cost beside those of all windows of one length."""
    said = f"It took {value(row['seconds'])} s"
    said += f", of them {value(row['look_seconds'])} for {len(looks)} looks" if looks else ""
    steps, seconds, compiled = (sum(finite(r[name] for r in fixed)) for name in ("steps", "seconds", "compile_seconds"))
    if not steps:
        return f"{said}."
    they = f"The {len(fixed)} windows of one length" if len(fixed) > 1 else "The window of one length"
    said += f", and {value(row['compile_seconds'])} s to compile. {they} took {value(seconds)} s and {value(compiled)} s to compile"
    return f"{said}, and read {steps / number(row['steps']):.3g} times as many steps."


def _shares(windows: list[list[list[int]]]) -> dict[int, float]:
    """The share of the steps of all seeds that was read in windows of each length."""
    read: dict[int, int] = {}
    for each in windows:
        for (begin, window), (end, _) in itertools.pairwise(each):
            read[window] = read.get(window, 0) + end - begin
    return {window: read[window] / sum(read.values()) for window in sorted(read) if read[window]}


# Numbers


def number(x: Any) -> float:
    return math.nan if x is None else float(x)


def finite(x: Iterable[Any] | None) -> list[float]:
    return [y for y in map(number, x if x is not None else []) if math.isfinite(y)]


def value(x: Any) -> str:
    """What a reader sees of a value: four figures, thousands apart, a dash for what is not finite or not there."""
    if isinstance(x, list | tuple):
        return ", ".join(map(value, x))
    if x is None or (isinstance(x, float) and not math.isfinite(x)):
        return "–"
    if isinstance(x, float | int) and not isinstance(x, bool):
        return f"{x:,.0f}" if 10_000 <= abs(x) < 1e15 else f"{x:.4g}"
    return str(x)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
