"""The state of optimizers with a rate for each variable: taken from phase to phase, given to a plain optimizer, put into weights.

`carry_over` moves an optimizer's state to the optimizer of the next phase. A variable that joins there has a step count of its
own: under the common one Adam's bias correction (Kingma & Ba, ICLR 2015, section 3) would take its empty moments for full ones,
and k steps after joining late its step would be (1 − β₁ᵏ) / √(1 − β₂ᵏ) times what it should be, 6.5 at the worst.

May import `optimizers` and what that may.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transferkit._keras import keras
from transferkit.errors import ModelError
from transferkit.tuning.optimizers import PerVariable

__all__ = ["as_plain", "carry_over", "raw_steps", "set_raw_steps", "swap_averages"]


def carry_over(old: Any, new: Any) -> int:
    """Moves the state of the optimizer of one phase to that of the next; changes `new` only.

    Slots of variables that both train, the step count, the loss scale and any other state are copied. A variable that joins
    has fresh slots, counts its own steps from here on, and its moving average (`use_ema`) starts from its present value. An
    average asked for by `average=` begins anew for all, from the present weights. The learning rate stays `new`'s. Nadam's
    running product of momenta is common to all variables, so there the first steps of one that joins are a little smaller
    than they would be alone.

    Args:
        old: An optimizer of `with_multipliers`, built.
        new: Another, of the same class; its variables may be others.

    Returns:
        How many variables kept their slots.

    Raises:
        ModelError: when the two are of different classes or not from `with_multipliers`.

    Example:
        >>> import keras
        >>> from transferkit.tuning.optimizers import with_multipliers
        >>> first, second = keras.Variable([1.0]), keras.Variable([2.0])
        >>> old = with_multipliers(keras.optimizers.Adam(0.1), [second])
        >>> old.apply([[1.0]], [second])
        >>> new = with_multipliers(keras.optimizers.Adam(0.01), [first, second])
        >>> carry_over(old, new)
        1
        >>> [options.origin for options in new.options]
        [1, 0]
    """
    asked = f"Carrying the state of the optimizer {type(old).__name__} over to {type(new).__name__}."
    if isinstance(old, keras.optimizers.LossScaleOptimizer) and isinstance(new, keras.optimizers.LossScaleOptimizer):
        kept = carry_over(old.inner_optimizer, new.inner_optimizer)
        new.step_counter.assign(_value(old.step_counter))
        new.dynamic_scale.assign(_value(old.dynamic_scale))
        return kept
    if type(old) is not type(new) or not isinstance(new, PerVariable):
        raise ModelError(
            asked,
            found="optimizers of two classes" if type(old) is not type(new) else "an optimizer without options for each variable",
            cause="the slots of one rule mean nothing to another",
            fix="make both with `with_multipliers`, of the same class; or start the phase with a fresh optimizer",
        )
    _copy_common(old, new, asked)
    before = {id(variable): index for index, variable in enumerate(old._built_on)}
    steps = int(_value(old.iterations))
    old_lists, new_lists = _slot_lists(old), _slot_lists(new)
    options = list(new._options)
    for index, variable in enumerate(new._built_on):
        earlier = before.get(id(variable))
        options[index] = dataclasses.replace(options[index], origin=steps if earlier is None else old._options[earlier].origin)
        for name, slot_list in new_lists.items():
            slot = slot_list[index]
            if slot is None or name == "_averages":
                continue
            if earlier is not None and name in old_lists and old_lists[name][earlier] is not None:
                slot.assign(_value(old_lists[name][earlier]))
            elif new.use_ema and slot.name.endswith("_average"):
                slot.assign(_value(variable))  # Keras sets it at step 0 only
    new._options = tuple(options)
    return sum(id(variable) in before for variable in new._built_on)


def as_plain(optimizer: Any) -> Any:
    """An optimizer of the plain class with the same settings and state, without rates and penalties for each variable.

    What a model that leaves the library is compiled with, so that it opens where transferkit isn't. A schedule of the library's
    gives way to the rate it had reached.

    Args:
        optimizer: An optimizer of `with_multipliers`, built; `LossScaleOptimizer` around one as well. Any other is given back.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) and isinstance(optimizer.inner_optimizer, PerVariable):
        settings = {key: value for key, value in optimizer.get_config().items() if key != "inner_optimizer"}
        outer = type(optimizer)(as_plain(optimizer.inner_optimizer), **settings)
        outer.build(list(optimizer.inner_optimizer._built_on))
        outer.step_counter.assign(_value(optimizer.step_counter))
        outer.dynamic_scale.assign(_value(optimizer.dynamic_scale))
        return outer
    if not isinstance(optimizer, PerVariable):
        return optimizer
    plain: Any = type(optimizer).__mro__[2]
    config = optimizer.get_config()["optimizer"]["config"]
    rate = vars(optimizer).get("_learning_rate")
    if callable(rate):
        config["learning_rate"] = (
            float(_value(optimizer.learning_rate)) if type(rate).__module__.startswith("transferkit.") else rate
        )
    new = plain.from_config(config)
    variables = list(optimizer._built_on)
    new.build(variables)
    _copy_common(optimizer, new, f"Making the optimizer {type(optimizer).__name__} plain.")
    held = _slot_lists(optimizer)
    for name, slot_list in _slot_lists(new, len(variables)).items():
        for source, target in zip(held[name], slot_list, strict=True):
            if target is not None:
                target.assign(_value(source))
    return new


def raw_steps(optimizer: Any) -> int:
    """How often the optimizer was given gradients, which is what a schedule counts; accumulated ones count each."""
    return int(_value(getattr(optimizer, "inner_optimizer", optimizer).variables[0]))


def set_raw_steps(optimizer: Any, steps: int) -> None:
    """Sets what `raw_steps` gives."""
    getattr(optimizer, "inner_optimizer", optimizer).variables[0].assign(steps)


def _value(variable: Any) -> Any:
    """The value as an array, of a variable with a copy on each device too."""
    return keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(variable))


def _copy_common(old: Any, new: Any, asked: str) -> None:
    """Copies the state that belongs to no variable of the model: the step count and the like; not the learning rate."""

    def common(optimizer: Any) -> list[Any]:
        lists = _slot_lists(optimizer, len(getattr(optimizer, "_built_on", old._built_on)))
        slots = {id(slot) for slot_list in lists.values() for slot in slot_list if slot is not None}
        return [v for v in optimizer.variables if id(v) not in slots and v.name != "learning_rate"]

    sources, targets = common(old), common(new)
    if [tuple(v.shape) for v in sources] != [tuple(v.shape) for v in targets]:
        raise ModelError(
            asked,
            found=f"{len(sources)} common state variables in the one, {len(targets)} in the other, or of shapes that differ",
            cause="the optimizer keeps state for each variable elsewhere than in lists in the variables' order",
            fix="start the phase with a fresh optimizer",
        )
    for source, target in zip(sources, targets, strict=True):
        target.assign(_value(source))


def _slot_lists(optimizer: Any, count: int | None = None) -> dict[str, list[Any]]:
    """The optimizer's lists with one slot (or None) for each variable, by attribute: how every Keras optimizer keeps them."""
    count = len(optimizer._built_on) if count is None else count
    own = {id(variable) for variable in optimizer.variables}
    step_counter = optimizer.variables[0]
    return {
        name: list(value)
        for name, value in vars(optimizer).items()
        if isinstance(value, list)
        and len(value) == count
        and any(slot is not None for slot in value)
        and all(slot is None or id(slot) in own for slot in value)
        and not any(slot is step_counter for slot in value)
    }


def swap_averages(optimizer: Any) -> None:
    """Puts the moving averages in the place of the weights, and the weights where the averages were; once more undoes it.

    Args:
        optimizer: An optimizer of `with_multipliers` with `average=`; `LossScaleOptimizer` around one as well.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    for variable, held in zip(optimizer._built_on, optimizer._averages, strict=True):
        value = _value(held)
        held.assign(_value(variable))
        variable.assign(value if variable.constraint is None else variable.constraint(value))
