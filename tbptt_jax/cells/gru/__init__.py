"""The GRU: ``gru.py`` the model, ``weights.py`` its parameters, ``window.py`` the operation."""

from tbptt_jax.cells.gru.gru import gru as gru
from tbptt_jax.cells.gru.weights import Weights as Weights
from tbptt_jax.cells.gru.weights import from_flax as from_flax
from tbptt_jax.cells.gru.weights import to_flax as to_flax
