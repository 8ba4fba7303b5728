"""ModelBuilder gives plain Keras models; plain Keras is the oracle."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import transferkit as tk
from transferkit import errors
from transferkit.building.backbones import BACKBONES, preprocess
from transferkit.building.heads import head_layers, heads_of, leaf_layers


def rows(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def test_the_classic_stack_is_the_keras_model() -> None:
    model = tk.ModelBuilder((784,)).dense(128, "relu").dense(64, "relu").classifier(10).build(seed=3)
    keras.utils.set_random_seed(3)
    plain = keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(128, "relu"),
            keras.layers.Dense(64, "relu"),
            keras.layers.Dense(10, "softmax"),
        ]
    )
    assert [layer.get_config()["units"] for layer in model.layers[1:]] == [128, 64, 10]
    x = rows(5, 784)
    np.testing.assert_array_equal(model.predict(x, verbose=0), plain.predict(x, verbose=0))
    assert [layer.name for layer in model.layers] == ["input", "dense", "dense_1", "head"]


def test_names_do_not_depend_on_what_was_built_before() -> None:
    plan = tk.ModelBuilder((4,)).dense(3).dropout(0.1).dense(3).classifier(2)
    assert [layer.name for layer in plan.build().layers] == [layer.name for layer in plan.build().layers]


def test_two_builds_share_nothing() -> None:
    plan = tk.ModelBuilder((4,)).layer(keras.layers.Dense(3)).classifier(2)
    first, second = plan.build(), plan.build()
    assert not {id(v) for v in first.weights} & {id(v) for v in second.weights}


def test_branches_merges_inputs_and_outputs() -> None:
    plan = (
        tk.ModelBuilder({"picture": (8, 8, 1), "table": (5,)})
        .conv(4, activation="relu")
        .branch("skip")
        .conv(4)
        .merge("add", "skip")
        .pool()
        .branch("seen")
        .at("table")
        .dense(4, "relu")
        .merge("concatenate", "seen", name="both")
        .classifier(["a", "b", "c"], name="kind")
        .at("both")
        .regression(name="size")
        .at("skip")
        .output("early")
    )
    model = plan.build()
    assert list(model.output_names) == ["early", "kind", "size"]  # Keras sorts the names of a dict
    out = model({"picture": rows(2, 8, 8, 1), "table": rows(2, 5)})
    assert {name: tuple(value.shape) for name, value in out.items()} == {"kind": (2, 3), "size": (2, 1), "early": (2, 8, 8, 4)}
    assert [(head.output, head.layer.name) for head in heads_of(model)] == [("early", "conv"), ("kind", "kind"), ("size", "size")]
    assert plan.class_names == ("a", "b", "c")


def test_a_model_with_weights_is_copied_with_them() -> None:
    base = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="inner")])
    plan = tk.ModelBuilder((4,)).backbone(base)
    model = plan.build()
    x = rows(2, 4)
    np.testing.assert_array_equal(model(x), base(x))
    base.set_weights([weight + 1 for weight in base.get_weights()])
    assert not np.array_equal(model(x), base(x))
    with pytest.raises(errors.PlanError) as caught:
        plan.to_json()
    assert str(caught.value) == (
        "Writing a plan as JSON.\n"
        f"  found: <Sequential {base.name}>, a Sequential with weights, which JSON has no room for\n"
        '  to fix it: build on a name instead, .backbone("MobileNetV2"), or load the weights from a file with a WeightLoader'
    )


def test_an_adapted_normalization_and_a_vocabulary_keep_what_they_learned() -> None:
    normal = keras.layers.Normalization()
    normal.adapt(rows(50, 3) * 4 + 2)
    model = tk.ModelBuilder((3,)).layer(normal).build()
    np.testing.assert_allclose(model(rows(4, 3)), normal(rows(4, 3)), rtol=1e-6)
    table = keras.layers.StringLookup(vocabulary=["a", "b"])
    looked = tk.ModelBuilder((1,), dtype="string").layer(table).build()
    assert np.asarray(looked(keras.ops.convert_to_tensor([["b"]], dtype="string"))).tolist() == [[2]]


@pytest.mark.parametrize("name", ["MobileNetV2", "DenseNet121", "ResNet50"])
def test_preprocessing_equals_the_applications_own(name: str) -> None:
    module = {"MobileNetV2": "mobilenet_v2", "DenseNet121": "densenet", "ResNet50": "resnet"}[name]
    pixels = np.random.default_rng(0).uniform(0, 255, size=(2, 5, 6, 3)).astype("float32")
    inputs = keras.Input((5, 6, 3))
    model = keras.Model(inputs, preprocess(inputs, BACKBONES[name]))
    expected = getattr(keras.applications, module).preprocess_input(pixels.copy())
    np.testing.assert_allclose(model(pixels), expected, rtol=1e-5, atol=1e-4)


def test_every_backbone_is_one_of_keras_applications() -> None:
    assert [name for name in BACKBONES if not hasattr(keras.applications, name)] == []


def test_a_backbone_by_name_is_saved_with_its_preprocessing(tmp_path: Any) -> None:
    model = tk.ModelBuilder((32, 32, 3)).backbone("MobileNet", weights=None, alpha=0.25).pool().classifier(2).build(seed=0)
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    pixels = np.random.default_rng(0).uniform(0, 255, size=(2, 32, 32, 3)).astype("float32")
    np.testing.assert_array_equal(model.predict(pixels, verbose=0), again.predict(pixels, verbose=0))
    assert head_layers(model)[0].name == "head"


def test_the_head_stays_float32_under_mixed_precision() -> None:
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = tk.ModelBuilder((4,)).dense(3, "relu").classifier(2).build()
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert model.get_layer("dense").compute_dtype == "bfloat16"
    assert model.get_layer("head").compute_dtype == "float32"


def test_heads_are_found_in_models_of_every_kind() -> None:
    sequential = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="x"), keras.layers.Softmax()])
    assert [(head.layer.name, head.shape, head.activation) for head in heads_of(sequential)] == [("x", (3,), "softmax")]

    class Net(keras.Model):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.body = keras.layers.Dense(5, name="body")
            self.top = keras.layers.Dense(2, activation="sigmoid", name="top")

        def call(self, x: Any) -> Any:
            return self.top(self.body(x))

    net = Net()
    with pytest.raises(errors.ModelError) as caught:
        heads_of(net)
    assert "isn't built" in str(caught.value)
    net(rows(2, 4))
    assert [(head.layer.name, head.shape, head.activation) for head in heads_of(net)] == [("top", (2,), "sigmoid")]
    nested = keras.Sequential([keras.Input((4,)), sequential, keras.layers.Dropout(0.1)])
    assert [head.layer.name for head in heads_of(nested)] == ["x"]
    assert next(path for path, _ in leaf_layers(nested)) == f"{sequential.name}/x"
    sequential.add(keras.layers.Dense(7, name="grown"))  # what was read before doesn't hold any more
    assert [(head.layer.name, head.shape) for head in heads_of(sequential)] == [("grown", (7,))]


def test_heads_are_found_behind_operations_that_are_no_layers() -> None:
    x = keras.Input((4,))
    one, other = keras.layers.Dense(3, name="one")(x), keras.layers.Dense(6, name="other")(x)
    model = keras.Model(x, [keras.ops.softmax(one), keras.ops.reshape(keras.activations.sigmoid(other), (-1, 2, 3)), x])
    found = [(head.layer and head.layer.name, head.shape, head.activation) for head in heads_of(model)]
    assert found == [("one", (3,), "softmax"), ("other", (2, 3), "sigmoid"), (None, (4,), "linear")]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: tk.ModelBuilder((4,)).dense(0),
            "ModelBuilder.dense was called.\n  found: units=0; it must be a whole number above 0",
        ),
        (
            lambda: tk.ModelBuilder((0,)),
            "Planning a model.\n  found: the shape (0,) for the input 'input'; sizes are whole numbers above 0, or None\n"
            "  to fix it: give the shape of one example: ModelBuilder((784,))",
        ),
        (
            lambda: tk.ModelBuilder((4,)).backbone("MobilNetV2"),
            "Building on the backbone 'MobilNetV2'.\n"
            "  found: no network of that name (did you mean 'MobileNetV2' or 'MobileNet' or 'MobileNetV3Small'?)\n"
            "  to fix it: name one of keras.applications, or give a model of your own: .backbone(model)",
        ),
        (
            lambda: tk.ModelBuilder((4,)).classifier(["a", "a"]),
            "ModelBuilder.classifier was told the classes.\n  found: names that stand twice: 'a'",
        ),
        (
            lambda: tk.ModelBuilder((4,)).classifier(1),
            "ModelBuilder.classifier was told the classes.\n  found: 1 classes; at least 2 are needed\n"
            "  to fix it: .multi_label(1) makes a yes-or-no classifier with one unit",
        ),
        (
            lambda: tk.ModelBuilder((4,)).layer(keras.layers.Dense),
            "ModelBuilder.layer was asked to add a layer.\n"
            "  found: <class 'keras.src.layers.core.dense.Dense'>, which is no Keras layer\n"
            "  likely cause: a class was given in place of a layer\n"
            "  to fix it: give a layer, keras.layers.Dense(3), or a function that makes one",
        ),
        (
            lambda: tk.ModelBuilder((4,)).merge("ad", "x"),
            "ModelBuilder.merge was told how.\n  found: 'ad' (did you mean 'add'?)\n"
            "  to fix it: one of 'add', 'average', 'concatenate', 'dot', 'maximum', 'minimum', 'multiply', 'subtract', "
            "'attention', or a layer",
        ),
    ],
)
def test_a_plan_refuses_what_it_cannot_hold(make: Any, message: str) -> None:
    with pytest.raises(errors.PlanError) as caught:
        make()
    assert str(caught.value) == message


def test_a_build_says_which_step_failed() -> None:
    with pytest.raises(errors.ModelError) as caught:
        tk.ModelBuilder((4,)).dense(3).layer(keras.layers.Conv2D(3, 3, name="c")).build()
    text = str(caught.value)
    assert text.startswith("Building .layer(<Conv2D c>) of a model.\n  found: Input 0 ")
    assert text.endswith("likely cause: what comes before it has the shape (None, 3)")
    with pytest.raises(errors.ModelError) as caught:
        tk.ModelBuilder((4,)).dense(3, name="skip").at("skp").build()
    assert str(caught.value) == (
        "Going on from the point 'skp' of a model.\n"
        "  found: no point, layer or input of that name before this step (did you mean 'skip'?)\n"
        "  to fix it: known here: input, skip; give a point a name with .branch('skp')"
    )


def test_custom_parts_work_unchanged() -> None:
    """A custom initializer, activation, constraint and layer, given as objects and functions."""

    class Ones(keras.initializers.Initializer):  # type: ignore[misc, unused-ignore]
        def __call__(self, shape: Any, dtype: Any = None) -> Any:
            return keras.ops.ones(shape, dtype)

    def square(x: Any) -> Any:
        return x * x

    class NonNegative(keras.constraints.Constraint):  # type: ignore[misc, unused-ignore]
        def __call__(self, w: Any) -> Any:
            return keras.ops.maximum(w, 0)

    plan = tk.ModelBuilder((4,)).dense(3, square, kernel_initializer=Ones(), kernel_constraint=NonNegative(), name="d")
    model = plan.layer(keras.layers.Lambda(lambda x: x + 1)).layer(lambda: keras.layers.Dense(2, name="made")).build()
    layer = model.get_layer("d")
    np.testing.assert_array_equal(layer.kernel, np.ones((4, 3)))
    np.testing.assert_allclose(layer(np.full((1, 4), 2.0)), np.full((1, 3), 64.0))
    assert type(layer.kernel_constraint) is NonNegative
    assert model.get_layer("made").units == 2


def test_an_unknown_activation_is_told_with_near_names() -> None:
    with pytest.raises(errors.PlanError) as caught:
        tk.ModelBuilder((4,)).dense(3, "rellu")
    assert "no activation named 'rellu' (did you mean 'relu'" in str(caught.value)
    with pytest.raises(errors.PlanError):
        tk.ModelBuilder((8, 8, 3)).conv(3, activation="sofmax")


@pytest.mark.parametrize(
    ("options", "found"), [({"include_top": True}, "include_top"), ({"include_preprocessing": False}, "0 to 255")]
)
def test_arguments_of_a_backbone_that_are_the_builders_own_are_refused(options: dict[str, Any], found: str) -> None:
    plan = tk.ModelBuilder((32, 32, 3)).backbone("MobileNetV3Small", weights=None, **options).classifier(2)
    with pytest.raises(errors.PlanError, match=found):
        plan.build()
