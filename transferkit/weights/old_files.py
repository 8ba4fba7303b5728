"""A file of Keras 1 or 2 as the layers of Keras 3 keep their arrays: `old_layouts`, applied to weights without a model.

Where a file holds the model's configuration, that says what each layer is. Where it holds weights alone, the names Keras made up
say it, the shapes (a kernel's filters are as many as its biases), or the layer of the same name in the model. What none of these
tells, such as whether Theano trained it, is asked for before anything is matched: a wrong guess would load without a word.
Imports the archive's face and NumPy only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from transferkit.errors import shorten
from transferkit.weights.composing import Arranged, Array, Composed, arranged
from transferkit.weights.mapping import FileArray, ModelVariable
from transferkit.weights.names import canonical, kind_of
from transferkit.weights.old_layouts import convert_layer
from transferkit.weights.readers.archive import Archive

__all__ = ["arranged_old_file", "generation_of"]

_CLASSES = {
    kind_of(name): name
    for name in (
        *("Conv1D", "Conv2D", "Conv3D", "Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"),
        *("DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D"),
        *("ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D", "LSTM", "GRU"),
    )
}
_OLD_NAME = re.compile(r"[WUb](_[icfozrh])?")
_PARTS = ("kernel", "recurrent_kernel", "bias")


def generation_of(archive: Archive, sources: Sequence[FileArray]) -> int:
    """1, 2 or 3, of the Keras that wrote a file; by the names of its arrays where it doesn't say."""
    if archive.format not in ("legacy_h5", "tfjs"):
        return 2 if archive.framework == "tf_keras" else 3
    major = archive.version.split(".")[0]
    if major.isdigit():
        return min(max(int(major), 1), 3)
    return 1 if any(_OLD_NAME.fullmatch(source.variable) or source.variable.isdigit() for source in sources) else 2


def _backend_of(archive: Archive, generation: int) -> str:
    """What a file was trained on, as it says; empty where that can't be told."""
    return archive.metadata.get("backend", "") or ("" if generation == 1 else "tensorflow")


@dataclass(frozen=True)
class _Layer:
    """The arrays of one layer, with what is known of it."""

    class_name: str
    said: Mapping[str, Any]
    sources: tuple[FileArray, ...]

    @property
    def kernel(self) -> FileArray:
        return self.sources[0]

    @property
    def spatial(self) -> bool:
        """Whether it has a kernel with axes of space, of which Theano had another idea."""
        return self.class_name.startswith(("Conv", "Depthwise", "Separable")) and len(self.kernel.shape) > 2

    @property
    def channels_first(self) -> bool | None:
        """Whether the kernel has Theano's order of axes; None where that can't be told."""
        given = self.said.get("dim_ordering", self.said.get("data_format"))
        if given in ("th", "channels_first"):
            return True
        if given in ("tf", "channels_last"):
            return False
        shape = self.kernel.shape
        filters = next((s.shape[0] for s in self.sources[1:] if len(s.shape) == 1), None)
        if filters is None or "Transpose" in self.class_name or (shape[0] == filters) == (shape[-1] == filters):
            return None
        return shape[0] == filters


def arranged_old_file(
    archive: Archive, sources: Sequence[FileArray], targets: Sequence[ModelVariable], *, backend: str | None = None
) -> Arranged:
    """The arrays of a Keras file in the layout of Keras 3.

    Args:
        archive: The file.
        sources: Its arrays as matching sees them.
        targets: The variables of the model, whose layers tell of a layer of the same name what it is.
        backend: `theano` or `tensorflow`, where the caller says it.
    """
    generation = generation_of(archive, sources)
    trained_on = backend or _backend_of(archive, generation)
    kinds = {canonical(target.path): target.kind for target in targets}
    layers = _layers(archive, sources, kinds) if generation < 3 or trained_on == "theano" else []
    spatial = [layer for layer in layers if layer.spatial and layer.class_name != "Conv1D"]
    first = {layer.channels_first for layer in spatial} - {None}
    common = first.pop() if len(first) == 1 else None
    problems, rules = [], []
    made: list[Composed] = []
    unclear: list[str] = []
    for layer in layers:
        order = layer.channels_first
        order = common if order is None else order
        if generation == 1 and order is None and layer in spatial:
            unclear.append(layer.kernel.path)
        try:
            made += _made(layer, bool(order), generation, trained_on)
        except (ValueError, IndexError) as error:
            problems.append(
                f"the arrays of {layer.kernel.path!r} are in no layout that is known here: {str(error).splitlines()[0]}"
            )
    if unclear:
        problems.append(
            f"the kernels of {shorten(unclear)} may be in Theano's order of axes or in TensorFlow's: neither the file nor the "
            "shapes tell which"
        )
        rules.append('.layout("keras") if the arrays are in Keras\'s layout; or open the file as a model, with its config')
    wide = [layer.kernel.path for layer in layers if layer.spatial and any(n > 1 for n in _lengths(layer, bool(common)))]
    if generation == 1 and not trained_on and wide:
        problems.append(
            f"the file doesn't say whether it was trained on Theano, which turns kernels round ({shorten(wide)}): add "
            '.layout("theano") if it was, .layout("tensorflow") if not'
        )
        rules += ['.layout("theano")', '.layout("tensorflow")']
    found = arranged(archive, sources, made)
    first_rows = _flattened_channels_first(archive) if archive.config else bool(common)
    return replace(found, problems=tuple(problems), rules=tuple(rules), flattened_first=first_rows)


def _flattened_channels_first(archive: Archive) -> bool:
    """Whether the saved model kept channels first and flattened them so."""
    said = [(kind_of(kind), own) for kind, own in archive.configured.values()]
    formats = {own.get("dim_ordering", own.get("data_format")) for kind, own in said if kind != "flatten"}
    first, last = formats & {"th", "channels_first"}, formats & {"tf", "channels_last"}
    # Since 2.2 a Flatten that is told so brings the channels to the end before it flattens.
    told = any(kind == "flatten" and own.get("data_format") == "channels_first" for kind, own in said)
    return bool(first) and not last and not told


def _lengths(layer: _Layer, first: bool) -> tuple[int, ...]:
    return layer.kernel.shape[2:] if first and layer.class_name != "Conv1D" else layer.kernel.shape[:-2]


def _layers(archive: Archive, sources: Sequence[FileArray], kinds: Mapping[str, str]) -> list[_Layer]:
    """The file's layers that had another layout once, with what is known of each."""
    configured = archive.configured
    units: dict[str, list[FileArray]] = defaultdict(list)
    for source in sources:
        units[source.path].append(source)
    layers = []
    for path, together in units.items():
        kind, said = _known(path, configured)
        leaf = path.rpartition("/")[2]
        gates = [source for source in together if re.fullmatch(r"[WUb]_[icfozrh]", source.variable)]
        for candidate in (kind, re.sub(r"^(forward|backward)_", "", leaf), kinds.get(canonical(path), "")):
            if class_name := _CLASSES.get(kind_of(candidate)):
                break
        else:
            class_name = {12: "LSTM", 9: "GRU"}.get(len(gates), "") or _by_shapes(together)
        if class_name:
            layers.append(_Layer(class_name, said, tuple(together)))
    return layers


def _known(path: str, configured: Mapping[str, tuple[str, Mapping[str, Any]]]) -> tuple[str, Mapping[str, Any]]:
    """Class and configuration of the layer at a path, or of the one that the wrapper at the path holds."""
    parts = path.split("/")
    for end in range(len(parts), 0, -1):
        if (found := configured.get("/".join(parts[:end]))) is not None:
            kind, said = found
            while isinstance(inner := said.get("layer", said.get("cell")), Mapping) and isinstance(inner.get("config"), Mapping):
                kind, said = str(inner.get("class_name", "")), inner["config"]
            return kind, said
    return "", {}


def _by_shapes(together: Sequence[FileArray]) -> str:
    """What a layer of no known class must be, by its arrays: a convolution, or a recurrent layer of CuDNN."""
    shapes = [source.shape for source in together]
    if len(shapes) == 3 and [len(shape) for shape in shapes] == [2, 2, 1] and shapes[1][0]:
        units, wide = shapes[1]
        if wide == 4 * units and shapes[2] == (8 * units,):
            return "LSTM"
        if wide == 3 * units and shapes[2] == (6 * units,):
            return "GRU"
    if len(shapes) <= 2 and len(shapes[0]) in (3, 4, 5) and together[0].variable in ("W", "kernel", "0"):
        return f"Conv{len(shapes[0]) - 2}D"
    return ""


def _made(layer: _Layer, channels_first: bool, generation: int, backend: str) -> list[Composed]:
    """The layer's arrays in the layout of Keras 3, those alone that are another one there."""
    config = {"data_format": "channels_first" if channels_first else "channels_last"}

    def part(i: int) -> Callable[[Sequence[Array]], Array]:
        return lambda arrays: convert_layer(layer.class_name, config, arrays, generation=generation, backend=backend).arrays[i]

    # Shapes follow from arrays that hold one number each, however large they say they are.
    stand_ins = [np.broadcast_to(np.zeros((), np.uint8), source.shape) for source in layer.sources]
    converted = convert_layer(layer.class_name, config, stand_ins, generation=generation, backend=backend)
    if not converted.changes:
        return []
    pieces = tuple(source.name for source in layer.sources)
    text = "; ".join(converted.changes)
    if len(converted.arrays) == len(pieces) and layer.class_name not in ("LSTM", "GRU"):
        return [
            Composed(source, (source.name,), _first, "")
            if array is stand_in
            else Composed(replace(source, shape=array.shape), pieces, part(i), text)
            for i, (source, array, stand_in) in enumerate(zip(layer.sources, converted.arrays, stand_ins, strict=True))
        ]
    path = layer.kernel.path
    return [
        Composed(
            FileArray(f"{path}/{word}", array.shape, path, word, layer.class_name),
            pieces,
            part(i),
            text,
        )
        for i, (word, array) in enumerate(zip(_PARTS, converted.arrays, strict=False))
    ]


def _first(arrays: Sequence[Array]) -> Array:
    return arrays[0]
