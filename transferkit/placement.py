"""`Placement`: on which devices a model is built and trained, in which precision, as a value; `tf.distribute` beneath.

A placement names devices and holds none. `scope()` looks for them, and only then says when one isn't there. What TensorFlow can
set only before it begins (parts of the CPU, the memory of GPUs, the connections between workers) is set there too, so the first
scope belongs at the beginning of a script.

A process has one strategy: several in one process come to use the same collectives, and a model that was built under one can't
be trained under another. Imports `_keras`, `_plan`, `errors`, `cluster` and `meeting`.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from typing_extensions import TypedDict, Unpack

from transferkit._keras import keras, tf
from transferkit._plan import JsonValue, register_value
from transferkit.cluster import Cluster, find_cluster
from transferkit.errors import DataError, PlacementError, PlanError, did_you_mean
from transferkit.meeting import check_in

__all__ = [
    "OTHER_ROWS",
    "Placement",
    "check_placement",
    "has_workers",
    "is_chief",
    "running",
    "worker_count",
    "worker_number",
]

#: What a step fails with, among TensorFlow's words, where workers have been given other rows than the chief.
OTHER_ROWS = "The workers have labels of different rows in one step."

_KINDS = ("auto", "cpu", "gpu", "mirrored", "multi_worker", "tpu")
_PRECISIONS = ("float32", "mixed_float16", "mixed_bfloat16")
_BEGIN = "open the scope at the beginning of the script, before the first tensor, model or list of devices"


class _Options(TypedDict, total=False):
    precision: str | None
    jit_compile: bool | Literal["measured"] | None
    memory_growth: bool


@dataclass
class _Process:
    """The strategy of this process, and what it was made for."""

    of: Placement | None = None
    strategy: Any = None
    cluster: Cluster | None = None


_process = _Process()


@register_value
@dataclass(frozen=True)
class Placement:
    """Where a model runs; made by `auto`, `cpu`, `gpu`, `mirrored`, `multi_worker` or `tpu`.

    Args:
        kind: Which of these.
        devices: TensorFlow's names of the devices (`GPU:0`), or the address of a TPU, where they were given.
        precision: `float32`, `mixed_float16` (with a scaled loss) or `mixed_bfloat16`; None for Keras's own setting. Heads that
            `ModelBuilder` makes stay in float32.
        jit_compile: Whether XLA compiles the steps; `"measured"` tries both before each phase that is computed in full; None
            leaves it to Keras, which does it where there is a GPU.
        memory_growth: Whether TensorFlow takes a GPU's memory bit by bit, and not all of it at once.

    Example:
        >>> import transferkit as tk
        >>> placement = tk.Placement.cpu()
        >>> with placement.scope():
        ...     model = tk.ModelBuilder((4,)).classifier(3).build()
        >>> print(placement.describe())
        the CPU, float32
    """

    kind: str
    devices: tuple[str, ...] = ()
    precision: str | None = None
    jit_compile: bool | Literal["measured"] | None = None
    memory_growth: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.kind not in _KINDS:
            problems.append(f"the kind {self.kind!r}{did_you_mean(str(self.kind), _KINDS)}")
        if self.precision is not None and self.precision not in _PRECISIONS:
            problems.append(f"the precision {self.precision!r}{did_you_mean(str(self.precision), _PRECISIONS)}")
        shared_jit = self.jit_compile in (True, "measured") and self.kind in ("mirrored", "multi_worker")
        if self.jit_compile is not None and not isinstance(self.jit_compile, bool) and self.jit_compile != "measured":
            problems.append(f'jit_compile={self.jit_compile!r}; it must be True, False, "measured" or None')
        elif shared_jit:
            problems.append(f"jit_compile={self.jit_compile!r} on several devices; XLA compiles the steps of one")
        if not isinstance(self.memory_growth, bool):
            problems.append(f"memory_growth={self.memory_growth!r}; it must be True or False")
        if self.kind in ("gpu", "mirrored"):
            problems.extend(
                f"the device {device!r}; devices are named like 'GPU:0'"
                for device in self.devices
                if not (isinstance(device, str) and re.fullmatch(r"(?:CPU|GPU):\d+", device))
            )
            again = sorted({device for device in self.devices if self.devices.count(device) > 1})
            problems.extend(f"the device {device!r} twice" for device in again)
        if problems:
            fix = (
                "leave jit_compile out"
                if shared_jit and len(problems) == 1
                else 'Placement.auto(), .cpu(), .gpu(0), .mirrored(["GPU:0", "GPU:1"])'
            )
            raise PlanError("Choosing a placement.", found=problems, fix=fix)

    @classmethod
    def auto(cls, **options: Unpack[_Options]) -> Placement:
        """Whatever is there: several GPUs mirrored, one GPU, or the CPU.

        Args:
            options: `precision`, `jit_compile` and `memory_growth`, as in `Placement`; here and below.
        """
        return cls("auto", **options)

    @classmethod
    def cpu(cls, **options: Unpack[_Options]) -> Placement:
        """The CPU."""
        return cls("cpu", **options)

    @classmethod
    def gpu(cls, index: int = 0, **options: Unpack[_Options]) -> Placement:
        """The GPU with that number, counted from 0."""
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise PlanError("Choosing a GPU.", found=f"the number {index!r}; GPUs are counted from 0")
        return cls("gpu", (f"GPU:{index}",), **options)

    @classmethod
    def mirrored(cls, devices: Sequence[str] | None = None, **options: Unpack[_Options]) -> Placement:
        """A copy of the model on each of several devices of this machine, which share the rows of each batch
        (`tf.distribute.MirroredStrategy`).

        Args:
            devices: TensorFlow's names, `["GPU:0", "GPU:1"]`; None for every GPU. `["CPU:0", "CPU:1"]` are two parts of the one
                CPU, for trying out what several devices do: they make nothing faster.
            options: As for `auto`.
        """
        if devices is not None and (isinstance(devices, str) or not isinstance(devices, Sequence) or not devices):
            count = devices if isinstance(devices, int) and not isinstance(devices, bool) and 0 < devices < 100 else 2
            listed = [devices] if isinstance(devices, str) and devices else [f"GPU:{index}" for index in range(count)]
            raise PlanError(
                "Choosing devices to mirror a model on.",
                found=f"{devices!r}; it must be a list of their names, or nothing for every GPU",
                fix=f"Placement.mirrored({listed!r})",
            )
        return cls("mirrored", tuple(devices or ()), **options)

    @classmethod
    def multi_worker(cls, **options: Unpack[_Options]) -> Placement:
        """A copy of the model in each of several processes, on one machine or many, which share the rows of each batch
        (`tf.distribute.MultiWorkerMirroredStrategy`).

        Every process runs the same script on the same data. Which processes there are is read from the environment: `TF_CONFIG`,
        which `python -m transferkit launch` sets, or what Slurm, torchrun and the like set.
        """
        return cls("multi_worker", **options)

    @classmethod
    def tpu(cls, address: str = "", **options: Unpack[_Options]) -> Placement:
        """A TPU (`tf.distribute.TPUStrategy`), where TensorFlow has one.

        Args:
            address: Its name or address; the one of this machine where nothing is given.
            options: As for `auto`.
        """
        return cls("tpu", (address,) if address else (), **options)

    def __repr__(self) -> str:
        subject = {"gpu": [str(device.split(":")[1]) for device in self.devices], "tpu": [repr(name) for name in self.devices]}
        listed = [repr(list(self.devices))] if self.devices else []
        chosen = [
            f"{item.name}={getattr(self, item.name)!r}" for item in fields(self)[2:] if getattr(self, item.name) != item.default
        ]
        return f"Placement.{self.kind}({', '.join([*subject.get(self.kind, listed), *chosen])})"

    def to_json_value(self) -> JsonValue:
        return {**{item.name: getattr(self, item.name) for item in fields(self)}, "devices": list(self.devices)}

    @classmethod
    def from_json_value(cls, value: JsonValue, *, custom_objects: Mapping[str, Any]) -> Placement:
        del custom_objects
        return cls(**{**value, "devices": tuple(value["devices"])})

    def describe(self) -> str:
        """One line that says which devices these are on this machine, in which precision, and whether XLA compiles the steps."""
        there = self._resolved()
        gpus = _gpus()
        named = [
            f"{name} (not on this machine)" if name.startswith("GPU") and name not in gpus else name for name in there.devices
        ]
        words = [named[0] if named else "the CPU"]
        if there.kind == "mirrored":
            words = [f"mirrored over {', '.join(named or gpus) or 'every GPU, of which this machine has none'}"]
        elif there.kind == "tpu":
            words = [f"the TPU {' '.join(there.devices)}".rstrip()]
        elif there.kind == "multi_worker":
            words = ["the workers that the environment names" if _process.cluster is None else str(_process.cluster)]
        words.append(self.precision or str(keras.config.dtype_policy().name))
        xla = {True: "on", False: "off", "measured": "where it is measured to be faster"}
        words += [] if self.jit_compile is None else [f"XLA {xla[self.jit_compile]}"]
        words += ["memory as it is needed"] if self.memory_growth else []
        return ", ".join(words)

    def _resolved(self) -> Placement:
        """This placement with `auto` decided by what is there."""
        if self.kind != "auto":
            return self
        gpus = _gpus()
        if len(gpus) > 1:
            return replace(self, kind="mirrored", devices=tuple(gpus), jit_compile=None)
        return replace(self, kind="gpu", devices=("GPU:0",)) if gpus else replace(self, kind="cpu")

    def alone(self) -> Placement:
        """One device of this process in the same precision, for what it does without the others: its first GPU, or the CPU."""
        gpus = _gpus()
        return replace(self, kind="gpu" if gpus else "cpu", devices=tuple(gpus[:1]))

    # -- what TensorFlow has

    def _failed(self, found: str | Sequence[str], *, cause: str | None = None, fix: str | None = None) -> PlacementError:
        return PlacementError(f"Placing a model by {self!r}.", found=found, cause=cause, fix=fix)

    def _prepare(self) -> None:
        """Sets what can be set only before TensorFlow begins."""
        parts = [int(device[4:]) + 1 for device in self.devices if device.startswith("CPU:")]
        (cpu, *_) = tf.config.list_physical_devices("CPU")
        have = tf.config.get_logical_device_configuration(cpu) or [None]
        try:
            if self.kind == "mirrored" and max(parts, default=1) > len(have):
                tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * max(parts))
            for gpu in tf.config.list_physical_devices("GPU") if self.memory_growth else ():
                if not tf.config.experimental.get_memory_growth(gpu):
                    tf.config.experimental.set_memory_growth(gpu, True)
        except RuntimeError as error:
            parts_now = f"its CPU is {len(have)} device{'s' if len(have) > 1 else ''}"
            what = "the memory of its GPUs is taken" if self.memory_growth else parts_now
            raise self._failed(f"TensorFlow has begun, and {what}", cause=str(error), fix=_BEGIN) from error

    def _check_devices(self) -> None:
        there = {device.name.split("device:")[1] for device in tf.config.list_logical_devices()}
        missing = [device for device in self.devices if device not in there]
        if missing or (self.kind == "mirrored" and not self.devices and not any("GPU" in name for name in there)):
            raise self._failed(
                [f"no device {device}" for device in missing] or "no GPU on this machine",
                cause=f"TensorFlow sees {', '.join(sorted(there))}",
                fix="Placement.auto() takes what is there; for a GPU, install tensorflow[and-cuda] and a driver",
            )

    def _strategy(self) -> Any:
        """The strategy, made on first use and kept for the life of the process; None on one device.

        Raises:
            PlacementError: when a device, a worker or a TPU isn't there, or the process has another strategy.
        """
        if keras.distribution.distribution() is not None:
            raise self._failed(
                "a distribution set by keras.distribution",
                cause="on TensorFlow it is accepted and does nothing",
                fix="keras.distribution.set_distribution(None)",
            )
        self._prepare()
        here = self._resolved()
        if here.kind not in ("multi_worker", "tpu"):
            here._check_devices()
        if here.kind in ("cpu", "gpu"):
            return None
        place = (here.kind, here.devices)
        if _process.of is None:
            _process.strategy = here._made()
            _process.of = here
        elif place != (_process.of.kind, _process.of.devices):
            raise self._failed(
                f"a process that runs by {_process.of!r}",
                cause="strategies share the collectives of a process, so it can have one",
                fix="start another process for another placement",
            )
        return _process.strategy

    def _made(self) -> Any:
        if self.kind == "mirrored":
            return tf.distribute.MirroredStrategy(list(self.devices) or None)
        if self.kind == "multi_worker":
            return self._met()
        try:
            resolver = tf.distribute.cluster_resolver.TPUClusterResolver(*self.devices)
            tf.config.experimental_connect_to_cluster(resolver)
            tf.tpu.experimental.initialize_tpu_system(resolver)
            return tf.distribute.TPUStrategy(resolver)
        except (ValueError, RuntimeError, tf.errors.OpError) as error:
            raise self._failed(
                f"no TPU: {str(error).splitlines()[0]}",
                cause="TensorFlow has TPUs on Google Cloud's machines, and nowhere else",
                fix="Placement.auto() takes what is there",
            ) from error

    def _met(self) -> Any:
        """The strategy of the workers, once all are there; None for a single one, which has nothing to share."""
        found = find_cluster()
        if found is None:
            raise self._failed(
                "no workers named in the environment",
                cause="the script was started by itself: TF_CONFIG, TRANSFERKIT_WORKERS, RANK and Slurm's variables aren't set",
                fix="python -m transferkit launch --workers 2 script.py",
            )
        cluster = _process.cluster = found if found.size == 1 else check_in(found)
        if cluster.size == 1:
            return None
        resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec({"worker": list(cluster.workers)}), task_type="worker", task_id=cluster.index, rpc_layer="grpc"
        )
        try:
            return tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
        except RuntimeError as error:
            raise self._failed("TensorFlow has begun, without the other workers", cause=str(error), fix=_BEGIN) from error

    # -- in use

    @contextlib.contextmanager
    def scope(self) -> Iterator[Any]:
        """Inside it, models are built here, in this precision: on the first device, from which `fit` and `run` share out to all.

        Gives the `tf.distribute` strategy, whose own scope isn't open in it, or None on one device.

        Raises:
            PlacementError: when a device, a worker or a TPU isn't there, TensorFlow has begun in a way that doesn't go with it,
                or the process has another strategy.
        """
        strategy = self._strategy()
        before = keras.config.dtype_policy()
        if self.precision is not None:
            keras.config.set_dtype_policy(self.precision)
        try:
            with self._entered():
                yield strategy
        finally:
            keras.config.set_dtype_policy(before)

    def _entered(self) -> contextlib.AbstractContextManager[Any]:
        here = self._resolved()
        if here.kind == "tpu":
            return _process.strategy.scope()  # type: ignore[no-any-return]
        # Where there is nothing but one CPU, TensorFlow needs no word; with one, it takes longer for a step.
        only = here.kind == "cpu" and len(tf.config.list_logical_devices()) == 1
        if only or here.kind == "multi_worker" or not (here.devices or here.kind == "cpu"):
            return contextlib.nullcontext()
        return tf.device(here.devices[0] if here.devices else "CPU:0")  # type: ignore[no-any-return]

    def _check_model(self, model: keras.Model) -> None:
        asked = f"Training the model {model.name!r} by {self!r}."
        if model.distribute_strategy.num_replicas_in_sync > 1:
            raise PlacementError(
                asked,
                found="a model built in the scope of a strategy of tf.distribute",
                cause="its weights are the strategy's, a copy on each device",
                fix="build or open it in the placement's scope: `with placement.scope(): model = …`",
            )
        if self.precision is not None and model.dtype_policy.name != self.precision:
            raise PlacementError(
                asked,
                found=f"a model built outside the placement's scope, in {model.dtype_policy.name}",
                cause="a layer has its precision from when it is made",
                fix="build or open it inside: `with placement.scope(): model = …`",
            )


def _gpus() -> list[str]:
    """TensorFlow's names of the GPUs of this process. Asking for them doesn't begin it, as asking for logical devices does."""
    devices: list[Any] = tf.config.list_physical_devices("GPU")
    return [f"GPU:{index}" for index in range(len(devices))]


def check_placement(placement: Any, asked: str) -> None:
    """Raises a PlanError for what isn't a `Placement` or None."""
    if placement is not None and not isinstance(placement, Placement):
        names = [kind for kind in _KINDS if kind == placement] if isinstance(placement, str) else []
        raise PlanError(
            asked,
            found=f"placement={placement!r}",
            cause="a placement is a value of its own, in whose scope the model is built",
            fix=f"placement = tk.Placement.{names[0] if names else 'auto'}(); with placement.scope(): model = …",
        )


def _check_not_alone() -> None:
    """Looks at a training without a placement in a process that has one, which it would go by only if it were given it.

    Raises:
        PlacementError: where the process is one of several workers, which would each train for themselves.
    """
    asked = "Training a model without a placement."
    if _process.cluster is not None and _process.cluster.size > 1:
        raise PlacementError(
            asked,
            found=f"a process that is {_process.cluster}",
            cause="each worker would train by itself, and all write the same files",
            fix="fit(…, placement=placement); placement=placement.alone() where each is to train by itself",
        )
    if _process.strategy is not None:
        warnings.warn(
            f"{asked} It runs on one device, though the process runs by {_process.of!r}: fit(…, placement=placement) shares it.",
            stacklevel=6,
        )
        return
    with contextlib.suppress(PlacementError):  # an environment that names no workers rightly, and isn't ours to judge
        found = find_cluster()
        if found is not None and found.size > 1:
            warnings.warn(
                f"{asked} The environment says that this is {found}, and each trains by itself: "
                "tk.Placement.multi_worker() has them train together.",
                stacklevel=6,
            )


def has_workers(strategy: Any) -> bool:
    """Whether the replicas of a strategy are in several processes."""
    return getattr(strategy, "cluster_resolver", None) is not None


def worker_number(strategy: Any) -> int:
    """Which of the workers this process is."""
    return int(strategy.cluster_resolver.task_id)


def worker_count(strategy: Any) -> int:
    """How many workers there are."""
    return int(strategy.cluster_resolver.cluster_spec().num_tasks("worker"))


def is_chief(strategy: Any) -> bool:
    """Whether this process writes the files of a run: the first worker, or the only one."""
    return not has_workers(strategy) or worker_number(strategy) == 0


@contextlib.contextmanager
def running(placement: Placement | None, model: keras.Model) -> Iterator[Any]:
    """Inside it, a model is trained or judged where it was built. Gives the strategy, or None on one device.

    Args:
        placement: Where the model was built; None for wherever that was.
        model: A built model.

    Raises:
        PlacementError: as in `Placement.scope`; when the model was built elsewhere or in another precision; inside a scope of
            a strategy of tf.distribute, which the placement isn't in; and without a placement in one of several workers.
        DataError: when several workers come to take a step of different rows.
    """
    check_placement(placement, "Running a model.")
    if placement is None:
        _check_not_alone()
        yield None
        return
    strategy = placement._strategy()
    placement._check_model(model)
    if tf.distribute.has_strategy():
        raise PlacementError(
            f"Running the model {model.name!r} by {placement!r}.",
            found="a call inside `strategy.scope()` of tf.distribute",
            cause="optimizer and metrics are made once for all replicas, outside of it",
            fix="call it after the block",
        )
    try:
        with placement._entered():
            yield strategy
    except tf.errors.InvalidArgumentError as error:
        if OTHER_ROWS not in str(error):
            raise
        raise DataError(
            f"Running the model {model.name!r} by {placement!r}.",
            found="labels in a step that aren't the same on all workers",
            cause="data that each worker shuffles or draws in its own way, where all must go over the same rows in one order",
            fix="give shuffle(…, seed=1) and other random parts a seed, or arrays or tk.Data, which the library orders",
        ) from None
