"""What is paired so far of a file's layers and a model's, how two layers are joined, and what is left over with its reason.

The steps of matching (`matching`, `structure`) decide on it one after the other. Pure: standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from transferkit.errors import did_you_mean, shorten
from transferkit.weights.mapping import FileArray, Match, ModelVariable, Pair, Rules
from transferkit.weights.names import covers, is_automatic, kind_of, listed, patterns_for, split_name
from transferkit.weights.units import OTHER_WORDS, Unit, told, units_of

__all__ = ["Fits", "Pairing"]

Fits = Callable[[FileArray, ModelVariable], bool]


class Pairing:
    """The layers of a file and of a model, those that were joined, and why others weren't.

    Args:
        sources: The arrays in the file's order.
        targets: The variables in the model's order.
        rules: What the caller asked for.
        fits: Whether an array can become a variable.
    """

    def __init__(self, sources: Sequence[FileArray], targets: Sequence[ModelVariable], rules: Rules, fits: Fits) -> None:
        self.rules = rules
        self.fits = fits
        self.sources = {source.name: source for source in sources}
        self.targets = {target.name: target for target in targets}
        self.pairs: dict[str, Pair] = {}
        self.twins: list[Pair] = []
        self.used: set[str] = set()
        self.skipped: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.why_missing: dict[str, str] = {}
        self.why_unused: dict[str, str] = {}
        self.asks_order = False
        self.undecided: set[str] = set()
        self.unsure: list[tuple[list[Unit], list[Unit]]] = []
        self.names = {source.name: self._renamed(source) for source in sources}

    def _renamed(self, source: FileArray) -> str:
        name = self.plain(source)
        for pattern, replacement in self.rules.rename:
            name = re.sub(pattern, replacement, name)
        return name

    @staticmethod
    def plain(source: FileArray) -> str:
        """An array's path in the file as patterns and rules name it."""
        return f"{source.path}/{source.variable}" if source.path else source.variable or source.name

    def open_sources(self) -> list[str]:
        """The arrays that nothing was made of yet."""
        return [name for name in self.sources if name not in self.used and name not in self.left_out]

    def open_targets(self) -> list[str]:
        """The variables that have no array yet."""
        return [name for name in self.targets if name not in self.pairs and name not in self.skipped]

    def pair(self, target: str, source: str, how: str) -> None:
        """Gives a variable an array."""
        self.pairs[target] = Pair(target, source, how)
        self.used.add(source)

    def as_renamed(self, name: str) -> FileArray:
        """An array under the path that the rules gave it."""
        source = self.sources[name]
        path, variable = split_name(self.names[name])
        return FileArray(name, source.shape, path, variable, source.kind)

    def open_units(self) -> tuple[list[Unit], list[Unit]]:
        """The layers of both sides that have something left."""
        return (
            units_of([self.as_renamed(name) for name in self.open_sources()]),
            units_of([self.targets[name] for name in self.open_targets()]),
        )

    def entries(self, source: Unit, target: Unit) -> list[tuple[str, str]]:
        """Full names of the entries of two layers that belong together: by name, or by position where the file has no names."""
        if source.positional and not target.positional:
            if len(source.entries) != len(target.entries):
                return []
            ordered = sorted(source.entries, key=int)
            return [(source.entries[s][0], target.entries[t][0]) for s, t in zip(ordered, target.entries, strict=True)]
        found = []
        for variable, (name, _) in target.entries.items():
            words: Sequence[str] = self.rules.words.get(variable, (variable,))
            if words[0] not in source.entries:
                words = (*words, *OTHER_WORDS.get((kind_of(target.kind), variable), ()), *OTHER_WORDS.get(("", variable), ()))
            for word in words:
                if word in source.entries:
                    found.append((source.entries[word][0], name))
                    break
        return found

    def join(self, source: Unit, target: Unit, how: str) -> bool:
        """Pairs what two layers hold; whether there was anything. Says why not where that isn't clear."""
        entries = self.entries(source, target)
        if source.positional and not target.positional and not entries:
            self.problems.append(
                f"{target.path!r}: the file has {len(source.entries)} arrays in {source.path!r} and doesn't name them, the layer "
                f"has {len(target.entries)} ({', '.join(target.entries)})"
            )
            for name, _ in target.entries.values():
                self.why_missing[name] = f"the file's {source.path!r} has another number of arrays"
            for name, _ in source.entries.values():
                self.why_unused[name] = f"the model's {target.path!r} has another number of variables"
            return False
        if self._positional_is_ambiguous(source, target):
            self.asks_order = True
            self.problems.append(
                f"{target.path!r}: the file doesn't name the arrays of {source.path!r}; of {', '.join(target.entries)} it may as "
                "well hold another choice of the same shapes (a BatchNormalization without center or without scale)"
            )
            for name, _ in target.entries.values():
                self.why_missing[name] = "the file doesn't name its arrays, and more than one reading fits"
            return False
        for s, t in entries:
            self.pair(t, s, how)
        return bool(entries)

    def _positional_is_ambiguous(self, source: Unit, target: Unit) -> bool:
        if not source.positional or target.positional or self.rules.by_order:
            return False
        return kind_of(target.kind) in ("batchnormalization", "layernormalization", "groupnormalization") and (
            len(target.entries) in (1, 3) if "batch" in kind_of(target.kind) else len(target.entries) == 1
        )

    def fitting(self, source: Unit, target: Unit) -> bool:
        """Whether two layers can belong together: kinds that agree where both are known, and each entry in its place."""
        if source.kind and target.kind and kind_of(source.kind) != kind_of(target.kind):
            return False
        if len(source.entries) != len(target.entries) or {source.direction, target.direction} == {"forward", "backward"}:
            return False
        entries = self.entries(source, target)
        return len(entries) == len(target.entries) and all(self.fits(self.as_renamed(s), self.targets[t]) for s, t in entries)

    def may_join(self, source: Unit, target: Unit) -> bool:
        """Whether structure may decide: no two names that somebody chose contradict each other."""
        if self.both_sided(source, target):
            return False
        return source.automatic or target.automatic or source.leaf == target.leaf

    def both_sided(self, source: Unit, target: Unit) -> bool:
        """Whether both lie in models that somebody named, and named differently: then the layers are not the same."""
        return bool(source.container) and bool(target.container) and source.container != target.container

    def ambiguous(self, sources: Sequence[Unit], targets: Sequence[Unit]) -> None:
        """Keeps layers that more than one way would join, to be told if no later step settles it."""
        self.unsure.append((list(sources), list(targets)))

    def _say_unsure(self) -> None:
        """Reports the ambiguities that no later step settled."""
        for sources, targets in self.unsure:
            of = [u for u in sources if not all(name in self.used for name, _ in u.entries.values())]
            to = [u for u in targets if not all(name in self.pairs for name, _ in u.entries.values())]
            text = f"more than one way to match: in the file {told(of)}; in the model {told(to)}"
            if not of or not to or text in self.problems:
                continue
            self.problems.append(text)
            for units, candidates, why in ((to, of, self.why_missing), (of, to, self.why_unused)):
                side = "file" if units is to else "model"
                fit = "fits" if len(candidates) == 1 else "each fit as well"
                for unit in units:
                    for name, _ in unit.entries.values():
                        self.undecided.add(name)
                        why[name] = f"the {side}'s {shorten(u.path for u in candidates)} {fit}"

    # The outcome

    def result(self) -> Match:
        """What came of it, with the rules that would settle the rest."""
        self._say_unsure()
        missing = {name: self.why_missing.get(name) or self._why_missing(name) for name in self.open_targets()}
        unused = {name: self.why_unused.get(name) or self._why_unused(name) for name in self.open_sources()}
        if self.rules.only:
            self.left_out |= dict.fromkeys(unused, "not needed for .only(…)")
            unused = {}
        order = {name: i for i, name in enumerate(self.targets)}
        return Match(
            pairs=tuple(sorted(self.pairs.values(), key=lambda pair: order[pair.target])),
            twins=tuple(self.twins),
            missing=missing,
            unused=unused,
            skipped=self.skipped,
            left_out={name: why for name, why in self.left_out.items() if name not in self.used},
            undecided=frozenset(self.undecided),
            problems=tuple(self.problems),
            notes=tuple(self.notes),
            rules=self._suggestions(missing, unused),
        )

    def _why_missing(self, name: str) -> str:
        target = self.targets[name]
        same = [s for s in self.sources if covers(target.path, self.names[s])]
        if same and not is_automatic(target.path.rpartition("/")[2], target.kind):
            return (
                f"the file's {target.path!r} has no {target.variable!r}, only {shorten(self.sources[s].variable for s in same)}"
            )
        known = {path for path, _ in map(split_name, self.names.values())}
        hint = "" if is_automatic(target.path.rpartition("/")[2], target.kind) else did_you_mean(target.path, known)
        return f"no layer of the file fits{hint}"

    def _why_unused(self, name: str) -> str:
        path, variable = split_name(self.names[name])
        same = [t for t in self.targets.values() if t.path == path]
        if same and not is_automatic(path.rpartition("/")[2], self.sources[name].kind):
            return f"the model's {path!r} has no {variable!r}, only {shorten(t.variable for t in same)}"
        hint = "" if is_automatic(path.rpartition("/")[2]) else did_you_mean(path, {t.path for t in self.targets.values()})
        return f"no layer of the model fits{hint}"

    def _suggestions(self, missing: Mapping[str, str], unused: Mapping[str, str]) -> tuple[str, ...]:
        rules: list[str] = []
        for here, there in self.unsure:
            if not any(name in self.undecided for unit in there for name, _ in unit.entries.values()):
                continue
            self.asks_order = self.asks_order or len(here) == len(there)
            if len(here) != len(there):
                rules.append(f'.map({{"{there[0].path}": "{here[0].path}"}}) and so on, one entry for each')
        missing = {name: why for name, why in missing.items() if name not in self.undecided}
        unused = {name: why for name, why in unused.items() if name not in self.undecided}
        to = patterns_for(missing, [name for name in self.targets if name not in missing])
        of = patterns_for([self.names[n] for n in unused], [self.names[n] for n in self.sources if n not in unused])
        if to:
            rules.append(f'.skip({listed(to)}, of="model")')
        if of:
            rules.append(f'.skip({listed(of)}, of="file")')
        for t, s in self._renames(missing, unused):
            rules.append(f'.map({{"{t}": "{s}"}})')
        if self.asks_order and not self.rules.by_order:
            rules.append(".by_order()")
        return tuple(rules)

    def _renames(self, missing: Mapping[str, str], unused: Mapping[str, str]) -> list[tuple[str, str]]:
        to = units_of([self.targets[n] for n in missing])
        of = units_of([self.as_renamed(n) for n in unused])
        found = []
        for t in to:
            fitting = [s for s in of if self.fitting(s, t)]
            if len(fitting) == 1 and sum(self.fitting(fitting[0], other) for other in to) == 1:
                found.append((t.path, fitting[0].path))
        return found[:3]
