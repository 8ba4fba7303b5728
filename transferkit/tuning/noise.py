"""What a layer does in training only: dropout, noise and dropped paths; found, turned off and set to another strength.

`trainable=False` doesn't stop any of it, though "frozen" is taken to mean that it does. Stochastic depth (Huang et al., ECCV
2016) drops whole residual branches; models have it as a layer of their own with its rate in a public attribute, or, as
EfficientNet, as a Dropout that drops all of an image's numbers at once. May import Keras and the floors below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transferkit._keras import keras
from transferkit.building.graph import NOISE
from transferkit.building.heads import leaf_layers
from transferkit.building.parts import parts_of
from transferkit.errors import ModelError

__all__ = ["Setting", "drops_paths", "noise_attribute", "restore", "set_stochastic_depth", "turn_off"]

#: A layer, the name of the attribute that holds its strength, and the value it had.
Setting = tuple[Any, str, float]

#: The names that layers of dropped paths give to the probability of a drop, and of none.
_PATH_RATES = ("drop_path_rate", "drop_connect_rate", "stochastic_depth_rate")
_SURVIVAL = "survival_probability"


def noise_attribute(layer: Any) -> str | None:
    """The attribute that holds the strength of a layer's noise or dropped paths; None for a layer without any."""
    found = next((name for kind, name in NOISE.items() if isinstance(layer, kind)), None)
    if found is not None:
        return found
    names = (name for name in (*_PATH_RATES, _SURVIVAL) if isinstance(getattr(layer, name, None), (int, float)))
    return next(names, None)


def drops_paths(layer: Any) -> bool:
    """Whether a layer drops whole branches: by a rate of that name, or as a Dropout that treats a row as one."""
    name = noise_attribute(layer)
    if name in (*_PATH_RATES, _SURVIVAL):
        return True
    shape = getattr(layer, "noise_shape", None)
    return isinstance(layer, keras.layers.Dropout) and shape is not None and all(length == 1 for length in tuple(shape)[1:])


def turn_off(layers: Sequence[Any]) -> list[Setting]:
    """Turns off the noise of the layers; gives what `restore` needs."""
    changed: list[Setting] = []
    for layer in layers:
        name = noise_attribute(layer)
        if name is not None:
            changed.append((layer, name, getattr(layer, name)))
            setattr(layer, name, 1.0 if name == _SURVIVAL else 0.0)
    return changed


def restore(changed: Sequence[Setting]) -> None:
    """Gives each layer its strength back; the first value of one that stands there twice is the real one."""
    for layer, name, value in reversed(changed):
        setattr(layer, name, value)


def set_stochastic_depth(model: Any, rate: float) -> list[Setting]:
    """Sets how often branches are dropped, rising from the first by equal steps to `rate` at the last (Huang et al., eq. 4).

    Args:
        model: A built model.
        rate: The probability at the last branch.

    Returns:
        What `restore` needs.

    Raises:
        ModelError: when no layer of the model drops branches.
    """
    found = [part for _, layer in leaf_layers(model) for part in parts_of(layer) if drops_paths(part)]
    if not found:
        raise ModelError(
            f"Setting the stochastic depth of the model {model.name!r}.",
            found="no layer in it that drops branches",
            cause="MobileNet, ResNet and VGG have none; EfficientNet, ConvNeXt and many transformers do",
            fix="leave .stochastic_depth out of the plan; .mixup, .ema and .weight_decay regularise any model",
        )
    changed: list[Setting] = []
    for number, layer in enumerate(found, start=1):
        name = str(noise_attribute(layer))
        changed.append((layer, name, getattr(layer, name)))
        own = rate * number / len(found)
        setattr(layer, name, 1.0 - own if name == _SURVIVAL else own)
    return changed
