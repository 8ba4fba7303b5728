"""How a plan wants its frozen layers computed: a value, checked as it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from transferkit.errors import PlanError, did_you_mean

__all__ = ["DTYPES", "EXTRACTIONS", "CacheSettings"]

DTYPES = ("float32", "float16", "bfloat16", "int8")
EXTRACTIONS = ("exact", "folded", "bfloat16")


@dataclass(frozen=True)
class CacheSettings:
    """What `FineTuner.cache` was told.

    Args:
        cache: True, False or a folder; None decides by what pays.
        dtype: What the training rows' features are kept in.
        views: How many times each training row is computed, with other random augmentation each time.
        noise: The standard deviation of noise on features, as a share of each feature's own.
        extraction: `exact`, `folded` or `bfloat16`.
    """

    cache: bool | str | None = None
    dtype: str = "float32"
    views: int = 1
    noise: float = 0.0
    extraction: str = "exact"

    def __post_init__(self) -> None:
        problems = []
        if not isinstance(self.cache, (bool, str, type(None))) or self.cache == "":
            problems.append(f"{self.cache!r}, which is neither True, False nor a folder")
        for name, known in (("dtype", DTYPES), ("extraction", EXTRACTIONS)):
            value = getattr(self, name)
            if value not in known:
                problems.append(f"{name}={value!r}{did_you_mean(str(value), known)}; there are {', '.join(map(repr, known))}")
        if not isinstance(self.views, int) or isinstance(self.views, bool) or self.views < 1:
            problems.append(f"views={self.views!r}; it must be a whole number above 0")
        if not _is_share(self.noise):
            problems.append(f"noise={self.noise!r}; it must be a number, at least 0")
        asked = [name for name, value in self.unusual().items() if value is not None]
        if self.cache is False and asked and not problems:
            problems.append(f"{' and '.join(asked)} of features that are not to be computed")
        if problems:
            raise PlanError(
                "Planning the feature cache.",
                found=problems,
                fix='.cache(True), .cache(False) or .cache("folder", dtype="float16")',
            )

    def unusual(self) -> dict[str, Any]:
        """What changes the numbers, by name; None where it is as usual."""
        usual = {one.name: one.default for one in fields(self) if one.name != "cache"}
        return {name: getattr(self, name) if getattr(self, name) != value else None for name, value in usual.items()}

    @property
    def wanted(self) -> bool | None:
        """Whether it must or must not be done; None leaves it open."""
        return None if self.cache is None else bool(self.cache)

    @property
    def folder(self) -> str | None:
        """Where features are kept for later runs."""
        return self.cache if isinstance(self.cache, str) else None


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
