"""Lists and reads an HDF5 file with HDF5's own library, run as a script in a process of its own that may crash or hang.

The first line on the standard input is JSON: where the file is, and the limits. The answer is JSON: what the file holds.
After that every line names a dataset, and the answer is its length as a line and its bytes.
Imports h5py only, and nothing of this package, so that it starts fast.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import math
import sys
from typing import Any, BinaryIO

import h5py
import numpy as np

__all__ = ["listing", "main"]

_FILTERS = (1, 2, 3, 32000)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray):
        return [_plain(v) for v in value.ravel().tolist()] if value.ndim else _plain(value.item())
    if isinstance(value, np.generic):
        return _plain(value.item())
    return value if isinstance(value, (str, int, float, bool, list)) else None


def _dataset(node: Any) -> dict[str, Any]:
    properties = node.id.get_create_plist()
    shape, dtype, problem, unsafe = node.shape, np.dtype(node.dtype), "", False
    filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    stored = node.id.get_storage_size()
    if shape is None:
        problem, shape = "it is empty (no shape)", ()
    elif properties.get_external_count():
        problem, unsafe = "its bytes lie in another file", True
    elif properties.get_layout() == h5py.h5d.VIRTUAL:
        problem, unsafe = "it is a virtual dataset, which reads other files", True
    elif dtype.kind not in "biuf" or h5py.check_vlen_dtype(node.dtype) is not None:
        problem = f"its type is {dtype}, which isn't read as weights"
    elif node.id.get_type().get_size() != dtype.itemsize:
        problem = "its type is an unusual number, which isn't read as weights"
    elif unknown := [f for f in filters if f not in _FILTERS]:
        problem = f"it is compressed with HDF5 filter {unknown[0]}, which isn't known here"
    elif math.prod(shape) and not stored:
        problem = "its bytes were never written"
    elif properties.get_layout() == h5py.h5d.CHUNKED and node.id.get_num_chunks() != math.prod(
        -(-extent // chunk) for extent, chunk in zip(shape, node.chunks, strict=True)
    ):
        problem = "some of its chunks were never written"
    return {
        "shape": [int(n) for n in shape],
        "dtype": "|V2" if dtype.kind == "V" and dtype.itemsize == 2 else dtype.str if dtype.kind in "biuf" else "|u1",
        "offset": node.id.get_offset(),
        "stored": stored,
        "problem": problem,
        "unsafe": unsafe,
    }


def listing(file: Any, *, max_objects: int, max_metadata: int) -> dict[str, Any]:
    """What an open h5py file holds, as values that fit into JSON; `refused` says why it is refused."""
    groups: dict[str, Any] = {}
    children: dict[str, list[str]] = {}
    datasets: dict[str, Any] = {}
    attributes_of: dict[str, Any] = {}
    seen: dict[int, str] = {}
    metadata = 0
    todo: list[tuple[str, Any]] = [("", file)]
    while todo:
        path, node = todo.pop()
        address = h5py.h5o.get_info(node.id).addr
        if address in seen:
            return {"refused": f"{path!r} and {seen[address] or '/'!r} are two names for one object"}
        seen[address] = path
        attributes = {}
        for name in node.attrs:
            attributes[name] = _plain(node.attrs[name])
            metadata += len(name) + 8 + (len(attributes[name]) if isinstance(attributes[name], (str, list)) else 0)
        if metadata > max_metadata or len(seen) > max_objects:
            return {"refused": "more objects or attributes than the limit allows"}
        if isinstance(node, h5py.Dataset):
            datasets[path] = _dataset(node)
            attributes_of[path] = attributes
            continue
        if not isinstance(node, h5py.Group):
            continue
        groups[path] = attributes
        children[path] = list(node)
        for name in reversed(children[path]):
            inner = f"{path}/{name}" if path else name
            if not isinstance(node.get(name, getlink=True), h5py.HardLink):
                return {"refused": f"{inner} is a soft or external link"}
            todo.append((inner, node[name]))
    return {
        "groups": groups,
        "children": children,
        "datasets": datasets,
        "attributes": attributes_of,
        "addresses": {path: address for address, path in seen.items()},
    }


def _answer(output: BinaryIO, content: bytes) -> None:
    output.write(b"%d\n" % len(content))
    output.write(content)
    output.flush()


def main() -> None:
    """Serves one file over the standard streams until the input ends."""
    request = json.loads(sys.stdin.buffer.readline())
    if importlib.util.find_spec("resource"):  # Windows has no such limits
        resource = importlib.import_module("resource")
        resource.setrlimit(resource.RLIMIT_AS, (request["memory"], request["memory"]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    output = sys.stdout.buffer
    try:
        where: Any = io.BytesIO(sys.stdin.buffer.read(request["size"])) if request["size"] else request["path"]
        file = h5py.File(where, "r")
        found = listing(file, max_objects=request["max_objects"], max_metadata=request["max_metadata"])
    except Exception as error:
        found = {"damaged": f"{type(error).__name__}: {error}"}
    _answer(output, json.dumps(found).encode())
    for line in sys.stdin.buffer:
        try:
            content = np.ascontiguousarray(file[line.decode().rstrip("\n")][()])
            _answer(output, b"+" + content.tobytes())
        except Exception as error:
            _answer(output, b"-" + str(error).encode())


if __name__ == "__main__":
    main()
