"""The report of a sweep over window lengths: one page that opens anywhere, its charts as PNGs, its rows as CSV.

python -m experiments.report runs/truncation_sweep      makes it again, from the results.json there
"""

import csv
import functools
import html
import io
import json
import math
import pathlib
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from tbptt_jax.study import lock
from tbptt_jax.study import writing as launch

Row = dict[str, Any]
Series = tuple[str, str]  # carry, influence

POINT = ("budget", "carry", "influence", "window")
FIELDS = (
    *("task", *POINT, "learning_rate", "seeds", "updates", "steps", "final_metric", "exact_metric", "final_loss"),
    *("metrics", "losses", "seconds", "compile_seconds", "temp_bytes"),
)
BUDGETS = {"data": "equal data", "updates": "equal updates"}
MODELS = ("untrained", "trained")

# Name → colour on a light page and on a dark one. The series are Okabe & Ito's, which the colour-blind tell apart, made
# darker or lighter until each stands 3:1 against its page. The page knows them as CSS variables of these names.
PALETTE = {
    "page": ("#fdfdfc", "#121417"), "ink": ("#1c1f23", "#e8eaed"), "muted": ("#5b626b", "#a3abb5"), "rule": ("#dcdfe3", "#2c3138"),
    "s0": ("#0072b2", "#56b4e9"), "s1": ("#d55e00", "#ff8c42"), "s2": ("#009e73", "#2ecc9b"), "s3": ("#b5598b", "#e39ac4"),
    "s4": ("#a87400", "#f0b429"), "s5": ("#2b8cc4", "#9bd0f0"), "s6": ("#5b5f66", "#b9bec6"),
}  # fmt: skip
PAGE, INK, MUTED, RULE, *SERIES = (light for light, _ in PALETTE.values())
MARKERS = "os^Dvp<*>h"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "tbptt_jax", "text.parse_math": False, "font.size": 10, "axes.titlesize": 11,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
    "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": PAGE, "figure.facecolor": PAGE,
    "axes.grid": True, "grid.color": RULE, "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 9.5,
    "lines.linewidth": 1.8, "lines.markersize": 6,
}  # fmt: skip


class Panel(NamedTuple):
    """A chart: its title, what it shows for those who cannot see it, how it is drawn, and what its legend lists."""

    title: str
    says: str
    draw: Callable[[Axes], None]
    lists: str | None = None


def write(directory: pathlib.Path, results: dict[str, Any]) -> None:
    """Writes ``report.html``, ``rows.csv`` and a PNG for each kind of chart that there is something to draw for.

    Everything is drawn before anything is written; each file is then written whole or not at all. The same results give the
    same bytes.

    Args:
      directory: exists.
      results: of :mod:`experiments.truncation_sweep`, or its ``results.json``. Any number may be None or NaN (the training
        diverged), any list empty.

    Raises:
      ValueError: if the results are not those of a sweep.
    """
    missing = [name for name in ("task", "metric", "rows") if name not in results]
    if missing:
        raise ValueError(f"The results have no {', '.join(missing)}: give those of experiments.truncation_sweep.")
    rows = [dict.fromkeys(FIELDS) | row for row in results["rows"]]
    metric = {"name": "metric", "better": "lower", "unit": "", **results["metric"]}
    bias = results.get("bias") or []
    windows = sorted({row["window"] for row in [*rows, *bias]})
    best = best_rates(rows, higher=metric["better"] == "higher")
    looks = series_looks([(row["carry"], row["influence"]) for row in rows])
    colours = window_colours(windows)
    palette = {**PALETTE, **{f"w{window}": pair for window, pair in colours.items()}}
    charts = {
        "final_metric": metric_panels(best, looks, metric),
        "curves": curve_panels(best, looks, {window: light for window, (light, _) in colours.items()}),
        "cost": cost_panels(best, looks),
        "bias": bias_panels(bias, looks, results.get("suggested") or {}),
        "decay": decay_panels(results.get("decay") or {}),
    }
    with matplotlib.rc_context(STYLE):
        files: dict[str, bytes] = {f"{name}.png": png(panels) for name, panels in charts.items() if panels}
        grids = {name: [svg(p, f"{name}{i}", palette) for i, p in enumerate(ps)] for name, ps in charts.items()}
    files["rows.csv"] = csv_of(rows).encode()
    files["report.html"] = page(results, metric, rows, best, bias, grids, palette).encode()

    for name in charts:
        if f"{name}.png" not in files:
            (directory / f"{name}.png").unlink(missing_ok=True)  # of other results, before these
    for name, content in files.items():
        with launch.whole(directory / name) as path:
            path.write_bytes(content)


def best_rates(rows: list[Row], *, higher: bool) -> list[Row]:
    """Of each budget, carry, influence and window the row whose learning rate did best, ordered by window."""

    points: dict[tuple, list[Row]] = {}
    for row in rows:
        points.setdefault(tuple(row[name] for name in POINT), []).append(row)
    return sorted((best_of(mine, higher) for mine in points.values()), key=lambda row: row["window"])


def best_of(rows: list[Row], higher: bool) -> Row:
    """The row of the best metric, what is not finite being worst; of equals the lowest loss, then the first."""

    def worth(row: Row) -> tuple[float, ...]:
        scores = number(row["final_metric"]) * (1 if higher else -1), -number(row["final_loss"])
        return tuple(score if math.isfinite(score) else -math.inf for score in scores)

    return max(rows, key=worth)


# The charts


def series_looks(series: Iterable[Series]) -> dict[Series, Row]:
    """How each series is drawn: its colour and marker; without a carried state dashed and hollow."""
    looks: dict[Series, Row] = {}
    for i, (carry, influence) in enumerate(dict.fromkeys(series)):
        look: Row = {"color": SERIES[i % len(SERIES)], "marker": MARKERS[i % len(MARKERS)]}
        hollow = {"linestyle": "--", "markerfacecolor": PAGE} if carry == "stateless" else {}
        looks[carry, influence] = {"label": f"{carry}, {influence}", **look, **hollow}
    return looks


def window_colours(windows: list[int]) -> dict[int, tuple[str, str]]:
    """A ramp from the shortest window to the longest, each end of it in sight of its page, light and dark."""
    ramp = matplotlib.colormaps["plasma"]
    light, dark = np.linspace(0, 0.7, len(windows)), np.linspace(0.42, 1, len(windows))
    return {k: (to_hex(ramp(x)), to_hex(ramp(y))) for k, x, y in zip(windows, light, dark, strict=True)}


def metric_panels(best: list[Row], looks: dict[Series, Row], metric: Row) -> list[Panel]:
    higher = metric["better"] == "higher"

    def draw(mine: list[Row], axes: Axes) -> None:
        against_window(axes, [row["window"] for row in mine])
        for series, points in by_series(mine, looks):
            x, look = [row["window"] for row in points], looks[series]
            seeds = [finite(row["metrics"]) for row in points]
            low, high = ([f(each) if len(each) else np.nan for each in seeds] for f in (np.min, np.max))
            axes.fill_between(x, low, high, color=look["color"], alpha=0.16, linewidth=0)
            for window, each in zip(x, seeds, strict=True):
                axes.plot([window] * len(each), each, ".", color=look["color"], markersize=4, alpha=0.55)
            mean = numbers([row["final_metric"] for row in points])
            axes.plot(x, mean, **look)
            lost = [window for window, y in zip(x, mean, strict=True) if not np.isfinite(y)]
            edge: Row = {"transform": axes.get_xaxis_transform(), "clip_on": False, "in_layout": False, "zorder": 5}
            axes.plot(lost, [0.0 if higher else 1.0] * len(lost), "x", color=look["color"], markeredgewidth=2, **edge)
        exact = [row for row in mine if math.isfinite(number(row["exact_metric"]))]
        if exact:
            dash: Row = {"color": INK, "markersize": 15, "markeredgewidth": 1.4, "label": "exact (theory)", "zorder": 4}
            axes.plot([row["window"] for row in exact], [row["exact_metric"] for row in exact], "_", **dash)
        if any(not math.isfinite(number(row["final_metric"])) for row in mine):
            axes.plot([], [], "x", color=MUTED, markeredgewidth=2, label="not finite")
        scale(axes, [row["final_metric"] for row in mine])
        axes.set_ylabel(f"{metric['name']}{metric['unit'] and ', '}{metric['unit']}")

    panels = []
    for budget, title in BUDGETS.items():
        mine = [row for row in best if row["budget"] == budget]
        if mine:
            top = best_of(mine, higher)
            says = (
                f"{metric['name']} against window at {title}. Best: {value(top['final_metric'])} with {name_of(top)}."
            )
            panels.append(Panel(capital(title), says, functools.partial(draw, mine)))
    return panels


def curve_panels(best: list[Row], looks: dict[Series, Row], colours: dict[int, str]) -> list[Panel]:
    def curve(row: Row, key: str) -> np.ndarray:
        return numbers((row["curve"] or {}).get(key))

    losses = finite([y for row in best for y in curve(row, "loss")])

    def draw(mine: list[Row], against: str, axes: Axes) -> None:
        for row in mine:
            colour, i = colours[row["window"]], list(colours).index(row["window"])
            x, y, low, high = (curve(row, key) for key in (against, "loss", "low", "high"))
            kept = np.unique(np.linspace(0, len(y) - 1, 80).round().astype(int))  # as many as the eye sees
            if len(low) == len(high) == len(y):
                axes.fill_between(x[kept], low[kept], high[kept], color=colour, alpha=0.13, linewidth=0)
            every = max(1, len(kept) // 6)
            marks: Row = {"marker": MARKERS[i % len(MARKERS)], "markevery": (i * every // len(colours), every)}
            axes.plot(x[kept], y[kept], color=colour, label=str(row["window"]), linewidth=1.5, markersize=5, **marks)
        if len(losses):  # the same in each chart, to be compared
            least, most = losses.min(), losses.max()
            margin = (most - least or abs(most) or 1) / 20
            axes.set_ylim((least / 1.2, most * 1.2) if scale(axes, losses) else (least - margin, most + margin))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
        axes.set(xlabel=f"{against} of training", ylabel="training loss")

    panels = []
    budgets = [budget for budget in BUDGETS if any(row["budget"] == budget for row in best)]
    for series in looks:
        for against, wanted in (("steps", "data"), ("updates", "updates")):
            budget = wanted if wanted in budgets else budgets[0]
            mine = [row for row in best if (row["carry"], row["influence"]) == series and row["budget"] == budget]
            mine = [row for row in mine if 0 < len(curve(row, "loss")) == len(curve(row, against))]
            if mine:
                title = capital(f"{looks[series]['label']}: {BUDGETS[budget]}, against {against}")
                says = f"Training loss against {against} at {BUDGETS[budget]}, {looks[series]['label']}, a line for each window."
                panels.append(Panel(title, says, functools.partial(draw, mine, against), "window"))
    return panels


def cost_panels(best: list[Row], looks: dict[Series, Row]) -> list[Panel]:
    budget = "data" if any(row["budget"] == "data" for row in best) else "updates"
    mine = [row for row in best if row["budget"] == budget]
    kinds = {
        f"Time to train, {BUDGETS[budget]}": ("seconds", lambda row: number(row["seconds"])),
        "Time of an update": ("milliseconds", lambda row: 1e3 * number(row["seconds"]) / (row["updates"] or math.nan)),
        "Memory": ("MiB beside state and data", lambda row: number(row["temp_bytes"]) / 2**20),
    }

    def draw(unit: str, of: Callable[[Row], float], axes: Axes) -> None:
        against_window(axes, [row["window"] for row in mine])
        for series, points in by_series(mine, looks):
            axes.plot([row["window"] for row in points], [of(row) for row in points], **looks[series])
        scale(axes, [of(row) for row in mine], log=True)
        axes.set_ylabel(unit)

    return [
        Panel(title, f"{title} against window, {unit}.", functools.partial(draw, unit, of))
        for title, (unit, of) in kinds.items()
        if any(math.isfinite(of(row)) for row in mine)
    ]


def bias_panels(bias: list[Row], looks: dict[Series, Row], suggested: Row) -> list[Panel]:
    influences = list(dict.fromkeys(row["influence"] for row in bias))
    others = series_looks([*looks, *(("stateful", influence) for influence in influences)])
    floor = 1e-8  # below what float32 can tell from none

    def draw(mine: list[Row], window: float, axes: Axes) -> None:
        against_window(axes, [row["window"] for row in mine], also=window)
        for influence in influences:
            points = sorted((row for row in mine if row["influence"] == influence), key=lambda row: row["window"])
            y = np.maximum(numbers([row["relative_bias"] for row in points]), floor)
            x, look = [row["window"] for row in points], others["stateful", influence]
            axes.plot(x, y, **{**look, "label": influence})
            error = np.nan_to_num(numbers([row.get("standard_error") for row in points]))
            if error.any():  # of a mean over draws
                low = np.minimum(error, y - floor)
                axes.errorbar(x, y, yerr=[low, error], fmt="none", ecolor=look["color"], elinewidth=1, capsize=3)
        if axes.get_xlim()[0] < window < axes.get_xlim()[1]:
            axes.axvline(window, color=MUTED, linestyle=":", linewidth=1.4, label="suggested window")
        scale(axes, np.maximum(numbers([row["relative_bias"] for row in mine]), floor), log=True)
        axes.set_ylabel("relative bias of the gradient")

    panels = []
    for model in MODELS:
        mine = [row for row in bias if row["model"] == model]
        if mine:
            window = number((suggested.get(model) or {}).get("window"))
            says = f"Relative bias of each influence's gradient against window, {model} model."
            panels.append(Panel(capital(f"{model} model"), says, functools.partial(draw, mine, window)))
    return panels


def decay_panels(decay: Row) -> list[Panel]:
    found = {model: decay[model] for model in MODELS if decay.get(model) and decay[model].get("norms")}

    def draw(axes: Axes) -> None:
        for i, (model, fading) in enumerate(found.items()):
            norms = numbers(fading["norms"])
            seen = np.isfinite(norms) & (norms > 0)
            look: Row = {"color": SERIES[5 + i], "marker": "<>"[i], "linestyle": ("-", "--")[i]}
            label = f"{model}: × {value(fading.get('rate'))} a step"
            axes.plot(np.arange(1, len(norms) + 1)[seen], norms[seen], label=label, markevery=0.1, **look)
        scale(axes, [y for fading in found.values() for y in fading["norms"]], log=True)
        axes.set(xlabel="lag, steps", ylabel="norm of the gradient")

    says = "How the gradient of a loss shrinks with the steps it goes back, untrained and trained."
    return [Panel("How fast gradients fade", says, draw)] if found else []


def by_series(rows: list[Row], looks: dict[Series, Row]) -> list[tuple[Series, list[Row]]]:
    grouped = [(series, [row for row in rows if (row["carry"], row["influence"]) == series]) for series in looks]
    return [(series, mine) for series, mine in grouped if mine]


def against_window(axes: Axes, windows: list[int], also: float = math.nan) -> None:
    """A logarithmic axis with a tick at each window, and in sight of ``also`` if that is not far off."""
    ticks = sorted(set(windows))
    low, high = ticks[0] / 1.25, ticks[-1] * 1.25
    if high / 6 < also * 1.1 < 6 * high:
        low, high = min(low, also / 1.1), max(high, also * 1.1)
    room, labels, last = math.log(high / low) / 13, [], 0.0  # a label's width
    for tick in ticks:
        labels.append(str(tick) if last == 0 or math.log(tick / last) > room else "")
        last = tick if labels[-1] else last
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, labels)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(low, high)
    axes.set_xlabel("window, steps")


def scale(axes: Axes, values: Iterable[float | None], *, log: bool = False) -> bool:
    """Makes the vertical axis logarithmic, with plain numbers on it, if the values span a factor of 30, or if ``log`` of 3. Whether it is."""
    seen = finite(list(values))
    if not len(seen) or seen.min() <= 0 or seen.max() < (3 if log else 30) * seen.min():
        return False
    axes.set_yscale("log")
    if seen.max() < 60 * seen.min():
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short(y)))
    return True


def figure_of(panels: list[Panel], *, titled: bool) -> Figure:
    """The panels side by side, two or three to a row, under them one legend for what is in any of them."""
    columns = min(len(panels), 3 if len(panels) == 3 else 2)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.7 * lines), layout="constrained")
    legend: dict[str, Any] = {}
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        panel.draw(axes)
        if titled:
            axes.set_title(panel.title, loc="left")
        handles, labels = axes.get_legend_handles_labels()
        legend.update(zip(labels, handles, strict=True))
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    if legend:
        fitting = max(1, 60 * columns // (max(map(len, legend)) + 6))
        ncols = -(-len(legend) // -(-len(legend) // fitting))  # as even as the lines that it takes allow
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=ncols, title=panels[0].lists)
    return figure


def png(panels: list[Panel]) -> bytes:
    to = io.BytesIO()
    figure_of(panels, titled=True).savefig(to, format="png", dpi=130, metadata={"Software": None})
    return to.getvalue()


def svg(panel: Panel, name: str, palette: dict[str, tuple[str, str]]) -> str:
    """The chart as a figure to put into a page: the page's colours and type, and ids that start with ``name``."""
    to = io.StringIO()
    figure_of([panel], titled=False).savefig(to, format="svg", transparent=True)
    text = to.getvalue()
    size = re.search(r'viewBox="[^"]*"', text)
    assert size
    body = text[text.index("</metadata>") + len("</metadata>") :]
    variables = {light: f"var(--{key})" for key, (light, _) in palette.items()}
    for pattern, by in (
        (r"<style.*?</style>", ""),
        (r' id="(?![mp][0-9a-f]{10}")[^"]*"', ""),  # but those of markers and clips, which are pointed at
        (r'( id="|href="#|url\(#)', rf"\1{name}-"),
        ("xlink:href", "href"),
        (r'font-family: [^;"]*', "font-family: inherit"),
        (r"(\.\d)\d+(?=[^<>]*>)", r"\1"),  # of coordinates, not of text
        (r"\s*\n\s*", "\n"),
        ("|".join(variables), lambda colour: variables[colour.group()]),
    ):
        body = re.sub(pattern, by, body, flags=re.DOTALL)
    says = html.escape(panel.says)
    return (
        f'<figure><figcaption>{html.escape(panel.title)}</figcaption>\n<svg role="img" aria-label="{says}" {size.group()}>'
        f"<title>{says}</title>{body.strip()}</figure>"
    )


# The page

CSS = """
* { box-sizing: border-box }
html { color-scheme: light dark; -webkit-text-size-adjust: 100% }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
main { max-width: 78rem; margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 3rem) 4rem }
h1 { font-size: clamp(1.45rem, 1rem + 2.2vw, 2.4rem); line-height: 1.22; letter-spacing: -.015em; font-weight: 650;
  max-width: min(100%, 34em); margin: .4rem 0 1.6rem; text-wrap: balance; overflow-wrap: anywhere }
h2 { font-size: 1.35rem; line-height: 1.3; letter-spacing: -.01em; margin: 0 0 .5rem }
p { max-width: 44rem; margin: 0 0 .8rem }
.lead { font-size: 1.1rem; max-width: 46em; margin: 0 0 1.2rem }
.kind { color: var(--muted); font-size: .9rem; margin: 0 }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; font-size: .9rem; padding: .8rem 0;
  border: solid var(--rule); border-width: 1px 0 }
a { color: var(--s0); text-underline-offset: .2em; text-decoration-thickness: 1px }
header + section { border-top: 0; padding-top: 0; margin-top: 1.8rem }
section { padding-top: 2rem; margin-top: 1.6rem; border-top: 1px solid var(--rule) }
.facts { display: grid; gap: 1.2rem 2rem; margin: 0 0 1.8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)) }
.facts div { border-left: 3px solid var(--s0); padding-left: .9rem }
dt { color: var(--muted); font-size: .85rem }
dd { margin: 0; overflow-wrap: anywhere }
.facts dd:nth-of-type(1) { font-size: 1.3rem; font-weight: 600; line-height: 1.35 }
.facts dd + dd { font-size: .9rem }
.grid { display: grid; gap: 1.6rem 2.4rem; margin: 1.2rem 0; grid-template-columns: repeat(auto-fill, minmax(min(100%, max(22rem, 40%)), 1fr)) }
.three { grid-template-columns: repeat(auto-fill, minmax(min(100%, max(19rem, 30%)), 1fr)) }
figure { margin: 0; min-width: 0; max-width: 42rem }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .35rem }
figure svg { display: block; width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt }
.scroll { overflow-x: auto; max-height: 34rem; border: 1px solid var(--rule); border-radius: 6px; margin: .5rem 0 1rem; width: fit-content; max-width: 100% }
table { border-collapse: separate; border-spacing: 0; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .38rem .8rem; white-space: nowrap; border-bottom: 1px solid var(--rule); vertical-align: top }
tr:last-child > * { border-bottom: 0 }
thead th { position: sticky; top: 0; background: var(--page); color: var(--muted); font-weight: 600 }
.number { text-align: right }
.long { white-space: normal; min-width: 20rem; overflow-wrap: anywhere }
.heat th, .heat td { padding: .36rem .42rem }
.heat [scope=row] { position: sticky; left: 0; background: var(--page); font-weight: 600; color: var(--muted) }
.heat td { text-align: right; background: color-mix(in srgb, var(--s0) var(--heat, 0%), transparent) }
.heat .best { font-weight: 700; box-shadow: inset 0 0 0 2px var(--s0) }
summary { cursor: pointer; font-weight: 600; padding: .3rem 0; width: fit-content }
:focus-visible { outline: 2px solid var(--s0); outline-offset: 2px }
pre { background: color-mix(in srgb, var(--ink) 5%, transparent); border-radius: 6px; padding: .9rem 1rem; overflow-x: auto; margin: .4rem 0 1.2rem }
code, pre { font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
"""


def page(
    results: dict[str, Any],
    metric: Row,
    rows: list[Row],
    best: list[Row],
    bias: list[Row],
    grids: dict[str, list[str]],
    palette: dict[str, tuple[str, str]],
) -> str:
    """The report, from the top in the order in which a reader decides."""
    higher, name = metric["better"] == "higher", str(metric["name"])
    recommended = results.get("recommendation") or {}
    sentence = recommended.get("sentence") or "No window is recommended."
    advice, _, because = str(sentence).partition(": ")
    advice, because = (f"{advice}." if because else advice), capital(because)
    rates = {row["learning_rate"] for row in rows}
    sections = [
        (
            "result",
            f"{capital(name)} by window",
            result_section(best, grids["final_metric"], metric, len(rates), str(results.get("about") or "")),
        ),
        ("curves", "Learning curves", curves_section(grids["curves"])),
        ("cost", "Time and memory", cost_section(grids["cost"])),
        ("gradient", "Gradient bias", gradient_section(results, bias, grids)),
        ("rates", "Learning rates", rates_section(rows, best, metric)),
        ("failed", "Failed points", failed_section(results.get("failed") or [])),
        ("rows", "All rows", rows_section(rows)),
        ("repeat", "Repeat this run", repeat_section(results, rows)),
    ]
    sections = [section for section in sections if section[2]]
    links = "\n".join(f'<a href="#{key}">{html.escape(title)}</a>' for key, title, _ in sections)
    body = "\n".join(
        f'<section aria-labelledby="{key}"><h2 id="{key}">{html.escape(title)}</h2>\n{text}</section>'
        for key, title, text in sections
    )
    light, dark = ("".join(f"--{key}:{colours[i]};" for key, colours in palette.items()) for i in (0, 1))
    title = f"Window lengths on {results['task']}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<style>
:root{{{light}}}
@media (prefers-color-scheme: dark){{:root{{{dark}}}}}{CSS}</style>
</head>
<body>
<main>
<header>
<p class="kind">Truncated backpropagation through time: {html.escape(title[0].lower() + title[1:])}</p>
<h1>{html.escape(advice)}</h1>
<p class="lead">{html.escape(because)}</p>
{facts(recommended, best, results.get("suggested") or {}, name, higher)}
<nav aria-label="Sections">{links}</nav>
</header>
{body}
</main>
</body>
</html>
"""


def facts(recommended: Row, best: list[Row], suggested: Row, name: str, higher: bool) -> str:
    told = []
    if recommended.get("window") is not None:
        how = f"{recommended.get('carry', '')}, {recommended.get('influence', '')}".strip(", ")
        told.append(("Recommended", f"window {value(recommended['window'])}", how))
    for budget, title in BUDGETS.items():
        mine = [row for row in best if row["budget"] == budget]
        if mine and math.isfinite(number(best_of(mine, higher)["final_metric"])):
            row = best_of(mine, higher)
            told.append((f"Best {name} at {title}", f"{row['final_metric']:#.4g}", name_of(row)))
    chosen = {model: suggested[model] for model in MODELS if (suggested.get(model) or {}).get("window") is not None}
    if chosen:
        *others, (model, choice) = chosen.items()
        small = "; ".join([f"{model} model", *(f"{value(other['window'])} for the {name}" for name, other in others)])
        told.append(("Suggested by the gradients", f"window {value(choice['window'])}", small))
    items = (
        f"<div><dt>{html.escape(term)}</dt><dd>{html.escape(big)}</dd><dd>{html.escape(small)}</dd></div>"
        for term, big, small in told
    )
    return f'<dl class="facts">{"".join(items)}</dl>'


def result_section(best: list[Row], charts: list[str], metric: Row, rates: int, about: str) -> str:
    chosen = "at the learning rate that did best for it" if rates > 1 else "at the one learning rate tried"
    exact = any(math.isfinite(number(row["exact_metric"])) for row in best)
    lost = any(not math.isfinite(number(row["final_metric"])) for row in best)
    above = said(
        about,
        f"Each point is the mean over seeds of the final {metric['name']} ({metric['better']} is better) with windows of that "
        f"many steps, {chosen}; the band and the small dots are the seeds. Look for the shortest window after which the line "
        "is flat.",
    )
    below = said(
        "Equal data and equal updates differ because a short window makes more updates from the same steps. At equal data "
        "every training reads the same number of steps, so short windows have the advantage of many updates; at equal updates "
        "every training makes the same number, so long windows have the advantage of more data.",
        "A short dash is the best that theory allows with what the windows can see." if exact else "",
        "A cross at the edge is a training that did not stay finite in every seed." if lost else "",
    )
    return above + grid(charts) + below


def curves_section(charts: list[str]) -> str:
    if not charts:
        return ""
    return said(
        "Training loss, mean over seeds, a line for each window, coloured in order of length; "
        "the band spans the seeds. Against steps, a line that is lower learned more from the same data; against updates, from "
        "the same number of updates. A line still falling at its end would gain from longer training."
    ) + grid(charts)


def cost_section(charts: list[str]) -> str:
    if not charts:
        return ""
    return said(
        "A training at equal data takes longer with short windows, which make more updates; an update "
        "takes longer, and its memory grows, with long ones. Times are of all seeds together, compilation apart. Memory is what "
        "the compiled training needs beside its state and its data. Axes are logarithmic where values span more than threefold."
    ) + grid(charts, "three")


def gradient_section(results: dict[str, Any], bias: list[Row], grids: dict[str, list[str]]) -> str:
    charts = [*grids["bias"], *grids["decay"]]
    suggested = results.get("suggested") or {}
    reasons = [(model, suggested[model].get("reason")) for model in MODELS if suggested.get(model)]
    if not charts and not reasons:
        return ""
    text = said(
        "The relative bias is the distance of an estimate's mean from the gradient of full backpropagation, over the length of "
        "that gradient: 0.1 is a tenth off, 1 is no better than no gradient at all. Training changes it, since a model that has "
        "learned to remember has more to lose; judge a window by the trained model. What is below 1e-8 is drawn there. Of random "
        "influences the mean of some draws is taken: what is not far beyond its standard error is noise. Measured on whole streams; "
        "where only a window's last step is scored in training, here every step is."
        if bias
        else "",
        "Where gradients fade with the lag, what lies beyond the window is small; the dotted line is the window that this suggests."
        if grids["decay"] and bias
        else "",
    )
    text += "".join(
        f"<p><strong>{capital(model)}:</strong> {html.escape(str(reason))}</p>" for model, reason in reasons
    )
    text += grid(charts, "three")
    return text + folded(
        "Show the figures", bias, ("model", "influence", "window", "relative_bias", "standard_error", "cosine")
    )


def rates_section(rows: list[Row], best: list[Row], metric: Row) -> str:
    tried = sorted({row["learning_rate"] for row in rows}, key=number)
    scores = ("learning_rate", "final_metric", "lowest seed", "highest seed", "final_loss")
    fields = (*POINT, *scores, "updates", "steps", "seconds")
    edges = {tried[0], tried[-1]} if len(tried) > 2 else set()

    def told(row: Row) -> Row:
        seeds = finite(row["metrics"])
        spread = {"lowest seed": seeds.min(), "highest seed": seeds.max()} if len(seeds) else {}
        rate = value(row["learning_rate"]) + (" †" if row["learning_rate"] in edges else "")
        return {**dict.fromkeys(fields), **row, **spread, "learning_rate": rate}

    lines = dict.fromkeys((budget, row["carry"], row["influence"]) for budget in BUDGETS for row in rows)
    mine = [told(row) for line in lines for row in best if (row["budget"], row["carry"], row["influence"]) == line]
    if not mine:
        return ""
    text = said(
        f"The learning rate is tuned for each window on its own: the one with the best mean {metric['name']}, the lower loss "
        "deciding between equals. No window is judged by a rate that suits another."
        if len(tried) > 1
        else f"One learning rate was tried, {value(tried[0])}; another may suit some windows better.",
        f"Below, {metric['name']} by rate and window; stronger colour is better, the frame marks the best of each window."
        if len(tried) > 1
        else "",
    )
    if len(tried) > 1:
        text += heat_tables(rows, best, tried, metric["better"] == "higher")
    if any("†" in row["learning_rate"] for row in mine):
        text += said("In the table, † is the smallest or the largest rate tried: a better one may lie beyond.")
    return text + folded("Show the best row of each point", mine, fields)


def heat_tables(rows: list[Row], best: list[Row], tried: list[float], higher: bool) -> str:
    found = finite([row["final_metric"] for row in rows])
    low, high = (found.min(), found.max()) if len(found) else (0.0, 0.0)
    chosen = {(*(row[name] for name in POINT), row["learning_rate"]) for row in best}
    text = []
    for budget, carry, influence in dict.fromkeys((row["budget"], row["carry"], row["influence"]) for row in rows):
        mine = {
            (row["learning_rate"], row["window"]): row
            for row in rows
            if (row["budget"], row["carry"], row["influence"]) == (budget, carry, influence)
        }
        windows = sorted({window for _, window in mine})
        head = "".join(f'<th scope="col" class="number">{value(window)}</th>' for window in windows)
        body = ""
        for rate in tried:
            body += f'<tr><th scope="row" class="number">{value(rate)}</th>'
            for window in windows:
                metric = number(mine.get((rate, window), {}).get("final_metric"))
                good = (metric - low) / ((high - low) or 1)
                shade = round(55 * (good if higher else 1 - good)) if math.isfinite(metric) else 0
                best_here = ' class="best"' if (budget, carry, influence, window, rate) in chosen else ""
                shown = f"{metric:#.3g}" if math.isfinite(metric) else "–"
                body += f'<td style="--heat:{shade}%"{best_here}>{shown}</td>'
            body += "</tr>\n"
        title = capital(f"{carry}, {influence}: {BUDGETS[budget]}")
        head = f'<thead><tr><th scope="col">rate \\ window</th>{head}</tr></thead>'
        heat = boxed(title, f'<table class="heat">{head}\n<tbody>{body}</tbody></table>')
        text.append(f"<figure><figcaption>{html.escape(title)}</figcaption>{heat}</figure>")
    return grid(text)


def failed_section(failed: list[Row]) -> str:
    if not failed:
        return ""
    fields = tuple(dict.fromkeys(key for row in failed for key in row))
    text = "These points ended in an error and are in no chart; the others went on."
    return said(text) + table("Failed points", failed, fields)


def rows_section(rows: list[Row]) -> str:
    text = "A row for each point and learning rate, as in rows.csv; a dash: a number not finite, or not given."
    return said(text) + folded(f"Show {len(rows)} rows", rows, FIELDS)


def repeat_section(results: dict[str, Any], rows: list[Row]) -> str:
    seeds = sorted({str(row["seeds"]) for row in rows if row["seeds"] is not None})
    made_by = {"git revision": results.get("git"), "device": results.get("device"), "seeds": ", ".join(seeds) or None}
    versions = {f"{name} version": version for name, version in (results.get("versions") or {}).items()}
    flags = [
        {"flag": f"--{name}", "value": ",".join(map(str, flag)) if isinstance(flag, list) else str(flag)}
        for name, flag in (results.get("flags") or {}).items()
    ]
    made = [{"what": name, "value": told} for name, told in {**made_by, **versions}.items()]
    command = str(results.get("command") or "not given").replace(" --", " \\\n  --")
    text = said("The same command, revision, versions and device give the same figures again, but for the times.")
    text += f'<pre tabindex="0"><code>{html.escape(command)}</code></pre>\n'
    return text + table("Made by", made, ("what", "value")) + folded("Show all flags", flags, ("flag", "value"))


def said(*paragraphs: str) -> str:
    return "".join(f"<p>{html.escape(text)}</p>\n" for text in paragraphs if text)


def grid(figures: list[str], kind: str = "") -> str:
    return f'<div class="grid {kind}">\n' + "\n".join(figures) + "\n</div>\n" if figures else ""


def folded(title: str, rows: list[Row], fields: tuple[str, ...]) -> str:
    shown = table(title.removeprefix("Show "), rows, fields)
    return f"<details><summary>{html.escape(title)}</summary>\n{shown}</details>\n" if rows else ""


def table(title: str, rows: list[Row], fields: tuple[str, ...]) -> str:
    numeric = {field for field in fields if any(isinstance(row.get(field), int | float) for row in rows)}

    def cell(tag: str, field: str, text: str) -> str:
        kind = ' class="number"' if field in numeric else ' class="long"' if len(text) > 60 else ""
        return f"<{tag}{kind}>{html.escape(text)}</{tag[:2]}>"

    head = "".join(cell('th scope="col"', field, field.replace("_", " ")) for field in fields)
    lines = ("".join(cell("td", field, value(row.get(field))) for field in fields) for row in rows)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return boxed(title, f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>")


def boxed(title: str, content: str) -> str:
    """What is wider than the page scrolls in a box of its own, by keyboard too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(title)}">{content}</div>\n'


def csv_of(rows: list[Row]) -> str:
    """A line for each row, without its curve; a list over seeds is separated by spaces; what is not finite is nan there, else empty."""

    def plain(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return " ".join("nan" if not math.isfinite(number(y)) else str(y) for y in x)
        if isinstance(x, str):
            return launch.cell(x)
        return "" if x is None or (isinstance(x, float) and not math.isfinite(x)) else x

    others = dict.fromkeys(key for row in rows for key in row if key != "curve")
    to = io.StringIO()
    fields = list(dict.fromkeys((*FIELDS, *others)))
    out = csv.writer(to, lineterminator="\n")
    out.writerow(map(launch.cell, fields))
    out.writerows([plain(row.get(field)) for field in fields] for row in rows)
    return to.getvalue()


# Numbers


def number(x: Any) -> float:
    return math.nan if x is None else float(x)


def numbers(x: list[Any] | np.ndarray | None) -> np.ndarray:
    return np.array([] if x is None else x, float)  # None becomes NaN


def finite(x: list[Any] | np.ndarray | None) -> np.ndarray:
    return numbers(x)[np.isfinite(numbers(x))]


def value(x: Any) -> str:
    """What a reader sees of a value: four figures, thousands apart, a dash for what is not finite."""
    if isinstance(x, list | tuple):
        return ", ".join(value(y) for y in x)
    if x is None or (isinstance(x, float | np.floating) and not math.isfinite(x)):
        return "–"
    if isinstance(x, bool):
        return str(x)
    if isinstance(x, int):
        return f"{x:,}" if abs(x) >= 10_000 else str(x)
    return f"{x:.4g}" if isinstance(x, float | np.floating) else str(x)


def short(x: float) -> str:
    """A tick's label: 20k, 1.5M, 0.05, 1e-6."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(x) >= size:
            return f"{x / (1e3 if letter == 'k' else size):g}{letter}"
    return re.sub(r"e([+-])0?", lambda m: "e" + m[1].strip("+"), f"{x:g}")


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def name_of(row: Row) -> str:
    return f"window {row['window']}, {row['carry']}, {row['influence']}"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("report: give the directory that has the results.json, as in runs/truncation_sweep.")
    place = pathlib.Path(sys.argv[1])
    try:
        results = json.loads((place / "results.json").read_text())
        lock.take(place)
        write(place, results)
    except (OSError, ValueError) as error:
        sys.exit(launch.plain(f"report: {error}"))
    finally:
        lock.release()
