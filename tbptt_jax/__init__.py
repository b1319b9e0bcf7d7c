"""Truncated backpropagation through time for recurrent networks, in JAX and Flax. Names in reading order."""

from tbptt_jax import schedules as schedules
from tbptt_jax import tasks as tasks
from tbptt_jax.window import Window as Window
from tbptt_jax.window import sequences as sequences
from tbptt_jax.window import lanes as lanes
from tbptt_jax.window import split as split
from tbptt_jax.window import slide as slide
from tbptt_jax.window import stateless as stateless
from tbptt_jax.recurrence import Recurrence as Recurrence
from tbptt_jax.recurrence import from_step as from_step
from tbptt_jax.recurrence import from_linen as from_linen
from tbptt_jax.recurrence import from_nnx as from_nnx
from tbptt_jax.recurrence import stack as stack
from tbptt_jax.lstm import lstm as lstm
from tbptt_jax.influence import Influence as Influence
from tbptt_jax.influence import truncate as truncate
from tbptt_jax.influence import replay as replay
from tbptt_jax.influence import rtrl as rtrl
from tbptt_jax.influence import uoro as uoro
from tbptt_jax.gradient import Metrics as Metrics
from tbptt_jax.gradient import gradient as gradient
from tbptt_jax.training import train_step as train_step
from tbptt_jax.training import train_windows as train_windows
from tbptt_jax.training import evaluate as evaluate
from tbptt_jax import horizon as horizon
from tbptt_jax import sharding as sharding
