"""Linear recurrences: how a window is best run, on this platform, and a train window of each cell beside others'.

    python -m benchmarks.cells --parts=ways            # each implementation at each shape: on a CPU or a GPU
    python -m benchmarks.cells --parts=peers           # a train window of each cell (extra `peers`)

Both print Markdown tables; `docs/cells.md` says what follows from them.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

import tbptt_jax as tb
from benchmarks import window
from benchmarks.turns import Maker, Side, could_not_run, elsewhere, prepare, table, take_turns
from experiments import launch
from tbptt_jax import sharding
from tbptt_jax.cells.linear_scan import Masks, diagonal, key_value

SHAPES = ((8, 64, 128), (16, 128, 256), (32, 64, 64), (4, 256, 512), (64, 32, 128))  # lanes, time, units
WAYS = ("step", "associative", "chunked", None)
RUN = window.RUN
HEAD = 64  # keys and values of a head
RATE = 1e-4
Shape = tuple[int, int, int]

_PARTS = flags.DEFINE_list("parts", ["ways", "peers"], "What to measure: ways, peers.")
_SECONDS = flags.DEFINE_float("seconds", 2.0, "Time for each comparison, besides what it takes to compile.")
_CELLS = flags.DEFINE_list("cells", [], "Which cells to measure beside their peers; all by default.")
_LONGER = flags.DEFINE_integer(
    "longer", 1, "Windows so many times as long, and as many lanes: shapes of an accelerator."
)


def shapes() -> list[Shape]:
    return [(lanes * _LONGER.value, time * _LONGER.value, units) for lanes, time, units in SHAPES]


# How a window is run


def vectors(dtype: Any, shape: Shape, way: Any) -> Side:
    rng = np.random.default_rng(0)
    a, b, given = (jnp.asarray(rng.uniform(size=shape), dtype) for _ in range(3))
    resets = jnp.asarray(rng.uniform(size=shape[:2]) < 0.01)
    h = jnp.zeros_like(a[:, 0])

    def window(a: jax.Array, b: jax.Array, h: jax.Array) -> tuple:
        hs, back = jax.vjp(lambda a, b, h: diagonal(a, b, h, None, Masks(resets), way), a, b, h)
        return hs, back(given)

    return ready(window, a, b, h)


def matrices(delta: bool, shape: Shape, way: Any) -> Side:
    lanes, time, units = shape
    heads, rng = max(1, units // HEAD), np.random.default_rng(0)
    k, v, q, given = (jnp.asarray(rng.normal(size=(lanes, time, heads, HEAD)), jnp.float32) / 8 for _ in range(4))
    decay, beta = (jnp.asarray(rng.uniform(size=(lanes, time, heads)), jnp.float32) for _ in range(2))
    of = tb.KeyValue(-decay, k, v, q, beta if delta else None)
    resets = jnp.asarray(rng.uniform(size=(lanes, time)) < 0.01)
    s = jnp.zeros((lanes, heads, HEAD, HEAD))

    def window(of: tb.KeyValue, s: jax.Array) -> tuple:
        (s, o), back = jax.vjp(lambda of, s: key_value(of, s, None, Masks(resets), way), of, s)
        return o, back((s, given))

    return ready(window, of, s)


def ready(window: Callable, *args: Any) -> Side:
    window = jax.jit(window)
    return lambda: jax.block_until_ready(window(*args)) and None


KINDS = {
    "vectors": functools.partial(vectors, jnp.float32),
    "complex vectors": functools.partial(vectors, jnp.complex64),
    "matrices": functools.partial(matrices, False),
    "matrices, delta rule": functools.partial(matrices, True),
}


def ways(seconds: float) -> str:
    rows = []
    for name, make in KINDS.items():
        for shape in shapes():
            makers: dict[str, Maker] = {str(way): functools.partial(make, shape, way) for way in WAYS}
            timed = take_turns(makers, seconds)
            best = {way: f"{1e3 * np.median(each):.2f}" for way, each in timed.times.items()}
            rows.append([name, shape, *(best.get(str(way), "–") for way in WAYS)])
            print(rows[-1], timed.failed or "", flush=True)
            jax.clear_caches()
    head = "ms, forward and backward"
    return table([head, "lanes, time, units", "step", "associative", "chunked", "default"], rows)


# A train window, beside others


def jax_window(model: tb.Recurrence, shape: Shape, devices: int = 1, outputs: int = 1) -> Side:
    """As many inputs as units, so many outputs of each, and Adam."""
    return window.jax_window(model, (*shape, outputs * shape[-1]), RUN, devices, optax.adam(RATE))


def ours(cell: str, shape: Shape) -> Side:
    """With the lanes over the devices that are faster: of a memory, whose window is products alone, over all."""
    lanes, time, units = shape
    heads = units // HEAD
    own: dict[str, dict[str, Any]] = {
        "gated_delta": {"heads": heads, "convolution": None},
        "mlstm": {"heads": heads},
        "mamba2": {"heads": 2 * heads},
        "slstm": {"heads": heads, "norm": True},
    }
    memory = cell in own and cell != "slstm"
    devices = jax.device_count() if memory else sharding.lane_devices(lanes, time, units)
    return jax_window(getattr(tb, cell)(units, **own.get(cell, {})), shape, devices, 2 if cell == "rtu" else 1)


def memax(layer: str, shape: Shape) -> Side:
    """Of Morad's `memax`: an associative scan."""
    import equinox as eqx
    from memax.equinox import semigroups

    units = shape[-1]
    module = __import__(f"{semigroups.__name__}.{layer.lower()}", fromlist=[layer])
    params, rest = eqx.partition(
        getattr(module, layer)(recurrent_size=units, hidden_size=units, key=jax.random.key(0)), eqx.is_inexact_array
    )

    def unroll(params: Any, carry: Any, x: jax.Array, *_: Any) -> tuple:
        layer: Any = eqx.combine(params, rest)
        start = jnp.zeros(x.shape[1], bool)
        states, y = jax.vmap(lambda h, x: layer(h, (x, start)))(carry, x)
        return jax.tree.map(lambda h: h[:, -1], states), y

    def initial_carry(params: Any, lanes: int) -> Any:
        begin: Any = eqx.combine(params, rest).initialize_carry()
        return jax.tree.map(lambda h: jnp.broadcast_to(h, (lanes, *jnp.shape(h))), begin)

    return jax_window(tb.Recurrence(lambda key, x: params, initial_carry, unroll), shape)


def recurrentgemma(scan: str, shape: Shape) -> Side:
    from recurrentgemma import common
    from recurrentgemma.jax import layers

    layer: Any = layers.RGLRU(width=shape[-1], num_heads=1, scan_type=getattr(common.ScanType, scan))

    def init(key: jax.Array, x: jax.Array) -> Any:
        return layer.init(key, x, jnp.ones(x.shape[:2], jnp.int32))

    def unroll(params: Any, h: jax.Array, x: jax.Array, *_: Any) -> tuple:
        y, h = layer.apply(params, x, jnp.ones(x.shape[:2], jnp.int32), h)
        return h, y

    return jax_window(tb.Recurrence(init, lambda params, lanes: jnp.zeros((lanes, shape[-1])), unroll), shape)


def by_hand(cell: str, shape: Shape) -> Side:
    """A minGRU, minLSTM or RTU of a few lines, as its paper has it, by JAX's own associative scan."""
    units = shape[-1]

    def coefficients(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        *gates, n = jnp.split(x @ params["w"] + params["b"], len(params["b"]) // units, -1)
        if cell == "rtu":
            size, angle = jnp.exp(-jnp.exp(params["nu"])), jnp.exp(params["theta"])
            turn = jax.lax.complex(size * jnp.cos(angle), size * jnp.sin(angle))
            return jnp.broadcast_to(turn, n.shape), jnp.sqrt(1 - size**2) * jax.lax.complex(gates[0], n)
        gates = list(map(jax.nn.sigmoid, gates))
        keep = 1 - gates[0] if cell == "min_gru" else gates[0] / (gates[0] + gates[1])
        return keep, (1 - keep) * n

    def unroll(params: Any, h: jax.Array, x: jax.Array, *_: Any) -> tuple:
        a, b = coefficients(params, x)
        b = b.at[:, 0].add(a[:, 0] * h)
        hs = jax.lax.associative_scan(lambda l, r: (l[0] * r[0], r[0] * l[1] + r[1]), (a, b), axis=1)[1]
        return hs[:, -1], jax.nn.relu(jnp.concatenate([hs.real, hs.imag], -1)) if cell == "rtu" else hs

    def init(key: jax.Array, x: jax.Array) -> Any:
        columns = (3 if cell == "min_lstm" else 2) * units
        rates = {"nu": -jnp.ones(units), "theta": jnp.zeros(units)} if cell == "rtu" else {}
        return {"w": jax.random.normal(key, (units, columns)) / units**0.5, "b": jnp.zeros(columns), **rates}

    dtype = complex if cell == "rtu" else float
    begin = lambda params, lanes: jnp.zeros((lanes, units), dtype)  # noqa: E731
    return jax_window(tb.Recurrence(init, begin, unroll), shape, outputs=2 if cell == "rtu" else 1)


def in_torch(name: str, *shape: int) -> Side:
    """By hand in PyTorch, compiled; the products of a cell, and what recurs by whoever has it fastest. As many windows as ours.

    For a process of its own: beside PyTorch's threads JAX takes up to a third longer.
    """
    import torch

    lanes, _, units = shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.compiler.reset()  # or it would compile the second shape for any shape
    with torch.device(device):
        module = _torch_cell(name, units)
        x, cotangents, h = torch.randn(shape), torch.randn(shape), torch.zeros(lanes, units)
    run = (
        torch.compile(module, dynamic=False) if name != "slstm" else module
    )  # its loop of steps takes minutes to compile
    optimiser = torch.optim.Adam(module.parameters(), RATE, fused=True)

    def call() -> None:
        for _ in range(RUN):
            optimiser.zero_grad()
            run(x, h).backward(cotangents)
            optimiser.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def _torch_cell(name: str, units: int):  # type: ignore[no-untyped-def]
    import torch
    from torch.nn import functional as F

    heads = max(1, units // HEAD)

    class Cell(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into = torch.nn.Linear(units, (2 if "min_gru" in name else 3) * units)
            self.gates = torch.nn.Linear(units, 2 * heads)
            self.output_gate, self.output = torch.nn.Linear(units, units), torch.nn.Linear(units, units)
            self.rate, self.gain = torch.nn.Parameter(torch.zeros(heads)), torch.nn.Parameter(torch.ones(HEAD))

    class MinGRU(Cell):
        def forward(self, x, h):  # type: ignore[no-untyped-def]
            z, n = self.into(x).chunk(2, -1)
            z = torch.sigmoid(z)
            if name == "min_gru, loop":
                a, b, hs = 1 - z, z * n, []
                for t in range(x.shape[1]):
                    h = a[:, t] * h + b[:, t]
                    hs.append(h)
                return torch.stack(hs, 1)
            # In chunks, whose cumulated products are matrices: no steps one after another in a chunk.
            c = 16
            a, b = ((y).unflatten(1, (-1, c)) for y in (1 - z, z * n))
            log = a.log().cumsum(2)
            i = torch.arange(c, device=x.device)
            decay = torch.where(
                (i[:, None] >= i)[..., None], (log[:, :, :, None] - log[:, :, None]).clamp(max=0).exp(), 0.0
            )
            local, products, before = (decay * b[:, :, None]).sum(3), log.exp(), []
            for n_th in range(a.shape[1]):
                before.append(h)
                h = products[:, n_th, -1] * h + local[:, n_th, -1]
            return (local + products * torch.stack(before, 1)[:, :, None]).flatten(1, 2)

    class GatedDelta(Cell):
        def forward(self, x, h):  # type: ignore[no-untyped-def]
            from transformers.models.qwen3_next import modeling_qwen3_next

            rule = modeling_qwen3_next.torch_chunk_gated_delta_rule
            q, k, v = (y.unflatten(-1, (heads, HEAD)) for y in F.silu(self.into(x)).chunk(3, -1))
            alpha, beta = self.gates(x).chunk(2, -1)
            s = h.new_zeros(len(x), heads, HEAD, HEAD)
            decay = -self.rate.exp() * F.softplus(alpha)
            o, _ = rule(
                q, k, v, decay, beta.sigmoid(), initial_state=s, output_final_state=True, use_qk_l2norm_in_kernel=True
            )
            o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-6) * self.gain
            return self.output((o * F.silu(self.output_gate(x)).unflatten(-1, (heads, HEAD))).flatten(-2))

    class MLSTM(Cell):
        def forward(self, x, h):  # type: ignore[no-untyped-def]
            from mlstm_kernels.torch.chunkwise.native import mlstm_chunkwise__native_autograd
            from mlstm_kernels.torch.parallel.native_stablef import mlstm_parallel__native_stablef_autograd

            q, k, v = (y.unflatten(-1, (heads, HEAD)).transpose(1, 2) for y in self.into(x).chunk(3, -1))
            i, f = (y.transpose(1, 2) for y in self.gates(x).chunk(2, -1))
            if name == "mlstm, chunkwise":
                c, n, m = (h.new_zeros(len(x), heads, *size) for size in ((HEAD, HEAD), (HEAD,), (1,)))
                o, _ = mlstm_chunkwise__native_autograd(
                    q, k, v, i, f, c, n, m, return_last_states=True, chunk_size=min(64, x.shape[1])
                )
            elif name == "mlstm, by hand":  # as their parallel form, with a state
                m, c, n = (
                    h.new_zeros(len(x), heads, 1),
                    h.new_zeros(len(x), heads, HEAD, HEAD),
                    h.new_zeros(len(x), heads, HEAD, 1),
                )
                decays = F.logsigmoid(f).cumsum(-1)
                logs = decays[..., None] - decays[..., None, :] + i[..., None, :]
                logs = logs.masked_fill(torch.ones_like(logs[0, 0], dtype=torch.bool).triu(1), -torch.inf)
                before, q = decays + m, q / HEAD**0.5
                m = torch.maximum(logs.amax(-1), before)
                reads, seen = (q @ k.mT) * (logs - m[..., None]).exp(), (before - m).exp()[..., None]
                size = torch.maximum((reads.sum(-1, keepdim=True) + seen * (q @ n)).abs(), (-m).exp()[..., None])
                o = (reads @ v + seen * (q @ c)) / (size + 1e-6)
                written = (logs[..., -1, :] - m[..., -1:]).exp()[..., None] * k
                self.state = seen[..., -1:, :] * c + written.mT @ v, seen[..., -1:, :] * n + written.sum(-2)[..., None]
            else:  # takes no state, and returns none
                o = mlstm_parallel__native_stablef_autograd(q, k, v, i, f)
            return o.transpose(1, 2).flatten(-2) * self.output_gate(x).sigmoid()

    class Mamba2(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            from transformers.models.mamba2 import modeling_mamba2 as models

            config = models.Mamba2Config(
                hidden_size=units, num_heads=2 * heads, head_dim=HEAD, state_size=HEAD, n_groups=1, chunk_size=HEAD, num_hidden_layers=1
            )  # fmt: skip
            self.mixer = models.Mamba2Mixer(config, 0)

        def forward(self, x, h):  # type: ignore[no-untyped-def]
            return self.mixer(x)

    class SLSTM(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            from xlstm.blocks.slstm import layer

            config = layer.sLSTMLayerConfig(
                embedding_dim=units, num_heads=heads, conv1d_kernel_size=0, backend="vanilla"
            )
            config.enable_automatic_mixed_precision = False
            config.dtype = config.dtype_b = config.dtype_r = config.dtype_w = config.dtype_g = config.dtype_s = (
                "float32"
            )
            self.layer = layer.sLSTMLayer(config)

        def forward(self, x, h):  # type: ignore[no-untyped-def]
            return self.layer(x)

    cells = {"gated_delta": GatedDelta, "mlstm": MLSTM, "mamba2": Mamba2, "slstm": SLSTM}
    return cells.get(name.split(",")[0], MinGRU)()


Peer = Callable[[Shape], Side] | str  # a name: in PyTorch, elsewhere

PEERS: dict[str, dict[str, Peer]] = {
    "min_gru": {
        "JAX, associative_scan": functools.partial(by_hand, "min_gru"),
        "PyTorch, loop, compiled": "min_gru, loop",
        "PyTorch, chunks, compiled": "min_gru, chunks",
    },
    "min_lstm": {"JAX, associative_scan": functools.partial(by_hand, "min_lstm")},
    "rtu": {"JAX, associative_scan": functools.partial(by_hand, "rtu")},
    "lru": {"memax": functools.partial(memax, "LRU")},
    "rg_lru": {
        "recurrentgemma": functools.partial(recurrentgemma, "AUTO"),
        "recurrentgemma, associative": functools.partial(recurrentgemma, "ASSOCIATIVE_NATIVE"),
    },
    "slstm": {"xlstm, vanilla": "slstm"},
    "mamba2": {"transformers, compiled": "mamba2"},
    "gated_delta": {
        "memax": functools.partial(memax, "GDN"),
        "transformers, compiled": "gated_delta",
    },
    "mlstm": {
        "mlstm_kernels, chunkwise, compiled": "mlstm, chunkwise",
        "by hand, compiled": "mlstm, by hand",
        "mlstm_kernels, parallel, compiled": "mlstm, parallel",
    },
}


UNROLLED = ("PyTorch, loop, compiled", "recurrentgemma")
# About half the products of a window that begins with a state and ends with one.
STATELESS = ["mlstm_kernels, parallel, compiled"]


def peers(seconds: float) -> str:
    rows: list = []
    failed: dict[str, str] = {}
    for cell, others in PEERS.items():
        if not hasattr(tb, cell) or (_CELLS.value and cell not in _CELLS.value):
            continue
        ratios = []
        for shape in shapes():
            makers: dict[str, Maker] = {"tb": functools.partial(ours, cell, shape)}
            with contextlib.ExitStack() as stack:

                def maker(peer: Peer, shape: Shape = shape, stack: contextlib.ExitStack = stack) -> Maker:
                    if isinstance(peer, str):
                        return lambda: stack.enter_context(elsewhere(in_torch, peer, *shape))
                    return functools.partial(peer, shape)

                for name, peer in others.items():
                    if not (name in UNROLLED and shape[1] > 64):  # minutes to compile
                        makers[name] = maker(peer)
                timed = take_turns(makers, seconds)
            failed |= {f"{cell}, {name}": why for name, why in timed.failed.items()}
            a_window = {n: 1e3 * np.median(each) / RUN for n, each in timed.times.items()}
            own = a_window.pop("tb")
            stateless = min((a_window[n] for n in STATELESS if n in a_window), default=None)
            name, fastest = min(((n, ms) for n, ms in a_window.items() if n not in STATELESS), key=lambda item: item[1])
            ratios.append(fastest / own)
            less = "" if stateless is None else f"{stateless:.2f}, {stateless / own:.2f}"
            rows.append([f"`{cell}`", shape, f"{own:.2f}", f"{fastest:.2f}", name, f"{fastest / own:.2f}", less])
            print(rows[-1], {n: f"{ms:.2f}" for n, ms in a_window.items()}, timed.failed or "", flush=True)
            jax.clear_caches()
        rows.append([f"`{cell}`", "geometric mean", "", "", "", f"{np.exp(np.mean(np.log(ratios))):.2f}", ""])
    head = [
        "cell",
        "lanes, time, units",
        "ours, ms a window",
        "the fastest peer, ms",
        "",
        "peer / ours",
        "without a state",
    ]
    return table(head, rows) + could_not_run(failed)


def main() -> None:
    for part in _PARTS.value:
        print("\n" + {"ways": ways, "peers": peers}[part](_SECONDS.value), flush=True)


if __name__ == "__main__":
    prepare()
    launch.run(main)
