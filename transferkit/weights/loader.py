"""`WeightLoader`: the plan of a load, its dry run and the load itself.

Open, match, check every name, shape, dtype and value, then assign: all or nothing. May import Keras and the floors below.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, final

import numpy as np
from typing_extensions import Self

from transferkit._plan import Plan
from transferkit.errors import MatchError, PlanError, did_you_mean
from transferkit.weights.assigning import Assignment, assign_all
from transferkit.weights.digest import digest_of
from transferkit.weights.matching import FileArray, Match, ModelVariable, Pair, Rules, match
from transferkit.weights.readers import Archive, Limits, open_archive
from transferkit.weights.report import LoadedTensor, LoadReport, by_layer_and_reason
from transferkit.weights.sources import file_arrays
from transferkit.weights.values import bad_values, dtype_problem, lossy_cast
from transferkit.weights.variables import Slot, check_built, slots_of

__all__ = ["WeightLoader"]

_PERMITS = ("nonfinite", "integers")


@final
class WeightLoader(Plan):
    """A plan to load the weights of a file into a Keras model, strict unless its rules say otherwise.

    Every variable of the model must get a value and every array of the file must go somewhere; what doesn't needs a rule.
    Names are matched first, then structure; see the report for what was matched how.

    Args:
        path: The weights file, of any format `open_archive` reads.

    Example:
        >>> import transferkit as tk
        >>> tk.WeightLoader("backbone.h5").rename("^features/", "backbone/").skip("head/*")
        WeightLoader('backbone.h5').rename('^features/', 'backbone/').skip('head/*')
    """

    __slots__ = ()

    STEPS = frozenset(
        {"only", "skip", "rename", "map", "by_order", "min_coverage", "allow", "sha256", "trusted", "limits"},
    )

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise PlanError("WeightLoader was called.", found=f"{path!r} as the path", fix='WeightLoader("weights.h5")')
        self._begin(path=path)

    @property
    def path(self) -> str:
        """The file."""
        return str(self._start.positional[0])

    # The rules

    def only(self, *patterns: str) -> Self:
        """Loads these variables of the model and leaves the rest as it is; the rest of the file goes unused.

        Args:
            patterns: Paths of variables, layers or nested models, with `*`, `?`, `[abc]`: `"backbone/*"`.
        """
        _check_patterns("only", patterns)
        return self._then("only", patterns=patterns)

    def skip(self, *patterns: str, of: str = "both") -> Self:
        """Leaves out these variables of the model and these arrays of the file.

        Args:
            patterns: Paths of variables, layers or nested models, with `*`, `?`, `[abc]`: `"head/*"`.
            of: `model`, `file`, or `both`: whose names are meant.
        """
        _check_patterns("skip", patterns)
        if of not in ("both", "model", "file"):
            raise PlanError("WeightLoader.skip was called.", found=f"of={of!r}", fix='of is "both", "model" or "file"')
        return self._then("skip", patterns=patterns, of=of)

    def rename(self, pattern: str, replacement: str) -> Self:
        """Renames arrays of the file before matching.

        Args:
            pattern: A regular expression, searched in the array's path with parts joined by `/`: `r"^features/"`.
            replacement: What takes its place; `\\1` stands for the first group.
        """
        try:
            groups = re.compile(pattern).groups
            re.sub(pattern, replacement, "")
        except (re.error, TypeError) as error:
            raise PlanError("WeightLoader.rename was called.", found=f"{pattern!r}, {replacement!r}: {error}") from error
        del groups
        return self._then("rename", pattern=pattern, replacement=replacement)

    def map(self, assignments: Mapping[str, str]) -> Self:
        """Says which array of the file a variable of the model takes; for whole layers, too.

        Args:
            assignments: From paths in the model to paths in the file: `{"head/kernel": "fc/weight"}`, `{"encoder": "tower"}`.
        """
        if not isinstance(assignments, Mapping) or not all(isinstance(v, str) for pair in assignments.items() for v in pair):
            raise PlanError("WeightLoader.map was called.", found=f"{assignments!r}", fix='.map({"in the model": "in the file"})')
        return self._then("map", assignments=assignments)

    def by_order(self) -> Self:
        """Also matches layers whose names say nothing by their order alone, where kinds and shapes agree one by one."""
        return self._then("by_order")

    def min_coverage(self, share: float) -> Self:
        """Refuses to load when fewer of the model's parameters would take values from the file.

        Args:
            share: 0 to 1.
        """
        if not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise PlanError("WeightLoader.min_coverage was called.", found=f"{share!r}", fix="a share from 0 to 1")
        return self._then("min_coverage", share=float(share))

    def allow(self, *what: str) -> Self:
        """Permits what is refused by default.

        Args:
            what: `nonfinite` for NaN and infinite values, `integers` for whole numbers where the model holds floats.
        """
        for word in what:
            if word not in _PERMITS:
                raise PlanError(
                    "WeightLoader.allow was called.",
                    found=f"{word!r}{did_you_mean(str(word), _PERMITS)}",
                    fix=f"one of {', '.join(map(repr, _PERMITS))}",
                )
        return self._then("allow", what=what)

    def sha256(self, digest: str) -> Self:
        """Loads only a file with this SHA-256.

        Args:
            digest: 64 hexadecimal digits.
        """
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", digest.strip()):
            raise PlanError("WeightLoader.sha256 was called.", found=f"{digest!r}", fix="64 hexadecimal digits")
        return self._then("sha256", digest=digest)

    def trusted(self) -> Self:
        """Says the file comes from a trusted source: unusual HDF5 structures are read in this process instead of another."""
        return self._then("trusted")

    def limits(self, *, max_bytes: int | None = None, max_arrays: int | None = None) -> Self:
        """Other limits than the default on what the file may ask for.

        Args:
            max_bytes: Of all arrays together, once in memory.
            max_arrays: How many arrays, layers or members.
        """
        return self._then("limits", max_bytes=max_bytes, max_arrays=max_arrays)

    def _arguments(self, name: str) -> list[tuple[Any, ...]]:
        return [step.positional for step in self._steps if step.name == name]

    def _rules(self) -> Rules:
        skips: dict[str, list[str]] = {"both": [], "model": [], "file": []}
        for step in self._steps:
            if step.name == "skip":
                skips[step.arguments.get("of", "both")].extend(step.positional)
        return Rules(
            only=tuple(p for patterns in self._arguments("only") for p in patterns),
            skip=tuple(skips["both"]),
            skip_in_model=tuple(skips["model"]),
            skip_in_file=tuple(skips["file"]),
            rename=tuple((pattern, replacement) for pattern, replacement in self._arguments("rename")),
            map={target: source for (assignments,) in self._arguments("map") for target, source in assignments.items()},
            by_order=bool(self._arguments("by_order")),
        )

    def open(self) -> Archive:
        """The file's arrays by name, lazily; close it, or use it in a `with` statement.

        Raises:
            WeightsNotFoundError: when there is no such file.
            WeightsFileError: when it is damaged, or no weights file.
            UnsafeFileError: when it asks for what a weights file must not, or has another SHA-256 than was asked for.
        """
        given = [step.arguments for step in self._steps if step.name == "limits"]
        chosen = {key: value for arguments in given for key, value in arguments.items()}
        digests = self._arguments("sha256")
        return open_archive(
            self.path,
            limits=Limits(**chosen) if chosen else None,
            trusted=bool(self._arguments("trusted")),
            sha256=digests[-1][0] if digests else None,
        )

    # The verbs

    def match(self, model: Any) -> LoadReport:
        """A dry run: what `load` would do, checked to the last value. Changes nothing.

        Args:
            model: A built Keras model.

        Returns:
            The report; its `problems` say what stands in the way, and which rules would settle it.

        Raises:
            ModelError: when the model isn't built or has no variables.
            WeightsError: when the file can't be read.
        """
        with self.open() as archive:
            return _Load(self, archive, model).report(applied=False)

    def load(self, model: Any) -> LoadReport:
        """Loads the file into the model: every variable the report names changes, or none. The optimizer isn't touched.

        Args:
            model: A built Keras model; its weights are replaced.

        Returns:
            The report that `match` gives.

        Raises:
            MatchError: when file and model don't fit under the rules; its text is the report's.
            ModelError: when the model isn't built or has no variables.
            WeightsError: when the file can't be read.
        """
        with self.open() as archive:
            load = _Load(self, archive, model)
            report = load.report(applied=True)
            if not report.ok:
                raise MatchError(
                    f"Loading {self.path!r} into the model {model.name!r}.",
                    found=report.problems,
                    cause=load.cause(report),
                    fix=("add the rules that say what you mean: " + "; ".join(report.rules) if report.rules else None),
                )
            load.apply()
            return report


def _check_patterns(name: str, patterns: tuple[str, ...]) -> None:
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise PlanError(f"WeightLoader.{name} was called.", found=f"{patterns!r}", fix=f'.{name}("head/*")')


class _Load:
    """One file met with one model under one plan."""

    def __init__(self, plan: WeightLoader, archive: Archive, model: Any) -> None:
        self.plan = plan
        self.archive = archive
        self.model = model
        rules = plan._rules()
        check_built(
            model,
            asked=f"Loading {plan.path!r}.",
            except_for=(*rules.skip, *rules.skip_in_model),
        )
        self.slots = {slot.name: slot for slot in slots_of(model)}
        self.sources = {source.name: source for source in file_arrays(archive)}
        self.rules = rules
        self.permits = {word for what in plan._arguments("allow") for word in what}
        self.found: Match = match(
            list(self.sources.values()), [slot.info for slot in self.slots.values()], rules, fits=self._fits
        )
        self.staged: list[Assignment] = []

    def _fits(self, source: FileArray, target: ModelVariable) -> bool:
        return source.shape == target.shape

    # Checking

    def report(self, *, applied: bool) -> LoadReport:
        problems = list(self.found.problems)
        rules = list(self.found.rules)
        pairs = {pair.target: pair for pair in self.found.pairs}
        tensors = []
        for slot in self.slots.values():
            if slot.name in pairs:
                tensor = self._checked(slot, pairs[slot.name])
                if not tensor.arrives:
                    problems.append(f"{slot.name!r}: {tensor.why}")
            else:
                skipped = self.found.skipped.get(slot.name)
                tensor = LoadedTensor(
                    name=slot.name,
                    layer=slot.layer,
                    shape=slot.info.shape,
                    dtype=slot.dtype.name,
                    status="skipped" if skipped else "missing",
                    why=skipped or self.found.missing[slot.name],
                )
            tensors.append(tensor)
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
        problems += [f"nothing for the model's {line}" for line in by_layer_and_reason(decided[0])]
        problems += [f"no use for the file's {line}" for line in by_layer_and_reason(decided[1])]
        rules += self._rules_for_misfits(tensors)
        notes = [*self.found.notes, *self._notes()]
        report = LoadReport(
            path=self.plan.path,
            origin=" ".join(dict.fromkeys(w for w in (self.archive.format, self.archive.framework, self.archive.version) if w)),
            model=str(self.model.name),
            tensors=tuple(tensors),
            unused={**self.found.unused, **self.found.left_out},
            problems=tuple(problems),
            notes=tuple(notes),
            rules=tuple(dict.fromkeys(rules)),
            applied=applied,
        )
        return self._covered(report)

    def _covered(self, report: LoadReport) -> LoadReport:
        problems = list(report.problems)
        wanted = max((share for (share,) in self.plan._arguments("min_coverage")), default=0.0)
        if report.coverage < wanted:
            problems.append(f"{report.coverage:.1%} of the model's parameters would be loaded, {wanted:.1%} are asked for")
        elif not problems and report.coverage == 0:
            problems.append("nothing would be loaded")
        return LoadReport(**{**vars(report), "problems": tuple(problems), "applied": report.applied and not problems})

    def _checked(self, slot: Slot, pair: Pair) -> LoadedTensor:
        info = self.archive.arrays[pair.source]
        why = status = digest = ""
        if info.shape != slot.info.shape:
            status, why = "misfit", f"the file's {pair.source!r} has the shape {info.shape}, the variable {slot.info.shape}"
        elif (problem := dtype_problem(info.dtype, slot.dtype)) and not (
            "integers" in self.permits and info.dtype.kind in "iub" and slot.dtype.kind == "f"
        ):
            status, why = "misfit", f"the file's {pair.source!r} has {problem}"
        else:
            array = self.archive.read(pair.source)
            permitted = "nonfinite" in self.permits
            bad = "" if permitted else bad_values(array, slot.dtype, variable=slot.info.variable)
            if bad:
                status, why = "misfit", f"the file's {pair.source!r} has {bad}"
            else:
                status = "loaded"
                if lossy_cast(info.dtype, slot.dtype):
                    status, why = "adapted", f"{info.dtype.name} → {slot.dtype.name}"
                with np.errstate(over="ignore", invalid="ignore"):
                    digest = digest_of(array.astype(slot.dtype, copy=False))
                self.staged.append(Assignment(slot.variable, _constant(array), slot.dtype, slot.size * slot.dtype.itemsize))
        return LoadedTensor(
            name=slot.name,
            layer=slot.layer,
            shape=slot.info.shape,
            dtype=slot.dtype.name,
            status=status,
            source=pair.source,
            source_shape=info.shape,
            source_dtype=info.dtype.name,
            how=pair.how,
            why=why,
            digest=digest,
        )

    def _rules_for_misfits(self, tensors: list[LoadedTensor]) -> list[str]:
        layers = dict.fromkeys(t.layer for t in tensors if t.status == "misfit")
        return [f'.skip("{layer}/*")' for layer in list(layers)[:8]]

    def _notes(self) -> list[str]:
        notes = []
        if self.archive.optimizer_arrays:
            notes.append(
                f"the file also holds optimizer state ({len(self.archive.optimizer_arrays)} arrays); it isn't loaded, and the "
                "model's own optimizer stays as it is"
            )
        optimizer = getattr(self.model, "optimizer", None)
        if optimizer is not None and optimizer.built and int(np.asarray(optimizer.iterations)) > 0:
            notes.append(
                f"the model's optimizer has taken {int(np.asarray(optimizer.iterations))} steps with other weights; compile the "
                "model again before training"
            )
        return notes

    def cause(self, report: LoadReport) -> str | None:
        if report.missing and report.unused:
            return "the model has other layers, or other names, than the one that was saved"
        if report.missing:
            return "the model has layers that the saved one had not"
        if report.unused:
            return "the saved model had layers that this one has not"
        return None

    # Doing

    def apply(self) -> None:
        assign_all(self.staged)
        for owner in {id(slot.owner): slot.owner for slot in self.slots.values()}.values():
            # Normalization computes with constants it derives from its variables.
            if callable(getattr(owner, "finalize_state", None)):
                owner.finalize_state()


def _constant(array: np.ndarray[Any, Any]) -> Callable[[], np.ndarray[Any, Any]]:
    return lambda: array
