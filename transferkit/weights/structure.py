"""Layers matched by kinds and shapes in order of creation, where names say nothing, or by order alone, where that is asked for.

Pure: standard library only.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from transferkit.errors import shorten
from transferkit.weights.names import kind_of
from transferkit.weights.pairing import Pairing
from transferkit.weights.units import Unit, same_creation_order, same_own_names, shapes_of

__all__ = ["by_order", "by_structure"]


def by_structure(state: Pairing) -> None:
    """Joins layers that their kinds and shapes, in order of creation, leave one way to join."""
    sources, targets = state.open_units()
    of: dict[tuple[str, ...], list[Unit]] = defaultdict(list)
    to: dict[tuple[str, ...], list[Unit]] = defaultdict(list)
    for unit in sources:
        of[unit.container].append(unit)
    for unit in targets:
        to[unit.container].append(unit)
    if set(of) == set(to):
        for container, units in to.items():
            _structure(state, of[container], units)
    else:
        _structure(state, sources, targets)


def _structure(state: Pairing, sources: list[Unit], targets: list[Unit]) -> None:
    whole = len(sources) == len(targets) and all(
        state.may_join(s, t) and state.fitting(s, t) for s, t in zip(sources, targets, strict=True)
    )
    by_shapes: dict[tuple[Any, ...], list[tuple[Unit, Unit]]] = defaultdict(list)
    if whole:
        for s, t in zip(sources, targets, strict=True):
            by_shapes[t.direction, shapes_of(t)].append((s, t))
        for together in by_shapes.values():
            if len(together) == 1 or same_creation_order(together) or same_own_names(together):
                for s, t in together:
                    state.join(s, t, "structure")
            else:
                state.asks_order = True
                state.ambiguous([s for s, _ in together], [t for _, t in together])
        return
    # Something is left over on one side: only layers that fit nothing else but each other are sure.
    fitting = [(s, t) for s in sources for t in targets if state.fitting(s, t)]
    fits_of: dict[int, list[Unit]] = defaultdict(list)
    fits_to: dict[int, list[Unit]] = defaultdict(list)
    for s, t in fitting:
        fits_of[id(s)].append(t)
        fits_to[id(t)].append(s)
    sure = [(s, t) for s, t in fitting if len(fits_of[id(s)]) == 1 and len(fits_to[id(t)]) == 1 and state.may_join(s, t)]
    crossing = {
        id(unit)
        for s, t in sure
        for other, there in sure
        if (s.index - other.index) * (t.index - there.index) < 0
        for unit in (s, t)
    }
    for s, t in sure:
        if id(s) in crossing:
            state.ambiguous([s], [t])
        else:
            state.join(s, t, "structure")
    unsure: dict[tuple[tuple[int, ...], ...], tuple[dict[int, Unit], dict[int, Unit]]] = {}
    for s, t in fitting:
        if len(fits_of[id(s)]) > 1 or len(fits_to[id(t)]) > 1:
            group = unsure.setdefault(shapes_of(t), ({}, {}))
            group[0][id(s)] = s
            group[1][id(t)] = t
    for here, there in unsure.values():
        if not state.rules.by_order:
            state.ambiguous(list(here.values()), list(there.values()))
    for s, t in fitting:
        if not state.may_join(s, t) and len(fits_of[id(s)]) == 1 and len(fits_to[id(t)]) == 1:
            state.asks_order = True
            for name, _ in t.entries.values():
                state.why_missing[name] = f"no {t.path!r} in the file; its {s.path!r} has the same shapes but another name"
            for name, _ in s.entries.values():
                state.why_unused[name] = f"no {s.path!r} in the model; its {t.path!r} has the same shapes but another name"
    _neighbours(state)


def _neighbours(state: Pairing) -> None:
    """One layer of a kind left on each side: most likely the same with other shapes. Paired, so that both shapes are told."""
    sources, targets = state.open_units()
    for t in targets:
        near = [
            s
            for s in sources
            if state.may_join(s, t)
            and state.entries(s, t)
            and len(s.entries) == len(t.entries)
            and (not s.kind or kind_of(s.kind) == kind_of(t.kind))
            and all(
                len(state.sources[a].shape) == len(state.targets[b].shape) or state.targets[b].variable == "bias"
                for a, b in state.entries(s, t)
            )
        ]
        alone = [o for o in targets if kind_of(o.kind) == kind_of(t.kind)]
        if len(near) == 1 and len(alone) == 1 and not any(name in state.why_unused for name, _ in near[0].entries.values()):
            state.join(near[0], t, "structure")


def by_order(state: Pairing) -> None:
    """Joins what is left by its order alone, where kinds and shapes agree one by one; says so."""
    sources, targets = state.open_units()
    if not sources or not targets:
        return
    open_targets = set(state.open_targets())
    state.why_missing = {k: v for k, v in state.why_missing.items() if k not in open_targets}
    if len(sources) == len(targets) and all(state.fitting(s, t) for s, t in zip(sources, targets, strict=True)):
        pairs = list(zip(sources, targets, strict=True))
    else:
        pairs = []
        groups: dict[str, list[Unit]] = defaultdict(list)
        for unit in targets:
            groups[kind_of(unit.kind)].append(unit)
        taken: set[int] = set()
        for units in groups.values():
            fitting = [s for s in sources if id(s) not in taken and any(state.fitting(s, t) for t in units)]
            if len(fitting) == len(units) and all(state.fitting(s, t) for s, t in zip(fitting, units, strict=True)):
                pairs += zip(fitting, units, strict=True)
                taken.update(id(s) for s in fitting)
            else:
                state.problems.append(
                    f".by_order(): {len(units)} layers of the kind {units[0].kind or '?'} in the model, {len(fitting)} that "
                    "could be theirs in the file, not of the same shapes one by one"
                )
    for s, t in pairs:
        state.join(s, t, "order")
    if pairs:
        state.notes.append(
            f"{len(pairs)} layers were matched by their order alone, as asked: "
            + shorten(f"{s.path} → {t.path}" for s, t in pairs)
        )
