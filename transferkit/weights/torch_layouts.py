"""PyTorch's recurrent and attention layers as Keras's layers keep their arrays.

PyTorch has a stack of recurrent layers in one module, each direction with two biases; Keras has a layer for each. PyTorch packs
the three projections of attention into one matrix, or has a Linear for each; Keras has them as layers within MultiHeadAttention.
The equations are those of the documentation of torch.nn.LSTM, GRU, RNN and MultiheadAttention, and of Keras's cells:
- LSTM: PyTorch's gates i, f, g, o are Keras's i, f, c, o. Keras has one bias, the sum of PyTorch's two.
- GRU: r, z, n are Keras's r, z, h, which Keras keeps as z, r, h. The reset gate comes after the recurrent product, so both biases
  stay: it is Keras's `reset_after=True`.
- `weight_norm` keeps a length and a direction: the weight is g · v / ‖v‖, the norm over the axes along which g is one.
Pure: NumPy, and what matching sees of files and models.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from transferkit.errors import shorten
from transferkit.weights.composing import Arranged, Array, Composed, arranged
from transferkit.weights.mapping import FileArray, ModelVariable
from transferkit.weights.names import covers, listed
from transferkit.weights.readers.archive import Archive

__all__ = ["arranged_torch", "is_torch_variable"]

_RECURRENT = re.compile(r"(?P<part>weight_ih|weight_hh|bias_ih|bias_hh|weight_hr)(?:_l(?P<layer>\d+)(?P<back>_reverse)?)?")
# What Keras's layers have not, as sentences, each with the patterns of the arrays to skip where that is meant.
Lacking = dict[str, tuple[str, ...]]
_KINDS = {4: "LSTM", 3: "GRU", 1: "SimpleRNN"}
_NAMES = {"LSTM": "lstm", "GRU": "gru", "SimpleRNN": "simple_rnn"}
_OWN = re.compile(
    r"running_mean|running_var|num_batches_tracked|in_proj_(weight|bias)|[qkv]_proj_weight|bias_[kv]|weight_g|original[01]"
)
_PROJECTIONS = ("query", "key", "value")
# What models call the projections of attention, by the part Keras has: the Linear layers beside each other in one module.
_BESIDE: Sequence[Mapping[str, str]] = (
    {"query": "q_proj", "key": "k_proj", "value": "v_proj"},
    {"query": "q_lin", "key": "k_lin", "value": "v_lin"},
    {"query": "to_q", "key": "to_k", "value": "to_v"},
    {"query": "wq", "key": "wk", "value": "wv"},
    {"query": "q", "key": "k", "value": "v"},
    {"query": "query", "key": "key", "value": "value"},
)
_OUTPUTS = ("out_proj", "o_proj", "out_lin", "to_out/0", "to_out", "wo", "o", "proj", "output/dense", "out")


def is_torch_variable(name: str) -> bool:
    """Whether an array of this name, the module left out, is PyTorch's and no one else's."""
    return name == "weight" or _OWN.fullmatch(name) is not None or _RECURRENT.fullmatch(name) is not None


def arranged_torch(
    archive: Archive, sources: Sequence[FileArray], targets: Sequence[ModelVariable], skipped: Sequence[str] = ()
) -> Arranged:
    """The arrays of a PyTorch file in the pieces in which Keras's layers keep theirs.

    Args:
        archive: The file.
        sources: Its arrays as matching sees them.
        targets: The variables of the model: projections of attention are taken for such where it has attention.
        skipped: Patterns of arrays that the caller leaves out.
    """
    modules: dict[str, dict[str, FileArray]] = defaultdict(dict)
    for source in sources:
        name = f"{source.path}/{source.variable}".lstrip("/")
        if not any(covers(pattern, name) or covers(pattern, source.name) for pattern in skipped):
            modules[source.path][source.variable] = source
    made: list[Composed] = []
    lacking: Lacking = {}
    for path, own in modules.items():
        made += _normed(path, own)
        made += _recurrent(path, own, lacking)
        made += _packed(path, own, lacking)
    named = {one.source.path for one in made}
    if any(target.path.endswith("/attention_output") for target in targets):
        known = {target.path.rpartition("/")[2] for target in targets}
        made += _attention(modules, known, named)
    rules = (f'.skip({listed(patterns)}, of="file")' for patterns in lacking.values())
    return replace(arranged(archive, sources, made), problems=tuple(lacking), rules=tuple(rules))


def _as_it_is(arrays: Sequence[Array]) -> Array:
    return arrays[0]


# Recurrent layers


def _recurrent(path: str, own: Mapping[str, FileArray], lacking: Lacking) -> list[Composed]:
    layers: dict[tuple[int, bool], dict[str, FileArray]] = defaultdict(dict)
    for variable, source in own.items():
        if found := _RECURRENT.fullmatch(variable):
            layers[int(found["layer"] or 0), bool(found["back"])][found["part"]] = source
    if not layers:
        return []
    if any("weight_hr" in parts for parts in layers.values()):
        text = f"{path!r} is an LSTM with a projection of its output (proj_size), which Keras's LSTM doesn't have"
        lacking[text] = (f"{path}/*" if path else "*",)
        return []
    depth, both = len({number for number, _ in layers}), any(back for _, back in layers)
    made = []
    for (number, back), parts in sorted(layers.items()):
        hidden = parts.get("weight_hh")
        gates = hidden.shape[0] // max(hidden.shape[1], 1) if hidden is not None and len(hidden.shape) == 2 else 0
        if hidden is None or "weight_ih" not in parts or gates not in _KINDS or hidden.shape[0] != gates * hidden.shape[1]:
            text = f"{path!r} has the arrays {shorten(own)}, which are those of no recurrent layer"
            lacking[text] = (f"{path}/*" if path else "*",)
            return []
        kind = _KINDS[gates]
        # The layers of a stack get the names that Keras would make up, which tell their order.
        where = [path] if path else []
        where += [_NAMES[kind] + (f"_{number}" if number else "")] if depth > 1 or not path else []
        where += [f"{'backward' if back else 'forward'}_{_NAMES[kind]}"] if both else []
        made += _one_recurrent("/".join(where), kind, parts, hidden.shape[1])
    return made


def _one_recurrent(path: str, kind: str, parts: Mapping[str, FileArray], units: int) -> list[Composed]:
    gates = {kind: gates for gates, kind in _KINDS.items()}[kind]
    order = (1, 0, 2) if kind == "GRU" else tuple(range(gates))  # PyTorch's reset gate comes first, Keras's update gate
    moved = "; gates r, z, n as z, r, h" if kind == "GRU" else ""

    def by_gate(array: Array) -> Array:
        split = np.split(array, gates, axis=0)
        return np.concatenate([split[gate] for gate in order], axis=0)

    def kernel(arrays: Sequence[Array]) -> Array:
        return by_gate(arrays[0]).T

    def bias(arrays: Sequence[Array]) -> Array:
        return np.stack([by_gate(array) for array in arrays]) if kind == "GRU" else np.asarray(sum(arrays[1:], start=arrays[0]))

    def composed(variable: str, shape: tuple[int, ...], pieces: Sequence[FileArray], make: Any, text: str) -> Composed:
        name = pieces[0].name + "".join(f" + {piece.variable}" for piece in pieces[1:])
        return Composed(FileArray(name, shape, path, variable, kind), tuple(p.name for p in pieces), make, text)

    width = parts["weight_ih"].shape[-1]
    made = [
        composed("kernel", (width, gates * units), [parts["weight_ih"]], kernel, f"transposed{moved}"),
        composed("recurrent_kernel", (units, gates * units), [parts["weight_hh"]], kernel, f"transposed{moved}"),
    ]
    if biases := [parts[part] for part in ("bias_ih", "bias_hh") if part in parts]:
        shape = (len(biases), gates * units) if kind == "GRU" else (gates * units,)
        words = f"two biases one above the other{moved}" if kind == "GRU" else "the sum of two biases"
        made.append(composed("bias", shape, biases, bias, words))
    return made


# Attention


def _packed(path: str, own: Mapping[str, FileArray], lacking: Lacking) -> list[Composed]:
    """The parts of torch.nn.MultiheadAttention under the names of Keras's projections."""
    made = []
    if more := [variable for variable in ("bias_k", "bias_v") if variable in own]:
        text = f"{path!r} is an attention with one more key and value that are learned (add_bias_kv), which Keras's doesn't have"
        lacking[text] = tuple(f"{path}/{variable}".lstrip("/") for variable in more)
    for variable, word in (("in_proj_weight", "weight"), ("in_proj_bias", "bias")):
        if (packed := own.get(variable)) is not None and packed.shape and packed.shape[0] % 3 == 0:
            made += _third(packed, path, word)
    for letter, part in zip("qkv", _PROJECTIONS, strict=True):
        if (source := own.get(f"{letter}_proj_weight")) is not None:
            made.append(_renamed(source, f"{path}/{part}" if path else part, "weight"))
    return made


def _third(packed: FileArray, path: str, word: str) -> list[Composed]:
    length = packed.shape[0] // 3

    def third(number: int) -> Callable[[Sequence[Array]], Array]:
        return lambda arrays: arrays[0][number * length : (number + 1) * length]

    return [
        Composed(
            FileArray(f"{packed.name}[{part}]", (length, *packed.shape[1:]), f"{path}/{part}" if path else part, word),
            (packed.name,),
            third(number),
            f"the {part}'s third of {packed.shape}",
        )
        for number, part in enumerate(_PROJECTIONS)
    ]


def _renamed(source: FileArray, path: str, variable: str) -> Composed:
    return Composed(FileArray(source.name, source.shape, path, variable), (source.name,), _as_it_is, "")


def _attention(modules: Mapping[str, Mapping[str, FileArray]], known: set[str], named: set[str]) -> list[Composed]:
    """Linear layers that are an attention's projections, under the names of Keras's."""
    made: list[Composed] = []

    def moved(here: str, there: str) -> None:
        if here != there and here in modules:
            made.extend(_renamed(source, there, variable) for variable, source in modules[here].items())

    around = {path.rpartition("/")[0] for path in modules} | {path.rpartition("/")[0] for path in named}
    for place in sorted(around):
        prefix = f"{place}/" if place else ""
        done = f"{prefix}query" in named
        if not done and f"{prefix}qkv" in modules and "qkv" not in known:
            for variable, source in modules[f"{prefix}qkv"].items():
                made += _third(source, place, variable) if source.shape and source.shape[0] % 3 == 0 else []
            done = True
        target = place
        for words in () if done else _BESIDE:
            if all(f"{prefix}{word}" in modules for word in words.values()):
                # Some models have the projections in a module of their own beside the output's: `attention.self.query`.
                outer, _, leaf = place.rpartition("/")
                inner = leaf in ("self", "attention") and f"{outer}/output/dense".lstrip("/") in modules
                target = outer if inner else place
                for part, word in words.items():
                    if word not in known or word in _PROJECTIONS:
                        moved(f"{prefix}{word}", f"{target}/{part}".lstrip("/"))
                done = True
                break
        if done:
            ahead = f"{target}/" if target else ""
            output = next((word for word in _OUTPUTS if f"{ahead}{word}" in modules and word not in known), None)
            if output is not None:
                moved(f"{ahead}{output}", f"{ahead}attention_output")
    return made


# Weight normalization


def _normed(path: str, own: Mapping[str, FileArray]) -> list[Composed]:
    """A weight of `torch.nn.utils.weight_norm`, or of the one of that name in `torch.nn.utils.parametrizations`."""
    around, marked, parametrized = path.rpartition("parametrizations/")
    if marked and "/" not in parametrized:
        g, v, path, variable = own.get("original0"), own.get("original1"), around.rstrip("/"), parametrized
    else:
        g, v, variable = own.get("weight_g"), own.get("weight_v"), "weight"
    if g is None or v is None or not v.shape or (g.shape and len(g.shape) != len(v.shape)):
        return []
    lengths = g.shape or tuple(1 for _ in v.shape)  # one length for all, or one for each along an axis
    if any(n not in (1, m) for n, m in zip(lengths, v.shape, strict=True)):
        return []
    axes = tuple(axis for axis, n in enumerate(lengths) if n == 1)

    def make(arrays: Sequence[Array]) -> Array:
        scale, towards = arrays
        norm = np.sqrt(np.square(towards, dtype=np.float64).sum(axis=axes, keepdims=True))
        return np.asarray(scale * towards / norm).astype(towards.dtype)

    source = FileArray(f"{g.name} + {v.variable}", v.shape, path, variable)
    return [Composed(source, (g.name, v.name), make, "the length and direction of weight_norm multiplied")]
