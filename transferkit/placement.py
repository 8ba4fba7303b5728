"""`Placement`: on which devices a model is built and trained, as a value; `tf.distribute` beneath.

A placement names devices and holds none. `scope()` looks for them, and only then says when one isn't there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transferkit._keras import keras, tf
from transferkit._plan import JsonValue, register_value
from transferkit.errors import PlacementError, PlanError

__all__ = ["Placement"]


@functools.cache
def _mirrored_strategy(devices: tuple[str, ...]) -> Any:
    """One strategy for each set of devices: a model built in one object's scope can't be trained in another's."""
    return tf.distribute.MirroredStrategy(list(devices) or None)


@register_value
@dataclass(frozen=True)
class Placement:
    """Where a model runs; made by `auto`, `cpu`, `gpu` or `mirrored`.

    Args:
        kind: `auto`, `cpu`, `gpu` or `mirrored`.
        devices: TensorFlow's names of the devices (`GPU:0`), where they were given.

    Example:
        >>> import transferkit as tk
        >>> with tk.Placement.cpu().scope():
        ...     model = tk.ModelBuilder((4,)).classifier(3).build()
    """

    kind: str
    devices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("auto", "cpu", "gpu", "mirrored"):
            raise PlanError(
                "Choosing a placement.", found=f"the kind {self.kind!r}", fix="Placement.auto(), .cpu(), .gpu(0) or .mirrored()"
            )

    @classmethod
    def auto(cls) -> Placement:
        """Whatever is there: several GPUs mirrored, one GPU, or the CPU."""
        return cls("auto")

    @classmethod
    def cpu(cls) -> Placement:
        """The CPU."""
        return cls("cpu")

    @classmethod
    def gpu(cls, index: int = 0) -> Placement:
        """The GPU with that number, counted from 0."""
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise PlanError("Choosing a GPU.", found=f"the number {index!r}; GPUs are counted from 0")
        return cls("gpu", (f"GPU:{index}",))

    @classmethod
    def mirrored(cls, devices: Sequence[str] | None = None) -> Placement:
        """A copy of the model on each of several devices of this machine, their gradients summed
        (`tf.distribute.MirroredStrategy`).

        Args:
            devices: TensorFlow's names, `["GPU:0", "GPU:1"]`; None for every GPU.
        """
        return cls("mirrored", tuple(devices or ()))

    def __repr__(self) -> str:
        if self.kind == "gpu":
            return f"Placement.gpu({self.devices[0].split(':')[1]})"
        return f"Placement.{self.kind}({list(self.devices) if self.devices else ''})"

    def to_json_value(self) -> JsonValue:
        return {"kind": self.kind, "devices": list(self.devices)}

    @classmethod
    def from_json_value(cls, value: JsonValue, *, custom_objects: Mapping[str, Any]) -> Placement:
        del custom_objects
        return cls(value["kind"], tuple(value["devices"]))

    def _resolved(self) -> Placement:
        """This placement with `auto` decided by what is there."""
        if self.kind != "auto":
            return self
        gpus = tf.config.list_logical_devices("GPU")
        if len(gpus) > 1:
            return Placement("mirrored", tuple(f"GPU:{index}" for index in range(len(gpus))))
        return Placement("gpu", ("GPU:0",)) if gpus else Placement("cpu")

    def _check(self) -> None:
        there = {device.name.split("device:")[1] for device in tf.config.list_logical_devices()}
        missing = [device for device in self.devices if device not in there]
        if missing or (self.kind == "mirrored" and not self.devices and not any("GPU" in name for name in there)):
            raise PlacementError(
                f"Placing a model by {self!r}.",
                found=[f"no device {device}" for device in missing] or "no GPU on this machine",
                cause=f"TensorFlow sees {', '.join(sorted(there))}",
                fix="Placement.auto() takes what is there; for a GPU, install tensorflow[and-cuda] and a driver",
            )

    def describe(self) -> str:
        """One line that says which devices these are on this machine."""
        resolved = self._resolved()
        if resolved.kind == "mirrored":
            return f"mirrored over {', '.join(resolved.devices) or 'every GPU'}"
        return resolved.devices[0] if resolved.devices else "the CPU"

    @contextlib.contextmanager
    def scope(self) -> Iterator[Any]:
        """Inside it, models are built and trained here. Gives the `tf.distribute` strategy, or None on one device.

        Raises:
            PlacementError: when a device isn't there.
        """
        resolved = self._resolved()
        resolved._check()
        if resolved.kind == "mirrored":
            strategy = _mirrored_strategy(resolved.devices)
            with strategy.scope():
                yield strategy
        else:
            with tf.device(resolved.devices[0] if resolved.devices else "CPU:0"):
                yield None

    @staticmethod
    def check_model(model: keras.Model, strategy: Any) -> None:
        """Raises a PlacementError when the model was built outside the strategy's scope.

        Args:
            model: A built model.
            strategy: What `scope()` gave.
        """
        if strategy is None or all(strategy.extended.variable_created_in_scope(item.value) for item in model.variables):
            return
        raise PlacementError(
            f"Training the model {model.name!r} on {strategy.num_replicas_in_sync} devices.",
            found="a model built outside the placement's scope, so that its weights are on one device only",
            fix="build or open it inside: `with placement.scope(): model = …`, and call fit in the same block",
        )
