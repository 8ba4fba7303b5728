"""How the learning rate runs over a phase: `Schedule`, a value a plan holds, and the Keras schedule it gives for a phase.

Every schedule scales one peak rate, so `learning_rate` keeps its meaning, and counts from the phase's own first step, though the
optimizer's step count runs on through all phases.

Sources: cosine, Loshchilov & Hutter, ICLR 2017, equation 5, without restarts; linear warm-up, Goyal et al. 2017, section 2.2;
one cycle, Smith & Topin 2018, in the two-cosine form of Howard & Gugger's fastai, without the cycle of momentum; BiT-HyperRule,
Kolesnikov et al., ECCV 2020, section 3.3. May import Keras and the floors below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from transferkit._keras import keras
from transferkit._plan import JsonValue, register_value
from transferkit.errors import PlanError, did_you_mean

__all__ = ["BitRule", "PhaseSchedule", "Schedule", "Since", "bit_hyper_rule"]

_DEFAULTS: dict[str, dict[str, Any]] = {
    "constant": {"warmup": 0.0},
    "cosine": {"warmup": 0.1, "final": 0.0},
    "linear": {"warmup": 0.1, "final": 0.0},
    "one_cycle": {"rise": 0.25, "initial": 0.04, "final": 1e-5},
    "bit": {"warmup": 0.0},
    "plateau": {"factor": 0.1, "patience": 3, "monitor": "val_loss"},
}


@final
@register_value
class Schedule:
    """The course of the learning rate over one phase, made by one of its named constructors.

    Example:
        >>> schedule = Schedule.cosine(warmup=0.1)
        >>> schedule
        Schedule.cosine()
        >>> schedule.curve(0.01, steps=4)
        [0.01, 0.00853..., 0.005, 0.00146...]
    """

    __slots__ = ("_settings", "kind")

    def __init__(self, kind: str, settings: Mapping[str, Any]) -> None:
        if kind not in _DEFAULTS:
            raise PlanError(
                "Choosing a schedule of the learning rate.",
                found=f"no schedule named {kind!r}{did_you_mean(str(kind), _DEFAULTS)}",
                fix="one of " + ", ".join(map(repr, _DEFAULTS)),
            )
        self.kind = kind
        self._settings = tuple((name, settings[name]) for name in _DEFAULTS[kind])
        self._check()

    @classmethod
    def of(cls, value: Schedule | str | None) -> Schedule:
        """The schedule that `value` names; constant for None."""
        return value if isinstance(value, Schedule) else cls(value or "constant", _DEFAULTS.get(value or "constant", {}))

    @classmethod
    def constant(cls, *, warmup: float = 0.0) -> Schedule:
        """One rate, after a linear warm-up over the share `warmup` (0–1) of the steps."""
        return cls("constant", {"warmup": warmup})

    @classmethod
    def cosine(cls, *, warmup: float = 0.1, final: float = 0.0) -> Schedule:
        """Linear warm-up over the share `warmup` of the steps, then half a cosine down to `final` × the rate."""
        return cls("cosine", {"warmup": warmup, "final": final})

    @classmethod
    def linear(cls, *, warmup: float = 0.1, final: float = 0.0) -> Schedule:
        """Linear warm-up over the share `warmup` of the steps, then a straight line down to `final` × the rate."""
        return cls("linear", {"warmup": warmup, "final": final})

    @classmethod
    def one_cycle(cls, *, rise: float = 0.25, initial: float = 0.04, final: float = 1e-5) -> Schedule:
        """From `initial` × the rate up to it over the share `rise` of the steps, and down to `final` × the rate, by cosines."""
        return cls("one_cycle", {"rise": rise, "initial": initial, "final": final})

    @classmethod
    def bit(cls, *, warmup: float = 0.0) -> Schedule:
        """The rate divided by ten at 30, 60 and 90% of the steps (BiT-HyperRule)."""
        return cls("bit", {"warmup": warmup})

    @classmethod
    def plateau(cls, *, factor: float = 0.1, patience: int = 3, monitor: str = "val_loss") -> Schedule:
        """The rate times `factor` whenever `monitor` hasn't improved for `patience` epochs."""
        return cls("plateau", {"factor": factor, "patience": patience, "monitor": monitor})

    def _check(self) -> None:
        settings = self.settings
        wrong = []
        for name in ("warmup", "rise", "initial", "final", "factor"):
            value = settings.get(name)
            if value is None:
                continue
            top = 1.0 if name in ("initial", "final") else 0.999999
            if not (isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= top):
                wrong.append(f"{name}={value!r}; it must be a share, from 0 to {'1' if top == 1.0 else 'below 1'}")
        patience = settings.get("patience", 0)
        if not isinstance(patience, int) or isinstance(patience, bool) or patience < 0:
            wrong.append(f"patience={patience!r}; it must be a whole number, at least 0")
        if wrong:
            raise PlanError(f"Planning the schedule {self.kind!r}.", found=wrong)

    @property
    def settings(self) -> dict[str, Any]:
        """Its arguments."""
        return dict(self._settings)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and (self.kind, self._settings) == (other.kind, other._settings)

    def __hash__(self) -> int:
        return hash((self.kind, self._settings))

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self._settings if value != _DEFAULTS[self.kind][name])
        return f"Schedule.{self.kind}({shown})"

    def to_json_value(self) -> JsonValue:
        return [self.kind, self.settings]

    @classmethod
    def from_json_value(cls, value: JsonValue, *, custom_objects: Mapping[str, Any]) -> Schedule:
        del custom_objects
        kind, settings = value
        return cls(kind, settings)

    def learning_rate(self, peak: float, *, steps: int, start: int = 0) -> Any:
        """What a Keras optimizer takes for a phase.

        Args:
            peak: The highest rate.
            steps: Optimizer steps in the phase.
            start: The optimizer's step count when the phase begins.

        Returns:
            A `LearningRateSchedule`; or `peak` itself where the rate is to stay settable for callbacks (constant without
            warm-up, plateau).
        """
        if self.kind == "plateau" or (self.kind == "constant" and not self.settings["warmup"]):
            return float(peak)
        return PhaseSchedule(self.kind, self.settings, peak=float(peak), steps=int(steps), start=int(start))

    def callbacks(self) -> list[Any]:
        """Fresh Keras callbacks that belong to the schedule."""
        if self.kind != "plateau":
            return []
        monitor = self.settings["monitor"]
        rising = any(word in monitor.lower() for word in ("acc", "auc"))
        return [
            keras.callbacks.ReduceLROnPlateau(
                monitor=monitor,
                factor=self.settings["factor"],
                patience=self.settings["patience"],
                mode="max" if rising else "min",
            )
        ]

    def curve(self, peak: float, *, steps: int) -> list[float]:
        """The rate at each step of a phase of `steps` steps."""
        return [peak * _factor(self.kind, self.settings, step, steps) for step in range(steps)]


def _factor(kind: str, settings: Mapping[str, Any], step: float, steps: int) -> float:
    """The share of the peak rate at one step, in plain Python: what `PhaseSchedule` computes with tensors."""
    warm = round(float(settings.get("warmup", 0.0)) * steps)
    if step < warm:
        return (step + 1) / warm
    if kind in ("constant", "plateau"):
        return 1.0
    if kind == "bit":
        return math.pow(0.1, sum(step >= share * steps for share in (0.3, 0.6, 0.9)))
    final: float = settings["final"]
    if kind == "one_cycle":
        rise = settings["rise"] * steps
        if step < rise:
            return _cosine(settings["initial"], 1.0, step / rise)
        return _cosine(1.0, final, min((step - rise) / max(steps - rise, 1.0), 1.0))
    done = min((step - warm) / max(steps - warm, 1), 1.0)
    return _cosine(1.0, final, done) if kind == "cosine" else 1.0 + (final - 1.0) * done


def _cosine(begin: float, end: float, done: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * done)) / 2


@keras.saving.register_keras_serializable(package="transferkit")
class PhaseSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A `Schedule` for one phase, as Keras takes it.

    Args:
        kind: The schedule's name.
        settings: Its arguments.
        peak: The highest rate.
        steps: Optimizer steps in the phase.
        start: The optimizer's step count when the phase begins.
    """

    def __init__(self, kind: str, settings: Mapping[str, Any], *, peak: float, steps: int, start: int = 0) -> None:
        self.kind, self.settings, self.peak, self.steps, self.start = kind, dict(settings), peak, steps, start

    def __call__(self, step: Any) -> Any:
        ops = keras.ops
        step = ops.cast(step, "float32") - float(self.start)
        warm = round(self.settings.get("warmup", 0.0) * self.steps)
        if self.kind == "constant":
            factor: Any = ops.ones_like(step)
        elif self.kind == "bit":
            passed = sum(ops.cast(step >= share * self.steps, "float32") for share in (0.3, 0.6, 0.9))
            factor = ops.power(10.0, -passed)
        elif self.kind == "one_cycle":
            rise, initial, final = self.settings["rise"] * self.steps, self.settings["initial"], self.settings["final"]
            up = self._cosine(initial, 1.0, step / max(rise, 1e-9))
            down = self._cosine(1.0, final, ops.minimum((step - rise) / max(self.steps - rise, 1.0), 1.0))
            factor = ops.where(step < rise, up, down)
        else:
            done = ops.minimum((step - warm) / max(self.steps - warm, 1), 1.0)
            final = self.settings["final"]
            factor = self._cosine(1.0, final, done) if self.kind == "cosine" else 1.0 + (final - 1.0) * done
        if warm:
            factor = ops.where(step < warm, (step + 1.0) / warm, factor)
        return self.peak * factor

    @staticmethod
    def _cosine(begin: float, end: float, done: Any) -> Any:
        return end + (begin - end) * (1.0 + keras.ops.cos(math.pi * done)) / 2.0

    def get_config(self) -> dict[str, Any]:
        return {"kind": self.kind, "settings": self.settings, "peak": self.peak, "steps": self.steps, "start": self.start}


@keras.saving.register_keras_serializable(package="transferkit")
class Since(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule of the user's, counted from the step at which a phase began.

    Args:
        schedule: Any Keras `LearningRateSchedule`.
        start: The optimizer's step count when the phase begins.
    """

    def __init__(self, schedule: Any, start: int) -> None:
        self.schedule, self.start = schedule, start

    def __call__(self, step: Any) -> Any:
        return self.schedule(step - self.start)

    def get_config(self) -> dict[str, Any]:
        return {"schedule": keras.saving.serialize_keras_object(self.schedule), "start": self.start}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Since:
        return cls(keras.saving.deserialize_keras_object(config["schedule"]), config["start"])


@dataclass(frozen=True)
class BitRule:
    """What BiT-HyperRule says for a data set.

    Args:
        steps: Optimizer steps in all, at batches of 512.
        mixup: Strength of mixup; 0 for none.
        learning_rate: For SGD with momentum 0.9 and batches of 512.
        resize: Side of the resized image in pixels.
        crop: Side of the random crop in pixels.
        schedule: The course of the rate.
    """

    steps: int
    mixup: float
    learning_rate: float
    resize: int
    crop: int
    schedule: Schedule

    def __str__(self) -> str:
        mixing = f"mixup {self.mixup:g}" if self.mixup else "no mixup"
        return (
            f"BiT-HyperRule: {self.steps:,} steps of SGD (momentum 0.9, batches of 512) at {self.learning_rate:g}, a tenth of it "
            f"from 30, 60 and 90% on; images resized to {self.resize} and cropped to {self.crop} pixels; {mixing}"
        )

    def epochs(self, examples: int, *, batch_size: int = 512) -> int:
        """Epochs that make as many steps, at least 1."""
        return max(1, round(self.steps / max(1, math.ceil(examples / batch_size))))


def bit_hyper_rule(examples: int, *, image_size: Sequence[int] = (224, 224)) -> BitRule:
    """The settings BiT-HyperRule gives for a data set: steps, mixup and resolution by its size alone.

    Kolesnikov et al., ECCV 2020, section 3.3.

    Args:
        examples: How many training examples there are.
        image_size: Height and width of the original images in pixels.

    Example:
        >>> print(bit_hyper_rule(5_000))
        BiT-HyperRule: 500 steps of SGD (momentum 0.9, batches of 512) at 0.003, a tenth of it from 30, 60 and 90% on; images resized to 512 and cropped to 480 pixels; no mixup
    """  # noqa: E501
    if examples < 1:
        raise PlanError("Asking BiT-HyperRule.", found=f"examples={examples!r}; there must be one at least")
    steps = 500 if examples < 20_000 else 10_000 if examples < 500_000 else 20_000
    small = math.prod(image_size) < 96 * 96
    return BitRule(
        steps=steps,
        mixup=0.1 if examples >= 20_000 else 0.0,
        learning_rate=0.003,
        resize=160 if small else 512,
        crop=128 if small else 480,
        schedule=Schedule.bit(),
    )
