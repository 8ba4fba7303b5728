"""Layers and an activation that Keras 1 and 2 had and Keras 3 has not, so that models that use them open again.

Each computes what the original did and holds its weights in the same shapes and order, so old files fit without a change. They
are
registered with Keras under `transferkit>…`: a model that has one is saved and loaded by Keras wherever transferkit is imported.
After Keras 1.2.2 and 2.3 (`layers.core`, `layers.local`, `layers.advanced_activations`, `activations`). May import Keras.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from transferkit._keras import keras

__all__ = [
    "Highway",
    "LayerScale",
    "LocallyConnected1D",
    "LocallyConnected2D",
    "MaxoutDense",
    "ParametricSoftplus",
    "SReLU",
    "hard_sigmoid_of_keras_2",
]

ops = keras.ops
_registered = keras.saving.register_keras_serializable(package="transferkit")


@_registered  # type: ignore[untyped-decorator]
def hard_sigmoid_of_keras_2(x: Any) -> Any:
    """`hard_sigmoid` with the slope it had in Keras 1 and 2.

    Args:
        x: A tensor.

    Returns:
        clip(0.2 x + 0.5, 0, 1), of the same shape and dtype.
    """
    return ops.clip(0.2 * x + 0.5, 0.0, 1.0)


class _KernelLayer(keras.layers.Layer):
    """What the dense and local layers share: their objects and their configuration."""

    _SETTINGS: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        activation: Any = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.activation = keras.activations.get(activation)
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config()
        config |= {name: getattr(self, name) for name in self._SETTINGS}
        for key in ("kernel_initializer", "bias_initializer"):
            config[key] = keras.initializers.serialize(getattr(self, key))
        for key in ("kernel_regularizer", "bias_regularizer"):
            config[key] = keras.regularizers.serialize(getattr(self, key))
        for key in ("kernel_constraint", "bias_constraint"):
            config[key] = keras.constraints.serialize(getattr(self, key))
        return config | {"activation": keras.activations.serialize(self.activation), "use_bias": self.use_bias}

    def _weight(self, kind: str, shape: Sequence[int], name: str | None = None) -> Any:
        return self.add_weight(
            name=name or kind,
            shape=tuple(shape),
            initializer=getattr(self, f"{kind}_initializer"),
            regularizer=getattr(self, f"{kind}_regularizer"),
            constraint=getattr(self, f"{kind}_constraint"),
        )


@final
@_registered
class MaxoutDense(_KernelLayer):
    """The largest of several linear maps, per unit (Goodfellow et al., 2013); Keras 1.

    Args:
        units: The number of outputs.
        nb_feature: The number of maps.
        arguments: As `keras.layers.Dense` takes them; without an activation.
    """

    _SETTINGS = ("units", "nb_feature")

    def __init__(self, units: int, nb_feature: int = 4, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.units, self.nb_feature = units, nb_feature

    def build(self, input_shape: Sequence[int]) -> None:
        self.kernel = self._weight("kernel", (self.nb_feature, input_shape[-1], self.units))
        self.bias = self._weight("bias", (self.nb_feature, self.units)) if self.use_bias else None

    def call(self, inputs: Any) -> Any:
        maps = ops.einsum("...i,kio->...ko", inputs, self.kernel)
        return ops.max(maps if self.bias is None else maps + self.bias, axis=-2)


@final
@_registered
class Highway(_KernelLayer):
    """A dense layer that a gate mixes with its input (Srivastava et al., 2015); Keras 1.

    Args:
        arguments: As `keras.layers.Dense` takes them, without units: there are as many as inputs.
    """

    def build(self, input_shape: Sequence[int]) -> None:
        width = input_shape[-1]
        self.kernel = self._weight("kernel", (width, width))
        self.carry_kernel = self.add_weight(name="carry_kernel", shape=(width, width), initializer=self.kernel_initializer)
        self.bias = self._weight("bias", (width,)) if self.use_bias else None
        self.carry_bias = self.add_weight(name="carry_bias", shape=(width,), initializer="ones") if self.use_bias else None

    def call(self, inputs: Any) -> Any:
        gate, change = ops.matmul(inputs, self.carry_kernel), ops.matmul(inputs, self.kernel)
        if self.use_bias:
            gate, change = gate + self.carry_bias, change + self.bias
        gate = ops.sigmoid(gate)
        return self.activation(change) * gate + (1 - gate) * inputs


class _LocallyConnected(_KernelLayer):
    """A convolution whose kernel isn't shared between places: one matrix (patch, filters) for each."""

    _RANK = 0
    _SETTINGS = ("filters", "kernel_size", "strides", "padding", "data_format")

    def __init__(
        self,
        filters: int,
        kernel_size: Any,
        *,
        strides: Any = 1,
        padding: str = "valid",
        data_format: str | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.filters = filters
        self.kernel_size, self.strides = (
            (value,) * self._RANK if isinstance(value, int) else tuple(value) for value in (kernel_size, strides)
        )
        if padding != "valid":
            raise ValueError(f"{type(self).__name__} has the padding 'valid' only; given: {padding!r}")
        self.padding, self.data_format = padding, data_format or "channels_last"

    def _places(self, input_shape: Sequence[int]) -> tuple[tuple[int, ...], int]:
        first = self.data_format == "channels_first"
        lengths, channels = (input_shape[2:], input_shape[1]) if first else (input_shape[1:-1], input_shape[-1])
        if None in lengths:
            raise ValueError(f"{type(self).__name__} needs an input of known size; given: {tuple(input_shape)}")
        return tuple((n - k) // s + 1 for n, k, s in zip(lengths, self.kernel_size, self.strides, strict=True)), channels

    def build(self, input_shape: Sequence[int]) -> None:
        places, channels = self._places(input_shape)
        count, patch = 1, channels
        for n, k in zip(places, self.kernel_size, strict=True):
            count, patch = count * n, patch * k
        self.kernel = self._weight("kernel", (count, patch, self.filters))
        self.bias = self._weight("bias", (*places, self.filters)) if self.use_bias else None

    def compute_output_shape(self, input_shape: Sequence[int]) -> tuple[Any, ...]:
        places, _ = self._places(input_shape)
        return (
            (input_shape[0], self.filters, *places)
            if self.data_format == "channels_first"
            else (input_shape[0], *places, self.filters)
        )

    def call(self, inputs: Any) -> Any:
        first = self.data_format == "channels_first"
        places, channels = self._places(inputs.shape)
        last = ops.moveaxis(inputs, 1, -1) if first else inputs
        patches = [last]
        for axis, (n, k, s) in enumerate(zip(places, self.kernel_size, self.strides, strict=True), start=1):
            # For each axis in turn: one shifted view for each offset within the kernel.
            patches = [
                view[(slice(None),) * axis + (slice(offset, offset + (n - 1) * s + 1, s),)]
                for view in patches
                for offset in range(k)
            ]
        stacked = ops.stack(patches, axis=-1 if first else -2)  # Keras ordered a patch as its data was ordered
        count = 1
        for n in places:
            count *= n
        flat = ops.reshape(stacked, (-1, count, channels * len(patches)))
        outputs = ops.reshape(ops.einsum("npi,pio->npo", flat, self.kernel), (-1, *places, self.filters))
        if first:
            outputs = ops.moveaxis(outputs, -1, 1)
        if self.bias is not None:
            # Keras reshaped the bias of channels_first from its memory, and did not transpose it.
            outputs = outputs + (ops.reshape(self.bias, (self.filters, *places)) if first else self.bias)
        return self.activation(outputs)


@final
@_registered
class LocallyConnected1D(_LocallyConnected):
    """A 1-D convolution whose kernel isn't shared between places; Keras 1 and 2.

    Args:
        filters: The number of outputs at each place.
        kernel_size: The length of the kernel.
        strides: The step between places.
        padding: "valid" only.
        data_format: "channels_last" or "channels_first".
        arguments: As `keras.layers.Conv1D` takes them.
    """

    _RANK = 1


@final
@_registered
class LocallyConnected2D(_LocallyConnected):
    """A 2-D convolution whose kernel isn't shared between places; Keras 1 and 2.

    Args:
        filters: The number of outputs at each place.
        kernel_size: The height and width of the kernel.
        strides: The steps between places.
        padding: "valid" only.
        data_format: "channels_last" or "channels_first".
        arguments: As `keras.layers.Conv2D` takes them.
    """

    _RANK = 2


@final
@_registered
class LayerScale(keras.layers.Layer):
    """A learned factor for each channel (Touvron et al., 2021), as keras.applications' ConvNeXt has it inside.

    Args:
        init_values: Where the factors began.
        projection_dim: The number of channels.
    """

    def __init__(self, init_values: float, projection_dim: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.init_values, self.projection_dim = init_values, projection_dim

    def build(self, input_shape: Sequence[int]) -> None:  # noqa: ARG002 - it is told the channels
        initializer = keras.initializers.Constant(self.init_values)
        self.gamma = self.add_weight(name="gamma", shape=(self.projection_dim,), initializer=initializer)

    def call(self, inputs: Any) -> Any:
        return inputs * self.gamma

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "init_values": self.init_values, "projection_dim": self.projection_dim}


class _ShapedActivation(keras.layers.Layer):
    """An activation with parameters of the input's shape, shared along some axes."""

    _PARAMETERS: tuple[str, ...] = ()

    def __init__(self, *, shared_axes: Any = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.supports_masking = True
        axes = shared_axes if isinstance(shared_axes, (list, tuple)) else [shared_axes]
        self.shared_axes = [axis for axis in axes if axis is not None]

    def build(self, input_shape: Sequence[int]) -> None:
        shape = [1 if axis in self.shared_axes else length for axis, length in enumerate(input_shape)][1:]
        for name in self._PARAMETERS:
            setattr(self, name, self.add_weight(name=name, shape=tuple(shape), initializer="zeros"))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "shared_axes": self.shared_axes or None}


@final
@_registered
class ParametricSoftplus(_ShapedActivation):
    """alpha · softplus(beta · x) with learned alpha and beta; Keras 1.

    Args:
        alpha_init: Where alpha began.
        beta_init: Where beta began.
        shared_axes: The axes along which the parameters are shared, the batch being 0.
    """

    _PARAMETERS = ("alphas", "betas")

    def __init__(self, alpha_init: float = 0.2, beta_init: float = 5.0, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.alpha_init, self.beta_init = float(alpha_init), float(beta_init)

    def build(self, input_shape: Sequence[int]) -> None:
        super().build(input_shape)
        self.alphas.assign(ops.full(self.alphas.shape, self.alpha_init))
        self.betas.assign(ops.full(self.betas.shape, self.beta_init))

    def call(self, inputs: Any) -> Any:
        return ops.softplus(self.betas * inputs) * self.alphas

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "alpha_init": self.alpha_init, "beta_init": self.beta_init}


@final
@_registered
class SReLU(_ShapedActivation):
    """The S-shaped rectified linear unit (Jin et al., 2015); Keras 1.

    Args:
        t_left_init: Of the left threshold; kept for the configuration.
        a_left_init: Of the left slope.
        t_right_init: Of the right threshold.
        a_right_init: Of the right slope.
        shared_axes: The axes along which the parameters are shared, the batch being 0.
    """

    _PARAMETERS = ("t_left", "a_left", "t_right", "a_right")

    def __init__(
        self,
        t_left_init: str = "zero",
        a_left_init: str = "glorot_uniform",
        t_right_init: str = "glorot_uniform",
        a_right_init: str = "one",
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self._said = {
            "t_left_init": t_left_init, "a_left_init": a_left_init, "t_right_init": t_right_init, "a_right_init": a_right_init,
        }  # fmt: skip

    def call(self, inputs: Any) -> Any:
        right = self.t_left + ops.abs(self.t_right)
        below = ops.where(inputs < self.t_left, self.t_left + self.a_left * (inputs - self.t_left), inputs)
        return ops.where(inputs > right, right + self.a_right * (inputs - right), below)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._said}
