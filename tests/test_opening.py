"""`open_model` on files written here in the words of old versions of Keras, against NumPy and plain Keras."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from transferkit.building.opening import explain_model, open_model
from transferkit.building.operations import operation
from transferkit.errors import ModelError, UnsafeFileError, WeightsError, WeightsFileError

rng = np.random.default_rng(0)
Arrays = Mapping[str, np.ndarray[Any, Any]]


def old_file(
    path: Path,
    config: Any,
    layers: Mapping[str, Arrays],
    *,
    version: str = "1.2.2",
    class_name: str = "Sequential",
    ending: str = ":0",
) -> Path:
    """A legacy HDF5 file as Keras 1 and 2 laid it out."""
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"] = version.encode()
        file.attrs["model_config"] = json.dumps({"class_name": class_name, "config": config}).encode()
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [name.encode() for name in layers]
        for name, arrays in layers.items():
            inner = group.create_group(name)
            inner.attrs["weight_names"] = [f"{key}{ending}".encode() for key in arrays]
            for key, array in arrays.items():
                inner.create_dataset(f"{key}{ending}", data=array.astype("float32"))
    return path


def layer(class_name: str, name: str, **config: Any) -> dict[str, Any]:
    return {"class_name": class_name, "config": {"name": name, **config}}


def sigmoid_of_keras_1(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.clip(0.2 * x + 0.5, 0, 1)


def test_an_lstm_of_keras_1_computes_what_it_did(tmp_path: Path) -> None:
    gates = {
        f"lstm_1_{part}_{gate}": rng.normal(size=shape)
        for gate in "icfo"
        for part, shape in (("W", (3, 4)), ("U", (4, 4)), ("b", (4,)))
    }
    config = [
        layer("LSTM", "lstm_1", output_dim=4, batch_input_shape=[None, 5, 3], init="glorot_uniform", inner_init="orthogonal",
              forget_bias_init="one", activation="tanh", inner_activation="hard_sigmoid", consume_less="cpu", W_regularizer=None,
              dropout_W=0.0, dropout_U=0.0, return_sequences=False, go_backwards=False, stateful=False, unroll=False),
    ]  # fmt: skip
    path = old_file(tmp_path / "old.h5", config, {"lstm_1": gates})
    model = open_model(path)
    inputs = rng.normal(size=(2, 5, 3)).astype("float32")
    hidden, cell = np.zeros((2, 4)), np.zeros((2, 4))
    for x in inputs.transpose(1, 0, 2):
        i, c, f, o = (x @ gates[f"lstm_1_W_{g}"] + hidden @ gates[f"lstm_1_U_{g}"] + gates[f"lstm_1_b_{g}"] for g in "icfo")
        cell = sigmoid_of_keras_1(f) * cell + sigmoid_of_keras_1(i) * np.tanh(c)
        hidden = sigmoid_of_keras_1(o) * np.tanh(cell)
    np.testing.assert_allclose(model.predict(inputs, verbose=0), hidden, atol=1e-5)
    assert isinstance(model, keras.Sequential)
    report = explain_model(path)
    assert report.generation == 1
    assert report.backend == "tensorflow"
    assert "hard_sigmoid keeps the slope 0.2 it had; Keras 3's own has 1/6" in str(report)
    assert report.to_dict()["problems"] == []


def test_a_convolution_from_theano_is_turned_round(tmp_path: Path) -> None:
    kernel, bias = rng.normal(size=(4, 2, 3, 3)), rng.normal(size=4)
    config = [
        layer("Convolution2D", "conv", nb_filter=4, nb_row=3, nb_col=3, border_mode="valid", subsample=[1, 1], dim_ordering="th",
              activation="linear", batch_input_shape=[None, 2, 6, 5], bias=True),
    ]  # fmt: skip
    image = rng.normal(size=(1, 2, 6, 5)).astype("float32")
    arrays = {"conv_W": kernel, "conv_b": bias}
    theano = open_model(old_file(tmp_path / "theano.h5", config, {"conv": arrays}, ending=""))
    tensorflow = open_model(old_file(tmp_path / "tensorflow.h5", config, {"conv": arrays}))
    for model, turned in ((theano, kernel[:, :, ::-1, ::-1]), (tensorflow, kernel)):
        expected = np.array(
            [
                [[(turned[f] * image[0, :, i : i + 3, j : j + 3]).sum() + bias[f] for j in range(3)] for i in range(4)]
                for f in range(4)
            ]
        )
        np.testing.assert_allclose(model.predict(image, verbose=0)[0], expected, atol=1e-5)


def test_branches_merged_in_a_sequential_become_one_model(tmp_path: Path) -> None:
    dense = {"output_dim": 2, "activation": "linear", "bias": True}
    branches = [
        {"class_name": "Sequential", "config": [layer("Dense", name, input_dim=3, batch_input_shape=[None, 3], **dense)]}
        for name in ("left", "right")
    ]
    merge = layer("Merge", "merge", mode="concat", mode_type="raw", concat_axis=-1, layers=branches)
    arrays = {
        n: {f"{n}_W": rng.normal(size=s), f"{n}_b": rng.normal(size=2)}
        for n, s in (("left", (3, 2)), ("right", (3, 2)), ("end", (4, 2)))
    }
    model = open_model(old_file(tmp_path / "old.h5", [merge, layer("Dense", "end", **dense)], arrays))
    a, b = rng.normal(size=(2, 4, 3)).astype("float32")
    both = np.concatenate(
        [a @ arrays["left"]["left_W"] + arrays["left"]["left_b"], b @ arrays["right"]["right_W"] + arrays["right"]["right_b"]], 1
    )
    np.testing.assert_allclose(
        model.predict([a, b], verbose=0), both @ arrays["end"]["end_W"] + arrays["end"]["end_b"], atol=1e-5
    )


def frozen_inside() -> keras.Model:
    inner = keras.Sequential(
        [keras.Input((6,)), keras.layers.BatchNormalization(), keras.layers.Dense(4), keras.layers.BatchNormalization()]
    )
    inner.layers[0].trainable = False
    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.layers.Dense(2)(inner(inputs)))
    model.set_weights([rng.uniform(0.5, 1.5, size=w.shape) for w in model.get_weights()])
    return model


def varied() -> keras.Model:
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, padding="same", activation="relu")(inputs)
    y = keras.layers.SeparableConv2D(4, 3, padding="same", depth_multiplier=2)(x)
    x = keras.layers.Concatenate()([x * 2.0 + y, keras.layers.PReLU(shared_axes=[1, 2])(y)])
    x = keras.layers.Reshape((64, 8))(x)
    x = keras.layers.Bidirectional(keras.layers.GRU(3, return_sequences=True))(x)
    x = keras.layers.MultiHeadAttention(2, 3)(x, x)
    x = keras.layers.TimeDistributed(keras.layers.Dense(2, activation="gelu"))(x)
    return keras.Model(inputs, keras.layers.Dense(2, kernel_regularizer="l2")(keras.ops.mean(x, axis=1)[:, :4]))


@pytest.mark.parametrize("build", [frozen_inside, varied])
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore:.*legacy")
def test_what_keras_opens_opens_equal_to_the_bit(tmp_path: Path, build: Any, suffix: str) -> None:
    model = build()
    model.save(tmp_path / f"model{suffix}")
    opened = open_model(tmp_path / f"model{suffix}")
    inputs = rng.normal(size=(3, *model.input_shape[1:])).astype("float32")
    np.testing.assert_array_equal(opened.predict(inputs, verbose=0), model.predict(inputs, verbose=0))


def test_a_lambda_is_refused_by_name_and_taken_as_a_function(tmp_path: Path) -> None:
    config = [
        layer("Dense", "dense", units=2, activation="linear", use_bias=True, batch_input_shape=[None, 3]),
        layer("Lambda", "twice", function=["4wEAAAA=", None, None], function_type="lambda", arguments={}),
        layer("Odd", "odd_1"),
        layer("Activation", "act", activation="odd_function"),
    ]
    path = old_file(tmp_path / "old.h5", config, {"dense": {"kernel": np.ones((3, 2)), "bias": np.zeros(2)}}, version="2.1.3")
    with pytest.raises(UnsafeFileError) as raised:
        open_model(path)
    assert str(raised.value) == (
        f"Opening {str(path)!r}.\n"
        "  found 3 problems:\n"
        "    - 'Odd' in layer 'odd_1' is no class or function of Keras\n"
        "    - 'odd_function' in layer 'act' is no class or function of Keras\n"
        "    - layer 'twice' is a Lambda: it holds Python bytecode\n"
        "  likely cause: the model uses classes or functions of its author, which only Python code has; "
        "a Lambda holds a function as Python bytecode, which is never run from a file\n"
        "  to fix it: open_model(path, custom_objects={'Odd': …, 'odd_function': …, 'twice': …}), "
        "with the function that stands at a layer's name taking the layer's inputs"
    )

    class Odd(keras.layers.Layer):
        def call(self, inputs: Any) -> Any:
            return inputs + 1.0

    given = {"Odd": Odd, "odd_function": keras.ops.negative, "twice": lambda x: x * 2.0}
    model = open_model(path, given)
    np.testing.assert_array_equal(model.predict(np.ones((1, 3), "float32"), verbose=0), [[-7.0, -7.0]])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ([layer("Dense", "d", units=10**9, batch_input_shape=[None, 3])], "numbers"),
        ([layer("Embedding", "e", input_dim=10**9, output_dim=8, batch_input_shape=[None, 3])], "numbers"),
        ([layer("StringLookup", "s", vocabulary="/etc/passwd", batch_input_shape=[None, 3])], "a file to open"),
        (
            [layer("Dense", "d", units=2, odd={"class_name": "function", "config": "eval"}, batch_input_shape=[None, 3])],
            "object of the kind",
        ),
        ([layer("Dense", f"d{i}", units=1) for i in range(2001)], "more than 2000 layers"),
        ([json.loads("[" * 200 + "]" * 200)], "nesting"),
        ([layer("TFSMLayer", "t", filepath="/tmp/model")], "no class or function"),
        ([layer("Activation", "a", activation="get_file", batch_input_shape=[None, 3])], "no class or function"),
    ],
)
def test_what_a_file_must_not_ask_for(tmp_path: Path, config: Sequence[Any], words: str) -> None:
    with pytest.raises((UnsafeFileError, ModelError), match=words):
        open_model(old_file(tmp_path / "bad.h5", config, {}, version="2.3.1"))


def test_weights_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    config = [layer("Dense", "d", units=2, batch_input_shape=[None, 3], use_bias=True)]
    path = old_file(tmp_path / "bad.h5", config, {"d": {"kernel": np.zeros((4, 2)), "bias": np.zeros(2)}}, version="2.3.1")
    with pytest.raises(WeightsError, match=r"'kernel' has the shape \(3, 2\), the file's array \(4, 2\)"):
        open_model(path)


def test_a_model_saved_before_it_had_weights(tmp_path: Path) -> None:
    config = [layer("Dense", "dense", units=3, batch_input_shape=[None, 4])]
    with pytest.raises(WeightsError, match="no weights at all in the file, for a model that has 2"):
        open_model(old_file(tmp_path / "empty.h5", config, {}, version="2.2.4"))


def test_weights_alone_say_so_and_open_with_their_json(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.save_weights(tmp_path / "only.weights.h5")
    with pytest.raises(WeightsFileError, match="weights alone"):
        open_model(tmp_path / "only.weights.h5")
    (tmp_path / "model.json").write_text(model.to_json())
    opened = open_model(tmp_path / "only.weights.h5", config=tmp_path / "model.json")
    np.testing.assert_array_equal(opened.get_weights()[0], model.get_weights()[0])


def tf_model(tmp_path: Path, shape: list[int | None], *operations: tuple[str, str, Any], dtype: str = "float32") -> Any:
    """A model of tf.keras whose layers call TensorFlow: class, name (that of its function) and its inbound node."""
    start = {"class_name": "InputLayer", "name": "x", "inbound_nodes": [],
             "config": {"name": "x", "batch_input_shape": [None, *shape], "dtype": dtype}}  # fmt: skip
    layers = [
        {"class_name": kind, "name": name, "config": {"name": name, "function": name}, "inbound_nodes": [node]}
        for kind, name, node in operations
    ]
    config = {"name": "model", "layers": [start, *layers], "input_layers": [["x", 0, 0]],
              "output_layers": [[operations[-1][1], 0, 0]]}  # fmt: skip
    return open_model(old_file(tmp_path / "ops.h5", config, {}, version="2.8.0", class_name="Functional"))


def test_lengths_and_tables_between_the_layers_of_tf_keras(tmp_path: Path) -> None:
    reshaped = tf_model(
        tmp_path,
        [3, 4],
        ("TFOpLambda", "compat.v1.shape", ["x", 0, 0, {"name": None}]),
        ("SlicingOpLambda", "__operators__.getitem", ["compat.v1.shape", 0, 0, {"slice_spec": 0}]),
        ("TFOpLambda", "reshape", ["x", 0, 0, {"shape": [["__operators__.getitem", 0, 0], 2, 6]}]),
    )
    x = rng.normal(size=(5, 3, 4)).astype("float32")
    np.testing.assert_array_equal(reshaped(x), x.reshape(5, 2, 6))
    table = [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    node = ["_CONSTANT_VALUE", -1, table, {"indices": ["x", 0, 0], "validate_indices": None, "axis": None}]
    looked_up = tf_model(tmp_path, [3], ("TFOpLambda", "compat.v1.gather", node), dtype="int32")
    np.testing.assert_array_equal(looked_up(np.array([[2, 0, 1]])), np.array([[[4, 5], [0, 1], [2, 3]]], "float32"))


def test_a_reshape_may_leave_the_batch_and_one_more_length_open(tmp_path: Path) -> None:
    def opened(shape: list[int | None], which: int, *more: int) -> Any:
        return tf_model(
            tmp_path,
            shape,
            ("TFOpLambda", "compat.v1.shape", ["x", 0, 0, {"name": None}]),
            ("SlicingOpLambda", "__operators__.getitem", ["compat.v1.shape", 0, 0, {"slice_spec": which}]),
            ("TFOpLambda", "reshape", ["x", 0, 0, {"shape": [["__operators__.getitem", 0, 0], *more]}]),
        )

    x = rng.normal(size=(5, 3, 4)).astype("float32")
    np.testing.assert_array_equal(opened([3, 4], 0, -1, 2)(x), x.reshape(5, 6, 2))
    for shape, which in (([None, 4], 0), ([None, 4], 1)):  # what the lengths are of isn't sure
        with pytest.raises(ModelError, match="a shape with more than one length that isn't known"):
            opened(shape, which, -1, 2)


@pytest.mark.parametrize(
    ("kind", "attributes", "constants", "expected"),
    [
        ("OneHot", {"axis": {"i": "-1"}}, {"1": 3, "2": 1.0, "3": 0.0}, lambda x: np.eye(3)[x]),
        ("OneHot", {"axis": {"i": "-1"}}, {"1": 3, "2": 5.0, "3": 2.0}, lambda x: np.eye(3)[x] * 3 + 2),
        ("ArgMax", {"output_type": {"type": "DT_INT64"}}, {"1": 1}, lambda x: x.argmax(1)),
        ("Einsum", {"equation": {"s": base64.b64encode(b"ij->ji").decode()}}, {}, lambda x: x.T),
        ("MirrorPad", {"mode": {"s": base64.b64encode(b"REFLECT").decode()}}, {"1": [[1, 0], [0, 1]]},
         lambda x: np.pad(x, [[1, 0], [0, 1]], "reflect")),
    ],
)  # fmt: skip
def test_nodes_of_a_graph(kind: str, attributes: Any, constants: Any, expected: Any) -> None:
    x = np.array([[0, 2, 1], [1, 1, 0]], "int32")
    call = operation("TensorFlowOpLayer", {"node_def": {"op": kind, "attr": attributes}, "constants": constants}, kind)
    np.testing.assert_allclose(np.asarray(call(keras.ops.convert_to_tensor(x))), expected(x))


def test_an_einstein_sum_whose_inputs_tf_keras_lost_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'bij->bji' without the tensors it is of"):
        tf_model(tmp_path, [3, 4], ("TFOpLambda", "einsum", ["_CONSTANT_VALUE", -1, "bij->bji", {}]))


def test_a_resize_of_tensorflow_1_is_refused() -> None:
    def resized(half: bool) -> Any:
        node = {"op": "ResizeBilinear", "attr": {"align_corners": {"b": False}, "half_pixel_centers": {"b": half}}}
        return operation("TensorFlowOpLayer", {"node_def": node, "constants": {"1": [4, 4]}}, "ResizeBilinear")

    x = rng.random((2, 8, 8, 3)).astype("float32")
    np.testing.assert_allclose(np.asarray(resized(True)(x)), tf.image.resize(x, (4, 4)).numpy())
    with pytest.raises(ModelError, match="half_pixel_centers=False: the resize of TensorFlow 1"):
        resized(False)(x)


def test_a_misspelt_name_has_a_hint_and_keras_0_is_told(tmp_path: Path) -> None:
    config = [layer("Dense", "d", units=2, activation="sigmiod", batch_input_shape=[None, 3])]
    with pytest.raises(ModelError, match=r"'sigmiod' in layer 'd' is no class or function of Keras[\s\S]*did you mean 'sigmoid'"):
        open_model(old_file(tmp_path / "a.h5", config, {}, version="2.2.4"))
    path = old_file(tmp_path / "b.h5", config, {}, version="0.3.3")
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = json.dumps({"name": "Graph", "input_config": [], "nodes": {}})
    with pytest.raises(ModelError, match=r"Keras 0\.x wrote it"):
        open_model(path)


def test_weights_and_configuration_of_two_runs_and_yaml(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    config = [layer("Dense", "dense_1", units=3, batch_input_shape=[None, 4]), layer("Dense", "dense_2", units=3)]
    arrays = {f"dense_{i}": {f"dense_{i}/kernel": rng.normal(size=s), f"dense_{i}/bias": rng.normal(size=3)}
              for i, s in ((7, (4, 3)), (8, (3, 3)))}  # fmt: skip
    whole = old_file(tmp_path / "w.h5", [], arrays, version="2.2.4")
    with h5py.File(whole, "r+") as file:
        del file.attrs["model_config"]
    said = {"class_name": "Sequential", "config": config, "keras_version": "2.2.4", "backend": "tensorflow"}
    text = yaml.dump(said).replace("- null\n        - 4", "!!python/tuple [null, 4]")
    (tmp_path / "model.yaml").write_text(text)
    model = open_model(whole, config=tmp_path / "model.yaml")
    x = rng.normal(size=(2, 4)).astype("float32")
    expected = x.astype("float64")
    for i in (7, 8):
        expected = expected @ arrays[f"dense_{i}"][f"dense_{i}/kernel"] + arrays[f"dense_{i}"][f"dense_{i}/bias"]
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-5)
    config[1]["config"]["name"] = "head"  # somebody's own name isn't what Keras counted otherwise
    with pytest.raises(WeightsError, match="the file has arrays for a layer 'dense_7'"):
        open_model(whole, config=said)
    for bad, words in (
        ("a: &a [1]\nb: !!python/object/apply:os.system ['true']", "neither JSON nor YAML of plain values"),
        ("a: &a [*a]", "refers to its own parts"),
        ("&a0 [x, x]", "a list, no configuration"),
    ):
        (tmp_path / "bad.yaml").write_text(bad)
        with pytest.raises((WeightsFileError, UnsafeFileError), match=words):
            open_model(whole, config=tmp_path / "bad.yaml")


def test_models_without_a_name_within_a_sequential(tmp_path: Path) -> None:
    """Keras 2.0 to 2.2.2 kept an autoencoder's two halves as lists of layers, and their weights under the names they had."""
    halves = [
        {"class_name": "Sequential", "config": [layer("Dense", f"dense_{i}", units=units, batch_input_shape=[None, inputs])]}
        for i, units, inputs in ((1, 3, 4), (2, 4, 3))
    ]
    arrays = {f"sequential_{i}": {f"dense_{i}/kernel": rng.normal(size=shape), f"dense_{i}/bias": rng.normal(size=shape[1])}
              for i, shape in ((1, (4, 3)), (2, (3, 4)))}  # fmt: skip
    model = open_model(old_file(tmp_path / "old.h5", halves, arrays, version="2.0.9"))
    x = rng.normal(size=(2, 4)).astype("float32")
    expected = x.astype("float64")
    for i in (1, 2):
        own = arrays[f"sequential_{i}"]
        expected = expected @ own[f"dense_{i}/kernel"] + own[f"dense_{i}/bias"]
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-5)


def test_compiled_only_when_asked(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.25), "mse", metrics=["mae"])
    model.save(tmp_path / "model.keras")
    assert not open_model(tmp_path / "model.keras").compiled
    opened = open_model(tmp_path / "model.keras", compile=True)
    assert float(opened.optimizer.learning_rate) == 0.25


class ConvDNA(keras.layers.Conv1D):
    def __init__(self, *, seq_length: int | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.seq_length = seq_length


@pytest.mark.parametrize(
    "name",
    ["MMSplice_MTSplice__Intron3.h5", "dl4j-test-resources__adam.h5", "dl4j-test-resources__cnn3d_16.h5",
     "dl4j-test-resources__cnn_batch_norm.h5", "dl4j-test-resources__simple_lstm_tf_keras_1_model.h5",
     "dl4j-test-resources__simple_lstm_tf_keras_2_model.h5", "face_classification__fer2013_mini_XCEPTION.119-0.65.hdf5",
     "rapidtide__model_crnn_tf2__model.keras", "rapidtide__model_serdar__model.h5", "rapidtide__model_serdar_tf2__model.keras",
     "MMSplice_MTSplice__Acceptor.h5"],
)  # fmt: skip
def test_real_files_open(shared_data: Path, name: str) -> None:
    model = open_model(shared_data / "keras_files" / name, {"ConvDNA": ConvDNA})
    shapes = [tuple(2 if d is None and i == 0 else 16 if d is None else d for i, d in enumerate(x.shape)) for x in model.inputs]
    outputs = model(
        [rng.normal(size=shape).astype("float32") for shape in shapes]
        if len(shapes) > 1
        else rng.normal(size=shapes[0]).astype("float32")
    )
    assert all(np.isfinite(np.asarray(output)).all() for output in keras.tree.flatten(outputs))


def test_the_real_lambda_is_refused(shared_data: Path) -> None:
    with pytest.raises(UnsafeFileError, match="lambda_3"):
        open_model(shared_data / "keras_files" / "dl4j-test-resources__model_lambda.h5")
