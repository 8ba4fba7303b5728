"""A model's architecture from a file of its own, beside a file of weights: the JSON of `model.to_json()`, or Keras 2's YAML.

YAML is read by its safe loader, which makes plain values only; tuples, which Keras wrote, become lists.
Imports the readers' guards; PyYAML only where a file is YAML.
"""

from __future__ import annotations

import os
from typing import Any

from transferkit.errors import MissingExtraError, UnsafeFileError, WeightsFileError
from transferkit.weights.readers import Limits
from transferkit.weights.readers.checks import json_object
from transferkit.weights.readers.source import Source

__all__ = ["architecture_in"]

_MOST_VALUES = 2_000_000


def architecture_in(path: str | os.PathLike[str], limits: Limits) -> dict[str, Any]:
    """The configuration of a model that a JSON or YAML file holds, unchecked.

    Args:
        path: The file.
        limits: What it may ask for.

    Raises:
        WeightsNotFoundError: when there is no such file.
        WeightsFileError: when it is neither.
        UnsafeFileError: when it is longer than the limits, or would unfold to more.
        MissingExtraError: when it is YAML and PyYAML isn't installed.
    """
    source = Source(path)
    try:
        text = source.bytes(0, min(source.size, limits.max_metadata_bytes + 1))
    finally:
        source.close()
    if text.lstrip()[:1] in (b"{", b"[", b'"') or not text.strip():
        return json_object(os.fspath(path), "the model's configuration", text, limits) or {}
    return _from_yaml(os.fspath(path), text, limits)


def _from_yaml(path: str, text: bytes, limits: Limits) -> dict[str, Any]:
    asked = f"Reading the configuration in {path!r}."
    if len(text) > limits.max_metadata_bytes:
        raise UnsafeFileError(
            asked, found="YAML longer than the limit", fix="raise Limits.max_metadata_bytes if you trust the file"
        )
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError.of("A configuration in YAML", package="pyyaml", extra="yaml") from error

    class Plain(yaml.SafeLoader):
        """The safe loader, with the tags of Python's own sequences and texts that Keras wrote."""

    for tag in ("python/tuple", "python/list"):
        Plain.add_constructor(f"tag:yaml.org,2002:{tag}", lambda loader, node: loader.construct_sequence(node, deep=True))
    for tag in ("python/unicode", "python/str"):
        Plain.add_constructor(f"tag:yaml.org,2002:{tag}", lambda loader, node: loader.construct_scalar(node))
    try:
        value = yaml.load(text, Plain)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise WeightsFileError(
            asked, found=f"neither JSON nor YAML of plain values: {lines[0][:200]}", fix="give the file of model.to_json()"
        ) from error
    if not isinstance(value, dict):
        raise WeightsFileError(asked, found=f"a {type(value).__name__}, no configuration", fix="give the file of model.to_json()")
    if _unfolded(value, {}) > _MOST_VALUES:
        raise UnsafeFileError(asked, found="YAML that refers to its own parts until it is too large")
    return value


def _unfolded(value: Any, known: dict[int, int]) -> int:
    """How many values there are when what is referred to is counted at each place; a value within itself counts as too many."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = _MOST_VALUES + 1
        known[id(value)] = 1 + sum(_unfolded(item, known) for item in (value.values() if isinstance(value, dict) else value))
    return known[id(value)]
