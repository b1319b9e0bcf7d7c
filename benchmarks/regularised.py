"""What an LSTM's regularisation costs a train window, and two layers with dropout beside PyTorch's."""

import functools
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes

import tbptt_jax as tb
from benchmarks.turns import Maker, Section, Side, Timed, could_not_run, quartiles, table, take_turns
from benchmarks.window import RUN, SHAPES, Shape, chosen, jax_window, torch_call

PLAIN, DROPOUT, TORCH = "tb.lstm", "tb.lstm, 2 layers, dropout", "PyTorch, 2 layers, dropout"
OPTIONS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "weight_drop=0.5": {"weight_drop": 0.5},
    "zoneout=0.1": {"zoneout": 0.1},
    "layer_norm=True": {"layer_norm": True},
    "all three": {"weight_drop": 0.5, "zoneout": 0.1, "layer_norm": True},
    "tb.lstm, 2 layers": {"layers": 2},
    DROPOUT: {"layers": 2, "dropout": 0.3},
    f"{DROPOUT}, draw='step'": {"layers": 2, "dropout": 0.3, "draw": "step"},
}


def torch_layers(shape: Shape) -> Side:
    import torch

    _, _, inputs, features = shape
    layers = torch.nn.LSTM(inputs, features, num_layers=2, dropout=0.3, batch_first=True)
    layers = layers.to("cuda" if torch.cuda.is_available() else "cpu")
    return torch_call(layers, lambda x: layers(x)[0], shape)


def measure(seconds: float) -> Section:
    results: dict[Shape, Timed] = {}
    failed: dict[str, str] = {}
    for shape in SHAPES:
        one: dict[str, Maker] = {}
        two: dict[str, Maker] = {TORCH: functools.partial(torch_layers, shape)}
        for name, options in OPTIONS.items():
            several = "layers" in options
            args = tb.lstm(shape[-1], **options), shape, RUN, chosen(shape) if several else 1
            (two if several else one)[name] = functools.partial(jax_window, *args)
        # Apart: PyTorch's threads still wait for work, and keep a core busy, when the side after it has begun.
        parts = take_turns(one, seconds), take_turns(two, seconds)
        timed = Timed(parts[0].times | parts[1].times, parts[0].failed | parts[1].failed)
        a_window = {name: 1e3 * times / (1 if name == TORCH else RUN) for name, times in timed.times.items()}
        results[shape] = timed._replace(times=a_window)
        failed |= timed.failed
        jax.clear_caches()
        print(shape, {name: quartiles(times) for name, times in a_window.items()}, timed.failed, flush=True)

    def ratio(name: str, base: str, shape: Shape) -> float:
        times = results[shape].times
        return float(np.median(times[name]) / np.median(times[base])) if {name, base} <= set(times) else np.nan

    def rows(names: list[str], base: str, write: Any) -> list[list[Any]]:
        each = {name: [ratio(name, base, shape) for shape in SHAPES] for name in names}
        return [[name, *map(write, [*r, np.exp(np.nanmean(np.log(r)))])] for name, r in each.items()]

    columns = [", ".join(map(str, shape)) for shape in SHAPES]
    times_table = table(
        ["ms a window: lanes, time, inputs, units", *columns],
        [
            [name, *(quartiles(results[s].times[name]) if name in results[s].times else "–" for s in SHAPES)]
            for name in [*OPTIONS, TORCH]
        ],
    )
    one_layer = [name for name in OPTIONS if "layers" not in OPTIONS[name]][1:]
    costs = table(
        ["more time than tb.lstm", *columns, "geometric mean"],
        rows(one_layer, PLAIN, lambda r: f"{100 * (r - 1):+.0f} %"),
    )
    costs += "\n" + "\n".join(
        table([""], rows([DROPOUT, f"{DROPOUT}, draw='step'"], "tb.lstm, 2 layers", lambda r: f"{100 * (r - 1):+.0f} %")).split("\n")[2:]
    )  # fmt: skip
    beside = table(
        ["PyTorch's time / that of", *columns, "geometric mean"],
        [
            [name, *(f"{1 / float(r):.2f}" for r in found)]
            for name, *found in (
                rows([name], TORCH, float)[0] for name in OPTIONS if name.startswith(DROPOUT)
            )
        ],
    )  # fmt: skip
    text = f"""One LSTM layer as above, on one device, with what it draws in training; and, on as many devices as the launches
choose, two layers with dropout of 0.3 between them beside `torch.nn.LSTM(num_layers=2, dropout=0.3)`, which draws a mask for each step, as `draw='step'` does.

{times_table}

What each option adds, of medians; dropout is compared with the two layers without.

{costs}

{beside}{could_not_run(failed)}"""

    def draw(axes: Axes) -> None:
        places, width = np.arange(len(SHAPES)), 0.85 / len(one_layer)
        for i, name in enumerate(one_layer):
            axes.bar(places + i * width, [ratio(name, PLAIN, shape) for shape in SHAPES], width, label=name)
        axes.axhline(1, color="black", linewidth=1)
        axes.set(ylabel="time / tb.lstm", title="Regularisation")
        axes.set_xticks(places + 0.4, ["×".join(map(str, shape)) for shape in SHAPES], rotation=30)
        axes.legend(frameon=False, fontsize=8)

    return Section("A regularised LSTM", text, draw)
