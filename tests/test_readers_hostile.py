"""Files made to mislead, crash, hang or flood their reader, and damaged ones: each a typed error in time, none a wrong result."""

from __future__ import annotations

import json
import os
import pickle
import stat
import struct
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import weights_files as files

from transferkit.errors import UnsafeFileError, WeightsError, WeightsFileError, WeightsNotFoundError
from transferkit.weights.readers import Limits, open_archive


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    start = time.process_time()  # of this process: the machine may be busy with others
    yield
    assert time.process_time() - start < 5, "a bad file took too long"


def read_all(path: str | Path, **options: Any) -> None:
    with open_archive(path, **options) as archive:
        for name in [*archive.arrays, *archive.optimizer_arrays]:
            archive.read(name)


def refused(path: str | Path, kind: type[WeightsError] = WeightsFileError, **options: Any) -> str:
    """What the error of opening the file and reading all of it says was found."""
    with pytest.raises(kind) as error:
        read_all(path, **options)
    assert type(error.value) is kind
    message = str(error.value)
    # An index and its shards are all of them the user's file.
    assert message.startswith(f"Reading weights from '{Path(path).parent}" if os.path.isabs(path) else "Reading weights from ")
    assert error.value.fix
    return "\n".join(error.value.found)


# -- what isn't a file, or isn't whole ------------------------------------------------------------------------------------------


def test_no_file(tmp_path: Path) -> None:
    (tmp_path / "other.h5").write_bytes(b"x")
    with pytest.raises(WeightsNotFoundError) as error:
        open_archive(tmp_path / "net.h5")
    assert isinstance(error.value, FileNotFoundError)
    assert str(error.value) == (
        f"Reading weights from '{tmp_path}/net.h5'.\n"
        "  found: no file at that path\n"
        "  to fix it: check the path; its directory holds other.h5"
    )


def test_no_network() -> None:
    with pytest.raises(WeightsNotFoundError) as error:
        open_archive("gs://bucket/net.h5")
    assert error.value.fix == "download the file first; transferkit opens local files only"


def test_a_directory(tmp_path: Path) -> None:
    assert refused(tmp_path) == "a directory, not a file"


def test_an_empty_file(tmp_path: Path) -> None:
    for name in ("a.h5", "a.keras", "a.safetensors"):
        (tmp_path / name).write_bytes(b"")
        assert refused(tmp_path / name) == "an empty file"


def test_something_else(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    path.write_bytes(b"\x00" * 500)
    assert refused(path) == "no known format; the file starts with b'\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00'"
    path.write_text("{}")
    assert refused(path) == "JSON with , which is no index of weights"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_and_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.h5")
    assert refused(tmp_path / "pipe.h5", UnsafeFileError) == "a named pipe, not a regular file"
    (tmp_path / "endless.keras").symlink_to("/dev/zero")
    assert refused(tmp_path / "endless.keras", UnsafeFileError) == "a device, not a regular file"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path, _ = files.npz(tmp_path)
    path.chmod(0)
    assert refused(path) == "the file can't be opened: Permission denied"


@pytest.mark.parametrize("name", [name for name in files.WRITERS if name not in ("sharded", "tfjs", "checkpoint")])
@pytest.mark.parametrize("part", [0.03, 0.4, 0.97, -1])
def test_cut_off(name: str, part: float, tmp_path: Path) -> None:
    path, _ = files.WRITERS[name](tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)] if part > 0 else content[:-1])
    with pytest.raises(WeightsError):
        read_all(path)


@pytest.mark.parametrize("name", ["sharded", "tfjs", "checkpoint"])
def test_a_file_of_several_missing_or_cut_off(name: str, tmp_path: Path) -> None:
    path, _ = files.WRITERS[name](tmp_path)
    others = sorted(p for p in tmp_path.iterdir() if p != path)
    content = others[-1].read_bytes()
    others[-1].write_bytes(content[:-4])
    refused(path)
    others[-1].unlink()
    refused(path, WeightsNotFoundError)


@pytest.mark.parametrize("name", ["legacy_h5", "weights_h5", "safetensors", "torch_old", "npz", "keras"])
def test_something_put_before_or_after(name: str, tmp_path: Path) -> None:
    path, _ = files.WRITERS[name](tmp_path)
    content = path.read_bytes()
    path.write_bytes(content + bytes(5000))
    if name not in ("npz", "keras"):  # a zip archive may end with a comment; these bytes are none of its own
        refused(path)
    path.write_bytes(bytes(512) + content)
    refused(path)


def test_cut_while_it_is_open(tmp_path: Path) -> None:
    path, _ = files.safetensors(tmp_path)
    with open_archive(path) as archive:
        os.truncate(path, 100)
        with pytest.raises(WeightsFileError) as error:
            archive.read("first/kernel")
    assert "is shorter now" in str(error.value)


def test_another_hash(tmp_path: Path) -> None:
    path, _ = files.npz(tmp_path)
    assert refused(path, UnsafeFileError, sha256="0" * 64).startswith("its SHA-256 is ")


# -- HDF5 -----------------------------------------------------------------------------------------------------------------------


def weights_file(tmp_path: Path, change: Callable[[h5py.File], None], **options: Any) -> Path:
    """Weights as Keras 3 writes them, with something of a second layer done by `change`."""
    path = tmp_path / "net.weights.h5"
    with h5py.File(path, "w", **options) as file:
        file["layers/dense/vars/0"] = np.ones((4, 4), "f4")
        file.create_group("layers/dense_1/vars")
        change(file)
    return path


def hard_link(file: h5py.File) -> None:
    file["layers/dense_1/vars/0"] = file["layers/dense/vars/0"]


def hard_link_of_a_group(file: h5py.File) -> None:
    del file["layers/dense_1/vars"]
    file["layers/dense_1/vars"] = file["layers/dense/vars"]


def soft_link(file: h5py.File) -> None:
    file["layers/dense_1/vars/0"] = h5py.SoftLink("/layers/dense/vars/0")


def external_link(file: h5py.File) -> None:
    file["layers/dense_1/vars/0"] = h5py.ExternalLink("/etc/passwd", "/x")


def external_storage(file: h5py.File) -> None:
    file.create_dataset("layers/dense_1/vars/0", (4,), "f4", external=[("/etc/passwd", 0, 16)])


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("/etc/other.h5", "x", (4,))
    file.create_virtual_dataset("layers/dense_1/vars/0", layout)


def never_written(file: h5py.File) -> None:
    file.create_dataset("layers/dense_1/vars/0", (4, 4), "f4")


def half_written(file: h5py.File) -> None:
    file.create_dataset("layers/dense_1/vars/0", (4, 4), "f4", chunks=(2, 2))[:2] = 1


def shape_bomb(file: h5py.File) -> None:
    file.create_dataset("layers/dense_1/vars/0", (1 << 20, 1 << 10), "f4", chunks=(1 << 18, 1 << 10), compression="gzip")


def variable_length(file: h5py.File) -> None:
    file.create_dataset("layers/dense_1/vars/0", data=["12", "3"], dtype=h5py.string_dtype())


def fixed_text(file: h5py.File) -> None:
    file["layers/dense_1/vars/0"] = np.array([b"12", b"34"])


def reference(file: h5py.File) -> None:
    file.create_dataset("layers/dense_1/vars/0", data=file.ref, dtype=h5py.ref_dtype)


def compound(file: h5py.File) -> None:
    file["layers/dense_1/vars/0"] = np.zeros(3, [("a", "f4"), ("b", "i4")])


def opaque(file: h5py.File) -> None:
    file["layers/dense_1/vars/0"] = np.zeros(3, "V4")


def empty(file: h5py.File) -> None:
    file["layers/dense_1/vars/0"] = h5py.Empty("f4")


def strange_float(file: h5py.File) -> None:
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_ebias(100)
    space = h5py.h5s.create_simple((4,))
    h5py.h5d.create(file["layers/dense_1/vars"].id, b"0", kind, space).write(h5py.h5s.ALL, h5py.h5s.ALL, np.ones(4, "f4"))


def unknown_filter(file: h5py.File) -> None:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((4,))
    properties.set_filter(h5py.h5z.FILTER_NBIT, h5py.h5z.FLAG_OPTIONAL)
    space = h5py.h5s.create_simple((4,))
    made = h5py.h5d.create(file["layers/dense_1/vars"].id, b"0", h5py.h5t.IEEE_F32LE, space, properties)
    made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ones(4, "f4"))


PLACE = "'layers/dense_1/vars/0'"
HOSTILE: dict[str, tuple[Callable[[h5py.File], None], type[WeightsError], str]] = {
    "hard link": (hard_link, UnsafeFileError, f"{PLACE} and 'layers/dense/vars/0' are two names for one object"),
    "hard link of a group": (
        hard_link_of_a_group,
        UnsafeFileError,
        "'layers/dense_1/vars' and 'layers/dense/vars' are two names for one object",
    ),
    "soft link": (soft_link, UnsafeFileError, "layers/dense_1/vars/0 is a soft link"),
    "external link": (external_link, UnsafeFileError, "layers/dense_1/vars/0 is a"),
    "external storage": (external_storage, UnsafeFileError, f"{PLACE}: its bytes lie in another file"),
    "virtual": (virtual, UnsafeFileError, f"{PLACE}: it is a virtual dataset, which reads other files"),
    "never written": (never_written, WeightsFileError, f"{PLACE}: its bytes were never written"),
    "half written": (half_written, WeightsFileError, f"{PLACE}: 2 of its 4 chunks were never written"),
    "shape bomb": (shape_bomb, WeightsFileError, f"{PLACE}: its bytes were never written"),
    "variable length": (
        variable_length,
        WeightsFileError,
        f"{PLACE}: its type is of variable length, which isn't read as weights",
    ),
    "text": (fixed_text, WeightsFileError, f"{PLACE}: its type is text, which isn't read as weights"),
    "reference": (reference, WeightsFileError, f"{PLACE}: its type is a reference, which isn't read as weights"),
    "compound": (compound, WeightsFileError, f"{PLACE}: its type is compound, which isn't read as weights"),
    "opaque": (opaque, WeightsFileError, f"{PLACE}: its type is opaque, which isn't read as weights"),
    "empty": (empty, WeightsFileError, f"{PLACE}: it is empty (no shape)"),
    "strange float": (strange_float, WeightsFileError, f"{PLACE}: its type is an unusual number, which isn't read as weights"),
    "unknown filter": (unknown_filter, WeightsFileError, f"{PLACE}: it is compressed with HDF5 filter 5, which isn't known here"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_hdf5(case: str, tmp_path: Path) -> None:
    change, kind, found = HOSTILE[case]
    assert refused(weights_file(tmp_path, change), kind).startswith(found)


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("trusted", [False, True])
def test_hostile_hdf5_of_the_newest_kind(case: str, trusted: bool, tmp_path: Path) -> None:
    """The same in files that HDF5's own library lists, in a process of its own or here."""
    change, kind, _ = HOSTILE[case]

    def more(file: h5py.File) -> None:
        file.create_dataset("layers/dense/vars/1", data=np.ones((6, 6), "f4"), chunks=(2, 2), maxshape=(None, 6))
        change(file)

    refused(weights_file(tmp_path, more, libver="latest"), kind, trusted=trusted)


def test_two_datasets_over_the_same_bytes(tmp_path: Path) -> None:
    path = weights_file(tmp_path, lambda file: file.create_dataset("layers/dense_1/vars/0", data=np.zeros((4, 4), "f4")))
    with h5py.File(path) as file:
        first, second = (file[f"layers/{layer}/vars/0"].id.get_offset() for layer in ("dense", "dense_1"))
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<QQ", second, 64), struct.pack("<QQ", first, 64)))
    assert "share bytes" in refused(path, UnsafeFileError)


def test_a_shape_larger_than_what_is_stored(tmp_path: Path) -> None:
    path = weights_file(tmp_path, lambda file: file.create_dataset("layers/dense_1/vars/0", data=np.zeros((77, 55), "f4")))
    content = path.read_bytes()
    small, large = struct.pack("<QQ", 77, 55), struct.pack("<QQ", 77 << 30, 55)
    assert content.count(small) == 2  # the shape, and the largest it may grow to
    path.write_bytes(content.replace(small, large))
    assert refused(path, UnsafeFileError) == (
        f"{PLACE}: its shape (82678120448, 55) needs 18189186498560 bytes, the file holds 16940 for it"
    )


def test_limits_of_bytes_and_of_arrays(tmp_path: Path) -> None:
    path, _ = files.weights_h5(tmp_path)
    assert refused(path, UnsafeFileError, limits=Limits(max_bytes=100)).startswith("arrays of 376 bytes, the largest ")
    assert refused(path, UnsafeFileError, limits=Limits(max_arrays=2)) == "8 arrays; the limit is 2"


def test_thousands_of_pieces_of_layer_names(tmp_path: Path) -> None:
    path = tmp_path / "many.h5"
    with h5py.File(path, "w") as file:
        file.create_group("a").attrs["weight_names"] = np.array([])
        file.attrs["layer_names0"] = [b"a"]
        for i in range(1, 2000):
            file.attrs[f"layer_names{i}"] = np.array([b"a"])
    assert refused(path) == "'layer_names' lists 'a' more than once"
    content = path.read_bytes()
    with h5py.File(path) as file:
        assert len(file.attrs) == 2000
    assert "more objects than the limit allows" in refused(path, UnsafeFileError, limits=Limits(max_arrays=100))
    assert path.read_bytes() == content


def legacy(tmp_path: Path, layers: list[str], weights: list[str], config: Any = None) -> Path:
    path = tmp_path / "net.h5"
    with h5py.File(path, "w") as file:
        if config is not None:
            file.attrs["model_config"] = config if isinstance(config, str) else json.dumps(config)
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [name.encode() for name in layers]
        for layer in set(layers):
            inner = group.create_group(layer)
            inner.attrs["weight_names"] = [name.encode() for name in weights]
            for name in set(weights):
                inner[name] = np.ones(3, "f4")
    return path


def test_layers_and_weights_listed_twice_or_missing(tmp_path: Path) -> None:
    assert refused(legacy(tmp_path, ["a", "b", "a"], ["w:0"])) == "'layer_names' lists 'a' more than once"
    assert refused(legacy(tmp_path, ["a"], ["w:0", "v:0", "w:0"])) == "'weight_names' lists 'w:0' more than once"
    path = legacy(tmp_path, ["first", "second"], ["w:0"])
    with h5py.File(path, "a") as file:
        file["model_weights"].attrs["layer_names"] = [b"first", b"secnd"]
    assert refused(path) == "'layer_names' lists 'secnd', which isn't there (did you mean 'second'?)"


def test_layers_in_another_order_than_the_configuration(tmp_path: Path) -> None:
    path = legacy(tmp_path, ["second", "first"], ["w:0"], files.CONFIG)
    assert refused(path) == "'layer_names' has another order than the file's own configuration, from 'second' on"


@pytest.mark.parametrize(
    ("config", "kind"),
    [("[" * 100_000 + "]" * 100_000, WeightsFileError), ('{"a": 1', WeightsFileError), ('{"a": 1, "a": 2}', WeightsFileError)],
)
def test_a_configuration_that_is_no_json(config: str, kind: type[WeightsError], tmp_path: Path) -> None:
    path = tmp_path / "net.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", config)
        archive.writestr("model.weights.h5", b"")
    assert refused(path, kind).startswith("config.json is ")


# -- a crash or a hang of HDF5's library ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("does", "found"),
    [("os.abort()", "it crashed HDF5's library"), ("time.sleep(60)", "reading it took more than 4 seconds")],
)
def test_a_crash_or_hang_of_the_library_stays_in_its_process(
    does: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transferkit.weights.readers import hdf5_process

    child = tmp_path / "child.py"
    child.write_text(f"import os, sys, time\nsys.stdin.buffer.readline()\n{does}\n")
    monkeypatch.setattr(hdf5_process, "_CHILD", str(child))
    path = weights_file(tmp_path, lambda _: None, libver="latest")
    with h5py.File(path, "a", libver="latest") as file:
        file.create_dataset("layers/dense/vars/1", data=np.ones((6, 6), "f4"), chunks=(2, 2), maxshape=(None, 6))
    assert refused(path, UnsafeFileError).startswith(found)


# -- zip ------------------------------------------------------------------------------------------------------------------------


def keras_file(tmp_path: Path, change: Callable[[zipfile.ZipFile], None]) -> Path:
    path, _ = files.keras(tmp_path)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")  # of a name that is there already
        change(archive)
    return path


def linked(archive: zipfile.ZipFile) -> None:
    info = zipfile.ZipInfo("assets/link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(info, "/etc/passwd")


def test_hostile_archives(tmp_path: Path) -> None:
    again = keras_file(tmp_path, lambda archive: archive.writestr("model.weights.h5", b"x"))
    assert refused(again, UnsafeFileError) == "two members named 'model.weights.h5'"
    assert refused(keras_file(tmp_path, linked), UnsafeFileError) == "the member 'assets/link' is a link"
    outside = keras_file(tmp_path, lambda archive: archive.writestr("../../x", b"x"))
    assert refused(outside, UnsafeFileError) == "a member named '../../x', which leaves the archive's directory"


def test_a_gigabyte_of_blanks_as_configuration(tmp_path: Path) -> None:
    path = tmp_path / "net.keras"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("config.json", "w", force_zip64=True) as member,
    ):
        for _ in range(256):
            member.write(b" " * (1 << 20))
    assert refused(path, UnsafeFileError) == "the member 'config.json' has 268435456 bytes; the limit is 67108864"


def test_large_members_that_nobody_needs_are_left_alone(tmp_path: Path) -> None:
    path = keras_file(tmp_path, lambda archive: archive.writestr("assets/big", bytes(1 << 24), zipfile.ZIP_DEFLATED))
    before = set(tmp_path.iterdir())
    with open_archive(path) as archive:
        assert len(archive.arrays) == 8
    assert set(tmp_path.iterdir()) == before


def test_one_bit_in_a_keras_archive(tmp_path: Path) -> None:
    path, expected = files.keras(tmp_path)
    content = bytearray(path.read_bytes())
    content[content.index(expected["layers/dense/vars/0"].tobytes()) + 5] ^= 1
    path.write_bytes(content)
    assert refused(path) == "the member 'model.weights.h5' doesn't match its checksum"


def test_arrays_that_inflate(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, x=np.zeros(1 << 26, np.uint8))
    assert path.stat().st_size < 1 << 17
    with open_archive(path) as archive:  # opening unpacks only the header
        assert archive.arrays["x"].nbytes == 1 << 26
    assert refused(path, UnsafeFileError, limits=Limits(max_bytes=1 << 20)).startswith("arrays of 67108864 bytes")


# -- code -----------------------------------------------------------------------------------------------------------------------


class Evil:
    """Runs a command when Python unpickles it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_code_in_pickles_never_runs(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    evil = pickle.dumps({"state_dict": {"weight": Evil(marker)}}, protocol)
    found = refused(files.torch_zip(tmp_path, evil)[0], UnsafeFileError)
    assert "system, which isn't a tensor" in found
    old = tmp_path / "evil.pth"
    begin = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    old.write_bytes(begin + evil)
    assert "system, which isn't a tensor" in refused(old, UnsafeFileError)
    np.savez(tmp_path / "evil.npz", x=np.array([Evil(marker)], dtype=object))
    assert refused(tmp_path / "evil.npz", UnsafeFileError) == ("the member 'x.npy' holds pickled objects, which can run code")
    plain = tmp_path / "evil.bin"
    plain.write_bytes(evil)
    with pytest.raises(WeightsError):
        open_archive(plain)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["builtins eval", "builtins getattr", "torch load", "torch.hub load", "torch.utils.data DataLoader", "numpy fromfile"]
)
def test_names_that_are_no_data(name: str, tmp_path: Path) -> None:
    module, what = name.split()
    program = b"\x80\x02c" + f"{module}\n{what}\n".encode() + b")R."
    assert refused(files.torch_zip(tmp_path, program)[0], UnsafeFileError) == (
        f"the pickle asks for {module}.{what}, which isn't a tensor"
    )


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02X\xff\xff\xff\x7fa.",  # text longer than the file
        b"\x80\x02]r\xff\xff\xff\xff.",  # a far place in the memo, which costs Python's own reader 32 GiB
        b"\x80\x02" + b"(" * 3_000_000 + b".",
        b"\x80\x02" + b"]" * 100 + b"a" * 99 + b".",
        b"\x80\x02]q\x00h\x00a.",  # a list in itself
        b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",  # a dict in itself
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x02",
        b"\x80\x02.",
    ],
)
def test_pickles_that_flood_or_break(program: bytes, tmp_path: Path) -> None:
    with pytest.raises(WeightsError):
        open_archive(files.torch_zip(tmp_path, program)[0])


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [((1 << 30,), (0,), 0), ((4,), (1,), 2), ((2, 2), (4, 1), 0), ((-1,), (1,), 0), ((2,), (-1,), 3), ((1 << 62, 4), (0, 1), 0)],
)
def test_tensors_outside_their_storage(shape: Any, strides: Any, offset: int, tmp_path: Path) -> None:
    tensor = files.Tensor(files._Reference("0", 4), shape, strides, offset)
    with pytest.raises(WeightsError):
        open_archive(files.torch_zip(tmp_path, {"w": tensor}, {"0": bytes(16)})[0])


# -- the other formats ----------------------------------------------------------------------------------------------------------


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "kind", "found"),
    [
        (header(a={"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}) + bytes(4), UnsafeFileError, "'a' of shape"),
        (header(a={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}), WeightsFileError, "'a' ends at byte 4"),
        (header(a={"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}) + bytes(8), UnsafeFileError, "'a' begins at byte 4"),
        (
            header(
                a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, b={"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}
            )
            + bytes(8),
            UnsafeFileError,
            "'b' begins at byte 4 of the data, where 8 is next",
        ),
        (header(a={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}) + bytes(9), WeightsFileError, "5 bytes after"),
        (header(a={"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}) + bytes(4), WeightsFileError, "'a' has the shape"),
        (header(a={"dtype": "OBJ", "shape": [1], "data_offsets": [0, 4]}) + bytes(4), WeightsFileError, "'a' is of dtype"),
        (header(a=[1]), WeightsFileError, "the entry of 'a'"),
        (struct.pack("<Q", 1 << 39) + b"{}", WeightsFileError, "a header of"),
        (struct.pack("<Q", 8) + b'{"a": 1,', WeightsFileError, "the header is no JSON"),
        (header(__metadata__={"a": 1}), WeightsFileError, "'__metadata__' isn't text only"),
    ],
)
def test_hostile_safetensors(content: bytes, kind: type[WeightsError], found: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert refused(path, kind).startswith(found)


@pytest.mark.parametrize("name", ["../outside.h5", "/etc/passwd", "a/b.h5", "..", "", "a\\b.h5", 3, None])
def test_indices_that_name_other_files(name: Any, tmp_path: Path) -> None:
    path = tmp_path / "net.weights.json"
    path.write_text(json.dumps({"weight_map": {"/layers/dense/vars": name}}))
    assert "which isn't a file beside it" in refused(path, UnsafeFileError)
    path.write_text(json.dumps({"weightsManifest": [{"paths": [name], "weights": []}]}))
    assert "which isn't a file beside it" in refused(path, UnsafeFileError)


def test_a_shard_of_another_run(tmp_path: Path) -> None:
    path, _ = files.sharded(tmp_path)
    shard = tmp_path / "net_00001.weights.h5"
    with h5py.File(shard, "w") as file:
        file["layers/dense_1/vars/0"] = np.zeros((7, 4), "f4")
        file["layers/dense_1/vars/1"] = np.zeros(4, "f4")
    assert refused(path) == "the index says the arrays have 376 bytes together, the shards hold 408"
    with h5py.File(shard, "a") as file:
        file["layers/dense_2/vars/0"] = np.zeros(4, "f4")
    assert refused(path) == "'net_00001.weights.h5' holds '/layers/dense_2/vars', which the index puts elsewhere"


def test_one_bit_in_a_checkpoint(tmp_path: Path) -> None:
    path, _ = files.checkpoint(tmp_path)
    data = tmp_path / "net.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[7] ^= 4
    data.write_bytes(content)
    assert refused(path) == "'first/kernel' doesn't match its checksum"
    index = bytearray(path.read_bytes())
    index[9] ^= 4
    path.write_bytes(index)
    assert "checksum" in refused(path)


def test_a_latest_checkpoint_that_is_gone(tmp_path: Path) -> None:
    files.checkpoint(tmp_path)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "net-30"\n')
    assert refused(tmp_path, WeightsNotFoundError) == (
        "its 'checkpoint' file names 'net-30', which isn't there; the directory holds 'net.index'"
    )


# -- memory and other files -----------------------------------------------------------------------------------------------------


def run(program: str, *arguments: str, folder: Path) -> str:
    """What a program prints in a fresh interpreter; it must say nothing on the standard error."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory as Linux keeps them")
def test_bombs_within_little_memory(tmp_path: Path) -> None:
    """Each bomb is refused, or opened without unpacking it, within 300 MB of address space over the interpreter's own."""
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(1 << 28, np.uint8))
    with h5py.File(tmp_path / "b.weights.h5", "w") as file:
        made = file.create_dataset("layers/dense/vars/0", (1 << 16, 1 << 12), "f4", chunks=(1 << 12, 1 << 12), compression="gzip")
        packed = zlib.compress(bytes(1 << 26), 1)
        for i in range(16):
            made.id.write_direct_chunk((i << 12, 0), packed)
    (tmp_path / "c.safetensors").write_bytes(header(a={"dtype": "U8", "shape": [1 << 50], "data_offsets": [0, 1 << 50]}))
    (tmp_path / "d.json").write_bytes(b'{"weight_map": [' + b"{},[]," * 4_000_000 + b"1]}")
    files.torch_zip(tmp_path, b"\x80\x02" + b"]" * 20_000_000 + b".")
    program = (
        "import resource, sys\n"
        "from transferkit.weights.readers import open_archive\n"
        "from transferkit.errors import WeightsError\n"
        "import ml_dtypes, zipfile, transferkit.weights.readers.hdf5\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000,) * 2)\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        open_archive(path).close()\n"
        "        print('opened')\n"
        "    except WeightsError as error:\n"
        "        print(type(error).__name__)\n"
    )
    names = ("a.npz", "b.weights.h5", "c.safetensors", "d.json", "net.pt")
    assert run(program, *names, folder=tmp_path).split() == [
        "opened",
        "opened",
        "WeightsFileError",
        "UnsafeFileError",
        "UnsafeFileError",
    ]


def test_nothing_else_is_opened(tmp_path: Path) -> None:
    """Only the files named, and those an index lists, by an audit hook in a fresh interpreter."""
    paths = [str(write(tmp_path)[0]) for write in files.WRITERS.values()]
    program = (
        "import sys\n"
        "from transferkit.weights.readers import open_archive\n"
        "import importlib, pkgutil, transferkit.weights.readers as readers\n"
        "[importlib.import_module(f'{readers.__name__}.{m.name}') for m in pkgutil.iter_modules(readers.__path__)]\n"
        "b'x'.decode('cp437')\n"  # Python's own table for names in zip archives, a file of the interpreter
        "seen = []\n"
        "def hook(event, arguments):\n"
        "    if event in ('open', 'subprocess.Popen', 'os.system', 'os.exec', 'socket.connect', 'socket.__new__'):\n"
        "        seen.append((event, str(arguments[0])))\n"
        "sys.addaudithook(hook)\n"
        "for path in sys.argv[1:]:\n"
        "    with open_archive(path) as archive:\n"
        "        [archive.read(name) for name in archive.arrays]\n"
        "[print(*item) for item in seen]\n"
    )
    opened = [line.split(" ", 1) for line in run(program, *paths, folder=tmp_path).splitlines()]
    assert {event for event, _ in opened} == {"open"}
    foreign = {name for _, name in opened if not name.startswith(str(tmp_path)) and not name.isdigit()}
    assert foreign == set()
