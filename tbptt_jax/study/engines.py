"""Engines: where the trainings of a sweep run."""

import concurrent.futures
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from tbptt_jax.study import scheduled
from tbptt_jax.study.lengths import Lengths
from tbptt_jax.study.process.machine import cores, memory
from tbptt_jax.study.process.machine import mesh as devices_mesh
from tbptt_jax.study.task import Task
from tbptt_jax.study.trainings import Program, Trained, Training, compiled, train

# Of JAX, what changes numbers: a worker has it as the launch has.
CONFIG = "jax_enable_x64", "jax_default_prng_impl", "jax_default_matmul_precision", "jax_threefry_partitionable"


class Job(NamedTuple):
    """What is trained, and how."""

    task: Task
    training: Training
    name: str  # for people


Plan = Callable[[dict[int, int]], None]  # given the bytes that a device needs for each job, once, before any training
Report = Callable[[int, int, float], None]  # given (number, updates, loss) of a job on its way, where that is known
Outcomes = Iterator[tuple[int, Trained | Exception]]  # of each job its number and what came of it, as it comes
Engine = Callable[[Sequence[Job], Plan, Report], Outcomes]  # does jobs


def local(devices: int | None = None) -> Engine:
    """This process, or the processes that work together: all seeds and rates of a job over their devices, job after job.

    Programs are compiled first and side by side, each once: jobs that differ in their updates or carry share one. Memory is
    looked at before anything is trained. Runs whose windows a schedule decides are not of one program: they come one by one.

    Args:
      devices: to use at most; default all.
    """

    def run(jobs: Sequence[Job], plan: Plan, report: Report) -> Outcomes:
        programs: dict[Any, Program | Exception] = {}
        with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
            asked: dict[Any, Any] = {}
            fixed = [job for job in jobs if not isinstance(job.training.window, Lengths)]
            for job in fixed:
                place = _program_of(job)
                if place in asked or place in programs:
                    continue
                runs = len(job.training.rates) * job.training.seeds
                try:
                    mesh = devices_mesh(runs=runs, devices=devices)
                    asked[place] = pool.submit(compiled(job.task, job.training, mesh))
                except Exception as error:  # as where a matrix of rtrl would be too large: the others go on
                    programs[place] = error
            for place, future in asked.items():
                programs[place] = future.exception() or future.result()
        found = [None if isinstance(job.training.window, Lengths) else programs[_program_of(job)] for job in jobs]
        needed = {i: program.bytes for i, program in enumerate(found) if isinstance(program, Program)}
        plan(needed)
        limit = memory() // jax.local_device_count()
        for i, most in needed.items():
            if most > limit:
                training = jobs[i].training
                raise ValueError(
                    f"Windows of {training.window} with {training.influence} need {most / 1e9:,.1f} GB, and a device has "
                    f"{limit / 1e9:,.1f} GB: leave them out of `windows` or `influences`, or choose fewer `seeds`, `lanes` or "
                    "a smaller model."
                )
        for i, (job, program) in enumerate(zip(jobs, found, strict=True)):
            if isinstance(program, Exception):
                yield i, program
                continue
            tell = functools.partial(report, i)
            try:
                if program is None:  # in a thread, which no signal stops in the middle of its point
                    with concurrent.futures.ThreadPoolExecutor(1) as alone:
                        trained = alone.submit(scheduled.train, job.task, job.training, tell, devices).result()
                else:
                    trained = train(job.training, program, tell)
                yield i, trained
            except Exception as error:  # whatever it is, the others go on
                yield i, error

    return run


def _program_of(job: Job) -> Any:
    return id(job.task), job.training._replace(carry="", updates=0)


def ray(address: str | None = None, *, cpus: float = 1, gpus: float = 0, retries: int = 3) -> Engine:
    """The machines of a Ray cluster: every job is a Ray task, tried again elsewhere when its worker or node dies.

    Args:
      address: of the cluster, as ``ray.init`` takes it, such as ``"auto"`` or ``"ray://head:10001"``. None: this machine.
      cpus: CPU cores of each job.
      gpus: GPUs of each job.
      retries: how often a job is tried again after a worker or node died.

    Raises:
      ValueError: if Ray is not there (extra ``ray``).
    """
    try:
        import ray as cluster
    except ImportError as error:
        raise ValueError("Ray is not installed: pip install 'tbptt_jax[ray]', or leave the engine out.") from error

    def run(jobs: Sequence[Job], plan: Plan, report: Report) -> Outcomes:
        if not cluster.is_initialized():
            cluster.init(address=address, log_to_driver=False, include_dashboard=False)
        plan({})
        options: Any = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": retries, "retry_exceptions": False}
        do = cluster.remote(**options)(_do)
        waiting = {do.remote(_of(job)): i for i, job in enumerate(jobs)}
        while waiting:
            (done,), _ = cluster.wait(list(waiting), num_returns=1)
            i = waiting.pop(done)
            try:
                yield i, cluster.get(done)
            except cluster.exceptions.RayTaskError as error:
                yield i, error.cause if isinstance(error.cause, Exception) else RuntimeError(str(error))
            except cluster.exceptions.RayError as error:
                yield i, RuntimeError(f"{error}".splitlines()[0])

    return run


def _of(job: Job) -> Any:
    """A job as it is sent: a task by how it is made where that is known, so that its data is read where it is used."""
    from ray import cloudpickle

    config = {name: getattr(jax.config, name) for name in CONFIG}
    if job.task.source is not None:
        return None, job.task.source, job.training, config
    return cloudpickle.dumps(job.task), None, job.training, config


def _do(job: Any) -> Trained:
    """A job, in a worker."""
    from ray import cloudpickle

    from tbptt_jax.study.process.machine import prepare
    from tbptt_jax.study.task import task as make

    pickled, source, training, config = job
    prepare()
    for name, value in config.items():
        jax.config.update(name, value)
    task = cloudpickle.loads(pickled) if source is None else make(source[0], **source[1])
    if isinstance(training.window, Lengths):
        return scheduled.train(task, training)
    runs = len(training.rates) * training.seeds
    trained = train(training, compiled(task, training, devices_mesh(runs=runs))())
    return trained._replace(params=jax.device_get(trained.params))
