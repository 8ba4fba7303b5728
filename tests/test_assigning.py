"""How values get into variables: straight into their memory, block by block, and never into anybody else's."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

from transferkit.errors import WeightsFileError
from transferkit.weights import streaming
from transferkit.weights.assigning import Assignment, assign_all
from transferkit.weights.digest import Digest, blocks, digest_of
from transferkit.weights.loader import WeightLoader
from transferkit.weights.readers.archive import Stretch
from transferkit.weights.readers.checks import tensor_digest
from transferkit.weights.readers.source import Memory, Source
from transferkit.weights.saving import save_weights

RNG = np.random.default_rng(0)


def lying(value: np.ndarray[Any, Any], *, sha256: str = "") -> Stretch:
    """The array's bytes in memory, where no vector could read them."""
    return Stretch(Memory("file", b"123" + value.tobytes()), 3, "array", value.dtype, value.shape, sha256)


def put(variable: Any, value: np.ndarray[Any, Any]) -> None:
    def unread() -> np.ndarray[Any, Any]:
        raise AssertionError("read whole, where it could be streamed")

    rows = streaming.look_over([lying(value)])[0].rows
    assign_all([Assignment("v", variable, value.dtype, value.nbytes, unread, rows, lying(value))])


@pytest.mark.parametrize("shape", [(3,), (), (0, 4), (300, 300), (5, 7, 80, 1000), (70_001,)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32", "uint8"])
def test_a_value_arrives_to_the_bit(shape: tuple[int, ...], dtype: str) -> None:
    kind: Any = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    variable = keras.Variable(np.zeros(shape), dtype=dtype)
    value = (RNG.normal(size=shape) * 50).astype(kind)
    if value.nbytes:
        put(variable, value)
        assert np.array_equal(keras.ops.convert_to_numpy(variable), value)


LARGE = (256, 512)


@pytest.mark.parametrize(
    "take", [lambda v: v.value.read_value(), lambda v: tf.identity(v.value), lambda v: v.value.sparse_read([0])]
)
def test_tensors_taken_before_keep_their_values(take: Callable[[Any], Any]) -> None:
    variable = keras.Variable(np.ones(LARGE, "float32"))
    taken = take(variable)
    before = taken.numpy().copy()
    put(variable, np.full(LARGE, 7, "float32"))
    assert np.array_equal(taken.numpy(), before)
    assert float(variable.value[0, 0]) == 7


def test_arrays_that_a_variable_took_over_keep_their_values() -> None:
    raw = np.ones(LARGE[0] * LARGE[1] * 4 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    mine = raw[start : -64 + start or None].view("float32").reshape(LARGE)
    mine[:] = 3
    variable = keras.Variable(np.zeros(LARGE, "float32"))
    tf.raw_ops.AssignVariableOp(resource=variable.value.handle, value=mine)  # TensorFlow shares aligned arrays
    put(variable, np.full(LARGE, 7, "float32"))
    assert (mine == 3).all()
    assert (keras.ops.convert_to_numpy(variable) == 7).all()


def test_a_variable_is_read_without_a_copy_afterwards() -> None:
    """The mode in which TensorFlow copies at every reading, and trains slower, is left again."""
    variable = keras.Variable(np.ones(LARGE, "float32"))
    put(variable, np.full(LARGE, 7, "float32"))
    held = [variable.value.read_value() for _ in range(3)]  # at a time, lest one gets the memory of another
    assert len({np.asarray(memoryview(tensor)).ctypes.data for tensor in held}) == 1


def test_training_goes_on_after_a_load() -> None:
    variable = keras.Variable(np.ones(LARGE, "float32"))
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build([variable])
    put(variable, np.full(LARGE, 7, "float32"))
    optimizer.apply([keras.ops.ones(LARGE)])
    assert (keras.ops.convert_to_numpy(variable) == 6).all()


@pytest.mark.parametrize("missing", ["DisableCopyOnRead", "ResourceScatterUpdate"])
def test_without_its_own_memory_a_variable_gets_another(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(**_: Any) -> None:
        raise ValueError

    if missing == "DisableCopyOnRead":
        monkeypatch.delattr(tf.raw_ops, missing)
    else:
        monkeypatch.setattr(tf.raw_ops, missing, refuses)
    variable = keras.Variable(np.ones(LARGE, "float32"))
    value = RNG.normal(size=LARGE).astype("float32")
    put(variable, value)
    assert np.array_equal(keras.ops.convert_to_numpy(variable), value)


def test_a_disk_that_fails_at_the_second_reading_of_a_large_model_is_told() -> None:
    class Broken(Memory):
        def read_into(self, *_: Any, **__: Any) -> None:
            raise WeightsFileError("Reading weights from 'w'.", found="'array' can't be read at byte 3: Input/output error")

    variable = keras.Variable(np.ones(LARGE, "float32"))
    stretch = Stretch(Broken("w", b"0" * 600_000), 3, "array", np.dtype("float32"), LARGE)
    with pytest.raises(WeightsFileError) as error:
        assign_all([Assignment("v", variable, stretch.dtype, stretch.nbytes, lambda: np.ones(1), stretch=stretch)])
    assert str(error.value) == (
        "Reading weights from 'w'.\n"
        "  found 2 problems:\n"
        "    - 'array' can't be read at byte 3: Input/output error\n"
        "    - up to 1 of 1 variables hold the file's values already\n"
        "  likely cause: the file was written, or the disk failed, after the first reading of every byte went well\n"
        "  to fix it: load again when the file can be read, or build the model anew"
    )


def test_what_is_worked_out_anew_must_come_out_the_same() -> None:
    variable = keras.Variable(np.ones(LARGE, "float32"))
    value = RNG.normal(size=LARGE).astype("float32")
    item = Assignment("v", variable, value.dtype, value.nbytes, lambda: value, digest_of(value))
    assign_all([item])
    assert np.array_equal(keras.ops.convert_to_numpy(variable), value)
    with pytest.raises(WeightsFileError, match="changed after they were checked"):
        assign_all([dataclasses.replace(item, value=lambda: value + 1)])
    assert np.array_equal(keras.ops.convert_to_numpy(variable), value)


def test_variables_with_one_memory_are_told_apart() -> None:
    first, second = (keras.Variable(np.ones(LARGE, "float32")) for _ in range(2))
    second.value.assign(first.value.read_value())  # TensorFlow lets both hold the same memory
    put(first, np.full(LARGE, 7, "float32"))
    assert (keras.ops.convert_to_numpy(second) == 1).all()
    constant = tf.ones(LARGE)
    first.value.assign(constant)
    put(first, np.full(LARGE, 5, "float32"))
    assert (constant.numpy() == 1).all()
    slot = tf.Variable(first.value.read_value())
    put(first, np.full(LARGE, 9, "float32"))
    assert (slot.numpy() == 5).all()


def test_a_function_that_holds_a_variables_value_keeps_it() -> None:
    variable = keras.Variable(np.ones(LARGE, "float32"))
    held = variable.value.read_value()
    add = tf.function(lambda x: x + held)
    assert float(add(0.0)[0, 0]) == 1
    sparse = tf.function(lambda: variable.value.scatter_sub(tf.IndexedSlices(tf.ones((1, LARGE[1])), [0])))
    sparse()  # from here on TensorFlow copies at every reading
    between = variable.value.read_value()
    put(variable, np.full(LARGE, 7, "float32"))
    assert float(add(0.0)[0, 0]) == 1
    assert (between.numpy()[0] == 0).all()
    after = variable.value.read_value()
    sparse()
    assert (after.numpy() == 7).all()
    assert float(variable.value[0, 0]) == 6


@pytest.mark.parametrize("size", [1, 1 << 14, (1 << 14) + 1, 780_288, 1_560_577, 3_120_000])
def test_the_digest_is_the_same_by_blocks(size: int) -> None:
    value = RNG.normal(size=size).astype("float32")
    raw = value.view(np.uint8)
    digest = Digest(value.dtype, value.shape)
    places = list(blocks(raw.size))
    assert [0, *(end for _, end in places)] == [*(start for start, _ in places), raw.size]
    for start, end in places:
        digest.update(raw[start:end])
    assert digest.hexdigests()[1] == digest_of(value)
    for i, j in ((0, size - 1), (size // 2, size // 3)):
        other = value.copy()
        other[i], other[j] = value[j], value[i]
        assert (digest_of(other) == digest_of(value)) == (value[i] == value[j])
    other = value.copy()
    other[size // 2] = np.nextafter(other[size // 2], np.float32(9))
    assert digest_of(other) != digest_of(value)
    assert len({streaming.look_over([lying(array)])[0].rows for array in (value, value.copy(), other)}) == 2


def test_values_are_looked_at_to_the_last() -> None:
    count = 3_121_157
    good = RNG.normal(size=count).astype("float32")
    bad = [good.copy() for _ in range(3)]
    for array, place, value in zip(bad, (0, count // 2, count - 1), (np.nan, np.inf, -np.inf), strict=True):
        array[place] = value
    looked = streaming.look_over([lying(a) for a in (good, *bad, good[:20_000])])
    assert [found.finite for found in looked] == [True, False, False, False, True]
    assert [found.digest for found in looked] == [digest_of(a) for a in (good, *bad, good[:20_000])]


def test_a_files_own_digest_is_checked() -> None:
    value = RNG.normal(size=300_000).astype("float32")
    expected = tensor_digest("array", value)
    assert streaming.look_over([lying(value, sha256=expected)])[0].finite
    value[-1] += 1
    with pytest.raises(WeightsFileError, match="doesn't match the SHA-256 the file keeps of it"):
        streaming.look_over([lying(value, sha256=expected)])


def test_a_file_is_read_where_it_has_no_reads_at_an_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(range(256)) * 100)
    source = Source(path)
    for name in ("pread", "preadv"):
        monkeypatch.delattr("os." + name, raising=False)
    room = bytearray(1000)
    source.read_into(memoryview(room), 300)
    assert bytes(room) == source.bytes(300, 1000) == (bytes(range(256)) * 100)[300:1300]
    source.close()


def test_small_arrays_are_taken_over_and_stay_apart(tmp_path: Path) -> None:
    """They are read side by side, and TensorFlow keeps that memory: nobody else may write to it, or give it away."""
    start = keras.Input((7,))
    layers = [keras.layers.Dense(n, name=f"d{n}") for n in (3, 5, 1)]
    model = keras.Model(start, [layer(start) for layer in layers])
    save_weights(model, tmp_path / "w.safetensors")
    report = WeightLoader(tmp_path / "w.safetensors").load(model)
    places = [np.asarray(memoryview(v.value.read_value())).ctypes.data for v in model.weights]
    assert max(places) - min(places) <= 64 * (len(places) + 4), "they weren't handed over without a copy"
    layers[1].kernel.value.assign_add(tf.ones((7, 5)))
    gc.collect()
    held = [np.full(size, 255, np.uint8) for size in (64, 256, 1024, 4096) for _ in range(50)]
    assert report.verify(model).changed == ("d5/kernel",)
    assert len(held) == 200
