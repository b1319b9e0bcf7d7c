"""The LSTM: ``lstm.py`` the model, ``weights.py`` its parameters, ``window.py`` the operation, ``gpu.py`` its loops on GPUs."""

from tbptt_jax.cells.lstm.lstm import lstm as lstm
from tbptt_jax.cells.lstm.weights import Weights as Weights
from tbptt_jax.cells.lstm.weights import from_flax as from_flax
from tbptt_jax.cells.lstm.weights import to_flax as to_flax
