"""What Keras 1, Keras 2 and tf_keras called things: classes and arguments that have another name now, or none.

The facts are those of the `get_config` methods of Keras 1.0 to 2.3, tf.keras 1.13 to 2.15 and tf_keras, of Keras 2's own
translation of Keras 1 arguments, and of the constructors of Keras 3. Tables only; imports the standard library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "ACTIVATIONS",
    "ARGUMENTS",
    "CLASSES",
    "CONSTRAINTS",
    "DROPPED",
    "FAMILIES",
    "INITIALIZERS",
    "MERGE_MODES",
    "REGULARIZERS",
    "WITHOUT_EFFECT",
]

#: Class as an old file words it -> class of Keras 3.
CLASSES: Mapping[str, str] = {
    "AtrousConv1D": "Conv1D",
    "AtrousConv2D": "Conv2D",
    "AtrousConvolution1D": "Conv1D",
    "AtrousConvolution2D": "Conv2D",
    "AvgPool1D": "AveragePooling1D",
    "AvgPool2D": "AveragePooling2D",
    "AvgPool3D": "AveragePooling3D",
    "BatchNormalizationV1": "BatchNormalization",
    "BatchNormalizationV2": "BatchNormalization",
    "Convolution1D": "Conv1D",
    "Convolution1DTranspose": "Conv1DTranspose",
    "Convolution2D": "Conv2D",
    "Convolution2DTranspose": "Conv2DTranspose",
    "Convolution3D": "Conv3D",
    "Convolution3DTranspose": "Conv3DTranspose",
    "CuDNNGRU": "GRU",
    "CuDNNLSTM": "LSTM",
    "Deconv2D": "Conv2DTranspose",
    "Deconv3D": "Conv3DTranspose",
    "Deconvolution2D": "Conv2DTranspose",
    "Deconvolution3D": "Conv3DTranspose",
    "DepthwiseConvolution2D": "DepthwiseConv2D",
    "GRUCellV1": "GRUCell",
    "GRUCellV2": "GRUCell",
    "GRUV1": "GRU",
    "GRUV2": "GRU",
    "GlobalAvgPool1D": "GlobalAveragePooling1D",
    "GlobalAvgPool2D": "GlobalAveragePooling2D",
    "GlobalAvgPool3D": "GlobalAveragePooling3D",
    "GlobalMaxPool1D": "GlobalMaxPooling1D",
    "GlobalMaxPool2D": "GlobalMaxPooling2D",
    "GlobalMaxPool3D": "GlobalMaxPooling3D",
    "IntegerLookupV1": "IntegerLookup",
    "LSTMCellV1": "LSTMCell",
    "LSTMCellV2": "LSTMCell",
    "LSTMV1": "LSTM",
    "LSTMV2": "LSTM",
    "MaxPool1D": "MaxPooling1D",
    "MaxPool2D": "MaxPooling2D",
    "MaxPool3D": "MaxPooling3D",
    "SeparableConvolution1D": "SeparableConv1D",
    "SeparableConvolution2D": "SeparableConv2D",
    "StringLookupV1": "StringLookup",
    "SyncBatchNormalization": "BatchNormalization",
    "TextVectorizationV1": "TextVectorization",
    "ThresholdedReLU": "ReLU",
    "TimeDistributedDense": "Dense",
    "UnifiedGRU": "GRU",
    "UnifiedLSTM": "LSTM",
}

#: The `mode` of Keras 1's `Merge` -> class of Keras 3.
MERGE_MODES: Mapping[str, str] = {
    "sum": "Add",
    "mul": "Multiply",
    "concat": "Concatenate",
    "ave": "Average",
    "max": "Maximum",
    "dot": "Dot",
}

_KERNEL = {
    "init": "kernel_initializer",
    "W_regularizer": "kernel_regularizer",
    "b_regularizer": "bias_regularizer",
    "W_constraint": "kernel_constraint",
    "b_constraint": "bias_constraint",
    "bias": "use_bias",
}
_SPACE = {"border_mode": "padding", "dim_ordering": "data_format"}
_CONVOLUTION = {
    **_KERNEL,
    **_SPACE,
    "nb_filter": "filters",
    "filter_length": "kernel_size",
    "subsample": "strides",
    "subsample_length": "strides",
    "atrous_rate": "dilation_rate",
}
_RECURRENT = {
    **_KERNEL,
    "output_dim": "units",
    "inner_init": "recurrent_initializer",
    "inner_activation": "recurrent_activation",
    "U_regularizer": "recurrent_regularizer",
    "U_constraint": "recurrent_constraint",
    "dropout_W": "dropout",
    "dropout_U": "recurrent_dropout",
}
_SEPARABLE = {
    **{old: new for old, new in _CONVOLUTION.items() if not old.startswith("W_") and old != "init"},
    "init": "depthwise_initializer",
}

#: Which renames apply to a class of Keras 3 (by its own name).
FAMILIES: Mapping[str, str] = {
    **dict.fromkeys(("Dense", "MaxoutDense", "Highway"), "dense"),
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D", "Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), "convolution"),
    **dict.fromkeys(("LocallyConnected1D", "LocallyConnected2D"), "convolution"),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D", "DepthwiseConv1D", "DepthwiseConv2D"), "separable"),
    **dict.fromkeys(("LSTM", "GRU", "SimpleRNN", "LSTMCell", "GRUCell", "SimpleRNNCell"), "recurrent"),
    **dict.fromkeys(("ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"), "recurrent convolution"),
    **dict.fromkeys((f"{kind}Pooling{n}D" for kind in ("Max", "Average") for n in (1, 2, 3)), "pooling"),
    **dict.fromkeys((f"Global{kind}Pooling{n}D" for kind in ("Max", "Average") for n in (1, 2, 3)), "space"),
    **dict.fromkeys((f"{kind}{n}D" for kind in ("UpSampling", "ZeroPadding", "Cropping") for n in (1, 2, 3)), "space"),
    **dict.fromkeys(("Dropout", "GaussianDropout", "AlphaDropout", "SpatialDropout1D"), "dropout"),
    **dict.fromkeys(("SpatialDropout2D", "SpatialDropout3D"), "dropout"),
    "BatchNormalization": "normalization",
    "CategoryEncoding": "categories",
    "Embedding": "embedding",
    "GaussianNoise": "noise",
    "IntegerLookup": "lookup",
    "LeakyReLU": "leaky",
    "PReLU": "prelu",
    "ReLU": "relu",
    "StringLookup": "lookup",
    "ParametricSoftplus": "softplus",
}

#: Family -> old argument -> argument of Keras 3.
ARGUMENTS: Mapping[str, Mapping[str, str]] = {
    "categories": {"max_tokens": "num_tokens"},
    "convolution": _CONVOLUTION,
    "dense": {**_KERNEL, "output_dim": "units"},
    "dropout": {"p": "rate", "dim_ordering": "data_format"},
    "embedding": {
        "init": "embeddings_initializer",
        "W_regularizer": "embeddings_regularizer",
        "W_constraint": "embeddings_constraint",
    },
    "leaky": {"alpha": "negative_slope"},
    "lookup": {"max_values": "max_tokens", "max_size": "max_tokens", "num_oov_tokens": "num_oov_indices"},
    "noise": {"sigma": "stddev"},
    "normalization": {"beta_init": "beta_initializer", "gamma_init": "gamma_initializer"},
    "pooling": {**_SPACE, "pool_length": "pool_size", "stride": "strides"},
    "prelu": {"init": "alpha_initializer"},
    "recurrent": _RECURRENT,
    "recurrent convolution": {**_CONVOLUTION, **_RECURRENT},
    "relu": {"theta": "threshold"},
    "separable": _SEPARABLE,
    "softplus": {},
    "space": {**_SPACE, "length": "size"},
}

#: Arguments that say where an input comes from or how a layer is computed, not what it computes. Class -> names; "" is any class.
DROPPED: Mapping[str, frozenset[str]] = {
    "": frozenset(
        {"batch_input_shape", "batch_size", "dynamic", "input_dim", "input_dtype", "input_length", "input_shape", "weights"}
    ),
    "BatchNormalization": frozenset({"adjustment", "fused", "virtual_batch_size"}),
    "Bidirectional": frozenset(
        {"return_sequences", "go_backwards", "stateful", "unroll", "implementation", "zero_output_for_mask"}
    ),
    "Embedding": frozenset({"dropout", "sparse"}),
    "Conv1DTranspose": frozenset({"groups", "output_shape"}),
    "Conv2DTranspose": frozenset({"groups", "output_shape"}),
    "Conv3DTranspose": frozenset({"groups", "output_shape"}),
    "DepthwiseConv1D": frozenset({"filters", "groups", "kernel_initializer", "kernel_regularizer", "kernel_constraint"}),
    "DepthwiseConv2D": frozenset({"filters", "groups", "kernel_initializer", "kernel_regularizer", "kernel_constraint"}),
    **dict.fromkeys(
        ("ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"),
        frozenset({"consume_less", "groups", "implementation", "num_constants", "unroll", "zero_output_for_mask"}),
    ),
    "Discretization": frozenset({"max_bins"}),
    **dict.fromkeys(
        ("IntegerLookup", "StringLookup", "TextVectorization"),
        frozenset({"has_input_vocabulary", "has_static_table", "idf_weights_size", "vocab_size", "vocabulary_size"}),
    ),
    "MultiHeadAttention": frozenset({"query_shape", "key_shape", "value_shape"}),
    "SeparableConv1D": frozenset({"groups", "kernel_initializer", "kernel_regularizer", "kernel_constraint"}),
    "SeparableConv2D": frozenset({"groups", "kernel_initializer", "kernel_regularizer", "kernel_constraint"}),
    "SpatialDropout1D": frozenset({"noise_shape", "trainable", "data_format"}),
    "SpatialDropout2D": frozenset({"noise_shape", "trainable"}),
    "SpatialDropout3D": frozenset({"noise_shape", "trainable"}),
    **dict.fromkeys(
        ("RNN", "LSTM", "GRU", "SimpleRNN", "LSTMCell", "GRUCell", "SimpleRNNCell"),
        frozenset({"consume_less", "implementation", "num_constants"}),
    ),
}

#: Arguments Keras 3 has no counterpart for, which change nothing while they hold one of these values.
WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "arguments": ({}, None),
    "causal": (False, None),
    "rms_scaling": (False, None),
    "time_major": (False, None),
    "ragged": (False, None),
    "output_mask": (None,),
    "constants": (None, []),
    "mode": (0,),
    "activity_regularizer": (None,),
    "groups": (1,),
    "implementation": (1,),
    "noise_shape": (None,),
    "return_attention_scores": (False,),
    "auto_vectorize": (False, True, None),
}

#: Initializers by every name they had -> class of Keras 3 and its arguments where the name says them.
INITIALIZERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "zero": ("Zeros", {}),
    "zeros": ("Zeros", {}),
    "one": ("Ones", {}),
    "ones": ("Ones", {}),
    "uniform": ("RandomUniform", {}),
    "normal": ("RandomNormal", {}),
    "gaussian": ("RandomNormal", {}),
    "random_uniform": ("RandomUniform", {}),
    "random_normal": ("RandomNormal", {}),
    "truncated_normal": ("TruncatedNormal", {}),
    "constant": ("Constant", {}),
    "orthogonal": ("Orthogonal", {}),
    "identity": ("Identity", {}),
    "glorot_normal": ("GlorotNormal", {}),
    "glorot_uniform": ("GlorotUniform", {}),
    "he_normal": ("HeNormal", {}),
    "he_uniform": ("HeUniform", {}),
    "lecun_normal": ("LecunNormal", {}),
    "lecun_uniform": ("LecunUniform", {}),
    "variance_scaling": ("VarianceScaling", {}),
}

#: Regularizers by every name they had -> class of Keras 3.
REGULARIZERS: Mapping[str, str] = {
    "ActivityRegularizer": "L1L2",
    "L1L2Regularizer": "L1L2",
    "WeightRegularizer": "L1L2",
    "activity_l1": "L1",
    "activity_l1l2": "L1L2",
    "activity_l2": "L2",
    "l1": "L1",
    "l1_l2": "L1L2",
    "l1l2": "L1L2",
    "l2": "L2",
    "orthogonal_regularizer": "OrthogonalRegularizer",
}

#: Constraints by every name they had -> class of Keras 3.
CONSTRAINTS: Mapping[str, str] = {
    "max_norm": "MaxNorm",
    "maxnorm": "MaxNorm",
    "min_max_norm": "MinMaxNorm",
    "non_neg": "NonNeg",
    "nonneg": "NonNeg",
    "unit_norm": "UnitNorm",
    "unitnorm": "UnitNorm",
}

#: Activations that were called something else.
ACTIVATIONS: Mapping[str, str] = {
    "hard_swish": "hard_silu",
    "log_softmax_v2": "log_softmax",
    "relu_6": "relu6",
    "softmax_v2": "softmax",
    "swish": "silu",
    "swish_v2": "silu",
}
