"""Every format read right: against what was written, plain Keras, h5py and TensorFlow."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
import weights_files as files
from hypothesis import given, settings
from hypothesis import strategies as st

from transferkit.errors import WeightsFileError
from transferkit.weights.readers import Limits, open_archive
from transferkit.weights.readers.checks import DIGESTS, tensor_digest
from transferkit.weights.readers.hdf5 import H5Tree, open_hdf5
from transferkit.weights.readers.hdf5_format import parse
from transferkit.weights.readers.hdf5_pages import Pages
from transferkit.weights.readers.hdf5_values import H5Dataset
from transferkit.weights.readers.legacy_h5 import read_legacy_h5
from transferkit.weights.readers.source import Memory, Source
from transferkit.weights.readers.tables import crc32c


@pytest.mark.parametrize("name", files.WRITERS)
def test_every_format_gives_what_was_written(name: str, tmp_path: Path) -> None:
    path, expected = files.WRITERS[name](tmp_path)
    with open_archive(path) as archive:
        assert set(archive.arrays) == set(expected)
        for key, array in expected.items():
            read = archive.read(key)
            assert archive.arrays[key].shape == array.shape
            assert archive.arrays[key].dtype == read.dtype == array.dtype
            np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("name", ["legacy_h5", "keras", "weights_h5", "tfjs"])
def test_layers_stand_in_order_with_class_and_variables(name: str, tmp_path: Path) -> None:
    path, _ = files.WRITERS[name](tmp_path)
    with open_archive(path) as archive:
        layers = [layer for layer in archive.layers if layer.arrays]
        assert [(layer.name, layer.class_name) for layer in layers] == [
            ("first", "Dense"),
            ("norm", "BatchNormalization"),
            ("second", "Dense"),
        ]
        said = [(archive.arrays[a].layer, archive.arrays[a].variable) for layer in layers for a in layer.arrays]
    assert said == [tuple(key.split("/")) for key in files.arrays()]


def test_what_a_file_says_of_itself(tmp_path: Path) -> None:
    with open_archive(files.keras(tmp_path)[0]) as archive:
        assert (archive.format, archive.framework, archive.version) == ("keras", "keras", "3.15.1")
        assert archive.config is not None
        assert archive.config["class_name"] == "Sequential"
        assert archive.metadata["date_saved"] == "2025-01-01@00:00:00"
    with open_archive(files.legacy_h5(tmp_path)[0]) as archive:
        assert (archive.format, archive.framework, archive.version) == ("legacy_h5", "keras", "2.9.0")
        assert archive.config == files.CONFIG
        assert archive.nbytes == sum(array.nbytes for array in files.arrays().values())


# -- Keras and TensorFlow as oracles --------------------------------------------------------------------------------------------


def nested_model(keras: Any) -> Any:
    """A model with a nested one, a wrapper, a partial normalization and a frozen layer."""
    inner = keras.Sequential(
        [
            keras.Input((6, 6, 4)),
            keras.layers.Conv2D(5, 3, name="in1"),
            keras.layers.BatchNormalization(name="in_bn"),
            keras.layers.Conv2D(5, 3, name="in2"),
        ],
        name="base",
    )
    inner.get_layer("in_bn").trainable = False
    start = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, name="c1")(start)
    x = keras.layers.BatchNormalization(name="bn1", scale=False)(x)
    x = inner(x)
    x = keras.layers.Reshape((4, 5))(x)
    x = keras.layers.Bidirectional(keras.layers.LSTM(3), name="both")(x)
    x = keras.layers.Dense(4, name="z_first")(x)
    return keras.Model(start, keras.layers.Dense(4, name="a_last")(x))


def test_files_that_keras_writes(tmp_path: Path) -> None:
    from transferkit._keras import keras

    model = nested_model(keras)
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
    by_path = {w.path: w.numpy() for w in model.weights}
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    model.save_weights(tmp_path / "s.weights.json", max_shard_size=1e-6)
    model.save(tmp_path / "m.h5")

    expected_bytes = sorted((w.shape, w.tobytes()) for w in by_path.values())
    for name in ("m.keras", "m.weights.h5", "s.weights.json", "m.h5"):
        with open_archive(tmp_path / name) as archive:
            assert sorted((info.shape, archive.read(key).tobytes()) for key, info in archive.arrays.items()) == expected_bytes
            assert archive.optimizer_arrays

    with open_archive(tmp_path / "m.keras") as archive:
        named = {f"{info.layer}/{info.variable}": archive.read(key) for key, info in archive.arrays.items()}
    expected = {
        "c1/kernel": model.get_layer("c1").kernel,
        "bn1/beta": model.get_layer("bn1").beta,
        "bn1/moving_variance": model.get_layer("bn1").moving_variance,
        "base/in_bn/gamma": model.get_layer("base").get_layer("in_bn").gamma,
        "base/in2/bias": model.get_layer("base").get_layer("in2").bias,
        "both/forward_lstm/lstm_cell/recurrent_kernel": model.get_layer("both").forward_layer.cell.recurrent_kernel,
        "both/backward_lstm/lstm_cell/kernel": model.get_layer("both").backward_layer.cell.kernel,
        "z_first/kernel": model.get_layer("z_first").kernel,
        "a_last/kernel": model.get_layer("a_last").kernel,
    }
    for key, variable in expected.items():
        np.testing.assert_array_equal(named[key], variable.numpy(), err_msg=key)
    with open_archive(tmp_path / "m.h5") as archive:
        order = [archive.arrays[a].variable for layer in archive.layers if layer.name == "base" for a in layer.arrays]
    assert order == [
        *("in1/kernel", "in1/bias", "in2/kernel", "in2/bias"),
        *("in_bn/gamma", "in_bn/beta", "in_bn/moving_mean", "in_bn/moving_variance"),
    ], "a nested model's arrays stand trainable ones first, as they were written"


def test_checkpoints_that_tensorflow_writes(tmp_path: Path) -> None:
    from transferkit._keras import keras, tf

    model = keras.Sequential([keras.Input((9,)), keras.layers.Dense(600, name="d1"), keras.layers.Dense(4, name="d2")])
    tf.train.Checkpoint(model=model).write(str(tmp_path / "objects"))
    tf.saved_model.save(tf.train.Checkpoint(v=tf.Variable([1, 2, 3])), str(tmp_path / "saved"))
    for version in (1, 2):
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            tf.compat.v1.get_variable("a/w", initializer=np.arange(12, dtype=np.float32).reshape(3, 4))
            tf.compat.v1.get_variable("a/w/Momentum", initializer=np.ones((3, 4), np.float32))
            tf.compat.v1.get_variable("a/n", initializer=np.array([-1, 5], np.int64))
            tf.compat.v1.get_variable("b", initializer=np.array([True, False]))
            session.run(tf.compat.v1.global_variables_initializer())
            tf.compat.v1.train.Saver(write_version=version).save(session, str(tmp_path / f"v{version}"), write_meta_graph=False)
    for name, prefix in (("objects", "objects"), ("saved", "saved/variables/variables"), ("v1", "v1"), ("v2", "v2")):
        oracle = tf.train.load_checkpoint(str(tmp_path / prefix))
        with open_archive(tmp_path / name) as archive:
            keys = oracle.get_variable_to_shape_map()
            known = [*archive.arrays, *archive.optimizer_arrays]
            assert len(known) == len([k for k in keys if k != "_CHECKPOINTABLE_OBJECT_GRAPH"])
            for key in known:
                full = key if key in keys else f"{key}/.ATTRIBUTES/VARIABLE_VALUE"
                np.testing.assert_array_equal(archive.read(key), oracle.get_tensor(full))
    with open_archive(tmp_path / "objects") as archive:
        said = {(info.layer.split("/")[-1], info.variable) for info in archive.arrays.values()}
    assert said >= {("d1", "kernel"), ("d1", "bias"), ("d2", "kernel"), ("d2", "bias")}
    with open_archive(tmp_path / "v2") as archive:
        assert list(archive.optimizer_arrays) == ["a/w/Momentum"]


# -- HDF5 -----------------------------------------------------------------------------------------------------------------------


def write_hdf5(path: Path, libver: str) -> None:
    rng = np.random.default_rng(1)
    with h5py.File(path, "w", libver=libver) as file:
        normal = rng.normal(size=(37, 53)).astype("f4")
        file.create_dataset("packed", data=normal, chunks=(10, 20), compression="gzip", shuffle=True, fletcher32=True)
        file.create_dataset("checked", data=rng.integers(0, 255, 371).astype("u1"), chunks=(37,), fletcher32=True)
        file.create_dataset("lzf", data=np.zeros((40, 40), "f4"), chunks=(10, 10), compression="lzf")
        file.create_dataset("big_endian", data=rng.normal(size=(7, 3)).astype(">f8"))
        file.create_dataset("truth", data=np.array([True, False]))
        file.create_dataset("half", data=rng.normal(size=3).astype("f2"))
        file.create_dataset("scalar", data=np.float32(3))
        file.create_dataset("nothing", data=np.zeros((0, 4), "f4"))
        group = file.create_group("in/side")
        group.attrs["words"] = ["a", "bé"]
        group.attrs["old_words"] = np.array([b"a", b"bcd"])
        group.attrs["number"] = 3.5
        for i in range(12):
            group.attrs[f"attribute_{i}"] = "x" * i


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("libver", ["earliest", "v108", "v110", "latest"])
@pytest.mark.parametrize("whole", [True, False])
def test_hdf5_as_h5py_reads_it(libver: str, trusted: bool, whole: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write_hdf5(path, libver)
    source = Source(path)
    piece = source if whole else Memory(str(path), path.read_bytes())
    tree = open_hdf5(piece, limits=Limits(), trusted=trusted)
    with h5py.File(path) as file:
        names: list[str] = []
        file.visititems(lambda name, _: names.append(name))
        assert set(names) == (set(tree.groups) | set(tree.datasets)) - {""}
        assert dict(tree.groups["in/side"])["words"] == ["a", "bé"]
        assert dict(tree.groups["in/side"])["old_words"] == ["a", "bcd"]
        assert dict(tree.groups["in/side"])["number"] == 3.5
        assert tree.groups["in/side"]["attribute_11"] == "x" * 11
        for name in tree.datasets:
            expected = file[name][()]
            read = tree.read(name)
            assert read.dtype == np.asarray(expected).dtype.newbyteorder("=")
            np.testing.assert_array_equal(read, expected)
    tree.close()
    source.close()


shapes = st.lists(st.integers(1, 9), min_size=0, max_size=4).map(tuple)


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    dtype=st.sampled_from(["f2", "f4", "f8", "i1", "u2", ">i4", "<i8"]),
    chunked=st.booleans(),
    packed=st.booleans(),
    libver=st.sampled_from(["earliest", "v108"]),
    data=st.data(),
)
def test_any_dataset_as_h5py_reads_it(
    shape: tuple[int, ...], dtype: str, chunked: bool, packed: bool, libver: str, data: Any
) -> None:
    import io

    array = np.random.default_rng(3).integers(0, 100, shape).astype(dtype)
    more: dict[str, Any] = {}
    if chunked and shape:
        more["chunks"] = tuple(data.draw(st.integers(1, extent)) for extent in shape)
        if packed:
            more |= {"compression": "gzip", "shuffle": True, "fletcher32": True}
    content = io.BytesIO()
    with h5py.File(content, "w", libver=libver) as file:
        file.create_dataset("x", data=array, **more)
    tree = open_hdf5(Memory("x.h5", content.getvalue()), limits=Limits())
    np.testing.assert_array_equal(tree.read("x"), array)
    assert tree.read("x").shape == shape


def test_bfloat16_as_keras_stores_it(tmp_path: Path) -> None:
    path = tmp_path / "b.weights.h5"
    values = np.array([1.5, -2, 3e38]).astype(ml_dtypes.bfloat16)
    with h5py.File(path, "w") as file:
        stored = file.create_dataset("layers/dense/vars/0", data=values)
        stored.attrs["dtype"] = "bfloat16"
    with open_archive(path) as archive:
        assert archive.arrays["layers/dense/vars/0"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(archive.read("layers/dense/vars/0"), values)


def test_chunked_attributes_of_many_layers(tmp_path: Path) -> None:
    path = tmp_path / "many.h5"
    layers = [f"a_layer_with_quite_a_long_name_{i}" for i in range(3000)]
    with h5py.File(path, "w") as file:
        for number, start in enumerate(range(0, len(layers), 1000)):
            file.attrs[f"layer_names{number}"] = [name.encode() for name in layers[start : start + 1000]]
        for name in layers:
            file.create_group(name).attrs["weight_names"] = np.array([])
    with open_archive(path) as archive:
        assert [layer.name for layer in archive.layers] == layers


def test_names_within_a_layer(tmp_path: Path) -> None:
    """As Keras 1, Keras 2 in a second session, a recurrent layer and a nested model name their weights."""
    path = tmp_path / "names.h5"
    content = {
        "lstm_1": ["lstm_1_W_i:0", "lstm_1_b_i:0"],
        "conv": ["conv_9/kernel:0", "conv_9/bias:0"],
        "rnn": ["rnn/lstm_cell/kernel:0"],
        "scoped": ["outer_model/scoped/kernel:0"],
        "base": ["c1/kernel:0", "bn/gamma:0"],
    }
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in content]
        for layer, weights in content.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [name.encode() for name in weights]
            for name in weights:
                group[name] = np.zeros(2, "f4")
    with open_archive(path) as archive:
        assert list(archive.arrays) == [
            *("lstm_1/W_i", "lstm_1/b_i", "conv/kernel", "conv/bias", "rnn/lstm_cell/kernel", "scoped/kernel"),
            *("base/c1/kernel", "base/bn/gamma"),
        ]
        assert archive.arrays["base/bn/gamma"].variable == "bn/gamma"


# -- the other formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "dtype"),
    [("BF16", ml_dtypes.bfloat16), ("F16", "f2"), ("F8_E4M3", ml_dtypes.float8_e4m3fn), ("F8_E5M2", ml_dtypes.float8_e5m2)],
)
def test_small_floats_in_safetensors(word: str, dtype: Any, tmp_path: Path) -> None:
    values = np.array([[0.5, -1.0, 2.0]]).astype(dtype)
    path = tmp_path / "a.safetensors"
    path.write_bytes(files.safetensors_bytes({"x": values}, dtypes={"x": word}))
    with open_archive(path) as archive:
        assert archive.arrays["x"].dtype == values.dtype
        np.testing.assert_array_equal(archive.read("x"), values)


def test_a_sharded_set_of_safetensors(tmp_path: Path) -> None:
    content = list(files.arrays().items())
    (tmp_path / "a-1.safetensors").write_bytes(files.safetensors_bytes(dict(content[:3])))
    (tmp_path / "a-2.safetensors").write_bytes(files.safetensors_bytes(dict(content[3:])))
    index = {name: "a-1.safetensors" if i < 3 else "a-2.safetensors" for i, (name, _) in enumerate(content)}
    path = tmp_path / "a.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    with open_archive(path) as archive:
        for name, array in content:
            np.testing.assert_array_equal(archive.read(name), array)


def test_digests_of_our_own_files_show_a_changed_byte(tmp_path: Path) -> None:
    content = files.arrays()
    digests = {name: tensor_digest(name, array) for name, array in content.items()}
    raw = bytearray(files.safetensors_bytes(content, metadata={DIGESTS: json.dumps(digests)}))
    path = tmp_path / "ours.safetensors"
    path.write_bytes(raw)
    with open_archive(path) as archive:
        np.testing.assert_array_equal(archive.read("second/bias"), content["second/bias"])
    raw[-1] ^= 1
    path.write_bytes(raw)
    with open_archive(path) as archive, pytest.raises(WeightsFileError) as error:
        archive.read("second/bias")
    assert str(error.value) == (
        f"Reading weights from {str(path)!r}.\n"
        "  found: 'second/bias' doesn't match the SHA-256 the file keeps of it\n"
        "  likely cause: the file was damaged or changed after it was written\n"
        "  to fix it: get the file again"
    )


@pytest.mark.parametrize("write", [files.torch_zip, files.torch_old])
def test_torch_tensors_that_share_and_stride(write: Any, tmp_path: Path) -> None:
    base = np.arange(24, dtype=np.float32)
    storage = files._Reference("0", 24)
    state = OrderedDict(
        {
            "module.whole": files.Tensor(storage, (4, 6), (6, 1)),
            "module.turned": files.Tensor(storage, (6, 4), (1, 6)),
            "module.part": files.Tensor(storage, (3,), (2,), 5),
            "module.scalar": files.Tensor(storage, (), (), 7),
            "module.empty": files.Tensor(storage, (0, 3), (3, 1)),
        }
    )
    path, _ = write(
        tmp_path,
        {"state_dict": state, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": state["module.part"]}}}},
        {"0": base.tobytes()},
    )
    with open_archive(path) as archive:
        assert list(archive.arrays) == ["whole", "turned", "part", "scalar", "empty"]
        assert archive.metadata == {"epoch": "3", "taken_from": "state_dict", "stripped_prefix": "module."}
        np.testing.assert_array_equal(archive.read("whole"), base.reshape(4, 6))
        np.testing.assert_array_equal(archive.read("turned"), base.reshape(4, 6).T)
        np.testing.assert_array_equal(archive.read("part"), base[5:11:2])
        assert archive.read("scalar").shape == ()
        assert float(archive.read("scalar")) == 7
        assert archive.read("empty").shape == (0, 3)
        assert list(archive.optimizer_arrays) == ["optimizer.optimizer.state.0.exp_avg"]


def test_real_torch_files(shared_data: Path) -> None:
    with open_archive(shared_data / "torch" / "resnet20-12fca82f.th") as archive:
        assert len(archive.arrays) == 97
        assert archive.arrays["layer3.2.conv2.weight"].shape == (64, 64, 3, 3)
        assert archive.metadata["taken_from"] == "state_dict"
        variance = archive.read("bn1.running_var")
    assert np.all(variance > 0)
    with open_archive(shared_data / "torch" / "aimed_digits.pth") as archive:
        assert sum(info.size for info in archive.arrays.values()) == 21_840


def test_every_real_keras_file_opens(shared_data: Path) -> None:
    found = sorted(path for path in (shared_data / "keras_files").iterdir() if path.suffix in {".h5", ".hdf5", ".keras"})
    assert len(found) == 14
    for path in found:
        with open_archive(path) as archive:
            assert archive.arrays
            for name in [*archive.arrays, *archive.optimizer_arrays]:
                assert archive.read(name).dtype == (archive.arrays.get(name) or archive.optimizer_arrays[name]).dtype


def test_quantized_arrays_of_tensorflow_js(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes([0, 1, 255]) + np.array([0.5, 2], "<f2").tobytes())
    weights = [
        {"name": "d/kernel", "shape": [3], "dtype": "float32", "quantization": {"dtype": "uint8", "scale": 0.5, "min": -1.0}},
        {"name": "d/bias", "shape": [2], "dtype": "float32", "quantization": {"dtype": "float16", "original_dtype": "float32"}},
    ]
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"modelTopology": {}, "weightsManifest": [{"paths": ["w.bin"], "weights": weights}]}))
    with open_archive(path) as archive:
        np.testing.assert_array_equal(archive.read("d/kernel"), np.array([-1, -0.5, 126.5], np.float32))
        np.testing.assert_array_equal(archive.read("d/bias"), np.array([0.5, 2], np.float32))
        assert archive.metadata["quantized"] == "'d/kernel', 'd/bias'"


def test_crc32c_of_known_texts() -> None:
    # RFC 3720, appendix B.4, and the usual check value.
    assert crc32c(memoryview(b"123456789")) == 0xE3069283
    assert crc32c(memoryview(bytes(32))) == 0x8A9136AA
    assert crc32c(memoryview(bytes(range(32)))) == 0x46DD794E


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 30_000))
def test_crc32c_in_lanes_is_the_plain_one(length: int) -> None:
    data = np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8).tobytes()
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    assert crc32c(memoryview(data)) == crc ^ 0xFFFFFFFF


@pytest.mark.parametrize("name", ["legacy_h5", "compressed_h5", "weights_h5"])
def test_no_byte_of_the_structure_is_used_unread(name: str, tmp_path: Path) -> None:
    """With pages of one byte nothing is there but what was asked for, and the structure comes out the same."""
    path, _ = files.WRITERS[name](tmp_path)
    with h5py.File(path, "r+") as file:
        file.attrs["texts"] = ["of", "variable", "length"]
        for i in range(300):  # several symbol tables under one node
            file.create_group(f"group_{i:03}").attrs["name"] = f"{i}"
    source = Source(path)
    whole = parse(Pages(Memory(str(path), path.read_bytes())), max_objects=10_000, max_metadata=1 << 20)
    assert parse(Pages(source, page=0), max_objects=10_000, max_metadata=1 << 20) == whole
    source.close()


def test_the_structure_alone_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.h5"
    with h5py.File(path, "w") as file:
        file["a"] = np.ones(5_000_000, np.float32)
        file["b"] = np.ones(5_000_000, np.float32)
    read: list[int] = []
    real = Source.read_into

    def counted(source: Source, buffer: memoryview, *given: Any) -> None:
        read.append(len(buffer))
        real(source, buffer, *given)

    monkeypatch.setattr(Source, "read_into", counted)
    source = Source(path)
    assert list(parse(Pages(source), max_objects=100, max_metadata=1 << 20).datasets) == ["a", "b"]
    assert 0 < sum(read) < 100_000
    source.close()


def test_a_plain_array_stays_once_the_file_is_closed(tmp_path: Path) -> None:
    path, _ = files.legacy_h5(tmp_path)
    with open_archive(path) as archive:
        read = archive.read("first/kernel")
    np.testing.assert_array_equal(read, files.arrays()["first/kernel"])  # still there once the archive is closed
    with pytest.raises(WeightsFileError) as error:
        archive.read("first/kernel")
    assert "the archive is closed already" in str(error.value)


def test_home_directory_and_expected_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transferkit.storage import sha256_of_file

    path, _ = files.npz(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    open_archive("~/net.npz", sha256=sha256_of_file(path)).close()


def test_checkpoints_by_any_of_their_names(tmp_path: Path) -> None:
    files.checkpoint(tmp_path)
    for name in ("net", "net.index", "net.data-00000-of-00001", "."):
        with open_archive(os.path.join(tmp_path, name)) as archive:
            assert archive.format == "tf_checkpoint"


def test_struct_is_little_endian_everywhere() -> None:
    # The readers build on this; on a big-endian machine NumPy's native order would differ from the file's.
    assert struct.pack("<I", 1) == b"\1\0\0\0"


@pytest.mark.parametrize("scope", ["other/", "layer/", "layer_1/"])
def test_a_layer_of_many_arrays_takes_no_more_steps_for_each(scope: str) -> None:
    def steps(count: int) -> int:
        weights = [f"{scope}w{i}" for i in range(count)]
        datasets = {f"layer/{name}": H5Dataset(f"layer/{name}", (3,), np.dtype("f4"), offset=0) for name in weights}
        groups: dict[str, dict[str, Any]] = {"": {"layer_names": ["layer"]}, "layer": {"weight_names": weights}}
        tree = H5Tree(groups, {}, datasets, {}, lambda _: np.zeros(3, "f4"), lambda _: None, lambda: None)
        taken = 0

        def counted(_: Any, event: str, __: Any) -> None:
            nonlocal taken
            taken += event == "call"

        before = sys.getprofile()
        sys.setprofile(counted)
        try:
            archive = read_legacy_h5("file.h5", tree, limits=Limits())
        finally:
            sys.setprofile(before)
        assert len(archive.arrays) == count
        return taken

    assert steps(600) < 2.2 * steps(300)
