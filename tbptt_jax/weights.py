"""Weights: parameters in files that others read, and to and from PyTorch's LSTM and GRU.

    tb.weights.save("model.safetensors", params)
    params = tb.weights.load("model.safetensors", like=params)

    params = tb.weights.from_torch(module.state_dict(), like=params)  # a torch.nn.LSTM or torch.nn.GRU
    module.load_state_dict({name: torch.tensor(x) for name, x in tb.weights.to_torch(params).items()})

A run's state, and what is gone on with, is kept by ``tb.checkpoint``: any tree, with checksums.
"""

import itertools
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tbptt_jax.arrays import PyTree, quoted, shortened
from tbptt_jax.cells.gru import Weights as GruWeights
from tbptt_jax.cells.gru.weights import GATES as GRU
from tbptt_jax.cells.lstm import Weights
from tbptt_jax.cells.lstm.weights import GATES as LSTM
from tbptt_jax.checkpoint_leaves import kinds_of, on_this_host, write_whole

# safetensors' name of each dtype
_DTYPES = {
    "bool": "BOOL", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "uint8": "U8", "uint16": "U16",
    "uint32": "U32", "uint64": "U64", "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64",
    "complex64": "C64",
}  # fmt: skip


def save(path: str | pathlib.Path, params: PyTree) -> None:
    """Writes parameters as a safetensors file, whole or not at all.

    Args:
      path: the file, such as ``"model.safetensors"``.
      params: a tree of arrays, bool, integers, floats down to float16 and bfloat16, or complex64. Each is written under its path, joined
        with dots: ``cell.0.recurrent``, ``readout.params.kernel``; a tree that is one array, as ``params``.

    Raises:
      ValueError: if a leaf is no such array (complex128 is two arrays, ``x.real`` and ``x.imag``; typed keys are
        ``jax.random.key_data``), or two have one name.
      ImportError: without safetensors (``pip install 'tbptt_jax[serve]'``).
      OSError: if the file cannot be written.
    """
    names = _names(params)
    for name, kind in names.items():
        if kind.partition("[")[0] not in _DTYPES:
            raise ValueError(
                f"`{name}` is {kind}, which safetensors has no name for: give arrays of bool, integers, floats or complex64, such as "
                "`x.real` and `x.imag` of complex128, `jax.random.key_data(x)` of keys, `np.float32(x)` of a Python "
                "number; or keep it with `tb.checkpoint.save`."
            )
    arrays = {}
    for name, leaf in zip(names, jax.tree.leaves(params), strict=True):
        array = on_this_host(name, leaf)
        # Native and in one piece: the library takes the bytes as they lie.
        arrays[name] = np.array(array, array.dtype.newbyteorder("="), order="C")
    write_whole(path, _safetensors().numpy.save(arrays))


def load(path: str | pathlib.Path, like: PyTree) -> PyTree:
    """The parameters of a safetensors file, bit for bit.

    Args:
      path: the file.
      like: the tree they are to have, of arrays or ``jax.ShapeDtypeStruct``, such as
        ``jax.eval_shape(model.init, key, inputs)``. NumPy arrays come back where it has such, or where JAX would change the
        bits (64-bit numbers without ``jax_enable_x64``); else JAX arrays, placed by its sharding.

    Raises:
      ValueError: if there is no such file, it is broken, or its names, shapes or dtypes are others than those of ``like``;
        all differences are listed.
      ImportError: without safetensors (``pip install 'tbptt_jax[serve]'``).
    """
    library = _safetensors()
    try:
        stored = dict(library.deserialize(pathlib.Path(path).read_bytes()))
    except FileNotFoundError as error:
        raise ValueError(f"There is no file {path}: give one that `tb.weights.save` has written.") from error
    except library.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): write it again.") from error
    dtypes = {code: dtype for dtype, code in _DTYPES.items()}
    names = _names(like)
    _check_same(
        str(path),
        {name: f"{dtypes.get(x['dtype'], x['dtype'])}{list(x['shape'])}" for name, x in stored.items()},
        names,
    )

    def array(x: dict[str, Any]) -> np.ndarray:
        return np.frombuffer(x["data"], jnp.dtype(dtypes[x["dtype"]])).reshape(x["shape"])

    leaves, tree = jax.tree.flatten(like)
    placed = [_placed(array(stored[name]), leaf) for name, leaf in zip(names, leaves, strict=True)]
    return jax.tree.unflatten(tree, placed)


def from_torch(state: Mapping[str, Any], like: PyTree) -> PyTree:
    """Parameters with the layers of a ``torch.nn.LSTM`` or ``torch.nn.GRU``.

    PyTorch has two biases for each gate. They only ever appear as their sum, and become one, but for the n gate of a GRU,
    n = tanh(W_in x + b_in + r (W_hn h + b_hn)), whose two are kept apart, as Flax's ``GRUCell`` has them.

    Args:
      state: its ``state_dict()``, of tensors or arrays: for each layer ``weight_ih_l0``, ``weight_hh_l0``, and where there
        are any ``bias_ih_l0``, ``bias_hh_l0`` and a projection's ``weight_hr_l0``. PyTorch is not needed.
      like: the parameters of a model with as many layers of the same sizes and dtypes: of :func:`tbptt_jax.lstm` or
        :func:`tbptt_jax.gru`, of :func:`tbptt_jax.from_linen` with an ``nn.LSTMCell``, ``nn.OptimizedLSTMCell`` or ``nn.GRUCell``, or of
        :func:`tbptt_jax.stack` of such. Encoders and readouts remain as they are there.

    Raises:
      ValueError: if the state is of a bidirectional module, or has other names than those of one LSTM or GRU; or layers, gates,
        projections, shapes or dtypes are not those of ``like``.
    """
    if any(name.endswith("_reverse") for name in state):
        raise ValueError("This PyTorch module is bidirectional; a stream is read in one direction only.")
    layers = _layers(like)
    kinds = "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"
    known = {f"{kind}_l{n}" for n in range(len(state)) for kind in kinds}
    if others := sorted(map(str, set(state) - known)):
        raise ValueError(
            f"The state_dict has {shortened(', '.join(others))}, which no torch.nn.LSTM or GRU has: give that module's own, "
            "`module.lstm.state_dict()`; what is around it is not read, and batch normalisation between layers has no place."
        )
    there = sum(name.startswith("weight_ih") for name in state)
    if there != len(layers):
        raise ValueError(
            f"The state_dict has {there} layers (`weight_ih_l0` and so on) and the model {len(layers)}: make the model with "
            f"`layers={there}`, or `tb.stack` of {there} layers."
        )
    arrays = {name: _array(name, x) for name, x in state.items()}
    converted = iter([_from_torch(arrays, n, layer) for n, layer in enumerate(layers)])
    params = _with_layers(lambda layer: jax.tree.map(_placed, next(converted), layer), like)
    _check_same("the state_dict", _names(params), _names(like))
    return params


def to_torch(params: PyTree) -> dict[str, np.ndarray]:
    """Arrays under the names of a ``torch.nn.LSTM``'s or ``torch.nn.GRU``'s ``state_dict()``, with biases.

    Of two biases that are one here, the second is 0.

    Args:
      params: of a model as for :func:`from_torch`; encoders and readouts are left out.

    Returns:
      Name → NumPy array. PyTorch takes no bfloat16 from NumPy: ``torch.tensor(np.float32(x)).bfloat16()``.

    Raises:
      ValueError: if the layers are of several kinds or sizes, which one PyTorch module cannot have.
    """
    layers = _layers(params)
    if len({(_gates(layer), _sizes(layer)) for layer in layers}) > 1:
        raise ValueError(
            "The layers are of several kinds or sizes, and one PyTorch module has one: convert each, `to_torch(params[0])`, "
            "into a module of its own."
        )
    state: dict[str, np.ndarray] = {}
    for n, layer in enumerate(layers):
        layer = jax.tree.map(lambda x: on_this_host(f"layer {n}", x), layer)  # noqa: B023
        state |= {f"{name}_l{n}": np.ascontiguousarray(x) for name, x in _to_torch(layer).items()}
    return state


def _from_torch(state: dict[str, Any], n: int, like: Any) -> Any:
    """Layer ``n`` in the tree of ``like``, weights of ours or a Flax cell's parameters."""
    gates, missing = _gates(like), [name for name in (f"weight_ih_l{n}", f"weight_hh_l{n}") if name not in state]
    if missing:
        raise ValueError(f"The state_dict has no `{missing[0]}`: give that of one torch.nn.LSTM or GRU.")
    into, again, down = state[f"weight_ih_l{n}"], state[f"weight_hh_l{n}"], state.get(f"weight_hr_l{n}")
    zeros = np.zeros(len(into), into.dtype)
    of_inputs, of_carry = (state.get(f"bias_{side}_l{n}", zeros) for side in ("ih", "hh"))
    if (down is None) != (not isinstance(like, Weights) or like.projection is None):
        has = "has no projection" if down is None else f"projects h to {len(down)} outputs (proj_size)"
        raise ValueError(
            f"Layer {n} of the state_dict {has}, and the model's is another: make it with `tb.lstm(..., projection=...)` as in "
            "PyTorch; a GRU and Flax's cells have none."
        )
    features = again.shape[-1] if down is None else down.shape[-1]
    shapes = [x.shape for x in (again, of_inputs, of_carry)]
    rows = len(gates) * features
    if again.ndim != 2 or into.ndim != 2 or shapes != [(rows, again.shape[-1]), (rows,), (rows,)] or len(into) != rows:
        raise ValueError(
            f"`weight_hh_l{n}` is {list(again.shape)}, and the model's cell is {'an LSTM' if gates == LSTM else 'a GRU'}, of "
            f"which every weight and bias has {len(gates)} times {features} rows: give a state_dict of the same kind."
        )
    if isinstance(like, Weights):
        return Weights(into.T, again.T, of_inputs + of_carry, None if down is None else down.T)
    if isinstance(like, GruWeights):
        candidate = np.arange(rows) >= 2 * features
        return GruWeights(into.T, again.T, of_inputs + np.where(candidate, 0, of_carry), of_carry[candidate])
    cell: dict[str, Any] = {}
    parts = (np.split(x, len(gates)) for x in (into, again, of_inputs, of_carry))
    for gate, w_i, w_h, b_i, b_h in zip(gates, *parts, strict=True):
        at_input, at_carry = {"kernel": w_i.T}, {"kernel": w_h.T}
        if gates == LSTM:
            at_carry["bias"] = b_i + b_h
        elif gate == "n":
            at_input["bias"], at_carry["bias"] = b_i, b_h
        else:
            at_input["bias"] = b_i + b_h
        cell |= {f"i{gate}": at_input, f"h{gate}": at_carry}
    return cell


def _to_torch(layer: Any) -> dict[str, Any]:
    if isinstance(layer, Weights):
        down = {} if layer.projection is None else {"weight_hr": layer.projection.T}
        zeros = np.zeros_like(layer.bias)
        return {
            "weight_ih": layer.input.T, "weight_hh": layer.recurrent.T, "bias_ih": layer.bias, "bias_hh": zeros, **down,
        }  # fmt: skip
    if isinstance(layer, GruWeights):
        of_carry = np.asarray(layer.recurrent_bias)
        of_carry = np.pad(of_carry, (2 * len(of_carry), 0))
        return {
            "weight_ih": layer.input.T, "weight_hh": layer.recurrent.T, "bias_ih": layer.bias, "bias_hh": of_carry,
        }  # fmt: skip
    gates = _gates(layer)

    def beside(side: str, name: str) -> np.ndarray:
        zeros = np.zeros_like(layer[f"h{gates[-1]}"]["bias"])
        return np.concatenate([layer[f"{side}{gate}"].get(name, zeros).T for gate in gates])

    first, second = ("h", "i") if gates == LSTM else ("i", "h")
    return {
        "weight_ih": beside("i", "kernel"), "weight_hh": beside("h", "kernel"),
        "bias_ih": beside(first, "bias"), "bias_hh": beside(second, "bias"),
    }  # fmt: skip


def _with_layers(convert: Callable[[Any], Any], params: PyTree) -> PyTree:
    """``params`` with each layer converted, in the order they are read: weights of ours, or a Flax cell's parameters."""
    if isinstance(params, tuple) and not hasattr(params, "_fields"):
        return tuple(_with_layers(convert, layer) for layer in params)
    cell = params.get("cell") if isinstance(params, Mapping) else None
    if isinstance(cell, tuple) and all(isinstance(layer, Weights | GruWeights) for layer in cell):
        return {**params, "cell": tuple(map(convert, cell))}
    if isinstance(cell, Mapping) and "params" in cell:
        return {**params, "cell": {**cell, "params": convert(cell["params"])}}
    raise ValueError(
        f"The parameters are {quoted(jax.tree.structure(params))}; PyTorch's LSTM and GRU go to and from those of `tb.lstm` "
        "and `tb.gru`, of `tb.from_linen` with a Flax LSTM or GRU cell, and of `tb.stack` of these."
    )


def _layers(params: PyTree) -> list[Any]:
    layers: list[Any] = []
    _with_layers(layers.append, params)
    for layer in layers:
        _gates(layer)
    models = _models(params)
    for before, after in itertools.pairwise(models):
        if "readout" in before or "encoder" in after:
            raise ValueError(
                "There is a readout or an encoder between two layers, and in a PyTorch module there is none: convert each "
                "layer by itself, `params[0]`, from and to a module of its own."
            )
    return layers


def _models(params: PyTree) -> list[Mapping[str, Any]]:
    return [model for layer in params for model in _models(layer)] if isinstance(params, tuple) else [params]


def _gates(layer: Any) -> str:
    if isinstance(layer, Weights):
        if layer.norm is not None:
            raise ValueError("These weights have layer normalisation; PyTorch's LSTM has none, so they stay here.")
        return LSTM
    if isinstance(layer, GruWeights):
        if layer.recurrent_bias is None or layer.norm is not None:
            raise ValueError(
                "PyTorch's GRU resets after the recurrent matrix and has no layer normalisation: these weights are of a `tb.gru` with "
                f"`{'layer_norm=True' if layer.norm is not None else 'reset_after=False'}`, which it cannot compute."
            )
        return GRU
    for gates in (LSTM, GRU):
        if set(layer) == {side + gate for side in "ih" for gate in gates}:
            return gates
    raise ValueError(
        f"The cell's parameters are {shortened(', '.join(sorted(layer)))}; PyTorch has the cells that are `nn.LSTMCell`, "
        "`nn.OptimizedLSTMCell` and `nn.GRUCell` in Flax, without normalisation in them."
    )


def _sizes(layer: Any) -> tuple[int, int]:
    """Outputs and features."""
    if isinstance(layer, Weights):
        outputs, columns = layer.recurrent.shape
        return outputs, columns // len(LSTM)
    if isinstance(layer, GruWeights):
        return layer.recurrent.shape[0], layer.recurrent.shape[0]
    return layer[f"h{_gates(layer)[0]}"]["kernel"].shape


def _array(name: str, x: Any) -> np.ndarray:
    """A tensor, without PyTorch, or an array, in NumPy."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        if str(x.dtype) == "torch.bfloat16":  # which NumPy does not take from it
            return np.asarray(x.float()).astype(jnp.bfloat16)
    array = np.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"`{name}` is {quoted(x)}; it needs to be a tensor or an array of floats.")
    return array


def _placed(array: np.ndarray, like: Any) -> Any:
    """A copy of the array, of the kind of ``like``: NumPy's or JAX's."""
    array = np.array(array, order="C")
    if isinstance(like, np.ndarray):
        return array
    own = jnp.array(array)
    return jax.device_put(own, getattr(like, "sharding", None)) if own.dtype == array.dtype else array


def _names(tree: PyTree) -> dict[str, str]:
    """Name → dtype and shape of each leaf, in order."""
    kinds = kinds_of("params", tree)
    names = {kind["path"] or "params": f"{kind['dtype']}{kind['shape']}" for kind in kinds}
    if len(names) < len(kinds):
        paths = [kind["path"] for kind in kinds]
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"Two parameters have the name `{shortened(twice)}`: use no dots in the keys of dicts.")
    return names


def _check_same(there: str, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    differences: Iterable[str] = (
        f"`{name}` {then.get(name, 'nothing')}, here {now.get(name, 'nothing')}"
        for name in [*now, *sorted(set(then) - set(now))]
        if then.get(name) != now.get(name)
    )
    if said := "; ".join(differences):
        raise ValueError(
            f"The parameters in {there} are not those of `like`: there {said}. Give `like` of the model they were trained in."
        )


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("safetensors is not installed: `pip install 'tbptt_jax[serve]'`.") from error
    return safetensors
