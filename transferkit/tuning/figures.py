"""What a loss or metric gave: a number, or several by a metric that gives one for each class. Pure: NumPy only."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["figure", "figure_text"]


def figure(value: Any) -> Any:
    """The value as a float, or as a list of floats where there are several."""
    return np.asarray(value, "float64").tolist()


def figure_text(value: Any) -> str:
    """The value for people, with four digits."""
    return " ".join(f"{number:.4g}" for number in np.ravel(np.asarray(value, "float64")))
