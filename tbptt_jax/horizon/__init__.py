"""How long should a window be? What a truncation leaves out, measured.

fading = horizon.decay(model, loss, params, window, lags=200)         how gradients fade: φ_k, and what is kept up to each lag
horizon.suggest(fading, tolerance=0.1)                                the window whose bias is bounded
horizon.bias(model, loss, params, window, 20, tb.replay(1))           windows of 20 against full BPTT
horizon.choose(model, loss, params, window, tolerance=0.1)            the cheapest of many, measured
"""

from tbptt_jax.horizon.decay import Decay as Decay
from tbptt_jax.horizon.decay import decay as decay
from tbptt_jax.horizon.suggest import Suggestion as Suggestion
from tbptt_jax.horizon.suggest import suggest as suggest
from tbptt_jax.horizon.bias import Bias as Bias
from tbptt_jax.horizon.bias import bias as bias
from tbptt_jax.horizon.choose import Candidate as Candidate
from tbptt_jax.horizon.choose import Choice as Choice
from tbptt_jax.horizon.choose import choose as choose
