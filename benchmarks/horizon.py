"""Is every window that `horizon.suggest` calls safe within its tolerance, and does `horizon.choose` find the shortest that is?

    python -m benchmarks.horizon
    python -m benchmarks.horizon --tasks=lag --tolerances=0.5,0.1

On each task, untrained and trained, the bias of the suggested window is measured against full BPTT over the same probe; what is chosen
is held against a measurement of all lengths that there are to choose from.
"""

import jax
from absl import app, flags

import tbptt_jax as tb
from tbptt_jax import study
from tbptt_jax.window import time_shape

FLAGS = flags.FLAGS
TASKS = ["influence_balancing", "lag", "copy_memory", "adding", "char_lm", "forecast"]
flags.DEFINE_list("tasks", TASKS, "Names of tasks; forecast is that of the two tanks.")
flags.DEFINE_list("tolerances", ["1", "0.5", "0.2", "0.1", "0.05"], "Relative biases that are allowed.")
flags.DEFINE_list("lags", ["50", "120"], "The longest lag to trace back, at most the probe's steps.")
flags.DEFINE_list("lengths", ["1", "2", "4", "8", "16", "32", "64", "128"], "Windows to choose from.")
flags.DEFINE_integer("steps", 200, "Steps of the probe.", lower_bound=2)
flags.DEFINE_integer("lanes", 4, "Its lanes.", lower_bound=1)
flags.DEFINE_integer("updates", 200, "Of the training, by windows of 20.", lower_bound=1)

HEADS = "task", "parameters", "tolerance", "lags", "window", "bound", "bias", "chosen", "shortest"


def probed(name: str, trained: bool) -> tuple[study.Task, dict, tb.Window]:
    """A task, parameters of its model, and a probe that is no part of what they were trained on."""
    task = study.task(name)
    probe = study.probe_of(task, 1, FLAGS.lanes, FLAGS.steps)
    if trained:
        return task, study.fit(task, window=20, updates=FLAGS.updates, quiet=True, devices=1).params, probe
    return task, task.model.init(jax.random.key(0), probe.inputs), probe


def measure(name: str, trained: bool) -> list[tuple[bool, float, tuple[int, int]]]:
    """``(safe, bias / tolerance, places of the chosen and the shortest length)`` of each case, each printed as a row."""
    task, params, probe = probed(name, trained)
    _, time = time_shape(probe)
    tolerances = [float(tolerance) for tolerance in FLAGS.tolerances]
    lengths = [n for n in map(int, FLAGS.lengths) if n <= time]
    biases: dict[int, float] = {}

    def bias(length: int) -> float:
        if length not in biases:
            biases[length] = tb.horizon.bias(task.model, task.loss, params, probe, length).relative_bias
        return biases[length]

    def place(length: int | None) -> int:
        return len(lengths) if length is None else lengths.index(length)

    alone = {"truncate": tb.truncate()}
    found, cases = {}, []
    for tolerance in tolerances:
        choice = tb.horizon.choose(task.model, task.loss, params, probe, tolerance, lengths=lengths, influences=alone)
        shortest = next((n for n in lengths if bias(n) <= tolerance), None)
        found[tolerance] = choice.best.window if choice.best else None, shortest
    for lags in sorted({min(time, int(lags)) for lags in FLAGS.lags}):
        fading = tb.horizon.decay(task.model, task.loss, params, probe, lags=lags)
        for tolerance in tolerances:
            says, (chosen, shortest) = tb.horizon.suggest(fading, tolerance=tolerance, largest=time), found[tolerance]
            measured = bias(says.window) if says.safe else float("nan")
            cases.append((says.safe, measured / tolerance, (place(chosen), place(shortest))))
            window, numbers = (
                (str(says.window) if says.safe else "none safe"),
                (f"{says.relative_bias:.3g}", f"{measured:.3g}"),
            )
            row = (
                name,
                "trained" if trained else "fresh",
                f"{tolerance:g}",
                str(lags),
                window,
                *numbers,
                str(chosen),
                str(shortest),
            )
            print("| " + " | ".join(row) + " |", flush=True)
    return cases


def main(argv: list[str]) -> None:
    del argv
    print("| " + " | ".join(HEADS) + " |\n" + "|---" * len(HEADS) + "|")
    cases = [case for name in FLAGS.tasks for trained in (False, True) for case in measure(name, trained)]
    safe = [ratio for is_safe, ratio, _ in cases if is_safe]
    apart = [abs(chosen - shortest) for _, _, (chosen, shortest) in cases]
    print(
        f"Chosen: at most {max(apart)} lengths from the shortest that holds, the same in {apart.count(0)} of {len(apart)} cases."
    )
    print(f"{len(cases)} cases, {len(safe)} safe, {sum(not ratio <= 1 for ratio in safe)} above their tolerance")


if __name__ == "__main__":
    app.run(main)
