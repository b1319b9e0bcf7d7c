"""The charts of a sweep's report: Vega-Lite specifications, which ``vl_convert`` draws as SVG without a browser.

Colours are the variables of ``palette.css``, which has them for light and for dark pages; series, and windows, differ in
their markers as well, and series without a carried state are dashed and hollow.
"""

import importlib.resources
import itertools
import json
import math
from collections.abc import Iterable
from typing import Any

from tbptt_jax.study.report.reading import (
    BUDGETS,
    Row,
    best_of,
    capital,
    column,
    finite,
    is_fixed,
    name_of,
    number,
    one_budget,
    value,
)

Spec = dict[str, Any]

COLOURS, RAMP = [f"var(--s{i})" for i in range(7)], [f"var(--w{i})" for i in range(8)]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left"]
THEME = json.loads((importlib.resources.files(__package__) / "theme.json").read_text(encoding="utf-8"))
LEAST_BIAS = 1e-8  # below what float32 can tell from none
WIDTH = 380
OWN: Spec = {"field": "colour", "type": "nominal", "scale": None}  # the colour that a point brings along, in no legend
BAND: Spec = {"y": {"field": "low"}, "y2": {"field": "high"}}
FIXED = "!datum.scheduled"
DOTTED: Spec = {"type": "rule", "color": "var(--muted)", "strokeDash": [2, 4], "strokeWidth": 1.5}


def svg(panels: list[Spec]) -> str:
    """One chart, without its title, or several with theirs, two or three to a row."""
    import vl_convert

    if len(panels) == 1:
        fit = {"type": "fit-x", "contains": "padding"}
        spec = {**panels[0], "title": None, "width": WIDTH, "height": 240, "autosize": fit}
    else:
        spec = {"concat": [{**panel, "width": 330, "height": 230} for panel in panels]}
        spec |= {"columns": 3 if len(panels) == 3 else 2, "spacing": 40}
    return str(vl_convert.vegalite_to_svg(json.dumps({**spec, "config": THEME}, allow_nan=False)))


def metric_panels(best: list[Row], metric: Row) -> list[Spec]:
    higher, unit = metric["better"] == "higher", ", ".join(filter(None, (metric["name"], metric["unit"])))
    series, panels = names(best), []
    for budget, title in BUDGETS.items():
        mine = [row for row in best if row["budget"] == budget]
        data = [point(row, series, row["final_metric"]) for row in mine]
        for at, row in zip(data, mine, strict=True):
            seeds = finite(row["metrics"])
            at |= {"seeds": seeds, "low": min(seeds, default=None), "high": max(seeds, default=None)}
            at["exact"] = known(row["exact_metric"])
        layers = [
            layer({"type": "area", "opacity": 0.16}, **BAND, color=OWN, filter=FIXED),
            layer(DOTTED, x={"value": 0}, x2={"value": "width"}, color=OWN, filter="datum.scheduled"),
            layer({"type": "circle", "size": 12, "opacity": 0.55}, flatten=["seeds"], y={"field": "seeds"}, color=OWN),
            *lines(series),
            layer({"type": "tick", "orient": "horizontal", "size": 18, "color": "var(--ink)"}, y={"field": "exact"}),
            crosses("height" if higher else 0),
        ]
        y = vertical(unit, [y for at in data for y in (at["y"], at["exact"], *at["seeds"])], log_from=30)
        if mine:
            top = best_of(mine, higher=higher)
            says = f"{metric['name']} against window at {title}. Best: {value(top['final_metric'])}, {name_of(top)}."
            panels.append(panel(capital(title), says, data, windows_along(mine), y, layers))
    return panels


def curve_panels(best: list[Row], windows: list[Any], level: float) -> list[Spec]:
    """A chart for each series and budget, a line for each window; a dotted one at the ``level`` of the loss, if there is one."""
    places, key = range(len(windows)), {"columns": 6, "title": "window"}
    lengths = sum(not isinstance(window, str) for window in windows)
    ramp = [RAMP[round(i * (len(RAMP) - 1) / max(1, lengths - 1))] if i < lengths else "var(--ink)" for i in places]
    stroke = nominal("window", windows, ramp, key)
    shape = nominal("window", windows, [SHAPES[i % len(SHAPES)] for i in places], key)
    marks = {"type": "point", "size": 34, "opacity": 1}
    layers = [
        layer({"type": "area", "opacity": 0.13}, **BAND, fill=stroke),
        layer({"type": "line", "strokeWidth": 1.6}, stroke=stroke),
        layer(marks, filter="datum.mark", stroke=stroke, fill=stroke, shape=shape),
    ]
    if math.isfinite(level):
        layers.append({**layer(DOTTED, x={"value": 0}, x2={"value": "width"}), "data": {"values": [{"y": level}]}})
    y = vertical("training loss", [y for row in best for y in finite((row["curve"] or {}).get("loss"))], log_from=30)

    def curve(row: Row, against: str) -> list[Spec]:
        told = [(row["curve"] or {}).get(name) or [] for name in (against, "loss", "low", "high")]
        every, i = max(1, len(told[0]) // 6), windows.index(row["window"])
        places = enumerate(itertools.zip_longest(*(map(known, each) for each in told)))
        return [
            {"x": x, "y": y, "low": low, "high": high, "window": row["window"], "mark": (n - i) % every == 0}
            for n, (x, y, low, high) in places
        ]

    panels, budgets = [], list(dict.fromkeys(row["budget"] for row in best))
    for series, (against, wanted) in itertools.product(names(best), (("steps", "data"), ("updates", "updates"))):
        budget = wanted if wanted in budgets else budgets[0]
        mine = [row for row in best if (row["series"], row["budget"]) == (series, budget)]
        data = [at for row in mine for at in curve(row, against)]
        if any(None not in (at["x"], at["y"]) for at in data):
            title = capital(f"{series}: {BUDGETS[budget]}, against {against}")
            says = f"Training loss against {against} at {BUDGETS[budget]}, {series}, a line for each window."
            panels.append(panel(title, says, data, along(f"{against} of training"), y, layers))
    return panels


def reach_panels(reached: list[Row]) -> list[Spec]:
    kinds = {f"{capital(unit)} to that loss": (unit, unit, 1.0) for unit in ("steps", "updates", "seconds")}
    return by_window(reached, kinds, never=True)


def cost_panels(best: list[Row]) -> list[Spec]:
    budget, mine = one_budget(best)
    kinds = {
        f"Time to train, {budget}": ("seconds", "seconds", 1.0),
        "Time of an update": ("milliseconds", "each", 1e3),
        "Memory": ("MiB beside state and data", "temp_bytes", 2.0**-20),
    }
    return by_window([{**r, "each": number(r["seconds"]) / (number(r["updates"]) or math.nan)} for r in mine], kinds)


def by_window(rows: list[Row], kinds: dict[str, tuple[str, str, float]], never: bool = False) -> list[Spec]:
    """By title: the unit, the field and what it is multiplied by. With ``never``, a cross where it has no number."""
    series, panels = names(rows), []
    for title, (unit, field, factor) in kinds.items():
        data = [point(row, series, number(row[field]) * factor) for row in rows]
        if told := finite(at["y"] for at in data):
            layers = lines(series) + [crosses(0)] * never
            says = f"{title} against window, {unit}."
            panels.append(panel(title, says, data, windows_along(rows), vertical(unit, told, log_from=3), layers))
    return panels


def bias_panels(bias: list[Row], best: list[Row], suggested: Row) -> list[Spec]:
    series, panels = list(dict.fromkeys([*names(best), *names(bias)])), []  # the colours of the other charts
    for model in ("untrained", "trained"):
        data, mine = [], [row for row in bias if row["model"] == model and finite([row["relative_bias"]])]
        for row in mine:
            y, error = max(row["relative_bias"], LEAST_BIAS), sum(finite([row.get("standard_error")]))
            data.append({**point(row, series, y), "low": max(y - error, LEAST_BIAS), "high": y + error})
        key = {"values": names(mine), "labelExpr": "replace(datum.label, 'stateful, ', '')"}
        window = number((suggested.get(model) or {}).get("window"))
        near = [window] if any(row["window"] / 6 < window < row["window"] * 6 for row in mine) else []
        down = layer(DOTTED, y={"value": 0}, y2={"value": "height"})
        layers = [layer({"type": "rule"}, **BAND, color=OWN), *lines(series, key)]
        layers += [{**down, "data": {"values": [{"x": x}]}} for x in near]
        y = vertical("relative bias of the gradient", [at["y"] for at in data], log_from=3)
        says = f"Relative bias of each influence's gradient against window, {model} model."
        if mine:
            panels.append(panel(capital(f"{model} model"), says, data, windows_along(mine, near), y, layers))
    return panels


def decay_panels(decay: Row) -> list[Spec]:
    data: list[Spec] = []
    for model in (model for model in ("untrained", "trained") if decay.get(model)):
        series = f"{model}: × {value(decay[model].get('rate'))} a step"
        norms = [number(norm) for norm in decay[model].get("norms") or []]
        data += [{"x": lag, "series": series, "y": y} for lag, y in enumerate(norms, 1) if math.isfinite(y) and y > 0]
    y = vertical("norm of the gradient", [at["y"] for at in data], log_from=3)
    layers = lines(names(data), first=5, every=max(1, len(data) // 20))
    says = "How the gradient of a loss shrinks with the steps it goes back, untrained and trained."
    return [panel("How fast gradients fade", says, data, along("lag, steps"), y, layers)] if data else []


def schedule_panels(rows: list[Row], tolerances: Row) -> list[Spec]:
    """Of each schedule the windows and the bounds of their bias over time, a line for each seed."""
    panels = []
    for row in rows:
        title = f"{capital(row['window'])}, {row['series']}, {BUDGETS[row['budget']]}"
        seeds = list(range(len(row["windows"])))
        colour = nominal("seed", seeds, [COLOURS[i % len(COLOURS)] for i in seeds], {"title": "seed", "columns": 8})
        windows = [{"x": x, "y": y, "seed": seed} for seed, each in enumerate(row["windows"]) for x, y in each]
        looks = [
            {"x": look["steps"], "y": known(look["bias_bound"]), "seed": seed, "colour": COLOURS[seed % len(COLOURS)]}
            for seed, each in enumerate(row["looks"]) for look in each
        ]  # fmt: skip
        end = max((at["x"] for at in windows), default=1)
        steps = along("steps of training", scale={"domain": [0, end], "nice": False})
        line = {"type": "line", "interpolate": "step-after", "strokeWidth": 1.8, "opacity": 0.8}
        y = vertical("window, steps", [at["y"] for at in windows], log_from=3)
        if len(lengths := sorted({at["y"] for at in windows})) <= 8:
            y["axis"] = {"values": lengths}
        says = f"The windows of each seed against the steps read: {title}."
        panels.append(panel(f"{title}: its windows", says, windows, steps, y, [layer(line, stroke=colour)]))
        if bounds := finite(at["y"] for at in looks):
            level = tolerances.get(row["window"])
            layers = [
                layer({"type": "line", "strokeWidth": 1.2, "opacity": 0.6}, stroke=colour),
                layer({"type": "point", "size": 40, "opacity": 1}, stroke=colour, fill=colour),
                crosses(0),
            ]
            if level is not None:
                across = layer(DOTTED, x={"value": 0}, x2={"value": "width"})
                layers.append({**across, "data": {"values": [{"y": level}]}})
            y = vertical("bound of the relative bias", [*bounds, *([level] if level else [])], log_from=3)
            says = f"The bound of the bias of each seed's windows against the steps read: {title}."
            panels.append(panel(f"{title}: their bias", says, looks, steps, y, layers))
    return panels


# The parts of a specification


def panel(title: str, says: str, data: list[Spec], x: Spec, y: Spec, layers: list[Spec]) -> Spec:
    """A chart, and in words what it shows for those who cannot see it."""
    told = {"title": title, "description": says, "data": {"values": data}}
    return {**told, "encoding": {"x": x, "y": y}, "layer": layers}


def layer(mark: Spec, *, flatten: Any = None, filter: Any = None, **encoding: Any) -> Spec:
    transform = [{"flatten": flatten}] * bool(flatten) + [{"filter": filter}] * bool(filter)
    return {"mark": mark, "transform": transform, "encoding": encoding}


def lines(series: list[str], key: Spec | None = None, first: int = 0, every: int = 1) -> list[Spec]:
    """A line for each series in a colour and with a marker of its own."""
    colours = [COLOURS[(first + i) % len(COLOURS)] for i in range(len(series))]
    hollow = ["var(--page)" if name.startswith("stateless") else own for name, own in zip(series, colours, strict=True)]
    ranges = {"stroke": colours, "fill": hollow, "shape": [SHAPES[i % len(SHAPES)] for i in range(len(series))]}
    key = {"title": None, "columns": max(1, WIDTH // (7 * max(map(len, series), default=1) + 34)), **(key or {})}
    how: Spec = {channel: nominal("series", series, told, key) for channel, told in ranges.items()}
    dash = {"condition": {"test": "indexof(datum.series, 'stateless') == 0", "value": [5, 3]}, "value": [1, 0]}
    marks = {"type": "point", "size": 46, "strokeWidth": 1.6, "opacity": 1}
    line = layer({"type": "line", "strokeWidth": 1.8}, stroke=how["stroke"], strokeDash=dash, filter=FIXED)
    return [line, layer(marks, filter=f"datum.x % {every} == 0", **how)]


def crosses(edge: int | str) -> Spec:
    """What has no number, at the edge where it would lie."""
    cross = {"type": "text", "text": "✕", "fontSize": 13}
    return layer(cross, filter="!isValid(datum.y)", y={"value": edge}, color=OWN)


def point(row: Row, series: list[str], y: Any) -> Spec:
    colour = COLOURS[series.index(row["series"]) % len(COLOURS)]
    at = {
        "x": column(row),
        "series": row["series"],
        "colour": colour,
        "y": known(y),
    }
    return at if is_fixed(row) else {**at, "scheduled": True}


def nominal(field: str, domain: list, told: list, legend: Spec) -> Spec:
    return {"field": field, "type": "nominal", "scale": {"domain": domain, "range": told}, "legend": legend}


def along(title: str, **more: Any) -> Spec:
    return {"field": "x", "type": "quantitative", "title": title, **more}


def windows_along(rows: list[Row], also: Iterable[float] = ()) -> Spec:
    """A logarithmic axis with a tick at each window, and those of schedules beside the longest."""
    ticks = sorted({column(row) for row in rows})
    ends = [min([*ticks, *also]) / 1.2, max([*ticks, *also]) * 1.2]
    scale = {"type": "log", "base": 2, "domain": ends, "nice": False}
    label = "datum.label"
    for x, name in {column(row): row["window"] for row in rows if not is_fixed(row)}.items():
        label = f"datum.value == {x} ? {json.dumps(name)} : {label}"
    return along("window, steps", scale=scale, axis={"values": ticks, "labelExpr": label})


def vertical(title: str, values: Iterable[float | None], *, log_from: float) -> Spec:
    """A vertical axis that holds the values, logarithmic where they are positive and span so many times the least."""
    seen = finite(values) or [0.0]
    low, high = min(seen), max(seen)
    log, room = low > 0 and high >= log_from * low, (high - low or abs(high) or 1) / 20
    ends = [low / 1.25, high * 1.25] if log else [low - room, high + room]
    tens = [float(f"{step}e{ten}") for ten in range(-9, 16) for step in ((1, 2, 5) if high < 60 * low else (1,))]
    axis = {"values": [x for x in tens if ends[0] <= x <= ends[1]]} if log else {}
    scale = {"type": "log" if log else "linear", "domain": ends, "nice": False, "clamp": True}
    return {"field": "y", "type": "quantitative", "title": title, "scale": scale, "axis": axis}


def names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["series"] for row in rows))


def known(x: Any) -> float | None:
    return number(x) if math.isfinite(number(x)) else None
