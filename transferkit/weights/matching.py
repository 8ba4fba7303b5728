"""Which array of a file belongs to which variable of a model: names, shapes and rules in, a mapping with its reasons out.

Arrays and variables are matched a layer at a time. First by the rules (`map`), then by name, then by the path below a model that
one side nests and the other doesn't, then by structure. A name counts as evidence only when somebody chose it: `dense_5` says no
more than "a Dense layer made after five others", so such layers are matched by structure, the kinds of layers in order of
creation with their shapes, and only where that leaves one way to do it. What two ways would fit is left to the caller's rules.

What goes in and out is in `mapping`, layers as they are compared here in `units`. Pure: no file, no Keras; standard library only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from transferkit.errors import did_you_mean, shorten
from transferkit.weights.mapping import FileArray, Match, ModelVariable, Pair, Rules
from transferkit.weights.names import canonical, covers, is_automatic, kind_of, listed, patterns_for, split_name
from transferkit.weights.units import (
    OTHER_WORDS,
    Unit,
    by_leaf,
    nested,
    same_creation_order,
    same_own_names,
    shapes_of,
    told,
    units_of,
)

__all__ = ["match"]

Fits = Callable[[FileArray, ModelVariable], bool]


def _same_shape(source: FileArray, target: ModelVariable) -> bool:
    return source.shape == target.shape


def match(
    sources: Sequence[FileArray],
    targets: Sequence[ModelVariable],
    rules: Rules | None = None,
    *,
    fits: Fits = _same_shape,
) -> Match:
    """Matches the arrays of a file with the variables of a model.

    Args:
        sources: The arrays in the file's order.
        targets: The variables in the model's order.
        rules: What the caller asked for.
        fits: Whether an array can become a variable as the rules stand; by default when the shapes are equal.

    Returns:
        The pairs and everything left over with its reason. A pair found by name may still fail `fits`: the caller reports it.
        It depends on the order of the arguments only where it says so (`structure`, `order`).

    Example:
        >>> found = match([FileArray("a/kernel", (3, 2), "a", "kernel")], [ModelVariable("a/kernel", (3, 2), "a", "kernel")])
        >>> found.pairs
        (Pair(target='a/kernel', source='a/kernel', how='name'),)
    """
    return _Matching(sources, targets, rules or Rules(), fits).run()


class _Matching:
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

    def run(self) -> Match:
        self._leave_out()
        self._by_map()
        self._by_name()
        self._by_spelling()
        self._by_path()
        self._by_structure()
        if self.rules.by_order:
            self._by_order()
        return self._result()

    # Names and rules

    def _renamed(self, source: FileArray) -> str:
        name = f"{source.path}/{source.variable}" if source.path else source.variable or source.name
        for pattern, replacement in self.rules.rename:
            name = re.sub(pattern, replacement, name)
        return name

    def _leave_out(self) -> None:
        rules = self.rules
        used_patterns: set[str] = set()

        def first(name: str, patterns: Iterable[str]) -> str | None:
            hits = [pattern for pattern in patterns if covers(pattern, name)]
            used_patterns.update(hits)
            return hits[0] if hits else None

        for name in self.targets:
            kept = first(name, rules.only)
            if rules.only and kept is None:
                self.skipped[name] = f"not in .only({', '.join(map(repr, rules.only))})"
            hit = first(name, (*rules.skip, *rules.skip_in_model))
            if hit is not None:
                self.skipped[name] = f".skip({hit!r})"
        for name in self.sources:
            hit = first(self.names[name], (*rules.skip, *rules.skip_in_file)) or first(name, (*rules.skip, *rules.skip_in_file))
            if hit is not None:
                self.left_out[name] = f".skip({hit!r})"
        known = {*self.targets, *self.names.values(), *(t.path for t in self.targets.values())}
        for word, patterns in (("only", rules.only), ("skip", (*rules.skip, *rules.skip_in_model, *rules.skip_in_file))):
            for pattern in patterns:
                if pattern not in used_patterns:
                    self.problems.append(f".{word}({pattern!r}) matches nothing{did_you_mean(pattern, known)}")
        for pattern, _ in rules.rename:
            if not any(re.search(pattern, self._plain(source)) for source in self.sources.values()) and len(rules.rename) == 1:
                self.problems.append(f".rename({pattern!r}, …) matches no name of the file")
        self._twice()

    @staticmethod
    def _plain(source: FileArray) -> str:
        return f"{source.path}/{source.variable}" if source.path else source.variable or source.name

    def _twice(self) -> None:
        by_name: dict[str, list[str]] = defaultdict(list)
        for source, name in self.names.items():
            by_name[name].append(source)
        for name, together in by_name.items():
            if len(together) > 1 and self.rules.rename:
                self.problems.append(f"{len(together)} arrays are renamed to {name!r}: {shorten(together)}")

    def _open_sources(self) -> list[str]:
        return [name for name in self.sources if name not in self.used and name not in self.left_out]

    def _open_targets(self) -> list[str]:
        return [name for name in self.targets if name not in self.pairs and name not in self.skipped]

    def _pair(self, target: str, source: str, how: str) -> None:
        self.pairs[target] = Pair(target, source, how)
        self.used.add(source)

    # By rule

    def _by_map(self) -> None:
        for target, source in self.rules.map.items():
            wanted = [n for n in self.targets if covers(target, n)]
            given = [n for n in self.sources if covers(source, self.names[n]) or covers(source, n)]
            if not wanted:
                hint = did_you_mean(target, {*self.targets, *(t.path for t in self.targets.values())})
                self.problems.append(f".map: the model has no {target!r}{hint}")
            if not given:
                hint = did_you_mean(source, {*self.names.values(), *(s.path for s in self.sources.values())})
                self.problems.append(f".map: the file has no {source!r}{hint}")
            if not wanted or not given:
                continue
            if len(wanted) == 1 and len(given) == 1:
                self._pair(wanted[0], given[0], "rule")
                continue
            to = units_of([self.targets[n] for n in wanted])
            of = units_of([self._as_renamed(n) for n in given])
            inner_to = {unit.path[len(target) :]: unit for unit in to}
            inner_of = {unit.path[len(source) :]: unit for unit in of}
            if set(inner_to) != set(inner_of) and len(to) == len(of) == 1:
                inner_of = {next(iter(inner_to)): of[0]}
            for inner, unit in inner_to.items():
                if inner in inner_of:
                    self._join(inner_of[inner], unit, "rule")
            # Layers of either side without a counterpart stay open, and are reported as such.

    def _as_renamed(self, name: str) -> FileArray:
        source = self.sources[name]
        path, variable = split_name(self.names[name])
        return FileArray(name, source.shape, path, variable, source.kind)

    def _open_units(self) -> tuple[list[Unit], list[Unit]]:
        return (
            units_of([self._as_renamed(name) for name in self._open_sources()]),
            units_of([self.targets[name] for name in self._open_targets()]),
        )

    def _entries(self, source: Unit, target: Unit) -> list[tuple[str, str]]:
        """Full names of the entries of two layers that belong together: by name, or by position where the file has no names."""
        if source.positional and not target.positional:
            if len(source.entries) != len(target.entries):
                return []
            ordered = sorted(source.entries, key=int)
            return [(source.entries[s][0], target.entries[t][0]) for s, t in zip(ordered, target.entries, strict=True)]
        found = []
        for variable, (name, _) in target.entries.items():
            words = (
                *self.rules.words.get(variable, (variable,)),
                *OTHER_WORDS.get((kind_of(target.kind), variable), ()),
                *OTHER_WORDS.get(("", variable), ()),
            )
            for word in words:
                if word in source.entries:
                    found.append((source.entries[word][0], name))
                    break
        return found

    def _join(self, source: Unit, target: Unit, how: str) -> bool:
        entries = self._entries(source, target)
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
            self._pair(t, s, how)
        return bool(entries)

    def _positional_is_ambiguous(self, source: Unit, target: Unit) -> bool:
        if not source.positional or target.positional or self.rules.by_order:
            return False
        return kind_of(target.kind) in ("batchnormalization", "layernormalization", "groupnormalization") and (
            len(target.entries) in (1, 3) if "batch" in kind_of(target.kind) else len(target.entries) == 1
        )

    def _fitting(self, source: Unit, target: Unit) -> bool:
        """Whether two layers can belong together: kinds that agree where both are known, and each entry in its place."""
        if source.kind and target.kind and kind_of(source.kind) != kind_of(target.kind):
            return False
        if len(source.entries) != len(target.entries) or {source.direction, target.direction} == {"forward", "backward"}:
            return False
        entries = self._entries(source, target)
        return len(entries) == len(target.entries) and all(self.fits(self._as_renamed(s), self.targets[t]) for s, t in entries)

    # By name

    def _by_name(self) -> None:
        sources, targets = self._open_units()
        by_path: dict[str, list[Unit]] = defaultdict(list)
        for unit in sources:
            by_path[canonical(unit.path)].append(unit)
        seen: dict[str, list[Unit]] = defaultdict(list)
        for unit in targets:
            seen[canonical(unit.path)].append(unit)
        for path, same in seen.items():
            found = by_path.get(path, [])
            if not found or same[0].numbered:
                continue
            if len(found) == 1 and len(same) == 1:
                self._join(found[0], same[0], "name")
            else:
                self._ambiguous(found, same)
        self._by_other_names()

    def _by_other_names(self) -> None:
        """What the file lists twice and the model holds once."""
        also = {name: target for target in self.targets.values() for name in (target.name, *target.also) if target.also}
        for source in self._open_sources():
            target = also.get(self.names[source])
            if target is not None and target.name in self.pairs:
                self.twins.append(Pair(target.name, source, "name"))
                self.used.add(source)

    def _by_path(self) -> None:
        """Layers with the same chosen name, where one side has a model around them that the other hasn't."""
        sources, targets = self._open_units()
        of, to = (by_leaf(units) for units in (sources, targets))
        for leaf, here in to.items():
            there = of.get(leaf, [])
            candidates = [
                (s, t)
                for s in there
                for t in here
                if nested(canonical(s.path), canonical(t.path))
                and not self._both_sided(s, t)
                and (not (s.automatic or t.automatic) or self._fitting(s, t))
            ]
            if not candidates:
                continue
            if len({id(s) for s, _ in candidates}) == len({id(t) for _, t in candidates}) == len(candidates):
                for s, t in candidates:
                    self._join(s, t, "path")
            else:
                self._ambiguous(
                    list({id(s): s for s, _ in candidates}.values()), list({id(t): t for _, t in candidates}.values())
                )

    def _by_spelling(self) -> None:
        """Chosen names that differ in what joins their parts only: `layer1.0.conv1` is `layer1_0_conv1` in Keras."""
        sources, targets = self._open_units()
        of: dict[str, list[Unit]] = defaultdict(list)
        to: dict[str, list[Unit]] = defaultdict(list)
        for units, found in ((sources, of), (targets, to)):
            for unit in units:
                if not unit.numbered:
                    found[re.sub(r"[/._]+", "_", canonical(unit.path))].append(unit)
        for name, here in to.items():
            if len(here) == len(of.get(name, ())) == 1:
                self._join(of[name][0], here[0], "path")

    def _may_join(self, source: Unit, target: Unit) -> bool:
        """Whether structure may decide: no two names that somebody chose contradict each other."""
        if self._both_sided(source, target):
            return False
        return source.automatic or target.automatic or source.leaf == target.leaf

    def _both_sided(self, source: Unit, target: Unit) -> bool:
        """Whether both lie in models that somebody named, and named differently: then the layers are not the same."""
        return bool(source.container) and bool(target.container) and source.container != target.container

    def _ambiguous(self, sources: Sequence[Unit], targets: Sequence[Unit]) -> None:
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

    # By structure

    def _by_structure(self) -> None:
        sources, targets = self._open_units()
        of: dict[tuple[str, ...], list[Unit]] = defaultdict(list)
        to: dict[tuple[str, ...], list[Unit]] = defaultdict(list)
        for unit in sources:
            of[unit.container].append(unit)
        for unit in targets:
            to[unit.container].append(unit)
        if set(of) == set(to):
            for container, units in to.items():
                self._structure(of[container], units)
        else:
            self._structure(sources, targets)

    def _structure(self, sources: list[Unit], targets: list[Unit]) -> None:
        whole = len(sources) == len(targets) and all(
            self._may_join(s, t) and self._fitting(s, t) for s, t in zip(sources, targets, strict=True)
        )
        by_shapes: dict[tuple[Any, ...], list[tuple[Unit, Unit]]] = defaultdict(list)
        if whole:
            for s, t in zip(sources, targets, strict=True):
                by_shapes[t.direction, shapes_of(t)].append((s, t))
            for together in by_shapes.values():
                if len(together) == 1 or same_creation_order(together) or same_own_names(together):
                    for s, t in together:
                        self._join(s, t, "structure")
                else:
                    self.asks_order = True
                    self._ambiguous([s for s, _ in together], [t for _, t in together])
            return
        # Something is left over on one side: only layers that fit nothing else but each other are sure.
        fitting = [(s, t) for s in sources for t in targets if self._fitting(s, t)]
        fits_of: dict[int, list[Unit]] = defaultdict(list)
        fits_to: dict[int, list[Unit]] = defaultdict(list)
        for s, t in fitting:
            fits_of[id(s)].append(t)
            fits_to[id(t)].append(s)
        sure = [(s, t) for s, t in fitting if len(fits_of[id(s)]) == 1 and len(fits_to[id(t)]) == 1 and self._may_join(s, t)]
        crossing = {
            id(unit)
            for s, t in sure
            for other, there in sure
            if (s.index - other.index) * (t.index - there.index) < 0
            for unit in (s, t)
        }
        for s, t in sure:
            if id(s) in crossing:
                self._ambiguous([s], [t])
            else:
                self._join(s, t, "structure")
        unsure: dict[tuple[tuple[int, ...], ...], tuple[dict[int, Unit], dict[int, Unit]]] = {}
        for s, t in fitting:
            if len(fits_of[id(s)]) > 1 or len(fits_to[id(t)]) > 1:
                group = unsure.setdefault(shapes_of(t), ({}, {}))
                group[0][id(s)] = s
                group[1][id(t)] = t
        for here, there in unsure.values():
            if not self.rules.by_order:
                self._ambiguous(list(here.values()), list(there.values()))
        for s, t in fitting:
            if not self._may_join(s, t) and len(fits_of[id(s)]) == 1 and len(fits_to[id(t)]) == 1:
                self.asks_order = True
                for name, _ in t.entries.values():
                    self.why_missing[name] = f"no {t.path!r} in the file; its {s.path!r} has the same shapes but another name"
                for name, _ in s.entries.values():
                    self.why_unused[name] = f"no {s.path!r} in the model; its {t.path!r} has the same shapes but another name"
        self._neighbours()

    def _neighbours(self) -> None:
        """One layer of a kind left on each side: most likely the same with other shapes. Paired, so that both shapes are told."""
        sources, targets = self._open_units()
        for t in targets:
            near = [
                s
                for s in sources
                if self._may_join(s, t)
                and self._entries(s, t)
                and len(s.entries) == len(t.entries)
                and (not s.kind or kind_of(s.kind) == kind_of(t.kind))
                and all(
                    len(self.sources[a].shape) == len(self.targets[b].shape) or self.targets[b].variable == "bias"
                    for a, b in self._entries(s, t)
                )
            ]
            alone = [o for o in targets if kind_of(o.kind) == kind_of(t.kind)]
            if len(near) == 1 and len(alone) == 1 and not any(name in self.why_unused for name, _ in near[0].entries.values()):
                self._join(near[0], t, "structure")

    # By order

    def _by_order(self) -> None:
        sources, targets = self._open_units()
        if not sources or not targets:
            return
        self.why_missing = {k: v for k, v in self.why_missing.items() if k not in self._open_targets()}
        if len(sources) == len(targets) and all(self._fitting(s, t) for s, t in zip(sources, targets, strict=True)):
            pairs = list(zip(sources, targets, strict=True))
        else:
            pairs = []
            groups: dict[str, list[Unit]] = defaultdict(list)
            for unit in targets:
                groups[kind_of(unit.kind)].append(unit)
            taken: set[int] = set()
            for units in groups.values():
                fitting = [s for s in sources if id(s) not in taken and any(self._fitting(s, t) for t in units)]
                if len(fitting) == len(units) and all(self._fitting(s, t) for s, t in zip(fitting, units, strict=True)):
                    pairs += zip(fitting, units, strict=True)
                    taken.update(id(s) for s in fitting)
                else:
                    self.problems.append(
                        f".by_order(): {len(units)} layers of the kind {units[0].kind or '?'} in the model, {len(fitting)} that "
                        "could be theirs in the file, not of the same shapes one by one"
                    )
        for s, t in pairs:
            self._join(s, t, "order")
        if pairs:
            self.notes.append(
                f"{len(pairs)} layers were matched by their order alone, as asked: "
                + shorten(f"{s.path} → {t.path}" for s, t in pairs)
            )

    # The outcome

    def _result(self) -> Match:
        self._say_unsure()
        missing = {name: self.why_missing.get(name) or self._why_missing(name) for name in self._open_targets()}
        unused = {name: self.why_unused.get(name) or self._why_unused(name) for name in self._open_sources()}
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
        of = units_of([self._as_renamed(n) for n in unused])
        found = []
        for t in to:
            fitting = [s for s in of if self._fitting(s, t)]
            if len(fitting) == 1 and sum(self._fitting(fitting[0], other) for other in to) == 1:
                found.append((t.path, fitting[0].path))
        return found[:3]
