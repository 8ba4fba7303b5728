"""What names of layers say: which Keras made up, which somebody chose, and which patterns cover them. Standard library only."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable, Sequence

__all__ = [
    "canonical",
    "covers",
    "creation_number",
    "direction_of",
    "is_automatic",
    "kind_of",
    "listed",
    "patterns_for",
    "snake_case",
    "split_name",
]

# Classes under which versions of Keras knew the same layer, lower case and without underscores.
_SAME_KIND = {
    "convolution1d": "conv1d",
    "convolution2d": "conv2d",
    "convolution3d": "conv3d",
    "atrousconvolution2d": "conv2d",
    "convolution2dtranspose": "conv2dtranspose",
    "deconvolution2d": "conv2dtranspose",
    "separableconvolution2d": "separableconv2d",
    "cudnnlstm": "lstm",
    "cudnngru": "gru",
    "lstmcell": "lstm",
    "grucell": "gru",
    "simplernncell": "simplernn",
    "convlstmcell": "convlstm2d",
    "syncbatchnormalization": "batchnormalization",
    "batchnormalizationv1": "batchnormalization",
    "batchnormalizationv2": "batchnormalization",
}

# Keras's layers that hold weights, and the containers it names by itself.
# fmt: off
_AUTOMATIC = frozenset({
    "additiveattention", "attention", "batchnormalization", "bidirectional", "conv", "conv1d", "conv1dtranspose", "conv2d",
    "conv2dtranspose", "conv3d", "conv3dtranspose", "convlstm1d", "convlstm2d", "convlstm3d", "convolution1d",
    "convolution2d", "convolution3d", "cudnngru", "cudnnlstm", "deconvolution2d", "dense", "depthwiseconv1d",
    "depthwiseconv2d", "discretization", "einsumdense", "embedding", "functional", "groupnormalization",
    "groupqueryattention", "gru", "grucell", "layernormalization", "locallyconnected1d", "locallyconnected2d", "lstm",
    "lstmcell", "maxoutdense", "model", "multiheadattention", "normalization", "prelu", "rmsnormalization", "rnn",
    "separableconv1d", "separableconv2d", "separableconvolution2d", "sequential", "simplernn", "simplernncell",
    "spectralnormalization", "stackedrnncells", "timedistributed", "timedistributeddense", "unitnormalization",
})
# fmt: on

# A model asks for the same names again and again: each of its layers is compared by several of these words.
_remembered = functools.lru_cache(1 << 14)


@_remembered
def snake_case(class_name: str) -> str:
    """The name Keras makes up from a class: `Conv2D` → `conv2d`, `BatchNormalization` → `batch_normalization`."""
    name = re.sub(r"\W+", "", class_name)
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


@_remembered
def kind_of(name: str) -> str:
    """A class or a made-up name as one word for comparing: `Conv2D`, `conv2d_3` and `Convolution2D` are all `conv2d`."""
    word = re.sub(r"_\d+$", "", name.rpartition(">")[2]).replace("_", "").lower()
    return _SAME_KIND.get(word, word)


@_remembered
def is_automatic(name: str, class_name: str = "") -> bool:
    """Whether Keras made the name up: from the class, or from one of its own where the class isn't known.

    Example:
        >>> is_automatic("dense_5"), is_automatic("conv1_bn"), is_automatic("my_block_2", "MyBlock")
        (True, False, True)
    """
    base = re.sub(r"_\d+$", "", name)
    base = base.removeprefix(f"{direction_of(name)}_")  # what Bidirectional puts before the names of its layers
    if class_name and base == snake_case(class_name.rpartition(">")[2]):
        return True
    return base.replace("_", "") in _AUTOMATIC


@_remembered
def direction_of(path: str) -> str:
    """`forward` or `backward` where a layer is one of the two that a Bidirectional holds, else empty."""
    found = re.match(r"(forward|backward)_", path.rpartition("/")[2])
    return found[1] if found else ""


@_remembered
def creation_number(path: str) -> tuple[int, ...]:
    """The numbers Keras put behind made-up names in a path, which count layers of a class in the order they were made."""
    numbers = []
    for part in path.split("/"):
        if is_automatic(part):
            found = re.search(r"_(\d+)$", part)
            numbers.append(int(found[1]) if found else 0)
    return tuple(numbers)


@_remembered
def canonical(path: str) -> str:
    """A layer's path without what versions of Keras word differently: recurrent cells, and the count in `forward_lstm_3`."""
    kept = []
    for i, part in enumerate(path.split("/")):
        if i and re.fullmatch(r"(lstm|gru|simple_rnn|conv_lstm\d?d?)_cell(_\d+)?", part):
            continue
        inner = re.fullmatch(r"((?:forward|backward)_(\w+?))_\d+", part)
        kept.append(inner[1] if inner and is_automatic(inner[2]) else part)
    return "/".join(kept)


def split_name(name: str) -> tuple[str, str]:
    """A full name as the layer's path and the variable's name."""
    path, _, variable = name.rpartition("/")
    return path, variable


def covers(pattern: str, name: str) -> bool:
    """Whether a pattern (`*`, `?`, `[abc]`; `*` also passes `/`) names this variable, its layer, or a model around it.

    Example:
        >>> covers("head", "head/kernel"), covers("head/*", "head/kernel"), covers("he", "head/kernel")
        (True, True, False)
    """
    if fnmatch.fnmatchcase(name, pattern):
        return True
    parts = name.split("/")
    return any(fnmatch.fnmatchcase("/".join(parts[:end]), pattern) for end in range(1, len(parts)))


def patterns_for(wanted: Iterable[str], others: Sequence[str]) -> list[str]:
    """Patterns that cover the wanted names and none of the others: whole models or layers where possible."""
    prefixes = {"/".join(name.split("/")[:end]) for name in others for end in range(1, name.count("/") + 1)}
    found: dict[str, None] = {}
    for name in wanted:
        parts = name.split("/")
        inner = ("/".join(parts[:end]) for end in range(1, len(parts)))
        found[next((f"{prefix}/*" for prefix in inner if prefix not in prefixes), name)] = None
    return list(found)


def listed(patterns: Sequence[str], most: int = 8) -> str:
    """Patterns as a call has them, with dots in place of those past `most`."""
    shown = ", ".join(f'"{pattern}"' for pattern in patterns[:most])
    return shown if len(patterns) <= most else f"{shown}, …"
