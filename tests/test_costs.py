"""What a phase costs, against TensorFlow's own profiler and figures from papers."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import transferkit as tk
from transferkit.building.heads import leaf_layers
from transferkit.tuning.costs import forward_flops, slots_of


def counted(model: Any) -> int:
    return sum(forward_flops(layer)[0] for _, layer in leaf_layers(model))


def profiled(model: Any) -> int:
    """Operations of the model's graph for one row, by TensorFlow's profiler."""
    spec = tf.TensorSpec((1, *model.input_shape[1:]))
    graph = tf.function(lambda x: model(x, training=False)).get_concrete_function(spec).graph
    builder = tf.compat.v1.profiler.ProfileOptionBuilder
    options = builder(builder.float_operation()).with_empty_output().build()
    return int(tf.compat.v1.profiler.profile(graph, options=options).total_float_ops)


LAYERS = keras.layers


@pytest.mark.parametrize(
    "layers",
    [
        [LAYERS.Conv2D(8, 3, strides=2), LAYERS.DepthwiseConv2D(3, padding="same"), LAYERS.SeparableConv2D(6, 3)],
        [LAYERS.Flatten(), LAYERS.Dense(7), LAYERS.Dense(3)],
        [LAYERS.Reshape((64, 36)), LAYERS.EinsumDense("abc,cde->abde", (64, 2, 5), bias_axes="de")],
        [LAYERS.Reshape((64, 36)), LAYERS.TimeDistributed(LAYERS.Dense(5)), LAYERS.Conv1D(4, 3)],
    ],
    ids=["convolutions", "dense", "einsum", "sequence"],
)
def test_operations_are_those_of_tensorflows_profiler(layers: list[Any]) -> None:
    model = keras.Sequential([keras.Input((32, 24, 3)), *(type(layer).from_config(layer.get_config()) for layer in layers)])
    # The profiler counts some elementwise operations and leaves out others.
    assert counted(model) == pytest.approx(profiled(model), rel=0.01)


def test_operations_the_profiler_does_not_see_are_their_products() -> None:
    queries = keras.Input((16, 12))
    model = keras.Model(queries, LAYERS.MultiHeadAttention(2, 8)(queries, queries))
    projections = 2 * 16 * 4 * (12 * 16)
    assert counted(model) == projections + 2 * (2 * 16 * 16 * 16), "scores, and the sums they weigh"
    model = keras.Sequential([keras.Input((32, 24, 3)), LAYERS.Conv2D(9, 5, groups=3, dilation_rate=2, use_bias=False)])
    assert counted(model) == 2 * 24 * 16 * (5 * 5 * 9), "each output sees a third of the channels"
    model = keras.Sequential([keras.Input((5, 6, 3)), LAYERS.Conv2DTranspose(4, 3, strides=2, use_bias=False)])
    assert counted(model) == 2 * 5 * 6 * (3 * 3 * 3 * 4), "the kernel at each place of the input"
    model = keras.Sequential([keras.Input((16, 12)), LAYERS.LSTM(5)])
    assert counted(model) == 2 * 16 * (12 * 20 + 5 * 20)
    both = keras.Sequential([keras.Input((16, 12)), LAYERS.Bidirectional(LAYERS.LSTM(5))])
    assert counted(both) == 2 * counted(model)


def test_mobilenet_v2_costs_what_its_paper_says() -> None:
    model = keras.applications.MobileNetV2(weights=None)
    assert counted(model) / 2 == pytest.approx(300e6, rel=0.05), "multiply-adds: Sandler et al. 2018, table 4"
    plan = (
        tk.FineTuner()
        .phase("head", train=tk.Layers.head(), epochs=1)
        .phase("top", train=tk.Layers.above("block_12_add"), epochs=1)
        .phase("all", train=tk.Layers.all(), epochs=1)
    )
    description = plan.describe(model, batch_size=8, rows=1000)
    head, top, everything = description.costs
    assert head.forward == forward_flops(model.layers[-1])[0], "the rest is computed once"
    assert head.backward == head.forward, "no gradient goes below the head"
    assert head.features == 1000 * 1280 * 4
    for cost in (head, top, everything):
        assert cost.once + cost.forward == counted(model)
    assert top.backward < 2 * top.forward
    assert 1.9 * everything.forward < everything.backward < 2 * everything.forward
    assert head.activations < top.activations < everything.activations
    assert everything.weights == 4 * model.count_params()
    assert everything.slots == 2 * everything.gradients, "Adam's two moments"
    assert "over all" not in str(description)
    assert "A row costs 2.56 M operations forward and 2.56 M backward an epoch, after 619 M once." in str(description)


@pytest.mark.parametrize(("name", "slots"), [("sgd", 0), ("adam", 2), ("adamw", 2), ("rmsprop", 1), ("lion", 1)])
def test_an_optimizer_is_asked_for_its_slots(name: str, slots: int) -> None:
    assert slots_of(keras.optimizers.get(name)) == slots


def test_the_memory_holds_what_the_plan_keeps_beside_the_weights() -> None:
    model = keras.Sequential([keras.Input((4,)), LAYERS.Dense(8), LAYERS.BatchNormalization(), LAYERS.Dense(2)])
    plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=1).batch_norm("adapt")
    (plain,) = plan.describe(model).costs
    assert plain.gradients == 4 * sum(np.prod(weight.shape) for weight in model.trainable_weights), "no statistics"
    (kept,) = plan.optimizer("sgd").l2_sp(0.1).ema().describe(model).costs
    assert kept.slots == 2 * kept.gradients, "the loaded values and the average"
    assert kept.memory == kept.weights + kept.gradients + kept.slots + kept.activations


def test_what_is_guessed_and_what_has_no_length_is_told() -> None:
    class Own(keras.layers.Dense):  # type: ignore[misc, unused-ignore]
        pass

    model = keras.Sequential([keras.Input((None, 4)), Own(3, name="own")])
    (cost,) = tk.FineTuner().describe(model).costs
    assert cost.guessed == ("own",)
    assert cost.notes()[-2:] == (
        "Operations are guessed from their weights for own.",
        "Lengths that aren't fixed (None) count as 1.",
    )


def test_decay_stands_in_the_table_where_there_is_some() -> None:
    model = keras.Sequential([keras.Input((4,)), LAYERS.Dense(8, name="body"), LAYERS.BatchNormalization(), LAYERS.Dense(2)])
    text = str(tk.FineTuner().optimizer("adamw").weight_decay(0.02).describe(model))
    columns = text.splitlines()[1].split("  ")
    assert "decay" in [column.strip() for column in columns]
    decays = {line.split()[0]: line.split("each epoch")[0].split()[-2] for line in text.splitlines()[3:6]}
    assert decays["body"] == "0.02"
    assert decays["batch_normalization"] == "–" or "–" in decays.values()
    assert "decay" not in str(tk.FineTuner().describe(model)).splitlines()[1]
