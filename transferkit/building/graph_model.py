"""`GraphModel` runs the calls of a model's graph, or part of them, as a Keras model of its own, on the model's own layers.

What it gives is told by content: `digest` covers layers, settings, wiring and weights. May import Keras and the floors below.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from transferkit._keras import keras, tf
from transferkit.building.batch_norms import Norms, apply_norm, is_kerass, simple_norms
from transferkit.building.graph import NOISE, Call, Ref, Spec, is_functional
from transferkit.building.rewriting import apart, stands_apart

__all__ = ["AttachMask", "GraphModel", "ReadMask", "as_declared", "flat_inputs", "run_call"]


class GraphModel(keras.Model):
    """Runs calls of a graph; its layers are those of the model the graph was read from.

    Args:
        calls: The calls to run, in order.
        inputs: The numbers of the tensors given to it.
        masked: The numbers of the tensors whose masks are given after them.
        outputs: A structure of `Ref`s to give back.
        output_masks: The numbers of tensors whose masks to give after the outputs, which must then be flat.
        quiet: Indices into `calls` that run in inference mode whatever the caller says.
        loud: Indices into `calls` that run in training mode whatever the caller says.
        specs: Of all tensors.
        order: The variables of the whole model, in its order; this model lists its own in the same.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        *,
        inputs: Sequence[int],
        masked: Sequence[int] = (),
        outputs: Any,
        output_masks: Sequence[int] = (),
        quiet: frozenset[int] = frozenset(),
        loud: frozenset[int] = frozenset(),
        specs: dict[int, Spec],
        order: Sequence[Any],
        input_structure: Any = None,
        name: str,
    ) -> None:
        # The layers cast to their own dtypes; the model passes its inputs through as they are.
        super().__init__(name=name, dtype="float32", autocast=False)
        place = {id(variable): index for index, variable in enumerate(order)}
        layers = list({id(call.operation): call.operation for call in calls if call.is_layer}.values())
        # Gradients are clipped and summed in the order of the variables, so theirs is the whole model's order, to the bit.
        layers.sort(key=lambda layer: min((place.get(id(v), len(place)) for v in layer.variables), default=len(place)))
        self._graph_layers = layers
        self._graph = (tuple(calls), tuple(inputs), tuple(masked), tuple(output_masks), quiet, loud)
        self._graph_outputs = _Opaque(outputs)
        self._graph_inputs = _Opaque(input_structure)
        self._graph_specs = _Opaque({number: specs[number] for number in inputs})
        self._all_specs = _Opaque(specs)
        self._last_use = _Opaque(_last_uses(calls, outputs, output_masks))
        self._function = _Opaque(None)
        self._folded = _Opaque({})
        self._read_mask = ReadMask()
        self._attach_mask = AttachMask()
        self.built = True

    def build(self, input_shape: Any) -> None:
        """Nothing to do: every layer was built with the model the graph comes from."""

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self._run(inputs, training, {}, frozenset())

    def _run(self, inputs: Any, training: bool | None, constants: dict[int, tuple[Any, Any]], plain: frozenset[int]) -> Any:
        calls, wanted, masked, output_masks, quiet, loud = self._graph
        flat = flat_inputs(inputs, self._graph_inputs.value, self._graph_specs.value)
        tensors: dict[int, Any] = {}
        for number, value in zip(wanted, flat[: len(wanted)], strict=True):
            tensors[number] = as_declared(value, self._graph_specs.value[number])
        for number, mask in zip(masked, flat[len(wanted) :], strict=True):
            tensors[number] = self._attach_mask([tensors[number], mask])
        drop = self._last_use.value
        for index, call in enumerate(calls):
            if index in constants:
                outputs = apply_norm(tensors[call.inputs[0]], constants[index])
            elif index in plain:
                outputs = call.operation.call(_values(call.args[0], tensors))
            else:
                mode = False if index in quiet else True if index in loud else training
                outputs = run_call(call, tensors, training=mode)
            tensors.update(zip(call.outputs, tf.nest.flatten(outputs), strict=True))
            for number in drop[index]:  # run eagerly, a long chain would hold every activation otherwise
                tensors.pop(number, None)
        given = tf.nest.map_structure(lambda ref: tensors[ref.tensor], self._graph_outputs.value)
        if output_masks:
            # The masks travel as tensors of their own, so those they sat on are given without them.
            return [*map(tf.identity, given), *(self._read_mask(tensors[number]) for number in output_masks)]
        return given[0] if isinstance(given, list) and len(given) == 1 else given

    def as_function(self, like: Any = None) -> Any:
        """The model in inference mode as one graph; traced once for each size of batch, however often this is asked for.

        What its BatchNorms come down to is worked out now, so the function is of the weights of now.

        Args:
            like: A batch to trace it for at once.
        """
        calls, _, masked, _, _, loud = self._graph
        if self._function.value is None:
            found = {} if masked else simple_norms(calls, self._all_specs.value, loud=loud)
            plain = frozenset() if masked else _plain_calls(calls, self._all_specs.value)
            norms = Norms([calls[index].operation for index in found], list(found.values())) if found else None

            def run(x: Any, *constants: Any) -> Any:
                pairs = norms.taken_apart(*constants) if norms is not None else ()
                return self._run(x, False, dict(zip(found, pairs, strict=True)), plain)

            self._function.value = norms, tf.function(run, autograph=False)
        norms, function = self._function.value
        constants = norms.constants() if norms is not None else ()
        if like is not None:
            function.get_concrete_function(like, *constants)
        return lambda x: function(x, *constants)

    def with_constants(self, policy: str | None = None) -> Any:
        """The model in inference mode as one graph with its weights as constants, which TensorFlow folds into one another.

        Args:
            policy: A dtype policy that the layers compute by in this graph; None leaves each its own.
        """
        weights = {id(weight): weight.numpy() for weight in self.weights}
        mark = hashlib.sha256()
        for value in weights.values():
            mark.update(np.ascontiguousarray(value).view(np.uint8).reshape(-1).data)
        held, found = self._folded.value.get(policy, (b"", None))
        if held == mark.digest():
            return found
        layers = [layer for layer in self._graph_layers if policy is not None and not layer.dtype_policy.name.startswith("int")]

        def constant(x: Any) -> Any:
            before = [layer.dtype_policy for layer in layers]
            try:
                for layer in layers:
                    layer.dtype_policy = policy
                trained, others = self.trainable_variables, self.non_trainable_variables
                given = [weights[id(v)] if id(v) in weights else keras.ops.convert_to_tensor(v) for v in others]
                outputs, moved = self.stateless_call([weights[id(v)] for v in trained], given, x, training=False)
                for variable, value in zip(others, moved, strict=True):
                    if id(variable) not in weights:  # the state of what is random goes on
                        variable.assign(value)
            finally:
                for layer, own in zip(layers, before, strict=True):
                    layer.dtype_policy = own
            declared = [self._all_specs.value[ref.tensor].dtype for ref in tf.nest.flatten(self._graph_outputs.value)]
            flat = tf.nest.flatten(outputs)
            return [tf.cast(a, dtype) for a, dtype in zip(flat, declared, strict=False)] + flat[len(declared) :]

        function = tf.function(constant, autograph=False)
        self._folded.value[policy] = mark.digest(), function
        return function

    def digest(self) -> str | None:
        """A digest of everything that decides what the model gives: layers, settings, wiring and weights; None when some of it is
        code of the user's."""
        calls, wanted, masked, output_masks, quiet, loud = self._graph
        mark = hashlib.sha256(repr((wanted, masked, output_masks, sorted(quiet), sorted(loud))).encode())
        for index, call in enumerate(calls):
            code = _code_of(call.operation, quiet=index in quiet)
            if code is None:
                return None
            mark.update(code)
            mark.update(repr((call.args, sorted(call.kwargs.items()), call.outputs, call.training, call.heard)).encode())
        mark.update(repr(self._graph_outputs.value).encode())
        for layer in self._graph_layers:
            for variable in layer.variables if loud else layer.weights:  # where nothing is drawn, seeds decide nothing
                value = np.ascontiguousarray(variable.numpy())
                mark.update(f"{value.dtype.name}{value.shape}".encode())
                mark.update(value.tobytes())
        return mark.hexdigest()


def _code_of(operation: Any, *, quiet: bool) -> bytes | None:
    """What an operation is and how it is set; None for one that runs code of the user's. Noise that is off has no settings.

    Such code can't be told by content: a file's text says nothing of the modules it imports, nor of what a function closes over.
    """
    if isinstance(operation, keras.layers.Lambda) or is_functional(operation):
        return None
    if any(kind.__module__.split(".")[0] not in ("keras", "tensorflow", "builtins") for kind in type(operation).__mro__):
        return None
    try:
        # Names are numbered by Keras as they come, and who trains changes nothing about what is given.
        config = {key: value for key, value in operation.get_config().items() if key not in ("name", "trainable")}
        text = "off" if quiet and isinstance(operation, tuple(NOISE)) else json.dumps(config, sort_keys=True)
    except (NotImplementedError, TypeError, ValueError):
        return None
    if _names_custom_code(config):
        return None
    return f"{type(operation).__module__}.{type(operation).__qualname__}\0{text}".encode()


def _names_custom_code(config: Any) -> bool:
    """Whether a configuration names a function or class that isn't Keras's: an activation of the user's, say."""
    if isinstance(config, dict):
        return config.get("registered_name") is not None or any(map(_names_custom_code, config.values()))
    return isinstance(config, (list, tuple)) and any(map(_names_custom_code, config))


def flat_inputs(inputs: Any, structure: Any, specs: dict[int, Spec]) -> list[Any]:
    """The inputs in the order of the model's, which takes a dict by name even where it lists its inputs, as Keras does."""
    if isinstance(inputs, dict) and structure is not None and not isinstance(structure, dict):
        return [inputs[specs[ref.tensor].name] for ref in tf.nest.flatten(structure)]
    return list(tf.nest.flatten(inputs))


def _plain_calls(calls: Sequence[Call], specs: dict[int, Spec]) -> frozenset[int]:
    """The calls in which calling the layer does no more than its `call`: no cast, no mask, no loss, no name that decides.

    Tracing that is faster.
    """
    if not all(is_kerass(call) for call in calls):
        return frozenset()
    found = []
    for index in sorted(apart(calls)):
        call = calls[index]
        layer = call.operation
        if not stands_apart(layer) or len(call.args) != 1 or call.kwargs or layer.activity_regularizer is not None:
            continue
        dtypes = {layer.compute_dtype, layer.variable_dtype, *(specs[number].dtype for number in call.inputs)}
        if dtypes == {"float32"} and getattr(layer, "quantization_mode", None) is None:
            found.append(index)
    return frozenset(found)


def _values(structure: Any, tensors: dict[int, Any]) -> Any:
    return tf.nest.map_structure(lambda leaf: tensors[leaf.tensor] if isinstance(leaf, Ref) else leaf, structure)


def run_call(call: Call, tensors: dict[int, Any], *, training: bool | None) -> Any:
    """Runs one call on the tensors by number; `training` goes to the layer as a functional model hands it on."""
    args, kwargs = _values((call.args, call.kwargs), tensors)
    if call.takes_training:
        if training is None or call.heard:
            training = call.training
        kwargs = {**kwargs, "training": training}
    return call.operation(*args, **kwargs)


def as_declared(value: Any, spec: Spec) -> Any:
    """The input as a functional model takes it: cast to the declared dtype, a last axis of 1 added or taken away."""
    tensor = keras.ops.convert_to_tensor(value, dtype=spec.dtype)
    if len(tensor.shape) == len(spec.shape) + 1 and tensor.shape[-1] == 1:
        return keras.ops.squeeze(tensor, axis=-1)
    if len(tensor.shape) == len(spec.shape) - 1 and spec.shape[-1] == 1:
        return keras.ops.expand_dims(tensor, axis=-1)
    return tensor


def _last_uses(calls: Sequence[Call], outputs: Any, masks: Sequence[int]) -> list[list[int]]:
    """For each call, the tensors that nothing reads after it."""
    kept = {ref.tensor for ref in tf.nest.flatten(outputs)} | set(masks)
    last: dict[int, int] = {}
    for index, call in enumerate(calls):
        for number in (*call.outputs, *call.inputs):
            last[number] = index
    drop: list[list[int]] = [[] for _ in calls]
    for number, index in last.items():
        if number not in kept:
            drop[index].append(number)
    return drop


class _Opaque:
    """Keeps Keras from turning a plain dict or list into a tracked one when it is set on a model."""

    def __init__(self, value: Any) -> None:
        self.value = value


class ReadMask(keras.layers.Layer):
    """Gives the mask that a tensor carries, or None."""

    def __init__(self) -> None:
        super().__init__(autocast=False)
        self.supports_masking = True

    def call(self, inputs: Any, mask: Any = None) -> Any:  # noqa: ARG002 -- Keras hands it over by this name
        return mask

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:  # noqa: ARG002
        return None


class AttachMask(keras.layers.Layer):
    """Gives the first of its two inputs, with the second as its mask."""

    def __init__(self) -> None:
        super().__init__(autocast=False)
        self.supports_masking = True

    def call(self, inputs: Any) -> Any:
        return tf.identity(inputs[0])  # a new tensor: the mask must not stay on the caller's

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:  # noqa: ARG002
        return inputs[1]
