"""`open_model`: a plain Keras model from any whole-model file of Keras, old ones put into the words of Keras 3.

Read, upgrade, vet, rebuild, restore: each step is a file of its own and the first three run without building anything.
`explain_model` stops after them. May import Keras.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transferkit._keras import keras
from transferkit._table import Table, Tabular
from transferkit.building.architectures import architecture_in
from transferkit.building.compiling import compile_as_saved
from transferkit.building.heads import heads_of
from transferkit.building.operations import OPERATIONS
from transferkit.building.rebuilding import rebuild
from transferkit.building.restoring import restore
from transferkit.building.upgrading import Upgraded, upgrade
from transferkit.building.upgrading_layers import Change
from transferkit.building.vetting import refuse, vet
from transferkit.class_names import name_classes
from transferkit.errors import ModelError, WeightsFileError
from transferkit.weights.readers import Archive, Limits, open_archive

__all__ = ["OpenReport", "explain_model", "open_model"]

_BACKENDS = ("tensorflow", "theano", "cntk", "jax", "torch", "numpy", "openvino")
#: What a model may hold besides the weights of its file: states of recurrent layers, statistics that are made anew.
_SPARE = 1_000_000


@dataclass(frozen=True)
class OpenReport(Tabular):
    """What `open_model` makes of a file.

    Args:
        path: The file.
        written_by: The framework and version that wrote it, as far as it says.
        generation: 1, 2 or 3, of that Keras; tf_keras and tf.keras are 2.
        backend: What the model was trained on, as the file says or its names show; empty where that can't be told.
        layers: How many layers it has, those of models inside it counted.
        changes: What was put into other words, layer by layer.
        problems: What stands in the way of opening it; empty when nothing does.
        needed: The keys that `custom_objects` must have.
    """

    path: str
    written_by: str
    generation: int
    backend: str
    layers: int
    changes: tuple[Change, ...]
    problems: tuple[str, ...]
    needed: tuple[str, ...]

    def table(self) -> Table:
        """The changes as a table, with the problems below it."""
        rows = [(change.layer or "the model", change.what) for change in self.changes]
        notes = [f"problem: {problem}" for problem in self.problems] or [
            "opens as it is" if not rows else "opens with these changes"
        ]
        if self.needed:
            notes.append(f"needs custom_objects for: {', '.join(map(repr, self.needed))}")
        return Table(("layer", "change"), rows, title=f"{self.path}: {self.layers} layers, {self.written_by}", notes=notes)

    def to_dict(self) -> dict[str, Any]:
        """Everything as lists, dicts, strings and numbers."""
        return {
            "path": self.path,
            "written_by": self.written_by,
            "generation": self.generation,
            "backend": self.backend,
            "layers": self.layers,
            "changes": [{"layer": change.layer, "what": change.what} for change in self.changes],
            "problems": list(self.problems),
            "needed": list(self.needed),
        }


def open_model(
    path: str | os.PathLike[str],
    custom_objects: Mapping[str, Any] | None = None,
    *,
    compile: bool = False,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    input_shape: Sequence[int | None] | None = None,
    backend: str | None = None,
    sha256: str | None = None,
    limits: Limits | None = None,
    trusted: bool = False,
    max_layers: int = 2000,
) -> Any:
    """A plain Keras model from a file of Keras 1, 2, tf.keras, tf_keras or Keras 3, architecture and weights.

    Nothing from the file is executed: layers, activations, initializers, regularizers and constraints come from an allow-list, or
    from `custom_objects`. Every weight gets its array, or nothing is returned. What was put into other words, and whether
    anything
    stands in the way, is told by `explain_model(path)`, which builds nothing; `open_model` returns the model alone, so that it
    can
    stand wherever `keras.models.load_model` stood.

    Args:
        path: A `.h5`, `.hdf5` or `.keras` file with a whole model, or a weights file together with `config`.
        custom_objects: Name → class or function that only its author has: layers by their class, activations, regularizers and
            constraints by their name. At a layer's own name, a function of the layer's inputs (or a layer) that takes the place
            of a
            `Lambda` or of a call of TensorFlow.
        compile: Whether to compile with the optimizer's settings, the loss and the metrics of the file. Off by default, other
            than
            in Keras: a model is opened to predict or to be tuned anew, and a file's custom loss would keep it from opening.
        config: The architecture where the file holds weights alone: a path to the JSON of `model.to_json()` or the YAML of Keras
            2, or its content as a dict. Layers that Keras counted from other numbers than in the weights are taken in order.
        input_shape: The shape of one example, for a Sequential whose file doesn't say it.
        backend: `"theano"` or `"tensorflow"`, what the model was trained on, where the file doesn't say it:
            Theano turned kernels round.
        sha256: The expected SHA-256 of the file, 64 hexadecimal digits.
        limits: What the file may ask for; by default `Limits()`.
        trusted: Skips the separate process in which unusual HDF5 structures are read.
        max_layers: How many layers the model may have.

    Returns:
        A `keras.Model`: a Sequential stays one, everything else is functional.

    Raises:
        WeightsNotFoundError: when there is no such file.
        WeightsFileError: when the file is damaged or holds weights alone.
        UnsafeFileError: when it holds code, or asks for more memory than its weights need.
        ModelError: when custom objects are missing (all are named at once), or a layer can't be rebuilt.
        WeightsError: when its weights and its architecture don't fit together.

    Example:
        >>> import tempfile, keras
        >>> import transferkit as tk
        >>> path = tempfile.mkdtemp() + "/model.keras"
        >>> keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="head")]).save(path)
        >>> tk.open_model(path).get_layer("head").units
        2
    """
    given = dict(custom_objects or {})
    with open_archive(path, limits=limits, trusted=trusted, sha256=sha256) as archive:
        archive = _with_config(archive, config, limits or Limits())
        upgraded = _upgraded(archive, input_shape, max_layers)
        refuse(vet(upgraded.architecture, given=_names(given), operations=OPERATIONS), path=archive.path, given=given)
        budget = sum(info.size for info in archive.arrays.values()) + _SPARE
        rebuilt = rebuild(
            upgraded.architecture, custom_objects=_registered() | given, budget=budget, generation=upgraded.generation
        )
        restore(rebuilt, archive, generation=upgraded.generation, backend=_backend(archive, backend))
        if compile:
            saved = archive.training_config or (archive.config or {}).get("compile_config")
            compile_as_saved(rebuilt.model, saved, path=archive.path, custom_objects=given)
        _name_classes(rebuilt.model, archive.class_names)
    return rebuilt.model


def _name_classes(model: Any, names: tuple[str, ...]) -> None:
    """Keeps what the file says of the classes with the one head that has as many units."""
    heads = []
    with contextlib.suppress(ModelError):  # a model whose outputs can't be followed
        heads = heads_of(model) if names else []
    if len(heads) == 1 and heads[0].layer is not None and heads[0].shape[-1:] in ((len(names),), (len(names) - 1,)):
        name_classes(heads[0].layer, names)


def explain_model(
    path: str | os.PathLike[str],
    custom_objects: Mapping[str, Any] | None = None,
    *,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    trusted: bool = False,
    max_layers: int = 2000,
) -> OpenReport:
    """What `open_model` would make of a file: who wrote it, what would be put into other words, what is missing; builds nothing.

    Args:
        path: As for `open_model`.
        custom_objects: As for `open_model`.
        config: As for `open_model`.
        limits: As for `open_model`.
        trusted: As for `open_model`.
        max_layers: As for `open_model`.

    Returns:
        An `OpenReport`; `str` gives a table, `to_dict()` plain data.

    Raises:
        WeightsNotFoundError: when there is no such file.
        WeightsFileError: when the file is damaged or holds weights alone.
        UnsafeFileError: when its configuration is nested too deeply or too long.
        ModelError: when its configuration is none of a model.

    Example:
        >>> import tempfile, keras
        >>> import transferkit as tk
        >>> path = tempfile.mkdtemp() + "/model.keras"
        >>> keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]).save(path)
        >>> tk.explain_model(path).problems
        ()
    """
    given = _names(dict(custom_objects or {}))
    with open_archive(path, limits=limits, trusted=trusted) as archive:
        archive = _with_config(archive, config, limits or Limits())
        upgraded = _upgraded(archive, None, max_layers)
        findings = vet(upgraded.architecture, given=given, operations=OPERATIONS)
        return OpenReport(
            path=archive.path,
            written_by=" ".join(part for part in (archive.framework or "Keras", archive.version) if part),
            generation=upgraded.generation,
            backend=_backend(archive, None),
            layers=_count(upgraded.architecture),
            changes=upgraded.changes,
            problems=tuple(findings.problems),
            needed=tuple(findings.needed),
        )


def _registered() -> dict[str, Any]:
    """The layers the user registered with Keras; functions have to be given, since a file may name any."""
    known = keras.saving.get_custom_objects()
    return {name: own for name, own in known.items() if isinstance(own, type) and issubclass(own, keras.layers.Layer)}


def _names(given: Mapping[str, Any]) -> list[str]:
    return [*given, *_registered()]


def _backend(archive: Archive, given: str | None) -> str:
    if given is not None and given not in _BACKENDS:
        raise ModelError(
            f"Opening {archive.path!r}.", found=f"backend={given!r}", fix=f"one of {', '.join(map(repr, _BACKENDS))}"
        )
    return given or archive.metadata.get("backend", "")


def _with_config(archive: Archive, config: str | os.PathLike[str] | Mapping[str, Any] | None, limits: Limits) -> Archive:
    if config is None:
        if archive.config is None:
            raise WeightsFileError(
                f"Opening {archive.path!r}.",
                found=f"weights alone ({len(archive.arrays)} arrays), without the model's architecture",
                cause="the file was written by save_weights, or isn't of Keras",
                fix="build the model with its code, then WeightLoader(path).load(model); or give config='model.json'",
            )
        return archive
    content = dict(config) if isinstance(config, Mapping) else architecture_in(config, limits)
    version = archive.version or str(content.get("keras_version") or "")
    backend = content.get("backend")
    metadata = {
        **archive.metadata,
        **({"backend": backend} if isinstance(backend, str) and "backend" not in archive.metadata else {}),
    }
    return replace(archive, config=content, version=version, metadata=metadata)


def _upgraded(archive: Archive, input_shape: Sequence[int | None] | None, max_layers: int) -> Upgraded:
    config = dict(archive.config or {})
    if input_shape is not None and config.get("class_name") == "Sequential":
        inner = config.get("config")
        listed = inner if isinstance(inner, list) else inner.get("layers") if isinstance(inner, Mapping) else None
        rest = dict(inner) if isinstance(inner, Mapping) else {}
        config["config"] = {**rest, "layers": listed, "build_input_shape": [None, *input_shape]}
    return upgrade(config, keras_version=archive.version, max_layers=max_layers)


def _count(plain: Mapping[str, Any]) -> int:
    inner = plain["config"].get("layers")
    model = isinstance(inner, list) and plain["class_name"] in ("Sequential", "Functional")
    return sum(_count(one) for one in inner) if model else 1
