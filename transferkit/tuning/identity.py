"""What a run is, in words, so that no other run goes on from its checkpoints; and what its bits depend on besides.

May import Keras and the floors below.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from transferkit._keras import keras, tf
from transferkit.building.content import keras_settings, vocabularies
from transferkit.building.heads import heads_of, leaf_layers
from transferkit.data import Data, is_arrays, row_count

__all__ = ["differences", "environment", "identity", "threads"]

#: How much of two long texts is shown around the place in which they differ.
_AROUND = 60


def identity(plan: Any, model: Any, *, data: Any, validation: Any, seed: int, **settings: Any) -> dict[str, str]:
    """What must be the same for a run to be gone on with, in words.

    Args:
        plan: The plan.
        model: The model; its weights don't count.
        data: The training data.
        validation: The validation data.
        seed: Of the run.
        settings: More of the call.
    """
    variables = [(tuple(item.shape), keras.backend.standardize_dtype(item.dtype)) for item in model.variables]
    mark = hashlib.sha256(repr(variables).encode()).hexdigest()[:12]
    return {
        "plan": repr(plan),
        "model": f"{len(model.layers)} layers, {model.count_params():,} parameters, {mark}",
        "setting of a layer": "; ".join(_settings(layer) for _, layer in leaf_layers(model)),
        "vocabulary": _words_mark(model),
        "classes of the model": repr([head.class_names for head in heads_of(model)]),
        "seed": str(seed),
        **{name: repr(value) for name, value in settings.items()},
        "training data": _data_mark(data),
        "validation data": _data_mark(validation),
    }


def _settings(layer: Any) -> str:
    """A layer in words, without what may differ between two that do the same: names, which Keras counts, and what is frozen."""
    try:
        config = layer.get_config()
    except (NotImplementedError, TypeError, ValueError):
        config = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items() if key not in ("name", "trainable")}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value if isinstance(value, (str, int, float)) or value is None else type(value).__name__

    return f"{type(layer).__name__}({', '.join(f'{key}={item}' for key, item in plain(config).items())})"


def _words_mark(model: Any) -> str:
    """What layers look words up in, by a digest: no weight tells it, and no checkpoint holds it."""
    found = [words for _, layer in leaf_layers(model) for words in vocabularies(layer)]
    return f"{sum(map(len, found))} words, {hashlib.sha256(repr(found).encode()).hexdigest()[:12]}" if found else "none"


def _data_mark(data: Any) -> str:
    """Rows, shapes and a digest of the content: of all of it up to 256 MB, of rows evenly spread beyond; streams by type only."""
    if data is None:
        return "none"
    digest = hashlib.sha256()
    if isinstance(data, Data):
        digest.update(
            repr([np.asarray(part).tobytes() for part in tf.nest.flatten([] if data.labels is None else data.labels)]).encode()
        )
        for part in tf.nest.flatten(data.rows(np.unique(np.linspace(0, len(data) - 1, 4).astype(int))).x):
            digest.update(np.ascontiguousarray(part).tobytes())
        return f"{len(data)} rows of {data!r}, {digest.hexdigest()[:12]}"
    if is_arrays(data):
        parts = [np.asarray(leaf) for part in data if part is not None for leaf in tf.nest.flatten(part)]
        whole = sum(part.nbytes for part in parts) <= 1 << 28
        for part in parts:
            rows = part if whole else part[np.unique(np.linspace(0, len(part) - 1, 1024).astype(int))]
            digest.update(repr(rows.tolist()).encode() if rows.dtype.kind == "O" else np.ascontiguousarray(rows).data)
        shapes = ", ".join(f"{part.dtype} {part.shape[1:]}" for part in parts)
        return f"{row_count(data)} rows of {shapes}, {digest.hexdigest()[:12]}"
    spec = getattr(data, "element_spec", None)
    return type(data).__name__ if spec is None else f"a data set of {spec}"


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """In what two runs, or what they ran on, differ, with the part of long texts in which they do.

    Args:
        before: What was written down.
        now: The same of this run.
    """
    found = []
    # Where rows are set apart for validation, which ones follows from these.
    shares = {marks.get("validation_share", "None") for marks in (before, now)}
    dealt_otherwise = shares != {"None"} and (len(shares) > 1 or before.get("seed") != now.get("seed"))
    for name in {**before, **now}:
        if dealt_otherwise and name in ("training data", "validation data"):
            continue
        one, other = before.get(name, "nothing"), now.get(name, "nothing")
        if one != other:
            one, other = _around_difference(one, other)
            found.append(f"another {name}: {one} there, {other} here")
    return found


def _shared(one: str, other: str) -> int:
    """How many characters two texts share at their beginning."""
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _around_difference(one: str, other: str) -> tuple[str, str]:
    """Both texts without what they share at either end, but for some words beside the difference."""
    if max(len(one), len(other)) <= 3 * _AROUND:
        return one, other
    begin = _shared(one, other)
    end = _shared(one[begin:][::-1], other[begin:][::-1])
    first = max(0, begin - _AROUND)

    def part(text: str) -> str:
        last = min(len(text), len(text) - end + _AROUND // 2)
        shown = text[first:last]
        shown = shown if len(shown) <= 4 * _AROUND else f"{shown[: 3 * _AROUND]} … {shown[-_AROUND:]}"
        return f"{'… ' if first else ''}{shown}{' …' if last < len(text) else ''}"

    return part(one), part(other)


def environment() -> dict[str, str]:
    """What besides model and data decides the bits of a computation, threads excepted."""
    flags = ""
    rewriting = [f"{name}={value}" for name, value in sorted(tf.config.optimizer.get_experimental_options().items())]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return {
        "TensorFlow": tf.__version__,
        "Keras": keras.__version__,
        "TF_ENABLE_ONEDNN_OPTS": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "unset"),
        "processor": f"{platform.machine()} {hashlib.sha256(flags.encode()).hexdigest()[:8]}",
        "devices": ", ".join(device.device_type for device in tf.config.list_physical_devices()),
        **keras_settings(),
        "setting of TensorFlow's graph optimizer": ", ".join(rewriting) or "none",
    }


def threads() -> str:
    """How many threads one operation may use; sums are cut into as many parts, so the last bits depend on it."""
    number = tf.config.threading.get_intra_op_parallelism_threads() or int(os.environ.get("TF_NUM_INTRAOP_THREADS") or 0)
    if not number:
        affinity = getattr(os, "sched_getaffinity", None)
        number = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return str(number)
