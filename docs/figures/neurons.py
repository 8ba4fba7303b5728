"""Draws the figures of docs/neurons.md from the numbers that the code on that page computes.

    python docs/figures/neurons.py

Runs the page's Python blocks and draws what they leave behind, so the pictures can't say anything else than the page. Needs the
`plots` extra.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER.parent / "neurons.md"
DARK, BLUE, ORANGE, GREY = "#30343b", "#2166ac", "#d6604d", "#9aa0a6"

plt.rcParams.update(
    {
        "svg.hashsalt": "transferkit",  # the same file from the same numbers
        "svg.fonttype": "none",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": DARK,
        "lines.linewidth": 1.8,
    }
)


def numbers() -> dict[str, Any]:
    """What the page's code leaves in its namespace."""
    namespace: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        exec(block, namespace)
    return namespace


def save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def unit(page: dict[str, Any]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.9))
    every = 10
    left.plot([i * page["STEP"] for i in range(0, len(page["trace"]), every)], page["trace"][::every], color=BLUE)
    left.vlines(page["spikes"], 1.0, 1.35, color=DARK)
    left.axhline(1.0, color=GREY, linewidth=1, linestyle=":")
    left.set(xlabel="time (ms)", ylabel="voltage (threshold = 1)", title="spikes under a constant current of 1.5")
    right.plot(page["currents"], page["counted"], "o", color=BLUE, markersize=4, label="simulated cell")
    right.plot(page["currents"], page["exact"], color=BLUE, linewidth=1, label="closed form")
    right.plot(page["currents"], page["relu"], color=ORANGE, label="ReLU, scaled")
    right.set(xlabel="input current", ylabel="spikes per second", title="rate over input")
    right.legend(frameon=False)
    save(figure, "unit")


def backward(page: dict[str, Any]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.9))
    for name, label, colour in (
        ("backprop", "backpropagation", BLUE),
        ("alignment", "random feedback", ORANGE),
        ("top_only", "top layer only", GREY),
    ):
        left.plot(range(0, 600, 4), page[name][::4], color=colour, label=label)
    left.set(xlabel="step", ylabel="loss", title="three ways to send the error back", yscale="log")
    left.legend(frameon=False)
    right.plot(range(0, 600, 4), page["angles"][::4], color=ORANGE)
    right.axhline(90, color=GREY, linewidth=1, linestyle=":")
    right.set(xlabel="step", ylabel="degrees", title="random feedback against the gradient", ylim=(0, 100))
    save(figure, "backward")


def plasticity(page: dict[str, Any]) -> None:
    figure, axes = plt.subplots(figsize=(4.6, 3.6))
    cloud, path, component = page["cloud"][:250], page["path"][::20], page["component"]
    axes.scatter(*cloud.T, s=5, color=GREY, alpha=0.6, linewidths=0)
    axes.axline((0, 0), tuple(component), color=DARK, linewidth=1, linestyle="--", label="first principal component")
    axes.plot([p[0] for p in path], [p[1] for p in path], color=ORANGE, label="weights, from start to end")
    axes.plot(*path[0], "o", color=ORANGE, markersize=5)
    axes.annotate("", xy=path[-1], xytext=(0, 0), arrowprops={"arrowstyle": "->", "color": ORANGE, "lw": 2})
    axes.set(xlabel="first input", ylabel="second input", xlim=(-5, 5), ylim=(-2.5, 2.5), title="Oja's rule")
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    save(figure, "plasticity")


if __name__ == "__main__":
    page = numbers()
    unit(page)
    backward(page)
    plasticity(page)
