"""The frontier: prefix and suffix together are the model, to the bit, and every cut that isn't legal says why."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from keras import layers

from transferkit.building.frontier import split
from transferkit.building.graph import trace
from transferkit.errors import ModelError


def _rows(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def _freeze(model: Any, *names: str) -> None:
    for name in names:
        model.get_layer(name).trainable = False


def _equal(model: Any, made: Any, x: Any) -> None:
    """Suffix of prefix is the model, with the same variables in the same order."""
    assert made, made.reason
    wanted = keras.tree.flatten(model(x, training=False))
    given_back = keras.tree.flatten(made.suffix(made.prefix(x), training=False))
    assert all(np.array_equal(a, b) for a, b in zip(wanted, given_back, strict=True))
    whole = keras.tree.flatten(made.whole(x, training=False))
    assert all(np.array_equal(a, b) for a, b in zip(wanted, whole, strict=True))
    assert [id(v) for v in made.suffix.trainable_variables] == [id(v) for v in model.trainable_variables]


def _stack(names: str = "abc") -> Any:
    x = tensor = keras.Input((6,), name="in")
    for name in names:
        tensor = layers.Dense(5, activation="relu", name=name)(tensor)
    return keras.Model(x, layers.Dense(2, name="head")(tensor))


def test_prefix_ends_behind_the_last_frozen_layer() -> None:
    model = _stack()
    _freeze(model, "a", "b")
    made = split(model)
    assert [item.name for item in made.boundary] == ["b"]
    assert made.cached == ("a", "b")
    assert made.blocked == (("c", "it trains"),)
    assert made.nbytes == 5 * 4
    _equal(model, made, _rows(7, 6))


def test_frozen_layers_may_be_named_before_their_flags_are_set() -> None:
    model = _stack()
    made = split(model, frozen=[model.get_layer("a"), model.get_layer("b"), model.get_layer("c")])
    assert made.cached == ("a", "b", "c")
    assert model.get_layer("a").trainable


def test_a_frozen_layer_behind_one_that_trains_is_not_cached() -> None:
    model = _stack()
    _freeze(model, "a", "c")
    assert split(model).cached == ("a",)


def test_nothing_frozen_gives_a_reason_and_the_whole() -> None:
    made = split(_stack())
    assert not made
    assert made.reason == "every way from the inputs starts with a layer that isn't constant (a: it trains)"
    assert str(made) == f"Nothing is computed once: {made.reason}"
    assert made.whole is not None


def test_residual_connections_give_several_boundary_tensors() -> None:
    x = keras.Input((6,))
    a = layers.Dense(5, name="a")(x)
    b = layers.Dense(4, name="b")(a)
    c = layers.Dense(5, name="c")(b)
    model = keras.Model(x, layers.Dense(2, name="head")(layers.Add()([a, c])))
    _freeze(model, "a", "b")
    made = split(model)
    assert [item.name for item in made.boundary] == ["a", "b"]
    _equal(model, made, _rows(7, 6))


def test_of_equal_cuts_the_one_with_the_fewest_bytes_is_taken() -> None:
    x = keras.Input((4, 4, 2))
    a = layers.Conv2D(3, 1, name="a")(x)
    wide = layers.UpSampling2D(4, name="wide")(a)
    model = keras.Model(x, layers.Dense(2, name="head")(layers.Flatten()(wide)))
    _freeze(model, "a")
    made = split(model)
    assert [item.name for item in made.boundary] == ["a"]
    assert made.nbytes == 4 * 4 * 3 * 4
    x = keras.Input((4, 4, 2))
    a = layers.Conv2D(3, 1, name="a")(x)
    narrow = layers.GlobalAveragePooling2D(name="narrow")(a)
    model = keras.Model(x, layers.Dense(2, name="head")(narrow))
    _freeze(model, "a")
    assert [item.name for item in split(model).boundary] == ["narrow"]


def test_two_branches_from_one_tensor_are_cut_before_they_part_when_that_is_less() -> None:
    x = keras.Input((6,))
    a = layers.Dense(5, name="a")(x)
    both = [layers.Activation("relu", name="r")(a), layers.Activation("tanh", name="t")(a)]
    model = keras.Model(
        x, layers.Dense(2, name="head")(layers.Multiply()([layers.Dense(3, name=f"d{i}")(b) for i, b in enumerate(both)]))
    )
    _freeze(model, "a")
    made = split(model)
    assert [item.name for item in made.boundary] == ["a"]
    _equal(model, made, _rows(7, 6))


def test_nested_models_are_opened() -> None:
    x = keras.Input((6,))
    inner = keras.Model(x, layers.Dense(4, name="late")(layers.Dense(5, name="early")(x)), name="base")
    y = keras.Input((6,))
    tower = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="one"), layers.Dense(3, name="two")], name="tower")
    model = keras.Model(y, layers.Dense(2, name="head")(tower(inner(y, training=False))))
    inner.trainable = False
    tower.layers[0].trainable = False
    made = split(model)
    assert made.cached == ("base/early", "base/late", "tower/one")
    _equal(model, made, _rows(7, 6))
    inner.layers[-1].trainable = True
    made = split(model)
    assert made.cached == ("base/early",)
    _equal(model, made, _rows(7, 6))


def test_sequential() -> None:
    model = keras.Sequential([keras.Input((6,)), layers.Dense(5, name="a"), layers.Dropout(0.5), layers.Dense(2, name="head")])
    model.layers[0].trainable = False
    made = split(model)
    assert made.cached == ("a",)
    _equal(model, made, _rows(7, 6))


def test_a_sequential_without_shape_says_so() -> None:
    assert split(keras.Sequential([layers.Dense(2)])).reason == "a Sequential that has not been given an input shape yet"


def test_a_shared_layer_on_both_sides() -> None:
    x = keras.Input((5,))
    shared = layers.Dense(5, name="shared")
    a = shared(x)
    b = layers.Dense(5, name="b")(a)
    model = keras.Model(x, layers.Dense(2, name="head")(shared(b)))
    _freeze(model, "shared")
    made = split(model)
    assert made.cached == ("shared",)
    assert made.blocked == (("b", "it trains"),)
    _equal(model, made, _rows(7, 5))


def test_several_inputs_and_outputs() -> None:
    a, b = keras.Input((6,), name="a"), keras.Input((3,), name="b")
    left, right = layers.Dense(4, name="left")(a), layers.Dense(4, name="right")(b)
    joined = layers.Concatenate()([left, right])
    model = keras.Model({"a": a, "b": b}, {"y": layers.Dense(2, name="y")(joined), "aux": layers.Dense(1, name="aux")(left)})
    _freeze(model, "left")
    made = split(model)
    assert [item.name for item in made.boundary] == ["b", "left"]
    x = {"a": _rows(7, 6), "b": _rows(7, 3)}
    _equal(model, made, x)
    assert set(made.suffix(made.prefix(x))) == {"y", "aux"}
    assert made.suffix.output_names == model.output_names


def test_an_output_that_is_frozen_passes_through() -> None:
    x = keras.Input((6,))
    a = layers.Dense(4, name="a")(x)
    model = keras.Model(x, [a, layers.Dense(2, name="head")(a)])
    _freeze(model, "a")
    _equal(model, split(model), _rows(7, 6))


def test_integer_inputs_are_cast_as_the_model_casts_them() -> None:
    x = keras.Input((4, 4, 3))
    a = layers.Conv2D(2, 3, name="a")(layers.Rescaling(1 / 255)(x))
    model = keras.Model(x, layers.Dense(2, name="head")(layers.Flatten()(a)))
    _freeze(model, "a")
    _equal(model, split(model), np.random.default_rng(0).integers(0, 255, (7, 4, 4, 3), dtype=np.uint8))


def test_masks_cross_the_boundary() -> None:
    x = keras.Input((9,), dtype="int32")
    a = layers.Embedding(11, 4, mask_zero=True, name="a")(x)
    model = keras.Model(x, layers.Dense(2, name="head")(layers.LSTM(3, name="rnn")(a)))
    _freeze(model, "a")
    made = split(model)
    assert made.boundary[0].masked
    tokens = np.array([[3, 4, 0, 0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8, 9]])
    _equal(model, made, tokens)
    features, *masks = made.prefix(tokens)
    assert not np.array_equal(made.suffix([features, *masks]), made.suffix([features, *map(np.ones_like, masks)]))


def test_frozen_batch_norm_is_constant_and_one_that_adapts_is_not() -> None:
    x = keras.Input((6,))
    norm = layers.BatchNormalization(name="norm")(layers.Dense(4, name="a")(x))
    model = keras.Model(x, layers.Dense(2, name="head")(norm))
    _freeze(model, "a", "norm")
    assert split(model).cached == ("a", "norm")
    _equal(model, split(model), _rows(7, 6))
    model.get_layer("norm").trainable = True
    assert split(model).blocked == (("norm", "it trains"),)


def test_batch_norm_without_weights_that_train_still_moves_its_statistics() -> None:
    x = keras.Input((6,))
    norm = layers.BatchNormalization(center=False, scale=False, name="norm")(layers.Dense(4, name="a")(x))
    model = keras.Model(x, layers.Dense(2, name="head")(norm))
    _freeze(model, "a")
    before = [np.array(v.numpy()) for v in model.variables]
    assert split(model).blocked == (("norm", "it moves its statistics in training"),)
    assert all(np.array_equal(a, v.numpy()) for a, v in zip(before, model.variables, strict=True))


def _with_dropout() -> Any:
    x = keras.Input((6,))
    a = layers.Dropout(0.5, seed=1, name="inner")(layers.Dense(5, name="a")(x))
    b = layers.Dropout(0.5, seed=2, name="outer")(layers.Dense(5, name="b")(a))
    return keras.Model(x, layers.Dense(2, name="head")(b))


def test_dropout_between_frozen_layers_is_off_and_that_of_the_head_stays_on() -> None:
    model = _with_dropout()
    _freeze(model, "a", "b")
    seeds = [np.array(v.numpy()) for v in model.non_trainable_variables]
    made = split(model)
    assert made.cached == ("a", "inner", "b")
    assert made.blocked == (("outer", "it is random in training"),)
    assert all(np.array_equal(a, v.numpy()) for a, v in zip(seeds, model.non_trainable_variables, strict=True))
    x = _rows(64, 6)
    y = made.suffix(made.prefix(x, training=True), training=True)
    assert not np.array_equal(y, made.suffix(made.prefix(x), training=False))
    model.get_layer("outer").seed_generator.state.assign(seeds[-1])
    assert np.array_equal(made.whole(x, training=True), y)


def test_as_keras_has_it_dropout_ends_the_prefix() -> None:
    model = _with_dropout()
    _freeze(model, "a", "b")
    made = split(model, inference=False)
    assert made.cached == ("a",)
    assert made.blocked == (("inner", "it is random in training"),)


def test_augmentation_before_the_frozen_part_is_never_dropped() -> None:
    x = keras.Input((8, 8, 3))
    flipped = layers.RandomFlip(name="flip")(layers.Rescaling(1 / 255, name="scale")(x))
    a = layers.Conv2D(2, 3, name="a")(flipped)
    model = keras.Model(x, layers.Dense(2, name="head")(layers.Flatten()(a)))
    _freeze(model, "a")
    made = split(model)
    assert "a" not in made.cached
    assert ("flip", "it is random in training") in made.blocked or "flip: it is random in training" in made.reason


@keras.saving.register_keras_serializable("frontier_tests")
class _Centre(layers.Layer):
    def call(self, x: Any) -> Any:
        return x - keras.ops.mean(x, axis=0)

    def compute_output_spec(self, x: Any) -> Any:
        # Keras marks some tensors of a random graph as sparse, and then can't work the shape out by calling the layer.
        return keras.KerasTensor(x.shape, x.dtype)


class _Count(layers.Layer):
    def build(self, _: Any) -> None:
        self.seen = self.add_weight(shape=(), trainable=False, initializer="zeros")

    def call(self, x: Any) -> Any:
        self.seen.assign_add(1.0)
        return x


class _Penalty(layers.Layer):
    def call(self, x: Any) -> Any:
        self.add_loss(keras.ops.mean(x))
        return x


class _NoiseWhenTraining(layers.Layer):
    def call(self, x: Any, training: bool = False) -> Any:
        return x + 1 if training else x


_REFUSED: dict[str, tuple[Any, str]] = {
    "rows": (lambda: _Centre(name="odd"), "its output for a row depends on the rows beside it"),
    "state": (lambda: _Count(name="odd"), "it changes its state when it is used"),
    "loss": (lambda: _Penalty(name="odd"), "it adds a loss, which the suffix would miss"),
    "activity": (
        lambda: layers.Activation("relu", activity_regularizer="l2", name="odd"),
        "it adds a loss, which the suffix would miss",
    ),
    "training": (lambda: _NoiseWhenTraining(name="odd"), "it is random in training"),
    "chance": (
        lambda: layers.Lambda(lambda t: t + keras.random.normal((5,)), output_shape=(5,), name="odd"),
        "it gives another result each time",
    ),
    "sum": (
        lambda: layers.Lambda(lambda t: keras.ops.sum(t, axis=0, keepdims=True), output_shape=(5,), name="odd"),
        "its output doesn't have one row for each row of its input",
    ),
    "axis": (lambda: layers.Softmax(axis=0, name="odd"), "its output for a row depends on the rows beside it"),
}


@pytest.mark.parametrize("kind", _REFUSED)
def test_what_is_not_constant_is_refused_with_its_reason(kind: str) -> None:
    make, reason = _REFUSED[kind]
    x = keras.Input((6,))
    odd = make()(layers.Dense(5, name="a")(x))
    model = keras.Model(x, layers.Dense(2, name="head")(layers.Dense(5, name="b")(odd)))
    _freeze(model, "a", "b")
    before = [np.array(v.numpy()) for v in model.variables]
    if kind == "training":  # between frozen layers it would be taken as off
        model.get_layer("b").trainable = True
    made = split(model, sample=_rows(5, 6))
    assert made.cached == ("a",)
    assert made.blocked == (("odd", reason),)
    assert all(np.array_equal(a, v.numpy()) for a, v in zip(before, model.variables, strict=True))
    with pytest.raises(ModelError) as caught:
        split(model, at=["b"], sample=_rows(5, 6))
    lines = [f"odd: {reason}"] + (["b: it trains"] if kind == "training" else [])
    found = f"  found: {lines[0]}" if len(lines) == 1 else "  found 2 problems:\n" + "\n".join(f"    - {line}" for line in lines)
    assert str(caught.value) == (
        "Cutting behind 'b'.\n"
        f"{found}\n"
        "  likely cause: what lies before the cut is computed once, so it must give the same numbers in every epoch\n"
        "  to fix it: cut earlier, or freeze those layers"
    )


def test_a_cut_behind_an_unknown_layer_names_near_ones() -> None:
    model = _stack()
    with pytest.raises(ModelError) as caught:
        split(model, at=["haed"])
    assert str(caught.value) == (
        "Cutting behind 'haed'.\n"
        "  found: no layer 'haed' (did you mean 'head'?)\n"
        "  to fix it: the layers are 'a', 'b', 'c', 'head'"
    )


class _Own(keras.Model):
    def train_step(self, data: Any) -> Any:
        return super().train_step(data)


class _Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.dense = layers.Dense(2)

    def call(self, x: Any) -> Any:
        return self.dense(x)


def test_models_that_are_more_than_their_graph_are_computed_in_full_and_say_why() -> None:
    x = keras.Input((6,))
    made = split(_Own(x, layers.Dense(2)(x)))
    assert (made.prefix, made.reason) == (None, "_Own has its own train_step, which must see the whole model")
    made = split(_Subclassed())
    assert made.reason == "_Subclassed is a subclassed model, whose graph is only in its Python code"


def test_mixed_precision_keeps_the_bits() -> None:
    x = keras.Input((6,))
    a = layers.Dense(5, name="a", dtype="mixed_bfloat16")(x)
    model = keras.Model(x, layers.Dense(2, name="head", dtype="float32")(a))
    _freeze(model, "a")
    made = split(model)
    assert made.boundary[0].dtype == "bfloat16"
    assert made.nbytes == 10
    _equal(model, made, _rows(7, 6))


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["dense", "shared", "relu", "norm", "drop", "add", "concat", "op", "nested", "centre"]),
        st.integers(0, 99),
        st.booleans(),
    ),
    min_size=2,
    max_size=9,
)


def _grown(steps: list[tuple[str, int, bool]]) -> tuple[Any, set[str]]:
    """A graph of 4-wide tensors, grown step by step from earlier ones; and the layers that no cut may have before it."""
    x = keras.Input((4,), name="in")
    tensors = [x]
    shared = layers.Dense(4, name="shared")
    shared.build((None, 4))
    barred = set()
    for number, (kind, pick, frozen) in enumerate(steps):
        tensor, other = tensors[-1 - pick % min(3, len(tensors))], tensors[pick % len(tensors)]
        name = f"{kind}{number}"
        if kind == "dense":
            layer = layers.Dense(4, name=name)
            layer.trainable = not frozen
            barred |= set() if frozen else {name}
            tensor = layer(tensor)
        elif kind == "shared":
            shared.trainable = False
            tensor = shared(tensor)
        elif kind == "relu":
            tensor = layers.Activation("relu", name=name)(tensor)
        elif kind == "norm":
            layer = layers.BatchNormalization(name=name)
            tensor = layer(tensor)
            layer.moving_mean.assign(_rows(4, seed=number))
            layer.trainable = not frozen
            barred |= set() if frozen else {name}
        elif kind == "drop":
            barred.add(name)
            tensor = layers.Dropout(0.3, name=name)(tensor)
        elif kind == "add":
            tensor = layers.Add(name=name)([tensor, other])
        elif kind == "concat":
            tensor = keras.ops.concatenate([tensor, other], axis=-1)[:, 1:5]
        elif kind == "op":
            tensor = keras.ops.tanh(tensor) * 2.0
        elif kind == "centre":
            barred.add(name)
            tensor = _Centre(name=name)(tensor)
        else:
            inside = keras.Input((4,))
            middle = layers.Dense(4, name="within")
            nested = keras.Model(inside, layers.Activation("tanh")(middle(inside)), name=name)
            middle.trainable = not frozen
            barred |= set() if frozen else {f"{name}/within"}
            tensor = nested(tensor)
        tensors.append(tensor)
    return keras.Model(x, [tensors[-1], layers.Dense(2, name="head")(tensors[-1])]), barred | {"head"}


@settings(
    max_examples=12,
    phases=[Phase.explicit, Phase.generate],
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(_STEPS)
def test_suffix_of_prefix_is_the_model_at_every_legal_cut(steps: list[tuple[str, int, bool]]) -> None:
    model, barred = _grown(steps)
    x = _rows(6, 4)
    graph = trace(model)
    feeds = {number: call for call in graph.calls for number in call.outputs}
    for path in dict.fromkeys(call.path for call in graph.calls):
        waiting, before = [call for call in graph.calls if call.path == path], set()
        while waiting:
            call = waiting.pop()
            before.add(call.path)
            waiting.extend(feeds[number] for number in call.inputs if number in feeds)
        if before & barred:
            with pytest.raises(ModelError) as caught:
                split(model, at=[path], sample=x, inference=False)
            blamed = {problem.split(":")[0] for problem in caught.value.found}
            assert blamed
            assert blamed <= before & barred
        else:
            _equal(model, split(model, at=[path], sample=x, inference=False), x)
    made = split(model, sample=x, inference=False)
    if made:
        _equal(model, made, x)
