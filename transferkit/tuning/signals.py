"""Ctrl-C and SIGTERM while a run can be gone on with: the step is finished, a checkpoint is written, and the run ends.

Only in the main thread, which is the only one that Python lets handle signals. Imports the standard library and `errors`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from transferkit.errors import TrainingInterruptedError

__all__ = ["PREEMPTED", "Signals"]

#: What the process exits with on SIGTERM: EX_TEMPFAIL of sysexits.h, "try again later".
PREEMPTED = 75


class Signals:
    """For the time of the block, the first Ctrl-C or SIGTERM is noted while `waits` is set, and otherwise ends the block at once.

    The second one does what it would without this.

    Args:
        folder: Where the run can be gone on with, for the words.
        follows: Whether another worker decides when the run ends: this one then goes on until that one has left.
    """

    #: Seconds that one that follows goes on after a signal, should it be the only one that got it.
    PATIENCE = 15.0

    def __init__(self, folder: str, *, follows: bool = False) -> None:
        self._folder, self.follows = folder, follows
        self._before: dict[int, Any] = {}
        #: The signal that came, or None, and when it did.
        self.received: int | None = None
        self.since = 0.0
        #: Whether one that comes is noted, to be acted on by `stop`.
        self.waits = False

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before is not None and before is not signal.SIG_IGN:  # None: set by other than Python; ignored: to stay so
                    self._before[number] = before
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, before = self._before.popitem()
            signal.signal(number, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.received is not None:
            self._restore()
            os.kill(os.getpid(), number)
            return
        self.received, self.since = number, time.monotonic()
        if not self.waits and not self.follows:
            self.stop("the last checkpoint")

    @property
    def patient(self) -> bool:
        """Whether one that follows goes on."""
        return self.received is None or time.monotonic() - self.since < self.PATIENCE

    def stop(self, where: str) -> None:
        """Ends the run: Ctrl-C with a `TrainingInterruptedError`, SIGTERM with `SystemExit(75)`."""
        if self.received == signal.SIGTERM:
            print(f"SIGTERM: training ends; resume=True goes on from {where}", file=sys.stderr, flush=True)
            raise SystemExit(PREEMPTED)
        raise TrainingInterruptedError(
            "Training, until Ctrl-C.",
            found=f"an interrupt; the run can go on from {where}",
            fix=f"fit(…, checkpoint_dir={self._folder!r}, resume=True)",
        )
