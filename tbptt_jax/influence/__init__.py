"""What a window knows of the past: one file for each choice."""

from tbptt_jax.influence.influence import Influence as Influence
from tbptt_jax.influence.influence import Linearisation as Linearisation
from tbptt_jax.influence.replay import replay as replay
from tbptt_jax.influence.rtrl import rtrl as rtrl
from tbptt_jax.influence.truncate import truncate as truncate
from tbptt_jax.influence.uoro import uoro as uoro
