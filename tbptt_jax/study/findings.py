"""What a sweep finds: how far each window's gradient is from the whole one, and which window to use."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tbptt_jax as tb
from tbptt_jax.study.bias import is_random
from tbptt_jax.study.influences import influence as named_influence
from tbptt_jax.study.points import Point
from tbptt_jax.study.report.reading import as_good, best_of
from tbptt_jax.study.task import Task, keys_of
from tbptt_jax.study.trainings import shape_of, streams_of


def gradients(task: Task, windows: list[int], influences: list[str], params: dict[str, Any]) -> dict[str, Any]:
    """The bias of each window and influence, and how the gradient fades, at these parameters."""
    streams = jax.jit(lambda seed: streams_of(task, "train", keys_of(seed).train))(10**6)
    longest, length = max(windows), shape_of(task).steps
    steps = length if length <= 512 else min(length, max(64, 4 * longest))
    probe = jax.tree.map(lambda x: x[:32, :steps], streams)
    found: dict[str, Any] = {"bias": [], "decay": {}, "suggested": {}}
    for name, at in params.items():
        at = jax.tree.map(jnp.asarray, at)
        for influence in influences:
            for window in windows:
                past = named_influence(influence, max(1, -(-steps // window) - 1))
                draws = 16 if is_random(influence) else 1
                try:
                    bias = tb.horizon.bias(task.model, task.loss, at, probe, window, past, draws=draws)
                except ValueError:  # what cannot be trained cannot be measured: its points say why
                    continue
                noise = float(bias.relative_std) / draws**0.5 if draws > 1 else 0.0  # of the mean of so many draws
                row = {"relative_bias": bias.relative_bias, "standard_error": noise, "cosine": bias.cosine}
                found["bias"].append({"model": name, "influence": influence, "window": window, **row})
        try:
            fading = tb.horizon.decay(task.model, task.loss, at, probe, lags=min(steps, 2 * longest))
        except ValueError:  # no probe is scored, or the gradient explodes: there is no decay to tell of
            continue
        choice = tb.horizon.suggest(fading)
        found["decay"][name] = {"norms": fading.norms.tolist(), "rate": fading.rate}
        found["suggested"][name] = {"window": choice.window, "reason": choice.reason}
        if choice.window >= length:
            why = f"No window shorter than a stream, {length} steps, bounds the relative bias by a tenth. β̂ is {fading.rate:.4f}."
            found["suggested"][name] = {"window": length, "reason": why}
    return found


def recommend(rows: list[dict[str, Any]], metric: dict[str, str], blind: float | None) -> dict[str, Any] | None:
    """The shortest window that is as good as the best, within the spread of seeds, in every budget that was run."""
    higher = metric["better"] == "higher"
    sign = 1 if higher else -1
    points: dict[str, dict[Point, list[dict]]] = {}
    for row in rows:
        if np.isfinite(row["metrics"]).all():
            points.setdefault(row["budget"], {}).setdefault(_place(row), []).append(row)
    best = {name: {p: best_of(each, higher=higher) for p, each in budget.items()} for name, budget in points.items()}
    if not best:
        return None
    top = best_of([row for budget in best.values() for row in budget.values()], higher=higher)
    if blind is not None and sign * (top["final_metric"] - blind) < 0.02 * abs(blind):
        sentence = (
            f"No window learned anything yet: the best {metric['name']} is {top['final_metric']:.4g}, and {blind:.4g} is what can "
            "be had from one step alone. Give more --updates, other --learning_rates, or longer --windows."
        )
        return {"window": None, "carry": None, "influence": None, "sentence": sentence}
    good = {name: {_place(row) for row in as_good(list(each.values()), higher=higher)} for name, each in best.items()}
    everywhere = set.intersection(*good.values())
    held = "at " + " and ".join(f"equal {name}" for name in best)
    if not everywhere:
        everywhere, held = good["data"], "at equal data, though not at equal updates"
    order = list(dict.fromkeys(_place(row) for row in rows))  # as the sweep was asked for
    place = min(everywhere, key=lambda place: (place.window, order.index(place)))
    mine = best.get("data", next(iter(best.values())))
    row, longest = mine[place], max(row["window"] for row in rows)
    of = ("" if place.influence == "truncate" else f" with {place.influence}") + "".join(
        f", {name} {value}" for name, value in place.params
    )
    sentence = (
        f"Use {place.carry} windows of {place.window}{of}: {metric['name']} {row['final_metric']:.4g}, the shortest that is as good "
        f"as any within the spread of {row['seeds']} seeds, {held}."
    )
    largest = mine.get(place._replace(window=longest))
    if largest and place.window < longest and largest["temp_bytes"]:
        sentence += f" It takes {row['temp_bytes'] / largest['temp_bytes']:.0%} of the memory of windows of {longest}."
    alike = [(p, r) for p, r in mine.items() if (p.window, p.params) == (place.window, place.params)]
    others = [r for p, r in alike if p.carry != place.carry]
    if others:
        verb = "Without the carried state" if place.carry == "stateful" else "With the state carried"
        sentence += f" {verb} such windows reach {others[0]['final_metric']:.4g}."
    return {name: row[name] for name in ("carry", "influence", "window")} | {
        "params": dict(place.params),
        "sentence": sentence,
    }


def _place(row: dict[str, Any]) -> Point:
    """The point of a row, whatever its budget."""
    return Point("", row["carry"], row["influence"], row["window"], tuple((row.get("params") or {}).items()))
