"""A window that chooses itself beside a sweep of fixed ones: the held-out score and the cost, at equal data.

    python -m benchmarks.adaptive_quality
    python -m benchmarks.adaptive_quality --tasks=forecast --seeds=2 --processes=2

Seconds are the median of the trainings after the first, which compiles what all use. The data is what the tasks have without files: the manual that ships inside Python, and two tanks, generated.
"""

import concurrent.futures
import functools
import json
import math
import multiprocessing
import os
import pathlib
import statistics
from typing import Any

from absl import app, flags

FLAGS = flags.FLAGS
SETTINGS: dict[str, dict[str, Any]] = {
    "char_lm": {"hidden": 48, "epochs": 4, "every": 1000, "seeds": 4},
    "forecast": {"hidden": 32, "epochs": 20, "every": 200, "seeds": 8},
}
flags.DEFINE_list("tasks", list(SETTINGS), f"Of {', '.join(SETTINGS)}; forecast is that of the two tanks.")
flags.DEFINE_list("windows", ["8", "16", "32", "64"], "Fixed windows, and those to choose from.")
flags.DEFINE_float("tolerance", 0.5, "The relative bias that a chosen window may have.", lower_bound=1e-6)
flags.DEFINE_integer("seeds", None, "Trainings of each; default 4 of the text, 8 of the tanks.", lower_bound=2)
flags.DEFINE_integer("epochs", None, "Times to read the data; default 4 and 20.", lower_bound=1)
flags.DEFINE_integer("processes", 1, "Trainings side by side, each on one core.", lower_bound=1)
flags.DEFINE_string("results", None, "Where the rows go, as JSON.")


def train(windows: list[int], tolerance: float, epochs: int | None, job: tuple[str, str, int]) -> dict[str, Any]:
    """A row: of one training the score, the updates, and the seconds that its compiled calls and its looks took."""
    from tbptt_jax import study

    name, window, seed = job
    settings = SETTINGS[name]
    task = _task(name, settings["hidden"])
    auto = study.adaptive(tolerance, lengths=windows, every=settings["every"])
    run = study.fit(
        task, window=auto if window == "auto" else int(window), epochs=epochs or settings["epochs"], seed=seed,
        checkpoint_every=100, windows_per_call=20, devices=1, quiet=True,
    )  # fmt: skip
    figure, score = next(iter(study.evaluate(task, run.params, seed=seed).items()))
    seconds = sum(call.seconds for call in run.calls)
    chosen = [choice.window for choice in run.choices]
    return {"task": name, "window": window, "seed": seed, "figure": figure, "score": score, "updates": run.updates, "seconds": seconds, "chosen": chosen}  # fmt: skip


@functools.cache  # so that of several seeds in a process one compiles
def _task(name: str, hidden: int) -> Any:
    from tbptt_jax import study

    return study.task(name, hidden=hidden)


def summary(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """The task's table, and what it says: scores less are better."""
    of = {row["window"]: [each for each in rows if each["window"] == row["window"]] for row in rows}
    mean = {window: statistics.mean(row["score"] for row in mine) for window, mine in of.items()}
    error = {
        window: statistics.stdev(row["score"] for row in mine) / math.sqrt(len(mine)) for window, mine in of.items()
    }
    first = {window: mine[0]["seconds"] for window, mine in of.items()}  # which compiles
    cost = {window: statistics.median(row["seconds"] for row in mine[1:]) for window, mine in of.items()}
    lines = [f"{name}: {rows[0]['figure']}, mean ± standard error over {len(of['auto'])} seeds", "| window | score | updates | seconds | the first training | it chose |", "|---|---|---|---|---|---|"]  # fmt: skip
    for window, mine in of.items():
        updates, chosen = (
            statistics.mean(row["updates"] for row in mine),
            [each for row in mine for each in row["chosen"]],
        )
        shares = ", ".join(f"{n} {chosen.count(n) / len(chosen):.0%}" for n in sorted(set(chosen)))
        lines.append(
            f"| {window} | {mean[window]:.4g} ± {error[window]:.2g} | {updates:.0f} | {cost[window]:.2f} | {first[window]:.1f} | {shares} |"
        )
    best = min((window for window in of if window != "auto"), key=mean.__getitem__)
    behind, noise = mean["auto"] - mean[best], math.hypot(error["auto"], error[best])
    part, compiled = (x["auto"] / sum(x[window] for window in of if window != "auto") for x in (cost, first))
    lines.append(
        f"Auto is {behind:+.3g} from the best fixed window, {best}; the standard error of that is {noise:.2g}. It took {part:.2f} of the sweep's "
        f"time, of which a training is {1 / (len(of) - 1):.2f}; the first training, with what is compiled, {compiled:.2f}."
    )
    return lines


def main(argv: list[str]) -> None:
    del argv
    windows = list(map(int, FLAGS.windows))
    jobs = [
        (name, window, seed)
        for name in FLAGS.tasks
        for window in ("auto", *FLAGS.windows)
        for seed in range(FLAGS.seeds or SETTINGS[name]["seeds"])
    ]
    one = functools.partial(train, windows, FLAGS.tolerance, FLAGS.epochs)
    if FLAGS.processes == 1:
        rows = list(map(one, jobs))
    else:
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(FLAGS.processes, spawn) as pool:
            rows = list(pool.map(one, jobs))
    for name in FLAGS.tasks:
        print("\n".join(summary(name, [row for row in rows if row["task"] == name])), flush=True)
    if FLAGS.results:
        pathlib.Path(FLAGS.results).write_text(json.dumps(rows))


if __name__ == "__main__":
    app.run(main)
