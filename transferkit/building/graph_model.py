"""`GraphModel` runs the calls of a model's graph, or part of them, as a Keras model of its own, on the model's own layers.

What it gives is told by content: `digest` covers layers, settings, wiring and weights. May import Keras and the floors below.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from transferkit._keras import keras, tf
from transferkit.building.batch_norms import Norms, Shape, apply_norm, is_kerass, norm_constants, simple_norms
from transferkit.building.content import held_tensors, structure_of
from transferkit.building.fused_norms import Fusion, fusions, holding
from transferkit.building.graph import Call, Ref, Spec
from transferkit.building.programs import Program
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
        self._quick = _Opaque(None)
        self._program = _Opaque((None, None))
        self._untold = _Opaque(None)
        self._folded = _Opaque({})
        self._read_mask = ReadMask()
        self._attach_mask = AttachMask()
        self.built = True

    def build(self, input_shape: Any) -> None:
        """Nothing to do: every layer was built with the model the graph comes from."""

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self._run(inputs, training)

    def _run(self, inputs: Any, training: bool | None, instead: Mapping[int, Callable[[Any], Any]] = MappingProxyType({})) -> Any:
        """Runs the calls, those in `instead` by the functions there of their only argument."""
        calls, wanted, masked, output_masks, quiet, loud = self._graph
        flat = flat_inputs(inputs, self._graph_inputs.value, self._graph_specs.value)
        tensors: dict[int, Any] = {}
        for number, value in zip(wanted, flat[: len(wanted)], strict=True):
            tensors[number] = as_declared(value, self._graph_specs.value[number])
        for number, mask in zip(masked, flat[len(wanted) :], strict=True):
            tensors[number] = self._attach_mask([tensors[number], mask])
        drop = self._last_use.value
        for index, call in enumerate(calls):
            if index in instead:
                outputs = instead[index](_values(call.args[0], tensors))
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

    def as_function(self, like: Any = None) -> Callable[[Any], Any]:
        """The model in inference mode as one graph, with the weights of now.

        It is traced once for each size of batch, and but once in a process for all models of the same structure.

        Args:
            like: A batch to trace it for at once.
        """
        norms, fused, plain = self._shortcuts()
        held, program = self._program.value
        if program is None or held != fused:
            program = self._programmed(norms, fused, plain)
            self._program.value = fused, program
        inputs, specs = self._graph_inputs.value, self._graph_specs.value
        ready = program.ready(None if like is None else flat_inputs(like, inputs, specs))
        return lambda x: ready(flat_inputs(x, inputs, specs))

    def _shortcuts(self) -> tuple[Mapping[int, Shape], Mapping[int, Fusion], frozenset[int]]:
        """The calls that needn't go through Keras: BatchNorms that are a factor and an offset, those of them that are computed
        with the convolution before them, and layers of which the `call` is all there is."""
        calls, _, masked, _, _, loud = self._graph
        if masked:
            return {}, {}, frozenset()
        if self._quick.value is None:
            norms = simple_norms(calls, self._all_specs.value, loud=loud)
            possible = fusions(calls, norms, self._all_specs.value, kept=self._kept())
            self._quick.value = norms, possible, _plain_calls(calls, self._all_specs.value)
        norms, possible, plain = self._quick.value
        return norms, holding(possible), plain

    def _programmed(self, norms: Mapping[int, Shape], fused: Mapping[int, Fusion], plain: frozenset[int]) -> Program:
        calls, *_, loud = self._graph
        single = [place for place, index in enumerate(norms) if index in fused]
        packed = Norms([calls[index].operation for index in norms], list(norms.values()), single=single) if norms else None
        within = {id(weight) for index in norms for weight in calls[index].operation.weights}

        def run(flat: Any, *constants: Any) -> Any:
            instead: dict[int, Callable[[Any], Any]] = {index: calls[index].operation.call for index in plain}
            pairs = packed.taken_apart(*constants) if packed is not None else ()
            for index, pair in zip(norms, pairs, strict=True):
                if index in fused:
                    instead[fused[index].call] = fused[index].convolve
                    instead[index] = functools.partial(fused[index].norm, constants=pair)
                else:
                    instead[index] = functools.partial(apply_norm, constants=pair)
            return self._run(flat, False, instead)

        # What is random keeps its state in variables, which a graph for several models can't.
        named = frozenset(range(len(calls))) - frozenset(norms) - {fusion.call for fusion in fused.values()} - plain
        structure = self._structure(named)
        self._untold.value = structure is None
        return Program(
            run,
            [weight for weight in self._by_call("weights") if id(weight) not in within],
            packed.constants if packed is not None else tuple,
            structure=None if structure is None or loud else f"{structure} {sorted(fused)}",
            told=[tensor for call in calls for tensor in held_tensors(call.operation)],
        )

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
        variables = self.variables
        folded = self._folded_convolutions() if policy is None else {}

        def constant(x: Any) -> Any:
            before = [layer.dtype_policy for layer in layers]
            given = [(v, tf.convert_to_tensor(weights.get(id(v), v.value))) for v in variables]
            try:
                for layer in layers:
                    layer.dtype_policy = policy
                with keras.StatelessScope(state_mapping=given) as scope:
                    outputs = self._run(x, False, folded)
            finally:
                for layer, own in zip(layers, before, strict=True):
                    layer.dtype_policy = own
            for variable in variables:
                if id(variable) not in weights:  # the state of what is random goes on
                    variable.assign(scope.get_current_value(variable))
            declared = [self._all_specs.value[ref.tensor].dtype for ref in tf.nest.flatten(self._graph_outputs.value)]
            flat = tf.nest.flatten(outputs)
            return [tf.cast(a, dtype) for a, dtype in zip(flat, declared, strict=False)] + flat[len(declared) :]

        function = tf.function(constant, autograph=False)
        self._folded.value[policy] = mark.digest(), function
        return function

    def _folded_convolutions(self) -> dict[int, Callable[[Any], Any]]:
        """Convolutions with the factor of the BatchNorm that follows in their kernels and its offset as a bias, as of now; the
        BatchNorms pass on what they are given."""
        calls, _, masked, _, _, loud = self._graph
        norms = {} if masked else simple_norms(calls, self._all_specs.value, loud=loud, summed=True)
        instead: dict[int, Callable[[Any], Any]] = {}
        found = fusions(calls, norms, self._all_specs.value, kept=self._kept())
        held = holding(found)
        for index, fusion in found.items():
            instead[fusion.call] = fusion.folded(norm_constants(calls[index].operation), grouped=index in held)
            instead[index] = tf.identity
        return instead

    def _kept(self) -> set[int]:
        """The tensors that are read from outside."""
        *_, output_masks, _, _ = self._graph
        return {ref.tensor for ref in tf.nest.flatten(self._graph_outputs.value)} | set(output_masks)

    def digest(self) -> str | None:
        """A digest of everything that decides what the model gives: layers, settings, wiring and weights; None when some of it is
        code of the user's."""
        structure = self._structure()
        if structure is None:
            return None
        # A dict of inputs is flattened by its keys, which are the inputs' names.
        names = [spec.name for spec in self._graph_specs.value.values()]
        mark = hashlib.sha256(f"{structure} {sorted(range(len(names)), key=names.__getitem__)}".encode())
        loud = self._graph[-1]
        for variable in self._by_call("variables" if loud else "weights"):  # where nothing is drawn, seeds decide nothing
            value = np.ascontiguousarray(variable.numpy())
            mark.update(f"{value.dtype.name}{value.shape}".encode())
            mark.update(value.tobytes())
        return mark.hexdigest()

    def is_random(self) -> bool:
        """Whether something in it stays in training mode, and so draws at random."""
        return bool(self._graph[-1])

    def has_users_code(self) -> bool:
        """Whether it runs, or may run, code that isn't Keras's."""
        if self._untold.value is None:
            self._untold.value = self._structure() is None
        return bool(self._untold.value)

    def _by_call(self, kind: str) -> list[Any]:
        """The layers' weights or variables in the order of the calls: the model's own order is no part of what it gives."""
        layers = {id(call.operation): call.operation for call in self._graph[0] if call.is_layer}.values()
        return list({id(variable): variable for layer in layers for variable in getattr(layer, kind)}.values())

    def _structure(self, named: frozenset[int] = frozenset()) -> str | None:
        """A digest of all that decides what the model gives, the values of weights apart; None where it can't be told."""
        calls, wanted, masked, output_masks, quiet, loud = self._graph
        found = structure_of(calls, quiet=quiet, named=named)
        given = (wanted, masked, output_masks, sorted(loud), self._graph_inputs.value, self._graph_outputs.value)
        numbers = [*wanted, *(number for call in calls for number in call.outputs)]
        declared = [(spec.shape, spec.dtype) for spec in map(self._all_specs.value.__getitem__, numbers)]
        return None if found is None else hashlib.sha256(f"{found} {given} {declared}".encode()).hexdigest()


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
