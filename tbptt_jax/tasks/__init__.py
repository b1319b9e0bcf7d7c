"""Data whose best possible score is known: pure functions of a key, one file a task, the floor beside it."""

from tbptt_jax.tasks.adding import adding as adding
from tbptt_jax.tasks.adding import adding_floor as adding_floor
from tbptt_jax.tasks.copy_memory import copy_memory as copy_memory
from tbptt_jax.tasks.copy_memory import copy_memory_floor as copy_memory_floor
from tbptt_jax.tasks.copy_stream import copy_stream as copy_stream
from tbptt_jax.tasks.copy_stream import copy_stream_floor as copy_stream_floor
from tbptt_jax.tasks.first_bit import first_bit as first_bit
from tbptt_jax.tasks.first_bit import first_bit_floor as first_bit_floor
from tbptt_jax.tasks.influence_balancing import influence_balancing as influence_balancing
from tbptt_jax.tasks.influence_balancing import influence_balancing_model as influence_balancing_model
from tbptt_jax.tasks.influence_balancing import influence_balancing_optimum as influence_balancing_optimum
from tbptt_jax.tasks.lag import lag as lag
from tbptt_jax.tasks.lag import lag_floor as lag_floor
from tbptt_jax.tasks.t_maze import t_maze as t_maze
from tbptt_jax.tasks.hidden_regime import hidden_regime as hidden_regime
from tbptt_jax.tasks.hidden_regime import hidden_regime_floor as hidden_regime_floor
