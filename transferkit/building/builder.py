"""`ModelBuilder`: the plan of a Keras model, layer by layer.

A builder goes along one line of layers; `branch` gives a point on it a name, `at` goes back to one, `merge` joins several.
What `build` gives is a plain functional `keras.Model`. May import Keras and the floors below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar, final

from typing_extensions import Self

from transferkit._keras import keras
from transferkit._objects import FunctionReference, HeldModel, KerasObject, as_value, check_names
from transferkit._plan import FrozenMapping, Plan, Step
from transferkit.building.backbones import BACKBONES, backbone_model, check_name, preprocess
from transferkit.building.heads import make_head
from transferkit.building.pca import PCA
from transferkit.errors import ModelError, PlanError, did_you_mean, shorten

__all__ = ["ModelBuilder"]

_MERGES: dict[str, Callable[..., Any]] = {
    "add": keras.layers.Add,
    "average": keras.layers.Average,
    "concatenate": keras.layers.Concatenate,
    "dot": keras.layers.Dot,
    "maximum": keras.layers.Maximum,
    "minimum": keras.layers.Minimum,
    "multiply": keras.layers.Multiply,
    "subtract": keras.layers.Subtract,
    "attention": keras.layers.Attention,
}


@final
class ModelBuilder(Plan):
    """The plan of a Keras model; `build` makes it.

    Args:
        input_shape: The shape of one example without the batch, `(784,)`; or a dict of several inputs' shapes by name. A length
            that isn't known is None.
        dtype: The dtype of the inputs, or a dict of dtypes by name.

    Example:
        >>> import transferkit as tk
        >>> plan = tk.ModelBuilder((784,)).dense(128, "relu").dense(64, "relu").classifier(10)
        >>> plan
        ModelBuilder((784,)).dense(128, 'relu').dense(64, 'relu').classifier(10)
        >>> model = plan.build()
        >>> model.output_shape
        (None, 10)
    """

    STEPS: ClassVar[frozenset[str]] = frozenset(
        {
            "at", "augment", "backbone", "branch", "classifier", "conv", "dense", "dropout", "flatten",
            "layer", "merge", "multi_label", "output", "pca", "pool", "regression",
        }
    )  # fmt: skip

    def __init__(self, input_shape: Sequence[int | None] | Mapping[str, Sequence[int | None]], *, dtype: Any = None) -> None:
        shapes = dict(input_shape) if isinstance(input_shape, Mapping) else {"input": input_shape}
        problems = []
        for name, shape in shapes.items():
            if isinstance(shape, (str, int)) or not all(map(_is_size, shape)):
                problems.append(f"the shape {shape!r} for the input {name!r}; sizes are whole numbers above 0, or None")
        if not shapes:
            problems.append("no input at all")
        if problems:
            raise PlanError("Planning a model.", found=problems, fix="give the shape of one example: ModelBuilder((784,))")
        self._begin(input_shape=input_shape, dtype=dtype)

    # Layers

    def dense(self, units: int, activation: Any = None, *, name: str | None = None, **options: Any) -> Self:
        """A fully connected layer.

        Args:
            units: Its width.
            activation: A name of Keras's, a function or a layer of yours.
            name: The layer's name.
            options: Further arguments of `keras.layers.Dense` (`kernel_initializer`, `kernel_constraint`, `use_bias` …).
        """
        _positive("ModelBuilder.dense", units=units)
        kept = {key: as_value(value) for key, value in options.items()}
        check_names("activation", activation, keras.activations)
        return self._then("dense", units=units, activation=as_value(activation), name=name, options=kept)

    def conv(
        self, filters: int, kernel_size: int = 3, activation: Any = None, *, name: str | None = None, **options: Any
    ) -> Self:
        """A convolution over as many axes as the input has in space (one, two or three), with `padding="same"` unless told
        otherwise.

        Args:
            filters: How many.
            kernel_size: Their extent along each axis.
            activation: A name of Keras's, a function or a layer of yours.
            name: The layer's name.
            options: Further arguments of `keras.layers.Conv1D`, `Conv2D` or `Conv3D`.
        """
        _positive("ModelBuilder.conv", filters=filters, kernel_size=kernel_size)
        kept = {key: as_value(value) for key, value in options.items()}
        check_names("activation", activation, keras.activations)
        return self._then(
            "conv", filters=filters, kernel_size=kernel_size, activation=as_value(activation), name=name, options=kept
        )

    def layer(self, layer: Any, *, name: str | None = None) -> Self:
        """Any Keras layer or model, of Keras or of yours.

        Args:
            layer: A layer or model; each `build` makes a fresh one of the same configuration, and copies the weights of one
                that has any. Or a function without arguments that makes one, called at each `build`.
            name: A name for this point of the line, to come back to with `at` or `merge`.

        Raises:
            PlanError: for a layer that gives no configuration to make a fresh one from.
        """
        value = as_value(layer)
        if not isinstance(value, (KerasObject, HeldModel, FunctionReference)) or isinstance(layer, type):
            raise PlanError(
                "ModelBuilder.layer was asked to add a layer.",
                found=f"{layer!r}, which is no Keras layer",
                cause="a class was given in place of a layer" if isinstance(layer, type) else None,
                fix="give a layer, keras.layers.Dense(3), or a function that makes one",
            )
        return self._then("layer", layer=value, name=name)

    def dropout(self, rate: float, *, name: str | None = None) -> Self:
        """Sets a share `rate` (0 to 1) of the values to 0 while training."""
        if not 0 <= rate < 1:
            raise PlanError("ModelBuilder.dropout was given a rate.", found=f"{rate!r}; it must be at least 0 and under 1")
        return self._then("dropout", rate=rate, name=name)

    def flatten(self, *, name: str | None = None) -> Self:
        """Puts all axes of an example into one."""
        return self._then("flatten", name=name)

    def pool(self, kind: str = "avg", *, name: str | None = None) -> Self:
        """Reduces every axis but the last to one value: `avg` their mean, `max` their largest."""
        if kind not in ("avg", "max"):
            raise PlanError("ModelBuilder.pool was given a kind.", found=f"{kind!r}", fix="pool('avg') or pool('max')")
        return self._then("pool", kind=kind, name=name)

    def pca(self, components: int, *, whiten: bool = False, name: str | None = None) -> Self:
        """Principal components of the features at this point: fewer inputs for what follows, against overfitting.

        The layer learns from rows, not by gradients: `Recipe(…).adapt("pca")` lets it learn from the training rows of each run.

        Args:
            components: How many are kept.
            whiten: Whether each gets unit variance.
            name: The layer's name, `pca` where nothing is said.
        """
        _positive("ModelBuilder.pca", components=components)
        return self._then("pca", components=components, whiten=whiten, name=name)

    def augment(self, *layers: Any) -> Self:
        """Random changes of the input that are on while training and off otherwise: Keras's augmentation layers or yours.

        Args:
            layers: For instance `keras.layers.RandomFlip("horizontal")`.
        """
        if not layers:
            raise PlanError(
                "ModelBuilder.augment was called.", found="no layer", fix='.augment(keras.layers.RandomFlip("horizontal"))'
            )
        return self._then("augment", layers=tuple(as_value(layer) for layer in layers))

    def backbone(self, model: Any, *, weights: str | None = "imagenet", preprocessing: bool = True, **options: Any) -> Self:
        """A pretrained network without its top, and what prepares RGB pixels (0 to 255) for it.

        Args:
            model: A name of `keras.applications` ("MobileNetV2"), or a model of yours, which is copied with its weights at each
                build.
            weights: For a name: `imagenet` (from ~/.keras/models, else downloaded by Keras), None for random ones, or a file.
            preprocessing: For a name: whether its preprocessing is put before it. Off when the inputs are prepared already.
            options: Further arguments of the function in `keras.applications` (`alpha=0.35`).
        """
        value = as_value(model)
        if isinstance(value, str):
            check_name(value)
        elif not isinstance(value, (HeldModel, FunctionReference, KerasObject)):
            raise PlanError(
                "ModelBuilder.backbone was asked to build on a model.",
                found=f"{model!r}",
                fix=f"give a Keras model, or a name: {shorten(list(BACKBONES)[:4])} …",
            )
        return self._then("backbone", model=value, weights=weights, preprocessing=preprocessing, options=options)

    # Branches

    def branch(self, name: str) -> Self:
        """Gives this point of the line a name."""
        return self._then("branch", name=name)

    def at(self, name: str) -> Self:
        """Goes on from the point, the layer or the input of that name."""
        return self._then("at", name=name)

    def merge(self, how: Any, *names: str, name: str | None = None) -> Self:
        """Joins this point of the line with others.

        Args:
            how: `add`, `average`, `concatenate`, `dot`, `maximum`, `minimum`, `multiply`, `subtract`, `attention`, or a layer
                of yours that takes a list.
            names: The other points: names given by `branch`, of layers or of inputs. This point comes first in the list.
            name: A name for the result.
        """
        value = as_value(how)
        if isinstance(value, str) and value not in _MERGES:
            raise PlanError(
                "ModelBuilder.merge was told how.",
                found=f"{how!r}{did_you_mean(value, _MERGES)}",
                fix=f"one of {', '.join(map(repr, _MERGES))}, or a layer",
            )
        if not names:
            raise PlanError("ModelBuilder.merge was called.", found="nothing to merge with", fix='.merge("add", "skip")')
        return self._then("merge", how=value, names=tuple(names), name=name)

    # Heads

    def classifier(self, classes: int | Sequence[str], *, name: str = "head") -> Self:
        """An output that gives each class a probability; they sum to 1.

        Args:
            classes: How many, at least 2, or their names in the order of the labels 0, 1, 2 …
            name: The layer's and the output's name.
        """
        _count(classes, "ModelBuilder.classifier", least=2)
        return self._then("classifier", classes=classes, name=name)

    def multi_label(self, labels: int | Sequence[str], *, name: str = "head") -> Self:
        """An output that gives each label a probability of its own; any number of them may hold.

        Args:
            labels: How many, or their names. One is a yes-or-no classifier.
            name: The layer's and the output's name.
        """
        _count(labels, "ModelBuilder.multi_label", least=1)
        return self._then("multi_label", labels=labels, name=name)

    def regression(self, units: int = 1, *, name: str = "head") -> Self:
        """An output of `units` plain numbers."""
        _positive("ModelBuilder.regression", units=units)
        return self._then("regression", units=units, name=name)

    def output(self, name: str) -> Self:
        """Makes this point an output of the model, beside the heads."""
        return self._then("output", name=name)

    # What follows from the plan

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes of the last head, or () where only their number was given."""
        for step in reversed(self._steps):
            if step.name in ("classifier", "multi_label"):
                classes = next(iter(self._bound(step).values()))
                return classes if isinstance(classes, tuple) else ()
        return ()

    def build(self, *, name: str = "model", seed: int | None = None) -> Any:
        """Makes the model. Changes nothing but, with a seed, Keras's global random state.

        Args:
            name: The model's name.
            seed: Fixes the initial weights, as `keras.utils.set_random_seed` does.

        Returns:
            A functional `keras.Model`, not compiled.

        Raises:
            ModelError: when a layer can't take what comes before it; it names the step.
        """
        if seed is not None:
            keras.utils.set_random_seed(seed)
        line = _Line(self._start)
        for step in self._steps:
            line.add(step, self._bound(step))
        return line.finish(name)


class _Line:
    """The state of one build: where the line is, and which points have names."""

    def __init__(self, start: Step) -> None:
        shape = start.positional[0]
        dtype = start.arguments.get("dtype")
        shapes = shape if isinstance(shape, FrozenMapping) else {"input": shape}
        dtypes = dtype if isinstance(dtype, FrozenMapping) else dict.fromkeys(shapes, dtype)
        self.inputs = {key: keras.Input(tuple(value), dtype=dtypes.get(key), name=key) for key, value in shapes.items()}
        self.points: dict[str, Any] = dict(self.inputs)
        self.outputs: dict[str, Any] = {}
        self.current: Any = next(iter(self.inputs.values()))
        self.counts: dict[str, int] = {}
        self.single = not isinstance(shape, FrozenMapping)

    def name(self, kind: str) -> str:
        """A layer name that depends on this model alone: `dense`, `dense_1` … Keras's own count over the whole process."""
        number = self.counts.get(kind, 0)
        self.counts[kind] = number + 1
        return kind if number == 0 else f"{kind}_{number}"

    def add(self, step: Step, arguments: dict[str, Any]) -> None:
        try:
            result = getattr(self, f"_{step.name}")(**arguments)
        except (ModelError, PlanError):
            raise
        except Exception as error:  # Keras raises ValueError, TypeError and others for a layer that doesn't fit
            raise ModelError(
                f"Building .{step!r} of a model.",
                found=f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}",
                cause=f"what comes before it has the shape {getattr(self.current, 'shape', None)}",
            ) from error
        if result is not None:
            self.current = result
            label = arguments.get("name")
            if label:
                self.points[label] = result

    def finish(self, name: str) -> Any:
        outputs = self.outputs or {"output": self.current}
        if len(outputs) == 1:
            (given,) = outputs.values()
        else:
            given = dict(outputs)
        (inputs,) = self.inputs.values() if self.single else ([dict(self.inputs)])
        try:
            return keras.Model(inputs, given, name=name)
        except ValueError as error:
            raise ModelError(
                "Building a model.",
                found=str(error).strip().splitlines()[0],
                cause="an input that no output depends on, or two layers of one name",
            ) from error

    def point(self, name: str) -> Any:
        if name not in self.points:
            raise ModelError(
                f"Going on from the point {name!r} of a model.",
                found=f"no point, layer or input of that name before this step{did_you_mean(name, self.points)}",
                fix=f"known here: {', '.join(self.points)}; give a point a name with .branch({name!r})",
            )
        return self.points[name]

    # One method for each step; the argument names are the step's.

    def _dense(self, units: int, activation: Any, name: str | None, options: Mapping[str, Any]) -> Any:
        layer = keras.layers.Dense(units, activation=_fresh(activation), name=name or self.name("dense"), **_fresh_all(options))
        return layer(self.current)

    def _conv(self, filters: int, kernel_size: int, activation: Any, name: str | None, options: Mapping[str, Any]) -> Any:
        rank = len(self.current.shape) - 2
        if rank not in (1, 2, 3):
            raise ModelError(
                f"Building a convolution on a tensor of shape {self.current.shape}.",
                found=f"{rank} axes in space",
                cause="a convolution needs one to three axes in space and one of channels",
                fix="add the channels: .layer(keras.layers.Reshape((28, 28, 1)))",
            )
        kind = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)[rank - 1]
        settings = {"padding": "same", **_fresh_all(options)}
        return kind(filters, kernel_size, activation=_fresh(activation), name=name or self.name("conv"), **settings)(self.current)

    def _layer(self, layer: Any, name: str | None) -> Any:
        del name  # names the point only: a user's layer keeps its own name
        return _fresh(layer, call=True)(self.current)

    def _dropout(self, rate: float, name: str | None) -> Any:
        return keras.layers.Dropout(rate, name=name or self.name("dropout"))(self.current)

    def _flatten(self, name: str | None) -> Any:
        return keras.layers.Flatten(name=name or self.name("flatten"))(self.current)

    def _pool(self, kind: str, name: str | None) -> Any:
        rank = len(self.current.shape) - 2
        if rank not in (1, 2, 3):
            raise ModelError(
                f"Pooling a tensor of shape {self.current.shape}.",
                found="no axes between the batch and the channels to pool over",
                fix="leave out .pool(); the tensor is one row for each example already",
            )
        word = "Average" if kind == "avg" else "Max"
        layer = getattr(keras.layers, f"Global{word}Pooling{rank}D")
        return layer(name=name or self.name(f"pool_{kind}"))(self.current)

    def _pca(self, components: int, whiten: bool, name: str | None) -> Any:
        return PCA(components, whiten=whiten, name=name or self.name("pca"))(self.current)

    def _augment(self, layers: tuple[Any, ...]) -> Any:
        tensor = self.current
        for layer in layers:
            tensor = _fresh(layer, call=True)(tensor)
        return tensor

    def _backbone(self, model: Any, weights: str | None, preprocessing: bool, options: Mapping[str, Any]) -> Any:
        if not isinstance(model, str):
            return _fresh(model, call=True)(self.current)
        network = backbone_model(model, input_shape=tuple(self.current.shape[1:]), weights=weights, options=_fresh_all(options))
        tensor = preprocess(self.current, BACKBONES[model]) if preprocessing else self.current
        return network(tensor)

    def _branch(self, name: str) -> Any:
        self.points[name] = self.current
        return self.current

    def _at(self, name: str) -> None:
        self.current = self.point(name)

    def _merge(self, how: Any, names: tuple[str, ...], name: str | None) -> Any:
        tensors = [self.current, *(self.point(other) for other in names)]
        if not isinstance(how, str):
            return _fresh(how, call=True)(tensors)
        options = {"axes": -1} if how == "dot" else {}
        return _MERGES[how](name=name or self.name(how), **options)(tensors)

    def _classifier(self, classes: Any, name: str) -> Any:
        return self._head(_count(classes, "classifier", least=2), "softmax", name, classes)

    def _multi_label(self, labels: Any, name: str) -> Any:
        return self._head(_count(labels, "multi_label", least=1), "sigmoid", name)

    def _regression(self, units: int, name: str) -> Any:
        return self._head(units, "linear", name)

    def _head(self, units: int, activation: str, name: str, classes: Any = ()) -> None:
        names = classes if isinstance(classes, tuple) else ()
        self._output(name, make_head(units, activation, name=name, class_names=names)(self.current))

    def _output(self, name: str, tensor: Any = None) -> None:
        if name in self.outputs:
            raise ModelError(
                f"Adding the output {name!r} to a model.",
                found="an output of that name already",
                fix=f'give it another: name="{name}_2"',
            )
        if tensor is None:
            # A layer of that name makes it the name Keras gives the output, its loss and its metrics.
            tensor = keras.layers.Identity(name=name)(self.current)
        self.outputs[name] = tensor
        self.points[name] = tensor


def _fresh(value: Any, *, call: bool = False) -> Any:
    """A new object from what the plan keeps; `call` for a function that makes a layer."""
    if isinstance(value, FunctionReference):
        return value.fresh()() if call else value.fresh()
    if isinstance(value, (KerasObject, HeldModel)):
        return value.fresh()
    return value


def _fresh_all(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _fresh(value) for key, value in options.items()}


def _is_size(size: Any) -> bool:
    return size is None or (isinstance(size, Integral) and not isinstance(size, bool) and int(size) > 0)


def _positive(asked: str, **values: Any) -> None:
    problems = [
        f"{name}={value!r}; it must be a whole number above 0"
        for name, value in values.items()
        if value is None or not _is_size(value)
    ]
    if problems:
        raise PlanError(f"{asked} was called.", found=problems)


def _count(classes: Any, asked: str, *, least: int) -> int:
    """How many classes were asked for, by number or by names."""
    number = int(classes) if isinstance(classes, Integral) else len(classes)
    names = [] if isinstance(classes, Integral) else list(classes)
    problems = []
    if isinstance(classes, str):
        problems.append(f"one text, {classes!r}, in place of a list of names")
    elif number < least:
        problems.append(f"{number} classes; at least {least} are needed")
    repeated = sorted({str(name) for name in names if names.count(name) > 1})
    if repeated and not isinstance(classes, str):
        problems.append(f"names that stand twice: {shorten(repeated)}")
    if problems:
        fix = ".multi_label(1) makes a yes-or-no classifier with one unit" if least == 2 and number == 1 else None
        raise PlanError(f"{asked} was told the classes.", found=problems, fix=fix)
    return number
