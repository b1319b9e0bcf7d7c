"""Stateful truncated BPTT(k, k): the carry crosses the window's edge, the gradient does not."""

from tbptt_jax.influence.influence import Influence


def truncate() -> Influence:
    """Knows nothing of the past: TBPTT(k, k) with windows of k steps, as Keras' ``stateful=True`` and AWD-LSTM train.

    In the lag gradients G[s, t] (the loss at s through the parameters' use at t), it sums exactly those pairs that lie
    in one window, and so is biased towards short lags. It costs nothing beyond the window.

    Reference: Williams & Peng 1990, *An efficient gradient-based algorithm for on-line training of recurrent network
    trajectories*; Williams & Zipser 1995, section 4.3, with h = h' = k.
    """
    return Influence(
        init=lambda params, carry, vjp: (),
        pullback=lambda state, carry_cotangent: None,
        push=lambda state, linearisation, key: (),
    )
