"""The report of a sweep over window lengths: one page that opens anywhere, its charts as SVG files, its rows as CSV."""

import importlib.resources
import importlib.util
import math
import pathlib
import re
from typing import Any

from tbptt_jax.study.report import charts, reading
from tbptt_jax.study.process.writing import csv_text, whole

FIELDS = (
    *("task", "budget", "carry", "influence", "window", "learning_rate", "seeds", "updates", "steps"),
    *("final_metric", "exact_metric", "final_loss", "metrics", "losses", "seconds", "compile_seconds", "temp_bytes"),
)


def report(directory: pathlib.Path, results: dict[str, Any]) -> None:
    """Writes ``report.html``, ``rows.csv``, ``looks.csv`` where a schedule looked, and an SVG for each kind of chart that there is something to draw for.

    Everything is drawn before anything is written; each file is then written whole or not at all. The same results give the
    same bytes.

    Args:
      directory: exists.
      results: of a sweep, or its ``results.json``. Any number may be None or NaN (the training diverged), any list empty.
        A row's ``params``, the task's own parameters where a sweep varies them, tell its line in a chart from others.

    Raises:
      ValueError: if the results are not those of a sweep.
      ModuleNotFoundError: if Jinja or vl-convert is not installed.
    """
    lacking = [name for name in ("jinja2", "vl_convert") if importlib.util.find_spec(name) is None]
    if lacking:
        raise ModuleNotFoundError(f"A report needs {' and '.join(lacking)}: pip install 'tbptt_jax[experiments]'.")
    missing = [name for name in ("task", "metric", "rows") if name not in results]
    if missing:
        raise ValueError(f"The results have no {', '.join(missing)}: give those of a sweep, as in its results.json.")
    some = {**dict.fromkeys(FIELDS), "curve": None}
    columns = reading.columns(results["rows"])
    rows = [
        {**some, **row, "series": reading.series_of(row), "column": columns[row["window"]]} for row in results["rows"]
    ]
    bias = [{**row, "series": reading.series_of({"carry": "stateful", **row})} for row in results.get("bias") or []]
    metric = {"name": "metric", "better": "lower", "unit": "", **results["metric"]}
    recommended = {"window": None, **(results.get("recommendation") or {})}
    asked = (results.get("suggested") or {}).items()
    suggested = {model: {"window": None, "reason": "", **choice} for model, choice in asked if choice}
    higher = metric["better"] == "higher"
    best = reading.best_rates(rows, higher=higher)
    fixed = [row for row in best if reading.is_fixed(row)]
    level, reached = reading.time_to_reach(best, higher=higher)
    schedules = reading.on_schedules(rows, metric)
    settings = (results.get("settings") or {}).get("schedules") or {}
    panels = {
        "final_metric": charts.metric_panels(best, metric),
        "curves": charts.curve_panels(best, reading.in_order(row["window"] for row in rows), level),
        "schedules": charts.schedule_panels(schedules, {name: told.get("adaptive") for name, told in settings.items()}),
        "reach": charts.reach_panels(reached),
        "cost": charts.cost_panels(best),
        "bias": charts.bias_panels(bias, best, suggested),
        "decay": charts.decay_panels(results.get("decay") or {}),
    }
    files = {f"{kind}.svg": on_paper(charts.svg(these)) for kind, these in panels.items() if these}
    files["rows.csv"] = csv_text(results["rows"], FIELDS, without=("curve", "windows", "looks"))
    looks = reading.looks_of(rows)
    if looks:
        files["looks.csv"] = csv_text(looks)
    files["report.html"] = page(
        results=dict.fromkeys(("about", "command", "git", "device", "versions", "flags")) | results,
        metric=metric,
        higher=higher,
        rows=rows,
        fields=FIELDS
        + tuple(name for name in ("params", "mean_window", "look_seconds") if any(name in row for row in rows)),
        schedules=schedules,
        looks=looks,
        best=best,
        level=level,
        reached=reached,
        bias=bias,
        suggested=suggested,
        recommended={**recommended, "series": reading.series_of(recommended)},
        two=reading.two_windows(recommended, suggested, fixed, bias, higher=higher),
        charts=panels,
    )
    for name in (*(f"{kind}.svg" for kind in panels), "looks.csv"):
        if name not in files:
            (directory / name).unlink(missing_ok=True)  # of other results, before these
    for name, text in files.items():
        with whole(directory / name) as path:
            path.write_text(text, encoding="utf-8", newline="\n")


def page(**told: Any) -> str:
    """The report, from the top in the order in which a reader decides."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    used = "value", "capital", "finite", "best_of", "name_of", "in_order"
    environment.filters |= {name: getattr(reading, name) for name in used}
    environment.filters["svg"] = charts.svg
    environment.tests["known"] = lambda x: isinstance(x, int | float) and math.isfinite(x)
    environment.globals |= {"css": beside("palette.css") + beside("report.css"), "budgets": reading.BUDGETS}
    return environment.from_string(beside("report.html.j2")).render(told) + "\n"


def on_paper(svg: str) -> str:
    """A chart as a file of its own: with the palette's light colours in place of their names."""
    light = dict(re.findall(r"--(\w+): (#\w+)", beside("palette.css").partition("@media")[0]))
    return re.sub(r"var\(--(\w+)\)", lambda name: light.get(name[1], name[0]), svg) + "\n"


def beside(name: str) -> str:
    return (importlib.resources.files(__package__) / name).read_text(encoding="utf-8")
