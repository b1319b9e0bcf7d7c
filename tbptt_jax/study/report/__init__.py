"""The report of a sweep over window lengths: one page that opens anywhere, its charts as SVG files, its rows as CSV.

study.report(directory, json.loads((directory / "results.json").read_text()))
"""

import csv
import importlib.resources
import io
import json
import math
import pathlib
from typing import Any

from tbptt_jax.study.report import charts, reading
from tbptt_jax.study.report.reading import BUDGETS, Row, capital, finite, number, value
from tbptt_jax.study.writing import cell, whole

FIELDS = (
    *("task", "budget", "carry", "influence", "window", "learning_rate", "seeds", "updates", "steps"),
    *("final_metric", "exact_metric", "final_loss", "metrics", "losses", "seconds", "compile_seconds", "temp_bytes"),
)
KINDS = "final_metric", "curves", "reach", "cost", "bias", "decay"


def write(directory: pathlib.Path, results: dict[str, Any]) -> None:
    """Writes ``report.html``, ``rows.csv`` and an SVG for each kind of chart that there is something to draw for.

    Everything is drawn before anything is written; each file is then written whole or not at all. The same results give the
    same bytes.

    Args:
      directory: exists.
      results: of a sweep, or its ``results.json``. Any number may be None or NaN (the training diverged), any list empty.
        A row's ``params``, the task's own parameters where a sweep varies them, tell its line in a chart from others.

    Raises:
      ValueError: if the results are not those of a sweep.
      ImportError: if Jinja or vl-convert are not installed.
    """
    missing = [name for name in ("task", "metric", "rows") if name not in results]
    if missing:
        raise ValueError(f"The results have no {', '.join(missing)}: give those of a sweep, as in its results.json.")
    rows = [{**dict.fromkeys(FIELDS), **row, "series": reading.series_of(row)} for row in results["rows"]]
    bias = [{**row, "series": reading.series_of({"carry": "stateful", **row})} for row in results.get("bias") or []]
    metric = {"name": "metric", "better": "lower", "unit": "", **results["metric"]}
    higher, suggested = metric["better"] == "higher", results.get("suggested") or {}
    windows = sorted({row["window"] for row in [*rows, *bias]})
    best = reading.best_rates(rows, higher=higher)
    level, reached = reading.time_to_reach(best, higher=higher)
    panels = {
        "final_metric": charts.metric_panels(best, metric),
        "curves": charts.curve_panels(best, windows, level),
        "reach": charts.reach_panels(reached),
        "cost": charts.cost_panels(best),
        "bias": charts.bias_panels(bias, best, suggested),
        "decay": charts.decay_panels(results.get("decay") or {}),
    }
    palette = {**charts.PALETTE, **charts.window_colours(windows)}
    files = {f"{kind}.svg": charts.alone(charts.svg(these), palette) for kind, these in panels.items() if these}
    files["rows.csv"] = csv_of(rows)
    files["report.html"] = page(
        results=dict.fromkeys(("about", "command", "git", "device", "versions", "flags")) | results,
        metric=metric,
        suggested=suggested,
        rows=rows,
        best=best,
        failed=results.get("failed") or [],
        bias=bias,
        level=level,
        reached=reached,
        first=reading.who_is_first(reached),
        why=reading.why_both(results.get("recommendation") or {}, suggested, best, bias, metric),
        facts=facts(results.get("recommendation") or {}, best, suggested, metric),
        fields=FIELDS + ("params",) * any("params" in row for row in rows),
        heat=heat(rows, best, higher=higher),
        charts={kind: [(p.title, p.says, charts.svg([p])) for p in these] for kind, these in panels.items()},
        palette=palette,
    )
    for kind in KINDS:
        if f"{kind}.svg" not in files:
            (directory / f"{kind}.svg").unlink(missing_ok=True)  # of other results, before these
    for name, text in files.items():
        with whole(directory / name) as path:
            path.write_text(text, encoding="utf-8", newline="\n")


def page(**told: Any) -> str:
    """The report, from the top in the order in which a reader decides."""
    import jinja2

    here = importlib.resources.files(__package__)
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(autoescape=True, **options)
    environment.filters |= {"value": value, "capital": capital, "number": number, "finite": finite}
    environment.tests["known"] = lambda x: math.isfinite(number(x))
    template = environment.from_string((here / "report.html.j2").read_text(encoding="utf-8"))
    css = (here / "report.css").read_text(encoding="utf-8")
    return template.render(css=css, budgets=BUDGETS, name_of=reading.name_of, **told) + "\n"


def facts(recommended: Row, best: list[Row], suggested: Row, metric: Row) -> list[tuple[str, str, str]]:
    """What is told in large type: the name, the figure, and what it belongs to."""
    told = []
    if recommended.get("window") is not None:
        told.append(("Recommended", f"window {value(recommended['window'])}", reading.series_of(recommended)))
    for budget, title in BUDGETS.items():
        mine = [row for row in best if row["budget"] == budget]
        if finite(row["final_metric"] for row in mine):
            row = reading.best_of(mine, higher=metric["better"] == "higher")
            told.append((f"Best {metric['name']} at {title}", value(row["final_metric"]), reading.name_of(row)))
    asked = [(m, suggested[m]["window"]) for m in charts.MODELS if (suggested.get(m) or {}).get("window") is not None]
    if asked:
        *others, (model, window) = asked
        small = "; ".join([f"{model} model", *(f"{value(other)} for the {name}" for name, other in others)])
        told.append(("Suggested by the gradients", f"window {value(window)}", small))
    return told


def heat(rows: list[Row], best: list[Row], *, higher: bool) -> list[Row]:
    """For each budget and series a table of rates × windows: the metric, how good it is in percent, whether it is the best."""
    found = finite(row["final_metric"] for row in rows)
    rates = sorted({row["learning_rate"] for row in rows}, key=number)
    chosen = {id(row) for row in best}
    tables = []
    for budget, series in dict.fromkeys((row["budget"], row["series"]) for row in rows):
        mine = {(r["learning_rate"], r["window"]): r for r in rows if (r["budget"], r["series"]) == (budget, series)}
        windows = sorted({window for _, window in mine})

        def shown(row: Row | None) -> tuple[str, int, bool]:
            if row is None or not finite([row["final_metric"]]):
                return "–", 0, False
            good = (row["final_metric"] - min(found)) / ((max(found) - min(found)) or 1)
            return value(row["final_metric"]), round(55 * (good if higher else 1 - good)), id(row) in chosen

        lines = [(rate, [shown(mine.get((rate, window))) for window in windows]) for rate in rates]
        tables.append({"title": capital(f"{series}: {BUDGETS[budget]}"), "windows": windows, "lines": lines})
    return tables if len(rates) > 1 else []


def csv_of(rows: list[Row]) -> str:
    """A line for each row, without its curve; a list over seeds is separated by spaces; what is not finite is nan there, else empty."""

    def told(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return " ".join("nan" if not math.isfinite(number(y)) else str(y) for y in x)
        if isinstance(x, dict):
            return cell(json.dumps(x))
        if isinstance(x, str):
            return cell(x)
        return "" if x is None or (isinstance(x, float) and not math.isfinite(x)) else x

    others = dict.fromkeys(key for row in rows for key in row if key not in ("curve", "series"))
    to, fields = io.StringIO(), list(dict.fromkeys((*FIELDS, *others)))
    out = csv.writer(to, lineterminator="\n")
    out.writerow(map(cell, fields))
    out.writerows([told(row.get(field)) for field in fields] for row in rows)
    return to.getvalue()
