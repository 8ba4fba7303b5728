"""Which array of a file belongs to which variable of a model: names, shapes and rules in, a mapping with its reasons out.

Arrays and variables are matched a layer at a time. First by the rules (`map`), then by name, then by the path below a model that
one side nests and the other doesn't, then by structure. A name counts as evidence only when somebody chose it: `dense_5` says no
more than "a Dense layer made after five others", so such layers are matched by structure, the kinds of layers in order of
creation with their shapes, and only where that leaves one way to do it. What two ways would fit is left to the caller's rules.

Here are the rules and the names; `structure` has the rest, `pairing` what both have decided so far. What goes in and out is in
`mapping`, layers as they are compared in `units`. Pure: no file, no Keras; standard library only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from transferkit.errors import did_you_mean, shorten
from transferkit.weights.mapping import FileArray, Match, ModelVariable, Pair, Rules
from transferkit.weights.names import canonical, covers
from transferkit.weights.pairing import Fits, Pairing
from transferkit.weights.structure import by_order, by_structure
from transferkit.weights.units import Unit, by_leaf, nested, units_of

__all__ = ["match"]


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


class _Matching(Pairing):
    def run(self) -> Match:
        self._leave_out()
        self._by_map()
        self._by_name()
        self._by_spelling()
        self._by_path()
        by_structure(self)
        if self.rules.by_order:
            by_order(self)
        return self.result()

    # Names and rules

    def _leave_out(self) -> None:
        rules = self.rules
        if not (rules.only or rules.skip or rules.skip_in_model or rules.skip_in_file or rules.rename):
            return
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
            if not any(re.search(pattern, self.plain(source)) for source in self.sources.values()) and len(rules.rename) == 1:
                self.problems.append(f".rename({pattern!r}, …) matches no name of the file")
        self._twice()

    def _twice(self) -> None:
        by_name: dict[str, list[str]] = defaultdict(list)
        for source, name in self.names.items():
            by_name[name].append(source)
        for name, together in by_name.items():
            if len(together) > 1 and self.rules.rename:
                self.problems.append(f"{len(together)} arrays are renamed to {name!r}: {shorten(together)}")

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
                self.pair(wanted[0], given[0], "rule")
                continue
            to = units_of([self.targets[n] for n in wanted])
            of = units_of([self.as_renamed(n) for n in given])
            inner_to = {unit.path[len(target) :]: unit for unit in to}
            inner_of = {unit.path[len(source) :]: unit for unit in of}
            if set(inner_to) != set(inner_of) and len(to) == len(of) == 1:
                inner_of = {next(iter(inner_to)): of[0]}
            for inner, unit in inner_to.items():
                if inner in inner_of:
                    self.join(inner_of[inner], unit, "rule")
            # Layers of either side without a counterpart stay open, and are reported as such.

    # By name

    def _by_name(self) -> None:
        sources, targets = self.open_units()
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
                self.join(found[0], same[0], "name")
            else:
                self.ambiguous(found, same)
        self._by_other_names()

    def _by_other_names(self) -> None:
        """What the file lists twice and the model holds once."""
        also = {name: target for target in self.targets.values() for name in (target.name, *target.also) if target.also}
        for source in self.open_sources():
            target = also.get(self.names[source])
            if target is not None and target.name in self.pairs:
                self.twins.append(Pair(target.name, source, "name"))
                self.used.add(source)

    def _by_path(self) -> None:
        """Layers with the same chosen name, where one side has a model around them that the other hasn't."""
        sources, targets = self.open_units()
        of, to = (by_leaf(units) for units in (sources, targets))
        for leaf, here in to.items():
            there = of.get(leaf, [])
            candidates = [
                (s, t)
                for s in there
                for t in here
                if nested(canonical(s.path), canonical(t.path))
                and not self.both_sided(s, t)
                and (not (s.automatic or t.automatic) or self.fitting(s, t))
            ]
            if not candidates:
                continue
            if len({id(s) for s, _ in candidates}) == len({id(t) for _, t in candidates}) == len(candidates):
                for s, t in candidates:
                    self.join(s, t, "path")
            else:
                self.ambiguous(list({id(s): s for s, _ in candidates}.values()), list({id(t): t for _, t in candidates}.values()))

    def _by_spelling(self) -> None:
        """Chosen names that differ in what joins their parts only: `layer1.0.conv1` is `layer1_0_conv1` in Keras."""
        sources, targets = self.open_units()
        of: dict[str, list[Unit]] = defaultdict(list)
        to: dict[str, list[Unit]] = defaultdict(list)
        for units, found in ((sources, of), (targets, to)):
            for unit in units:
                if not unit.numbered:
                    found[re.sub(r"[/._]+", "_", canonical(unit.path))].append(unit)
        for name, here in to.items():
            if len(here) == len(of.get(name, ())) == 1:
                self.join(of[name][0], here[0], "path")
