"""The charts of a sweep's report: Vega-Lite specifications, which ``vl_convert`` draws as SVG without a browser.

Colours are CSS variables, so that a page gives them for light, dark and paper; series differ in marker and dash as well.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from tbptt_jax.study.report.reading import BUDGETS, Row, best_of, capital, finite, name_of, number, one_budget, value

Spec = dict[str, Any]

# Name → colour on a light page and on a dark one. The series are Okabe & Ito's, which the colour-blind tell apart, made
# darker or lighter until each stands 3:1 against its page.
PALETTE = {
    "page": ("#fdfdfc", "#121417"), "ink": ("#1c1f23", "#e8eaed"), "muted": ("#5b626b", "#a3abb5"), "rule": ("#dcdfe3", "#2c3138"),
    "s0": ("#0072b2", "#56b4e9"), "s1": ("#d55e00", "#ff8c42"), "s2": ("#009e73", "#2ecc9b"), "s3": ("#b5598b", "#e39ac4"),
    "s4": ("#a87400", "#f0b429"), "s5": ("#2b8cc4", "#9bd0f0"), "s6": ("#5b5f66", "#b9bec6"),
}  # fmt: skip
SERIES = [f"var(--{name})" for name in PALETTE if re.fullmatch(r"s\d", name)]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left"]
PLASMA = "#0d0887", "#7e03a8", "#cc4778", "#f89540", "#f0f921"  # matplotlib's, at five even places
MODELS = ("untrained", "trained")
LEAST_BIAS = 1e-8  # below what float32 can tell from none
WIDTH = 380
COLOUR: Spec = {"field": "colour", "type": "nominal", "scale": None}  # as the data have it, not in the legend
# A number at an axis, in Vega's language: 20k, 0.05, 1e-6.
PLAIN = "abs(datum.value) >= 1e4 ? format(datum.value, '~s') : datum.value && abs(datum.value) < 1e-3 ? format(datum.value, '~e') : format(datum.value, '~g')"

CONFIG: Spec = {
    "font": "system-ui, sans-serif", "aria": False, "view": {"stroke": None}, "title": {"anchor": "start", "color": "var(--ink)"},
    "axis": {
        "gridColor": "var(--rule)", "domainColor": "var(--muted)", "tickColor": "var(--muted)", "tickSize": 4,
        "labelColor": "var(--muted)", "labelFontSize": 13, "labelOverlap": "greedy", "labelFlush": False,
        "titleColor": "var(--ink)", "titleFontSize": 13, "titleFontWeight": "normal", "titlePadding": 6,
    },
    "legend": {
        "orient": "bottom", "title": None, "labelColor": "var(--ink)", "labelFontSize": 13, "labelLimit": 340, "symbolSize": 60,
        "symbolOpacity": 1, "columnPadding": 28,
        "titleColor": "var(--muted)", "titleFontWeight": "normal", "titleFontSize": 13,
    },
}  # fmt: skip


class Panel(NamedTuple):
    """A chart: its title, what it shows for those who cannot see it, and its specification."""

    title: str
    says: str
    spec: Spec


def svg(panels: list[Panel]) -> str:
    """One panel, without its title, or several with theirs, two or three to a row, as an SVG whose colours are CSS variables."""
    import vl_convert

    if len(panels) == 1:
        spec = {**panels[0].spec, "width": WIDTH, "height": 240, "autosize": {"type": "fit-x", "contains": "padding"}}
    else:
        parts = [{**panel.spec, "title": panel.title, "width": 330, "height": 230} for panel in panels]
        spec = {"concat": parts, "columns": 3 if len(panels) == 3 else 2, "spacing": 40}
    return str(vl_convert.vegalite_to_svg(json.dumps({**spec, "config": CONFIG, "background": None}, allow_nan=False)))


def alone(text: str, palette: dict[str, tuple[str, str]]) -> str:
    """The same SVG as a file of its own, on paper: with the palette's light colours in place of their names."""
    return re.sub(r"var\(--(\w+)\)", lambda name: palette[name[1]][0], text) + "\n"


def window_colours(windows: list[int]) -> dict[str, tuple[str, str]]:
    """A ramp from the shortest window to the longest, each end of it in sight of its page, light and dark."""
    ramp = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in PLASMA])

    def colours(first: float, last: float) -> list[str]:
        at, places = np.linspace(first, last, len(windows)), np.linspace(0, 1, len(ramp))
        rgb = np.stack([np.interp(at, places, channel) for channel in ramp.T], -1).round().astype(int)
        return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in rgb]

    pairs = zip(colours(0, 0.7), colours(0.42, 1), strict=True)
    return {f"w{window}": pair for window, pair in zip(windows, pairs, strict=True)}


def metric_panels(best: list[Row], metric: Row) -> list[Panel]:
    series, unit = names(best), f"{metric['name']}{metric['unit'] and ', '}{metric['unit']}"
    edge = "height" if metric["better"] == "higher" else 0
    panels = []
    for budget, title in BUDGETS.items():
        mine = [row for row in best if row["budget"] == budget]
        if not mine:
            continue
        points, seeds, bands = [], [], []
        for row in mine:
            at = {"x": row["window"], "series": row["series"], "colour": colour_of(row, series)}
            points.append({**at, "y": known(row["final_metric"]), "exact": known(row["exact_metric"])})
            seeds += [{**at, "y": y} for y in finite(row["metrics"])]
            if finite(row["metrics"]):
                bands.append({**at, "low": min(finite(row["metrics"])), "high": max(finite(row["metrics"]))})
        told = [p["y"] for p in [*points, *seeds]] + [p["exact"] for p in points]
        y = scaled("y", unit, told, log=spans(told, 30))
        layers = [
            layer({"type": "area", "opacity": 0.16}, bands, y={**y, "field": "low"}, y2={"field": "high"}, color=COLOUR),
            layer({"type": "circle", "size": 12, "opacity": 0.55}, seeds, y=y, color=COLOUR),
            *lines([p for p in points if p["y"] is not None], series, y),
            layer({"type": "tick", "orient": "horizontal", "size": 18, "thickness": 1.5, "color": "var(--ink)"}, [p for p in points if p["exact"] is not None], y={**y, "field": "exact"}),
            crosses([p for p in points if p["y"] is None], edge),
        ]  # fmt: skip
        top = best_of(mine, higher=metric["better"] == "higher")
        says = f"{metric['name']} against window at {title}. Best: {value(top['final_metric'])} with {name_of(top)}."
        panels.append(Panel(capital(title), says, {"layer": layers, "encoding": {"x": window_axis(mine)}}))
    return panels


def curve_panels(best: list[Row], windows: list[int], level: float) -> list[Panel]:
    def curve(row: Row, against: str) -> list[Spec]:
        told = row["curve"] or {}
        x, loss = told.get(against) or [], told.get("loss") or []
        if len(x) != len(loss):
            return []
        low, high = (told.get(name) or [] for name in ("low", "high"))
        low, high = (low, high) if len(low) == len(high) == len(loss) else (loss, loss)
        every, i = max(1, len(x) // 6), windows.index(row["window"])
        return [
            {"x": at, "y": known(y), "low": known(a), "high": known(b), "window": row["window"], "mark": (n - i) % every == 0}
            for n, (at, y, a, b) in enumerate(zip(x, loss, low, high, strict=True))
        ]  # fmt: skip

    losses = [y for row in best for y in finite((row["curve"] or {}).get("loss"))]
    log = spans(losses, 30)
    y = scaled("y", "training loss", losses, log=log, margin=True)  # the same in each chart, to be compared
    key = {"columns": 6, "title": "window", "symbolType": "circle"}
    colours, shapes = [f"var(--w{w})" for w in windows], [SHAPES[i % len(SHAPES)] for i in range(len(windows))]
    stroke = nominal("window", windows, colours, **key)
    marks = {"stroke": stroke, "fill": stroke, "shape": nominal("window", windows, shapes, columns=6, title="window")}
    budgets = [budget for budget in BUDGETS if any(row["budget"] == budget for row in best)]
    panels = []
    for series in names(best):
        for against, wanted in (("steps", "data"), ("updates", "updates")):
            budget = wanted if wanted in budgets else budgets[0]
            mine = [row for row in best if (row["series"], row["budget"]) == (series, budget)]
            data = [at for row in mine for at in curve(row, against) if at["y"] is not None]
            if not data:
                continue
            band = [at for at in data if None not in (at["low"], at["high"]) and (at["low"] > 0 or not log)]
            x = axis("x", f"{against} of training", axis={"labelExpr": PLAIN, "tickCount": 5})
            layers = [
                layer({"type": "area", "opacity": 0.13}, band, y={**y, "field": "low"}, y2={"field": "high"}, fill=stroke),
                layer({"type": "line", "strokeWidth": 1.6}, data, y=y, stroke=stroke),
                layer({"type": "point", "size": 34, "opacity": 1}, [at for at in data if at["mark"]], y=y, **marks),
            ]  # fmt: skip
            if math.isfinite(level):
                across = {"x": {"value": 0}, "x2": {"value": "width"}}
                layers.append(layer({"type": "rule", "color": "var(--muted)", "strokeDash": [2, 4]}, [{"y": level}], y=y, **across))  # fmt: skip
            says = f"Training loss against {against} at {BUDGETS[budget]}, {series}, a line for each window."
            title = capital(f"{series}: {BUDGETS[budget]}, against {against}")
            panels.append(Panel(title, says, {"layer": layers, "encoding": {"x": x}}))
    return panels


def reach_panels(reached: list[Row]) -> list[Panel]:
    kinds = {unit: (unit, lambda row, unit=unit: row[unit]) for unit in ("steps", "updates", "seconds")}
    return by_window(reached, {f"{capital(unit)} to that loss": kind for unit, kind in kinds.items()}, never=True)


def cost_panels(best: list[Row]) -> list[Panel]:
    budget, mine = one_budget(best)
    return by_window(
        mine,
        {
            f"Time to train, {budget}": ("seconds", lambda row: number(row["seconds"])),
            "Time of an update": ("milliseconds", lambda row: 1e3 * number(row["seconds"]) / (number(row["updates"]) or math.nan)),
            "Memory": ("MiB beside state and data", lambda row: number(row["temp_bytes"]) / 2**20),
        },
    )  # fmt: skip


def by_window(
    rows: list[Row], kinds: dict[str, tuple[str, Callable[[Row], float]]], never: bool = False
) -> list[Panel]:
    """A chart for each kind, its unit and its number of a row; with ``never`` a cross for each row that has none."""
    panels, series = [], names(rows)
    for title, (unit, of) in kinds.items():
        points = [
            {"x": row["window"], "series": row["series"], "colour": colour_of(row, series), "y": known(of(row))}
            for row in rows
        ]
        data, lost = ([point for point in points if (point["y"] is None) == none] for none in (False, True))
        if data:
            told = [point["y"] for point in data]
            layers = lines(data, series, scaled("y", unit, told, log=spans(told, 3)))
            layers += [crosses(lost, 0)] * never
            spec = {"layer": layers, "encoding": {"x": window_axis(rows)}}
            panels.append(Panel(title, f"{title} against window, {unit}.", spec))
    return panels


def bias_panels(bias: list[Row], best: list[Row], suggested: Row) -> list[Panel]:
    series = list(dict.fromkeys([*names(best), *names(bias)]))  # the colours of the other charts
    panels = []
    for model in MODELS:
        mine = [row for row in bias if row["model"] == model and math.isfinite(number(row["relative_bias"]))]
        if not mine:
            continue
        data = []
        for row in sorted(mine, key=lambda row: row["window"]):
            y, error = max(row["relative_bias"], LEAST_BIAS), number(row.get("standard_error"))
            error = error if math.isfinite(error) else 0.0
            data.append({"x": row["window"], "series": row["series"], "y": y, "low": max(y - error, LEAST_BIAS), "high": y + error})  # fmt: skip
        told = [point["y"] for point in data]
        y = scaled("y", "relative bias of the gradient", told, log=spans(told, 3))
        key = {"values": names(mine), "labelExpr": "replace(datum.label, 'stateful, ', '')"}
        layers = [layer({"type": "rule"}, data, y={**y, "field": "low"}, y2={"field": "high"}, stroke=look(series, **key)["stroke"])]  # fmt: skip
        layers += lines(data, series, y, **key)
        window = number((suggested.get(model) or {}).get("window"))
        says = f"Relative bias of each influence's gradient against window, {model} model."
        ticks = [row["window"] for row in mine]
        near = math.isfinite(window) and min(ticks) / 6 < window < 6 * max(ticks)
        if near:
            says += f" A dotted line marks the suggested window, {value(window)}."
            dotted = {"type": "rule", "color": "var(--muted)", "strokeDash": [2, 4], "strokeWidth": 1.5}
            layers.append(layer(dotted, [{"x": window}]))
        x = window_axis(mine, [window] if near else [])
        panels.append(Panel(capital(f"{model} model"), says, {"layer": layers, "encoding": {"x": x}}))
    return panels


def decay_panels(decay: Row) -> list[Panel]:
    data, series = [], []
    for model in (model for model in MODELS if decay.get(model)):
        norms = [number(norm) for norm in decay[model].get("norms") or []]
        name = f"{model}: × {value(decay[model].get('rate'))} a step"
        shown = [{"x": lag, "y": y, "series": name} for lag, y in enumerate(norms, 1) if math.isfinite(y) and y > 0]
        data += shown
        series += [name] * bool(shown)
    if not data:
        return []
    told = [point["y"] for point in data]
    y, x = scaled("y", "norm of the gradient", told, log=spans(told, 3)), axis("x", "lag, steps", axis={"tickCount": 5})
    some = [point for point in data if point["x"] % max(1, len(data) // 20) == 0]
    spec = {"layer": lines(data, series, y, some, first=5), "encoding": {"x": x}}
    says = "How the gradient of a loss shrinks with the steps it goes back, untrained and trained."
    return [Panel("How fast gradients fade", says, spec)]


# The parts of a specification


def names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["series"] for row in rows))


def layer(mark: Spec, data: list[Spec], **encoding: Spec) -> Spec:
    return {"mark": mark, "data": {"values": data}, "encoding": encoding}


def axis(field: str, title: str, **more: Any) -> Spec:
    return {"field": field, "type": "quantitative", "title": title, **more}


def nominal(field: str, domain: list, colours: list, **legend: Any) -> Spec:
    return {"field": field, "type": "nominal", "scale": {"domain": domain, "range": colours}, "legend": legend}


def look(series: list[str], first: int = 0, **legend: Any) -> dict[str, Spec]:
    """How series are drawn: each in a colour and with a marker of its own; without a carried state dashed and hollow."""
    colours = [SERIES[(first + i) % len(SERIES)] for i in range(len(series))]
    hollow = [name.startswith("stateless") for name in series]
    ranges = {
        "stroke": colours,
        "fill": ["var(--page)" if no else colour for colour, no in zip(colours, hollow, strict=True)],
        "shape": [SHAPES[i % len(SHAPES)] for i in range(len(series))],
    }
    legend = {"columns": max(1, WIDTH // (7 * max(map(len, series)) + 34)), **legend}
    return {channel: nominal("series", series, told, **legend) for channel, told in ranges.items()}


def lines(data: list[Spec], series: list[str], y: Spec, some: list[Spec] | None = None, first: int = 0, **legend: Any) -> list[Spec]:  # fmt: skip
    """A line for each series, with markers at its points, or at ``some``."""
    how = look(series, first, **legend)
    dash = {"condition": {"test": "indexof(datum.series, 'stateless') == 0", "value": [5, 3]}, "value": [1, 0]}
    return [
        layer({"type": "line", "strokeWidth": 1.8}, data, y=y, stroke=how["stroke"], strokeDash=dash),
        layer({"type": "point", "size": 46, "strokeWidth": 1.6, "opacity": 1}, data if some is None else some, y=y, **how),
    ]  # fmt: skip


def crosses(data: list[Spec], edge: int | str) -> Spec:
    """What has no number, at the edge where it would lie."""
    return layer({"type": "text", "text": "✕", "fontSize": 13}, data, y={"value": edge}, color=COLOUR)


def colour_of(row: Row, series: list[str], first: int = 0) -> str:
    return SERIES[(first + series.index(row["series"])) % len(SERIES)]


def window_axis(rows: list[Row], also: Iterable[float] = ()) -> Spec:
    """A logarithmic axis with a tick at each window."""
    ticks = sorted({row["window"] for row in rows})
    ends = [min([*ticks, *also]) / 1.2, max([*ticks, *also]) * 1.2]
    scale = {"type": "log", "base": 2, "domain": ends, "nice": False}
    return axis("x", "window, steps", scale=scale, axis={"values": ticks, "format": "d", "grid": True})


def scaled(field: str, title: str, values: Iterable[float | None], *, log: bool, margin: bool = False) -> Spec:
    """A vertical axis that holds the values, with plain numbers on it."""
    seen = finite(values)
    scale: Spec = {"type": "log", "nice": False} if log else {"zero": False}
    if seen:
        low, high = min(seen), max(seen)
        room = (high - low or abs(high) or 1) / 20
        scale["domain"] = [low / 1.25, high * 1.25] if log else [low - room, high + room]
        scale["nice"] = False
    ticks: Spec = {"tickCount": 5, "labelExpr": PLAIN}
    if seen and log:
        steps = (1, 2, 5) if high < 60 * low else (1,)
        tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks["values"] = [
            at for ten in tens for step in steps if low / 1.25 <= (at := float(f"{step}e{ten}")) <= high * 1.25
        ]
    return axis(field, title, scale=scale, axis=ticks)


def spans(values: Iterable[float | None], factor: float) -> bool:
    """Whether the values, all positive, span so many times the least."""
    seen = finite(values)
    return bool(seen) and min(seen) > 0 and max(seen) >= factor * min(seen)


def known(x: Any) -> float | None:
    return number(x) if math.isfinite(number(x)) else None
