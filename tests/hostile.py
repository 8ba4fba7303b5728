"""Files made to run code, to change a process's settings or to leave a model half loaded; what came of each.

`python tests/hostile.py PART … [--every N]` runs the parts in this process and prints counts as JSON; in each, `failed` lists
the defects. `exploits`: files of the published kinds. `names`: every exported name of `keras.*` where a configuration names a
function or a class. `loads`: loads that must fail and change nothing. `--every N` takes every N-th name or load.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import errno
import io
import json
import marshal
import os
import pickle
import pkgutil
import random
import resource
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import weights_files as files

from transferkit.errors import TransferKitError

SECONDS = 5
EVENTS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "socket.getaddrinfo")
Config = Mapping[str, Any]


def layer(kind: str, name: str = "x", /, **config: Any) -> dict[str, Any]:
    return {"class_name": kind, "config": {"name": name, **config}}


def dense(**config: Any) -> dict[str, Any]:
    return layer("Dense", "dense", units=2, batch_input_shape=[None, 2], **config)


def model(*layers: Any, **more: Any) -> dict[str, Any]:
    return {"class_name": "Sequential", "config": {"name": "net", "layers": list(layers)}, **more}


def new(module: str, name: str, registered: str | None = None, /, **config: Any) -> dict[str, Any]:
    """An object as Keras 3 writes it."""
    return {"module": module, "class_name": name, "config": config, "registered_name": registered}


def legacy(config: Any) -> bytes:
    held = io.BytesIO()
    with h5py.File(held, "w") as file:
        file.attrs["keras_version"] = "2.9.0"
        file.attrs["model_config"] = json.dumps(config)
        inner = file.create_group("model_weights/dense")
        file["model_weights"].attrs["layer_names"] = [b"dense"]
        inner.attrs["weight_names"] = [b"dense/kernel:0", b"dense/bias:0"]
        inner["dense/kernel:0"], inner["dense/bias:0"] = np.ones((2, 2), "f4"), np.ones(2, "f4")
    return held.getvalue()


def archive(config: Any, **members: bytes) -> bytes:
    held, weights = io.BytesIO(), io.BytesIO()
    with h5py.File(weights, "w") as file:
        file["layers/dense/vars/0"], file["layers/dense/vars/1"] = np.ones((2, 2), "f4"), np.ones(2, "f4")
    with zipfile.ZipFile(held, "w") as packed:
        packed.writestr("metadata.json", '{"keras_version": "3.15.1"}')
        packed.writestr("config.json", json.dumps(config))
        packed.writestr("model.weights.h5", weights.getvalue())
        for name, content in members.items():
            packed.writestr(name, content)
    return held.getvalue()


class Evil:
    """Runs a command when Python unpickles it."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call[0], tuple(self.call[1:])


def exploits(marker: Path) -> Iterator[tuple[str, bytes]]:
    """Files of the kinds that were published against Keras, PyTorch and NumPy; each would leave `marker` behind if it ran."""
    command = f"touch {marker}"
    program = f"__import__('os').system({command!r})"
    code = base64.b64encode(marshal.dumps(compile(f"lambda x: {program}", "x", "eval"))).decode()
    lambdas: list[Any] = [
        layer("Lambda", "l", function=[code, None, None], function_type="lambda", arguments={}),
        layer("Lambda", "l", function=new("builtins", "function", code=code, defaults=None, closure=None)),
        layer("Lambda", "l", function={"class_name": "__lambda__", "config": {"code": code, "defaults": None, "closure": None}}),
        layer("Lambda", "l", function="system", function_type="function", module="os", arguments={}),
        layer("Lambda", "l", function=new("os", "system", "system")),
        layer("Lambda", "l", function=new("keras.utils", "get_file"), arguments={"fname": "x", "origin": "http://127.0.0.1:9/x"}),
    ]
    called = [
        new("os", "system", None, command=command),
        new("builtins", "exec", None, source=program),
        new("builtins", "function", "os", code=code),
        new("subprocess", "Popen", None, args=command, shell=True),
        new("keras.utils", "get_file", None, origin="http://127.0.0.1:9/x", fname="x"),
        new("keras.src.utils.file_utils", "get_file", None, origin="http://127.0.0.1:9/x"),
        new("keras.config", "enable_unsafe_deserialization"),
        new("keras.saving", "load_model", None, filepath="/etc/passwd"),
        new("keras.models", "clone_model", None, model=None),
        {"class_name": "__lambda__", "config": {"value": code}},
        {"class_name": "__import__", "config": {"name": "antigravity"}},
        {"class_name": "function", "config": "system", "module": "os", "registered_name": "system"},
    ]
    places: list[Callable[[Any], dict[str, Any]]] = [
        lambda x: model(dense(activation=x)),
        lambda x: model(dense(kernel_initializer=x)),
        lambda x: model(dense(), x),
        lambda x: model(dense(kernel_regularizer=x), compile_config={"loss": x, "optimizer": x}),
    ]
    for i, evil in enumerate(lambdas):
        yield f"lambda{i}.h5", legacy(model(dense(), evil))
        yield f"lambda{i}.keras", archive(model(dense(), evil))
    for i, evil in enumerate(called):
        for j, place in enumerate(places):
            pack = (legacy, archive)[(i + j) % 2]
            yield f"call{i}-{j}{'.h5' if pack is legacy else '.keras'}", pack(place(evil))
    wrapped = {"TorchModuleWrapper": {"module": base64.b64encode(pickle.dumps(Evil(os.system, command))).decode()}}
    yield "torch.keras", archive(model(dense(), new("keras.layers", "TorchModuleWrapper", None, **wrapped["TorchModuleWrapper"])))
    yield "tfsm.keras", archive(model(dense(), new("keras.layers", "TFSMLayer", None, filepath="/etc/passwd")))
    yield "jax.keras", archive(model(dense(), new("keras.layers", "JaxLayer", None, call_fn=code)))
    yield "words.keras", archive(model(dense(), layer("StringLookup", vocabulary="/etc/passwd")))
    yield "text.keras", archive(model(dense(), layer("TextVectorization", vocabulary="file:///etc/passwd", standardize=code)))
    yield "assets.keras", archive(model(dense()), **{"assets/../../x": b"1"})
    yield "weights.keras", archive(model(dense()), **{"model.weights.npz": pickle.dumps(Evil(os.system, command))})
    for protocol in (0, 2, 4):
        yield f"state{protocol}.pkl", pickle.dumps({"weight": Evil(os.system, command)}, protocol)
    for i, evil in enumerate(
        (Evil(os.system, command), Evil(eval, program), Evil(exec, program), Evil(__import__, "antigravity"))
    ):
        with tempfile.TemporaryDirectory() as folder:
            yield f"state{i}.pt", files.torch_zip(Path(folder), pickle.dumps({"state_dict": evil}, 2))[0].read_bytes()
    held = io.BytesIO()
    np.savez(held, x=np.array([Evil(os.system, command)], dtype=object))
    yield "objects.npz", held.getvalue()


def state() -> dict[str, Any]:
    """What a process is set to, as far as a file might want to change it."""
    import keras
    import tensorflow as tf

    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "files": sorted(os.listdir()),
        "path": list(sys.path),
        "umask": (os.umask(0o22), os.umask(0o22))[1],
        "keras": (
            keras.config.floatx(),
            keras.config.epsilon(),
            keras.config.image_data_format(),
            keras.config.dtype_policy().name,
            keras.config.is_traceback_filtering_enabled(),
            keras.config.is_interactive_logging_enabled(),
            keras.config.is_flash_attention_enabled() if hasattr(keras.config, "is_flash_attention_enabled") else None,
            sorted(map(str, keras.saving.get_custom_objects())),
        ),
        "tensorflow": (
            tf.config.functions_run_eagerly(),
            tf.config.get_soft_device_placement(),
            tf.config.threading.get_inter_op_parallelism_threads(),
            tf.executing_eagerly(),
        ),
        # Not Python's: Keras draws the seed of every initializer and dropout it makes from it, whatever the file says.
        "random": np.random.get_state()[1].tolist(),  # type: ignore[index]
        "recursion": sys.getrecursionlimit(),
        "limits": resource.getrlimit(resource.RLIMIT_AS),
    }


class Watch:
    """Sees by an audit hook what runs, connects or is opened while it is on."""

    def __init__(self) -> None:
        self.on, self.seen = False, list[str]()
        self.own = ""
        self.known = (sys.prefix, sys.base_prefix, "/usr", "/dev/null", "/proc/self", *(place for place in sys.path if place))
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in EVENTS:
            self.seen.append(f"{event} {arguments[:2]!r}"[:200])
        elif event == "open" and isinstance(arguments[0], str) and not arguments[0].startswith((self.own, *self.known)):
            self.seen.append(f"open {arguments[0]}")

    @contextlib.contextmanager
    def during(self, own: str) -> Iterator[list[str]]:
        self.seen, self.own, self.on = [], own, True
        try:
            yield self.seen
        finally:
            self.on = False


def opened(path: Path, watch: Watch, marker: Path, before: Mapping[str, Any]) -> tuple[str, list[str]]:
    """What opening a file as a model came to, and what it did that it mustn't."""
    from transferkit.building.opening import open_model

    outcome, wrong = "opened", []
    begin = time.process_time()
    with watch.during(str(path)) as seen:
        try:
            open_model(path)
        except TransferKitError as error:
            outcome = "refused"
            if "makes no sense" in "".join(error.found):
                wrong.append(f"an error without words of its own: {error.found[0]}")
        except Exception as error:
            outcome = "raw"
            wrong.append(f"{type(error).__name__}: {error}"[:300])
    wrong += seen
    if time.process_time() - begin > SECONDS:
        wrong.append("it takes long")
    if marker.exists():
        wrong.append("it ran")
        marker.unlink()
    after = state()
    wrong += [f"changed {key}" for key in before if after[key] != before[key]]
    return outcome, [f"{path.name}: {problem}" for problem in wrong]


def run_exploits(watch: Watch) -> dict[str, Any]:
    counts: dict[str, Any] = {"files": 0, "opened": 0, "refused": 0, "raw": 0, "failed": []}
    marker = Path(tempfile.mkdtemp()) / "ran"
    folder = Path(tempfile.mkdtemp())
    for warm in ("net.h5", "net.keras"):
        (folder / warm).write_bytes((legacy if warm.endswith("h5") else archive)(model(dense(activation="relu"))))
        opened(folder / warm, watch, marker, {})
    before = state()
    for name, content in exploits(marker):
        path = folder / name
        path.write_bytes(content)
        outcome, wrong = opened(path, watch, marker, before)
        counts["files"] += 1
        counts[outcome] += 1
        counts["failed"] += wrong
    return counts


def exported() -> list[str]:
    """Every public dotted name of `keras`, with its modules."""
    import keras

    found: dict[str, None] = {}
    for module in [
        keras,
        *(sys.modules[m.name] for m in pkgutil.walk_packages(keras.__path__, "keras.") if m.name in sys.modules),
    ]:
        if ".src" not in module.__name__:
            found.update({f"{module.__name__}.{name}": None for name in dir(module) if not name.startswith("__")})
    return sorted(found)


def run_names(watch: Watch, every: int) -> dict[str, Any]:
    names = exported()
    counts: dict[str, Any] = {"names": len(names), "files": 0, "opened": 0, "refused": 0, "raw": 0, "failed": []}
    marker = Path(tempfile.mkdtemp()) / "ran"
    path = Path(tempfile.mkdtemp()) / "net.h5"
    places: list[Callable[[str, str], Any]] = [
        lambda _, name: model(dense(activation=name)),
        lambda _, name: model(dense(kernel_initializer=name)),
        lambda module, name: model(dense(activation=new(module, name), bias_regularizer={"class_name": name, "config": {}})),
        lambda module, name: model(dense(), {**new(module, name, name="y"), "name": "y"}),
        lambda module, name: model(dense(kernel_constraint=f"{module}.{name}", dtype=name)),
    ]
    path.write_bytes(legacy(model(dense(activation="relu"))))
    opened(path, watch, marker, {})
    before = state()
    for number, dotted in enumerate(names[::every]):
        module, _, name = dotted.rpartition(".")
        for i, place in enumerate(places):
            if every > 1 and i != number % len(places):
                continue  # a short run puts each name in one place
            path.write_bytes(legacy(place(module, name)))
            outcome, wrong = opened(path, watch, marker, before)
            counts["files"] += 1
            counts[outcome] += 1
            counts["failed"] += [f"{dotted} at place {i}: {problem}" for problem in wrong]
            before = state() if wrong else before
    return counts


# -- loads that fail ------------------------------------------------------------------------------------------------------------


def network(units: int = 520) -> Any:
    """A network of which two kernels are read straight into their variables, and the rest by way of memory."""
    import keras

    start = keras.Input((units,))
    x = keras.layers.BatchNormalization(name="norm")(keras.layers.Dense(units, name="first")(start))
    return keras.Model(start, keras.layers.Dense(units, name="second")(x))


def written(folder: Path, units: int = 520) -> list[Path]:
    """The network's weights in each format a model can be saved in."""
    from transferkit.weights.saving import save_weights

    net, rng = network(units), np.random.default_rng(1)
    for variable in net.weights:
        variable.assign(rng.uniform(0.1, 1, variable.shape))
    paths = [folder / f"{units}{ending}" for ending in (".h5", ".weights.h5", ".keras", ".safetensors", ".npz")]
    for path in paths:
        if path.suffix == ".keras":
            net.save(path)
        else:
            save_weights(net, path)
    return paths


def spoiled(path: Path, rng: random.Random) -> bytes:
    """The file with one value that isn't finite."""
    from transferkit.weights.readers import open_archive

    content = path.read_bytes()
    with open_archive(path) as archive:
        raw = archive.read(rng.choice(list(archive.arrays))).tobytes()
    at = content.index(raw) + 4 * rng.randrange(len(raw) // 4)
    return content[:at] + rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff")) + content[at + 4 :]


class FailingDisk:
    """Lets every read fail from a certain one on, as a dying disk does."""

    def __init__(self) -> None:
        self.reads, self.failing = 0, sys.maxsize
        os.pread, os.preadv = self.watched(os.pread), self.watched(os.preadv)

    def watched(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def read(*arguments: Any) -> Any:
            self.reads += 1
            if self.reads > self.failing:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments)

        return read

    def fails_from(self, failing: int) -> None:
        self.reads, self.failing = 0, failing


def run_loads(every: int) -> dict[str, Any]:
    """A thousand loads that fail: damaged files, failing disks, values that aren't finite, files of other networks."""
    import fuzz_weights
    import keras

    from transferkit.weights.loader import WeightLoader

    folder = Path(tempfile.mkdtemp())
    net = network()
    net.compile(keras.optimizers.Adam(), "mse")
    net.fit(np.ones((4, 520)), np.ones((4, 520)), verbose=0)
    good, other = written(folder), written(folder, 510)
    variables = [*net.weights, *net.optimizer.variables]
    values = [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]
    before = [value.tobytes() for value in values]
    counts: dict[str, Any] = {"loads": 0, "failing": 0, "by_kind": {}, "errors": {}, "failed": []}
    rng, disk = random.Random(0), FailingDisk()
    reads = {}
    for path in good:
        disk.fails_from(sys.maxsize)
        if not WeightLoader(path).load(net).verify(net):
            counts["failed"].append(f"{path.name}: undamaged, and not what was loaded")
        reads[path] = disk.reads
    kinds = ("damaged", "not finite", "failing disk", "of another network")
    while counts["failing"] < 1000 // every:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        number = counts["loads"]
        kind = kinds[number // len(good) % len(kinds)]
        path = (other if kind == "of another network" else good)[number % len(good)]
        if kind == "damaged":
            content = fuzz_weights.mutated(path.read_bytes(), rng)
        else:
            content = spoiled(path, rng) if kind == "not finite" else path.read_bytes()
        victim = folder / f"victim{''.join(path.suffixes)}"
        victim.write_bytes(content)
        counts["loads"] += 1
        disk.fails_from(rng.randrange(reads[path]) if kind == "failing disk" else sys.maxsize)
        try:
            report = WeightLoader(victim).load(net)
        except TransferKitError as error:
            said = type(error).__name__
            counts["errors"][said] = counts["errors"].get(said, 0) + 1
        except Exception as error:
            counts["failed"].append(f"{number}, {kind}: {type(error).__name__}: {error}"[:300])
        else:
            if kind != "damaged" or not report.verify(net):
                counts["failed"].append(f"{number}, {kind}: it loads")
            continue
        finally:
            disk.fails_from(sys.maxsize)
        counts["failing"] += 1
        counts["by_kind"][kind] = counts["by_kind"].get(kind, 0) + 1
        if [keras.ops.convert_to_numpy(variable).tobytes() for variable in variables] != before:
            counts["failed"].append(f"{number}, {kind}: the model or its optimizer changed")
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", choices=("exploits", "names", "loads"))
    parser.add_argument("--every", type=int, default=1)
    chosen = parser.parse_args()
    os.chdir(tempfile.mkdtemp())
    found: dict[str, Any] = {}
    if {"exploits", "names"} & set(chosen.parts):
        watch = Watch()
        if "exploits" in chosen.parts:
            found["exploits"] = run_exploits(watch)
        if "names" in chosen.parts:
            found["names"] = run_names(watch, chosen.every)
    if "loads" in chosen.parts:
        found["loads"] = run_loads(chosen.every)
    print(json.dumps(found, indent=1))
    return 1 if any(part["failed"] for part in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
