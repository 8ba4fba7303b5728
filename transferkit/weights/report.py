"""What a load does, or would do: each variable of the model and each array of the file with what became of it and why.

Imports the table and, to look at a model again, its variables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transferkit._table import Table
from transferkit.errors import shorten
from transferkit.weights.variables import digests_of

__all__ = ["LoadReport", "LoadedTensor", "Verification", "by_layer_and_reason"]

_STATUS = ("loaded", "adapted", "skipped", "missing", "misfit")
_MOST_ROWS = 60


@dataclass(frozen=True)
class LoadedTensor:
    """One variable of the model.

    Args:
        name: Its path in the model.
        layer: The path of its layer as the model lists it.
        shape: Its shape.
        dtype: Its dtype.
        status: `loaded` as it stands in the file, `adapted`, `skipped` by a rule, `missing` in the file, or `misfit` when what
            the file has can't become this variable.
        source: The array of the file it takes, or empty.
        source_shape: That array's shape.
        source_dtype: That array's dtype.
        how: How the two were matched: `rule`, `name`, `path`, `structure` or `order`.
        why: What was adapted, or the reason for not loading.
        digest: A digest of the values the variable holds after loading; empty where nothing is loaded.
    """

    name: str
    layer: str
    shape: tuple[int, ...]
    dtype: str
    status: str
    source: str = ""
    source_shape: tuple[int, ...] = ()
    source_dtype: str = ""
    how: str = ""
    why: str = ""
    digest: str = ""

    @property
    def size(self) -> int:
        """The number of parameters."""
        size = 1
        for n in self.shape:
            size *= n
        return size

    @property
    def arrives(self) -> bool:
        """Whether the variable takes values from the file."""
        return self.status in ("loaded", "adapted")


@dataclass(frozen=True)
class Verification:
    """Whether a model still holds what was loaded.

    Args:
        checked: How many variables were compared.
        changed: Those that hold other values now, by path.
        absent: Those the model doesn't have.
    """

    checked: int
    changed: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every variable was there with the values that were loaded."""
        return not self.changed and not self.absent

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        if self.ok:
            return f"{self.checked} variables hold what was loaded."
        parts = [f"{self.checked} variables checked."]
        if self.changed:
            parts.append(f"{len(self.changed)} hold other values now: {shorten(self.changed)}.")
        if self.absent:
            parts.append(f"{len(self.absent)} aren't in this model: {shorten(self.absent)}.")
        return " ".join(parts)

    def _repr_html_(self) -> str:
        return Table((), (), title=str(self)).to_html()

    def to_dict(self) -> dict[str, Any]:
        """The verification as plain values."""
        return {"ok": self.ok, "checked": self.checked, "changed": list(self.changed), "absent": list(self.absent)}


@dataclass(frozen=True)
class LoadReport:
    """What `match` found and `load` does.

    Args:
        path: The file.
        origin: Its format and what wrote it.
        model: The model's name.
        tensors: Every variable of the model, in its order.
        unused: The arrays of the file that go nowhere, each with the reason; left out by a rule or not.
        problems: What stands in the way of loading, one sentence each. Empty when `load` will do it.
        notes: What is worth knowing though nothing is wrong.
        rules: Calls that would settle the problems.
        applied: Whether the model was changed accordingly. Two reports are equal without regard to it.
    """

    path: str
    origin: str
    model: str
    tensors: tuple[LoadedTensor, ...] = field(repr=False)
    unused: Mapping[str, str] = field(repr=False)
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    applied: bool = field(default=False, compare=False)

    @property
    def ok(self) -> bool:
        """Whether the file loads into the model under the rules given."""
        return not self.problems

    def __bool__(self) -> bool:
        return self.ok

    def __getitem__(self, name: str) -> LoadedTensor:
        """What became of one variable, by its path."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise KeyError(name)

    def _with(self, *statuses: str) -> tuple[LoadedTensor, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.status in statuses)

    @property
    def loaded(self) -> tuple[LoadedTensor, ...]:
        """The variables that take their values as the file has them."""
        return self._with("loaded")

    @property
    def adapted(self) -> tuple[LoadedTensor, ...]:
        """The variables whose values are made to fit; `why` says how."""
        return self._with("adapted")

    @property
    def missing(self) -> tuple[LoadedTensor, ...]:
        """The variables for which the file has nothing, or nothing that fits."""
        return self._with("missing", "misfit")

    @property
    def skipped(self) -> tuple[LoadedTensor, ...]:
        """The variables a rule leaves alone."""
        return self._with("skipped")

    @property
    def coverage(self) -> float:
        """The share of the model's parameters that take values from the file, 0 to 1."""
        total = sum(tensor.size for tensor in self.tensors)
        return sum(tensor.size for tensor in self.tensors if tensor.arrives) / total if total else 0.0

    @property
    def layers(self) -> Mapping[str, float]:
        """The same share for each layer of the model that has weights, in its order."""
        return {
            layer: sum(t.size for t in tensors if t.arrives) / max(sum(t.size for t in tensors), 1)
            for layer, tensors in self._by_layer().items()
        }

    def _by_layer(self) -> dict[str, list[LoadedTensor]]:
        found: dict[str, list[LoadedTensor]] = {}
        for tensor in self.tensors:
            found.setdefault(tensor.layer, []).append(tensor)
        return found

    def verify(self, model: Any) -> Verification:
        """Compares the values a model holds with the digests of what was loaded. Changes nothing.

        Args:
            model: The Keras model given to `load`, or one of the same structure.
        """
        held = digests_of(model)
        if not set(held) >= {tensor.name for tensor in self.tensors} and len(held) == len(self.tensors):
            # The same model built again: names that Keras makes up count on, the order of the variables stays.
            held = dict(zip((tensor.name for tensor in self.tensors), held.values(), strict=True))
        expected = {tensor.name: tensor.digest for tensor in self.tensors if tensor.digest}
        return Verification(
            checked=len(expected),
            changed=tuple(name for name, digest in expected.items() if name in held and held[name] != digest),
            absent=tuple(name for name in expected if name not in held),
        )

    # For people

    def _row(self, layer: str, tensors: list[LoadedTensor]) -> tuple[str, str, str, str, str]:
        size = sum(t.size for t in tensors)
        arriving = sum(t.size for t in tensors if t.arrives)
        verb = "loaded" if self.applied else "loads" if self.ok else "fits"
        statuses = [verb if s == "loaded" else s for s in _STATUS if any(t.status == s for t in tensors)]
        sources = dict.fromkeys(t.source.rpartition("/")[0] or t.source for t in tensors if t.source)
        hows = dict.fromkeys(t.how for t in tensors if t.arrives)
        what = ", ".join(statuses) + (f" by {', '.join(hows)}" if hows else "")
        whys = dict.fromkeys(t.why for t in tensors if t.why)
        if whys:
            what += f": {'; '.join(whys)}"
        count = f"{size:,}" if arriving in (0, size) else f"{arriving:,} of {size:,}"
        return layer or "(the model itself)", shorten_plain(sources), "+".join(str(t.shape) for t in tensors[:2]), count, what

    def __str__(self) -> str:
        by_layer = self._by_layer()
        plain = [layer for layer, tensors in by_layer.items() if all(t.status == "loaded" and t.how == "name" for t in tensors)]
        hidden = set(plain[_MOST_ROWS // 2 :]) if len(by_layer) > _MOST_ROWS else set()
        table = self._table({layer: tensors for layer, tensors in by_layer.items() if layer not in hidden}, len(hidden))
        return str(table)

    def _repr_html_(self) -> str:
        return self._table(self._by_layer(), 0).to_html()

    def _table(self, by_layer: Mapping[str, list[LoadedTensor]], hidden: int) -> Table:
        verb = "loaded" if self.applied else "loads" if self.ok else "does not load"
        notes = [f"… and {hidden} more layers, loaded by name."] if hidden else []
        notes.append(self.summary())
        left = [f"  {line}" for line in by_layer_and_reason(self.unused)]
        if left:
            notes += ["Not used from the file:", *left[:_MOST_ROWS]]
            notes += [f"  … and {len(left) - _MOST_ROWS} more"] if len(left) > _MOST_ROWS else []
        notes += [f"Note: {note}" for note in self.notes]
        if self.problems:
            notes += [f"Problems ({len(self.problems)}):", *(f"  - {problem}" for problem in self.problems)]
        if self.rules:
            notes += ["Rules that fit:", *(f"  {rule}" for rule in self.rules)]
        return Table(
            ("layer", "from the file's", "shapes", ">parameters", "what"),
            [self._row(layer, tensors) for layer, tensors in by_layer.items()],
            title=f"{self.path} ({self.origin}) → {self.model!r}: {verb}",
            notes=notes,
        )

    def summary(self) -> str:
        """One line: how many layers and parameters take values from the file."""
        shares = list(self.layers.values())
        whole, part = sum(s == 1 for s in shares), sum(0 < s < 1 for s in shares)
        total = sum(t.size for t in self.tensors)
        arriving = sum(t.size for t in self.tensors if t.arrives)
        return (
            f"{whole} of {len(shares)} layers"
            + (f" and {part} in part" if part else "")
            + f", {arriving:,} of {total:,} parameters ({self.coverage:.1%})."
            + ("" if self.ok else f" It can't be loaded so: {len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}.")
        )

    # For programs

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return {
            "path": self.path,
            "origin": self.origin,
            "model": self.model,
            "ok": self.ok,
            "applied": self.applied,
            "coverage": self.coverage,
            "layers": dict(self.layers),
            "tensors": [
                {
                    "name": t.name,
                    "layer": t.layer,
                    "shape": list(t.shape),
                    "dtype": t.dtype,
                    "status": t.status,
                    "source": t.source,
                    "source_shape": list(t.source_shape),
                    "source_dtype": t.source_dtype,
                    "how": t.how,
                    "why": t.why,
                    "digest": t.digest,
                }
                for t in self.tensors
            ],
            "unused": dict(self.unused),
            "problems": list(self.problems),
            "notes": list(self.notes),
            "rules": list(self.rules),
        }

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=1)


def by_layer_and_reason(reasons: Mapping[str, str]) -> list[str]:
    """One line for each layer rather than for each array, with the reason its arrays share."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for name, why in reasons.items():
        layer, _, variable = name.rpartition("/")
        grouped.setdefault((layer, why), []).append(variable)
    lines = []
    for (layer, why), variables in grouped.items():
        named = f"{layer!r} ({', '.join(variables)})" if layer else ", ".join(map(repr, variables))
        lines.append(f"{named}: {why}")
    return lines


def shorten_plain(names: Mapping[str, None]) -> str:
    """Names for a table cell: the first two and a count."""
    listed = list(names)
    return ", ".join(listed[:2]) + (f" and {len(listed) - 2} more" if len(listed) > 2 else "")
