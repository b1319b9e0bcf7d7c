"""Trains any task, so that it lasts: your own model and data, or one of the library's.

python -m experiments.fit --task=mine.py:task --window=32 --updates=2000 --workdir=runs/mine
python -m experiments.fit --task=lag --set=hidden=32 --window=10 --epochs=3
python -m experiments.fit --task=lag --window=auto --tolerance=0.2 --lengths=5,10,20,40 --epochs=3
python -m experiments.fit --task=lag --window=5 --influence=replay:auto --tolerance=0.2 --depths=0,1,2,4,8 --epochs=3

A task is a function that returns a ``study.Task``. Interrupted in any way, the same command goes on from the last checkpoint
and ends with the same bits; with more ``--updates`` it goes on after its end. ``study.load(workdir)`` gives the model back.
"""

from absl import flags

from experiments import launch, tasks, training
from tbptt_jax import study

FLAGS = flags.FLAGS
tasks.define(None)
training.define("runs/fit")


def main() -> None:
    training.check()
    task = tasks.chosen()()
    launch.join_processes(task.lanes)
    run = training.fitted(task, updates=2000)
    how = {
        "stateless": FLAGS.stateless,
        "burn_in": FLAGS.burn_in,
        "window": training.window() if FLAGS.stateless else None,
    }
    data = {name: streams for name in ("valid", "test") if (streams := getattr(task, name)) is not None}
    scores = {name: study.evaluate(task, run.params, s, seed=FLAGS.seed, **how) for name, s in data.items()}
    told = training.told_of(run)
    curve = [(call.updates, call.loss) for call in run.calls]
    shown = "; ".join(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in each.items()) for name, each in scores.items())
    launch.say(
        f"{task.name}, {training.windows_told()}, {run.updates} updates: {shown or f'loss {run.calls[-1].loss:.4g}'}. "
        f"{told['seconds']:.0f} s."
    )
    launch.write_results(
        FLAGS.workdir,
        {"task": task.name, "scores": scores, **told, "curve": curve},
        more=", run.json, checkpoints",
    )


if __name__ == "__main__":
    launch.run(main)
