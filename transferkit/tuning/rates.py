"""A factor on the learning rate for each layer: by block from the head down, and by the groups a plan names.

`layer_decay` has timm's meaning (Wightman's pytorch-image-models, after BEiT, Bao et al., ICLR 2022): the head trains at the
full rate, the block below at `decay` times that, the next at `decay²`, and so on. Blocks, not layers: MobileNetV2 has 52
convolutions in 19 blocks, and 0.7⁵² would freeze it. Which layers make a block is read from their names, as Keras's applications
write them (`block_3_expand`, `conv4_block2_1_conv`, `conv_dw_5`); a layer whose name tells of none is a block of its own, and
normalisation belongs to the layer before it. May import Keras and the floors below.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transferkit._keras import keras
from transferkit.building.heads import head_layers, leaf_layers
from transferkit.tuning.layers import Layers

__all__ = ["blocks_of", "multipliers_of"]

_BLOCK = re.compile(r"(.*?(?:block|stage|layer)_?\d+[a-z]?)(?:_|$)")
_NUMBERED = re.compile(r"([a-z]+)(?:_[a-z]+)+_(\d+)$")
_SUFFIX = re.compile(r"_(?:bn|relu|pad|norm|gn|activation|expand|depthwise|project)$")
_NORMALISATIONS = tuple(
    getattr(keras.layers, name)
    for name in ("BatchNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization", "UnitNormalization")
    if hasattr(keras.layers, name)
)


def _block_name(name: str) -> str:
    found = _BLOCK.match(name)
    if found:
        return found[1]
    bare = _SUFFIX.sub("", name)
    numbered = _NUMBERED.match(bare)  # conv_dw_5 and conv_pw_5 are one block
    return f"{numbered[1]}_{numbered[2]}" if numbered else bare


def blocks_of(model: Any) -> list[list[str]]:
    """The paths of the layers with weights, in blocks, from the inputs to the head; the head is the last block."""
    heads = {id(layer) for layer in head_layers(model)}
    blocks: list[list[str]] = []
    head: list[str] = []
    last = ""
    for path, layer in leaf_layers(model):
        if not layer.weights:
            continue
        if id(layer) in heads:
            head.append(path)
            continue
        name = _block_name(layer.name)
        if blocks and (name == last or isinstance(layer, _NORMALISATIONS)):
            blocks[-1].append(path)
        else:
            blocks.append([path])
            last = name
    return [*blocks, head] if head else blocks


def multipliers_of(model: Any, *, layer_decay: float | None, rates: Sequence[tuple[Layers, float]]) -> dict[str, float]:
    """The factor for each layer with weights, by path.

    Args:
        model: A built model.
        layer_decay: The factor from block to block, or None for one rate.
        rates: Groups of layers with a factor each, multiplied in.
    """
    blocks = blocks_of(model)
    found = {}
    for above, block in enumerate(reversed(blocks)):
        for path in block:
            found[path] = 1.0 if layer_decay is None else float(layer_decay**above)
    for layers, factor in rates:
        for path in layers.resolve(model):
            if path in found:
                found[path] *= factor
    return found
