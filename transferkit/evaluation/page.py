"""An evaluation as one HTML page: figures, tables and pictures in a single file that loads nothing and reads well on a phone.

Pictures are drawn where matplotlib is there and left out where it isn't; they are kept as vector graphics, so that they stay
sharp at any size and on paper.
"""

from __future__ import annotations

import base64
import html
import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from transferkit.errors import EvaluationError, MissingExtraError
from transferkit.evaluation import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from transferkit.evaluation.report import Evaluation

__all__ = ["page_of"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5b6670; --line: #d9dee3; --back: #ffffff; --card: #f6f8fa;
  --warn: #8a4b00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa5b1; --line: #38404a; --back: #14181d;
  --card: #1d232a; --warn: #f0b56b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 66rem; color: var(--ink); background: var(--back);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); } .note { color: var(--warn); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; margin: 1rem 0; }
.figure { background: var(--card); border-radius: .5rem; padding: .7rem .9rem; }
.figure b { display: block; font-size: 1.6rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.figure small { color: var(--soft); display: block; }
.span { position: relative; height: .35rem; background: var(--line); border-radius: .2rem; margin: .4rem 0 .2rem; }
.span i { position: absolute; top: 0; bottom: 0; background: #0072B2; border-radius: .2rem; min-width: 3px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: .8rem;
  align-items: start; }
.pictures img { width: 100%; height: auto; background: #fff; border-radius: .5rem; border: 1px solid var(--line); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); }
.rows { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .8rem; }
.rows figure { margin: 0; } .rows img { width: 100%; border-radius: .4rem; display: block; }
figcaption { font-size: .8rem; line-height: 1.3; margin-top: .3rem; }
details { margin: .8rem 0; } summary { cursor: pointer; }
@media print { body { max-width: none; padding: 0; } .pictures, .figures { break-inside: avoid; } }
"""


def page_of(evaluation: Evaluation, *, title: str, inputs: Any = None) -> str:
    """The page as HTML text."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="soft">{html.escape(evaluation.table().title)} · {evaluation.uncertainty.level:.0%} intervals</p>',
        _figures(evaluation),
    ]
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in evaluation.notes]
    pictures = _pictures(evaluation)
    if pictures:
        parts.append(f'<h2>Pictures</h2><div class="pictures">{"".join(pictures)}</div>')
    if evaluation.task.is_classification:
        parts.append(_section("By class", replace(evaluation.per_class().table(), title="").to_html()))
    if evaluation.rows.kind in ("binary", "multiclass"):
        if len(evaluation.classes) > 2:
            confused = evaluation.confusion().most_confused(8)
            listed = "".join(f"<li>{html.escape(a)} taken for {html.escape(b)}: {n:g}</li>" for a, b, n in confused)
            if listed:
                parts.append(f"<h2>Most often mixed up</h2><ul>{listed}</ul>")
        parts.append(_mistakes(evaluation, inputs))
    parts.append(_section("All figures", evaluation.table().to_html(), open_=False))
    parts.append(f'<p class="soft"><code>{html.escape(repr(evaluation.evaluator))}</code></p></body></html>')
    return "\n".join(part for part in parts if part)


def _section(title: str, content: str, *, open_: bool = True) -> str:
    if open_:
        return f'<h2>{html.escape(title)}</h2><div class="scroll">{content}</div>'
    return f'<details><summary>{html.escape(title)}</summary><div class="scroll">{content}</div></details>'


def _figures(evaluation: Evaluation) -> str:
    cards = []
    for one in evaluation.estimates.values():
        span, text = "", "no interval"
        if one.low is not None and one.high is not None:
            text = f"{one.low:.4g} – {one.high:.4g} · {one.method}"
            if one.greater_is_better and one.low >= 0 and one.high <= 1:
                left, width = 100 * one.low, 100 * (one.high - one.low)
                span = f'<div class="span"><i style="left:{left:.2f}%;width:{width:.2f}%"></i></div>'
        value = "not defined" if not np.isfinite(one.value) else f"{one.value:.4g}"
        cards.append(f'<div class="figure">{html.escape(one.name)}<b>{value}</b>{span}<small>{html.escape(text)}</small></div>')
    return f'<div class="figures">{"".join(cards)}</div>'


def _pictures(evaluation: Evaluation) -> list[str]:
    kind = evaluation.rows.kind
    if kind == "regression":
        wanted: list[tuple[str, Callable[..., Axes]]] = []
    else:
        wanted = [("ROC curve", plots.roc), ("precision and recall", plots.precision_recall), ("reliability", plots.reliability)]
        if kind != "multilabel":
            wanted.append(("confusion matrix", plots.confusion))
        if len(evaluation.classes) > 2:
            wanted.append(("F1 by class", plots.per_class))
    made = []
    for name, draw in wanted:
        try:
            made.append(f'<img alt="{html.escape(name)}" src="{_as_image(evaluation, draw)}">')
        except MissingExtraError:
            return []
        except EvaluationError:
            continue  # a picture of what isn't defined for these rows; the notes say so
    return made


def _as_image(evaluation: Evaluation, draw: Callable[..., Axes]) -> str:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError.of("Drawing a picture", package="matplotlib", extra="plots") from error
    # Small enough for its letters to be read at the width of a phone; bars grow with their number.
    height = min(max(3.8, 1.2 + 0.3 * len(evaluation.classes)), 9.0) if draw is plots.per_class else 3.8
    figure = Figure(figsize=(4.5, height), layout="constrained")
    draw(evaluation, figure.subplots())
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _mistakes(evaluation: Evaluation, inputs: Any) -> str:
    mistakes = evaluation.mistakes(12, inputs=inputs)
    if not len(mistakes):
        return "<h2>Mistakes</h2><p>None.</p>"
    pictures = [] if mistakes.inputs is None else _as_pictures(mistakes.inputs)
    if not pictures:
        return _section("Most confident mistakes", mistakes.table().to_html())
    # A picture of a few pixels is enlarged; its pixels should stay pixels then.
    crisp = ' style="image-rendering:pixelated"' if min(np.shape(mistakes.inputs)[1:3]) < 64 else ""
    shown = []
    for i, source in enumerate(pictures):
        words = f"row {mistakes.index[i]}: {mistakes.instead[i]} ({mistakes.confidence[i]:.0%}), labelled {mistakes.labels[i]}"
        safe = html.escape(words)
        shown.append(f'<figure><img{crisp} alt="{safe}" src="{source}"><figcaption>{safe}</figcaption></figure>')
    heading = f"Most confident mistakes, {len(mistakes)} of {mistakes.found}"
    return f'<h2>{heading}</h2><div class="rows">{"".join(shown)}</div>'


def _as_pictures(inputs: Any) -> list[str]:
    """PNG images of inputs that look like pictures (n, height, width, 1 or 3); none for others."""
    array = np.asarray(inputs) if hasattr(inputs, "shape") else None
    if array is None or array.ndim not in (3, 4) or min(array.shape[1:3]) < 8:
        return []
    if array.ndim == 4 and array.shape[-1] not in (1, 3):
        return []
    pixels = array.astype(np.float64)
    low, high = float(pixels.min()), float(pixels.max())
    # Whatever range the preprocessing left: 0 … 255, 0 … 1 and -1 … 1 as they are, others stretched.
    if low >= 0 and 1 < high <= 255:
        low, high = 0.0, 255.0
    elif low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif low >= -1 and high <= 1:
        low, high = -1.0, 1.0
    scaled = np.clip((pixels - low) / ((high - low) or 1) * 255, 0, 255).round().astype(np.uint8)
    step = max(1, min(array.shape[1:3]) // 160)
    return [_png(picture[::step, ::step]) for picture in scaled]


def _png(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    """An image (height, width[, 1 or 3]) as PNG (RFC 2083), which needs zlib and nothing else."""
    colour = pixels.ndim == 3 and pixels.shape[2] == 3
    height, width = pixels.shape[:2]
    lines = np.zeros((height, 1 + width * (3 if colour else 1)), dtype=np.uint8)  # every line begins with its filter: none
    lines[:, 1:] = pixels.reshape(height, -1)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2 if colour else 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode("ascii")
