"""Laws that models, influences and tasks are held to, for unit tests: each failure is a sentence."""

from tbptt_jax.testing.recurrence import check_recurrence as check_recurrence
from tbptt_jax.testing.influence import check_influence as check_influence
from tbptt_jax.testing.influence import lag_gradients as lag_gradients
from tbptt_jax.testing.task import check_task as check_task
