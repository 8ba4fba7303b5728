"""A rate, a weight decay and a penalty for each variable, around any Keras optimizer, the user's own too.

`with_multipliers` gives an optimizer of the same class with the same settings, extended so that every variable is trained just
as the plain optimizer with `learning_rate × multiplier` would train it: the rate given to `update_step` is scaled, and the rate
of the weight decay with it. Scaling the gradients instead would do nothing under Adam and its kin, which are invariant to it.
There stays one `learning_rate` for schedules and callbacks.

Each variable can count its own steps from an origin; `optimizer_state` sets it for those that join in a later phase.

The penalty `strength/2 · ‖w − w₀‖²` is that of L2-SP (Li, Grandvalet & Davoine, ICML 2018, equation 2), or plain L2 with
w₀ = 0. It is added to the gradients, before they are clipped, so it works with any `train_step` and changes no layer.

An average of the weights (Polyak & Juditsky 1992) is kept beside them where asked, moving with
min(`average`, (1 + t) / (10 + t)) at step t, as in TensorFlow's ExponentialMovingAverage, so that a short run isn't averaged with
its own beginning.

Imports `errors` and `_keras`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from transferkit._keras import keras, tf
from transferkit.errors import ModelError, PlanError, TrainingError

__all__ = [
    "Penalty",
    "PerVariable",
    "VariableOptions",
    "changed",
    "check_optimizer",
    "decays",
    "with_multipliers",
]

Variable: TypeAlias = Any  # keras.Variable, which has no types


@dataclass(frozen=True)
class Penalty:
    """A pull on a variable: the gradient of `strength/2 · ‖w − w₀‖²`.

    Args:
        strength: Factor of the penalty, 0 or more.
        to_start: Whether w₀ is the variable's value when the optimizer is built (L2-SP), or zero (plain L2).
    """

    strength: float
    to_start: bool = False


@dataclass(frozen=True)
class VariableOptions:
    """How one variable is trained.

    Args:
        multiplier: Factor on the learning rate.
        decay: Whether the optimizer's weight decay applies.
        penalty: The pull on the variable, if there is one.
        origin: The optimizer step from which the variable's own steps count.
    """

    multiplier: float = 1.0
    decay: bool = True
    penalty: Penalty | None = None
    origin: int = 0


def decays(variable: Variable) -> bool:
    """Whether weight decay applies by default: to matrices and kernels; not to biases, normalisation and embeddings.

    Biases and scales have one axis in most layers; those of attention have two, so the name decides too.
    """
    name = variable.name.lower()
    return len(variable.shape) > 1 and not any(part in name for part in ("bias", "gamma", "beta", "scale", "embedding"))


def changed(optimizer: Any, **settings: Any) -> Any:
    """A fresh optimizer like that one with other settings; of one around another, as for loss scaling, the inner one has them."""
    if hasattr(optimizer, "inner_optimizer"):
        return _around(optimizer, changed(optimizer.inner_optimizer, **settings))
    return type(optimizer).from_config({**optimizer.get_config(), **settings})


def _around(scaling: Any, inner: Any) -> Any:
    """A fresh optimizer like `scaling`, around another one."""
    settings = {key: value for key, value in scaling.get_config().items() if key != "inner_optimizer"}
    return type(scaling)(inner, **settings)


def with_multipliers(
    optimizer: Any,
    variables: Sequence[Variable],
    *,
    multiplier: float | Callable[[Variable], float] = 1.0,
    decay: bool | Callable[[Variable], bool] = decays,
    penalty: Penalty | Callable[[Variable], Penalty | None] | None = None,
    average: float | None = None,
    start: Callable[[Variable], Any] | None = None,
) -> Any:
    """An optimizer like `optimizer`, built on `variables`, with a rate for each of them.

    With every multiplier 1, no penalty and `decay=True`, training is equal to the bit to that with `optimizer`. The new
    optimizer is of a subclass of the given one's class, is saved and loaded with its model by Keras, and works with schedules,
    clipping, EMA, gradient accumulation, loss scaling and `tf.distribute`. `optimizer` isn't changed, nor its state used.

    Args:
        optimizer: Any Keras optimizer that writes its rule in `update_step`; `LossScaleOptimizer` around one as well.
        variables: The model's trainable variables, in the model's order.
        multiplier: Factor on the learning rate, 0 or more: one for all, or a function of the variable.
        decay: Whether the optimizer's weight decay (if it has one) applies: for all, or a function of the variable.
        penalty: L2-SP or L2: for all, or a function of the variable.
        average: Momentum of a moving average of the weights, from 0 to below 1; None for none.
        start: Gives a variable's w₀ for a penalty to the start; None for its present value.

    Returns:
        The optimizer, for `model.compile`.

    Raises:
        ModelError: when the optimizer can't be given rates of this kind.
        PlanError: when a multiplier or a strength is negative or not finite.

    Example:
        >>> import keras
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, name="body"), keras.layers.Dense(2, name="head")])
        >>> head = {id(variable) for variable in model.get_layer("head").trainable_variables}
        >>> optimizer = with_multipliers(
        ...     keras.optimizers.Adam(1e-3), model.trainable_variables, multiplier=lambda v: 1.0 if id(v) in head else 0.1
        ... )
        >>> model.compile(optimizer, "mse")
        >>> [options.multiplier for options in optimizer.options]
        [0.1, 0.1, 1.0, 1.0]
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = with_multipliers(
            optimizer.inner_optimizer,
            variables,
            multiplier=multiplier,
            decay=decay,
            penalty=penalty,
            average=average,
            start=start,
        )
        outer = _around(optimizer, inner)
        outer.build(list(variables))
        return outer
    kept = getattr(
        optimizer, "_use_weight_decay", lambda _: True
    )  # what `exclude_from_weight_decay` was told isn't in the config
    options = tuple(
        VariableOptions(
            multiplier=float(multiplier(variable) if callable(multiplier) else multiplier),
            decay=bool(decay(variable) if callable(decay) else decay) and bool(kept(variable)),
            penalty=penalty(variable) if callable(penalty) else penalty,
        )
        for variable in variables
    )
    _check(optimizer, options, average)
    shapes = tuple(tuple(variable.shape) for variable in variables)
    new = _extended(optimizer, options, shapes=shapes, average=average)
    new.build(list(variables))
    if start is not None:
        for variable, anchor in zip(variables, new._anchors, strict=True):
            if anchor is not None:
                anchor.assign(start(variable))
    return new


def _check(optimizer: Any, options: Sequence[VariableOptions], average: float | None) -> None:
    asked = f"Giving the optimizer {type(optimizer).__name__} a rate for each variable."
    numbers = [o.multiplier for o in options] + [o.penalty.strength for o in options if o.penalty]
    wrong = sorted({number for number in numbers if not (math.isfinite(number) and number >= 0)}, key=str)
    if wrong:
        raise PlanError(
            asked,
            found=f"multipliers or penalty strengths of {', '.join(map(repr, wrong))}",
            fix="give finite numbers of 0 or more; to leave a layer as it is, freeze it",
        )
    if average is not None and not 0 <= average < 1:
        raise PlanError(
            asked, found=f"average={average!r}, the momentum of a moving average", fix="give a number from 0 to below 1"
        )
    check_optimizer(optimizer)


def check_optimizer(optimizer: Any) -> None:
    """Raises a ModelError when the optimizer is none that can be given rates of this kind."""
    asked = f"Giving the optimizer {type(optimizer).__name__} a rate for each variable."
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ModelError(asked, found=f"a {type(optimizer).__name__}, which is no keras.optimizers.Optimizer")
    kind = type(optimizer)
    if kind.update_step is keras.optimizers.Optimizer.update_step:
        raise ModelError(
            asked,
            found=f"{kind.__name__} has no `update_step` of its own",
            cause="rates are scaled where Keras hands them to `update_step`, once for each variable",
            fix="write the update rule in `update_step(gradient, variable, learning_rate)`",
        )
    if not hasattr(keras.optimizers.Optimizer, "_apply_weight_decay"):
        raise ModelError(
            asked,
            found=f"Keras {keras.__version__} decays weights in a place of its own",
            fix="install a version of Keras that this version of transferkit was tested with",
        )


_Mixed: Any = object  # the optimizer class beneath; `Any` because Keras has no types


class PerVariable(_Mixed):
    """What an optimizer of `with_multipliers` has more than its plain class.

    One subclass is made for each optimizer class; all are saved under one name, with the plain optimizer inside the config.
    """

    _options: tuple[VariableOptions, ...] = ()
    _shapes: tuple[tuple[int, ...], ...] = ()
    _average: float | None = None
    _scale: float = 1.0
    _origin: int = 0
    _stepped: bool = False
    _plain: Mapping[str, Any]
    built: bool

    @property
    def options(self) -> tuple[VariableOptions, ...]:
        """How each variable is trained, in the order of the variables the optimizer was built on."""
        return tuple(self._options)

    @property
    def learning_rate(self) -> Any:
        """The common learning rate; each variable's own is this times its multiplier."""
        rate = super().learning_rate  # from the optimizer class this one is mixed into
        return rate if self._scale == 1.0 else keras.ops.multiply(rate, self._scale)

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        keras.optimizers.Optimizer.learning_rate.fset(self, value)

    @property
    def iterations(self) -> Any:
        """Steps taken; within a variable's update, those since it joined."""
        steps = super().iterations
        return steps if self._origin == 0 else keras.ops.subtract(steps, self._origin)

    def build(self, variables: Sequence[Variable]) -> None:
        if self.built:
            return
        variables = list(variables)
        shapes = tuple(tuple(variable.shape) for variable in variables)
        if shapes != self._shapes:
            differing = [i for i, (a, b) in enumerate(zip(shapes, self._shapes, strict=False)) if a != b]
            raise ModelError(
                f"Building the optimizer {type(self).__name__} on {len(shapes)} variables.",
                found=f"rates for {len(self._shapes)} variables"
                + (f"; number {differing[0]} has another shape" if differing else ""),
                cause="`trainable` was changed on some layer, or the model is another one",
                fix="make the optimizer anew with `with_multipliers`, for the variables that are trained now",
            )
        undecayed = [variable for variable, options in zip(variables, self._options, strict=True) if not options.decay]
        if undecayed:
            self.exclude_from_weight_decay(var_list=undecayed)
        super().build(variables)
        # Past Keras's tracking, which would take the model's variables for the optimizer's own.
        object.__setattr__(self, "_built_on", tuple(variables))
        self._anchors = [
            self._slot(variable, "anchor") if options.penalty and options.penalty.to_start and options.penalty.strength else None
            for variable, options in zip(variables, self._options, strict=True)
        ]
        self._averages = [None if self._average is None else self._slot(variable, "polyak") for variable in variables]
        self.built = True

    def _slot(self, variable: Variable, name: str) -> Any:
        """A variable of the optimizer's that begins with the model variable's value."""
        return self.add_variable_from_reference(
            variable, name=name, initializer=lambda _shape, dtype=None: keras.ops.cast(variable, dtype or variable.dtype)
        )

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Variable] | None = None) -> None:
        grads = list(grads)
        variables = None if trainable_variables is None else list(trainable_variables)
        if variables is not None and not self.built:
            self.build(variables)
        if any(options.penalty for options in self._options):
            known = self._built_on if variables is None else variables
            grads = [self._penalised(grad, variable) for grad, variable in zip(grads, known, strict=True)]
        self._stepped = False
        super().apply(grads, variables)
        scaled = any(options.multiplier != 1.0 for options in self._options)
        # With accumulation most steps rightly update nothing.
        if grads and scaled and not self._stepped and not self.gradient_accumulation_steps:
            raise TrainingError(
                f"Training with a rate for each variable under {type(self).__name__}.",
                found="the optimizer applied gradients without calling `update_step`, so the rates had no effect",
                fix="write the update rule in `update_step(gradient, variable, learning_rate)`",
            )

    def _penalised(self, grad: Any, variable: Variable) -> Any:
        index = self._get_variable_index(variable)
        penalty = self._options[index].penalty
        if grad is None or penalty is None or not penalty.strength:
            return grad
        anchor = self._anchors[index]
        away = variable if anchor is None else keras.ops.subtract(variable, anchor)
        # Keras sums the gradients of all replicas, and divides them by the loss scale, after this.
        strength = penalty.strength / tf.distribute.get_strategy().num_replicas_in_sync
        strength *= self.loss_scale_factor or 1.0
        pull = keras.ops.multiply(keras.ops.cast(strength, variable.dtype), away)
        return keras.ops.add(tf.convert_to_tensor(grad), keras.ops.cast(pull, grad.dtype))

    def update_step(self, gradient: Any, variable: Variable, learning_rate: Any) -> None:
        index = self._get_variable_index(variable)
        options = self._options[index]
        rate = learning_rate if options.multiplier == 1.0 else keras.ops.multiply(learning_rate, options.multiplier)
        self._stepped = True
        self._origin = options.origin
        try:
            super().update_step(gradient, variable, rate)
            if self._average is not None:
                step = keras.ops.cast(self.iterations, variable.dtype)
                momentum = keras.ops.minimum((1 + step) / (10 + step), keras.ops.cast(self._average, variable.dtype))
                held = self._averages[index]
                self.assign(held, keras.ops.add(variable, keras.ops.multiply(momentum, keras.ops.subtract(held, variable))))
        finally:
            self._origin = 0

    def _apply_weight_decay(self, variables: Sequence[Variable]) -> None:
        groups: dict[float, list[Variable]] = {}
        for variable in variables:
            groups.setdefault(self._options[self._get_variable_index(variable)].multiplier, []).append(variable)
        try:
            for scale, group in groups.items():
                self._scale = scale
                super()._apply_weight_decay(group)
        finally:
            self._scale = 1.0

    def get_config(self) -> dict[str, Any]:
        plain = {**self._plain, "config": super().get_config()}
        return {
            "optimizer": plain,
            "options": [dataclasses.asdict(options) for options in self._options],
            "shapes": [list(shape) for shape in self._shapes],
            "average": self._average,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Any:
        plain = keras.saving.deserialize_keras_object(config["optimizer"], custom_objects=custom_objects)
        options = tuple(
            VariableOptions(**{**entry, "penalty": Penalty(**entry["penalty"]) if entry["penalty"] else None})
            for entry in config["options"]
        )
        _check(plain, options, config["average"])
        shapes = tuple(tuple(shape) for shape in config["shapes"])
        return _extended(plain, options, shapes=shapes, average=config["average"])


def _extended(
    optimizer: Any, options: tuple[VariableOptions, ...], *, shapes: tuple[tuple[int, ...], ...], average: float | None
) -> Any:
    """An unbuilt copy of `optimizer` that trains each variable by its options."""
    plain: Any = type(optimizer)
    if isinstance(optimizer, PerVariable):
        plain = plain.__mro__[2]
        serialized, config = dict(optimizer._plain), optimizer.get_config()["optimizer"]["config"]
    else:
        serialized, config = keras.saving.serialize_keras_object(optimizer), optimizer.get_config()
        serialized.pop("config")
    kind = _subclass(plain)
    rate = vars(optimizer).get("_learning_rate")
    if callable(rate) and isinstance(config.get("learning_rate"), Mapping):
        config["learning_rate"] = rate  # the object itself: a schedule of the user's own needn't be registered
    new = super(PerVariable, kind).from_config(config)  # the plain class's way, for the subclass
    if not isinstance(new, kind):
        raise ModelError(
            f"Giving the optimizer {plain.__name__} a rate for each variable.",
            found=f"its `from_config` gave a {type(new).__name__} where it was called on {kind.__name__}",
            fix="end `from_config` with `return cls(**config)`",
        )
    new._plain = serialized
    new._options = options
    new._shapes = shapes
    new._average = average
    return new


@functools.cache
def _subclass(plain: Any) -> type[Any]:
    # Adding the optimizer's name keeps `type(model.optimizer).__name__` telling in messages and logs.
    kind = type(f"PerVariable{plain.__name__}", (PerVariable, plain), {"__module__": __name__, "__doc__": PerVariable.__doc__})
    register = keras.saving.register_keras_serializable(package="transferkit", name="PerVariable")
    register(kind)
    # All share one name; whichever class stands under it reads every config, so it is always this one.
    register(PerVariable)
    return kind


keras.saving.register_keras_serializable(package="transferkit", name="PerVariable")(PerVariable)
