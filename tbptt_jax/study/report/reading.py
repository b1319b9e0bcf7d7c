"""What a sweep's rows say: the best row of each point, who reached a loss when, how a measured window and a suggested one differ."""

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
    return f"window {row['window']}, {row['series']}"


def best_rates(rows: list[Row], *, higher: bool) -> list[Row]:
    """Of each budget, series and window the row whose learning rate did best, ordered by window."""
    points: dict[tuple, list[Row]] = {}
    for row in rows:
        points.setdefault((row["budget"], row["series"], row["window"]), []).append(row)
    return sorted((best_of(mine, higher=higher) for mine in points.values()), key=lambda row: row["window"])


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
        reached.append({"series": row["series"], "window": row["window"], **when})
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
