"""One file met with one model under one plan: matched, every name, shape, dtype and value checked, and ready to be assigned.

May import Keras and the floors below.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from transferkit.class_names import class_names_of, name_classes
from transferkit.errors import shorten
from transferkit.weights.adapters import Channels, Classes, Positions, Settings, Vocabulary, adaptation
from transferkit.weights.assigning import Assignment, assign_all
from transferkit.weights.composing import Arranged, arranged
from transferkit.weights.differences import differences, torch_notes
from transferkit.weights.digest import SMALL, digest_of, name_of
from transferkit.weights.mapping import FileArray, Match, ModelVariable, Pair, Rules
from transferkit.weights.matching import match
from transferkit.weights.names import kind_of
from transferkit.weights.old_files import arranged_old_file
from transferkit.weights.readers import Archive
from transferkit.weights.readers.archive import Stretch
from transferkit.weights.report import LoadedTensor, LoadReport, by_layer_and_reason
from transferkit.weights.sources import file_arrays, looks_like_torch
from transferkit.weights.streaming import Looked, gather, look_over
from transferkit.weights.torch_layouts import arranged_torch
from transferkit.weights.values import bad_values, dtype_problem, lossy_cast
from transferkit.weights.variables import Slot, check_built, flattened_shapes, leaf_layers_of, slots_of, values_of

__all__ = ["TORCH_WORDS", "Staged", "Wishes"]

# What PyTorch calls a variable that Keras calls by the key.
TORCH_WORDS = {
    "kernel": ("weight", "kernel"),
    "embeddings": ("weight",),
    "gamma": ("weight", "gamma"),
    "beta": ("bias", "beta"),
    "scale": ("weight",),
    "alpha": ("weight",),
    "moving_mean": ("running_mean",),
    "moving_variance": ("running_var",),
}
_COUNTER = "num_batches_tracked"
_KEPT = 64 << 20  # bytes of values that are kept from when they are checked until they are in their place
_LARGE = 1 << 20  # bytes from which an array is read a second time where not all can be kept


@dataclass(frozen=True)
class Wishes:
    """What a plan asks for.

    Args:
        path: The file.
        rules: Of matching.
        layout: How the file stores kernels, where that was said.
        flatten: Shapes that were flattened before a Dense layer, by the layer's path.
        channels: For other input channels.
        classes: For other classes.
        positions: For other position grids.
        vocabularies: For other vocabularies.
        permits: What is let through though it is refused by default.
        min_coverage: The least share of the model's parameters to be loaded.
    """

    path: str
    rules: Rules
    layout: str | None = None
    flatten: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    channels: tuple[Channels, ...] = ()
    classes: tuple[Classes, ...] = ()
    positions: tuple[Positions, ...] = ()
    vocabularies: tuple[Vocabulary, ...] = ()
    permits: frozenset[str] = frozenset()
    min_coverage: float = 0.0


class Staged:
    """One file met with one model under one plan."""

    def __init__(self, wishes: Wishes, archive: Archive, model: Any) -> None:
        self.wishes = wishes
        self.model = model
        rules = wishes.rules
        check_built(model, asked=f"Loading {wishes.path!r}.", except_for=(*rules.skip, *rules.skip_in_model))
        self.slots = {slot.name: slot for slot in slots_of(model)}
        self.arranged = self._arranged(archive)
        self.archive = self.arranged.archive
        self.sources = {source.name: source for source in self.arranged.sources}
        kernels = [slot for slot in self.slots.values() if slot.info.variable == "kernel"]
        self._first_convolution = next((s.layer for s in kernels if kind_of(s.info.kind).startswith("conv")), "")
        self._last_layer = kernels[-1].layer if kernels else ""
        self._head = kernels[-1] if kernels else None
        self.settings = self._settings()
        self.counters = [n for n, source in self.sources.items() if wishes.layout == "torch" and source.variable == _COUNTER]
        self.found: Match = match(
            [source for name, source in self.sources.items() if name not in self.counters],
            [slot.info for slot in self.slots.values()],
            rules,
            fits=self._fits,
        )
        self.staged: list[Assignment] = []
        # What is kept until all is checked: everything, or no more than leaves room for values that are worked out anew.
        total = sum(self.slots[pair.target].nbytes for pair in self.found.pairs)
        self._room = _KEPT if total <= _KEPT else _KEPT // 2
        self._keeps_all = total <= _KEPT

    def _arranged(self, archive: Archive) -> Arranged:
        """The file's arrays in the pieces in which Keras 3's layers keep theirs."""
        layout, sources, targets = self.wishes.layout, file_arrays(archive), [slot.info for slot in self.slots.values()]
        if layout == "torch":
            rules = self.wishes.rules
            return arranged_torch(archive, sources, targets, (*rules.skip, *rules.skip_in_file))
        if layout == "keras" or looks_like_torch(archive):
            return arranged(archive, sources, ())
        return arranged_old_file(archive, sources, targets, backend=layout)

    def _settings(self) -> Settings:
        """The adaptations asked for, with what they leave to the model: its first convolution, its head, its Flatten layers."""
        wishes = self.wishes
        torch = wishes.layout == "torch"
        flattened = {**flattened_shapes(self.model), **wishes.flatten} if torch or self.arranged.flattened_first else {}
        return Settings(
            layout="torch" if torch else "keras",
            flattened=flattened,
            channels=tuple(
                dataclasses.replace(rule, patterns=rule.patterns or (self._first_convolution,)) for rule in wishes.channels
            ),
            classes=tuple(
                dataclasses.replace(
                    rule, source=rule.source or self.archive.class_names, patterns=rule.patterns or (self._last_layer,)
                )
                for rule in wishes.classes
            ),
            positions=wishes.positions,
            vocabularies=wishes.vocabularies,
        )

    def _fits(self, source: FileArray, target: ModelVariable) -> bool:
        found = adaptation(source, target, self.settings)
        return found is not None and not found.problem

    # Checking

    def report(self, *, applied: bool) -> LoadReport:
        unclear = self._layout_problems()  # shapes say nothing before the layout is known
        problems = unclear or list(self.found.problems)
        rules = list(self.arranged.rules or ['.layout("torch")']) if unclear else list(self.found.rules)
        pairs = {pair.target: pair for pair in self.found.pairs}
        tensors = self._tensors(pairs)
        if not unclear:
            problems += [f"{t.name!r}: {t.why}" for t in tensors if t.status == "misfit"]
        for twin in self.found.twins:
            first = pairs[twin.target].source
            if not np.array_equal(self.archive.read(first), self.archive.read(twin.source)):
                problems.append(
                    f"{twin.target!r} is one variable in the model, but the file's {first!r} and {twin.source!r} differ"
                )
        decided = [
            {name: why for name, why in reasons.items() if name not in self.found.undecided}
            for reasons in (self.found.missing, self.found.unused)
        ]
        decided = [{}, {}] if unclear else decided
        problems += [f"nothing for the model's {line}" for line in by_layer_and_reason(decided[0])]
        problems += [f"no use for the file's {line}" for line in by_layer_and_reason(decided[1])]
        rules += [] if unclear else self._rules_for_misfits(tensors)
        if not unclear and (other := self._other_classes()):
            problems.append(other)
            rules.append(f".classes(target={list(self._classes())!r})")
        notes = [*self.found.notes, *self._notes()]
        report = LoadReport(
            path=self.wishes.path,
            origin=" ".join(dict.fromkeys(w for w in (self.archive.format, self.archive.framework, self.archive.version) if w)),
            model=str(self.model.name),
            tensors=tuple(tensors),
            unused={
                **self.found.unused,
                **self.found.left_out,
                **dict.fromkeys(self.counters, '.layout("torch"): a counter that Keras has no use for'),
            },
            problems=tuple(problems),
            notes=tuple(notes),
            rules=tuple(dict.fromkeys(rules)),
            applied=applied,
        )
        return self._covered(report)

    def _tensors(self, pairs: Mapping[str, Pair]) -> list[LoadedTensor]:
        """What becomes of each variable. What is plain in the file is looked at together, in as few readings as may be."""
        told: dict[str, LoadedTensor] = {}
        plain: list[tuple[Slot, Pair, Stretch]] = []
        for slot in self.slots.values():
            pair = pairs.get(slot.name)
            if pair is None:
                told[slot.name] = self._left(slot)
            elif isinstance(found := self._decided(slot, pair), Stretch):
                plain.append((slot, pair, found))
            else:
                told[slot.name] = found
        plain.sort(key=lambda item: item[0].nbytes)
        room, small = self._room, 0
        kept: list[bool] = []
        for slot, _, _ in plain:
            nbytes = slot.nbytes
            kept.append(nbytes <= room and (self._keeps_all or nbytes < _LARGE))
            if kept[-1]:
                room -= nbytes
                small += nbytes <= SMALL
        stretches = [stretch for *_, stretch in plain]
        looks = [*gather(stretches[:small]), *look_over(stretches[small:], kept[small:])]
        for (slot, pair, stretch), looked in zip(plain, looks, strict=True):
            told[slot.name] = self._looked_at(slot, pair, stretch, looked)
        return [told[name] for name in self.slots]

    def _told(self, slot: Slot, pair: Pair, status: str, why: str = "", digest: str = "") -> LoadedTensor:
        info = self.archive.arrays[pair.source]
        return LoadedTensor(
            name=slot.name,
            layer=slot.layer,
            shape=slot.info.shape,
            dtype=name_of(slot.dtype),
            status=status,
            source=pair.source,
            source_shape=info.shape,
            source_dtype=name_of(info.dtype),
            how=pair.how,
            why=why,
            digest=digest,
        )

    def _left(self, slot: Slot) -> LoadedTensor:
        skipped = self.found.skipped.get(slot.name)
        return LoadedTensor(
            name=slot.name,
            layer=slot.layer,
            shape=slot.info.shape,
            dtype=name_of(slot.dtype),
            status="skipped" if skipped else "missing",
            why=skipped or self.found.missing[slot.name],
        )

    def _covered(self, report: LoadReport) -> LoadReport:
        problems = list(report.problems)
        wanted = self.wishes.min_coverage
        if report.coverage < wanted:
            problems.append(f"{report.coverage:.1%} of the model's parameters would be loaded, {wanted:.1%} are asked for")
        elif not problems and report.coverage == 0:
            problems.append("nothing would be loaded")
        return LoadReport(**{**vars(report), "problems": tuple(problems), "applied": report.applied and not problems})

    def _decided(self, slot: Slot, pair: Pair) -> LoadedTensor | Stretch:
        """What a variable would get; where that is bytes of the file as they stand, only where they lie."""
        info = self.archive.arrays[pair.source]
        how = adaptation(self.sources[pair.source], slot.info, self.settings)
        as_it_is = how is not None and not how.problem and not how.text and info.dtype == slot.dtype
        if as_it_is and (stretch := self.archive.stretch(pair.source)) is not None:
            return stretch
        named = f"the file's {pair.source!r}"
        if how is None:
            hint = self._hint(slot, info.shape)
            return self._told(slot, pair, "misfit", f"{named} has the shape {info.shape}, the variable {slot.info.shape}{hint}")
        if how.problem:
            return self._told(slot, pair, "misfit", how.problem)
        whole = "integers" in self.wishes.permits and info.dtype.kind in "iub" and slot.dtype.kind == "f"
        if (problem := dtype_problem(info.dtype, slot.dtype)) and not whole:
            return self._told(slot, pair, "misfit", f"{named} has {problem}")
        array = self.archive.read(pair.source)
        if array.shape != info.shape or array.dtype != info.dtype:
            announced = f"{named} was announced as {info.dtype.name} {info.shape}"
            return self._told(slot, pair, "misfit", f"{announced}, it holds {array.dtype.name} {array.shape}")
        if bad := self._bad(slot, array):
            return self._told(slot, pair, "misfit", f"{named} has {bad}")
        cast = f"{info.dtype.name} → {slot.dtype.name}" if lossy_cast(info.dtype, slot.dtype) else ""
        why = "; ".join(word for word in (self.arranged.texts.get(pair.source, ""), how.text, cast) if word)

        def adapted(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            with np.errstate(over="ignore", invalid="ignore"):
                return how.apply(array, lambda: values_of(slot.variable)).astype(slot.dtype, copy=False)

        value = adapted(array)
        assert value.shape == slot.info.shape, (slot.name, how.text)
        digest = digest_of(value)
        self._stage(slot, lambda: adapted(self.archive.read(pair.source)), digest, value=value)
        return self._told(slot, pair, "adapted" if why else "loaded", why, digest)

    def _looked_at(self, slot: Slot, pair: Pair, stretch: Stretch, looked: Looked) -> LoadedTensor:
        """What a variable gets whose bytes stand in the file as they are."""
        read = _reading(self.archive, pair.source)
        # Variances must not be negative, either.
        if not looked.finite or "variance" in slot.info.variable:
            bad = self._bad(slot, read() if looked.content is None else looked.content)
            if bad:
                return self._told(slot, pair, "misfit", f"the file's {pair.source!r} has {bad}")
        self._stage(slot, read, looked.rows, value=looked.content, stretch=stretch)
        return self._told(slot, pair, "loaded", digest=looked.digest)

    def _bad(self, slot: Slot, array: np.ndarray[Any, Any]) -> str:
        """Why an array's values can't be the variable's, unless that is permitted; empty when they can."""
        return "" if "nonfinite" in self.wishes.permits else bad_values(array, slot.dtype, variable=slot.info.variable)

    def _stage(
        self,
        slot: Slot,
        again: Callable[[], np.ndarray[Any, Any]],
        digest: str,
        *,
        value: np.ndarray[Any, Any] | None,
        stretch: Stretch | None = None,
    ) -> None:
        """Keeps a value that was checked until all are, as far as memory may be taken; else how to get it again."""
        nbytes = slot.nbytes
        if value is not None and nbytes <= self._room:
            self._room -= nbytes
            item = Assignment(slot.name, slot.variable, slot.dtype, nbytes, _constant(value), own=stretch is not None)
        else:
            item = Assignment(slot.name, slot.variable, slot.dtype, nbytes, again, digest, stretch)
        self.staged.append(item)

    def _hint(self, slot: Slot, shape: tuple[int, ...]) -> str:
        """The rule that would make an array of another shape fit, as words behind the shapes."""
        to = slot.info.shape
        if len(shape) == len(to) and shape != to:
            if len(to) >= 3 and slot.info.variable == "kernel" and shape[:-2] == to[:-2] and shape[-1] == to[-1]:
                return "; for other input channels .channels() fits it"
            if shape[:-1] == to[:-1] and slot.layer == self._last_layer:
                return "; for other classes .classes(source=[…], target=[…]) copies the rows they share"
            if slot.info.variable == "embeddings" and shape[1:] == to[1:]:
                return f"; for another vocabulary .vocabulary({slot.info.path!r}) copies the rows they share"
        if (
            kind_of(slot.info.kind) == "gru" and slot.info.variable == "bias" and len(shape) != len(to)
        ):  # only `reset_after` has two
            after, when = ("True", "after") if len(shape) == 2 else ("False", "before")
            return f"; the file's layer applies its reset gate {when} the recurrent kernel: build GRU(…, reset_after={after})"
        if len(shape) > 1 and shape != to and sorted(shape) == sorted(to) and self.settings.layout != "torch":
            return '; the axes look exchanged, as in PyTorch: .layout("torch")'
        return ""

    def _rules_for_misfits(self, tensors: list[LoadedTensor]) -> list[str]:
        layers = dict.fromkeys(t.layer for t in tensors if t.status == "misfit")
        return [f'.skip("{layer}/*")' for layer in list(layers)[:8]]

    def _layout_problems(self) -> list[str]:
        if self.wishes.layout is None and looks_like_torch(self.archive):
            return [
                "the file is PyTorch's, whose kernels are stored transposed: "
                'add .layout("torch"), or .layout("keras") if its arrays are in Keras\'s layout'
            ]
        return list(self.arranged.problems)

    def _notes(self) -> list[str]:
        leaves = list(leaf_layers_of(self.model))
        notes = differences(self.archive, leaves, self._layers_of_pairs())
        if self.archive.metadata.get("stripped_prefix"):
            notes.append(f"the prefix {self.archive.metadata['stripped_prefix']!r} of every name was left out")
        if self.settings.layout == "torch":
            notes += torch_notes([slot.owner for slot in self.slots.values()])
        head = [t for t in self.found.pairs if self.slots[t.target].layer == self._last_layer]
        if head and not self.settings.classes and head[0].how in ("structure", "order"):
            notes.append(
                f"the last layer {self._last_layer!r} takes the file's {self.sources[head[0].source].path!r}, matched by "
                f"{head[0].how}: if its classes are other ones, give them with .classes(…) or .skip it"
            )
        worded = [path for path, layer in leaves if hasattr(layer, "get_vocabulary")]
        if worded:
            notes.append(f"a vocabulary is no weight: {shorten(worded)} keep{'s' if len(worded) == 1 else ''} the model's own")
        if self.archive.optimizer_arrays:
            notes.append(
                f"the file also holds optimizer state ({len(self.archive.optimizer_arrays)} arrays); it isn't loaded, and the "
                "model's own optimizer stays as it is"
            )
        optimizer = getattr(self.model, "optimizer", None)
        if optimizer is not None and optimizer.built and int(values_of(optimizer.iterations)) > 0:
            notes.append(
                f"the model's optimizer has taken {int(values_of(optimizer.iterations))} steps with other weights; compile the "
                "model again before training"
            )
        return notes

    def _layers_of_pairs(self) -> dict[str, str]:
        """From the path of each layer of the model to the path of the file's layer it takes its values from."""
        return {self.slots[p.target].layer: self.sources[p.source].path for p in self.found.pairs}

    def cause(self, report: LoadReport) -> str | None:
        if self._layout_problems():
            return None
        if not self.found.pairs and not any(t.status == "skipped" for t in report.tensors):
            return "nothing in the file fits any layer of the model: it is most likely the file of another model"
        sizes = [t for t in report.tensors if t.status == "misfit" and t.source_shape != t.shape]
        head = [t.name for t in sizes if self.slots[t.name].layer == self._last_layer and t.source_shape[:-1] == t.shape[:-1]]
        if head and len(head) == len(sizes) and not report.unused and {t.name for t in report.missing} <= set(head):
            return "the model's head has another number of classes than the saved one"
        if len(sizes) > len(report.tensors) / 2:
            return "most shapes differ: the file is that of a model of another size, or of another model"
        if report.missing and report.unused:
            return "the model has other layers, or other names, than the one that was saved"
        if report.missing:
            return "the model has layers that the saved one had not"
        if report.unused:
            return "the saved model had layers that this one has not"
        return None

    # Doing

    def _loaded_head(self) -> Slot | None:
        """The kernel of the model's head, where the file has something for it."""
        head = self._head
        return head if head is not None and any(pair.target == head.name for pair in self.found.pairs) else None

    def _classes(self) -> tuple[str, ...]:
        """The model's classes, where they are known and the file has something for its head."""
        head = self._loaded_head()
        return () if head is None else class_names_of(head.owner)

    def _other_classes(self) -> str:
        """What is wrong where units would stand for other classes than in the file; empty where nothing is."""
        ours, theirs = self._classes(), self.archive.class_names
        if not ours or not theirs or ours == theirs or self.wishes.classes:
            return ""
        what = "the same classes in another order" if sorted(ours) == sorted(theirs) else "other classes"
        return f"{self._last_layer!r}: {what}: {shorten(theirs)} in the file, {shorten(ours)} in the model"

    def _name_classes(self) -> None:
        """Keeps the file's classes for a head of which nothing was said yet."""
        if self.wishes.classes:
            (*_, rule) = self.wishes.classes
            names = () if rule.patterns else rule.target
        else:
            names = self.archive.class_names
        head = self._loaded_head()
        if head is None or class_names_of(head.owner):
            return
        if names and head.info.shape[-1:] == (len(names),):
            name_classes(head.owner, names)

    def apply(self) -> None:
        """Assigns what was checked."""
        assign_all(self.staged)
        self._name_classes()
        for owner in {id(slot.owner): slot.owner for slot in self.slots.values()}.values():
            # Normalization computes with constants it derives from its variables.
            if callable(getattr(owner, "finalize_state", None)):
                owner.finalize_state()


def _reading(archive: Archive, name: str) -> Callable[[], np.ndarray[Any, Any]]:
    return lambda: archive.read(name)


def _constant(array: np.ndarray[Any, Any]) -> Callable[[], np.ndarray[Any, Any]]:
    return lambda: array
