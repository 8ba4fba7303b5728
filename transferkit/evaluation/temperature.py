"""Temperature scaling that ends in a Keras model: the head's weights are divided by the temperature.

softmax((Wx + b) / T) is a head with weights W / T and b / T. So the calibrated model has the layers, the loss and the file
format of the one it comes from, and nothing has to be installed or remembered to use it (Guo et al., ICML 2017, section 4.2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from transferkit._keras import keras
from transferkit._table import Table, Tabular
from transferkit.building.heads import heads_of
from transferkit.errors import ModelError
from transferkit.evaluation.calibration import fit_temperature, log_probabilities
from transferkit.evaluation.metrics import statistic_of
from transferkit.evaluation.rows import FloatArray, Rows

__all__ = ["Temperature", "temperature_of"]


@dataclass(frozen=True)
class Temperature(Tabular):
    """A temperature and what it does to the rows it was fitted on.

    Args:
        value: What logits are divided by; above 1 for a model too sure of itself.
        log_loss: Before and after.
        calibration_error: Before and after (15 bins of equal width).
        rows: How many rows it was fitted on.
        output: The output it belongs to; empty for a model's only one.
    """

    value: float
    log_loss: tuple[float, float]
    calibration_error: tuple[float, float]
    rows: int
    output: str = ""

    def __float__(self) -> float:
        return self.value

    def table(self) -> Table:
        """The figures before and after."""
        body = [
            ("log_loss", f"{self.log_loss[0]:.4f}", f"{self.log_loss[1]:.4f}"),
            ("ece", f"{self.calibration_error[0]:.4f}", f"{self.calibration_error[1]:.4f}"),
        ]
        note = "fitted on these rows: judge the calibrated model on others"
        title = f"temperature {self.value:.4f}, from {self.rows:,} rows"
        return Table(("metric", ">before", ">after"), body, title=title, notes=(note,))

    def to_dict(self) -> dict[str, Any]:
        """The temperature and its effect as plain values."""
        return {
            "value": self.value,
            "log_loss": list(self.log_loss),
            "calibration_error": list(self.calibration_error),
            "rows": self.rows,
        }

    def records(self) -> list[dict[str, Any]]:
        """One dict a metric."""
        both = {"log_loss": self.log_loss, "ece": self.calibration_error}
        return [{"metric": name, "before": before, "after": after} for name, (before, after) in both.items()]

    def apply(self, model: Any) -> Any:
        """Gives a copy of the model with the temperature in its head; the model itself stays as it is.

        Args:
            model: The model that was evaluated: functional or Sequential, its head a layer with a kernel and, at most, a bias.

        Returns:
            A Keras model, not compiled.

        Raises:
            ModelError: when the head can't take the temperature.
        """
        asked = f"Putting the temperature {self.value:.4g} into the model {model.name!r}."
        try:
            calibrated = keras.models.clone_model(model)
            calibrated.set_weights(model.get_weights())
        except (NotImplementedError, TypeError, ValueError) as error:
            raise ModelError(
                asked,
                found=f"a model that can't be copied ({error})",
                cause="a subclassed model, whose layers Keras can't read",
                fix="divide its logits by the temperature yourself",
            ) from error
        heads = heads_of(calibrated)
        at = next((i for i, head in enumerate(heads) if head.output == self.output), 0)
        layer = heads[at].layer
        trainable = {id(weight) for weight in layer.weights}
        expected = {id(weight) for weight in (getattr(layer, "kernel", None), getattr(layer, "bias", None)) if weight is not None}
        inner = getattr(getattr(layer, "activation", None), "__name__", "linear")
        if trainable != expected or (inner not in ("linear", heads[at].activation)):
            raise ModelError(
                asked,
                found=f"the head {layer.name!r}, a {type(layer).__name__} with weights other than a kernel and a bias",
                fix="end the model with a Dense layer, or divide its logits by the temperature yourself",
            )
        before = _outputs_of_ones(calibrated, at)
        for weight in (layer.kernel, layer.bias if getattr(layer, "use_bias", False) else None):
            if weight is not None:
                weight.assign(weight / self.value)
        after = _outputs_of_ones(calibrated, at)
        wanted = _tempered(before, heads[at].activation, self.value)
        if not np.allclose(after, wanted, rtol=1e-3, atol=1e-4):
            raise ModelError(
                asked,
                found=f"outputs that don't follow when the weights of {layer.name!r} are divided",
                cause="a layer between the head and the output that isn't only an activation",
                fix="divide the logits by the temperature yourself",
            )
        return calibrated


def _outputs_of_ones(model: Any, at: int) -> FloatArray:
    """An output for inputs of ones, which fit pictures, tables and token indices alike."""
    wanted = model.inputs[0] if isinstance(model, keras.Sequential) else model.input

    def ones_like(tensor: Any) -> Any:
        return np.ones((2, *(2 if size is None else size for size in tensor.shape[1:])), dtype=tensor.dtype)

    ones = keras.tree.map_structure(ones_like, wanted)
    outputs = keras.tree.flatten(model(ones, training=False))
    return np.asarray(outputs[at], dtype=np.float64)


def _tempered(outputs: FloatArray, activation: str, temperature: float) -> FloatArray:
    if activation == "softmax":
        logits = log_probabilities(outputs) / temperature
        e = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return np.asarray(e / e.sum(axis=-1, keepdims=True))
    if activation == "sigmoid":
        p = np.clip(outputs, 1e-12, 1 - 1e-12)
        return np.asarray(1 / (1 + np.exp(-np.log(p / (1 - p)) / temperature)))
    return outputs / temperature


def temperature_of(rows: Rows, *, output: str = "") -> Temperature:
    """Fits one temperature to all rows; for labels that don't exclude each other, to all labels together."""
    before = rows.predictions
    if rows.kind == "multiclass":
        logits, labels, weight = log_probabilities(before), rows.labels, rows.weight
    else:
        p = np.clip(before.reshape(-1), 1e-15, 1 - 1e-15)
        logits = np.stack([np.zeros_like(p), np.log(p) - np.log1p(-p)], axis=1)
        labels = rows.labels.reshape(-1)
        weight = None if rows.weight is None else np.repeat(rows.weight, len(p) // len(rows))
    value = fit_temperature(logits, labels, weight)
    tempered = _tempered(before, "softmax" if rows.kind == "multiclass" else "sigmoid", value)
    changed = replace(rows, predictions=tempered)
    ones = np.ones((1, len(rows)))

    def figure(name: str, of: Rows) -> float:
        return float(statistic_of(name, of)(ones)[0])

    return Temperature(
        value,
        log_loss=(figure("log_loss", rows), figure("log_loss", changed)),
        calibration_error=(figure("ece", rows), figure("ece", changed)),
        rows=len(rows),
        output=output,
    )
