"""What a load can't carry over, though every shape fits: settings of layers, told apart by the configuration a file holds.

May import Keras.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transferkit._keras import keras
from transferkit.weights.readers.archive import Archive

__all__ = ["differences", "torch_notes"]

# Settings that change a layer's output and no shape of its weights, with the value a configuration that leaves them out means.
_SETTINGS = (
    *("activation", "recurrent_activation", "epsilon", "go_backwards", "strides", "padding", "dilation_rate", "data_format"),
    *("groups", "axis", "depth_multiplier", "reset_after", "return_sequences", "stateful", "use_causal_mask", "mask_zero"),
    *("center", "scale", "rms_scaling"),
)
# Keras 1's words for them.
_OLD_WORDS = {
    "recurrent_activation": "inner_activation",
    "padding": "border_mode",
    "strides": "subsample",
    "data_format": "dim_ordering",
    "dilation_rate": "atrous_rate",
}
_OLD_VALUES = {"th": "channels_first", "tf": "channels_last"}
_TORCH_EPSILON = 1e-5


def differences(archive: Archive, owners: Sequence[tuple[str, Any]], taken: Mapping[str, str]) -> list[str]:
    """One sentence for each layer whose settings in the file's configuration aren't the model's.

    Args:
        archive: The file.
        owners: Path and Keras layer of the model's layers.
        taken: From a layer's path in the model to the path in the file from which it, or a layer inside it, takes values.
    """
    said = {path: _in_new_words(own) for path, (_, own) in archive.configured.items()}
    old = archive.version.startswith(("0.", "1.", "2.")) or archive.framework == "tf_keras"
    found: dict[str, None] = {}
    for path, layer in owners:
        parts = taken.get(path, "").split("/")
        around = ("/".join(parts[:end]) for end in range(len(parts), 0, -1))
        saved = next((said[part] for part in around if part in said), None)
        if saved is None or not isinstance(layer, keras.Layer) or _alike_at_a_glance(layer, saved):
            continue
        try:
            present = layer.get_config()
        except NotImplementedError:  # a custom layer that can't be written down
            continue
        other = [
            f"{key}={_plain(saved[key])!r} in the file, {_plain(present[key])!r} in the model"
            for key in _SETTINGS
            if key in saved and key in present and _plain(saved[key]) != _plain(present[key])
        ]
        if old:
            other += [
                f"{key}='hard_sigmoid' was clip(0.2 x + 0.5, 0, 1) in the file's Keras, has the slope 1/6 in this one"
                for key in ("activation", "recurrent_activation")
                if _plain(saved.get(key)) == _plain(present.get(key)) == "hard_sigmoid"
            ]
        if other:
            found[f"{path!r} gives other outputs than the saved layer: {'; '.join(other)}"] = None
    return list(found)


def _in_new_words(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    new = {key: saved[old] for key, old in _OLD_WORDS.items() if old in saved}
    return {**{key: _OLD_VALUES.get(str(value), value) for key, value in new.items()}, **saved}


def _alike_at_a_glance(layer: Any, saved: Mapping[str, Any]) -> bool:
    """Whether every setting is an attribute with the saved value, so that the layer needn't write its configuration down."""
    for key in _SETTINGS:
        if key in saved:
            present = getattr(layer, key, None)
            present = getattr(present, "__name__", present)
            if _plain(present) != _plain(saved[key]) or present == "hard_sigmoid":
                return False
    return True


def _plain(value: Any) -> Any:
    """A setting so that versions of Keras word it alike."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (dict, Mapping)):
        inner = value.get("config")
        return _plain(inner.get("name", value.get("class_name")) if isinstance(inner, Mapping) else inner)
    if isinstance(value, (list, tuple)):
        items = tuple(_plain(item) for item in value)
        return items[0] if len(items) == 1 or (items and len(set(map(str, items))) == 1) else items
    return value


def torch_notes(owners: Sequence[Any]) -> list[str]:
    """What PyTorch's layers do otherwise by default, where the model's differ from it."""
    norms = {id(o): o for o in owners if isinstance(o, keras.layers.BatchNormalization)}
    other = [o.name for o in norms.values() if abs(float(o.epsilon) - _TORCH_EPSILON) > 1e-9]
    if not other:
        return []
    return [
        f"{len(other)} BatchNormalization layers have epsilon={norms[next(iter(norms))].epsilon}; PyTorch's default is "
        f"{_TORCH_EPSILON}, and outputs differ unless the model was trained with the former"
    ]
