"""Laws of matching over pairs of models made by hypothesis: no variable ever takes another layer's array without an error."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transferkit.weights.mapping import FileArray, ModelVariable, Rules
from transferkit.weights.matching import match

SHAPES = [(4, 4), (4, 4), (4, 8), (8, 4), (8, 8)]


@dataclass(frozen=True)
class Made:
    """A layer with the role it plays, which no name need tell."""

    role: int
    name: str
    shape: tuple[int, int]
    kind: str = "Dense"


def arrays(model: list[Made], kinds: bool) -> list[FileArray]:
    return [
        FileArray(f"{m.name}/{v}", shape, m.name, v, m.kind if kinds else "")
        for m in model
        for v, shape in (("kernel", m.shape), ("bias", m.shape[1:]))
    ]


def variables(model: list[Made]) -> list[ModelVariable]:
    return [
        ModelVariable(f"{m.name}/{v}", shape, m.name, v, m.kind)
        for m in model
        for v, shape in (("kernel", m.shape), ("bias", m.shape[1:]))
    ]


def wrong(saved: list[Made], model: list[Made], *, kinds: bool, rules: Rules | None = None) -> list[str]:
    """The variables that would take an array of another role."""
    of, to = {m.name: m.role for m in saved}, {m.name: m.role for m in model}
    found = match(arrays(saved, kinds), variables(model), rules)
    assert len({p.source for p in found.pairs}) == len(found.pairs)
    matched = {p.target for p in found.pairs}
    assert matched | set(found.missing) | set(found.skipped) == {v.name for v in variables(model)}
    assert {p.source for p in found.pairs} | set(found.unused) | set(found.left_out) == {a.name for a in arrays(saved, kinds)}
    return [p.target for p in found.pairs if of[p.source.rpartition("/")[0]] != to[p.target.rpartition("/")[0]]]


def changed(model: list[Made], changes: list[str], seed: int) -> list[Made]:
    """The model with layers reordered, nested, inserted, dropped and renamed."""
    rng = random.Random(seed)
    model = list(model)
    for number, change in enumerate(changes):
        if change == "reorder":
            rng.shuffle(model)
        elif change == "insert":
            place = rng.randint(0, len(model))
            model.insert(place, Made(1000 + number, f"new_{rng.choice('abc')}{number}", rng.choice(SHAPES)))
        elif change == "drop" and len(model) > 1:
            model.pop(rng.randrange(len(model)))
        elif change == "rename":
            place = rng.randrange(len(model))
            model[place] = replace(model[place], name=f"other_{number}x")
        elif change == "nest":
            around = rng.choice(["backbone", "functional_3", "sequential"])
            first, last = sorted((rng.randint(0, len(model)), rng.randint(0, len(model))))
            model[first:last] = [replace(m, name=f"{around}/{m.name}") for m in model[first:last]]
    return model


CHANGES = st.lists(st.sampled_from(["reorder", "insert", "drop", "rename", "nest"]), max_size=4)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=8), CHANGES, st.integers(0, 10_000), st.booleans())
def test_chosen_names_never_lead_astray(shapes: list[tuple[int, int]], changes: list[str], seed: int, kinds: bool) -> None:
    saved = [Made(i, f"layer{i}_{'qkv'[i % 3]}", shape) for i, shape in enumerate(shapes)]
    assert not wrong(saved, changed(saved, changes, seed), kinds=kinds)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.sampled_from(SHAPES), min_size=1, max_size=8),
    st.sampled_from(["insert", "drop", "nest", "none"]),
    st.integers(0, 50),
    st.integers(0, 50),
    st.integers(0, 10_000),
    st.booleans(),
)
def test_made_up_names_never_lead_astray(
    shapes: list[tuple[int, int]], change: str, start: int, other_start: int, seed: int, kinds: bool
) -> None:
    saved = [Made(i, "", shape) for i, shape in enumerate(shapes)]
    model = changed(saved, [change], seed) if change != "nest" else saved

    def named(layers: list[Made], first: int) -> list[Made]:
        return [replace(m, name="dense" if first + i == 0 else f"dense_{first + i}") for i, m in enumerate(layers)]

    saved, model = named(saved, start), named(model, other_start)
    if change == "nest":
        model = [replace(m, name=f"functional_7/{m.name}") for m in model]
    assert not wrong(saved, model, kinds=kinds)
    if change in ("none", "nest"):
        assert not match(arrays(saved, kinds), variables(model)).missing


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=8), st.integers(0, 10_000))
def test_the_order_of_chosen_names_changes_nothing(shapes: list[tuple[int, int]], seed: int) -> None:
    saved = [Made(i, f"layer{i}_a", shape) for i, shape in enumerate(shapes)]
    model = changed(saved, ["reorder"], seed)
    found = match(arrays(saved, True), variables(model))
    assert {(p.target, p.source) for p in found.pairs} == {(v.name, v.name) for v in variables(saved)}
    assert not found.problems


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(SHAPES), min_size=2, max_size=8), CHANGES, st.integers(0, 10_000))
def test_rules_leave_the_rest_as_it_is(shapes: list[tuple[int, int]], changes: list[str], seed: int) -> None:
    saved = [Made(i, f"layer{i}_a", shape) for i, shape in enumerate(shapes)]
    model = changed(saved, changes, seed)
    found = match(arrays(saved, True), variables(model), Rules(skip_in_model=(model[0].name,)))
    assert all(p.target.rpartition("/")[0] != model[0].name for p in found.pairs)
    assert not wrong(saved, model, kinds=True, rules=Rules(skip_in_model=(model[0].name,)))


@pytest.mark.slow
@settings(max_examples=5_000, deadline=None)
@given(
    st.lists(st.sampled_from(SHAPES), min_size=1, max_size=12),
    st.lists(st.sampled_from(["reorder", "insert", "drop", "rename", "nest"]), max_size=8),
    st.integers(0, 1_000_000),
    st.booleans(),
)
def test_chosen_names_never_lead_astray_at_length(
    shapes: list[tuple[int, int]], changes: list[str], seed: int, kinds: bool
) -> None:
    saved = [Made(i, f"layer{i}_{'qkv'[i % 3]}", shape) for i, shape in enumerate(shapes)]
    assert not wrong(saved, changed(saved, changes, seed), kinds=kinds)


@pytest.mark.slow
@settings(max_examples=5_000, deadline=None)
@given(
    st.lists(st.sampled_from(SHAPES), min_size=1, max_size=12),
    st.sampled_from(["insert", "drop", "none"]),
    st.integers(0, 50),
    st.integers(0, 50),
    st.integers(0, 1_000_000),
    st.booleans(),
)
def test_made_up_names_never_lead_astray_at_length(
    shapes: list[tuple[int, int]], change: str, start: int, other_start: int, seed: int, kinds: bool
) -> None:
    saved = [Made(i, "", shape) for i, shape in enumerate(shapes)]
    model = changed(saved, [change], seed)

    def named(layers: list[Made], first: int) -> list[Made]:
        return [replace(m, name="dense" if first + i == 0 else f"dense_{first + i}") for i, m in enumerate(layers)]

    assert not wrong(named(saved, start), named(model, other_start), kinds=kinds)
