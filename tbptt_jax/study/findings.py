"""What a sweep finds: how far each window's gradient is from the whole one, and which window to use."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tbptt_jax as tb
from tbptt_jax.study.influences import influence as named_influence
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
                draws = 1 if influence.startswith(("truncate", "rtrl")) or influence.count(":") == 1 else 16
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
    sign = 1 if metric["better"] == "higher" else -1
    best: dict[str, dict[tuple, dict]] = {}
    for row in rows:
        if not np.isfinite(row["metrics"]).all():
            continue
        mine = best.setdefault(row["budget"], {})
        place = row["carry"], row["influence"], row["window"]
        if place not in mine or sign * row["final_metric"] > sign * mine[place]["final_metric"]:
            mine[place] = row
    if not best:
        return None
    top = max((row for budget in best.values() for row in budget.values()), key=lambda row: sign * row["final_metric"])
    if blind is not None and sign * (top["final_metric"] - blind) < 0.02 * abs(blind):
        sentence = (
            f"No window learned anything yet: the best {metric['name']} is {top['final_metric']:.4g}, and {blind:.4g} is what can "
            "be had from one step alone. Give more --updates, other --learning_rates, or longer --windows."
        )
        return {"window": None, "carry": None, "influence": None, "sentence": sentence}

    def good(budget: dict[tuple, dict]) -> dict[tuple, dict]:
        top = max(budget.values(), key=lambda row: sign * row["final_metric"])
        worst = min(sign * row["final_metric"] for row in budget.values())
        # The best mean's own standard error, and no row's: where only some seeds learned, a spread would excuse the others.
        error = np.std(top["metrics"]) / np.sqrt(len(top["metrics"]))
        slack = max(error, 0.02 * (sign * top["final_metric"] - worst))
        return {
            place: row for place, row in budget.items() if sign * (top["final_metric"] - row["final_metric"]) <= slack
        }

    as_good = {name: good(budget) for name, budget in best.items()}
    everywhere = set.intersection(*(set(places) for places in as_good.values()))
    views = " and ".join(f"equal {name}" for name in best)
    if everywhere:
        views_held = f"at {views}"
    else:
        everywhere = set(as_good.get("data") or next(iter(as_good.values())))
        views_held = "at equal data, though not at equal updates"
    order = list(dict.fromkeys(row["influence"] for row in rows))
    carry, influence, window = min(everywhere, key=lambda place: (place[2], order.index(place[1]), place[0]))
    row = best.get("data", next(iter(best.values())))[carry, influence, window]
    longest = max(row["window"] for row in rows)
    of = "" if influence == "truncate" else f" with {influence}"
    sentence = (
        f"Use {carry} windows of {window}{of}: {metric['name']} {row['final_metric']:.4g}, the shortest that is as good as "
        f"any within the spread of {row['seeds']} seeds, {views_held}."
    )
    largest = next((r for r in rows if r["window"] == longest and r["influence"] == influence), None)
    if largest and window < longest and largest["temp_bytes"]:
        sentence += f" It takes {row['temp_bytes'] / largest['temp_bytes']:.0%} of the memory of windows of {longest}."
    other = next(
        (r for p, r in best.get("data", next(iter(best.values()))).items() if p[2] == window and p[0] != carry), None
    )
    if other:
        verb = "Without the carried state" if carry == "stateful" else "With the state carried"
        sentence += f" {verb} such windows reach {other['final_metric']:.4g}."
    return {"window": window, "carry": carry, "influence": influence, "sentence": sentence}
