"""The feature cache: what `predict` gives, in the data's order, and never anything else."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from transferkit.building.frontier import split
from transferkit.data import Data
from transferkit.errors import DataError
from transferkit.tuning.cache_settings import CacheSettings
from transferkit.tuning.features import Features, compute
from transferkit.tuning.fingerprints import fingerprint, fitting_block
from transferkit.tuning.snapshots import as_array


def _model(width: int = 5) -> Any:
    x = keras.Input((8, 8, 3))
    a = layers.Conv2D(width, 3, activation="relu", name="a")(x)
    b = layers.GlobalAveragePooling2D(name="pool")(a)
    model = keras.Model(x, layers.Dense(2, name="head")(b))
    model.get_layer("a").trainable = False
    return model


def _rows(count: int, seed: int = 0) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    return random.normal(size=(count, 8, 8, 3)).astype("float32"), random.integers(0, 2, count)


def _expected(model: Any, x: Any) -> Any:
    return keras.Model(model.input, model.get_layer("pool").output).predict(x, batch_size=32, verbose=0)


@pytest.mark.parametrize("cores", [1, 2])
def test_features_are_what_predict_gives_to_the_bit(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    model, (x, y) = _model(), _rows(277)
    made = compute(split(model).prefix, (x, y))
    assert np.array_equal(made.arrays[0], _expected(model, x))
    assert made.y is y
    assert (made.rows, made.views, made.where, made.reused) == (277, 1, "memory", False)
    assert made.nbytes == 277 * 5 * 4
    assert str(made).startswith("277 rows computed in ")
    assert np.array_equal(made.tensors()[0], made.arrays[0])


@pytest.mark.parametrize("after", ["added", "added to two", "after an activation", "hard swish", "multiplied"])
def test_a_batch_norm_is_what_predict_gives_to_the_bit_whatever_takes_it(after: str) -> None:
    # TensorFlow puts (x * a + b) + y into an order of its own, which it can't where something stands in between.
    keras.utils.set_random_seed(0)
    x = keras.Input((56, 56, 3))
    y = layers.Conv2D(12, 3, padding="same")(x)
    normed = layers.BatchNormalization()(layers.Conv2D(12, 1)(y))
    if after in ("after an activation", "hard swish"):
        normed = layers.Activation("relu" if after == "after an activation" else "hard_swish")(normed)
    if after == "added to two":
        normed = layers.add([layers.BatchNormalization()(layers.Conv2D(12, 3, padding="same")(y)), normed])
    both = (layers.multiply if after == "multiplied" else layers.add)([y, normed])
    model = keras.Model(x, layers.Dense(2)(layers.GlobalAveragePooling2D(name="pool")(layers.ReLU(6.0)(both))))
    random = np.random.default_rng(1)
    for layer in model.layers[:-1]:
        layer.trainable = False
        if isinstance(layer, layers.BatchNormalization):
            layer.set_weights([random.uniform(0.2, 2.0, weight.shape) for weight in layer.get_weights()])
    rows = random.normal(size=(96, 56, 56, 3)).astype("float32")
    assert np.array_equal(compute(split(model).prefix, (rows,)).arrays[0], _expected(model, rows))


@pytest.mark.slow
@pytest.mark.parametrize(
    "network",
    [
        *("ConvNeXtTiny", "DenseNet121", "EfficientNetB0", "EfficientNetV2B0", "InceptionResNetV2", "InceptionV3", "MobileNet"),
        *("MobileNetV2", "MobileNetV3Large", "MobileNetV3Small", "NASNetMobile", "ResNet50", "ResNet50V2", "VGG16", "Xception"),
    ],
)
def test_features_of_a_known_network_are_what_predict_gives_to_the_bit(network: str) -> None:
    keras.utils.clear_session()
    keras.utils.set_random_seed(3)
    base = getattr(keras.applications, network)(input_shape=(96, 96, 3), include_top=False, pooling="avg", weights=None)
    random = np.random.default_rng(0)
    for layer in base.layers:
        if isinstance(layer, layers.BatchNormalization):  # as it is made it changes next to nothing
            by_name = {"gamma": (0.5, 1.5), "moving_variance": (0.5, 1.5), "beta": (-0.1, 0.1), "moving_mean": (-0.1, 0.1)}
            layer.set_weights([random.uniform(*by_name[weight.name], weight.shape) for weight in layer.weights])
    base.trainable = False
    pixels = keras.Input((96, 96, 3))
    made = split(keras.Model(pixels, layers.Dense(3)(base(pixels))))
    rows = random.uniform(0, 255, (160, 96, 96, 3)).astype("float32")  # two blocks of 80
    found = compute(made.prefix, (rows,)).arrays[0]
    assert np.array_equal(found, base.predict(rows, batch_size=32, verbose=0))
    assert np.isfinite(found).all()
    assert found.std() > 0


def test_tensors_share_the_memory() -> None:
    made = compute(split(_model()).prefix, _rows(40))
    (tensor,) = made.tensors()
    made.arrays[0][3, 2] = 123.0
    assert tensor[3, 2] == 123.0


def test_tensors_share_the_mapping_of_a_kept_folder_which_nobody_can_write_to(tmp_path: Path) -> None:
    made = compute(split(_model()).prefix, _rows(40), folder=tmp_path)
    (tensor,) = made.tensors()
    assert as_array(tensor).ctypes.data == made.arrays[0].ctypes.data
    assert np.array_equal(tensor, made.arrays[0])
    with pytest.raises(ValueError, match="read-only"):
        made.arrays[0][3, 2] = 123.0


@pytest.mark.parametrize("kind", ["dataset", "sequence"])
def test_data_in_batches_keeps_its_rows_with_their_labels(kind: str) -> None:
    model, (x, y) = _model(), _rows(77)
    weights = np.linspace(0, 1, 77).astype("float32")
    dataset = tf.data.Dataset.from_tensor_slices((x, y, weights)).batch(10)
    data: Any = dataset if kind == "dataset" else _Sequence(x, y, weights)
    made = compute(split(model).prefix, data)
    assert np.array_equal(made.arrays[0], _expected(model, x))
    assert np.array_equal(made.y, y)
    assert np.array_equal(made.sample_weight, weights)
    assert made.where == "a temporary folder"


class _Sequence(keras.utils.PyDataset):
    def __init__(self, *parts: Any) -> None:
        super().__init__()
        self.parts = parts

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return tuple(part[10 * index : 10 * index + 10] for part in self.parts)


def test_a_shuffled_data_set_keeps_each_label_beside_its_row() -> None:
    model, (x, y) = _model(), _rows(77)
    dataset = tf.data.Dataset.from_tensor_slices((x, np.arange(77))).shuffle(77, seed=1).batch(10)
    made = compute(split(model).prefix, dataset)
    assert not np.array_equal(made.y, np.arange(77))
    assert np.array_equal(made.arrays[0], _expected(model, x)[made.y])
    del y


def test_augmentation_in_the_data_is_an_error_rather_than_lost() -> None:
    x, y = _rows(77)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(10)

    def noisy(a: Any) -> Any:
        return a + np.random.normal(size=a.shape).astype("float32")

    dataset = dataset.map(lambda a, b: (tf.ensure_shape(tf.numpy_function(noisy, [a], tf.float32), (None, 8, 8, 3)), b))
    with pytest.raises(DataError) as caught:
        compute(split(_model()).prefix, dataset)
    assert str(caught.value) == (
        "Computing the frozen part of a model once for every row.\n"
        "  found: rows that are different when the data is gone over a second time\n"
        "  likely cause: the data is augmented or drawn at random while it is read, so one pass isn't what the other epochs see\n"
        "  to fix it: .cache(False), or put the augmentation into the model or the plan, where it isn't lost"
    )


def test_too_much_for_memory_goes_to_a_disk_and_is_removed_with_the_features() -> None:
    model, (x, y) = _model(), _rows(77)
    made = compute(split(model).prefix, (x, y), memory_limit=100)
    assert made.where == "a temporary folder"
    assert np.array_equal(made.arrays[0], _expected(model, x))
    folder = Path(made._keeps.path)
    assert folder.is_dir()
    del made
    assert not folder.exists()


@pytest.mark.parametrize(("dtype", "most"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_smaller_dtypes_state_what_they_change(dtype: str, most: float) -> None:
    model, (x, y) = _model(), _rows(77)
    made = compute(split(model).prefix, (x, y), settings=CacheSettings(True, dtype=dtype))
    exact = _expected(model, x)
    change = np.abs(made.arrays[0].astype("float32") - exact).max()
    assert 0 < change <= made.rounding * np.abs(exact).max() * 1.001
    assert made.rounding <= most
    assert np.array_equal(tf.cast(made.tensors()[0], tf.float32), made.arrays[0].astype("float32"))
    assert "values rounded by up to" in str(made)


def test_features_are_found_again_by_content(tmp_path: Path) -> None:
    model, (x, y) = _model(), _rows(77)
    prefix = split(model).prefix
    first = compute(prefix, (x, y), folder=tmp_path)
    again = compute(split(model).prefix, (x.copy(), y), folder=tmp_path)
    assert (first.reused, again.reused) == (False, True)
    assert np.array_equal(first.arrays[0], again.arrays[0])
    assert np.array_equal(again.arrays[0], _expected(model, x))
    assert np.array_equal(again.tensors()[0], first.arrays[0])
    # The same rows in other batches are the same rows.
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(10)
    assert compute(prefix, dataset, folder=tmp_path).reused


def _other_weights(model: Any, x: Any) -> tuple[Any, Any]:
    kernel = model.get_layer("a").kernel
    kernel.assign(kernel + 1e-6)
    return model, x


def _other_row(model: Any, x: Any) -> tuple[Any, Any]:
    x = x.copy()
    x[-1, 0, 0, 0] += 1e-6
    return model, x


def _other_order(model: Any, x: Any) -> tuple[Any, Any]:
    return model, x[::-1].copy()


def _other_setting(model: Any, x: Any) -> tuple[Any, Any]:
    model.get_layer("a").activation = keras.activations.tanh
    return model, x


@pytest.mark.parametrize("change", [_other_weights, _other_row, _other_order, _other_setting])
def test_any_change_of_content_is_computed_anew(change: Any, tmp_path: Path) -> None:
    model, (x, y) = _model(), _rows(77)
    compute(split(model).prefix, (x, y), folder=tmp_path)
    model, x = change(model, x)
    made = compute(split(model).prefix, (x, y), folder=tmp_path)
    assert not made.reused
    assert np.array_equal(made.arrays[0], _expected(model, x))


def test_keras_settings_are_part_of_the_key(tmp_path: Path) -> None:
    """`UnitNormalization` asks for Keras's epsilon while it runs."""
    prefix, data, before = split(_model()).prefix, _rows(20), keras.config.epsilon()
    compute(prefix, data, folder=tmp_path)
    try:
        keras.config.set_epsilon(1e-3)
        assert not compute(prefix, data, folder=tmp_path).reused
    finally:
        keras.config.set_epsilon(before)
    assert compute(prefix, data, folder=tmp_path).reused


def test_the_note_is_part_of_the_key(tmp_path: Path) -> None:
    prefix, data = split(_model()).prefix, _rows(20)
    compute(prefix, data, folder=tmp_path, note="caffe")
    assert not compute(prefix, data, folder=tmp_path, note="torch").reused
    assert compute(prefix, data, folder=tmp_path, note="torch").reused


def test_a_function_of_the_users_is_never_kept_on_disk(tmp_path: Path) -> None:
    x = keras.Input((8, 8, 3))
    a = layers.Conv2D(2, 3, name="a")(layers.Lambda(lambda t: t * 2.0)(x))
    model = keras.Model(x, layers.Dense(2)(layers.Flatten()(a)))
    model.get_layer("a").trainable = False
    prefix = split(model).prefix
    assert prefix.digest() is None
    for _ in range(2):
        made = compute(prefix, _rows(20), folder=tmp_path)
        assert (made.where, made.reused) == ("memory", False)


def test_an_activation_or_a_layer_of_the_users_is_never_kept_on_disk(tmp_path: Path) -> None:
    def twice(x: Any) -> Any:
        return 2 * x

    class Own(layers.Dense):  # type: ignore[misc, unused-ignore]
        """Keras's, but for its name."""

    for first in (layers.Dense(4, activation=twice, name="a"), Own(4, name="a")):
        model = keras.Sequential([keras.Input((5,)), first, layers.Dense(2)])
        first.trainable = False
        prefix = split(model).prefix
        assert prefix.digest() is None
        for _ in range(2):
            made = compute(prefix, (np.ones((8, 5), "float32"), np.zeros(8)), folder=tmp_path)
            assert (made.where, made.reused) == ("memory", False)


def _damaged(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "bit":
        content[len(content) // 2] ^= 1
    elif how == "cut":
        del content[-7:]
    elif how == "longer":
        content += b"\0"
    path.write_bytes(bytes(content)) if how != "gone" else path.unlink()


@pytest.mark.parametrize("how", ["bit", "cut", "longer", "gone"])
@pytest.mark.parametrize("which", ["0.bin", "manifest.json"])
def test_a_damaged_entry_is_computed_anew(which: str, how: str, tmp_path: Path) -> None:
    model, (x, y) = _model(), _rows(77)
    compute(split(model).prefix, (x, y), folder=tmp_path)
    (entry,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    _damaged(entry / which, how)
    made = compute(split(model).prefix, (x, y), folder=tmp_path)
    assert np.array_equal(made.arrays[0], _expected(model, x))
    # A manifest that is longer by a zero or has another bit may still say the same; what it says is checked.
    assert not made.reused or which == "manifest.json"
    assert compute(split(model).prefix, (x, y), folder=tmp_path).reused


def test_writers_that_fail_leave_nothing(tmp_path: Path) -> None:
    def data() -> Iterator[Any]:
        yield _rows(20)
        raise RuntimeError("the disk with the photos went away")

    dataset = tf.data.Dataset.from_generator(
        data, output_signature=(tf.TensorSpec((None, 8, 8, 3), tf.float32), tf.TensorSpec((None,), tf.int64))
    )
    with pytest.raises(tf.errors.OpError):
        compute(split(_model()).prefix, dataset, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_fingerprint_is_of_rows_and_not_of_batches() -> None:
    x, y = _rows(77)
    marks = {fingerprint(tf.data.Dataset.from_tensor_slices((x, y)).batch(size))[0] for size in (1, 10, 77)}
    assert marks == {fingerprint((x, y))[0]}
    assert fingerprint((x[:76], y[:76]))[0] not in marks


def test_views_take_turns() -> None:
    made = Features((np.zeros((6, 1)),), None, None, 3, 2, "memory", False, 0.0)
    assert made.index(np.array([2, 0, 1]), epoch=0).tolist() == [2, 0, 1]
    assert made.index(np.array([2, 0, 1]), epoch=3).tolist() == [5, 3, 4]


@pytest.mark.slow
def test_processes_that_compute_the_same_features_get_the_same(tmp_path: Path) -> None:
    """Whole processes with TensorFlow, half of them killed on the way: what is found is what one process alone computes."""
    code = f"""
        import sys, keras, numpy as np
        from transferkit.building.frontier import split
        from transferkit.tuning.features import compute
        keras.utils.set_random_seed(0)
        x = keras.Input((32, 32, 3))
        a = keras.layers.Conv2D(16, 3, activation="relu")(keras.layers.Conv2D(16, 3, activation="relu")(x))
        model = keras.Model(x, keras.layers.Dense(2, name="head")(keras.layers.GlobalAveragePooling2D()(a)))
        for layer in model.layers[:-1]:
            layer.trainable = False
        rows = np.random.default_rng(int(sys.argv[1]) % 2).normal(size=(4000, 32, 32, 3)).astype("float32")
        prefix = split(model).prefix
        print("ready", flush=True)
        made = compute(prefix, (rows, np.zeros(4000)), folder={str(tmp_path)!r})
        assert np.array_equal(made.arrays[0], compute(prefix, (rows, np.zeros(4000))).arrays[0])
        print("reused" if made.reused else "computed", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    random = np.random.default_rng(0)
    running = [
        # Without a buffer: what `readline` reads ahead, `communicate` doesn't give.
        subprocess.Popen([*command, str(number)], env=environment, bufsize=0, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for number in range(6)
    ]
    said = []
    for number, process in enumerate(running):
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        if number < 3:
            try:
                process.wait(timeout=random.uniform(0.05, 1.5))
            except subprocess.TimeoutExpired:
                process.kill()
        out, errors = process.communicate()
        assert process.returncode in ((0, -9) if number < 3 else (0,)), errors.decode()
        said.append(out.decode().strip())
    assert "reused" in said[3:]
    print(f"{sum(process.returncode == -9 for process in running)} killed, the others {', '.join(filter(None, said))}")


@pytest.mark.parametrize(("rows", "block"), [(5, 64), (64, 64), (80, 80), (100, 64), (192, 64), (95, 96), (800, 80), (4000, 64)])
def test_few_rows_are_cut_so_that_few_are_computed_for_nothing(rows: int, block: int) -> None:
    assert fitting_block(rows) == block
    model, (x, y) = _model(), _rows(rows)
    assert np.array_equal(compute(split(model).prefix, (x, y)).arrays[0], _expected(model, x))


@pytest.mark.parametrize("rows", [277, 64, 5])
def test_int8_has_a_scale_for_each_channel_of_every_block(rows: int) -> None:
    model, (x, y) = _model(), _rows(rows)
    x[64:] *= 100.0  # a block with large values doesn't cost the others their precision
    made = compute(split(model).prefix, (x, y), settings=CacheSettings(True, dtype="int8"))
    exact = _expected(model, x)
    order = np.random.default_rng(0).permutation(rows)
    found = made.read()(made.tensors(), tf.constant(order)).numpy()
    for start in range(0, rows, 64):
        block = np.flatnonzero((order >= start) & (order < start + 64))
        step = np.abs(exact[start : start + 64]).max(axis=0) / 127
        assert (np.abs(found[block] - exact[order[block]]) <= step * 0.5001).all()
    assert 0 < made.rounding <= 0.5 / 127 * 1.001
    assert made.arrays[0].dtype == "int8"
    assert made.nbytes == rows * 5 + -(-rows // 64) * 5 * 4


def test_values_that_the_dtype_can_not_hold_are_an_error() -> None:
    model, (x, y) = _model(), _rows(70)
    with pytest.raises(DataError) as caught:
        compute(split(model).prefix, (x * 1e6, y), settings=CacheSettings(True, dtype="float16"))
    assert "values that it can't hold, up to " in str(caught.value)
    assert str(caught.value).endswith(
        'to fix it: .cache(True, dtype="bfloat16"), which has the range of float32, or no dtype at all'
    )


@pytest.mark.parametrize(("how", "most"), [("folded", 1e-5), ("bfloat16", 2e-2)])
def test_quicker_ways_of_computing_state_how_far_off_they_are(how: str, most: float) -> None:
    model, (x, y) = _model(), _rows(77)
    made = compute(split(model).prefix, (x, y), settings=CacheSettings(True, extraction=how))
    exact = _expected(model, x)
    change = np.abs(made.arrays[0] - exact)[:64].max() / np.abs(exact[:64]).max()
    assert made.arrays[0].dtype == "float32"
    assert made.inexact == pytest.approx(change, rel=1e-3, abs=1e-6)
    assert made.inexact <= most
    assert how == "folded" or f"computed to within {made.inexact:.1e} of the largest" in str(made)
    assert model.get_layer("a").dtype_policy.name == "float32"


def test_views_differ_come_again_by_seed_and_leave_random_states_alone(tmp_path: Path) -> None:
    x = keras.Input((8, 8, 3))
    a = layers.Conv2D(4, 3, name="a")(layers.GaussianNoise(0.5, seed=1)(layers.RandomFlip(seed=2)(x)))
    model = keras.Model(x, layers.Dense(2, name="head")(layers.Flatten()(a)))
    model.get_layer("a").trainable = False
    rows = _rows(70)
    states = [v.numpy() for v in model.variables]
    made = split(model, views=True)
    assert "a" in made.cached
    assert "a" not in split(model).cached
    settings = CacheSettings(True, views=3)
    one, again, other = (compute(made.prefix, rows, settings=settings, seed=seed) for seed in (5, 5, 6))
    assert (one.rows, one.views, len(one.arrays[0])) == (70, 3, 210)
    views = one.arrays[0].reshape(3, 70, -1)
    assert not np.array_equal(views[0], views[1])
    assert np.array_equal(one.arrays[0], again.arrays[0])
    assert not np.array_equal(one.arrays[0], other.arrays[0])
    assert all(np.array_equal(v.numpy(), before) for v, before in zip(model.variables, states, strict=True))
    still = compute(made.still, rows)
    assert np.allclose(still.arrays[0].reshape(70, -1), model.get_layer("a")(rows[0]).numpy().reshape(70, -1), atol=1e-5)
    kept = [compute(made.prefix, rows, settings=settings, folder=tmp_path, seed=seed).reused for seed in (5, 6, 5)]
    assert kept == [False, False, True]


def _draw(path: Path, random: Any) -> None:
    tf.io.write_file(str(path), tf.io.encode_png(random.integers(0, 255, (8, 8, 3)).astype("uint8")))


def test_an_image_that_was_exchanged_is_computed_anew(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            _draw(tmp_path / "images" / name / f"{number}.png", random)
    model = _model()

    def computed() -> Features:
        return compute(split(model).prefix, Data.image_folder(tmp_path / "images", size=(8, 8)), folder=tmp_path / "kept")

    first = computed()
    assert computed().reused
    path = tmp_path / "images" / "dog" / "1.png"
    status = path.stat()
    _draw(path, random)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # even where the time of change doesn't tell
    second = computed()
    assert not second.reused
    assert np.flatnonzero((first.arrays[0] != second.arrays[0]).any(axis=1)).tolist() == [4]
