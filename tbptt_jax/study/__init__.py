"""What lasts: a task, and the runs that train, judge and keep it. Names in reading order."""

from tbptt_jax.study.task import Figure as Figure
from tbptt_jax.study.task import Task as Task
from tbptt_jax.study.task import task as task
from tbptt_jax.study.fit import fit as fit
from tbptt_jax.study.fit import Run as Run
from tbptt_jax.study.fit import load as load
from tbptt_jax.study.averaging import ema as ema
from tbptt_jax.study.averaging import asgd as asgd
from tbptt_jax.study.loop import Event as Event
from tbptt_jax.study.loop import health_of as health_of
from tbptt_jax.study.listeners import jsonl as jsonl
from tbptt_jax.study.listeners import tensorboard as tensorboard
from tbptt_jax.study.listeners import wandb as wandb
from tbptt_jax.study.scoring import evaluate as evaluate
from tbptt_jax.study.bias import bias as bias
from tbptt_jax.study.bias import probe_of as probe_of
from tbptt_jax.study.sweep import sweep as sweep
from tbptt_jax.study.engines import local as local
from tbptt_jax.study.engines import ray as ray
from tbptt_jax.study.report import report as report
from tbptt_jax.study.tasks import text as text
from tbptt_jax.study.tasks import series as series
from tbptt_jax.study.tasks import tables as tables
from tbptt_jax.study.tasks import forecasting as forecasting
