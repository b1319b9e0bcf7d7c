"""AWD-LSTM on a small text, and what each of its parts is worth: the full recipe, without one part at a time, and a plain LSTM.

python -m experiments.awd_lstm
python -m experiments.awd_lstm --text=mine.txt --set=hidden=200 --systems=full,plain --seeds=1 --workdir=runs/mine

Every training is kept in the workdir; interrupted in any way, the same command does what is missing, and ends with the same bits.
Of each the parameters that are best on the validation part are judged, on the test part.
"""

import statistics
from typing import Any

import optax
from absl import flags

import tbptt_jax as tb
from experiments import launch, tasks, training
from tbptt_jax import study
from tbptt_jax.study.process.writing import write_json

PARTS: dict[str, dict[str, Any]] = {
    "embedding dropout": {"embedding_dropout": 0.0},
    "locked dropout": {"input_dropout": 0.0, "dropout": 0.0, "output_dropout": 0.0},
    "weight-drop": {"weight_drop": 0.0},
    "AR and TAR": {"alpha": 0.0, "beta": 0.0},
    "tied weights": {"tied": False},
    "random lengths": {"random_lengths": False},
    "NT-ASGD": {"nonmonotone": None},
    "clipping": {"clip": None},
}  # and what leaves each out
RECIPE = "clip", "nonmonotone"
PLAIN = {k: v for name, part in PARTS.items() if name != "clipping" for k, v in part.items()}
SYSTEMS: dict[str, dict[str, Any]] = {
    "full": {},
    **{f"without {name}": part for name, part in PARTS.items()},
    "plain": PLAIN,
}
HEADS = "system", "validation", "test", "of each seed", "updates", "seconds"

FLAGS = flags.FLAGS
flags.DEFINE_string("text", None, "A file. None: the reference manual that ships inside Python.")
flags.DEFINE_multi_string("set", [], "name=value: another argument of the task; may be given again.")
flags.DEFINE_list("systems", list(SYSTEMS), "Which to train: full, plain, 'without weight-drop' and so on.")
flags.DEFINE_integer("seeds", 3, "Trainings of each system.", lower_bound=1)
flags.DEFINE_string(
    "window", "32", f"Steps of a window, or the mean of those that are drawn. Without these: {training.SCHEDULES}"
)
training.define_auto(["8", "16", "32", "64"], 200, "windows auto")
flags.DEFINE_integer("updates", 1600, "Updates at most, one a window.", lower_bound=1)
flags.DEFINE_integer("look", 50, "Updates from one look at the validation part to the next.", lower_bound=1)
flags.DEFINE_integer("patience", 6, "Looks without a better one, after which a training ends.", lower_bound=1)
flags.DEFINE_integer("nonmonotone", 3, "Looks before which one has to be better, or averaging begins.", lower_bound=0)
flags.DEFINE_float("learning_rate", 0.008, "Adam's, constant.", lower_bound=0.0)
flags.DEFINE_float("clip", 0.25, "The norm to which a gradient is clipped.", lower_bound=0.0)
flags.DEFINE_string("workdir", "runs/awd_lstm", "Where results.json, flags.txt and a directory for each training go.")


def window() -> int | study.Lengths:
    return training.lengths_of(FLAGS.window, "window", FLAGS.lengths, FLAGS.look_every)


def optimiser(clip: float | None, scaled: bool) -> optax.GradientTransformation:
    """Adam of a clipped gradient, and its step by the window's length where that varies."""
    parts = [
        *([optax.clip_by_global_norm(clip)] if clip is not None else []),
        optax.adam(FLAGS.learning_rate),
        *([tb.schedules.scale_by_length(int(FLAGS.window))] if scaled else []),
    ]
    return optax.chain(*parts)


def trained(name: str, seed: int) -> dict[str, Any]:
    """One training of a system, made or gone on with."""
    arguments = tasks.arguments_of(FLAGS.set) | ({"text": FLAGS.text} if FLAGS.text else {})
    recipe = {each: FLAGS[each].value for each in RECIPE}
    for key, value in SYSTEMS[name].items():
        (recipe if key in RECIPE else arguments)[key] = value
    task = study.task("awd_lstm", **arguments)
    looks = recipe["nonmonotone"]
    run = study.fit(
        task,
        window=window(),
        updates=FLAGS.updates,
        optimiser=optimiser(recipe["clip"], arguments.get("random_lengths", True)),
        average=None if looks is None else study.asgd(looks),
        patience=FLAGS.patience,
        checkpoint_every=FLAGS.look,
        windows_per_call=FLAGS.look,
        seed=seed,
        workdir=launch.expanded(FLAGS.workdir) / f"{name.replace(' ', '_')}-{seed}",
        settings={"learning rate": FLAGS.learning_rate, **recipe, **arguments},
        devices=launch.DEVICES.value,
        quiet=True,
    )
    ((figure, test),) = study.evaluate(task, run.params).items()
    valid = [call.valid[figure] for call in run.calls if call.valid]
    seconds = sum(call.seconds for call in run.calls)
    return {"figure": figure, "test": test, "valid": min(valid), "updates": run.updates, "seconds": seconds,
            "curve": [(call.updates, call.loss, call.valid and call.valid[figure]) for call in run.calls]}  # fmt: skip


def told(rows: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """A system a row: bits of validation and test, in the mean and of each seed, updates and seconds."""
    found = []
    for name, runs in rows.items():
        mean = {key: statistics.fmean(run[key] for run in runs) for key in ("valid", "test", "updates", "seconds")}
        each = ", ".join(f"{run['test']:.3f}" for run in runs)
        bits = [f"{mean[part]:.3f}" for part in ("valid", "test")]
        found.append([name, *bits, each, f"{mean['updates']:.0f}", f"{mean['seconds']:.0f}"])
    return found


def main() -> None:
    unknown = [name for name in FLAGS.systems if name not in SYSTEMS]
    if unknown or not FLAGS.systems:
        raise ValueError(f"--systems has {launch.short(''.join(unknown[:1]))!r}: give any of {', '.join(SYSTEMS)}.")
    given = tasks.arguments_of(FLAGS.set)
    own = [name for name in FLAGS.systems if (given | SYSTEMS[name]).get("random_lengths", True)]
    if own and not isinstance(window(), int):
        raise ValueError(
            f"--window={FLAGS.window}: the system {own[0]!r} draws the lengths of its windows itself. Give steps, or "
            "--systems='without random lengths,plain'."
        )
    directory, rows = launch.expanded(FLAGS.workdir), dict[str, list[dict[str, Any]]]()
    order = [(name, seed) for seed in range(FLAGS.seeds) for name in FLAGS.systems]
    with launch.progress(len(order), "trainings") as report:
        for done, (name, seed) in enumerate(order, 1):
            rows.setdefault(name, []).append(trained(name, seed))
            report(done, f"{name}, seed {seed}: {rows[name][-1]['test']:.3f}")
            write_json(directory / "results.json", {"rows": rows})
    launch.console.print(launch.table("Bits, lower is better", HEADS, told(rows)))
    launch.write_results(directory, {"rows": rows})


if __name__ == "__main__":
    launch.run(main)
