"""LoRA: layers that train through two thin factors beside their kernel, which are added into it when the phase ends.

Hu et al., ICLR 2022: W = W₀ + α/r · A B, with B zero at the start, so that training begins at the loaded weights; W₀ is frozen.
The factors are Keras's own (`enable_lora`), on whatever layer has them. At the end the layer is as it was, with the sum in its
kernel: no factors, no flags, the same weights in number and shape. May import Keras and the floors below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from transferkit._keras import keras
from transferkit.building.parts import parts_of

__all__ = ["LowRank", "Lowered", "lower", "lowerable"]


@dataclass(frozen=True)
class LowRank:
    """How layers train through factors.

    Args:
        rank: Of the factors.
        alpha: Their product counts α / rank times.
        times: Factor on the learning rate of the factors.
    """

    rank: int
    alpha: float
    times: float = 1.0


def lowerable(layer: Any) -> list[Any]:
    """The parts of a layer (itself among them) that can train through factors: those with `enable_lora`, built, unconstrained."""
    return [
        part
        for part in parts_of(layer)
        if hasattr(part, "enable_lora")
        and part.built
        and not getattr(part, "lora_enabled", False)
        and getattr(part, "kernel_constraint", None) is None
        and getattr(part, "embeddings_constraint", None) is None
        and getattr(part, "quantization_mode", None) is None
    ]


@dataclass(frozen=True)
class Lowered:
    """A layer that trains through factors for the time being.

    Args:
        layer: The layer.
        base: Its kernel, frozen.
        factors: The names of its two factors.
    """

    layer: Any = field(repr=False)
    base: Any = field(repr=False)
    factors: tuple[str, str]

    @property
    def variables(self) -> list[Any]:
        """The two factors."""
        return [getattr(self.layer, name) for name in self.factors]

    def merge(self) -> None:
        """Adds the factors' product into the kernel and takes the factors off the layer."""
        merged = keras.ops.convert_to_numpy(_kernel(self.layer))
        for name in self.factors:
            delattr(self.layer, name)
        self.layer.lora_enabled = False
        self.layer.lora_rank = None
        if hasattr(self.layer, "lora_alpha"):
            self.layer.lora_alpha = None
        self.base.assign(merged)
        self.base.trainable = True


def _kernel(layer: Any) -> Any:
    return layer.embeddings if isinstance(layer, keras.layers.Embedding) else layer.kernel


def lower(layers: Sequence[Any], how: LowRank) -> Iterator[Lowered]:
    """Puts factors beside the kernels of the layers, which must be `lowerable`; each is given when it is done."""
    for layer in layers:
        base = _kernel(layer)
        before = {id(weight) for weight in layer.weights}
        _enable(layer, how)
        added = {id(weight) for weight in layer.weights if id(weight) not in before}
        names = [name for name, value in vars(layer).items() if id(value) in added]
        yield Lowered(layer, base, (names[0], names[1]))


def _enable(layer: Any, how: LowRank) -> None:
    try:
        layer.enable_lora(how.rank, lora_alpha=how.alpha)
    except TypeError:  # Keras before 3.11 has no α: its product counts once, as with α = rank
        layer.enable_lora(how.rank)
