"""`WeightLoader`: the plan of a load, its dry run and the load itself.

Open, match, check every name, shape, dtype and value, then assign: all or nothing. May import Keras and the floors below.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, final

from typing_extensions import Self

from transferkit._plan import Plan, Step
from transferkit.errors import MatchError, PlanError, did_you_mean
from transferkit.weights.adapters import Channels, Classes, Positions, Vocabulary
from transferkit.weights.mapping import Rules
from transferkit.weights.readers import Archive, Limits, open_archive
from transferkit.weights.report import LoadReport
from transferkit.weights.staging import TORCH_WORDS, Staged, Wishes

__all__ = ["WeightLoader"]

_PERMITS = ("nonfinite", "integers")
_LAYOUTS = ("keras", "tensorflow", "theano", "torch")
_CHANNELS = ("auto", "sum", "repeat", "zero")


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
        {
            *("only", "skip", "rename", "map", "by_order", "layout", "classes", "channels", "positions", "vocabulary"),
            *("min_coverage", "allow", "sha256", "trusted", "limits"),
        }
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

    def layout(self, framework: str, *, flatten: Mapping[str, Sequence[int]] | None = None) -> Self:
        """Says how the file stores kernels and names variables.

        Files of Keras 1 and 2 are put into Keras 3's layout without it: gates kept as arrays of their own, CuDNN's, Theano's
        order of axes and kernels turned round; the report names each.
        `torch` transposes kernels, reads `weight`, `running_mean` and the like as Keras's names, leaves `num_batches_tracked`
        out, puts the rows of a Dense layer behind a Flatten into channels-last order, and makes Keras's arrays of the recurrent
        and attention layers'.

        Args:
            framework: `torch`; `theano` or `tensorflow`, what a file of Keras 1 was trained on, where it doesn't say it;
                `keras` for arrays that are in Keras 3's layout whatever they look like.
            flatten: For Dense layers whose Flatten can't be found in the model (a subclassed one): from the layer's path to the
                shape `(height, width, channels)` that was flattened.
        """
        if framework not in _LAYOUTS:
            raise PlanError(
                "WeightLoader.layout was called.",
                found=f"{framework!r}{did_you_mean(str(framework), _LAYOUTS)}",
                fix=f"one of {', '.join(map(repr, _LAYOUTS))}",
            )
        return self._then("layout", framework=framework, flatten=flatten)

    def classes(self, source: Sequence[str] = (), target: Sequence[str] = (), *, layers: Sequence[str] = ()) -> Self:
        """Copies the head's rows by the names of the classes; classes the file doesn't know keep the model's own values.

        Args:
            source: The file's classes in the order of its units; empty to take the names the file says itself.
            target: The model's classes in the order of its units.
            layers: Patterns of the layers it is for; by default the last layer with weights.
        """
        for word, names in (("source", source), ("target", target)):
            given = [] if isinstance(names, str) else list(names)
            if isinstance(names, str) or len(set(given)) != len(given) or not all(isinstance(name, str) for name in given):
                raise PlanError("WeightLoader.classes was called.", found=f"{word}={names!r}", fix="a list of names, each once")
        if not target:
            raise PlanError(
                "WeightLoader.classes was called.",
                found="no target classes",
                fix='.classes(source=["ant", …], target=["bee", …])',
            )
        return self._then("classes", source=tuple(source), target=tuple(target), layers=tuple(layers))

    def channels(self, how: str = "auto", *, layers: Sequence[str] = ()) -> Self:
        """Fits a convolution on another number of input channels; outputs stay the same on channels that are copies.

        Args:
            how: `sum` gives each channel its share of the sum over the file's; `repeat` goes round the file's channels, each
                divided by how often it is used; `zero` adds channels with zero weights; `auto` takes `repeat` for more channels,
                `sum` for fewer.
            layers: Patterns of the layers it is for; by default the first convolution.
        """
        if how not in _CHANNELS:
            raise PlanError(
                "WeightLoader.channels was called.",
                found=f"{how!r}{did_you_mean(str(how), _CHANNELS)}",
                fix=f"one of {', '.join(map(repr, _CHANNELS))}",
            )
        return self._then("channels", how=how, layers=tuple(layers))

    def positions(
        self,
        *patterns: str,
        relative: bool = False,
        extra: int = 0,
        source: Sequence[int] | None = None,
        target: Sequence[int] | None = None,
        method: str = "bicubic",
    ) -> Self:
        """Resizes tables of positions to another grid.

        Args:
            patterns: The variables, `"pos_embed*"`; the last two axes are positions and features.
            relative: For tables of relative offsets, with `(2 height − 1)(2 width − 1)` rows.
            extra: How many rows stand before the grid (class tokens); they are kept.
            source: Height and width of the file's grid; by default square.
            target: Of the model's.
            method: `bicubic` or `bilinear`.
        """
        _check_patterns("positions", patterns)
        if method not in ("bicubic", "bilinear"):
            raise PlanError("WeightLoader.positions was called.", found=f"method={method!r}", fix="'bicubic' or 'bilinear'")
        return self._then(
            "positions", patterns=patterns, relative=relative, extra=extra, source=source, target=target, method=method
        )

    def vocabulary(self, *patterns: str, source: Sequence[str] = (), target: Sequence[str] = ()) -> Self:
        """Copies part of an embedding: rows by word, or the first ones; the other rows keep the model's own values.

        Args:
            patterns: The embeddings, `"token_embedding/*"`.
            source: The file's words in the order of its rows.
            target: The model's words in the order of its rows; without words the first rows both have are copied.
        """
        _check_patterns("vocabulary", patterns)
        for names in (source, target):
            if len(set(names)) != len(names):
                raise PlanError("WeightLoader.vocabulary was called.", found="a word more than once", fix="each word once")
        if bool(source) != bool(target):
            raise PlanError("WeightLoader.vocabulary was called.", found="words for one side only", fix="give both, or neither")
        return self._then("vocabulary", patterns=patterns, source=tuple(source), target=tuple(target))

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

    def _wishes(self) -> Wishes:
        """The rules as the load reads them."""
        layout, flatten = None, {}
        for step in self._steps:
            if step.name == "layout":
                layout = str(step.positional[0])
                flatten.update({path: tuple(shape) for path, shape in (step.arguments.get("flatten") or {}).items()})
        return Wishes(
            path=self.path,
            rules=dataclasses.replace(self._rules(), words=TORCH_WORDS if layout == "torch" else {}),
            layout=layout,
            flatten=flatten,
            channels=tuple(Channels(a.get("how", "auto"), tuple(a.get("layers", ()))) for a in self._filled("channels", "how")),
            classes=tuple(
                Classes(tuple(a.get("source", ())), tuple(a.get("target", ())), tuple(a.get("layers", ())))
                for a in self._filled("classes", "source", "target")
            ),
            positions=tuple(_positions(step) for step in self._steps if step.name == "positions"),
            vocabularies=tuple(
                Vocabulary(step.positional, **{k: tuple(v) for k, v in step.arguments.items()})
                for step in self._steps
                if step.name == "vocabulary"
            ),
            permits=frozenset(word for what in self._arguments("allow") for word in what),
            min_coverage=max((share for (share,) in self._arguments("min_coverage")), default=0.0),
        )

    def _filled(self, name: str, *words: str) -> list[dict[str, Any]]:
        """The arguments of each step of the name, those given by position under their names."""
        return [
            {**dict(zip(words, step.positional, strict=False)), **step.arguments} for step in self._steps if step.name == name
        ]

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
            return Staged(self._wishes(), archive, model).report(applied=False)

    def load(self, model: Any) -> LoadReport:
        """Loads the file into the model: every variable the report names changes, or none. The optimizer isn't touched.

        The one exception is a model of over 64 MB, where the file is written or the disk fails after every byte was checked and
        before it was read again, into the variables. The error then says that the model holds some of the new values.

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
            staged = Staged(self._wishes(), archive, model)
            report = staged.report(applied=True)
            if not report.ok:
                raise MatchError(
                    f"Loading {self.path!r} into the model {model.name!r}.",
                    found=report.problems,
                    cause=staged.cause(report),
                    fix=_fix(report.rules),
                )
            staged.apply()
            return report


def _fix(rules: Sequence[str]) -> str | None:
    """The rules in words that tell those which load something from those which leave it out: mostly one or the other is meant."""
    leave = [rule for rule in rules if rule.startswith(".skip")]
    take = [rule for rule in rules if not rule.startswith(".skip")]
    if not take or not leave:
        return f"add the rules that say what you mean: {'; '.join(rules)}" if rules else None
    return f"add {'; '.join(take)} to load what differs in name or order alone, or {'; '.join(leave)} to leave it out"


def _positions(step: Step) -> Positions:
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, tuple) else value for key, value in step.arguments.items()}
    return Positions(step.positional, **given)


def _check_patterns(name: str, patterns: tuple[str, ...]) -> None:
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise PlanError(f"WeightLoader.{name} was called.", found=f"{patterns!r}", fix=f'.{name}("head/*")')
