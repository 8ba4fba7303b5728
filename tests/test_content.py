"""What a graph computes, told by content: two that differ in anything but their weights never share a mark or a program."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from transferkit.building import programs
from transferkit.building.frontier import split
from transferkit.building.graph_model import GraphModel
from transferkit.tuning.features import compute


def _prefix(model: Any) -> GraphModel:
    made: GraphModel = split(model).prefix
    return made


def _with_constant(array: Any) -> Any:
    x = keras.Input((len(array),))
    return _headed(x, keras.ops.add(x, array))


def _headed(x: Any, tensor: Any) -> Any:
    keras.utils.set_random_seed(0)
    tensor = layers.Dense(3, trainable=False, name="frozen")(tensor)
    return keras.Model(x, layers.Dense(2, name="head")(tensor))


@pytest.mark.parametrize("size", [4, 5000])
def test_a_constant_counts_to_its_last_bit(size: int) -> None:
    base = np.linspace(0, 1, size, dtype="float32")
    changed = base.copy()
    changed[size // 2] = np.nextafter(changed[size // 2], np.float32(2))
    marks = [_prefix(_with_constant(array)).digest() for array in (base, base.copy(), changed, base.astype("float64"))]
    assert marks[0] is not None
    assert marks[0] == marks[1]
    assert len(set(marks)) == 3


def _texts(words: list[str], *, mode: str = "int", make: Any = layers.TextVectorization) -> Any:
    keras.utils.set_random_seed(0)
    text = keras.Input((1,), dtype="string")
    look_up = make(output_mode=mode) if make is layers.StringLookup else make(output_mode=mode, output_sequence_length=None)
    look_up.adapt(np.array(words)[:, None])
    tensor = look_up(text)
    if mode == "int":
        tensor = layers.GlobalAveragePooling1D()(layers.Embedding(10, 3, trainable=False)(tensor))
    return keras.Model(text, layers.Dense(2)(layers.Dense(3, trainable=False)(tensor)))


@pytest.mark.parametrize("make", [layers.TextVectorization, layers.StringLookup])
def test_other_words_are_other_content(make: Any) -> None:
    one, same, other = (_prefix(_texts(words, make=make)).digest() for words in (["a", "b"], ["a", "b"], ["b", "c"]))
    assert one is not None
    assert one == same != other


def test_the_weights_of_words_are_content() -> None:
    one, same, other = (
        _prefix(_texts(words, mode="tf_idf")).digest() for words in (["a b", "b a a"], ["a b", "b a a"], ["a b", "a"])
    )
    assert one is not None
    assert one == same != other


def test_features_of_other_words_are_computed_anew(tmp_path: Any) -> None:
    data = np.array([["a"], ["c"]]), np.array([0, 1])
    found = []
    for words in (["a", "b"], ["c", "a"]):
        model = _texts(words, make=layers.StringLookup)
        made = compute(_prefix(model), data, folder=tmp_path)
        assert not made.reused
        assert np.array_equal(made.arrays[0], keras.Model(model.input, model.layers[-2].output).predict(tf.constant(data[0])))
        found.append(made.arrays[0])
    assert not np.array_equal(*found)


def test_inputs_whose_names_change_places_are_other_content() -> None:
    marks = []
    for names in (("a", "b"), ("a", "b"), ("c", "d"), ("b", "a")):
        keras.utils.set_random_seed(0)
        inputs = [keras.Input((2,), name=name) for name in names]
        merged = layers.Subtract()([layers.Dense(3, trainable=False)(tensor) for tensor in inputs])
        marks.append(_prefix(keras.Model(inputs, layers.Dense(2)(merged))).digest())
    # Under other names in the same order the same rows go the same ways.
    assert marks[0] == marks[1] == marks[2] != marks[3]


def test_a_call_that_was_put_in_place_of_a_layers_own_has_no_mark() -> None:
    model = _with_constant(np.ones(4, "float32"))
    model.get_layer("frozen").call = lambda x, **_: x[:, :3]
    assert _prefix(model).digest() is None


def _images(seed: int, *, mean: float = 0.0, name: str = "sum") -> tuple[Any, Any]:
    """A frozen network with BatchNorm in front of a sum, and its rows scaled by what was adapted."""
    keras.utils.set_random_seed(seed)
    pixels = keras.Input((8, 8, 3))
    scaled = layers.Normalization(name="scaled")
    scaled.build((None, 8, 8, 3))
    scaled.adapt(np.random.default_rng(seed).normal(mean, 2.0, (20, 8, 8, 3)).astype("float32"))
    tensor = layers.Conv2D(16, 3, padding="same", name="first")(scaled(pixels))
    tensor = layers.BatchNormalization(name="before")(tensor)
    tensor = layers.Add(name=name)([tensor, layers.Conv2D(16, 1, name="beside")(tensor)])
    tensor = layers.GlobalAveragePooling2D(name="pool")(tensor)
    base = keras.Model(pixels, tensor)
    base.trainable = False
    for weight in base.get_layer("before").weights:
        weight.assign(np.random.default_rng(seed).uniform(0.5, 1.5, weight.shape))
    return base, keras.Model(pixels, layers.Dense(2)(base(pixels)))


def _is_predicts(made: tuple[Any, Any], x: Any) -> None:
    base, model = made
    prefix = _prefix(model)
    assert np.array_equal(prefix.as_function(x)(x), base.predict(x, verbose=0))


@pytest.fixture
def none_kept(monkeypatch: pytest.MonkeyPatch) -> Any:
    kept = type(programs._kept)()
    monkeypatch.setattr(programs, "_kept", kept)
    return kept


def test_models_of_one_structure_share_a_program_and_each_gives_its_own(none_kept: Any) -> None:
    x = tf.constant(np.random.default_rng(0).normal(size=(6, 8, 8, 3)).astype("float32"))
    base, model = _images(1)
    _is_predicts((base, model), x)
    assert len(none_kept) == 1
    for weight in base.weights:  # the same statistics of the rows, all else another
        if "scaled" not in weight.path:
            weight.assign(weight + 0.25)
    _is_predicts((base, model), x)
    assert len(none_kept) == 1
    _is_predicts(_images(1), x)
    assert len(none_kept) == 1


def _stacked(order: tuple[int, int], *, once: bool = False) -> tuple[Any, Any]:
    """Two frozen layers of the same settings, one after the other; `order` is that in which the model comes by them."""
    keras.utils.set_random_seed(2)
    made = [layers.Dense(4, name=name) for name in "ab"]
    for layer in made:
        layer.build((None, 4))
    x = keras.Input((4,))
    first, second = made[order[0]], made[order[0] if once else order[1]]
    tensor = layers.Add(name="sum")([x, second(layers.ReLU(name="between")(first(x)))])
    base = keras.Model(x, tensor)
    base.trainable = False
    return base, keras.Model(x, layers.Dense(2)(base(x)))


def test_weights_go_to_the_calls_that_take_them(none_kept: Any) -> None:
    x = tf.constant(np.random.default_rng(0).normal(size=(6, 4)).astype("float32"))
    marks = []
    for order in ((0, 1), (1, 0)):
        _is_predicts(_stacked(order), x)
        marks.append(_prefix(_stacked(order)[1]).digest())
    assert marks[0] != marks[1]
    base, model = _stacked((0, 1))
    prefix = _prefix(model)
    # The same calls in a model that lists the variables the other way round.
    turned = GraphModel(
        prefix._graph[0],
        inputs=prefix._graph[1],
        outputs=prefix._graph_outputs.value,
        quiet=prefix._graph[4],
        specs=prefix._all_specs.value,
        order=list(reversed(model.variables)),
        input_structure=prefix._graph_inputs.value,
        name="turned",
    )
    assert [w.path for w in turned.weights] != [w.path for w in prefix.weights]
    assert turned.digest() == prefix.digest() == marks[0]
    assert np.array_equal(turned.as_function(x)(x), base.predict(x, verbose=0))
    assert len(none_kept) == len(marks)


def test_a_layer_that_is_called_twice_is_not_two_layers(none_kept: Any) -> None:
    x = tf.constant(np.random.default_rng(0).normal(size=(6, 4)).astype("float32"))
    for once in (False, True):
        _is_predicts(_stacked((0, 1), once=once), x)
    assert len(none_kept) == 2


def test_what_a_layer_holds_beside_its_weights_makes_another_program(none_kept: Any) -> None:
    x = tf.constant(np.random.default_rng(0).normal(size=(6, 8, 8, 3)).astype("float32"))
    for count, (seed, mean, name) in enumerate([(1, 0.0, "sum"), (1, 5.0, "sum"), (1, 5.0, "a_sum")], start=1):
        _is_predicts(_images(seed, mean=mean, name=name), x)
        assert len(none_kept) == count


def test_a_program_is_for_its_shapes_and_settings(none_kept: Any) -> None:
    base, model = _images(1)
    for count, rows in enumerate((4, 5, 4, 5), start=1):
        _is_predicts((base, model), tf.constant(np.random.default_rng(rows).normal(size=(rows, 8, 8, 3)).astype("float32")))
        assert len(none_kept) == min(count, 2)
    before = keras.config.epsilon()
    try:
        keras.config.set_epsilon(1e-5)
        _is_predicts((base, model), tf.ones((4, 8, 8, 3)))
    finally:
        keras.config.set_epsilon(before)
    assert len(none_kept) == 3


def test_what_is_a_models_own_is_not_shared(none_kept: Any) -> None:
    """A table of words is the model's; layers of the user's may be anything."""
    data = tf.constant([["a"], ["c"]])
    for words in (["a", "b"], ["c", "a"]):
        model = _texts(words)
        assert np.array_equal(_prefix(model).as_function(data)(data), keras.Model(model.input, model.layers[-2].output)(data))
    assert set(none_kept.values()) == {None}
    none_kept.clear()

    class Twice(layers.Layer):  # type: ignore[misc, unused-ignore]
        """Its factor stands in no setting."""

        factor = 2.0

        def call(self, x: Any) -> Any:
            return x * self.factor

    x = keras.Input((4,))
    made = Twice()
    prefix = _prefix(_headed(x, made(x)))
    rows = tf.ones((3, 4))
    first = prefix.as_function(rows)(rows)
    made.factor = 3.0
    assert not none_kept
    assert first.shape == (3, 3)


def test_only_the_last_programs_are_kept(none_kept: Any) -> None:
    for rows in range(2, 2 + programs._KEPT + 3):
        x = tf.ones((rows, 4))
        _prefix(_with_constant(np.ones(4, "float32"))).as_function(x)(x)
    assert len(none_kept) == programs._KEPT


def test_shared_programs_take_the_weights_of_the_time_they_are_asked_for(none_kept: Any) -> None:
    del none_kept
    model = _with_constant(np.zeros(4, "float32"))
    rows = tf.ones((3, 4))
    prefix = _prefix(model)
    before = prefix.as_function(rows)
    wanted = model.get_layer("frozen")(rows).numpy()
    model.get_layer("frozen").kernel.assign(tf.ones((4, 3)))
    assert np.array_equal(before(rows), wanted)
    assert np.array_equal(prefix.as_function()(rows), np.full((3, 3), 4.0))
