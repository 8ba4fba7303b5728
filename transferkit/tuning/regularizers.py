"""What holds a fine-tuned model back: L2-SP and L2 as penalties of the optimizer, and label smoothing for any kind of labels.

L2-SP: Li, Grandvalet & Davoine, ICML 2018, equation 2: α/2 ‖w − w₀‖² on what was loaded, β/2 ‖w‖² on the new head. It lives in
the optimizer, so it needs nothing of the model's layers, survives a compile and works with a `train_step` of the user's; the
loss that `fit` reports is without it. Label smoothing: Szegedy et al., CVPR 2016, section 7.

May import Keras and the floors below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transferkit._keras import keras
from transferkit.building.heads import head_layers
from transferkit.errors import DataError
from transferkit.tuning.optimizers import Penalty

__all__ = ["SmoothedSparseCrossentropy", "l2_sp_penalty", "smoothed", "soft_loss"]


def l2_sp_penalty(model: Any, *, strength: float, head: float) -> Callable[[Any], Penalty]:
    """The penalty of each variable of the model: to the loaded weights below, to zero in the head.

    Args:
        model: A built model.
        strength: α, on the distance to the loaded weights.
        head: β, on the size of the head's weights.
    """
    of_head = {id(weight) for layer in head_layers(model) for weight in layer.weights}

    def penalty(variable: Any) -> Penalty:
        return Penalty(head) if id(variable) in of_head else Penalty(strength, to_start=True)

    return penalty


@keras.saving.register_keras_serializable(package="transferkit")
class SmoothedSparseCrossentropy(keras.losses.Loss):
    """Cross-entropy of whole-number labels with label smoothing, which Keras has for one-hot labels only.

    Equal to `CategoricalCrossentropy(label_smoothing=…)` on the one-hot labels.

    Args:
        smoothing: The share of the label's weight that goes to all classes alike, from 0 to below 1.
        from_logits: Whether predictions are logits rather than probabilities.
        name: Its name in logs.
        reduction: As for any Keras loss.
        dtype: As for any Keras loss.
    """

    def __init__(
        self,
        smoothing: float,
        from_logits: bool = False,
        name: str = "smoothed_sparse_crossentropy",
        reduction: str = "sum_over_batch_size",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.smoothing = smoothing
        self.from_logits = from_logits

    def call(self, y_true: Any, y_pred: Any) -> Any:
        ops = keras.ops
        if len(y_true.shape) == len(y_pred.shape):  # a column of labels, which Keras takes as well
            y_true = ops.squeeze(y_true, axis=-1)
        one_hot = ops.one_hot(ops.cast(y_true, "int32"), y_pred.shape[-1], dtype=y_pred.dtype)
        return keras.losses.categorical_crossentropy(
            one_hot, y_pred, from_logits=self.from_logits, label_smoothing=self.smoothing
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "smoothing": self.smoothing, "from_logits": self.from_logits}


def smoothed(loss: Any, smoothing: float) -> Any:
    """The loss with label smoothing: one loss, or each of a list or dict of losses.

    Raises:
        DataError: for a loss that has no classes to smooth over.
    """
    return _replaced(loss, lambda item: _smoothed_one(item, smoothing), "label smoothing")


def soft_loss(loss: Any) -> Any:
    """The loss that takes probabilities as labels where `loss` takes whole numbers.

    Raises:
        DataError: for a loss that can't take soft labels.
    """
    return _replaced(loss, _soft_one, "mixed labels")


def _replaced(loss: Any, replace: Callable[[Any], Any], what: str) -> Any:
    if isinstance(loss, dict):
        return {key: _replaced(value, replace, what) for key, value in loss.items()}
    if isinstance(loss, (list, tuple)):
        return [_replaced(value, replace, what) for value in loss]
    found = keras.losses.get(loss) if isinstance(loss, str) else loss
    new = replace(_as_object(found))
    if new is None:
        shown = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
        raise DataError(
            f"Training with {what}.",
            found=f"the loss {shown!r}, which is no cross-entropy over classes",
            cause="it needs labels that are probabilities of classes",
            fix="leave it out of the plan, or give a cross-entropy of Keras's as loss",
        )
    return new


_FUNCTIONS: Sequence[tuple[str, str]] = (
    ("sparse_categorical_crossentropy", "SparseCategoricalCrossentropy"),
    ("categorical_crossentropy", "CategoricalCrossentropy"),
    ("binary_crossentropy", "BinaryCrossentropy"),
)


def _as_object(loss: Any) -> Any:
    """The loss class's object for one of Keras's loss functions, else the loss itself."""
    name = getattr(loss, "__name__", "")
    found = next((kind for function, kind in _FUNCTIONS if name == function), None)
    return getattr(keras.losses, found)() if found else loss


def _smoothed_one(loss: Any, smoothing: float) -> Any:
    if isinstance(loss, (keras.losses.CategoricalCrossentropy, keras.losses.BinaryCrossentropy)):
        return type(loss).from_config({**loss.get_config(), "label_smoothing": smoothing})
    if isinstance(loss, keras.losses.SparseCategoricalCrossentropy):
        config = loss.get_config()
        if config.get("ignore_class") is None:
            return SmoothedSparseCrossentropy(smoothing, from_logits=config["from_logits"], reduction=config["reduction"])
    return None


def _soft_one(loss: Any) -> Any:
    if isinstance(loss, (keras.losses.CategoricalCrossentropy, keras.losses.BinaryCrossentropy)):
        return loss
    if isinstance(loss, SmoothedSparseCrossentropy):
        return keras.losses.CategoricalCrossentropy(
            from_logits=loss.from_logits, label_smoothing=loss.smoothing, reduction=loss.reduction
        )
    if isinstance(loss, keras.losses.SparseCategoricalCrossentropy):
        config = loss.get_config()
        if config.get("ignore_class") is None:
            return keras.losses.CategoricalCrossentropy(from_logits=config["from_logits"], reduction=config["reduction"])
    if isinstance(loss, (keras.losses.MeanSquaredError, keras.losses.MeanAbsoluteError, keras.losses.KLDivergence)):
        return loss
    return None
