"""A model's calls as a flat list that can be run in part: nested models opened, every layer the model's own object.

The list is read through `keras.models.clone_model`, whose `call_function` is told of each call; placeholders stand in for the
layers there, so nothing is added to the layers of the user. `GraphModel` runs such a list, or part of it, as a Keras model.
May import Keras and the floors below.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transferkit._keras import keras, tf
from transferkit.errors import ModelError

__all__ = [
    "NOISE",
    "AttachMask",
    "Call",
    "Graph",
    "GraphModel",
    "ReadMask",
    "Ref",
    "Spec",
    "as_declared",
    "flat_inputs",
    "is_functional",
    "run_call",
    "trace",
]


#: What `trainable=False` doesn't stop, though "frozen" is taken to mean it does. Each has its strength in a public attribute.
NOISE = {
    keras.layers.Dropout: "rate",
    keras.layers.SpatialDropout1D: "rate",
    keras.layers.SpatialDropout2D: "rate",
    keras.layers.SpatialDropout3D: "rate",
    keras.layers.AlphaDropout: "rate",
    keras.layers.GaussianDropout: "rate",
    keras.layers.GaussianNoise: "stddev",
}


@dataclass(frozen=True)
class Ref:
    """Stands for a tensor in the arguments of a call; the number is the tensor's."""

    tensor: int


@dataclass(frozen=True)
class Call:
    """One call of a layer or an operation.

    Args:
        operation: The layer or operation, the model's own object.
        path: Its name, after the names of the nested models it lies in.
        container: The innermost nested model it lies in, or None.
        args: The positional arguments, a `Ref` for each tensor.
        kwargs: The keyword arguments likewise.
        outputs: The numbers of the tensors it gives.
        training: What the model's author passed as `training`, to it or to a nested model around it.
        takes_training: Whether its `call` knows that argument.
        heard: Whether Keras lets the author's `training` stand when the whole model is called with another.
    """

    operation: Any
    path: str
    container: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]
    training: bool | None = None
    takes_training: bool = False
    heard: bool = False

    @property
    def inputs(self) -> tuple[int, ...]:
        """The numbers of the tensors it reads, without repeats."""
        leaves = tf.nest.flatten((self.args, self.kwargs))
        return tuple(dict.fromkeys(leaf.tensor for leaf in leaves if isinstance(leaf, Ref)))

    @property
    def is_layer(self) -> bool:
        return isinstance(self.operation, keras.layers.Layer)


@dataclass(frozen=True)
class Spec:
    """A tensor's shape, dtype and name as the model declares them."""

    shape: tuple[int | None, ...]
    dtype: str
    name: str


@dataclass(frozen=True)
class Graph:
    """A model as calls in an order in which they can run.

    Args:
        calls: Each after those whose tensors it reads.
        inputs: The numbers of the model's inputs, in the order of `model.inputs`.
        outputs: The numbers of its outputs, in the order of `model.outputs`.
        specs: The shape and dtype of each tensor, by number.
        input_structure: `model.input` with `Ref`s.
        output_structure: `model.output` with `Ref`s.
    """

    calls: tuple[Call, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    specs: dict[int, Spec]
    input_structure: Any
    output_structure: Any


class _Placeholder(keras.Operation):
    """Stands where a layer stood, so that a traced graph hangs together without a call of the layer itself."""

    def compute_output_spec(self, tensors: Any) -> Any:  # noqa: ARG002 -- Keras's signature
        return self.spec

    def call(self, tensors: Any) -> Any:
        return tensors


def _functional_class() -> type[Any]:
    tensor = keras.Input((1,))
    return type(keras.Model(tensor, tensor))


def is_functional(model: Any) -> bool:
    """Whether the model is its graph: functional or a built Sequential, with no `call` of its own."""
    if not isinstance(model, keras.Model):
        return False
    if isinstance(model, keras.Sequential):
        return type(model).call is keras.Sequential.call and _has_graph(model)
    return isinstance(model, keras.Function) and type(model).call is _functional_class().call


def _has_graph(model: Any) -> bool:
    try:
        return bool(model.built and model.inputs and model.outputs)
    except (AttributeError, ValueError):  # a Sequential that was never given a shape
        return False


def _key(leaf: Any) -> bool:
    return isinstance(leaf, keras.KerasTensor)


class _Tracer:
    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.specs: dict[int, Spec] = {}

    def new(self, shape: Any, dtype: Any, name: str) -> int:
        number = len(self.specs)
        self.specs[number] = Spec(tuple(shape), keras.backend.standardize_dtype(dtype), name)
        return number

    def run(
        self, model: Any, inputs: Sequence[int], prefix: str = "", container: Any = None, training: bool | None = None
    ) -> list[int]:
        """Adds the model's calls, with the tensors `inputs` as its inputs; gives the numbers of its outputs."""
        # A view without the model's compile state and class: cloning would compile again and call the user's constructor.
        view = keras.Model(model.inputs, model.outputs)
        numbers: dict[int, int] = {}
        alive: list[Any] = []  # a number belongs to an object's id, so the object must not go

        def on_call(operation: Any, *args: Any, **kwargs: Any) -> Any:
            leaves = [leaf for leaf in tf.nest.flatten((args, kwargs)) if _key(leaf)]
            spec = operation.compute_output_spec(*args, **kwargs)
            placeholder = _Placeholder()
            placeholder.spec = spec
            outputs = placeholder(leaves)
            alive.extend(tf.nest.flatten(outputs))
            path = f"{prefix}{operation.name}"

            def as_ref(leaf: Any) -> Any:
                return Ref(numbers[id(leaf)]) if _key(leaf) else leaf

            ref_args, ref_kwargs = tf.nest.map_structure(as_ref, (args, kwargs))
            said = training if training is not None else kwargs.get("training")
            if self._opens(operation, args, kwargs):
                made = self.run(operation, [numbers[id(leaf)] for leaf in leaves], f"{path}/", operation, said)
            else:
                made = [self.new(leaf.shape, leaf.dtype, path) for leaf in tf.nest.flatten(outputs)]
                ref_kwargs.pop("training", None)
                self.calls.append(
                    Call(
                        operation,
                        path,
                        container,
                        args=tuple(ref_args),
                        kwargs=dict(ref_kwargs),
                        outputs=tuple(made),
                        training=said if isinstance(said, bool) else None,
                        takes_training=_takes_training(operation),
                        heard=isinstance(said, bool) and _author_is_heard(),
                    )
                )
            for leaf, number in zip(tf.nest.flatten(outputs), made, strict=True):
                numbers[id(leaf)] = number
            return outputs

        # The inputs get their numbers before the first call, which sees tensors that clone_model makes itself.
        tensors = [keras.Input(batch_shape=leaf.shape, dtype=leaf.dtype, name=f"{leaf.name}_seen") for leaf in view.inputs]
        for tensor, number in zip(tensors, inputs, strict=True):
            numbers[id(tensor)] = number
        structured = tf.nest.pack_sequence_as(view.input, tensors)
        clone = keras.models.clone_model(
            view, input_tensors=structured, clone_function=lambda operation: operation, call_function=on_call
        )
        return [numbers[id(leaf)] for leaf in clone.outputs]

    def _opens(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the call is of a nested model that can be replaced by its own calls, nothing lost on the way in."""
        if not is_functional(operation) or len(args) != 1:
            return False
        if any(name != "training" and value is not None for name, value in kwargs.items()):
            return False
        given, wanted = tf.nest.flatten(args[0]), operation.inputs
        if len(given) != len(wanted) or not all(_key(leaf) for leaf in given):
            return False
        if len(wanted) > 1 and not _same_structure(args[0], operation.input):
            return False
        return all(len(a.shape) == len(b.shape) and a.dtype == b.dtype for a, b in zip(given, wanted, strict=True))


def _takes_training(operation: Any) -> bool:
    return isinstance(operation, keras.layers.Layer) and "training" in inspect.signature(operation.call).parameters


def _same_structure(one: Any, other: Any) -> bool:
    try:
        tf.nest.assert_same_structure(one, other, check_types=False)
    except (ValueError, TypeError):
        return False
    return True


def trace(model: Any) -> Graph:
    """The model's calls, nested models opened; the layers are left as they are.

    Args:
        model: A functional model or a built Sequential.

    Raises:
        ModelError: when the model has no graph to read, with the reason.
    """
    asked = f"Reading the graph of the model {model.name!r}."
    if "call_function" not in inspect.signature(keras.models.clone_model).parameters:
        raise ModelError(
            asked, found=f"Keras {keras.__version__}, whose clone_model has no `call_function`", fix='pip install -U "keras>=3.5"'
        )
    if not is_functional(model):
        raise ModelError(asked, found=_why_no_graph(model))
    tracer = _Tracer()
    inputs = [tracer.new(leaf.shape, leaf.dtype, leaf.name) for leaf in model.inputs]
    outputs = tracer.run(model, inputs)
    sequential = isinstance(model, keras.Sequential)
    return Graph(
        calls=tuple(tracer.calls),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        specs=tracer.specs,
        # A Sequential has one of each, and knows `input` and `output` only once it was called.
        input_structure=Ref(inputs[0]) if sequential else tf.nest.pack_sequence_as(model.input, list(map(Ref, inputs))),
        output_structure=Ref(outputs[0]) if sequential else tf.nest.pack_sequence_as(model.output, list(map(Ref, outputs))),
    )


def _why_no_graph(model: Any) -> str:
    name = type(model).__name__
    if isinstance(model, keras.Sequential) and not _has_graph(model):
        return "a Sequential that has not been given an input shape yet"
    if isinstance(model, (keras.Function, keras.Sequential)):
        return f"{name} has a `call` of its own, which may do more than its graph"
    return f"{name} is a subclassed model, whose graph is only in its Python code"


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
        self._last_use = _Opaque(_last_uses(calls, outputs, output_masks))
        self._function = _Opaque(None)
        self._read_mask = ReadMask()
        self._attach_mask = AttachMask()
        self.built = True

    def build(self, input_shape: Any) -> None:
        """Nothing to do: every layer was built with the model the graph comes from."""

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        calls, wanted, masked, output_masks, quiet, loud = self._graph
        flat = flat_inputs(inputs, self._graph_inputs.value, self._graph_specs.value)
        tensors: dict[int, Any] = {}
        for number, value in zip(wanted, flat[: len(wanted)], strict=True):
            tensors[number] = as_declared(value, self._graph_specs.value[number])
        for number, mask in zip(masked, flat[len(wanted) :], strict=True):
            tensors[number] = self._attach_mask([tensors[number], mask])
        drop = self._last_use.value
        for index, call in enumerate(calls):
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

    def as_function(self) -> Any:
        """The model in inference mode as one graph; traced once for each size of batch, however often this is asked for."""
        if self._function.value is None:
            self._function.value = tf.function(lambda x: self(x, training=False), autograph=False)
        return self._function.value

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


def run_call(call: Call, tensors: dict[int, Any], *, training: bool | None) -> Any:
    """Runs one call on the tensors by number; `training` goes to the layer as a functional model hands it on."""

    def value(leaf: Any) -> Any:
        return tensors[leaf.tensor] if isinstance(leaf, Ref) else leaf

    args, kwargs = tf.nest.map_structure(value, (call.args, call.kwargs))
    if call.takes_training:
        if training is None or call.heard:
            training = call.training
        kwargs = {**kwargs, "training": training}
    return call.operation(*args, **kwargs)


@functools.cache
def _author_is_heard() -> bool:
    """Whether `layer(x, training=False)` in a functional model holds when the model itself is called with `training=True`.

    Up to Keras 3.15.1 it doesn't (keras-team/keras#20285); what this library runs in parts must do what Keras does as a whole.
    """
    x = keras.Input((64,), name="heard_in")
    model = keras.Model(x, keras.layers.Dropout(0.5, seed=0, name="heard_drop")(x, training=False), name="heard")
    return bool(np.all(np.asarray(model(np.ones((1, 64), "float32"), training=True)) == 1))


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
