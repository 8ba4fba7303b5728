"""Files that ask for more memory or time than they hold content for, and what came of opening and reading each.

`python tests/bombs.py` opens them under a limit of memory, little over what the interpreter has already, and prints counts as
JSON; `failed` lists what wasn't refused with words of its own, or took over five seconds. TensorFlow, whose memory isn't
counted, stays out of the process.
"""

from __future__ import annotations

import io
import json
import pkgutil
import resource
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import weights_files as files

from transferkit.errors import WeightsError

SECONDS = 5
MEMORY = 300_000_000


def deflated(size: int) -> bytes:
    return zlib.compress(bytes(size), 1)


def safetensors(entries: Any, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def zipped(members: Mapping[str, bytes], *, packed: bool = True, lie: int = 0) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as written:
        for name, content in members.items():
            written.writestr(name, content)
    content = held.getvalue()
    if lie:  # the size of the last member, in its local and its central head
        size = struct.pack("<I", len([*members.values()][-1]))
        content = content.replace(size, struct.pack("<I", lie))
    return content


def weights_of(shape: tuple[int, ...], chunks: tuple[int, ...] | None, **options: Any) -> bytes:
    held = io.BytesIO()
    with h5py.File(held, "w") as file:
        file.create_dataset("layers/dense/vars/0", shape, "f4", chunks=chunks, **options)
    return held.getvalue()


def packed_weights(rows: int, times: int) -> bytes:
    """Chunks of zeros that unpack to a thousand times their size."""
    held = io.BytesIO()
    with h5py.File(held, "w") as file:
        made = file.create_dataset(
            "layers/dense/vars/0", (rows * times, 1 << 12), "f4", chunks=(rows, 1 << 12), compression="gzip"
        )
        chunk = deflated(rows << 14)
        for i in range(times):
            made.id.write_direct_chunk((i * rows, 0), chunk)
    return held.getvalue()


def many(count: int, name: Callable[[int], str], attribute: str = "", libver: str = "earliest") -> bytes:
    held = io.BytesIO()
    with h5py.File(held, "w", libver=libver) as file:
        for i in range(count):
            if attribute:
                file.attrs[f"{attribute}{i}"] = [b"a" * 20] * 4
            else:
                file.create_group(name(i))
        file.attrs["layer_names"] = [b"a"]
    return held.getvalue()


def npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + data


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


def bombs() -> Iterator[tuple[str, bytes]]:
    """Files that must be refused, on opening or on reading all of them, whatever they ask for."""
    floats = {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 1 << 32]}
    yield "a.npz", zipped({"x.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904,), }\n")})
    yield "b.npz", zipped({"x.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1073741824,), }\n", bytes(64))})
    for i, size in enumerate((1 << 28, 1 << 29)):
        head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size},), }}\n"
        yield f"inflating{i}.npz", zipped({"x.npy": npy(head, bytes(size))})
    yield "lie.npz", zipped({"x.npy": bytes(1000)}, packed=False, lie=1 << 31)
    yield "header.npz", zipped({"x.npy": npy("{" + " " * 60_000 + "}")})
    yield "members.npz", zipped({f"{i}.npy": b"" for i in range(20_000)}, packed=False)
    yield "about.npz", zipped({"transferkit.json": b"[" * 30_000_000})
    yield "config.keras", zipped({"config.json": b" " * (1 << 28)})
    yield "deep.keras", zipped({"config.json": nested(1_000_000).encode()})
    yield "wide.keras", zipped({"config.json": b"{" + b",".join(b'"%d":[]' % i for i in range(2_500_000)) + b"}"})
    yield "inside.keras", zipped({"config.json": b"{}", "model.weights.h5": bytes(1 << 29)})
    yield "lie.keras", zipped({"config.json": b"{}", "model.weights.h5": bytes(999)}, packed=False, lie=0xFFFFFFF0)
    yield "overlong.safetensors", struct.pack("<Q", 1 << 62) + b"{" + bytes(100)
    yield "long.safetensors", struct.pack("<Q", 70 << 20) + b"{" + b" " * (70 << 20)
    yield "shape.safetensors", safetensors({"a": floats}, bytes(64))
    yield "product.safetensors", safetensors({"a": {**floats, "shape": [1 << 31, 1 << 31, 4], "data_offsets": [0, 0]}})
    yield "zeros.safetensors", safetensors({"a": {**floats, "shape": [1 << 61, 0, 1 << 61], "data_offsets": [0, 4]}}, bytes(4))
    yield "dims.safetensors", safetensors({"a": {**floats, "shape": [1] * 1000, "data_offsets": [0, 4]}}, bytes(4))
    yield "deep.safetensors", safetensors(b'{"a":' + nested(500_000).encode() + b"}")
    yield "many.safetensors", safetensors(b"{" + b"[]," * 10_000_000 + b"}")
    yield (
        "digits.safetensors",
        safetensors(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 100_000 + b'], "data_offsets": [0, 4]}}'),
    )
    yield "never.weights.h5", weights_of((1 << 20, 1 << 12), None)
    yield "chunks.weights.h5", weights_of((1 << 20, 1 << 12), (1 << 10, 1 << 12), compression="gzip")
    yield "tiny.weights.h5", weights_of((1 << 40,), (1,))
    yield "packed.weights.h5", packed_weights(1 << 12, 16)
    yield "packed2.weights.h5", packed_weights(1 << 10, 64)
    yield "groups.h5", many(150_000, lambda i: f"g{i}", libver="latest")
    yield "deep.h5", many(1, lambda _: "/".join("g" * 40_000))
    yield "names.h5", many(30_000, str, "layer_names", libver="latest")
    yield "fill.weights.h5", weights_of((1 << 30,), None, fillvalue=1.0)
    yield "count.weights.h5", weights_of((4, 4), None).replace(struct.pack("<QQ", 4, 4), struct.pack("<QQ", 1 << 20, 1 << 12))
    yield "index.json", b'{"weight_map": {' + b",".join(b'"%d": "../../x.safetensors"' % i for i in range(200_000)) + b"}}"
    yield "deep.json", b'{"weight_map": ' + nested(900_000, '{"a":', "}").replace("{}", "{").encode() + b"}"
    yield "wide.json", b'{"weight_map": [' + b"{},[]," * 4_000_000 + b"1]}"
    manifest = [{"paths": ["x.bin"], "weights": [{"name": "a", "dtype": "float32", "shape": [1 << 50]}]}]
    yield "tfjs.json", json.dumps({"weightsManifest": manifest}).encode()
    with tempfile.TemporaryDirectory() as folder:
        for i, program in enumerate(
            (b"]" * 20_000_000, b"(" * 20_000_000, b"\x8a\xff" + b"\xff" * 255, b"T" + struct.pack("<I", 1 << 31))
        ):
            yield f"flood{i}.pt", files.torch_zip(Path(folder), b"\x80\x02" + program + b".")[0].read_bytes()
        doubling = b"]" + b"q\0" + b"".join(b"]q%c(%s%se" % (i + 1, b"h%c" % i, b"h%c" % i) for i in range(60))
        yield "laughs.pt", files.torch_zip(Path(folder), b"\x80\x02" + doubling + b".")[0].read_bytes()


def run_bombs() -> dict[str, Any]:
    """Opens and reads each whole, with little memory over what the interpreter has already."""
    from transferkit.weights import readers
    from transferkit.weights.readers import open_archive

    for found in pkgutil.iter_modules(readers.__path__):
        __import__(f"{readers.__name__}.{found.name}")
    counts: dict[str, Any] = {"files": 0, "slowest_seconds": 0.0, "failed": []}
    folder = Path(tempfile.mkdtemp())
    paths = []
    for name, content in bombs():
        (folder / name).write_bytes(content)
        paths.append(folder / name)
    del content
    with open_archive(files.safetensors(folder)[0]) as warm:
        [warm.read(name) for name in warm.arrays]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    whole = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, whole[1]))
    for path in paths:
        begin = time.process_time()
        try:
            with open_archive(path) as archive:
                for name in archive.arrays:
                    archive.read(name)
            counts["failed"].append(f"{path.name}: it opens")
        except WeightsError as error:
            if "makes no sense" in error.found[0]:
                counts["failed"].append(f"{path.name}: {error.found[0]}")
        except BaseException as error:
            counts["failed"].append(f"{path.name}: {type(error).__name__}: {error}"[:300])
        taken = time.process_time() - begin
        counts["slowest_seconds"] = max(counts["slowest_seconds"], round(taken, 2))
        if taken > SECONDS:
            counts["failed"].append(f"{path.name}: {taken:.1f} seconds")
        counts["files"] += 1
    resource.setrlimit(resource.RLIMIT_AS, whole)
    return counts


if __name__ == "__main__":
    found = run_bombs()
    print(json.dumps(found, indent=1))
    sys.exit(1 if found["failed"] else 0)
