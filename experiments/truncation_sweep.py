"""How long should the window be? One launch trains every window length, fairly, and ends in a report that shows the decision.

python -m experiments.truncation_sweep
python -m experiments.truncation_sweep --task=mine.py:task --windows=4,16,64 --influences=truncate,replay:3 --seeds=3
python -m experiments.truncation_sweep --task=lag --param=hidden=8,16 --windows=5,20
python -m experiments.truncation_sweep --task=lag --windows=5,10,20,40,auto
python -m experiments.truncation_sweep --task=forecast --set=train=past.csv --set=test=next.csv --set=targets=load

A point is one budget, carry, influence and window. Each is kept as it is done: the same command goes on with those that are
missing.

Many machines: ``--engine=ray``; or ``--points=2/5`` does the second fifth of the points, in a workdir of its own, and
``--merge=DIR,…`` makes one report of them. Processes that work together on each point: ``--coordinator``, ``--processes``,
``--process``.
"""

import pathlib
import re
import shlex
import subprocess
import sys
from typing import Any

from absl import flags

from experiments import launch, tasks, training
from tbptt_jax import study

FLAGS = flags.FLAGS
tasks.define("first_bit")
flags.DEFINE_multi_string("param", [], "name=value,value: an argument of the task to sweep, too; may be given again.")
flags.DEFINE_list(
    "windows", ["1", "2", "5", "10", "20"], f"Window lengths, in steps, and schedules: {training.SCHEDULES}"
)
training.define_auto(None, None, "windows auto")
flags.DEFINE_list("carry", ["stateful", "stateless"], "stateful: carried on; stateless: each window begins anew.")
flags.DEFINE_list("influences", ["truncate"], f"{launch.INFLUENCES} Stateless windows: truncate.")
flags.DEFINE_list("learning_rates", ["0.02"], "Adam's rates at the start; each falls to zero along a cosine.")
flags.DEFINE_integer("seeds", 5, "Trainings of each point and learning rate, side by side.", lower_bound=1)
flags.DEFINE_enum("budget", "both", ["data", "updates", "both"], "Equal data for all windows, or equal updates.")
flags.DEFINE_integer(
    "updates", 500, "Updates of each window, or with equal data of the longest; the others make more.", lower_bound=1
)
flags.DEFINE_enum("engine", "local", ["local", "ray"], "Where the points are trained.")
flags.DEFINE_string("ray_address", None, "Of a Ray cluster, such as auto; default this machine.")
flags.DEFINE_float("ray_cpus", 1, "CPU cores of a point on Ray.", lower_bound=0.0)
flags.DEFINE_float("ray_gpus", 0, "GPUs of a point on Ray.", lower_bound=0.0)
flags.DEFINE_string("points", None, "I/N: do only the I-th of N shares of the points.")
flags.DEFINE_list("merge", [], "Workdirs of the shares of a sweep, to make one report of.")
flags.DEFINE_bool("tensorboard", False, "Write TensorBoard event files as well.")
flags.DEFINE_string("workdir", "runs/truncation_sweep", "Where the report and all that is in it go.")


def share(wanted: str | None) -> tuple[int, int] | None:
    """The I and N of ``--points``."""
    if wanted is None:
        return None
    parts = re.fullmatch(r"(\d{1,18})/(\d{1,18})", wanted)
    i, n = (int(part) for part in parts.groups()) if parts else (0, 0)
    if not 1 <= i <= n:
        raise ValueError(f"--points={launch.short(wanted)}: give I/N with I from 1 to N, such as --points=2/5.")
    return i, n


def rates() -> list[float]:
    for rate in FLAGS.learning_rates:
        number = r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"
        if not re.fullmatch(number, rate.strip().lower()) or not 0 < float(rate) < float("inf"):
            raise ValueError(f"--learning_rates has {launch.short(rate)!r}: give positive numbers, such as 0.01,0.003.")
    if not FLAGS.learning_rates:
        raise ValueError("--learning_rates is empty: give at least one, such as --learning_rates=0.01.")
    return [float(rate) for rate in FLAGS.learning_rates]


def lengths() -> list[int | study.Lengths]:
    """The windows of ``--windows``, and schedules of them; what chooses itself does among these, unless ``--lengths`` says."""
    numbers = [each for each in FLAGS.windows if each.strip().isdecimal()]
    among = FLAGS.lengths or sorted(set(map(int, numbers))) or [2]
    every = FLAGS.look_every or max(1, FLAGS.updates // 5)
    names = [each for each in FLAGS.windows if each not in numbers]
    schedules = [training.lengths_of(name, "windows", among, every) for name in names]
    return [*launch.positive_integers("windows", numbers, at_most=10**9), *schedules]


def git_revision() -> str | None:
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=pathlib.Path(__file__).parent
    )
    return asked.stdout.strip() or None if asked.returncode == 0 else None


def main() -> None:
    windows = lengths()
    launch.check_influences(FLAGS.influences)
    part, learning_rates = share(FLAGS.points), rates()
    launch.join_processes(0)  # they share the trainings, not the lanes
    make, params = tasks.chosen(), tasks.swept(FLAGS.param)
    engine = study.local(launch.DEVICES.value)
    if FLAGS.engine == "ray":
        engine = study.ray(FLAGS.ray_address, cpus=FLAGS.ray_cpus, gpus=FLAGS.ray_gpus)
    command = shlex.join(["python", "-m", "experiments.truncation_sweep", *sys.argv[1:]])
    names = "carry", "influences", "seeds", "budget", "updates", "workdir", "merge", "tensorboard"
    asked: Any = {name: FLAGS[name].value for name in names}
    results = study.sweep(
        make,
        windows,
        learning_rates=learning_rates,
        params=params,
        engine=engine,
        share=part,
        about_launch={"command": command, "git": git_revision(), **launch.made_by()},
        **asked,
    )
    if "rows" in results:
        launch.write_flags(launch.expanded(FLAGS.workdir))
    if not results["all_done"]:
        sys.exit(1)


if __name__ == "__main__":
    launch.run(main)
