"""Every error the library raises, and how its message is put together.

    TransferKitError
    ├── PlanError (ValueError)              a plan was given a value it can't hold
    ├── ModelError (ValueError)             a model can't be built, or isn't what the call needs
    ├── DataError (ValueError)              data that is empty, damaged, or doesn't fit the model
    ├── WeightsError (ValueError)           weights can't be loaded
    │   ├── WeightsNotFoundError (FileNotFoundError)   no file at that path
    │   ├── WeightsFileError (OSError)      the file is damaged, or no weights file at all
    │   ├── UnsafeFileError                 the file asks for something a weights file must not
    │   └── MatchError                      file and model don't fit together
    ├── TrainingError (RuntimeError)        a run had to stop
    ├── TrainingInterruptedError (KeyboardInterrupt)   Ctrl-C ended a run that can be gone on with
    ├── EvaluationError (ValueError)        a figure that can't be computed from what was given
    ├── PlacementError (RuntimeError)       a device or cluster that isn't there
    ├── StorageError (OSError)              a file of ours couldn't be written or read
    └── MissingExtraError (ImportError)     an optional package isn't installed

A message has four parts: what was asked, what was found (every problem at once), the likely cause, and the call that fixes it.
Imports the standard library only.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "DataError",
    "EvaluationError",
    "MatchError",
    "MissingExtraError",
    "ModelError",
    "PlacementError",
    "PlanError",
    "StorageError",
    "TrainingError",
    "TrainingInterruptedError",
    "TransferKitError",
    "UnsafeFileError",
    "WeightsError",
    "WeightsFileError",
    "WeightsNotFoundError",
    "did_you_mean",
    "shorten",
]


class TransferKitError(Exception):
    """The base of every error of the library.

    Args:
        asked: What the caller wanted, in a few words and with the names involved.
        found: What stood in the way: one sentence, or one for each problem.
        cause: The likely reason, where one can be told.
        fix: The call or the change that mends it.
    """

    def __init__(self, asked: str, *, found: str | Sequence[str], cause: str | None = None, fix: str | None = None) -> None:
        self.asked = asked
        self.found = (found,) if isinstance(found, str) else tuple(found)
        self.cause = cause
        self.fix = fix
        super().__init__(self._message())

    def _message(self) -> str:
        lines = [self.asked]
        if len(self.found) == 1:
            lines.append(f"  found: {self.found[0]}")
        else:
            lines.append(f"  found {len(self.found)} problems:")
            lines.extend(f"    - {problem}" for problem in self.found)
        if self.cause:
            lines.append(f"  likely cause: {self.cause}")
        if self.fix:
            lines.append(f"  to fix it: {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # The default would call the class with the finished message only, and fail for want of `found`.
        return (_rebuild, (type(self), self.asked, self.found, self.cause, self.fix))


def _rebuild(
    kind: type[TransferKitError], asked: str, found: Sequence[str], cause: str | None, fix: str | None
) -> TransferKitError:
    return kind(asked, found=found, cause=cause, fix=fix)


class PlanError(TransferKitError, ValueError):
    """A plan was given a value it can't hold."""


class ModelError(TransferKitError, ValueError):
    """A model can't be built, or isn't what the call needs."""


class DataError(TransferKitError, ValueError):
    """Data that is empty, damaged, or doesn't fit the model."""


class WeightsError(TransferKitError, ValueError):
    """Weights can't be loaded; nothing was changed."""


class WeightsNotFoundError(WeightsError, FileNotFoundError):
    """There is no file at the path."""


class WeightsFileError(WeightsError, OSError):
    """The file is damaged, or no weights file at all."""


class UnsafeFileError(WeightsError):
    """The file asks for something a weights file must not: to run code, open another file, or take more memory than it holds."""


class MatchError(WeightsError):
    """The file and the model don't fit together under the rules given."""


class TrainingError(TransferKitError, RuntimeError):
    """A run had to stop."""


class TrainingInterruptedError(TransferKitError, KeyboardInterrupt):
    """Ctrl-C ended a run that can be gone on with."""


class EvaluationError(TransferKitError, ValueError):
    """A figure can't be computed from what was given."""


class PlacementError(TransferKitError, RuntimeError):
    """A device or cluster isn't there, or can't be used as asked."""


class StorageError(TransferKitError, OSError):
    """A file of the library's own couldn't be written or read."""


class MissingExtraError(TransferKitError, ImportError):
    """An optional package isn't installed."""

    @classmethod
    def of(cls, feature: str, *, package: str, extra: str) -> MissingExtraError:
        """The error for `feature`, which needs `package` from the extra `extra`."""
        return cls(
            f"{feature} needs the package {package!r}.",
            found=f"{package!r} is not installed here",
            fix=f'pip install "transferkit[{extra}]"',
        )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Names in `known` close to `name` as a hint to append to a message; empty when none is close."""
    by_lower: dict[str, str] = {}
    for item in known:
        by_lower.setdefault(item.lower(), item)
    near = [by_lower[item] for item in difflib.get_close_matches(name.lower(), list(by_lower), n=3, cutoff=0.6)]
    return f" (did you mean {' or '.join(repr(n) for n in near)}?)" if near else ""


def shorten(names: Iterable[str], *, most: int = 8) -> str:
    """The names in quotes, with a count in place of those past `most`."""
    listed = list(names)
    shown = ", ".join(repr(n) for n in listed[:most])
    return shown if len(listed) <= most else f"{shown} and {len(listed) - most} more"
