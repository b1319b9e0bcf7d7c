"""What a sweep's rows say: the best row of each point, who reached a loss when, why two windows can both be right."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

Row = dict[str, Any]

BUDGETS = {"data": "equal data", "updates": "equal updates"}
POINT = ("budget", "series", "window")
REACHED = ("updates", "steps", "seconds")
LIKE = ("carry", "influence", "params")
SMALL = 0.1  # of a relative bias: what `tbptt_jax.horizon.suggest` bounds it by


def series_of(row: Row) -> str:
    """What tells a line of a chart from the others: carry, influence and, where given, the task's own parameters."""
    params = [f"{name} {value(told)}" for name, told in (row.get("params") or {}).items()]
    return ", ".join(str(part) for part in (row.get("carry"), row.get("influence"), *params) if part)


def best_rates(rows: list[Row], *, higher: bool) -> list[Row]:
    """Of each budget, series and window the row whose learning rate did best, ordered by window."""
    points: dict[tuple, list[Row]] = {}
    for row in rows:
        points.setdefault(tuple(row[name] for name in POINT), []).append(row)
    return sorted((best_of(mine, higher=higher) for mine in points.values()), key=lambda row: row["window"])


def best_of(rows: list[Row], *, higher: bool) -> Row:
    """The row of the best metric, what is not finite being worst; of equals the lowest loss, then the first."""

    def worth(row: Row) -> tuple[float, ...]:
        scores = number(row["final_metric"]) * (1 if higher else -1), -number(row["final_loss"])
        return tuple(score if math.isfinite(score) else -math.inf for score in scores)

    return max(rows, key=worth)


def as_good(best: list[Row], *, higher: bool) -> list[Row]:
    """The rows as good as the best one: within its standard error over seeds, or 2 % of the way to the worst."""
    scores = [number(row["final_metric"]) * (1 if higher else -1) for row in best]
    if not finite(scores):
        return []
    top = best_of(best, higher=higher)
    seeds = finite(top["metrics"])
    error = float(np.std(seeds)) / len(seeds) ** 0.5 if seeds else 0.0
    slack = max(error, 0.02 * (max(finite(scores)) - min(finite(scores))))
    return [row for row, score in zip(best, scores, strict=True) if max(finite(scores)) - score <= slack]


def one_budget(best: list[Row]) -> tuple[str, list[Row]]:
    """The rows at equal data, or where there are none at equal updates, and how that is called."""
    budget = "data" if any(row["budget"] == "data" for row in best) else "updates"
    return BUDGETS[budget], [row for row in best if row["budget"] == budget]


def time_to_reach(best: list[Row], *, higher: bool) -> tuple[float, list[Row]]:
    """The training loss at which the slowest of the windows as good as the best ends, and when each row first had it.

    Returns:
      The loss, NaN if there is none, and for each row its series and window, and the updates, steps and seconds to that
      loss, NaN if it never had it. A row's seconds are taken to be as many for each of its updates.
    """
    _, mine = one_budget(best)
    ends = [losses[-1] for row in as_good(mine, higher=higher) if (losses := finite((row["curve"] or {}).get("loss")))]
    level = max(ends, default=math.nan)

    def first(row: Row) -> Row:
        curve = {"loss": [], "updates": [], "steps": [], **(row["curve"] or {})}
        places = zip(*(curve[name] or [] for name in ("loss", "updates", "steps")), strict=False)
        _, updates, steps = next((at for at in places if number(at[0]) <= level), (None, None, None))
        seconds = number(row["seconds"]) * number(updates) / (number(row["updates"]) or math.nan)
        reached = zip(REACHED, map(number, (updates, steps, seconds)), strict=True)
        return {"series": row["series"], "window": row["window"], **dict(reached)}

    return level, [first(row) for row in mine] if ends else []


def who_is_first(reached: list[Row]) -> str:
    """A sentence: which windows reached the loss first, in updates, in steps and in seconds."""
    firsts: dict[str, list[str]] = {}
    for unit in REACHED:
        there = [row for row in reached if math.isfinite(row[unit])]
        if there:
            row = min(there, key=lambda row: row[unit])
            firsts.setdefault(name_of(row), []).append(f"{value(row[unit])} {unit}")
    told = "; ".join(f"{name} after {', '.join(when)}" for name, when in firsts.items())
    never = sum(not math.isfinite(row["updates"]) for row in reached)
    return (told and f"First there: {told}.") + (f" {never} of {len(reached)} never get there." if never else "")


def why_both(recommended: Row, suggested: Row, best: list[Row], bias: list[Row], metric: Row) -> str:
    """A sentence on the window that is recommended beside the one that the gradients suggest, made from their numbers.

    Args:
      recommended: of the results: ``window``, ``carry``, ``influence`` and perhaps ``params``; empty if none is.
      suggested: by model, of which the trained one counts more: ``window`` and ``reason``.
      best: a row for each point.
      bias: rows of relative biases.
      metric: its name, and which of ``higher`` and ``lower`` is better.
    """
    model = next((m for m in ("trained", "untrained") if (suggested.get(m) or {}).get("window") is not None), None)
    if model is None:
        return ""
    at, ask, higher = recommended.get("window"), suggested[model]["window"], metric["better"] == "higher"
    if at is None:
        return f"The gradients of the {model} model suggest windows of {ask}; no training tells yet whether that helps."
    _, mine = one_budget(best)
    alike = [row for row in mine if all(row.get(key) == told for key, told in recommended.items() if key in LIKE)]
    here = [row for row in alike if row["window"] == at]
    if not here:
        return ""
    score, top = (value(best_of(rows, higher=higher)["final_metric"]) for rows in (here, mine))
    equals = "the best of all" if score == top else f"as good as the best, {top}, within the spread of seeds"
    measured = f"{metric['name']} {score} with windows of {at}, {equals}"
    place = model, recommended.get("influence"), at
    of_here = (row["relative_bias"] for row in bias if (row["model"], row["influence"], row["window"]) == place)
    off = next((number(x) for x in of_here), math.nan)
    if at == ask:
        known = f" (measured, {value(off)})" if math.isfinite(off) else ""
        return (
            f"Training and gradients agree on {at}: {measured}, and the bias of the gradient within its bound{known}."
        )
    if at > ask:
        between = [row for row in alike if ask <= row["window"] < at]
        shorter = (
            f"{value(best_of(between[-1:], higher=higher)['final_metric'])} with {between[-1]['window']}"
            if between
            else f"windows of {ask} to {at - 1} were not trained"
        )
        return (
            f"Why {at}, when the gradients suggest only {ask}? Both are right: from {ask} on the bias of the gradient is small, but "
            f"a small bias is not yet a good score, and this is what was measured: {measured}; {shorter}."
        )
    reason = (
        f"The bound is cautious: the measured bias of windows of {at} is {value(off)}."
        if off <= SMALL
        else f"Windows of {at} {f'have a gradient off by {value(off)} of its length' if math.isfinite(off) else 'cut the gradient short'}, but "
        + (
            "a carried state can hold what the gradient never saw, so a shorter window may do as well on this task."
            if recommended.get("carry") == "stateful"
            else "even such a gradient can lead to a model that scores as well, and on this task it does."
        )
    )
    return (
        f"Why {at}, when the gradients suggest {ask}? Both are right: {ask} bounds what the gradient misses, {at} is what was "
        f"measured, {measured}. {reason}"
    )


# Numbers


def number(x: Any) -> float:
    return math.nan if x is None else float(x)


def finite(x: Iterable[Any] | None) -> list[float]:
    return [y for y in map(number, x if x is not None else []) if math.isfinite(y)]


def value(x: Any) -> str:
    """What a reader sees of a value: four figures, thousands apart, a dash for what is not finite or not there."""
    if isinstance(x, list | tuple):
        return ", ".join(map(value, x))
    if isinstance(x, bool | str):
        return str(x)
    if x is None or (isinstance(x, float) and not math.isfinite(x)):
        return "–"
    if isinstance(x, float | int):
        return f"{x:,.0f}" if abs(x) >= 10_000 and abs(x) < 1e15 else f"{x:.4g}"
    return str(x)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def name_of(row: Row) -> str:
    return f"window {row['window']}, {row['series']}"
