"""A model's calls as a flat list that can be run in part: nested models opened, every layer the model's own object.

The list is read through `keras.models.clone_model`, whose `call_function` is told of each call; placeholders stand in for the
layers there, so nothing is added to the layers of the user. May import Keras and the floors below.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transferkit._keras import keras, tf
from transferkit.errors import ModelError

__all__ = ["NOISE", "Call", "Graph", "Ref", "Spec", "is_functional", "makes_mask", "trace", "trace_outer"]


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

    @functools.cached_property
    def inputs(self) -> tuple[int, ...]:
        """The numbers of the tensors it reads, without repeats."""
        leaves = keras.tree.flatten((self.args, self.kwargs))
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


def makes_mask(operation: Any) -> bool:
    """Whether what Keras knows of the layer says that it makes a mask."""
    return isinstance(operation, keras.layers.Masking) or bool(getattr(operation, "mask_zero", False))


@functools.cache
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


def _known_spec(operation: Any, leaves: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the operation gave when the model was made, where it was given the like; working it out anew costs a trace."""
    said = {name for name, value in kwargs.items() if value is not None}
    plain = len(keras.tree.flatten(args)) == len(leaves) and said <= {"training"}
    if not plain or isinstance(operation, keras.Model):
        return None
    try:
        before, spec = keras.tree.flatten(operation.input), operation.output
    except (AttributeError, ValueError):
        return None
    if [(leaf.shape, leaf.dtype) for leaf in leaves] != [(leaf.shape, leaf.dtype) for leaf in before]:
        return None
    if any(getattr(leaf, name, False) for leaf in keras.tree.flatten(spec) for name in ("sparse", "ragged")):
        return None
    # New ones: a tensor remembers the call it came from, and those of the model are the model's.
    return keras.tree.map_structure(lambda leaf: keras.KerasTensor(leaf.shape, leaf.dtype), spec)


class _Tracer:
    def __init__(self, *, opens: bool = True) -> None:
        self.calls: list[Call] = []
        self.specs: dict[int, Spec] = {}
        self._opens_models = opens

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
        placeholder = _Placeholder()

        def on_call(operation: Any, *args: Any, **kwargs: Any) -> Any:
            leaves = [leaf for leaf in keras.tree.flatten((args, kwargs)) if _key(leaf)]
            spec = _known_spec(operation, leaves, args, kwargs)
            if spec is None:
                spec = operation.compute_output_spec(*args, **kwargs)
            placeholder.spec = spec
            outputs = placeholder(leaves)
            alive.extend(keras.tree.flatten(outputs))
            path = f"{prefix}{operation.name}"

            def as_ref(leaf: Any) -> Any:
                return Ref(numbers[id(leaf)]) if _key(leaf) else leaf

            ref_args, ref_kwargs = keras.tree.map_structure(as_ref, (args, kwargs))
            said = training if training is not None else kwargs.get("training")
            if self._opens(operation, args, kwargs):
                made = self.run(operation, [numbers[id(leaf)] for leaf in leaves], f"{path}/", operation, said)
            else:
                made = [self.new(leaf.shape, leaf.dtype, path) for leaf in keras.tree.flatten(outputs)]
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
            for leaf, number in zip(keras.tree.flatten(outputs), made, strict=True):
                numbers[id(leaf)] = number
            return outputs

        # The inputs get their numbers before the first call, which sees tensors that clone_model makes itself.
        tensors = [keras.Input(batch_shape=leaf.shape, dtype=leaf.dtype, name=f"{leaf.name}_seen") for leaf in view.inputs]
        for tensor, number in zip(tensors, inputs, strict=True):
            numbers[id(tensor)] = number
        structured = keras.tree.pack_sequence_as(view.input, tensors)
        clone = keras.models.clone_model(
            view, input_tensors=structured, clone_function=lambda operation: operation, call_function=on_call
        )
        return [numbers[id(leaf)] for leaf in clone.outputs]

    def _opens(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the call is of a nested model that can be replaced by its own calls, nothing lost on the way in."""
        if not self._opens_models or not is_functional(operation) or len(args) != 1:
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
    return isinstance(operation, keras.layers.Layer) and _knows_training(type(operation).call)


@functools.lru_cache(maxsize=1024)
def _knows_training(call: Any) -> bool:
    return "training" in inspect.signature(call).parameters


@functools.cache
def _author_is_heard() -> bool:
    """Whether `layer(x, training=False)` in a functional model holds when the model itself is called with `training=True`.

    Up to Keras 3.15.1 it doesn't (keras-team/keras#20285); what this library runs in parts must do what Keras does as a whole.
    """
    x = keras.Input((64,), name="heard_in")
    model = keras.Model(x, keras.layers.Dropout(0.5, seed=0, name="heard_drop")(x, training=False), name="heard")
    return bool(np.all(np.asarray(model(np.ones((1, 64), "float32"), training=True)) == 1))


def _same_structure(one: Any, other: Any) -> bool:
    try:
        tf.nest.assert_same_structure(one, other, check_types=False)
    except (ValueError, TypeError):
        return False
    return True


#: What was read before, beside the layers it was read from: a functional model's graph stays as it is, a Sequential's may grow.
_traced: weakref.WeakKeyDictionary[Any, tuple[Any, Graph]] = weakref.WeakKeyDictionary()


def _layers_within(model: Any) -> Any:
    return tuple((id(layer), _layers_within(layer) if isinstance(layer, keras.Model) else ()) for layer in model.layers)


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
    layers = _layers_within(model)
    before = _traced.get(model)
    if before is None or before[0] != layers:
        before = _traced[model] = layers, _read(model, _Tracer())
    return before[1]


def trace_outer(model: Any) -> Graph:
    """The calls of a functional model without those within its nested models, whatever its own `call` does.

    Raises:
        AttributeError, TypeError, ValueError: when it has no graph.
    """
    nested = any(isinstance(layer, keras.Model) for layer in model.layers)
    return _read(model, _Tracer(opens=False)) if nested or not is_functional(model) else trace(model)


def _read(model: Any, tracer: _Tracer) -> Graph:
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
