"""Pretrained backbones by name, each with the preprocessing its weights were trained with.

The networks of `keras.applications` differ in what they expect: pixels from -1 to 1, ImageNet's mean and deviation, BGR without
its mean, or raw pixels that the network rescales itself. A model built here always takes RGB pixels from 0 to 255, and what
comes first does the rest, so the preprocessing is saved and moves with the model.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transferkit._keras import keras
from transferkit.errors import ModelError, PlanError, did_you_mean

__all__ = ["BACKBONES", "backbone_model", "preprocess"]

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
_CAFFE_MEAN_BGR = (103.939, 116.779, 123.68)

#: Name in `keras.applications` → how its inputs are prepared: `tf`, `torch`, `caffe` (the words of
#: keras.applications.imagenet_utils.preprocess_input) or `inside`.
BACKBONES: dict[str, str] = {
    **dict.fromkeys(("MobileNet", "MobileNetV2", "Xception", "InceptionV3", "InceptionResNetV2"), "tf"),
    **dict.fromkeys(("NASNetMobile", "NASNetLarge", "ResNet50V2", "ResNet101V2", "ResNet152V2"), "tf"),
    **dict.fromkeys(("DenseNet121", "DenseNet169", "DenseNet201"), "torch"),
    **dict.fromkeys(("ResNet50", "ResNet101", "ResNet152", "VGG16", "VGG19"), "caffe"),
    **dict.fromkeys(("MobileNetV3Small", "MobileNetV3Large"), "inside"),
    **dict.fromkeys((f"EfficientNetB{i}" for i in range(8)), "inside"),
    **dict.fromkeys(("EfficientNetV2B0", "EfficientNetV2B1", "EfficientNetV2B2", "EfficientNetV2B3"), "inside"),
    **dict.fromkeys(("EfficientNetV2S", "EfficientNetV2M", "EfficientNetV2L"), "inside"),
    **dict.fromkeys((f"ConvNeXt{size}" for size in ("Tiny", "Small", "Base", "Large", "XLarge")), "inside"),
}


def preprocess(tensor: Any, kind: str) -> Any:
    """RGB pixels from 0 to 255 as the backbone expects them, by layers that save with the model.

    Args:
        tensor: A symbolic tensor of shape (batch, height, width, 3), or the like.
        kind: `tf`: from -1 to 1. `torch`: ImageNet's mean taken off, divided by its deviation. `caffe`: BGR, mean taken off.
            `inside`: as it is.
    """
    if kind == "tf":
        return keras.layers.Rescaling(1 / 127.5, offset=-1.0, name="preprocess")(tensor)
    if kind == "torch":
        scale = [1 / (255 * deviation) for deviation in _IMAGENET_DEVIATION]
        offset = [-mean / deviation for mean, deviation in zip(_IMAGENET_MEAN, _IMAGENET_DEVIATION, strict=True)]
        return keras.layers.Rescaling(scale, offset=offset, name="preprocess")(tensor)
    if kind == "caffe":
        reverse = keras.ops.flip(tensor, axis=-1)
        return keras.layers.Rescaling([1.0, 1.0, 1.0], offset=[-mean for mean in _CAFFE_MEAN_BGR], name="preprocess")(reverse)
    return tensor


def check_name(name: str) -> None:
    """Raises a PlanError when no backbone has that name."""
    if name not in BACKBONES:
        raise PlanError(
            f"Building on the backbone {name!r}.",
            found=f"no network of that name{did_you_mean(name, BACKBONES)}",
            fix="name one of keras.applications, or give a model of your own: .backbone(model)",
        )


def backbone_model(name: str, *, input_shape: tuple[int | None, ...], weights: str | None, options: dict[str, Any]) -> Any:
    """The network `name` without its top, as a Keras model.

    Args:
        name: One of `BACKBONES`.
        input_shape: Height, width and channels.
        weights: `imagenet`, None for random ones, or the path of a weights file.
        options: Further arguments of the function in `keras.applications` (`alpha=0.35`).

    Raises:
        PlanError: for arguments that are the builder's own.
        ModelError: when the network can't be made so, or its weights can't be had.
    """
    check_name(name)
    own = f".backbone(keras.applications.{name}(…))"
    problems, fixes = [], []
    if "include_top" in options:
        problems.append("include_top, where the builder makes the top")
        fixes.append(f".classifier(…) for a head of your own; for the network's, {own}")
    if not options.get("include_preprocessing", True):
        problems.append("include_preprocessing=False, where a model built here takes pixels from 0 to 255")
        fixes.append(f"leave it out; for inputs that were preprocessed before, {own}")
    if problems:
        raise PlanError(f"Building on the backbone {name!r}.", found=problems, fix="; ".join(fixes))
    try:
        return getattr(keras.applications, name)(include_top=False, weights=weights, input_shape=input_shape, **options)
    except Exception as error:  # Keras: ValueError for shapes and options; Exception for a download that fails
        home = os.environ.get("KERAS_HOME", str(Path.home() / ".keras"))
        offline = weights == "imagenet" and ("fetch" in str(error) or "URL" in str(error))
        raise ModelError(
            f"Building the backbone {name} for inputs of shape {input_shape} with weights {weights!r}.",
            found=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            cause=f"the weights aren't in {home}/models, and can't be downloaded from here" if offline else None,
            fix='put the weights file there, or name it: .backbone(…, weights="folder/mobilenet_…_no_top.h5")'
            if offline
            else "see the arguments of keras.applications." + name,
        ) from error
