"""Data whose best possible score is known: pure functions of a key, one file a task."""

from tbptt_jax.tasks.first_bit import first_bit as first_bit
