"""Tables as results print them: aligned text for a terminal, HTML for a notebook. Standard library only, and pandas on demand."""

from __future__ import annotations

import abc
import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transferkit.errors import MissingExtraError

__all__ = ["Table", "Tabular"]


@dataclass(frozen=True)
class Table:
    """A titled table of strings with notes below it.

    Args:
        columns: The header. A column whose name starts with `>` is set flush right (the sign isn't shown).
        rows: Each as long as `columns`.
        title: One line above.
        notes: Lines below.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    notes: Sequence[str] = field(default=())

    def __str__(self) -> str:
        names = [column.lstrip(">") for column in self.columns]
        right = [column.startswith(">") for column in self.columns]
        widths = [max(len(str(row[i])) for row in [names, *self.rows]) for i in range(len(names))]

        def line(row: Sequence[str]) -> str:
            cells = (str(c).rjust(w) if r else str(c).ljust(w) for c, w, r in zip(row, widths, right, strict=True))
            return "  ".join(cells).rstrip()

        lines = [self.title] if self.title else []
        if names:
            lines += [line(names), "  ".join("─" * w for w in widths)]
        lines += [line(row) for row in self.rows]
        lines += list(self.notes)
        return "\n".join(lines)

    def to_html(self) -> str:
        """The table as a self-contained HTML fragment; every cell escaped."""
        right = [column.startswith(">") for column in self.columns]

        def cell(tag: str, text: str, flush_right: bool) -> str:
            style = ' style="text-align:right"' if flush_right else ' style="text-align:left"'
            return f"<{tag}{style}>{html.escape(str(text))}</{tag}>"

        parts = ["<div>"]
        if self.title:
            parts.append(f"<p><strong>{html.escape(self.title)}</strong></p>")
        header = "".join(cell("th", c.lstrip(">"), r) for c, r in zip(self.columns, right, strict=True))
        parts.append(f"<table><thead><tr>{header}</tr></thead><tbody>")
        for row in self.rows:
            parts.append("<tr>" + "".join(cell("td", c, r) for c, r in zip(row, right, strict=True)) + "</tr>")
        parts.append("</tbody></table>")
        parts.extend(f"<p>{html.escape(note)}</p>" for note in self.notes)
        parts.append("</div>")
        return "".join(parts)


class Tabular(abc.ABC):
    """A result that prints as a table: text in a terminal, HTML in a notebook; and gives its figures as JSON and to pandas."""

    @abc.abstractmethod
    def table(self) -> Table:
        """What it prints."""

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values."""

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().to_html()

    def to_json(self) -> str:
        """`to_dict` as JSON text; what isn't a finite number is null."""
        return json.dumps(_finite_or_none(self.to_dict()), indent=1)

    def records(self) -> list[dict[str, Any]]:
        """The rows of the table as dicts. Results that have figures give them as numbers, others the table's words."""
        names = [column.lstrip(">") for column in self.table().columns]
        return [dict(zip(names, row, strict=True)) for row in self.table().rows]

    def to_frame(self) -> Any:
        """`records` as a pandas frame.

        Raises:
            MissingExtraError: when pandas isn't installed.
        """
        try:
            import pandas  # type: ignore[import-untyped, unused-ignore]
        except ImportError as error:
            raise MissingExtraError.of(f"{type(self).__name__}.to_frame", package="pandas", extra="tables") from error
        return pandas.DataFrame(self.records())


def _finite_or_none(value: Any) -> Any:
    """JSON has no word for NaN and infinity."""
    if isinstance(value, dict):
        return {key: _finite_or_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
