"""What a file may name: the classes and functions of Keras that are safe to make from a configuration, and how large they may be.

An allow-list, since a list of what is forbidden needs repair after repair: a name that doesn't stand here is asked for in
`custom_objects`, never looked up. Left out on purpose: `Lambda` (code), `TFSMLayer`, `TorchModuleWrapper`, `JaxLayer`,
`FlaxLayer`
(they open other files or hold functions). `elements` foretells how many numbers a layer will allocate when it is built, so that
`Dense(10**9)` is refused before the memory goes and not while it does. Pure: standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = [
    "ACTIVATIONS",
    "CONSTRAINTS",
    "DTYPES",
    "INITIALIZERS",
    "LAYERS",
    "OPERATION_LAYERS",
    "REGULARIZERS",
    "RETIRED",
    "elements",
    "inner_layers",
    "size_product",
]

#: Layers of Keras 3 that may be made from a file.
LAYERS: frozenset[str] = frozenset(
    """
    Activation ActivityRegularization AdaptiveAveragePooling1D AdaptiveAveragePooling2D AdaptiveAveragePooling3D
    AdaptiveMaxPooling1D AdaptiveMaxPooling2D AdaptiveMaxPooling3D Add AdditiveAttention AlphaDropout Attention AugMix
    AutoContrast Average AveragePooling1D AveragePooling2D AveragePooling3D BatchNormalization Bidirectional
    CategoryEncoding CenterCrop Concatenate Conv1D Conv1DTranspose Conv2D Conv2DTranspose Conv3D Conv3DTranspose
    ConvLSTM1D ConvLSTM2D ConvLSTM3D Cropping1D Cropping2D Cropping3D CutMix Dense DepthwiseConv1D DepthwiseConv2D
    Discretization Dot Dropout ELU EinsumDense Embedding Equalization Flatten GRU GRUCell GaussianDropout GaussianNoise
    GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D GlobalMaxPooling1D GlobalMaxPooling2D
    GlobalMaxPooling3D GroupNormalization GroupQueryAttention HashedCrossing Hashing Identity InputLayer IntegerLookup
    LSTM LSTMCell LayerNormalization LeakyReLU Masking MaxNumBoundingBoxes MaxPooling1D MaxPooling2D MaxPooling3D
    Maximum MelSpectrogram Minimum MixUp MultiHeadAttention Multiply Normalization PReLU Permute Pipeline
    RMSNormalization RNN RandAugment RandomBrightness RandomColorDegeneration RandomColorJitter RandomContrast
    RandomCrop RandomElasticTransform RandomErasing RandomFlip RandomGaussianBlur RandomGrayscale RandomHue RandomInvert
    RandomPerspective RandomPosterization RandomRotation RandomSaturation RandomSharpness RandomShear RandomTranslation
    RandomZoom ReLU RepeatVector Rescaling Reshape Resizing ReversibleEmbedding STFTSpectrogram SeparableConv1D
    SeparableConv2D SimpleRNN SimpleRNNCell Softmax Solarization SpatialDropout1D SpatialDropout2D SpatialDropout3D
    SpectralNormalization StackedRNNCells StringLookup Subtract TextVectorization TimeDistributed UnitNormalization
    UpSampling1D UpSampling2D UpSampling3D ZeroPadding1D ZeroPadding2D ZeroPadding3D
    """.split()  # noqa: SIM905 - a list of names reads better without quotes
)

#: Layers of Keras 1 and 2 that Keras 3 has no counterpart for; `retired_layers` has them.
RETIRED: frozenset[str] = frozenset(
    ("Highway", "LayerScale", "LocallyConnected1D", "LocallyConnected2D", "MaxoutDense", "ParametricSoftplus", "SReLU")
)

ACTIVATIONS: frozenset[str] = frozenset(
    """
    celu elu exponential gelu glu hard_shrink hard_sigmoid hard_silu hard_tanh leaky_relu linear log_sigmoid log_softmax
    mish relu relu6 selu sigmoid silu soft_shrink softmax softplus softsign sparse_plus sparse_sigmoid sparsemax
    squareplus tanh tanh_shrink threshold
    """.split()  # noqa: SIM905 - a list of names reads better without quotes
)

INITIALIZERS: frozenset[str] = frozenset(
    """
    Constant GlorotNormal GlorotUniform HeNormal HeUniform Identity LecunNormal LecunUniform Ones Orthogonal
    RandomNormal RandomUniform TruncatedNormal VarianceScaling Zeros
    """.split()  # noqa: SIM905 - a list of names reads better without quotes
)

REGULARIZERS: frozenset[str] = frozenset(("L1", "L1L2", "L2", "OrthogonalRegularizer"))

CONSTRAINTS: frozenset[str] = frozenset(("MaxNorm", "MinMaxNorm", "NonNeg", "UnitNorm"))

#: Dtypes, and policies by their names.
DTYPES: frozenset[str] = frozenset(
    """
    bfloat16 float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool string mixed_float16
    mixed_bfloat16
    """.split()  # noqa: SIM905 - a list of names reads better without quotes
)

#: Classes by which Keras 2 and tf_keras wrote the call of a TensorFlow function between layers.
OPERATION_LAYERS: frozenset[str] = frozenset(
    ("TFOpLambda", "SlicingOpLambda", "TensorFlowOpLayer", "ClassMethod", "InstanceMethod", "InstanceProperty")
)

_CONVOLUTIONS = frozenset(f"Conv{rank}D{kind}" for rank in (1, 2, 3) for kind in ("", "Transpose"))

Shape = Sequence[Any]


def inner_layers(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The layers, in the plain form, that a layer's configuration holds: a wrapper's, a cell, an activation that is a layer."""
    for value in config.values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping) and "said" in item and isinstance(item.get("config"), Mapping):
                yield item


def _int(value: Any, default: int = 0) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def _product(values: Any) -> int:
    listed = values if isinstance(values, (list, tuple)) else [values]
    return math.prod(abs(_int(value, 1)) for value in listed)


def _kernel(config: Mapping[str, Any], rank: int) -> int:
    size = config.get("kernel_size", 1)
    return _product(size) if isinstance(size, (list, tuple)) else abs(_int(size, 1)) ** rank


def size_product(config: Mapping[str, Any]) -> int:
    """The product of all whole numbers in a configuration: more than any layer that isn't in `elements`' table could allocate."""
    total = 1
    for key, value in config.items():
        if key == "seed" or key.endswith(("_value", "_token", "axis", "axes")):
            continue
        for number in value if isinstance(value, (list, tuple)) else [value]:
            total *= max(abs(_int(number, 1)), 1)
    return total


def elements(class_name: str, config: Mapping[str, Any], shape: Shape) -> int | None:
    """How many numbers a layer's weights and states will hold once it is built.

    Args:
        class_name: The class, of Keras 3.
        config: Its arguments.
        shape: Of its first input, batch first; None where a length isn't known.

    Returns:
        The number, at least; or None for a class that isn't in the table.
    """
    if class_name not in LAYERS | RETIRED:
        return None
    channels_first = config.get("data_format") == "channels_first"
    last = abs(_int(shape[1 if channels_first and len(shape) > 1 else -1], 1)) if len(shape) else 1
    units, filters = _int(config.get("units")), _int(config.get("filters"))
    if class_name in ("Dense", "MaxoutDense", "Highway"):
        return last * max(units, last if class_name == "Highway" else 0) * max(_int(config.get("nb_feature"), 1), 1) + units
    if class_name in ("LSTM", "LSTMCell", "GRU", "GRUCell", "SimpleRNN", "SimpleRNNCell"):
        gates = {"L": 4, "G": 3, "S": 1}[class_name[0]]
        states = 2 * units * _int(shape[0] if len(shape) else 1, 1) if config.get("stateful") else 0
        return gates * units * (last + units + 1) + states
    if class_name.startswith("ConvLSTM"):
        rank = int(class_name[-2])
        states = 2 * filters * _product([s for s in shape if s is not None]) if config.get("stateful") else 0
        return 4 * filters * _kernel(config, rank) * (last + filters) + states
    if class_name in _CONVOLUTIONS:
        rank = int(class_name[4])
        return _kernel(config, rank) * max(last // max(_int(config.get("groups"), 1), 1), 1) * filters + filters
    if class_name.startswith(("Depthwise", "Separable")):
        deep = last * max(_int(config.get("depth_multiplier"), 1), 1)
        return _kernel(config, int(class_name[-2])) * deep + deep * filters
    if class_name.startswith("LocallyConnected"):
        places = _product([s for s in shape[1:] if s is not None])
        return places * _kernel(config, int(class_name[-2])) * filters
    if class_name in ("Embedding", "ReversibleEmbedding"):
        return _int(config.get("input_dim")) * _int(config.get("output_dim"))
    if class_name in ("MultiHeadAttention", "GroupQueryAttention"):
        heads = _int(config.get("num_heads"), 1) * max(_int(config.get("key_dim")), _int(config.get("value_dim")))
        wide = _int(config.get("num_query_heads"), 1) * _int(config.get("head_dim"))
        return 4 * last * max(heads, wide)
    if class_name == "EinsumDense":
        return _product(config.get("output_shape", 1))
    if class_name in ("PReLU", "SReLU", "ParametricSoftplus"):
        return _product([s for s in shape[1:] if s is not None])
    if class_name in ("BatchNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization", "Normalization"):
        return last
    return None
