"""Loads that go wrong without a word in plain Keras: here each one either arrives right or is refused."""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import weights_files as files
from keras import layers

from transferkit.errors import MatchError, ModelError, UnsafeFileError, WeightsFileError
from transferkit.weights import assigning, staging
from transferkit.weights.loader import WeightLoader
from transferkit.weights.saving import save_weights


def values(model: Any) -> list[np.ndarray[Any, Any]]:
    return [np.array(v) for v in model.weights]


def equal(one: list[np.ndarray[Any, Any]], other: list[np.ndarray[Any, Any]]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def scrambled(model: Any, seed: int = 0) -> Any:
    """The model with values that tell every tensor from every other."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        variable.assign(rng.uniform(0.1, 1, variable.shape))
    return model


def chain(names: list[str], units: int = 4) -> Any:
    start = x = keras.Input((units,))
    for name in names:
        x = layers.Dense(units, name=name)(x)
    return keras.Model(start, x, name="net")


def refused(plan: WeightLoader, model: Any, *words: str) -> str:
    """The message of a load that is refused and changes nothing."""
    before = values(model)
    with pytest.raises(MatchError) as caught:
        plan.load(model)
    assert equal(values(model), before)
    message = str(caught.value)
    for word in words:
        assert word in message
    assert not plan.match(model).ok
    return message


def backbone() -> Any:
    start = keras.Input((6, 6, 3))
    x = layers.Conv2D(3, 3, padding="same", name="conv_a")(start)
    x = layers.BatchNormalization(name="bn_a")(x)
    x = layers.Conv2D(3, 3, padding="same", name="conv_b")(x)
    return keras.Model(start, layers.BatchNormalization(name="bn_b")(x), name="backbone")


def around(inner: Any) -> Any:
    start = keras.Input((6, 6, 3))
    return keras.Model(start, layers.Dense(2, name="out")(layers.GlobalAveragePooling2D()(inner(start))))


def test_1_frozen_normalization_in_a_nested_model(tmp_path: Path) -> None:
    inner = backbone()
    saved = scrambled(around(inner))
    inner.get_layer("bn_a").trainable = False
    saved.save_weights(tmp_path / "w.weights.h5")
    saved.save(tmp_path / "w.h5")
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype("float32")
    for file in ("w.h5", "w.weights.h5"):
        model = around(backbone())
        WeightLoader(tmp_path / file).load(model)
        assert equal(values(model), values(saved))
        assert np.array_equal(model(x), saved(x))


def test_1_a_block_of_normalizations_alone(tmp_path: Path) -> None:
    def block() -> Any:
        start = keras.Input((3,))
        x = layers.BatchNormalization(name="first")(start)
        return keras.Model(start, layers.BatchNormalization(name="second")(x), name="block")

    def net(inner: Any) -> Any:
        start = keras.Input((3,))
        return keras.Model(start, inner(start))

    inner = block()
    saved = scrambled(net(inner))
    inner.get_layer("first").trainable = False
    saved.save(tmp_path / "w.h5")
    x = np.eye(3, dtype="float32")
    plain, model = net(block()), net(block())
    plain.load_weights(tmp_path / "w.h5")
    assert not np.allclose(plain(x), saved(x))  # what Keras makes of it, without a word
    WeightLoader(tmp_path / "w.h5").load(model)
    assert np.array_equal(model(x), saved(x))


def test_2_and_15_the_optimizer_stays_as_it_is_and_is_spoken_of(tmp_path: Path) -> None:
    saved = chain(["a"])
    saved.compile(keras.optimizers.Adam(1e-2), "mse")
    saved.fit(np.ones((4, 4)), np.ones((4, 4)), verbose=0)
    saved.save(tmp_path / "w.keras")
    model = chain(["a"])
    model.compile(keras.optimizers.Adam(1e-5), "mse")
    model.optimizer.build(model.trainable_variables)
    before = [np.array(v) for v in model.optimizer.variables]
    report = WeightLoader(tmp_path / "w.keras").load(model)
    assert float(model.optimizer.learning_rate) == pytest.approx(1e-5)
    assert equal(before, [np.array(v) for v in model.optimizer.variables])
    assert any("the file also holds optimizer state" in note for note in report.notes)
    model.fit(np.ones((4, 4)), np.ones((4, 4)), verbose=0)
    assert any("has taken 1 steps" in note for note in WeightLoader(tmp_path / "w.keras").match(model).notes)


@pytest.mark.parametrize("file", ["w.h5", "w.weights.h5", "w.keras"])
def test_3_layers_of_equal_shape_listed_in_another_order(tmp_path: Path, file: str) -> None:
    def attention(order: list[str]) -> Any:
        start = keras.Input((4,))
        made = {name: layers.Dense(4, name=name)(start) for name in order}
        return keras.Model(start, layers.Subtract()([made["query"], made["key"]]))

    saved = scrambled(attention(["query", "key"]))
    (saved.save_weights if file == "w.weights.h5" else saved.save)(tmp_path / file)
    model = attention(["key", "query"])
    WeightLoader(tmp_path / file).load(model)
    x = np.eye(4, dtype="float32")
    assert np.array_equal(model(x), saved(x))


def test_3_two_encoders_listed_in_another_order(tmp_path: Path) -> None:
    def encoder(name: str) -> Any:
        start = keras.Input((4,))
        return keras.Model(start, layers.Dense(4, name="fc")(start), name=name)

    def both(order: list[str]) -> Any:
        start = keras.Input((4,))
        made = {name: encoder(name)(start) for name in order}
        return keras.Model(start, layers.Subtract()([made["text"], made["image"]]))

    saved = scrambled(both(["text", "image"]))
    saved.save(tmp_path / "w.h5")
    model = both(["image", "text"])
    WeightLoader(tmp_path / "w.h5").load(model)
    assert np.array_equal(model(np.eye(4)), saved(np.eye(4)))


def test_4_five_layers_into_three(tmp_path: Path) -> None:
    chain(["a", "b", "c", "d", "e"]).save(tmp_path / "w.h5")
    refused(WeightLoader(tmp_path / "w.h5"), chain(["a", "b", "c"]), "no use for the file's 'd'", "no use for the file's 'e'")


def test_5_an_inserted_layer_shifts_nothing(tmp_path: Path) -> None:
    saved = scrambled(chain(["a", "b", "c"]))
    for file, save in (("w.h5", saved.save), ("w.weights.h5", saved.save_weights)):
        save(tmp_path / file)
        model = chain(["a", "x", "b", "c"])
        refused(WeightLoader(tmp_path / file), model, "nothing for the model's 'x' (kernel, bias)", '.skip("x/*", of="model")')
        own = np.array(model.get_layer("x").kernel)
        WeightLoader(tmp_path / file).skip("x/*", of="model").load(model)
        assert np.array_equal(model.get_layer("x").kernel, own)
        for name in "abc":
            assert np.array_equal(model.get_layer(name).kernel, saved.get_layer(name).kernel)


def test_6_a_new_head_of_the_same_shape(tmp_path: Path) -> None:
    saved = scrambled(chain(["body", "old_head"]))
    saved.save(tmp_path / "w.h5")
    refused(WeightLoader(tmp_path / "w.h5"), chain(["body", "new_head"]), "its 'old_head' has the same shapes but another name")
    made_up = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="body"), layers.Dense(4)])
    report = WeightLoader(tmp_path / "w.h5").match(made_up)
    assert any("if its classes are other ones" in note for note in report.notes)
    model = chain(["body", "old_head"])
    own = np.array(model.get_layer("old_head").kernel)
    report = WeightLoader(tmp_path / "w.h5").classes(["ant", "bee", "cat", "dog"], ["bee", "eel", "ant", "fly"]).load(model)
    head, old = np.array(model.get_layer("old_head").kernel), np.array(saved.get_layer("old_head").kernel)
    assert np.array_equal(head[:, [0, 2]], old[:, [1, 0]])
    assert np.array_equal(head[:, [1, 3]], own[:, [1, 3]])
    assert report["old_head/kernel"].why == "2 of 4 classes by name; eel, fly keep the model's own values"


def test_7_a_load_of_nothing(tmp_path: Path) -> None:
    chain(["a", "b"]).save(tmp_path / "w.h5")
    refused(WeightLoader(tmp_path / "w.h5").skip("*"), chain(["a", "b"]), "nothing would be loaded")
    refused(WeightLoader(tmp_path / "w.h5"), chain(["u", "v"]), "more than one way to match", ".by_order()")
    refused(
        WeightLoader(tmp_path / "w.h5").only("a/*").min_coverage(0.9),
        chain(["a", "b"]),
        "50.0% of the model's parameters would be loaded, 90.0% are asked for",
    )


def test_8_a_rule_hides_no_damage(tmp_path: Path) -> None:
    chain(["a", "b"]).save(tmp_path / "w.h5")
    with h5py.File(tmp_path / "w.h5", "r+") as file:
        del file["model_weights/b/b/kernel"]
        file["model_weights/b/b/kernel"] = h5py.ExternalLink("other.h5", "/kernel")
    with pytest.raises(UnsafeFileError):
        WeightLoader(tmp_path / "w.h5").skip("b/*").load(chain(["a", "b"]))


def test_9_a_subclassed_model_whose_children_arent_built(tmp_path: Path) -> None:
    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.first = layers.Dense(4, name="first")

        def call(self, x: Any) -> Any:
            return self.first(x)

    saved = Net()
    saved(np.zeros((1, 4)))
    saved.save_weights(tmp_path / "w.weights.h5")
    fresh = Net()
    with pytest.raises(ModelError, match="'first' have no variables yet"):
        WeightLoader(tmp_path / "w.weights.h5").load(fresh)
    fresh(np.zeros((1, 4)))
    assert WeightLoader(tmp_path / "w.weights.h5").load(fresh).coverage == 1
    assert equal(values(fresh), values(saved))


class FailingDisk:
    """Counts the reads at an offset, and lets every one fail from a certain one on, as a dying disk does, or that one alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: int | None = None, *, once: bool = False) -> None:
        self.reads, self.once = 0, once
        self.failing = sys.maxsize if failing is None else failing
        for name in ("pread", "preadv"):
            monkeypatch.setattr(os, name, self.watched(getattr(os, name)))

    def watched(self, real: Any) -> Any:
        def read(*arguments: Any) -> Any:
            self.reads += 1
            if self.reads == self.failing + 1 or (self.reads > self.failing and not self.once):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments)

        return read


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="reads at an offset as POSIX has them")
@pytest.mark.parametrize("file", ["w.h5", "w.weights.h5", "w.keras", "w.safetensors"])
def test_10_a_disk_that_fails_at_any_read_changes_nothing(tmp_path: Path, file: str) -> None:
    saved = scrambled(chain(["a", "b"], units=520))  # kernels that aren't read in one piece with others
    if file.endswith("safetensors"):
        save_weights(saved, tmp_path / file)
    else:
        (saved.save_weights if "weights" in file else saved.save)(tmp_path / file)
    model = chain(["a", "b"], units=520)
    model.compile(keras.optimizers.Adam(), "mse")
    model.fit(np.ones((4, 520)), np.ones((4, 520)), verbose=0)
    before = [*values(model), *map(np.array, model.optimizer.variables)]
    count, failing = None, 0
    while count is None or failing < count:
        with pytest.MonkeyPatch.context() as patch:
            disk = FailingDisk(patch, failing)
            with pytest.raises(WeightsFileError) as error:
                WeightLoader(tmp_path / file).load(model)
            assert disk.reads > failing, "the load was over before the read that was to fail"
        assert "Input/output error" in str(error.value)
        assert equal([*values(model), *map(np.array, model.optimizer.variables)], before)
        if count is None:
            with pytest.MonkeyPatch.context() as patch:
                counting = FailingDisk(patch)
                WeightLoader(tmp_path / file).load(chain(["a", "b"], units=520))
                count = counting.reads
        failing += 1
    assert count > 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "_KEPT", 0)  # as in a model too large to be kept: all is read a second time
        counting = FailingDisk(patch)
        WeightLoader(tmp_path / file).load(chain(["a", "b"], units=520))
        assert counting.reads > count
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "_KEPT", 0)
        FailingDisk(patch, counting.reads - 1, once=True)
        assert WeightLoader(tmp_path / file).load(model).ok, "the second reading is tried once more"
    assert equal(values(model), values(saved))


@pytest.mark.parametrize("file", ["w.h5", "w.keras"])
def test_10_a_file_that_is_written_after_it_was_checked(tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = scrambled(chain(["a"], units=520))
    real = assigning.assign_all

    def written(items: Any) -> None:
        with (tmp_path / file).open("r+b") as opened:
            opened.seek(opened.read().index(saved.get_layer("a").kernel.numpy().tobytes()) + 100_000)
            opened.write(b"\0\0\xc0\x7f")  # NaN
        real(items)

    monkeypatch.setattr(staging, "assign_all", written)
    saved.save(tmp_path / file)
    model = chain(["a"], units=520)
    WeightLoader(tmp_path / file).load(model)  # what was checked is at hand
    assert equal(values(model), values(saved))
    saved.save(tmp_path / file)
    monkeypatch.setattr(staging, "_KEPT", 0)  # as in a model too large to be kept
    with pytest.raises(WeightsFileError) as error:
        WeightLoader(tmp_path / file).load(chain(["a"], units=520))
    assert str(error.value) == (
        "Loading 'a/kernel'.\n"
        "  found 2 problems:\n"
        "    - its values in the file changed after they were checked\n"
        "    - up to 2 of 2 variables hold the file's values already\n"
        "  likely cause: the file was written, or the disk failed, after the first reading of every byte went well\n"
        "  to fix it: load again when the file can be read, or build the model anew"
    )


def test_10_a_failing_assignment_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scrambled(chain(["a", "b", "c"])).save(tmp_path / "w.h5")
    model = chain(["a", "b", "c"])
    before = values(model)

    def fails(items: Any) -> None:
        def broken() -> np.ndarray[Any, Any]:
            raise MemoryError

        real(
            [
                *items[:-1],
                dataclasses.replace(items[-1], value=broken),
            ]
        )

    real = assigning.assign_all
    monkeypatch.setattr(staging, "assign_all", fails)
    with pytest.raises(MemoryError):
        WeightLoader(tmp_path / "w.h5").load(model)
    assert equal(values(model), before)


def test_11_a_normalization_without_center_into_one_without_scale(tmp_path: Path) -> None:
    def net(**options: Any) -> Any:
        return keras.Sequential([keras.Input((4,)), layers.BatchNormalization(name="bn", **options)])

    saved = scrambled(net(center=False))
    for file, save in (("w.h5", saved.save), ("w.keras", saved.save), ("w.weights.h5", saved.save_weights)):
        save(tmp_path / file)
        refused(WeightLoader(tmp_path / file), net(scale=False))
    same = net(center=False)
    WeightLoader(tmp_path / "w.keras").load(same)
    assert equal(values(same), values(saved))


def test_11_mean_and_variance_exchanged_in_the_file(tmp_path: Path) -> None:
    saved = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(name="bn")])
    saved.layers[-1].moving_mean.assign([-1.0, 0.5, 2.0, 0.1])
    saved.save(tmp_path / "w.h5")
    with h5py.File(tmp_path / "w.h5", "r+") as file:
        found: list[Any] = []
        file.visititems(lambda name, node: found.append(node.parent) if name.endswith("moving_mean") else None)
        (group,) = found
        mean, variance = group["moving_mean"][()], group["moving_variance"][()]
        group["moving_mean"][...], group["moving_variance"][...] = variance, mean
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(name="bn")])
    refused(WeightLoader(tmp_path / "w.h5"), model, "a variance below zero (-1): mean and variance may have changed places")


def test_12_a_square_kernel_stored_in_the_other_layout(tmp_path: Path) -> None:
    path = tmp_path / "w.npz"
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(4, 4)).astype("float32"), rng.normal(size=4).astype("float32")
    files.save_arrays(path, {"a.weight": kernel, "a.bias": bias})
    model = chain(["a"])
    refused(WeightLoader(path), model, "the file is PyTorch's, whose kernels are stored transposed", '.layout("torch")')
    report = WeightLoader(path).layout("torch").load(model)
    assert np.array_equal(model.get_layer("a").kernel, kernel.T)
    assert report["a/kernel"].status == "adapted"
    assert report["a/kernel"].why == "transposed"


def test_12_a_square_kernel_of_theano(tmp_path: Path) -> None:
    def net() -> Any:
        return keras.Sequential([keras.Input((6, 6, 3)), layers.Conv2D(3, 3, name="conv")])

    net().save(tmp_path / "w.h5")
    with h5py.File(tmp_path / "w.h5", "r+") as file:
        for node in (file, file["model_weights"]):
            node.attrs["backend"] = "theano"
    saved, model = net(), net()
    saved.load_weights(tmp_path / "w.h5")
    report = WeightLoader(tmp_path / "w.h5").load(model)
    assert report["conv/kernel"].why == "the kernel turned round, as Theano convolves and TensorFlow correlates"
    assert np.array_equal(model.get_layer("conv").kernel, saved.get_layer("conv").kernel.numpy()[::-1, ::-1])
    assert WeightLoader(tmp_path / "w.h5").layout("keras").load(net())["conv/kernel"].status == "loaded"


def test_13_other_settings_of_a_layer_are_told(tmp_path: Path) -> None:
    def net(activation: str, epsilon: float, backwards: bool) -> Any:
        start = keras.Input((3, 4))
        x = layers.LSTM(4, name="rnn", go_backwards=backwards)(start)
        x = layers.BatchNormalization(name="bn", epsilon=epsilon)(x)
        return keras.Model(start, layers.Dense(2, activation, name="out")(x))

    for file in ("w.h5", "w.keras"):
        net("relu", 1e-3, False).save(tmp_path / file)
        notes = " ".join(WeightLoader(tmp_path / file).match(net("tanh", 1e-5, True)).notes)
        assert "'out' gives other outputs than the saved layer: activation='relu' in the file, 'tanh' in the model" in notes
        assert "epsilon=0.001 in the file, 1e-05 in the model" in notes
        assert "go_backwards=False in the file, True in the model" in notes
        assert not WeightLoader(tmp_path / file).match(net("relu", 1e-3, False)).notes


def test_14_state_that_is_no_weight(tmp_path: Path) -> None:
    def net() -> Any:
        return keras.Sequential([keras.Input((2,)), layers.Normalization(name="norm"), layers.Dense(1, name="out")])

    saved = net()
    saved.layers[0].adapt(np.array([[1.0, 5.0], [3.0, 9.0]]))
    saved.save(tmp_path / "w.keras")
    model = net()
    model.get_layer("out").trainable = False
    WeightLoader(tmp_path / "w.keras").load(model)
    x = np.array([[2.0, 4.0]], "float32")
    assert np.array_equal(model(x), saved(x))  # the constants the layer computes with, too
    assert model.get_layer("out").trainable is False
    words = layers.StringLookup(vocabulary=["a", "b"], name="words")
    start = keras.Input((1,), dtype="string")
    texts = keras.Model(start, layers.Embedding(4, 2, name="vectors")(words(start)))
    texts.save_weights(tmp_path / "t.weights.h5")
    notes = WeightLoader(tmp_path / "t.weights.h5").match(texts).notes
    assert "a vocabulary is no weight: 'words' keeps the model's own" in notes


def test_16_tied_layers_from_an_untied_file(tmp_path: Path) -> None:
    def tower(dense: Any) -> Any:
        start = keras.Input((4,))
        return keras.Model(start, dense(start), name="tower")

    def net(tied: bool) -> Any:
        shared = layers.Dense(4, name="fc")
        start = keras.Input((4,))
        last = shared if tied else layers.Dense(4, name="fc")
        return keras.Model(start, last(tower(shared)(start)))

    untied = scrambled(net(tied=False))
    untied.save(tmp_path / "untied.h5")
    refused(WeightLoader(tmp_path / "untied.h5"), net(tied=True), "is one variable in the model, but the file's")
    tied = scrambled(net(tied=True))
    tied.save(tmp_path / "tied.h5")
    model = net(tied=True)
    WeightLoader(tmp_path / "tied.h5").load(model)
    assert equal(values(model), values(tied))


def test_18_values_too_large_for_the_variable(tmp_path: Path) -> None:
    saved = chain(["a"])
    saved.get_layer("a").bias.assign([1e6, 0, 0, 0])
    saved.save(tmp_path / "w.h5")
    start = keras.Input((4,), dtype="float16")
    half = keras.Model(start, layers.Dense(4, name="a", dtype="float16")(start))
    refused(WeightLoader(tmp_path / "w.h5"), half, "the file's 'a/bias' has values up to 1e+06 become infinite as float16")
    saved.get_layer("a").bias.assign([1, 0, 0, 0])
    saved.save(tmp_path / "w.h5")
    assert WeightLoader(tmp_path / "w.h5").load(half)["a/kernel"].why == "float32 → float16"


def test_18_whole_numbers_and_truth_values(tmp_path: Path) -> None:
    files.save_arrays(tmp_path / "w.npz", {"a/kernel": np.ones((4, 4), "uint8"), "a/bias": np.zeros(4, "float32")})
    refused(WeightLoader(tmp_path / "w.npz"), chain(["a"]), "the file's 'a/kernel' has uint8 values for a float32 variable")
    assert WeightLoader(tmp_path / "w.npz").allow("integers").load(chain(["a"])).ok


def test_19_a_model_without_variables(tmp_path: Path) -> None:
    chain(["a"]).save(tmp_path / "w.h5")
    empty = keras.Sequential([keras.Input((4,)), layers.ReLU()])
    with pytest.raises(ModelError, match="has no variables, so any file would seem to fit"):
        WeightLoader(tmp_path / "w.h5").load(empty)


def test_20_values_that_arent_finite(tmp_path: Path) -> None:
    saved = chain(["a", "b"])
    kernel = np.ones((4, 4), "float32")
    kernel[1, 2] = np.nan
    saved.get_layer("b").kernel.assign(kernel)
    save_weights(saved, tmp_path / "w.safetensors")
    plan = WeightLoader(tmp_path / "w.safetensors")
    refused(plan, chain(["a", "b"]), "the file's 'b/kernel' has 1 values aren't finite (1 NaN), the first at (1, 2)")
    model = chain(["a", "b"])
    plan.allow("nonfinite").load(model)
    assert np.isnan(np.array(model.get_layer("b").kernel)[1, 2])
