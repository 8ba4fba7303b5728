"""The optimizer, loss and metrics a model was saved with, restored by an allow-list.

`compile` in Keras looks names up; here only names of the tables below, or of `custom_objects`, reach it. The optimizer's settings
are restored, its state isn't. May import Keras.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from transferkit._keras import keras
from transferkit.errors import ModelError, TransferKitError

__all__ = ["compile_as_saved"]

_OPTIMIZERS = "SGD RMSprop Adam AdamW Adadelta Adagrad Adamax Adafactor Nadam Ftrl Lion Lamb Muon".split()  # noqa: SIM905 - a list of names reads better without quotes
_LOSSES = """
    BinaryCrossentropy BinaryFocalCrossentropy CategoricalCrossentropy CategoricalFocalCrossentropy CategoricalHinge
    CosineSimilarity Dice Hinge Huber KLDivergence LogCosh MeanAbsoluteError MeanAbsolutePercentageError MeanSquaredError
    MeanSquaredLogarithmicError Poisson SparseCategoricalCrossentropy SquaredHinge Tversky
""".split()  # noqa: SIM905 - a list of names reads better without quotes
_METRICS = """
    AUC Accuracy BinaryAccuracy BinaryCrossentropy BinaryIoU CategoricalAccuracy CategoricalCrossentropy CategoricalHinge
    CosineSimilarity F1Score FBetaScore FalseNegatives FalsePositives Hinge IoU KLDivergence LogCoshError MeanAbsoluteError
    MeanAbsolutePercentageError MeanIoU MeanSquaredError MeanSquaredLogarithmicError OneHotIoU OneHotMeanIoU Poisson Precision
    PrecisionAtRecall R2Score Recall RecallAtPrecision RootMeanSquaredError SensitivityAtSpecificity SparseCategoricalAccuracy
    SparseCategoricalCrossentropy SparseTopKCategoricalAccuracy SpecificityAtSensitivity SquaredHinge TopKCategoricalAccuracy
    TrueNegatives TruePositives
""".split()  # noqa: SIM905 - a list of names reads better without quotes
_SHORT = {
    "acc": "accuracy",
    "cosineproximity": "cosinesimilarity",
    "cosine": "cosinesimilarity",
    "kld": "kldivergence",
    "kullbackleiblerdivergence": "kldivergence",
    "mae": "meanabsoluteerror",
    "mape": "meanabsolutepercentageerror",
    "mse": "meansquarederror",
    "msle": "meansquaredlogarithmicerror",
}
#: Arguments of optimizers that were called something else; None: given up.
_RENAMED = {"lr": "learning_rate", "beta1": "beta_1", "beta2": "beta_2", "schedule_decay": None, "decay": None, "name": "name"}


def _key(name: str) -> str:
    key = re.sub(r"[^a-z0-9]", "", name.rpartition(">")[2].lower())
    return _SHORT.get(key, key)


def _table(module: Any, names: list[str]) -> dict[str, Any]:
    return {_key(name): getattr(module, name) for name in names if hasattr(module, name)}


def _made(asked: str, kinds: Mapping[str, Any], value: Any, custom: Mapping[str, Any], problems: list[str]) -> Any:
    """One loss, metric or optimizer from its name or its class and configuration."""
    if isinstance(value, str):
        name, config = value, {}
    elif isinstance(value, Mapping) and isinstance(value.get("class_name"), str):
        inner = value.get("config")
        name, config = value["class_name"], dict(inner) if isinstance(inner, Mapping) else {}
        if name == "MeanMetricWrapper" or isinstance(inner, str):  # a function in tf.keras's or Keras 3's words
            said = inner if isinstance(inner, str) else config.get("fn", config.get("name"))
            name, config = said if isinstance(said, str) else str(config.get("name")), {}
    else:
        problems.append(f"the {asked} is {str(value)[:60]!r}")
        return None
    for known in (name, name.rpartition(">")[2]):
        if known in custom:
            return custom[known](**config) if isinstance(custom[known], type) and config else custom[known]
    if asked == "metric" and _key(name) == "accuracy":
        return "accuracy"  # which one depends on the loss
    own = kinds.get(_key(name))
    if own is None:
        problems.append(f"the {asked} {name!r} is none of Keras's")
        return None
    accepted = inspect.signature(own.__init__).parameters
    kept = {
        key: item for key, item in config.items() if key in accepted and isinstance(item, (int, float, str, list, type(None)))
    }
    if kept.get("reduction") not in ("sum", "sum_over_batch_size", "mean", "none"):
        kept.pop("reduction", None)
    if "dtype" in kept and kept["dtype"] != "float32":
        kept.pop("dtype")
    try:
        return own(**kept)
    except Exception as error:
        problems.append(f"the {asked} {name!r}: {error}")
        return None


def _optimizer(value: Any, custom: Mapping[str, Any], problems: list[str]) -> Any:
    if (
        not isinstance(value, Mapping)
        or not isinstance(value.get("class_name"), str)
        or not isinstance(value.get("config"), Mapping)
    ):
        problems.append("no optimizer")
        return None
    config: dict[str, Any] = {}
    for key, item in value["config"].items():
        new = _RENAMED.get(key, key)
        if new is not None and isinstance(item, (int, float, str, bool)):
            config[new] = item
    if not isinstance(config.get("learning_rate", 0.0), float):
        config.pop("learning_rate", None)
    name = value["class_name"].removesuffix("Optimizer").removeprefix("Custom>")
    return _made("optimizer", _table(keras.optimizers, _OPTIMIZERS), {"class_name": name, "config": config}, custom, problems)


def _nested(make: Callable[[Any], Any], value: Any) -> Any:
    """The same shape of lists and dicts with each leaf made."""
    if value is None:
        return None
    if isinstance(value, list):
        return [_nested(make, item) for item in value]
    if isinstance(value, Mapping) and "class_name" not in value:
        return {key: _nested(make, item) for key, item in value.items()}
    return make(value)


def compile_as_saved(model: Any, saved: Mapping[str, Any] | None, *, path: str, custom_objects: Mapping[str, Any]) -> None:
    """Compiles the model with the optimizer, loss and metrics of its file.

    Args:
        model: The model, which is changed.
        saved: The training configuration as the file words it.
        path: The file, for messages.
        custom_objects: Name -> loss, metric or optimizer that only its author has.

    Raises:
        ModelError: when the file has none, or names what isn't Keras's.
    """
    if not saved:
        raise ModelError(
            f"Opening {path!r} compiled.",
            found="no training configuration in the file",
            cause="the model was saved without being compiled",
            fix="open_model(path), then model.compile(…)",
        )
    problems: list[str] = []
    losses, metrics = _table(keras.losses, _LOSSES), _table(keras.metrics, _METRICS)
    optimizer = _optimizer(saved.get("optimizer_config", saved.get("optimizer")), custom_objects, problems)
    loss = _nested(lambda value: _made("loss", losses, value, custom_objects, problems), saved.get("loss"))
    shown = saved.get("metrics")
    if isinstance(shown, list) and shown and all(isinstance(item, list) for item in shown) and len(model.outputs) == 1:
        shown = [item for items in shown for item in items]  # tf.keras kept a list for each output
    kept = _nested(lambda value: _made("metric", metrics, value, custom_objects, problems), shown)
    if not problems:
        weights = saved.get("loss_weights")
        try:
            model.compile(optimizer=optimizer, loss=loss, metrics=kept or None, loss_weights=weights or None)
            return
        except TransferKitError:
            raise
        except Exception as error:
            problems.append(str(error).splitlines()[0])
    raise ModelError(
        f"Opening {path!r} compiled.",
        found=problems,
        cause="the model was trained with functions of its author, or of a version that isn't known here",
        fix="give them in custom_objects, or open_model(path) and model.compile(…)",
    )
