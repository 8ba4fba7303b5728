"""PyTorch's recurrent and attention layers in Keras's: against the equations of PyTorch's documentation, written out in NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import transferkit as tk

Array = np.ndarray[Any, Any]
State = dict[str, Array]
UNITS, WIDTH = 5, 4
GATES = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}
rng = np.random.default_rng(0)


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def saved(path: Path, state: State) -> tk.WeightLoader:
    arrays: Any = {name: array.astype("float32") for name, array in state.items()}
    np.savez(path, **arrays)
    return tk.WeightLoader(path).layout("torch")


def recurrent_state(kind: str, depth: int, both: bool) -> State:
    rows = GATES[kind] * UNITS
    state: State = {}
    for number in range(depth):
        width = WIDTH if number == 0 else UNITS * (1 + both)
        for back in ("", "_reverse")[: 1 + both]:
            ending = f"l{number}{back}"
            state |= {f"rnn.weight_ih_{ending}": rng.normal(size=(rows, width)), f"rnn.bias_ih_{ending}": rng.normal(size=rows)}
            state |= {f"rnn.weight_hh_{ending}": rng.normal(size=(rows, UNITS)), f"rnn.bias_hh_{ending}": rng.normal(size=rows)}
    return state


def recurrent(kind: str, state: State, x: Array, ending: str) -> Array:
    """What torch.nn.LSTM, GRU and RNN compute in one direction, by their documentation; (n, steps, features)."""
    w, u, b, c = (state[f"rnn.{part}_{ending}"] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    hidden = cell = np.zeros((len(x), UNITS))
    outputs = []
    for step in x.transpose(1, 0, 2):
        of_x, of_h = step @ w.T + b, hidden @ u.T + c
        if kind == "LSTM":
            i, f, g, o = np.split(of_x + of_h, 4, axis=1)
            cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
            hidden = sigmoid(o) * np.tanh(cell)
        elif kind == "GRU":
            (r, z, n), (hr, hz, hn) = np.split(of_x, 3, axis=1), np.split(of_h, 3, axis=1)
            update = sigmoid(z + hz)
            hidden = (1 - update) * np.tanh(n + sigmoid(r + hr) * hn) + update * hidden
        else:
            hidden = np.tanh(of_x + of_h)
        outputs.append(hidden)
    return np.stack(outputs, 1)


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize(("depth", "both"), [(1, False), (2, False), (2, True)])
def test_recurrent_layers(tmp_path: Path, kind: str, depth: int, both: bool) -> None:
    state = recurrent_state(kind, depth, both)
    stack = [getattr(layers, kind)(UNITS, return_sequences=True) for _ in range(depth)]
    stack = [layers.Bidirectional(layer) for layer in stack] if both else stack
    model = keras.Sequential([keras.Input((6, WIDTH)), *stack])
    report = saved(tmp_path / "w.npz", state).load(model)
    assert report.coverage == 1
    expected = x = rng.normal(size=(2, 6, WIDTH))
    for number in range(depth):
        ahead = recurrent(kind, state, expected, f"l{number}")
        behind = [recurrent(kind, state, expected[:, ::-1], f"l{number}_reverse")[:, ::-1]] if both else []
        expected = np.concatenate([ahead, *behind], -1)
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-5)


def test_stacks_go_by_their_numbers_and_chosen_names_by_a_rule(tmp_path: Path) -> None:
    loader = saved(tmp_path / "w.npz", recurrent_state("LSTM", 2, False))
    first, second = (layers.LSTM(UNITS, return_sequences=True, name=name) for name in ("lower", "upper"))
    model = keras.Sequential([keras.Input((6, WIDTH)), first, second])
    report = loader.map({"upper": "rnn/lstm_1", "lower": "rnn/lstm"}).load(model)
    assert report["upper/lstm_cell/kernel"].source == "rnn.weight_ih_l1"
    assert report["upper/lstm_cell/bias"].source == "rnn.bias_ih_l1 + bias_hh_l1"
    assert [t.why for t in report.tensors[:3]] == ["transposed", "transposed", "the sum of two biases"]


def test_what_kerass_layers_dont_have_is_refused(tmp_path: Path) -> None:
    state = recurrent_state("LSTM", 1, False)
    model = keras.Sequential([keras.Input((6, WIDTH)), layers.LSTM(UNITS)])
    projected = saved(tmp_path / "p.npz", {**state, "rnn.weight_hr_l0": np.zeros((3, UNITS))}).match(model)
    assert projected.problems == (
        "'rnn' is an LSTM with a projection of its output (proj_size), which Keras's LSTM doesn't have",
    )
    assert projected.rules == ('.skip("rnn/*", of="file")',)
    gru = saved(tmp_path / "g.npz", recurrent_state("GRU", 1, False))
    before = keras.Sequential([keras.Input((6, WIDTH)), layers.GRU(UNITS, reset_after=False, name="rnn")])
    assert gru.match(before).problems == (
        "'rnn/gru_cell/bias': the file's 'rnn.bias_ih_l0 + bias_hh_l0' has the shape (2, 15), the variable (15,); the file's "
        "layer applies its reset gate after the recurrent kernel: build GRU(…, reset_after=True)",
    )


HEADS, SIZE = 2, 8


def attention(q: Array, k: Array, parts: State) -> Array:
    """torch.nn.functional.multi_head_attention written out, from W and b of each projection."""

    def heads(x: Array, part: str) -> Array:
        y = x @ parts[f"{part}.weight"].T + parts[f"{part}.bias"]
        return y.reshape(*y.shape[:2], HEADS, -1).transpose(0, 2, 1, 3)

    query, key, value = heads(q, "query"), heads(k, "key"), heads(k, "value")
    scores = np.exp(query @ key.transpose(0, 1, 3, 2) / np.sqrt(query.shape[-1]))
    mixed = (scores / scores.sum(-1, keepdims=True)) @ value
    return np.asarray(mixed.transpose(0, 2, 1, 3).reshape(*q.shape[:2], -1) @ parts["out.weight"].T + parts["out.bias"])


def packed(parts: State) -> State:
    return {
        f"attn.in_proj_{word}": np.concatenate([parts[f"{part}.{word}"] for part in ("query", "key", "value")])
        for word in ("weight", "bias")
    } | {f"attn.out_proj.{word}": parts[f"out.{word}"] for word in ("weight", "bias")}


def qkv(parts: State) -> State:
    return {name.replace("in_proj_", "qkv.").replace("out_proj", "proj"): array for name, array in packed(parts).items()}


def beside(parts: State) -> State:
    words = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
    return {f"attn.{words[name.split('.')[0]]}.{name.split('.')[1]}": array for name, array in parts.items()}


def of_bert(parts: State) -> State:
    return {f"attn.{'output.dense' if n[:3] == 'out' else 'self.' + n[:-len(n.split('.')[1]) - 1]}.{n.split('.')[1]}": a
            for n, a in parts.items()}  # fmt: skip


@pytest.mark.parametrize("written", [packed, qkv, beside, of_bert])
@pytest.mark.parametrize("name", ["attn", "multi_head_attention"])
def test_attention(tmp_path: Path, written: Any, name: str) -> None:
    shapes = {"weight": (SIZE, SIZE), "bias": (SIZE,)}
    parts = {f"{p}.{w}": rng.normal(scale=0.4, size=s) for p in ("query", "key", "value", "out") for w, s in shapes.items()}
    q, k = keras.Input((6, SIZE)), keras.Input((3, SIZE))
    model = keras.Model([q, k], layers.MultiHeadAttention(HEADS, SIZE // HEADS, name=name)(q, k))
    report = saved(tmp_path / "w.npz", written(parts)).load(model)
    assert report.coverage == 1
    assert report[f"{name}/key/kernel"].why.endswith("transposed, (8, 8) as (8, 2, 4)")
    x, y = rng.normal(size=(2, 6, SIZE)), rng.normal(size=(2, 3, SIZE))
    np.testing.assert_allclose(model.predict([x, y], verbose=0), attention(x, y, parts), atol=1e-5)


def test_a_learned_key_and_value_more_are_never_dropped_in_silence(tmp_path: Path) -> None:
    shapes = {"weight": (SIZE, SIZE), "bias": (SIZE,)}
    parts = {f"{p}.{w}": rng.normal(size=s) for p in ("query", "key", "value", "out") for w, s in shapes.items()}
    state = packed(parts) | {f"attn.bias_{letter}": rng.normal(size=(1, 1, SIZE)) for letter in "kv"}
    start = keras.Input((6, SIZE))
    model = keras.Model(start, layers.MultiHeadAttention(HEADS, SIZE // HEADS, name="attn")(start, start))
    loader = saved(tmp_path / "w.npz", state)
    for rules in (loader, loader.only("attn/*"), loader.by_order()):
        report = rules.match(model)
        assert report.problems == (
            "'attn' is an attention with one more key and value that are learned (add_bias_kv), which Keras's doesn't have",
        )
        assert report.rules == ('.skip("attn/bias_k", "attn/bias_v", of="file")',)
    assert loader.skip("attn/bias_k", "attn/bias_v", of="file").load(model).coverage == 1


def test_projections_stay_dense_layers_in_a_model_that_has_such(tmp_path: Path) -> None:
    names = ("q_proj", "k_proj", "v_proj")
    state = {f"{name}.{word}": rng.normal(size=s) for name in names for word, s in (("weight", (3, 4)), ("bias", (3,)))}
    start = keras.Input((4,))
    model = keras.Model(start, [layers.Dense(3, name=name)(start) for name in names])
    report = saved(tmp_path / "w.npz", state).load(model)
    assert [t.source for t in report.tensors] == list(state)


@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize(
    "names", [("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1")]
)
def test_weight_norm(tmp_path: Path, names: tuple[str, str], axis: int | None) -> None:
    v = rng.normal(size=(3, 4))
    over = tuple(other for other in (0, 1) if other != axis)
    norm = np.sqrt(np.square(v).sum(axis=over, keepdims=True))
    g = rng.uniform(1, 2, size=norm.shape if axis is not None else ())
    loader = saved(tmp_path / "n.npz", {f"fc.{names[0]}": g, f"fc.{names[1]}": v, "fc.bias": np.zeros(3)})
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="fc")])
    report = loader.load(model)
    assert report["fc/kernel"].why == "the length and direction of weight_norm multiplied; transposed"
    np.testing.assert_allclose(model.get_weights()[0], (g * v / norm).T, rtol=1e-6)


def test_separable_convolutions_and_one_slope(tmp_path: Path) -> None:
    state = {
        "dw.weight": rng.normal(size=(8, 1, 3, 3)),
        "pw.weight": rng.normal(size=(5, 8, 1, 1)),
        "act.weight": np.full(1, 0.3),
    }
    rules = {"sep/depthwise_kernel": "dw/weight", "sep/pointwise_kernel": "pw/weight"}
    model = keras.Sequential(
        [
            keras.Input((7, 7, 4)),
            layers.SeparableConv2D(5, 3, depth_multiplier=2, use_bias=False, name="sep"),
            layers.PReLU(shared_axes=[1, 2], name="act"),
        ]
    )
    report = saved(tmp_path / "s.npz", state).map(rules).load(model)
    assert report["act/alpha"].why == "one slope for all"
    deep, wide, slope = model.get_weights()
    # PyTorch's output channel 2c + m of a depthwise convolution is channel c's m-th.
    np.testing.assert_array_equal(deep[:, :, 1, 1], state["dw.weight"][3, 0].astype("float32"))
    np.testing.assert_array_equal(wide[0, 0].T, state["pw.weight"][:, :, 0, 0].astype("float32"))
    assert slope.shape == (1, 1, 5)
    assert np.all(slope == np.float32(0.3))
